"""Comparisons against others' libraries, published tables, enumeration and simulation; and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.linear_model import LogisticRegression

from lmbook import comparisons
from lmbook.comparisons import (
    ComparisonError,
    compare,
    elo,
    examples_needed,
    false_discoveries,
    holm,
    mcnemar,
    paired_power,
    rank,
    resampled_differences,
)  # fmt: skip
from lmbook.core import LmbookError
from lmbook.evaluation import Score, accuracy, entity_f1, f1, roc_auc, spearman
from tests.faults import planted

# ---------------------------------------------------------------- paired tests


def means(*columns: np.ndarray) -> list[Score]: return [Score.mean("mean", column) for column in columns]


def bleu_scores(n: int, seed: int, errors: tuple[float, float]) -> tuple[list[list[str]], list[str], list[Score]]:
    "Two noisy copies of random references, and their BLEU as Scores made of sacrebleu's own statistics."
    from sacrebleu.metrics import BLEU

    rng, vocabulary = np.random.default_rng(seed), "the a cat dog sat on mat ran fast slow big red".split()
    references = [[str(w) for w in rng.choice(vocabulary, rng.integers(8, 14))] for _ in range(n)]
    systems = [[" ".join(w if rng.random() > e else str(rng.choice(vocabulary)) for w in ref) for ref in references] for e in errors]
    texts, metric = [" ".join(ref) for ref in references], BLEU()

    def combine(sums: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(sums)
        found = np.array([metric._compute_score_from_stats(row.tolist()).score for row in rows])
        return found.reshape(np.shape(sums)[:-1])

    scores = [Score.of("BLEU", np.array(metric._extract_corpus_statistics(s, [texts])), combine) for s in systems]
    return systems, texts, scores


@pytest.mark.parametrize("seed", range(4))
def test_with_the_same_seed_the_p_values_are_sacrebleus(seed, monkeypatch):
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    monkeypatch.setenv("SACREBLEU_SEED", str(seed + 1))
    systems, texts, (a, b) = bleu_scores(40, seed, (0.2, 0.24))
    named, size = list(zip("ab", systems)), abs(a.value - b.value)
    _, theirs = PairedTest(named, {"BLEU": BLEU()}, [texts], test_type="ar", n_samples=300)()
    assert theirs["BLEU"][0].score == pytest.approx(a.value)
    drawn = resampled_differences(a, b, "randomisation", samples=300, seed=seed + 1)
    assert theirs["BLEU"][1].p_value == pytest.approx((1 + (np.abs(drawn) > size).sum()) / 301, abs=1e-12)
    _, theirs = PairedTest(named, {"BLEU": BLEU()}, [texts], test_type="bs", n_samples=300)()
    drawn = np.abs(resampled_differences(a, b, "bootstrap", samples=300, seed=seed + 1))
    assert theirs["BLEU"][1].p_value == pytest.approx((1 + (drawn - drawn.mean() > size).sum()) / 301, abs=1e-12)


def test_another_seed_gives_sacrebleus_p_up_to_sampling():
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    systems, texts, (a, b) = bleu_scores(40, 9, (0.2, 0.25))
    _, theirs = PairedTest(list(zip("ab", systems)), {"BLEU": BLEU()}, [texts], test_type="ar", n_samples=1500)()
    p = theirs["BLEU"][1].p_value
    assert compare(a, b, samples=1500, seed=77).p == pytest.approx(p, abs=4 * math.sqrt(2 * p * (1 - p) / 1500))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9))
def test_all_swaps_are_counted_as_scipy_counts_them(pairs):
    x, y = np.array(pairs, dtype=float).T
    found = compare(*means(x, y))
    theirs = scipy_stats.permutation_test(
        (x, y), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert found.exact and found.p == pytest.approx(theirs.pvalue) and found.difference == pytest.approx(x.mean() - y.mean())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0.5, 5)] * 2, st.integers(0, 4)), min_size=3, max_size=8), st.booleans())
def test_swaps_of_ratios_one_by_one(rows, grouped):
    up_a, up_b, low_a, low_b, group = (np.array(c) for c in zip(*rows))
    groups = group.tolist() if grouped and len(set(group.tolist())) > 1 else None
    a, b = Score.ratio("r", up_a, low_a), Score.ratio("r", up_b, low_b)
    units = list(range(len(rows))) if groups is None else groups
    names, size, count = sorted(set(units)), abs(a.value - b.value), 0
    for way in itertools.product((False, True), repeat=len(names)):
        swap = np.array([way[names.index(u)] for u in units])
        first = np.where(swap, up_b, up_a).sum() / np.where(swap, low_b, low_a).sum()
        second = np.where(swap, up_a, up_b).sum() / np.where(swap, low_a, low_b).sum()
        count += abs(first - second) >= size - 1e-10 * max(abs(a.value), abs(b.value))
    found = compare(a, b, groups=groups)
    assert found.exact and found.units == len(names)
    assert found.p == pytest.approx(count / 2 ** len(names), abs=1e-12)


def test_few_draws_estimate_all_swaps_and_all_resamples():
    rng = np.random.default_rng(0)
    x, y = rng.gamma(1, size=(2, 12))
    exact = compare(*means(x, y), samples=4096)
    drawn = compare(*means(x, y), samples=4095)
    assert exact.exact and not drawn.exact and abs(exact.p - drawn.p) < 4 * math.sqrt(exact.p / 4095)
    for method in ("randomisation", "bootstrap"): assert compare(*means(x + 9, y), method=method, samples=99).p == 0.01  # 1 / (99 + 1)
    a, b = means(x[:5], y[:5])
    every = np.array([(x[:5] - y[:5])[list(pick)].mean() for pick in itertools.product(range(5), repeat=5)])
    some = resampled_differences(a, b, samples=20_000)
    for limit in np.quantile(every, [0.1, 0.25, 0.5, 0.75, 0.9]) + 1e-12:
        assert (some <= limit).mean() == pytest.approx((every <= limit).mean(), abs=0.015)
    far = (np.abs(every - a.value + b.value) >= abs(a.value - b.value) - 1e-12).mean()
    assert compare(a, b, method="bootstrap", samples=20_000).p == pytest.approx(far, abs=0.015)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=30))
def test_the_jackknife_of_means_is_the_paired_standard_error(pairs):
    x, y = np.array(pairs).T
    found = compare(*means(x, y), samples=20)
    assert found.error == pytest.approx(np.std(x - y, ddof=1) / math.sqrt(len(x)), rel=1e-6, abs=1e-9)


def test_the_sign_is_the_first_minus_the_second():
    x = np.linspace(0, 1, 30)
    for method in ("randomisation", "bootstrap"):
        up, down = compare(*means(x + 0.3, x), method=method), compare(*means(x, x + 0.3), method=method)
        assert up.difference == pytest.approx(0.3) == pytest.approx(-down.difference)
        assert up.interval[0] <= up.difference + 1e-9 and up.interval[1] >= up.difference - 1e-9 and up.p < 0.001


def test_equal_systems_have_p_of_one():
    x = np.random.default_rng(0).normal(size=20)
    for method in ("randomisation", "bootstrap"):
        found = compare(*means(x, x), method=method)
        assert found.difference == 0 and found.error == 0 and found.p == 1
    right = (x > 0).astype(float)
    assert compare(*means(right, right), method="mcnemar").p == compare(*means(right, right), method="mid-p").p == 1


def test_blocks_change_nothing(monkeypatch):
    x, y = np.random.default_rng(1).normal(size=(2, 64))
    whole = resampled_differences(*means(x, y), "randomisation", samples=50)
    monkeypatch.setattr("lmbook.comparisons._BLOCK", 64 * 7)
    assert len(resampled_differences(*means(x, y), "randomisation", samples=50)) == len(whole) == 50


def test_groups_are_bigger_items():
    rng = np.random.default_rng(3)
    x, y, groups = *rng.normal(size=(2, 40)), rng.integers(0, 12, size=40)
    found = compare(*means(x, y), groups=groups, samples=20_000)
    sums = np.array([[(x - y)[groups == g].sum(), (groups == g).sum()] for g in np.unique(groups)])
    assert found.units == len(sums) and found.n == 40 and found.exact
    signs = np.array(list(itertools.product([1, -1], repeat=len(sums))))
    assert found.p == pytest.approx((np.abs(signs @ sums[:, 0]) >= abs(sums[:, 0].sum()) - 1e-9).mean())
    left = (sums[:, 0].sum() - sums[:, 0]) / (40 - sums[:, 1])
    G = len(sums)
    assert found.error == pytest.approx(math.sqrt((G - 1) / G * ((left - left.mean()) ** 2).sum()))
    alone = compare(*means(x, y), groups=range(40))
    assert alone.p == compare(*means(x, y)).p and alone.units == 40
    own = [Score.mean("mean", v, groups=groups) for v in (x, y)]
    assert compare(*own, samples=20_000).p == found.p  # a score's own groups


@pytest.mark.parametrize("kind", ["items", "clusters"])
def test_wrong_alarms_are_as_many_as_promised(kind):
    rng, p = np.random.default_rng(0), {"randomisation": [], "bootstrap": []}
    for seed in range(300):
        x, y = rng.gamma(2, size=(2, 40))
        groups = None
        if kind == "clusters":
            groups = np.arange(80) // 4
            x, y = (np.repeat(rng.normal(size=20), 4) + 0.5 * rng.normal(size=80) for _ in "xy")
        for method in p: p[method].append(compare(*means(x, y), method=method, groups=groups, samples=199, seed=seed).p)
    noise = math.sqrt(0.05 * 0.95 / 300)
    for method, values in p.items():
        assert (np.array(values) <= 0.05).mean() < 0.05 + 3 * noise, method
        assert (np.array(values) <= 0.5).mean() == pytest.approx(0.5, abs=0.1), method


def test_scores_that_are_no_sums_are_drawn_again():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=60)
    a, b = spearman(gold + rng.normal(size=60), gold), spearman(gold + 3 * rng.normal(size=60), gold)
    found = compare(a, b, method="bootstrap", samples=500)
    assert found.difference == pytest.approx(a.value - b.value) and 0 < found.error < 0.3 and found.p < 0.05
    with pytest.raises(ComparisonError, match="bootstrap"): compare(a, b)
    labels = (gold > 0).astype(int)
    aucs = [roc_auc(1 / (1 + np.exp(-gold - s * rng.normal(size=60))), labels) for s in (1, 4)]
    assert compare(*aucs, method="bootstrap", samples=300, groups=np.arange(60) // 3).units == 20


def test_a_metric_of_the_chapter_before():
    gold, one, two = ["a", "b"] * 20, ["a", "b"] * 18 + ["b", "a"] * 2, ["a", "a"] * 20
    found = compare(accuracy(one, gold), accuracy(two, gold), method="mcnemar")
    assert found.p == mcnemar(18, 2) and found.difference == pytest.approx(0.4)


# ---------------------------------------------------------------- McNemar, power, many tests


def test_mcnemar_is_a_binomial_test():
    for b, c in itertools.product(range(31), repeat=2):
        if b + c == 0: continue
        assert mcnemar(b, c) == pytest.approx(scipy_stats.binomtest(b, b + c).pvalue, rel=1e-9)
        all_, at = scipy_stats.binomtest(b, b + c).pvalue, scipy_stats.binom.pmf(b, b + c, 0.5)
        assert mcnemar(b, c, mid_p=True) == pytest.approx(all_ - (at / 2 if b == c else at), rel=1e-9)
    assert mcnemar(4_000, 4_300) == pytest.approx(scipy_stats.binomtest(4_000, 8_300).pvalue, rel=1e-8)
    assert mcnemar(0, 5_000) == 0.0 or mcnemar(0, 5_000) < 1e-300


def test_mcnemar_as_published():
    assert round(mcnemar(12, 2), 4) == 0.0129  # Armitage and Berry's two culture media, as in StatsDirect's manual
    assert round(mcnemar(1, 7), 4) == 0.0703 and round(mcnemar(1, 7, mid_p=True), 4) == 0.0391  # Bentur 2009; Fagerland's example


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=12))
def test_mcnemar_is_randomisation_of_accuracies(pairs):
    x, y = np.array(pairs, dtype=float).T
    assert compare(*means(x, y), method="mcnemar").p == pytest.approx(compare(*means(x, y)).p)


def test_sample_sizes_as_published():
    assert examples_needed(0.4, 0.5) == 23  # the calculator of powerandsamplesize.com: p01 = 0.45, p10 = 0.05, Connor 1987


@settings(max_examples=200, deadline=None)
@given(st.floats(0.005, 0.5), st.floats(0, 1), st.floats(0.3, 0.99), st.floats(0.001, 0.2))
def test_power_and_size_agree(difference, more, power, level):
    disagreement = difference + (1 - difference) * more
    n = examples_needed(difference, disagreement, power, level)
    assert paired_power(n, difference, disagreement, level) >= power - 1e-9
    assert n == 1 or paired_power(n - 1, difference, disagreement, level) < power + 0.02
    assert paired_power(n, -difference, disagreement, level) == paired_power(n, difference, disagreement, level)


def test_without_a_difference_the_power_is_the_level():
    for level in (0.01, 0.05, 0.2): assert paired_power(100, 0, 0.3, level) == pytest.approx(level)


probabilities = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.01, 0.05])), min_size=1, max_size=12)


@settings(max_examples=400, deadline=None)
@given(probabilities)
def test_false_discoveries_are_scipys(p):
    for dependent, method in ((False, "bh"), (True, "by")):
        np.testing.assert_allclose(false_discoveries(p, dependent), scipy_stats.false_discovery_control(p, method=method), rtol=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_bonferroni_closed_over_all_subsets(p):
    m = len(p)
    sets = [s for k in range(1, m + 1) for s in itertools.combinations(range(m), k)]
    closed = [max(min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(m)]
    np.testing.assert_allclose(holm(p), closed, rtol=1e-12)


def test_as_published_by_benjamini_and_hochberg():
    p = [.0001, .0004, .0019, .0095, .0201, .0278, .0298, .0344, .0459, .3240, .4262, .5719, .6528, .7590, 1.0]
    assert (holm(p) < 0.05).sum() == 3 and (false_discoveries(p) < 0.05).sum() == 4 and (false_discoveries(p, True) < 0.05).sum() == 3


# ---------------------------------------------------------------- rankings

BASEBALL = """Milwaukee Detroit 4 3|Milwaukee Toronto 4 2
Milwaukee NewYork 4 3|Milwaukee Boston 6 1|Milwaukee Cleveland 4 2|Milwaukee Baltimore 6 0
Detroit Milwaukee 3 3|Detroit Toronto 4 2|Detroit NewYork 4 3|Detroit Boston 6 0|Detroit Cleveland 6 1|Detroit Baltimore 4 3
Toronto Milwaukee 2 5|Toronto Detroit 4 3|Toronto NewYork 2 4|Toronto Boston 4 3|Toronto Cleveland 4 2|Toronto Baltimore 6 0
NewYork Milwaukee 3 3|NewYork Detroit 5 1|NewYork Toronto 2 5|NewYork Boston 4 3|NewYork Cleveland 4 2|NewYork Baltimore 6 1
Boston Milwaukee 5 1|Boston Detroit 2 5|Boston Toronto 3 3|Boston NewYork 4 2|Boston Cleveland 5 2|Boston Baltimore 6 0
Cleveland Milwaukee 2 5|Cleveland Detroit 3 3|Cleveland Toronto 3 4|Cleveland NewYork 4 3|Cleveland Boston 4 2|Cleveland Baltimore 2 4
Baltimore Milwaukee 2 5|Baltimore Detroit 1 5|Baltimore Toronto 1 6|Baltimore NewYork 2 4|Baltimore Boston 1 6|Baltimore Cleveland 3 4"""


def test_the_american_league_of_1987():
    "Agresti, Categorical Data Analysis (2002), table 10.11: strengths over Baltimore, standard errors of about 0.3."
    rows = [row.split() for row in BASEBALL.replace("\n", "|").split("|")]
    games = [(a, b, 1 - lost) for a, b, won, away in rows for lost, n in ((0, int(won)), (1, int(away))) for _ in range(n)]
    found = rank(games)
    over = [found.difference(name, "Baltimore") for name in found.names[:-1]]
    assert found.names == ("Milwaukee", "Detroit", "Toronto", "NewYork", "Boston", "Cleveland", "Baltimore")
    assert [round(d, 2) for d, _ in over] == [1.58, 1.44, 1.29, 1.25, 1.11, 0.68]
    assert all(round(error, 1) == 0.3 for _, error in over)


def season(seed: int, players: int = 5, n: int = 60, ties: float = 0.0) -> list[tuple[str, str, float]]:
    rng, theta = np.random.default_rng(seed), np.random.default_rng(seed).normal(size=players)
    out = []
    for _ in range(n):
        i, j = rng.choice(players, 2, replace=False)
        won = float(rng.random() < 1 / (1 + math.exp(theta[j] - theta[i])))
        out.append((f"p{i}", f"p{j}", 0.5 if rng.random() < ties else won))
    return out + [(f"p{i}", f"p{(i + 1) % players}", 1.0) for i in range(players)]  # so that each has lost to someone


@pytest.mark.parametrize("seed", range(12))
def test_strengths_are_scikit_learns_logistic_regression(seed):
    games = season(seed, ties=0.0 if seed % 2 else 0.3)
    found = rank(games)
    place = {name: i for i, name in enumerate(found.names)}
    X, y, weight = [], [], []
    for a, b, result in games:
        for outcome, w in ((1, result), (0, 1 - result)):
            if not w: continue
            row = [0.0] * len(place)
            row[place[a]], row[place[b]] = 1.0, -1.0
            X.append(row), y.append(outcome), weight.append(w)
    model = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-12, max_iter=2000).fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(found.strengths, model.coef_[0] - model.coef_[0].mean(), atol=1e-4)
    expected = (found.wins + found.wins.T) / (1 + np.exp(found.strengths - found.strengths[:, None]))
    np.testing.assert_allclose(expected.sum(1), found.wins.sum(1), atol=1e-8)


def test_errors_are_the_inverse_of_a_numerical_hessian():
    found = rank(season(1, players=4, n=80))
    theta, wins, h, P = found.strengths, found.wins, 1e-4, 4

    def likelihood(t): return -(wins * np.logaddexp(0, t[None, :] - t[:, None])).sum()

    basis = np.linalg.svd(np.ones((1, P)))[2][1:]  # the directions that sum to zero
    def at(u): return likelihood(theta + u @ basis)
    I = np.eye(P - 1) * h
    H = np.array([[(at(a + b) - at(a - b) - at(b - a) + at(-a - b)) / (4 * h * h) for b in I] for a in I])
    np.testing.assert_allclose(found.covariance, basis.T @ np.linalg.inv(-H) @ basis, atol=1e-4)
    gap, error = found.difference(found.names[0], found.names[-1])
    assert gap == pytest.approx(theta[0] - theta[-1])
    assert error == pytest.approx(math.sqrt(found.covariance[0, 0] + found.covariance[-1, -1] - 2 * found.covariance[0, -1]))
    assert found.chance(found.names[0], found.names[-1]) == pytest.approx(1 / (1 + math.exp(-gap)))
    np.testing.assert_allclose(found.intervals[:, 1] - found.intervals[:, 0], 2 * 1.959964 * found.errors, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_order_and_sides_do_not_matter_to_bradley_and_terry(seed, random):
    games = season(seed, ties=0.2)
    found, shuffled = rank(games, prior=0.5), [g if random.random() < 0.5 else (g[1], g[0], 1 - g[2]) for g in games]
    random.shuffle(shuffled)
    again = rank(shuffled, prior=0.5)
    assert dict(zip(again.names, again.strengths)) == pytest.approx(dict(zip(found.names, found.strengths)), abs=1e-7)


def test_two_players_have_a_closed_form():
    found = rank([("a", "b", 1)] * 30 + [("b", "a", 1)] * 10)
    assert found.difference("a", "b")[0] == pytest.approx(math.log(3))
    assert found.difference("a", "b")[1] == pytest.approx(math.sqrt(1 / 30 + 1 / 10))


def test_a_prior_is_a_tie_of_each_pair():
    games, ties = season(5), [(f"p{i}", f"p{j}", 0.5) for i, j in itertools.combinations(range(5), 2)]
    with_prior, with_ties = rank(games, prior=2), rank(games + 2 * ties)
    assert with_prior.names == with_ties.names
    np.testing.assert_allclose(with_prior.strengths, with_ties.strengths, atol=1e-8)


def test_intervals_cover_the_truth():
    theta, rng, hits = np.array([0.8, 0.2, -0.3, -0.7]), np.random.default_rng(0), {"hessian": [], "bootstrap": []}
    for seed in range(120):
        pairs = [(i, j) for i, j in itertools.combinations(range(4), 2) for _ in range(25)]
        games = [(str(i), str(j), float(rng.random() < 1 / (1 + math.exp(theta[j] - theta[i])))) for i, j in pairs]
        for kind in hits:
            found = rank(games, intervals=kind, samples=150, seed=seed)
            for name, (low, high) in zip(found.names, found.intervals): hits[kind].append(low <= theta[int(name)] <= high)
    assert np.mean(hits["hessian"]) == pytest.approx(0.95, abs=0.03) and np.mean(hits["bootstrap"]) == pytest.approx(0.94, abs=0.04)


def test_a_lopsided_league_converges():
    games = [(str(i), str(i + 1), 1) for i in range(30) for _ in range(200)] + [(str(i + 1), str(i), 1) for i in range(30)]
    found = rank(games)
    assert found.names == tuple(map(str, range(31)))
    np.testing.assert_allclose(-np.diff(found.strengths), math.log(200), rtol=1e-6)


def test_elo_by_hand_and_its_order():
    assert elo([("a", "b", 1)]) == {"a": 1516.0, "b": 1484.0}
    second = elo([("a", "b", 1), ("b", "a", 1)])
    expected = 1 / (1 + 10 ** (-32 / 400))
    assert second["a"] == pytest.approx(1516 - 32 * expected) and sum(second.values()) == pytest.approx(3000)
    assert list(second) == ["b", "a"]  # who won last stands first, though each won once
    games = season(3, n=200)
    assert elo(games) != pytest.approx(elo(games[::-1]), abs=1.0)


# ---------------------------------------------------------------- what is refused

X = np.arange(6.0)
ONE, SHORT, OTHER = Score.mean("mean", X), Score.mean("mean", X[:4]), Score.mean("other", X)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: compare(ONE, SHORT), "same items"),
        (lambda: compare(ONE, OTHER), "two metrics"),
        (lambda: compare(ONE, 0.8), "Two Scores"),
        (lambda: compare(ONE, ONE, method="randomization"), "Did you mean 'randomisation'"),
        (lambda: compare(ONE, ONE, method="mcnemar"), "right"),
        (lambda: compare(*means(X > 2, X > 3), method="mcnemar", groups=[1, 1, 2, 2, 3, 3]), "independent"),
        (lambda: compare(ONE, ONE, groups=[1, 2]), "6 items"),
        (lambda: compare(ONE, ONE, groups="abcdef"), "group"),
        (lambda: compare(ONE, ONE, groups=[1] * 6), "at least two"),
        (lambda: compare(ONE, ONE, groups=[math.nan] * 6), "NaN"),
        (lambda: compare(ONE, Score.mean("mean", X, groups=[1, 1, 2, 2, 3, 3])), "different groups"),
        (lambda: compare(ONE, ONE, samples=0), "samples"),
        (lambda: compare(ONE, ONE, confidence=95), "confidence"),
        (lambda: compare(ONE, Score.ratio("mean", [0.0] * 6, X).clustered(X)), "groups"),
        (lambda: compare(Score.mean("m", [1]), Score.mean("m", [0])), "at least two"),
        (lambda: compare(ONE, Score.of("mean", np.ones((6, 3)), lambda s: s[..., 0])), "Two kinds"),
        (lambda: resampled_differences(ONE, ONE, "mcnemar"), "method"),
        (lambda: mcnemar(-1, 2), "only_a"),
        (lambda: mcnemar(2.5, 2), "only_a"),
        (lambda: paired_power(0, 0.1, 0.2), "n"),
        (lambda: paired_power(10, 2, 3), "two points are 0.02"),
        (lambda: paired_power(10, 0.2, 0.1), "disagreement"),
        (lambda: examples_needed(0, 0.1), "what is not there"),
        (lambda: examples_needed(0.1, 0.2, power=0.01), "power"),
        (lambda: examples_needed(math.nan, 0.2), "difference"),
        (lambda: holm([]), "at least one"),
        (lambda: holm([0.1, math.nan]), "NaN"),
        (lambda: false_discoveries([1.2]), "0 to 1"),
        (lambda: false_discoveries([[0.1]]), "row"),
        (lambda: false_discoveries(["a"]), "number"),
        (lambda: rank([]), "Without games"),
        (lambda: rank([("a", "a", 1)]), "itself"),
        (lambda: rank([("a", "b", 2)]), "1 won"),
        (lambda: rank([("a", "b", math.nan)]), "1 won"),
        (lambda: rank([("a", "b")]), "two names"),
        (lambda: rank([("a", "b", 0.5), ("c", "d", 0.5)]), "one scale"),
        (lambda: rank([("a", "b", 1), ("a", "c", 1), ("b", "c", 1), ("c", "b", 1)]), "beat or tied a,"),
        (lambda: rank([("a", "b", 0.5), ("a", "c", 1), ("b", "c", 1)]), "beat or tied a, b,"),
        (lambda: rank([("a", "b", 1)] * 9 + [("b", "a", 1)], intervals="bootstrap"), "too few games"),
        (lambda: rank([("a", "b", 0.5)], prior=-1), "prior"),
        (lambda: rank([("a", "b", 0.5)]).chance("a", "bb"), "Did you mean b"),
        (lambda: elo([("a", "b", 1)], k=0), "k"),
        (lambda: elo([("a", "b", 1)], start=math.inf), "start"),
        (lambda: elo([]), "Without games"),
    ],
)  # fmt: skip
def test_one_clear_error_each(call, says):
    with pytest.raises(LmbookError, match=says): call()


# ---------------------------------------------------------------- faults that the checks find


def pairs_stay_together(m) -> None:
    "What is hard for both systems cancels in the difference."
    rng = np.random.default_rng(0)
    hard, own = 10 * rng.normal(size=80), rng.normal(size=80)
    drawn = m.resampled_differences(*means(hard + own, hard), samples=2000)
    assert drawn.std() == pytest.approx(own.std() / math.sqrt(80), rel=0.1)
    assert m.compare(*means(hard + own, hard)).error == pytest.approx(own.std(ddof=1) / math.sqrt(80))


def our_own_case_is_counted(m) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    for method in ("randomisation", "bootstrap"): assert m.compare(*means(x + 9, y), method=method, samples=99).p == 0.01


def coins_fall_to_both_sides(m) -> None:
    for b, c in itertools.product(range(12), repeat=2):
        exact = scipy_stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert m.mcnemar(b, c) == pytest.approx(exact)
        half = scipy_stats.binom.pmf(b, b + c, 0.5) * (0.5 if b == c else 1) if b + c else 0
        assert m.mcnemar(b, c, mid_p=True) == pytest.approx(exact - half)


def all_signs_are_tried(m) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        d, group = rng.normal(size=12), rng.integers(0, 5, size=12)
        for groups in (None, group):
            units = d if groups is None else np.bincount(group, d)[np.unique(group)]
            signs = np.array(list(itertools.product([1, -1], repeat=len(units))))
            p = (np.abs(signs @ units) >= abs(units.sum()) - 1e-9).mean()
            assert m.compare(*means(d, 0 * d), groups=groups).p == pytest.approx(p)


def many_tests_agree(m) -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        p = rng.random(int(rng.integers(1, 6))).round(1)
        sets = [c for k in range(1, len(p) + 1) for c in itertools.combinations(range(len(p)), k)]
        closed = [max(min(1, len(c) * min(p[j] for j in c)) for c in sets if i in c) for i in range(len(p))]
        np.testing.assert_allclose(m.holm(p), closed)
        np.testing.assert_allclose(m.false_discoveries(p), scipy_stats.false_discovery_control(p))


def two_players_have_their_odds(m) -> None:
    for won, lost in ((1, 1), (30, 10), (7, 90)):
        found = m.rank([("a", "b", 1)] * won + [("b", "a", 1)] * lost)
        assert found.difference("a", "b") == pytest.approx((math.log(won / lost), math.sqrt(1 / won + 1 / lost)))
        assert found.strengths.sum() == pytest.approx(0) and found.names[0] == ("b" if lost > won else "a")
        assert found.errors == pytest.approx(math.sqrt(1 / won + 1 / lost) / 2)
        assert found.chance("a", "b") == pytest.approx(won / (won + lost))


def points_go_to_the_winner(m) -> None:
    assert m.elo([("a", "b", 1)]) == {"a": 1516.0, "b": 1484.0}
    second = m.elo([("a", "b", 1), ("a", "b", 1)])
    assert second["a"] == pytest.approx(1516 + 32 * (1 - 1 / (1 + 10 ** (-32 / 400))))


def power_is_what_trials_find(m) -> None:
    assert m.examples_needed(0.4, 0.5) == 23  # as published
    rng = np.random.default_rng(3)
    trials = rng.multinomial(400, [0.12, 0.06, 0.82], size=20_000)[:, :2]
    z = np.abs(trials[:, 0] - trials[:, 1]) / np.sqrt(trials.sum(1))
    assert m.paired_power(400, 0.06, 0.18) == pytest.approx((z > 1.96).mean(), abs=0.02)


FAULTS = {
    "bootstrap unpaired": ("a.resample(w) - b.resample(w)", "a.resample(w) - b.resample(w[:, ::-1])", pairs_stay_together),
    "jackknife unpaired": ("without = _value(a, A.sum(0) - A) - _value(b, B.sum(0) - B)",
                           "without = _value(a, A.sum(0) - A) - _value(b, B.sum(0) - B)[::-1]", pairs_stay_together),
    "p without + 1, swaps": ("p = (1 + int(_extreme(drawn, difference", "p = (int(_extreme(drawn, difference", our_own_case_is_counted),
    "p without + 1, draws": ("p = (1 + int(_extreme(drawn - difference", "p = (int(_extreme(drawn - difference", our_own_case_is_counted),
    "bootstrap not moved": ("_extreme(drawn - difference, difference", "_extreme(drawn, difference", our_own_case_is_counted),
    "McNemar one-sided": ("min(1.0, 2 * float", "min(1.0, 1 * float", coins_fall_to_both_sides),
    "mid-p takes all": ("at / 2 if only_a", "at if only_a", coins_fall_to_both_sides),
    "groups are ignored": ("if groups is not None: a, b =", "if False: a, b =", all_signs_are_tried),
    "swaps one-sided": ("np.abs(drawn) < abs(seen)", "drawn < abs(seen)", all_signs_are_tried),
    "Holm is Bonferroni": ("np.arange(len(values), 0, -1)", "len(values)", many_tests_agree),
    "Holm out of order": ("np.minimum(1, np.maximum.accumulate(values[order]", "np.minimum(1, (values[order]", many_tests_agree),
    "discoveries ranked from 0": ("ranks = np.arange(1, m + 1)", "ranks = np.arange(2, m + 2)", many_tests_agree),
    "Bradley-Terry without an anchor": ("covariance = np.linalg.inv(curvature + level) - 1 / (level * P * P)",
                                        "covariance = np.linalg.inv(curvature + level)", two_players_have_their_odds),
    "Bradley-Terry: who is ahead": ("order = np.argsort(-theta", "order = np.argsort(theta", two_players_have_their_odds),
    "Elo: points go to the loser": ("gained = k * (result -", "gained = -k * (result -", points_go_to_the_winner),
    "Elo: the stronger is surprised": ("(ratings[j] - ratings[i]) / 400", "(ratings[i] - ratings[j]) / 400", points_go_to_the_winner),
    "power one-sided": ("z, spread = _NORMAL.inv_cdf(1 - level / 2)", "z, spread = _NORMAL.inv_cdf(1 - level)", power_is_what_trials_find),
}  # fmt: skip


@pytest.mark.parametrize("check", {check: None for *_, check in FAULTS.values()})
def test_the_checks_for_faults_pass(check): check(comparisons)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    with pytest.raises(AssertionError): check(planted(comparisons, old, new, monkeypatch))


def test_systems_that_name_other_classes():
    "Sums of classes are swapped between systems, so they must be sums of the same classes. Micro averages have one sum for all."
    true, one, two = ["x", "y"] * 4, ["x", "y", "a", "y"] * 2, ["x", "y", "b", "y"] * 2
    with pytest.raises(ComparisonError, match="classes"): compare(f1(one, true, "macro"), f1(two, true, "macro"))
    known = {"average": "macro", "labels": ["x", "y"]}
    assert compare(f1(one, true, **known), f1(two, true, **known)).p == 1
    tags, a, b = [["B-X", "O"]] * 4, [["B-X", "B-Y"]] * 4, [["B-X", "B-Z"]] * 3 + [["O", "O"]]
    more = ["x", "y", "b", "c"] * 2
    with pytest.raises(ComparisonError, match="classes"): compare(f1(one, true, "macro"), f1(more, true, "macro"))
    assert compare(entity_f1(a, tags), entity_f1(b, tags)).exact
    with pytest.raises(ComparisonError, match="classes"): compare(entity_f1(a, tags, average="macro"), entity_f1(b, tags, average="macro"))
