"""Losses, gradients, initialisation, norms and networks: parity with PyTorch, invariants, and every kind of bad input with its message."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.deep_networks import (
    MLP,
    NORMS,
    SCHEMES,
    LayerNorm,
    MLPConfig,
    NeuralNGram,
    NeuralNGramConfig,
    Norm,
    RMSNorm,
    Scheme,
    init_weights,
    signal_by_depth,
)
from lmbook.networks import ACTIVATIONS, Activation, NetworkError, Value, cross_entropy, gradient_check, log_softmax


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- losses


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_log_softmax_is_torchs_and_never_overflows(scores):
    s = torch.tensor(scores)
    ours = log_softmax(s)
    assert torch.isfinite(ours).all() and (ours <= 0).all()
    torch.testing.assert_close(ours, s.log_softmax(-1))
    assert abs(ours.double().exp().sum() - 1) < 1e-5


def test_log_softmax_masks_and_other_axes():
    s = torch.tensor([[0., -math.inf, 1.]])
    torch.testing.assert_close(log_softmax(s), s.log_softmax(-1))
    s = rand(3, 4, 5)
    for dim in (0, 1, -1): torch.testing.assert_close(log_softmax(s, dim), s.log_softmax(dim))


def test_log_softmax_gradient():
    s = rand(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(log_softmax, (s,))


shapes, reductions = st.sampled_from([(), (3,), (2, 4)]), st.sampled_from(["mean", "sum", "none"])


@given(st.integers(0, 10**6), shapes, reductions, st.floats(0, .9), st.booleans())
@settings(deadline=None)
def test_cross_entropy_is_torchs(seed, shape, reduction, smoothing, ignore):
    scores, dice = rand(*shape, 6, seed=seed).requires_grad_(), torch.Generator().manual_seed(seed)
    targets = torch.randint(6, shape, generator=dice)
    if ignore: targets[torch.rand(shape, generator=dice) < .3] = 5
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": 5 if ignore else -100}
    ours, theirs = cross_entropy(scores, targets, **options), F.cross_entropy(scores.reshape(-1, 6), targets.reshape(-1), **options)
    if reduction == "none": theirs = theirs.reshape(shape)
    if theirs.isnan().any(): assert reduction == "mean" and ours == 0  # nothing counts: the one departure
    else:
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), scores)[0] for loss in (ours, theirs)))


def test_cross_entropy_over_nothing_is_zero_with_zero_gradient():
    scores = rand(2, 3).requires_grad_()
    loss = cross_entropy(scores, torch.tensor([-100, -100]))
    assert loss == 0 and (torch.autograd.grad(loss, scores)[0] == 0).all()


@pytest.mark.parametrize(
    "scores, targets, options, says",
    [
        (rand(2, 3), torch.tensor([0, 3]), {}, "The target 3 is no class: they run from 0 to 2"),
        (rand(2, 3), torch.tensor([-1, 0]), {}, "The target -1 is no class"),
        (rand(2, 3), torch.tensor([0]), {}, r"scores \(2, 3\) must have the shape of targets \(1,\) and one axis more"),
        (rand(3), torch.tensor([0]), {}, "one axis more"),
        (torch.tensor(1.), torch.tensor(0), {}, "one axis more"),
        (rand(2, 3), torch.tensor([0., 1.]), {}, "whole numbers, one class for each, not torch.float32"),
        (rand(2, 3), torch.tensor([True, False]), {}, "not torch.bool"),
        (rand(2, 3), torch.tensor([0, 1]), {"label_smoothing": 1.}, "label_smoothing=1.0 must be at least 0 and below 1"),
        (rand(2, 3), torch.tensor([0, 1]), {"reduction": "average"}, "no reduction='average'. Choose one of: mean, sum, none"),
    ],
)
def test_cross_entropy_says_what_is_wrong(scores, targets, options, says):
    with pytest.raises(NetworkError, match=says): cross_entropy(scores, targets, **options)


# ---------------------------------------------------------------- gradient_check


def test_gradient_check_finds_the_wrong_parameter():
    a, b = (rand(3, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    before = a.detach().clone(), b.detach().clone()
    right = gradient_check(lambda: (a.sin() * b).sum(), [a, b], samples=None)
    assert max(right) < 1e-8
    wrong = gradient_check(lambda: (a.sin() * b + 2 * b.detach()).sum(), [a, b])  # b is used where its gradient does not see it
    assert wrong[0] < 1e-8 and wrong[1] > .1
    assert all(torch.equal(x, y) for x, y in zip((a, b), before))


def test_gradient_check_of_scalars_unused_and_generators():
    a, unused = torch.tensor(2., dtype=torch.float64, requires_grad=True), torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert gradient_check(lambda: a**3, (p for p in (a, unused))) == pytest.approx([0, 0], abs=1e-8)


def test_gradient_check_leaves_parameters_alone_when_the_loss_fails():
    a, calls = torch.ones(1, dtype=torch.float64, requires_grad=True), iter([1, 1, 1])

    def loss():
        next(calls)
        return a.sum()

    with pytest.raises(StopIteration): gradient_check(loss, [a])
    assert a.item() == 1


def test_gradient_check_looks_at_as_many_entries_as_it_should():
    p, calls = torch.ones(10, dtype=torch.float64, requires_grad=True), []
    for samples, entries in ((3, 3), (50, 10), (None, 10)):
        calls.clear()
        gradient_check(lambda: calls.append(1) or p.square().sum(), [p], samples=samples)
        assert len(calls) == 2 + 2 * entries


@pytest.mark.parametrize(
    "loss, parameters, says",
    [
        (lambda: torch.tensor(0.), [], "no parameters to check"),
        (lambda: torch.tensor(0.), [torch.ones(2, requires_grad=True)], "mostly rounding: use model.double"),
        (lambda: torch.tensor(0.), [torch.ones(2, dtype=torch.float64)], "requires_grad=False"),
    ],
)
def test_gradient_check_says_what_is_wrong(loss, parameters, says):
    with pytest.raises(NetworkError, match=says): gradient_check(loss, parameters)


def test_gradient_check_refuses_random_and_vector_losses():
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NetworkError, match="not the same twice"): gradient_check(lambda: (p * torch.rand(4)).sum(), [p])
    with pytest.raises(NetworkError, match=r"one number, not a tensor of shape \(4,\)"): gradient_check(lambda: p * 2, [p])


# ---------------------------------------------------------------- Value

OPERATIONS = [
    lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b, lambda a, b: a / (b * b + 1.), lambda a, b: -a,
    lambda a, b: 2 - a, lambda a, b: 3 / (a * a + 2), lambda a, b: 2 * a + 1, lambda a, b: a**3, lambda a, b: a.tanh(),
    lambda a, b: a.relu() - b.relu(), lambda a, b: (a.tanh()).exp(), lambda a, b: (b * b + 1.).log(),
]  # fmt: skip


lines = st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 50), st.integers(0, 50))


@given(st.lists(lines, min_size=1, max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_value_computes_what_autograd_computes(program, x, y):
    "Random programs, in which every number may be used any number of times."

    def run(a, b):
        stack = [a, b]
        for op, i, j in program: stack.append(OPERATIONS[op](stack[i % len(stack)], stack[j % len(stack)]).tanh() + stack[-1])
        return stack[-1]

    ours, theirs = [Value(x), Value(y)], [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, y)]
    out, expected = run(*ours), run(*theirs)
    out.backward()
    gradients = torch.autograd.grad(expected, theirs, materialize_grads=True)
    assert out.data == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    assert [v.grad for v in ours] == pytest.approx([g.item() for g in gradients], rel=1e-6, abs=1e-6)


def test_value_long_chains_repeats_and_order():
    a = Value(1.)
    y = a
    for _ in range(50_000): y = y + 0.
    y.backward(); y.backward()  # a second walk gives the same, not twice as much
    assert a.grad == 1
    order = y.ancestors()
    assert order[-1] is y and len({id(v) for v in order}) == len(order)
    place = {id(v): i for i, v in enumerate(order)}
    assert all(place[id(p)] < place[id(v)] for v in order for p in v.parents)
    assert (Value(0.) ** 0).data == 1 and repr(Value(2.)) == "Value(2, grad=0)"


def test_value_draws_itself():
    a = Value(2., name="a")
    ax = (a * a + 1).draw()
    texts = [t.get_text() for t in ax.texts]
    assert any(t.startswith("a\n2\n") for t in texts) and any(t.startswith("constant\n1\n") for t in texts)
    assert a.draw(plt.figure().gca()).texts
    plt.close("all")


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_are_torchs(dtype):
    x = (rand(3, 5, 16) * 3 + 1).to(dtype)
    unshifted = LayerNorm(16, bias=False), nn.LayerNorm(16, bias=False)
    pairs = [(LayerNorm(16), nn.LayerNorm(16)), unshifted, (RMSNorm(16), nn.RMSNorm(16, eps=1e-6))]
    for ours, theirs in pairs:
        with torch.no_grad():
            ours.weight.copy_(rand(16, seed=1))
            if getattr(ours, "bias", None) is not None: ours.bias.copy_(rand(16, seed=2))
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x))
    assert "16" in repr(pairs[0][0]) and "1e-06" in repr(pairs[2][0])


@given(st.floats(.1, 100), st.floats(-100, 100))
@settings(max_examples=30)
def test_what_norms_ignore(scale, shift):
    x = rand(4, 8, dtype=torch.float64)
    layer, rms = LayerNorm(8, eps=0).double(), RMSNorm(8, eps=0).double()
    torch.testing.assert_close(layer(scale * x + shift), layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rms(scale * x), rms(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rms(x).square().mean(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, lambda d: MLP(MLPConfig(d, 2))])
def test_input_of_another_width(make):
    with pytest.raises(NetworkError, match=r"shape \(2, 7\), but this network was made for a last axis of 8"): make(8)(rand(2, 7))
    with pytest.raises(NetworkError, match=r"shape \(\)"): make(8)(torch.tensor(1.))
    with pytest.raises(NetworkError, match="torch.int64, a network computes with floats"): make(8)(torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_of_no_width_and_odd_epsilons(norm):
    for width in (-2, 0, 2.5):
        with pytest.raises(NetworkError, match="d_model=.* must be a whole number, at least 1"): norm(width)
    with pytest.raises(NetworkError, match="eps=-1 must be at least 0"): norm(4, eps=-1)


def test_the_choices_are_the_tables():
    assert set(get_args(Scheme)) == set(SCHEMES)
    assert set(get_args(Norm)) == set(NORMS)
    assert set(get_args(Activation)) == set(ACTIVATIONS)


# ---------------------------------------------------------------- initialisation

REFERENCE = {
    "normal": nn.init.normal_, "uniform": lambda w, generator: nn.init.uniform_(w, -1, 1, generator=generator),
    "small": lambda w, generator: nn.init.normal_(w, std=.02, generator=generator),
    "pytorch": lambda w, generator: nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=generator),
    "xavier": nn.init.xavier_normal_, "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming": lambda w, generator: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=generator),
    "kaiming_uniform": lambda w, generator: nn.init.kaiming_uniform_(w, nonlinearity="relu", generator=generator),
    "lecun": lambda w, generator: nn.init.kaiming_normal_(w, nonlinearity="linear", generator=generator),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_torchs(scheme):
    "The very same numbers from the same generator."
    layer, reference = nn.Linear(30, 50), torch.empty(50, 30)
    assert init_weights(layer, scheme, generator=torch.Generator().manual_seed(3)) is layer
    REFERENCE[scheme](reference, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer.weight.detach(), reference)
    assert not layer.bias.any()


def test_init_leaves_other_parameters_alone_and_scales_branches():
    model = nn.Sequential(nn.Embedding(5, 8), LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[2].ends_branch = model[4].ends_branch = True
    embedding = model[0].weight.detach().clone()
    plain = [m.weight.clone() for m in init_weights(model, "xavier", generator=torch.Generator().manual_seed(0))[2:]]
    scaled = [m.weight for m in init_weights(model, "xavier", scale_residual=True, generator=torch.Generator().manual_seed(0))[2:]]
    torch.testing.assert_close(scaled[0], plain[0] / 2**.5)
    torch.testing.assert_close(scaled[1], plain[1])
    torch.testing.assert_close(scaled[2], plain[2] / 2**.5)
    assert torch.equal(model[0].weight, embedding) and (model[1].weight == 1).all()


@pytest.mark.parametrize(
    "module, scheme, scale, says",
    [
        (nn.Linear(2, 2), "he", False, "no scheme='he'. Choose one of: normal, uniform"),
        (nn.Linear(2, 2), "kaiming", True, "no layer has ends_branch"),
        (nn.ReLU(), "kaiming", False, "no nn.Linear in this ReLU"),
    ],
)
def test_init_says_what_is_wrong(module, scheme, scale, says):
    with pytest.raises(NetworkError, match=says): init_weights(module, scheme, scale_residual=scale)


# ---------------------------------------------------------------- MLP and signals


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("norm_first, residual", [(True, True), (False, True), (True, False), (False, False)])
def test_gradients_of_every_kind_of_network(activation, norm, norm_first, residual):
    torch.manual_seed(0)
    model = MLP(MLPConfig(3, 4, 5, 3, activation, norm, norm_first, residual)).double()
    x, y = rand(6, 3, dtype=torch.float64), torch.arange(6) % 4
    assert max(gradient_check(lambda: cross_entropy(model(x), y), list(model.parameters()), samples=5)) < 1e-4
    assert model(rand(2, 7, 3).double()).shape == (2, 7, 4)


def test_plain_network_is_a_stack_of_linears():
    torch.manual_seed(0)
    model = MLP(MLPConfig(3, 2, 8, 4, activation="tanh", bias=False))
    stack = nn.Sequential(*[part for m in model.modules() if isinstance(m, nn.Linear) for part in (m, nn.Tanh())][:-1])
    torch.testing.assert_close(model(rand(5, 3)), stack(rand(5, 3)))
    assert sum(p.numel() for p in model.parameters()) == 3 * 8 + 3 * 64 + 8 * 2


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_where_norms_and_residuals_stand(norm, norm_first, residual):
    "The equations written out: W act(norm(x)) or norm(W act(x)), with or without x added before the second norm."
    torch.manual_seed(0)
    model, x = MLP(MLPConfig(3, 2, 8, 3, norm=norm, norm_first=norm_first, residual=residual)), rand(5, 3)
    normalise = {"none": lambda h: h, "layer": lambda h: F.layer_norm(h, (8,)), "rms": lambda h: F.rms_norm(h, (8,), eps=1e-6)}[norm]
    h = model.into(x)
    for layer in model.layers:
        new = layer.linear((normalise(h) if norm_first else h).relu())
        h = h + new if residual else new
        if not norm_first: h = normalise(h)
    torch.testing.assert_close(model(x), model.out((normalise(h) if norm_first else h).relu()))


def test_one_hidden_layer_and_dropout():
    model = MLP(MLPConfig(3, 2, 8, 1, dropout=.5, norm="rms", norm_first=False))
    x = rand(5, 3)
    assert not model.layers and not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_scaled_branches_are_smaller():
    sizes = []
    for scale in (False, True):
        torch.manual_seed(0)
        model = MLP(MLPConfig(4, 4, 32, 5, residual=True, scale_residual=scale))
        sizes.append([layer.linear.weight.std().item() for layer in model.layers])
    assert np.allclose(np.divide(*sizes), 2)  # four branches


@pytest.mark.parametrize(
    "options, says",
    [
        ({"d_in": 0}, "d_in=0 must be a whole number, at least 1"), ({"d_out": 2.5}, "d_out=2.5 must be a whole number"),
        ({"d_model": True}, "d_model=True must be"), ({"n_layer": -1}, "n_layer=-1 must be"),
        ({"activation": "swish"}, "no activation='swish'. Choose one of: identity, relu"),
        ({"norm": "batch"}, "no norm='batch'. Choose one of: none"),
        ({"init": "he"}, "no init='he'"), ({"dropout": 1.}, "dropout=1.0 must be at least 0 and below 1"),
        ({"scale_residual": True}, "needs residual=True"),
        ({"scale_residual": True, "residual": True, "n_layer": 1}, "n_layer of at least 2"),
    ],
)  # fmt: skip
def test_mlp_config_says_what_is_wrong(options, says):
    with pytest.raises(NetworkError, match=says): MLPConfig(**({"d_in": 3, "d_out": 2} | options))


def test_signal_listens_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = rand(32, 4)
    with torch.no_grad(): signal = signal_by_depth(model, x)
    with torch.no_grad(): sizes = [model[0](x).square().mean().sqrt().item(), model(x).square().mean().sqrt().item()]
    assert signal.names == ("0", "2") and np.allclose(signal.forward, sizes)
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    assert np.isclose(signal.backward[1], noise.square().mean().sqrt().item())
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_signal_of_other_modules():
    model = NeuralNGram(NeuralNGramConfig(9, 2, 4, 5))
    assert signal_by_depth(model, torch.tensor([[1, 2, 3]]), (nn.Embedding, nn.Linear)).names == ("embed", "hidden", "out")
    assert signal_by_depth(nn.LSTM(3, 4), rand(5, 2, 3), nn.LSTM).forward.shape == (1,)
    chosen = signal_by_depth(MLP(MLPConfig(3, 3, 4, 3)), rand(2, 3), lambda name, m: name.endswith("act"))
    assert chosen.names == ("layers.0.act", "layers.1.act", "act")
    with pytest.raises(NetworkError, match="No module of that kind ran. The model's modules are: Embedding, Linear"):
        signal_by_depth(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), torch.tensor([0]), nn.Conv1d)

    class Odd(nn.Module):
        def forward(self, x): return {"x": x}

    with pytest.raises(NetworkError, match="puts out a dict"): signal_by_depth(Odd(), rand(2), Odd)


def test_signal_removes_its_hooks_when_the_model_fails():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2))
    with pytest.raises(RuntimeError): signal_by_depth(model, rand(3, 4))
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- the neural n-gram


def naive_scores(model: NeuralNGram, text: list[int]) -> torch.Tensor:
    "Equation 1 of the paper, one place after the other."
    c, rows = model.config, []
    for t in range(len(text)):
        window = [text[i] if i >= 0 else c.vocab_size for i in range(t - c.context_length + 1, t + 1)]
        x = torch.cat([model.embed.weight[w] for w in window])
        y = model.out.bias + model.out.weight @ torch.tanh(model.hidden.bias + model.hidden.weight @ x)
        rows.append(y if model.direct is None else y + model.direct.weight @ x)
    return torch.stack(rows)


@pytest.mark.parametrize("context", [1, 2, 5])
@pytest.mark.parametrize("direct", [False, True])
def test_neural_ngram_is_the_equation(context, direct):
    torch.manual_seed(0)
    model = NeuralNGram(NeuralNGramConfig(11, context, 3, 4, direct))
    for p in model.parameters(): nn.init.normal_(p)
    ids = torch.randint(11, (3, 6))
    expected = torch.stack([naive_scores(model, row.tolist()) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    log_p = model.token_log_probs(ids)
    torch.testing.assert_close(log_p, expected[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids.int()), model(ids))


def test_neural_ngram_sees_its_window_and_nothing_else():
    torch.manual_seed(0)
    model, ids = NeuralNGram(NeuralNGramConfig(11, 3, 3, 4)), torch.randint(1, 11, (1, 9))
    edited = ids.clone()
    edited[0, 4] = 0
    moved = (model(ids) - model(edited)).abs().amax(-1)[0] > 0
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    longer = model(torch.cat([ids, ids], dim=1))
    torch.testing.assert_close(longer[:, :9], model(ids))  # padding behind a text changes nothing


def test_neural_ngram_gradients_and_state():
    torch.manual_seed(0)
    model = NeuralNGram(NeuralNGramConfig(7, 2, 3, 4, direct=True)).double()
    ids = torch.randint(7, (2, 5))
    assert max(gradient_check(lambda: -model.token_log_probs(ids).sum(), list(model.parameters()))) < 1e-6
    twin = NeuralNGram(model.config).double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids), model(ids))
    assert model(ids[:, :1]).shape == (2, 1, 7) and model.token_log_probs(ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.tensor([1, 2]), r"shape \(B, T\) and hold something, not \(2,\). For one text pass ids\[None\]"),
        (torch.tensor([[0, 7]]), "The id 7 is no token: ids run from 0 to 6"),
        (torch.tensor([[-100, 1]]), "The id -100 is no token"), (torch.tensor([[.5]]), "ids are whole numbers, not torch.float32"),
    ],
)  # fmt: skip
def test_neural_ngram_says_what_is_wrong(ids, says):
    model = NeuralNGram(NeuralNGramConfig(7))
    with pytest.raises(NetworkError, match=says): model(ids)


@pytest.mark.parametrize("options, says", [
    ({"vocab_size": 0}, "vocab_size=0 must be"), ({"context_length": 0}, "context_length=0 must be"),
    ({"dropout": -.1}, "dropout=-0.1 must be"),
])  # fmt: skip
def test_neural_ngram_config_says_what_is_wrong(options, says):
    with pytest.raises(NetworkError, match=says): NeuralNGramConfig(**({"vocab_size": 5} | options))


# ---------------------------------------------------------------- the module


def test_import_is_light():
    "Drawing needs matplotlib, and only drawing."
    root = Path(__file__).parent.parent
    code = "import sys, lmbook.deep_networks; print(sorted({'matplotlib', 'datasets', 'lmbook.language_models'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
