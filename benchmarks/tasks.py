"""What a small Transformer and models that count know of English grammar: twelve kinds of BLiMP's minimal pairs.

    python -m benchmarks.tasks --data ../shared/data

All learn from the sentences of WikiText-2's small training file (some 200,000 words; the spaces before punctuation are taken out again,
and <unk> is written as the word "unk", so that sentences stay whole), with one BPE tokenizer of 4,000 tokens. The Transformer's weights are
those with the lowest loss on sentences of the validation file; nothing is chosen on BLiMP. A pair is right if the good sentence is more
likely as a whole; equal ones count half. Each sentence is asked with a space in front, so that its first word is the token that it is
elsewhere. A coin gets half. The Transformer's error holds both what other pairs and what other seeds would give.

`seeds` is the chapter's model of Small World, trained with other seeds: the share of right verbs for each kind of sentence, asked after the
sentence before it, and its exam.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Option, Settings, run
from lmbook.batches import Examples
from lmbook.core import seed_everything
from lmbook.evaluation import Score
from lmbook.language_models import NGram, NGramConfig
from lmbook.perplexity import Dependency, DependencyKind, dependencies, evaluate
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tasks import Item, by_kind, multiple_choice, read_task
from lmbook.tokenization import BPE
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch",), seeds=3, options=[
    Option("epochs", 5, 1, "of the Transformer's training, at most"), Option("worlds", 5, 2, "seeds of the chapter's model"),
])  # fmt: skip
SIZE = {"d_model": 128, "n_layer": 3, "n_head": 4, "context_length": 64, "dropout": 0.1}
TODAY = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False}


def sentences(file: Path, longest: int) -> list[str]:
    "Sentences of running text from WikiText's tokens, each with a space in front; at most so many words."
    out = []
    for line in file.read_text(encoding="utf-8").splitlines():
        line = re.sub(r" @(.)@ ", r"\1", line.strip()).replace("<unk>", "unk")
        if line.startswith("="): continue
        for text in re.split(r"(?<= [.?!]) (?!\")", line):
            if not 5 <= len(text.split()) <= longest: continue
            out.append(" " + re.sub(r" ([,.;:!?)']|n't|'s)", r"\1", text).replace("( ", "(").strip())
    return out


def scores(model: Any, tokenizer: BPE, items: list[Item]) -> dict[str, Score]:
    "The share of pairs that are right: all, and of each kind."
    found = multiple_choice(model, tokenizer, items)
    return {"all": found, **by_kind(found, items)}


def told(runs: list[dict[str, Score]], perplexities: list[float]) -> dict[str, Any]:
    "Of one model's runs: the mean accuracy of each kind with its error, and what each run gave."
    out = {}
    for kind in runs[0]:
        seeds = [run[kind].value for run in runs]
        pairs = Score.mean(kind, np.mean([run[kind].items for run in runs], axis=0))
        between = statistics.stdev(seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
        out[kind] = {"accuracy": pairs.value, "error": math.hypot(pairs.error, between), "runs": seeds, "pairs": pairs.n}
    return {"perplexity": statistics.fmean(perplexities), "kinds": out}


@BENCHMARK.part(data=["wikitext2", "blimp"])
def blimp(settings: Settings) -> dict[str, Any]:
    "Accuracy of each kind of pair and of all, for two models that count and for the Transformers of some seeds."
    texts = {name: sentences(settings.folder("wikitext2") / f"{name}.txt", 45) for name in ("train", "valid")}
    tokenizer = BPE.train(texts["train"], settings.pick(4000, 280))
    longest = SIZE["context_length"] if not settings.dry else 1000
    rows = {name: [tokenizer.encode(text, bos=True, eos=True) for text in part] for name, part in texts.items()}
    rows = {name: [row for row in part if len(row) <= longest] for name, part in rows.items()}
    held = rows["valid"][: settings.pick(1000, 20)]
    items = [replace(item, choices=tuple(" " + choice for choice in item.choices))
             for file in sorted(settings.folder("blimp").glob("*.jsonl")) for item in read_task(file)]
    size = SIZE if not settings.dry else {**SIZE, "d_model": 16, "n_layer": 1, "context_length": longest}
    models: dict[str, Any] = {}
    for name, order in (("single tokens", 1), ("three tokens", 3)):
        counts = NGram.fit(rows["train"], tokenizer.vocab_size, NGramConfig(order=order))
        models[name] = told([scores(counts, tokenizer, items)], [evaluate(counts, held).perplexity])
        print(f"  {name}: {models[name]['kinds']['all']['accuracy']:.3f}", flush=True)
    runs, perplexities = [], []
    for seed in range(settings.seeds):
        seed_everything(seed)
        model = Transformer(TransformerConfig(tokenizer.vocab_size, **size, **TODAY))  # type: ignore[arg-type]
        batches = Examples(rows["train"], batch_size=settings.pick(64, 4), sort=10, seed=seed)
        config = TrainConfig(epochs=settings.epochs, lr=3e-3, warmup=settings.pick(40, 0), weight_decay=0.1, eval_every=len(batches),
                             load_best=True, device="cpu", seed=seed)
        Trainer(model, batches, config, evaluate=Examples(held, batch_size=settings.pick(64, 4), sort=10, shuffle=False)).fit()
        runs.append(scores(model, tokenizer, items))
        perplexities.append(evaluate(model, held).perplexity)
        print(f"  seed {seed}: {runs[-1]['all'].value:.3f}, perplexity {perplexities[-1]:.0f}", flush=True)
    models["Transformer"] = told(runs, perplexities)
    return {"sentences": len(rows["train"]), "tokens": sum(len(row) - 1 for row in rows["train"]), "pairs": len(items), "models": models}


def minimal_pair(story: str, question: Dependency) -> Item:
    "A sentence after the one before it, and the same with the verb's number swapped; the kind says what stands between."
    start, end = question.prefix.rindex("The "), story.index(".", len(question.prefix)) + 1
    subject, (good, wrong) = story[start : len(question.prefix)], question.options
    rest, last = story[len(question.prefix) + len(good) : end], subject.split()[-1]
    number = "same" if last.endswith(("s", "men")) == (good in (" are", " were")) else "other"
    kind = f"clause, {number} number" if " who " in subject else f"door, {number} number" if last == "door" else "nothing"
    choices = (f" {subject}{good}{rest}", f" {subject}{wrong}{rest}")
    return Item(story[: start - 1].rsplit(". ", 1)[-1], choices, kind=kind, group=subject + rest)


def in_rows(texts: Sequence[str]) -> list[str]:
    "One, two, three, one, ... of them in a row."
    out: list[str] = []
    at = 0
    while at < len(texts):
        many = len(out) % 3 + 1
        out.append("\n\n".join(texts[at : at + many]))
        at += many
    return out


@BENCHMARK.part()
def seeds(settings: Settings) -> dict[str, Any]:
    "The mean over seeds of the share that is right, and of differences, each with its standard error."
    world, texts = SmallWorld(SmallWorldConfig(limit=3)), []
    for story in world.documents("train", n=settings.pick(1800, 40)):
        told, (start, end) = " ".join(english for english, _ in story.sentences), story.answer["en"]
        texts.append(f"{told}\nQuestion: {story.question['en']}\nAnswer: {told[start:end]}")
    tokenizer = BPE.train(texts[:1200], settings.pick(600, 280))
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in in_rows(texts)]
    verbs: tuple[DependencyKind, ...] = ("agreement",)
    asked: tuple[DependencyKind, ...] = ("object", "agreement", "pronoun", "place")
    pairs = [minimal_pair(story, question) for story in world.texts("test", n=settings.pick(1000, 60))
             for question in dependencies(world, [story], verbs)]
    exam = [Item(one.prefix, one.options, kind=one.kind)
            for one in dependencies(world, world.texts("test", n=settings.pick(120, 5)), asked)]
    found: dict[str, list[float]] = {}
    for seed in range(settings.worlds):
        torch.manual_seed(seed)
        size = {"d_model": settings.pick(64, 16), "n_layer": settings.pick(2, 1), "n_head": 4, "context_length": settings.pick(768, 3000)}
        model = Transformer(TransformerConfig(tokenizer.vocab_size, **size, **TODAY))  # type: ignore[arg-type]
        batches = Examples(rows, tokens=settings.pick(1100, 3000), sort=20, seed=seed)
        config = TrainConfig(epochs=settings.pick(2, 1), lr=0.01, schedule="wsd", warmup=settings.pick(20, 0), device="cpu")
        Trainer(model, batches, config).fit()
        kinds = {kind: score.value for kind, score in by_kind(multiple_choice(model, tokenizer, pairs), pairs).items()}
        for kind in ("clause", "door"): kinds[f"{kind}, same less other"] = kinds[f"{kind}, same number"] - kinds[f"{kind}, other number"]
        kinds["nothing less clause, other number"] = kinds["nothing"] - kinds["clause, other number"]
        kinds |= {f"exam, {kind}": score.value for kind, score in by_kind(multiple_choice(model, tokenizer, exam), exam).items()}
        for kind, value in kinds.items(): found.setdefault(kind, []).append(value)
        print(f"  seed {seed}: {', '.join(f'{kind} {value:.2f}' for kind, value in kinds.items())}", flush=True)
    return {"pairs": len(pairs), "kinds": {
        kind: {"mean": statistics.fmean(values), "error": statistics.stdev(values) / math.sqrt(len(values)), "seeds": values}
        for kind, values in found.items()
    }}  # fmt: skip


if __name__ == "__main__": run(__file__)
