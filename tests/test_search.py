"""Search against gensim, brute force and formulas by hand; what comes back from a folder; bad input and its sentences; planted faults."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmbook.search as search
from lmbook.core import LmbookError
from lmbook.evaluation import recall_at, reciprocal_rank
from lmbook.search import (
    BM25,
    HNSW,
    IVF,
    Answer,
    Answerer,
    CrossEncoder,
    Exact,
    Hit,
    Index,
    SearchConfig,
    SearchError,
    SentenceEncoder,
    contrastive_loss,
    fit_threshold,
    fuse,
    score_hits,
    split_passages,
    terms,
)
from lmbook.text_metrics import sentence_vectors
from lmbook.tokenization import ByteTokenizer
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig
from tests.faults import planted

WORDS = ["cat", "dog", "sat", "mat", "the", "the", "a", "茶", "壶", "x1"]
SMALL = SearchConfig(vocab_size=270, d_model=16, n_layer=1, n_head=2, context_length=24, steps=3, batch_size=4)
PAIRS = [(f"What is {word}?", f"This is a {word}.") for word in ("cat", "dog", "cup", "pan", "hat", "key")]


def texts(n: int, seed: int = 0, longest: int = 12) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choice(WORDS) for _ in range(dice.randint(0, longest))) for _ in range(n)]


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder: return SentenceEncoder.fit(PAIRS, SMALL)


@pytest.fixture(scope="module")
def cross() -> CrossEncoder: return CrossEncoder.fit([(q, t, q[8:11] in t) for q, _ in PAIRS for _, t in PAIRS], SMALL)


# ---------------------------------------------------------------- words


def test_terms_are_words_numbers_and_chinese_characters():
    assert terms("Don't ask x1: 3.5 well-known 茶壶a！") == ["don't", "ask", "x1", "3", "5", "well-known", "茶", "壶", "a"]
    assert terms("") == terms("...!") == [] and terms("ÉTÉ") == ["été"]


def by_formula(query: str, texts: list[str], k1: float, b: float) -> list[float]:
    counts = [Counter(terms(text)) for text in texts]
    mean = sum(c.total() for c in counts) / len(texts) or 1
    out = []
    for c in counts:
        total = 0.0
        for word in terms(query):
            n = sum(word in other for other in counts)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            if c[word]: total += idf * c[word] / (c[word] + k1 * (1 - b + b * c.total() / mean))
        out.append(total)
    return out


def check_bm25(module: ModuleType) -> None:
    for seed in range(12):
        corpus, (k1, b) = texts(15, seed), [(1.2, 0.75), (0.0, 1.0), (2.0, 0.0)][seed % 3]
        for query in texts(4, 100 + seed, 5):
            np.testing.assert_allclose(module.BM25(corpus, k1, b).scores(query), by_formula(query, corpus, k1, b))


def test_bm25_is_its_formula(): check_bm25(search)


def test_bm25_is_gensims():
    models, corpora = pytest.importorskip("gensim.models"), pytest.importorskip("gensim.corpora")
    for seed in range(6):
        corpus = [text or "cat" for text in texts(20, seed)]
        rows = [terms(text) for text in corpus]
        known = corpora.Dictionary(rows)
        theirs = models.LuceneBM25Model(dictionary=known, k1=1.2, b=0.75)  # from a corpus it takes the mean of *distinct* words
        weights = [dict(theirs[known.doc2bow(row)]) for row in rows]
        for query in texts(5, 50 + seed, 4):
            wanted = [sum(w.get(known.token2id.get(word, -1), 0.0) for word in terms(query)) for w in weights]
            np.testing.assert_allclose(BM25(corpus).scores(query), wanted, rtol=1e-6)


def test_bm25_finds_what_shares_a_word_in_order_and_ties_by_number():
    index = BM25(["cat", "dog", "cat", "a cat sat", "cat"])
    assert [hit.number for hit in index.search(["cat"], 3)[0]] == [0, 2, 4]
    assert [hit.number for hit in index.search(["cat"], 99)[0]] == [0, 2, 4, 3]
    assert index.search(["zyzzyva", "", "猫"], 3) == [[], [], []] and index.search([], 3) == []
    assert BM25(["", "..."]).search(["cat"]) == [[]]


# ---------------------------------------------------------------- vectors


def check_loss(module: ModuleType) -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (4, 7))
    same = torch.zeros(4, 7, dtype=torch.bool)
    same[0, 0] = same[0, 5] = same[2, 1] = True  # the first is its own: that stays
    total = 0.0
    for i in range(4):
        left = [j for j in range(7) if j == i or not same[i, j]]
        total -= math.log(math.exp(float(a[i] @ b[i]) / 0.1) / sum(math.exp(float(a[i] @ b[j]) / 0.1) for j in left))
    assert abs(float(module.contrastive_loss(a, b, 0.1, same)) - total) < 1e-9


def test_the_contrastive_loss_by_hand(): check_loss(search)


def test_a_vector_is_the_mean_of_the_tokens_and_the_same_in_any_company(encoder):
    some = ["This is a cat.", "Hat", "", "A dog? A dog!"]
    vectors = encoder.encode(some)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, sentence_vectors(encoder.model, encoder.tokenizer, some), atol=1e-5)
    np.testing.assert_allclose(vectors, np.concatenate([encoder.encode([text]) for text in some]), atol=1e-5)
    np.testing.assert_allclose(vectors, encoder.encode(some, batch_size=1), atol=1e-5)
    assert encoder.encode([]).shape == (0, 16)
    assert np.allclose(encoder.similarity(some, some), 1)


def check_windows(module: ModuleType) -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(ByteTokenizer().vocab_size, 8, 1, 2, kind="encoder", context_length=10))
    made = module.SentenceEncoder(model, ByteTokenizer())
    text = "the end of a long text is read as well"
    ids = [ByteTokenizer().bos_id, *ByteTokenizer().encode(text), ByteTokenizer().eos_id]
    windows = [ids[at : at + 10] for at in range(0, len(ids) - 5, 5)]
    assert {i for at in range(0, len(ids) - 5, 5) for i in range(at, at + 10)} >= set(range(len(ids)))
    with torch.no_grad(): rows = [model.hidden(torch.tensor([window]))[0].mean(0) for window in windows]
    mean = torch.stack([row / row.norm() for row in rows]).mean(0)
    np.testing.assert_allclose(made.encode([text])[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_text_that_is_longer_than_the_model_is_read_in_windows(): check_windows(search)


def test_the_first_token_instead_of_the_mean(encoder):
    first = SentenceEncoder(encoder.model, encoder.tokenizer, "first")
    ids = torch.tensor([encoder.tokenizer.encode("Hat", bos=True, eos=True)])
    with torch.no_grad(): state = encoder.model.hidden(ids)[0, 0]
    np.testing.assert_allclose(first.encode(["Hat", "This is a long cat."])[0], (state / state.norm()).numpy(), atol=1e-5)


def test_training_brings_pairs_together_and_is_the_same_each_time():
    config = replace(SMALL, steps=60, lr=1e-2)
    one, two = SentenceEncoder.fit(PAIRS, config), SentenceEncoder.fit(PAIRS, config)
    asked, told = (one.encode([pair[i] for pair in PAIRS]) for i in range(2))
    assert (asked @ told.T).argmax(1).tolist() == list(range(len(PAIRS)))
    assert np.array_equal(told, two.encode([pair[1] for pair in PAIRS])) and one.history.rows[-1]["loss"] < 0.5
    hard = SentenceEncoder.fit([(a, b, b + " not") for a, b in PAIRS], SMALL)
    assert hard.history.rows[0]["loss"] > 0


def test_an_encoder_comes_back_from_its_folder(encoder, tmp_path):
    first = SentenceEncoder(encoder.model, encoder.tokenizer, "first")
    first.save(tmp_path / "e")
    again = SentenceEncoder.load(tmp_path / "e")
    assert again.pooling == "first" and np.array_equal(again.encode(["a cat"]), first.encode(["a cat"]))
    (tmp_path / "e" / "encoder.json").write_text("[")
    with pytest.raises(SearchError, match="cannot be read"): SentenceEncoder.load(tmp_path / "e")


# ---------------------------------------------------------------- nearest


def brute(vectors: np.ndarray, query: np.ndarray, k: int) -> list[int]: return np.argsort(-(vectors @ query), kind="stable")[:k].tolist()


def check_nearest(module: ModuleType) -> None:
    vectors, queries = unit(300, 8), unit(20, 8, 1)
    wanted = [brute(vectors, query, 7) for query in queries]
    for made in (module.Exact(vectors), module.IVF(vectors, cells=12, probes=12), module.HNSW(vectors, links=6, width=300)):
        found = made.search(queries, 7)
        assert [[hit.number for hit in row] for row in found] == wanted, type(made).__name__
        products = [vectors[w] @ q for w, q in zip(wanted, queries)]
        np.testing.assert_allclose([[hit.score for hit in row] for row in found], products, atol=1e-6)


def test_all_find_the_nearest_if_they_look_everywhere(): check_nearest(search)


def test_looking_at_less_finds_most(): # and counts what it has looked at
    vectors, queries = unit(600, 8), unit(40, 8, 1)
    true = Exact(vectors).search(queries, 10)
    for made, least in ((IVF(vectors, probes=8), 0.7), (HNSW(vectors), 0.9)):
        made.compared = 0
        found = made.search(queries, 10)
        share = np.mean([len({h.number for h in a} & {h.number for h in b}) / 10 for a, b in zip(found, true)])
        assert share > least and 40 * 10 < made.compared < 40 * 600 * 0.75, (type(made).__name__, share, made.compared)


def test_a_graph_keeps_its_links_and_its_levels():
    graph = HNSW(unit(200, 6), links=4)
    assert set(graph.levels[0]) == set(range(200)) and len(graph.levels) > 1
    for level, links in enumerate(graph.levels):
        assert all(len(near) <= (8 if level == 0 else 4) and a not in near and set(near) <= set(links) for a, near in links.items())
        if level: assert set(links) < set(graph.levels[level - 1])
    assert graph.levels == HNSW(unit(200, 6), links=4).levels


def test_one_vector_twins_and_zeros():
    for kind in (Exact, IVF, HNSW):
        assert [h.number for h in kind(unit(1, 3)).search(unit(2, 3, 1), 5)[0]] == [0]
        assert len(kind(np.ones((9, 3), np.float32)).search(np.ones((1, 3)), 4)[0]) >= 1
        assert kind(np.zeros((5, 3))).search(np.zeros((1, 3)), 2)[0][0].score == 0
        with pytest.raises(SearchError, match="no vector"): kind(np.zeros((0, 3)))
        with pytest.raises(SearchError, match="shape"): kind(unit(4, 3)).search(unit(1, 2))
        with pytest.raises(SearchError, match="finite"): kind(np.full((2, 2), np.nan))
    with pytest.raises(SearchError, match="more than the 3 vectors"): IVF(unit(3, 2), cells=4)
    with pytest.raises(SearchError, match="links=1"): HNSW(unit(3, 2), links=1)


# ---------------------------------------------------------------- fusion, scores


def check_fusion(module: ModuleType) -> None:
    a, b = [Hit(5, 9.0), Hit(2, 8.0), Hit(7, 1.0)], [Hit(2, 0.9), Hit(9, 0.5)]
    found = module.fuse([a, b], 10)
    assert [hit.number for hit in found] == [2, 5, 9, 7]
    assert [hit.score for hit in found] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


def test_fusion_by_hand(): check_fusion(search)


def test_fusion_of_one_is_the_one_and_of_none_is_none():
    hits = [Hit(3, 0.1), Hit(1, 0.05)]
    assert [hit.number for hit in fuse([hits])] == [3, 1] and fuse([]) == fuse([[], []]) == [] and len(fuse([hits], 1)) == 1


def check_scores(module: ModuleType) -> None:
    dice = np.random.default_rng(0)
    rows, relevant = dice.normal(size=(30, 12)), dice.random((30, 12)) < 0.2
    relevant[:, 3] |= ~relevant.any(1)
    hits = [[Hit(i, row[i]) for i in brute(np.eye(12) * row, np.ones(12), 12)] for row in rows]
    found = module.score_hits(hits, [np.flatnonzero(row) for row in relevant], 12)
    assert found["MRR@12"].value == pytest.approx(reciprocal_rank(rows, relevant).value)
    for k in (1, 4): assert module.score_hits(hits, [np.flatnonzero(row) for row in relevant], k)[f"recall@{k}"].value == pytest.approx(
        recall_at(rows, relevant, k).value)  # fmt: skip


def test_scores_of_rankings_are_those_of_chapter_60(): check_scores(search)


def test_what_is_not_found_scores_nothing():
    scores = score_hits([[Hit(1, 1.0)], []], [[2], [0]], 5)
    assert scores["MRR@5"].value == scores["recall@5"].value == 0
    with pytest.raises(SearchError, match="Nothing is relevant for query 0"): score_hits([[]], [[]])
    with pytest.raises(SearchError, match="2 rankings"): score_hits([[], []], [[1]])


# ---------------------------------------------------------------- passages

PIECES = st.lists(st.sampled_from(["One. ", "Two!", " ", "\n", "三。", "no end", "?!", '"Yes."', "4", "."]), max_size=12).map("".join)


@given(PIECES, st.integers(1, 3), st.integers(0, 2))
def test_passages_cover_a_text_and_know_where_they_stand(text, sentences, overlap):
    if overlap >= sentences: return
    found = split_passages([{"text": "before."}, {"text": text, "title": "T"}], sentences, overlap)
    mine = [p for p in found if p["source"] == 1]
    covered = {i for p in mine for i in range(p["start"], p["end"])}
    assert covered >= {i for i, c in enumerate(text) if not c.isspace()}
    for p in mine:
        quoted = text[p["start"] : p["end"]]
        assert p["text"] == f"T. {quoted}" and quoted.strip() == quoted
    if not overlap: assert all(a["end"] <= b["start"] for a, b in zip(mine, mine[1:]))


def check_passages(module: ModuleType) -> None:
    found = module.split_passages(['He hid it. He said: "What a day!" 真的？是。'])
    assert [p["text"] for p in found] == ["He hid it.", 'He said: "What a day!"', "真的？", "是。"]
    assert [p["text"] for p in module.split_passages(["A. B. C. D. E."], 3, 1)] == ["A. B. C.", "C. D. E."]
    assert [p["text"] for p in module.split_passages(["A. B. C. D."], 3, 1)] == ["A. B. C.", "C. D."]
    assert [p["text"] for p in module.split_passages(["A.", "", "B. C."], 5)] == ["A.", "B. C."]


def test_passages_of_known_texts(): check_passages(search)


def test_passages_that_never_end_are_refused():
    with pytest.raises(SearchError, match="never comes to an end"): split_passages(["A."], 2, 2)
    with pytest.raises(SearchError, match="Record 1 has no text"): split_passages(["A.", {"title": "B"}])  # type: ignore[list-item]
    with pytest.raises(SearchError, match="one text"): split_passages("A. B.")


# ---------------------------------------------------------------- the index


@pytest.mark.parametrize("near", ["exact", "ivf", "hnsw"])
def test_an_index_comes_back_from_its_folder(encoder, near, tmp_path):
    records = [{"text": text, "n": i} for i, (_, text) in enumerate(PAIRS)] + [{"text": "猫。\u2028坐", "n": None}]
    index = Index.fit(records, encoder, near)
    index.save(tmp_path / "i")
    again = Index.load(tmp_path / "i")
    assert again.records == records and again.near == near
    asked = ["What is a cat?", "猫"]
    for by in ("words", "vectors", "both"): assert again.search(asked, 4, by) == index.search(asked, 4, by)
    index.save(tmp_path / "i")  # over it


def test_an_index_of_words_needs_no_encoder(tmp_path):
    index = Index.fit(["a cat", "a dog"])
    assert [hit.number for hit in index.search(["dog"])[0]] == [1] and len(index) == 2
    index.save(tmp_path / "w")
    assert Index.load(tmp_path / "w").search(["dog"]) == index.search(["dog"])
    with pytest.raises(SearchError, match="needs an encoder"): index.search(["dog"], by="vectors")
    with pytest.raises(SearchError, match="Did you mean 'words'"): index.search(["dog"], by="word")  # type: ignore[arg-type]


def test_both_is_the_fusion_of_both(encoder):
    index = Index.fit([text for _, text in PAIRS], encoder)
    asked = ["What is a cat?", "zyzzyva"]
    rankings = zip(index.search(asked, 100, "words"), index.search(asked, 100, "vectors"))
    assert index.search(asked, 3) == [fuse(pair, 3) for pair in rankings]
    assert len(index.search(["zyzzyva"], 99)[0]) == len(PAIRS)  # vectors always find something


def test_what_an_index_refuses(encoder, tmp_path):
    for records, says in (([], "empty index"), ("a cat", "one text"), ([3], "Record 0 has no text"), (5, "give a list")):
        with pytest.raises(SearchError, match=says): Index.fit(records)  # type: ignore[arg-type]
    index = Index.fit(["a cat", "a dog"], encoder)
    for k in (0, -1, 2.5, True):
        with pytest.raises(SearchError, match="k="): index.search(["cat"], k)  # type: ignore[arg-type]
    with pytest.raises(SearchError, match="one text"): index.search("cat")
    with pytest.raises(SearchError, match="queries is one text|Number 0 of queries"): index.search([None])  # type: ignore[list-item]
    with pytest.raises(SearchError, match="no 'relevant'"): index.evaluate([{"query": "cat"}])
    with pytest.raises(SearchError, match="There are no records"): index.evaluate([])
    with pytest.raises(SearchError, match="2 texts: each has one"): Index(["a", "b"], encoder, vectors=np.ones((1, 16)))
    with pytest.raises(SearchError, match="the encoder that made them"): Index(["a"], vectors=np.ones((1, 16)))
    with pytest.raises(SearchError, match="JSON"): Index.fit([{"text": "a", "x": object()}]).save(tmp_path / "bad")
    with pytest.raises(SearchError, match="JSON"): Index.fit(["\ud800"]).save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_damaged_index_says_so(encoder, tmp_path):
    index = Index.fit(["a cat", "a dog"], encoder)
    faults = {
        "index.json": [b"{", b"[]", b'{"texts": 3, "encoder": false}', b'{"texts": 2, "encoder": false, "near": "far"}'],
        "records.jsonl": [b'{"text": "a"}\n', b"\xff\n", b"{"], "vectors.npy": [b"", b"\x93NUMPY", b"PK\3\4"],
    }  # fmt: skip
    for name, contents in faults.items():
        for content in contents:
            index.save(tmp_path / "i")
            (tmp_path / "i" / name).write_bytes(content)
            with pytest.raises(SearchError): Index.load(tmp_path / "i")
    with pytest.raises(SearchError, match="There is no index"): Index.load(tmp_path / "absent")


# ---------------------------------------------------------------- reading again


def test_a_cross_encoder_learns_from_pairs_what_no_word_says():
    examples = [(f"{a}?", f"{b}.", (a in "abc") == (b in "abc")) for a in "abcxyz" for b in "abcxyz"]
    made = CrossEncoder.fit(examples, replace(SMALL, steps=150, lr=1e-2, batch_size=12))
    scores = [float(made.scores(q, [t])[0]) for q, t, _ in examples]
    assert np.mean([(score > 0.5) == good for score, (_, _, good) in zip(scores, examples)]) > 0.9


def test_a_cross_encoder_reads_alone_as_in_company_and_comes_back(cross, tmp_path):
    some = ["This is a cat.", "no", "", "a very long text " * 20]
    scores = cross.scores("What is cat?", some)
    assert scores.shape == (4,) and ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_allclose(scores, [cross.scores("What is cat?", [text])[0] for text in some], atol=1e-5)
    cross.save(tmp_path / "c")
    assert np.array_equal(CrossEncoder.load(tmp_path / "c").scores("What is cat?", some), scores)
    ids, types = cross._joined("q " * 99, "t " * 99)
    assert len(ids) == len(types) == 24 and sum(types) == 12
    assert cross.scores("q", []).shape == (0,)


def test_a_cross_encoder_begins_with_an_encoder_and_leaves_it_alone(encoder):
    before = encoder.encode(["a cat"])
    made = CrossEncoder.fit([("a", "b", True), ("a", "c", False)], SMALL, encoder)
    assert made.tokenizer is encoder.tokenizer and np.array_equal(encoder.encode(["a cat"]), before) and encoder.model.has_scores


def test_reranking_keeps_numbers_and_sorts(cross):
    told = [text for _, text in PAIRS]
    found = cross.rerank("What is cat?", [Hit(4, 1.0), Hit(0, 0.5), Hit(2, 0.1)], told, 2)
    scores = cross.scores("What is cat?", told)
    assert [hit.number for hit in found] == sorted([0, 2, 4], key=lambda i: -scores[i])[:2] and cross.rerank("q", [], told) == []
    with pytest.raises(SearchError, match="no text 9"): cross.rerank("q", [Hit(9, 1.0)], told)


def test_what_encoders_refuse(encoder):
    one, two = [("a", "b", True)], [("a", "b")]
    for examples, says in ((one, "right and examples that are wrong"), (two, "Example 0"), ([], "wrong"), (["abc"], "Ex")):
        with pytest.raises(SearchError, match=says): CrossEncoder.fit(examples, SMALL)  # type: ignore[arg-type]
    for pairs in ([], [("a", "b")], [("a",), ("b",)], [("a", "b", "c", "d")] * 2):
        with pytest.raises(SearchError, match="at least two pairs"): SentenceEncoder.fit(pairs, SMALL)
    with pytest.raises(SearchError, match="pair 1"): SentenceEncoder.fit([("a", "b"), "cd"], SMALL)
    with pytest.raises(LmbookError): SentenceEncoder.fit([("a", "\ud800"), ("c", "d")], SMALL)
    with pytest.raises(SearchError, match="batch_size=1"): SearchConfig(batch_size=1)
    with pytest.raises(SearchError, match="temperature"): SearchConfig(temperature=0)
    with pytest.raises(SearchError, match="Did you mean 'mean'"): SentenceEncoder(encoder.model, encoder.tokenizer, "means")  # type: ignore[arg-type]
    small = Transformer(TransformerConfig(20, 8, 1, 2, kind="encoder"))
    with pytest.raises(SearchError, match="no pair"): SentenceEncoder(small, ByteTokenizer())
    pair = Transformer(TransformerConfig(300, 8, 1, 2, kind="encoder-decoder"))
    with pytest.raises(SearchError, match="encoder-decoder"): SentenceEncoder(pair, ByteTokenizer())
    plain = Classifier(Transformer(TransformerConfig(300, 8, 1, 2, kind="encoder")), ClassifierConfig(("bad", "good")))
    with pytest.raises(SearchError, match="'no', 'yes'"): CrossEncoder(plain, ByteTokenizer())
    assert contrastive_loss(torch.ones(1, 2), torch.ones(1, 2)) == 0
    with pytest.raises(SearchError, match=r"\(B, D\)"): contrastive_loss(torch.ones(2, 3), torch.ones(1, 3))


# ---------------------------------------------------------------- answers


class _Judge:
    "Says of each passage how many words of the question it has."

    def rerank(self, question, hits, texts, k):
        scores = [Hit(h.number, len(set(terms(question)) & set(terms(texts[h.number]))) / 10) for h in hits]
        return sorted(scores, key=lambda h: (-h.score, h.number))[:k]


def check_answers(module: ModuleType) -> None:
    records = [{"text": "Ann had a cat.  It was red.", "title": "Ann"}, {"text": "Bob had a dog.", "title": "Bob"}]
    index = module.Index.fit(module.split_passages(records))
    answerer = module.Answerer(index, 0.2, _Judge())
    [known, unknown, nothing] = answerer.predict(["Ann: was it red?", "Carl had what?", "zyzzyva"])
    assert known[:4] == ("It was red.", 0, 16, 27) and records[0]["text"][16:27] == known.text
    assert nothing is None and answerer.best(["zyzzyva"]) == [None]
    assert unknown is None and answerer.best(["Carl had what?"])[0].score < 0.2


def test_an_answer_is_a_quotation_with_its_source(): check_answers(search)


def test_answers_need_passages(cross):
    with pytest.raises(SearchError, match="no 'source'"): Answerer(Index.fit(["a text"]), 0.5, cross)
    with pytest.raises(SearchError, match="an encoder, or a cross-encoder"): Answerer(Index.fit(split_passages(["A."])))
    index = Index.fit(split_passages(["A cat."]))
    for threshold in (-0.1, 1.5, math.nan):
        with pytest.raises(SearchError, match="threshold"): Answerer(index, threshold, cross)
    assert isinstance(Answerer(index, 0.0, cross).predict(["cat?"])[0], Answer) and Answerer(index, 1.0, cross).predict(["cat?"]) == [None]


def test_answers_by_vectors(encoder):
    answerer = Answerer(Index.fit(split_passages([{"text": "A cat. A dog.", "title": "Pets"}]), encoder), 0.0)
    [answer] = answerer.predict(["Pets. A dog."])
    assert answer[:4] == ("A dog.", 0, 7, 13) and answer.score == pytest.approx(1, abs=1e-5)


def check_threshold(module: ModuleType) -> None:
    dice = np.random.default_rng(0)
    for n in (1, 2, 5, 30):
        for _ in range(20):
            scores, right = dice.integers(1, 7, n) / 7, dice.random(n) < 0.5
            errors = {t: int((right & (scores < t)).sum() + (~right & (scores >= t)).sum()) for t in np.linspace(0, 1, 999)}
            t = module.fit_threshold(scores, right)
            got = int((right & (scores < t)).sum() + (~right & (scores >= t)).sum())
            assert 0 <= t <= 1 and got == min(errors.values())


def test_the_threshold_makes_fewest_errors(): check_threshold(search)


def test_a_threshold_needs_scores():
    for scores, right in (([], []), ([0.5], [True, False]), ([1.5], [True]), ([math.nan], [True])):
        with pytest.raises(SearchError, match="score from 0 to 1"): fit_threshold(scores, right)


# ---------------------------------------------------------------- faults

FAULTS = {
    "idf without the half": ("(len(places) + 0.5))", "(len(places) + 1.5))", check_bm25),
    "no discount of length": ("(1 - b + b * lengths /", "(1 - b + b + 0 * lengths /", check_bm25),
    "a repeated word counts once": ("total[rows] += times * weights", "total[rows] += weights", check_bm25),
    "its own is left out, too": ("same & ~own", "same", check_loss),
    "no temperature": ("scores = a @ b.T / temperature", "scores = a @ b.T", check_loss),
    "the end is not read": ("range(0, len(row) - most // 2, max", "range(0, len(row) - most, max", check_windows),
    "cells forget": ("np.flatnonzero(cell == c) for c in", "np.flatnonzero(cell == c)[1:] for c in", check_nearest),
    "no way back": ("self._link(other, number, level)", "None", check_nearest),
    "ranks from 0": ("enumerate(ranking, 1): total", "enumerate(ranking, 0): total", check_fusion),
    "recall of k": ("share.append(len(found) / len(right))", "share.append(len(found) / k)", check_scores),
    "the last sentence is lost": ("max(len(spans) - overlap, min", "max(len(spans) - overlap - 1, min", check_passages),
    "a quotation with its title": ('record["text"][at[1] - at[2] :]', 'record["text"]', check_answers),
    "answers whatever": ("answer.score >= self.threshold", "answer.score >= 0", check_answers),
    "the other side of the threshold": ("(good & (values < t)).sum()", "(good & (values > t)).sum()", check_threshold),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(search, old, new, monkeypatch)
    with pytest.raises((AssertionError, ValueError)): check(faulty)


def test_a_folder_holds_plain_files(tmp_path):
    Index.fit(["a cat"]).save(tmp_path / "i")
    assert json.loads(Path(tmp_path / "i" / "index.json").read_text()) == {"near": "exact", "encoder": False, "texts": 1}
