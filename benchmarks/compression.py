"""Trained models made smaller: nats above the floor, bytes and tokens per second, over three seeds; tickets and teachers, tried honestly.

    python -m benchmarks.compression --data ../shared/data

stories: three models of Small World (limit=2), each trained anew with a seed of its own, and made smaller in every way that the chapter has
(and rounded as in chapter 78). Nats per token above the floor, on the same 300 test stories, once as it is and once after further training;
the control "as trained" gets the same further steps. What is rounded is not trained on, and of the ways to choose zeros only some are.
gradual: pruning at once and then training, against a sparsity that rises while training, at equal steps.
lottery: the mask of a trained model on the weights of its beginning, on another beginning, and a random mask; against the dense model, and
against pruning what was trained and training on for as long (which has had twice the steps). Nats above the floor.
distillation: a student with and without a teacher, once at equal computation (forward and backward passes of the student, forward passes
of the teacher) and once at equal steps, for few texts and for many.
shakespeare: three models of real text (bytes), the table of `stories` in bits per byte.
speed: tokens a second in reading (256 at once) and in writing (one by one, after 64, with a KVCache), by the clock, in rounds in which all
take turns. Random weights, since time does not depend on them. "90 % zeros, CSR" multiplies by torch.sparse's product.
products: the seconds of one product with a CSR matrix over those of a dense one, by sparsity.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, in_turns, mean_sd, medians, ratio, run
from lmbook.batches import Examples, TokenStream
from lmbook.cache import KVCache
from lmbook.compression import (
    DistillConfig,
    PruneConfig,
    SparseTraining,
    distilling,
    importance,
    low_rank,
    prune,
    shrink,
    sparsity_of,
    stored_bytes,
)
from lmbook.generation import SamplingConfig, generate
from lmbook.perplexity import Evaluation, evaluate, floor
from lmbook.quantization import QuantizeConfig, quantize, size_of
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig, flops

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3, options=[Option("rounds", 5, 1, "rounds in which all take turns")])
WORLD = SmallWorld(SmallWorldConfig(limit=2))
SHAPE: dict[str, Any] = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_ff": 128, "norm": "rms", "activation": "swiglu",
                         "positions": "rotary", "bias": False, "init": "xavier_uniform"}
SMALL = SHAPE | {"d_model": 32, "n_layer": 1, "n_head": 2, "d_ff": 96}
STEPS = 400  # of a model of stories
NOT_TRAINED_ON = ("bits", "by chance", "of the model", "Wanda", "plain", "30% ")
Rows = Sequence[Sequence[int]]


def fit(model: Transformer, batches: Any, steps: int, seed: int = 0, **more: Any) -> Transformer:
    config = TrainConfig(steps=steps, warmup=min(10, steps - 1), schedule="wsd", seed=seed, optimizer=muon_and_adamw, device="cpu",
                         log_every=10**6)
    Trainer(model, batches, config, **more).fit()
    return model.eval()


class Stories:
    "Texts, and models of them."

    def __init__(self, settings: Settings):
        self.settings, texts = settings, list(WORLD.texts("train", n=settings.pick(3000, 300)))
        self.test, self.words = list(WORLD.texts("test", n=settings.pick(300, 4))), WordTokenizer.train(texts)
        self.rows = [self.words.encode(text, bos=True, eos=True) for text in texts]
        self.calibration = self.rows[: settings.pick(64, 3)]
        self.floor = floor(WORLD, self.test, sample=not settings.dry)

    def new(self, seed: int, shape: dict[str, Any] = SHAPE) -> Transformer:
        torch.manual_seed(seed)
        return Transformer(TransformerConfig(self.words.vocab_size, **shape))

    def fit(self, model: Transformer, steps: int, seed: int = 0, rows: Rows | None = None, batch: int = 16, **more: Any) -> Transformer:
        batches = Examples(self.rows if rows is None else rows, batch_size=batch, sort=10, seed=seed)
        return fit(model, batches, self.settings.pick(steps, 2), seed, **more)

    def pays(self, model: nn.Module) -> Evaluation: return evaluate(model, self.test, self.words)

    def above(self, model: nn.Module) -> float: return self.pays(model).excess(self.floor).value


def ways(model: Transformer, texts: Rows, short: bool = False) -> dict[str, tuple[Transformer, str]]:
    "Models made of one, each with the layout in which its sparse matrices are stored (empty: as its tensors are)."
    value, c = importance(model, texts), model.config

    def zeros(share: float, method: str = "magnitude", scope: str = "matrix", pattern: str = "any") -> Transformer:
        return prune(model, PruneConfig(share, method, scope, pattern), texts)  # type: ignore[arg-type]

    made = {"as trained": (model, "dense")}
    for share in (0.5, 0.7) if short else (0.3, 0.5, 0.7, 0.9):
        made[f"{share:.0%} zeros, by size"] = zeros(share), "bitmap"
        made[f"{share:.0%} zeros, SparseGPT"] = zeros(share, "sparsegpt"), "bitmap"
        if short: continue
        made[f"{share:.0%} zeros, by chance"] = zeros(share, "random"), "bitmap"
        made[f"{share:.0%} zeros, by size, of the model"] = zeros(share, "magnitude", "global"), "bitmap"
        made[f"{share:.0%} zeros, by gradient, of the model"] = zeros(share, "taylor", "global"), "bitmap"
        made[f"{share:.0%} zeros, Wanda, by row"] = zeros(share, "wanda", "row"), "bitmap"
    for label, method in (("by size", "magnitude"), ("SparseGPT", "sparsegpt")):
        made[f"2:4, {label}"] = zeros(0.5, method, pattern="2:4"), "2:4"
    made["half of the heads"] = shrink(model, heads=c.n_head // 2, by=value), "dense"
    made["half of the channels"] = shrink(model, channels=c.hidden // 2, by=value), "dense"
    made["without the last layer"] = shrink(model, layers=range(c.n_layer - 1)), "dense"
    for keep in (0.5,) if short else (0.75, 0.5):
        made[f"rank for {keep:.0%}, plain"] = low_rank(model, keep), ""
        made[f"rank for {keep:.0%}, with activations"] = low_rank(model, keep, texts), ""
    made["8 bits"] = quantize(model, QuantizeConfig(8)), ""
    made["4 bits, gptq"] = quantize(model, QuantizeConfig(4, 32, method="gptq"), texts), ""
    return made


def table(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    "By way: mean and spread over models of each number."
    return {name: {key: mean_sd([row[key] for row in rows]) for key in rows[0]} for name, rows in found.items()}


def bytes_of(model: Transformer, layout: str) -> float:
    return float(stored_bytes(model, layout) if layout else size_of(model).bytes)  # type: ignore[arg-type]


def compressed(model: Transformer, texts: Rows, loss: Callable[[nn.Module], float], train_on: Callable[[Transformer, Any], Transformer],
               short: bool = False) -> dict[str, dict[str, float]]:
    "All ways on one model: bytes, loss, and loss after training on."
    out = {}
    for name, (new, layout) in ways(model, texts, short).items():
        out[name] = {"kilobytes": bytes_of(new, layout) / 1000, "loss": loss(new)}
        if any(word in name for word in NOT_TRAINED_ON): continue
        callbacks = [SparseTraining()] if layout in ("bitmap", "2:4") else []
        trained = train_on(copy.deepcopy(new), callbacks)
        out[name]["trained on"] = loss(trained)
        if name == "half of the channels":
            both = quantize(trained, QuantizeConfig(4, 32, method="gptq"), texts)
            out["half of the channels, trained on, 4 bits"] = {"kilobytes": size_of(both).bytes / 1000, "loss": loss(both)}
    return out


@BENCHMARK.part()
def stories(settings: Settings) -> dict[str, Any]:
    data, found = Stories(settings), dict[str, list[dict[str, float]]]()
    for seed in range(settings.seeds):
        model = data.fit(data.new(seed), STEPS, seed)
        made = compressed(model, data.calibration, data.above, lambda new, c: data.fit(new, 60, callbacks=c), settings.dry)
        for name, row in made.items(): found.setdefault(name, []).append(row)
        print(f"  seed {seed}: {made['as trained']['loss']:.3f} nats per token above the floor", flush=True)
    return table(found)


@BENCHMARK.part()
def gradual(settings: Settings) -> dict[str, Any]:
    data, found = Stories(settings), dict[str, list[float]]()
    steps = settings.pick(120, 4)
    for seed in range(settings.seeds):
        model = data.fit(data.new(seed), STEPS, seed)
        exact = data.pays(model)

        def lost(new: nn.Module) -> float: return data.pays(new).excess(exact).value  # noqa: B023

        found.setdefault("dense", []).append(lost(fit(copy.deepcopy(model), Examples(data.rows, batch_size=16, sort=10, seed=0), steps)))
        for share in (0.8, 0.95):
            new, rising = prune(model, PruneConfig(share)), copy.deepcopy(model)
            batches = lambda: Examples(data.rows, batch_size=16, sort=10, seed=0)  # noqa: E731
            fit(new, batches(), steps, callbacks=[SparseTraining()])
            fit(rising, batches(), steps, callbacks=[SparseTraining(PruneConfig(share), 0, steps * 2 // 3, max(1, steps // 24))])
            assert abs(sparsity_of(new) - share) < 0.01 > abs(sparsity_of(rising) - share)
            for name, m in (("at once", new), ("gradual", rising)): found.setdefault(f"{share:.0%}, {name}", []).append(lost(m))
    return {name: mean_sd(values) for name, values in found.items()}


def masked(model: Transformer, pattern: Transformer) -> Transformer:
    "A copy with zeros where the other model has them."
    new = copy.deepcopy(model)
    for a, b in zip(new.decoder.blocks.modules(), pattern.decoder.blocks.modules()):  # type: ignore[union-attr]
        if isinstance(a, nn.Linear) and isinstance(b, nn.Linear): a.weight.data *= b.weight.data != 0
    return new


@BENCHMARK.part()
def lottery(settings: Settings) -> dict[str, Any]:
    data, found, steps = Stories(settings), dict[str, list[float]](), 400
    for seed in range(settings.seeds):
        first = data.new(seed, SMALL)
        dense = data.fit(copy.deepcopy(first), steps, seed, batch=8)
        found.setdefault("dense", []).append(data.above(dense))
        for share in (0.5, 0.8, 0.9):
            by_size, by_chance = prune(dense, PruneConfig(share)), prune(dense, PruneConfig(share, "random", seed=seed))
            starts = {"ticket": masked(first, by_size), "mask, new start": masked(data.new(seed + 100, SMALL), by_size),
                      "random mask": masked(first, by_chance), "trained on": by_size}
            for name, new in starts.items():
                data.fit(new, steps, seed, batch=8, callbacks=[SparseTraining()])
                found.setdefault(f"{share:.0%}, {name}", []).append(data.above(new))
    return {name: mean_sd(values) for name, values in found.items()}


@BENCHMARK.part()
def distillation(settings: Settings) -> dict[str, Any]:
    data, found = Stories(settings), dict[str, list[float]]()
    small, large = (data.new(0, shape).config for shape in (SMALL, SHAPE))
    times = 1 + flops(large, 100) / (3 * flops(small, 100))  # what a step with a teacher costs
    steps, n = 200, settings.pick(300, 4)
    alone = round(steps * times)
    for seed in range(settings.seeds):
        teacher = data.fit(data.new(seed), STEPS, seed)
        found.setdefault("teacher", []).append(data.above(teacher))
        torch.manual_seed(seed)
        free = SamplingConfig(max_new_tokens=settings.pick(160, 8), eos_id=data.words.eos_id)
        begin = [[data.words.bos_id]] * n
        written = [b + w for b, w in zip(begin, generate(teacher, begin, free))]

        def learn(rows: Rows, steps: int, config: DistillConfig | None = None) -> float:
            student = data.new(seed + 50, SMALL)  # noqa: B023
            if config is None: return data.above(data.fit(student, steps, seed, rows, 8))  # noqa: B023
            with distilling(student, teacher, config) as loss:  # noqa: B023
                return data.above(data.fit(student, steps, seed, rows, 8, loss=loss))  # noqa: B023

        spent = n / 8 * flops(large, 100) / (3 * flops(small, 100))  # steps of the student that writing costs, of eight stories each
        for size in (60, 3000):
            rows = data.rows[:size]
            lessons = {
                "no teacher, equal computation": learn(rows, alone), "no teacher, equal steps": learn(rows, steps),
                "soft targets, T = 1": learn(rows, steps, DistillConfig(1.0)),
                "soft targets, T = 2": learn(rows, steps, DistillConfig(1.0, 2.0)),
                "half soft, half text": learn(rows, steps, DistillConfig(0.5)),
                "soft targets and hidden states": learn(rows, steps, DistillConfig(1.0, 1.0, 1.0)),
                "written stories": learn([*rows, *written], max(2, round(alone - spent))),
                "written stories, soft targets": learn([*rows, *written], steps, DistillConfig(1.0)),
            }  # fmt: skip
            for name, loss in lessons.items(): found.setdefault(f"{size} stories: {name}", []).append(loss)
    return {"a step with a teacher costs": times, "steps": {"with a teacher": steps, "without": alone},
            "above the floor": {name: mean_sd(values) for name, values in found.items()}}


@BENCHMARK.part(data=["tinyshakespeare"])
def shakespeare(settings: Settings) -> dict[str, Any]:
    text = (settings.folder("tinyshakespeare") / "input.txt").read_bytes()
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    cut, T = len(ids) * 9 // 10, settings.pick(96, 32)
    shape = SHAPE | settings.pick({"d_model": 96, "n_layer": 3, "n_head": 6, "d_ff": 256}, {}) | {"context_length": T}
    held, n, found = ids[cut:], settings.pick(200, 3), dict[str, list[dict[str, float]]]()
    windows = [held[i * T : (i + 1) * T].tolist() for i in range(min(n, len(held) // T))]
    starts = np.random.default_rng(0).integers(0, cut - T, settings.pick(64, 3))
    calibration = [ids[i : i + T].tolist() for i in starts.tolist()]

    def bits(model: nn.Module) -> float: return evaluate(model, windows).loss / float(np.log(2))

    def train(model: Transformer, steps: int, seed: int, callbacks: Any = ()) -> Transformer:
        return fit(model, TokenStream(ids[:cut], 8, T, seed=seed), settings.pick(steps, 2), seed, callbacks=callbacks)

    for seed in range(settings.seeds):
        torch.manual_seed(seed)
        model = train(Transformer(TransformerConfig(256, **shape)), 600, seed)
        made = compressed(model, calibration, bits, lambda new, c: train(new, 50, 100, c), True)
        for name, row in made.items(): found.setdefault(name, []).append(row)
        print(f"  seed {seed}: {made['as trained']['loss']:.3f} bits per byte", flush=True)
    return table(found)


# ---------------------------------------------------------------- speed


class Sparse(nn.Module):
    "A linear layer by PyTorch's product with a CSR matrix."

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.csr, self.in_features = layer.weight.detach().to_sparse_csr(), layer.in_features

    def forward(self, x: Tensor) -> Tensor: return (self.csr @ x.flatten(0, -2).T).T.view(*x.shape[:-1], -1)


def in_csr(model: Transformer) -> Transformer:
    new = copy.deepcopy(model)
    for name, layer in list(new.named_modules()):
        if isinstance(layer, nn.Linear) and ".blocks." in name:
            parent, _, own = name.rpartition(".")
            setattr(new.get_submodule(parent), own, Sparse(layer))
    return new


@BENCHMARK.part()
def speed(settings: Settings) -> list[dict[str, Any]]:
    width, depth = settings.pick((512, 4), (64, 2))
    torch.manual_seed(0)
    config = TransformerConfig(512, **{**SHAPE, "d_model": width, "n_layer": depth, "n_head": width // 64 * 2, "d_ff": 3 * width})
    model = Transformer(config).eval()
    half, nine = (prune(model, PruneConfig(share)) for share in (0.5, 0.9))
    value = importance(model, [list(range(8))])
    models: dict[str, tuple[Transformer, str]] = {
        "as trained": (model, "dense"), "50 % zeros": (half, "bitmap"), "90 % zeros": (nine, "bitmap"),
        "50 % zeros, CSR": (in_csr(half), ""), "90 % zeros, CSR": (in_csr(nine), ""),
        "half of the heads": (shrink(model, heads=config.n_head // 2, by=value), "dense"),
        "half of the channels": (shrink(model, channels=config.hidden // 2, by=value), "dense"),
        "half of the layers": (shrink(model, layers=range(depth // 2)), "dense"), "rank for 50 %": (low_rank(model, 0.5), ""),
        "8 bits": (quantize(model, QuantizeConfig(8)), ""), "4 bits": (quantize(model, QuantizeConfig(4, 32)), ""),
    }  # fmt: skip
    read, start = (torch.randint(0, 512, (1, settings.pick(*sizes))) for sizes in ((256, 8), (64, 4)))
    n, rows = settings.pick(16, 2), []

    def reading(m: Transformer) -> Callable[[], None]:
        @torch.inference_mode()
        def work() -> None: m(read)
        return work

    def writing(m: Transformer) -> Callable[[], None]:
        kept = KVCache(m.config.n_layer)
        with torch.inference_mode(): m(start, cache=kept)

        @torch.inference_mode()
        def work() -> None:
            kept.crop(start.shape[1])
            for i in range(n): m(read[:, [i % read.shape[1]]], cache=kept)
        return work

    read_s, write_s = (in_turns({name: f(m) for name, (m, _) in models.items()}, settings.rounds) for f in (reading, writing))
    for name, (m, layout) in models.items():
        csr = name.endswith("CSR")
        kept = half if name.startswith("50") else nine
        rows.append({
            "way": name, "megabytes": (stored_bytes(kept, "csr") if csr else bytes_of(m, layout)) / 1e6,
            "read, tokens a second": read.shape[1] / medians(read_s)[name], "times as fast": ratio(read_s["as trained"], read_s[name]),
            "written, tokens a second": n / medians(write_s)[name],
            "written, times as fast": ratio(write_s["as trained"], write_s[name]),
        })  # fmt: skip
    return rows


@BENCHMARK.part()
def products(settings: Settings) -> list[dict[str, Any]]:
    size, rows = settings.pick(1024, 64), []
    torch.manual_seed(0)
    W = torch.randn(size, size)
    for tokens in settings.pick((1, 64, 512), (1, 4)):
        X = torch.randn(size, tokens)
        for share in settings.pick((0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (0.9,)):
            sparse = torch.where(W.abs() > W.abs().flatten().kthvalue(round(share * W.numel())).values, W, 0)
            csr = sparse.to_sparse_csr()
            torch.testing.assert_close(csr @ X, sparse @ X, rtol=1e-3, atol=1e-2)
            times = in_turns({"csr": lambda: csr @ X, "dense": lambda: F.linear(X.T, sparse)}, settings.rounds, settings.pick(5, 1))  # noqa: B023
            rows.append({"tokens": tokens, "sparsity": share, "seconds over dense": ratio(times["csr"], times["dense"]),
                         "multiplications over dense": statistics.fmean([csr.values().numel() / W.numel()])})
    return rows


if __name__ == "__main__": run(__file__)
