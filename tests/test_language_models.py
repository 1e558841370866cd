"""n-grams, their smoothings and their files; evaluation of any model; the floor. Parity with NLTK, KenLM, knlm and a plain dictionary."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook import language_models, perplexity
from lmbook.generation import SamplingConfig, generate
from lmbook.grammar import WORD
from lmbook.language_models import (
    SMOOTHING,
    LanguageModelError,
    NGram,
    NGramConfig,
    Vocabulary,
    count_ngrams,
    estimate_discounts,
)
from lmbook.perplexity import Dependency, DependencyKind, Evaluation, choice_nats, dependencies, evaluate, floor
from lmbook.small_world import SmallWorld, SmallWorldConfig, SmallWorldError

BOS, EOS = 0, 1


def corpus(seed: int = 0, V: int = 12, n: int = 60, longest: int = 30) -> list[list[int]]:
    "Documents of a crude Markov chain: <bos>, words, <eos>."
    dice = np.random.default_rng(seed)
    steps = dice.dirichlet(np.full(V - 2, .3), size=V)
    rows = []
    for _ in range(n):
        row = [BOS]
        for _ in range(dice.integers(0, longest)): row.append(2 + int(dice.choice(V - 2, p=steps[row[-1]])))
        rows.append([*row, EOS])
    return rows


def compiled(name: str):
    "A package that has to be compiled: where it is missing the test is skipped, but in CI it fails (for Python 3.13 there is none)."
    if os.environ.get("CI") and sys.version_info < (3, 13): return __import__(name)
    return pytest.importorskip(name)


def message(function, *arguments, **options) -> str:
    with pytest.raises(LanguageModelError) as error: function(*arguments, **options)
    assert isinstance(error.value, ValueError)
    return str(error.value)


# ---------------------------------------------------------------- counting

ROWS = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=8)


@given(ROWS, st.integers(1, 5))
def test_counts_are_those_of_a_dictionary(rows, order):
    if all(len(row) < 2 for row in rows): return
    counts = count_ngrams(rows, 5, order)
    assert counts.order == order and counts.tokens == sum(max(0, len(row) - 1) for row in rows)
    for n in range(1, order + 1):
        want = Counter(tuple(row[i : i + n]) for row in rows for i in range(n == 1, len(row) - n + 1))
        words, how_often = counts.table(n)
        assert {tuple(w): c for w, c in zip(words.tolist(), how_often.tolist()) if c} == want
        if n > 1:
            assert (np.diff(counts.levels[n - 1].keys) > 0).all()
            shorter = counts.table(n - 1)[0]
            assert (shorter[counts.levels[n - 1].suffixes] == words[:, 1:]).all()


@given(ROWS)
def test_seen_is_true_for_what_occurs_and_nothing_else(rows):
    if all(len(row) < 2 for row in rows): return
    counts, grid = count_ngrams(rows, 5, 3), np.array(list(itertools.product(range(5), repeat=3)))
    for n in (2, 3):
        have = {tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)}
        assert [tuple(g[3 - n :]) in have for g in grid.tolist()] == (counts.seen(grid)[n - 1][:, -1] >= 0).tolist()


def test_documents_in_any_form_and_from_a_generator():
    rows = corpus()
    want = count_ngrams(rows, 12, 3)
    forms = [np.array, torch.tensor, tuple, lambda row: np.array(row, dtype=np.uint8), lambda row: torch.tensor(row, dtype=torch.int32)]
    for form in forms:
        found = count_ngrams((form(row) for row in rows), 12, 3)
        assert all(np.array_equal(a, b) for x, y in zip(found.levels, want.levels) for a, b in zip(x, y))


def test_n_grams_keep_within_documents_and_empty_documents_do_no_harm():
    counts = count_ngrams([[], [0, 1], [], [2], [2, 3]], 4, 3)
    assert counts.table(2)[0].tolist() == [[0, 1], [2, 3]] and len(counts.levels[2].keys) == 0 and counts.tokens == 2
    model = NGram.from_counts(counts, NGramConfig(3))  # a level without n-grams
    assert model.sizes == [4, 2, 0]
    for smoothing in SMOOTHING:  # levels and contexts without n-grams
        model = NGram.fit([[0, 1], [2, 3]], 4, NGramConfig(5, smoothing))
        rows = torch.tensor([[0, 1, 2, 3, 0, 1], [2, 3, 2, 3, 2, 3]])
        want = torch.stack([torch.stack([model.next_log_probs(row[:t])[row[t]] for t in range(1, 6)]) for row in rows])
        torch.testing.assert_close(model.token_log_probs(rows), want)


def test_long_keys_sort_too():
    "Where key and place do not fit into 64 bits together."
    for key in (np.array([5, 2**62, 0, 5, 2**61]), np.array([3, 1, 2, 1]), np.zeros(0, dtype=np.int64)):
        ordered, at = language_models._sorted(key)
        assert ordered.tolist() == sorted(key.tolist()) and key[at].tolist() == ordered.tolist()


@pytest.mark.parametrize(("documents", "V", "order", "says"), [
    ([], 5, 2, "nothing to count: 0 documents"), ([[], [3]], 5, 2, "nothing to count: 1 documents"), (iter(()), 5, 2, "read before"),
    ([[0, 1, 5]], 5, 2, "The id 5 is no token: the text's ids run from 0 to 4"), ([[0, -1, 2]], 5, 2, "The id -1 is no token"),
    ([[0, 1]], 5, 0, "order=0"), ([[0, 1]], 5, 10**9, "order=1000000000 is more than 100"),
    ([0, 1, 2], 5, 2, "document 0 is 0, not a row of ids"), ([[0, 1.5]], 5, 2, "whole numbers, not float64"),
    ("abc", 5, 2, "a single text"), (["abc"], 5, 2, "document 0 is a text"), ([[[0, 1], [1, 2]]], 5, 2, "shape (2, 2)"),
    ([[0, [1]]], 5, 2, "not one row"), ([[0, 1]], 0, 2, "vocab_size=0"), ([["a", "b"]], 5, 2, "whole numbers, not <U1"),
])  # fmt: skip
def test_bad_corpora_say_what_is_wrong(documents, V, order, says): assert says in message(count_ngrams, documents, V, order)


def test_counts_of_what_was_not_counted():
    counts = count_ngrams([[0, 1, 2]], 3, 2)
    assert "of 1 to 2 words were counted, not of 3" in message(counts.table, 3)
    assert "only n-grams of up to 2 words" in message(NGram.from_counts, counts, NGramConfig(3))


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("smoothing", SMOOTHING)
@given(rows=ROWS, order=st.integers(1, 4), context=st.lists(st.integers(0, 4), max_size=6))
@settings(max_examples=60)
def test_probabilities_sum_to_one(smoothing, rows, order, context):
    if all(len(row) < 2 for row in rows): return
    model = NGram.fit(rows, 5, NGramConfig(order, smoothing))
    log_p = model.next_log_probs(context)
    assert log_p.isfinite().all() and abs(log_p.double().exp().sum() - 1) < 1e-5


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_rows_and_single_contexts_agree(smoothing):
    dice = np.random.default_rng(1)
    for order in (1, 2, 3, 5):
        model, x = NGram.fit(corpus(), 12, NGramConfig(order, smoothing)), dice.integers(0, 12, (6, 9))
        want = torch.stack([torch.stack([model.next_log_probs(row[:t])[row[t]] for t in range(1, 9)]) for row in x])
        torch.testing.assert_close(model.token_log_probs(x), want)
        torch.testing.assert_close(model.token_log_probs(torch.tensor(x)), want)
        assert model.token_log_probs(x[:, :1]).shape == (6, 0)


def chen_goodman(rows: list[list[int]], V: int, order: int):
    "Modified Kneser-Ney with dictionaries, as the paper has it: p(w | context) by recursion."
    raw = [Counter(tuple(row[i : i + n]) for row in rows for i in range(n == 1, len(row) - n + 1)) for n in range(1, order + 1)]
    tables = []
    for n in range(1, order + 1):
        if n == order: tables.append(raw[n - 1])
        else:
            before = Counter(gram[1:] for gram in raw[n])
            tables.append(Counter({g: before[g] or c * (n > 1) for g, c in raw[n - 1].items()}))
    spent, sums, off = [], [], []
    for table in tables:
        n1, n2, n3, n4 = (sum(c == r for c in table.values()) for r in (1, 2, 3, 4))
        D = [.5, 1., 1.5]
        if n1 and n2 and n3:
            Y = n1 / (n1 + 2 * n2)
            found = [1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3]
            if all(0 < d <= r for r, d in enumerate(found, 1)): D = found
        off.append(lambda c, D=D: 0 if c == 0 else D[min(int(c), 3) - 1])
        sums.append(defaultdict(float)); spent.append(defaultdict(float))
        for gram, c in table.items():
            sums[-1][gram[:-1]] += c
            spent[-1][gram[:-1]] += off[-1](c)

    def p(w: int, context: tuple[int, ...], n: int) -> float:
        if n == 0: return 1 / V
        if not sums[n - 1][context]: return p(w, context[1:], n - 1)
        c = tables[n - 1][(*context, w)]
        return (c - off[n - 1](c)) / sums[n - 1][context] + spent[n - 1][context] / sums[n - 1][context] * p(w, context[1:], n - 1)

    return lambda w, past: p(w, tuple(past[max(0, len(past) - order + 1) :]), min(order, len(past) + 1))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_modified_kneser_ney_is_that_of_the_paper(order):
    rows = corpus(2, V=60, n=80)
    model, want = NGram.fit(rows, 60, NGramConfig(order)), chen_goodman(rows, 60, order)
    assert order == 1 or any(d != (.5, 1., 1.5) for d in model.discounts)
    for context in [[], [0], [5], [0, 3], [7, 7], [4, 9, 2], *(row[:k] for row in rows[:8] for k in range(1, len(row)))]:
        np.testing.assert_allclose(model.next_log_probs(context).exp().numpy(), [want(w, context) for w in range(60)], atol=2e-6)


def test_witten_bell_by_hand():
    "Of 4 words, 2 occurred: after 3 occurrences a new one is expected with 2 / (3 + 2)."
    model = NGram.fit([[0, 1, 1, 2]], 4, NGramConfig(1, "witten_bell"))
    torch.testing.assert_close(model.next_log_probs([]).exp(), torch.tensor([.5, 2.5, 1.5, .5]) / 5)
    p = NGram.fit([[0, 1, 1, 2]], 4, NGramConfig(2, "witten_bell")).next_log_probs([1]).exp()  # 1 and 2 followed once each
    torch.testing.assert_close(p, (torch.tensor([0., 1., 1., 0.]) + 2 * torch.tensor([.5, 2.5, 1.5, .5]) / 5) / 4)


def test_discounts_by_hand_and_where_a_text_is_too_small():
    counts = np.repeat([1, 2, 3, 4, 9, 0], [13, 4, 2, 1, 1, 3])
    assert np.allclose(estimate_discounts(counts), [13 / 21, 15 / 14, 37 / 21]) and estimate_discounts(counts, three=False) == (13 / 21,)
    for small in ([], [1, 1], [2, 2, 3], [1, 2, 3, 3, 3, 3, 3]):  # the last one: D2 below zero
        assert estimate_discounts(np.array(small)) == (.5, 1., 1.5)
    assert estimate_discounts(np.array([1, 1]), three=False) == estimate_discounts(np.array([3]), three=False) == (.5,)


def test_fixed_discounts_are_used():
    model = NGram.fit(corpus(), 12, NGramConfig(2, "absolute", discount=.25))
    assert model.discounts == [(.25,), (.25,)]
    rows = corpus()
    followers = Counter(b for row in rows for a, b in zip(row, row[1:]) if a == 5)
    single = model.next_log_probs([]).exp()
    w, c = followers.most_common(1)[0]
    want = (c - .25) / followers.total() + .25 * len(followers) / followers.total() * single[w]
    assert model.next_log_probs([5]).exp()[w].item() == pytest.approx(want.item(), rel=1e-5)
    three = NGram.fit(rows, 12, NGramConfig(2, discount=[.4, .8, 1.2]))
    assert three.discounts == [(.4, .8, 1.2)] * 2 and three.config.discount == (.4, .8, 1.2)


def test_backoff_gives_seen_words_nothing_from_below():
    rows = corpus(n=20)
    model = NGram.fit(rows, 12, NGramConfig(2, "backoff", discount=.5))
    followers = Counter(b for row in rows for a, b in zip(row, row[1:]) if a == 5)
    assert 0 < len(followers) < 12
    p = model.next_log_probs([5]).exp()
    for w, c in followers.items(): assert p[w].item() == pytest.approx((c - .5) / followers.total(), rel=1e-5)
    below, unseen = model.next_log_probs([]).exp(), [w for w in range(12) if w not in followers]
    ratio = p[unseen] / below[unseen]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_context_after_which_everything_was_seen():
    rows = [[a, b] for a in range(3) for b in range(3) for _ in range(1 + a + b)]
    for smoothing in SMOOTHING:
        assert abs(NGram.fit(rows, 3, NGramConfig(2, smoothing)).next_log_probs([1]).double().exp().sum() - 1) < 1e-6
    p = NGram.fit(rows, 3, NGramConfig(2, "backoff")).next_log_probs([1]).exp()
    torch.testing.assert_close(p, torch.tensor([2., 3., 4.]) / 9)  # nothing is unseen, so nothing is kept for it


def test_more_context_than_the_order_changes_nothing():
    for smoothing in SMOOTHING:
        model = NGram.fit(corpus(), 12, NGramConfig(3, smoothing))
        assert torch.equal(model.next_log_probs([9, 9, 9, 4, 5]), model.next_log_probs([4, 5]))
        a, b = model.token_log_probs([[3, 4, 5, 6], [8, 4, 5, 6]])
        assert a[-1] == b[-1]


@pytest.mark.parametrize(("options", "says"), [
    ({"order": 0}, "order=0"), ({"order": 2.5}, "order=2.5"), ({"smoothing": "laplace"}, "Choose one of: add_k"), ({"k": 0}, "k=0"),
    ({"k": math.nan}, "k=nan"), ({"weight": 1}, "weight=1"), ({"weight": 0.}, "weight=0"), ({"discount": .5}, "takes three numbers"),
    ({"discount": (.5, 1, 4)}, "takes three numbers"), ({"smoothing": "absolute", "discount": 1.5}, "takes one number"),
    ({"smoothing": "kneser_ney", "discount": (.5, 1, 1.5)}, "takes one number"),
])  # fmt: skip
def test_bad_settings_say_what_is_wrong(options, says): assert says in message(NGramConfig, **options)


def test_bad_ids_say_what_is_wrong():
    model = NGram.fit(corpus(), 12, NGramConfig(2))
    assert "The id 12 is no token: ids run from 0 to 11" in message(model.token_log_probs, [[0, 12]])
    assert "The id -1 is no token" in message(model.next_log_probs, [-1])
    assert "shape (B, T)" in message(model.token_log_probs, [0, 1]) and "whole numbers" in message(model.token_log_probs, [[.5]])


# ---------------------------------------------------------------- other libraries


def nltk_model(kind, rows, order, **options):
    "A model of NLTK over the same 12 words (it adds a word of its own for unknown ones: let that be the last)."
    from nltk.lm import Vocabulary as NltkVocabulary
    from nltk.util import everygrams

    model = kind(order=order, vocabulary=NltkVocabulary([str(i) for i in range(11)], unk_label="11"), **options)
    model.fit([[tuple(map(str, gram)) for gram in everygrams(row, max_len=order)] for row in rows])
    return model


def test_add_k_equals_nltk():
    from nltk.lm import Lidstone

    rows = corpus(3)
    theirs = nltk_model(Lidstone, rows, 3, gamma=.2)
    ours = NGram.fit(rows, 12, NGramConfig(3, "add_k", k=.2))
    for context in ([3, 4], [5, 5], [7, 2], [11, 11]):
        want = [theirs.score(str(w), [str(c) for c in context]) for w in range(12)]
        np.testing.assert_allclose(ours.next_log_probs(context).exp().numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_kneser_ney_equals_nltk(order):
    "NLTK's single words have no discount and no uniform share; that is taken out here: everything above them must agree."
    from nltk.lm import KneserNeyInterpolated

    rows = [[BOS] * (order - 2) + row for row in corpus(4)]  # as NLTK pads
    theirs = nltk_model(KneserNeyInterpolated, rows, order, discount=.3)
    ours = NGram.fit(rows, 12, NGramConfig(order, "kneser_ney", discount=.3))
    single = ours.next_log_probs([]).double().exp().numpy()
    checked = 0
    for context in ([3, 4], [5, 5], [7, 2], [4, 9], [2, 6]):
        context = context[: order - 1]
        places = language_models._places(ours.keys, np.array([context]), 12)
        if any(place[0, -1] < 0 for place in places[: len(context)]): continue  # NLTK answers 0 after a context that it has not seen
        weight = math.exp(sum(ours.log_backoffs[n][place[0, -1]] for n, place in enumerate(places[: len(context)])))
        share = np.array([theirs.score(str(w)) for w in range(12)])
        want = np.array([theirs.score(str(w), [str(c) for c in context]) for w in range(12)])
        np.testing.assert_allclose(ours.next_log_probs(context).double().exp().numpy() - weight * single, want - weight * share, atol=2e-6)
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("smoothing", [s for s in SMOOTHING if s != "add_k"])
@pytest.mark.parametrize("order", [2, 3, 5])
def test_kenlm_reads_our_tables_and_agrees(smoothing, order, tmp_path):
    kenlm = compiled("kenlm")
    names = ["<s>", "</s>", "<unk>", *(f"词{i}" for i in range(3, 12))]
    model, path = NGram.fit(corpus(5), 12, NGramConfig(order, smoothing)), tmp_path / "model.arpa"
    model.write_arpa(path, names)
    theirs = kenlm.Model(str(path))
    for row in [row for row in corpus(6) if len(row) > 2]:
        scores = [s for s, _, _ in theirs.full_scores(" ".join(names[i] for i in row[1:-1]))]
        np.testing.assert_allclose(model.token_log_probs([row])[0].numpy() / math.log(10), scores, atol=1e-4)


def test_knlm_estimates_the_same_bigrams():
    "knlm takes no discount off single words and mixes in no uniform share; above them, its modified Kneser-Ney is an independent estimate."
    knlm = compiled("knlm")
    rows = corpus(7, V=60, n=200)
    theirs = knlm.KneserNey(2, 4)
    for row in rows: theirs.train([str(i) for i in row[1:-1]])
    theirs.optimize()
    ours = NGram.fit(rows, 60, NGramConfig(2))
    assert ours.discounts[1] != (.5, 1., 1.5)
    single = ours.next_log_probs([]).double().exp().numpy()
    pairs = count_ngrams(rows, 60, 2).table(2)[0]
    share = np.bincount(pairs[:, 1], minlength=60) / len(pairs)
    for a in range(2, 60):
        if not (pairs[:, 0] == a).any(): continue
        weight = math.exp(ours.log_backoffs[0][a])
        want = ours.next_log_probs([a]).double().exp().numpy() + weight * (share - single)
        found = [math.exp(theirs.evaluate([str(a), str(b)])) for b in range(2, 60) if share[b]]
        np.testing.assert_allclose(found, want[2:][share[2:] > 0], rtol=1e-4)


def test_arpa_refuses_what_it_cannot_hold(tmp_path):
    model = NGram.fit([[0, 1, 2]], 3, NGramConfig(2))
    assert "2 names for 3 words" in message(model.write_arpa, tmp_path / "a", ["x", "y"])
    for names in (["x", "x", "y"], ["x", "a b", "y"], ["x", "", "y"], ["x", " y", "z"]):
        assert "without white space" in message(model.write_arpa, tmp_path / "a", names)
    assert "no back-off model" in message(NGram.fit([[0, 1, 2]], 3, NGramConfig(2, "add_k")).write_arpa, tmp_path / "a", ["x", "y", "z"])
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("smoothing", SMOOTHING)
def test_a_saved_model_comes_back_the_same(smoothing, tmp_path):
    config = NGramConfig(3, smoothing, k=.3, weight=.4, discount=(.5, .9, 1.2) if smoothing == "modified_kneser_ney" else None)
    model, path = NGram.fit(corpus(), 12, config), tmp_path / "new folder" / "model.safetensors"
    model.save(path)
    back = NGram.load(path)
    assert back.config == config and back.discounts == model.discounts and repr(back) == repr(model) and back.nbytes == model.nbytes
    x = np.random.default_rng(0).integers(0, 12, (4, 20))
    assert torch.equal(back.token_log_probs(x), model.token_log_probs(x))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_files_that_are_no_models_and_tokenizers_that_do_not_fit(tmp_path):
    from safetensors.numpy import save_file

    words = Vocabulary(["<bos>", "<eos>", "a", "b"])
    model, path = NGram.fit([[0, 2, 3, 1]], 4, NGramConfig(2)), tmp_path / "model.safetensors"
    model.save(path, words)
    assert NGram.load(path, words).vocab_size == 4
    assert "has 4 words, the tokenizer 5" in message(NGram.load, path, Vocabulary(["<bos>", "<eos>", "a", "b", "c"]))
    assert "another tokenizer of the same size" in message(NGram.load, path, Vocabulary(["<bos>", "<eos>", "b", "a"]))
    model.save(path)  # without fingerprint: only the size is known
    NGram.load(path, Vocabulary(["<bos>", "<eos>", "b", "a"]))
    assert "There is no file" in message(NGram.load, tmp_path / "none")
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"not a model at all, but long enough to look like one"):
        path.write_bytes(data)
        assert "not a whole safetensors file" in message(NGram.load, path)
    save_file({"weight": np.zeros(3)}, tmp_path / "other.safetensors")
    assert "not an n-gram model" in message(NGram.load, tmp_path / "other.safetensors")


def test_the_ends_of_a_text_have_the_names_that_other_tools_ask_for(tmp_path):
    model = NGram.fit([[1, 3, 4, 2], [1, 4, 2]], 5, NGramConfig(3))
    for words in (["<pad>", "<bos>", "<eos>", "a", "b"], ["<pad>", "<s>", "</s>", "a", "b"]):
        model.write_arpa(tmp_path / words[1], words)
    ours, theirs = ((tmp_path / name).read_text() for name in ("<bos>", "<s>"))
    assert ours == theirs and "\t<s> a\t" in ours and "<bos>" not in ours and "<eos>" not in ours
    assert "must be different" in message(model.write_arpa, tmp_path / "x", ["<s>", "<bos>", "<eos>", "a", "b"])


PARTS = {
    "no keys": lambda arrays: arrays.pop("keys.2"),
    "no log_probs": lambda arrays: arrays.pop("log_probs.3"),
    "no log_backoffs": lambda arrays: arrays.pop("log_backoffs.1"),
    "shorter": lambda arrays: arrays.update({"log_probs.2": arrays["log_probs.2"][:-1]}),
    "shorter backoffs": lambda arrays: arrays.update({"log_backoffs.2": arrays["log_backoffs.2"][:-1]}),
    "another dtype": lambda arrays: arrays.update({"log_probs.2": arrays["log_probs.2"].astype(np.int32)}),
    "keys of floats": lambda arrays: arrays.update({"keys.2": arrays["keys.2"].astype(np.float64)}),
    "two dimensions": lambda arrays: arrays.update({"keys.3": arrays["keys.3"][None]}),
    "not sorted": lambda arrays: arrays.update({"keys.2": np.ascontiguousarray(arrays["keys.2"][::-1])}),
    "beyond": lambda arrays: arrays.update({"keys.3": arrays["keys.3"] + 10**9}),
    "negative": lambda arrays: arrays.update({"keys.2": arrays["keys.2"] - 10**9}),
    "no number": lambda arrays: arrays.update({"log_probs.1": arrays["log_probs.1"] * np.float32(np.nan)}),
    "more": lambda arrays: arrays.update({"keys.4": arrays["keys.3"]}),
    "no words": lambda arrays: arrays.update({name: array[:0] for name, array in arrays.items()}),
}
ABOUT = {
    "config": [None, "{", "[]", "{}x", '{"order": 3, "new": 1}', '{"order": 1000000000}', '{"order": "3"}', "[" * 100_000],
    "discounts": [None, "{", "3", "[3]"],
}
NOT_WHOLE: list = [*PARTS, *((name, value) for name, values in ABOUT.items() for value in values)]


@pytest.mark.parametrize("part", NOT_WHOLE, ids=lambda part: str(part)[:40])
def test_a_file_with_a_part_that_is_missing_or_does_not_fit_is_no_model(part, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model.safetensors"
    NGram.fit(corpus(), 12, NGramConfig(3)).save(path)
    arrays = load_file(path)
    with safe_open(path, "numpy") as file: about = dict(file.metadata())
    if isinstance(part, str): PARTS[part](arrays)
    elif part[1] is None: del about[part[0]]
    else: about[part[0]] = part[1]
    save_file(arrays, path, metadata=about)
    assert "no whole n-gram model" in message(NGram.load, path)


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    model, path = NGram.fit([[0, 1, 2]], 3, NGramConfig(2)), tmp_path / "model.safetensors"
    model.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(LanguageModelError, match="cannot be written: no space left"): model.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ---------------------------------------------------------------- sampling


def test_samples_have_the_probabilities_of_the_model():
    model = NGram.fit(corpus(8), 12, NGramConfig(2))
    for temperature in (1, .5):
        config = SamplingConfig(max_new_tokens=1, temperature=temperature, seed=0)
        drawn = np.bincount([new for [new] in generate(model, [[5]] * 4000, config)], minlength=12)
        p = (model.next_log_probs([5]).double() / temperature).softmax(0).numpy()
        assert (abs(drawn - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 1).all()


def test_sampling_ends_and_repeats():
    model = NGram.fit(corpus(8), 12, NGramConfig(3))
    one, two = (generate(model, [BOS], SamplingConfig(max_new_tokens=200, eos_id=EOS, seed=1))[0] for _ in range(2))
    assert one == two and EOS not in one[:-1] and (one[-1] == EOS or len(one) == 200)
    [greedy], text = generate(model, [BOS], SamplingConfig(max_new_tokens=20, temperature=0)), [BOS]
    for _ in range(20): text.append(int(model.next_log_probs(text).argmax()))
    assert greedy == text[1:]


# ---------------------------------------------------------------- vocabulary


def test_vocabulary():
    words = Vocabulary.of(["a b a", "c"])
    assert words.words == ["<bos>", "<eos>", "<unk>", "a", "b", "c"] and words.encode(" a  z\nc ", bos=True, eos=True) == [0, 3, 2, 5, 1]
    assert words.decode([3, 4]) == "a b" and (words.bos_id, words.eos_id, words.unk_id, words.vocab_size) == (0, 1, 2, 6)
    assert "'z' is not in the vocabulary, and there is no <unk>" in message(Vocabulary(["a", "b"]).encode, "a z")
    assert "'<bos>' is not in the vocabulary" in message(Vocabulary(["a", "b"]).encode, "a", bos=True)
    assert "once" in message(Vocabulary, ["a", "a"])


# ---------------------------------------------------------------- evaluation


class Network(nn.Module):
    "A small causal model whose every answer depends on all tokens before."

    def __init__(self, V: int = 12, C: int = 8):
        super().__init__()
        self.embed, self.read, self.out, self.dropout = nn.Embedding(V, C), nn.GRU(C, C, batch_first=True), nn.Linear(C, V), nn.Dropout(.5)

    def forward(self, ids): return self.out(self.dropout(self.read(self.embed(ids))[0]))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def alone(model: nn.Module, row: list[int]) -> np.ndarray:
    "The losses of one document in one pass."
    model.eval()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="none").double().numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_with_padding_equal_one_document_at_a_time(batch_size):
    model, rows = network(), [row for row in corpus(9) if len(row) > 1]
    found = evaluate(model, rows, batch_size=batch_size)
    assert found.tokens == sum(len(row) - 1 for row in rows)
    for nats, row in zip(found.token_nats, rows): np.testing.assert_allclose(nats, alone(model, row), atol=1e-5)
    long_window = evaluate(model, rows, context_length=64, batch_size=batch_size)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found.token_nats, long_window.token_nats))


@given(length=st.integers(2, 60), context_length=st.integers(2, 20), data=st.data())
def test_windows_score_each_token_once_with_enough_context(length, context_length, data):
    stride = data.draw(st.integers(1, context_length - 1))
    scored = []
    for begin, end, first in perplexity._windows(length, context_length, stride):
        assert 0 <= begin < end <= length and end - begin <= context_length
        for t in range(first, end):
            scored.append(t)
            assert t - begin >= min(t, context_length - stride)
    assert scored == list(range(1, length))


def test_a_window_is_what_the_model_would_say_of_it():
    "Each token's loss is that of a pass over its own window, nothing else."
    model, [row] = network(), corpus(10, n=1, longest=60)[:1]
    row = (row * 3)[:40]
    found = evaluate(model, [row], context_length=10, stride=4).token_nats[0]
    want = np.zeros(39)
    for begin, end, first in perplexity._windows(40, 10, 4):
        want[first - 1 : end - 1] = alone(model, row[begin:end])[first - begin - 1 :]
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not np.allclose(found, alone(model, row), atol=1e-3)  # the short window does matter to this model


def test_evaluation_counts_text_exactly():
    words = Vocabulary.of(["the tea is ready", "茶 好 了 🍵"])
    texts = ["the tea is 好", "茶 🍵", "", "the the unheard"]
    model = NGram.fit([words.encode(text, bos=True, eos=True) for text in texts[:2]], words.vocab_size, NGramConfig(2))
    found = evaluate(model, texts, words)
    assert found.characters == sum(map(len, texts)) and found.bytes == sum(len(text.encode()) for text in texts) and found.documents == 4
    assert found.document_tokens.tolist() == [5, 3, 1, 4] and found.unknown == 1
    rows = [words.encode(text, bos=True, eos=True) for text in texts]
    assert found.nats == pytest.approx(-sum(model.token_log_probs([row]).sum().item() for row in rows), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)
    assert found.perplexity == pytest.approx(math.exp(found.nats / 13))
    assert found.bits_per_character == pytest.approx(found.nats / math.log(2) / found.characters)
    assert evaluate(model, texts, words, eos=False).document_tokens.tolist() == [4, 2, 0, 3]
    assert "bits per byte" in repr(found)


def test_models_of_every_kind():
    net, rows = network().eval(), [row for row in corpus(9) if len(row) > 1][:5]
    want = evaluate(net, rows).nats
    kinds = [lambda ids: net(ids), lambda ids: (net(ids), "cache"), lambda ids: SimpleNamespace(logits=net(ids)),
             SimpleNamespace(token_log_probs=lambda ids: net(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]),
             lambda ids: net(ids).to(torch.bfloat16)]
    for kind, near in zip(kinds, (1e-6, 1e-6, 1e-6, 1e-6, 1e-2)): assert evaluate(kind, rows).nats == pytest.approx(want, rel=near)
    assert evaluate(net, [torch.tensor(row) for row in rows]).nats == evaluate(net, (np.array(row) for row in rows)).nats


def test_the_training_flag_and_gradients_are_as_before():
    net, rows = network(), corpus(9)
    net.train()
    first, second = evaluate(net, rows), evaluate(net, rows)
    assert net.training and net.dropout.training and first.nats == second.nats  # no dropout while it is measured
    assert all(p.grad is None for p in net.parameters())
    net.forward = lambda ids: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"): evaluate(net, rows)
    assert net.training
    net.eval()
    with pytest.raises(RuntimeError): evaluate(net, rows)
    assert not net.training


@pytest.mark.parametrize(("model", "documents", "options", "says"), [
    (network(), [], {}, "nothing to score in 0 documents"), (network(), [[3], []], {}, "none has two tokens"),
    (network(), ["text"], {}, "pass the model's tokenizer"), (network(), "text", {}, "a single text"),
    (network(), [[0, 1]], {"context_length": 1}, "context_length=1"),
    (network(), [[0, 1]], {"context_length": 4, "stride": 4}, "stride=4"), (network(), [[0, 1]], {"stride": 0}, "stride=0"),
    (network(), [[0, 1]], {"batch_size": 0}, "batch_size=0"), (lambda ids: ids, [[0, 1]], {}, "must give logits (B, T, V)"),
    (lambda ids: torch.zeros(*ids.shape, 3), [[0, 7]], {}, "The id 7 is no token: the documents' ids run from 0 to 2"),
    (lambda ids: "no", [[0, 1]], {}, "not str"),
    (lambda ids: torch.full((*ids.shape, 12), torch.nan), [[0, 1, 2]], {}, "NaN for token 1 of document 0"),
    (SimpleNamespace(token_log_probs=lambda ids: torch.zeros(ids.shape)), [[0, 1]], {}, "token_log_probs gave (1, 2)"),
    (network(), [[0, "a"]], {}, "whole numbers"),
])  # fmt: skip
def test_bad_evaluations_say_what_is_wrong(model, documents, options, says): assert says in message(evaluate, model, documents, **options)


def test_tokenizers_without_bos_or_eos():
    model, words = NGram.fit([[0, 1, 2]], 3, NGramConfig(2)), Vocabulary(["a", "b", "c"])
    assert "some are ids" in message(evaluate, model, ["a b", [0, 1]], words)
    bare = SimpleNamespace(encode=lambda text: [ord(c) - 97 for c in text])  # somebody else's tokenizer, without special tokens
    assert "no <bos>" in message(evaluate, model, ["ab"], bare)
    assert evaluate(model, ["abc"], bare, bos_id=2, eos_id=2).document_tokens.tolist() == [4]
    assert "no <bos>" in message(evaluate, model, ["a b"], words) and "no <eos>" in message(evaluate, model, ["a b"], words, bos_id=2)
    assert evaluate(model, ["a b"], words, bos_id=2, eos=False).tokens == 2
    assert evaluate(model, ["a b"], words, bos_id=2, eos_id=2).tokens == 3


def test_unknown_tokens_are_counted_and_not_compared_with_what_was_predicted():
    "A word that became <unk> costs little and says nothing: with a small vocabulary a model would seem to beat the floor."
    words, few = Vocabulary.of(["a b c d"]), Vocabulary.of(["a b"])
    texts, rows = ["a b c", "d a"], [few.encode(text, bos=True, eos=True) for text in ["a b c", "d a"]]
    model, small = (NGram.fit([w.encode(t, bos=True, eos=True) for t in texts], w.vocab_size, NGramConfig(2)) for w in (words, few))
    assert evaluate(small, texts, few).unknown == evaluate(small, rows, few).unknown == 2
    assert evaluate(small, rows).unknown is None and evaluate(model, texts, words).unknown == 0
    bare = SimpleNamespace(encode=few.encode)
    assert evaluate(small, texts, bare, bos_id=few.bos_id, eos_id=few.eos_id).unknown is None
    for pair in ((small, few, model, words), (model, words, small, few)):
        with pytest.raises(LanguageModelError, match="2 tokens of one of the two were <unk>"):
            evaluate(pair[0], texts, pair[1]).excess(evaluate(pair[2], texts, pair[3]))
    assert evaluate(small, texts, few).excess(evaluate(small, texts, few)).value == 0
    world = SmallWorld(SmallWorldConfig(limit=3))
    stories = list(world.texts("test", n=5))
    with pytest.raises(LanguageModelError, match="were <unk>"):
        hides = Vocabulary.of([stories[0]])
        some = NGram.fit([hides.encode(text, bos=True, eos=True) for text in stories], hides.vocab_size, NGramConfig(2))
        evaluate(some, stories, hides).excess(floor(world, stories), "documents")


def test_the_same_model_is_the_same_bytes(tmp_path):
    model, words = NGram.fit([[0, 1, 2], [0, 2, 1]], 3, NGramConfig(2)), Vocabulary(["a", "b", "c"])
    for i in range(20): model.save(tmp_path / str(i), words)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(20)}) == 1
    assert np.array_equal(NGram.load(tmp_path / "0", words).next_log_probs([1]), model.next_log_probs([1]))


def test_a_document_with_nothing_to_score_is_none():
    "It must neither make an error bar out of one document, nor narrow that of several."
    model = NGram.fit([[0, 1, 2]], 3, NGramConfig(2))
    assert math.isnan(evaluate(model, [[0, 1, 2], [0]]).standard_error)
    rows = [[0, 1, 2], [0, 2], [0, 2, 1, 1]]
    assert evaluate(model, [*rows, [0], [1]]).standard_error == evaluate(model, rows).standard_error > 0


def test_the_standard_error_is_that_of_the_bootstrap():
    dice = np.random.default_rng(0)
    level = dice.normal(3, 1, 300)  # documents differ
    found = Evaluation(tuple(dice.normal(mean, .5, dice.integers(5, 60)) for mean in level))
    draws = dice.integers(300, size=(2000, 300))
    scatter = (found.document_nats[draws].sum(1) / found.document_tokens[draws].sum(1)).std()
    assert found.standard_error == pytest.approx(scatter, rel=.1)
    assert found.standard_error > 2 * np.concatenate(found.token_nats).std() / found.tokens**.5  # what independent tokens would have
    assert math.isnan(Evaluation((np.ones(3),)).standard_error)


def test_excess_is_paired():
    dice = np.random.default_rng(0)
    base = [dice.normal(10, 5, 20) for _ in range(50)]
    a, b = Evaluation(tuple(x + .1 + dice.normal(0, .01, 20) for x in base)), Evaluation(tuple(base))
    gap = a.excess(b)
    assert gap.value == pytest.approx(.1, abs=.01) and gap.standard_error < .01 * a.standard_error
    assert a.excess(b, "documents").value == pytest.approx(2, abs=.2)
    assert "50 documents against 49" in message(a.excess, Evaluation(tuple(base[1:])))
    assert "the documents came as ids" in message(lambda: a.bits_per_byte) and "no unit='words'" in message(a.per, "words")
    sizes = np.full(50, 7)
    assert "differ in length" in message(Evaluation(tuple(base), sizes, sizes).excess, Evaluation(tuple(base), sizes, sizes + 1))


# ---------------------------------------------------------------- Small World


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_floor_is_the_grammars(lang):
    world = SmallWorld(SmallWorldConfig(limit=4))
    texts = list(world.texts("test", lang, 40))
    ground = floor(world, texts, lang)
    np.testing.assert_allclose(ground.document_nats, [-world.log_prob(text, lang) for text in texts])
    assert ground.bytes == sum(len(text.encode()) for text in texts)
    value, error = ground.per("documents")
    assert abs(value - world.expectations.nats) < 4 * error
    assert "not of this world" in message(floor, world, ["Ann sang."], lang)


@pytest.mark.parametrize("config", [SmallWorldConfig(limit=5), SmallWorldConfig(seed=3, talk=12, nested=6)])
def test_at_a_dependency_only_one_option_is_possible(config):
    world = SmallWorld(config)
    kinds = Counter()
    for text in world.texts("test", n=40):
        for place in dependencies(world, [text], get_args(DependencyKind)):
            kinds[place.kind] += 1
            assert text.startswith(place.prefix + place.options[0])
            assert len(set(place.options)) == len(place.options) and place.distance >= 1
            rest = text[len(place.prefix + place.options[0]) :]
            for wrong in place.options[1:]: assert world.log_prob(place.prefix + wrong + rest) == -math.inf, (place, rest)
            if place.kind == "place":  # things are hidden in every other spot of the list only
                spots = {row["en"] for row in world.grammar.lexicon["spot"] if row["half"] == "a"}
                assert {option.strip() for option in place.options} <= spots
    assert min(kinds[kind] for kind in get_args(DependencyKind)) >= 5, kinds
    assert "no English story" in message(dependencies, world, ["Ann sang."])


def test_only_the_kinds_that_are_asked_for():
    world = SmallWorld(SmallWorldConfig(limit=5))
    texts = list(world.texts("valid", n=20))
    every = dependencies(world, texts, get_args(DependencyKind))
    for kind in get_args(DependencyKind): assert dependencies(world, texts, [kind]) == [place for place in every if place.kind == kind]
    assert dependencies(world, texts) == [place for place in every if place.kind in ("agreement", "pronoun", "place")]
    assert "no kind='names'" in message(dependencies, world, texts, ["names"])


def test_what_is_named_again_by_hand():
    world = SmallWorld(SmallWorldConfig(limit=4))
    seen = set()
    for text in world.texts("test", n=60):
        for place in dependencies(world, [text], ["name", "object", "number", "town", "country"]):
            right = place.options[0].strip()
            if place.kind == "name": assert re.search(rf"\b{right}\b", place.prefix), place
            if place.kind == "town": assert f" {right}" in place.prefix or place.prefix.startswith(right)
            if place.kind == "number" and place.prefix.endswith(" had"):  # what is left is not written anywhere before: it is a difference
                n, m = (re.search(pattern, text)[1] for pattern in (r"had ([\w-]+) [\w ]+ for sale", r"asked for ([\w-]+) of"))
                [row] = [row for row in world.grammar.lexicon["take"] if row["of"] == n and row["en"] == m]
                assert right == row["rest"]
                decided = WORD.findall(place.prefix)[-place.distance]
                assert decided == m
                seen.add("rest")
            seen.add(place.kind)
    assert seen == {"name", "object", "number", "town", "country", "rest"}


def test_no_name_is_the_beginning_of_anything_else():
    "So where a sentence begins with a name, no other name can stand: names begin no other sentence, and objects are no jobs."
    lexicon = SmallWorld().grammar.lexicon
    starts = {form.split()[0].capitalize() for name in ("when", "sky", "event", "number") for form in (row["en"] for row in lexicon[name])}
    assert not starts & {row["en"] for row in lexicon["given"]}
    assert not {row["en"] for row in lexicon["object"]} & {row["en"] for row in lexicon["job"]}
    assert not {row["en"] for row in lexicon["hide"]} & {row["past"] for row in lexicon["deal"]}


def test_distances_by_hand():
    world = SmallWorld()
    text = next(text for text in world.texts("test") if " who " in text and "At last" in text)
    for place in dependencies(world, [text]):
        words = [word.lower() for word in WORD.findall(place.prefix)]
        tells = {"she", "he", "her", "his", "him"}
        if place.kind == "pronoun": assert not tells & set(words[len(words) - place.distance + 1 :])
        if place.kind == "pronoun" and tells & set(words):
            assert words[-place.distance] in tells or place.distance < words[::-1].index(next(w for w in words[::-1] if w in tells)) + 1
        if place.kind == "agreement" and place.distance == 1: assert words[-2] == "the" or words[-3] == "the"
        if place.kind == "place": assert place.prefix.endswith("looked") or place.prefix.endswith("was")


def test_a_choice_costs_what_the_options_are_worth():
    words = Vocabulary(["<bos>", "<eos>", "<unk>", "she", "he", "was", "glad"])
    places = [Dependency("pronoun", "was", (" she", " he"), 1), Dependency("place", "glad was", (" he glad", " she glad", " was glad"), 2)]
    uniform = SimpleNamespace(token_log_probs=lambda ids: torch.full((ids.shape[0], ids.shape[1] - 1), -math.log(7)))
    np.testing.assert_allclose(choice_nats(uniform, places, words), [math.log(2), math.log(3)], rtol=1e-6)
    model = NGram.fit([words.encode("was she glad was he glad was she", bos=True, eos=True)], 7, NGramConfig(2, "add_k", k=1))
    p = model.next_log_probs(words.encode("was")).exp()
    np.testing.assert_allclose(choice_nats(model, places[:1], words), [-math.log(p[3] / (p[3] + p[4]))], rtol=1e-5)
    letters = SimpleNamespace(bos_id=0, encode=lambda text: [len(text)])
    assert "joins the option" in message(choice_nats, uniform, places, letters)


# ---------------------------------------------------------------- as a whole


def test_importing_is_light():
    heavy = {"datasets", "matplotlib", "safetensors", "nltk", "pandas", "sentencepiece"}
    code = f"import sys, lmbook.perplexity; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_hundred_thousand_documents_take_no_quadratic_time():
    "If they did, this would take minutes."
    dice = np.random.default_rng(0)
    counts = count_ngrams((row for row in dice.integers(0, 1000, (100_000, 10))), 1000, 4)
    assert counts.tokens == 900_000
    assert evaluate(NGram.from_counts(counts, NGramConfig(3)), dice.integers(0, 1000, (20_000, 10)), batch_size=1000).tokens == 180_000


def test_wikitext(data_dir):
    "Real text: counts of a plain Counter, and the perplexity that the chapter reports."
    folder = data_dir / "wikitext2"
    lines = {name: (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1] for name in ("train", "valid", "test")}
    words = Vocabulary.of((line for part in lines.values() for line in part), specials=("<eos>",))
    train, test = ([words.eos_id, *(i for line in lines[name] for i in words.encode(line, eos=True))] for name in ("train", "test"))
    counts = count_ngrams([train], words.vocab_size, 5)
    grams, how_often = counts.table(3)
    assert dict(zip(map(tuple, grams.tolist()), how_often.tolist())) == Counter(zip(train, train[1:], train[2:]))
    assert evaluate(NGram.from_counts(counts, NGramConfig(5)), [test]).perplexity == pytest.approx(380.8, rel=1e-3)


# ---------------------------------------------------------------- nothing wrong in silence


def test_texts_of_another_world_are_refused_though_this_one_could_tell_them():
    small, large = SmallWorld(SmallWorldConfig(limit=2)), SmallWorld(SmallWorldConfig(limit=9))
    texts = list(small.texts("test", n=60))
    assert "other settings" in message(floor, large, texts)
    assert floor(large, texts, sample=False).documents == 60 and floor(small, texts).documents == 60
    assert "e**" in message(floor, large, texts[:4])
    assert floor(large, texts[:1]).documents == 1  # one could be chance
    own = list(large.texts("test", n=40))
    assert floor(large, own * 30).documents == 1200  # what is said twice is no further evidence


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_two_stories_of_a_small_world_are_told_from_the_default_one(lang):
    world, small = SmallWorld(), SmallWorld(SmallWorldConfig(limit=3))
    two = list(small.texts("test", lang, n=2))
    assert world.smaller_world(two, lang)[0] <= 3
    assert "of limit=3 than in this one" in message(floor, world, two, lang)
    assert "of limit=3 than in this one" in message(floor, world, list(small.texts("test", lang, n=200)), lang)
    assert floor(world, two, lang, sample=False).documents == floor(small, two, lang).documents == 2
    own = list(world.texts("test", lang, n=300, start=500))
    assert max(world.smaller_world(own[i : i + 3], lang)[1] for i in range(0, 300, 3)) < 10  # 20.7 are needed


def test_what_a_smaller_world_is_and_how_much_likelier():
    "By definition: the log-probabilities in both worlds, less the price of having looked for the limit."
    world, small = SmallWorld(SmallWorldConfig(limit=9)), SmallWorld(SmallWorldConfig(limit=2))
    texts = list(small.texts("valid", n=4))
    gain = sum(small.log_prob(text) - world.log_prob(text) for text in texts)
    assert world.smaller_world(texts) == (2, pytest.approx(gain - math.log(9), abs=1e-6)) and gain > 10
    assert small.smaller_world(texts)[1] == 0
    with pytest.raises(SmallWorldError, match="no story of this world"): world.smaller_world(["Ann sang."])


def test_a_story_beyond_the_limit_is_refused_by_itself():
    large, small = SmallWorld(), SmallWorld(SmallWorldConfig(limit=2))
    for text in large.texts("test", n=5): assert "Text 0 is not of this world" in message(floor, small, [text], sample=False)


def test_another_seed_is_no_other_world():
    one, other = SmallWorld(SmallWorldConfig(0, 4)), SmallWorld(SmallWorldConfig(7, 4))
    texts = list(other.texts("test", n=40))
    assert floor(one, texts).nats == floor(other, texts).nats


def test_documents_are_told_by_what_they_hold_not_by_their_length():
    world = SmallWorld(SmallWorldConfig(limit=3))
    texts = list(world.texts("test", n=6))
    model = NGram.fit([[0, 1, 2]], 3, NGramConfig(2))
    def scored(rows: list) -> Evaluation: return evaluate(model, rows)

    rows = [[0, 1, 2, 1], [0, 2, 2, 1]]
    assert scored(rows).excess(scored([list(row) for row in rows])).value == 0
    for others in ([rows[1], rows[0]], [[0, 1, 2, 2], rows[1]]):
        assert "The ids of document 0 differ" in message(scored(rows).excess, scored(others))
    ground = floor(world, texts)
    assert "Document 0 is another one" in message(ground.excess, floor(world, texts[::-1]), "documents")
    letters = SimpleNamespace(encode=lambda text: [2 for _ in text.split()])
    pair = [evaluate(model, [text], letters, bos_id=0, eos_id=1) for text in ("x y", "y x")]
    assert "Document 0 is another one" in message(pair[0].excess, pair[1])


def test_the_floor_says_sentences():
    world = SmallWorld(SmallWorldConfig(limit=2))
    ground = floor(world, world.texts("test", n=3))
    assert "nats per sentence" in repr(ground) and f"{ground.tokens:,} sentences" in repr(ground)
    assert "nats per token" in repr(Evaluation((np.ones(3),))) and "3 tokens" in repr(Evaluation((np.ones(3),)))


def test_documents_that_came_as_ids_are_not_compared_with_texts():
    world = SmallWorld(SmallWorldConfig(limit=2))
    ground, ids = floor(world, world.texts("test", n=3)), Evaluation((np.ones(3),) * 3)
    for a, b in ((ids, ground), (ground, ids)): assert "one as ids" in message(a.excess, b, "documents")
    assert ids.excess(ids).value == 0


class Sentences:
    "A tokenizer whose tokens are sentences, and a model that knows what the grammar pays for each."

    bos_id, eos_id, unk_id, pad_id, mask_id = 0, None, None, None, None

    def __init__(self, world: SmallWorld, lang: str):
        self.world, self.lang, self.log_p, self.known = world, lang, [0.0], {}

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            parts = self.world.sentence_log_probs(text, self.lang)
            self.known[text] = list(range(len(self.log_p), len(self.log_p) + len(parts)))
            self.log_p += parts
        return self.known[text]

    def token_log_probs(self, ids: torch.Tensor) -> torch.Tensor: return torch.tensor(self.log_p, dtype=torch.float64)[ids[:, 1:]]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_an_oracle_sits_on_the_floor(lang):
    "Whoever knows the grammar pays the floor, and nothing more or less, through the same `evaluate` as every model."
    world = SmallWorld(SmallWorldConfig(limit=3))
    texts, oracle = list(world.texts("test", lang, 30)), Sentences(world, lang)
    gap = evaluate(oracle, texts, oracle, eos=False, bos_id=0).excess(floor(world, texts, lang), "documents")
    assert abs(gap.value) < 1e-12 and gap.standard_error < 1e-12


def test_documents_without_a_scored_token_do_not_narrow_the_error():
    "Planted: the number of all rows in place of those that hold something."
    from lmbook.perplexity import _ratio

    x, y = np.array([1.0, 4.0, 2.0]), np.array([2.0, 3.0, 2.0])
    assert _ratio(np.append(x, [0.0] * 9), np.append(y, [0.0] * 9)) == _ratio(x, y)
