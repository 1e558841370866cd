"""Tokenizers: nothing is lost, ids equal to other libraries', the teaching algorithms against enumeration, files, faults."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from lmbook.corpora import load_reader
from lmbook.small_world import SmallWorld
from lmbook.tokenization import (
    BPE,
    LONGEST,
    SPECIALS,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerError,
    WordTokenizer,
    jieba_words,
    learn_merges,
    split_words,
)
from lmbook.tokenizer_files import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    expected_counts,
    load_tokenizer,
    ngram_cost,
    spell,
    tokenizer_from_bytes,
    train_unigram,
    viterbi,
    wordpiece,
)

READER = [document.text(lang) for document in load_reader()[:60] for lang in ("en", "zh")]
# Anything that a file can hold, and pieces that are likely to hurt: names of tokens, ▁, spaces of all kinds, joined emoji, runs.
TROUBLE = [
    "<eos>", "<pad>", "<unk>", "<0x41>", "<0xE8>", "<", "▁", " ", "  ", "\n", "\r\n", "\t", "\0", "\x1b", "\u00a0",
    "\u3000", "\u200b", "\u2028", "aaa", "aa", "the", " the", "The", "茶", "灯塔", "我们", "。", "👩‍👩‍👧‍👦", "🏳️‍🌈", "é",
    "e\u0301", "שלום", "नमस्ते", "ฟ้า", "1234", "½", "²", "ǅ", "İ", "'s", "'", "\ufffd", "\ufeff", "\U0010ffff",
    "\ue000", "##", "Ġ", "Ċ",
]  # fmt: skip
ANY_CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ANYTHING = st.lists(st.one_of(st.sampled_from(TROUBLE), ANY_CHARACTERS), max_size=12).map("".join)


@pytest.fixture(scope="module")
def bpe() -> BPE: return BPE.train(READER, 3000)


@pytest.fixture(scope="module")
def pieces() -> dict[str, SentencePieceTokenizer]:
    return {kind: SentencePieceTokenizer.train(READER, 3200, model_type=kind) for kind in ("unigram", "bpe")}


@pytest.fixture(scope="module")
def exported(pieces) -> dict[str, tokenizers.Tokenizer]: return {kind: in_library(t) for kind, t in pieces.items()}


def in_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    "What the library makes of our export."
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._json()))
    theirs.encode_special_tokens = True
    return theirs


@pytest.fixture(scope="module")
def kinds(bpe, pieces) -> list[Tokenizer]:
    words = [WordTokenizer.train(READER, 500), CharTokenizer.train(READER), WordTokenizer.train(READER, 500, split="jieba")]
    return [bpe, ByteTokenizer(), *pieces.values(), *words]


@pytest.fixture(scope="module")
def library(bpe) -> tokenizers.Tokenizer: return in_library(bpe)


# Nothing is lost


@given(text=ANYTHING)
@settings(max_examples=400)
def test_bytes_come_back(bpe, pieces, text):
    for tokenizer in (bpe, ByteTokenizer(), *pieces.values()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and not {*ids} & {*tokenizer.specials.values()}


@given(text=ANYTHING)
@settings(max_examples=200)
def test_words_lose_only_what_they_do_not_know(text):
    known = WordTokenizer.train([text, "x"])
    assert known.decode(known.encode(text)) == text or any(name in text for name in SPECIALS)
    letters = CharTokenizer.train([text, "x"])
    assert letters.decode(letters.encode(text)) == text
    assert WordTokenizer(["never"]).decode(WordTokenizer(["never"]).encode(text)) == "\ufffd" * len(split_words(text))


@given(text=ANYTHING)
@settings(max_examples=300)
def test_words_joined_are_the_text(text):
    words = split_words(text)
    assert "".join(words) == text and all(words)
    assert "".join(split_words(text, "[a-z]+")) == text  # a pattern that leaves gaps: they are words too
    assert all(not word[0].isspace() or word.isspace() or word[0] == " " for word in words)


@given(text=ANYTHING)
@settings(max_examples=200)
def test_offsets_cover_the_text_in_order(kinds, text):
    for tokenizer in kinds[:6]:
        spans, shown = tokenizer.offsets(text), tokenizer.tokens(text)
        assert len(spans) == len(tokenizer.encode(text)) == len(shown)
        if not text: continue
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(a < b for a, b in spans)
        assert all(c <= b and a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(spans))  # no gap, and never backwards
        whole = [(text[a:b], token) for (a, b), token in zip(spans, shown) if "<0x" not in token and token not in tokenizer.specials]
        assert all(piece == token or piece.endswith(token) or piece.startswith(token) for piece, token in whole)
    assert kinds[0].offsets("é茶", bos=True, eos=True)[0] == (0, 0) and kinds[0].offsets("é茶", eos=True)[-1] == (2, 2)


def test_long_texts_and_long_words(bpe, pieces):
    for text in ("a" * 100_000, "茶" * 30_000, " " * 100_000, "ab" * 50_000 + "\n" + "x. " * 50_000):
        for tokenizer in (bpe, *pieces.values()): assert tokenizer.decode(tokenizer.encode(text)) == text
    with_long_line = SentencePieceTokenizer.train(["zebra " * 5000], 275, model_type="bpe")  # SentencePiece alone would leave it out
    assert with_long_line.tokens(" zebra") == [" zebra"]


# Byte-pair encoding


def naive_merges(words: dict[bytes, int], n: int, min_count: int = 2) -> list[tuple[bytes, bytes]]:
    "All pairs counted anew in each round."
    spelled = {word: [bytes([byte]) for byte in word] for word in words}
    order, merges = [bytes([byte]) for byte in range(256)], []
    for _ in range(n):
        counts = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(spelled[word]): counts[pair] += times
        counts = {pair: c for pair, c in counts.items() if c >= min_count}
        if not counts: break
        best = min(counts, key=lambda p: (-counts[p], order.index(p[0]), order.index(p[1])))
        merges.append(best)
        order.append(best[0] + best[1])
        spelled = {word: replay_one(tokens, best) for word, tokens in spelled.items()}
    return merges


def replay_one(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out, i = [], 0
    while i < len(tokens):
        step = 2 if tuple(tokens[i : i + 2]) == pair else 1
        out.append(b"".join(tokens[i : i + step]))
        i += step
    return out


WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=12).map(str.encode), st.integers(1, 9), max_size=8)


@given(words=WORDS, n=st.integers(0, 30), min_count=st.integers(1, 4))
@settings(max_examples=500)
def test_fast_merges_are_the_naive_ones(words, n, min_count):
    merges = learn_merges(words, n, min_count)
    assert merges == naive_merges(words, n, min_count)
    assert len({a + b for a, b in merges}) == len(merges)  # each token has one history


@given(words=WORDS, text=st.text("abc ", max_size=150))
@settings(max_examples=300)
def test_encoding_replays_the_merges(words, text):
    merges = learn_merges(words, 20, 1)
    tokenizer = BPE(merges, specials=())
    want = []
    for word in split_words(text):
        for start in range(0, len(word), LONGEST):
            tokens = [bytes([byte]) for byte in word[start : start + LONGEST].encode()]
            for pair in merges: tokens = replay_one(tokens, pair)
            want += tokens
    assert [tokenizer.id_to_bytes(i) for i in tokenizer.encode(text)] == want


def test_training_is_the_librarys_training():
    "Words of printable ASCII, where both sort the bytes alike: the same merges in the same order, equal counts and all."
    text = " ".join(w for t in READER for w in t.split() if w.isascii())
    theirs = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[^ ]+"), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 1000, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    theirs.train_from_iterator([text], trainer)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    ours = BPE.train([text], 256 + 1000, specials=(), pattern="[^ ]+")
    assert [[a.decode(), b.decode()] for a, b in ours.merges] == merges


@given(text=ANYTHING)
@settings(max_examples=400)
def test_the_library_makes_the_same_ids(bpe, library, text):
    ids = bpe.encode(text)
    assert library.encode(text).ids == ids
    assert library.decode(ids, skip_special_tokens=False) == text


def test_every_character_there_is(bpe, library):
    "Words are cut alike by `re` and the library's engine, whatever each of them thinks a letter is. (Planes 4 to 13: some.)"
    there = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (c < 0x33480 or c >= 0xE0000 or c % 997 == 0)]
    for start in range(0, len(there), 10_000):
        text = "".join(f"{chr(c)}a {chr(c)} " for c in there[start : start + 10_000])
        assert library.encode(text).ids == bpe.encode(text)


def test_long_words_in_the_library(bpe, library):
    runs = BPE.train(["ab" * 60] * 3, 268)  # has tokens as long as a word may be, so it matters where a longer one is cut
    for text in ("ab" * 100, "b" + "ab" * 70, "a" * 65): assert in_library(runs).encode(text).ids == runs.encode(text)
    assert len(runs.encode("b" + "ab" * 70)) > len(runs.encode("ab" * 64))
    for text in ("ab" * 500, "茶" * 200, "-" * 300, " " * 300 + "x", "é" * 129): assert library.encode(text).ids == bpe.encode(text)


def test_real_text_in_the_library(data_dir):
    [wiki] = (data_dir / "zhwiki").glob("*.txt")
    chinese = wiki.read_text(encoding="utf-8")[:100_000]
    english = (data_dir / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:150_000]
    learned = [chinese[:60_000], english[:100_000]]
    ours = BPE.train(learned, 4000)
    kinds = {kind: SentencePieceTokenizer.train(learned, 6000, model_type=kind) for kind in ("bpe", "unigram")}
    for tokenizer in (ours, *kinds.values()):
        theirs = in_library(tokenizer)
        for text in (*chinese.split("\n"), *english.split("\n")):
            assert theirs.encode(text).ids == tokenizer.encode(text)


def test_merges_that_cannot_be():
    with pytest.raises(TokenizerError, match="which no earlier merge makes"): BPE([(b"ab", b"c")])
    with pytest.raises(TokenizerError, match="Two merges make the same token"):
        BPE([(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")])
    assert BPE.train(["<eos>"] * 9, 263, pattern="[^ ]+").tokens("<eos>") == ["<eos", ">"]  # text must not grow a token of that name
    with pytest.raises(TokenizerError, match="at most 263"): BPE.train(["<eos>"] * 9, 264, pattern="[^ ]+")


# SentencePiece and its export


def cost(tokenizer: SentencePieceTokenizer, ids: list[int]) -> float: return sum(tokenizer._sp.get_score(i) for i in ids)


@given(text=ANYTHING)
@settings(max_examples=400)
def test_unigram_export(pieces, exported, text):
    "The same ids; or others that are as probable, to the rounding of a float: then there are two best ways."
    ours, theirs = pieces["unigram"], exported["unigram"]
    want, ids = ours.encode(text), theirs.encode(text).ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert ids == want or abs(cost(ours, ids) - cost(ours, want)) < 1e-5 * abs(cost(ours, want))


@given(text=ANYTHING)
@settings(max_examples=400)
def test_bpe_export(pieces, exported, text):
    ours, theirs = pieces["bpe"], exported["bpe"]
    ids = theirs.encode(text).ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert ids == ours.encode(text) or two_ways(ours, text)


def two_ways(tokenizer: SentencePieceTokenizer, text: str) -> bool:
    "Whether the text holds a piece that can be made of two pairs: there SentencePiece goes by place, the library by the rank of the merge."
    names = {tokenizer._show(i) for i in range(260, tokenizer.vocab_size)}
    inside = {text[a:b] for a in range(len(text)) for b in range(a + 3, min(a + 16, len(text)) + 1)} & names
    return any(sum(piece[:k] in names and piece[k:] in names for k in range(1, len(piece))) > 1 for piece in inside)


def test_bpe_export_on_real_text(pieces, exported):
    "Two ways to make a piece are common; that they compete is not."
    held_out = [document.text(lang) for document in load_reader()[60:] for lang in ("en", "zh")]
    for kind in pieces:
        assert all(exported[kind].encode(text).ids == pieces[kind].encode(text) for text in held_out + READER)


def test_names_in_a_text_stay_text_after_export():
    "A unigram model of HTML has pieces with < inside; text that spells the name of a token is still text, as its characters are known."
    html = [f"<b>0x4{n % 10}ABCDEF</b></i></u> <eos> <pad>eospad{n}</></>" for n in range(60)]
    tokenizer = SentencePieceTokenizer.train(html, 300)
    assert tokenizer._json()["pre_tokenizer"] is None and "</" in tokenizer.vocab  # so the text cannot be cut at each <
    for text in ("<0x41><eos>", "<0x4F> <pad>", "</i><0x00>"):
        assert in_library(tokenizer).encode(text).ids == tokenizer.encode(text) and not {*tokenizer.encode(text)} & set(range(4))


def test_sentencepiece_keeps_line_breaks_and_marks(pieces):
    for tokenizer in pieces.values():
        assert tokenizer.tokens("a\nb") == ["a", "\n", "b"] and len(tokenizer.encode("\n")) == 1
        assert tokenizer.tokens("▁") == ["<0xE2>", "<0x96>", "<0x81>"] and tokenizer.encode("▁") != tokenizer.encode(" ")
        assert tokenizer.offsets("a▁b") == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]


def foreign_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(READER), model_writer=model, minloglevel=3, **options)
    return model.getvalue()


def test_sentencepiece_models_from_elsewhere():
    "The library's defaults (T5's kind), and Llama's kind: they do what SentencePiece does with them."
    for options in (dict(vocab_size=3000), dict(vocab_size=3300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")):
        model = foreign_model(**options)
        ours, theirs = tokenizer_from_bytes(model), sentencepiece.SentencePieceProcessor(model_proto=model)
        assert isinstance(ours, SentencePieceTokenizer) and ours.model_type == options.get("model_type", "unigram")
        assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, None)
        for text in ("The  tea\nis ready.", "灯塔 ①", "", " x"):
            assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
            assert len(ours.offsets(text)) == len(ours.encode(text))
        spans = [(a, b) for a, b in ours.offsets("灯 tea") if a < b]
        assert spans[0] == (0, 1) and spans[-1][1] == 5 and all(b == c for (_, b), (c, _) in itertools.pairwise(spans))
        assert ours.encode_batch(["tea", "tea is"], bos=True).ids[:, 0].tolist() == [1, 1]
        with pytest.raises(TokenizerError, match="Only models without normalisation"): ours.to_json("never.json")


# Unigram, WordPiece, n-grams


def all_ways(word: str):
    for cuts in itertools.product([False, True], repeat=max(0, len(word) - 1)):
        places = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(word)]
        yield [word[a:b] for a, b in itertools.pairwise(places)]


PIECES = st.dictionaries(st.text("ab", min_size=1, max_size=4), st.floats(-9, -.01), max_size=12).map(lambda d: {"a": -2.0, "b": -3.0} | d)


@given(log_p=PIECES, word=st.text("ab", min_size=1, max_size=9))
@settings(max_examples=300)
def test_viterbi_and_expectations_by_enumeration(log_p, word):
    ways = {tuple(way): sum(log_p[piece] for piece in way) for way in all_ways(word) if all(piece in log_p for piece in way)}
    best, score = viterbi(word, log_p)
    assert math.isclose(score, max(ways.values())) and math.isclose(ways[tuple(best)], score) and "".join(best) == word
    total = math.log(sum(map(math.exp, ways.values())))
    used, found = expected_counts({word: 3}, log_p)
    by_hand = defaultdict(float)
    for way, p in ways.items():
        for piece in way: by_hand[piece] += 3 * math.exp(p - total)
    assert math.isclose(found, 3 * total, abs_tol=1e-9)
    assert {*used} == {*by_hand} and all(math.isclose(used[piece], by_hand[piece], rel_tol=1e-9) for piece in used)


def test_unigram_training():
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    log_p = train_unigram(words, 12)
    assert len(log_p) <= 12 and {"h", "u", "g", "p", "n", "b", "s"} <= {*log_p} and math.isclose(sum(map(math.exp, log_p.values())), 1)
    assert viterbi("hugs", log_p)[0][0].startswith("hug")
    assert expected_counts(words, log_p)[1] > expected_counts(words, train_unigram(words, 7))[1]
    with pytest.raises(TokenizerError, match="there are 7 different characters"): train_unigram(words, 3)
    for call in (lambda: viterbi("xyz", log_p), lambda: expected_counts({"xyz": 1}, log_p)):
        with pytest.raises(TokenizerError, match="'xyz' cannot be cut into these pieces"): call()
    assert viterbi("", log_p) == ([], 0.0)


@given(words=st.lists(st.text("abcdé", min_size=1, max_size=8), max_size=5), vocab=st.sets(st.text("abcdé", min_size=1, max_size=3)))
@settings(max_examples=300)
def test_wordpiece_is_the_librarys(words, vocab):
    vocab = sorted(vocab) + ["##" + piece for piece in sorted(vocab)[::2]]
    theirs = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0} | {piece: i for i, piece in enumerate(vocab, 1)}, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert [piece for word in words for piece in wordpiece(word, vocab)] == theirs.encode(" ".join(words)).tokens
    assert wordpiece("a" * 101, ["a", "##a"]) == ["[UNK]"]


def test_ngram_cost_is_a_distribution():
    "Over all texts the probabilities add up to one: those of at most 12 tokens have nearly all of it."
    train = ["a", "ab", "b", "", "ba"]
    for n in (1, 2, 3):
        mass = sum(math.exp(-ngram_cost(train, ["".join(t)], 2, n)) for k in range(13) for t in itertools.product("ab", repeat=k))
        assert .99 < mass < 1 + 1e-9
    assert ngram_cost(train, [], 2) == 0 and math.isclose(ngram_cost([], ["ab"], 3, 2), 3 * math.log(4))


def test_ngram_cost_by_hand():
    "Bigram: after a came b twice and the end once. p(b) = (3 + 4 * 1/4) / (9 + 4) is the unigram's; p(b|a) = (2 + 2 * p(b)) / (3 + 2)."
    train = ["ab", "ab", "a"]  # tokens: a a a b b, ends: 3
    p1 = {"a": (3 + 3 / 4) / (8 + 3), "b": (2 + 3 / 4) / (8 + 3), "end": (3 + 3 / 4) / (8 + 3)}  # V = 3 and the end; 3 kinds seen
    p_a = (3 + 1 * p1["a"]) / (3 + 1)  # after the beginning: only a
    p_b = (2 + 2 * p1["b"]) / (3 + 2)
    p_end = (2 + 1 * p1["end"]) / (2 + 1)
    assert math.isclose(ngram_cost(train, ["ab"], 3, 2), -math.log(p_a * p_b * p_end))


def test_spelling():
    assert spell(["tea", "茶", "té"], {"tea", "t"}) == ["tea", "<0xE8>", "<0x8C>", "<0xB6>", "t", "<0xC3>", "<0xA9>"]
    text = "南京市长江大桥 and tea"
    assert "".join(jieba_words(text)) == text and "".join(spell(jieba_words(text), set(text))) == text


# Special tokens and batches


def test_text_is_text(bpe, kinds):
    for tokenizer in (*kinds, in_wrapper(bpe)):
        text = "tea <eos> tea"
        plain = tokenizer.encode(text)
        assert tokenizer.eos_id not in plain and tokenizer.bos_id not in plain
        asked = tokenizer.encode(text, bos=True, eos=True, specials=True)
        assert asked.count(tokenizer.eos_id) == 2 and asked[0] == tokenizer.bos_id
        assert tokenizer.offsets(text, specials=True)[asked.index(tokenizer.eos_id) - 1] == (4, 9)
        assert "<eos>" in tokenizer.decode(asked, specials=True) and "<eos>" not in tokenizer.decode(asked)


def in_wrapper(tokenizer: Tokenizer) -> HuggingFaceTokenizer: return HuggingFaceTokenizer(json.dumps(tokenizer._json()))


def test_more_special_tokens(tmp_path):
    names = (*SPECIALS, "<mask>", "<sep>", "<cls>")
    for make in (lambda: BPE.train(READER, 400, specials=names), lambda: WordTokenizer.train(READER, 300, specials=names),
                 lambda: CharTokenizer.train(READER, specials=names), lambda: SentencePieceTokenizer.train(READER, 3000, specials=names)):
        tokenizer = make()
        assert [tokenizer.special(name) for name in names] == list(range(7)) and list(tokenizer.specials) == list(names)
        tokenizer.save(tmp_path / "t")
        again = load_tokenizer(tmp_path / "t")
        assert again.specials == tokenizer.specials
        assert again.encode("tea<mask>", specials=True)[-1] == 4 and 4 not in again.encode("<mask>")
    with pytest.raises(TokenizerError, match=r"no special token '<mask>'; there are: <pad> <bos> <eos> <unk>. Name it"):
        ByteTokenizer().special("<mask>")
    bare = BPE(specials=())
    assert (bare.pad_id, bare.bos_id, bare.eos_id, bare.unk_id) == (None,) * 4 and bare.encode("a") == [97]
    with pytest.raises(TokenizerError, match="there are: none"): bare.encode("a", bos=True)
    for names in (("<pad>", "<pad>"), ("",)):
        with pytest.raises(TokenizerError, match="each its own"): BPE(specials=names)


def test_batches(bpe, kinds):
    texts = ["", "tea", "The lighthouse keeper had a kettle.", "灯塔"]
    for tokenizer in kinds:
        for side, (bos, eos), most in itertools.product(("left", "right"), itertools.product((False, True), repeat=2), (None, 2, 4, 100)):
            batch = tokenizer.encode_batch(texts, most, bos=bos, eos=eos, side=side, offsets=True)
            assert batch.ids.dtype == torch.int64 and batch.mask.dtype == torch.bool and batch.ids.shape == batch.mask.shape
            for b, text in enumerate(texts):
                row, full = batch.ids[b][batch.mask[b]].tolist(), tokenizer.encode(text)
                room = len(full) if most is None else most - bos - eos
                assert row == [tokenizer.bos_id] * bos + full[:room] + [tokenizer.eos_id] * eos
                assert batch.offsets[b] == [(0, 0)] * bos + tokenizer.offsets(text)[:room] + [(len(text), len(text))] * eos
                assert (batch.ids[b][~batch.mask[b]] == tokenizer.pad_id).all()
                assert batch.mask[b].tolist() == sorted(batch.mask[b].tolist(), reverse=side == "right")
            if most in (None, 100): assert tokenizer.decode_batch(batch.ids) == [tokenizer.decode(tokenizer.encode(text)) for text in texts]
    assert bpe.encode_batch("tea").ids.tolist() == [bpe.encode("tea")]  # a text by itself is one text
    assert bpe.encode_batch([]).ids.shape == (0, 0) and bpe.encode_batch(["", ""]).ids.shape == (2, 0)
    with pytest.raises(TokenizerError, match="leaves no room"): bpe.encode_batch(["a"], 1, bos=True, eos=True)
    with pytest.raises(TokenizerError, match="There is no side='top'. Choose one of: left, right"): bpe.encode_batch(["a"], side="top")


def test_vocabulary(bpe, kinds):
    for tokenizer in (*kinds, in_wrapper(bpe)):
        assert len(tokenizer) == len(tokenizer.vocab) == tokenizer.vocab_size
        assert all(tokenizer.vocab[tokenizer.id_to_token(i)] == i for i in range(tokenizer.vocab_size))
        for i in (-1, tokenizer.vocab_size):
            for call in (tokenizer.decode, lambda ids: tokenizer.id_to_token(ids[0])):  # noqa: B023
                says = f"{i} is not an id of this vocabulary: they run from 0 to {tokenizer.vocab_size - 1}"
                with pytest.raises(TokenizerError, match=says): call([i])
        with pytest.raises(TokenizerError, match="For several rows: decode_batch"): tokenizer.decode(torch.zeros(2, 2, dtype=torch.long))


def test_a_cut_character_shows(bpe):
    ids = ByteTokenizer().encode("茶")
    assert ByteTokenizer().decode(ids[:2]) == "\ufffd" and ByteTokenizer().decode(ids) == "茶"
    assert CharTokenizer.train(["tea"]).decode([3, *CharTokenizer.train(["tea"]).encode("t")]) == "\ufffdt"


# Files


def test_files(kinds, tmp_path):
    for n, tokenizer in enumerate(kinds):
        path = tmp_path / str(n) / "tokenizer.json"
        tokenizer.save(path)
        for again in (load_tokenizer(path), tokenizer_from_bytes(tokenizer.to_bytes()), pickle.loads(pickle.dumps(tokenizer))):
            assert isinstance(again, (type(tokenizer), WordTokenizer, BPE))
            assert again.vocab == tokenizer.vocab and again.specials == tokenizer.specials
            assert all(again.encode(text) == tokenizer.encode(text) for text in READER[:6])
        assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]  # no temporary file is left
    custom = BPE.train(READER, 300, pattern=r"\d|[^\d]+")
    assert tokenizer_from_bytes(custom.to_bytes()).pattern == custom.pattern


def test_each_class_loads_its_own_file_and_no_other(kinds, tmp_path):
    for tokenizer in kinds:
        tokenizer.save(tmp_path / "file")
        again = type(tokenizer).load(tmp_path / "file")
        assert type(again) is type(tokenizer) and again.vocab == tokenizer.vocab and again.specials == tokenizer.specials
        assert all(again.encode(text) == tokenizer.encode(text) for text in READER[:6])
        assert type(tokenizer).from_bytes(tokenizer.to_bytes()).vocab == tokenizer.vocab
    BPE.train(READER, 300).save(tmp_path / "bpe")
    WordTokenizer.train(READER, 300).save(tmp_path / "words")
    for kind, name in ((ByteTokenizer, "bpe"), (WordTokenizer, "bpe"), (BPE, "words"), (Tokenizer, "bpe")):
        says = f"{name}: this was not written by a {kind.__name__}.*lmbook.tokenizer_files.load_tokenizer"
        with pytest.raises(TokenizerError, match=says): kind.load(tmp_path / name)
    for kind in (BPE, WordTokenizer, SentencePieceTokenizer, Tokenizer):
        with pytest.raises(TokenizerError, match="There is no file"): kind.load(tmp_path / "other")
    (tmp_path / "torn").write_bytes((tmp_path / "bpe").read_bytes()[:-20])
    with pytest.raises(TokenizerError, match="not written by a BPE"): BPE.load(tmp_path / "torn")


def test_exports_of_words(tmp_path):
    for tokenizer in (WordTokenizer.train(READER, 800), CharTokenizer.train(READER, 300)):
        theirs = in_library(tokenizer)
        assert all(theirs.encode(text).ids == tokenizer.encode(text) for text in READER)
    known = WordTokenizer.train(READER)
    assert in_library(known).decode(known.encode(READER[0])) == READER[0]
    with pytest.raises(TokenizerError, match="knows no jieba"): WordTokenizer.train(READER, split="jieba").to_json(tmp_path / "x.json")
    assert not any(tmp_path.iterdir())
    with pytest.raises(Exception, match="PreTokenizer"):  # and the library does not take the saved one for something else
        tokenizers.Tokenizer.from_str(WordTokenizer.train(READER, split="jieba").to_bytes().decode())


def test_folders(bpe, pieces, tmp_path):
    pieces["bpe"].save(tmp_path / "a" / "spiece.model")
    assert load_tokenizer(tmp_path / "a").encode("tea") == pieces["bpe"].encode("tea")
    bpe.to_json(tmp_path / "a" / "tokenizer.json")
    assert isinstance(load_tokenizer(str(tmp_path / "a")), BPE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"no tokenizer.json and no \*.model in this folder"): load_tokenizer(tmp_path / "empty")


def test_a_failed_save_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    path.write_text("old", encoding="utf-8")

    def fail(*_): raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TokenizerError, match="cannot be written: disk full. What was there before is untouched"): bpe.save(path)
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("data, says", [
    (b"", "the file is empty"), (b"<html>404</html>", "no SentencePiece model and no tokenizer.json"),
    (b"\x00\x01\x02" * 50, "no SentencePiece model"), (b'{"model": ', "not JSON, or it is damaged"),
    (b"{\xff}", "not JSON, or it is damaged"), (b'{"tokenizer_class": "x"}', 'no "model"'),
    (b'{"model": {"type": "Magic"}}', "cannot read it"),
])  # fmt: skip
def test_wrong_files(data, says, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=says) as caught: load_tokenizer(path)
    assert str(path) in str(caught.value)
    with pytest.raises(TokenizerError, match="There is no file"): load_tokenizer(tmp_path / "other")


def test_damaged_files(bpe, pieces):
    "Cut anywhere, or with a byte changed: a TokenizerError, or a tokenizer that works; never another kind of error."
    rng = random.Random(0)
    for tokenizer in (bpe, pieces["unigram"], WordTokenizer.train(READER, 300)):
        data = tokenizer.to_bytes()
        for _ in range(12):
            at = rng.randrange(len(data))
            for broken in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
                try: tokenizer_from_bytes(broken).encode("tea")
                except TokenizerError: pass


def test_bytes_of_a_file_from_sentencepiece(pieces, tmp_path):
    for theirs in pieces.values():
        theirs.to_json(tmp_path / "tokenizer.json")
        ours = load_tokenizer(tmp_path)
        assert isinstance(ours, HuggingFaceTokenizer)
        for text in [*READER[:10], "tea 🍵 茶", "a"]:
            assert b"".join(map(ours.id_to_bytes, ours.encode(text))) == b"".join(map(theirs.id_to_bytes, theirs.encode(text))), text


def test_files_from_elsewhere():
    "GPT-2's kind of BPE, BERT's WordPiece and a Unigram, made by the library: the same ids, through our interface."
    gpt2 = tokenizers.Tokenizer(models.BPE())
    gpt2.pre_tokenizer, gpt2.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    gpt2.train_from_iterator(READER, trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False))
    bert = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.decoder = tokenizers.decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert.train_from_iterator(READER, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=names, show_progress=False))
    bert.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    bert.enable_truncation(5); bert.enable_padding(length=9)
    plain = tokenizers.Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(vocab_size=3000, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    plain.train_from_iterator(READER, trainer)
    for theirs, wants in ((gpt2, (None, 0, 0, None)), (bert, (0, 2, 3, 1)), (plain, (None, None, None, 0))):
        ours = tokenizer_from_bytes(theirs.to_str().encode())
        theirs.no_truncation(); theirs.no_padding()
        assert isinstance(ours, HuggingFaceTokenizer) and (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id) == wants
        assert ours.vocab == theirs.get_vocab()
        if theirs is gpt2:
            assert ours.id_to_bytes(0) == b""
            assert all(b"".join(map(ours.id_to_bytes, ours.encode(text))).decode() == text for text in READER[:20])
        else:
            with pytest.raises(TokenizerError, match="does not say which bytes"): ours.id_to_bytes(10)
        for text in READER[:10]:
            want = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == want.ids and ours.tokens(text) == want.tokens and ours.offsets(text) == want.offsets
            assert ours.decode(want.ids) == theirs.decode(want.ids)
        again = pickle.loads(pickle.dumps(ours))
        assert again.encode(READER[0]) == ours.encode(READER[0])
    inside = bert.encode("tea", add_special_tokens=False).ids
    assert tokenizer_from_bytes(bert.to_str().encode()).encode("tea", bos=True, eos=True) == [2, *inside, 3]


NAMES = ["<unk>", "<s>", "</s>", "<mask>"]


def foreign(kind: str) -> tokenizers.Tokenizer:
    "A small file from elsewhere whose model has its special tokens among its pieces, as if they were text."
    words = ["a", "b", "x", "y", "▁", "</", "s", ">", "<", "/", "m", "k", "▁a", "tea"]
    if kind == "unigram":
        scored = [(name, 0.) for name in NAMES] + [(word, -5. - i / 9) for i, word in enumerate(words)]
        theirs = tokenizers.Tokenizer(models.Unigram(scored, 0))
        theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        theirs.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    elif kind == "wordlevel":
        theirs = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate([*NAMES, *words])}, unk_token="<unk>"))
        theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "wordpiece":
        theirs = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate([*NAMES, *words])}, unk_token="<unk>"))
        theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        vocab = {w: i for i, w in enumerate([*NAMES, *words, "s>", "</s"])}
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        theirs = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", ignore_merges=kind == "whole"))
    theirs.add_special_tokens([
        tokenizers.AddedToken("<s>", rstrip=True), tokenizers.AddedToken("</s>", lstrip=True),
        tokenizers.AddedToken("<mask>", single_word=True, lstrip=True), "<unk>", "<new>",
    ])  # fmt: skip
    theirs.add_tokens(["later", tokenizers.AddedToken("x y", normalized=False)])
    return theirs


SPELLED = ["a</s>a", "</s>", "a </s> a", "<s> a", "x</s>y", "a<mask>b", "a <mask> b", "<new>a", "later</s>x y<s>", "", "tea a", "<unk>"]


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "wordpiece", "bpe", "whole"])
def test_text_never_becomes_a_special_token_of_any_file(kind):
    "And where it is asked for, the file's own rules say when it does: ids and offsets are the library's."
    theirs = foreign(kind)
    ours = pickle.loads(pickle.dumps(tokenizer_from_bytes(theirs.to_str().encode())))
    assert isinstance(ours, HuggingFaceTokenizer) and set(ours.specials) == {*NAMES, "<new>"}
    named = {i for name, i in ours.specials.items() if name != "<unk>"}
    for text in SPELLED:
        assert not named & {*ours.encode(text)}, text
        assert len(ours.offsets(text)) == len(ours.encode(text)) and ours.tokens(text) == [ours.id_to_token(i) for i in ours.encode(text)]
        want = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, specials=True) == want.ids and ours.offsets(text, specials=True) == want.offsets, text
        spelled = any(name in text for name in ours.specials)
        if not spelled: assert ours.encode(text) == want.ids and ours.offsets(text) == want.offsets, text
    assert ours.decode(ours.encode("a</s>a", specials=True)) == ours.decode(theirs.encode("a</s>a", add_special_tokens=False).ids)


def test_a_file_with_dropout_has_one_encoding(library):
    content = json.loads(library.to_str())
    content["model"]["dropout"] = .5
    ours, text = HuggingFaceTokenizer(json.dumps(content)), READER[0]
    for specials in (False, True):
        for _ in range(5):
            ids = ours.encode(text, specials=specials)
            assert ids == library.encode(text).ids and len(ours.offsets(text, specials=specials)) == len(ids)
    assert json.loads(ours.to_bytes())["model"]["dropout"] == .5  # the file is what it was


def test_each_byte_of_a_character_has_all_of_it():
    for options in (dict(model_type="bpe"), dict(model_type="unigram"), dict(model_type="bpe", normalization_rule_name="identity")):
        ours = tokenizer_from_bytes(foreign_model(vocab_size=3300, byte_fallback=True, **options))
        assert ours.offsets("a𠀀b")[-6:] == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)] or not options
        for text in ("𠀀", "𠀀𠀁", "x 𠀀", "𠀀 🜁y", "a🜁🜁b"):
            ids, spans = ours.encode(text), ours.offsets(text)
            for i, (start, end) in zip(ids, spans):
                if ours._sp.is_byte(i): assert end == start + 1 and text[start] in "𠀀𠀁🜁", (text, spans)
            for place, letter in enumerate(text):
                if letter in "𠀀𠀁🜁": assert spans.count((place, place + 1)) == 4, (text, spans)


def test_half_a_character_is_refused_by_every_way_in(kinds, bpe):
    for tokenizer in (*kinds, in_wrapper(bpe)):
        for call in (tokenizer.encode, tokenizer.tokens, tokenizer.offsets, lambda text: tokenizer.encode_batch([text])):  # noqa: B023
            with pytest.raises(TokenizerError, match="half a character"): call("tea \ud800")
            with pytest.raises(TokenizerError, match="A text is a str"): call(b"tea")


def hostile() -> dict[str, dict]:
    "Files of the library's kind that would take all memory, or end in errors of their own."
    start = json.loads(foreign("wordlevel").to_str())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    long = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**6}
    return {
        "id 4e8": {**start, "model": {**start["model"], "vocab": {"a": 400_000_000, "<unk>": 0}}},
        "id 4e9": {**start, "model": {**start["model"], "vocab": {"a": 4_000_000_000, "<unk>": 0}}},
        "empty": {**start, "added_tokens": [], "model": {**start["model"], "vocab": {}}},
        "normalizer": {**start, "normalizer": long},
        "normalizers": {**start, "normalizer": {"type": "Sequence", "normalizers": [double] * 30}},
        "prepend": {**start, "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "y" * 10**6}] * 3}},
        "decoder": {**start, "decoder": {"type": "Sequence", "decoders": [double] * 30}},
        "wordpiece decoder": {**start, "decoder": long},
        "model is a number": {**start, "model": 7},
        "vocab is a list": {**start, "model": {**start["model"], "vocab": [1, 2]}},
        "rules are a list": {**start, "normalizer": [1]},
    }


@pytest.mark.parametrize("what", hostile())
def test_hostile_files_are_refused(what):
    with pytest.raises(TokenizerError): tokenizer_from_bytes(json.dumps(hostile()[what]).encode())


def test_many_rules_that_do_not_meet_are_no_growth():
    content = json.loads(foreign("wordlevel").to_str())
    spelled = {"…": "...", "½": "1/2", "¼": "1/4", "¾": "3/4", "℃": "deg", "№": "No.", "™": "TM", "㎏": "kg", "㎝": "cm", "㎡": "m2"}
    rules = [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in spelled.items()]
    content["normalizer"] = {"type": "Sequence", "normalizers": [*rules, {"type": "Lowercase"}]}
    assert tokenizer_from_bytes(json.dumps(content).encode()).encode("tea") == [len(NAMES) + 13]


def test_files_that_are_none(tmp_path):
    with pytest.raises(TokenizerError, match="not JSON, or it is damaged"): tokenizer_from_bytes(b'{"model":' + b"[" * 200_000)
    with pytest.raises(TokenizerError): tokenizer_from_bytes(b'{"model":' + b'{"a":' * 500 + b"1" + b"}" * 501)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="no file but a folder"): load_tokenizer(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(TokenizerError, match="a pipe"): load_tokenizer(tmp_path / "pipe")


def test_a_panic_of_the_library_is_an_error_of_ours(monkeypatch):
    class Panic(BaseException): pass

    def fail(*_, **__): raise Panic("called `unwrap()` on a `None` value")

    ours = tokenizer_from_bytes(foreign("wordlevel").to_str().encode())
    ours.__dict__["_plain"] = type("Broken", (), {"encode": fail})
    with pytest.raises(TokenizerError, match="unwrap"): ours.encode("tea")
    ours.__dict__["_plain"] = type("Stopped", (), {"encode": lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)})
    with pytest.raises(KeyboardInterrupt): ours.encode("tea")


BERT_TEXTS = ["The tea, isn't it?", "灯塔 tea", "Café au lait", "a [SEP] b", "x\ty\n", "unbelievable 🍵"]


CASED = {"do_lower_case": False}


@pytest.mark.parametrize("settings_", [{}, CASED, {**CASED, "strip_accents": True, "tokenize_chinese_chars": False}])
def test_a_vocabulary_of_berts_is_read(settings_, tmp_path):
    transformers = pytest.importorskip("transformers")
    letters = sorted({c for text in BERT_TEXTS for c in text.lower() + text + "cafe" if not c.isspace()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), "tea", "the", "The", "##able"]
    vocab = list(dict.fromkeys(pieces))
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings_}))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "vocab.txt"):
        ours = load_tokenizer(path)
        assert (ours.pad_id, ours.bos_id, ours.eos_id, ours.unk_id, ours.vocab_size) == (0, 2, 3, 1, len(vocab))
        for text in BERT_TEXTS:
            assert ours.encode(text, specials=True) == theirs.encode(text, add_special_tokens=False), text
            assert ours.encode(text, specials=True, bos=True, eos=True) == theirs.encode(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(TokenizerError, match="BertJapaneseTokenizer has its rules in its program"): load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_text("tea\ncup\n")
    with pytest.raises(TokenizerError, match=r"a line \[UNK\]"): load_tokenizer(tmp_path)


def test_a_vocabulary_of_gpt2s_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(READER, vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save_model(str(tmp_path))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "vocab.json"):
        ours = load_tokenizer(path)
        assert ours.bos_id == ours.eos_id == 0 == theirs.eos_token_id
        for text in [*READER[:10], " tea 🍵", "a<|endoftext|>b"]:
            assert ours.encode(text, specials=True) == theirs.encode(text), text
            assert ours.decode(ours.encode(text)) == text and ours.bos_id not in ours.encode(text)
    for name, content, says in (
        ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}', "Qwen2Tokenizer has its rules in its program"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("merges.txt", "#version: 0.2\na b c\n", "holds two pieces"),
        ("vocab.json", '{"a": 0}', "256 bytes"),
        ("vocab.json", '{"a": "b"}', "no whole numbers"),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        (tmp_path / name).write_text(content)
        with pytest.raises(TokenizerError, match=says): load_tokenizer(tmp_path)
        (tmp_path / name).write_bytes(before)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="no file .*merges.txt"): load_tokenizer(tmp_path)


# Bad input, and what is needed


EMPTY = "There is no text to learn from. An iterator that was read before is empty"
MORE = r"vocab_size=9000 is more than this text allows: at most \d+"


@pytest.mark.parametrize("call, says", [
    (lambda: BPE.train([], 300), EMPTY), (lambda: BPE.train([""], 300), EMPTY), (lambda: WordTokenizer.train(iter([])), EMPTY),
    (lambda: CharTokenizer.train([]), EMPTY), (lambda: SentencePieceTokenizer.train([], 300), EMPTY),
    (lambda: SentencePieceTokenizer.train(["", "\n"], 300), EMPTY),
    (lambda: BPE.train(READER[:2], 9000), MORE), (lambda: WordTokenizer.train(READER[:2], 9000), MORE),
    (lambda: SentencePieceTokenizer.train(READER[:2], 9000), MORE),
    (lambda: SentencePieceTokenizer.train(READER[:2], 9000, model_type="bpe"), MORE),
    (lambda: BPE.train(READER, 200), "vocab_size=200 is too small: special tokens and bytes alone are 260"),
    (lambda: SentencePieceTokenizer.train(READER, 300), r"vocab_size=300 is too small: special tokens, bytes and characters alone are \d+"),
    (lambda: WordTokenizer.train(READER, 4), "vocab_size=4 leaves no room beside 4 special tokens"),
    (lambda: SentencePieceTokenizer.train(READER, 3000, model_type="magic"), "There is no model_type='magic'. Choose one of: unigram, bpe"),
    (lambda: SentencePieceTokenizer.train(READER, 3000, character_coverage=.5), "character_coverage is between 0.98 and 1, not 0.5"),
    (lambda: WordTokenizer.train(READER, split="magic"), "There is no split='magic'. Choose one of: words, characters, jieba"),
    (lambda: WordTokenizer(["a"], specials=("<pad>",)), "Words need <unk>"),
    (lambda: WordTokenizer(["a", "a"]), "Each unit must be there once"),
    (lambda: BPE(pattern="[a"), "The pattern is not a regular expression"), (lambda: BPE(pattern="(a)"), r"write \(\?:\.\.\.\)"),
    (lambda: SentencePieceTokenizer("tea.model"), "there is SentencePieceTokenizer.load"),
    (lambda: ByteTokenizer().encode("tea \ud83c"), "is half a character"), (lambda: CharTokenizer(["a"]).encode("tea \ud83c"), "is half a"),
    (lambda: SentencePieceTokenizer.train(READER, 3000).encode("tea \ud83c"), "is half a character"),
    (lambda: BPE.train(["\ud83c"], 300), "is half a character"),
    (lambda: SentencePieceTokenizer.train(["\ud83c"], 300), "is half a character"),
    (lambda: ByteTokenizer().encode(b"tea"), "A text is a str, not bytes"),
    (lambda: ByteTokenizer().encode(None), "A text is a str, not NoneType"),
    (lambda: BPE.train([None], 300), "A text is a str, not NoneType"), (lambda: ByteTokenizer().decode(["a"]), "Ids are whole numbers"),
    (lambda: ByteTokenizer().decode([1.5]), "Ids are whole numbers"),
    (lambda: ByteTokenizer().decode(5), r"Ids come in a row, as in \[5\]"),
    (lambda: ByteTokenizer().decode(torch.tensor(5)), "Ids come in a row"), (lambda: BPE(specials=("a",)), "'a' is a token of text"),
])  # fmt: skip
def test_bad_input(call, says):
    with pytest.raises(TokenizerError, match=says): call()


def test_the_largest_vocabulary_that_is_named_works():
    for train in (BPE.train, WordTokenizer.train, SentencePieceTokenizer.train):
        with pytest.raises(TokenizerError) as caught: train(READER[:20], 90000)
        most = int(str(caught.value).split("at most ")[1].split()[0])
        assert train(READER[:20], most).vocab_size == most


def test_optional_packages(monkeypatch):
    for name, call in (("tokenizers", lambda: HuggingFaceTokenizer("{}")), ("jieba", lambda: jieba_words("茶"))):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(TokenizerError, match=rf"needs the package {name}.*pip install 'lmbook\[tokenization\]'"): call()


def test_import_is_light():
    code = "import sys, lmbook.tokenizer_files; print(sorted({'tokenizers', 'jieba', 'sentencepiece', 'datasets'} & {*sys.modules}))"
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, check=True)
    assert run.stdout.strip() == "[]" and not run.stderr


def test_a_generator_a_corpus_and_one_text():
    world = SmallWorld()
    texts = list(world.texts("train", "en", 50))
    for train, size in ((BPE.train, 500), (WordTokenizer.train, 200), (SentencePieceTokenizer.train, 450)):
        records = (record["text"] for record in world.corpus("train", "en", 50))
        assert train(iter(texts), size).vocab == train(texts, size).vocab == train(records, size).vocab
    assert BPE.train("a rose is a rose is a rose", 262).tokens("rose") != list("rose")  # a text by itself is one text, not many letters
