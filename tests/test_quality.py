"""Rules of quality, hashes, and a judge that learns: edge cases, and the slow way."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbook.cleaning import CleaningError
from lmbook.quality import (
    GopherLimits,
    c4_page,
    char_hashes,
    fit_logistic,
    fit_quality,
    gopher_quality,
    gopher_repetition,
    hashed_features,
    ngram_hashes,
    token_hashes,
)
from lmbook.small_world import SmallWorld

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------------------------- rules of quality

PROSE = ("The old woman had the pot on the stove and waited for it to boil, and the cat that lived with her waited too. "
         "It would not be long now. She had to think of those who were to come, and of what they would have to eat.") * 2


@pytest.mark.parametrize("text, why", [
    ("The cat and the dog.", "too short"), ("the and " * 50_001, "too long"), ("a b " * 60, "mean word length"),
    ("internationalisation " * 60, "mean word length"), (PROSE + " ### " * 100, "mean word length|symbols"),
    (PROSE.replace(" ", " # "), "mean word length|symbols"), (PROSE.replace(". ", "... ... ... ... ... ... "), "symbols"),
    ("\n".join("- the kettle and the teapot were at home" for _ in range(20)), "bullets"),
    ("\n".join("the cat and the dog that went on and on…" for _ in range(20)), "ellipses"),
    ("the and " + "12345 67890 " * 50, "not alphabetic"), ("kettle teapot saucer " * 30, "no common words"), (PROSE, None),
])
def test_each_rule_of_gopher(text, why):
    found = gopher_quality(text)
    assert (found is None) if why is None else re.fullmatch(f"gopher: ({why})", found or "")


@pytest.mark.parametrize("text, why", [
    ("一二三", "gopher: too short"), ("茶水" * 40, "gopher: no common words"), ("abc的了是 12345 " * 20, "gopher: not alphabetic"),
    ("他的茶是好的，我也在等。" * 8, None),
])
def test_the_rules_for_chinese(text, why): assert gopher_quality(text, "zh") == why


def test_rules_on_repetition():
    lines = [f"line number {n} says something else" for n in range(20)]
    assert gopher_repetition("\n".join(lines[:10] + lines[:10])) == "gopher: repeated lines"
    assert gopher_repetition("\n\n".join(lines[:10] + lines[:10])) == "gopher: repeated paragraphs"
    assert gopher_repetition("tea time " * 40) == "gopher: top 2-gram"
    unique = " ".join(f"w{n}" for n in range(400))
    block = " ".join(f"b{n}" for n in range(12))
    assert gopher_repetition(unique) is None and gopher_repetition(f"{unique} {block} {unique[:20]} {block}") is None
    blocks = [" ".join(f"b{m}x{n}" for n in range(12)) for m in range(20)]
    assert gopher_repetition(" ".join(f"u{m} {b} v{m} {b}" for m, b in enumerate(blocks))) == "gopher: repeated 5-grams"
    assert gopher_repetition("") is None and gopher_repetition("one") is None


def test_pages_after_c4():
    assert c4_page("One. Two. Three.") is None and c4_page("好。是。走。") is None
    assert c4_page("One. Two.") == "c4: fewer than three sentences"
    assert c4_page("Lorem ipsum. A. B.") == "c4: lorem ipsum" and c4_page("function() { } A. B. C.") == "c4: curly bracket"


def test_limits_that_contradict_themselves():
    with pytest.raises(CleaningError, match="least, most"): GopherLimits(words=(10, 5))


# ----------------------------------------------------------------------------------------------------------------- hashes and features


@given(st.lists(st.text(alphabet="aB1 ,茶好İß\u0301", max_size=12), max_size=8), st.integers(1, 4))
def test_hashes_of_sequences_agree_with_the_slow_way(texts, n):
    def tokens(text): return ["".join(ch.lower()[0] for ch in t) for t in re.findall(r"[\u3400-\u9fff]|(?:(?![\u3400-\u9fff_])\w)+", text)]

    slow = [[tuple(ts[i : i + n]) for i in range(len(ts) - n + 1)] for ts in map(tokens, (re.sub("\u0301", " ", t) for t in texts))]
    texts = [re.sub("\u0301", " ", t) for t in texts]
    fast, bounds = ngram_hashes(*token_hashes(texts), n)
    assert [len(s) for s in slow] == np.diff(bounds).tolist()
    flat = [gram for grams in slow for gram in grams]
    assert len(set(flat)) == len(set(fast.tolist())) == len(set(zip(flat, fast.tolist())))


def test_hashes_do_not_depend_on_company_or_process():
    alone, together = token_hashes(["tea is ready"])[0], token_hashes(["x" * 5000, "tea is ready", "茶"])
    assert (alone == together[0][together[1][1] : together[1][2]]).all()
    code = "from lmbook.quality import token_hashes; print(token_hashes(['tea is ready'])[0].tolist())"
    for seed in "12":
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout == f"{alone.tolist()}\n"


def test_short_texts_and_empty_ones():
    hashes, bounds = ngram_hashes(*token_hashes(["", "tea", "tea is", "a b c d"]), 3, short=True)
    assert np.diff(bounds).tolist() == [0, 1, 1, 2] and len(hashes) == 4
    assert np.diff(ngram_hashes(*token_hashes([]), 3)[1]).tolist() == [] and len(char_hashes([])[0]) == 0
    features = hashed_features(["", "tea"])
    assert features.shape == (2, 4096) and not features[0].any() and abs(np.linalg.norm(features[1]) - 1) < 1e-5
    with pytest.raises(CleaningError, match="n=0 must be a whole number, at least 1"): ngram_hashes(*token_hashes(["a"]), 0)


def test_logistic_regression_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)).astype(np.float32)
    y = (x @ rng.normal(size=(12, 3)) + rng.gumbel(size=(300, 3))).argmax(axis=1)
    weight = rng.uniform(.2, 3, 300)
    for w in (None, weight):
        ours, theirs = fit_logistic(x, y.tolist(), w, l2=2.0), LogisticRegression(C=.5, tol=1e-8, max_iter=2000).fit(x, y, w)
        np.testing.assert_allclose(ours.probabilities(x), theirs.predict_proba(x), atol=2e-3)
    assert (ours.predict(x) == np.array(y, dtype=object)).mean() > .5


def test_a_judge_learns_and_its_step_leaves_the_dropped_alone():
    world = SmallWorld()
    good = list(world.texts(n=60))
    rng = random.Random(0)
    judge = fit_quality(good, [", ".join(rng.choices(t.lower().split(), k=60)) for t in good])
    texts = [*world.texts(n=3, start=500), "kettle, tea, cup, tea, shop, buy, cheap, tea", "x"]
    batch = judge({"text": texts, "dropped": [None] * 4 + ["before"]})
    assert batch["dropped"] == [None, None, None, "learned quality", "before"] and batch["quality"][4] is None
