"""How much gets through one vector, what that does to translation, and what convolutions cost beside recurrence.

    python -m benchmarks.seq2seq --data ../shared/data

Without --data the part on Tatoeba is left out. Everything is trained on one thread, through lmbook.training, and judged by greedy writing
unless it says nats.

copy: random letters of eight kinds, 1 to 12 in training and 1 to 16 in testing, through vectors of several widths (LSTM, 64 numbers of
state), three seeds each; the bits that arrive are those of the sequence less what the decoder still pays for it. reversal: the same with
the source read backwards. translation: the chapter's translator, trained longer. sentences: Small World, English words to Chinese
characters, one to four sentences at once. continuation: the second half of a story from the first, encoder-decoders beside a decoder-only
Transformer of as many parameters. tatoeba: real sentence pairs, split by their English side; chrF of NLTK, on characters. speed: forward
and backward, PyTorch's LSTM and convolutions of the same width, in turns.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.common import Benchmark, Settings, in_turns, ratio, run, spread
from lmbook.batches import Examples
from lmbook.convolutions import ConvConfig, ConvEncoder, PooledEncoder, receptive_field
from lmbook.core import evaluating, seed_everything
from lmbook.generation import SamplingConfig, generate
from lmbook.grammar import WORD
from lmbook.seq2seq import (
    BOS_ID,
    EOS_ID,
    N_SPECIAL,
    Seq2Seq,
    Seq2SeqConfig,
    copy_task,
    greedy_accuracy,
)
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.training import TrainConfig, Trainer, mean_loss

LETTERS = 8
UNITS = ("<pad>", "<bos>", "<eos>", "<unk>")
GREEDY = SamplingConfig(max_new_tokens=45, temperature=0, eos_id=EOS_ID)
BENCHMARK = Benchmark(packages=("torch", "numpy", "nltk"), seeds=3)


def train(make: Callable[[], nn.Module], pairs: list, seed: int, steps: int, lr: float, batch: int, join: bool = False) -> nn.Module:
    seed_everything(seed)
    model = make()
    config = TrainConfig(steps=steps, lr=lr, warmup=min(20, steps - 1), seed=seed, device="cpu")
    Trainer(model, Examples(pairs, batch_size=batch, join=join, seed=seed), config).fit()
    return model


def nats(model: nn.Module, pairs: list, join: bool = False) -> float:
    "Per token, the true tokens given."
    with evaluating(model): return mean_loss(model, Examples(pairs, batch_size=min(100, len(pairs)), join=join, shuffle=False).read())


@BENCHMARK.part()
def speed(settings: Settings) -> dict:
    out, d, B = {}, 64, 16
    config = ConvConfig(d, 3, 4, "doubling")
    models = {"lstm": nn.LSTM(d, d, batch_first=True), "conv": ConvEncoder(config)}
    for T in settings.pick((16, 64, 256, 1024), (16, 64)):
        x = torch.randn(B, T, d)

        def step(name: str, x=x) -> None:
            y = models[name](x)
            (y[0] if isinstance(y, tuple) else y).sum().backward()

        times = in_turns({name: partial(step, name) for name in models}, settings.pick(15, 1))
        out[T] = {name: min(values) * 1e3 for name, values in times.items()} | {"ratio": ratio(times["conv"], times["lstm"])}  # ms
    return {"d": d, "batch": B, "layers": {"lstm": 1, "conv": config.n_layer}, "sees": receptive_field(config).back, "by_length": out}


@BENCHMARK.part()
def copy(settings: Settings) -> dict:
    out: dict = {"lengths": list(range(1, 17)), "steps": settings.pick(1500, 2), "widths": {}}
    longer = settings.pick(6000, 3)
    V = N_SPECIAL + LETTERS
    tests = {length: copy_task(settings.pick(500, 4), length, LETTERS, seed=10_000 + length) for length in out["lengths"]}

    def measure(model: Seq2Seq) -> tuple[list[float], list[float]]:
        exact = [float(greedy_accuracy(model, pairs).exact.mean()) for pairs in tests.values()]
        bits = [length * math.log2(LETTERS) - nats(model, pairs) * (length + 1) / math.log(2) for length, pairs in tests.items()]
        return exact, bits

    def trained(width: int, seed: int, steps: int) -> Seq2Seq:
        make = lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=16, d_hidden=64, d_vector=width))  # noqa: E731
        return train(make, copy_task(steps * 64, (1, 12), LETTERS, seed=seed), seed, steps, 1e-2, 64)

    for width in settings.pick((4, 16, 64), (4,)):
        models = [trained(width, seed, out["steps"]) for seed in range(settings.seeds)]
        exact, bits = zip(*map(measure, models))
        out["widths"][width] = {"exact": [spread(list(v)) for v in zip(*exact)], "bits": [spread(list(v)) for v in zip(*bits)]}
    model, kept = trained(64, 0, longer), {}
    exact, bits = measure(model)
    out["longer"] = {"width": 64, "steps": longer, "exact": exact, "bits": bits}
    for levels in (2, 4, 8, 16, 256):
        def rounding(module, args, memory, levels=levels):
            return memory._replace(summary=((memory.summary + 1) / 2 * (levels - 1)).round() / (levels - 1) * 2 - 1)

        hook = model.encoder.register_forward_hook(rounding)
        kept[levels] = {length: float(greedy_accuracy(model, tests[length]).exact.mean()) for length in (4, 8, 12)}
        hook.remove()
    out["rounded"] = kept
    return out


@BENCHMARK.part()
def reversal(settings: Settings) -> dict:
    V, steps, out = N_SPECIAL + LETTERS, settings.pick(600, 2), {"lengths": [4, 8, 12]}
    out["steps"] = steps
    for name in (False, True):
        runs = []
        for seed in range(settings.seeds):
            make = lambda name=name: Seq2Seq(Seq2SeqConfig(V, V, d_embed=16, d_hidden=64, reverse=name))  # noqa: E731
            model = train(make, copy_task(steps * 64, (1, 12), LETTERS, seed=seed), seed, steps, 1e-2, 64)
            tests = [copy_task(settings.pick(500, 4), length, LETTERS, seed=10_000 + length) for length in out["lengths"]]
            runs.append([nats(model, pairs) for pairs in tests])
        out["reversed" if name else "plain"] = [spread(list(v)) for v in zip(*runs)]
    return out


def number(units: list[str]) -> dict[str, int]: return {unit: i for i, unit in enumerate([*UNITS, *units])}


def encoded(pairs: list[tuple[list[str], list[str]]], source: dict[str, int], target: dict[str, int]) -> list:
    return [([source.get(w, 3) for w in a], [1, *(target.get(c, 3) for c in b), 2]) for a, b in pairs]


@BENCHMARK.part()
def translation(settings: Settings) -> dict:
    "The translator of chapter 34, from its start and on its pairs, trained as long as there and half as long again."
    documents = SmallWorld(SmallWorldConfig(limit=3, talk=0)).documents("train", settings.pick(3500, 40))
    pairs = list(dict.fromkeys(pair for document in documents for pair in document.sentences))
    source = number(sorted({w for e, _ in pairs for w in WORD.findall(e)}))
    target = number(sorted({c for _, z in pairs for c in z}))
    rows = encoded([(WORD.findall(e), list(z)) for e, z in pairs], source, target)
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, known = [rows[i] for i in order[::12]], [rows[i] for at, i in enumerate(order) if at % 12]
    config = Seq2SeqConfig(len(source), len(target), d_embed=48, d_hidden=96, encoder="gru", decoder="gru")
    out: dict = {"training_pairs": len(known), "tests": len(held_out), "by_steps": {}}
    for steps in settings.pick((300, 450), (2, 3)):
        model = train(lambda: Seq2Seq(config), known, 0, steps, 1e-2, 48)
        out["by_steps"][steps] = {"exact": float(greedy_accuracy(model, held_out).exact.mean()), "nats": nats(model, held_out)}
    return out


@BENCHMARK.part()
def sentences(settings: Settings) -> dict:
    world, most, steps = SmallWorld(SmallWorldConfig(limit=3)), 4, settings.pick(1000, 2)

    def pieces(split: str, n: int) -> list[tuple[list[str], list[str], int]]:
        rng, found = np.random.default_rng(0), {}
        for document in world.documents(split, n):
            at, rows = 0, document.sentences
            while at < len(rows):
                size = int(rng.integers(1, most + 1))
                part = rows[at : at + size]
                words, characters = [w for e, _ in part for w in WORD.findall(e)], [c for _, z in part for c in z]
                found.setdefault(" ".join(e for e, _ in part), (words, characters, len(part)))
                at += size
        return list(found.values())

    known = pieces("train", settings.pick(8_000, 60))
    seen = {tuple(a) for a, _, _ in known}
    fresh = [p for p in pieces("test", settings.pick(1500, 40)) if tuple(p[0]) not in seen]
    source, target = number(sorted({w for a, _, _ in known for w in a})), number(sorted({c for _, b, _ in known for c in b}))
    rows, runs = encoded([p[:2] for p in known], source, target), []
    for seed in range(settings.seeds):
        config = Seq2SeqConfig(len(source), len(target), d_embed=48, d_hidden=128, encoder="gru", decoder="gru")
        model = train(lambda: Seq2Seq(config), rows, seed, steps, 5e-3, 32)  # noqa: B023
        run = {}
        for k in range(1, most + 1):
            some = encoded([p[:2] for p in fresh if p[2] == k][: settings.pick(300, 10)], source, target)
            right = greedy_accuracy(model, some)
            found = [nats(model, some), float(right.exact.mean()), float(right.tokens.mean())]
            run[k] = [*found, len(some), statistics.fmean(len(a) for a, _ in some)]
        runs.append(run)
    names = ("nats", "exact", "tokens")
    out = {k: {name: spread([run[k][i] for run in runs]) for i, name in enumerate(names)} for k in runs[0]}
    for k, row in out.items(): row |= {"pairs": runs[0][k][3], "words": runs[0][k][4]}
    return {"steps": steps, "training_pairs": len(known), "parameters": sum(p.numel() for p in model.parameters()), "by_sentences": out}


class DecoderOnly(nn.Module):
    "A Transformer that reads given and wanted as one row."

    def __init__(self, V: int, d: int = 64, n_layer: int = 2, longest: int = 160):
        super().__init__()
        self.embed, self.place = nn.Embedding(V, d), nn.Embedding(longest, d)
        for table in (self.embed, self.place): nn.init.normal_(table.weight, std=d**-0.5)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, n_layer, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, ids):
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        return self.body(x, nn.Transformer.generate_square_subsequent_mask(ids.shape[1]), is_causal=True) @ self.embed.weight.T


@BENCHMARK.part()
def continuation(settings: Settings) -> dict:
    world, steps, kept = SmallWorld(SmallWorldConfig(limit=3, talk=0)), settings.pick(400, 2), settings.pick(500, 10)

    def halves(split: str, n: int) -> tuple[list, float]:
        pairs, paid, tokens = [], 0.0, 0
        for text, document in zip(world.texts(split, n=n), world.documents(split, n)):
            rows = [WORD.findall(e) for e, _ in document.sentences]
            half = (len(rows) + 1) // 2
            pairs.append(tuple(list(chain.from_iterable(part)) for part in (rows[:half], rows[half:])))
            if split == "test":
                paid -= sum(world.sentence_log_probs(text)[half:])
                tokens += len(pairs[-1][1]) + 1
        return pairs, paid / tokens if tokens else math.nan

    known, (fresh, ground) = halves("train", settings.pick(20_000, 60))[0], halves("test", settings.pick(500, 10))
    words = number(sorted({w for pair in known for part in pair for w in part}))
    known, fresh, V = encoded(known, words, words), encoded(fresh, words, words), len(words)
    joined = lambda pairs: [([*a, 1], b[1:]) for a, b in pairs]  # noqa: E731
    windows = Seq2SeqConfig(V, V, d_embed=48, d_hidden=64, n_layer=2)
    makers = {
        "lstm": lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=48, d_hidden=64)),
        "gru": lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=48, d_hidden=72, encoder="gru", decoder="gru")),
        "conv": lambda: Seq2Seq(windows, encoder=PooledEncoder(windows)),
        "transformer": lambda: DecoderOnly(V),
    }
    out: dict = {"steps": steps, "floor": ground, "nats": {}, "parameters": {}, "lr": {}}
    for name, make in makers.items():
        change, join = (joined, True) if name == "transformer" else (list, False)
        dev = change(known[-kept:])
        pairs, tried = change(known[:-kept]), settings.pick((3e-3, 1e-2, 2e-2), (3e-3, 1e-2))  # each at its own best rate
        rates = {lr: nats(train(make, pairs, 9, settings.pick(100, 2), lr, 16, join), dev, join) for lr in tried}
        lr = min(rates, key=rates.get)
        models = [train(make, pairs, seed, steps, lr, 16, join) for seed in range(settings.seeds)]
        out["nats"][name], out["lr"][name] = spread([nats(model, change(fresh), join) for model in models]), lr
        out["parameters"][name] = sum(p.numel() for p in models[0].parameters())
        print(f"  {name}: {out['nats'][name][0]:.3f} nats per word", flush=True)
    return out


# ---------------------------------------------------------------- real sentence pairs, also for benchmarks/transformer.py


@dataclass
class Pairs:
    "English sentences as words with their Chinese as characters, split by the English side."

    rows: list  # encoded, to learn from
    tests: list[tuple[list[str], list[str]]]  # English words, and all their translations
    source: dict[str, int]
    target: dict[str, int]

    @classmethod
    def read(cls, folder: Path, n_fresh: int) -> Pairs:
        [path] = folder.glob("*.t*")
        by_english: dict[str, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            english, chinese = line.split("\t")[:2]
            by_english.setdefault(english, []).append(chinese)
        names = sorted(by_english)
        np.random.default_rng(0).shuffle(names)
        fresh, known = names[:n_fresh], names[n_fresh:]
        cut = lambda text: WORD.findall(text.lower())  # noqa: E731
        pairs = [(cut(e), list(z)) for e in known for z in by_english[e] if len(cut(e)) and len(z) <= 40]
        counts = [Counter(unit for pair in pairs for unit in pair[side]) for side in (0, 1)]
        source, target = (number(sorted(unit for unit, n in count.items() if n >= 3)) for count in counts)
        tests = [(cut(e), by_english[e]) for e in fresh if cut(e) and len(by_english[e][0]) <= 40]
        return cls(encoded(pairs, source, target), tests, source, target)

    def judged(self, write: Callable[[list], list[list[int]]], nats: Callable[[list], float]) -> dict[str, list[float]]:
        "By the number of English words: nats, chrF on characters, share of exact translations, and how many pairs."
        from nltk.translate.chrf_score import corpus_chrf

        units, out = [*UNITS, *list(self.target)[4:]], {}
        for low, high in ((1, 4), (5, 6), (7, 8), (9, 11), (12, 40)):
            some = [t for t in self.tests if low <= len(t[0]) <= high]
            if not some: continue
            ids = encoded([(a, list(b[0])) for a, b in some], self.source, self.target)
            said = ["".join(units[i] for i in row if i >= 4) or "?" for row in write(ids)]

            def near(reference: str, text: str) -> float: return corpus_chrf([list(reference)], [list(text)], min_len=1, max_len=2)

            best = [max(references, key=lambda r, text=text: near(r, text)) for text, (_, references) in zip(said, some)]
            chrf = corpus_chrf([list(b) for b in best], [list(text) for text in said], min_len=1, max_len=2)
            exact = np.mean([text in references for text, (_, references) in zip(said, some)])
            out[f"{low}-{high}"] = [nats(ids), chrf, float(exact), len(some)]
        return out

    def summary(self, runs: list[dict[str, list[float]]], steps: int, parameters: int) -> dict:
        names = ("nats", "chrf", "exact")
        out = {k: {name: spread([run[k][i] for run in runs]) for i, name in enumerate(names)} | {"pairs": runs[0][k][3]} for k in runs[0]}
        return {"steps": steps, "training_pairs": len(self.rows), "vocabularies": [len(self.source), len(self.target)],
                "parameters": parameters, "by_words": out}


@BENCHMARK.part(data=["tatoeba_en_zh"], needs=["nltk"])
def tatoeba(settings: Settings) -> dict:
    pairs, steps, runs = Pairs.read(settings.folder("tatoeba_en_zh"), settings.pick(1500, 30)), settings.pick(800, 2), []
    config = Seq2SeqConfig(len(pairs.source), len(pairs.target), d_embed=64, d_hidden=128, encoder="bigru", decoder="gru", dropout=0.2)
    for seed in range(min(2, settings.seeds)):
        model = train(lambda: Seq2Seq(config), pairs.rows, seed, steps, 3e-3, 48)

        def write(ids: list, model=model) -> list[list[int]]:
            return generate(model, [[BOS_ID]] * len(ids), GREEDY, source=[list(given) for given, _ in ids])

        runs.append(pairs.judged(write, partial(nats, model)))
        print(f"  seed {seed}", runs[-1], flush=True)
    return pairs.summary(runs, steps, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__": run(__file__)
