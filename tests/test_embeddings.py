"""Learning word vectors: counting and training, beside gensim, brute force, and every kind of bad input."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.embeddings import (
    WEIGHTS,
    EmbeddingError,
    SparseMatrix,
    Word2VecConfig,
    banded,
    cooccurrences,
    huffman,
    index_text,
    negative_gradient,
    pmi,
    ppmi,
    sum_by_id,
    svd_vectors,
    train_word2vec,
)
from lmbook.glove import GloVeConfig, glove_weight, train_glove
from lmbook.word_vectors import VectorsError, WordVectors

dice = np.random.default_rng(0)
documents_of_ids = st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=6)


def topics(n: int = 300, seed: int = 0) -> list[list[str]]:
    "Sentences about one of four subjects: a word's company is the words of its subject."
    rng = np.random.default_rng(seed)
    return [[f"{'abcd'[t]}{i}" for i in rng.integers(0, 8, size=12)] for t in rng.integers(0, 4, size=n)]


def purity(vectors: WordVectors) -> float: return float(np.mean([vectors.nearest(word, 1)[0][0][0] == word[0] for word in vectors]))


# ---------------------------------------------------------------- counting


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=9), min_size=1, max_size=5), st.integers(1, 3))
def test_a_text_is_numbered_by_frequency(documents, min_count):
    count = Counter(itertools.chain(*documents))
    kept = {word: n for word, n in count.items() if n >= min_count}
    if not kept:
        with pytest.raises(EmbeddingError): index_text(documents, min_count)
        return
    text = index_text((tuple(d) for d in documents), min_count)
    assert dict(zip(text.words, text.counts.tolist())) == kept and text.counts.tolist() == sorted(kept.values(), reverse=True)
    assert [[text.words[i] for i in row] for row in text] == [[w for w in d if w in kept] for d in documents]
    assert text.n_words == sum(map(len, documents)) and text.n_documents == len(documents)


@pytest.mark.parametrize(("documents", "says"), [
    ([], "no words"), ([[], []], "no words"), (iter(()), "A generator"), (["a string"], "is a string"), ([["a", 3]], "3 is a int"),
    ([["a", "b", "a"]], "None of the 2 words occurs 5 times; the most frequent occurs 2 times"),
])  # fmt: skip
def test_a_text_that_cannot_be_read(documents, says):
    with pytest.raises(EmbeddingError, match=says): index_text(documents, 5)


@given(documents_of_ids, st.integers(1, 4), st.sampled_from(sorted(WEIGHTS)))
def test_cooccurrences_by_brute_force(documents, window, weight):
    want = np.zeros((7, 7))
    for row in documents:
        for i, j in itertools.permutations(range(len(row)), 2):
            if abs(i - j) <= window: want[row[i], row[j]] += WEIGHTS[weight](abs(i - j), window)
    found = cooccurrences(documents, 7, window, weight)
    np.testing.assert_allclose(found.dense(), want, atol=1e-12)
    np.testing.assert_allclose(found.tensor().to_dense().numpy(), want, rtol=1e-6)
    assert (np.diff(found.rows * 7 + found.cols) > 0).all()


def test_cooccurrences_of_a_long_text_are_summed_in_parts():
    rows = [dice.integers(0, 50, size=300_000) for _ in range(5)]
    whole = cooccurrences(rows, 50, 2).dense()
    np.testing.assert_array_equal(whole, sum(cooccurrences([row], 50, 2).dense() for row in rows))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: cooccurrences([[0, 7]], 7), "0 to 6"), (lambda: cooccurrences([[-1, 1]], 7), "Ids run from -1"),
    (lambda: cooccurrences([[0]], 7, 0), "window=0"),
    (lambda: cooccurrences([[0]], 7, weight="far"), "no weight='far'"),
    (lambda: svd_vectors(list("ab"), SparseMatrix(*np.eye(2).nonzero(), np.ones(2), 2), 3), "dim=3"),
])  # fmt: skip
def test_bad_counts(call, says):
    with pytest.raises(EmbeddingError, match=says): call()


def test_pmi_by_the_formula():
    counts = cooccurrences([dice.integers(0, 30, size=2000)], 30, 3)
    table = counts.dense()
    p = table / table.sum()
    want = np.log(p / np.outer(p.sum(1), p.sum(0)), out=np.zeros_like(p), where=p > 0)
    np.testing.assert_allclose(pmi(counts).dense(), want, atol=1e-12)
    shift = 0.1
    np.testing.assert_allclose(ppmi(counts, shift).dense(), np.maximum(want - shift, 0), atol=1e-12)
    smooth = p.sum(0) ** 0.75 / (p.sum(0) ** 0.75).sum()
    np.testing.assert_allclose(pmi(counts, 0.75).dense()[p > 0], np.log(p / np.outer(p.sum(1), smooth))[p > 0], atol=1e-12)


@pytest.mark.parametrize("size", [40, 1010])  # both ways to decompose
def test_svd_vectors_are_the_best_of_their_rank(size):
    low = dice.normal(size=(size, 5))
    matrix = low @ low.T + 0.01 * dice.normal(size=(size, size))
    scores = SparseMatrix(*matrix.nonzero(), matrix[matrix.nonzero()], size)
    before = torch.random.get_rng_state()
    found = svd_vectors(list(map(str, range(size))), scores, 5, power=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)
    best = np.linalg.svd(matrix, compute_uv=False)
    assert np.linalg.norm(found.matrix @ found.outputs.T - matrix) <= 1.001 * math.sqrt((best[5:] ** 2).sum()) + 1e-2
    again = svd_vectors(list(map(str, range(size))), scores, 5, power=0.5)
    np.testing.assert_array_equal(found.matrix, again.matrix)


# ---------------------------------------------------------------- word2vec


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_huffman_is_a_tree_of_the_least_mean_depth(counts):
    nodes, turns = huffman(counts)
    depth = (turns != 0).sum(1)
    if len(counts) == 1:
        assert depth.tolist() == [0]
        return
    assert sum(2.0 ** -int(d) for d in depth) == 1 and nodes.max() == len(counts) - 2  # Kraft: every leaf of a full binary tree
    p = np.array(counts) / sum(counts)
    entropy = -(p * np.log2(p)).sum()
    assert entropy - 1e-9 <= p @ depth < entropy + 1
    scores = torch.randn(len(counts) - 1, dtype=torch.float64)
    turns = torch.from_numpy(turns).double()
    total = torch.where(turns != 0, torch.sigmoid(turns * scores[torch.from_numpy(nodes)]), 1.0).prod(1).sum()
    assert math.isclose(total.item(), 1, abs_tol=1e-9)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_the_band_by_brute_force(window, L, B, seed):
    rng = np.random.default_rng(seed)
    n = B * L
    ids, document = rng.integers(0, 9, n + 2 * window), np.sort(rng.integers(0, 3, n + 2 * window))
    document[:window], document[window + n - seed % 3 :] = -1, -1  # now and then the text ends within a block
    reach = rng.integers(1, window + 1, (B, L))
    chunk = banded(*map(torch.from_numpy, (ids, document, reach)), window)
    found = {(b * L + i, b * L + j - window) for b, i, j in chunk.band.nonzero().tolist()}
    want = {(i, j) for i in range(n) for j in range(-window, n + window)
            if 0 < abs(i - j) <= reach.flat[i] and document[i + window] == document[j + window] >= 0}
    assert found == want
    assert torch.equal(chunk.centre.flatten(), torch.from_numpy(ids[window : window + n]))


def test_block_gradients_are_autograds():
    B, L, S, K, d = 2, 3, 7, 4, 5
    hidden, true, noise = (torch.randn(B, n, d, dtype=torch.float64, requires_grad=True) for n in (L, S, K))
    want, weight = torch.randint(0, 2, (B, L, S)).double(), torch.rand(K, dtype=torch.float64)
    loss = -(want * torch.nn.functional.logsigmoid(hidden @ true.mT)).sum()
    loss = loss - (want.sum(2, keepdim=True) * weight * torch.nn.functional.logsigmoid(-hidden @ noise.mT)).sum()
    loss.backward()
    for mine, theirs in zip(negative_gradient(hidden.detach(), true.detach(), want, noise.detach(), weight), (hidden, true, noise)):
        torch.testing.assert_close(mine, theirs.grad)


@pytest.mark.parametrize("method", ["skipgram", "cbow"])
@pytest.mark.parametrize("loss", ["hierarchical", "softmax"])
def test_one_step_is_the_gradient_of_the_loss(method, loss):
    "The change that one chunk makes to both matrices, against autograd on the loss written out pair by pair."
    from lmbook.embeddings import _Word2Vec

    text = index_text([["a", "b", "c", "a", "d", "b", "a", "e"]])
    model = _Word2Vec(text, Word2VecConfig(dim=4, window=2, method=method, loss=loss, min_count=1, subsample=0.0, clip=0.0))
    model.inputs, model.outputs = model.inputs.double() * 9, torch.randn(model.outputs.shape, dtype=torch.float64)
    if loss == "hierarchical": model.turns = model.turns.double()
    I, O = model.inputs.clone().requires_grad_(), model.outputs.clone().requires_grad_()
    ids, n = text.ids.tolist(), len(text.ids)
    padded, belongs = torch.tensor([0, 0, *ids, 0, 0]), torch.tensor([-1, -1, *[0] * n, -1, -1])
    reach = torch.tensor([[1, 2, 2, 1], [2, 1, 2, 2]])
    chunk = banded(padded, belongs, reach, 2)

    def log_p(h, word):
        if loss == "softmax": return torch.log_softmax(O @ h, 0)[word]
        way = model.turns[word] != 0
        return torch.nn.functional.logsigmoid(model.turns[word][way] * (O[model.nodes[word][way]] @ h)).sum()

    total = 0
    for i in range(n):
        near = [ids[j] for j in range(max(0, i - 2), min(n, i + 3)) if 0 < abs(i - j) <= reach.flatten()[i]]
        if method == "skipgram": total = total - sum(log_p(I[ids[i]], w) for w in near)
        elif near: total = total - log_p(I[near].mean(0), ids[i])
    total.backward()
    chunk = chunk._replace(band=chunk.band.double())
    before = model.inputs.clone(), model.outputs.clone()
    model.step(chunk, 0.1, torch.Generator())
    torch.testing.assert_close(before[0] - model.inputs, 0.1 * I.grad)
    torch.testing.assert_close(before[1] - model.outputs, 0.1 * O.grad)


@pytest.mark.parametrize("change", [
    {}, {"method": "cbow", "lr": 0.3}, {"loss": "hierarchical"}, {"loss": "softmax", "batch": 128}, {"workers": 2},
    {"block": 5, "batch": 64},
    {"method": "cbow", "loss": "softmax", "lr": 0.3}, {"method": "cbow", "loss": "hierarchical", "lr": 0.3},
    {"subsample": 0.0, "dynamic_window": False},
])  # fmt: skip
def test_every_way_to_train_finds_the_subjects(change):
    found = train_word2vec(
        topics(), Word2VecConfig(**({"dim": 16, "window": 4, "lr": 0.1, "epochs": 6, "min_count": 1, "subsample": 0.0} | change))
    )
    assert purity(found) > 0.9 and found.counts.sum() == 3600
    assert (found.outputs is None) == (change.get("loss") == "hierarchical")


def test_counting_and_glove_find_them_too():
    text = index_text(topics())
    assert purity(svd_vectors(text.words, ppmi(cooccurrences(text, 32, 4)), 8)) == 1
    assert purity(train_glove(topics(), GloVeConfig(dim=8, window=4, min_count=1, x_max=10.0, lr=0.1, epochs=40))) > 0.9


def test_the_same_seed_is_the_same_model_and_leaves_no_trace():
    config, state = Word2VecConfig(dim=8, min_count=1, epochs=2), torch.random.get_rng_state()
    first, second, other = (train_word2vec(topics(50), replace(config, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert np.abs(first.matrix - other.matrix).max() > 0.01
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for workers in (1, 3): train_word2vec(topics(50), replace(config, workers=workers))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    glove = GloVeConfig(dim=4, min_count=1, epochs=2)
    np.testing.assert_array_equal(train_glove(topics(50), glove).matrix, train_glove(iter(topics(50)), glove).matrix)


def test_texts_at_the_edge():
    config = Word2VecConfig(dim=4, min_count=1, epochs=1)
    assert len(train_word2vec([["a"]], config)) == 1
    for loss in ("hierarchical", "softmax"): assert len(train_word2vec([["a", "a"]], replace(config, loss=loss))) == 1
    assert len(train_word2vec([[], ["a", "b"], []], replace(config, workers=4))) == 2  # more workers than words
    assert "茶" in train_word2vec([["茶", "水"]] * 3, config)
    with pytest.raises(EmbeddingError, match="No two words stand in one document"): train_glove([["a"], ["b"]], GloVeConfig(min_count=1))


def test_too_large_a_rate_is_told_as_such():
    with pytest.raises(VectorsError, match="diverge"):
        train_word2vec(topics(), Word2VecConfig(dim=8, min_count=1, clip=0.0, lr=1e38, epochs=5))


def test_an_error_in_a_thread_comes_out(monkeypatch):
    from lmbook import embeddings

    def broken(*_): raise RuntimeError("in a thread")

    monkeypatch.setattr(embeddings, "banded", broken)
    with pytest.raises(RuntimeError, match="in a thread"): train_word2vec(topics(10), Word2VecConfig(min_count=1, workers=2))


@pytest.mark.parametrize(("config", "change", "says"), [
    (Word2VecConfig, {"window": 0}, "window=0"), (Word2VecConfig, {"dim": 0}, "dim=0"), (Word2VecConfig, {"epochs": 1.5}, "epochs=1.5"),
    (Word2VecConfig, {"workers": 0}, "workers=0"),
    (Word2VecConfig, {"method": "sg"}, "Choose one of: skipgram, cbow"),
    (Word2VecConfig, {"loss": "ns"}, "negative, hierarchical, softmax"),
    (Word2VecConfig, {"lr": 0}, "lr=0"), (Word2VecConfig, {"lr": math.nan}, "lr=nan"),
    (Word2VecConfig, {"min_lr": 1.0}, "falls from lr to min_lr"),
    (Word2VecConfig, {"subsample": -1}, "subsample=-1"), (Word2VecConfig, {"clip": math.nan}, "clip=nan"),
    (Word2VecConfig, {"noise_power": math.nan}, "noise_power=nan"),
    (GloVeConfig, {"window": 0}, "window=0"), (GloVeConfig, {"x_max": 0}, "x_max=0"), (GloVeConfig, {"lr": math.inf}, "lr=inf"),
    (GloVeConfig, {"power": -1.0}, "power=-1"),
])  # fmt: skip
def test_settings_that_make_no_sense(config, change, says):
    with pytest.raises(EmbeddingError, match=says): config(**change)


def test_noise_is_drawn_by_the_power():
    from lmbook.embeddings import _Word2Vec

    model = _Word2Vec(index_text([["a"] * 81 + ["b"] * 16 + ["c"]]), Word2VecConfig(min_count=1))
    drawn = torch.searchsorted(model.noise_bounds, torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 200_000, np.array([27, 8, 1]) / 36, atol=0.005)


def test_rows_are_summed_by_their_ids():
    rows = torch.from_numpy(dice.normal(size=(30, 4)))
    ids = torch.from_numpy(dice.integers(0, 7, size=30) * 3)
    different, sums = sum_by_id(ids, rows)
    assert different.tolist() == sorted(set(ids.tolist()))
    torch.testing.assert_close(sums, torch.stack([rows[ids == i].sum(0) for i in different]))


def test_no_worse_than_gensim_where_the_truth_is_known():
    from gensim.models import Word2Vec

    text = topics(150)
    theirs = Word2Vec(text, vector_size=16, window=4, sg=1, min_count=1, epochs=6, seed=1, workers=1, alpha=0.1)
    gensims = purity(WordVectors(theirs.wv.index_to_key, theirs.wv.vectors))
    ours = purity(train_word2vec(text, Word2VecConfig(dim=16, window=4, min_count=1, epochs=6, lr=0.1)))
    assert ours >= gensims - 0.1


def test_glove_weight():
    np.testing.assert_allclose(glove_weight(np.array([0, 16, 100, 200])), [0, (16 / 100) ** 0.75, 1, 1])


def test_glove_reaches_the_counts_that_it_fits():
    text = index_text(topics(100))
    pairs = cooccurrences(text, 32, 10, "harmonic")
    few, many = (train_glove(text, GloVeConfig(dim=32, epochs=n, x_max=1.0, lr=0.2)) for n in (1, 60))
    logs = np.log(pairs.dense() + 1e-9)[0, 1:]
    def fit(v): return abs(np.corrcoef(logs, (v.matrix @ v.matrix.T)[0, 1:])[0, 1])
    assert fit(many) > max(0.7, fit(few))


def test_import_is_light_and_needs_the_core_only():
    heavy = ("gensim", "scipy", "sklearn", "jieba", "datasets", "matplotlib")
    code = f"import sys; import lmbook.glove; print([m for m in {heavy} if m in sys.modules])"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(__file__).resolve().parents[1]
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
        )
    assert out.stdout.strip() == "[]"
