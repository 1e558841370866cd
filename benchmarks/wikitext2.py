"""An LSTM on a small split of WikiText-2 in the time that PyTorch's example takes: the recipe, the curve, and what a cache adds.

    python -m benchmarks.wikitext2 --data ../shared/data

Training file, words, vocabulary and split are those of the reference (data/README.md): every word of the three files is in the vocabulary,
and every token of the test file is scored once, the state carried from its first to its last. A third of the vocabulary never occurs in the
training file. The model has one output for all of these words, whose probability they share equally, and learns what it is worth from words
that occur once, half of which are hidden in each epoch.
All settings were chosen on the validation file. Training is in bfloat16, which PyTorch's LSTM refuses on processors without AVX-512.
The cache (Grave, Joulin and Usunier 2017) remembers the states of the last words and what followed them; its three numbers are chosen on
the validation file, too.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Benchmark, Option, Settings, best_of, run
from lmbook.batches import Batch, TokenStream
from lmbook.core import seed_everything
from lmbook.recurrent import detach_state
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig
from lmbook.training import TrainConfig, Trainer

REFERENCE = {  # data/README.md
    "model": "PyTorch's example word_language_model, LSTM 2 x 200, tied, 4 epochs", "seconds": 401, "perplexity": 332.6,
}
MODEL = {"d_embed": 256, "d_hidden": 256, "n_layer": 1, "dropout_words": .1, "dropout_in": .5, "dropout_out": .5, "weight_drop": .4}
TRAIN = {"lr": 6e-3, "warmup": 100, "clip": 1., "weight_decay": 1e-5}
ROWS, LENGTH, EPOCHS, HIDDEN = 32, 48, 12, .5
BENCHMARK = Benchmark(
    packages=("torch", "numpy"), seeds=2, threads=2,
    options=[Option("epochs", EPOCHS, 1),
             Option("check", 30_000, 400, "words of the validation file that are read for the curve and the cache")],
    facts=lambda settings: {"reference": REFERENCE},
)


class Text:
    "The three files as ids: the words of the training file by frequency, then one id for all others."

    def __init__(self, folder: Path):
        lines = {name: (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in ("train", "valid", "test")}
        files = {name: [word for line in part for word in [*line.split(), "<eos>"]] for name, part in lines.items()}
        counts = Counter(files["train"])
        known = {word: i for i, (word, _) in enumerate(counts.most_common())}
        self.unseen, self.counts = len(known), np.array([*sorted(counts.values(), reverse=True), 0])
        new = {word: self.unseen + i for i, word in enumerate(sorted({*files["valid"], *files["test"]} - set(known)))}
        self.sharing = len(new)  # words that share the last id
        ids = known | new  # they tell all words apart
        self.words = {name: np.array([ids[word] for word in file]) for name, file in files.items()}
        self.ids = {name: np.minimum(row, self.unseen) for name, row in self.words.items()}


class Reading(TokenStream):
    "The training text as contiguous rows. Each epoch begins somewhere else, and hides some words that occur once as unseen ones."

    def __init__(self, text: Text, seed: int):
        self.text = text
        super().__init__(text.ids["train"], ROWS, LENGTH, contiguous=True, seed=seed)

    def plan(self, epoch: int) -> list:
        rng = np.random.default_rng([self.seed, epoch])
        hide = (self.text.counts == 1) & (rng.random(len(self.text.counts)) < HIDDEN)
        ids = self.text.ids["train"]
        tokens = np.roll(np.where(hide[ids], self.text.unseen, ids), rng.integers(len(ids)))
        return [(tokens, item) for item in super().plan(epoch)]

    def make(self, item: Any) -> Batch:
        self.tokens, where = item
        return super().make(where)


class Halved(CarriedState):
    """A CarriedState that leaves the scores in bfloat16. They are most of the work: so a step takes about two thirds of the time,
    and each word's loss is right to a hundredth or so."""

    def __call__(self, model: RecurrentLM, batch: Batch) -> tuple[Tensor, int]:
        x, after = model.features(batch.ids, self.states["train"] if batch.carry else None)
        self.states["train"] = tuple(map(detach_state, after))
        scores = model.out(x).flatten(0, 1)
        with torch.autocast(scores.device.type, enabled=False):
            losses = F.cross_entropy(scores, batch.targets.flatten(), reduction="none")
        return losses.float().sum(), batch.tokens


def build(text: Text) -> RecurrentLM:
    "A model that begins with the frequencies of words."
    model = RecurrentLM(RecurrentLMConfig(text.unseen + 1, **MODEL))
    share = torch.from_numpy(text.counts + .5) / text.counts.sum()
    share[text.unseen] = .03
    with torch.no_grad(): model.out.bias.copy_(share.log())
    return model


@torch.no_grad()
def read(model: RecurrentLM, ids: np.ndarray, rows: int = 1) -> tuple[Tensor, Tensor]:
    "(N, D) what the last layer says before each word but the first, and these words: with the state carried, in float32, evaluation mode."
    length = len(ids) // rows
    table = torch.from_numpy(ids[: rows * length].reshape(rows, length))
    model.eval()
    states, out = None, []
    for part in table[:, :-1].split(2000, 1):
        x, states = model.features(part, states)
        out.append(x)
    return torch.cat(out, 1).flatten(0, 1), table[:, 1:].flatten()


@torch.no_grad()
def scores(model: RecurrentLM, x: Tensor, targets: Tensor, text: Text, bias: float = 0.) -> Tensor: # (N,) log-probability of each word
    "Unseen words share the probability of their one output. `bias` is added to its score."
    shift = torch.zeros(text.unseen + 1)
    shift[-1] = bias
    found = [-F.cross_entropy(model.out(part) + shift, t, reduction="none") for part, t in zip(x.split(512), targets.split(512))]
    return torch.cat(found) - (targets == text.unseen) * math.log(text.sharing)


@torch.no_grad()
def cached(x: Tensor, words: Tensor, sharpness: float, size: int) -> Tensor: # (N,) what the cache says of each word
    "Attention to the last `size` states, by their dot product with the present one; each votes for the word that followed it."
    out, place = [], torch.arange(len(x))
    for start in range(0, len(x), 500):
        now, past = place[start : start + 500, None], place[max(0, start - size) : start + 499]
        dots = (sharpness * x[start : start + 500] @ x[past].T).masked_fill((past >= now) | (past < now - size), -torch.inf)
        vote = dots.softmax(1).nan_to_num(0.)
        out.append((vote * (words[past] == words[start : start + 500, None])).sum(1))
    return torch.cat(out)


def mixed(log_p: Tensor, cache: Tensor, share: float) -> float: # perplexity
    return math.exp(-((1 - share) * log_p.exp() + share * cache).log().double().mean())


def one_training(text: Text, seed: int, settings: Settings) -> tuple[RecurrentLM, dict]:
    "One training, and the test, by the clock."
    seed_everything(seed)
    epochs, check = settings.epochs, settings.check
    start, curve = time.perf_counter(), []
    model, stream = build(text), Reading(text, seed)

    def valid(model: RecurrentLM) -> float:
        x, targets = read(model, text.ids["valid"][:check], rows=20)
        loss = -scores(model, x, targets, text).double().mean().item()
        curve.append({"seconds": time.perf_counter() - start, "valid": math.exp(loss)})
        print(f"  seed {seed}: {curve[-1]['seconds']:5.0f} s, validation perplexity {curve[-1]['valid']:.1f} (first {check:,} words)",
              flush=True)
        return loss

    dtype = settings.pick("bfloat16", "float32")  # not every processor has an LSTM in bfloat16, and a dry run is for all of them
    config = TrainConfig(epochs=epochs, dtype=dtype, eval_every=2 * len(stream), log_every=100, seed=seed, deterministic=False,
                         **TRAIN | {"warmup": settings.pick(TRAIN["warmup"], 1)})
    history = Trainer(model, stream, config, loss=Halved(), evaluate=valid).fit()
    trained = time.perf_counter() - start
    x, targets = read(model, text.ids["test"])
    log_p = scores(model, x, targets, text)
    seconds = time.perf_counter() - start
    tokens = epochs * len(text.ids["train"])
    before_last = history.rows[-2] if len(history.rows) > 1 else {}
    result = {"seed": seed, "seconds": seconds, "seconds_of_training": trained, "tokens_per_s": tokens / trained,
              "perplexity": math.exp(-log_p.double().mean()),
              "training_perplexity": math.exp(before_last["loss"]) if "loss" in before_last else None, "curve": curve}
    print(f"  seed {seed}: {seconds:.0f} s, test perplexity {result['perplexity']:.1f}", flush=True)
    return model, result


def with_cache(model: RecurrentLM, text: Text, check: int) -> dict:
    "Choose the cache on the validation file, use it on the test file."
    x, targets = read(model, text.ids["valid"][:check])
    words = torch.from_numpy(text.words["valid"][1:check])
    grid = []
    for bias in (0., .3, .6):
        log_p = scores(model, x, targets, text, bias)
        for sharpness in (0., .1, .2, .3) if bias == .3 else (.1,):
            cache = cached(x, words, sharpness, 3000)
            grid += [(mixed(log_p, cache, share), bias, sharpness, share) for share in (.05, .1, .15, .2, .3)]
    perplexity, bias, sharpness, share = min(grid)
    x, targets = read(model, text.ids["test"])
    log_p = scores(model, x, targets, text, bias)
    cache = cached(x, torch.from_numpy(text.words["test"][1:]), sharpness, 3000)
    return {"bias": bias, "sharpness": sharpness, "share": share, "size": 3000, "valid": perplexity, "test": mixed(log_p, cache, share),
            "test_without": math.exp(-log_p.double().mean())}


# ---------------------------------------------------------------- the parts


@BENCHMARK.part(data=["wikitext2"])
def recipe(settings: Settings) -> dict:
    model = build(Text(settings.folder("wikitext2")))
    return {"model": MODEL, "train": TRAIN, "rows": ROWS, "length": LENGTH, "epochs": settings.epochs, "hidden": HIDDEN,
            "dtype": "bfloat16", "parameters": sum(p.numel() for p in model.parameters())}


@BENCHMARK.part(data=["wikitext2"])
def vocabulary(settings: Settings) -> dict:
    text = Text(settings.folder("wikitext2"))
    return {"words": text.unseen + text.sharing, "unseen_in_training": text.sharing,
            "unseen_share_of_test": float((text.ids["test"] == text.unseen).mean())}


@BENCHMARK.part()
def matrix_product_gflops(settings: Settings) -> float:
    "What this machine can do at all."
    a = torch.randn(settings.pick(2048, 64), settings.pick(2048, 64))
    return 2 * len(a) ** 3 / best_of(settings.pick(5, 1), lambda: a @ a) / 1e9


@BENCHMARK.part(data=["wikitext2"])
def runs(settings: Settings) -> list[dict]:
    text, out = Text(settings.folder("wikitext2")), []
    for seed in range(settings.seeds):
        model, result = one_training(text, seed, settings)
        out.append(result | {"cache": with_cache(model, text, settings.check)})
    print(f"  {'':44}{'seconds':>9}{'test perplexity':>17}")
    print(f"  {REFERENCE['model'][:43]:44}{REFERENCE['seconds']:>9}{REFERENCE['perplexity']:>17}   (measured on a machine of this size)")
    for r in out:
        name, cache = f"this recipe, seed {r['seed']}", r["cache"]["test"]
        print(f"  {name:44}{r['seconds']:>9.0f}{r['perplexity']:>17.1f}   with a cache {cache:.1f}")
    return out


if __name__ == "__main__": run(__file__)
