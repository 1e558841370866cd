"""The inside of a model: sums that come out, interventions done by hand, a probe like scikit-learn's, a dictionary that is found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.circuits import (
    CircuitError,
    SparseAutoencoder,
    SparseConfig,
    best_f1,
    control_labels,
    direct_attribution,
    explained,
    fit_probe,
    fit_sparse,
    logit_lens,
    patching_grid,
    prefix_matching,
    repeated_tokens,
    residual_stream,
    without_heads,
)  # fmt: skip
from lmbook.interpretability import InterpretabilityError, Question, log_odds
from lmbook.transformer import Transformer, TransformerConfig

V = 19
TODAY = {"norm": "rms", "bias": False, "positions": "rotary", "tie": False}
KINDS = [{}, TODAY, {"activation": "swiglu", "n_kv_head": 1}, {"norm": "none"}]


def make(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(V, **{"d_model": 16, "n_layer": 2, "n_head": 2, "context_length": 24, **changes}))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.2)
    return model.double().eval()


@pytest.mark.parametrize("changes", KINDS)
def test_the_stream_is_what_the_blocks_pass_on(changes):
    model, ids = make(**changes), [3, 1, 4, 1, 5]
    stream = residual_stream(model, ids)
    torch.testing.assert_close(logit_lens(model, ids)[-1], model(torch.tensor([ids]))[0].detach())
    torch.testing.assert_close(logit_lens(model, ids)[0], model.score(model.decoder.norm(stream[0])).detach())
    assert stream.shape == (3, 5, 16)


@pytest.mark.parametrize("changes", KINDS)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), st.integers(0, V - 2), st.booleans(), st.integers(0, 5))
def test_direct_attribution_adds_up(changes, ids, right, two, seed):
    model, q = make(seed, **changes), Question(tuple(ids), right, (V - 1,) if two else ())
    logits = model(torch.tensor([ids]))[0, -1]
    wanted = logits[right] - (logits[V - 1] if two else 0)
    parts = direct_attribution(model, q)
    assert sum(part.value for part in parts) == pytest.approx(float(wanted.detach()), abs=1e-9)
    assert sum(part.name.startswith("head") for part in parts) == 4


def test_direct_attribution_of_a_head_by_hand():
    "With no norm at the end, what a head writes into a logit is what the logit loses without it, as far as no later part reads it."
    model, q = make(norm="none"), Question((3, 1, 4), 7)
    parts = {part.name: part.value for part in direct_attribution(model, q)}
    mlp = model.decoder.blocks[1].mlp
    with torch.no_grad():
        for p in mlp.down.parameters(): p.zero_()
        whole = model(torch.tensor([q.ids]))[0, -1, 7]
        with without_heads(model, [(1, 0)]): cut = model(torch.tensor([q.ids]))[0, -1, 7]
    assert parts["head 1.0"] == pytest.approx(float(whole - cut), abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 20), st.sampled_from(["stream", "attention", "mlp"]))
def test_the_grid_by_hand(seed, where):
    model = make(seed)
    q = Question((3, 1, 4, 1), 7, (2,), (1,), (3, 5, 4, 1))
    grid = patching_grid(model, q, where)
    names = {"stream": ["embed", "decoder.blocks.0", "decoder.blocks.1"]}.get(where, [f"decoder.blocks.{i}.{where}" for i in range(2)])
    good, bad = (log_odds(model(torch.tensor([ids]))[0, -1], q) for ids in (q.ids, q.other))
    for i, name in enumerate(names):
        module, kept = model.get_submodule(name), {}
        hook = module.register_forward_hook(lambda m, a, out, kept=kept: kept.update(out=out))
        model(torch.tensor([q.ids]))
        hook.remove()
        for t in range(4):
            def put(m, a, out, t=t, kept=kept): return torch.cat([out[:, :t], kept["out"][:, t : t + 1], out[:, t + 1 :]], 1)

            hook = module.register_forward_hook(put)
            found = log_odds(model(torch.tensor([q.other]))[0, -1], q)
            hook.remove()
            assert grid[i, t] == pytest.approx(float((found - bad) / (good - bad)), abs=1e-7)
    if where == "stream":
        assert grid[0] == pytest.approx([0, 1, 0, 0], abs=1e-7) and grid[-1] == pytest.approx([0, 0, 0, 1], abs=1e-7)


def test_heads_that_are_switched_off():
    model, ids = make(), torch.tensor([[3, 1, 4, 1]])
    plain = model(ids)
    with without_heads(model, []): torch.testing.assert_close(model(ids), plain)
    with without_heads(model, [(0, 0), (0, 1), (1, 0), (1, 1)]): none = model(ids)
    for block in model.decoder.blocks:
        with torch.no_grad(): block.attention.out.weight.zero_()
    torch.testing.assert_close(none, model(ids))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_prefix_matching_of_a_head_made_by_hand():
    "Attention that looks exactly n - 1 positions back has a score of 1; one that looks at itself 0."
    ids = repeated_tokens(3, 5, V, seed=1)
    assert ids.shape == (3, 10) and torch.equal(ids[:, :5], ids[:, 5:])
    model, T = make(n_layer=1), 10

    def weights(x, memory=None, mask=None, **more):
        out = torch.zeros(1, 2, T, T, dtype=torch.float64)
        out[0, 0, range(T), [max(t - 4, 0) for t in range(T)]] = 1
        out[0, 1] = torch.eye(T)
        return out

    model.decoder.blocks[0].attention.weights = weights
    np.testing.assert_array_equal(prefix_matching(model, ids), [[1, 0]])


# ---------------------------------------------------------------- probes


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([0.1, 1.0, 10.0]))
def test_probes_are_those_of_scikit_learn(seed, K, penalty):
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 1] + 3, np.concatenate([np.arange(K), rng.integers(K, size=60 - K)])
    probe = fit_probe(x, y, penalty)
    z = (x - x.mean(0)) / x.std(0)
    C = (2 if K == 2 else 1) / penalty  # of two classes scikit-learn has one row of weights, the difference of our two
    theirs = linear.LogisticRegression(C=C, tol=1e-8, max_iter=1000).fit(z, y)
    scores = z @ probe.weight.T + probe.bias
    p = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(p / p.sum(1, keepdims=True), theirs.predict_proba(z), atol=2e-3)
    margin = np.sort(theirs.predict_proba(z), 1)
    clear = margin[:, -1] - margin[:, -2] > 0.05
    assert (probe.predict(x) == theirs.predict(z))[clear].all()


def test_a_probe_learns_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)), rng.integers(2, size=400)
    x[:, 3] += 4 * y
    assert (fit_probe(x[:200], y[:200]).predict(x[200:]) == y[200:]).mean() > 0.95
    assert abs((fit_probe(x[:200, :3], y[:200]).predict(x[200:, :3]) == y[200:]).mean() - 0.5) < 0.12


def test_control_labels_belong_to_words():
    words = np.array([5, 7, 5, 9, 7, 5])
    labels = control_labels(words, 2, seed=3)
    assert len({(w, c) for w, c in zip(words.tolist(), labels.tolist())}) == 3 and set(labels.tolist()) == {0, 1}


def test_control_labels_are_even_and_of_their_seed():
    words = np.arange(40)
    drawn = [control_labels(words, 4, seed) for seed in range(3)]
    assert all((np.bincount(labels) == 10).all() for labels in drawn)
    assert np.array_equal(drawn[0], control_labels(words, 4, 0))
    assert not any(np.array_equal(a, b) for a, b in zip(drawn, drawn[1:]))


# ---------------------------------------------------------------- sparse autoencoders


def test_a_planted_dictionary_is_found():
    rng = np.random.default_rng(0)
    planted = rng.normal(size=(12, 16))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    codes = np.zeros((3000, 12))
    for row in codes: row[rng.choice(12, 2, replace=False)] = rng.uniform(1, 2, 2)
    x = codes @ planted
    model = fit_sparse(x[:2000], SparseConfig(24, k=2, steps=800, lr=1e-2))
    fresh = torch.tensor(x[2000:]).float()
    assert explained(fresh, model(fresh)) > 0.8
    likeness = np.abs(planted @ model.directions.numpy().T).max(1)
    assert np.median(likeness) > 0.95
    f1 = np.array([best_f1(model.encode(fresh).numpy(), codes[2000:, i] > 0).max() for i in range(12)])
    other = np.array([best_f1(fresh.numpy(), codes[2000:, i] > 0).max() for i in range(12)])
    assert f1.mean() > other.mean() + 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_k_features_at_most(seed, k):
    torch.manual_seed(seed)
    model = SparseAutoencoder(5, SparseConfig(9, k=k, seed=seed))
    features = model.encode(torch.randn(20, 5))
    assert ((features != 0).sum(1) <= k).all() and (features >= 0).all()
    torch.testing.assert_close(model(torch.zeros(1, 5)), model.decode(model.encode(torch.zeros(1, 5))))


def slow_f1(x: np.ndarray, wanted: np.ndarray) -> float:
    best = 0.0
    for threshold in set(x.tolist()):
        said = x >= threshold
        best = max(best, 2 * (said & wanted).sum() / (said.sum() + wanted.sum()))
    return best


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=12).filter(lambda rows: any(w for _, w in rows)))
def test_the_best_f1_over_all_thresholds(rows):
    x, wanted = np.array([float(a) for a, _ in rows]), np.array([w for _, w in rows])
    assert best_f1(x[:, None], wanted)[0] == pytest.approx(slow_f1(x, wanted))


def test_explained_is_one_minus_the_share_that_is_lost():
    x = np.random.default_rng(0).normal(size=(50, 3))
    assert explained(x, x) == 1 and explained(x, np.tile(x.mean(0), (50, 1))) == pytest.approx(0)


# ---------------------------------------------------------------- bad input

BAD = [
    (lambda: residual_stream(nn.Linear(2, 3), [1]), "kind 'decoder'"),
    (lambda: residual_stream(make(norm_first=False), [1]), "norm_first"),
    (lambda: residual_stream(make(kind="encoder"), [1]), "kind 'decoder'"),
    (lambda: residual_stream(make(), []), "no token"),
    (lambda: direct_attribution(make(), Question((1, 2), 3, (4, 5))), "one logit"),
    (lambda: direct_attribution(make(), Question((1, 2), V)), "no token"),
    (lambda: patching_grid(make(), Question((1, 2), 3)), "other"),
    (lambda: patching_grid(make(), Question((1, 2), 3, other=(1, 2))), "same answer"),
    (lambda: patching_grid(make(), Question((1, 2), 3, other=(1, 3)), "streams"), "Did you mean 'stream'"),  # type: ignore[arg-type]
    (lambda: without_heads(make(), [(0, 2)]), "no head 0.2"),
    (lambda: prefix_matching(make(), torch.tensor([[1, 2, 3]])), "2 n"),
    (lambda: prefix_matching(make(), torch.tensor([[1, 2, 1, 3]])), "twice"),
    (lambda: repeated_tokens(0, 3, 5), "at least 1"),
    (lambda: fit_probe(np.zeros((3, 2)), [0, 1]), "2 labels for 3"),
    (lambda: fit_probe(np.zeros((2, 2)), [0, 0]), "at least two"),
    (lambda: fit_probe(np.full((2, 2), np.nan), [0, 1]), "NaN"),
    (lambda: fit_probe(np.eye(2), [0, 1], 0), "above 0"),
    (lambda: fit_probe(np.eye(2), [0, 1]).predict(np.zeros((1, 3))), "reads 2"),
    (lambda: SparseConfig(4, k=5), "larger"),
    (lambda: fit_sparse(np.zeros(3)), "shape"),
    (lambda: explained(np.ones((3, 2)), np.ones((3, 2))), "no variance"),
    (lambda: best_f1(np.ones((3, 2)), np.zeros(3, dtype=bool)), "No vector"),
    (lambda: best_f1(np.ones((3, 2)), np.zeros(3)), "true or false"),
]


@pytest.mark.parametrize("call, says", BAD)
def test_bad_input(call, says):
    with pytest.raises((CircuitError, InterpretabilityError), match=says): call()
