"""Ranks on one machine: what a message costs, and all-reduce by ring, tree and doubling, measured beside what the model of a link predicts.

`messages`: two processes throw a tensor to and fro, for the times of messages of many sizes and the line through them (latency, bandwidth).
Then two and four processes add tensors of several sizes by each of the algorithms of chapter 54, and by gloo's own; all take turns, and the
median over the rounds of the slowest rank's time is kept. The prediction replays the messages of that very call over the fitted link.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Benchmark, Option, Settings, run
from lmbook.distributed import Event, Post, doubling_all_reduce, fit_link, replay, ring_all_reduce, run_ranks, tree_all_reduce

BENCHMARK = Benchmark(
    packages=("torch",),
    options=[Option("rounds", 30, 2, "rounds in which all algorithms take turns"), Option("ranks", [2, 4], [2], "processes")],
)
ALGORITHMS: dict[str, Callable[[Tensor, Post], None]] = {
    "tree": tree_all_reduce, "doubling": doubling_all_reduce, "ring": ring_all_reduce, "gloo": lambda x, post: dist.all_reduce(x),
}  # fmt: skip


def to_and_fro(sizes: list[int], rounds: int) -> list[float]:
    "Seconds of one message of so many bytes: half of the median time that it takes to come back."
    me, found = dist.get_rank(), []
    for size in sizes:
        x, times = torch.zeros(size, dtype=torch.uint8), []
        for _ in range(rounds):
            begin = time.perf_counter()
            if me == 0: dist.send(x, 1)
            dist.recv(x, 1 - me)
            if me == 1: dist.send(x, 0)
            times.append(time.perf_counter() - begin)
        found.append(statistics.median(times) / 2)
    return found


def sums(sizes: list[int], rounds: int) -> list[tuple[str, int, float, list[Event]]]:
    "Of this rank: algorithm, bytes, median seconds, and the log of one call."
    found = []
    for size in sizes:
        x, times, logs = torch.ones(size // 8, dtype=torch.float64), {how: [] for how in ALGORITHMS}, {}
        for _ in range(rounds):
            for how, algorithm in ALGORITHMS.items():
                post, begin_value = Post(), x.fill_(1.0)
                dist.barrier()
                begin = time.perf_counter()
                algorithm(begin_value, post)
                times[how].append(time.perf_counter() - begin)
                logs[how] = post.events
        found += [(how, size, statistics.median(times[how]), logs[how]) for how in ALGORITHMS]
    return found


@BENCHMARK.part()
def messages(settings: Settings) -> dict[str, object]:
    "What a message costs, and what an all-reduce of them does."
    rounds = settings.rounds
    sizes = settings.pick([8 * 4**k for k in range(11)], [8, 65536])
    one = run_ranks(to_and_fro, 2, sizes, 5 * rounds, how="processes", check=False)[0]
    link = fit_link(sizes, one)
    rows = []
    for n in settings.ranks:
        ranks = run_ranks(sums, n, settings.pick([64 * 8**k for k in range(7)], [64, 4096]), rounds, how="processes", check=False)
        for of_ranks in zip(*ranks):
            how, size = of_ranks[0][:2]
            row = {"ranks": n, "how": how, "bytes": size, "seconds": max(seconds for *_, seconds, _ in of_ranks)}
            if how != "gloo": row["predicted"] = max(message.end for message in replay([log for *_, log in of_ranks], link))
            rows.append(row)
    return {
        "link": {"latency": link.latency, "bandwidth": link.bandwidth},
        "one": [{"bytes": size, "seconds": seconds, "line": link.seconds(size)} for size, seconds in zip(sizes, one)],
        "all_reduce": rows,
    }  # fmt: skip


if __name__ == "__main__": run(__file__)
