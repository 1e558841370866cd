"""How long a step takes, beside torch.optim's, and what it keeps in memory.

    python -m benchmarks.optimizers

Parameters: the tensors of a Transformer with about ten million, and of a network with seven tensors, where what counts is the work in
Python. Each way of making a step has its own parameters, and all take turns in each round, so that what else the machine does meets them
alike. Where parameters lie in memory makes a difference of up to a third to the very same code; so everything is made anew several times,
in alternating order. A ratio is the median of the ratios within a round. One thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, in_turns, medians, ratio, run
from lmbook.optimizers import SGD, Adagrad, Adam, AdamW, Lion, Muon, RMSprop
from lmbook.schedules import clip_gradients

Shapes = list[tuple[int, ...]]
BAR = 1.2  # our step may take so many times as long as torch.optim's fastest
BENCHMARK = Benchmark(
    packages=("torch",), facts=lambda settings: {"bar": BAR},
    options=[Option("rounds", 5, 1, "rounds in which all take turns"), Option("copies", 6, 1, "how often everything is made anew")],
)


def transformer(d: int = 320, n_layer: int = 7, vocabulary: int = 4096) -> Shapes:
    "The shapes in a decoder with tied word vectors."
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocabulary, d), *n_layer * layer, (d,), (d,)]


def parameters(shapes: Shapes, matrices: bool) -> list[nn.Parameter]:
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


def measure(name: str, makers: dict[str, Callable], shapes: Shapes, rounds: int, repeat: int, copies: int) -> dict[str, object]:
    times: dict[str, list[float]] = {way: [] for way in makers}
    kept = 0.0
    for copy in range(copies):
        optimizers = {}
        for way in list(makers)[:: -1 if copy % 2 else 1]:
            ps = parameters(shapes, matrices=name == "Muon")
            optimizers[way] = makers[way](ps)
            for _ in range(2): optimizers[way].step()
            if way == "ours": kept = state_numbers(optimizers[way], ps)
        steps = {way: optimizer.step for way, optimizer in optimizers.items()}
        for way, found in in_turns(steps, rounds, repeat, warm_up=False).items(): times[way] += found
    middle = medians(times)
    theirs = {way: t for way, t in middle.items() if way.startswith("torch")}
    row: dict[str, object] = {"optimizer": name, "numbers_kept": round(kept, 3), "ms": {way: t * 1e3 for way, t in middle.items()}}
    if theirs:
        best = min(theirs, key=theirs.get)
        row |= {"fastest_of_torch": best, "ratio": ratio(times["ours"], times[best]),
                "ratio_to_loop": ratio(times["ours"], times["torch, loop"])}
    return row


def clipping(shapes: Shapes, rounds: int, repeat: int) -> dict[str, object]:
    ps = parameters(shapes, matrices=False)
    times = in_turns({"ours": lambda: clip_gradients(ps, 1e9), "torch": lambda: nn.utils.clip_grad_norm_(ps, 1e9)}, rounds, repeat)
    return {"ms": {way: t * 1e3 for way, t in medians(times).items()}, "ratio": ratio(times["ours"], times["torch"])}


def all_of(shapes: Shapes, repeat: int, settings: Settings, rounds: dict[str, int]) -> dict[str, object]:
    "All optimizers on tensors of these shapes, and clipping. `rounds`: fewer for those that are slow."
    rows = [measure(name, makers, shapes, rounds.get(name, settings.rounds), repeat, settings.copies) for name, makers in ways().items()]
    print(f"  worst ratio {max(row.get('ratio', 0.0) for row in rows):.2f} (the bar for 10 M is {BAR})")
    return {"parameters": sum(torch.Size(shape).numel() for shape in shapes), "tensors": len(shapes), "steps": rows,
            "clipping": clipping(shapes, settings.rounds * settings.copies, repeat)}


@BENCHMARK.part("10 M")
def large(settings: Settings) -> dict[str, object]:
    shapes = settings.pick(transformer(), transformer(d=32, n_layer=1, vocabulary=64))
    return all_of(shapes, 1, settings, {"Muon": 1})


@BENCHMARK.part()
def small(settings: Settings) -> dict[str, object]:
    return all_of([(501, 16), (64, 64), (64,), (64, 64), (64,), (501, 64), (501,)], settings.pick(50, 2), settings, {})


if __name__ == "__main__": run(__file__)
