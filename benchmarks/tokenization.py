"""How fast lmbook.tokenization learns and encodes, beside Hugging Face tokenizers and SentencePiece, and what tokenizers do to Chinese.

    python -m benchmarks.tokenization --data ../shared/data

The data folder is described in its own README; without it, speed is measured on Python's documentation and on text of Small World only, and
the parts that need real text are left out. One thread for everybody; times are the best of some runs.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from benchmarks.common import Benchmark, Settings, best_of, fastest, in_turns, run, table
from lmbook.corpora import load_reader, python_docs
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import (
    BPE,
    LONGEST,
    PATTERN,
    SPECIALS,
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    jieba_words,
)
from lmbook.tokenizer_files import SentencePieceTokenizer, ngram_cost, spell

MERGES = 8000
SIZE = 1_000_000  # bytes of text
BENCHMARK = Benchmark(
    packages=("tokenizers", "sentencepiece", "jieba", "torch", "numpy"), facts=lambda settings: {"merges": settings.pick(MERGES, 500)},
)


def first(text: str, settings: Settings) -> str: return text.encode()[: settings.pick(SIZE, 20_000)].decode(errors="ignore")


def hugging_face(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    "Train the library's byte-level BPE at our settings."
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in (PATTERN, f"[\\s\\S]{{1,{LONGEST}}}")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def speed_on(name: str, text: str, settings: Settings) -> dict[str, object]:
    "Seconds to learn 8,000 merges on a text, and megabytes a second to encode it, whole and for the first time."
    V, rounds = settings.pick(MERGES, 500) + 256 + len(SPECIALS), settings.pick(5, 1)
    texts, megabytes = text.split("\n"), len(text.encode()) / 1e6
    lines = [line + "\n" for line in texts]  # what the SentencePiece trainer gets, line breaks aside
    ours, theirs = BPE.train(lines, V), hugging_face(lines, V)
    pieces = {kind: SentencePieceTokenizer.train(texts, V, model_type=kind) for kind in ("bpe", "unigram")}
    same = tokenizers.Tokenizer.from_str(ours.to_bytes().decode())  # our merges in their library
    same.encode_special_tokens = True
    assert same.encode(text).ids == ours.encode(text) and ours.decode(ours.encode(text)) == text

    content = ours.to_bytes().decode()
    learn = fastest(in_turns({
        "ours, BPE": lambda: BPE.train(lines, V),
        "tokenizers, BPE": lambda: hugging_face(lines, V),
        "SentencePiece, BPE": lambda: SentencePieceTokenizer.train(texts, V, model_type="bpe"),
        "SentencePiece, unigram": lambda: SentencePieceTokenizer.train(texts, V),
    }, rounds, warm_up=False))
    encode = fastest(in_turns({  # a new tokenizer each time, whose cache is empty; what making it takes is subtracted
        "ours, BPE": lambda: BPE(ours.merges).encode(text),
        "ours, making": lambda: BPE(ours.merges),
        "tokenizers, BPE": lambda: tokenizers.Tokenizer.from_str(content).encode(text),
        "tokenizers, making": lambda: tokenizers.Tokenizer.from_str(content),
        "SentencePiece, BPE": lambda: pieces["bpe"].encode(text),
        "SentencePiece, unigram": lambda: pieces["unigram"].encode(text),
        "ours, again": lambda: ours.encode(text),
        "tokenizers, again": lambda: same.encode(text),
    }, rounds, warm_up=False))
    rows = []
    for library, seconds in learn.items():
        who = library.split(",")[0]
        encoding = encode[library] - encode.get(f"{who}, making", 0)
        rows.append({"library": library, "train_s": seconds, "encode_megabytes_per_s": megabytes / encoding})
        if f"{who}, again" in encode: rows[-1]["encode_again_megabytes_per_s"] = megabytes / encode[f"{who}, again"]
    theirs_vocab, our_vocab = set(theirs.get_vocab()), set(ours.vocab)
    return {"text": name, "bytes": len(text.encode()), "vocab_size": V, "rows": rows,
            "vocabulary_shared_with_tokenizers": len(our_vocab & theirs_vocab) / len(our_vocab),
            "tokens": {"ours": len(ours.encode(text)), "tokenizers": len(theirs.encode(text).ids),
                       "SentencePiece, BPE": len(pieces["bpe"].encode(text)),
                       "SentencePiece, unigram": len(pieces["unigram"].encode(text))}}


def ways_to_cut(train: list[str], test: list[str], vocab_size: int) -> list[dict[str, object]]:
    "The ways to cut Chinese, on held-out text: length, what is unknown, speed, and what an n-gram model pays per character."
    single = Counter(c for text in train for c in text)
    letters = {c for c, n in single.items() if n > 1}  # what occurs once is spelled, so that a model learns what spelling looks like
    coverage = max(.98, sum(single[c] for c in letters) / single.total())  # SentencePiece takes no less
    counts = Counter(word for text in train for word in jieba_words(text))
    frequent = [word for word, n in counts.most_common() if n > 1 and word not in letters]
    words = letters | set(frequent[: max(0, vocab_size - 256 - len(letters))])
    pieces = {kind: SentencePieceTokenizer.train(train, vocab_size, model_type=kind, character_coverage=coverage)
              for kind in ("unigram", "bpe")}
    merges, plain = BPE.train(train, vocab_size), ByteTokenizer()  # its cache is empty: the speed below is that of a text seen first
    cut = {
        "characters": (lambda text: spell(text, letters), len(letters) + 256),
        "jieba": (lambda text: spell(jieba_words(text), words), len(words) + 256),
        "SentencePiece, unigram": (pieces["unigram"].encode, vocab_size),
        "SentencePiece, BPE": (pieces["bpe"].encode, vocab_size),
        "byte-level BPE": (merges.encode, vocab_size),
        "bytes": (plain.encode, 256),
    }
    unknown = {"characters": CharTokenizer.train(train, min_count=2), "jieba": WordTokenizer(sorted(words), split="jieba")}
    characters, megabytes = sum(map(len, test)), sum(len(text.encode()) for text in test) / 1e6
    rows = []
    for name, (encode, size) in cut.items():
        seconds = best_of(1, lambda: [encode(text) for text in test])  # noqa: B023
        a, b = [encode(text) for text in train], [encode(text) for text in test]
        orders = range(2, 8) if name == "bytes" else range(1, 6)
        costs = {n: ngram_cost(a, b, size, n) / characters for n in orders}
        best = min(costs, key=costs.get)
        ids = [i for text in test for i in unknown[name].encode(text)] if name in unknown else []
        rows.append({"way": name, "vocab_size": size, "tokens_per_character": sum(map(len, b)) / characters,
                     "unknown_share": ids.count(unknown[name].unk_id) / len(ids) if ids else 0.0, "megabytes_per_s": megabytes / seconds,
                     "nats_per_character": costs[best], "best_order": best, "by_order": {str(n): cost for n, cost in costs.items()}})
    return rows


def wikipedia(settings: Settings) -> list[str]:
    [path] = settings.folder("zhwiki").glob("*.txt")
    return path.read_text(encoding="utf-8").splitlines()


@BENCHMARK.part(data=["zhwiki"])
def chinese(settings: Settings) -> list[dict[str, object]]:
    paragraphs, out = wikipedia(settings), []
    random.Random(0).shuffle(paragraphs)
    cut = len(paragraphs) * 9 // 10
    for vocab_size in settings.pick((8000, 16000), (700,)):
        rows = ways_to_cut(paragraphs[:cut], paragraphs[cut:], vocab_size)
        out.append({"vocab_size": vocab_size, "train_paragraphs": cut, "test_paragraphs": len(paragraphs) - cut,
                    "test_characters": sum(map(len, paragraphs[cut:])), "rows": rows})
        print(f"  vocabulary {vocab_size}")
        table([{key: value for key, value in row.items() if key != "by_order"} for row in rows], "    ")
    return out


@BENCHMARK.part(data=["tatoeba_en_zh"])
def love(settings: Settings) -> dict[str, object]:
    "Tatoeba's pairs: how the English side puts a sentence with the word 爱 (love), and one with 喜欢 (like)."
    table = {word: Counter() for word in ("爱", "喜欢")}
    seen = set()
    [path] = settings.folder("tatoeba_en_zh").glob("*.t[sx][vt]")
    for line in path.read_text(encoding="utf-8").splitlines():
        english, chinese, *_ = line.split("\t")
        if chinese in seen: continue
        seen.add(chinese)
        units = set(jieba_words(chinese))
        found = [word for word in table if word in units]
        if len(found) != 1: continue
        love, like = (bool(re.search(rf"\b{w}", english.lower())) for w in (r"lov(?:e|es|ed|ing)\b", r"(?:dis)?lik(?:e|es|ed|ing)\b"))
        table[found[0]]["love" if love and not like else "like" if like and not love else "other"] += 1
    plain = {word: {side: counts[side] for side in ("love", "like")} for word, counts in table.items()}
    total = sum(sum(row.values()) for row in plain.values())
    right = sum(max(row.values()) for row in plain.values())
    merged = max(sum(row[side] for row in plain.values()) for side in ("love", "like"))
    return {"pairs": {word: dict(counts) for word, counts in table.items()}, "love_or_like": total,
            "errors_knowing_the_word": 1 - right / total, "errors_after_merging": 1 - merged / total}


@BENCHMARK.part(data=["tinyshakespeare", "zhwiki"])
def speed(settings: Settings) -> list[dict[str, object]]:
    shakespeare = (settings.folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    texts = {"tinyshakespeare": shakespeare, "Chinese Wikipedia": "\n".join(wikipedia(settings))}
    return [speed_on(name, first(text, settings), settings) for name, text in texts.items()]


@BENCHMARK.part()
def speed_without_data(settings: Settings) -> list[dict[str, object]]:
    "The same on text of ours. Small World alone has too few words for 8,000 merges in English."
    own = {"en": [*(r["text"] for r in python_docs()), *(d.text("en") for d in load_reader())], "zh": []}
    names = {"en": "documentation, reader, Small World", "zh": "Small World in Chinese"}
    world = SmallWorld(SmallWorldConfig(limit=settings.pick(None, 3)))
    texts = {names[lang]: "\n".join([*own[lang], *world.texts("train", lang, settings.pick(4000, 80))]) for lang in own}
    return [speed_on(name, first(text, settings), settings) for name, text in texts.items()]


if __name__ == "__main__": run(__file__)
