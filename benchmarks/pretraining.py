"""Which objective of pre-training is worth what for which later task, at one budget of computation; and what a mixture of texts costs.

    python -m benchmarks.pretraining --data ../shared/data

One body (two layers, 48 numbers, rotary positions, input and output not tied), one text, one budget of training FLOPs, counted by
three times the forward pass, and one learning rate for all.
Then each body is fine-tuned in the same way for each task, on few examples, and so is one that has not been trained.

matrix: the objectives of claim D2-06 (causal, masked, GLM's blank infilling) and no pre-training, on Small World. Tasks: `verb` (is or are,
was or were, from the 16 words before it), `mood` (whether the story ends well, from its last 16 words), each read off a mask behind them,
and `next`: nats per token of a decoder with these weights after it has read a few stories; `none` is in it, too.
others: prefix LM, masked spans, and more hidden words, in the same way.
own_rates: each objective of the matrix at three learning rates; the one with the lowest loss of its own on fresh stories (with a seed that
nothing else uses) makes its row anew; for masked words another one with three times the budget.
mixing: English and Chinese stories, by shares, from the beginning: the loss on either after equal steps.
real: the same body, larger, on WikiText-2's small training file with a BPE of 2,000; then reviews of films (SST-2), good or bad, from 128
labelled ones. chinese: the same on 1,104 paragraphs of the Chinese Wikipedia, then the topics of SIB-200's Chinese sentences, of seven,
from its training file, beside a linear model of characters and their pairs. Both: accuracy on the test file; the learning rate of the
fine-tuning is the one, out of three, that is best on the dev file with the first seed.
Nothing is chosen on a test set.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Benchmark, Option, Settings, run
from benchmarks.trust import Linear, characters
from lmbook.batches import IGNORE, Batch, TokenStream
from lmbook.core import evaluating
from lmbook.objectives import BlankInfilling, Causal, Marks, Masked, Objective, PrefixLM, SpanMasked
from lmbook.perplexity import dependencies
from lmbook.pretraining import Mixture, as_kind, continue_on, pretrain
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE, WordTokenizer
from lmbook.training import TrainConfig, Trainer, mean_loss
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3, options=[
    Option("budget", 1.2e11, 1e9, "training FLOPs for each body on Small World"),
    Option("real-budget", 3e12, 1e9, "training FLOPs for each body on WikiText-2"),
    Option("labels", 64, 8, "labelled examples of a task"),
])  # fmt: skip
BODY: dict[str, Any] = {"d_model": 48, "n_layer": 2, "n_head": 4, "context_length": 96, "norm": "rms", "activation": "gelu",
                        "positions": "rotary", "bias": False, "tie": False}
READ = 16  # words that a task shows


class World:
    "Stories of Small World as ids, and the tasks about them."

    def __init__(self, settings: Settings):
        self.settings, self.world = settings, SmallWorld(SmallWorldConfig(limit=2))
        texts = list(self.world.texts("train", n=settings.pick(800, 30)))
        self.tokenizer = WordTokenizer.train(texts)
        self.marks = Marks.of(self.tokenizer)
        self.text = self.stream(texts)
        self.few = self.stream(list(self.world.texts("train", n=settings.pick(40, 12), start=5000)))
        self.fresh = self.stream(list(self.world.texts("valid", n=settings.pick(40, 12))))
        self.config = TransformerConfig(self.marks.vocab_size, **BODY | settings.pick({}, {"n_layer": 1}))
        self.test = {task: make("test", settings.pick(400, 10), 0) for task, make in self.tasks.items()}

    def stream(self, texts: list[str]) -> np.ndarray:
        return np.concatenate([self.tokenizer.encode(text, bos=True, eos=True) for text in texts])

    @property
    def tasks(self) -> dict[str, Callable[[Any, int, int], tuple[Tensor, Tensor]]]: return {"verb": self.verb, "mood": self.mood}

    def asked(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return [*([self.tokenizer.bos_id] * READ + ids)[-READ:], self.marks.mask_id]

    def verb(self, split: Any, n: int, start: int) -> tuple[Tensor, Tensor]:
        found = dependencies(self.world, self.world.texts(split, n=3 * n, start=start), ("agreement",))[:n]
        return torch.tensor([self.asked(d.prefix) for d in found]), torch.tensor([int(d.options[0] in (" is", " was")) for d in found])

    def mood(self, split: Any, n: int, start: int) -> tuple[Tensor, Tensor]:
        found = list(self.world.documents(split, n, start))
        texts = [" ".join(english for english, _ in story.sentences) for story in found]
        return torch.tensor([self.asked(text) for text in texts]), torch.tensor([int(story.sentiment == "positive") for story in found])


def fine_tuned(body: Transformer, ids: Tensor, labels: Tensor, seed: int, steps: int, segments: Tensor | None = None,
               lr: float = 3e-3, names: tuple[str, ...] = ("no", "yes"), rows: int | None = None) -> Any:
    "A classifier that reads the label off the last position of a row (or off its last token); `rows` in a batch, by default all."
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(body), ClassifierConfig(names, level="token"))
    targets = torch.full_like(ids, IGNORE)
    targets[torch.arange(len(ids)), last(ids, segments)] = labels

    def loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
        scores = model(batch.ids, segments=batch.segments)
        return F.cross_entropy(scores.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"), batch.tokens

    config = TrainConfig(steps=steps, lr=lr, schedule="linear", warmup=min(5, steps - 1), seed=seed, device="cpu", log_every=10**6)
    parts = torch.randperm(len(ids)).split(rows or len(ids))
    Trainer(model, [Batch(ids[i], targets[i], None if segments is None else segments[i]) for i in parts], config, loss=loss).fit()
    return model


def last(ids: Tensor, segments: Tensor | None) -> Tensor:
    return torch.full((len(ids),), ids.shape[1] - 1) if segments is None else (segments > 0).sum(1) - 1


def accuracy(model: Any, ids: Tensor, labels: Tensor, segments: Tensor | None = None) -> float:
    right = 0
    with evaluating(model):
        for some in torch.arange(len(ids)).split(128):
            told = None if segments is None else segments[some]
            scores = model(ids[some], segments=told)[torch.arange(len(some)), last(ids[some], told)]
            right += int((scores.argmax(-1) == labels[some]).sum())
    return right / len(ids)


def body_of(objective: Objective | None, text: np.ndarray, config: TransformerConfig, budget: float, seed: int, rows: int, length: int,
            lr: float = 6e-3) -> tuple[Transformer, int]:
    "A body that was trained with an objective; without one, as it is made."
    if objective is not None:
        batches = TokenStream(text, rows, length, seed=seed)
        done = pretrain(objective, batches, config, budget, lr=lr, seed=seed, schedule="wsd", log_every=10**6)
        return done.model, done.steps
    torch.manual_seed(seed)
    return Transformer(config), 0


def row(data: World, objective: Objective | None, settings: Settings, lr: float = 6e-3, budget: float = 0.0) -> dict[str, Any]:
    "One row of the matrix: for each task what each seed gave, the mean, and its standard error."
    found: dict[str, list[float]] = {"verb": [], "mood": [], "next": []}
    steps = 0
    for seed in range(settings.seeds):
        budget = budget or settings.budget
        body, steps = body_of(objective, data.text, data.config, budget, seed, *settings.pick((16, 24), (4, 24)), lr=lr)
        for task, make in data.tasks.items():
            rows = make("train", settings.labels, 6000 + 1000 * seed)
            found[task].append(accuracy(fine_tuned(body, *rows, seed, settings.pick(40, 2)), *data.test[task]))
        decoder = as_kind(body, "decoder")
        continue_on(decoder, TokenStream(data.few, settings.pick(16, 4), 24, seed=seed), settings.pick(40, 2), seed=seed, log_every=10**6)
        found["next"].append(mean_loss(decoder, TokenStream(data.fresh, settings.pick(16, 4), 24, shuffle=False)))
    print(f"  {type(objective).__name__ if objective else 'none'}, {steps} steps: {found}", flush=True)
    return {"steps": steps, **{task: told(values) for task, values in found.items()}}


def told(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "error": error, "seeds": values}


# ---------------------------------------------------------------- the parts


@BENCHMARK.part()
def matrix(settings: Settings) -> dict[str, Any]:
    data = World(settings)
    rows: dict[str, Objective | None] = {
        "none": None, "causal": Causal(), "masked": Masked(data.marks), "blank infilling": BlankInfilling(data.marks),
    }  # fmt: skip
    return {name: row(data, objective, settings) for name, objective in rows.items()}


@BENCHMARK.part()
def others(settings: Settings) -> dict[str, Any]:
    data = World(settings)
    rows: dict[str, Objective] = {"masked, 40 %": Masked(data.marks, rate=.4), "masked spans": SpanMasked(data.marks), "prefix": PrefixLM()}
    return {name: row(data, objective, settings) for name, objective in rows.items()}


@BENCHMARK.part()
def own_rates(settings: Settings) -> dict[str, Any]:
    data, found = World(settings), {}
    rows: dict[str, Objective] = {"causal": Causal(), "masked": Masked(data.marks), "blank infilling": BlankInfilling(data.marks)}
    for name, objective in rows.items():
        fresh, tried = objective.on(TokenStream(data.fresh, settings.pick(16, 4), 24, shuffle=False), 0), {}
        for lr in settings.pick((3e-3, 6e-3, 1.2e-2), (3e-3, 6e-3)):
            body, _ = body_of(objective, data.text, data.config, settings.budget, 99, *settings.pick((16, 24), (4, 24)), lr=lr)
            tried[lr] = mean_loss(body, fresh, objective.loss)
        best = min(tried, key=tried.__getitem__)
        found[name] = {"tried": {str(lr): loss for lr, loss in tried.items()}, "lr": best, "best": row(data, objective, settings, best)}
        if name == "masked": found[name]["three times the budget"] = row(data, objective, settings, best, 3 * settings.budget)
    return found


@BENCHMARK.part()
def mixing(settings: Settings) -> dict[str, Any]:
    "The same number of steps with each share of Chinese; the loss on fresh stories of either language."
    data, out = World(settings), {}
    chinese = list(data.world.texts("train", "zh", n=settings.pick(400, 30)))
    fresh_chinese = list(data.world.texts("valid", "zh", n=settings.pick(40, 12)))
    numbers = {c: data.marks.vocab_size + i for i, c in enumerate(sorted(set("".join([*chinese, *fresh_chinese]))))}
    def encoded(texts: list[str]) -> np.ndarray:
        return np.concatenate([[data.tokenizer.bos_id, *(numbers[c] for c in text), data.tokenizer.eos_id] for text in texts])

    size, B = data.marks.vocab_size + len(numbers), settings.pick(16, 4)
    fresh = {name: TokenStream(ids, B, 24, shuffle=False) for name, ids in (("English", data.fresh), ("Chinese", encoded(fresh_chinese)))}
    config = TransformerConfig(size, **BODY | settings.pick({}, {"n_layer": 1}))
    for share in (.1, .3, .5, .7, .9):
        losses: dict[str, list[float]] = {name: [] for name in fresh}
        for seed in range(settings.seeds):
            sources = [TokenStream(data.text, B, 24, seed=seed), TokenStream(encoded(chinese), B, 24, seed=seed)]
            torch.manual_seed(seed)
            model = Transformer(config)
            continue_on(model, Mixture(sources, [1 - share, share], seed=seed), settings.pick(150, 2), lr=6e-3, seed=seed, log_every=10**6)
            for name, batches in fresh.items(): losses[name].append(mean_loss(model, batches))
        out[str(share)] = {name: told(values) for name, values in losses.items()}
        print(f"  {share}: {', '.join(f'{name} {statistics.fmean(values):.2f}' for name, values in losses.items())}", flush=True)
    return out


def asked(texts: list[str], tokenizer: BPE, mask_id: int, most: int) -> tuple[Tensor, Tensor]:
    "Ids and segments; the mask stands behind each text."
    rows = [[*tokenizer.encode(text)[: most - 1], mask_id] for text in texts]
    ids, there = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
    for i, ids_of in enumerate(rows): ids[i, : len(ids_of)], there[i, : len(ids_of)] = torch.tensor(ids_of), 1
    return ids, there


Labelled = dict[str, tuple[Tensor, Tensor, Tensor]]  # of train, dev and test: ids, segments, labels


def compared(text: np.ndarray, marks: Marks, vocab_size: int, data: Labelled, few: int | None, steps: int, names: tuple[str, ...],
             settings: Settings) -> dict[str, Any]:
    """Bodies trained with each objective on a text, then fine-tuned on all labelled rows, or on `few` others with each seed. The learning
    rate of that is the one, of three, that is best on the dev file with the first seed."""
    config = TransformerConfig(vocab_size, **BODY | settings.pick({"d_model": 96, "n_layer": 3}, {"n_layer": 1}))
    rates, rows = settings.pick((1e-3, 3e-3, 1e-2), (1e-3, 3e-3)), settings.pick(64, 8)
    objectives: dict[str, Objective | None] = {"none": None, "causal": Causal(), "masked": Masked(marks)}
    (ids, there, labels), dev, test = data["train"], data["dev"], data["test"]
    out: dict[str, Any] = {}
    for name, objective in objectives.items():
        found, done, best, tried = [], 0, rates[0], dict[float, float]()
        for seed in range(settings.seeds):
            body, done = body_of(objective, text, config, settings.real_budget, seed, settings.pick(16, 4), settings.pick(48, 24), lr=4e-3)
            some = torch.from_numpy(np.random.default_rng(seed).permutation(len(ids))[:few])

            def tuned(lr: float, body: Transformer = body, some: Tensor = some, seed: int = seed) -> Any:
                return fine_tuned(body, ids[some], labels[some], seed, steps, there[some], lr, names, rows)

            models = {lr: tuned(lr) for lr in (rates if seed == 0 else (best,))}
            if seed == 0:
                tried = {lr: accuracy(model, dev[0], dev[2], dev[1]) for lr, model in models.items()}
                best = max(tried, key=tried.__getitem__)
            found.append(accuracy(models[best], test[0], test[2], test[1]))
        out[name] = {"steps": done, "lr": best, "dev": list(tried.values()), "accuracy": told(found)}
        print(f"  {name}: {out[name]}", flush=True)
    return out


def baseline(train: list[tuple[str, int]], test: list[tuple[str, int]], classes: int, settings: Settings) -> float:
    counted = Linear(train, characters, classes, settings.pick(100, 5), decay=0.1)
    return float((counted([text for text, _ in test]).argmax(1) == torch.tensor([label for _, label in test])).float().mean())


@BENCHMARK.part(data=["wikitext2", "sst2"])
def real(settings: Settings) -> dict[str, Any]:
    lines = [line.strip() for line in (settings.folder("wikitext2") / "train.txt").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("=")]
    tokenizer = BPE.train(lines, settings.pick(2000, 280))
    marks = Marks.of(tokenizer)
    text = np.concatenate([tokenizer.encode(f" {line}", bos=True, eos=True) for line in lines])
    data = {}
    for split in ("train", "dev", "test"):
        file = settings.folder("sst2") / f"{split}.tsv"
        pairs = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()]
        read = asked([f" {text}" for text, _ in pairs], tokenizer, marks.mask_id, settings.pick(64, 96))
        data[split] = *read, torch.tensor([int(label) for _, label in pairs])
    return compared(text, marks, marks.vocab_size, data, 2 * settings.labels, settings.pick(40, 2), ("no", "yes"), settings)


@BENCHMARK.part(data=["zhwiki", "sib200"])
def chinese(settings: Settings) -> dict[str, Any]:
    lines = (settings.folder("zhwiki") / "zhwiki_contexts.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = BPE.train(lines, settings.pick(3000, 280))
    marks, folder = Marks.of(tokenizer), settings.folder("sib200") / "zho_Hans"
    text = np.concatenate([tokenizer.encode(line, bos=True, eos=True) for line in lines])
    told_of = {}
    for split in ("train", "dev", "test"):
        rows = [line.split("\t") for line in (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]]
        told_of[split] = [(sentence, topic) for _, topic, sentence in rows]
    names = tuple(sorted({topic for _, topic in told_of["train"]}))
    numbered = {split: [(sentence, names.index(topic)) for sentence, topic in rows] for split, rows in told_of.items()}
    data = {split: (*asked([sentence for sentence, _ in rows], tokenizer, marks.mask_id, 96), torch.tensor([label for _, label in rows]))
            for split, rows in numbered.items()}
    labels, right = data["train"][2], data["test"][2]
    out = compared(text, marks, marks.vocab_size, data, None, settings.pick(88, 2), names, settings)
    simple = baseline(numbered["train"], numbered["test"], len(names), settings)
    return {"tokens": len(text), "test": len(right), **out, "runs of characters": simple,
            "majority": float(right.eq(labels.mode().values).float().mean())}


if __name__ == "__main__": run(__file__)
