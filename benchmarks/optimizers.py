"""How long a step takes, beside torch.optim's, and what it keeps in memory.

    python -m benchmarks.optimizers

Prints a table and writes benchmarks/results/optimizers.json. Parameters: the tensors of a Transformer with about ten million, and of a
network with seven tensors, where what counts is the work in Python. Each way of making a step has its own parameters, and all take turns in
each round, so that what else the machine does meets them alike. Where parameters lie in memory makes a difference of up to a third to the very
same code; so everything is made anew several times, in alternating order. A ratio is the median of the ratios within a round. One thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import machine
from lmbook.optimizers import SGD, Adagrad, Adam, AdamW, Lion, Muon, RMSprop, clip_gradients

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
BAR = 1.2  # our step may take so many times as long as torch.optim's fastest


def transformer(d: int = 320, n_layer: int = 7, vocabulary: int = 4096) -> list[tuple[int, ...]]:
    "The shapes in a decoder with tied word vectors."
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocabulary, d), *n_layer * layer, (d,), (d,)]


SHAPES = {"10 M": transformer(), "small": [(501, 16), (64, 64), (64,), (64, 64), (64,), (501, 64), (501,)]}


def parameters(shapes: list[tuple[int, ...]], matrices: bool) -> list[nn.Parameter]:
    dice = torch.Generator().manual_seed(0)
    out = [nn.Parameter(torch.randn(shape, generator=dice) * 0.02) for shape in shapes if len(shape) == 2 or not matrices]
    for p in out: p.grad = torch.randn(p.shape, generator=dice)
    return out


def ways() -> dict[str, dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]]:
    "For each optimizer: ours (as it comes; on lists only), and what torch.optim has (as it comes on a CPU: a loop; lists; fused)."
    table = {
        "SGD": (SGD, "SGD", {"lr": 1e-3}), "momentum": (SGD, "SGD", {"lr": 1e-3, "momentum": 0.9}),
        "Nesterov": (SGD, "SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}), "Adagrad": (Adagrad, "Adagrad", {"lr": 1e-3}),
        "RMSprop": (RMSprop, "RMSprop", {"lr": 1e-3}), "Adam": (Adam, "Adam", {"lr": 1e-3}),
        "AdamW": (AdamW, "AdamW", {"lr": 1e-3, "weight_decay": 0.1}), "Lion": (Lion, "", {"lr": 1e-4}),
        "Muon": (Muon, "Muon", {"lr": 1e-3, "weight_decay": 0.1}),
    }
    out: dict[str, dict[str, Callable]] = {}
    for name, (ours, theirs, options) in table.items():
        out[name] = {"ours": lambda ps, make=ours, options=options: make(ps, **options)}
        if ours.kernels: out[name]["ours, lists"] = lambda ps, make=ours, options=options: make(ps, fused=False, **options)
        reference = getattr(torch.optim, theirs, None) if theirs else None
        if not reference: continue
        variants = {"torch, loop": {}} if theirs == "Muon" else {"torch, loop": {"foreach": False}, "torch, lists": {"foreach": True}}
        if ours.kernels: variants["torch, fused"] = {"fused": True}
        for way, extra in variants.items():
            out[name][way] = lambda ps, make=reference, more=options | extra: make(ps, **more)
    return out


def state_numbers(optimizer: torch.optim.Optimizer, ps: list[nn.Parameter]) -> float:
    "How many numbers are kept for each parameter, the counter of the steps apart."
    kept = sum(x.numel() for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim)
    return kept / sum(p.numel() for p in ps)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, repeat: int) -> dict[str, list[float]]:
    "Seconds of each run in each round; all take turns."
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeat): run()
            times[name].append((time.perf_counter() - start) / repeat)
    return times


def measure(name: str, makers: dict[str, Callable], shapes: list[tuple[int, ...]], rounds: int, repeat: int, copies: int) -> dict[str, object]:
    times: dict[str, list[float]] = {way: [] for way in makers}
    kept = 0.0
    for copy in range(copies):
        optimizers = {}
        for way in list(makers)[:: -1 if copy % 2 else 1]:
            ps = parameters(shapes, matrices=name == "Muon")
            optimizers[way] = makers[way](ps)
            for _ in range(2): optimizers[way].step()
            if way == "ours": kept = state_numbers(optimizers[way], ps)
        for way, t in interleaved({way: optimizer.step for way, optimizer in optimizers.items()}, rounds, repeat).items(): times[way] += t
    theirs = {way: statistics.median(t) for way, t in times.items() if way.startswith("torch")}
    row: dict[str, object] = {"optimizer": name, "numbers_kept": round(kept, 3), "ms": {w: round(statistics.median(t) * 1e3, 4) for w, t in times.items()}}
    if theirs:
        best = min(theirs, key=theirs.get)
        row |= {"fastest_of_torch": best, "ratio": round(statistics.median(a / b for a, b in zip(times["ours"], times[best])), 3),
                "ratio_to_loop": round(statistics.median(a / b for a, b in zip(times["ours"], times["torch, loop"])), 3)}
    return row


def clipping(shapes: list[tuple[int, ...]], rounds: int, repeat: int) -> dict[str, object]:
    ps = parameters(shapes, matrices=False)
    times = interleaved({"ours": lambda: clip_gradients(ps, 1e9), "torch": lambda: nn.utils.clip_grad_norm_(ps, 1e9)}, rounds, repeat)
    return {"ms": {w: round(statistics.median(t) * 1e3, 4) for w, t in times.items()},
            "ratio": round(statistics.median(a / b for a, b in zip(times["ours"], times["torch"])), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "machine": machine("torch"), "command": "python -m benchmarks.optimizers",
                                 "threads": arguments.threads, "rounds": arguments.rounds,
                                 "copies": arguments.copies, "bar": BAR}
    for size, shapes in SHAPES.items():
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"\n{size}: {numbers:,} parameters in {len(shapes)} tensors; milliseconds a step")
        rows = []
        for name, makers in ways().items():
            slow = name == "Muon" and size == "10 M"
            rows.append(row := measure(name, makers, shapes, 1 if slow else arguments.rounds, 1 if size == "10 M" else 50, arguments.copies))
            cells = "  ".join(f"{way} {ms:.3g}" for way, ms in row["ms"].items())
            print(f"{name:9} ratio {row.get('ratio', float('nan')):5.2f}  keeps {row['numbers_kept']:.0f}   {cells}", flush=True)
        clip = clipping(shapes, arguments.rounds * arguments.copies, 1 if size == "10 M" else 50)
        print(f"clipping  ratio {clip['ratio']:5.2f}            ours {clip['ms']['ours']:.3g}  torch {clip['ms']['torch']:.3g}")
        result[size] = {"parameters": numbers, "tensors": len(shapes), "steps": rows, "clipping": clip}
        worst = max(row.get("ratio", 0.0) for row in rows)
        print(f"worst ratio {worst:.2f}" + (f" (bar {BAR}: {'met' if worst <= BAR else 'MISSED'})" if size == "10 M" else ""))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__": main()
