"""Worker, writer and server of chapter 87: what must hold however clients behave, with faults planted where a check could be blind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

from lmbook.batching import Engine, Event, Request
from lmbook.core import LmbookError
from lmbook.generation import SamplingConfig, generate
from lmbook.streaming import (
    Answer,
    Fields,
    Piece,
    Problem,
    Server,
    ServerConfig,
    ServingError,
    Worker,
    Writer,
    checked_text,
    listen,
    parsed,
    read_keys,
    send_events,
    send_start,
    send_whole,
    to_json,
    write_texts,
)  # fmt: skip
from lmbook.tokenization import BPE, ByteTokenizer
from lmbook.transformer import Transformer, TransformerConfig

pytest.importorskip("uvicorn")


def small(vocab_size: int, seed: int = 0, context: int = 64) -> Transformer:
    "A model whose scores differ enough that no last bit decides."
    torch.manual_seed(seed)
    parts = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False}
    model = Transformer(TransformerConfig(vocab_size, d_model=32, n_layer=2, n_head=4, context_length=context, **parts)).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.3)
    return model


TOKENIZER = ByteTokenizer()
MODEL = small(TOKENIZER.vocab_size)
BPE_TOKENIZER = BPE.train(["The goat é and the 长夜漫漫 goat 🎉 ate the café. " * 3], 285)


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    "Wait for something that happens in another thread."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# ---------------------------------------------------------------- the writer


def pieces(ids: list[int], tokenizer=BPE_TOKENIZER, finish: str = "length", **options) -> tuple[list[Piece], Writer]:
    writer, out = Writer(tokenizer, **options), []
    for n, id in enumerate(ids, 1):
        out.append(writer.take(Event(0, id, -0.5, ((id, -0.5), (0, -1.5)), finish if n == len(ids) else None)))
        if out[-1].finish:
            break
    return out, writer


@pytest.mark.parametrize("text", ["", "The goat", "café 🎉 长夜", "🎉👩‍👩‍👧", "a\n\nb"])
def test_pieces_make_the_text_and_never_half_a_character(text):
    ids = BPE_TOKENIZER.encode(text)
    if not ids:
        return
    found, writer = pieces(ids)
    assert "".join(p.text for p in found) == text and writer.count == len(ids)
    assert all("\ufffd" not in p.text for p in found)


def test_half_a_character_at_the_end_is_shown_as_such():
    found, _ = pieces([TOKENIZER.encode("é")[0]], TOKENIZER)
    assert found[-1].text == "\ufffd"


@pytest.mark.parametrize("stop", [("goat",), ("t 🎉",), ("ate the",), ("nothing of this",), ("长夜", "goat é")])
def test_a_stop_string_that_straddles_tokens_is_never_shown(stop):
    text = "The goat é and the 长夜漫漫 goat 🎉 ate the café."
    found, _ = pieces(BPE_TOKENIZER.encode(text), stop=stop)
    at = min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))
    assert "".join(p.text for p in found) == text[:at]
    assert found[-1].finish == ("stop" if at < len(text) else "length")


def test_ends_are_no_text_and_no_tokens():
    eos = BPE_TOKENIZER.eos_id
    found, writer = pieces([*BPE_TOKENIZER.encode("goat"), eos], finish="stop", ends=(eos,), logprobs=1)
    assert "".join(p.text for p in found) == "goat" and writer.count == len(BPE_TOKENIZER.encode("goat")) + 1
    assert sum(len(p.tokens) for p in found) == len(BPE_TOKENIZER.encode("goat"))


@pytest.mark.parametrize("stop", [(), ("ate",)])
def test_tokens_are_told_with_their_text(stop):
    ids = BPE_TOKENIZER.encode("The goat é 🎉 ate the café.")
    found, _ = pieces(ids, stop=stop, logprobs=2)
    sent = 0
    for piece in found:
        for token in piece.tokens:
            assert token["offset"] < sent + len(piece.text)
        sent += len(piece.text)
    told = [token for piece in found for token in piece.tokens]
    text = "".join(p.text for p in found)
    assert bytes(b for token in told for b in token["bytes"]).decode("utf-8", "ignore").startswith(text)
    assert [token["offset"] for token in told] == sorted(token["offset"] for token in told)
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] == -0.5 for token in told)


def test_a_probability_of_zero_is_a_number_of_json():
    writer = Writer(TOKENIZER, logprobs=1)
    piece = writer.take(Event(0, 70, float("-inf"), ((71, float("-inf")),), "length"))
    assert json.loads(to_json(piece.tokens))[0]["logprob"] == -9999.0


# ---------------------------------------------------------------- the worker


@contextmanager
def working(make: Callable[[], object] = lambda: Engine(MODEL), places: int = 8) -> Iterator[tuple[Worker, asyncio.AbstractEventLoop]]:
    "A worker and an event loop in a thread."
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    worker = Worker(make, places)
    worker.start(loop)
    try:
        yield worker, loop
    finally:
        worker.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def asked(prompt: str = "ab", n: int = 12, **settings) -> Request:
    return Request(
        tuple(TOKENIZER.encode(prompt)), SamplingConfig(**({"max_new_tokens": n, "temperature": 0, "on_full": "stop"} | settings))
    )


async def gather(worker: Worker, *requests: Request) -> list[str]:
    texts = [""] * len(requests)
    async for batch in write_texts(worker, requests, [Writer(TOKENIZER) for _ in requests]):
        for index, piece in batch:
            texts[index] += piece.text
    return texts


def do(loop: asyncio.AbstractEventLoop, work) -> object:
    return asyncio.run_coroutine_threadsafe(work, loop).result(60)


def alone(request: Request) -> str:
    return TOKENIZER.decode(generate(MODEL, list(request.ids), request.sampling)[0])


def test_every_text_is_what_it_is_alone():
    requests = [
        asked("ab", 9),
        asked("wxyz", 20, temperature=1.0, seed=3),
        asked("q", 1),
        asked("a longer prompt", 15, temperature=0.7, seed=5),
    ]
    with working() as (worker, loop):
        assert do(loop, gather(worker, *requests)) == [alone(request) for request in requests]
        assert worker.open == 0


def test_all_texts_of_a_client_have_a_place_or_none():
    with working(places=3) as (worker, loop):
        with pytest.raises(Problem) as why:
            do(loop, gather(worker, *[asked()] * 4))
        assert why.value.status == 429 and int(why.value.headers["Retry-After"]) >= 1 and worker.open == 0
        assert len(do(loop, gather(worker, *[asked()] * 3))) == 3


def test_a_client_that_leaves_frees_its_place():
    async def leave(worker: Worker) -> None:
        texts = write_texts(worker, [asked(n=50)] * 2, [Writer(TOKENIZER)] * 2)
        await anext(texts)
        await texts.aclose()

    with working(places=2) as (worker, loop):
        do(loop, leave(worker))
        until(lambda: worker.open == 0)
        assert worker.engine.stats().tokens_written < 100
        assert do(loop, gather(worker, asked())) == [alone(asked())]


def test_a_stop_string_ends_the_work_too():
    async def stopped(worker: Worker) -> str:
        text, whole = "", alone(asked(n=50))
        async for batch in write_texts(worker, [asked(n=50)], [Writer(TOKENIZER, stop=(whole[5],))]):
            for _, piece in batch:
                text += piece.text
        return text

    with working() as (worker, loop):
        whole = alone(asked(n=50))
        assert do(loop, stopped(worker)) == whole[: whole.index(whole[5])]
        until(lambda: worker.open == 0)
        assert worker.engine.stats().tokens_written < 50


class Failing:
    "An engine that breaks at its third step."

    made = 0

    def __init__(self) -> None:
        self.inner, self.left = Engine(MODEL), 3 if Failing.made == 0 else 10**9
        Failing.made += 1

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def step(self) -> list[Event]:
        self.left -= 1
        if not self.left:
            raise LmbookError("planted")
        return self.inner.step()


def test_an_engine_that_breaks_is_replaced():
    Failing.made = 0
    with working(Failing) as (worker, loop):
        with pytest.raises(Problem) as why:
            do(loop, gather(worker, asked(), asked("cd")))
        assert why.value.status == 500 and "planted" not in why.value.body["error"]["message"]
        assert do(loop, gather(worker, asked())) == [alone(asked())]
        assert worker.failures == 1 and worker.alive


def test_those_who_wait_are_told_when_it_stops():
    with working() as (worker, loop):
        future = asyncio.run_coroutine_threadsafe(gather(worker, asked(n=60)), loop)
        until(lambda: worker.open == 1)
        worker.stop()
        with suppress(Problem):
            assert future.result(20) == [alone(asked(n=60))]  # it may have been in time
        assert not worker.alive


def test_bad_requests_are_told_and_others_go_on():
    with working() as (worker, loop):
        with pytest.raises(Problem) as why:
            do(loop, gather(worker, Request((), SamplingConfig())))
        assert why.value.status == 400
        with pytest.raises(Problem) as why:
            do(loop, gather(worker, replace(asked(), deadline=time.monotonic() - 1)))
        assert why.value.status == 503
        assert do(loop, gather(worker, asked())) == [alone(asked())]


# ---------------------------------------------------------------- the server


async def tiny_app(scope, receive, send) -> None:
    "Answers at once, or never ends, by its path."
    if scope["type"] != "http":
        return
    if scope["path"] == "/body":
        while (await receive()).get("more_body"):
            pass

    async def answer(send) -> None:
        if scope["path"] != "/endless":
            return await send_whole(send, 200, b"{}")
        await send_start(send)
        while True:
            await send_events(send, "x" * 10_000)

    try:
        await Answer(answer)(scope, receive, send)
    finally:
        LEFT.append((scope["path"], scope.get("lmbook", {}).get("left")))


LEFT: list[tuple[str, object]] = []
QUICK = ServerConfig(port=0, patience=0.4, stop=3)


def connected(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    s = socket.create_connection((host, int(port)), timeout=20)
    return s


def ended(s: socket.socket) -> bytes:
    "All that comes until the server closes."
    data = b""
    with suppress(ConnectionError):
        while part := s.recv(65536):
            data += part
    return data


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_head_that_does_not_arrive_is_waited_for_a_while_only(sent):
    with Server(tiny_app, QUICK) as server, connected(server) as s:
        s.sendall(sent)
        assert ended(s) == b""


def test_a_second_head_that_drips_is_not_waited_for_either():
    with Server(tiny_app, QUICK) as server, connected(server) as s:
        s.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"200" in s.recv(65536)
        with suppress(ConnectionError):
            for _ in range(40):
                s.sendall(b"G")
                time.sleep(0.05)
            pytest.fail("it still listens")


def test_others_are_served_while_many_drip():
    with Server(tiny_app, replace(QUICK, patience=5)) as server:
        idle = [connected(server) for _ in range(50)]
        with connected(server) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert ended(s).endswith(b"{}")
        for s in idle:
            s.close()


def test_a_client_that_takes_nothing_is_dropped():
    LEFT.clear()
    with Server(tiny_app, QUICK) as server, connected(server) as s:
        s.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: ("/endless", True) in LEFT)


def test_a_client_that_goes_is_noticed():
    LEFT.clear()
    with Server(tiny_app, replace(QUICK, patience=60)) as server:
        s = connected(server)
        s.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        s.recv(100)
        s.close()
        until(lambda: ("/endless", True) in LEFT)


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"\0" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000])
def test_junk_is_refused_and_the_server_lives(junk):
    with Server(tiny_app, QUICK) as server:
        with connected(server) as s:
            with suppress(ConnectionError):
                s.sendall(junk)
            answer = ended(s)
            assert answer == b"" or b" 400 " in answer.splitlines()[0] or b" 431 " in answer.splitlines()[0]
        with connected(server) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert ended(s).endswith(b"{}")


def test_a_stop_does_not_wait_longer_than_it_says():
    start = time.monotonic()
    with Server(tiny_app, replace(QUICK, stop=1, patience=60)) as server:
        s = connected(server)
        s.sendall(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        s.recv(100)
    s.close()
    assert time.monotonic() - start < 30


def test_a_port_that_is_in_use_is_an_error_of_one_sentence():
    with listen(ServerConfig(port=0)) as s:
        port = s.getsockname()[1]
        with pytest.raises(ServingError, match="in use"):
            listen(ServerConfig(port=port))
        with pytest.raises(ServingError, match="in use"):
            Server(tiny_app, ServerConfig(port=port)).__enter__()


def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(ServingError, match="can listen on"):
        listen(ServerConfig(host="192.0.2.1", keys=("k" * 16,)))


@pytest.mark.parametrize("bad", [
    {"host": "0.0.0.0"}, {"host": ""}, {"port": -1}, {"port": 65536},
    {"port": 1.5}, {"keys": ("short",)}, {"keys": ("with a space in it",)},
    {"max_batch": 0}, {"deadline": 0}, {"deadline": float("inf")}, {"patience": -1}, {"max_body": "1"}, {"keys": ("é" * 20,)},
])  # fmt: skip
def test_settings_that_are_none(bad):
    with pytest.raises(ServingError):
        ServerConfig(**bad)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.1", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_who_can_reach_it(host, local):
    assert ServerConfig(host=host, keys=("k" * 16,)).local == local


def test_keys_are_read_and_never_shown(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# whose\nkey-of-somebody-1\n\n  key-of-somebody-2 \n", encoding="utf-8")
    assert read_keys(path) == ("key-of-somebody-1", "key-of-somebody-2")
    assert "somebody" not in repr(ServerConfig(keys=read_keys(path)))
    for bad in ("", "# only\n", "short\n"):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(ServingError):
            read_keys(path)
    with pytest.raises(ServingError):
        read_keys(tmp_path / "none")


# ---------------------------------------------------------------- what a client sends


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"a"', b'{"a":NaN}', b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"])
def test_bodies_that_are_no_object(body):
    with pytest.raises(Problem) as why:
        parsed(body)
    assert why.value.status == 400 and why.value.body["error"]["code"] == "bad_json"


@pytest.mark.parametrize(("data", "read"), [
    ({"n": True}, lambda f: f.number("n", 1, 0, 5)),
    ({"n": "1"}, lambda f: f.number("n", 1, 0, 5)), ({"n": 6}, lambda f: f.number("n", 1, 0, 5)),
    ({"n": 1.5}, lambda f: f.number("n", 1, 0, 5, whole=True)), ({"n": 1e999}, lambda f: f.number("n", 1, 0, 5)),
    ({"n": 10**400}, lambda f: f.number("n", 1, 0, 5)), ({"n": []}, lambda f: f.text("n")), ({"n": "\ud800"}, lambda f: f.text("n")),
    ({"n": 1}, lambda f: f.get("n", bool, "true or false")), ({"n": 1}, lambda f: f.none_of("n")), ({"m": 1}, lambda f: f),
])  # fmt: skip
def test_fields_that_are_wrong(data, read):
    with pytest.raises(Problem) as why:
        read(Fields(data, ("n",)))
    assert why.value.status == 400 and why.value.body["error"]["param"] in ("n", "m")
    to_json(why.value.body)


def test_fields_that_are_right():
    fields = Fields({"n": None, "m": 0, "t": "é"}, ("n", "m", "t"))
    assert fields.number("n", 7, 0, 9) == 7 and fields.number("m", 7, 0, 9) == 0 and fields.text("t") == "é"
    assert checked_text("x", "y") == "x"
    fields.none_of("n", "m")


def test_json_of_anything():
    assert to_json({"a": "\ud800é"}).decode() == '{"a":"?é"}'
