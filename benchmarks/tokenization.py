"""How fast lmbook.tokenization learns and encodes, beside Hugging Face tokenizers and SentencePiece, and what tokenizers do to Chinese.

    python -m benchmarks.tokenization --data ../shared/data

Prints tables and writes benchmarks/results/tokenization.json. The data folder is described in its own README; without it, speed is measured
on Python's documentation and on text of Small World, and the parts that need real text are left out. One thread for everybody; times are the best of some runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from benchmarks.common import best_of, machine, rounded
from lmbook.corpora import load_reader, python_docs
from lmbook.small_world import SmallWorld
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

RESULTS = Path(__file__).parent / "results" / "tokenization.json"
PACKAGES = ("tokenizers", "sentencepiece", "jieba", "torch", "numpy")  # whose versions are noted
MERGES = 8000
VOCAB = MERGES + 256 + len(SPECIALS)
SIZE = 1_000_000  # bytes of text


def first(text: str, size: int = SIZE) -> str: return text.encode()[:size].decode(errors="ignore")


def in_turn(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    "The fastest time of each in seconds. They take turns, so that a busy minute of the machine hits all of them."
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items(): best[name] = min(best[name], best_of(1, run))
    return best


def hugging_face(texts: Sequence[str]) -> tokenizers.Tokenizer:
    "Train the library's byte-level BPE at our settings."
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(p), "isolated") for p in (PATTERN, f"[\\s\\S]{{1,{LONGEST}}}")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def speed(name: str, text: str) -> dict[str, object]:
    "Seconds to learn 8,000 merges on a text, and megabytes a second to encode it, whole and for the first time."
    texts, megabytes = text.split("\n"), len(text.encode()) / 1e6
    lines = [line + "\n" for line in texts]  # what the SentencePiece trainer gets, line breaks aside
    ours, theirs = BPE.train(lines, VOCAB), hugging_face(lines)
    pieces = {kind: SentencePieceTokenizer.train(texts, VOCAB, model_type=kind) for kind in ("bpe", "unigram")}
    same = tokenizers.Tokenizer.from_str(ours.to_bytes().decode())  # our merges in their library
    same.encode_special_tokens = True
    assert same.encode(text).ids == ours.encode(text) and ours.decode(ours.encode(text)) == text

    content = ours.to_bytes().decode()
    learn = in_turn({
        "ours, BPE": lambda: BPE.train(lines, VOCAB),
        "tokenizers, BPE": lambda: hugging_face(lines),
        "SentencePiece, BPE": lambda: SentencePieceTokenizer.train(texts, VOCAB, model_type="bpe"),
        "SentencePiece, unigram": lambda: SentencePieceTokenizer.train(texts, VOCAB),
    })
    encode = in_turn({  # a new tokenizer each time, whose cache is empty; what making it takes is subtracted
        "ours, BPE": lambda: BPE(ours.merges).encode(text),
        "ours, making": lambda: BPE(ours.merges),
        "tokenizers, BPE": lambda: tokenizers.Tokenizer.from_str(content).encode(text),
        "tokenizers, making": lambda: tokenizers.Tokenizer.from_str(content),
        "SentencePiece, BPE": lambda: pieces["bpe"].encode(text),
        "SentencePiece, unigram": lambda: pieces["unigram"].encode(text),
        "ours, again": lambda: ours.encode(text),
        "tokenizers, again": lambda: same.encode(text),
    })
    rows = []
    for library, seconds in learn.items():
        who = library.split(",")[0]
        rows.append({"library": library, "train_s": seconds, "encode_megabytes_per_s": megabytes / (encode[library] - encode.get(f"{who}, making", 0))})
        if f"{who}, again" in encode: rows[-1]["encode_again_megabytes_per_s"] = megabytes / encode[f"{who}, again"]
    theirs_vocab, our_vocab = set(theirs.get_vocab()), set(ours.vocab)
    return {"text": name, "bytes": len(text.encode()), "vocab_size": VOCAB, "rows": rows,
            "vocabulary_shared_with_tokenizers": len(our_vocab & theirs_vocab) / len(our_vocab),
            "tokens": {"ours": len(ours.encode(text)), "tokenizers": len(theirs.encode(text).ids),
                       "SentencePiece, BPE": len(pieces["bpe"].encode(text)), "SentencePiece, unigram": len(pieces["unigram"].encode(text))}}


def chinese(train: list[str], test: list[str], vocab_size: int) -> list[dict[str, object]]:
    "The ways to cut Chinese, on held-out text: length, what is unknown, speed, and what an n-gram model pays per character."
    single = Counter(c for text in train for c in text)
    letters = {c for c, n in single.items() if n > 1}  # what occurs once is spelled, so that a model learns what spelling looks like
    coverage = max(.98, sum(single[c] for c in letters) / single.total())  # SentencePiece takes no less
    counts = Counter(word for text in train for word in jieba_words(text))
    frequent = [word for word, n in counts.most_common() if n > 1 and word not in letters]
    words = letters | set(frequent[: max(0, vocab_size - 256 - len(letters))])
    pieces = {kind: SentencePieceTokenizer.train(train, vocab_size, model_type=kind, character_coverage=coverage) for kind in ("unigram", "bpe")}
    merges, plain = BPE.train(train, vocab_size), ByteTokenizer()  # its cache is empty: the speed below is that of a text seen for the first time
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


def love(path: Path) -> dict[str, object]:
    "Tatoeba's pairs: how the English side puts a sentence with the word 爱 (love), and one with 喜欢 (like)."
    table = {word: Counter() for word in ("爱", "喜欢")}
    seen = set()
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


def language(data: Path, paragraphs: list[str]) -> dict[str, object]:
    "The parts that are about language: ways to cut Chinese, and two words that mean love and like."
    result = {}
    random.Random(0).shuffle(paragraphs)
    cut = len(paragraphs) * 9 // 10
    for vocab_size in (8000, 16000):
        rows = chinese(paragraphs[:cut], paragraphs[cut:], vocab_size)
        result.setdefault("chinese", []).append({"vocab_size": vocab_size, "train_paragraphs": cut, "test_paragraphs": len(paragraphs) - cut,
                                                 "test_characters": sum(map(len, paragraphs[cut:])), "rows": rows})
        print(f"\nChinese Wikipedia, vocabulary {vocab_size}\n{'way':24}{'ids':>8}{'tokens/char':>13}{'unknown':>9}{'MB/s':>7}{'nats/char':>11}{'order':>7}")
        for row in rows:
            print(f"{row['way']:24}{row['vocab_size']:8}{row['tokens_per_character']:13.3f}{row['unknown_share']:9.2%}"
                  f"{row['megabytes_per_s']:7.2f}{row['nats_per_character']:11.3f}{row['best_order']:7}")
    [pairs] = (data / "tatoeba_en_zh").glob("*.t[sx][vt]")
    result["love"] = love(pairs)
    print("\nlove and like:", result["love"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--only-speed", action="store_true", help="measure speed only, and keep the other results")
    arguments = parser.parse_args()
    data = arguments.data
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if arguments.only_speed else {}
    result: dict[str, object] = before | {
        "date": datetime.date.today().isoformat(), "command": "python -m benchmarks.tokenization --data ../shared/data", "machine": machine(*PACKAGES), "threads": 1,
        "merges": MERGES}
    real = data is not None and data.is_dir()
    if not real:
        print("no data: give --data to measure on real text; the file of results is left as it is")
        # Small World alone has too few words for 8,000 merges in English
        own = {"en": [*(r["text"] for r in python_docs()), *(d.text("en") for d in load_reader())], "zh": []}
        names = {"en": "documentation, reader, Small World", "zh": "Small World in Chinese"}
        texts = {names[lang]: first("\n".join([*own[lang], *SmallWorld().texts("train", lang, 4000)])) for lang in own}
    else:
        texts = {"tinyshakespeare": first((data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8"))}
        [wiki] = (data / "zhwiki").glob("*.txt")
        paragraphs = wiki.read_text(encoding="utf-8").splitlines()
        texts["Chinese Wikipedia"] = first("\n".join(paragraphs))
        if not arguments.only_speed: result |= language(data, paragraphs)
    result["speed"] = [speed(name, text) for name, text in texts.items()]
    for part in result["speed"]:
        print(f"\n{part['text']}, {part['bytes']:,} bytes, {MERGES:,} merges\n{'':24}{'learn, s':>10}{'encode, MB/s':>14}{'again':>8}")
        for row in part["rows"]:
            again = f"{row['encode_again_megabytes_per_s']:8.1f}" if "encode_again_megabytes_per_s" in row else ""
            print(f"{row['library']:24}{row['train_s']:10.2f}{row['encode_megabytes_per_s']:14.2f}{again}")
        print(f"vocabulary shared with tokenizers: {part['vocabulary_shared_with_tokenizers']:.1%}; tokens: {part['tokens']}")
    if not real: return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
