"""A service over HTTP: first token, time between tokens and texts a second, with 1 to 64 clients, and hours of clients who misbehave.

    python -m benchmarks.serving

A Llama of random weights, of the size of the preset "tiny", behind the server of chapter 88, with three engines: one request at a time
(`OneAtATime`), continuous batches (`Engine`), and CTranslate2 with the same weights, which writes all that wait as one batch and shows it
when it has ended. The clients are a process of their own. The model computes on one thread.

closed: so many clients, each of which asks again as soon as it has its text; the engines take turns. Seconds are those of the clock, and
"processor seconds" those that the server's process computed, which other programs on the machine change less. arrivals: clients that come
at random (a Poisson process) to the continuous batches, at shares of the texts a second that 16 clients got. soak (with --minutes): clients
that read, leave, stall, send junk and ask for too much; each whole text is compared with the same request alone, and what the process
holds is counted before and after.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Option, Settings, run

BENCHMARK = Benchmark(
    packages=("torch", "starlette", "uvicorn", "h11", "ctranslate2"),
    options=[
        Option("clients", [1, 2, 4, 8, 16, 32, 64], dry=[1, 3], help="that ask at the same time"),
        Option("texts", 64, dry=4, help="for each number of clients, and 2 for each client at least"),
        Option("tokens", 32, dry=4, help="of a text"),
        Option("minutes", 2.0, dry=0.03, help="of the soak"),
    ],
)  # fmt: skip
ENGINES = ("one at a time", "batches", "CTranslate2")


def model_and_tokenizer(settings: Settings) -> Any: # a Run
    from lmbook.runs import Run
    from lmbook.tokenization import ByteTokenizer
    from lmbook.transformer import Transformer, preset

    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    sizes = {} if not settings.dry else {"d_model": 32, "n_layer": 1, "n_head": 2}
    model = Transformer(preset("tiny", tokenizer.vocab_size, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.normal_(0, 1.2 * p.shape[1] ** -0.5)
    return Run(Path("."), model, tokenizer, {})


class ByCTranslate2:
    "CTranslate2 as an engine: all that wait are one batch, and the next batch begins when that has ended."

    def __init__(self, model: Any, config: Any):
        import ctranslate2

        from lmbook.engines import export_model

        with tempfile.TemporaryDirectory() as folder:
            export_model(model, f"{folder}/model", "ctranslate2")
            self.engine = ctranslate2.Generator(f"{folder}/model", intra_threads=1, compute_type="float32")
            self.words: list[str] = json.loads(Path(f"{folder}/model/vocabulary.json").read_text())
        self.config, self.waiting, self.number = config, deque[tuple[int, Any]](), 0

    def submit(self, request: Any) -> int:
        self.number += 1
        self.waiting.append((self.number, request))
        return self.number

    def cancel(self, number: int) -> None: self.waiting = deque(one for one in self.waiting if one[0] != number)
    def busy(self) -> bool: return bool(self.waiting)

    def step(self) -> list[Any]:
        from lmbook.batching import Event

        batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.config.max_batch))]
        rows = [[self.words[id] for id in request.ids] for _, request in batch]
        told: dict[str, Any] = {"max_length": batch[0][1].sampling.max_new_tokens, "sampling_topk": 1, "include_prompt_in_result": False}
        found = [one.sequences_ids[0] for one in self.engine.generate_batch(rows, **told)]
        return [Event(number, id, None, (), "length" if i == len(ids) - 1 else None)
                for (number, _), ids in zip(batch, found) for i, id in enumerate(ids)]


# ---------------------------------------------------------------- the clients


@dataclass
class Seen:
    "What one client saw of one text: when it asked, when tokens came, how it ended."

    asked: float
    status: int = 0
    came: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


async def ask(host: str, port: int, body: dict[str, Any], leave: int | None = None, stall: float = 0.0) -> Seen:
    "Ask for a stream, and read it: to its end, or to the token at which this client leaves."
    seen, data = Seen(time.perf_counter()), json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = ["POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode() + data)
        await asyncio.sleep(stall)
        seen.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if not line.startswith(b"data: {"): continue
            event = json.loads(line[6:])
            if "choices" not in event: break
            seen.came.append(time.perf_counter())
            seen.text += event["choices"][0]["text"]
            seen.finish = event["choices"][0]["finish_reason"] or seen.finish
            if leave is not None and len(seen.came) >= leave: break
    finally:
        writer.close()
        with suppress(OSError): await writer.wait_closed()
    return seen


def prompt_of(seed: int) -> str: return f"text {seed}: " + "goat " * (seed * 7 % 12)


async def closed_clients(host: str, port: int, clients: int, texts: int, tokens: int) -> list[Seen]:
    todo, out = iter(range(texts)), list[Seen]()

    async def client() -> None:
        for seed in todo: out.append(await ask(host, port, {"prompt": prompt_of(seed), "max_tokens": tokens, "temperature": 0}))

    await asyncio.gather(*(client() for _ in range(clients)))
    return out


async def random_clients(host: str, port: int, rate: float, texts: int, tokens: int) -> list[Seen]:
    rng, tasks = random.Random(0), list[asyncio.Task[Seen]]()
    for seed in range(texts):
        tasks.append(asyncio.create_task(ask(host, port, {"prompt": prompt_of(seed), "max_tokens": tokens, "temperature": 0})))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def clients(kind: str, *arguments: Any) -> list[Seen]: # in a process of their own
    return asyncio.run({"closed": closed_clients, "random": random_clients}[kind](*arguments))


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    if not len(values): return {}
    return {f"{name} p{q}, ms": 1000 * float(np.percentile(values, q)) for q in (50, 95, 99)}


def summary(found: Sequence[Seen]) -> dict[str, float]:
    good = [one for one in found if one.status == 200]
    took = max(one.came[-1] for one in good) - min(one.asked for one in found)
    between = [b - a for one in good for a, b in zip(one.came, one.came[1:])]
    row = {"texts a second": len(good) / took, "tokens a second": sum(len(one.came) for one in good) / took}
    return {**row, **percentiles("first", [one.came[0] - one.asked for one in good]), **percentiles("between", between)}


def served(settings: Settings, engine: str, **limits: Any) -> Any: # a Server
    from lmbook.batching import Engine, OneAtATime
    from lmbook.serving import make_app
    from lmbook.streaming import Server, ServerConfig

    makers: dict[str, Any] = {"one at a time": OneAtATime, "batches": Engine, "CTranslate2": ByCTranslate2}
    return Server(make_app({"model": model_and_tokenizer(settings)}, ServerConfig(port=0, **limits), engine=makers[engine]))


def address(server: Any) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


@BENCHMARK.part(needs=("uvicorn", "ctranslate2"))
def closed(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        servers = {engine: stack.enter_context(served(settings, engine)) for engine in ENGINES}
        for server in servers.values(): settings.alone(clients, "closed", *address(server), 1, 2, 2)  # everything is warm
        for n in settings.clients:
            for engine, server in servers.items():  # by turns, so that what else the machine does is spread over all
                start = time.process_time()  # of the server: the clients are another process
                found = settings.alone(clients, "closed", *address(server), n, max(settings.texts, 2 * n), settings.tokens)
                busy = time.process_time() - start
                tokens = sum(len(one.came) for one in found)
                rows.append({"engine": engine, "clients": n, "tokens a processor second": tokens / busy, **summary(found)})
    return rows


@BENCHMARK.part(needs=("uvicorn",))
def arrivals(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    with served(settings, "batches", max_waiting=16) as server:
        found = settings.alone(clients, "closed", *address(server), 16, max(settings.texts, 4), settings.tokens)
        rate = summary(found)["texts a second"]
        for share in (0.3, 0.6, 0.9, 2.0):
            found = settings.alone(clients, "random", *address(server), share * rate, settings.pick(3, 1) * settings.texts, settings.tokens)
            refused = sum(one.status == 429 for one in found) / len(found)
            rows.append({"share of the most": share, "asked a second": share * rate, "refused": refused, **summary(found)})
    return rows


# ---------------------------------------------------------------- the soak


async def misbehave(host: str, port: int, seed: int) -> None:
    "One of the clients that a server meets."
    kind = seed % 5
    if kind == 0: await ask(host, port, {"prompt": prompt_of(seed), "max_tokens": 200}, leave=1 + seed % 9)
    elif kind == 1: await ask(host, port, {"prompt": "goat " * 2000, "max_tokens": 10**9})
    elif kind == 2: await ask(host, port, {"prompt": prompt_of(seed), "max_tokens": 40}, stall=0.5)
    else:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            if kind == 3: writer.write(random.Random(seed).randbytes(300))
            else: writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n")
            await reader.read(2000) if kind == 3 else await asyncio.sleep(0.3)
        finally: writer.close()


async def soak_clients(host: str, port: int, seconds: float, right: dict[int, str], tokens: int) -> Counter:
    counts: Counter = Counter()
    end, seeds = time.monotonic() + seconds, iter(range(10**9))

    async def good() -> None:
        while time.monotonic() < end:
            seed = next(seeds) % len(right)
            seen = await ask(host, port, {"prompt": prompt_of(seed), "max_tokens": tokens, "seed": seed})
            counts["asked"] += 1
            if seen.status == 429: counts["refused"] += 1
            elif seen.status != 200 or seen.finish is None: counts["lost"] += 1
            else: counts["right" if seen.text == right[seed] else "wrong"] += 1

    async def bad() -> None:
        while time.monotonic() < end:
            counts["misbehaved"] += 1
            with suppress(OSError, IndexError, ValueError): await misbehave(host, port, next(seeds))

    await asyncio.gather(*(good() for _ in range(8)), *(bad() for _ in range(8)))
    return counts


def soak_in_process(*arguments: Any) -> Counter: return asyncio.run(soak_clients(*arguments))


def holds() -> dict[str, float]:
    "What this process holds."
    gc.collect()
    pages = Path("/proc/self/statm")
    memory = int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if pages.exists() else 0.0
    descriptors = len(os.listdir("/proc/self/fd")) if pages.exists() else 0
    return {"MB": memory, "threads": threading.active_count(), "descriptors": descriptors}


@BENCHMARK.part(needs=("uvicorn",))
def soak(settings: Settings) -> dict[str, Any]:
    from lmbook.generation import SamplingConfig, generate_text

    one = model_and_tokenizer(settings)
    config: dict[str, Any] = {"max_new_tokens": settings.tokens, "on_full": "stop"}
    right = {seed: generate_text(one.model, one.tokenizer, [prompt_of(seed)], SamplingConfig(seed=seed, **config))[0] for seed in range(40)}
    with served(settings, "batches", max_waiting=24, patience=2) as server:
        worker = server.app.state.service.models["model"].worker
        counts, before = Counter(), {}
        for part in range(4):  # the first warms up: what it leaves is no leak
            counts += settings.alone(soak_in_process, *address(server), 15 * settings.minutes, right, settings.tokens)
            time.sleep(settings.pick(4, 0.5))
            if part == 0: before = holds()
        after, stats = holds(), worker.engine.stats()
        row = {"minutes": settings.minutes, **counts, "open": worker.open, "blocks used": stats.used}
        row["engines that failed"] = worker.failures
        return row | {f"{name} after a quarter": before[name] for name in before} | {f"{name} at the end": after[name] for name in after}


if __name__ == "__main__": run(__file__)
