"""Scores: equal to scikit-learn, SciPy and seqeval on random and on nasty input, elsewhere to enumeration; and errors of the right size."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import seqeval.metrics
import seqeval.metrics.sequence_labeling
import seqeval.metrics.v1
import seqeval.scheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

import lmbook.evaluation as evaluation
from lmbook.evaluation import (
    EvaluationError,
    Score,
    accuracy,
    average_precision,
    bootstrap_weights,
    confusion,
    entity_f1,
    f1,
    ndcg,
    pass_at_k,
    pearson,
    pr_curve,
    precision,
    recall,
    recall_at,
    reciprocal_rank,
    roc_auc,
    roc_curve,
    span_f1,
    spans,
    spearman,
)  # fmt: skip
from tests.faults import planted

SCHEMES = {"IOB1": "IB", "IOB2": "IB", "IOE1": "IE", "IOE2": "IE", "IOBES": "BIES", "BILOU": "BILU"}
AVERAGES = ("micro", "macro", "weighted")
MANY = settings(max_examples=100, deadline=None)
near = pytest.approx


def same(a: float, b: float) -> None:
    assert np.isclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True), (a, b)


@st.composite
def labels(draw: st.DrawFn, classes: int = 4) -> tuple[list[int], list[int]]:
    n = draw(st.integers(1, 25))
    one = st.lists(st.integers(0, draw(st.integers(0, classes - 1))), min_size=n, max_size=n)
    return draw(one), draw(one)


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    "Scores with many ties, truth, and whole weights."
    n = draw(st.integers(2, 25))
    scores = st.one_of(st.integers(0, 4).map(float), st.floats(-1e3, 1e3))
    s, t, w = (draw(st.lists(x, min_size=n, max_size=n)) for x in (scores, st.integers(0, 1), st.integers(1, 3)))
    assume(0 < sum(t) < n)
    return s, t, w


# ---------------------------------------------------------------- classes


@MANY
@given(labels(), st.sampled_from(AVERAGES), st.sampled_from([0.0, 1.0, math.nan]))
def test_classes_as_scikit_learn(pair, average, zero):
    said, true = pair
    same(accuracy(said, true).value, metrics.accuracy_score(true, said))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (confusion(said, true).counts == metrics.confusion_matrix(true, said)).all()
        for ours, theirs in ((precision, metrics.precision_score), (recall, metrics.recall_score), (f1, metrics.f1_score)):
            same(ours(said, true, average, zero_division=zero).value, theirs(true, said, average=average, zero_division=zero))
            some = ours(said, true, average, labels=[0, 1], zero_division=zero).value
            same(some, theirs(true, said, average=average, labels=[0, 1], zero_division=zero))
        same(f1(said, true, average, beta=2).value, metrics.fbeta_score(true, said, beta=2, average=average, zero_division=0))


@MANY
@given(labels(2), st.sampled_from([0.0, 1.0, math.nan]))
def test_binary_as_scikit_learn(pair, zero):
    said, true = pair
    for ours, theirs in ((precision, metrics.precision_score), (recall, metrics.recall_score), (f1, metrics.f1_score)):
        same(ours(said, true, zero_division=zero).value, theirs(true, said, zero_division=zero))
        if len({*said, *true}) == 2: same(ours(said, true, positive=0).value, theirs(true, said, pos_label=0, zero_division=0))


def test_labels_of_any_kind():
    assert f1(["a", "b\0"], ["a", "b"], "macro").value == near(1 / 3)  # NumPy's texts would have lost the zero
    assert accuracy(["", "é"], ["", "e\u0301"]).value == 0.5
    assert accuracy([True, 1], [1, True]).value == 1
    assert confusion([1, "a", None], ["a", "a", None]).labels == (None, 1, "a")
    assert repr(confusion(["x"], ["y"])).split() == ["truth", "x", "y", "x", "0", "0", "y", "1", "0"]
    found = f1(["a", "b"], ["a", "a"], "macro").details
    assert found["per_class"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


# ---------------------------------------------------------------- areas


@MANY
@given(scored())
def test_areas_as_scikit_learn(given):
    s, t, w = given
    auc, ap = roc_auc(s, t), average_precision(s, t)
    same(auc.value, metrics.roc_auc_score(t, s))
    same(ap.value, metrics.average_precision_score(t, s))
    same(auc.resample(w)[0], metrics.roc_auc_score(t, s, sample_weight=w))
    same(ap.resample(w)[0], metrics.average_precision_score(t, s, sample_weight=w))
    x, y, at = metrics.roc_curve(t, s, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(s, t), (x, y, at)): np.testing.assert_allclose(ours, theirs)
    y, x, at = metrics.precision_recall_curve(t, s)
    for ours, theirs in zip(pr_curve(s, t), (x[:-1], y[:-1], at)): np.testing.assert_allclose(ours, theirs[::-1])
    pairs = [(a > b) + (a == b) / 2 for a, i in zip(s, t) if i for b, j in zip(s, t) if not j]
    same(auc.value, float(np.mean(pairs)))
    for side in (0, 1): same(auc.items[np.array(t) == side].mean(), auc.value)


@MANY
@given(scored())
def test_weights_are_copies(given):
    s, t, w = given
    n = [np.repeat(row, w) for row in (s, t)]
    same(roc_auc(s, t).resample(w)[0], roc_auc(*n).value)
    same(average_precision(s, t).resample(w)[0], average_precision(*n).value)
    same(f1(t, s > np.median(s), positive=True).resample(w)[0], f1(n[1], n[0] > np.median(s), positive=True).value)
    if len(set(s)) > 1:
        same(spearman(s, t).resample(w)[0], spearman(*n).value)
        if np.ptp(s) > 1e-3: same(pearson(s, t).resample(w)[0], pearson(*n).value)


# ---------------------------------------------------------------- tags and spans


@st.composite
def tagged(draw: st.DrawFn, marks: str) -> tuple[list[list[str]], list[list[str]]]:
    tag = st.one_of(st.just("O"), st.builds("{}-{}".format, st.sampled_from(marks), st.sampled_from("XY")))
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    one, two = ([draw(st.lists(tag, min_size=n, max_size=n)) for n in sizes] for _ in range(2))
    return one, two


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_entities_as_seqeval(scheme):
    strict = {} if scheme is None else {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)}

    @settings(max_examples=60, deadline=None)
    @given(tagged(SCHEMES.get(scheme, "BIES")))
    def check(pair):
        said, true = pair
        for average in AVERAGES:
            found = entity_f1(said, true, scheme, average)
            if not found.details["per_class"]:  # no entities at all, of which seqeval's means are NaN
                assert found.value == 0
                continue
            for name, value in found.details.items():
                if name == "per_class": continue
                theirs = getattr(seqeval.metrics, f"{name}_score")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    same(value, theirs(true, said, average=average, zero_division=0, **strict))
            same(found.value, found.details["f1"])

    check()


@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_a_scheme_says_what_was_written(scheme):
    "Spans that a scheme writes are read again; and the lenient reading finds them, too."
    def written(length: int, kind: str, same_before: bool, same_behind: bool) -> list[str]:
        first, last, one = {
            "IOB1": ("B" if same_before else "I", "I", ""), "IOB2": ("B", "I", ""), "IOE1": ("I", "E" if same_behind else "I", ""),
            "IOE2": ("I", "E", ""), "IOBES": ("B", "E", "S"), "BILOU": ("B", "L", "U"),
        }[scheme]  # fmt: skip
        if length == 1: marks = [one or (last if "E" in scheme else first)]
        else: marks = [first, *"I" * (length - 2), last]
        return [f"{mark}-{kind}" for mark in marks]

    rng = np.random.default_rng(0)
    for _ in range(300):
        row = [(int(rng.integers(1, 4)), str(rng.choice(["X", "Y"])), int(rng.integers(0, 2))) for _ in range(4)]
        tags, wanted = [], []
        if scheme == "IOE1": row = [(length + 1, kind, gap) for length, kind, gap in row]  # to seqeval, E alone ends nothing
        for i, (length, kind, gap) in enumerate(row):
            before = i > 0 and row[i - 1][1:] == (kind, 0)
            behind = i < 3 and (row[i + 1][1], gap) == (kind, 0)
            wanted.append((len(tags), len(tags) + length, kind))
            tags += written(length, kind, before, behind) + ["O"] * gap
        assert spans(tags, scheme) == wanted
        assert spans(tags) == wanted or scheme == "IOB1" and "B" not in "".join(tags)


def test_spans_of_other_things():
    assert span_f1([[(0, 2, "PER")], []], [[(0, 2, "PER")], [(5, "LOC")]]).value == near(2 / 3)
    assert span_f1([[]], [[]]).value == 0 and span_f1([[]], [[]], zero_division=1).value == 1
    assert entity_f1([["B-PER"]], [["B-LOC"]], average="macro").details["per_class"]["PER"]["precision"] == 0


# ---------------------------------------------------------------- rankings, correlations, pass@k


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    one = st.lists(st.integers(0, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    return np.reshape(draw(one), shape), np.reshape(draw(one), shape)


def orders(s: np.ndarray) -> list[tuple[int, ...]]:
    return [o for o in itertools.permutations(range(len(s))) if all(s[a] >= s[b] for a, b in zip(o, o[1:]))]


@settings(max_examples=80, deadline=None)
@given(rankings(), st.integers(1, 6))
def test_rankings_are_means_over_the_orders_of_ties(pair, k):
    s, r = pair
    same(ndcg(s, r, k).value, metrics.ndcg_score(r, s, k=k))
    same(ndcg(s, r).value, metrics.ndcg_score(r, s))

    def first(row: list[bool]) -> float: return 1 / (row.index(True) + 1) if any(row) else 0.0

    same(reciprocal_rank(s, r).value, np.mean([np.mean([first([r[q][i] > 0 for i in o]) for o in orders(s[q])]) for q in range(len(s))]))
    some = [q for q in range(len(s)) if r[q].any()]
    if not some:
        with pytest.raises(EvaluationError, match="relevant"): recall_at(s, r, k)
        return
    found = [np.mean([sum(r[q][i] > 0 for i in o[:k]) for o in orders(s[q])]) / (r[q] > 0).sum() for q in some]
    same(recall_at(s, r, k).value, np.mean(found))


@MANY
@given(st.lists(st.tuples(st.one_of(st.integers(0, 3).map(float), st.floats(-1e6, 1e6)), st.floats(-1e3, 1e3)), min_size=3, max_size=30))
def test_correlations_as_scipy(rows):
    x, y = np.array(rows).T
    assume(np.ptp(x) > 1e-3 and np.ptp(y) > 1e-3)
    same(spearman(x, y).value, stats.spearmanr(x, y)[0])
    assert pearson(x, y).value == near(stats.pearsonr(x, y)[0], abs=1e-9)
    assert pearson(x * 1e200, y * 1e-200).value == near(pearson(x, y).value, abs=1e-9)
    assert pearson(x + 1e9, y).value == near(pearson(x, y).value, abs=1e-3)


def test_pass_at_k_counts_subsets():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            tries = list(itertools.combinations([True] * c + [False] * (n - c), k))
            same(pass_at_k([c], n, k).value, sum(map(any, tries)) / len(tries))
    assert pass_at_k([3, 200], [200, 200], 100).value == near((1 - math.comb(197, 100) / math.comb(200, 100) + 1) / 2)


# ---------------------------------------------------------------- the error


RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(2, 40))
T = (X + RNG.normal(size=40) > 0).astype(int)
C, D = RNG.integers(0, 3, size=(2, 40))
TAGS = [[["O", "B-X", "I-X", "B-Y"][i] for i in row] for row in RNG.integers(0, 4, size=(40, 5))]
SCORES = {
    "accuracy": lambda i: accuracy(C[i], D[i]), "f1": lambda i: f1(C[i], D[i], "macro", labels=[0, 1, 2]),
    "auc": lambda i: roc_auc(X[i], T[i]), "ap": lambda i: average_precision(X[i], T[i]),
    "spearman": lambda i: spearman(X[i], Y[i]), "pearson": lambda i: pearson(X[i], Y[i]),
    "entities": lambda i: entity_f1([TAGS[j] for j in i], [TAGS[39 - j] for j in i]),
    "mean": lambda i: Score.mean("m", X[i]), "ratio": lambda i: Score.ratio("r", X[i], np.abs(Y[i])),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_the_jackknife_leaves_out_one_item_and_scores_again(name):
    every = np.arange(40)
    score = SCORES[name](every)
    left = np.array([SCORES[name](np.delete(every, i)).value for i in every])
    assert score.error == near(math.sqrt(39 / 40 * ((left - left.mean()) ** 2).sum()), rel=1e-9)
    assert score.n == 40 == len(score.items)


@pytest.mark.parametrize("name", SCORES)
def test_the_bootstrap_scores_sets_with_repetitions(name):
    score = SCORES[name](np.arange(40))
    weights = np.concatenate(list(bootstrap_weights(40, 30, 7)))
    assert weights.shape == (30, 40) and (weights.sum(1) == 40).all()
    by_hand = [SCORES[name](np.repeat(np.arange(40), w.astype(int))).value for w in weights]
    np.testing.assert_allclose(score.bootstrap(30, 7), by_hand, atol=1e-9)
    np.testing.assert_allclose(score.resample(weights), by_hand, atol=1e-9)
    assert score.error == near(score.bootstrap(4000).std(), rel=0.2)


@pytest.mark.parametrize("name", SCORES)
def test_groups_are_drawn_whole(name):
    groups = [f"g{i % 8}" for i in range(40)]
    score = SCORES[name](np.arange(40)).clustered(groups)
    left = np.array([SCORES[name](np.flatnonzero(np.arange(40) % 8 != g)).value for g in range(8)])
    assert score.error == near(math.sqrt(7 / 8 * ((left - left.mean()) ** 2).sum()), rel=1e-9)
    w = np.concatenate(list(bootstrap_weights(8, 20, 3)))
    np.testing.assert_allclose(score.bootstrap(20, 3), score.resample(np.tile(w, 5)), atol=1e-12)


def test_blocks_do_not_matter(monkeypatch):
    def drawn(): return roc_auc(X, T).bootstrap(50), f1(T, 1 - T).bootstrap(50), roc_auc(X, T).error, pearson(X, Y).bootstrap(50)

    whole = drawn()
    monkeypatch.setattr(evaluation, "_BLOCK", 100)
    for a, b in zip(whole, drawn()): np.testing.assert_allclose(a, b, rtol=1e-12)


def test_many_items_are_left_out_in_parts(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 600))
    exact = spearman(x, x + y).error
    monkeypatch.setattr(evaluation, "_JACKKNIFE", 100)
    assert spearman(x, x + y).error == near(exact, rel=0.25)


def test_the_error_of_a_mean_is_the_textbooks():
    assert Score.mean("m", X).error == near(X.std(ddof=1) / math.sqrt(40))
    assert Score.mean("m", [2.0, 2.0]).error == 0 and math.isnan(Score.mean("m", [1.0]).error)


def test_intervals():
    score = accuracy([1] * 19 + [0], [1] * 20)
    low, high = score.interval(0.9, "wilson")
    theirs = stats.binomtest(19, 20).proportion_ci(0.9, method="wilson")
    assert (low, high) == near((theirs.low, theirs.high))
    assert score.interval().high > 1 > high
    all_right = accuracy([1] * 10, [1] * 10)
    assert all_right.interval() == (1, 1) and all_right.interval(method="wilson").low == near(0.7225, abs=1e-4)
    low, high = score.interval(method="bootstrap")
    assert 0.8 <= low < high == 1
    assert score.as_dict()["n"] == 20 and "± 0.05" in repr(score)
    with pytest.raises(EvaluationError, match="shares"): f1([1, 0], [1, 1]).interval(method="wilson")
    with pytest.raises(EvaluationError, match="groups"): score.clustered([0, 1] * 10).interval(method="wilson")
    with pytest.raises(EvaluationError, match="between 0 and 1"): score.interval(95)


def test_a_value_that_may_be_missing():
    drawn = roc_auc([1.0, 2.0, 3.0], [0, 1, 1]).bootstrap(200)
    assert np.isnan(drawn).any() and not np.isnan(drawn).all()  # some sets have one class only
    score = roc_auc([1.0, 2.0, 3.0], [0, 1, 1])
    assert math.isnan(score.error)  # and so has the set without the one negative
    assert score.interval(method="bootstrap") == (1, 1)


# ---------------------------------------------------------------- what cannot be scored


BAD = {
    "lengths": (lambda: accuracy([1], [1, 2]), "1 predictions and 2 references"),
    "nothing": (lambda: f1([], []), "empty"),
    "text": (lambda: accuracy("yes", "yes"), "one str"),
    "bytes": (lambda: accuracy([b"a"], ["a"]), "Decode"),
    "nan": (lambda: accuracy([math.nan], [1]), "NaN"),
    "table": (lambda: accuracy(np.ones((2, 2)), [1, 1]), "shape"),
    "list in list": (lambda: accuracy([[1]], [1]), "one label"),
    "three classes": (lambda: f1([0, 1, 2], [0, 1, 2]), "choose average"),
    "unseen positive": (lambda: f1(["a", "b"], ["a", "a"]), "say which is looked for"),
    "average": (lambda: f1([1], [1], "marco"), "macro"),
    "zero": (lambda: f1([1], [1], zero_division=0.5), "0, 1 or nan"),
    "scores nan": (lambda: roc_auc([math.nan, 1], [0, 1]), "nan at item 0"),
    "one class": (lambda: roc_auc([1, 2], [1, 1]), "one class"),
    "no positive": (lambda: average_precision([1, 2], [0, 0]), "recall"),
    "tag": (lambda: spans(["B_PER"]), "no tag"),
    "scheme": (lambda: spans(["S-PER"], "IOB2"), "no tag of IOB2"),
    "no scheme": (lambda: spans(["O"], "BIO"), "Choose one of"),
    "tags as text": (lambda: entity_f1(["O O"], ["O O"]), "sentence 0 is one str"),
    "tag lengths": (lambda: entity_f1([["O"]], [["O", "O"]]), "Sentence 0"),
    "span": (lambda: span_f1([[3]], [[4]]), "tuples"),
    "queries": (lambda: ndcg([[1]], [[1], [2]]), "one of each for each query"),
    "documents": (lambda: ndcg([[1, 2]], [[1]]), "Query 0"),
    "negative": (lambda: ndcg([[1, 2]], [[1, -1]]), "at least 0"),
    "constant": (lambda: pearson([1, 1], [1, 2]), "does not vary"),
    "too few": (lambda: pass_at_k([1], 3, 5), "at least k"),
    "more than all": (lambda: pass_at_k([4], 3, 1), "Problem 0"),
    "groups": (lambda: accuracy([1, 1], [1, 0]).clustered(["a"]), "1 groups for 2 items"),
    "weights": (lambda: accuracy([1, 1], [1, 0]).resample([1, 2, 3]), "one number for each of 2"),
    "negative weights": (lambda: accuracy([1, 1], [1, 0]).resample([1, -2]), "at least 0"),
    "stats": (lambda: Score.of("x", np.array([[math.nan]]), lambda s: s[..., 0]), "NaN"),
    "combine": (lambda: Score.of("x", np.ones((3, 2)), lambda s: s.sum()), "give the value of each"),
    "no sums": (lambda: roc_auc([1, 2], [0, 1]).combine(np.zeros(0)), "no function of sums"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    call, words = BAD[case]
    with pytest.raises(EvaluationError, match=words): call()


# ---------------------------------------------------------------- thousands of cases, and faults that they find

# Each check below takes the module to be checked and a number of cases, drawn from a seed of its own. The module itself passes thousands;
# a copy of it with one planted fault does not pass a few hundred.


def random_labels(rng: np.random.Generator, most: int = 5) -> tuple[list, list]:
    "Predictions and truth: from one item to thirty; classes that are rare, never predicted, never true; words as well as numbers."
    n, C = int(rng.integers(1, 30)), int(rng.integers(1, most + 1))
    names = [-7, 0, 1, 3, 40][:C] if most > 2 and rng.random() < 0.5 else ["", "b", "A", "é", "zz"][:C] if most > 2 else [0, 1][:C]
    share = rng.dirichlet(np.full(C, 0.6), size=2)
    return tuple([names[i] for i in rng.choice(C, n, p=p)] for p in share)


def classes_agree(m, cases: int, average: str) -> None:
    rng = np.random.default_rng(11)
    for case in range(cases):
        said, true = random_labels(rng, 2 if average == "binary" else 5)
        zero, beta = (0.0, 1.0, math.nan)[case % 3], (1.0, 2.0, 0.5)[case % 5 % 3]
        theirs = metrics.precision_recall_fscore_support(true, said, beta=beta, average=average, zero_division=zero)[:3]
        options = {"average": average, "zero_division": zero}
        for ours, value in zip((m.precision(said, true, **options), m.recall(said, true, **options)), theirs): same(ours.value, value)
        same(m.f1(said, true, beta=beta, **options).value, theirs[2])


def accuracy_and_confusion_agree(m, cases: int) -> None:
    rng = np.random.default_rng(12)
    for _ in range(cases):
        said, true = random_labels(rng)
        same(m.accuracy(said, true).value, metrics.accuracy_score(true, said))
        found = m.confusion(said, true)
        assert (found.counts == metrics.confusion_matrix(true, said, labels=list(found.labels))).all()


def areas_agree(m, cases: int) -> None:
    "Scores with many ties, all alike, of any size, and so close that only their last bits differ."
    rng = np.random.default_rng(13)
    for case in range(cases):
        n = int(rng.integers(2, 40))
        t = (rng.random(n) < rng.choice([0.1, 0.5, 0.9])).astype(int)
        t[:2] = rng.permutation([0, 1])
        s = (rng.integers(0, rng.choice([1, 2, 5]), n).astype(float), rng.normal(size=n) * 10.0 ** rng.integers(-200, 200),
             1 + rng.integers(0, 3, n) * 2.0**-52, rng.choice([0.0, -0.0, 5e-324], n))[case % 4]  # fmt: skip
        same(m.roc_auc(s, t).value, metrics.roc_auc_score(t, s))
        same(m.average_precision(s, t).value, metrics.average_precision_score(t, s))
        curve = metrics.roc_curve(t, s, drop_intermediate=False)
        for ours, theirs in zip(m.roc_curve(s, t), curve): np.testing.assert_allclose(ours, theirs)
        y, x, at = metrics.precision_recall_curve(t, s)
        for ours, theirs in zip(m.pr_curve(s, t), (x[:-1], y[:-1], at)): np.testing.assert_allclose(ours, theirs[::-1])


def entities_agree(m, cases: int, scheme: str | None, average: str = "micro") -> None:
    "Rows of tags, legal or not; half of the predicted tags are right."
    rng, marks = np.random.default_rng(14), SCHEMES.get(scheme, "BIES")
    lenient, strictly = seqeval.metrics.sequence_labeling, seqeval.metrics.v1
    asked = {} if scheme is None else {"scheme": getattr(seqeval.scheme, scheme)}
    score = (lenient if scheme is None else strictly).precision_recall_fscore_support
    tags = ["O", *(f"{mark}-{kind}" for mark in marks for kind in "XY")]
    for case in range(cases):
        true = [[tags[i] for i in rng.integers(case % 2, len(tags), size=rng.integers(1, 9))] for _ in range(3)]
        said = [[tag if rng.random() < 0.5 else tags[rng.integers(len(tags))] for tag in row] for row in true]
        ours = m.entity_f1(said, true, scheme, average)
        theirs = score(true, said, average=average, zero_division=0, **asked)
        for name, value in zip(("precision", "recall", "f1"), theirs): same(ours.details[name], value)


def rankings_agree(m, cases: int) -> None:
    "nDCG with ties; and with one relevant document and no ties, MRR is the precision of labels, recall at k the accuracy of the first k."
    rng = np.random.default_rng(15)
    for _ in range(cases // 5):
        D, k = int(rng.integers(2, 12)), int(rng.integers(1, 14))
        s, r = rng.integers(0, 4, size=(5, D)), rng.integers(0, 5, size=(5, D)) * (rng.random((5, D)) < 0.6)
        same(m.ndcg(s, r, k).value, metrics.ndcg_score(r, s, k=k))
        same(m.ndcg(s, r).value, metrics.ndcg_score(r, s))
        places, one = rng.normal(size=(5, D + 1)), rng.integers(0, D + 1, size=5)
        hit = np.eye(D + 1)[one]
        same(m.reciprocal_rank(places, hit).value, metrics.label_ranking_average_precision_score(hit, places))
        if D > 2 and k < D: same(m.recall_at(places, hit, k).value, metrics.top_k_accuracy_score(one, places, k=k, labels=range(D + 1)))


def correlations_agree(m, cases: int) -> None:
    "Ties, outliers, any size; and far from zero, where sums of squares cancel, against exact fractions."
    rng = np.random.default_rng(16)
    for case in range(cases):
        n = int(rng.integers(3, 30))
        x, y = (rng.integers(0, rng.choice([2, 4, 50]), n).astype(float) for _ in "xy")
        if case % 3 == 1: x, y = x + rng.normal(size=n), x - y + rng.standard_t(1, size=n)
        if np.ptp(x) == 0 or np.ptp(y) == 0: continue
        same(m.spearman(x, y).value, stats.spearmanr(x, y)[0])
        if case % 3 < 2:
            size = 10.0 ** rng.integers(-140, 140)
            assert m.pearson(x * size, y).value == near(stats.pearsonr(x, y)[0], abs=1e-9)
            continue
        far = [[Fraction(int(v)) + 10**9 for v in row] for row in (x, y)]
        off = [[v - sum(row) / n for v in row] for row in far]
        over, under = sum(a * b for a, b in zip(*off)), sum(a * a for a in off[0]) * sum(b * b for b in off[1])
        assert m.pearson(*([float(v) for v in row] for row in far)).value == near(float(over) / math.sqrt(under), abs=1e-9)


def tries_agree(m, cases: int) -> None:
    rng = np.random.default_rng(17)
    n = rng.integers(1, 60, size=cases)
    c, k = rng.integers(0, n + 1), int(rng.integers(1, 9))
    c, n = c[n >= k], n[n >= k]
    exact = [1 - math.comb(int(b - a), k) / math.comb(int(b), k) for a, b in zip(c, n)]
    np.testing.assert_allclose(m.pass_at_k(c, n, k).items, exact, atol=1e-12)


def errors_agree(m, cases: int) -> None:
    "Leaving out one item, or one group, and scoring again."
    rng = np.random.default_rng(18)
    for case in range(cases):
        n = int(rng.integers(4, 12))
        said, true, group = rng.integers(0, 2, size=(3, n))
        if len(set(group.tolist())) < 2: group[0] = 1 - group[0]
        metric = (m.accuracy, lambda s, t: m.f1(s, t, "micro", labels=[1]), lambda s, t: m.Score.ratio("r", s + 1, t + 1))[case % 3]
        for score, groups in ((metric(said, true), np.arange(n)), (metric(said, true).clustered(group), group)):
            left = np.array([metric(said[groups != g], true[groups != g]).value for g in np.unique(groups)])
            if np.isfinite(left).all(): same(score.error, math.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()))


PARITY = {
    **{f"P, R, F {average}": (lambda m, n, a=average: classes_agree(m, n, a), 1000) for average in ("binary", *AVERAGES)},
    "accuracy, confusion": (accuracy_and_confusion_agree, 2000), "ROC, PR": (areas_agree, 1000), "rankings": (rankings_agree, 5000),
    **{f"entities {s}": (lambda m, n, s=s: entities_agree(m, n, s), 1200) for s in (None, *SCHEMES)},
    **{f"entities None {a}": (lambda m, n, a=a: entities_agree(m, n, None, a), 600) for a in ("macro", "weighted")},
    "correlations": (correlations_agree, 2500), "pass@k": (tries_agree, 5000), "errors": (errors_agree, 500),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARITY)
def test_thousands_of_random_and_nasty_cases(name):
    check, cases = PARITY[name]
    check(evaluation, cases)


FAULTS = {
    "macro is weighted": ('if average == "weighted" else', 'if average == "macro" else', "P, R, F macro"),
    "0/0 is 1": ("square * true + called, zero)", "square * true + called, 1.0)", "P, R, F binary"),
    "precision is recall": ('if name == "recall": return', 'if name == "precision": return', "P, R, F weighted"),
    "F of beta, not of its square": ("else beta**2", "else beta", "P, R, F macro"),
    "confusion transposed": ("bincount(true * C + said", "bincount(said * C + true", "accuracy, confusion"),
    "ties are ordered": ("np.flatnonzero(falling[1:] != falling[:-1]) + 1", "np.arange(1, len(falling))", "ROC, PR"),
    "PR is interpolated": ("precision = _divide(found, found + false, 0.0)[:, 1:]",
                           "p = _divide(found, found + false, 1.0); precision = (p[:, 1:] + p[:, :-1]) / 2", "ROC, PR"),
    "IOB2: I after O begins": ('("IOB", "OB IB BB"', '("IOB", "OB IB BB OI"', "entities IOB2"),
    "leniently, I after O does not begin": ('if p[1] != "O")', 'if p[1] != "O" and p != "OI")', "entities None"),
    "IOBES: S does not end": ("ES SO SI SB SE SS", "ES", "entities IOBES"),
    "types do not matter": ('"=" if kind == other else "!"', '"="', "entities None"),
    "jackknife without its factor": ("math.sqrt((G - 1) / G * (", "math.sqrt(1 / G * (", "errors"),
    "groups are forgotten": ("if self.groups is None: return self.stats\n", "if True: return self.stats\n", "errors"),
    "nDCG: discount off by one": ("np.arange(len(gains))[:k] + 2", "np.arange(len(gains))[:k] + 3", "rankings"),
    "nDCG: cut off by one": ("return float(by_rank[:k] @ discount", "return float(by_rank[: k and k - 1] @ discount[: k and k - 1]",
                                "rankings"),
    "MRR: ranks from 0": ("above + 1 + np.arange", "above + 2 + np.arange", "rankings"),
    "recall@k: cut off by one": ("lambda by_rank, _, gains: by_rank[:k]", "lambda by_rank, _, gains: by_rank[: k + 1]", "rankings"),
    "pass@k: a factor is missing": ("for j in range(k): miss", "for j in range(k - 1): miss", "pass@k"),
    "equal numbers do not share a rank": ("np.cumsum(here, axis=1) - here / 2", "np.cumsum(here, axis=1)", "correlations"),
    "squares cancel": ("(row - row.mean()) / np.abs(row - row.mean()).max() for row in (x, y)", "row for row in (x, y)", "correlations"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(evaluation, old, new, monkeypatch)
    with pytest.raises(AssertionError): PARITY[check][0](faulty, 200)
