"""An LSTM on a small split of WikiText-2 in the time that PyTorch's example takes for its own: the recipe, the curve, and what a cache adds.

    python -m benchmarks.wikitext2 --data ../shared/data

Prints the curve and a table and writes benchmarks/results/wikitext2.json. Training file, words, vocabulary and split are those of the reference (data/README.md):
every word of the three files is in the vocabulary, and every token of the test file is scored once, the state carried from its first to its last.
A third of the vocabulary never occurs in the training file. The model has one output for all of these words, whose probability they share equally, and learns
what it is worth from words that occur once, half of which are hidden in each epoch. All settings were chosen on the validation file.
The cache (Grave, Joulin and Usunier 2017) remembers the states of the last words and what followed them; its three numbers are chosen on the validation file, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import best_of, machine, rounded
from lmbook.batches import Batch, TokenStream
from lmbook.bilstm import detach_state
from lmbook.core import seed_everything
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig
from lmbook.training import TrainConfig, Trainer

RESULTS = Path(__file__).parent / "results" / "wikitext2.json"
REFERENCE = {"model": "PyTorch's example word_language_model, LSTM 2 x 200, tied, 4 epochs", "seconds": 401, "perplexity": 332.6}  # data/README.md
MODEL = {"d_embed": 256, "d_hidden": 256, "layers": 1, "dropout_words": .1, "dropout_in": .5, "dropout_out": .5, "weight_drop": .4}
TRAIN = {"lr": 6e-3, "warmup": 100, "clip": 1., "weight_decay": 1e-5}
ROWS, LENGTH, EPOCHS, HIDDEN = 32, 48, 12, .5


class Text:
    "The three files as ids: the words of the training file by frequency, then one id for all others."

    def __init__(self, folder: Path):
        files = {name: [word for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for word in [*line.split(), "<eos>"]]
                 for name in ("train", "valid", "test")}
        counts = Counter(files["train"])
        known = {word: i for i, (word, _) in enumerate(counts.most_common())}
        self.unseen, self.counts = len(known), np.array([*sorted(counts.values(), reverse=True), 0])
        new = {word: self.unseen + i for i, word in enumerate(sorted({*files["valid"], *files["test"]} - set(known)))}
        self.sharing = len(new)  # words that share the last id
        self.words = {name: np.array([known.get(w, new.get(w)) for w in file]) for name, file in files.items()}  # ids that tell all words apart
        self.ids = {name: np.minimum(row, self.unseen) for name, row in self.words.items()}


class Reading(TokenStream):
    "The training text as contiguous rows. Each epoch begins somewhere else, and hides some of the words that occur once behind the id of unseen words."

    def __init__(self, text: Text, seed: int):
        self.text = text
        super().__init__(text.ids["train"], ROWS, LENGTH, contiguous=True, seed=seed)

    def plan(self, epoch: int) -> list:
        rng = np.random.default_rng([self.seed, epoch])
        hide = (self.text.counts == 1) & (rng.random(len(self.text.counts)) < HIDDEN)
        tokens = np.roll(np.where(hide[self.text.ids["train"]], self.text.unseen, self.text.ids["train"]), rng.integers(len(self.text.ids["train"])))
        return [(tokens, item) for item in super().plan(epoch)]

    def make(self, item: Any) -> Batch:
        self.tokens, where = item
        return super().make(where)


class Halved(CarriedState):
    "A CarriedState that leaves the scores in bfloat16. They are most of the work: so a step takes about two thirds of the time, and each word's loss is right to a hundredth or so."

    def __call__(self, model: RecurrentLM, batch: Batch) -> tuple[Tensor, int]:
        x, after = model.features(batch.ids, self.states["train"] if batch.carry else None)
        self.states["train"] = tuple(map(detach_state, after))
        scores = model.out(x).flatten(0, 1)
        with torch.autocast(scores.device.type, enabled=False): losses = F.cross_entropy(scores, batch.targets.flatten(), reduction="none")
        return losses.float().sum(), batch.tokens


def build(text: Text) -> RecurrentLM:
    "A model that begins with the frequencies of words."
    model = RecurrentLM(RecurrentLMConfig(text.unseen + 1, **MODEL))
    share = torch.from_numpy(text.counts + .5) / text.counts.sum()
    share[text.unseen] = .03
    with torch.no_grad(): model.out.bias.copy_(share.log())
    return model


@torch.no_grad()
def read(model: RecurrentLM, ids: np.ndarray, rows: int = 1) -> tuple[Tensor, Tensor]: # (N, D) what the last layer says before each word but the first, and these words
    "Read a text with the state carried, in float32, evaluation mode."
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


def run(text: Text, seed: int, epochs: int, check: int) -> tuple[RecurrentLM, dict]:
    "One training, and the test, by the clock."
    seed_everything(seed)
    start, curve = time.perf_counter(), []
    model, stream = build(text), Reading(text, seed)

    def valid(model: RecurrentLM) -> float:
        x, targets = read(model, text.ids["valid"][:check], rows=20)
        loss = -scores(model, x, targets, text).double().mean().item()
        curve.append({"seconds": time.perf_counter() - start, "valid": math.exp(loss)})
        print(f"seed {seed}: {curve[-1]['seconds']:5.0f} s, validation perplexity {curve[-1]['valid']:.1f} (first {check:,} words)", flush=True)
        return loss

    config = TrainConfig(epochs=epochs, dtype="bfloat16", eval_every=2 * len(stream), log_every=100, seed=seed, deterministic=False, **TRAIN)
    history = Trainer(model, stream, config, loss=Halved(), evaluate=valid).fit()
    trained = time.perf_counter() - start
    x, targets = read(model, text.ids["test"])
    log_p = scores(model, x, targets, text)
    seconds = time.perf_counter() - start
    tokens = epochs * len(text.ids["train"])
    result = {"seed": seed, "seconds": seconds, "seconds_of_training": trained, "tokens_per_s": tokens / trained, "perplexity": math.exp(-log_p.double().mean()),
              "training_perplexity": math.exp(history.rows[-2]["loss"]) if "loss" in history.rows[-2] else None, "curve": curve}
    print(f"seed {seed}: {seconds:.0f} s, test perplexity {result['perplexity']:.1f}", flush=True)
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
    return {"bias": bias, "sharpness": sharpness, "share": share, "size": 3000, "valid": perplexity, "test": mixed(log_p, cache, share), "test_without": math.exp(-log_p.double().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds wikitext2/")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--check", type=int, default=30_000, help="words of the validation file that are read for the curve and the cache")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    folder = args.data / "wikitext2"
    if not folder.is_dir(): raise SystemExit(f"There is no folder {folder}. Pass --data, the folder that holds wikitext2/.")
    text = Text(folder)
    made = machine("torch", "numpy")
    a = torch.randn(2048, 2048)
    made["matrix_product_gflops"] = 2 * 2048**3 / best_of(5, lambda: a @ a) / 1e9
    runs = []
    for seed in range(args.seeds):
        model, result = run(text, seed, args.epochs, args.check)
        result["cache"] = with_cache(model, text, args.check)
        print(f"seed {seed}: with a cache {result['cache']['test']:.1f}", flush=True)
        runs.append(result)
    print(f"\n{'':44}{'seconds':>9}{'test perplexity':>17}")
    print(f"{REFERENCE['model'][:43]:44}{REFERENCE['seconds']:>9}{REFERENCE['perplexity']:>17}   (measured on a machine of this size)")
    for r in runs: print(f"{'this recipe, seed ' + str(r['seed']):44}{r['seconds']:>9.0f}{r['perplexity']:>17.1f}   with a cache {r['cache']['test']:.1f}")
    report = {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.wikitext2 --data ../shared/data", "machine": made,
              "recipe": {"model": MODEL, "train": TRAIN, "rows": ROWS, "length": LENGTH, "epochs": args.epochs, "hidden": HIDDEN, "dtype": "bfloat16",
                         "parameters": sum(p.numel() for p in model.parameters())},
              "vocabulary": {"words": text.unseen + text.sharing, "unseen_in_training": text.sharing, "unseen_share_of_test": float((text.ids["test"] == text.unseen).mean())},
              "reference": REFERENCE, "runs": runs}
    if not args.dry: RESULTS.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__": main()
