"""Many texts at the same time: tokens a second against requests, latency under load, and what blocks and packed weights cost or save.

    python -m benchmarks.batching

A Llama of random weights, of the size of the preset "small", writes greedily and on one thread: one request at a time (`OneAtATime`), in
the engine of chapter 86 (`Engine`), in `transformers` one request at a time, and in CTranslate2, in batches. All of them write the same
tokens. The clock is the processor time of the whole program, which a busy machine changes less than the time on the wall.

throughput: so many requests at once, of equal lengths (which suits batches that are not refilled). arrivals: requests of many lengths
come at random (a Poisson process) in a time that runs as the processor works; seconds until the first token, and between two tokens.
CTranslate2 takes all that wait as one batch, and the next ones when that has ended. paging: a decoding step of 16 rows by the length of the
texts, with keys that stand one after the other (`KVCache`), with keys in blocks that are neighbours, and with keys in blocks that stand
anywhere. chunks: the longest step of those who write, while a long prompt is read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Option, Settings, fastest, in_turns, medians, run
from lmbook.batching import Engine, EngineConfig, OneAtATime, Request
from lmbook.cache import reader_of
from lmbook.engines import export_model
from lmbook.generation import SamplingConfig
from lmbook.pretrained import save_pretrained
from lmbook.transformer import Transformer, TransformerConfig, preset

BENCHMARK = Benchmark(
    packages=("torch", "transformers", "ctranslate2"),
    options=[
        Option("rounds", 3, dry=1, help="rounds in which all take turns"),
        Option("requests", 48, dry=3, help="that arrive at each rate"),
    ],
)  # fmt: skip
clock = time.process_time
OnToken = Callable[[int, int], bool]  # row and id; whether its text is over


def sized(settings: Settings) -> TransformerConfig:
    if settings.dry: return preset("tiny", 64, d_model=32, n_layer=1, n_head=2, context_length=64)
    return preset("small", 8192)


def model_of(settings: Settings) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(sized(settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.normal_(0, 1.2 * p.shape[1] ** -.5)  # so loud that no two tokens are nearly equally likely
    return model


def prompts(n: int, lengths: tuple[int, int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab_size, int(rng.integers(lengths[0], lengths[1] + 1))).tolist() for _ in range(n)]


def greedy(n: int) -> SamplingConfig: return SamplingConfig(max_new_tokens=n, temperature=0)


class ByTransformers:
    "One request at a time in the library `transformers`."

    def __init__(self, model: Transformer):
        from transformers import LlamaForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder, layout="llama")
            self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.model.generation_config.pad_token_id, self.model.generation_config.eos_token_id = 0, None

    def write(self, prompt: list[int], n: int, on_token: Callable[[], Any] | None = None) -> list[int]:
        class Watch:  # the prompt is put first
            first = True

            def put(self, value: Any) -> None:
                if not self.first and on_token: on_token()
                self.first = False

            def end(self) -> None: ...

        ids = torch.tensor([prompt])
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "do_sample": False}
        return self.model.generate(ids, **given, streamer=Watch() if on_token else None)[0, len(prompt) :].tolist()


class ByCTranslate2:
    "Batches in CTranslate2."

    def __init__(self, model: Transformer):
        from ctranslate2 import Generator

        with tempfile.TemporaryDirectory() as folder:
            export_model(model, f"{folder}/model", "ctranslate2")
            self.engine = Generator(f"{folder}/model", compute_type="float32", inter_threads=1, intra_threads=1)
        self.words = [f"<id {i}>" for i in range(model.config.vocab_size)]

    def write(self, rows: Sequence[Sequence[int]], n: int, on_token: OnToken | None = None) -> list[list[int]]:
        words = [[self.words[id] for id in row] for row in rows]
        more = {} if on_token is None else {"callback": lambda step: on_token(step.batch_id, step.token_id)}
        done = self.engine.generate_batch(words, max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False, end_token=[],
                                          **more)  # fmt: skip
        return [one.sequences_ids[0] for one in done]


def by_engine(engine: Engine | OneAtATime, rows: Sequence[Sequence[int]], n: int) -> list[list[int | None]]:
    return [[event.token for event in events] for events in engine.run([Request(tuple(row), greedy(n)) for row in rows])]


def by_transformers(theirs: ByTransformers, rows: Sequence[list[int]], n: int) -> list[list[int]]:
    return [theirs.write(row, n) for row in rows]


@BENCHMARK.part(needs=("transformers", "ctranslate2"))
def throughput(settings: Settings) -> list[dict[str, Any]]:
    model, n = model_of(settings), settings.pick(64, 4)
    theirs, compiled = ByTransformers(model), ByCTranslate2(model)
    out = []
    for rows in settings.pick((1, 2, 4, 8, 16, 32, 64), (1, 3)):
        texts = prompts(rows, settings.pick((24, 48), (4, 8)), model.config.vocab_size)
        few = texts[:2]  # one at a time: more of them take as much longer
        here = EngineConfig(max_batch=rows, max_waiting=rows, share_prefixes=False)  # the same prompts come again, and are read again
        ways: dict[str, tuple[Callable[[], Any], int]] = {
            "one at a time": (partial(by_engine, OneAtATime(model), few, n), len(few)),
            "transformers": (partial(by_transformers, theirs, few, n), len(few)),
            "CTranslate2": (partial(compiled.write, texts, n), rows),
            "engine": (partial(by_engine, Engine(model, here), texts, n), rows),
            "engine, weights not packed": (partial(by_engine, Engine(model, replace(here, packed=False)), texts, n), rows),
        }  # fmt: skip
        found = {name: way() for name, (way, _) in ways.items()}
        for name, answer in found.items(): assert answer == found["engine"][: len(answer)], f"{name} writes something else"
        best = fastest(in_turns({name: way for name, (way, _) in ways.items()}, settings.rounds, clock=clock, warm_up=False))
        out.append({"requests": rows, **{name: n * count / best[name] for name, (_, count) in ways.items()}})
        print("  ", {key: round(value) for key, value in out[-1].items()}, flush=True)
    return out


@dataclass
class Guest:
    "A request that comes at a time, and when its tokens came."

    at: float
    ids: list[int]
    n: int
    tokens: list[float] = field(default_factory=list)


def guests(settings: Settings, rate: float, vocab_size: int) -> list[Guest]:
    rng = np.random.default_rng(1)
    count = settings.requests
    ats = rng.exponential(1 / rate, count).cumsum()
    texts = prompts(count, settings.pick((16, 96), (4, 8)), vocab_size, seed=2)
    longest = settings.pick(384, 20)
    for b in range(5, count, 10): texts[b] = prompts(1, (longest, longest), vocab_size, seed=b)[0]  # one in ten has a long prompt
    return [Guest(float(at), ids, int(n)) for at, ids, n in zip(ats, texts, rng.integers(*settings.pick((16, 112), (2, 6)), count))]


def serve(engine: Engine | OneAtATime, todo: list[Guest]) -> float: # the time at the end
    now, waiting, found = 0., list(todo), dict[int, Guest]()
    while waiting or engine.busy():
        if not engine.busy() and waiting: now = max(now, waiting[0].at)
        while waiting and waiting[0].at <= now:
            guest = waiting.pop(0)
            found[engine.submit(Request(tuple(guest.ids), greedy(guest.n)))] = guest
        start = clock()
        events = engine.step()
        now += clock() - start
        for event in events:
            if event.token is not None: found[event.request].tokens.append(now)
    return now


def serve_alone(theirs: ByTransformers, todo: list[Guest]) -> float:
    now = 0.
    for guest in todo:
        now = max(now, guest.at)
        start = clock()

        def on_token(guest: Guest = guest, begin: float = now, start: float = start) -> None: guest.tokens.append(begin + clock() - start)

        theirs.write(guest.ids, guest.n, on_token)
        now += clock() - start
    return now


def serve_batches(compiled: ByCTranslate2, todo: list[Guest]) -> float:
    now, waiting = 0., list(todo)
    while waiting:
        now = max(now, waiting[0].at)
        batch = [guest for guest in waiting if guest.at <= now][:16]
        waiting = waiting[len(batch) :]
        start, begin = clock(), now

        def on_token(row: int, id: int, batch: list[Guest] = batch, start: float = start, begin: float = begin) -> bool:
            guest = batch[row]
            if len(guest.tokens) < guest.n: guest.tokens.append(begin + clock() - start)
            return len(guest.tokens) >= guest.n

        compiled.write([guest.ids for guest in batch], max(guest.n for guest in batch), on_token)
        now += clock() - start
    return now


def percentiles(values: list[float], name: str) -> dict[str, float]:
    return {f"{name} p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}


@BENCHMARK.part(needs=("transformers", "ctranslate2"))
def arrivals(settings: Settings) -> list[dict[str, Any]]:
    model = model_of(settings)
    theirs, compiled = ByTransformers(model), ByCTranslate2(model)
    crowd = EngineConfig(max_waiting=10_000, prefill_tokens=128)
    out = []
    for rate in settings.pick((1., 4., 16.), (50.,)):
        ways: dict[str, Callable[[list[Guest]], float]] = {
            "one at a time": partial(serve, OneAtATime(model, crowd)),
            "transformers": partial(serve_alone, theirs),
            "CTranslate2": partial(serve_batches, compiled),
            "engine": partial(serve, Engine(model, crowd)),
        }  # fmt: skip
        for name, way in ways.items():
            todo = guests(settings, rate, model.config.vocab_size)
            end = way(todo)
            assert all(len(guest.tokens) == guest.n for guest in todo), name
            between = [b - a for guest in todo for a, b in zip(guest.tokens, guest.tokens[1:])]
            out.append({"requests a second": rate, "system": name, "tokens a second": sum(g.n for g in todo) / end,
                        **percentiles([g.tokens[0] - g.at for g in todo], "first"), **percentiles(between, "between")})  # fmt: skip
    return out


def take_anywhere(take: Callable[[int], int | None], after: int = 0) -> int | None: return take(0)


@BENCHMARK.part()
def paging(settings: Settings) -> list[dict[str, Any]]:
    "Milliseconds of a step of 16 rows, all of the same length; weights as they are, so that only the cache differs."
    model, rows, out = model_of(settings), settings.pick(16, 2), []
    steps = settings.pick(12, 2)
    for length in settings.pick((32, 64, 128, 256, 480), (8, 16)):
        texts = prompts(rows, (length, length), model.config.vocab_size)
        with torch.inference_mode():
            reader = reader_of(model, None, 32)
            logits = reader.start(texts)
        there = EngineConfig(max_batch=rows, packed=False, share_prefixes=False, prefill_tokens=10**6)
        near, far = Engine(model, there), Engine(model, there)
        far.blocks.take = partial(take_anywhere, far.blocks.take)  # type: ignore[method-assign]
        for engine in (near, far):
            for row in texts: engine.submit(Request(tuple(row), greedy(10**6)))
            engine.step()
        state = {"ids": logits.argmax(-1, keepdim=True)}

        def one_after_the_other(reader: Any = reader, state: dict[str, torch.Tensor] = state) -> None:
            with torch.inference_mode(): state["ids"] = reader.read(state["ids"])[:, -1].argmax(-1, keepdim=True)

        for _ in range(settings.pick(5, 1)):  # until the steps are on tape
            one_after_the_other()
            near.step()
            far.step()
        took = medians(in_turns({"contiguous": one_after_the_other, "neighbours": near.step, "anywhere": far.step}, steps, clock=clock))
        assert near.stats().running == far.stats().running == rows
        out.append({"length": length, **{name: 1000 * seconds for name, seconds in took.items()}})
    return out


@BENCHMARK.part()
def chunks(settings: Settings) -> list[dict[str, Any]]:
    "Four write; a long prompt comes. Milliseconds of their longest step while it is read, and until it has its first token."
    model, out = model_of(settings), []
    short = prompts(4, settings.pick((16, 16), (4, 4)), model.config.vocab_size)
    (long,) = prompts(1, settings.pick((448, 448), (32, 32)), model.config.vocab_size, seed=3)
    for size in settings.pick((512, 128, 64, 32), (64, 8)):
        found = []
        for _ in range(settings.rounds):
            engine = Engine(model, EngineConfig(prefill_tokens=size, share_prefixes=False))
            for row in short: engine.submit(Request(tuple(row), greedy(settings.pick(60, 20))))
            for _ in range(settings.pick(10, 4)): engine.step()
            number, times = engine.submit(Request(tuple(long), greedy(2))), list[float]()
            first = False
            while not first:
                start = clock()
                first = any(event.request == number for event in engine.step())
                times.append(1000 * (clock() - start))
            found.append((max(times), sum(times)))
        longest, first_token = (float(np.median(column)) for column in zip(*found))
        out.append({"prefill_tokens": size, "longest step": longest, "until its first token": first_token})
    return out


if __name__ == "__main__": run(__file__)
