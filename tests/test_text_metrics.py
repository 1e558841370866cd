"""Metrics of texts against sacrebleu, rouge-score and jiwer, on random and hostile texts; published examples; bad input; faults."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

import lmbook.text_metrics as tm
from lmbook.core import LmbookError
from lmbook.evaluation import EvaluationError, Score
from lmbook.text_metrics import (
    answer_f1,
    bert_score,
    bleu,
    bleu_tokens,
    cer,
    chrf,
    edit_distance,
    edit_path,
    embedding_similarity,
    exact_match,
    lcs_length,
    normalize_answer,
    porter_stem,
    rouge,
    rouge_tokens,
    sentence_vectors,
    ter,
    token_vectors,
    wer,
)  # fmt: skip
from lmbook.tokenization import ByteTokenizer
from lmbook.transformer import Transformer, TransformerConfig

sacrebleu = pytest.importorskip("sacrebleu.metrics")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
jiwer = pytest.importorskip("jiwer")
logging.getLogger("sacrebleu").setLevel(logging.ERROR)

# Pieces that tokenizers stumble over: entities, numbers with stops, dashes at ends of lines, Chinese, full-width forms, many spaces.
PIECES = [
    "the", "cat", "cat", "sat", "mat", "a", "The", "don't", "'s", "1,000.5", "3-4", "U.S.", "x.", "..", ".", ",", "-", "(hi)", "$5", "%",
    "~", "`", "&quot;", "&amp;lt;", "&lt;", "<skipped>", "-\n", "\n", "\t", "\r", "\x0b", "\x85", "\u2009", "\u3000", " ",
    "中文", "一", "把",
    "。", "，", "“", "—", "…", "🙂", "é", "€", "½", "²", "１", "ａ", "ひらがな", "カ", "𠀀", "running", "flies", "state-of-the-art",
]  # fmt: skip
TEXT = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([" ", " ", ""])), max_size=14).map(lambda x: "".join(map("".join, x)))


@st.composite
def systems(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    "Predictions with one to three references each; most predictions are a reference with words changed, moved or left out."
    n, many = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    wanted = [[draw(TEXT) for _ in range(many)] for _ in range(n)]
    said = []
    for right in wanted:
        words = draw(st.sampled_from(right)).split(" ")
        for _ in range(draw(st.integers(0, 3))):
            i, j = draw(st.integers(0, len(words))), draw(st.integers(0, len(words)))
            kind = draw(st.sampled_from(["move", "put", "drop"]))
            piece = words[i : i + 2]
            if kind != "put": del words[i : i + 2]
            words[j:j] = piece if kind == "move" else [draw(st.sampled_from(PIECES))] if kind == "put" else []
        said.append(draw(st.one_of(st.just(" ".join(words)), TEXT)))
    return said, wanted


def corpus(seed: int, n: int, many: int = 1) -> tuple[list[str], list[list[str]]]:
    "The same without hypothesis, for thousands of pairs: short nasty texts, some empty, most predictions a reference that was damaged."
    rng = random.Random(seed)
    sizes = [0, 1, 2, 3, 4, 5, 6, 8, 10, 14]

    def text() -> str: return "".join(rng.choice(PIECES) + rng.choice([" ", " ", ""]) for _ in range(rng.choice(sizes)))

    said, wanted = [], []
    for _ in range(n):
        wanted.append([text() for _ in range(rng.randint(1, many))])
        words = rng.choice(wanted[-1]).split(" ")
        for _ in range(rng.randrange(4)):
            i, j, kind = rng.randrange(len(words) + 1), rng.randrange(len(words) + 1), rng.choice(["move", "put", "drop"])
            piece = words[i : i + 2]
            if kind != "put": del words[i : i + 2]
            words[j:j] = piece if kind == "move" else [rng.choice(PIECES)] if kind == "put" else []
        said.append(" ".join(words) if rng.random() < 0.8 else text())
    assert "" in said and ["" for right in wanted if "" in right]
    return said, wanted


def equal(ours: np.ndarray, theirs: list[float], said: list[str], wanted: list[list[str]]) -> None:
    "All scores of sentences; the worst pair is shown where they differ."
    apart = np.abs(np.asarray(ours) - np.array(theirs))
    assert apart.max() < 1e-9, (said[int(apart.argmax())], wanted[int(apart.argmax())])


def hypothesis(cases: int):
    return settings(max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def close(ours: float, theirs: float) -> None: assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------- sacrebleu


@hypothesis(200)
@given(systems(), st.sampled_from(["13a", "intl", "zh", "char", "none"]), st.sampled_from(["exp", "floor", "add-k", "none"]),
       st.sampled_from([None, 0.3]), st.booleans(), st.booleans(), st.sampled_from([4, 4, 2, 6]))  # fmt: skip
def test_bleu_is_sacrebleus(texts, tokenize, smooth, value, effective, lowercase, order):
    said, wanted = texts
    options = {"tokenize": tokenize, "smooth_method": smooth, "smooth_value": value, "lowercase": lowercase, "max_ngram_order": order}
    theirs = sacrebleu.BLEU(**options, effective_order=effective).corpus_score(said, [list(x) for x in zip(*wanted)])
    ours = bleu(said, wanted, tokenize=tokenize, smooth=smooth, smooth_value=value, effective_order=effective, lowercase=lowercase,
                max_order=order)  # fmt: skip
    close(ours.value, theirs.score)
    close(ours.details["brevity_penalty"], theirs.bp)
    assert (ours.details["length"], ours.details["reference_length"]) == (theirs.sys_len, theirs.ref_len)
    if ours.value: np.testing.assert_allclose(ours.details["precisions"], theirs.precisions, rtol=1e-9)
    alone = sacrebleu.BLEU(**options, effective_order=True)
    for item, text, right in zip(ours.items, said, wanted): close(item, alone.sentence_score(text, right).score)


@hypothesis(200)
@given(systems(), st.sampled_from([6, 6, 2]), st.sampled_from([0, 1, 2]), st.sampled_from([2, 1, 3]), *[st.booleans()] * 3)
def test_chrf_is_sacrebleus(texts, char_order, word_order, beta, lowercase, whitespace, eps_smoothing):
    said, wanted = texts
    options = {"char_order": char_order, "word_order": word_order, "beta": beta, "lowercase": lowercase, "whitespace": whitespace,
               "eps_smoothing": eps_smoothing}  # fmt: skip
    theirs, ours = sacrebleu.CHRF(**options), chrf(said, wanted, **options)
    close(ours.value, theirs.corpus_score(said, [list(x) for x in zip(*wanted)]).score)
    for item, text, right in zip(ours.items, said, wanted): close(item, theirs.sentence_score(text, right).score)


@hypothesis(200)
@given(systems(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_ter_is_sacrebleus(texts, normalized, no_punct, asian_support, case_sensitive):
    said, wanted = texts
    options = {"normalized": normalized, "no_punct": no_punct, "asian_support": asian_support, "case_sensitive": case_sensitive}
    theirs, ours = sacrebleu.TER(**options), ter(said, wanted, **options)
    close(ours.value, theirs.corpus_score(said, [list(x) for x in zip(*wanted)]).score)
    for item, text, right in zip(ours.items, said, wanted): close(item, theirs.sentence_score(text, right).score)


THOUSANDS = 3000  # pairs for each setting below


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize(("tokenize", "smooth", "lowercase"), [
    ("13a", "exp", False), ("13a", "floor", True), ("13a", "add-k", False), ("13a", "none", False), ("intl", "exp", False),
    ("zh", "exp", False), ("zh", "floor", False), ("char", "exp", True), ("char", "add-k", False), ("none", "exp", False),
])  # fmt: skip
def test_bleu_of_thousands_of_pairs(tokenize, smooth, lowercase, many):
    said, wanted = corpus(many, THOUSANDS, many)
    theirs = sacrebleu.BLEU(tokenize=tokenize, smooth_method=smooth, lowercase=lowercase, effective_order=True)
    ours = bleu(said, wanted, tokenize=tokenize, smooth=smooth, lowercase=lowercase)
    equal(ours.items, [theirs.sentence_score(text, right).score for text, right in zip(said, wanted)], said, wanted)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("options", [{}, {"word_order": 2}, {"word_order": 2, "lowercase": True}, {"whitespace": True}, {"beta": 3},
                                     {"word_order": 1, "eps_smoothing": True}], ids=str)  # fmt: skip
def test_chrf_of_thousands_of_pairs(options, many):
    said, wanted = corpus(10 + many, THOUSANDS, many)
    theirs = sacrebleu.CHRF(**options)
    expected = [theirs.sentence_score(text, right).score for text, right in zip(said, wanted)]
    equal(chrf(said, wanted, **options).items, expected, said, wanted)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("options", [{}, {"normalized": True}, {"normalized": True, "asian_support": True},
                                     {"no_punct": True, "asian_support": True}, {"case_sensitive": True, "no_punct": True}],
                         ids=lambda options: "+".join(options))  # fmt: skip
def test_ter_of_thousands_of_pairs(options, many):
    said, wanted = corpus(20 + many, THOUSANDS, many)
    theirs = sacrebleu.TER(**options)
    expected = [theirs.sentence_score(text, right).score for text, right in zip(said, wanted)]
    equal(ter(said, wanted, **options).items, expected, said, wanted)


@pytest.mark.parametrize("seed", range(2))
def test_ter_of_long_texts_meets_the_limits_of_tercom(seed):
    "Beyond 25 words its beam matters, and beyond some length it stops trying shifts."
    rng = random.Random(seed)
    for length, kinds in ((30, 40), (56, 90)):
        right = [str(rng.randrange(kinds)) for _ in range(length)]
        ours = right[length // 3 :] + right[: length // 3] if seed % 2 else right[: length // 2 + rng.randrange(length // 2)]
        for _ in range(length // 6): ours[rng.randrange(len(ours))] = str(rng.randrange(kinds))
        a, b = " ".join(ours), " ".join(right)
        close(ter([a], [b]).value, sacrebleu.TER().sentence_score(a, [b]).score)
        close(ter([b], [a]).value, sacrebleu.TER().sentence_score(b, [a]).score)


def test_different_numbers_of_references():
    said, wanted = ["the cat sat", "a dog"], [["the cat sat down", "a cat sat"], ["a dog ran"]]
    streams = [["the cat sat down", "a dog ran"], ["a cat sat", None]]
    close(bleu(said, wanted).value, sacrebleu.BLEU().corpus_score(said, streams).score)
    close(chrf(said, wanted).value, sacrebleu.CHRF().corpus_score(said, streams).score)
    close(ter(said, wanted).value, sacrebleu.TER().corpus_score(said, streams).score)
    assert bleu(said, wanted).details["signature"].startswith("nrefs:var|")


# ---------------------------------------------------------------- rouge-score

KINDS = ["rouge1", "rouge2", "rouge3", "rouge4", "rougeL", "rougeLsum"]


@hypothesis(100)
@given(systems(), st.booleans())
def test_rouge_is_rouge_scores(texts, stem):
    said, wanted = texts
    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=stem)
    theirs = [scorer.score_multi(right, text) for text, right in zip(said, wanted)]
    for kind in KINDS:
        ours = rouge(said, wanted, kind, stem=stem)
        np.testing.assert_allclose(ours.items, [row[kind].fmeasure for row in theirs], atol=1e-12)
        means = [np.mean([getattr(row[kind], name) for row in theirs]) for name in ("precision", "recall")]
        np.testing.assert_allclose([ours.details["precision"], ours.details["recall"]], means, atol=1e-12)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_thousands_of_pairs(stem, many):
    said, wanted = corpus(30 + many, THOUSANDS, many)
    said, wanted = ([text.replace("a", "running").replace("€", "\n") for text in said],
                    [[text.replace("The", "runs").replace("€", "\n") for text in right] for right in wanted])  # fmt: skip
    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=stem)
    theirs = [scorer.score_multi(right, text) for text, right in zip(said, wanted)]
    for kind in KINDS: equal(rouge(said, wanted, kind, stem=stem).items, [row[kind].fmeasure for row in theirs], said, wanted)
    assert sum("\n" in text.strip() for text in said) > 100


@hypothesis(150)
@given(*[st.lists(st.lists(st.sampled_from("abcd"), max_size=7), max_size=4)] * 2)
def test_rouge_of_summaries_of_many_sentences(ours, theirs):
    a, b = ("\n".join(" ".join(sentence) for sentence in text) for text in (ours, theirs))
    expected = rouge_scorer.RougeScorer(["rougeLsum"]).score(b, a)["rougeLsum"].fmeasure
    close(rouge([a], [b], "rougeLsum").value, expected)


ENDINGS = ["", "s", "es", "ies", "ied", "ed", "eed", "ing", "izing", "bling", "ational", "alli", "fulli", "logi",
           "ness", "ment", "ement", "ion",
           "e", "y", "ll", "ative", "able"]  # fmt: skip


@hypothesis(1000)
@given(st.text("aeiouyyslbtzdgnlicmefrxw1", max_size=8), st.sampled_from(ENDINGS))
def test_stems_are_nltks(word, ending):
    assert porter_stem(word + ending) == PorterStemmer().stem(word + ending)


def test_stems_of_real_words_are_nltks():
    from lmbook.small_world import SmallWorld

    theirs = PorterStemmer()
    words = set(re.findall("[a-z]+", " ".join(SmallWorld().texts("train", "en", 150)).lower())) | set(tm._KEPT)
    assert len(words) > 1000
    for word in words: assert porter_stem(word) == theirs.stem(word)


def test_chinese_counts_only_when_it_is_asked_for():
    assert rouge_tokens(["警察 Killed 1 枪手!", "\0a\0"]) == [["killed", "1"], ["a"]]
    assert rouge_tokens(["警察 Killed 1 枪手!"], chinese=True) == [["警", "察", "killed", "1", "枪", "手"]]
    assert rouge_tokens([]) == []
    assert rouge_tokens(["It was his, runs"], stem=True) == [["it", "was", "his", "run"]] and porter_stem("was") == "wa"
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    assert scorer.score("警察", "警察")["rougeL"].fmeasure == rouge(["警察"], ["警察"]).value == 0
    assert rouge(["警察"], ["警察"], chinese=True).value == 1


# ---------------------------------------------------------------- jiwer, and edits


@hypothesis(200)
@given(systems())
def test_error_rates_are_jiwers(texts):
    said, wanted = texts
    right = [" ".join(options[0].split()) for options in wanted]
    said = [" ".join(text.split()) for text in said]
    for ours, theirs in ((wer(said, right), jiwer.process_words(right, said)), (cer(said, right), jiwer.process_characters(right, said))):
        close(ours.value, theirs.wer if hasattr(theirs, "wer") else theirs.cer)
        assert ours.details == {name: getattr(theirs, name) for name in ("substitutions", "deletions", "insertions", "hits")}


@pytest.mark.parametrize("seed", range(2))
def test_error_rates_of_thousands_of_pairs(seed):
    said, wanted = corpus(40 + seed, THOUSANDS)
    said, right = [" ".join(text.split()) for text in said], [" ".join(text.split()) for [text] in wanted]
    words, letters = (
        [process([b], [a]) for a, b in zip(said, right)] for process in (jiwer.process_words, jiwer.process_characters)
    )
    for ours, theirs, rate in ((wer(said, right), words, "wer"), (cer(said, right), letters, "cer")):
        equal(ours.items, [getattr(row, rate) for row in theirs], said, wanted)
        for kind in ("substitutions", "deletions", "insertions", "hits"):
            assert ours.details[kind] == sum(getattr(row, kind) for row in theirs)
    close(wer(said, right).value, jiwer.wer(right, said))
    close(cer(said, right).value, jiwer.cer(right, said))
    padded = [[" " * (i % 3) + text + " " * (i % 2) for i, text in enumerate(texts)] for texts in (said, right)]
    close(cer(*padded).value, jiwer.cer(padded[1], padded[0]))  # spaces at the ends do not count
    close(wer(*padded).value, jiwer.wer(padded[1], padded[0]))
    assert cer([" ab "], ["ab"]).value == 0 < cer(["a  b"], ["a b"]).value


LETTERS = st.text("abc", max_size=12)


@hypothesis(500)
@given(LETTERS, LETTERS)
def test_edits_and_common_subsequences_by_the_table(a, b):
    D, L = np.zeros((len(a) + 1, len(b) + 1), int), np.zeros((len(a) + 1, len(b) + 1), int)
    D[0], D[:, 0] = np.arange(len(b) + 1), np.arange(len(a) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            D[i, j] = min(D[i - 1, j] + 1, D[i, j - 1] + 1, D[i - 1, j - 1] + (x != y))
            L[i, j] = L[i - 1, j - 1] + 1 if x == y else max(L[i - 1, j], L[i, j - 1])
    assert edit_distance(a, b) == edit_distance(list(a), list(b)) == D[-1, -1]
    assert lcs_length(a, b) == L[-1, -1]
    path = edit_path(a, b)
    assert sum(kind != "equal" for kind, *_ in path) == D[-1, -1]
    rebuilt = "".join({"equal": a[i : i + 1], "delete": ""}.get(kind, b[j : j + 1]) for kind, i, j in path)
    assert rebuilt == b and all(a[i] == b[j] for kind, i, j in path if kind == "equal")


def test_longer_than_a_machine_word():
    rng = random.Random(0)
    a = [rng.choice("abcdefgh") for _ in range(700)]
    b = [x for x in a if rng.random() > 0.1] + ["z"] * 9
    assert edit_distance(a, b) == 700 - len(b) + 9 + 9 and lcs_length(a, b) == len(b) - 9


# ---------------------------------------------------------------- published examples


def test_published_examples():
    jokes = (["does this sentence match??", "what about this sentence?", "What did the TER metric user say to the developer?"],
             [["does this sentence match", "does this sentence match!?!"], ["wHaT aBoUt ThIs SeNtEnCe?", "wHaT aBoUt ThIs SeNtEnCe?"],
              ["Your jokes are...", "...TERrible"]])  # fmt: skip
    score = ter(*jokes, case_sensitive=True)  # of the metric card of Hugging Face's evaluate
    assert (score.value, score.details) == (150.0, {"edits": 15, "reference_words": 10.0})
    dogs = [["The dog bit the man.", "The dog had bit the man."], ["It was not unexpected.", "No one was surprised."],
            ["The man bit him first.", "The man had bitten the dog."]]  # fmt: skip
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]  # of sacrebleu's page
    assert round(bleu(said, dogs).value, 2) == 48.53
    assert chrf(said, dogs).value == pytest.approx(59.73, abs=0.005) and chrf(said, dogs).name == "chrF"
    assert rouge(["police kill the gunman"], ["police killed the gunman"]).value == 0.75  # Lin 2004
    assert wer(["hello duck"], ["hello world"]).value == 0.5  # jiwer's page
    assert porter_stem("relational") == "relat" and edit_distance("kitten", "sitting") == 3


def test_answers_by_the_definition():
    assert normalize_answer("  The  Cat's, an A-B!") == "cats ab"
    score = answer_f1(["the cat sat", "", "a the"], [["cat", "a cat sat down"], ["x"], [""]])
    assert score.items.tolist() == [pytest.approx(0.8), 0, 0]  # v1.1: two empty answers share no word
    assert exact_match(["The cat!", "a the", "x"], [["dog", "cat"], [""], ["y"]]).items.tolist() == [1, 1, 0]

    def by_hand(a: str, b: str) -> float:
        ours, theirs = Counter(normalize_answer(a).split()), Counter(normalize_answer(b).split())
        same = (ours & theirs).total()
        return 2 * same / (ours.total() + theirs.total()) if same else 0.0

    rng = random.Random(0)
    texts = [" ".join(rng.choices(PIECES, k=rng.randrange(6))) for _ in range(400)]
    np.testing.assert_allclose(answer_f1(texts[:200], texts[200:]).items, [by_hand(a, b) for a, b in zip(texts, texts[200:])], atol=1e-12)


# ---------------------------------------------------------------- one shape, in chunks, with several references

METRICS = {
    "exact_match": exact_match, "answer_f1": answer_f1, "wer": wer, "cer": cer, "ter": ter, "bleu": bleu, "chrf": chrf,
    "chrf++": partial(chrf, word_order=2), "rouge": rouge, "rouge2": partial(rouge, kind="rouge2"),
    "rougeLsum": partial(rouge, kind="rougeLsum"),
    "cosine": partial(embedding_similarity, embed=lambda texts: np.array([[len(t), t.count("a") + 1] for t in texts])),
    "bert": partial(bert_score, embed=lambda texts: [np.array([[ord(c), 1, i] for i, c in enumerate(t)]).reshape(-1, 3) for t in texts]),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_sums_decide_the_value(name):
    rng = random.Random(1)
    texts = [" ".join(rng.choices(PIECES[:20], k=rng.randrange(2, 12))) for _ in range(60)]
    score = METRICS[name](texts[:30], texts[30:])
    assert isinstance(score, Score) and score.n == 30 == len(score.items) == len(score.stats) and np.isfinite(score.error)
    close(score.value, float(score.combine(score.stats.sum(0))))
    half = METRICS[name](texts[:15] * 2, texts[30:45] * 2)  # a resample: the first fifteen items twice each
    weights = np.r_[np.full(15, 2.0), np.zeros(15)]
    close(half.value, float(score.resample(weights)[0]))
    stacked = score.combine(np.stack([weights, weights]) @ score.stats)
    assert stacked.shape == (2,)


@pytest.mark.parametrize("name", METRICS)
def test_a_text_is_like_itself(name):
    texts = ["The cat sat on the mat.", "police killed the gunman", "It was cold, and 3 dogs ran."]
    best = {"wer": 0, "cer": 0, "ter": 0, "bleu": 100, "chrf": 100, "chrf++": 100}.get(name, 1)
    close(METRICS[name](texts, texts).value, best)
    close(METRICS[name](texts, [["nothing of it", text] for text in texts]).value, best)


def test_chunks_change_nothing(monkeypatch):
    rng = random.Random(2)
    texts = [" ".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(90)]
    wanted = [texts[30 + i : 30 + i + rng.randrange(1, 3)] for i in range(30)]
    before = [bleu(texts[:30], wanted).stats, chrf(texts[:30], wanted).stats]
    monkeypatch.setattr(tm, "_CHUNK", 7)
    for old, new in zip(before, [bleu(texts[:30], wanted).stats, chrf(texts[:30], wanted).stats]): np.testing.assert_array_equal(old, new)


def test_numbers_of_n_grams_do_not_overflow():
    rng = random.Random(3)
    ours = [[str(rng.randrange(2000)) for _ in range(40)] for _ in range(50)]
    theirs = [words[:20] + [str(rng.randrange(2000)) for _ in range(20)] for words in ours]
    found = tm._overlaps(ours, theirs, np.arange(50), 9)
    for row, a, b in zip(found, ours, theirs):
        for n in range(1, 10):
            grams = [Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (a, b)]
            assert row[n - 1] == (grams[0] & grams[1]).total()


# ---------------------------------------------------------------- vectors


def test_vectors_of_an_encoder():
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = Transformer(TransformerConfig(tokenizer.vocab_size, d_model=16, n_layer=1, n_head=2, context_length=12, kind="encoder")).eval()
    texts = ["a cat", "", "something that is longer than twelve bytes"]
    vectors = token_vectors(model, tokenizer, texts, batch_size=2, ends=True)
    assert [len(v) for v in vectors] == [min(12, len(tokenizer.encode(t, bos=True, eos=True))) for t in texts]
    for text, v in zip(texts, vectors): np.testing.assert_allclose(token_vectors(model, tokenizer, [text], ends=True)[0], v, atol=1e-5)
    means = sentence_vectors(model, tokenizer, texts)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)
    assert sentence_vectors(model, tokenizer, []).shape == (0, 16)
    np.testing.assert_allclose(means[0], vectors[0].mean(0) / np.linalg.norm(vectors[0].mean(0)), atol=1e-5)  # <bos> and <eos> count
    same = bert_score(texts, texts, partial(token_vectors, model, tokenizer))
    np.testing.assert_allclose(same.items, [1, 0, 1], atol=1e-6)  # an empty text has no token left: 0, as in the paper's program
    close(round(embedding_similarity(texts, texts, partial(sentence_vectors, model, tokenizer)).value, 6), 1)


def test_precision_is_of_ours_and_recall_of_theirs():
    vectors = {"x": np.eye(2)[:1], "x y": np.eye(2)}
    score = bert_score(["x y"], ["x"], lambda texts: [vectors[text] for text in texts])
    assert (score.details["precision"], score.details["recall"]) == (0.5, 1.0)
    for metric in (answer_f1, rouge): assert metric(["x y"], ["x"]).details == score.details


class _NoEnds(ByteTokenizer):
    bos_id = eos_id = None


def test_special_tokens_are_read_and_take_no_part_in_the_match():
    """In the paper's program (bert_score, read at commit cb582ed) [CLS] and [SEP] weigh 0 in both means: without weights by rarity because
    `score` sets them so, with them because both stand in every reference and log((N + 1) / (N + 1)) is 0. There a word may still pick one
    of them as its partner; here it may not."""
    torch.manual_seed(1)
    tokenizer = ByteTokenizer()
    model = Transformer(TransformerConfig(tokenizer.vocab_size, d_model=16, n_layer=1, n_head=2, context_length=9, kind="encoder")).eval()
    texts = ["a cat", "the cat", "sevenby", "eight by", "more than nine"]
    whole, inside = token_vectors(model, tokenizer, texts, ends=True), token_vectors(model, tokenizer, texts)
    for text, with_ends, without in zip(texts, whole, inside):
        cut = len(tokenizer.encode(text)) + 2 > 9  # then <eos> has gone
        np.testing.assert_array_equal(without, with_ends[1:] if cut else with_ends[1:-1])
    assert [len(v) for v in inside] == [5, 7, 7, 8, 8]

    def by_hand(ours: np.ndarray, theirs: np.ndarray, candidates: slice) -> float:
        ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs))
        similar, inner = ours @ theirs.T, slice(1, -1)
        p, r = similar[inner, candidates].max(1).mean(), similar[candidates, inner].max(0).mean()
        return 2 * p * r / (p + r)

    embed = partial(token_vectors, model, tokenizer)
    score = bert_score(texts[:1], texts[1:2], embed)
    assert score.value == pytest.approx(by_hand(whole[0], whole[1], slice(1, -1)), abs=1e-6)
    assert score.value != pytest.approx(bert_score(texts[:1], texts[1:2], partial(embed, ends=True)).value, abs=1e-4)
    assert by_hand(whole[0], whole[1], slice(None)) >= score.value - 1e-6  # the program's: more candidates, so never less

    plain = _NoEnds()  # a tokenizer without special tokens: nothing to leave out
    for ends in (True, False): assert [len(v) for v in token_vectors(model, plain, ["a cat", "more than nine"], ends=ends)] == [5, 9]
    assert token_vectors(model, plain, [""])[0].shape == (0, 16)


# ---------------------------------------------------------------- bad input

TAKES_TEXTS = [exact_match, answer_f1, wer, cer, ter, bleu, chrf, rouge]


@pytest.mark.parametrize("metric", TAKES_TEXTS)
@pytest.mark.parametrize(("said", "wanted", "says"), [
    ("text", ["text"], "give a list"), (["a"], "a", "give a list"), ([b"a"], ["a"], "decode"), (["a"], [b"a"], "decode"),
    (["a"], [[b"a"]], "decode"),
    (["a", "b"], ["a"], "2 predictions and 1 references"), ([], [], "nothing to score"), (["a"], [[]], "has no reference"),
    ([1], ["a"], "int"), ([None], ["a"], "NoneType"), (["a"], [None], "NoneType"), (["a"], [[float("nan")]], "float"),
    (3, ["a"], "give a list"),
])  # fmt: skip
def test_what_is_no_pair_of_texts_is_one_clear_error(metric, said, wanted, says):
    with pytest.raises(EvaluationError, match=says): metric(said, wanted)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: bleu(["a"], ["a"], tokenize="13"), "Did you mean '13a'"), (lambda: bleu(["a"], ["a"], smooth="addk"), "Did you mean 'add-k'"),
    (lambda: bleu(["a"], ["a"], smooth="floor", smooth_value=-1), "smooth_value"), (lambda: bleu(["a"], ["a"], max_order=0), "max_order"),
    (lambda: chrf(["a"], ["a"], char_order=0), "char_order"), (lambda: chrf(["a"], ["a"], word_order=-1), "word_order"),
    (lambda: chrf(["a"], ["a"], beta=0), "beta"), (lambda: rouge(["a"], ["a"], "rouge"), "rouge1"),
    (lambda: bleu_tokens("one text"), "give a list"), (lambda: edit_distance(["a", 1], ["a"]), "int"),
    (lambda: normalize_answer(b"x"), "decode"),
    (lambda: embedding_similarity(["a"], ["a"], lambda t: np.zeros((1, 2))), "1 results for 2 texts"),
    (lambda: embedding_similarity(["a"], ["a"], lambda t: np.full((2, 2), np.nan)), "finite"),
    (lambda: bert_score(["a"], ["a"], lambda t: [np.zeros((1, 2)), np.zeros((1, 3))]), "of one size"),
    (lambda: bert_score(["a"], ["a"], lambda t: np.zeros((2, 2))), "2 dimensions"),
])  # fmt: skip
def test_wrong_options_are_one_clear_error(call, says):
    with pytest.raises(LmbookError, match=says): call()


# ---------------------------------------------------------------- faults are found

FAULTS = {
    "no clipping": ("_overlaps", lambda old: lambda *a: old(*a) * 1.5, lambda: bleu(["the cat sat on it"], ["the cat sat on mats"]).value),
    "tokens": ("_marks_apart", lambda old: lambda text, *a: text, lambda: bleu(["a cat, a dog sat."], ["a cat, a dog ran."]).value),
    "shifts": ("_best_shift", lambda old: lambda a, b, n: (0, a, n), lambda: ter(["c d e a b"], ["a b c d e"]).value),
    "stems": ("porter_stem", lambda old: lambda word: word, lambda: rouge(["hiding it"], ["hides it"], stem=True).value),
    "path": ("_lcs_positions", lambda old: lambda *a: old(*a)[1:], lambda: rouge(["a b c x\nd"], ["a b c\nd"], "rougeLsum").value),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_changes_the_number(name, monkeypatch):
    attribute, broken, score = FAULTS[name]
    before = score()
    monkeypatch.setattr(tm, attribute, broken(getattr(tm, attribute)))
    tm._rouge_words.cache_clear()
    assert score() != before
    tm._rouge_words.cache_clear()
