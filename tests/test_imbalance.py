"""Missing values and class imbalance: edge cases, and parity with scikit-learn and imbalanced-learn."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbook.cleaning import CleaningError, apply_steps
from lmbook.imbalance import (
    MISSING,
    calibration_error,
    class_weights,
    f1,
    fill,
    is_missing,
    mark_missing,
    oversample,
    predict_category,
    reliability,
    smote,
    statistic,
    undersample,
)
from lmbook.small_world import SmallWorld

LABELS = st.lists(st.sampled_from("abc"), min_size=1, max_size=40)


@pytest.mark.parametrize("value", [None, float("nan"), np.nan, np.float64("nan"), "", "  ", "n/a", " N/A ", "null", "?"])
def test_ways_to_say_nothing(value): assert is_missing(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "0", "none at all", "no", [], -1])
def test_what_is_a_value(value): assert not is_missing(value)


@given(st.lists(st.one_of(st.none(), st.integers(-5, 5)), min_size=1).filter(lambda v: any(x is not None for x in v)))
def test_statistics_are_scikit_learns(values):
    from sklearn.impute import SimpleImputer

    column = np.array([np.nan if v is None else v for v in values], float)[:, None]
    for how in ("mean", "median"):
        np.testing.assert_allclose(np.array(fill(values, how)[0], float), SimpleImputer(strategy=how).fit_transform(column)[:, 0])
    counts = Counter(v for v in values if v is not None)
    assert counts[statistic(values, "mode")] == max(counts.values()) and fill(values, "mode")[1] == [v is None for v in values]


@pytest.mark.parametrize("values, how, message", [
    ([], "mean", "all 0 are missing"), ([None, ""], "mode", "all 2 are missing"), (["tea"], "mean", "For categories take the mode"),
    ([True], "median", "is a bool"),
])
def test_no_statistic(values, how, message):
    with pytest.raises(CleaningError, match=message): statistic(values, how)


def test_an_unknown_statistic():
    with pytest.raises(CleaningError, match="no how='average'.*mean, median, mode"): statistic([1], "average")


def test_categories_are_predicted_where_they_are_missing_only():
    docs = list(SmallWorld().documents(n=300))
    truth = [d.topic for d in docs]
    holes = np.arange(300) % 3 == 0
    values, sure = predict_category([d.text("en") for d in docs], [None if h else t for h, t in zip(holes, truth)])
    assert all(v == t for v, t, h in zip(values, truth, holes) if not h) and (sure[~holes] == 1).all() and (sure[holes] < 1).all()
    assert np.mean([v == t for v, t, h in zip(values, truth, holes) if h]) > .6
    with pytest.raises(CleaningError, match="two or more"): predict_category(["a", "b"], ["x", None])


def test_marking_is_a_step():
    batch, _ = apply_steps({"text": ["tea", None, " "], "id": [1, 2, 3]}, [mark_missing])
    assert batch["text"] == ["tea", "<missing>", "<missing>"]


@given(LABELS)
def test_sampling_makes_classes_equally_frequent(y):
    counts, rng = Counter(y), np.random.default_rng(0)
    over, under = oversample(y, rng), undersample(y, rng)
    assert set(Counter(np.array(y)[over]).values()) == {max(counts.values())}
    assert set(Counter(np.array(y)[under]).values()) == {min(counts.values())}
    assert set(over) == set(range(len(y))) and len(set(under)) == len(under)


@given(LABELS)
def test_weights_are_scikit_learns(y):
    from sklearn.utils.class_weight import compute_sample_weight

    np.testing.assert_allclose(class_weights(y), compute_sample_weight("balanced", y))
    assert abs(class_weights(y).mean() - 1) < 1e-9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_f1_is_scikit_learns(pairs):
    from sklearn.metrics import f1_score

    truth, guess = zip(*pairs)
    ours = f1(truth, guess)
    np.testing.assert_allclose(list(ours.values()), f1_score(truth, guess, labels=list(ours), average=None, zero_division=0))


def on_a_line_between_neighbours(row: np.ndarray, own: np.ndarray, k: int) -> bool:
    "Whether a row lies between some row and one of its k nearest neighbours."
    for i, base in enumerate(own):
        distance = ((own - base) ** 2).sum(1)
        distance[i] = np.inf
        for j in np.argsort(distance)[:k]:
            step = own[j] - base
            u = (row - base) @ step / (step @ step)
            if -1e-6 <= u <= 1 + 1e-6 and np.allclose(base + u * step, row, atol=1e-5): return True
    return False


@pytest.mark.parametrize("who", ["ours", "imbalanced-learn"])
def test_smote_interpolates_between_neighbours_as_imbalanced_learn_does(who):
    from imblearn.over_sampling import SMOTE

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), ["many"] * 45 + ["few"] * 15
    if who == "ours": new, labels = smote(x, y, rng, k=3)
    else: new, labels = SMOTE(k_neighbors=3, random_state=0).fit_resample(x, y)
    assert Counter(labels) == {"many": 45, "few": 45} and np.array_equal(new[:60], x) and list(labels[:60]) == y
    assert all(on_a_line_between_neighbours(row, x[45:], 3) for row in new[60:])


def test_smote_and_imbalanced_learn_invent_alike():
    "Mean and spread of what is invented, over many draws."
    from imblearn.over_sampling import SMOTE

    rng = np.random.default_rng(1)
    x, y = np.concatenate([rng.normal(size=(2000, 2)), rng.normal(3, [1, 2], size=(30, 2))]), ["many"] * 2000 + ["few"] * 30
    ours, theirs = smote(x, y, rng)[0][2030:], SMOTE(random_state=0).fit_resample(x, y)[0][2030:]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=.15)
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=.15)


def test_smote_with_few_rows_and_several_classes():
    x, y = np.eye(8, dtype=np.float32), ["a"] * 4 + ["b"] * 2 + ["c"] * 2
    new, labels = smote(x, y, np.random.default_rng(0))
    assert Counter(labels) == {"a": 4, "b": 4, "c": 4} and new.dtype == np.float32
    assert np.array_equal(smote(x[:4], ["a", "a", "b", "b"], np.random.default_rng(0))[0], x[:4])
    with pytest.raises(CleaningError, match="class 'b' has one"): smote(x[:3], ["a", "a", "b"], np.random.default_rng(0))


def test_calibration_by_hand():
    p, happened = np.array([.05, .05, .95, .95, 1.0, 0.0]), np.array([0, 1, 1, 1, 1, 0])
    predicted, real, n = reliability(p, happened)
    np.testing.assert_allclose(predicted, [.1 / 3, 2.9 / 3]); np.testing.assert_allclose(real, [1 / 3, 1]); assert n.tolist() == [3, 3]
    assert calibration_error(p, happened) == pytest.approx((.3 + .1 / 3) / 2)


@given(st.integers(0, 10**6))
def test_a_forecaster_who_is_right_is_calibrated(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(20_000)
    assert calibration_error(p, rng.random(20_000) < p) < .03


# ---------------------------------------------------------------------------------------------------------- nothing wrong in silence


@pytest.mark.parametrize("value", [
    *(kind("nan") for kind in (np.float16, np.float32, np.longdouble, complex, Decimal)), np.datetime64("NaT"), np.timedelta64("NaT"),
    "NA", "NaN", "NULL", "<NA>", "\u3000", "None ",
])
def test_every_type_and_spelling_of_nothing_is_missing(value): assert is_missing(value) is True


@pytest.mark.parametrize("value", [np.float32(0), np.datetime64("2020-01-01"), Decimal(1), "Na", "nano", np.array([1.0, 2.0]), (), "no"])
def test_values_of_every_type_are_values(value): assert is_missing(value) is False


def test_which_words_mean_nothing_can_be_said():
    mine = partial(is_missing, words=("unknown",))
    values = ["unknown", "NA", "NA", "x"]
    assert "NA" in MISSING and fill(values, "mode") == (["unknown", "unknown", "unknown", "x"], [False, True, True, False])
    assert fill(values, "mode", mine) == (["NA", "NA", "NA", "x"], [True, False, False, False])
    assert statistic(values, "mode", mine) == "NA" and mark_missing({"text": values}, missing=mine)["text"][0] == "<missing>"
