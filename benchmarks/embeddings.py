"""How fast word vectors are learned and how good they are, beside gensim's compiled Word2Vec at equal settings.

    python -m benchmarks.embeddings --data ../shared/data

Prints tables and writes benchmarks/results/embeddings.json. Skip-gram with negative sampling: 100 dimensions, window 5, 5 noise words, words
that occur at least 5 times, subsampling 1e-3, rate 0.025. Time is that of the whole call, from lists of words to vectors. Runs of both take turns,
so that a busy machine is busy for both. The real text is 96 articles of Wikipedia and the paragraphs of SQuAD, 5 epochs, with a seed for each round, judged by
WordSim-353, SimLex-999 and the analogies of Mikolov et al.; both are judged by the same functions (tests/test_embeddings.py: they agree with gensim's own). The
long text is 17 million words of Small World, one epoch, judged by what its grammar knows. Without --data only the long text is measured.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
from gensim.models import Word2Vec

from benchmarks.common import machine, rounded
from lmbook.embeddings import (
    Word2VecConfig,
    WordVectors,
    read_analogies,
    read_similarities,
    score_analogies,
    score_similarity,
    train_word2vec,
)
from lmbook.small_world import WORD, SmallWorld

RESULTS = Path(__file__).parent / "results" / "embeddings.json"
SETTINGS = {"dim": 100, "window": 5, "negative": 5, "min_count": 5, "subsample": 1e-3, "lr": 0.025}
Text = list[list[str]]


def theirs(text: Text, workers: int, seed: int, epochs: int, cbow: bool = False) -> WordVectors:
    model = Word2Vec(text, vector_size=100, window=5, negative=5, min_count=5, sample=1e-3, alpha=0.025, sg=int(not cbow), epochs=epochs, workers=workers, seed=seed + 1)
    return WordVectors(model.wv.index_to_key, model.wv.vectors)


def ours(text: Text, workers: int, seed: int, epochs: int, cbow: bool = False) -> WordVectors:
    return train_word2vec(text, Word2VecConfig(**SETTINGS, epochs=epochs, workers=workers, seed=seed, method="cbow" if cbow else "skipgram"))


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
            print(f"  round {seed}, {workers} worker(s), {name:6}: {n / seconds[name, workers][-1]:10,.0f} words/s  {rounded(scores[name, workers][-1], 3)}", flush=True)
    out: dict[str, object] = {"words": n // epochs, "documents": len(text), "epochs": epochs, "rounds": rounds, "seconds": {}, "words_per_s": {}, "scores": {}}
    for (name, workers), times in seconds.items():
        key = f"{name}, {workers} worker{'s' * (workers > 1)}"
        out["seconds"][key], out["words_per_s"][key] = times, n / min(times)
        out["scores"][key] = {what: {"mean": statistics.mean(values), "sd": statistics.stdev(values) if rounds > 1 else 0., "all": values}
                              for what in judge(vectors) if (values := [s[what] for s in scores[name, workers]])}
    out["ratio"] = {w: {"best": min(seconds["gensim", w]) / min(seconds["ours", w]),
                        "median_of_pairs": statistics.median(a / b for a, b in zip(seconds["gensim", w], seconds["ours", w]))} for w in (1, 2)}
    return out


def show(title: str, result: dict[str, object]) -> None:
    print(f"\n{title}: {result['words']:,} words, {result['epochs']} epochs, {result['rounds']} rounds")
    for key, speed in result["words_per_s"].items():
        scores = "  ".join(f"{what} {s['mean']:.3f} ± {s['sd']:.3f}" for what, s in result["scores"][key].items())
        print(f"  {key:18}{speed:12,.0f} words/s   {scores}")
    for workers, ratio in result["ratio"].items():
        print(f"  ours / gensim, {workers} worker(s): {ratio['best']:.2f} (best against best), {ratio['median_of_pairs']:.2f} (median of pairs)")


def small_world_judge() -> Callable[[WordVectors], dict[str, float]]:
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


def write(result: dict[str, object]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--rounds", type=int, default=5, help="rounds and seeds on the real text")
    parser.add_argument("--long", type=int, default=17_000_000, help="words of Small World; 0: leave it out")
    args = parser.parse_args()
    command = "python -m benchmarks.embeddings --data ../shared/data" + "".join(f" --{name} {n}" for name, n, usual in (("rounds", args.rounds, 5), ("long", args.long, 17_000_000)) if n != usual)
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "command": command, "machine": machine("torch", "numpy", "gensim"), "settings": SETTINGS}
    if args.data is None or not (args.data / "word_similarity").is_dir(): print("no folder word_similarity: give --data to measure real text; the file of results is left as it is")
    else:
        folder = args.data / "word_similarity"
        pairs = {"WordSim-353": read_similarities(folder / "wordsim353.tsv"), "SimLex-999": read_similarities(folder / "simlex999.txt")}
        questions = read_analogies(folder / "questions-words.txt")

        def judge(vectors: WordVectors) -> dict[str, float]:
            return {name: score_similarity(vectors, rows).spearman for name, rows in pairs.items()} | {"analogies": score_analogies(vectors, questions).accuracy}

        text = real_text(args.data)
        result["real"] = race(text, 5, args.rounds, judge)
        some = ours(text, 2, 0, 1)
        result["real"]["covered"] = {name: score_similarity(some, rows).covered for name, rows in pairs.items()} | {"analogies": score_analogies(some, questions).covered}
        show("Wikipedia and SQuAD", result["real"])
        write(result)
    if args.long:
        result["small_world"] = race(long_text(args.long), 1, 1, small_world_judge())
        show("Small World", result["small_world"])
        if "real" in result: write(result)


if __name__ == "__main__": main()
