"""Rounding against enumeration, PyTorch and torchao; GPTQ against least squares solved anew; files, caches, bad input; planted faults."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lmbook.quantization as quantization
from lmbook.cache import KVCache
from lmbook.core import LmbookError
from lmbook.experts import MoEConfig, with_experts
from lmbook.finetuning import FinetuningError, LoraConfig, apply_lora, load_adapter, merge, save_adapter
from lmbook.generation import SamplingConfig, beam_search, generate
from lmbook.pretrained import load_pretrained
from lmbook.quantization import (
    QuantizationError,
    QuantizeConfig,
    QuantizedKVCache,
    QuantizedLinear,
    Seen,
    awq_scale,
    gptq,
    int8_product,
    load_quantized,
    nf4_levels,
    pack,
    quantization_aware,
    quantize,
    round_weight,
    save_quantized,
    size_of,
    smooth_scale,
    unpack,
)
from lmbook.tokenization import CharTokenizer
from lmbook.transformer import Classifier, ClassifierConfig, TransformerError
from tests import models
from tests.faults import planted

SCHEMES = [(b, s) for b, s in product((2, 3, 4, 8), ("affine", "symmetric", "nf4")) if s != "nf4" or b == 4]
INT8 = QuantizeConfig(8, None, "symmetric", activations="int8")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def config(bits: int, group_size: int | None, scheme: str = "affine", **more: Any) -> QuantizeConfig:
    return QuantizeConfig(bits, group_size, scheme, **more)  # type: ignore[arg-type]


def matrix(N: int = 6, K: int = 64, seed: int = 0, **kind: Any) -> Tensor:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W[0, :8], W[1] = 0, W[1].abs()  # a stretch of zeros, and a row that is all positive
    return W.to(kind.get("dtype", torch.float32))


def inputs(n: int = 300, K: int = 64, seed: int = 1) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=dice, dtype=torch.float64) * torch.rand(K, generator=dice, dtype=torch.float64)
    return torch.randn(n, K, generator=dice, dtype=torch.float64) @ mix


def hessian(X: Tensor) -> Tensor: return X.T @ X / len(X)


def output_error(new: Tensor, W: Tensor, H: Tensor) -> float:
    change = new.double() - W.double()
    return float(((change @ H.double()) * change).sum())


# ---------------------------------------------------------------- rounding


def all_levels(scale: float, zero: int | None, c: QuantizeConfig) -> Tensor:
    "What a weight can become, by the meaning of codes."
    if c.scheme == "nf4": return nf4_levels() * scale
    if c.scheme == "symmetric": return torch.arange(-(2 ** (c.bits - 1)) + 1, 2 ** (c.bits - 1)).float() * scale
    return (torch.arange(2**c.bits).float() - zero) * scale


def test_each_weight_gets_the_nearest_of_all_levels(module=quantization):
    W = matrix()
    for (bits, scheme), size in product(SCHEMES, (8, 32, None)):
        c = config(bits, size, scheme)
        rounded = module.round_weight(W, c)
        back, n = rounded.weight(), size or 64
        assert rounded.codes.dtype == torch.uint8 and int(rounded.codes.max()) < 2**bits
        for i, g in product(range(len(W)), range(64 // n)):
            zero = None if rounded.zero is None else int(rounded.zero[i, g])
            levels = all_levels(float(rounded.scale[i, g]), zero, c)
            w, new = (x[i, g * n : (g + 1) * n] for x in (W, back))
            best = (w[:, None] - levels).abs().amin(1)
            torch.testing.assert_close((w - new).abs(), best, rtol=1e-5, atol=1e-6 * float(levels.abs().max()))
            most = float(w.abs().max())
            assert most == 0 or float((w - new).abs().max()) <= (1.01 if scheme == "affine" else 0.505) * float(levels.diff().max())


def test_the_scale_fits_the_largest_weight(module=quantization):
    W = matrix()
    for bits, size in product((2, 3, 4, 8), (16, None)):
        groups = W.unflatten(1, (-1, size or 64))
        torch.testing.assert_close(module.round_weight(W, config(bits, size, "symmetric")).scale.float()[1:],
                                   groups.abs().amax(-1)[1:] / (2 ** (bits - 1) - 1), rtol=0.008, atol=0)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        torch.testing.assert_close(module.round_weight(W, config(bits, size)).scale.float()[1:],
                                   (high - low)[1:] / (2**bits - 1), rtol=0.008, atol=0)


def test_zero_stays_zero_and_zeros_round_to_zeros(module=quantization):
    W = matrix()
    W[:, 10] = 0
    for bits, scheme in SCHEMES:
        back = module.round_weight(W, config(bits, 8, scheme)).weight()
        assert not back[:, 10].any() and not back[0, :8].any() and back.isfinite().all()
    assert not module.round_weight(torch.zeros(2, 4), config(4, None)).weight().any()


def test_it_is_the_same_in_every_type_and_layout():
    W = matrix(dtype=torch.bfloat16)
    for bits, scheme in SCHEMES:
        c = config(bits, 16, scheme)
        one = round_weight(W, c)
        for other in (W.float(), W.double(), W.float().T.contiguous().T):
            assert torch.equal(one.codes, round_weight(other, c).codes)


def test_nf4_is_the_published_table():
    table = [  # of bitsandbytes, and of the paper's appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(nf4_levels(), torch.tensor(table), rtol=0, atol=1e-6)


def test_it_is_as_pytorch_does_it(module=quantization):
    W = matrix()
    for kind, scheme in ((torch.qint8, "symmetric"), (torch.quint8, "affine")):
        ours = module.round_weight(W, config(8, None, scheme))
        zero = torch.zeros(len(W)) if ours.zero is None else ours.zero[:, 0].double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are going to move to torchao
            theirs = torch.quantize_per_channel(W, ours.scale[:, 0].double(), zero.long(), 0, kind)
        assert torch.equal(theirs.int_repr().int(), ours.codes.int() - (128 if scheme == "symmetric" else 0))
        torch.testing.assert_close(theirs.dequantize(), ours.weight())
    for bits in (2, 3, 4):
        ours = module.round_weight(W, config(bits, None))
        theirs = torch.fake_quantize_per_channel_affine(W, ours.scale[:, 0].float(), ours.zero[:, 0].int(), 0, 0, 2**bits - 1)
        torch.testing.assert_close(theirs, ours.weight())


@needs_torchao
def test_it_is_as_torchao_does_it():
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

    W = matrix()[2:]
    for bits, size in product((2, 3, 4, 8), (16, 64)):
        for scheme, mapping, low in (("affine", MappingType.ASYMMETRIC, 0), ("symmetric", MappingType.SYMMETRIC, 1)):
            ours = round_weight(W, config(bits, size, scheme))
            most, middle = 2**bits - 1, 2 ** (bits - 1)
            scale, zero = choose_qparams_affine(W, mapping, (1, size), torch.uint8, low, most)
            torch.testing.assert_close(scale.view(len(W), -1), ours.scale.float(), rtol=0.008, atol=0)  # bfloat16
            if ours.zero is not None: assert (zero.view(len(W), -1).int() - ours.zero.int()).abs().max() <= 1
            own = torch.full(ours.scale.shape, middle) if ours.zero is None else ours.zero
            given = ((1, size), ours.scale.float(), own.int())
            codes = quantize_affine(W, *given, torch.uint8, low, most)
            assert torch.equal(codes, ours.codes)
            torch.testing.assert_close(dequantize_affine(codes, *given, torch.uint8, low, most), ours.weight())


# ---------------------------------------------------------------- packing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 41), st.integers(0, 3), st.integers(0, 99))
def test_codes_come_back(bits, n, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8)) and torch.equal(unpack(packed, bits, n), codes)


def test_bytes_by_hand(module=quantization):
    def packed(codes: list[int], bits: int) -> list[str]:
        return [f"{byte:08b}" for byte in module.pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()]

    assert packed([3, 15, 9], 4) == ["11110011", "00001001"]
    assert packed([1, 2, 3, 0], 2) == ["00111001"]
    assert packed([1, 7, 0, 5], 3) == ["00111001", "00001010"]  # from the right: 001, 111, 00|0, 101
    back = module.unpack(torch.tensor([0b00111001, 0b00001010], dtype=torch.uint8), 3, 4)
    assert back.tolist() == [1, 7, 0, 5]


def test_what_cannot_be_packed():
    codes = torch.tensor([[4, 1]], dtype=torch.uint8)
    for attempt in (lambda: pack(codes, 2), lambda: pack(codes, 9), lambda: pack(codes.long(), 4), lambda: unpack(codes, 4, 9),
                    lambda: unpack(codes, 4, -1), lambda: unpack(codes.int(), 4, 4), lambda: pack(torch.tensor(1, dtype=torch.uint8), 4)):
        with pytest.raises(QuantizationError): attempt()


# ---------------------------------------------------------------- whole numbers


def test_products_are_exact(module=quantization):
    dice = torch.Generator().manual_seed(0)
    for M, N, K in ((1, 1, 1), (1, 8, 512), (3, 5, 17), (20, 4, 3000), (2, 3, 3001), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
        a, b = (torch.randint(-128, 128, (n, K), dtype=torch.int8, generator=dice) for n in (M, N))
        for x, y in ((a, b), (a * 0 + 127, b * 0 + 127), (a * 0 - 128, b * 0 - 128), (a * 0 + 127, b * 0 - 128)):
            assert torch.equal(module.int8_product(x, y).long(), x.long() @ y.long().T)


def test_products_of_strange_strides():
    a, b = (torch.randint(-128, 128, (n, 512), dtype=torch.int8, generator=torch.Generator().manual_seed(0)) for n in (1, 9))
    right = a.long() @ b.long().T
    assert torch.equal(int8_product(a.as_strided((1, 512), (0, 1)), b).long(), right)
    assert torch.equal(int8_product(a, b.T.contiguous().T).long(), right)
    assert torch.equal(int8_product(a.expand(3, -1), b).long(), right.expand(3, -1))


def test_products_are_exact_where_the_processor_is_not(monkeypatch):
    monkeypatch.setattr(quantization, "_counts_exactly", lambda: False)
    test_products_are_exact()


def test_products_are_exact_without_the_newer_instructions():
    "As on a processor of 2017, where PyTorch's own product may be wrong."
    run = "import tests.test_quantization as t; t.test_products_are_exact(); print('exact')"
    done = subprocess.run([sys.executable, "-c", run], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout == "exact\n", done.stderr


# ---------------------------------------------------------------- GPTQ, AWQ, smoothing


def solved_anew(W: Tensor, H: Tensor, c: QuantizeConfig) -> Tensor:
    "At each column the best others, by least squares, given all that was rounded; the scale of a group when its first column comes."
    new, size = W.clone(), c.group_size or W.shape[1]
    for j in range(W.shape[1]):
        if not j % size: group = round_weight(new[:, j : j + size], config(c.bits, None, c.scheme))
        scale, zero = group.scale[:, 0].double(), None if group.zero is None else group.zero[:, 0]
        levels = torch.stack([all_levels(float(s), None if zero is None else int(zero[i]), c) for i, s in enumerate(scale)]).double()
        new[:, j] = levels.gather(1, (new[:, [j]] - levels).abs().argmin(1, keepdim=True))[:, 0]
        done, free = slice(0, j + 1), slice(j + 1, None)
        new[:, free] = W[:, free] - (new[:, done] - W[:, done]) @ H[done, free] @ torch.linalg.inv(H[free, free])
    return new


def test_gptq_is_least_squares_solved_anew(module=quantization):
    W, H = matrix(K=32, dtype=torch.float64), hessian(inputs(K=32))
    for bits, scheme in SCHEMES:
        for size in (8, None):
            c = config(bits, size, scheme, method="gptq", damping=0)
            torch.testing.assert_close(module.gptq(W, H, c).weight(torch.float64), solved_anew(W, H, c), rtol=1e-6, atol=1e-8)


def test_damping_is_a_share_of_the_mean(module=quantization):
    W, H = matrix(K=16, dtype=torch.float64), hessian(inputs(K=16))
    damped = H + 0.3 * H.diagonal().mean() * torch.eye(16)
    one = module.gptq(W, H, config(3, 8, method="gptq", damping=0.3))
    assert torch.equal(one.codes, module.gptq(W, damped, config(3, 8, method="gptq", damping=0)).codes)


def test_gptq_changes_outputs_less_than_rounding(module=quantization):
    W, H = matrix(32), hessian(inputs())
    for bits, scheme in SCHEMES:
        if (bits, scheme) == (2, "symmetric"): continue  # three levels: it is greedy, and no promise
        c = config(bits, 16, scheme, method="gptq")
        assert output_error(module.gptq(W, H, c).weight(), W, H) < 0.9 * output_error(round_weight(W, c).weight(), W, H)


def test_gptq_without_correlations_is_rounding():
    W = matrix()
    for bits, scheme in SCHEMES:
        c = config(bits, 16, scheme, method="gptq")
        assert torch.equal(gptq(W, 3 * torch.eye(64), c).codes, round_weight(W, c).codes)
        assert torch.equal(gptq(W, torch.zeros(64, 64), c).codes, round_weight(W, c).codes)  # nothing ever came


def test_an_input_that_never_comes_does_no_harm():
    X = inputs()
    X[:, 5] = 0
    W = matrix()
    new = gptq(W, hessian(X), config(4, 16, method="gptq")).weight()
    assert new.isfinite().all() and (new[:, 5] - W[:, 5]).abs().max() < 0.5


def test_gptq_refuses():
    W, H = matrix(), hessian(inputs())
    for weight, h, c in (
        (W, H[:9], config(4, 16)), (W, H * math.nan, config(4, 16)), (W, -H, config(4, 16, damping=0)), (W[0], H, config(4, 16)),
        (W, hessian(inputs(5)), config(4, 16, damping=0)), (W * math.nan, H, config(4, 16)), (W, H, config(4, 24)),
    ):  # fmt: skip
        with pytest.raises(QuantizationError): gptq(weight, h, c)


def seen_of(X: Tensor) -> Seen: return Seen(hessian(X), X.abs().mean(0), X.abs().amax(0))


def test_awq_is_the_best_of_its_powers(module=quantization):
    X, W, c = inputs(), matrix(), config(3, 16, method="awq")
    X[:, 3] *= 50
    scale = module.awq_scale(W, seen_of(X), c).double()

    def error(s: Tensor) -> float:
        new = round_weight(W * s.float(), c).weight() / s.float()
        return float((X @ (new - W).double().T).square().mean())

    tried = []
    for i in range(20):
        s = X.abs().mean(0) ** (i / 20)
        tried.append(error((s / (s.max() * s.min()).sqrt()).bfloat16()))
    assert error(scale) <= 1.001 * min(tried) and min(tried) < 0.7 * tried[0]


@needs_torchao
def test_awq_and_smoothing_are_torchaos():
    from torchao.prototype.awq.core import AWQObserver
    from torchao.prototype.smoothquant.core import SmoothQuantObserver
    from torchao.quantization import Int8WeightOnlyConfig

    X, W = inputs().float(), matrix()
    X[:, 3] *= 50
    theirs = AWQObserver(W, None, Int8WeightOnlyConfig(set_inductor_config=False))
    theirs(X, X @ W.T)
    found = theirs.calculate_qparams()
    ours = awq_scale(W, seen_of(X), config(8, None, "symmetric", method="awq"))
    powers = [x.log().std() / X.abs().mean(0).log().std() for x in (found, ours)]
    assert abs(powers[0] - powers[1]) < 0.11  # of twenty: their scales have more digits, and two neighbours may change places
    for alpha in (0.3, 0.5, 1.0):
        smooth = SmoothQuantObserver(W, alpha)
        smooth(X)
        torch.testing.assert_close(smooth_scale(X.abs().amax(0), W.abs().amax(0), alpha), smooth.calculate_qparams()[0],
                                   rtol=0.01, atol=1e-4)


def test_smoothing_by_hand():
    most_x, most_w = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 3.0, 0.0])
    assert smooth_scale(most_x, most_w).tolist() == [2, 1, 1, 1]
    assert smooth_scale(most_x, most_w, 1).tolist() == [4, 1, 1, 1]
    with pytest.raises(QuantizationError): smooth_scale(most_x, most_w, 1.5)


# ---------------------------------------------------------------- the layer

KINDS = [
    *(config(b, 16, s) for b, s in SCHEMES), config(4, None), INT8, config(8, None, "symmetric", activations="int8", smooth=0.5),
    config(3, 16, method="awq"), config(4, 16, method="gptq"), config(4, 32, smooth=0.5),
]  # fmt: skip


def made(c: QuantizeConfig, module: ModuleType = quantization, bias: bool = True) -> tuple[Any, nn.Linear, Tensor]:
    "A layer, what it was, and inputs."
    torch.manual_seed(0)
    layer, X = nn.Linear(64, 10, bias=bias), inputs().float()
    layer.weight.data *= torch.linspace(0.5, 2, 10)[:, None]
    divisor = torch.rand(64).add(0.5).bfloat16().float() if c.divides else None
    return module.QuantizedLinear.of(layer, module.round_weight(layer.weight * (1 if divisor is None else divisor), c), divisor), layer, X


@pytest.mark.parametrize("c", KINDS, ids=str)
def test_a_layer_is_its_weight(c, module=quantization):
    layer, plain, X = made(c, module)
    tol = 0.05 if c.activations == "int8" else 1e-4
    torch.testing.assert_close(layer(X), F.linear(X, layer.weight, plain.bias), rtol=tol, atol=tol * float(X.abs().max()))
    coarse = {2: 0.8, 3: 0.3, 4: 0.2, 8: 0.02}[c.bits]
    assert (layer.weight - plain.weight).norm() < coarse * plain.weight.norm()
    assert layer(X[0]).shape == (10,) and layer(X.view(3, 100, 64)).shape == (3, 100, 10)
    assert torch.equal(layer(X[:1]), layer(X)[:1]) or c.activations == "float"
    again = copy.deepcopy(layer)
    assert torch.equal(again(X), layer(X))
    assert "Parameter" not in {type(t).__name__ for t in layer.buffers()} and [n for n, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("c", KINDS, ids=str)
def test_the_gradient_goes_through_a_layer(c):
    layer, _, X = made(c)
    x = X[:7].clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(7, -1), rtol=1e-3, atol=1e-3)
    assert layer.bias.grad.tolist() == [7] * 10


def test_a_layer_in_other_types():
    for c in (config(4, 16), INT8):
        layer, _, X = made(c)
        for dtype in (torch.bfloat16, torch.float64):
            other = copy.deepcopy(layer).to(dtype)
            with torch.no_grad(): y, z = other(X.to(dtype)), layer(X)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), z, rtol=0.05, atol=0.05 * float(z.abs().max()))


def test_bytes_of_a_layer(module=quantization):
    cases = (4, "affine", 32, 4.75), (4, "symmetric", 32, 4.5), (3, "affine", 16, 4.5), (8, "symmetric", 64, 8.25), (4, "nf4", 64, 4.25)
    for bits, scheme, size, expected in cases:
        layer, plain, _ = made(config(bits, size, scheme), module, bias=False)
        found = module.size_of(layer)
        assert found == (640 * expected / 8, 640, expected)
        assert module.size_of(plain).bytes == 4 * 640 and math.isnan(module.size_of(plain).bits)


def test_a_layer_takes_no_weights():
    layer, plain, _ = made(config(4, 16))
    with pytest.raises(QuantizationError, match="take no other value"): layer.weight = plain.weight.data
    with pytest.raises(QuantizationError): QuantizedLinear(64, 10, config(4, 24))
    with pytest.raises(QuantizationError): QuantizedLinear.of(nn.Linear(32, 10), round_weight(matrix(10), config(4, 16)))
    with pytest.raises(QuantizationError): QuantizedLinear.of(plain, round_weight(matrix(10), config(4, 16)), torch.ones(64))


# ---------------------------------------------------------------- models

ROWS = models.ids(8, 20).tolist()
METHODS = [
    config(4, 8), config(8, None, "symmetric"), INT8, config(3, 8, method="gptq"), config(4, 8, "nf4", method="awq"),
    config(8, None, "symmetric", activations="int8", smooth=0.5), config(4, 8, "symmetric", method="gptq", smooth=0.5),
]  # fmt: skip


def state(model: nn.Module) -> dict[str, Tensor]: return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("variant", models.VARIANTS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_any_transformer_is_rounded_and_stays_as_it_was(kind, variant):
    model = models.make(kind, variant)
    before, ids = state(model), models.ids(3, 12)
    more = models.given_source(model, 3)
    size = 2 if variant == "window" else 8
    for c in (config(8, size), config(4, size), config(3, None)):
        new = quantize(model, c)
        with torch.no_grad(): off = ((new(ids, **more) - model(ids, **more)).norm() / model(ids, **more).norm()).item()
        assert 0 < off < {8: 0.05, 4: 0.8, 3: 2.0}[c.bits]
        layers = [m for m in new.modules() if isinstance(m, QuantizedLinear)]
        assert len(layers) == sum(isinstance(m, nn.Linear) and ".blocks." in n for n, m in model.named_modules())
    assert same(state(model), before) and not any(isinstance(m, QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize("c", METHODS, ids=str)
def test_a_quantised_model_is_a_model(c):
    model = models.make()
    before = state(model)
    new, ids = quantize(model, c, ROWS), models.ids(3, 12, 7)
    assert same(state(model), before) and new.training == model.training
    with torch.no_grad():
        # one row at a time gives the same: nothing is shared by a batch
        torch.testing.assert_close(torch.cat([new(row[None]) for row in ids]), new(ids), rtol=1e-4, atol=1e-4)
        cache = KVCache(2)
        pieces = torch.cat([new(piece, cache=cache) for piece in ids.split([5, 1, 6], 1)], 1)
        torch.testing.assert_close(pieces, new(ids), rtol=1e-3, atol=1e-3)
    greedy = SamplingConfig(max_new_tokens=6, temperature=0)
    together = generate(new, [[1, 2, 3], [4, 5]], greedy)
    assert together == [generate(new, row, greedy)[0] for row in ([1, 2, 3], [4, 5])]
    assert beam_search(new, [1, 2], 1, 4, length_penalty=0.0)[0].ids == generate(new, [1, 2], SamplingConfig(4, temperature=0))[0]


def test_what_is_looked_at_has_gone_through_rounded_blocks(module=quantization):
    model, c = models.make(), config(2, 8, method="gptq")
    new = module.quantize(model, c, ROWS)
    half = copy.deepcopy(model)  # its first block rounded
    half.decoder.blocks[0] = copy.deepcopy(new.decoder.blocks[0])
    name = "decoder.blocks.1.mlp.up"
    seen = module.activations(half, [name], [torch.tensor([row]) for row in ROWS])[name]
    layer = model.decoder.blocks[1].mlp.up
    assert torch.equal(module.gptq(layer.weight, seen.hessian, c).codes, new.decoder.blocks[1].mlp.up.rounded.codes)


def test_what_activations_note(module=quantization):
    model, names = models.make(), ["decoder.blocks.0.attention.query", "decoder.blocks.1.mlp.down"]
    caught: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names: model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: caught[name].append(x[0][0]))
    seen = module.activations(model, names, [torch.tensor([row]) for row in ROWS[:3]])
    for name in names:
        X = torch.cat(caught[name])
        torch.testing.assert_close(seen[name].hessian, X.T @ X / len(X))
        torch.testing.assert_close(seen[name].mean, X.abs().mean(0))
        torch.testing.assert_close(seen[name].most, X.abs().amax(0))
    with pytest.raises(QuantizationError, match="Did you mean"): module.activations(model, [names[0][:-1]], [torch.tensor([[1]])])
    with pytest.raises(QuantizationError, match="no linear layer"): module.activations(model, ["decoder"], [torch.tensor([[1]])])


def test_an_outlier_hurts_and_smoothing_repairs_it():
    model, ids = models.make(), torch.tensor(ROWS)
    for block in model.decoder.blocks:
        block.mlp_norm.weight.data[3] *= 300
        for layer in (block.mlp.up, block.mlp.gate): layer.weight.data[:, 3] /= 300

    def off(c: QuantizeConfig) -> float:
        with torch.no_grad(): return (quantize(model, c, ROWS)(ids) - model(ids)).norm().item()

    assert off(QuantizeConfig(8, None, "symmetric", activations="int8", smooth=0.5)) < 0.3 * off(INT8)


def test_gptq_is_nearer_than_rounding_in_a_whole_model():
    model, ids = models.make(), models.ids(8, 20, 9)
    calibration = models.ids(40, 24, 3).tolist()

    def off(method: str) -> float:
        with torch.no_grad(): return (quantize(model, config(3, 8, method=method), calibration)(ids) - model(ids)).norm().item()

    assert off("gptq") < 0.9 * off("round")


def test_targets_by_name_and_by_last_part(module=quantization):
    model = models.make()

    def rounded(*targets: str) -> set[str]:
        new = module.quantize(model, config(4, 8, targets=targets))
        return {name for name, m in new.named_modules() if isinstance(m, module.QuantizedLinear)}

    assert rounded("decoder.blocks.1.mlp.up") == {"decoder.blocks.1.mlp.up"}
    assert rounded("query", "down") == {f"decoder.blocks.{i}.{n}" for i in (0, 1) for n in ("attention.query", "mlp.down")}
    assert "out" in rounded("out") and len(rounded("out")) == 3  # of the attentions, and the scores
    with pytest.raises(module.QuantizationError, match="no linear layer 'own'"): rounded("own")


def test_other_models():
    body = models.make("encoder", "bert")
    classifier = Classifier(body, ClassifierConfig(("no", "yes"))).eval()
    new = quantize(classifier, config(4, 8, method="gptq"), ROWS)
    assert new(torch.tensor(ROWS)).shape == (8, 2) and isinstance(new.body.encoder.blocks[0].mlp.up, QuantizedLinear)
    assert type(new.score) is nn.Linear  # it is in no block
    mixture = with_experts(models.make(), MoEConfig(4, 2)).eval()
    for method in ("round", "gptq", "awq"):
        few = quantize(mixture, config(4, 8, method=method), ROWS[:1])
        with torch.no_grad(): assert few(torch.tensor(ROWS)).isfinite().all()
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert all(isinstance(plain_new, QuantizedLinear) for plain_new in quantize(plain, config(4, 8))[::2])


def test_texts_to_calibrate_on():
    model, tokenizer = models.make(), CharTokenizer.train(["abcdefgh"])
    c = config(4, 8, method="gptq")
    by_text = quantize(model, c, ["abc", "hgfed"], tokenizer)
    by_ids = quantize(model, c, [tokenizer.encode(text, bos=True) for text in ("abc", "hgfed")])
    assert same(state(by_text), state(by_ids))
    larger = CharTokenizer("".join(chr(i) for i in range(300, 400)))
    for calibration, tok, said in (
        (None, None, "give calibration="), ([], None, "no token"), ([[]], None, "no token"), (["abc"], None, "tokenizer="),
        ("abc", tokenizer, "list of texts"), (["abc"], larger, "do not belong together"), ([[1, 2, models.V]], None, "no token"),
        ([[1, -1]], None, "no token"), ([[1.5, 2.5]], None, "whole numbers"),
    ):  # fmt: skip
        with pytest.raises(QuantizationError, match=said): quantize(model, c, calibration, tok)
    with pytest.raises(TransformerError, match="context_length"): quantize(model, c, [[1] * 99])
    with pytest.raises(QuantizationError, match="source"): quantize(models.make("encoder-decoder"), c, ROWS)


def test_what_is_refused_before_anything_is_done():
    model = models.make()
    before = state(model)
    broken, lora = copy.deepcopy(model), copy.deepcopy(model)
    broken.decoder.blocks[1].mlp.down.weight.data[0, 0] = math.nan
    apply_lora(lora, LoraConfig(rank=2))
    for m, c, said in (
        (model, config(4, 16), "does not divide the 88 inputs of decoder.blocks.0.mlp.down"),
        (model, config(4, 8, targets=("keys",)), "key"), (quantize(model, config(4, 8)), config(4, 8), "quantised already"),
        (broken, config(4, 8), "blocks.1.mlp.down holds a weight that is NaN"),
        (lora, config(4, 8), "merge_lora"), (nn.Embedding(3, 4), config(4, 8), "no linear layer"),
    ):  # fmt: skip
        with pytest.raises(QuantizationError, match=said): quantize(m, c, ROWS)
    deaf = copy.deepcopy(model)
    deaf.decoder.blocks[0].mlp_norm.weight.data[0] = math.inf
    with pytest.raises(QuantizationError, match="NaN or infinity"): quantize(deaf, config(4, 8, method="gptq"), ROWS)
    assert same(state(model), before)


@pytest.mark.parametrize("wrong", [
    {"bits": 5}, {"bits": 1}, {"bits": 4.0}, {"bits": True}, {"group_size": 0}, {"group_size": -8}, {"group_size": 1.5},
    {"scheme": "log"}, {"method": "gtpq"}, {"activations": "int4"}, {"smooth": -0.1}, {"smooth": 2}, {"smooth": math.nan},
    {"damping": -1}, {"targets": "query"}, {"targets": (3,)}, {"scheme": "nf4", "bits": 3}, {"activations": "int8"},
    {"activations": "int8", "bits": 8}, {"method": "awq", "smooth": 0.5},
], ids=str)  # fmt: skip
def test_settings_that_cannot_be(wrong):
    with pytest.raises(QuantizationError): QuantizeConfig(**wrong)


# ---------------------------------------------------------------- fine-tuning


def test_a_lora_on_top(tmp_path):
    model, ids = quantize(models.make(), config(4, 8)), torch.tensor(ROWS)
    codes = {name: t.clone() for name, t in model.named_buffers()}
    apply_lora(model, LoraConfig(rank=4, targets=("query", "up")))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, codes[name.replace(".base.", ".")]) for name, t in model.named_buffers())
    with torch.no_grad(): y = model(ids)
    with pytest.raises((QuantizationError, FinetuningError), match="LoRA"): merge(model)
    with torch.no_grad(): assert torch.equal(model(ids), y)
    save_adapter(model, tmp_path)
    fresh = quantize(models.make(), config(4, 8))
    load_adapter(fresh, tmp_path)
    with torch.no_grad(): assert torch.equal(fresh(ids), y)
    with pytest.raises(QuantizationError, match="LoRA"): save_quantized(model, tmp_path / "m.safetensors")


def test_training_with_rounded_weights(module=quantization):
    model, ids, c = models.make(), torch.tensor(ROWS), config(2, 8)
    exact, rounded = state(model), quantize(model, c)
    with module.quantization_aware(model, c):
        with torch.no_grad(): torch.testing.assert_close(model(ids), rounded(ids))
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
        for _ in range(25):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad(): trained = model(ids)
    assert losses[-1] < losses[0] and model.state_dict().keys() == exact.keys()
    with torch.no_grad(): torch.testing.assert_close(quantize(model, c)(ids), trained)
    off = [(model.state_dict()[name] - t).abs().max() for name, t in exact.items() if name.endswith("up.weight")]
    assert min(off) > 0 and type(model.decoder.blocks[0].mlp.up) is nn.Linear


def test_what_training_with_rounded_weights_refuses():
    model = models.make()
    before = state(model)
    for c in (config(4, 8, method="gptq"), INT8, config(4, 8, smooth=0.5), config(4, 16)):
        with pytest.raises(QuantizationError), quantization_aware(model, c): pass
    with quantization_aware(model, config(4, 8)):
        with pytest.raises(QuantizationError, match="already"), quantization_aware(model, config(4, 8)): pass
        with torch.no_grad(): assert torch.equal(model(torch.tensor(ROWS)), quantize(models.make(), config(4, 8))(torch.tensor(ROWS)))
    with pytest.raises(ZeroDivisionError), quantization_aware(model, config(4, 8)): 1 / 0  # noqa: B018
    assert same(state(model), before)


# ---------------------------------------------------------------- files

FILES = [("llama", config(4, 8)), ("gpt2", config(3, 8, method="gptq")), ("alibi", INT8), ("window", config(4, 2, "nf4", method="awq")),
         ("bare", config(2, None, targets=("out", "up")))]  # fmt: skip


@pytest.mark.parametrize(("variant", "c"), FILES, ids=str)
def test_a_file_holds_all_of_it(variant, c, tmp_path):
    model, ids = models.make("decoder", variant), torch.tensor(ROWS)
    new = quantize(model, c, ROWS)
    path = tmp_path / "inside" / "model.safetensors"
    save_quantized(new, path)
    again = load_quantized(path)
    with torch.no_grad(): assert torch.equal(again(ids), new(ids))
    assert not again.training and size_of(again) == size_of(new) and same(state(again), state(new))
    assert again.config == model.config and [p.name for p in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    save_quantized(again, path)
    assert path.read_bytes() == first and len(first) < size_of(new).bytes + 12_000
    if model.config.tie and "out" not in c.targets: assert again.out.weight is again.embed.tokens.weight
    assert all(p.requires_grad for p in again.parameters())


def test_encoders_and_pairs_have_files_too(tmp_path):
    for kind, variant in (("encoder", "bert"), ("encoder-decoder", "2017")):
        model = quantize(models.make(kind, variant), config(4, 8))
        more = models.given_source(model, 8)
        save_quantized(model, tmp_path / "m")
        again, ids = load_quantized(tmp_path / "m"), torch.tensor(ROWS)
        with torch.no_grad(): assert torch.equal(again(ids, **more), model(ids, **more))


def test_what_is_not_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("mine")
    body = quantize(models.make(), config(4, 8))
    body.drop_scores()
    plain: Any
    for plain in (models.make(), nn.Linear(3, 3), quantize(with_experts(models.make(), MoEConfig(2, 1)), config(4, 8)), body):
        with pytest.raises(QuantizationError): save_quantized(plain, path)
    mixed = quantize(models.make(), config(4, 8))
    mixed.decoder.blocks[0].mlp.up = nn.Linear(32, 88, bias=False)
    with pytest.raises(QuantizationError, match="does not hold"): save_quantized(mixed, path)
    with pytest.raises(QuantizationError, match="cannot be written"): save_quantized(quantize(models.make(), config(4, 8)), path / "inside")
    assert path.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_damaged_files_are_refused_or_read(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from tests.test_hostile_files import FOREIGN

    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    save_quantized(quantize(models.make(), config(4, 8)), path)
    data, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, "pt") as file: notes = file.metadata()["lmbook"]
    head = int.from_bytes(data[:8], "little")
    cases = [data[:n] for n in (0, 7, 8, 100, head, head + 8, head + 500, len(data) - 1)] + list(FOREIGN.values())
    dice = torch.Generator().manual_seed(0)
    for at in torch.randint(0, head + 8, (60,), generator=dice).tolist(): cases.append(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    read = 0
    for case in cases:
        bad.write_bytes(case)
        try: read += load_quantized(bad).training is False
        except LmbookError as error: assert "\n" not in str(error) and str(error)
    assert read < 40

    def changed(text: str = notes, **more: Tensor) -> None:
        save_file(tensors | more, bad, metadata={"lmbook": text})
        load_quantized(bad)

    codes, scale, zero = (f"decoder.blocks.0.mlp.up.{name}" for name in ("codes", "scale", "zero"))
    changed()
    edits = (
        ('"format": 1', '"format": 2', "format"), ("smooth", "smoth", "setting"), ('"n_layer": 2', '"n_layer": 999999999', "layers"),
        ('"n_layer": 2', '"n_layer": 3', "differ"), ('"bits": 4', '"bits": 5', "bits"), ('"bits": 4', '"bits": 2', "by its notes"),
        ('"group_size": 8', '"group_size": 7', "group_size"), ('"d_model": 32', '"d_model": 4611686018427387904', ""),
        ('"d_model": 32', '"d_model": "32"', ""), ('"targets": []', '"targets": ["keys"]', "keys"),
    )  # fmt: skip
    for old, new, said in edits:
        assert notes.count(old) == 1
        with pytest.raises(LmbookError, match=said or None): changed(notes.replace(old, new))
    for text in ("{", "null", "[]", "{}", "[" * 100_000, "3"):
        with pytest.raises(QuantizationError): changed(text)
    for name, tensor, said in (
        ("more", torch.ones(1), "differ"), (codes, tensors[codes].float(), "by its notes"),
        (zero, tensors[zero][:, :1].contiguous(), "by its notes"), (scale, tensors[scale] * math.nan, "finite"),
    ):  # fmt: skip
        with pytest.raises(QuantizationError, match=said): changed(**{name: tensor})
    for where in (tmp_path, tmp_path / "absent", "\0"):
        with pytest.raises(QuantizationError): load_quantized(where)
    with pytest.raises(TransformerError): load_pretrained(tmp_path)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("variant", ["llama", "gpt2", "alibi", "window"])
def test_eight_bits_are_nearly_the_cache(variant):
    model, ids = models.make("decoder", variant), models.ids(3, 20)
    for pieces in ([20], [5, 1, 3, 11], [1] * 20):
        caches = KVCache(2, model.config.window, 4), QuantizedKVCache(2, 8, model.config.window, 4)
        with torch.no_grad(): a, b = (torch.cat([model(x, cache=cache) for x in ids.split(pieces, 1)], 1) for cache in caches)
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(a.abs().max()))
        assert caches[0].length == caches[1].length == 20 and caches[1].nbytes < caches[0].nbytes


def test_what_the_cache_gives_back(module=quantization):
    "By hand: each head's vector at each position on 2**bits levels from its least to its largest number."
    dice = torch.Generator().manual_seed(0)
    for bits in (2, 4, 8):
        cache, whole = module.QuantizedKVCache(1, bits, capacity=2), []
        for T in (3, 1, 4):
            k, v = (torch.randn(2, 3, T, 12, generator=dice) for _ in range(2))
            cache.extend(2, T)
            found = cache[0].append(k, v)
            whole.append((k, v))
            for i, got in enumerate(found):
                x = torch.cat([pair[i] for pair in whole], 2)
                low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
                step = (high - low) / (2**bits - 1)
                assert got.shape == x.shape and ((got - x).abs() < 0.5 * step + 0.01 * (high.abs() + low.abs())).all()
                assert max(len(row.unique()) for row in got.flatten(0, 2)) <= 2**bits
        assert cache.nbytes == 2 * 2 * 3 * cache.capacity * (12 * bits // 8 + 4)


def test_the_cache_goes_back_and_keeps_rows():
    model, ids = models.make(), models.ids(3, 12)
    with torch.no_grad():
        cache = QuantizedKVCache(2, 4, capacity=4)
        model(ids, cache=cache)
        cache.crop(7)
        cache.select(torch.tensor([2, 0, 0]))
        rest = model(ids[[2, 0, 0], 7:], cache=cache)
        plain = QuantizedKVCache(2, 4)
        model(ids[[2, 0, 0], :7], cache=plain)
        torch.testing.assert_close(model(ids[[2, 0, 0], 7:], cache=plain), rest)
        padded, there = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1), torch.ones(3, 14, dtype=torch.long)
        there[:, :2] = 0
        left = model(padded, segments=there, cache=QuantizedKVCache(2, 8))[:, 2:]
        torch.testing.assert_close(left, model(ids, cache=QuantizedKVCache(2, 8)), rtol=1e-3, atol=1e-3)
    for wrong in ({"bits": 3}, {"bits": 16}, {"n_layer": 0}):
        with pytest.raises(LmbookError): QuantizedKVCache(**({"n_layer": 2} | wrong))


# ---------------------------------------------------------------- faults


def _layers_are_their_weights(module: ModuleType) -> None:
    for c in KINDS: test_a_layer_is_its_weight(c, module)


@pytest.mark.parametrize(("old", "new", "check"), [
    ("(w / scale).round().clamp(-(most // 2), most // 2)", "(w / scale).trunc().clamp(-(most // 2), most // 2)",
     test_each_weight_gets_the_nearest_of_all_levels),
    ("((w / scale).round() + zero).clamp(0, most)", "((w / scale).round() + zero).clamp(1, most)",
     test_each_weight_gets_the_nearest_of_all_levels),
    ("(levels[1:] + levels[:-1]) / 2", "levels[1:]", test_each_weight_gets_the_nearest_of_all_levels),
    ("(high - low) / most", "(high - low) / (most + 1)", test_the_scale_fits_the_largest_weight),
    ("(1 if config.scheme == \"nf4\" else most // 2)", "(1 if config.scheme == \"nf4\" else most // 2 + 1)",
     test_the_scale_fits_the_largest_weight),
    ("w.amin(-1).clamp(max=0)", "w.amin(-1)", test_the_scale_fits_the_largest_weight),
    ("-codes.shape[-1] * bits % 8", "0", test_bytes_by_hand),
    ("torch.arange(0, 8, bits, dtype", "torch.arange(8 - bits, -1, -bits, dtype", _layers_are_their_weights),
    ("_BLOCK = 1024", "_BLOCK = 4096", test_products_are_exact),
    ("error[:, None] * U[j, j + 1 :]", "error[:, None] * U[j + 1 :, j]", test_gptq_is_least_squares_solved_anew),
    ("/ U[j, j]", "/ U[j, j] ** 2", test_gptq_is_least_squares_solved_anew),
    ("if not j % size: grids", "if not j: grids", test_gptq_is_least_squares_solved_anew),
    ("H + damping * mean *", "H + damping *", test_damping_is_a_share_of_the_mean),
    ("if loss < least:", "if loss < least and i < 2:", test_awq_is_the_best_of_its_powers),
    ("x / self.divisor.to(x.dtype)\n", "x * self.divisor.to(x.dtype)\n", _layers_are_their_weights),
    ("(rounded.codes ^ 128).view(torch.int8)", "rounded.codes.view(torch.int8)", _layers_are_their_weights),
    ("* self.scale.T.to(scale.dtype)", "* self.scale[0].to(scale.dtype)", _layers_are_their_weights),
    ("activations(new, stage, rows)", "activations(model, stage, rows)", test_what_is_looked_at_has_gone_through_rounded_blocks),
    ("old.mean + new.mean, torch.maximum", "new.mean, torch.maximum", test_what_activations_note),
    ("name == target or name.endswith(f\".{target}\")", "name == target or name.endswith(target)", test_targets_by_name_and_by_last_part),
    (".weight(weight.dtype) - weight).detach()", ".weight(weight.dtype) - weight)", test_training_with_rounded_weights),
    ("2**self.cache.bits - 1, x.amin", "2**self.cache.bits, x.amin", test_what_the_cache_gives_back),
    ("(x.amax(-1, keepdim=True) - low) / most", "(x.amax(-1, keepdim=True) - low) / (most - 1)", test_what_the_cache_gives_back),
])  # fmt: skip
def test_a_fault_is_found(old, new, check, monkeypatch):
    faulty = planted(quantization, old, new, monkeypatch)
    if "_BLOCK" in old: monkeypatch.setattr(faulty, "_counts_exactly", lambda: False)
    with pytest.raises((AssertionError, RuntimeError, ValueError, pytest.fail.Exception)): check(module=faulty)
