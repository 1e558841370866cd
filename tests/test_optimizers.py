"""Optimizers: equal to torch.optim's and to formulas in numpy; state that goes both ways; faults."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from lmbook import optimizers as module
from lmbook.optimizers import (
    OPTIMIZERS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    Muon,
    OptimizerError,
    RMSprop,
    Together,
    multiplies_bfloat16,
    orthogonalize,
)
from lmbook.runs import muon_and_adamw
from lmbook.schedules import cosine, linear
from lmbook.transformer import Transformer, preset

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, torch.optim.Adagrad, {"lr": 0.05}),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"lr": 0.003, "alpha": 0.95, "eps": 1e-6}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.01}),
}  # fmt: skip
if hasattr(torch.optim, "Muon"): PAIRS["muon"] = (Muon, torch.optim.Muon, {"lr": 0.02})
ALL = [SGD, Adagrad, RMSprop, Adam, AdamW, Lion, Muon]


def model(dtype=torch.float64, device="cpu", bias=True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 12, bias=bias), nn.Tanh(), nn.Linear(12, 3, bias=bias)).to(device, dtype)


def run(net: nn.Module, optimizer, start=0, stop=100, after=lambda: None) -> list[torch.Tensor]:
    "Steps from `start` to `stop` of one fixed series of batches."
    first = next(net.parameters())
    dice = torch.Generator().manual_seed(0)
    x, y = (torch.randn(stop, 16, n, generator=dice).to(first.device, first.dtype) for n in (5, 3))
    for i in range(start, stop):
        optimizer.zero_grad()
        ((net(x[i]) - y[i]) ** 2).mean().backward()
        optimizer.step()
        after()
    return [p.detach().clone() for p in net.parameters()]


def in_groups(net: nn.Module) -> list[dict]:
    ps = list(net.parameters())
    return [{"params": ps[:1], "lr": 0.005, "weight_decay": 0.2}, {"params": ps[1:]}]


@pytest.fixture(autouse=True)
def bfloat16_as_torch_multiplies_it(monkeypatch):
    "PyTorch's Muon does it on any processor, however slowly; it can only be matched in the same way."
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)


def close(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def message(function, *arguments, **options) -> str:
    with pytest.raises(OptimizerError) as caught: function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- equal to torch.optim


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", PAIRS)
def test_a_hundred_steps_like_torch(name, decay, dtype, tolerance, device):
    ours, theirs, options = PAIRS[name]
    options = options | {"weight_decay": decay}
    bias = name != "muon"  # which is for matrices
    if dtype == torch.float32: options["lr"] = options["lr"] / 4  # rounding must not be amplified by the training itself
    for split in (lambda net: net.parameters(), in_groups):
        expected = {}
        for fused in (False, True) if ours.kernels else (False,):
            reference = model(dtype, device, bias)
            expected[fused] = run(reference, theirs(split(reference), **options, **({"fused": fused} if ours.kernels else {})))
            net = model(dtype, device, bias)
            close(run(net, ours(split(net), **options, **({"fused": fused} if ours.kernels else {}))), expected[fused], tolerance)
        start = model(dtype, device, bias).parameters()
        assert max((a - b).abs().max() for a, b in zip(expected[False], start)) > 0.01  # it went somewhere


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_options_of_muon(adjust, nesterov):
    if "muon" not in PAIRS: return
    options = {"lr": 0.02, "adjust_lr_fn": adjust, "nesterov": nesterov, "momentum": 0.8}
    options |= {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)}
    a, b = model(bias=False), model(bias=False)
    close(run(a, Muon(a.parameters(), **options)), run(b, torch.optim.Muon(b.parameters(), **options)))


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_like_torch(name):
    "Bit by bit, against the way of PyTorch that rounds as ours do. (Muon without decay: in bfloat16, `mul_` and lists round apart.)"
    ours, theirs, options = PAIRS[name]
    a, b = model(torch.bfloat16, bias=name != "muon"), model(torch.bfloat16, bias=name != "muon")
    way = {"weight_decay": 0.0} if name == "muon" else {"foreach": name != "adagrad"}
    if name == "muon": options = options | way
    lists = {"fused": False} if ours.kernels else {}
    close(run(a, ours(a.parameters(), **options, **lists), stop=20), run(b, theirs(b.parameters(), **options | way), stop=20), 0)


def test_muon_leaves_its_buffer_alone():
    "PyTorch 2.13's scales the momentum of bfloat16 parameters in place where nesterov is off."
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    optimizer = Muon([p], momentum=0.5, nesterov=False)
    p.grad = torch.full_like(p, 8)
    optimizer.step()
    assert (optimizer.state[p]["momentum_buffer"] == 4).all() and (p.grad == 8).all()


@pytest.mark.parametrize("name", PAIRS)
def test_state_goes_to_torch_and_back(name):
    "33 steps with ours, 33 with torch's, 34 with ours again are a hundred with either; the state goes through a file."
    ours, theirs, options = PAIRS[name]
    options = options | {"weight_decay": 0.05}
    whole = model(bias=name != "muon")
    expected = run(whole, ours(in_groups(whole), **options))
    net, state = model(bias=name != "muon"), None
    for make, start, stop in ((ours, 0, 33), (theirs, 33, 66), (ours, 66, 100)):
        optimizer = make(in_groups(net), **options)
        if state is not None:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        end = run(net, optimizer, start, stop) if stop == 100 else run_part(net, optimizer, start, stop)
        state = optimizer.state_dict()
    close(end, expected)


def run_part(net, optimizer, start, stop):
    "As `run`, on the batches of the whole series."
    class Enough(Exception): pass
    count = [start]

    def after():
        count[0] += 1
        if count[0] == stop: raise Enough
    with pytest.raises(Enough): run(net, optimizer, start, 100, after)


# ---------------------------------------------------------------- formulas, once more and plainly


def formula(kind, w, gradients, o):
    "One parameter through all gradients, in numpy, from the papers."
    m, v, b = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if kind in (AdamW, Lion): w = w * (1 - o["lr"] * o["weight_decay"])
        else: g = g + o["weight_decay"] * w
        if kind is SGD:
            b = o["momentum"] * b + g
            w = w - o["lr"] * (g + o["momentum"] * b if o["nesterov"] else b)
        elif kind is Adagrad:
            v = v + g**2
            w = w - o["lr"] * g / (np.sqrt(v) + o["eps"])
        elif kind is RMSprop:
            v = o["alpha"] * v + (1 - o["alpha"]) * g**2
            w = w - o["lr"] * g / (np.sqrt(v) + o["eps"])
        elif kind is Lion:
            w = w - o["lr"] * np.sign(o["betas"][0] * m + (1 - o["betas"][0]) * g)
            m = o["betas"][1] * m + (1 - o["betas"][1]) * g
        else:
            m = o["betas"][0] * m + (1 - o["betas"][0]) * g
            v = o["betas"][1] * v + (1 - o["betas"][1]) * g**2
            w = w - o["lr"] * (m / (1 - o["betas"][0] ** t)) / (np.sqrt(v / (1 - o["betas"][1] ** t)) + o["eps"])
    return w


@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from([SGD, Adagrad, RMSprop, Adam, AdamW, Lion]), fused=st.booleans(),
       shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_lists_equal_the_formulas(data, kind, fused, shapes, seed):
    "Any shapes, also empty ones and single numbers; some gradients are missing in some steps; gradients are left as they were."
    share, dice = st.floats(0, 0.99), np.random.default_rng(seed)
    o = {"lr": data.draw(st.floats(0, 1)), "weight_decay": data.draw(st.floats(0, 1))}
    if kind is SGD: o |= {"momentum": data.draw(share), "nesterov": data.draw(st.booleans())}
    if kind is SGD and o["nesterov"]: o["momentum"] = max(o["momentum"], 0.01)
    if kind is RMSprop: o["alpha"] = data.draw(share)
    if kind in (Adam, AdamW, Lion): o["betas"] = (data.draw(share), data.draw(share))
    if kind in (Adagrad, RMSprop, Adam, AdamW): o["eps"] = data.draw(st.floats(1e-8, 1e-2))
    starts = [dice.normal(size=shape) for shape in shapes]
    series = [[dice.normal(size=shape) if dice.random() < 0.8 else None for shape in shapes] for _ in range(6)]
    ps = [nn.Parameter(torch.tensor(w)) for w in starts]
    optimizer = kind(ps, **o, **({"fused": fused} if kind.kernels else {}))
    for gradients in series:
        for p, g in zip(ps, gradients): p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        for p, g in zip(ps, gradients):
            if g is not None: assert np.array_equal(p.grad.numpy(), g)
    for i, p in enumerate(ps):
        seen = [gradients[i] for gradients in series if gradients[i] is not None]
        np.testing.assert_allclose(p.detach().numpy(), formula(kind, starts[i], seen, o), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_pieces_change_nothing(kind, monkeypatch):
    results = []
    for size in (1, 65, 10**9):  # one tensor at a time, two at a time (of 60 and 12 numbers, of 36 and 3), all at once
        monkeypatch.setattr(module, "_CACHE", size)
        net = model(bias=kind is not Muon)
        results.append(run(net, kind(net.parameters(), lr=0.01, **({"fused": False} if kind.kernels else {})), stop=10))
    close(results[0], results[2], 0)
    close(results[1], results[2], 0)


@pytest.mark.parametrize("kind", [SGD, Adagrad, Adam, AdamW])
@pytest.mark.parametrize("which", ["gradient", "parameter", "both"])
def test_a_tensor_that_lies_in_another_order(kind, which):
    "The fused kernels go through memory as it lies; they must not be used where that mixes up the numbers."
    ends = []
    for fused in (True, False):
        w = torch.arange(12.0).reshape(4, 3).T if which != "gradient" else torch.arange(12.0).reshape(4, 3).T.contiguous()
        p = nn.Parameter(w.clone())
        assert p.is_contiguous() == (which == "gradient")
        optimizer = kind([p], lr=0.5, fused=fused)
        for _ in range(3):
            g = torch.arange(12.0).reshape(4, 3).cos().T
            p.grad = g if which != "parameter" else g.contiguous()
            optimizer.step()
        ends.append(p.detach().contiguous())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("kind", [*ALL, "nesterov"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_left_alone(kind, fused):
    kind, options = (SGD, {"momentum": 0.9, "nesterov": True}) if kind == "nesterov" else (kind, {})
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = kind([p], lr=0.1, weight_decay=0.0, **options, **({"fused": fused} if kind.kernels else {}))
    for _ in range(3):
        p.grad = torch.arange(6.0).reshape(3, 2)
        optimizer.step()
        assert torch.equal(p.grad, torch.arange(6.0).reshape(3, 2))


def test_what_is_kept():
    kept = {}
    for kind in ALL:
        net = model(bias=False)
        optimizer = kind(net.parameters(), lr=0.01)
        run(net, optimizer, stop=2)
        numbers = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.ndim)
        kept[kind.__name__] = numbers / sum(p.numel() for p in net.parameters())
    assert kept == {"SGD": 0, "Adagrad": 1, "RMSprop": 1, "Adam": 2, "AdamW": 2, "Lion": 1, "Muon": 1}
    assert set(OPTIMIZERS.values()) == set(ALL)


def test_types_together():
    "Parameters of several types in one group."
    ps = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32)]
    optimizer = AdamW(ps, lr=0.1, weight_decay=0.0)
    for p in ps: p.grad = torch.ones_like(p)
    optimizer.step()
    for p in ps: torch.testing.assert_close(p.detach().double(), torch.full((3,), 0.9, dtype=torch.float64), rtol=0, atol=4e-3)
    assert [optimizer.state[p]["exp_avg"].dtype for p in ps] == [p.dtype for p in ps]


def test_closure():
    w = nn.Parameter(torch.tensor([2.0]))
    for optimizer in (SGD([w], lr=0.0), Together(SGD([w], lr=0.0))):
        def closure():
            optimizer.zero_grad()  # noqa: B023
            loss = (w**2).sum()
            loss.backward()
            return loss
        assert optimizer.step(closure).item() == 4 and w.grad.item() == 4


def test_it_is_a_torch_optimizer():
    "Hooks, schedulers, copies and pickles."
    net = model()
    optimizer, called = AdamW(net.parameters(), lr=0.01, fused=False), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, optimizer, stop=5, after=scheduler.step)
    assert called == ["before", "after"] * 5 and math.isclose(optimizer.param_groups[0]["lr"], 0.01 * cosine(5, 10))
    both = copy.deepcopy((net, optimizer))
    close(run(both[0], both[1], 5, 10), run(net, optimizer, 5, 10))
    net2, optimizer2 = pickle.loads(pickle.dumps((net, AdamW(net.parameters()))))
    before = [p.detach().clone() for p in net2.parameters()]
    run(net2, optimizer2, stop=1)
    assert any((a != b).any() for a, b in zip(before, net2.parameters()))


# ---------------------------------------------------------------- Muon and Together


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8), (1, 5), (5, 1), (1, 1)])
def test_orthogonalize(shape, native, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: native)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(matrix).double()
    values = torch.linalg.svdvals(out)
    assert out.shape == shape and 0.6 < values.min() and values.max() < 1.3
    U, _, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    inner = U.T @ out @ Vt.T  # the same directions: nothing beside the diagonal
    assert (inner - inner.diag().diag()).abs().max() < 0.06
    assert (inner.diag() > 0.6).all()
    torch.testing.assert_close(orthogonalize(1e-3 * matrix).double(), out, rtol=0, atol=0.03)


def test_a_processor_without_bfloat16_rounds_to_it(monkeypatch):
    "It multiplies in float32, which PyTorch does many times faster there, and rounds each product."
    for oneDNN in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda oneDNN=oneDNN: oneDNN)
        assert multiplies_bfloat16(torch.device("cpu")) == oneDNN
    matrix, found = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(1)), {}
    for native in (True, False):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device, native=native: native)
        found[native] = orthogonalize(matrix)
        assert found[native].dtype == torch.bfloat16
    off = (found[True].float() - found[False].float()).abs()
    assert off.max() < 0.02 and off.mean() < 0.002
    assert multiplies_bfloat16(torch.device("cuda"))


def test_orthogonalize_nothing():
    assert (orthogonalize(torch.zeros(3, 4)) == 0).all()


def pair(net, lr=0.02):
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return Together(Muon(matrices, lr=lr), AdamW([{"params": [p for p in net.parameters() if p.ndim < 2], "lr": lr / 2}], weight_decay=0.0))


def test_together_is_both():
    a, b = model(), model()
    matrices, rest = ([p for p in b.parameters() if (p.ndim == 2) is two] for two in (True, False))
    expected = [Muon(matrices, lr=0.02), AdamW(rest, lr=0.01, weight_decay=0.0)]

    class Both:
        def zero_grad(self): [o.zero_grad() for o in expected]
        def step(self): [o.step() for o in expected]

    close(run(a, pair(a)), run(b, Both()))


@pytest.mark.parametrize("way", ["state dict", "deepcopy"])
def test_together_goes_on(way):
    a, b = model(), model()
    expected = run(a, pair(a))
    optimizer = pair(b)
    run_part(b, optimizer, 0, 40)
    if way == "deepcopy": b, optimizer = copy.deepcopy((b, optimizer))
    else:
        state, optimizer = copy.deepcopy(optimizer.state_dict()), pair(b, lr=0.5)
        optimizer.load_state_dict(state)
    close(run(b, optimizer, 40, 100), expected)


def test_a_schedule_moves_both_and_state_given_before_is_kept():
    net = model()
    first = AdamW([p for p in net.parameters() if p.ndim < 2], lr=0.01)
    run(net, first, stop=3)
    optimizer = Together(Muon([p for p in net.parameters() if p.ndim == 2], lr=0.02), first)
    assert all(int(optimizer.state[p]["step"]) == 3 for p in net.parameters() if p.ndim < 2)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: linear(step, 10))
    run(net, optimizer, stop=5, after=scheduler.step)
    assert [round(group["lr"], 6) for o in optimizer.optimizers for group in o.param_groups] == [0.01, 0.005]


def test_faults_of_together():
    net = model()
    optimizer = pair(net)
    run(net, optimizer, stop=1)
    saved, other = optimizer.state_dict(), nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    assert "saved for another model" in message(pair(other).load_state_dict, saved)
    with pytest.raises(ValueError, match="more than one parameter group"): Together(SGD(net.parameters()), SGD(net.parameters()))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1})
    assert "belongs to none of the optimizers" in message(optimizer.step)


# ---------------------------------------------------------------- faults


W = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("kind, options, says", [
    (SGD, {"lr": -1}, "lr=-1: it must be at least 0"),
    (Adam, {"lr": math.nan}, "lr=nan"),
    (Adam, {"lr": math.inf}, "lr=inf"),
    (Adam, {"lr": "1e-3"}, "lr is '1e-3', a str; give a number"),
    (Adam, {"lr": torch.tensor(0.1)}, "a Tensor; give a number"),
    (AdamW, {"weight_decay": -0.1}, "weight_decay=-0.1"),
    (AdamW, {"betas": (0.9, 1.0)}, "betas"),
    (AdamW, {"betas": (0.9,)}, "give two numbers"),
    (Lion, {"betas": (0.9, 0.99, 0.999)}, "give two numbers"),
    (RMSprop, {"alpha": 1.0}, "alpha=1.0"),
    (RMSprop, {"eps": -1e-8}, "eps=-1e-08"),
    (SGD, {"momentum": 1.0}, "momentum=1.0: it must be at least 0 and below 1"),
    (SGD, {"nesterov": True}, "nesterov=True needs a momentum"),
    (Muon, {"ns_steps": 0}, "ns_steps=0"),
    (Muon, {"adjust_lr_fn": "mine"}, "one of None, 'original', 'match_rms_adamw'"),
])  # fmt: skip
def test_an_option_out_of_range(kind, options, says):
    assert says in message(kind, [W], **options)
    assert says in message(kind, [{"params": [W], **options}])  # in a group as well


def test_a_group_added_later_is_checked():
    optimizer, more = Muon([W]), nn.Parameter(torch.ones(2))
    assert "shape (2,)" in message(optimizer.add_param_group, {"params": [more]})
    assert "lr=-1" in message(optimizer.add_param_group, {"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1})
    assert len(optimizer.param_groups) == 1
    given_by_user = {"params": [nn.Parameter(torch.ones(2, 2))]}
    optimizer.add_param_group(given_by_user)
    assert len(optimizer.param_groups) == 2 and given_by_user.keys() == {"params"}


def test_bad_parameters():
    assert "stands twice" in message(SGD, [W, W])
    assert "shape (3,)" in message(Muon, [nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="No parameters"): SGD([])


@pytest.mark.parametrize("kind", ALL)
def test_sparse_and_complex_gradients_are_refused_before_any_change(kind):
    good, table = nn.Parameter(torch.ones(2, 2)), nn.Embedding(4, 2, sparse=True)
    optimizer = kind([good, table.weight])
    good.grad = torch.ones(2, 2)
    table(torch.tensor([1])).sum().backward()
    assert "SparseAdam" in message(optimizer.step)
    strange = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    strange.grad = torch.ones_like(strange)
    good.grad = torch.ones(2, 2)
    assert "complex" in message(kind([good, strange]).step)
    assert (good == 1).all() and not optimizer.state


def saved_by(kind, shape=(2, 2), **options):
    p = nn.Parameter(torch.ones(shape))
    optimizer = kind([p], **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("kind, state, says", [
    (SGD, lambda: saved_by(torch.optim.SGD, momentum=0.9, dampening=0.5), "SGD has dampening=0 only, not 0.5"),
    (SGD, lambda: saved_by(torch.optim.SGD, maximize=True), "maximize=False only"),
    (SGD, lambda: saved_by(Adam), "another kind of optimizer: it has no momentum, nesterov"),
    (Adam, lambda: saved_by(torch.optim.Adam, amsgrad=True), "amsgrad=False only"),
    (Adam, lambda: saved_by(AdamW), "decoupled_weight_decay=False only"),
    (AdamW, lambda: saved_by(Adam), "decoupled_weight_decay=True only"),
    (Lion, lambda: saved_by(Adam), "Lion keeps no exp_avg_sq"),
    (RMSprop, lambda: saved_by(torch.optim.RMSprop, centered=True), "centered=False only"),
    (RMSprop, lambda: saved_by(torch.optim.RMSprop, momentum=0.5), "momentum=0 only"),
    (Adagrad, lambda: saved_by(torch.optim.Adagrad, lr_decay=0.1), "lr_decay=0 only"),
    (AdamW, lambda: saved_by(AdamW, shape=(3, 2)), "exp_avg of parameter 0 has the shape (3, 2), the parameter (2, 2)"),
])  # fmt: skip
def test_a_state_that_does_not_fit(kind, state, says):
    optimizer = kind([nn.Parameter(torch.ones(2, 2))], lr=0.123)
    assert says in message(optimizer.load_state_dict, state())
    assert optimizer.param_groups[0]["lr"] == 0.123 and not optimizer.state


def test_a_state_of_another_number_of_parameters():
    with pytest.raises(ValueError): SGD([W], momentum=0.9).load_state_dict(SGD(model().parameters(), momentum=0.9).state_dict())


# ---------------------------------------------------------------- in a run


def test_a_run_shrinks_the_matrices_between_the_layers_and_nothing_else():
    "Without a gradient only the decay is left: tables of vectors, scores of the vocabulary, norms and biases stay as they are."
    for tie in (True, False):
        model = Transformer(preset("tiny", 30, d_model=16, n_layer=1, n_head=2, tie=tie, positions="learned"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters(): p.grad = torch.zeros_like(p)
        muon_and_adamw(model, lr=.1, weight_decay=.5).step()
        shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert shrunk == {name for name, p in before.items() if p.ndim == 2 and name.startswith("decoder.")} and len(shrunk) > 4
        for name in shrunk: torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * .95)
