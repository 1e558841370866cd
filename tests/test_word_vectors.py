"""Tables of word vectors: beside gensim, scipy and scikit-learn, on every kind of bad input, and stored files that are damaged."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmbook.word_vectors import (
    VectorsError,
    WordVectors,
    project,
    read_analogies,
    read_similarities,
    score_analogies,
    score_similarity,
)

dice = np.random.default_rng(0)


# ---------------------------------------------------------------- a table of words


@pytest.fixture
def vectors() -> WordVectors:
    rng = np.random.default_rng(1)
    words = ["the", "tea", "Tea", "coffee", "spoon", "Athens", "Greece", "茶", *(f"w{i}" for i in range(40))]
    return WordVectors(words, rng.normal(size=(len(words), 12)))


def keyed(vectors: WordVectors):
    from gensim.models import KeyedVectors

    out = KeyedVectors(vectors.dim)
    out.add_vectors(list(vectors.words), vectors.matrix)
    return out


def test_neighbours_and_analogies_are_gensims(vectors):
    theirs = keyed(vectors)
    for word in vectors:
        ours = vectors.nearest(word, 5)
        assert [w for w, _ in ours] == [w for w, _ in theirs.most_similar(word, topn=5)]
        np.testing.assert_allclose([c for _, c in ours], [c for _, c in theirs.most_similar(word, topn=5)], atol=1e-5)
    for a, b, c in itertools.permutations(["tea", "coffee", "茶", "Athens"], 3):
        ours, gensims = vectors.analogy(a, b, c, 5), theirs.most_similar(positive=[b, c], negative=[a], topn=5)
        assert [w for w, _ in ours] == [w for w, _ in gensims]
        np.testing.assert_allclose([x for _, x in ours], [x for _, x in gensims], atol=1e-5)
    assert math.isclose(vectors.similarity("tea", "茶"), theirs.similarity("tea", "茶"), abs_tol=1e-6)


def test_what_a_table_holds(vectors):
    assert len(vectors) == 48 and vectors.dim == 12 and "tea" in vectors and "cup" not in vectors and list(vectors)[:2] == ["the", "tea"]
    assert vectors["tea"].shape == (12,) and vectors.matrix.dtype == np.float32 and repr(vectors) == "WordVectors(48 words, 12 dimensions)"
    assert np.allclose(np.linalg.norm(vectors.normalized, axis=1), 1, atol=1e-6) and vectors.normalized is vectors.normalized
    near = vectors.nearest(vectors["tea"], 2)
    assert near[0][0] == "tea" and vectors.nearest("tea", 1, exclude=[near[1][0]])[0][0] != near[1][0]
    assert len(vectors.nearest("tea", 1000)) == 47 and len(vectors.nearest("tea", 1000, exclude=["the", "tea"])) == 46
    assert WordVectors(["a"], [[1, 2]]).nearest("a") == []


def test_words_without_direction_and_ties():
    tied = WordVectors(["a", "b", "c", "zero"], torch.tensor([[1, 0], [1, 0], [2, 0], [0, 0]]))
    assert tied.nearest("a", 3) == [("b", 1.0), ("c", 1.0), ("zero", 0.0)]  # ties in the order of the words


def test_a_mapped_file_stays_one_and_is_checked_when_it_is_compared(tmp_path):
    path = tmp_path / "matrix.npy"
    np.save(path, np.eye(3, dtype=np.float32))
    good = WordVectors(list("abc"), np.load(path, mmap_mode="r"))
    assert isinstance(good.matrix, np.memmap) and good["b"].tolist() == [0, 1, 0]
    np.save(path, np.full((3, 2), np.nan, dtype=np.float32))
    bad = WordVectors(list("abc"), np.load(path, mmap_mode="r"))
    with pytest.raises(VectorsError, match="not finite"): bad.nearest("a")


@pytest.mark.parametrize(("make", "says"), [
    (lambda: WordVectors(["a", "b", "a"], np.eye(3)), "'a' occurs 2 times"),
    (lambda: WordVectors(["a", "b"], np.eye(3)), "2 words but 3 rows in matrix"),
    (lambda: WordVectors(["a", "b"], np.eye(2), outputs=np.eye(3)), "3 rows in outputs"),
    (lambda: WordVectors(["a", "b"], np.eye(2), counts=[1]), "one count for each word"),
    (lambda: WordVectors(["a"], [1., 2.]), r"matrix of numbers \(V, d\)"),
    (lambda: WordVectors(["a"], [["x"]]), "matrix of numbers"),
    (lambda: WordVectors(["a", "b"], [[0, 1], [0, math.nan]]), "vector of 'b' holds a number that is not finite"),
    (lambda: WordVectors(["a", "b"], [[0, 1], [0, math.inf]]), "not finite"),
])  # fmt: skip
def test_a_broken_table_is_refused(make, says):
    with pytest.raises(VectorsError, match=says): make()


@pytest.mark.parametrize(("ask", "says"), [
    (lambda v: v["cofee"], "no vector for 'cofee' among 48 words. Did you mean coffee"),
    (lambda v: v["GREECE"], "Did you mean Greece"),
    (lambda v: v["unheardof"], "Ask `word in vectors` first"),
    (lambda v: v.nearest("xyzzy"), "no vector for 'xyzzy'"),
    (lambda v: v.nearest("tea", exclude=["xyzzy"]), "no vector for 'xyzzy'"),
    (lambda v: v.nearest("tea", 0), "k=0"),
    (lambda v: v.nearest(np.ones(3)), r"shape \(12,\), not \(3,\)"),
    (lambda v: v.nearest(np.full(12, np.nan)), "not finite"),
    (lambda v: v.analogy("tea", "xyzzy", "the"), "xyzzy"),
    (lambda v: v.similarity("tea", "xyzzy"), "xyzzy"),
    (lambda v: score_similarity(v, [("tea", "the", 1.), ("tea", "xyzzy", 2.)]), "1 of 2 pairs"),
    (lambda v: score_analogies(v, {"s": [("tea", "the", "xyzzy", "Greece")]}), "None of the 1 questions"),
    (lambda v: project(v, 13), "dims=13"),
    (lambda v: project(np.full((3, 3), np.nan)), "not finite"),
])  # fmt: skip
def test_a_question_without_answer_says_why(vectors, ask, says):
    with pytest.raises(VectorsError, match=says): ask(vectors)


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize("ignore_case", [True, False])
def test_scores_are_gensims(vectors, tmp_path, ignore_case):
    theirs, words = keyed(vectors), [*vectors.words, "missing"]
    every = list(itertools.combinations(words, 2))  # a pair twice would make ties that rounding decides
    pairs = [(*every[i], float(s)) for i, s in zip(dice.choice(len(every), 200, replace=False), dice.integers(0, 11, 200))]  # with ties
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\t{s}\n" for a, b, s in pairs), encoding="utf-8")
    pearson, spearman, unknown = theirs.evaluate_word_pairs(tmp_path / "pairs.tsv", case_insensitive=ignore_case)
    ours = score_similarity(vectors, pairs, ignore_case)
    assert (ours.pearson, ours.spearman) == pytest.approx((pearson[0], spearman[0]), abs=1e-6)
    assert ours.covered == round(200 * (1 - unknown / 100)) and ours.total == 200

    questions = {s: [tuple(map(str, dice.choice(words, 4, replace=False))) for _ in range(300)] for s in ("one", "two")}
    for a, b, c in itertools.permutations(("tea", "the", "coffee", "w1"), 3):  # and some that are answered
        questions["one"].append((a, b, c, vectors.analogy(a, b, c, 1)[0][0]))
    text = "".join(f": {s}\n" + "".join(" ".join(q) + "\n" for q in rows) for s, rows in questions.items())
    (tmp_path / "questions.txt").write_text(text, encoding="utf-8")
    accuracy, sections = theirs.evaluate_word_analogies(tmp_path / "questions.txt", case_insensitive=ignore_case)
    assert read_analogies(tmp_path / "questions.txt") == questions
    found = score_analogies(vectors, questions, ignore_case=ignore_case)
    right = {s["section"]: (len(s["correct"]), len(s["correct"]) + len(s["incorrect"])) for s in sections[:-1]}
    assert found.sections == right and found.accuracy == pytest.approx(accuracy) and found.accuracy > 0.01
    some, _ = theirs.evaluate_word_analogies(tmp_path / "questions.txt", restrict_vocab=20, case_insensitive=ignore_case)
    assert score_analogies(vectors, questions, restrict=20, ignore_case=ignore_case).accuracy == pytest.approx(some)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(rows):
    from scipy.stats import spearmanr

    x, y = map(np.array, zip(*rows))
    if len(set(x)) < 2 or len(set(y)) < 2: return
    angles = x / 4
    table = WordVectors(
        ["o", *(f"w{i}" for i in range(len(x)))], np.vstack([[1.0, 0.0], np.stack([np.cos(1.5 + angles), np.sin(1.5 + angles)], 1)])
    )
    ours = score_similarity(table, [("o", f"w{i}", s) for i, s in enumerate(y)])
    assert ours.spearman == pytest.approx(-spearmanr(x, y).statistic, abs=1e-9)


def test_projection_is_scikit_learns():
    from sklearn.decomposition import PCA

    X = dice.normal(size=(30, 7)) * np.arange(1, 8)
    ours, theirs = project(X, 3), PCA(3).fit_transform(X)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-4)
    assert ours[np.abs(ours).argmax(0), range(3)].min() > 0 and project(torch.eye(3)).shape == (3, 2)
    np.testing.assert_array_equal(project(np.ones((4, 3))), 0)


def test_real_files(data_dir):
    pairs = {name: read_similarities(data_dir / "word_similarity" / name) for name in ("wordsim353.tsv", "simlex999.txt")}
    assert [len(rows) for rows in pairs.values()] == [353, 999] and pairs["simlex999.txt"][0] == ("old", "new", 1.58)
    questions = read_analogies(data_dir / "word_similarity" / "questions-words.txt")
    assert len(questions) == 14 and sum(map(len, questions.values())) == 19_544


@pytest.mark.parametrize(("read", "text", "says"), [
    (read_similarities, "word1,word2,mean\na,b,1\na,b\n", "line 3"), (read_similarities, "# x\n\na\tb\t1\na\tb\tten\n", "line 4"),
    (read_analogies, ": s\na b c d\na b c\n", "line 3"),
])  # fmt: skip
def test_a_broken_file_is_told_by_its_line(tmp_path, read, text, says):
    (tmp_path / "x").write_text(text, encoding="utf-8")
    with pytest.raises(VectorsError, match=says): read(tmp_path / "x")
