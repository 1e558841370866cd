"""What the Trainer costs beside a bare loop, and whether runs that are killed end as if they had not been.

    python -m benchmarks.training --kills 200

Overhead: two copies of a model are trained on the same ready batches with the same settings (AdamW, clipping, a cosine with warm-up, a line
of JSON every ten steps), one by a bare loop, one by the Trainer, a few steps of the one and a few of the other in turns, on one thread.
Given is the median over the turns of the ratio of their times, with its standard error, by the clock and by the processor's time. The tiny
model has next to nothing to compute: it shows what a step of the loop costs by itself.
Kills: a small run (dropout, shuffled data, accumulation, schedule, patience, a checkpoint at every step) is killed with SIGKILL at a random
moment, started again, and so on until it ends; its weights and history are compared with those of a run that nobody touched.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, run
from lmbook.batches import Examples, TokenStream
from lmbook.checkpoints import Checkpoints, latest
from lmbook.core import seed_everything
from lmbook.optimizers import AdamW
from lmbook.schedules import clip_gradients, cosine, parameter_groups
from lmbook.training import JsonLog, TrainConfig, Trainer

LR, WARMUP = 1e-3, 5
BENCHMARK = Benchmark(
    packages=("torch", "safetensors", "numpy"),
    options=[Option("kills", 200, 1, "how many kills"),
             Option("turns", 150, 2, "turns for the overhead")],
)


class WordModel(nn.Module):
    "The model of the chapter: the next word from the few before it."

    def __init__(self, vocab_size: int, context_length: int, d: int, hidden: int):
        super().__init__()
        self.context_length, self.token = context_length, nn.Embedding(vocab_size, d)
        self.hidden, self.out = nn.Linear(context_length * d, hidden), nn.Linear(hidden, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        seen = F.pad(ids, (self.context_length - 1, 0)).unfold(1, self.context_length, 1)
        return self.out(torch.tanh(self.hidden(self.token(seen).flatten(2))))


Times = tuple[float, float]  # seconds by the clock, and of the processor


def now() -> Times: return time.perf_counter(), time.process_time()


def since(start: Times) -> Times: return tuple(b - a for a, b in zip(start, now()))


def bare_loop(model: nn.Module, batches: list, log: Path) -> Iterator[None]: # stops after each step
    "What one would write by hand."
    optimizer, total = AdamW(parameter_groups(model, 0.1), lr=LR), len(batches)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # in the Trainer's order: the same norm to the last bit
    model.train()
    running, counted = torch.zeros(()), 0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups: group["lr"] = LR * cosine(step, total, warmup=WARMUP)
        loss = F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        (loss / batch.tokens).backward()
        norm = clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running, counted = running + loss.detach(), counted + batch.tokens
        if (step + 1) % 10 == 0:
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step + 1, "loss": float(running) / counted, "norm": float(norm)}) + "\n")
            running, counted = torch.zeros(()), 0
        yield


def one_overhead(name: str, shape: tuple[int, int, int, int], rows: int, length: int, block: int, turns: int) -> dict[str, object]:
    "The Trainer against the bare loop, `block` steps (a multiple of ten logs alike) of each in turns."
    steps = block * (turns + 1)  # the first turn warms up
    tokens = np.random.default_rng(0).integers(0, shape[0], rows * length * 20 + 1)
    batches = (list(TokenStream(tokens, rows, length).read()) * steps)[:steps]
    ours, bare = [], []

    def take_turns(trainer: Trainer, event: str, row: dict) -> None:
        nonlocal start
        if event == "start": start = now()
        elif event == "step" and row["step"] % block == 0:
            ours.append(since(start))
            start = now()
            for _ in range(block): next(loop)
            bare.append(since(start))
            start = now()

    start = now()
    torch.manual_seed(0)
    mine, its = WordModel(*shape), WordModel(*shape)
    its.load_state_dict(mine.state_dict())
    config = TrainConfig(steps=steps, lr=LR, warmup=WARMUP, weight_decay=0.1, log_every=10, deterministic=False, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        loop = bare_loop(mine, batches, Path(folder, "bare.jsonl"))
        Trainer(its, batches, config, callbacks=[JsonLog(Path(folder, "log.jsonl")), take_turns]).fit()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), its.parameters())), "they did not do the same"
    clock, processor = ([b[k] / a[k] for a, b in zip(bare[1:], ours[1:])] for k in (0, 1))

    def error(ratios: list[float]) -> float: # of the median, from the middle half of the ratios, which no outlier moves
        low, _, high = statistics.quantiles(ratios, n=4)
        return 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios))

    return {
        "model": name, "parameters": sum(p.numel() for p in mine.parameters()), "tokens_per_step": rows * length,
        "steps_a_turn": block, "turns": turns,
        "bare_ms_per_step": 1e3 * statistics.median(a for a, _ in bare[1:]) / block,
        "trainer_ms_per_step": 1e3 * statistics.median(b for b, _ in ours[1:]) / block,
        "overhead": statistics.median(clock) - 1, "standard_error": error(clock),
        "overhead_processor": statistics.median(processor) - 1, "standard_error_processor": error(processor),
    }  # fmt: skip


# ---------------------------------------------------------------- kills


def child(folder: str, seed: int, result: str, steps: int) -> None:
    "The run that is killed: everything on that has a state. It writes a fingerprint of its final weights and history."
    torch.set_num_threads(1)
    seed_everything(seed)
    rng = np.random.default_rng(seed)
    data = Examples([rng.integers(1, 40, n).tolist() for n in rng.integers(3, 20, 300)], batch_size=8, sort=4, seed=seed)
    aside = Examples([rng.integers(1, 40, n).tolist() for n in rng.integers(3, 20, 40)], batch_size=8, shuffle=False)
    model = nn.Sequential(nn.Embedding(40, 16), nn.Dropout(0.3), nn.Linear(16, 40))
    config = TrainConfig(steps=steps, lr=1e-2, warmup=10, weight_decay=0.1, accumulate=2, eval_every=10, patience=50, save_every=1,
                         log_every=3, seed=seed, device="cpu")
    history = Trainer(model, data, config, evaluate=aside, checkpoints=Checkpoints(folder)).fit()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    state = repr((history.rows, history.best, history.best_step, history.waiting, history.stopped))
    Path(result).write_text(hashlib.sha256(weights + state.encode()).hexdigest(), encoding="utf-8")


def kills(wanted: int, seed: int = 0, steps: int = 150) -> dict[str, object]:
    "Kill runs at random moments until so many kills have hit; compare each run with one that was left alone."
    # a forked process need not import torch again, so nearly all of its life is training; elsewhere each starts anew
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    importlib.import_module("torch._dynamo")  # which PyTorch's optimizers import at their first step
    rng, done, runs, equal, at, half = random.Random(seed), 0, 0, 0, [], 0
    while done < wanted:
        with tempfile.TemporaryDirectory() as scratch:
            folder, mine, others = (str(Path(scratch, name)) for name in ("run", "mine", "others"))
            untouched = processes.Process(target=child, args=(str(Path(scratch, "untouched")), runs, others, steps))
            untouched.start()
            untouched.join()
            while not Path(mine).exists():
                before, began = latest(folder).step, time.monotonic()
                process = processes.Process(target=child, args=(folder, runs, mine, steps))
                process.start()
                while process.is_alive() and latest(folder).step == before and time.monotonic() - began < 60:  # until it is under way
                    time.sleep(0.001)
                process.join(rng.uniform(0, 0.4))
                if process.is_alive():
                    process.kill()
                    done, half = done + 1, half + len(list(Path(folder).glob(".writing-*")))
                    at.append(latest(folder).step)
                process.join()
                if process.exitcode not in (0, -9, 1): raise SystemExit(f"a run ended with {process.exitcode}")
            runs, equal = runs + 1, equal + (Path(mine).read_text(encoding="utf-8") == Path(others).read_text(encoding="utf-8"))
            print(f"  {done} kills, {runs} runs ended, {equal} of them equal", flush=True)
    return {"kills": done, "runs": runs, "equal": equal, "in_the_middle_of_writing": half, "median_step": statistics.median(at)}


# ---------------------------------------------------------------- the parts


@BENCHMARK.part("kills")  # first: a process that has computed gradients is not one to be forked
def killed(settings: Settings) -> dict[str, object]:
    return kills(settings.kills, steps=settings.pick(150, 20))


@BENCHMARK.part()
def overhead(settings: Settings) -> list[dict[str, object]]:
    return [one_overhead("tiny", (60, 2, 8, 16), 2, 4, 10, 2 * settings.turns),
            one_overhead("small", (600, 4, 64, 128), 8, 32, 10, settings.turns),
            one_overhead("middling", (3000, 4, 128, 512), 8, 64, 2, settings.turns)]


if __name__ == "__main__": run(__file__)
