"""What attention costs by length beside an LSTM, what its variants cost and are worth, and how far each kind of position reaches.

    python -m benchmarks.attention

One thread, nothing but CPU. Times are seconds of the processor, which a busy machine changes less than the clock; the contenders take
turns, and the fastest of some rounds counts. Memory: each in a process of its own, peak resident size above that of the same process before
(Linux). Length: one layer, four sequences, forward alone and forward with backward.
Layers: stacks of equally many weights on one thread and on two. Heads: keys and values shared by groups of queries.
Text: small causal models on Small World, trained on short rows and read on long ones, and an LSTM at equal parameters and words.
Copy: through one vector, through D2's gate, and through attention, a harder game than the chapter's.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, fastest, in_turns, memory, run
from lmbook.alignment import AttentionDecoder
from lmbook.attention import Attention, AttentionConfig, attention, attention_weights
from lmbook.batches import Examples, TokenStream
from lmbook.deep_networks import MLP, LayerNorm, MLPConfig, init_weights
from lmbook.grammar import WORD
from lmbook.positions import LearnedPositions, online_attention, sinusoidal
from lmbook.recurrent import Recurrent, RecurrentConfig
from lmbook.seq2seq import Seq2Seq, Seq2SeqConfig, copy_task, greedy_accuracy
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.training import TrainConfig, Trainer

ROWS, WIDTH, HEADS = 4, 256, 4
LENGTHS = (64, 128, 256, 512, 1024, 2048)
LONG = (4096,)  # without the plain one, whose matrices would take gigabytes
BENCHMARK = Benchmark(
    packages=("torch",), seeds=3, facts=lambda settings: {"shape": {"rows": ROWS, "width": WIDTH, "heads": HEADS}},
    options=[Option("lengths", [*LENGTHS, *LONG], [64], "of the part length; the rows of other lengths are kept"),
             Option("rounds", 6, 1, "rounds in which all take turns"), Option("steps", 600, 3, "of each training in the part text"),
             Option("copy-steps", 600, 2, "of each training in the part copy")],
)


# ---------------------------------------------------------------- length


class Layer(nn.Module):
    "One causal layer of attention whose core can be changed."

    def __init__(self, core: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.maps, self.core = Attention(AttentionConfig(WIDTH, HEADS)), core

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = self.maps._split(self.maps.query(x)), self.maps.keys_values(x)
        return self.maps.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class Loop(nn.Module):
    "One layer of LSTM."

    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor: return self.body(x)[0]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor: return attention_weights(q, k, causal=True) @ v
def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor: return attention(q, k, v, causal=True)
def online(q: Tensor, k: Tensor, v: Tensor) -> Tensor: return online_attention(q, k, v, causal=True)


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Loop() if name == "LSTM" else Layer({"plain": plain, "fused": fused, "online": online}[name])


def work(model: nn.Module, x: Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad(): model(x)
        return
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)


def turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    "Processor seconds of the fastest round."
    return fastest(in_turns(ways, rounds, clock=time.process_time))


def peak(name: str, T: int, backward: bool) -> float | None:
    "MiB that a layer takes at most for rows of this length; in a process of its own."
    if sys.platform != "linux": return None
    torch.set_num_threads(1)
    model = layer(name)
    work(model, torch.randn(ROWS, 16, WIDTH), backward)
    x = torch.randn(ROWS, T, WIDTH)
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    work(model, x, backward)
    return (memory(peak=True) - before) / 2**20


@BENCHMARK.part()
def length(settings: Settings) -> list[dict]:
    rows = [row for row in settings.before or [] if row["T"] not in settings.lengths]
    for T in settings.lengths:
        names = [n for n in ("LSTM", "plain", "fused", "online") if T in LENGTHS or n in ("LSTM", "fused")]
        models, x = {n: layer(n) for n in names}, torch.randn(ROWS, T, WIDTH)
        rounds = settings.rounds if T <= 1024 or settings.dry else max(3, settings.rounds // 2)
        row: dict = {"T": T}
        for way, backward in (("forward", False), ("both", True)):
            # the backward pass of "online" keeps every block, which the kernels compute again
            use = [n for n in names if not (backward and n == "online")]
            seconds = turns({n: partial(work, models[n], x, backward) for n in use}, rounds)
            row[way] = {n: s / (ROWS * T) * 1e6 for n, s in seconds.items()}  # microseconds a token
            row[f"{way}_peak_MiB"] = {n: settings.alone(peak, n, T, backward) for n in use}
        rows.append(row)
        print(f"  T {T:5}  microseconds a token, forward: " + "  ".join(f"{n} {v:.2f}" for n, v in row["forward"].items()), flush=True)
    return sorted(rows, key=lambda row: row["T"])


# ---------------------------------------------------------------- layers


class Stack(nn.Module):
    "Three LSTM layers, two blocks of attention and MLP, or eight causal convolutions of width 3: 24 D^2 weights each, biases aside."

    def __init__(self, name: str, width: int):
        super().__init__()
        self.name = name
        if name == "LSTM": self.body = nn.LSTM(width, width, 3, batch_first=True)
        elif name == "convolution": self.body = nn.ModuleList(nn.Conv1d(width, width, 3, bias=False) for _ in range(8))
        else:
            self.body = nn.ModuleList(Attention(AttentionConfig(width, HEADS)) for _ in range(2))
            self.mlps = nn.ModuleList(MLP(MLPConfig(width, width, 4 * width, activation="relu")) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "LSTM": return self.body(x)[0]
        if self.name == "convolution":
            x = x.mT
            for conv in self.body: x = x + F.relu(conv(F.pad(x, (2, 0))))
            return x.mT
        for look, mlp in zip(self.body, self.mlps):
            x = x + look(x, causal=True)
            x = x + mlp(x)
        return x


def stack_times(T: int, width: int, rounds: int) -> tuple[dict, dict]: # parameters by name; seconds by name and threads
    names = ("LSTM", "convolution", "attention and MLP")
    models, x = {name: Stack(name, width) for name in names}, torch.randn(ROWS, T, width)
    ways = {(name, threads): partial(on_threads, threads, models[name], x) for name in names for threads in (1, 2)}
    seconds = fastest(in_turns(ways, rounds, clock=time.thread_time))
    return {name: sum(p.numel() for p in models[name].parameters()) for name in names}, seconds


def on_threads(threads: int, model: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(threads)
    work(model, x, True)


@BENCHMARK.part()
def layers(settings: Settings) -> list[dict]:
    """Stacks of equally many weights, forward and backward, on one thread and on two.

    Seconds of the main thread, which does all that cannot be shared and its share of what can. Where threads sleep while they wait
    (OMP_WAIT_POLICY) that is what the clock shows on a machine with nothing else to do, and other people's work does not count.
    """
    rows, width = [], settings.pick(WIDTH, 16)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    for T in settings.pick((64, 256, 1024), (8,)):
        sizes, seconds = settings.alone(stack_times, T, width, settings.rounds)
        row: dict = {"T": T, "parameters": sizes}
        for threads in (1, 2): row[f"threads_{threads}"] = {name: seconds[name, threads] / (ROWS * T) * 1e6 for name in sizes}
        rows.append(row)
        print(f"  T {T:5}  " + "  ".join(f"{n} x{k} {s / (ROWS * T) * 1e6:.1f}" for (n, k), s in seconds.items()) + " us", flush=True)
    return rows


# ---------------------------------------------------------------- heads


@BENCHMARK.part()
def heads(settings: Settings) -> list[dict]:
    "Eight heads of queries of 64 numbers, 8, 2 or 1 of keys: one step of writing after S places, and what the cache holds."
    rows, S, width = [], settings.pick(4096, 32), 512
    q, ways = torch.randn(8, 8, 1, 64), {}
    for kv in (8, 2, 1):
        k, v = torch.randn(2, 8, kv, S, 64)
        ways[kv] = partial(attention, q, k, v)
    with torch.no_grad(): seconds = turns(ways, settings.pick(10, 1) * settings.rounds)
    for kv in ways:
        module = Attention(AttentionConfig(width, 8, n_kv_head=kv))
        rows.append({"n_kv_head": kv, "parameters": sum(p.numel() for p in module.parameters()), "cache_bytes_a_token": 2 * kv * 64 * 4,
                     "step_ms": seconds[kv] * 1e3, "places": S, "rows": 8})
    return rows


# ---------------------------------------------------------------- text


class SmallLM(nn.Module):
    "Two blocks of attention and MLP, pre-norm; or two layers of LSTM. Positions of one kind."

    def __init__(self, V: int, d: int, kind: str, trained: int, n_kv_head: int | None = None, window: int | None = None, hidden: int = 0):
        super().__init__()
        self.kind, self.squeeze = kind, 1.
        self.embed, self.out = nn.Embedding(V, d), nn.Linear(d, V)
        nn.init.normal_(self.embed.weight, 0, .1)
        if kind == "LSTM":
            self.body = Recurrent(RecurrentConfig(d, hidden, 2))
            self.back = nn.Linear(hidden, d)
            return
        config = AttentionConfig(d, HEADS, n_kv_head, window=window, positions=kind if kind in ("rotary", "alibi") else "none")
        self.learned = LearnedPositions(trained, d) if kind == "learned" else None
        self.looks = nn.ModuleList(Attention(config) for _ in range(2))
        self.mlps = nn.ModuleList(MLP(MLPConfig(d, d, 4 * d, activation="gelu")) for _ in range(2))
        self.norms = nn.ModuleList(LayerNorm(d) for _ in range(5))
        init_weights(self.looks, "xavier")

    def forward(self, ids: Tensor) -> Tensor:
        T, x = ids.shape[1], self.embed(ids)
        if self.kind == "LSTM": return self.out(self.back(self.body(x)[0]))
        places = torch.arange(T, device=ids.device)
        if self.kind == "learned": x = x + self.learned(places.clamp(max=self.learned.table.num_embeddings - 1))
        if self.kind == "sinusoidal": x = x + .1 * sinusoidal(places, x.shape[-1])
        for i, (look, mlp) in enumerate(zip(self.looks, self.mlps)):
            x = x + look(self.norms[2 * i](x), causal=True, positions=places / self.squeeze)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.out(self.norms[-1](x))


TRAINED, READ = 64, 512


def stories(settings: Settings) -> tuple[np.ndarray, np.ndarray, int]: # training ids, test ids, vocabulary
    world, number = SmallWorld(SmallWorldConfig(limit=6)), {"<bos>": 0}
    def ids(split: str, n: int) -> np.ndarray:
        rows = [[0, *(number.setdefault(word, len(number)) for word in WORD.findall(text))] for text in world.texts(split, n=n)]
        return np.concatenate([np.array(row) for row in rows])

    train, test = ids("train", settings.pick(12_000, 60)), ids("valid", settings.pick(700, 120))
    return train, test, len(number)


def by_place(model: nn.Module, test: np.ndarray) -> np.ndarray: # (READ,) nats
    total, n = torch.zeros(READ), 0
    with torch.no_grad():
        for batch in TokenStream(test, 16, READ).read():
            if batch.ids.shape[1] != READ: continue
            logits = model(batch.ids)
            total += F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(-1, READ).sum(0)
            n += len(batch.ids)
    return (total / n).numpy()


EDGES = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512)


@BENCHMARK.part()
def text(settings: Settings) -> dict:
    (train, test, V), steps = stories(settings), settings.steps
    out = {"vocabulary": V, "trained": TRAINED, "steps": steps, "tokens": steps * 16 * TRAINED, "edges": EDGES, "models": {}}
    d = 64
    attention_size = sum(p.numel() for p in SmallLM(V, d, "none", TRAINED).parameters())
    def lstm_size(hidden: int) -> int: return sum(p.numel() for p in SmallLM(V, d, "LSTM", TRAINED, hidden=hidden).parameters())

    hidden = next(h for h in range(8, 512) if lstm_size(h) >= attention_size)
    variants = {k: {"kind": k} for k in ("none", "learned", "sinusoidal", "alibi", "rotary")}
    variants |= {"rotary, window 32": {"kind": "rotary", "window": 32}, "rotary, 1 kv head": {"kind": "rotary", "n_kv_head": 1},
                 "rotary, 2 kv heads": {"kind": "rotary", "n_kv_head": 2}, "LSTM": {"kind": "LSTM", "hidden": hidden}}
    for name, options in variants.items():
        found, within, times = [], [], []
        squeezed: list[np.ndarray] = []
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            model = SmallLM(V, d, trained=TRAINED, **options)
            start = time.process_time()
            config = TrainConfig(steps=steps, lr=5e-3, warmup=min(50, steps - 1), weight_decay=.1, seed=seed, device="cpu")
            Trainer(model, TokenStream(train, 16, TRAINED, seed=seed), config).fit()
            times.append(time.process_time() - start)
            curve = by_place(model, test)
            found.append([float(curve[a:b].mean()) for a, b in zip(EDGES, EDGES[1:])])
            within.append(float(curve[:TRAINED].mean()))
            if name == "rotary":
                model.squeeze = READ / TRAINED
                curve = by_place(model, test)
                squeezed.append([float(curve[a:b].mean()) for a, b in zip(EDGES, EDGES[1:])])
        size = sum(p.numel() for p in model.parameters())
        out["models"][name] = {"parameters": size, "within": within, "by_place": found, "train_cpu_s": statistics.fmean(times)}
        if squeezed: out["models"]["rotary, squeezed 8 times"] = {"parameters": size, "by_place": squeezed}
        print(f"  {name:22} {size:8,} parameters  within {statistics.fmean(within):.3f} +- {statistics.pstdev(within):.3f}", flush=True)
    return out


# ---------------------------------------------------------------- copy


class Gate(AttentionDecoder):
    "D2's formula: each state of the encoder passes a gate of its own, and all that passed is added up, whoever asks."

    def __init__(self, config: Seq2SeqConfig):
        super().__init__(config, "dot")
        self.query, self.gate = None, nn.Linear(config.d_hidden, 1)

    def context(self, h: Tensor, memory) -> tuple[Tensor, Tensor]:
        weights = (self.gate(memory.states)[..., 0].sigmoid() * memory.mask)[:, None].expand(-1, h.shape[1], -1)
        return weights @ memory.states, weights


@BENCHMARK.part()
def copy(settings: Settings) -> dict:
    letters, longest, d, steps = 16, 24, 64, settings.copy_steps
    n_train, n_test = settings.pick((64 * 500, 200), (64 * 4, 4))
    lengths = (2, 4, 8, 12, 16, 20, 24, 32)
    out = {"letters": letters, "trained": [1, longest], "steps": steps, "lengths": lengths, "models": {}}
    for name, width in (("one vector", d + 4), ("gate", d + 4), ("attention", d)):
        rows, seconds = [], []
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            config = Seq2SeqConfig(4 + letters, 4 + letters, d_embed=32, d_hidden=width)
            decoder = {"one vector": lambda c: None, "gate": Gate, "attention": AttentionDecoder}[name](config)
            model = Seq2Seq(config, decoder)
            data = Examples(copy_task(n_train, (1, longest), letters, seed=seed), batch_size=64, join=False, sort=16, seed=seed)
            start = time.process_time()
            Trainer(model, data, TrainConfig(steps=steps, lr=5e-3, warmup=min(50, steps - 1), seed=seed, device="cpu")).fit()
            seconds.append(time.process_time() - start)
            tests = [copy_task(n_test, n, letters, seed=10**6) for n in lengths]
            rows.append([float(greedy_accuracy(model, pairs).tokens.mean()) for pairs in tests])
        size = sum(p.numel() for p in model.parameters())
        out["models"][name] = {"parameters": size, "accuracy": rows, "train_cpu_s": statistics.fmean(seconds)}
        print(f"  {name:12} {size:8,} parameters", flush=True)
    return out


if __name__ == "__main__": run(__file__)
