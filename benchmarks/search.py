"""Search: how a sentence encoder is trained, what its vectors are worth beside people's judgement, and who finds SQuAD's paragraphs.

    python -m benchmarks.search --data DATA

DATA holds the folders sts (five sets of SemEval's pairs of sentences, with a similarity that people gave), squad (SQuAD v1.1's development
set) and all_MiniLM_L6_v2 (see benchmarks/pretrained.py). squad: 1,000 questions about the second half of the articles, searched among all
2,067 paragraphs; ours is trained on the questions of the first half; errors are by article. sts: correlation with people of what needs no
training (MiniLM on the same pairs: benchmarks.text_metrics). training: the chapter's encoder, trained in three ways by each seed (mean;
first token; mean, with a sentence of the same story as hard negative), and not trained; English questions about 271 stories, MRR over
English and over Chinese passages.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.corpora import Document
from lmbook.evaluation import pearson, spearman
from lmbook.search import BM25, Exact, Hit, Index, SearchConfig, SentenceEncoder, fuse, score_hits, split_passages, terms
from lmbook.small_world import SmallWorld

BENCHMARK = Benchmark(packages=("torch", "numpy", "safetensors", "tokenizers"), seeds=3)
STEPS = 150


# ---------------------------------------------------------------- Small World


def stories(split: Any, n: int) -> list[Document]:
    return [d for d in SmallWorld().documents(split, n) if not d.question["en"].startswith("In which town")]


def passages(stories: list[Document], lang: str) -> list[dict[str, Any]]:
    return split_passages([{"text": story.text(lang), "title": story.title[lang]} for story in stories])


def queries(stories: list[Document]) -> Iterator[dict[str, Any]]:
    "As the chapter asks."
    first = 0
    for story in stories:
        start, end = story.answer["en"]
        answer = story.text("en")[start:end]
        if story.question["en"].startswith("Where was"): right = [i for i, (en, _) in enumerate(story.sentences) if answer in en]
        else: right = [i for i, (a, b) in enumerate(story.sentence_spans("en")) if a <= start < b]
        yield {"query": f"{story.title['en']}: {story.question['en']}", "relevant": [first + i for i in right]}
        first += len(story.sentences)


def training_pairs(stories: list[Document], hard: bool, seed: int = 0) -> list[tuple[str, ...]]:
    en, zh, dice = passages(stories, "en"), passages(stories, "zh"), random.Random(seed)
    of: dict[int, list[int]] = {}
    for i, passage in enumerate(en): of.setdefault(passage["source"], []).append(i)
    pairs: list[tuple[str, ...]] = []

    def add(left: str, side: list[dict[str, Any]], right: list[int]) -> None:
        wrong = dice.choice([i for i in of[side[right[0]]["source"]] if i not in right])
        pairs.append((left, side[right[0]]["text"], *([side[wrong]["text"]] if hard else [])))

    for item in queries(stories):
        for side in (en, zh): add(item["query"], side, item["relevant"])
    for i in random.Random(0).sample(range(len(en)), 2 * len(stories)): add(en[i]["text"], zh, [i])
    return pairs


# ---------------------------------------------------------------- real texts


def articles(settings: Settings) -> list[list[dict[str, Any]]]:
    "SQuAD's paragraphs by article."
    [file] = settings.folder("squad").glob("*.json")
    data = [article["paragraphs"] for article in json.loads(file.read_text(encoding="utf-8"))["data"]]
    return data if len(data) > 1 else [data[0][: len(data[0]) // 2], data[0][len(data[0]) // 2 :]]


def trained(settings: Settings, articles: list[list[dict[str, Any]]]) -> SentenceEncoder:
    pairs = [(qa["question"], paragraph["context"]) for article in articles for paragraph in article for qa in paragraph["qas"]]
    return SentenceEncoder.fit(pairs, SearchConfig(vocab_size=4000, d_model=96, steps=settings.pick(250, 2), batch_size=32))


def bags(texts: list[str]) -> list[dict[str, float]]: # of length 1
    "Words, weighted by how rare they are among these texts."
    counts = [Counter(terms(text)) for text in texts]
    often = Counter(word for count in counts for word in count)
    rows = [{word: n * math.log(1 + len(texts) / often[word]) for word, n in count.items()} for count in counts]
    return [{word: x / max(math.hypot(*row.values()), 1e-9) for word, x in row.items()} for row in rows]


def shared_words(a: list[str], b: list[str]) -> np.ndarray: # (N,) cosines
    both = bags(a + b)
    return np.array([sum(x[word] * y.get(word, 0.0) for word in x) for x, y in zip(both, both[len(a) :])])


@BENCHMARK.part(data=["squad", "all_MiniLM_L6_v2"])
def squad(settings: Settings) -> dict[str, Any]:
    all_articles = articles(settings)
    half = len(all_articles) // 2
    ours, real = trained(settings, all_articles[:half]), SentenceEncoder.load(settings.folder("all_MiniLM_L6_v2"))
    texts = [paragraph["context"] for article in all_articles for paragraph in article]
    asked, right, owner, number = list[str](), list[list[int]](), list[int](), 0
    for a, article in enumerate(all_articles):
        for paragraph in article:
            if a >= half:
                for qa in paragraph["qas"]:
                    asked.append(qa["question"])
                    right.append([number])
                    owner.append(a)
            number += 1
    keep = random.Random(0).sample(range(len(asked)), min(len(asked), settings.pick(1000, 8)))
    asked, right, owner = [asked[i] for i in keep], [right[i] for i in keep], [owner[i] for i in keep]
    rankings: dict[str, list[list[Hit]]] = {"BM25": BM25(texts).search(asked, 100)}
    for name, encoder in (("ours", ours), ("MiniLM", real)):
        rankings[name] = Exact(encoder.encode(texts)).search(encoder.encode(asked), 100)
        rankings[f"BM25 and {name}"] = [fuse(pair, 100) for pair in zip(rankings["BM25"], rankings[name])]
    found: dict[str, Any] = {"paragraphs": len(texts), "questions": len(asked)}
    for name, hits in rankings.items():
        found[name] = {}
        for k in (1, 10, 100):
            scores = score_hits(hits, right, k)
            for key in ("MRR", "recall"):
                score = scores[f"{key}@{k}"].clustered(owner) if len(set(owner)) > 1 else scores[f"{key}@{k}"]
                found[name][f"{key}@{k}"] = {"value": score.value, "error": score.error if math.isfinite(score.error) else None}
        print(name, {key: round(row["value"], 3) for key, row in found[name].items()}, flush=True)
    return found


@BENCHMARK.part(data=["sts"])
def sts(settings: Settings) -> dict[str, Any]:
    "Of what needs no training; benchmarks.text_metrics has MiniLM on the same pairs."
    blank = SentenceEncoder.fit([("a", "b"), ("c", "d")], SearchConfig(vocab_size=260, steps=1, lr=1e-9))
    ways: dict[str, Callable[[list[str], list[str]], np.ndarray]] = {"shared rare words": shared_words, "not trained": blank.similarity}
    found: dict[str, Any] = {name: {} for name in ways}
    for file in sorted(settings.folder("sts").glob("*.tsv")):
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        gold, a, b = [float(row[0]) for row in rows], [row[1] for row in rows], [row[2] for row in rows]
        for name, similar in ways.items():
            cosines = similar(a, b)
            r, rho = pearson(cosines, gold), spearman(cosines, gold)
            found[name][file.stem] = {"pearson": r.value, "error": r.error, "spearman": rho.value}
        print(file.stem, {name: round(found[name][file.stem]["pearson"], 3) for name in ways}, flush=True)
    return found


@BENCHMARK.part()
def training(settings: Settings) -> dict[str, Any]:
    learn, test = stories("train", settings.pick(1200, 20)), stories("test", settings.pick(300, 12))
    asked = list(queries(test))
    sides = {lang: passages(test, lang) for lang in ("en", "zh")}
    ways: dict[str, tuple[Any, bool]] = {
        "not trained": ("mean", False), "mean": ("mean", False), "first token": ("first", False), "mean, hard negatives": ("mean", True),
    }  # fmt: skip
    found: dict[str, Any] = {"stories": len(test), "passages": len(sides["en"]), "steps": settings.pick(STEPS, 2)}
    for name, (pooling, hard) in ways.items():
        values: dict[str, list[float]] = {"en": [], "zh": []}
        for seed in range(settings.seeds):
            config = SearchConfig(steps=settings.pick(STEPS, 2), pooling=pooling, seed=seed)
            if name == "not trained": config = SearchConfig(steps=1, lr=1e-9, seed=seed)
            encoder = SentenceEncoder.fit(training_pairs(learn, hard, seed), config)
            for lang, side in sides.items():
                values[lang].append(Index(side, encoder).evaluate(asked, 10, "vectors")["MRR@10"].value)
        found[name] = {lang: {**mean_sd(each), "each": each} for lang, each in values.items()}
        print(name, {lang: round(row["mean"], 3) for lang, row in found[name].items()}, flush=True)
    words = {lang: Index(side).evaluate(asked, 10)["MRR@10"] for lang, side in sides.items()}
    found["BM25"] = {lang: {"mean": score.value, "error": score.error} for lang, score in words.items()}
    return found


if __name__ == "__main__": run(__file__)
