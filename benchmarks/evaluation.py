"""Scores of names on WNUT-17 with our code and with seqeval, and how fast a bootstrap is.

    python -m benchmarks.evaluation --data ../shared/data

WNUT-17 (needs --data): the official test set. A list of names (each row of words that was a name in training, longest first, of its most
frequent type), and a BiLSTM as in chapter 32 (embeddings of 64, 64 units to each side, 0.3 dropout, words seen less than three times by
their shape; the weights of the best epoch by the development set's entity F1), scored leniently and strictly (IOB2) by both libraries.
Speed: F1 of 10,000 items, once, and its bootstrap; against scikit-learn's f1_score, once, and in a loop over drawn sets. The loop's time is
that of a few rounds, times the number of rounds. All take turns, and ratios are of medians.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from time import process_time

import numpy as np
import torch

from benchmarks.bilstm import WNUT, conll
from benchmarks.common import Benchmark, Option, Settings, in_turns, medians, run
from lmbook.bilstm import TaggedSentences, Tagger, TaggerConfig, tag_loss
from lmbook.core import evaluating
from lmbook.evaluation import accuracy, entity_f1, f1, spans
from lmbook.training import TrainConfig, Trainer

BENCHMARK = Benchmark(
    packages=("torch", "numpy", "scikit-learn", "seqeval"),
    options=[Option("repeats", 7, 1, "rounds in which all take turns"), Option("epochs", 8, 1, "of the training")],
)
Rows = list[tuple[list[str], list[str]]]


def names_by_list(train: Rows, test: Rows) -> list[list[str]]:
    "Mark what was a name in training, wherever it stands."
    seen: dict[tuple[str, ...], Counter] = defaultdict(Counter)
    for words, tags in train:
        for start, end, kind in spans(tags): seen[tuple(words[start:end])][kind] += 1
    longest = max(map(len, seen))
    out = []
    for words, _ in test:
        tags, i = ["O"] * len(words), 0
        while i < len(words):
            size = next((n for n in range(min(longest, len(words) - i), 0, -1) if tuple(words[i : i + n]) in seen), 0)
            if size:
                kind = min(seen[tuple(words[i : i + size])].items(), key=lambda pair: (-pair[1], pair[0]))[0]
                tags[i : i + size] = [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
            i += max(1, size)
        out.append(tags)
    return out


def bilstm(train: Rows, dev: Rows, test: Rows, epochs: int) -> list[list[str]]:
    "Train the tagger of chapter 32, and tag the test set."
    names = ["O", *sorted({tag for _, tags in train for tag in tags} - {"O"})]
    counts = Counter(word for words, _ in train for word in words)

    def known(word: str) -> str:
        if counts[word] > 2: return word
        return "<" + re.sub(r"(.)\1+", r"\1", re.sub("[A-Z]", "X", re.sub("[a-z]", "x", re.sub(r"\d", "0", word)))) + ">"

    units = Counter(known(word) for words, _ in train for word in words)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(word for word, n in units.items() if n > 1)])}

    def ids(rows: Rows) -> list[list[int]]: return [[vocabulary.get(known(word), 0) for word in words] for words, _ in rows]

    def tagged(model: Tagger, rows: Rows) -> list[list[str]]: return [[names[t] for t in row] for row in model.predict(ids(rows))]

    def judge(model: Tagger) -> dict[str, float]: return {"minus_f1": -entity_f1(tagged(model, dev), [tags for _, tags in dev]).value}

    torch.manual_seed(0)
    model = Tagger(TaggerConfig(len(vocabulary), len(names), 64, 64, bidirectional=True, dropout=0.3))
    batches = TaggedSentences(zip(ids(train), ([names.index(tag) for tag in tags] for _, tags in train)), 32, sort=20)
    steps = len(batches)
    config = TrainConfig(epochs=epochs, lr=1e-2, seed=0, eval_every=steps, load_best=True, log_every=steps)
    Trainer(model, batches, config, loss=tag_loss, evaluate=judge).fit()
    with evaluating(model): return tagged(model, test)


@BENCHMARK.part(data=["wnut17"], needs=["seqeval"])
def wnut17(settings: Settings) -> dict[str, object]:
    "Tag the test set, and score it twice."
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    folder = settings.folder("wnut17")
    train, dev, test = (list(conll(folder / WNUT[split])) for split in ("train", "dev", "test"))
    truth = [tags for _, tags in test]
    systems = {
        "always O": [["O"] * len(tags) for tags in truth], "list of names": names_by_list(train, test),
        "BiLSTM": bilstm(train, dev, test, settings.epochs),
    }
    out = {}
    for name, guess in systems.items():
        lenient, strict = entity_f1(guess, truth), entity_f1(guess, truth, "IOB2")
        flat = [[tag for row in rows for tag in row] for rows in (guess, truth)]
        out[name] = {
            "token accuracy": accuracy(*flat).value, "error": lenient.error,
            "entity F1": {"ours": lenient.value, "seqeval": float(f1_score(truth, guess, zero_division=0))},
            "strict": {"ours": strict.value, "seqeval": float(f1_score(truth, guess, mode="strict", scheme=IOB2, zero_division=0))},
        }
        print(f"  {name:14} entity F1 {lenient.value:.4f}", flush=True)
    pairs = [s[reading] for s in out.values() for reading in ("entity F1", "strict")]
    largest = max(abs(p["ours"] - p["seqeval"]) for p in pairs)
    return {"systems": out, "largest difference": largest, "sentences": len(truth), "epochs": settings.epochs}


@BENCHMARK.part(needs=["sklearn"])
def speed(settings: Settings) -> dict[str, object]:
    "How many times as long scikit-learn takes."
    from sklearn.metrics import f1_score

    n, resamples, rounds = settings.pick(10_000, 200), settings.pick(1000, 10), settings.pick(20, 2)
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, size=n)
    said = np.where(rng.random(n) < 0.7, true, rng.integers(0, 5, size=n))
    score = f1(said, true, "macro")

    def loop() -> None:
        for _ in range(rounds):
            at = rng.integers(n, size=n)
            f1_score(true[at], said[at], average="macro")

    t = medians(in_turns({
        "ours": lambda: f1(said, true, "macro"), "theirs": lambda: f1_score(true, said, average="macro"),
        "bootstrap": lambda: score.bootstrap(resamples), "loop": loop,
    }, settings.repeats, clock=process_time))  # fmt: skip
    difference = abs(score.value - float(f1_score(true, said, average="macro")))
    return {"items": n, "resamples": resamples, "difference": difference,
            "f1": {"ratio": t["theirs"] / t["ours"]}, "bootstrap": {"ratio": t["loop"] * resamples / rounds / t["bootstrap"]}}


if __name__ == "__main__": run(__file__)
