"""Loss against parameters, data and compute on a text whose entropy is known; what a step takes; and four things that bend the curves.

    python -m benchmarks.scaling

The text is a Small World whose entropy is known exactly, in words. Each story is a row of its own, from its beginning, so that a perfect
model would reach the entropy. Rates: for each width the learning rate with the lowest loss on validation stories, with a seed that nothing
else uses. Sweep: six widths and four lengths of training, one epoch each, so that runs with equal 6ND meet (IsoFLOP), scored on test
stories. Its runs are kept one by one in the temporary folder, so the part goes on where it was stopped, and runs that the file of results
has are not trained again (unless --anew 1). Step_time: what a step of training
takes in seconds of the processor, in turns, for shapes by which a model of time is calibrated and for others that it has to predict.
Repeats: the same stories again, against new ones, for equally many steps. Widths: learning rates at several widths, in standard
parametrisation and in muP. Batches: steps until a loss is reached, by batch size, each with its best rate, and the gradient noise scale.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Benchmark, Option, Settings, in_turns, run
from lmbook.batches import IGNORE, Batch
from lmbook.core import evaluating, seed_everything
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.training import TrainConfig, Trainer, mean_loss, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig, count_parameters, preset

LIMIT, ROWS = 2, 8  # of the world; stories in a batch
WIDTHS = [8, 12, 20, 32, 48, 64]
STEPS = [80, 160, 320, 640]  # of the smallest width; a wider model takes so many fewer that 6ND agrees
WORD = re.compile(r"[\w'·-]+|[^\w\s]")
BENCHMARK = Benchmark(
    packages=("torch", "numpy"), seeds=3,
    options=[Option("rounds", 9, 2, "rounds in which all shapes of the part step_time take turns"),
             Option("anew", 0, 0, "1: train the runs of the sweep that the file has, too")],
    facts=lambda settings: {"world": {"limit": LIMIT, **floors(), "vocab_size": len(vocabulary())}, "rows": ROWS},
)

# ---------------------------------------------------------------- the text


@cache
def world() -> SmallWorld: return SmallWorld(SmallWorldConfig(limit=LIMIT))


@cache
def vocabulary() -> dict[str, int]:
    "Each word of the world, by looking; 0 ends a story and 1 begins it."
    found = {"</s>": 0, "<s>": 1}
    for text in world().texts("train", n=3000):
        for word in WORD.findall(text): found.setdefault(word, len(found))
    return found


def batches(split: str, stories: int, start: int = 0, rows: int = ROWS) -> list[Batch]:
    "Stories as rows, padded at their ends, where a causal model does not look."
    known, out = vocabulary(), []
    texts = list(world().texts(split, n=stories, start=start))
    for i in range(0, stories, rows):
        found = [[1, *(known[word] for word in WORD.findall(text)), 0] for text in texts[i : i + rows]]
        T = max(map(len, found)) - 1
        ids, targets = torch.zeros(len(found), T, dtype=torch.long), torch.full((len(found), T), IGNORE)
        for b, row in enumerate(found):
            ids[b, : len(row) - 1], targets[b, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        out.append(Batch(ids, targets))
    return out


@cache
def judged(split: str, stories: int) -> list[Batch]: return batches(split, stories, rows=50)


@cache
def floors(stories: int = 200) -> dict[str, float]:
    "The entropy for each token, of the language and of the very stories of the test."
    expected, texts = world().expectations, list(world().texts("test", n=stories))
    tokens = sum(len(WORD.findall(text)) + 1 for text in texts)
    return {
        "entropy": expected.nats / (expected.words + 1), "entropy_of_test": -sum(map(world().log_prob, texts)) / tokens,
        "tokens_a_story": expected.words + 1,
    }  # fmt: skip


def shape(d: int, **changes: Any) -> TransformerConfig:
    return preset("tiny", len(vocabulary()), **{"d_model": d, "n_layer": 2, "n_head": 2, "context_length": 192, **changes})


def stories_for(d: int, steps: int) -> int:
    "As many stories as make 6ND that of the smallest width at so many steps."
    smaller = count_parameters(shape(WIDTHS[0])) / count_parameters(shape(d))
    return max(ROWS, round(steps * ROWS * smaller * 2 ** WIDTHS.index(d)))


def trained(d: int, data: list[Batch], lr: float, seed: int, steps: int = 0, **changes: Any) -> Transformer:
    seed_everything(seed)
    model = Transformer(shape(d))
    steps = steps or len(data)
    warmup = max(min(10, steps - 1), steps // 20)
    config = TrainConfig(steps=steps, lr=lr, warmup=warmup, device="cpu", log_every=10**6, seed=seed, **changes)
    Trainer(model, data, config).fit()
    return model


def begin(seed: int) -> int: return 10**6 * (seed + 1)  # where the stories of a seed are


# ---------------------------------------------------------------- the sweep

RATES = [0.01, 0.02, 0.04]  # twice as much for the two smallest widths


@BENCHMARK.part()
def rates(settings: Settings) -> list[dict]:
    rows = []
    for d in settings.pick(WIDTHS, WIDTHS[:2]):
        data, valid = batches("train", settings.pick(120, 2) * ROWS, begin(99)), judged("valid", settings.pick(150, 10))
        tries = [lr * (1 + (d < 20)) for lr in settings.pick(RATES, RATES[:2])]
        losses = {str(lr): mean_loss(trained(d, data, lr, 99), valid) for lr in tries}
        rows.append({"d_model": d, "lr": float(min(losses, key=losses.__getitem__)), "losses": losses})
        print(" ", rows[-1], flush=True)
    return rows


def scores(model: Transformer, data: list[Batch]) -> dict[str, Any]:
    "Loss for each token, and how often all of the next k words are the likeliest ones, k by k."
    right = {k: [0, 0] for k in (1, 2, 4, 8, 16, 32)}
    with evaluating(model):
        for batch in data:
            hits = (model(batch.ids).argmax(-1) == batch.targets)
            for k, count in right.items():
                T = hits.shape[1] // k * k
                spans, there = hits[:, :T].unflatten(1, (-1, k)), (batch.targets[:, :T] != IGNORE).unflatten(1, (-1, k)).all(-1)
                count[0] += int((spans.all(-1) & there).sum())
                count[1] += int(there.sum())
    return {"loss": mean_loss(model, data), "exact": {str(k): hit / n if n else 0.0 for k, (hit, n) in right.items()}}


@BENCHMARK.part()
def sweep(settings: Settings) -> list[dict]:
    chosen = {d: 0.02 for d in WIDTHS} if settings.dry else {row["d_model"]: row["lr"] for row in found_rates(settings)}
    kept = Path(tempfile.gettempdir()) / "lmbook-scaling-sweep.jsonl"
    done = [] if settings.dry or settings.anew else list(settings.before or [])
    if kept.exists() and not settings.dry: done += [json.loads(line) for line in kept.read_text().splitlines()]
    for seed in range(settings.seeds):
        for k, steps in enumerate(settings.pick(STEPS, [1, 2])):
            for d in settings.pick(WIDTHS, WIDTHS[:2]):
                if any((row["seed"], row["d_model"], row["k"]) == (seed, d, k + WIDTHS.index(d)) for row in done): continue
                stories = stories_for(d, steps)
                data = batches("train", stories, begin(seed))
                tokens = sum(int((batch.targets != IGNORE).sum()) for batch in data)
                model = trained(d, data, chosen[d], seed)
                done.append({
                    "seed": seed, "d_model": d, "k": k + WIDTHS.index(d), "parameters": count_parameters(model.config),
                    "tokens": tokens, "steps": len(data), **scores(model, judged("test", settings.pick(200, 10))),
                })  # fmt: skip
                if settings.dry: continue
                with open(kept, "a") as file: file.write(json.dumps(done[-1]) + "\n")
                print(f"  seed {seed}  d {d}  {tokens:,} tokens: {done[-1]['loss']:.4f}", flush=True)
    if not settings.dry: kept.unlink(missing_ok=True)
    return done


def found_rates(settings: Settings) -> list[dict]:
    from benchmarks.common import RESULTS, read_results

    before = read_results(settings.out or RESULTS / "scaling.json", settings.dry)
    if "rates" not in before: raise SystemExit("The sweep needs the learning rates: run the part `rates` first.")
    return before["rates"]


# ---------------------------------------------------------------- what a step takes

# (d_model, n_layer, rows, length, vocab_size): the first four calibrate, the others are predicted.
CALIBRATE = [(32, 2, 4, 64, 512), (128, 2, 8, 128, 512), (256, 4, 4, 128, 2048), (64, 6, 16, 64, 512)]
PREDICT = [(96, 3, 8, 96, 1024), (192, 2, 4, 192, 512), (128, 6, 8, 64, 2048), (64, 4, 16, 128, 1024), (224, 3, 6, 128, 1024)]


@BENCHMARK.part()
def step_time(settings: Settings) -> list[dict]:
    ways, shapes = {}, settings.pick(CALIBRATE + PREDICT, CALIBRATE + PREDICT[:1])
    for d, n_layer, rows, length, vocab in shapes:
        torch.manual_seed(0)
        size = settings.pick(d, 16)
        config = preset("tiny", vocab, d_model=size, n_layer=n_layer, n_head=size // 16, context_length=length)
        model = Transformer(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        ids = torch.randint(vocab, (rows, length + 1))

        def step(model=model, optimizer=optimizer, ids=ids) -> None:
            loss, tokens = next_token_loss(model, Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        ways[str((d, n_layer, rows, length, vocab))] = step
    times = in_turns(ways, settings.rounds, repeat=settings.pick(2, 1), clock=time.process_time)
    return [
        {"d_model": d, "n_layer": n, "rows": rows, "length": length, "vocab_size": vocab,
         "calibrates": (d, n, rows, length, vocab) in CALIBRATE, "seconds": statistics.median(times[key]), "fastest": min(times[key])}
        for (d, n, rows, length, vocab), key in zip(shapes, ways)
    ]


# ---------------------------------------------------------------- what bends the curves


@BENCHMARK.part()
def repeats(settings: Settings) -> list[dict]:
    "The same stories again and again, against new ones, for as many steps."
    rows, unique, d = [], settings.pick(40, 2) * ROWS, settings.pick(32, 8)
    test = judged("test", settings.pick(200, 10))
    for seed in range(settings.seeds):
        for epochs in settings.pick([1, 2, 4, 8, 16], [1, 2]):
            steps = epochs * unique // ROWS
            again, fresh = batches("train", unique, begin(seed)), batches("train", epochs * unique, begin(seed))
            row: dict[str, Any] = {"seed": seed, "epochs": epochs, "steps": steps}
            row["fresh"] = mean_loss(trained(d, fresh, 0.02, seed), test)
            row["repeated"] = row["fresh"] if epochs == 1 else mean_loss(trained(d, again, 0.02, seed, steps), test)
            rows.append(row)
            print(" ", row, flush=True)
    return rows


@BENCHMARK.part()
def widths(settings: Settings) -> list[dict]:
    "Learning rates at several widths: standard parametrisation, and muP with the smallest width as its base."
    from lmbook.scaling import mup

    rows, sizes = [], settings.pick([16, 96], [8, 16])
    valid, steps = judged("valid", settings.pick(100, 10)), settings.pick(50, 2)
    for seed in range(settings.seeds):
        data = batches("train", steps * ROWS, begin(seed))
        for d in sizes:
            for lr in settings.pick([2.0**k for k in range(-9, -2)], [0.01, 0.02]):
                for name in ("standard", "mup"):
                    seed_everything(seed)
                    model = Transformer(shape(d, tie=False, n_head=d // 8, init="lecun"))
                    groups = mup(model, lr, base_width=sizes[0]) if name == "mup" else [{"params": list(model.parameters()), "lr": lr}]

                    def optimizer(_: Any, groups: list = groups) -> torch.optim.Optimizer: return torch.optim.Adam(groups)

                    config = TrainConfig(steps=steps, optimizer=optimizer, schedule="linear", device="cpu", log_every=10**6, seed=seed)
                    try:
                        Trainer(model, data, config).fit()
                        loss = mean_loss(model, valid)
                    except ValueError: loss = math.inf  # the loss is no longer a number
                    rows.append({"seed": seed, "d_model": d, "how": name, "lr": lr, "loss": loss})
        print(f"  seed {seed}", flush=True)
    return rows


@BENCHMARK.part()
def critical_batch(settings: Settings) -> dict:
    "Steps until the loss falls below a mark, by batch size, each with the best of some learning rates; and the noise scale on the way."
    from lmbook.scaling import noise_scale

    mark, most, d = settings.pick(1.2, 6.0), settings.pick(600, 3), settings.pick(32, 8)
    sizes, tries = settings.pick([1, 4, 16, 64], [1, 2]), settings.pick([0.01, 0.02, 0.04], [0.01])
    valid, rows, noise = judged("valid", settings.pick(50, 10)), [], []
    for seed in range(settings.seeds):
        for size in sizes:
            limit = min(most * 2, max(200, most * 8 // size)) if not settings.dry else most
            best: int | None = None
            for lr in tries:
                seed_everything(seed)
                model, reached = Transformer(shape(d)), None
                optimizer = torch.optim.Adam(model.parameters(), lr=lr)
                stop = min(limit, best or limit)
                for step, batch in enumerate(batches("train", stop * size, begin(seed), rows=size), 1):
                    loss, tokens = next_token_loss(model, batch)
                    (loss / tokens).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    if step % 10 == 0 and mean_loss(model, valid) < mark:
                        reached = step
                        break
                if reached: best = min(best or reached, reached)
            rows.append({"seed": seed, "batch": size, "steps": best})
            print(" ", rows[-1], flush=True)
        model = trained(d, batches("train", settings.pick(60, 2) * 16, begin(seed), rows=16), 0.02, seed)
        noise.append(noise_scale(model, batches("train", settings.pick(128, 8), begin(seed + 50), rows=1), group=settings.pick(16, 4)))
    return {"mark": mark, "runs": rows, "noise_scale": noise}


if __name__ == "__main__": run(__file__)
