"""Schedules, clipping and groups: equal to torch's and to closed forms; what makes no sense is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from lmbook.optimizers import SGD, AdamW, OptimizerError
from lmbook.schedules import SCHEDULES, clip_gradients, constant, cosine, linear, one_cycle, parameter_groups, wsd


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).to(torch.float64)


def close(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def message(function, *arguments, **options) -> str:
    with pytest.raises(OptimizerError) as caught: function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- schedules


def driven(make, total):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler, rates = make(optimizer), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total", [2, 7, 100])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_schedules_of_torch(total, floor):
    def ours(schedule, **options): return [schedule(step, total, **options) for step in range(total)]
    wave = driven(lambda o: lr_scheduler.CosineAnnealingLR(o, total, eta_min=floor), total)
    np.testing.assert_allclose(ours(cosine, floor=floor), wave, atol=1e-9)
    np.testing.assert_allclose(ours(linear, floor=floor), driven(lambda o: lr_scheduler.LinearLR(o, 1.0, floor, total), total), atol=1e-9)
    np.testing.assert_allclose(ours(constant), driven(lambda o: lr_scheduler.ConstantLR(o, 1.0, 1), total))


@pytest.mark.parametrize("total", [5, 20, 21, 100])
@pytest.mark.parametrize("share", [0.3, 0.25, 0.5])
def test_one_cycle_of_torch(total, share):
    theirs = driven(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=total + 1, pct_start=share), total)
    warmup = None if share == 0.3 else share * (total + 1)
    np.testing.assert_allclose([one_cycle(step, total + 1, warmup=warmup) for step in range(total)], theirs, atol=1e-9)


def test_closed_forms():
    assert [round(linear(step, 6, warmup=2), 3) for step in range(8)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [round(wsd(step, 10, warmup=2, decay=4, floor=0.2), 3) for step in range(12)] == [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [wsd(step, 10) for step in range(11)] == [1] * 9 + [0.5, 0]
    assert [constant(step, 4, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert math.isclose(cosine(5 + 10, 25, warmup=5, floor=0.5), 0.75)
    assert [round(one_cycle(step, 5, warmup=3, start=0.5, floor=0.0), 3) for step in range(7)] == [0.5, 0.75, 1, 0.5, 0, 0, 0]


@given(name=st.sampled_from(sorted(SCHEDULES)), total=st.integers(1, 200), data=st.data())
def test_any_schedule(name, total, data):
    "Between the floor and 1; up, then down; it stays where it ends."
    warmup = data.draw(st.integers(0, total))
    options = {"warmup": warmup}
    if name in ("linear", "cosine", "wsd", "one_cycle"): options["floor"] = data.draw(st.floats(0, 1))
    if name == "wsd": options["decay"] = data.draw(st.integers(0, total - warmup))
    schedule = SCHEDULES[name]
    values = [schedule(step, total, **options) for step in range(total + 3)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert math.isclose(max(values), 1)
    peak = max(0, warmup - 1)
    assert all(b >= a - 1e-12 for a, b in zip(values[:peak], values[1 : peak + 1]))
    assert all(b <= a + 1e-12 for a, b in zip(values[peak:], values[peak + 1 :]))
    if "floor" in options: assert all(math.isclose(value, options["floor"], abs_tol=1e-12) for value in values[total:])
    if name != "one_cycle": assert values[0] > 0  # no step is wasted
    assert schedule(total * 10, total, **options) == values[-1]


@pytest.mark.parametrize("schedule", SCHEDULES.values())
@pytest.mark.parametrize("arguments", [(-1, 10, 0), (0, 0, 0), (0, -5, 0), (0, 10, 11), (0, 10, -1)])
def test_a_schedule_that_makes_no_sense(schedule, arguments):
    step, total, warmup = arguments
    assert "0 <= step, 0 < total" in message(schedule, step, total, warmup=warmup)


def test_more_schedules_that_make_no_sense():
    assert "floor=1.5" in message(cosine, 0, 10, floor=1.5)
    assert "floor=-0.1" in message(linear, 0, 10, floor=-0.1)
    assert "start=2" in message(one_cycle, 0, 10, start=2)
    assert "not longer than the total" in message(wsd, 0, 10, warmup=6, decay=5)


# ---------------------------------------------------------------- clipping


def with_gradients(scale, dtypes=(torch.float64,) * 3):
    dice, ps = torch.Generator().manual_seed(0), []
    for shape, dtype in zip([(3, 4), (5,), ()], dtypes):
        ps.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))
        ps[-1].grad = (scale * torch.randn(shape, generator=dice)).to(dtype)
    return [*ps, nn.Parameter(torch.zeros(2))]  # the last has no gradient


@given(scale=st.floats(1e-3, 1e3), max_norm=st.floats(1e-3, 1e3))
def test_clipping_like_torch(scale, max_norm):
    a, b = with_gradients(scale), with_gradients(scale)
    torch.testing.assert_close(clip_gradients(a, max_norm), nn.utils.clip_grad_norm_(b, max_norm), rtol=1e-12, atol=1e-12)
    close([p.grad for p in a[:3]], [p.grad for p in b[:3]])
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in a[:3]))
    assert norm <= max_norm * (1 + 1e-9)


def test_clipping_types_and_forms():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    a, b = with_gradients(5, dtypes), with_gradients(5, dtypes)
    torch.testing.assert_close(clip_gradients(iter(a), 1.0).double(), nn.utils.clip_grad_norm_(b, 1.0).double(), rtol=1e-2, atol=0)
    close([p.grad.double() for p in a[:3]], [p.grad.double() for p in b[:3]], 0.02)
    assert [p.grad.dtype for p in a[:3]] == list(dtypes)
    half = with_gradients(5, (torch.bfloat16,) * 3)
    assert clip_gradients(half, 1.0).dtype == torch.float32 and half[0].grad.dtype == torch.bfloat16
    [p] = with_gradients(5)[:1]
    assert clip_gradients(p, math.inf) == p.grad.norm()
    assert clip_gradients([], 1.0) == 0 and clip_gradients([nn.Parameter(torch.ones(1))], 1.0) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_no_numbers(value):
    ps = with_gradients(1)
    ps[1].grad[0] = value
    before = [p.grad.clone() for p in ps[:3]]
    told = message(clip_gradients, ps, 1.0, error_if_nonfinite=True)
    assert f"norm of the gradients is {value}" in told and "of 1 parameters are not all finite, the first is number 1" in told
    torch.testing.assert_close([p.grad for p in ps[:3]], before, equal_nan=True)
    assert not clip_gradients(ps, 1.0).isfinite()  # as torch: told by the norm only
    huge = nn.Parameter(torch.zeros(2)); huge.grad = torch.full((2,), 3e38)
    assert "it is too large" in message(clip_gradients, huge, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("max_norm", [0, -1, math.nan])
def test_a_bound_that_makes_no_sense(max_norm):
    assert "has to be above 0" in message(clip_gradients, with_gradients(1), max_norm)


# ---------------------------------------------------------------- groups


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norms = nn.ModuleList([nn.LayerNorm((2, 4)), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.RMSNorm((2, 4))])
        self.lstm, self.conv = nn.LSTM(4, 3), nn.Conv1d(4, 4, 3)
        self.scale, self.position = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 7, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_every_parameter_is_in_one_group():
    net = Everything()
    names = {p: name for name, p in net.named_parameters()}
    yes, no = ([names[p] for p in group["params"]] for group in parameter_groups(net, 0.1))
    assert sorted(yes + no) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    assert set(yes) == {"embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
                        "conv.weight", "position"}  # fmt: skip
    assert [group["weight_decay"] for group in parameter_groups(net, 0.1)] == [0.1, 0.0]


def test_embeddings_can_be_left_alone():
    "Tied ones too: what is an embedding anywhere is one."
    net = Everything()
    yes, no = (group["params"] for group in parameter_groups(net, 0.1, decay_embeddings=False))
    assert any(p is net.embed.weight for p in no) and not any(p is net.embed.weight for p in yes)


def test_groups_that_are_empty():
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(2), 0.1)] == [0.0]
    assert "nothing to train" in message(parameter_groups, nn.Linear(2, 2).requires_grad_(False), 0.1)
    assert "nothing to train" in message(parameter_groups, nn.ReLU(), 0.1)
    assert "weight_decay=-1" in message(parameter_groups, nn.Linear(2, 2), -1)


def test_groups_train():
    net = model()
    optimizer = AdamW(parameter_groups(net, 0.5), lr=0.1)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    for p, old in zip(net.parameters(), before): torch.testing.assert_close(p.detach(), old * (0.95 if p.ndim > 1 else 1))
