"""Metrics of texts against the libraries that papers use: the same numbers, how fast; and against what people think.

    python -m benchmarks.text_metrics --data DATA

DATA holds the folders squad (SQuAD v1.1's development set), sts (five sets of SemEval's pairs of sentences, with a similarity that people
gave) and all_MiniLM_L6_v2 (see benchmarks/pretrained.py). speed: processor seconds for so many pairs of texts, in turns, and the ratio
(above 1: ours is faster); it asserts that the scores are equal. answers: two simple systems that answer SQuAD's questions, scored by ours
and by the official arithmetic, written out here. sts: correlation of metrics with people's judgements. blind: sentences of Small World in
which one word was replaced by a synonym, or by its opposite, or that were negated: how often a metric prefers the synonym.
"""

from __future__ import annotations

import json
import random
import re
import string
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np

import lmbook.text_metrics as tm
from benchmarks.common import Benchmark, Option, Settings, in_turns, ratio, run
from lmbook.evaluation import pearson, spearman
from lmbook.pretrained import load_pretrained
from lmbook.small_world import SmallWorld
from lmbook.text_metrics import (
    answer_f1,
    bert_score,
    bleu,
    chrf,
    embedding_similarity,
    exact_match,
    rouge,
    sentence_vectors,
    ter,
    token_vectors,
    wer,
)  # fmt: skip
from lmbook.tokenizer_files import load_tokenizer

PACKAGES = ("numpy", "torch", "sacrebleu", "rouge_score", "jiwer")
KINDS = ("rougeL", "rougeLsum")
BENCHMARK = Benchmark(packages=PACKAGES, options=[Option("rounds", 3, dry=1, help="rounds in which all take turns")])


def pairs(n: int) -> tuple[list[str], list[str]]:
    "Texts of three sentences of Small World, and the same with a fifth of their words wrong, left out or elsewhere."
    rng, said, wanted = random.Random(0), [], []
    for document in SmallWorld().documents("train"):
        sentences = [en for en, _ in document.sentences]
        for i in range(0, len(sentences) - 2, 3):
            wanted.append(" ".join(sentences[i : i + 3]))
            words = wanted[-1].split()
            for _ in range(max(1, len(words) // 5)):
                i, kind = rng.randrange(len(words)), rng.randrange(3)
                word = words.pop(i)
                if kind == 0: words.insert(rng.randrange(len(words) + 1), word)
                elif kind == 1: words.insert(i, rng.choice(words))
            said.append(" ".join(words))
            if len(said) == n: return said, wanted
    raise AssertionError


@BENCHMARK.part(needs=["sacrebleu", "rouge_score", "jiwer"])
def speed(settings: Settings) -> dict[str, Any]:
    import logging

    import jiwer
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF, TER

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    n = settings.pick(10_000, 20)
    said, wanted = pairs(n)
    few = settings.pick(300, 5)  # of what takes long

    lines = [[text.replace(". ", ".\n") for text in texts] for texts in (said, wanted)]  # a sentence a line, for rougeLsum

    def rouge_score(*kinds: str) -> float:
        scorer, texts = RougeScorer(list(kinds)), lines if "rougeLsum" in kinds else (said, wanted)
        return sum(scores[kind].fmeasure for a, b in zip(*texts) for scores in [scorer.score(b, a)] for kind in kinds) / n

    def ours_rouge(*kinds: Any) -> float:
        tm._rouge_words.cache_clear()
        return sum(rouge(*(lines if kind == "rougeLsum" else (said, wanted)), kind).value for kind in kinds)

    ways: dict[str, tuple[int, Any, Any]] = {
        "BLEU": (n, lambda: bleu(said, wanted).value, lambda: BLEU().corpus_score(said, [wanted]).score),
        "chrF": (n, lambda: chrf(said, wanted).value, lambda: CHRF().corpus_score(said, [wanted]).score),
        "TER": (few, lambda: ter(said[:few], wanted[:few]).value, lambda: TER().corpus_score(said[:few], [wanted[:few]]).score),
        "WER": (n, lambda: wer(said, wanted).value, lambda: jiwer.wer(wanted, said)),
    } | {
        name: (n, partial(ours_rouge, *kinds), partial(rouge_score, *kinds))
        for name, kinds in {"ROUGE-1, -2 and -L": ("rouge1", "rouge2", "rougeL"), **{k: (k,) for k in KINDS}}.items()
    }  # fmt: skip
    found: dict[str, Any] = {"words_a_text": sum(len(text.split()) for text in wanted) / n}
    for name, (many, ours, theirs) in ways.items():
        a, b = ours(), theirs()
        assert abs(a - b) < 1e-9 * max(1, abs(b)), name
        times = in_turns({"ours": ours, "theirs": theirs}, settings.rounds, clock=time.process_time, warm_up=False)
        fastest = {side: min(seconds) for side, seconds in times.items()}
        found[name] = {"pairs": many, **fastest, "ratio": ratio(times["theirs"], times["ours"])}
        print(name, found[name], flush=True)
    return found


# ---------------------------------------------------------------- SQuAD


def words(text: str) -> list[str]: return re.findall(r"\w+", text.lower())


def best_sentence(context: str, question: str) -> str:
    "The sentence that shares most words with the question, rare ones of the paragraph counting for more."
    sentences = re.split(r"(?<=[.?!])\s+", context)
    often = Counter(word for sentence in sentences for word in set(words(sentence)))
    return max(sentences, key=lambda s: sum(1 / often[w] for w in set(words(s)) & set(words(question))) / (10 + len(words(s))))


def first_name(context: str, question: str) -> str:
    "In that sentence the first number or run of capitalised words that the question does not have."
    sentence, asked = best_sentence(context, question), set(words(question))
    for span in re.findall(r"(?:[A-Z][\w'-]*|\d[\d,.]*\d|\d+)(?: (?:[A-Z][\w'-]*|\d[\d,.]*\d|\d+))*", sentence):
        if not set(words(span)) & asked and words(span) not in (["the"], ["in"], ["a"]): return span
    return sentence


def official(said: list[str], wanted: list[list[str]]) -> tuple[float, float]:
    "Exact match and F1 in percent, as the task defines them: one question after the other, by hand."

    def plain(text: str) -> str:
        kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    def f1(a: str, b: str) -> float:
        ours, theirs = plain(a).split(), plain(b).split()
        same = sum((Counter(ours) & Counter(theirs)).values())
        if not same: return 0.0
        p, r = same / len(ours), same / len(theirs)
        return 2 * p * r / (p + r)

    exact = sum(max(float(plain(a) == plain(b)) for b in right) for a, right in zip(said, wanted))
    return 100 * exact / len(said), 100 * sum(max(f1(a, b) for b in right) for a, right in zip(said, wanted)) / len(said)


@BENCHMARK.part(data=["squad"])
def answers(settings: Settings) -> dict[str, Any]:
    [file] = settings.folder("squad").glob("*.json")
    paragraphs = [p for article in json.loads(file.read_text(encoding="utf-8"))["data"] for p in article["paragraphs"]]
    asked = [(p["context"], q["question"], [a["text"] for a in q["answers"]]) for p in paragraphs for q in p["qas"]]
    wanted = [right for _, _, right in asked]
    systems = {"best sentence": best_sentence, "first name in it": first_name}
    found: dict[str, Any] = {"questions": len(asked)}
    for name, system in systems.items():
        said = [system(context, question) for context, question, _ in asked]
        exact, f1 = exact_match(said, wanted), answer_f1(said, wanted)
        by_hand = official(said, wanted)
        assert np.allclose(by_hand, [100 * exact.value, 100 * f1.value], rtol=0, atol=1e-9)
        found[name] = {"exact": 100 * exact.value, "exact_error": 100 * exact.error, "F1": 100 * f1.value, "F1_error": 100 * f1.error,
                       "official": list(by_hand)}  # fmt: skip
    people = [right[0] for right in wanted if len(right) > 1]
    others = [right[1:] for right in wanted if len(right) > 1]
    if people: found["a person"] = {"exact": 100 * exact_match(people, others).value, "F1": 100 * answer_f1(people, others).value}
    return found


# ---------------------------------------------------------------- what people think


def encoder(settings: Settings) -> tuple[Any, Any]:
    folder = settings.folder("all_MiniLM_L6_v2")
    return load_pretrained(folder).eval(), load_tokenizer(folder)


def all_metrics(model: Any, tokenizer: Any) -> dict[str, Any]:
    read: dict[str, np.ndarray] = {}  # no text is read twice

    def all_tokens(texts: list[str]) -> list[np.ndarray]:
        new = sorted(set(texts) - set(read), key=len)
        read.update(zip(new, token_vectors(model, tokenizer, new, ends=True)))
        return [read[text] for text in texts]

    def tokens(texts: list[str]) -> list[np.ndarray]:
        first = int(tokenizer.bos_id is not None)  # without [CLS] and [SEP]
        inside = [x[first : first + len(tokenizer.encode(text))] for text, x in zip(texts, all_tokens(texts))]
        for ours, theirs in zip(inside, token_vectors(model, tokenizer, texts[:2])): np.testing.assert_allclose(ours, theirs, atol=1e-4)
        return inside

    def whole(texts: list[str]) -> np.ndarray:
        means = np.array([x.mean(0) for x in all_tokens(texts)])
        vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        assert np.allclose(vectors[:2], sentence_vectors(model, tokenizer, texts[:2]), atol=1e-4)
        return vectors

    return {
        "F1 of words": answer_f1, "BLEU": bleu, "chrF": chrf, "TER": ter, "ROUGE-L": rouge,
        "cosine": partial(embedding_similarity, embed=whole), "BERTScore": partial(bert_score, embed=tokens),
    }  # fmt: skip


def better(name: str, items: np.ndarray) -> np.ndarray: return -items if name == "TER" else items


@BENCHMARK.part(data=["sts", "all_MiniLM_L6_v2"])
def sts(settings: Settings) -> dict[str, Any]:
    model = encoder(settings)
    found: dict[str, Any] = {}
    for file in sorted(settings.folder("sts").glob("*.tsv")):
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        gold, a, b = np.array([float(row[0]) for row in rows]), [row[1] for row in rows], [row[2] for row in rows]
        found[file.stem] = {}
        for name, metric in all_metrics(*model).items():
            items = better(name, metric(a, b).items)
            r, rho = pearson(items, gold), spearman(items, gold)
            found[file.stem][name] = {"pearson": r.value, "error": r.error, "spearman": rho.value}
        print(file.stem, {name: round(row["pearson"], 3) for name, row in found[file.stem].items()}, flush=True)
    return found


OPPOSITES = [("large", "small"), ("new", "old"), ("beautiful", "ugly"), ("heavy", "light"), ("clean", "dirty"), ("expensive", "cheap"),
             ("happy", "sad"), ("calm", "angry"), ("confident", "afraid"), ("strange", "common")]  # fmt: skip


def changed(n: int) -> dict[str, list[str]]: # "truth", "synonym", "opposite", "not": n sentences each
    "Sentences of Small World, and each of them with one word replaced, or with a `not`."
    world = SmallWorld()
    groups = {key.split(".")[1]: row for key, row in world.synonyms().items()}
    other = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
    group_of = {word: name for name in other for word in groups[name]}
    found: dict[str, list[str]] = {"truth": [], "synonym": [], "opposite": [], "not": []}
    seen: set[str] = set()
    for document in world.documents("train"):
        for sentence, _ in document.sentences:
            here = [word for word in re.findall(r"[a-z-]+", sentence) if word in group_of]
            if len(here) != 1 or sentence in seen or not re.search(r"\b(?:is|was|are|were)\b", sentence): continue
            if re.search(rf"\ban? {here[0]}\b", sentence, re.IGNORECASE): continue  # another word may ask for the other article
            seen.add(sentence)
            [word], name = here, group_of[here[0]]
            place = groups[name].index(word)

            def put(new: str, sentence: str = sentence, word: str = word) -> str: return re.sub(rf"\b{re.escape(word)}\b", new, sentence)

            found["truth"].append(sentence)
            found["synonym"].append(put(groups[name][(place + 1) % 3]))
            found["opposite"].append(put(groups[other[name]][place]))
            found["not"].append(re.sub(r"\b(is|was|are|were)\b", r"\1 not", sentence, count=1))
            if len(seen) == n: return found
    raise AssertionError


@BENCHMARK.part(data=["all_MiniLM_L6_v2"])
def blind(settings: Settings) -> dict[str, Any]:
    texts = changed(settings.pick(500, 10))
    found: dict[str, Any] = {"sentences": len(texts["truth"])}
    for name, metric in all_metrics(*encoder(settings)).items():
        items = {kind: better(name, metric(said, texts["truth"]).items) for kind, said in texts.items() if kind != "truth"}
        ahead = {kind: items["synonym"] - items[kind] for kind in ("opposite", "not")}
        wins = {kind: float(np.where(abs(x) <= 1e-9, 0.5, x > 0).mean()) for kind, x in ahead.items()}  # a tie is half a win
        found[name] = {"mean": {kind: float(x.mean()) for kind, x in items.items()}, "prefers the synonym": wins}
    return found


if __name__ == "__main__": run(__file__)
