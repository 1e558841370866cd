"""Long texts: what real text costs in windows by stride and with a memory of the segment before, and four ways of joining windows.

    python -m benchmarks.long_text --data DATA

DATA holds the folders wikitext2 and tinyshakespeare. Each of these parts: byte-level BPE and two decoders of the same size from the same
seed, in equally many steps over equally many tokens: one reads windows of 64 tokens, one segments of 64 with a memory of 128. Nats per
token of the first 20,000 tokens of the test text (of Shakespeare: of the last tenth), in windows by stride, and read with memories of both
lengths by both models. All seeds read the same text; they draw other weights (and the windows in another order).
joining: the chapter's reports. A label that hangs on one clue and a label that hangs on two, in different windows; accuracy on 800 reports
in which all cases are equally frequent, and the least accuracy of the four cases.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.batches import TokenStream
from lmbook.long_text import CarriedMemory, LongClassifier, LongConfig, read_with_memory, window_loss
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE, SPECIALS, learn_merges, split_words, utf8
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3)
SIZE, MEMORY, STRIDES, STEPS = 64, 128, (63, 48, 32, 16), 400
CASES = ("east east", "west west", "east west", "west east")


# ---------------------------------------------------------------- real text


def tokenizer_of(text: str, vocab_size: int) -> BPE:
    counts: dict[bytes, int] = {}
    for word in split_words(text): counts[utf8(word)] = counts.get(utf8(word), 0) + 1
    return BPE(learn_merges(counts, vocab_size - len(SPECIALS) - 256, 2, [name.encode() for name in SPECIALS]))


def language_model(train: str, test: str, settings: Settings) -> dict[str, Any]:
    tokenizer = tokenizer_of(train[:1_000_000], settings.pick(2000, 300))
    learn, judged = (np.array(tokenizer.encode(text)) for text in (train, test))
    judged = judged[: settings.pick(20_000, 300)]
    steps, rows = settings.pick(STEPS, 2), settings.pick(16, 2)
    found: dict[str, list[float]] = {}
    for seed in range(settings.seeds):
        how = TrainConfig(steps=steps, warmup=steps // 20, schedule="linear", seed=seed, device="cpu", optimizer=muon_and_adamw)
        models = {}
        for name in ("windows", "memory"):
            torch.manual_seed(seed)
            parts: dict[str, Any] = {"norm": "rms", "positions": "alibi", "bias": False, "init": "xavier_uniform"}
            models[name] = Transformer(TransformerConfig(tokenizer.vocab_size, 64, 2, 4, context_length=SIZE + MEMORY, **parts))
            if name == "windows": Trainer(models[name], TokenStream(learn, rows, SIZE, seed=seed), how).fit()
            else: Trainer(models[name], TokenStream(learn, rows, SIZE, contiguous=True), how, loss=CarriedMemory(MEMORY)).fit()
        values = {f"trained in windows, stride {stride}": window_loss(models["windows"], judged, SIZE, stride).mean() for stride in STRIDES}
        for name, model in models.items():
            for memory in (16, MEMORY):
                values[f"trained with {name}, memory {memory}"] = read_with_memory(model, judged, SIZE, memory).mean()
        for key, value in values.items(): found.setdefault(key, []).append(float(value))
        print(seed, {key: round(each[-1], 3) for key, each in found.items()}, flush=True)
    loss = {key: {**mean_sd(each), "each": each} for key, each in found.items()}
    return {"tokens": len(judged), "tokens learned from": steps * rows * SIZE, "loss": loss}


@BENCHMARK.part(data=["wikitext2"])
def wikitext2(settings: Settings) -> dict[str, Any]:
    train, test = ((settings.folder("wikitext2") / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "test"))
    return language_model(train, test, settings)


@BENCHMARK.part(data=["tinyshakespeare"])
def shakespeare(settings: Settings) -> dict[str, Any]:
    text = (settings.folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return language_model(text[:cut], text[cut:], settings)


# ---------------------------------------------------------------- joining


def report(text: str, dice: random.Random, east: float) -> dict[str, str]:
    "As in the chapter."
    told = [sentence + "." for sentence in text.split(". ")[:8]]
    sides = ["east" if dice.random() < east else "west" for _ in range(2)]
    places = range(len(told) + 1)
    i, j = dice.choice([(i, j) for i in places for j in places if abs(i - j) >= 4])
    for at, which, side in sorted(zip((i, j), ("first", "second"), sides), reverse=True):
        told.insert(at, f"The {which} signal came from the {side}.")
    return {"text": " ".join(told), "one": sides[0], "two": "same" if sides[0] == sides[1] else "different", "case": " ".join(sides)}


def reports(split: Any, n: int, east: float, seed: int) -> list[dict[str, str]]:
    dice = random.Random(seed)
    return [report(text, dice, east) for text in SmallWorld(SmallWorldConfig.hard()).texts(split, "en", n)]


@BENCHMARK.part()
def joining(settings: Settings) -> dict[str, Any]:
    test = reports("test", settings.pick(800, 12), 0.5, 0)
    ways: tuple[Any, ...] = ("truncate", "mean", "max", "hierarchy")
    found: dict[str, Any] = {"reports": len(test)}
    for task, steps in (("one", 200), ("two", 300)):
        for way in ways:
            values: dict[str, list[float]] = {"accuracy": [], "worst case": []}
            for seed in range(settings.seeds):
                train = reports("train", settings.pick(2000, 20), 0.7, seed + 1)
                config = LongConfig(way, 32, 12, 700, 32, lr=8e-3, steps=settings.pick(steps, 2), seed=seed)
                model = LongClassifier.fit([{"text": row["text"], "label": row[task]} for row in train], config)
                right = np.array([a == row[task] for a, row in zip(model.predict([row["text"] for row in test]), test)])
                cases = [[r for r, row in zip(right, test) if row["case"] == case] for case in CASES]
                values["accuracy"].append(float(right.mean()))
                values["worst case"].append(float(min(np.mean(case) for case in cases if case)))
            found[f"{task}, {way}"] = {key: {**mean_sd(each), "each": each} for key, each in values.items()}
            print(task, way, {key: [round(v, 3) for v in each] for key, each in values.items()}, flush=True)
    return found


if __name__ == "__main__": run(__file__)
