"""Data parallelism on this machine: tokens per second, what the Trainer adds to plain DDP, memory and bytes against the formulas.

Every part trains the same small decoder, of 0.8 million parameters, on random tokens. Ranks are processes over gloo.
"""

from __future__ import annotations

import copy
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import Benchmark, Option, Settings, run
from lmbook.batches import TokenStream
from lmbook.data_parallel import CommunicationLog, DataParallel, FullySharded, blocks_of, ranks_of
from lmbook.distributed import run_ranks
from lmbook.optimizers import AdamW, own_part
from lmbook.training import Ranks, TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch",), options=[
    Option("rounds", 7, dry=1, help="rounds in which all take turns"),
    Option("steps", 40, dry=2, help="steps in a round"),
])  # fmt: skip
V, ROWS, LENGTH = 65, 12, 64


def decoder(tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    size = {"d_model": 32, "n_layer": 2} if tiny else {"d_model": 128, "n_layer": 4}
    return Transformer(TransformerConfig(V, n_head=4, context_length=LENGTH, bias=False, positions="rotary", **size))


def stream(steps: int) -> TokenStream:
    tokens = torch.randint(V, (ROWS * LENGTH * steps + 1,), generator=torch.Generator().manual_seed(0))
    return TokenStream(tokens, ROWS, LENGTH, shuffle=False)


def by_trainer(start: nn.Module, steps: int, ranks: Ranks | None) -> float: # seconds
    config = TrainConfig(steps=steps, lr=1e-3, log_every=10**6, device="cpu", deterministic=False)
    trainer = Trainer(copy.deepcopy(start), stream(steps), config, ranks=ranks)
    begun = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - begun


def by_ddp(start: nn.Module, steps: int) -> float: # seconds
    "What one would write with PyTorch alone."
    model = DistributedDataParallel(copy.deepcopy(start), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rank, world, batches = dist.get_rank(), dist.get_world_size(), iter(stream(steps))
    begun = time.perf_counter()
    for _ in range(steps):
        batch = next(batches)
        ids, targets = batch.ids[rank::world], batch.targets[rank::world]
        F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun


def both(tiny: bool, rounds: int, steps: int) -> list[tuple[float, float]]:
    "On a rank: seconds of a round by the Trainer, and by DDP alone, in turns."
    start, seen = decoder(tiny), []
    torch.set_num_threads(1)
    for i in range(rounds + 1):
        first, second = (partial(by_trainer, start, steps, DataParallel()), partial(by_ddp, start, steps))
        times = (first(), second()) if i % 2 else (second(), first())[::-1]
        if i: seen.append(times)  # the first round warms up
    return seen


def one_process(tiny: bool, threads: int, steps: int) -> float:
    torch.set_num_threads(threads)
    start = decoder(tiny)
    by_trainer(start, max(2, steps // 4), None)
    return by_trainer(start, steps, None)


@BENCHMARK.part()
def ddp(settings: Settings) -> dict[str, Any]:
    "Two ranks of one thread, by the Trainer and by DDP alone; and one process of two threads."
    alone, pairs = [], []
    for _ in range(settings.pick(3, 1)):
        alone.append(settings.alone(one_process, settings.dry, 2, settings.steps))
        pairs += run_ranks(both, 2, settings.dry, settings.rounds, settings.steps, how="processes", timeout=600, check=False)[0]
    tokens = ROWS * LENGTH * settings.steps
    ratios = [trainer / plain for trainer, plain in pairs]
    return {
        "parameters": sum(p.numel() for p in decoder(settings.dry).parameters()),
        "tokens_per_s": {
            "1 process x 2 threads": round(tokens / statistics.median(alone)),
            "2 ranks x 1 thread, Trainer": round(tokens / statistics.median(t for t, _ in pairs)),
            "2 ranks x 1 thread, plain DDP": round(tokens / statistics.median(p for _, p in pairs)),
        },
        "overhead": round(statistics.median(ratios) - 1, 4),
        "overheads": [round(r - 1, 3) for r in sorted(ratios)],
        "ranks_against_threads": round(statistics.median(alone) / statistics.median(t for t, _ in pairs), 3),
    }


STRATEGIES: dict[str, Any] = {
    "ddp": partial(ranks_of, "ddp"), "zero": partial(ranks_of, "zero"), "fsdp": partial(ranks_of, "fsdp"),
    "fsdp, gathered once": partial(FullySharded, reshard=False),
}  # fmt: skip


def after_steps(tiny: bool, strategy: str) -> dict[str, Any]:
    "On a rank: bytes kept after a step, and what was said in it."
    ranks, model = STRATEGIES[strategy](), decoder(tiny)
    forward = ranks.join(model)
    optimizer = ranks.optimize(AdamW(model.parameters(), lr=1e-3))
    [batch] = list(stream(1))
    for _ in range(3):
        optimizer.zero_grad()
        with CommunicationLog() as log:
            next_token_loss(forward, ranks.share(batch))[0].backward()
            optimizer.step()
    state = [s for slots in getattr(optimizer, "optim", optimizer).state.values() for s in slots.values()]
    held = {"weights": list(model.parameters()), "gradients": [p.grad for p in model.parameters()], "state": state}
    return {"kept": {name: sum(own_part(t).nbytes for t in tensors) for name, tensors in held.items()}, "sent": dict(log.bytes)}


@BENCHMARK.part()
def memory(settings: Settings) -> dict[str, Any]:
    "Bytes that each of four ranks keeps of weights, gradients and Adam's state, against 4, 2 + 2/N, and 4/N sizes of the model."
    size, n = sum(p.nbytes for p in decoder(settings.dry).parameters()), 4
    promised = {"ddp": 4 * size, "zero": (2 + 2 / n) * size, "fsdp": 4 * size / n}
    found = {}
    for name, wanted in promised.items():
        kept = [sum(rank["kept"].values()) for rank in run_ranks(after_steps, n, settings.dry, name)]
        found[name] = {"formula": round(wanted), "ranks": kept, "off": round(max(abs(k / wanted - 1) for k in kept), 4)}
    return {"model": size, "ranks": n, "kept": found}


@BENCHMARK.part("bytes")
def bytes_sent(settings: Settings) -> dict[str, Any]:
    "Bytes of the collectives of a step on four ranks, against the formulas: exact."
    model, n = decoder(settings.dry), 4
    size, blocks = sum(p.nbytes for p in model.parameters()), sum(p.nbytes for b in blocks_of(model) for p in b.parameters())
    padded = -(-V // n) * n * model.out.weight.shape[1] * 4 - model.out.weight.nbytes  # type: ignore[operator,union-attr]  # 65 rows over 4
    promised = {
        "ddp": {"allreduce": size},
        "zero": {"allreduce": size, "broadcast": size},
        "fsdp": {"allgather": size + blocks + padded, "reduce_scatter": size + padded},
        "fsdp, gathered once": {"allgather": size + padded, "reduce_scatter": size + padded},
    }
    found = {name: run_ranks(after_steps, n, settings.dry, name)[0]["sent"] for name in promised}
    return {name: {"formula": wanted, "found": found[name], "exact": found[name] == wanted} for name, wanted in promised.items()}


if __name__ == "__main__": run(__file__)
