"""Attention beyond its chapter: parity with PyTorch, arbitrary shapes and masks, caches, precision, and every kind of bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.attention import (
    AdditiveAttention,
    Attention,
    AttentionConfig,
    AttentionError,
    AttentionPositions,
    Rotary,
    alibi_bias,
    alibi_slopes,
    attention,
    attention_weights,
    causal_mask,
    check_attention,
    padding_mask,
    segment_mask,
)
from lmbook.deep_networks import init_weights
from lmbook.networks import gradient_check
from lmbook.positions import LearnedPositions, online_attention, sinusoidal


def make(B=2, H=4, H_kv=2, T=5, S=7, d=8, e=6, grad=False):
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, requires_grad=grad) for shape in ((B, H, T, d), (B, H_kv, S, d), (B, H_kv, S, e)))


def reference(q, k, v, mask=None, causal=False, **options):
    return attention_weights(q, k, mask, causal=causal, **options) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def masks(B, H, T, S):
    torch.manual_seed(1)
    return {
        "none": None, "random": torch.rand(B, H, T, S) > .4, "padding": padding_mask(torch.arange(B) % (S + 1), S),
        "two axes": torch.rand(T, S) > .4,
        "one row": torch.rand(1, S) > .4, "nothing": torch.zeros(T, S, dtype=torch.bool), "float": torch.randn(H, T, S),
        "float, forbidding": torch.randn(B, 1, T, S).masked_fill(torch.rand(B, 1, T, S) > .5, -math.inf),
        "float64": torch.randn(T, S).double(),
    }  # fmt: skip


# ---------------------------------------------------------------- one function, three ways


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)]), st.integers(1, 6), st.integers(0, 5), st.booleans(),
       st.sampled_from(list(masks(1, 1, 1, 1))), st.integers(1, 9), st.sampled_from([None, .3]))  # fmt: skip
def test_plain_fused_and_online_agree(B, heads, T, more, causal, name, block, scale):
    (H, H_kv), S = heads, T + more
    q, k, v = make(B, H, H_kv, T, S)
    mask = masks(B, H, T, S)[name]
    wanted = reference(q, k, v, mask, causal, scale=scale)
    assert wanted.isfinite().all()
    torch.testing.assert_close(attention(q, k, v, mask, causal=causal, scale=scale), wanted)
    torch.testing.assert_close(online_attention(q, k, v, mask, causal=causal, scale=scale, block=block), wanted)


@pytest.mark.parametrize("name", list(masks(1, 1, 1, 1)))
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_agree_and_are_never_nan(name, causal):
    found = []
    for way in (reference, attention, online_attention):
        q, k, v = make(grad=True)
        way(q, k, v, masks(2, 4, 5, 7)[name], causal=causal).sin().sum().backward()
        found.append([x.grad for x in (q, k, v)])
        assert all(g.isfinite().all() for g in found[-1])
    for others in found[1:]: torch.testing.assert_close(others, found[0])


def test_equal_to_pytorch():
    q, k, v = make(H_kv=4, S=5)
    torch.testing.assert_close(attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(reference(q, k, v), F.scaled_dot_product_attention(q, k, v))
    mask = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(reference(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


def test_who_sees_nothing_finds_zeros_here_and_in_pytorchs_kernel():
    q, k, v = make(H_kv=4, S=5)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    assert attention(q, k, v, nothing).abs().max() == 0 == F.scaled_dot_product_attention(q, k, v, nothing).abs().max()
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
    assert module(x, x, x, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))[0].isnan().all()  # which is why we decide it ourselves


def test_queries_of_a_causal_call_are_the_last_places():
    q, k, v = make(H_kv=4, T=7, e=8)
    whole = attention(q, k, v, causal=True)
    for T in (1, 3): torch.testing.assert_close(attention(q[:, :, -T:], k, v, causal=True), whole[:, :, -T:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    q, k, v = (x.to(dtype) for x in make())
    wanted = reference(*(x.double() for x in (q, k, v)), causal=True)
    for way in (attention, online_attention):
        result = way(q, k, v, causal=True)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, atol={torch.float64: 1e-12}.get(dtype, .05), rtol=0)


def test_scores_in_the_thousands_do_not_overflow():
    q, k, v = make()
    assert online_attention(1e4 * q, k, v, block=2).isfinite().all() and reference(1e4 * q, k, v).isfinite().all()


def test_dropout_keeps_the_mean():
    q, k, v = make(B=1, H=1, H_kv=1, T=1, S=7)
    many = attention(*(x.expand(20_000, -1, -1, -1) for x in (q, k, v)), dropout=.5)
    torch.testing.assert_close(many.mean(0), attention(q, k, v)[0], atol=.05, rtol=0)
    assert many.std(0).min() > .05


# ---------------------------------------------------------------- masks


@given(st.integers(0, 8), st.integers(0, 8), st.none() | st.integers(1, 4))
def test_causal_mask_is_what_it_says(T, more, window):
    mask = causal_mask(T, T + more, window=window)
    for t in range(T):
        for s in range(T + more):
            place = t + more
            assert bool(mask[t, s]) == (s <= place and (window is None or s > place - window))


def test_masks_of_a_batch():
    assert padding_mask(torch.tensor([2, 0]), 3).tolist() == [[[[True, True, False]]], [[[False] * 3]]]
    left = torch.tensor([[0, 1, 1]])
    assert padding_mask(left).tolist() == padding_mask(left.bool()).tolist() == [[[[False, True, True]]]]
    packed = segment_mask(torch.tensor([[1, 1, 2, 0]]))[0, 0]
    assert packed.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert segment_mask(torch.tensor([[2, 1]]), torch.tensor([[1, 1, 2]]))[0, 0].int().tolist() == [[0, 0, 1], [1, 1, 0]]


# ---------------------------------------------------------------- positions


def test_sinusoidal_is_the_formula():
    table = sinusoidal(50, 12)
    for t in (0, 7, 49):
        for i in range(6):
            angle = t / 10_000 ** (2 * i / 12)
            assert abs(table[t, 2 * i].item() - math.sin(angle)) < 1e-4 and abs(table[t, 2 * i + 1].item() - math.cos(angle)) < 1e-4
    assert torch.equal(sinusoidal(torch.tensor([[3, 7]]), 12)[0], table[[3, 7]])


def test_alibi_slopes_of_the_paper():
    assert torch.allclose(alibi_slopes(8), 2.0 ** -torch.arange(1, 9))
    assert torch.allclose(alibi_slopes(1), torch.tensor([1 / 256]))
    twelve = alibi_slopes(12)  # in the authors' code: those of 8, then every other of 16
    assert torch.allclose(twelve[:8], alibi_slopes(8)) and torch.allclose(twelve[8:], alibi_slopes(16)[::2][:4])
    assert alibi_bias(alibi_slopes(2), 1, 3)[0, 0].tolist() == [-2 / 16, -1 / 16, 0]


@settings(deadline=None)
@given(st.sampled_from(["half", "interleaved"]), st.integers(0, 50), st.integers(0, 50), st.integers(0, 2000))
def test_rotary_scores_depend_on_distance_alone(layout, m, n, shift):
    torch.manual_seed(0)
    rotary, (q, k) = Rotary(8, layout=layout), torch.randn(2, 1, 1, 1, 8)
    def score(a, b): return (rotary(q, torch.tensor([a])) * rotary(k, torch.tensor([b]))).sum().item()
    assert abs(score(m, n) - score(m + shift, n + shift)) < 5e-3


def test_rotary_is_a_complex_product():
    x, places = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [9, 8, 0, 0, 5]])
    speeds = 10_000 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(()), places[:, None, :, None] * speeds)
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    torch.testing.assert_close(Rotary(8, layout="interleaved")(x, places), wanted)
    a, b = x.chunk(2, -1)
    halves = torch.view_as_real(torch.complex(a, b) * turn)
    torch.testing.assert_close(Rotary(8)(x, places), torch.cat([halves[..., 0], halves[..., 1]], -1))


def test_rotary_equals_transformers_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    rotation = Rotary(16).at(torch.arange(6))
    cos, sin = (torch.cat([x, x], -1)[None] for x in rotation)
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for x, wanted in zip((q, k), theirs): torch.testing.assert_close(Rotary(16)(x, rotation), wanted)


# ---------------------------------------------------------------- the module


class Kept:
    "The simplest cache."

    def __init__(self): self.k = self.v = None

    def append(self, k, v):
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


CONFIGS = [
    AttentionConfig(24, 6, n_kv_head=kv, positions=positions, window=window)
    for positions in get_args(AttentionPositions) for window in (None, 3) for kv in (None, 2, 1)
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_with_a_cache_as_without(config):
    torch.manual_seed(0)
    module, x = Attention(config), torch.randn(2, 7, 24)
    cache, whole = Kept(), module(x, causal=True)
    parts = [module(x[:, a:b], causal=True, cache=cache, positions=torch.arange(a, b)) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_place_sees_the_future(config):
    torch.manual_seed(0)
    module, x = Attention(config), torch.randn(1, 7, 24)
    edited = x.clone(); edited[:, 4:] += 1
    moved = (module(edited, causal=True) - module(x, causal=True)).abs().amax((0, 2))
    assert moved[:4].max() < 1e-6 < .01 < moved[4:].min()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_text_in_a_batch_is_as_alone(config):
    torch.manual_seed(0)
    module, (a, b) = Attention(config), (torch.randn(1, 3, 24), torch.randn(1, 5, 24))
    alone = [module(x, causal=True) for x in (a, b)]
    padded = torch.cat([F.pad(a, (0, 0, 0, 2), value=9.), b])
    right = module(padded, mask=padding_mask(torch.tensor([3, 5]), 5), causal=True)
    torch.testing.assert_close(right[:1, :3], alone[0]); torch.testing.assert_close(right[1:], alone[1])
    padded = torch.cat([F.pad(a, (0, 0, 2, 0), value=9.), b])  # on the left, as for generation in batches
    places = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    left = module(padded, mask=padding_mask(torch.tensor([[0, 0, 1, 1, 1], [1] * 5])), causal=True, positions=places)
    torch.testing.assert_close(left[:1, 2:], alone[0]); torch.testing.assert_close(left[1:], alone[1])
    packed = torch.cat([a, b], 1)
    segments, places = torch.tensor([[1] * 3 + [2] * 5]), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    both = module(packed, mask=segment_mask(segments), causal=True, positions=places)
    torch.testing.assert_close(both, torch.cat(alone, 1))


def test_a_window_looks_both_ways_where_it_may():
    module = Attention(AttentionConfig(8, 2, window=2))
    seen = [(row > 0).tolist() for row in module.weights(torch.randn(1, 3, 8))[0, 0]]
    assert seen == [[True, True, False], [True, True, True], [False, True, True]]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_grouped_is_full_with_copied_heads(n_kv_head):
    torch.manual_seed(0)
    grouped = Attention(AttentionConfig(16, 4, n_kv_head=n_kv_head, bias=True))
    full = Attention(AttentionConfig(16, 4, bias=True))
    state = grouped.state_dict()
    for name in ("key", "value"):
        for part in ("weight", "bias"):
            rows = state[f"{name}.{part}"]
            state[f"{name}.{part}"] = rows.unflatten(0, (n_kv_head, 4)).repeat_interleave(4 // n_kv_head, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(grouped(x, causal=True), full(x, causal=True))
    torch.testing.assert_close(grouped(x[:, :1], x), full(x[:, :1], x))


def test_equal_to_multihead_attention_of_another_width():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 2, batch_first=True, kdim=12, vdim=12, bias=False)
    ours = Attention(AttentionConfig(16, 2, d_memory=12))
    weights = {"query": theirs.q_proj_weight, "key": theirs.k_proj_weight, "value": theirs.v_proj_weight, "out": theirs.out_proj.weight}
    ours.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    x, memory, there = torch.randn(2, 3, 16), torch.randn(2, 5, 12), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    wanted, weights = theirs(x, memory, memory, key_padding_mask=~there, average_attn_weights=False)
    torch.testing.assert_close(ours(x, memory, padding_mask(there)), wanted)
    torch.testing.assert_close(ours.weights(x, memory, padding_mask(there)), weights)
    torch.testing.assert_close(ours(x, ours.keys_values(memory), padding_mask(there)), wanted)


def test_dropout_acts_in_training_only():
    module, x = Attention(AttentionConfig(16, 2, dropout=.5)), torch.randn(1, 5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_autocast_and_other_dtypes():
    for positions in get_args(AttentionPositions):
        module, x = Attention(AttentionConfig(16, 2, positions=positions)), torch.randn(1, 5, 16)
        with torch.autocast("cpu", torch.bfloat16): assert module(x, causal=True).dtype == torch.bfloat16
        assert module.double()(x.double(), causal=True).dtype == torch.float64


def test_initialisation_knows_the_layer_that_ends_the_branch():
    module = Attention(AttentionConfig(256, 4))
    init_weights(nn.ModuleList([module, Attention(AttentionConfig(256, 4))]), "small", scale_residual=True)
    assert abs(module.query.weight.std().item() / .02 - 1) < .05 and abs(module.out.weight.std().item() / (.02 / 2**.5) - 1) < .05


# ---------------------------------------------------------------- float64 stays float64


def test_positions_are_computed_in_the_precision_asked_for():
    "In float64 equal to the formulas as NumPy has them, to the last digits; in less than float32 computed in float32 and rounded once."
    places = torch.tensor([0, 1, 7, 5000])
    angles = places.numpy()[:, None] / 10_000 ** (np.arange(0, 12, 2) / 12)
    waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(4, 12)
    for table in (sinusoidal(places, 12, dtype=torch.float64), sinusoidal(places.double(), 12)):
        assert table.dtype == torch.float64 and np.abs(table.numpy() - waves).max() < 1e-10
    assert sinusoidal(places, 12).dtype == torch.float32
    assert torch.equal(sinusoidal(places, 12, dtype=torch.bfloat16), sinusoidal(places, 12).bfloat16())
    x = torch.randn(1, 2, 4, 12, dtype=torch.float64)
    turns = torch.from_numpy(np.exp(1j * angles))
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (6, 2))) * turns).flatten(-2)
    for where in (places, Rotary(12).at(places, torch.float64)):
        turned = Rotary(12, layout="interleaved")(x, where)
        assert turned.dtype == torch.float64 and (turned - wanted).abs().max() < 1e-10
    low = Rotary(12).at(places, torch.bfloat16)
    assert low.cos.dtype == torch.float32 and all(torch.equal(*pair) for pair in zip(low, Rotary(12).at(places)))
    assert torch.equal(Rotary(12)(x.bfloat16(), places), Rotary(12)(x.bfloat16().float(), places).bfloat16())
    slopes = alibi_slopes(12, torch.float64)
    assert slopes.dtype == torch.float64 and abs(slopes[8].item() - 2**-.5) < 1e-15  # the first of sixteen
    assert alibi_bias(slopes, 3).dtype == torch.float64 and alibi_bias(slopes.bfloat16(), 3).dtype == torch.float32
    module = Attention(AttentionConfig(24, 12, positions="alibi")).double()
    score, fade = module.weights(x.new_zeros(1, 2, 24), causal=True)[0, 8, 1].log(), slopes[8]
    assert abs((score[1] - score[0] - fade).item()) < 1e-12


def double_modules():
    for positions in get_args(AttentionPositions):
        for window in (None, 2):
            config = AttentionConfig(6, 3, 1, 2, positions=positions, window=window)
            yield f"Attention, {positions}, {window}", Attention(config)
    yield "cross-attention", Attention(AttentionConfig(6, 3, d_memory=5))
    yield "additive", AdditiveAttention(6, 5, 4)
    yield "learned positions", LearnedPositions(5, 6)


@pytest.mark.parametrize("module", [pytest.param(module, id=name) for name, module in double_modules()])
def test_a_double_module_computes_in_double(module):
    "What comes out is float64, and gradients agree with differences as they can only if nothing on the way was rounded to float32."
    torch.manual_seed(0)
    module, x, memory = module.double(), torch.randn(2, 4, 6).double().requires_grad_(), torch.randn(2, 3, 5).double()
    if isinstance(module, LearnedPositions): call = lambda: module(4)  # noqa: E731
    elif isinstance(module, AdditiveAttention): call = lambda: module(x, memory)[0]  # noqa: E731
    elif module.config.d_memory: call = lambda: module(x, memory)  # noqa: E731
    else: call = lambda: module(x, causal=True)  # noqa: E731
    leaves = [*module.parameters(), *([] if isinstance(module, LearnedPositions) else [x])]
    assert call().dtype == torch.float64 and max(gradient_check(lambda: call().sin().sum(), leaves, samples=None)) < 1e-6


@pytest.mark.parametrize("way", (attention, online_attention, reference))
def test_double_gradients_of_the_functions(way):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, n, 4, dtype=torch.float64, requires_grad=True) for H, n in ((4, 3), (2, 5), (2, 5)))
    assert max(gradient_check(lambda: way(q, k, v, causal=True).sin().sum(), (q, k, v), samples=None)) < 1e-6


# ---------------------------------------------------------------- bad input

q, k, v = make()
GOOD = AttentionConfig(16, 4, n_kv_head=2, positions="rotary")
BAD = [
    (lambda: AttentionConfig(30, 4), "n_head=4 does not divide d_model=30"),
    (lambda: AttentionConfig(32, 4, n_kv_head=3), "n_kv_head=3 does not divide n_head=4"),
    (lambda: AttentionConfig(32, 4, n_kv_head=8), "n_kv_head=8 does not divide n_head=4"),
    (lambda: AttentionConfig(32, 0), "n_head=0 must be a whole number"),
    (lambda: AttentionConfig(32.0, 4), "d_model=32.0 must be a whole number"),
    (lambda: AttentionConfig(32, 4, window=0), "window=0 must be a whole number"),
    (lambda: AttentionConfig(32, 4, dropout=1.), "dropout=1.0 must be"),
    (lambda: AttentionConfig(32, 4, positions="learned"), "There is no positions='learned'. Choose one of: none, rotary, alibi"),
    (lambda: AttentionConfig(12, 4, positions="rotary"), "d_head=3 must be even"),
    (lambda: Rotary(8, layout="llama"), "There is no layout='llama'. Choose one of: half, interleaved"),
    (lambda: Rotary(8, base=0), "base=0 must be above 0"),
    (lambda: Rotary(8)(torch.randn(1, 1, 3, 6), torch.arange(3)), r"\(B, H, T, 8\) is to be turned, not \(1, 1, 3, 6\)"),
    (lambda: Rotary(8)(torch.randn(1, 1, 3, 8), torch.arange(4)), "Positions for 4 tokens do not fit"),
    (lambda: Rotary(8)(torch.randn(2, 1, 3, 8), torch.zeros(3, 3)), "Positions for 3x3 tokens do not fit"),
    (lambda: Rotary(8).at(torch.tensor(3)), "Positions have the shape"),
    (lambda: sinusoidal(5, 7), "d=7 must be even"),
    (lambda: LearnedPositions(8, 4)(torch.tensor([3, 8])), "Position 8 has no vector: the table runs from 0 to 7"),
    (lambda: LearnedPositions(8, 4)(torch.tensor([-1])), "Position -1 has no vector"),
    (lambda: LearnedPositions(8, 4)(-2), "positions=-2 must be a whole number, at least 0"),
    (lambda: alibi_slopes(0), "n_head=0"),
    (lambda: causal_mask(5, 3), "T=5 queries that begin at position -2 of S=3 keys"),
    (lambda: causal_mask(3, window=0), "window=0 must be a whole number, at least 1"),
    (lambda: padding_mask(torch.tensor([3, 4])), "say to how many positions"),
    (lambda: padding_mask(torch.tensor([3, 4]), 3), "Lengths run from 3 to 4, but rows have S=3"),
    (lambda: padding_mask(torch.tensor([1.5]), 3), "lengths in whole numbers"),
    (lambda: segment_mask(torch.tensor([1, 2])), "Segments have the shape"),
    (lambda: attention(q[0], k, v), "The queries have the shape"),
    (lambda: attention(q, k.long(), v), "The keys hold torch.int64"),
    (lambda: attention(q, k.double(), v), "Of one dtype, please"),
    (lambda: attention(q, k[..., :4], v), "the size of a head"),
    (lambda: attention(q, k, v[:, :, :3]), "each key has one value"),
    (lambda: attention(q[:, :3], k, v), "2 heads of keys do not divide 3 heads of queries"),
    (lambda: attention(q, k, v, torch.ones(2, 7).bool()), r"A mask of shape \(2, 7\) does not fit scores \(2, 4, 5, 7\)"),
    (lambda: attention(q, k, v, torch.ones(5, 7).int()), "not torch.int32. Say mask.bool"),
    (lambda: attention(k, q[:, :1], q[:, :1], causal=True), "7 queries and only 5 keys"),
    (lambda: check_attention(k, q[:, :1], q[:, :1], causal=True), "7 queries and only 5 keys"),
    (lambda: check_attention(q, k, v, torch.ones(2, 7).bool()), "does not fit scores"),
    (lambda: online_attention(q, k, v, block=0), "block=0"),
    (lambda: online_attention(q, k, v, torch.ones(9, 7).bool()), "does not fit scores"),
    (lambda: Attention(GOOD)(torch.randn(1, 5, 8)), r"must have the shape \(B, T, 16\), not \(1, 5, 8\)"),
    (lambda: Attention(GOOD)(torch.randn(1, 5, 16), torch.randn(1, 3, 16)), "A memory has positions of its own"),
    (lambda: Attention(replace(GOOD, positions="none"))(torch.randn(1, 5, 16), torch.randn(1, 3, 8)), r"must have the shape \(B, S, 16\)"),
    (lambda: Attention(GOOD)(torch.randn(1, 5, 16), mask=torch.ones(1, 5)[:, :, None, None] > 0), "does not fit scores"),
    (lambda: Attention(GOOD)(torch.randn(1, 1, 16), cache=Kept()), "give positions="),
    (lambda: AdditiveAttention(4, 5, 6)(torch.randn(2, 3, 4), torch.randn(2, 7, 4)), r"The memory must have the shape \(2, positions, 5\)"),
    (lambda: AdditiveAttention(4, 5, 6)(torch.ones(2, 3, 4), torch.ones(2, 7, 5), torch.ones(2, 6) > 0), "The mask must be bool of shape"),
]


@pytest.mark.parametrize("call, says", BAD, ids=[says[:40] for _, says in BAD])
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(AttentionError, match=says): call()
