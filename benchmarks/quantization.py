"""Rounded weights: nats lost by bits and method over three models, and what int8 and int4 do to speed and bytes.

    python -m benchmarks.quantization --data ../shared/data

stories: three models of Small World (limit=3), each trained anew with a seed of its own, rounded in every way that the chapter has. Nats
per token that a rounded model pays more than its own exact one, on the same 300 test stories: the difference of each story pair, its mean
over the models with their standard deviation, and the mean standard error over stories. Calibration on 128 training stories. Differences
between methods are taken model by model. `repair`: plain rounding at two bits against as many further steps with and without rounding.
outliers: the same models with one planted channel, whole numbers on both sides, smoothed and not.
cache: keys and values in few bits, read token by token.
shakespeare: one model of real text (bytes), the same table in bits per byte; windows of the context, paired by window.
speed: tokens a second in reading (256 at once) and in writing (one by one, after 64, with a KVCache), by the clock, in rounds in which all
take turns; bytes of the model. Random weights, since time does not depend on them. float32 and bfloat16 are plain PyTorch; "int8 weights"
and "int4 weights" make floats of the codes at each call; "int8 products" rounds activations, too, and multiplies whole numbers; "PyTorch's
kernels" are torch.ops.aten._weight_int8pack_mm and _weight_int4pack_mm_for_cpu behind activations in bfloat16. All models run module
by module (`generate` writes down the operations of plain models, which would favour float32).
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
from lmbook.perplexity import Evaluation, evaluate, floor
from lmbook.quantization import QuantizeConfig, QuantizedKVCache, QuantizedLinear, quantization_aware, quantize, size_of
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3, options=[Option("rounds", 7, 1, "rounds in which all take turns")])
WORLD = SmallWorld(SmallWorldConfig(limit=3))
SHAPE: dict[str, Any] = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_ff": 192, "norm": "rms", "activation": "swiglu",
                         "positions": "rotary", "bias": False, "init": "xavier_uniform"}
INT8 = QuantizeConfig(8, None, "symmetric", activations="int8")
WAYS: dict[str, QuantizeConfig] = {
    "int8, rows": QuantizeConfig(8, None, "symmetric"), "int8 products": INT8,
    **{f"{bits} bits, {scheme}, groups of {size}": QuantizeConfig(bits, size, scheme)  # type: ignore[arg-type]
       for bits in (4, 3, 2) for scheme in ("affine", "symmetric") for size in (16, 32, 64)},
    **{f"4 bits, nf4, groups of {size}": QuantizeConfig(4, size, "nf4") for size in (16, 32, 64)},
    **{f"{bits} bits, affine, groups of 32, {method}": QuantizeConfig(bits, 32, method=method)  # type: ignore[arg-type]
       for bits in (4, 3, 2) for method in ("awq", "gptq")},
    "4 bits, nf4, groups of 64, gptq": QuantizeConfig(4, 64, "nf4", "gptq"),
}  # fmt: skip


def fit(model: Transformer, rows: Sequence[Sequence[int]], steps: int, seed: int) -> Transformer:
    config = TrainConfig(steps=steps, warmup=min(10, steps - 1), schedule="wsd", seed=seed, optimizer=muon_and_adamw, device="cpu",
                         log_every=10**6)
    Trainer(model, Examples(rows, batch_size=16, sort=10, seed=seed), config).fit()
    return model.eval()


class Stories:
    "Texts, and for each seed a model of them."

    def __init__(self, settings: Settings):
        self.settings, texts = settings, list(WORLD.texts("train", n=settings.pick(8000, 1500)))
        self.test, self.words = list(WORLD.texts("test", n=settings.pick(300, 5))), WordTokenizer.train(texts)
        self.rows = [self.words.encode(text, bos=True, eos=True) for text in texts[: settings.pick(8000, 40)]]
        self.calibration = self.rows[: settings.pick(128, 3)]

    def model(self, seed: int) -> Transformer:
        torch.manual_seed(seed)
        return fit(Transformer(TransformerConfig(self.words.vocab_size, **SHAPE)), self.rows, self.settings.pick(800, 2), seed)

    def pays(self, model: nn.Module) -> Evaluation: return evaluate(model, self.test, self.words)


def summary(found: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    "By name: mean and spread over models of the nats lost, and the mean standard error over stories."
    return {name: mean_sd([value for value, _ in values]) | {"error over stories": statistics.fmean(e for _, e in values)}
            for name, values in found.items()}


@BENCHMARK.part()
def stories(settings: Settings) -> dict[str, Any]:
    data = Stories(settings)
    lost: dict[str, list[tuple[float, float]]] = {}
    saved: dict[str, list[tuple[float, float]]] = {}
    above, bits = [], {}
    for seed in range(settings.seeds):
        model = data.model(seed)
        exact, paid = data.pays(model), {}
        above.append(exact.excess(floor(WORLD, data.test, sample=not settings.dry)).value)
        for name, config in WAYS.items():
            new = quantize(model, config, data.calibration)
            paid[name], bits[name] = data.pays(new), size_of(new).bits
            lost.setdefault(name, []).append(tuple(paid[name].excess(exact)))
        for name in WAYS:
            plain, _, method = name.rpartition(", ")
            if method in ("awq", "gptq"): saved.setdefault(name, []).append(tuple(paid[plain].excess(paid[name])))
        two, steps = QuantizeConfig(2, 32), settings.pick(150, 2)
        aware, unaware = copy.deepcopy(model), copy.deepcopy(model)
        with quantization_aware(aware, two): fit(aware, data.rows, steps, seed)
        fit(unaware, data.rows, steps, seed)
        after = {name: data.pays(quantize(m, two)) for name, m in (("with rounding", aware), ("without", unaware))}
        for name, found in after.items(): lost.setdefault(f"repair: {name}", []).append(tuple(found.excess(exact)))
        saved.setdefault("repair", []).append(tuple(after["without"].excess(after["with rounding"])))
        print(f"  seed {seed}: {above[-1]:.3f} nats per token above the floor", flush=True)
    return {"above the floor": mean_sd(above), "bits per weight": bits, "nats lost": summary(lost), "saved": summary(saved)}


def with_outlier(model: Transformer, channel: int = 5, times: float = 60) -> Transformer:
    "The same function, with a channel so many times as large where the norms let it out."
    new = copy.deepcopy(model)
    for block in new.decoder.blocks:  # type: ignore[union-attr]
        a, m = block.attention, block.mlp
        for norm, readers in ((block.attention_norm, (a.query, a.key, a.value)), (block.mlp_norm, (m.up, m.gate))):
            norm.weight.data[channel] *= times
            for layer in readers: layer.weight.data[:, channel] /= times
    return new


@BENCHMARK.part()
def outliers(settings: Settings) -> dict[str, Any]:
    data, found = Stories(settings), dict[str, list[tuple[float, float]]]()
    for seed in range(settings.seeds):
        model = data.model(seed)
        exact, planted = data.pays(model), with_outlier(model)
        smooth = QuantizeConfig(8, None, "symmetric", activations="int8", smooth=0.5)
        for name, new in (
            ("as trained", quantize(model, INT8)), ("outlier", quantize(planted, INT8)),
            ("outlier, smoothed", quantize(planted, smooth, data.calibration)),
            ("outlier, 4 bits", quantize(planted, QuantizeConfig(4, 32))),
            ("outlier, 4 bits, awq", quantize(planted, QuantizeConfig(4, 32, method="awq"), data.calibration)),
            ("outlier, 4 bits, gptq", quantize(planted, QuantizeConfig(4, 32, method="gptq"), data.calibration)),
        ): found.setdefault(name, []).append(tuple(data.pays(new).excess(exact)))  # fmt: skip
    return summary(found)


@BENCHMARK.part()
def cache(settings: Settings) -> dict[str, Any]:
    data, found, sizes = Stories(settings), dict[str, list[tuple[float, float]]](), dict[str, float]()
    T = 64
    long = torch.tensor([row[:T] for row in map(lambda t: data.words.encode(t, bos=True), data.test) if len(row) >= T])

    @torch.no_grad()
    def pays(model: Transformer, kept: KVCache) -> np.ndarray:
        scores = torch.cat([model(long[:, [t]], cache=kept) for t in range(T - 1)], 1)
        return F.cross_entropy(scores.transpose(1, 2), long[:, 1:], reduction="none").mean(1).numpy()

    for seed in range(settings.seeds):
        model, plain = data.model(seed), KVCache(2)
        exact = pays(model, plain)
        for bits in (8, 4, 2):
            few = QuantizedKVCache(2, bits)
            extra = pays(model, few) - exact
            found.setdefault(f"{bits} bits", []).append((float(extra.mean()), float(extra.std(ddof=1) / len(extra) ** 0.5)))
            sizes[f"{bits} bits"] = few.nbytes / plain.nbytes
    return {"nats lost": summary(found), "share of the bytes": sizes}


@BENCHMARK.part(data=["tinyshakespeare"])
def shakespeare(settings: Settings) -> dict[str, Any]:
    text = (settings.folder("tinyshakespeare") / "input.txt").read_bytes()
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    cut, T = len(ids) * 9 // 10, settings.pick(128, 32)
    torch.manual_seed(0)
    shape = SHAPE | settings.pick({"d_model": 192, "n_layer": 4, "n_head": 6, "d_ff": 512}, {}) | {"context_length": T}
    model, steps = Transformer(TransformerConfig(256, **shape)), settings.pick(2000, 2)
    config = TrainConfig(steps=steps, lr=0.02, warmup=min(50, steps - 1), schedule="wsd", optimizer=muon_and_adamw, device="cpu",
                         log_every=10**6)
    Trainer(model, TokenStream(ids[:cut], 16, T, seed=0), config).fit()
    model.eval()
    held, n = ids[cut:], settings.pick(400, 4)
    windows = [held[i * T : (i + 1) * T].tolist() for i in range(min(n, len(held) // T))]
    starts = np.random.default_rng(0).integers(0, cut - T, settings.pick(128, 3))
    calibration = [ids[i : i + T] for i in starts.tolist()]
    exact, out = evaluate(model, windows), {}
    for name, way in WAYS.items():
        new = quantize(model, way, calibration)
        lost = evaluate(new, windows).excess(exact)
        cost = {"bits per byte lost": lost.value / np.log(2), "error": lost.standard_error / np.log(2)}
        out[name] = {"bits per weight": size_of(new).bits, **cost}
    return {"bits per byte": exact.loss / np.log(2), "parameters": sum(p.numel() for p in model.parameters()), "ways": out}


# ---------------------------------------------------------------- speed


class Packed(nn.Module):
    "A linear layer by PyTorch's own kernels for packed weights, with activations in bfloat16."

    def __init__(self, layer: nn.Linear, bits: int):
        super().__init__()
        self.bits, self.in_features = bits, layer.in_features
        new = QuantizedLinear.of(layer, quantize_one(layer, bits))
        codes, scale = new.codes, new.scale[:, 0].contiguous()
        if bits == 4:
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(new.rounded.codes.int(), 1)
            scale = torch.stack([new.scale.T, torch.zeros_like(new.scale.T)], -1).contiguous()  # codes less 8, and no shift
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).bfloat16()
        if self.bits == 8: y = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale)
        else: y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, 32, self.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_one(layer: nn.Linear, bits: int) -> Any:
    from lmbook.quantization import round_weight

    return round_weight(layer.weight, QuantizeConfig(bits, None if bits == 8 else 32, "symmetric"))


def packed(model: Transformer, bits: int) -> Transformer:
    new = copy.deepcopy(model)
    for name, layer in list(new.named_modules()):
        if isinstance(layer, nn.Linear) and ".blocks." in name:
            parent, _, own = name.rpartition(".")
            setattr(new.get_submodule(parent), own, Packed(layer, bits))
    return new


@BENCHMARK.part()
def speed(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for width, depth in settings.pick(((256, 4), (768, 6), (1536, 4)), ((64, 1),)):
        torch.manual_seed(0)
        config = TransformerConfig(512, **{**SHAPE, "d_model": width, "n_layer": depth, "n_head": width // 64, "d_ff": 3 * width})
        model = Transformer(config).eval()
        models: dict[str, Transformer] = {
            "float32": model, "bfloat16": copy.deepcopy(model).bfloat16(),
            "int8 weights": quantize(model, QuantizeConfig(8, None, "symmetric")),
            "int8 products": quantize(model, INT8), "int4 weights": quantize(model, QuantizeConfig(4, 32, "symmetric")),
            "int8, PyTorch's kernel": packed(model, 8), "int4, PyTorch's kernel": packed(model, 4),
        }  # fmt: skip
        read, start = (torch.randint(0, 512, (1, settings.pick(*sizes))) for sizes in ((256, 8), (64, 4)))
        n = settings.pick(16, 2)

        def reading(m: Transformer) -> Callable[[], None]:
            @torch.inference_mode()
            def work() -> None: m(read)  # noqa: B023
            return work

        def writing(m: Transformer) -> Callable[[], None]:
            kept = KVCache(depth)  # noqa: B023
            with torch.inference_mode(): m(start, cache=kept)  # noqa: B023

            @torch.inference_mode()
            def work() -> None:
                kept.crop(start.shape[1])  # noqa: B023
                for i in range(n): m(read[:, [i % read.shape[1]]], cache=kept)  # noqa: B023
            return work

        read_s = in_turns({name: reading(m) for name, m in models.items()}, settings.rounds)
        write_s = in_turns({name: writing(m) for name, m in models.items()}, settings.rounds)
        middle, middle_write = medians(read_s), medians(write_s)
        with torch.inference_mode(): exact = model(read)
        for name, m in models.items():
            with torch.inference_mode(): off = (m(read).float() - exact).norm() / exact.norm()
            rows.append({
                "d_model": width, "n_layer": depth, "way": name, "megabytes": size_of(m).bytes / 1e6,
                "read, tokens a second": read.shape[1] / middle[name], "against float32": ratio(read_s["float32"], read_s[name]),
                "written, tokens a second": n / middle_write[name], "written against float32": ratio(write_s["float32"], write_s[name]),
                "scores off by": float(off),
            })  # fmt: skip
    return rows


if __name__ == "__main__": run(__file__)
