"""Pairs and groups: against scikit-learn, against loops, on bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_score, recall_score

from lmbook.fairness import FairnessError, balancing_weights, counterfactual_gap, fairness_gap, group_rates, swap_words

ITEMS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.sampled_from("abc")), min_size=4, max_size=60)
PAIRS = {"she": "he", "Anna": "John", "queen": "king", "她": "他"}


@given(ITEMS)
def test_rates_are_those_of_sklearn(items):
    said, true, groups = map(np.array, zip(*items))
    theirs = {
        "equal opportunity": lambda s, t: recall_score(t, s) if t.any() else None,
        "false positives": lambda s, t: 1 - recall_score(t, s, pos_label=0) if (1 - t).any() else None,
        "predictive parity": lambda s, t: precision_score(t, s) if s.any() else None,
        "accuracy": lambda s, t: accuracy_score(t, s),
        "demographic parity": lambda s, t: s.mean(),
    }  # fmt: skip
    rates = {}
    for kind, reference in theirs.items():
        wanted = {g: reference(said[groups == g], true[groups == g]) for g in np.unique(groups)}
        if None in wanted.values():
            with pytest.raises(FairnessError): group_rates(kind, said, true, groups)
            with pytest.raises(FairnessError): fairness_gap(kind, said, true, groups)
            continue
        found = group_rates(kind, said, true, groups)
        for g, value in wanted.items(): assert math.isclose(found[g].value, value, abs_tol=1e-12)
        if len(wanted) < 2: continue
        rates[kind] = max(wanted.values()) - min(wanted.values())
        assert math.isclose(fairness_gap(kind, said, true, groups).value, rates[kind], abs_tol=1e-12)
    if {"equal opportunity", "false positives"} <= rates.keys():
        both = max(rates["equal opportunity"], rates["false positives"])
        assert math.isclose(fairness_gap("equalised odds", said, true, groups).value, both, abs_tol=1e-12)


def test_the_error_of_a_gap_is_that_of_fresh_samples():
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b"], 300)
    found = []
    for _ in range(200):
        true = rng.integers(2, size=600)
        said = (rng.random(600) < np.where(groups == "a", 0.8, 0.5)).astype(int)
        found.append(fairness_gap("equal opportunity", said, true, groups))
    assert 0.85 < np.mean([s.error for s in found]) / np.std([s.value for s in found]) < 1.18
    covered = [s.interval()[0] <= 0.3 <= s.interval()[1] for s in found]
    assert np.mean(covered) > 0.9


@given(st.text(alphabet="sheqkingunANJohna她他 .,'", max_size=40))
def test_swapping_twice_gives_the_text(text):
    assert swap_words(swap_words(text, PAIRS), PAIRS) == text or any(c.isupper() for c in text)
    lower = text.lower()
    assert swap_words(swap_words(lower, PAIRS), PAIRS) == lower


def test_swapping_by_hand():
    assert swap_words("She said: the queen is here; SHE'S Anna.", PAIRS) == "He said: the king is here; HE'S John."
    assert swap_words("shell there Annabel", PAIRS) == "shell there Annabel"
    assert swap_words("她说他是面包师", PAIRS) == "他说她是面包师"
    assert swap_words("she", {}) == "she"
    assert swap_words("I see: WE.", {"i": "we", "see": "saw"}) == "We saw: I."  # one capital is a Capital
    assert swap_words("她们说她", {"她": "他", "她们": "男人"}) == "男人说他"  # the longest word first


def test_a_word_ends_where_its_letters_end_in_any_alphabet():
    french = {"il": "elle", "il y a": "voici"}
    assert swap_words("Il a vu l'îlot; ilôt, il", french) == "Elle a vu l'îlot; ilôt, elle"
    assert swap_words("il y a, il", french) == "voici, elle"
    assert swap_words("он сказал: тон, она", {"он": "она"}) == "она сказал: тон, он"
    assert swap_words("il ilo\u0302t il\u0302", french) == "elle ilo\u0302t il\u0302"  # accents as characters of their own
    assert swap_words("他是he吗 он", {"он": "她", "he": "she"}) == "他是she吗 她"  # beside Chinese a word ends


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), min_size=1, max_size=60))
def test_balanced_groups_and_labels_are_independent(items):
    labels, groups = map(np.array, zip(*items))
    w = balancing_weights(labels, groups)
    assert math.isclose(w.mean(), 1) and (w > 0).all()
    cells = {(y, g) for y, g in items}
    assume(len(cells) == len(set(labels)) * len(set(groups)))  # where a group is missing, no weight can bring it
    for y, g in cells:
        together = w[(labels == y) & (groups == g)].sum() / w.sum()
        assert math.isclose(together, (labels == y).mean() * (groups == g).mean(), abs_tol=1e-9)
    even = balancing_weights(labels, groups, equal=True)
    for y in set(labels):
        parts = [even[(labels == y) & (groups == g)].sum() for g in set(groups)]
        assert math.isclose(max(parts), min(parts), rel_tol=1e-9)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30))
def test_the_gap_of_pairs(pairs):
    a, b = map(np.array, zip(*pairs))
    found = counterfactual_gap(a, b)
    assert math.isclose(found.value, (a - b).mean(), abs_tol=1e-9)
    assert math.isclose(found.error, (a - b).std(ddof=1) / math.sqrt(len(a)), abs_tol=1e-9)


def test_pairs_that_belong_together_count_once():
    rng = np.random.default_rng(0)
    d = rng.normal(size=40)
    alone = counterfactual_gap(d, np.zeros(40))
    copied = counterfactual_gap(np.repeat(d, 5), np.zeros(200), groups=np.repeat(np.arange(40), 5))
    assert math.isclose(copied.value, alone.value) and math.isclose(copied.error, alone.error, rel_tol=0.02)
    assert counterfactual_gap(np.repeat(d, 5), np.zeros(200)).error < 0.6 * alone.error


def test_groups_of_any_kind_keep_their_names():
    said, true, mixed = [1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1], [1, "a", 1, "a", 2, 2]
    assert set(group_rates("accuracy", said, true, mixed)) == {1, 2, "a"}
    gap = fairness_gap("accuracy", said, true, mixed)
    assert set(gap.details["groups"]) == {1, 2, "a"} and math.isclose(gap.value, 0.5)


def test_impossibility_holds_for_every_confusion_matrix():
    rng = np.random.default_rng(0)
    for _ in range(200):
        tp, fp, fn, tn = rng.integers(1, 50, 4)
        said, true = np.repeat([1, 1, 0, 0], [tp, fp, fn, tn]), np.repeat([1, 0, 1, 0], [tp, fp, fn, tn])
        group = np.zeros(len(said), dtype=int)
        tpr, fpr, ppv = (group_rates(k, said, true, group)[0].value for k in ("equal opportunity", "false positives", "predictive parity"))
        p = true.mean()
        assert math.isclose(fpr, p / (1 - p) * (1 - ppv) / ppv * tpr)


BAD = {
    "they come in pairs": lambda: counterfactual_gap([1.0], [1.0, 2.0]),
    "finite": lambda: counterfactual_gap([math.nan], [1.0]),
    "an empty one": lambda: counterfactual_gap([], []),
    "stands in two pairs": lambda: swap_words("a", {"she": "he", "her": "he"}),
    "A pair is two words": lambda: swap_words("a", {"she": ""}),
    "A text is needed": lambda: swap_words(b"she", PAIRS),
    "a threshold": lambda: fairness_gap("accuracy", [0.3, 1], [0, 1], "ab"[:0] or ["a", "b"]),
    "no more than 1,000": lambda: fairness_gap("accuracy", [0] * 1001, [0] * 1001, range(1001)),
    "must be 0 or 1": lambda: group_rates("accuracy", [0.5, 1], [0, 1], ["a", "b"]),
    "must be 0 or 1. Scores": lambda: fairness_gap("accuracy", [1, 1], [0.5, 1], ["a", "b"]),
    "needs two": lambda: fairness_gap("accuracy", [0, 1], [0, 1], ["a", "a"]),
    "in the group 'b'": lambda: fairness_gap("equal opportunity", [0, 1], [1, 0], ["a", "b"]),
    "two rates": lambda: group_rates("equalised odds", [0, 1], [1, 0], ["a", "b"]),
    "Did you mean 'accuracy'": lambda: fairness_gap("acuracy", [0, 1], [1, 0], ["a", "b"]),
    "give one for each": lambda: fairness_gap("accuracy", [0, 1], [1, 0], ["a"]),
    "groups is one text": lambda: balancing_weights([0, 1], "ab"),
    "nothing to balance": lambda: balancing_weights([], []),
}  # fmt: skip


@pytest.mark.parametrize("part", BAD)
def test_bad_input_is_one_clear_error(part):
    with pytest.raises(FairnessError) as error: BAD[part]()
    assert part in str(error.value)
