"""Recurrent networks: what writing the cells by hand costs, what packing gains, and a tagger on real text.

    python -m benchmarks.bilstm --data ../shared/data

One thread. All speeds are ratios of two things that took turns in one run.
Cells: our `unroll` of RNNCell, GRUCell and LSTMCell against nn.RNN, nn.GRU and nn.LSTM with the same weights, forward and forward +
backward.
Padding: a BiLSTM over sentences of Small World, in random batches and in batches of like length; `Recurrent` with lengths (PyTorch packs),
the same layer over the padded rectangle (wrong for the backward direction), and each sentence alone.
WNUT-17 (needs --data): BIO tags of six types; forward only against both directions at about equal weights of the recurrent layers; test
set; no vectors from elsewhere. Words seen less than three times are known by their shape only (Xx for a capitalised word, @x for a name on
the web, ...). The weights of the best epoch by the development set's span F1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time

import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, in_turns, mean_sd, medians, run
from lmbook.bilstm import TaggedSentences, Tagger, TaggerConfig, bio_spans, tag_loss
from lmbook.core import evaluating
from lmbook.grammar import WORD
from lmbook.recurrent import GRUCell, LSTMCell, Recurrent, RecurrentConfig, RNNCell, unroll
from lmbook.small_world import SmallWorld
from lmbook.training import TrainConfig, Trainer

WNUT = {"train": "wnut17train.conll", "dev": "emerging.dev.conll", "test": "emerging.test.annotated"}


BENCHMARK = Benchmark(
    packages=("torch", "numpy"), seeds=3,
    options=[Option("repeats", 15, 1, "rounds in which all take turns"), Option("epochs", 12, 1, "of each training")],
)


@BENCHMARK.part()
def cells(settings: Settings) -> dict[str, dict[str, float]]:
    "How many times as long the loop over words takes."
    out = {}
    x = torch.randn(32, 40, 64)
    for name, hand in {"rnn": RNNCell, "gru": GRUCell, "lstm": LSTMCell}.items():
        cell, fused = hand(64, 64), Recurrent(RecurrentConfig(64, 64, cell=name, forget_bias=None))
        fused.rnn.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})

        def forward(run: Callable[[], Tensor]) -> Callable[[], None]:
            def once() -> None:
                with torch.no_grad(): run()

            return once

        by_hand, by_torch = lambda c=cell: unroll(c, x)[0], lambda f=fused: f(x)[0]
        t = medians(in_turns({
            "hand": forward(by_hand), "torch": forward(by_torch),
            "hand, learning": lambda run=by_hand: run().sum().backward(), "torch, learning": lambda run=by_torch: run().sum().backward(),
        }, settings.repeats, clock=process_time))  # fmt: skip
        out[name] = {"forward": t["hand"] / t["torch"], "forward and backward": t["hand, learning"] / t["torch, learning"],
                     "largest difference": (by_hand() - by_torch()).abs().max().item()}
    return out


@BENCHMARK.part()
@torch.no_grad()
def padding(settings: Settings) -> dict[str, dict[str, float]]:
    "Time of packing and of one sentence at a time, each over that of reading the padded rectangle."
    world, out = SmallWorld(), {}
    sentences = [n for text in world.texts("train", n=60) for n in map(len, map(WORD.findall, text.split(". "))) if n]
    sentences = sentences[: settings.pick(512, 64)]
    model = Recurrent(RecurrentConfig(64, 64, bidirectional=True)).eval()
    for order, lengths in {"random batches": sentences, "batches of like length": sorted(sentences)}.items():
        batches = [torch.tensor(lengths[i : i + 32]) for i in range(0, len(lengths), 32)]
        data = [(torch.randn(len(n), int(n.max()), 64), n) for n in batches]

        t = medians(in_turns({
            "packed": lambda data=data: [model(x, lengths=n) for x, n in data],
            "rectangle": lambda data=data: [model(x) for x, n in data],
            "alone": lambda data=data: [model(row[None, :k]) for x, n in data for row, k in zip(x, n.tolist())],
        }, settings.repeats, clock=process_time))  # fmt: skip
        places = sum(x.shape[0] * x.shape[1] for x, _ in data)
        out[order] = {"padding": 1 - sum(lengths) / places, "packed": t["packed"] / t["rectangle"], "alone": t["alone"] / t["rectangle"]}
    return out


def conll(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    "Sentences of a file with a token and a tag a line and an empty line between sentences."
    words: list[str] = []
    tags: list[str] = []
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip():
            word, _, tag = line.strip().rpartition("\t")
            words.append(word)
            tags.append(tag)
        elif words:
            yield words, tags
            words, tags = [], []


@BENCHMARK.part(data=["wnut17"])
def wnut17(settings: Settings) -> dict[str, object]:
    "Train and judge the taggers."
    folder, seeds, epochs = settings.folder("wnut17"), settings.seeds, settings.epochs
    data = {split: list(conll(folder / name)) for split, name in WNUT.items()}
    names = ["O", *sorted({tag for words, tags in data["train"] for tag in tags} - {"O"})]
    counts = Counter(word for words, _ in data["train"] for word in words)

    def known(word: str) -> str:
        "The word, or of a rare one its shape."
        if counts[word] > 2: return word
        return "<" + re.sub(r"(.)\1+", r"\1", re.sub("[A-Z]", "X", re.sub("[a-z]", "x", re.sub(r"\d", "0", word)))) + ">"

    units = Counter(known(word) for words, _ in data["train"] for word in words)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(word for word, n in units.items() if n > 1)])}

    def encoded(split: str) -> list[tuple[list[int], list[int]]]:
        def ids(words: list[str]) -> list[int]: return [vocabulary.get(known(word), 0) for word in words]

        return [(ids(words), [names.index(tag) if tag in names else 0 for tag in tags]) for words, tags in data[split]]

    def judge(model: Tagger, split: str) -> dict[str, float]:
        guesses, hit, guessed, true, same, total = model.predict([ids for ids, _ in encoded(split)]), 0, 0, 0, 0, 0
        for guess, (_, truth) in zip(guesses, data[split]):
            guess = [names[t] for t in guess]
            found, wanted = set(bio_spans(guess)), set(bio_spans(truth))
            hit, guessed, true = hit + len(found & wanted), guessed + len(found), true + len(wanted)
            same, total = same + sum(a == b for a, b in zip(guess, truth)), total + len(truth)
        return {"span_f1": 2 * hit / max(1, guessed + true), "token_accuracy": same / total}

    def trained(width: int, bidirectional: bool, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = Tagger(TaggerConfig(len(vocabulary), len(names), 64, width, bidirectional=bidirectional, dropout=0.3))
        batches = TaggedSentences(encoded("train"), 32, sort=20, seed=seed)
        steps = len(batches)
        config = TrainConfig(epochs=epochs, lr=1e-2, seed=seed, eval_every=steps, load_best=True, log_every=steps)
        Trainer(model, batches, config, loss=tag_loss, evaluate=lambda m: {"minus_f1": -judge(m, "dev")["span_f1"]}).fit()
        with evaluating(model): return judge(model, "test")

    models = {}
    for name, width, both in (("forward only", 100, False), ("both directions", 64, True)):
        found = [trained(width, both, seed) for seed in range(seeds)]
        rnn = nn.LSTM(64, width, bidirectional=both)
        models[name] = {"recurrent weights": sum(p.numel() for p in rnn.parameters()),
                        **{key: mean_sd([row[key] for row in found]) for key in found[0]}}
        print(f"  {name:16} span F1 {models[name]['span_f1']['mean']:.3f}", flush=True)
    total = sum(len(tags) for _, tags in data["test"])
    outside = sum(tag == "O" for _, tags in data["test"] for tag in tags) / total
    unseen = sum(counts[word] < 3 for words, _ in data["test"] for word in words) / total
    return {"models": models, "seeds": seeds, "epochs": epochs, "vocabulary": len(vocabulary),
            "share_of_test_words_by_shape_only": unseen, "accuracy_of_always_O": outside}


if __name__ == "__main__": run(__file__)
