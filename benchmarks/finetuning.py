"""Seven ways to fine-tune one small model, by how many labels there are; and a real encoder on real reviews.

    python -m benchmarks.finetuning --data DATA

rates: for each way three learning rates, the accuracy on validation stories (one seed that is used nowhere else); RATES holds the best, of
equals the one in the middle.
labels: a model of stories is pre-trained as in the chapter, once for each seed. It is told the mood of a story, from 8 labels to 2,000, by
each way: accuracy on 300 test stories, numbers that are trained, bytes of weights, gradients and Adam's moments, seconds, and by how much
the loss on stories has risen (nats a token), measured with the change switched on. languages: bodies that have read English stories
only, English and Chinese ones, or each story in both languages side by side (equal numbers of tokens read, within a few per cent); each is
told the mood of 512 English stories, and of 512 Chinese ones, and judges new Chinese stories. sst2: DATA holds the folders sst2 and
all_MiniLM_L6_v2 (see benchmarks.pretrained): film reviews, good or bad, by a head from 32 to all 6,920 labels, by LoRA and in full from
32 to 512, three passes each; accuracy on the first 600 test sentences.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, mean_sd, run
from lmbook.batches import Examples
from lmbook.finetuning import (
    LabelledTexts,
    LoraConfig,
    SoftPrompt,
    apply_adapters,
    apply_lora,
    freeze,
    label_loss,
    label_scores,
    trained,
    training_bytes,
)
from lmbook.grammar import Grammar
from lmbook.pretrained import load_pretrained
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.tokenizer_files import load_tokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig

CORNER = """
story
  1 > opening feel say other answer buy put
opening
  1 | {hero} was {job.a} in {land.capital}. | {hero}是{land.capital_zh}的一名{job}。 | topic ~ topic; job ~ job(topic=topic.en); hero ~ given; land ~ land
feel
  1 | {hero.gender.she} was {feeling}. | {hero.gender.zh}很{feeling}。 | polarity ~ polarity; feeling ~ feeling(polarity=polarity.en)
say
  1 | {hero.gender.she} said: "{_say}" | {hero.gender.zh}说：“{_say}” | _say ~ saying(polarity=polarity.en)
other
  1 | {hero.gender.her} {kin} {friend} was {_feeling}. | {kin}{friend}很{_feeling}。 | friend ~ given; kin ~ kin(gender=friend.gender); _feeling ~ feeling(polarity=polarity.en)
answer
  1 | {friend} said: "{_say}" | {friend}说：“{_say}” | _say ~ saying(polarity=polarity.en)
buy
  1 | {hero.gender.she} bought {look.a} {thing} for {hero.gender.him}self. | {hero.gender.zh}给自己买了一{thing.cl}{look}的{thing}。 | look ~ quality; thing ~ object(topic=topic.en)
put
  1 | {hero.gender.she} put the {thing} {box}. | {hero.gender.zh}把{thing}放在{box}。 | box ~ spot(topic=topic.en, half=a)
"""  # noqa: E501 (a line is a rule)
WAYS = ("from scratch", "full", "last block", "head", "LoRA", "adapters", "soft prompt")
RATES = {"from scratch": 3e-3, "full": 3e-3, "last block": 3e-3, "head": 9e-2, "LoRA": 2e-2, "adapters": 2e-2, "soft prompt": 3e-2}
STEPS = {8: 40, 32: 60, 128: 100, 512: 150, 2000: 200}  # by labels; batches of 16, or of all labels
PROMPT = ' She said: "What a'  # behind it the mood decides the next word

BENCHMARK = Benchmark(
    packages=("torch", "safetensors"), seeds=3,
    options=[Option("steps", 720, dry=4, help="steps of pre-training"), Option("labels", list(STEPS), dry=[8], help="numbers of labels")],
)  # fmt: skip


def corner() -> SmallWorld:
    world = SmallWorld(SmallWorldConfig(limit=6))
    world.grammar = Grammar(CORNER, world.grammar.lexicon, limit=6)
    return world


def stories(split: str, n: int, start: int = 0) -> tuple[list[str], list[int]]:
    "Stories up to the mood, and whether it is a good one."
    world = corner()
    good = {row["en"] for row in world.grammar.lexicon["feeling"] if row["polarity"] == "positive"}
    texts = [re.split(r" S?[Hh]e said:", text)[0] for text in world.texts(split, n=n, start=start)]
    return texts, [int(text[:-1].rpartition(" was ")[2] in good) for text in texts]


def rows_of(tokenizer: WordTokenizer, texts: list[str], end: str = "") -> list[list[int]]:
    return [tokenizer.encode(text + end, bos=True) for text in texts]


def pretrained(settings: Settings, seed: int) -> tuple[Transformer, WordTokenizer]:
    "As the chapter does it."
    texts = list(corner().texts("train", n=settings.pick(12_000, 60)))
    tokenizer = WordTokenizer.train(texts)
    torch.manual_seed(seed)
    model = Transformer(shape(tokenizer.vocab_size))
    config = TrainConfig(steps=settings.steps, lr=7e-3, schedule="wsd", warmup=min(20, settings.steps - 1), seed=seed, device="cpu")
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    Trainer(model, Examples(rows, batch_size=8, sort=settings.pick(10, 0), seed=seed), config).fit()
    return model, tokenizer


def shape(vocab_size: int) -> TransformerConfig:
    parts = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "init": "xavier_uniform"}
    return TransformerConfig(vocab_size, d_model=48, n_layer=2, n_head=4, context_length=192, **parts)


def prepare(way: str, model: Transformer) -> nn.Module:
    "A classifier, with that made trainable which the way trains."
    body = Transformer(model.config) if way == "from scratch" else copy.deepcopy(model)
    judge = Classifier(body, ClassifierConfig(("bad", "good")))
    if way == "last block": freeze(judge, ["score", "blocks.1.", "decoder.norm"])
    elif way == "head": freeze(judge, ["score"])
    elif way == "LoRA": apply_lora(judge, LoraConfig(rank=4, alpha=8))
    elif way == "adapters": apply_adapters(judge, width=4)
    elif way == "soft prompt": return SoftPrompt(judge, n=4)
    return judge


def tune(way: str, model: Transformer, rows: list, labels: list, seed: int, lr: float, steps: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    judge, start = prepare(way, model), time.process_time()
    batches = LabelledTexts(rows, labels, classes=2, batch_size=min(16, len(rows)), seed=seed)
    config = TrainConfig(steps=steps, lr=lr, warmup=min(5, steps - 1), seed=seed, device="cpu")
    Trainer(judge, batches, config, loss=label_loss).fit()
    return judge, time.process_time() - start


def accuracy(judge: nn.Module, rows: list, labels: list) -> float:
    return float((label_scores(judge, rows).argmax(1) == torch.tensor(labels)).float().mean())


@torch.no_grad()
def story_loss(judge: nn.Module, rows: list[list[int]]) -> float:
    "Nats a token that the body, as it is now, pays for stories. Its scores are the table of vectors, which is tied."
    soft = isinstance(judge, SoftPrompt)
    body, n = (judge.body, judge.n) if isinstance(judge, SoftPrompt) else (judge.body, 0)
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([[*(body.config.vocab_size + i for i in range(n)), *row]])
        logits = F.linear(body.eval().hidden(ids[:, :-1]), body.embed.tokens.weight)[0, n if soft else 0 :]
        total += float(F.cross_entropy(logits, ids[0, n + 1 :], reduction="sum"))
        count += len(row) - 1
    return total / count


@BENCHMARK.part()
def rates(settings: Settings) -> dict[str, Any]:
    model, tokenizer = pretrained(settings, seed=9)
    texts, labels = stories("train", 64, start=900_000)
    valid, truth = stories("valid", settings.pick(200, 10))
    found: dict[str, Any] = {}
    for way in WAYS:
        tried = [RATES[way] / 3, RATES[way], RATES[way] * 3]
        scores = {}
        for lr in tried:
            judge, _ = tune(way, model, rows_of(tokenizer, texts), labels, 9, lr, settings.pick(60, 2))
            scores[f"{lr:.0e}"] = accuracy(judge, rows_of(tokenizer, valid), truth)
        found[way] = scores
    return found


@BENCHMARK.part()
def labels(settings: Settings) -> dict[str, Any]:
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    prompted: dict[str, list[float]] = {way: [] for way in WAYS}
    sizes: dict[str, dict[str, int]] = {}
    before = []
    test, truth = stories("test", settings.pick(300, 10))
    whole = list(corner().texts("valid", n=settings.pick(60, 3)))
    for seed in range(settings.seeds):
        model, tokenizer = pretrained(settings, seed)
        kept = [tokenizer.encode(text, bos=True, eos=True) for text in whole]
        before.append(story_loss(Classifier(copy.deepcopy(model), ClassifierConfig(("bad", "good"))), kept))
        for n in settings.labels:
            texts, known = stories("train", n, start=20_000 + 3000 * seed)
            for way in WAYS:
                judge, seconds = tune(way, model, rows_of(tokenizer, texts), known, seed, RATES[way], settings.pick(STEPS.get(n, 100), 2))
                row = {"accuracy": accuracy(judge, rows_of(tokenizer, test), truth), "seconds": seconds}
                if way != "from scratch": row["forgotten"] = story_loss(judge, kept) - before[-1]
                found.setdefault((way, n), []).append(row)
                sizes[way] = {"trained": trained(judge), "bytes": training_bytes(judge)}
                if n == 8:
                    end = PROMPT
                    judge, _ = tune(way, model, rows_of(tokenizer, texts, end), known, seed, RATES[way], settings.pick(STEPS[8], 2))
                    prompted[way].append(accuracy(judge, rows_of(tokenizer, test, end), truth))
    rows = [
        {"way": way, "labels": n, **{name: mean_sd([one[name] for one in all_]) for name in all_[0]}} for (way, n), all_ in found.items()
    ]
    return {"rows": rows, "sizes": sizes, "8 labels with a prompt": {way: mean_sd(v) for way, v in prompted.items() if v},
            "loss of stories": mean_sd(before)}


class TwoLanguages:
    "Stories in English words and Chinese characters, as ids of one vocabulary."

    def __init__(self, settings: Settings):
        self.n = settings.pick(6000, 40)
        self.pairs = {start: self.both("train", self.n, start) for start in (0, 500_000)}
        every = [text for pairs in self.pairs.values() for pair in pairs for text in pair]
        self.tokenizer = WordTokenizer.train([english for pairs in self.pairs.values() for english, _ in pairs])
        first = self.tokenizer.vocab_size
        letters = sorted({c for text in every for c in text if ord(c) > 127})
        self.number = {c: first + i for i, c in enumerate(letters)}
        self.vocab_size = first + len(letters)

    def both(self, split: str, n: int, start: int) -> list[tuple[str, str]]:
        world = corner()
        return list(zip(world.texts(split, n=n, start=start), world.texts(split, "zh", n=n, start=start)))

    def ids(self, text: str, language: int) -> list[int]:
        return [self.number.get(c, 0) for c in text] if language else self.tokenizer.encode(text)

    def rows(self, how: str) -> list[list[int]]:
        "What a body reads: so many English stories; or half as many and as many Chinese ones, of others or of the same."
        begin, end, first, second = self.tokenizer.bos_id, self.tokenizer.eos_id, self.pairs[0], self.pairs[500_000]
        english = [[begin, *self.ids(text, 0), end] for text, _ in first]
        if how == "English only": return english + [[begin, *self.ids(text, 0), end] for text, _ in second]
        if how == "both, of different stories": return english + [[begin, *self.ids(text, 1), end] for _, text in second]
        rows = []
        for i, (a, b) in enumerate(first):
            pair = [[begin, *self.ids(a, 0), end], [begin, *self.ids(b, 1), end]]
            rows.append([*pair[i % 2], *pair[1 - i % 2]])  # now the one first, now the other
        return rows

    def judged(self, split: str, n: int, start: int, language: int) -> tuple[list[list[int]], list[int]]:
        "Stories up to the mood, and whether it is a good one."
        _, labels = stories(split, n, start)
        texts = [re.split(r"[他她]说：" if language else r" S?[Hh]e said:", pair[language])[0] for pair in self.both(split, n, start)]
        return [[self.tokenizer.bos_id, *self.ids(text, language)] for text in texts], labels


@BENCHMARK.part()
def languages(settings: Settings) -> dict[str, Any]:
    data, found = TwoLanguages(settings), {}
    test = data.judged("test", settings.pick(300, 10), 0, 1)
    for seed in range(settings.seeds):
        for how in ("none", "English only", "both, of different stories", "both, side by side"):
            torch.manual_seed(seed)
            model = Transformer(replace(shape(data.vocab_size), context_length=256))
            if how != "none":
                size = settings.pick(8 if how == "both, side by side" else 16, 4)
                steps = 3 * settings.steps
                config = TrainConfig(steps=steps, lr=7e-3, schedule="wsd", warmup=min(20, steps - 1), seed=seed, device="cpu")
                Trainer(model, Examples(data.rows(how), batch_size=size, sort=settings.pick(10, 0), seed=seed), config).fit()
            for name, language in (("English labels", 0), ("Chinese labels", 1)):
                rows, known = data.judged("train", settings.pick(512, 8), 20_000 + 3000 * seed, language)
                judge, _ = tune("full", model, rows, known, seed, RATES["full"], settings.pick(STEPS[512], 2))
                found.setdefault(how, {}).setdefault(name, []).append(accuracy(judge, *test))
            print(f"  seed {seed}, {how}: {found[how]}", flush=True)
    most = max(test[1].count(label) for label in (0, 1)) / len(test[1])
    return {"one answer to all": most, **{how: {name: mean_sd(values) for name, values in row.items()} for how, row in found.items()}}


class Reviewer(nn.Module):
    "A sentence encoder and a linear map of the mean of its vectors."

    def __init__(self, body: Transformer):
        super().__init__()
        self.body, self.score = body, nn.Linear(body.config.d_model, 2)

    def vector(self, ids: Tensor, segments: Tensor) -> Tensor: # (B, D)
        states, there = self.body.hidden(ids, segments=segments), (segments > 0)[..., None]
        return (states * there).sum(1) / there.sum(1)

    def forward(self, ids: Tensor, *, segments: Tensor) -> Tensor: return self.score(self.vector(ids, segments))


def logistic(X: Tensor, y: Tensor) -> nn.Linear:
    "A head on vectors that do not change: 300 steps of Adam with a little weight decay."
    head = nn.Linear(X.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-2, weight_decay=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(head(X), y).backward()
        optimizer.step()
    return head


@BENCHMARK.part(data=["sst2", "all_MiniLM_L6_v2"])
def sst2(settings: Settings) -> dict[str, Any]:
    folder: Path = settings.folder("all_MiniLM_L6_v2")
    tokenizer = load_tokenizer(folder)
    ends = [i for name in ("[CLS]", "[SEP]") if (i := tokenizer.specials.get(name)) is not None]

    def read(split: str, n: int) -> tuple[list[list[int]], list[int]]:
        lines = [line.split("\t") for line in (settings.folder("sst2") / f"{split}.tsv").read_text(encoding="utf-8").splitlines()]
        if split == "train": lines = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
        rows = [[*ends[:1], *tokenizer.encode(text)[: settings.pick(46, 8)], *ends[1:]] for text, _ in lines[:n]]
        return rows, [int(label) for _, label in lines[:n]]

    most = settings.pick(6920, 16)  # all
    rows, known = read("train", most)
    test, truth = read("test", settings.pick(600, 6))
    body = load_pretrained(folder)

    @torch.no_grad()
    def vectors(rows: list[list[int]]) -> Tensor:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        out = torch.zeros(len(rows), body.config.d_model)
        reader = Reviewer(body).eval()
        for at in range(0, len(order), 32):
            some = order[at : at + 32]
            [batch] = LabelledTexts([rows[i] for i in some], [0] * len(some), classes=1, batch_size=32, shuffle=False).read()
            out[some] = reader.vector(batch.ids, batch.segments)
        return out

    X, Xt, y = vectors(rows), vectors(test), torch.tensor(known)
    size = sum(p.numel() for p in body.parameters())
    found: list[dict[str, Any]] = []
    for n in sorted({settings.pick(32, 4), settings.pick(128, 8), settings.pick(512, 8), most}):
        scores = []
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            some = np.random.default_rng(seed).permutation(most)[:n]
            head = logistic(X[some], y[some])
            scores.append(float((head(Xt).argmax(1) == torch.tensor(truth)).float().mean()))
        found.append({"way": "head", "labels": n, "trained": trained(head), "seeds": settings.seeds, "accuracy": mean_sd(scores)})
    for n, epochs in settings.pick(((32, 3), (128, 3), (512, 3)), ((8, 3),)):
        for way, lr in (("LoRA", 2e-3), ("full", 1e-4)):
            scores, seconds, numbers = [], [], 0
            for seed in range(settings.seeds):
                some = np.random.default_rng(seed).permutation(most)[:n].tolist()
                torch.manual_seed(seed)
                judge = Reviewer(copy.deepcopy(body))
                judge.score.load_state_dict(logistic(X[some], y[some]).state_dict())  # begin where the head has come to
                if way == "LoRA":
                    apply_lora(judge, LoraConfig(rank=8, alpha=16))
                    judge.score.requires_grad_(True)
                batches = LabelledTexts([rows[i] for i in some], [known[i] for i in some], classes=2, batch_size=16, seed=seed)
                steps = settings.pick(epochs * math.ceil(n / 16), 1)
                start = time.process_time()
                config = TrainConfig(steps=steps, lr=lr, warmup=min(2, steps - 1), seed=seed, device="cpu")
                Trainer(judge, batches, config, loss=label_loss).fit()
                seconds.append(time.process_time() - start)
                numbers = trained(judge)
                scores.append(accuracy(judge, test, truth))
            found.append({"way": way, "labels": n, "trained": numbers, "seeds": settings.seeds, "accuracy": mean_sd(scores),
                          "seconds": statistics.fmean(seconds)})
    return {"parameters": size, "test": len(test), "rows": found}


if __name__ == "__main__": run(__file__)
