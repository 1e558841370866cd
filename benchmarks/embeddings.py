"""How fast word vectors are learned and how good they are, beside gensim's compiled Word2Vec at equal settings.

    python -m benchmarks.embeddings --data ../shared/data

Skip-gram with negative sampling: 100 dimensions, window 5, 5 noise words, words that occur at least 5 times, subsampling 1e-3, rate 0.025.
Time is that of the whole call, from lists of words to vectors. Runs of both take turns, so that a busy machine is busy for both. The real
text is 96 articles of Wikipedia and the paragraphs of SQuAD, 5 epochs, with a seed for each round, judged by WordSim-353, SimLex-999 and
the analogies of Mikolov et al.; both are judged by the same functions (tests/test_embeddings.py: they agree with gensim's own). The long
text is 17 million words of Small World, one epoch, judged by what its grammar knows. Without --data only the long text is measured.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gensim.models import Word2Vec

from benchmarks.common import Benchmark, Option, Settings, mean_sd, ratio, run
from lmbook.embeddings import Word2VecConfig, train_word2vec
from lmbook.grammar import WORD
from lmbook.small_world import SmallWorld
from lmbook.word_vectors import WordVectors, read_analogies, read_similarities, score_analogies, score_similarity

SETTINGS = {"dim": 100, "window": 5, "negative": 5, "min_count": 5, "subsample": 1e-3, "lr": 0.025}
Text = list[list[str]]
BENCHMARK = Benchmark(
    packages=("torch", "numpy", "gensim"), facts=lambda settings: {"settings": SETTINGS},
    options=[Option("rounds", 5, 2, "rounds and seeds on the real text"), Option("long", 17_000_000, 20_000, "words of Small World")],
)


def theirs(text: Text, workers: int, seed: int, epochs: int, cbow: bool = False) -> WordVectors:
    model = Word2Vec(text, vector_size=100, window=5, negative=5, min_count=5, sample=1e-3, alpha=0.025, sg=int(not cbow), epochs=epochs,
                     workers=workers, seed=seed + 1)
    return WordVectors(model.wv.index_to_key, model.wv.vectors)


def ours(text: Text, workers: int, seed: int, epochs: int, cbow: bool = False) -> WordVectors:
    method = "cbow" if cbow else "skipgram"
    return train_word2vec(text, Word2VecConfig(**SETTINGS, epochs=epochs, workers=workers, seed=seed, method=method))


def real_text(data: Path) -> Text:
    "Paragraphs as lists of lower-cased words."
    lines = (data / "enwiki_dump" / "enwiki96.txt").read_text(encoding="utf-8").split("\n")
    [squad] = (data / "squad").glob("*.json")
    lines += [p["context"] for article in json.loads(squad.read_text(encoding="utf-8"))["data"] for p in article["paragraphs"]]
    return [words for line in lines if (words := re.findall(r"\w+", line.lower()))]


def long_text(n_words: int) -> Text:
    "Stories of Small World. Equal words are one object, or they would not fit into memory."
    out, n = [], 0
    for text in SmallWorld().texts():
        out.append([sys.intern(word) for word in WORD.findall(text.lower())])
        n += len(out[-1])
        if n >= n_words: break
    return out


def race(text: Text, epochs: int, rounds: int, judge: Callable[[WordVectors], dict[str, float]]) -> dict[str, object]:
    "Both with one and two workers, in turn; the words per second of the best round, the scores of all."
    n = sum(map(len, text)) * epochs
    seconds: dict[tuple[str, int], list[float]] = {(name, w): [] for w in (1, 2) for name in ("gensim", "ours")}
    scores: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in seconds}
    for seed in range(rounds):
        for name, workers in seconds:
            start = time.perf_counter()
            vectors = {"gensim": theirs, "ours": ours}[name](text, workers, seed, epochs)
            seconds[name, workers].append(time.perf_counter() - start)
            scores[name, workers].append(judge(vectors))
            print(f"  round {seed}, {workers} worker(s), {name:6}: {n / seconds[name, workers][-1]:10,.0f} words/s", flush=True)
    out: dict[str, object] = {"words": n // epochs, "documents": len(text), "epochs": epochs, "rounds": rounds,
                              "seconds": {}, "words_per_s": {}, "scores": {}}
    for (name, workers), times in seconds.items():
        key = f"{name}, {workers} worker{'s' * (workers > 1)}"
        out["seconds"][key], out["words_per_s"][key] = times, n / min(times)
        found = {what: [s[what] for s in scores[name, workers]] for what in scores[name, workers][0]}
        out["scores"][key] = {what: {**mean_sd(values), "all": values} for what, values in found.items()}
    out["ratio"] = {w: {"best": min(seconds["gensim", w]) / min(seconds["ours", w]),
                        "median_of_pairs": ratio(seconds["gensim", w], seconds["ours", w])} for w in (1, 2)}
    return out


def neighbours_and_analogies() -> Callable[[WordVectors], dict[str, float]]:
    "Whether a word's nearest neighbour is in a list of the lexicon with it, and analogies between words of one story."
    world, lists = SmallWorld(), {}
    for category, entries in world.grammar.lexicon.items():
        for entry in entries: lists.setdefault(entry["en"].lower(), set()).add(category)
    pairs = {name: [(a.lower(), b.lower()) for a, b in world.analogies()[name]] for name in ("capital", "people", "shop", "product")}
    questions = {name: [(*x, *y) for x, y in itertools.permutations(rows, 2)] for name, rows in pairs.items()}

    def judge(vectors: WordVectors) -> dict[str, float]:
        known = [word for word in vectors if word in lists]
        unit = vectors.normalized[[vectors.index[word] for word in known]]
        cosine = unit @ unit.T
        np.fill_diagonal(cosine, -2)
        near = cosine.argmax(1)
        return {"same list": float(np.mean([bool(lists[word] & lists[known[i]]) for word, i in zip(known, near)])),
                "analogies": score_analogies(vectors, questions).accuracy}

    return judge


@BENCHMARK.part(data=["enwiki_dump", "squad", "word_similarity"])
def real(settings: Settings) -> dict[str, object]:
    "Wikipedia and SQuAD, judged by people's opinions on pairs of words and by analogies."
    folder = settings.folder("word_similarity")
    pairs = {"WordSim-353": read_similarities(folder / "wordsim353.tsv"), "SimLex-999": read_similarities(folder / "simlex999.txt")}
    questions = read_analogies(folder / "questions-words.txt")

    def judge(vectors: WordVectors) -> dict[str, float]:
        found = {name: score_similarity(vectors, rows).spearman for name, rows in pairs.items()}
        return found | {"analogies": score_analogies(vectors, questions).accuracy}

    text = real_text(settings.data)
    some = ours(text, 2, 0, 1)
    covered = {name: score_similarity(some, rows).covered for name, rows in pairs.items()}
    return race(text, settings.pick(5, 1), settings.rounds, judge) | {
        "covered": covered | {"analogies": score_analogies(some, questions).covered}}


@BENCHMARK.part()
def small_world(settings: Settings) -> dict[str, object]:
    return race(long_text(settings.long), 1, 1, neighbours_and_analogies())


if __name__ == "__main__": run(__file__)
