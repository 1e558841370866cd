"""Calibration, noise and attacks: as scikit-learn has it, as enumeration has it, and with one clear error for what cannot be judged."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torch import nn

from lmbook.trust import (
    TrustError,
    add_noise,
    brier,
    brier_parts,
    expected_calibration_error,
    fit_temperature,
    flip_gains,
    hotflip,
    log_score,
    reliability,
    universal_trigger,
)  # fmt: skip

FORECASTS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1 / 3, 5e-324, 1 - 2**-53]))


@st.composite
def events(draw, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    pairs = draw(st.lists(st.tuples(FORECASTS, st.integers(0, 1)), min_size=least, max_size=60))
    p, y = zip(*pairs)
    return np.array(p), np.array(y)


def classes(seed: int, n: int, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: # logits, probabilities, labels
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, K))
    p = np.exp(z - z.max(1, keepdims=True))
    return z, p / p.sum(1, keepdims=True), rng.integers(K, size=n)


# ---------------------------------------------------------------- against scikit-learn


@given(events(), st.integers(1, 20))
def test_reliability_is_sklearns_calibration_curve(both, bins):
    p, y = both
    assume(0 < y.sum() < len(y))
    for binning, strategy in (("width", "uniform"), ("mass", "quantile")):
        frequency, confidence = calibration_curve(y, p, n_bins=bins, strategy=strategy)
        found = reliability(p, y, bins, binning)
        np.testing.assert_allclose(found.frequency, frequency)
        np.testing.assert_allclose(found.confidence, confidence)
        assert found.count.sum() == len(p)


@settings(max_examples=500)
@given(events())
def test_brier_is_sklearns(both):
    p, y = both
    assert math.isclose(brier(p, y).value, brier_score_loss(y, p, pos_label=1, labels=[0, 1]), abs_tol=1e-12)


@given(st.lists(st.tuples(st.floats(0.001, 0.999), st.integers(0, 1)), min_size=1, max_size=40))
def test_log_score_of_an_event_is_sklearns(pairs):
    p, y = zip(*pairs)
    assert math.isclose(log_score(p, y).value, log_loss(y, p, labels=[0, 1]), rel_tol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(3, 6))
def test_brier_and_log_score_of_classes_are_sklearns(seed, n, K):
    _, p, y = classes(seed, n, K)
    names = list(range(K))
    assert math.isclose(brier(p, y).value, brier_score_loss(y, p, labels=names, scale_by_half=False), rel_tol=1e-9)
    assert math.isclose(log_score(p, y).value, log_loss(y, p, labels=names), rel_tol=1e-9)


# ---------------------------------------------------------------- by hand, and what always holds


def test_a_published_example_of_the_parts():
    "Two forecasts, 0.2 and 0.8, five times each; it comes once and three times. By hand."
    p, y = np.array([0.2] * 5 + [0.8] * 5), np.array([1, 0, 0, 0, 0, 1, 1, 1, 0, 0])
    parts = brier_parts(p, y)
    np.testing.assert_allclose(parts, (0.5 * 0.0 + 0.5 * 0.04, 0.04, 0.24, 0), atol=1e-12)
    assert math.isclose(brier(p, y).value, 0.02 - 0.04 + 0.24)
    assert math.isclose(expected_calibration_error(p, y).value, 0.1)
    assert math.isclose(expected_calibration_error(p, y, squared=True).value, 0.02)


@settings(max_examples=500)
@given(events(), st.integers(1, 20), st.sampled_from(["width", "mass"]))
def test_the_parts_sum_to_the_brier_score(both, bins, binning):
    p, y = both
    for parts in (brier_parts(p, y), brier_parts(p, y, bins, binning)):
        assert math.isclose(parts.reliability - parts.resolution + parts.uncertainty + parts.within, brier(p, y).value, abs_tol=1e-9)
        assert min(parts[:3]) >= 0
    assert abs(brier_parts(p, y).within) < 1e-9


@settings(max_examples=500)
@given(events(), st.integers(1, 20))
def test_ece_by_a_loop(both, bins):
    p, y = both
    edges, total, square = np.linspace(0, 1, bins + 1), 0.0, 0.0
    for b in range(bins):
        inside = (p > edges[b] if b else p >= 0) & (p <= edges[b + 1])
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
            square += inside.mean() * (p[inside].mean() - y[inside].mean()) ** 2
    assert math.isclose(expected_calibration_error(p, y, bins).value, total, abs_tol=1e-9)
    assert math.isclose(expected_calibration_error(p, y, bins, squared=True).value, square, abs_tol=1e-9)
    assert expected_calibration_error(p, y, bins).value <= 1


def test_errors_items_and_the_debiased_square_by_a_loop():
    rng = np.random.default_rng(4)
    p = np.r_[rng.uniform(0, 0.8, 60), 0.95]  # the last one alone in its bin
    y = (rng.random(61) < p).astype(int)
    found, which = reliability(p, y, 5), np.ceil(p * 5).astype(int) - 1
    plain, debiased = expected_calibration_error(p, y, 5), expected_calibration_error(p, y, 5, squared=True, debias=True)
    total = 0.0
    for b in range(5):
        inside, d = which == b, (p - y)[which == b]
        np.testing.assert_allclose(plain.items[inside], abs(d.mean()))  # an item shows the gap of its bin
        if len(d) == 1: assert math.isnan(found.error[b])
        else:
            assert math.isclose(found.error[b], y[inside].std(ddof=1) / len(d) ** 0.5)
            total += len(d) / 61 * (d.mean() ** 2 - d.var(ddof=1) / len(d))
    assert found.count[-1] == 1 and math.isclose(debiased.value, total, abs_tol=1e-12)
    assert math.isclose(plain.items.mean(), plain.value)


def test_a_diagram_shows_two_standard_errors():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    found = reliability([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1], 2)
    found.plot(axes)
    [bar] = axes.containers[0].lines[2][0].get_segments()
    plt.close(figure)
    np.testing.assert_allclose(bar[:, 1], [0.5 - 2 * found.error[0], 0.5 + 2 * found.error[0]])


def test_the_debiased_square_is_unbiased_where_the_truth_is_known():
    rng = np.random.default_rng(0)
    for off in (0.0, 0.1):  # a calibrated model; one that is 0.1 too sure in each bin
        values, plain = [], []
        for _ in range(200):
            p = rng.uniform(0.15, 0.85, 100)
            y = rng.random(100) < p - off
            values.append(expected_calibration_error(p, y, 5, squared=True, debias=True).value)
            plain.append(expected_calibration_error(p, y, 5, squared=True).value)
        error = np.std(values) / 200**0.5
        assert abs(np.mean(values) - off**2) < 4 * error < abs(np.mean(plain) - off**2)


def test_the_error_of_ece_is_that_of_fresh_samples():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        p = rng.uniform(0.3, 1, 500)
        found.append(expected_calibration_error(p, rng.random(500) < p - 0.15, 10))
    spread, said = np.std([s.value for s in found]), np.mean([s.error for s in found])
    assert 0.8 < said / spread < 1.25


def test_true_probabilities_may_stand_for_outcomes():
    _, p, _ = classes(0, 500, 4)
    assert expected_calibration_error(p, p).value < 1e-12
    assert np.allclose(reliability(p, p).frequency, reliability(p, p).confidence)


@given(st.integers(0, 10**6), st.integers(5, 60), st.integers(2, 5))
def test_no_temperature_on_a_grid_is_better(seed, n, K):
    z, _, y = classes(seed, n, K)
    def loss(T: float) -> float: return F.cross_entropy(torch.tensor(z / T), torch.tensor(y)).item()

    best = loss(fit_temperature(z, y))
    assert all(best <= loss(T) + 1e-9 for T in np.geomspace(1e-3, 1e3, 61))


def test_the_temperature_of_a_model_that_was_heated():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (20000, 5))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (p.cumsum(1) < rng.random((20000, 1))).sum(1)
    assert abs(fit_temperature(z, y) - 1) < 0.05
    assert abs(fit_temperature(3 * z, y) - 3) < 0.15
    assert fit_temperature(np.eye(3), [0, 1, 2]) < 1.1e-3  # always right: the surer the better


# ---------------------------------------------------------------- noise

TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(["", "长夜漫漫", "Straße", "e\u0301", "ﬁ", "İ", "\ud800", "a b", "...", "在再"]))
KINDS = ("typos", "swaps", "drops", "repeats", "case")


@given(TEXTS, st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 2**70), st.sampled_from(["en", "zh"]))
def test_noise_is_the_same_each_time_and_touches_letters_only(text, kind, rate, seed, lang):
    noisy = add_noise(text, kind, rate, seed, lang)
    assert noisy == add_noise(text, kind, rate, seed, lang)
    if kind in ("typos", "swaps"): assert len(noisy) == len(text)
    if kind == "swaps": assert sorted(noisy) == sorted(text)
    if kind == "drops": assert len(noisy) <= len(text)
    if kind != "case": assert [c for c in noisy if not c.isalpha()] == [c for c in text if not c.isalpha()]
    assert add_noise(text, kind, 0.0, seed, lang) == text


def test_noise_at_its_rate():
    text = "a" * 20000
    assert abs(sum(c != "a" for c in add_noise(text, "typos", 0.1)) / 20000 - 0.1) < 0.01
    assert abs(1 - len(add_noise(text, "drops", 0.1)) / 20000 - 0.1) < 0.01
    assert set(add_noise(text, "typos", 1.0)) == set("qwsz")
    assert add_noise("Ab", "case", 1.0) == "aB" and add_noise("ab.", "drops", 1.0) == "." and add_noise("ab", "swaps", 1.0) == "ba"
    assert add_noise("在", "typos", 1.0, lang="zh") == "再" and add_noise("在", "typos", 1.0) == "在"


def test_seed_and_text_decide_the_noise():
    def turned(text: str, seed: int = 0) -> list[bool]: return [c.isupper() for c in add_noise(text, "case", 0.5, seed)]

    assert turned("a" * 100) != turned("a" * 100, seed=1)
    assert turned("a" * 100) != turned("b" * 100)
    assert turned("a" * 100)[:50] != turned("a" * 50)


def test_keys_are_next_to_each_other():
    near = {key: {add_noise(key, "typos", 1.0, seed) for seed in range(60)} for key in "sgmpQ"}
    assert near == {"s": set("adwezx"), "g": set("fhtyvb"), "m": set("njk"), "p": set("ol"), "Q": set("WA")}
    assert all(ord(c) < 128 for found in near.values() for c in found)


# ---------------------------------------------------------------- attacks


class Reader(nn.Module):
    "A small network whose loss bends."

    def __init__(self, V: int = 7, bend: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.bend = nn.Embedding(V, 4), nn.Linear(4, 3), bend

    def forward(self, ids):
        found = self.embed(ids)
        return self.out((torch.tanh(2 * found) if self.bend else found).mean(1))


def loss_of(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(): return F.cross_entropy(model(ids), labels, reduction="none")


def test_gains_are_derivatives():
    model, ids, labels = Reader().double(), torch.tensor([[1, 2, 3, 4], [0, 0, 6, 5]]), torch.tensor([0, 2])
    gains, table = flip_gains(model, model.embed, ids, labels), model.embed.weight.detach()
    for b, t, v in itertools.product(range(2), range(4), range(7)):
        vectors, step = table[ids[b]].clone(), 1e-6
        vectors[t] += step * (table[v] - table[ids[b, t]])
        with torch.no_grad():
            moved = F.cross_entropy(model.out(torch.tanh(2 * vectors).mean(0)), labels[b])
            moved -= loss_of(model, ids[b : b + 1], labels[b : b + 1])[0]
        assert abs(moved.item() / step - gains[b, t, v].item()) < 1e-4
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters(): p.requires_grad_(False)
    torch.testing.assert_close(flip_gains(model, model.embed, ids, labels), gains)  # frozen, too


def test_gains_know_no_dropout_and_leave_no_trace():
    class Forgetful(Reader):
        def forward(self, ids): return self.out(F.dropout(self.embed(ids), 0.5, self.training).mean(1))

    model, ids, labels = Forgetful(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([0])
    gains = flip_gains(model, model.embed, ids, labels)
    torch.testing.assert_close(flip_gains(model, model.embed, ids, labels), gains)
    assert model.training and not model.embed._forward_hooks
    F.cross_entropy(model.eval()(ids), labels).backward()  # and it still learns
    assert bool(model.embed.weight.grad.any())


def test_each_flip_begins_where_the_last_one_ended():
    model = Reader()
    ids, labels = torch.randint(7, (30, 6), generator=torch.Generator().manual_seed(5)), torch.arange(30) % 3
    once = ids
    for _ in range(3): once = hotflip(model, model.embed, once, labels, range(7))
    assert torch.equal(hotflip(model, model.embed, ids, labels, range(7), flips=3), once)
    stale = flip_gains(model, model.embed, ids, labels)  # and the gradient has changed meanwhile
    assert not torch.allclose(stale, flip_gains(model, model.embed, once, labels))


def test_with_all_candidates_one_flip_is_the_best_of_all_flips():
    model, allowed = Reader(), [1, 2, 3, 5]
    ids, labels = torch.randint(7, (30, 5), generator=torch.Generator().manual_seed(1)), torch.arange(30) % 3
    found = loss_of(model, hotflip(model, model.embed, ids, labels, allowed, candidates=99), labels)
    for b in range(30):
        flips = [(t, v) for t in range(5) for v in allowed if int(ids[b, t]) in allowed and v != ids[b, t]]
        if not flips: continue
        tried = ids[b].repeat(len(flips), 1)
        for row, (t, v) in zip(tried, flips): row[t] = v
        assert abs(loss_of(model, tried, labels[b].repeat(len(flips))).max() - found[b]) < 1e-6


def test_flips_stay_within_what_is_allowed():
    model = Reader()
    ids, labels = torch.randint(7, (20, 6), generator=torch.Generator().manual_seed(2)), torch.zeros(20, dtype=torch.long)
    for n in range(4):
        out = hotflip(model, model.embed, ids, labels, [0, 1, 2], n)
        changed = out != ids
        assert int(changed.sum(1).max()) <= n and bool((ids[changed] <= 2).all()) and bool((out[changed] <= 2).all())
    assert torch.equal(hotflip(model, model.embed, ids, labels, [4], 3), ids)  # nothing else may stand there
    mask = torch.tensor([True, True, True, False, False, False, False])
    assert torch.equal(hotflip(model, model.embed, ids, labels, mask, 2), hotflip(model, model.embed, ids, labels, [0, 1, 2], 2))
    assert model.training


def test_a_trigger_with_all_candidates_is_the_best_single_token():
    model = Reader()
    ids, labels = torch.randint(7, (40, 6), generator=torch.Generator().manual_seed(3)), torch.arange(40) % 3
    [found] = universal_trigger(model, model.embed, ids, labels, range(7), length=1, candidates=7).tolist()
    losses = [loss_of(model, torch.cat([torch.full((40, 1), v), ids[:, :-1]], 1), labels).mean().item() for v in range(7)]
    assert found == int(np.argmax(losses))
    two = universal_trigger(model, model.embed, ids, labels, range(7), length=2, candidates=7)

    def loss(trigger: list[int]) -> float:
        before = torch.tensor(trigger).expand(40, -1)
        return loss_of(model, torch.cat([before, ids[:, : 6 - len(trigger)]], 1), labels).mean().item()

    a, b = two.tolist()  # no single change of it does more harm
    assert all(loss([a, v]) <= loss([a, b]) + 1e-6 and loss([v, b]) <= loss([a, b]) + 1e-6 for v in range(7))


class Paired(Reader):
    "What the first token does depends on the second."

    def forward(self, ids):
        found = self.embed(ids)
        return self.out(found.mean(1) + found[:, 0] * found[:, 1])


def test_a_trigger_follows_all_texts_and_goes_on_while_it_helps():
    more = 0
    def loss(model: nn.Module, trigger: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> float:
        return loss_of(model, torch.cat([trigger.expand(len(ids), -1), ids[:, : 6 - len(trigger)]], 1), labels).mean().item()

    for seed in range(12):
        ids, labels = torch.randint(7, (9, 6), generator=torch.Generator().manual_seed(seed)), torch.arange(9) % 3
        model = Reader()
        for first in range(6):  # a trigger begins as the first id that is allowed; then comes the best estimate over all texts, if it harms
            start = torch.tensor([first])
            gains = flip_gains(model, model.embed, torch.cat([start.expand(9, -1), ids[:, :5]], 1), labels)
            best = gains[:, 0, first:].mean(0).argmax()[None] + first
            wanted = best if loss(model, best, ids, labels) > loss(model, start, ids, labels) else start
            found = universal_trigger(model, model.embed, ids, labels, range(first, 7), length=1, candidates=1, rounds=1)
            assert torch.equal(found, wanted)
        model, labels = Paired(), torch.full((9,), seed % 3)
        both = [universal_trigger(model, model.embed, ids, labels, range(7), length=2, candidates=7, rounds=n) for n in (1, 8)]
        once, often = (loss(model, trigger, ids, labels) for trigger in both)
        assert often >= once - 1e-6
        more += often > once + 1e-4
    assert more > 3


# ---------------------------------------------------------------- what cannot be judged

model = Reader()
IDS, LABELS = torch.tensor([[1, 2, 3]]), torch.tensor([0])
BAD = {
    "must sum to 1": lambda: brier([[0.5, 0.2]], [0]),
    "between 0 and 1": lambda: reliability([1.2], [1]),
    "NaN": lambda: brier([math.nan], [1]),
    "hold something": lambda: reliability([], []),
    "one of each": lambda: brier([0.5, 0.5], [1]),
    "do not fit": lambda: reliability([0.5, 0.5], [1]),
    "whole numbers from 0 to 1": lambda: brier([0.5], [2]),
    "from 0 to 2": lambda: log_score([[0.2, 0.3, 0.5]], [3]),
    "not numbers": lambda: brier(b"0.5", [1]),
    "must be numbers": lambda: brier(["high"], [1]),
    "probability 0": lambda: log_score([0.0], [1]),
    "squared=True": lambda: expected_calibration_error([0.5], [1], debias=True),
    "bins=0": lambda: reliability([0.5], [1], 0),
    "Did you mean 'width'": lambda: reliability([0.5], [1], 5, "widht"),
    "not about true probabilities": lambda: brier_parts([0.5], [0.5]),
    "two classes or more": lambda: fit_temperature([0.1, 0.2], [0, 1]),
    "no kind='typo'": lambda: add_noise("a", "typo"),
    "rate=2": lambda: add_noise("a", "drops", 2),
    "decode bytes": lambda: add_noise(b"a", "drops"),
    "seed=-1": lambda: add_noise("a", "drops", seed=-1),
    "as many labels": lambda: flip_gains(model, model.embed, IDS, torch.tensor([0, 1])),
    "used once": lambda: flip_gains(model, nn.Embedding(7, 4), IDS, LABELS),
    "no token": lambda: hotflip(model, model.embed, IDS + 9, LABELS, [1]),
    "ids outside": lambda: hotflip(model, model.embed, IDS, LABELS, [9]),
    "not an empty one": lambda: hotflip(model, model.embed, IDS, LABELS, []),
    "leaves nothing": lambda: universal_trigger(model, model.embed, IDS, LABELS, [1], length=3),
}  # fmt: skip


@pytest.mark.parametrize("part", BAD)
def test_bad_input_is_one_clear_error(part):
    with pytest.raises(TrustError) as error: BAD[part]()
    assert part in str(error.value) and "\n" not in str(error.value)
