"""Words, ranks, new words and the fit of a power law: agreement with plain counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.word_counts import power_law, rank_frequency, vocabulary_growth, words


@settings(deadline=None)
@given(tokens=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=200))
def test_counts_agree_with_counting(tokens):
    rank, frequency = rank_frequency(Counter(tokens))
    assert list(frequency) == sorted(Counter(tokens).values(), reverse=True) and list(rank) == list(range(1, len(set(tokens)) + 1))
    read, met = vocabulary_growth(tokens, points=20)
    assert read[-1] == len(tokens) and [len(set(tokens[:n])) for n in read] == list(met)


@pytest.mark.parametrize("exponent", [-1.3, -.8, .5])
def test_power_law_is_recovered(exponent):
    x = np.arange(1, 2000)
    assert power_law(x, 7 * x**exponent) == pytest.approx((exponent, 7), rel=1e-3)


def test_words():
    expected = ["don't", "stop", "it's", "a", "well-known", "naïve", "café", "times", "x"]
    assert words("Don't stop: it's a well-known naïve CAFÉ, 42 times_x.") == expected
    assert words("茶好了，tea 42。", "zh") == ["茶", "好", "了"]
