"""How much gets through one vector, what that does to translation, and what convolutions cost beside recurrence.

    python -m benchmarks.seq2seq --data ../shared/data

Prints a table for each part and writes benchmarks/results/seq2seq.json after each. Without --data the part on Tatoeba is left out; `--only copy,speed` runs
some parts and keeps the others of the file. Everything is trained on one thread, through lmbook.training, and judged by greedy writing unless it says nats.

copy: random letters of eight kinds, 1 to 12 in training and 1 to 16 in testing, through vectors of several widths (LSTM, 64 numbers of state), three seeds each; the
bits that arrive are those of the sequence less what the decoder still pays for it. reversal: the same with the source read backwards. sentences: Small World,
English words to Chinese characters, one to four sentences at once. continuation: the second half of a story from the first, encoder-decoders beside a decoder-only
Transformer of as many parameters. tatoeba: real sentence pairs, split by their English side; chrF of NLTK, on characters. speed: forward and backward, PyTorch's LSTM
and convolutions of the same width, in turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.common import best_of, machine, rounded
from lmbook.batches import Examples
from lmbook.core import evaluating, seed_everything
from lmbook.seq2seq import SPECIAL, ConvConfig, ConvEncoder, Seq2Seq, Seq2SeqConfig, copy_task, greedy_accuracy, receptive_field
from lmbook.small_world import WORD, SmallWorld, SmallWorldConfig
from lmbook.training import TrainConfig, Trainer, mean_loss

RESULTS = Path(__file__).parent / "results" / "seq2seq.json"
LETTERS, SEEDS = 8, (0, 1, 2)
UNITS = ("<pad>", "<bos>", "<eos>", "<unk>")


def train(make: Callable[[], nn.Module], pairs: list, seed: int, steps: int, lr: float, batch: int, join: bool = False) -> nn.Module:
    seed_everything(seed)
    model = make()
    Trainer(model, Examples(pairs, batch_size=batch, join=join, seed=seed), TrainConfig(steps=steps, lr=lr, warmup=20, seed=seed, device="cpu")).fit()
    return model


def nats(model: nn.Module, pairs: list, join: bool = False) -> float:
    "Per token, the true tokens given."
    with evaluating(model): return mean_loss(model, Examples(pairs, batch_size=min(100, len(pairs)), join=join, shuffle=False).read())


def spread(values: list[float]) -> list[float]: return [statistics.fmean(values), min(values), max(values)]


def copy(_: Path | None) -> dict:
    out: dict = {"lengths": list(range(1, 17)), "steps": 1500, "widths": {}}
    V = SPECIAL + LETTERS
    tests = {length: copy_task(500, length, LETTERS, seed=10_000 + length) for length in out["lengths"]}

    def measure(model: Seq2Seq) -> tuple[list[float], list[float]]:
        exact = [float(greedy_accuracy(model, pairs).exact.mean()) for pairs in tests.values()]
        bits = [length * math.log2(LETTERS) - nats(model, pairs) * (length + 1) / math.log(2) for length, pairs in tests.items()]
        return exact, bits

    def run(width: int, seed: int, steps: int) -> Seq2Seq:
        make = lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=16, d_hidden=64, d_vector=width))  # noqa: E731
        return train(make, copy_task(steps * 64, (1, 12), LETTERS, seed=seed), seed, steps, 1e-2, 64)

    for width in (4, 16, 64):
        models = [run(width, seed, out["steps"]) for seed in SEEDS]
        exact, bits = zip(*map(measure, models))
        out["widths"][width] = {"exact": [spread(list(v)) for v in zip(*exact)], "bits": [spread(list(v)) for v in zip(*bits)]}
        print(f"copy, width {width}: exact {[round(v[0], 2) for v in out['widths'][width]['exact']]}", flush=True)
    model, kept = run(64, 0, 6000), {}
    exact, bits = measure(model)
    out["longer"] = {"width": 64, "steps": 6000, "exact": exact, "bits": bits}
    for levels in (2, 4, 8, 16, 256):
        def rounding(module, args, memory, levels=levels):
            return memory._replace(summary=((memory.summary + 1) / 2 * (levels - 1)).round() / (levels - 1) * 2 - 1)

        hook = model.encoder.register_forward_hook(rounding)
        kept[levels] = {length: float(greedy_accuracy(model, tests[length]).exact.mean()) for length in (4, 8, 12)}
        hook.remove()
    out["rounded"] = kept
    print(f"copy, width 64, 6000 steps: {[round(v, 2) for v in exact]}; rounded {kept}", flush=True)
    return out


def reversal(_: Path | None) -> dict:
    V, out = SPECIAL + LETTERS, {"steps": 600, "lengths": [4, 8, 12]}
    for name in (False, True):
        runs = []
        for seed in SEEDS:
            make = lambda name=name: Seq2Seq(Seq2SeqConfig(V, V, d_embed=16, d_hidden=64, reverse=name))  # noqa: E731
            model = train(make, copy_task(600 * 64, (1, 12), LETTERS, seed=seed), seed, 600, 1e-2, 64)
            runs.append([nats(model, copy_task(500, length, LETTERS, seed=10_000 + length)) for length in out["lengths"]])
        out["reversed" if name else "plain"] = [spread(list(v)) for v in zip(*runs)]
    print("reversal:", out, flush=True)
    return out


def number(units: list[str]) -> dict[str, int]: return {unit: i for i, unit in enumerate([*UNITS, *units])}


def encoded(pairs: list[tuple[list[str], list[str]]], source: dict[str, int], target: dict[str, int]) -> list:
    return [([source.get(w, 3) for w in a], [1, *(target.get(c, 3) for c in b), 2]) for a, b in pairs]


def sentences(_: Path | None) -> dict:
    world, most, steps = SmallWorld(SmallWorldConfig(limit=3)), 4, 1000

    def pieces(split: str, n: int) -> list[tuple[list[str], list[str], int]]:
        rng, found = np.random.default_rng(0), {}
        for document in world.documents(split, n):
            at, rows = 0, document.sentences
            while at < len(rows):
                size = int(rng.integers(1, most + 1))
                part = rows[at : at + size]
                found.setdefault(" ".join(e for e, _ in part), ([w for e, _ in part for w in WORD.findall(e)], [c for _, z in part for c in z], len(part)))
                at += size
        return list(found.values())

    known = pieces("train", 8_000)
    seen = {tuple(a) for a, _, _ in known}
    fresh = [p for p in pieces("test", 1500) if tuple(p[0]) not in seen]
    source, target = number(sorted({w for a, _, _ in known for w in a})), number(sorted({c for _, b, _ in known for c in b}))
    rows, runs = encoded([p[:2] for p in known], source, target), []
    for seed in SEEDS:
        make = lambda: Seq2Seq(Seq2SeqConfig(len(source), len(target), d_embed=48, d_hidden=128, encoder="gru", decoder="gru"))  # noqa: E731
        model = train(make, rows, seed, steps, 5e-3, 32)
        run = {}
        for k in range(1, most + 1):
            some = encoded([p[:2] for p in fresh if p[2] == k][:300], source, target)
            right = greedy_accuracy(model, some)
            run[k] = [nats(model, some), float(right.exact.mean()), float(right.tokens.mean()), len(some), statistics.fmean(len(a) for a, _ in some)]
        runs.append(run)
        print("sentences:", rounded(run, 3), flush=True)
    names = ("nats", "exact", "tokens")
    out = {k: {name: spread([run[k][i] for run in runs]) for i, name in enumerate(names)} | {"pairs": runs[0][k][3], "words": runs[0][k][4]} for k in runs[0]}
    return {"steps": steps, "training_pairs": len(known), "parameters": sum(p.numel() for p in model.parameters()), "by_sentences": out}


class DecoderOnly(nn.Module):
    "A Transformer that reads given and wanted as one row."

    def __init__(self, V: int, d: int = 64, layers: int = 2, longest: int = 160):
        super().__init__()
        self.embed, self.place = nn.Embedding(V, d), nn.Embedding(longest, d)
        for table in (self.embed, self.place): nn.init.normal_(table.weight, std=d**-0.5)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, ids):
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        return self.body(x, nn.Transformer.generate_square_subsequent_mask(ids.shape[1]), is_causal=True) @ self.embed.weight.T


def continuation(_: Path | None) -> dict:
    world, steps = SmallWorld(SmallWorldConfig(limit=3, talk=0)), 400

    def halves(split: str, n: int) -> tuple[list, float]:
        pairs, paid, tokens = [], 0.0, 0
        for text, document in zip(world.texts(split, n=n), world.documents(split, n)):
            rows = [WORD.findall(e) for e, _ in document.sentences]
            half = (len(rows) + 1) // 2
            pairs.append((sum(rows[:half], []), sum(rows[half:], [])))
            if split == "test": paid, tokens = paid - sum(world.sentence_log_probs(text)[half:]), tokens + len(pairs[-1][1]) + 1
        return pairs, paid / tokens if tokens else math.nan

    known, (fresh, ground) = halves("train", 20_000)[0], halves("test", 500)
    words = number(sorted({w for pair in known for part in pair for w in part}))
    known, fresh, V = encoded(known, words, words), encoded(fresh, words, words), len(words)
    joined = lambda pairs: [([*a, 1], b[1:]) for a, b in pairs]  # noqa: E731
    makers = {
        "lstm": lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=48, d_hidden=64)),
        "gru": lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=48, d_hidden=72, encoder="gru", decoder="gru")),
        "conv": lambda: Seq2Seq(Seq2SeqConfig(V, V, d_embed=48, d_hidden=64, encoder="conv", layers=2)),
        "transformer": lambda: DecoderOnly(V),
    }
    out: dict = {"steps": steps, "floor": ground, "nats": {}, "parameters": {}, "lr": {}}
    for name, make in makers.items():
        change, join = (joined, True) if name == "transformer" else (list, False)
        dev = change(known[-500:])
        rates = {lr: nats(train(make, change(known[:-500]), 9, 100, lr, 16, join), dev, join) for lr in (3e-3, 1e-2, 2e-2)}  # each at its own best rate
        lr = min(rates, key=rates.get)
        models = [train(make, change(known[:-500]), seed, steps, lr, 16, join) for seed in SEEDS]
        out["nats"][name], out["lr"][name] = spread([nats(model, change(fresh), join) for model in models]), lr
        out["parameters"][name] = sum(p.numel() for p in models[0].parameters())
        print(f"continuation, {name}: {rounded(out['nats'][name])} nats per word, floor {ground:.3f}, {out['parameters'][name]:,} parameters, lr {lr}", flush=True)
    return out


def tatoeba(data: Path | None) -> dict:
    from nltk.translate.chrf_score import corpus_chrf

    [path] = (data / "tatoeba_en_zh").glob("*.t*")
    by_english: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        english, chinese = line.split("\t")[:2]
        by_english.setdefault(english, []).append(chinese)
    names = sorted(by_english)
    np.random.default_rng(0).shuffle(names)
    fresh, known = names[:1500], names[1500:]
    cut = lambda text: WORD.findall(text.lower())  # noqa: E731
    pairs = [(cut(e), list(z)) for e in known for z in by_english[e] if len(cut(e)) and len(z) <= 40]
    count = {}
    for a, b in pairs:
        for side, units in (("s", a), ("t", b)):
            for unit in units: count[side, unit] = count.get((side, unit), 0) + 1
    source, target = (number(sorted(u for (s, u), n in count.items() if s == side and n >= 3)) for side in "st")
    rows, runs = encoded(pairs, source, target), []
    tests = [(cut(e), by_english[e]) for e in fresh if cut(e) and len(by_english[e][0]) <= 40]
    units, steps = [*UNITS, *list(target)[4:]], 800
    edges = ((1, 4), (5, 6), (7, 8), (9, 11), (12, 40))
    for seed in SEEDS[:2]:
        make = lambda: Seq2Seq(Seq2SeqConfig(len(source), len(target), d_embed=64, d_hidden=128, encoder="bigru", decoder="gru", dropout=0.2))  # noqa: E731
        model = train(make, rows, seed, steps, 3e-3, 48)
        run = {}
        for low, high in edges:
            some = [t for t in tests if low <= len(t[0]) <= high]
            ids = encoded([(a, list(b[0])) for a, b in some], source, target)
            [batch] = Examples(ids, batch_size=len(ids), join=False, shuffle=False).read()
            said = ["".join(units[i] for i in row if i >= 4) or "?" for row in model.decode_greedy(batch.source, batch.source_segments, 45)]
            best = [max(refs, key=lambda r, s=s: corpus_chrf([list(r)], [list(s)], min_len=1, max_len=2)) for s, (_, refs) in zip(said, some)]
            chrf = corpus_chrf([list(b) for b in best], [list(s) for s in said], min_len=1, max_len=2)
            run[f"{low}-{high}"] = [nats(model, ids), chrf, float(np.mean([s in refs for s, (_, refs) in zip(said, some)])), len(some)]
        runs.append(run)
        print("tatoeba:", rounded(run, 3), flush=True)
    names = ("nats", "chrf", "exact")
    out = {k: {name: spread([run[k][i] for run in runs]) for i, name in enumerate(names)} | {"pairs": runs[0][k][3]} for k in runs[0]}
    return {"steps": steps, "training_pairs": len(pairs), "vocabularies": [len(source), len(target)],
            "parameters": sum(p.numel() for p in model.parameters()), "by_words": out}


def speed(_: Path | None) -> dict:
    out, d, B = {}, 64, 16
    config = ConvConfig(d, 3, 4, "doubling")
    models = {"lstm": nn.LSTM(d, d, batch_first=True), "conv": ConvEncoder(config)}
    for T in (16, 64, 256, 1024):
        x = torch.randn(B, T, d)

        def step(name: str, x=x) -> None:
            y = models[name](x)
            (y[0] if isinstance(y, tuple) else y).sum().backward()

        seconds = {name: [] for name in models}
        for _ in range(5):
            for name in models: seconds[name].append(best_of(3, lambda name=name: step(name)))
        out[T] = {name: min(v) * 1e3 for name, v in seconds.items()} | {"ratio": statistics.median(a / b for a, b in zip(seconds["conv"], seconds["lstm"]))}
    print("speed, ms forward and backward:", rounded(out, 3), flush=True)
    return {"d": d, "batch": B, "layers": {"lstm": 1, "conv": config.layers}, "sees": receptive_field(config).back, "by_length": out}


PARTS = {"speed": speed, "continuation": continuation, "copy": copy, "reversal": reversal, "sentences": sentences, "tatoeba": tatoeba}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of real data sets; without it Tatoeba is left out")
    parser.add_argument("--only", help="parts to run, separated by commas; the others stay as they are in the file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if options.only and RESULTS.exists() else {}
    for name in options.only.split(",") if options.only else PARTS:
        if name == "tatoeba" and options.data is None:
            print("tatoeba: left out, give --data")
            continue
        start = time.perf_counter()
        made = machine("torch", "numpy")
        results[name] = rounded(PARTS[name](options.data)) | {"seconds": round(time.perf_counter() - start), "load_before": made["load_before"]}
        results |= {"command": "python -m benchmarks.seq2seq --data DATA", "date": datetime.date.today().isoformat(), "machine": made}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{RESULTS.name} written", file=sys.stderr)


if __name__ == "__main__": main()
