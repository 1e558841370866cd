"""What a processor can do at most, what a training step of the book's Transformer reaches, and what each way to save time or memory buys.

    python -m benchmarks.speed

One thread, nothing but CPU, where not said otherwise. Roofline: products and copies at their fastest, and the step's own operations
beside them, with FLOPs and bytes counted by hand. Techniques: the same step of the same model with one thing changed at a time, then
several together; seconds of the processor, the fastest of some rounds in which all take turns; peak bytes by `MemoryLog`; and how far the
gradient is from that of the plain step in float64. (Compiled steps each in a process of its own, beside the plain one.) Lengths: attention
forward and backward, plain and fused. Padding: the sentences of stories padded, sorted, packed. Resident: by how much a process grows in
the same step. Feeding: a model fed with Chinese stories that are cut into words in the loop, ahead by a thread or a process, or once; by
the clock. To a loss: what document 1 names against slow training, each on one task, in seconds of the processor until the loss on a
validation set falls below a mark; learning rates chosen for each optimizer on a run with another seed. Threads: a step on one thread and on
two, by the clock.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Benchmark, Option, Settings, fastest, in_turns, medians, memory, run
from lmbook.attention import attention
from lmbook.batches import Batch, Batches, Examples, TokenStream
from lmbook.deep_networks import RMSNorm
from lmbook.schedules import clip_gradients
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.speed import MemoryLog, checkpointing, count_flops, flash_attention, measure_roofline, prefetch, train_flops
from lmbook.tokenization import BPE, WordTokenizer
from lmbook.training import mean_loss, next_token_loss
from lmbook.transformer import Transformer, count_parameters, preset

ROWS, LENGTH, VOCAB = 8, 256, 512
BENCHMARK = Benchmark(
    packages=("torch", "numpy", "tokenizers", "jieba"), seeds=3,
    facts=lambda settings: {"shape": {"rows": ROWS, "length": LENGTH, "vocab_size": VOCAB}},
    options=[Option("rounds", 6, 1, "rounds in which all take turns"), Option("steps", 500, 4, "most steps in the part to_loss")],
)


def stories(n: int, limit: int | None = None, split: str = "train") -> list[str]:
    return list(SmallWorld(SmallWorldConfig(limit=limit)).texts(split, n=n))


def tokenizer(settings: Settings) -> BPE: return BPE.train(stories(settings.pick(600, 60)), VOCAB)


def model_of(settings: Settings, **changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(preset("tiny", VOCAB, **settings.pick({}, {"d_model": 32, "n_layer": 2, "n_head": 2}), **changes))


def processor(ways: dict[str, Callable[[], object]], settings: Settings, repeat: int = 1) -> dict[str, float]:
    "Processor seconds of the fastest round."
    return fastest(in_turns(ways, settings.rounds, repeat, clock=time.process_time))


# ---------------------------------------------------------------- roofline


@BENCHMARK.part()
def roofline(settings: Settings) -> dict:
    size, megabytes = settings.pick((1024, 512), (64, 1))
    limits = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found = measure_roofline(dtype=dtype, size=size, megabytes=megabytes, rounds=3 * settings.rounds, clock=time.process_time)
        limits[name] = {"peak_gflops": found.peak / 1e9, "bandwidth_gbs": found.bandwidth / 1e9}
    config = preset("tiny", VOCAB)
    D, hidden, H, n = config.d_model, config.hidden, config.n_head, ROWS * LENGTH
    x, wide, scores = torch.randn(n, D), torch.randn(n, hidden), torch.randn(n, VOCAB)
    up, out, norm = torch.randn(hidden, D), torch.randn(VOCAB, D), RMSNorm(D)
    q, k, v = (torch.randn(ROWS, H, LENGTH, D // H) for _ in range(3))
    ids, table = torch.randint(VOCAB, (n,)), torch.randn(VOCAB, D)
    square = torch.randn(1024, 1024)
    matrix = ROWS * H * LENGTH * LENGTH  # numbers in the scores of attention

    def plain() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH): return F.scaled_dot_product_attention(q, k, v)

    work: dict[str, tuple[float, float, Callable[[], object]]] = {  # FLOPs and numbers read or written, by hand, of each operation
        "product 1024 x 1024": (2 * 1024**3, 3 * 1024**2, lambda: square @ square),
        "matrix times vector": (2 * 1024**2, 1024**2 + 2 * 1024, lambda: square @ square[0]),
        "MLP up": (2 * n * D * hidden, n * D + D * hidden + n * hidden, lambda: F.linear(x, up)),
        "vocabulary scores": (2 * n * D * VOCAB, n * D + D * VOCAB + n * VOCAB, lambda: F.linear(x, out)),
        "attention, fused": (4 * matrix * (D // H), 4 * n * D, lambda: attention(q, k, v)),
        "attention, plain": (4 * matrix * (D // H), 4 * n * D + 4 * matrix, plain),
        "softmax": (4 * n * VOCAB, 2 * n * VOCAB, lambda: scores.softmax(-1)),
        "RMS norm": (4 * n * D, 2 * n * D, lambda: norm(x)),
        "add": (n * hidden, 3 * n * hidden, lambda: wide + wide),
        "embedding": (0, 2 * n * D, lambda: F.embedding(ids, table)),
    }
    with torch.no_grad(): seconds = processor({name: w for name, (_, _, w) in work.items()}, settings, settings.pick(20, 1))
    ops = {name: {"flops": f, "bytes": 4 * numbers, "seconds": seconds[name]} for name, (f, numbers, _) in work.items()}
    return {"limits": limits, "operations": ops}


# ---------------------------------------------------------------- techniques


def gradients(model: nn.Module) -> Tensor: return torch.cat([p.grad.flatten() for p in model.parameters()])


class Way:
    "A training step with some things changed."

    def __init__(self, settings: Settings, *, fused: bool = False, half: bool = False, compiled: bool = False, adam: str = "loop",
                 parts: int = 1, checkpoints: bool = False):
        self.model = model_of(settings)
        self.call = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=adam == "foreach", fused=adam == "fused")
        ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        self.batches = [Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids.chunk(parts)]
        self.fused, self.half, self.checkpoints = fused, half, checkpoints

    def gradient(self) -> None:
        with ExitStack() as stack:
            if not self.fused: stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.checkpoints: stack.enter_context(checkpointing(self.model))
            for batch in self.batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.half): loss, _ = next_token_loss(self.call, batch)
                (loss / (ROWS * LENGTH)).backward()

    def step(self) -> None:
        self.gradient()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


BOTH: dict[str, object] = {"fused": True, "adam": "fused"}


def compiled(options: dict, rounds: int) -> dict[str, float]:
    "The plain step and a compiled one. (Neither counter sees into compiled code.)"
    torch.set_num_threads(1)
    settings = Settings(dry=False, rounds=rounds)
    plain, way = Way(settings), Way(settings, compiled=True, **options)
    plain.gradient()
    way.gradient()
    exact = gradients(plain.model).double()
    error = float((gradients(way.model).double() - exact).norm() / exact.norm())
    seconds = processor({"plain": plain.step, "this": way.step}, settings)
    return {"gradient_error": error, "ms": 1e3 * seconds["this"], "speedup": seconds["plain"] / seconds["this"]}


@BENCHMARK.part()
def techniques(settings: Settings) -> dict:
    ways: dict[str, dict] = {
        "plain": {}, "fused attention": {"fused": True}, "foreach AdamW": {"adam": "foreach"}, "fused AdamW": {"adam": "fused"},
        "bfloat16": {"half": True}, "4 parts": {"parts": 4}, "checkpointing": {"checkpoints": True},
        "fused attention and AdamW": BOTH, "both, in bfloat16": BOTH | {"half": True},
        "least memory": BOTH | {"checkpoints": True, "parts": 4},
    }
    made = {name: Way(settings, **options) for name, options in ways.items()}
    found: dict[str, dict] = {}
    exact = model_of(settings).double()
    next_token_loss(exact, made["plain"].batches[0])[0].div(ROWS * LENGTH).backward()
    truth = gradients(exact)
    for name, way in made.items():
        if not way.optimizer.state: way.gradient()
        error = float((gradients(way.model).double() - truth).norm() / truth.norm())
        way.optimizer.step()
        way.optimizer.zero_grad(set_to_none=True)
        row = {"gradient_error": error}
        with MemoryLog(way.model, way.optimizer) as log: way.step()
        found[name] = row | {"peak_mb": log.peak / 1e6, "gflop": count_flops(way.gradient) / 1e9}
        way.optimizer.zero_grad(set_to_none=True)
    seconds = processor({name: way.step for name, way in made.items()}, settings)
    config = made["plain"].model.config
    must = train_flops(config, ROWS, LENGTH)
    for name, row in found.items(): row |= {"ms": 1e3 * seconds[name], "speedup": seconds["plain"] / seconds[name]}
    if shutil.which("g++") and not settings.dry:  # each in a process of its own: code that was compiled for one would be taken for another
        for name, options in {"compile": {}, "all for speed": BOTH, "all, in bfloat16": BOTH | {"half": True}}.items():
            found[name] = settings.alone(compiled, options, settings.rounds)
    return {"parameters": count_parameters(config), "train_gflop": must / 1e9, "ways": found}


@BENCHMARK.part()
def lengths(settings: Settings) -> list[dict]:
    "Attention alone, forward and backward, 4 heads of 32 numbers, two rows."
    rows = []
    for T in settings.pick((128, 256, 512, 1024, 2048), (64,)):
        q, k, v = (torch.randn(2, 4, T, 32, requires_grad=True) for _ in range(3))

        def both(way: Callable[[], Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            torch.autograd.grad(way().sum(), (q, k, v))

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH): return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        ways = {"plain": plain, "fused": partial(attention, q, k, v, causal=True),
                "tiles in Python": partial(flash_attention, q, k, v, causal=True, block=128)}
        seconds = processor({name: partial(both, way) for name, way in ways.items()}, settings)
        peaks = {}
        for name, way in ways.items():
            with MemoryLog(q, k, v) as log: both(way)
            peaks[name] = log.peak / 1e6
        rows.append({"T": T, "ms": {name: 1e3 * s for name, s in seconds.items()}, "peak_mb": peaks})
    return rows


@BENCHMARK.part()
def padding(settings: Settings) -> dict:
    bpe, model = tokenizer(settings), model_of(settings)
    rows = [bpe.encode(sentence) for text in stories(settings.pick(48, 8)) for sentence in text.split(". ")]
    many = settings.pick(64, 8)
    ways = {"padded": Examples(rows, batch_size=many), "sorted": Examples(rows, batch_size=many, sort=8),
            "packed": Examples(rows, batch_size=ROWS, length=LENGTH, pack=True)}
    found: dict[str, dict] = {}

    def epoch(batches: list[Batch]) -> None:
        for batch in batches:
            loss, n = next_token_loss(model, batch)
            (loss / n).backward()
            model.zero_grad(set_to_none=True)

    batches = {name: list(source.read()) for name, source in ways.items()}
    rounds = max(1, settings.rounds // 2)
    seconds = fastest(in_turns({name: partial(epoch, b) for name, b in batches.items()}, rounds, clock=time.process_time))
    for name, all_ in batches.items():
        tokens, places = sum(b.tokens for b in all_), sum(b.ids.numel() for b in all_)
        found[name] = {"steps": len(all_), "tokens": tokens, "padding": 1 - tokens / places, "tokens_per_s": tokens / seconds[name]}
    return found


@BENCHMARK.part()
def resident(settings: Settings) -> dict:
    "Peak of the tensors of the plain step, and by how much the process has grown beyond what it held before, in two new processes."
    runs = [settings.alone(growth, settings.dry) for _ in range(2)]
    return {"tensors_mb": runs[0][0], "resident_mb": [grown for _, grown in runs]}


def growth(dry: bool) -> tuple[float, float]:
    torch.set_num_threads(1)
    settings = Settings(dry=dry)
    before = memory()
    way = Way(settings)
    with MemoryLog(way.model) as log: way.gradient()
    return log.peak / 1e6, (memory(peak=True) - before) / 1e6


# ---------------------------------------------------------------- feeding


def small(settings: Settings, **changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"d_model": settings.pick(96, 16), "n_layer": 2, "n_head": 2, "context_length": 128}
    return Transformer(preset("tiny", **{"vocab_size": VOCAB} | shape | changes))


WORLD = SmallWorld()


@cache
def chinese() -> WordTokenizer:
    "The words of Chinese stories, cut by a dictionary."
    return WordTokenizer.train(WORLD.texts("train", lang="zh", n=400), 1500, split="jieba")


def block_of(index: int) -> Tensor: # (ROWS, 129)
    "The ids of one batch, from stories that are written and cut into words now."
    held: list[int] = []
    texts = WORLD.texts("train", lang="zh", n=100, start=1000 + 100 * index)
    while len(held) < ROWS * 129: held += chinese().encode(next(texts))
    return torch.tensor(held[: ROWS * 129]).view(ROWS, 129)


def as_batch(block: Tensor) -> Batch: return Batch(block[:, :-1].contiguous(), block[:, 1:].contiguous())


def generated() -> Iterator[Batch]:
    for index in count(): yield as_batch(block_of(index))


def by_a_process(pool: ProcessPoolExecutor) -> Iterator[Batch]:
    "The same, made by another process, a few ahead."
    coming = [pool.submit(block_of, index) for index in range(4)]
    for index in count(4):
        yield as_batch(coming.pop(0).result())
        coming.append(pool.submit(block_of, index))


@BENCHMARK.part(needs=("jieba",))
def feeding(settings: Settings) -> dict:
    steps, rounds = settings.pick(20, 2), max(1, settings.rounds // 2)
    model = small(settings, vocab_size=chinese().vocab_size, d_model=settings.pick(48, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def train(batches: Iterable[Batch]) -> None:
        source = iter(batches)
        for _ in range(steps):
            loss, n = next_token_loss(model, next(source))
            (loss / n).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    kept = list(islice(generated(), steps))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(block_of, 0).result()  # its start does not count
        ways: dict[str, Callable[[], object]] = {
            "made in the loop": lambda: train(generated()), "made by a thread": lambda: train(prefetch(generated(), 4)),
            "made by a process": lambda: train(by_a_process(pool)), "kept": lambda: train(kept),
            "making alone": lambda: list(islice(generated(), steps)),
        }
        seconds = medians(in_turns(ways, rounds))
    slow = seconds["kept"] / steps  # what a disk or a network takes for a batch: as long as the step, and nobody computes meanwhile

    def from_afar() -> Iterator[Batch]:
        for batch in kept:
            time.sleep(slow)
            yield batch

    waits = medians(in_turns({"waited for": lambda: train(from_afar()), "read ahead": lambda: train(prefetch(from_afar(), 4))}, rounds))
    def spans(batches: Iterable[Batch]) -> list[list]: # name, and begin and end in ms, of two steps
        source, found = iter(batches), []
        for i in range(4):
            marks = [time.perf_counter()]
            batch = next(source)
            marks.append(time.perf_counter())
            loss, n = next_token_loss(model, batch)
            marks.append(time.perf_counter())
            (loss / n).backward()
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            if i >= 2: found += [[name, a, b] for name, a, b in zip(("batch", "forward", "backward", "optimizer"), marks, marks[1:])]
        return [[name, 1e3 * (a - found[0][1]), 1e3 * (b - found[0][1])] for name, a, b in found]

    trace = {"made in the loop": spans(generated()), "kept": spans(kept * 2)}
    each = {name: 1e3 * s / steps for name, s in (seconds | waits).items()}
    return {"steps": steps, "trace": trace, "wait_ms": 1e3 * slow, "ms_a_step": each}


# ---------------------------------------------------------------- to a loss


def train_to(mark: float, model: nn.Module, optimizer: torch.optim.Optimizer, data: Batches, valid: list[Batch], steps: int) -> dict:
    "Steps and processor seconds (evaluation not counted) until the validation loss is below the mark; None: not in so many steps."
    seconds, best = 0.0, math.inf
    step = 0
    while step < steps:
        for batch in data:
            start = time.process_time()
            loss, n = next_token_loss(model, batch)
            (loss / n).backward()
            clip_gradients(list(model.parameters()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.process_time() - start
            step += 1
            if step % 10 == 0 or step == steps:
                best = min(best, mean_loss(model, valid))
                if best < mark: return {"steps": step, "seconds": seconds, "best": best}
            if step >= steps: break
    return {"steps": None, "seconds": None, "best": best, "seconds_spent": seconds}


RATES = {"SGD": (.1, .3, 1., 3.), "AdaGrad": (.01, .03, .1), "Adam": (1e-3, 3e-3, 1e-2)}
MAKERS: dict[str, Callable] = {"SGD": torch.optim.SGD, "AdaGrad": torch.optim.Adagrad, "Adam": partial(torch.optim.Adam, fused=True)}


@BENCHMARK.part()
def to_loss(settings: Settings) -> dict:
    bpe, steps = tokenizer(settings), settings.steps
    def rows(n: int, limit: int | None, split: str = "train") -> list[list[int]]: return [bpe.encode(t) for t in stories(n, limit, split)]

    task, general = rows(settings.pick(800, 40), 6), rows(settings.pick(4000, 40), None)
    valid = list(TokenStream.of(rows(settings.pick(60, 20), 6, "valid"), batch_size=ROWS, length=128).read())
    def data(seed: int) -> TokenStream: return TokenStream.of(task, batch_size=ROWS, length=128, seed=seed)

    mark = settings.pick(1.0, 6.0)
    def fresh(seed: int) -> Transformer:
        model = small(settings)
        torch.manual_seed(seed)
        return Transformer(model.config)

    chosen = {}
    for name, rates in RATES.items():
        trials = []
        for lr in rates:
            model = fresh(100)
            trials.append((train_to(-1, model, MAKERS[name](model.parameters(), lr=lr), data(100), valid, steps // 2)["best"], lr))
        chosen[name] = min(trials)[1]
        print(f"  {name}: lr {chosen[name]} of {[(lr, round(best, 2)) for best, lr in trials]}", flush=True)
    start = fresh(7)
    broad = TokenStream.of(general, batch_size=ROWS, length=128, seed=7)
    spent = train_to(-1, start, MAKERS["Adam"](start.parameters(), lr=chosen["Adam"]), broad, valid, settings.pick(600, 2))["seconds_spent"]
    out: dict[str, object] = {"mark": mark, "lr": chosen, "pretraining_seconds": spent}
    for name in (*MAKERS, "Adam, pre-trained"):
        runs = []
        for seed in range(settings.seeds):
            model, kind = (copy.deepcopy(start), "Adam") if name == "Adam, pre-trained" else (fresh(seed), name)
            runs.append(train_to(mark, model, MAKERS[kind](model.parameters(), lr=chosen[kind]), data(seed), valid, steps))
        done = [r for r in runs if r["steps"] is not None]
        out[name] = {"reached": len(done), "runs": len(runs), "best": [r["best"] for r in runs],
                     "steps": statistics.fmean(r["steps"] for r in done) if done else None,
                     "seconds": statistics.fmean(r["seconds"] for r in done) if done else None}
        print(f"  {name}: {out[name]}", flush=True)
    return out


@BENCHMARK.part()
def threads(settings: Settings) -> dict:
    "The clock's milliseconds of a step on one thread and on two, for two sizes."
    found = {}
    for size, model, length in (("small", small(settings), 128), ("tiny", model_of(settings), LENGTH)):
        ids = torch.randint(VOCAB, (ROWS, length + 1))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

        def step(n: int, model: nn.Module = model, batch: Batch = batch) -> None:
            torch.set_num_threads(n)
            loss, tokens = next_token_loss(model, batch)
            (loss / tokens).backward()
            model.zero_grad(set_to_none=True)

        seconds = fastest(in_turns({str(n): partial(step, n) for n in (1, 2)}, settings.rounds * settings.pick(3, 1)))
        torch.set_num_threads(1)
        found[size] = {"one_ms": 1e3 * seconds["1"], "two_ms": 1e3 * seconds["2"], "speedup": seconds["1"] / seconds["2"]}
    return found


if __name__ == "__main__": run(__file__)
