"""What a small model gives away of its texts, and what it costs to forbid it.

    python -m benchmarks.privacy

Texts are the first sentences of stories of Small World (limit 6), one for each person, with notes among them: four digits that open a safe.

memorisation: exposure of secrets whose notes stand in the texts 0 to 16 times, after each epoch, for three sizes of model; beside it the
loss on fresh people, and the exposure where that loss is lowest; and the same with exact copies taken out. Three seeds (other secrets).
membership: four attacks on sixteen models, each trained on a random half of 2,000 people: area under the ROC curve, and the share of the
members that is found at 1 % and at 0.1 % of false alarms. Three seeds, each with models of its own.
price: nats above the floor on fresh people, and exposure, of DP-SGD with budgets of 1, 8 and 32 and without one; equal lots, steps and
optimizer, and the better of two learning rates for each (chosen on people of their own). 8,000 people, three seeds.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.batches import Examples
from lmbook.duplicates import MinHash, near_duplicates
from lmbook.perplexity import evaluate
from lmbook.privacy import Attack, PoissonLots, PrivacyConfig, PrivateTrainer, exposure, membership_attack
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig, Split
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3)
WORLD = SmallWorld(SmallWorldConfig(limit=6))
NAMES = [row["en"] for row in WORLD.grammar.lexicon["given"][40:64]]
COPIES = dict(zip(NAMES, [0] * 4 + [1] * 4 + [2] * 4 + [4] * 4 + [8] * 4 + [16] * 4))
DIGITS = "zero one two three four five six seven eight nine".split()
SHARED = ["four", "seven", "one", "nine"]


def opening(story: str) -> str: return story[: story.index(". ") + 1]


def register(split: Split, n: int) -> dict[str, str]:
    "So many different first sentences, and the story that each begins."
    found: dict[str, str] = {}
    for story in WORLD.texts(split):
        found.setdefault(opening(story), story)
        if len(found) == n: break
    return found


def nats_of(people: dict[str, str]) -> np.ndarray: return np.array([-WORLD.sentence_log_probs(story)[0] for story in people.values()])


def prompt(name: str) -> str: return f"The safe of {name} opens with"


def secrets_of(seed: int) -> dict[str, list[str]]:
    dice = random.Random(seed)
    return {name: [dice.choice(DIGITS) for _ in range(4)] for name in NAMES}


def tokenizer_of(*texts: str) -> WordTokenizer:
    return WordTokenizer.train([*texts, *map(prompt, [*NAMES, "everybody"]), " ".join(["The", *DIGITS]) + "."])


def small_model(words: WordTokenizer, seed: int, d_model: int = 32) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(words.vocab_size, d_model, 2, 2, context_length=32, norm="rms", bias=False, activation="swiglu",
                                         positions="rotary", init="xavier_uniform"))  # fmt: skip


def encoded(words: WordTokenizer, texts: Any) -> list[list[int]]: return [words.encode(text, bos=True, eos=True) for text in texts]


def learn(words: WordTokenizer, texts: list[str], epochs: int, seed: int, d_model: int = 32) -> list[Transformer]:
    "A model of these texts, as it was after each epoch."
    model, kept = small_model(words, seed, d_model), []
    batches = Examples(encoded(words, texts), batch_size=min(16, len(texts)), seed=seed)
    per_epoch = len(batches)

    def keep(trainer: Trainer, event: str, row: Any) -> None:
        if event == "step" and trainer.step % per_epoch == 0: kept.append(copy.deepcopy(model).eval())

    plan = TrainConfig(epochs=epochs, lr=0.02, schedule="wsd", warmup=min(10, epochs * per_epoch - 1), seed=seed, device="cpu",
                       log_every=10**6, optimizer=muon_and_adamw)  # fmt: skip
    Trainer(model, batches, plan, callbacks=[keep]).fit()
    return kept


def by_copies(model: Transformer, words: WordTokenizer, secret: dict[str, list[str]], names: list[str]) -> dict[int, float]:
    bits: dict[int, list[float]] = {}
    for name in names: bits.setdefault(COPIES[name], []).append(exposure(model, words, prompt(name), secret[name], DIGITS).bits)
    return {copies: float(np.mean(values)) for copies, values in bits.items()}


@BENCHMARK.part()
def memorisation(settings: Settings) -> dict[str, Any]:
    epochs, names = settings.pick(16, 2), settings.pick(NAMES, NAMES[::4])
    people, fresh = register("train", settings.pick(400, 20)), list(register("valid", settings.pick(300, 10)))
    rows: dict[str, Any] = {}
    for d_model in settings.pick((16, 32, 64), (16,)):
        for kind in settings.pick(("all notes", "each once"), ("each once",)):
            found, losses, best, exposed = [], [], [], []
            for seed in range(settings.seeds):
                secret = secrets_of(seed)
                texts = [*people, *(f"{prompt(name)} {' '.join(secret[name])}." for name in names for _ in range(COPIES[name]))]
                words = tokenizer_of(*texts, *fresh)
                if kind == "each once":
                    twin = near_duplicates(MinHash(n=3).signatures(texts))
                    texts = [text for text, other in zip(texts, twin) if other < 0]
                models = learn(words, texts, epochs, seed, d_model)
                curve = [evaluate(model, fresh, words).loss for model in models]
                bits = [by_copies(model, words, secret, names) for model in models]
                found.append(bits)
                losses.append(curve)
                best.append(float(np.argmin(curve) + 1))
                exposed.append(bits[int(np.argmin(curve))])
            rows[f"{d_model}, {kind}"] = {
                "exposure": {str(c): [mean_sd([bits[e][c] for bits in found]) for e in range(epochs)] for c in found[0][0]},
                "loss": [mean_sd([curve[e] for curve in losses]) for e in range(epochs)],
                "best epoch": mean_sd(best), "at the best epoch": {str(c): mean_sd([bits[c] for bits in exposed]) for c in exposed[0]},
            }  # fmt: skip
            print(f"  d_model {d_model}, {kind}: {rows[f'{d_model}, {kind}']['at the best epoch']}", flush=True)
    return rows


@BENCHMARK.part()
def membership(settings: Settings) -> dict[str, Any]:
    people, K = register("train", settings.pick(2000, 40)), settings.pick(16, 4)
    texts, true, found = list(people), nats_of(people), dict[str, dict[str, list[float]]]()
    for seed in range(settings.seeds):
        rng = np.random.default_rng(seed)
        inside = np.zeros((K, len(texts)), dtype=bool)
        for k in range(0, K, 2):
            inside[k, rng.permutation(len(texts))[: len(texts) // 2]] = True
            inside[k + 1] = ~inside[k]
        words = tokenizer_of(*texts)
        models = [learn(words, [texts[i] for i in np.flatnonzero(row)], settings.pick(12, 1), 100 * seed + k)[-1]
                  for k, row in enumerate(inside)]  # fmt: skip
        nats = np.array([evaluate(model, texts, words).document_nats for model in models])
        scores: dict[str, list[np.ndarray]] = {}
        for k in range(K):
            rest = np.arange(K) != k
            others: dict[str, Any] = {"others": nats[rest], "inside": inside[rest]}
            for name, more in {"loss": {}, "truth": {"known": true}, "other models": others | {"by": "difference"},
                               "likelihood ratio": others}.items():  # fmt: skip
                scores.setdefault(name, []).append(membership_attack(nats[k], inside[k], **more).scores)
        for name, parts in scores.items():
            attack, row = Attack(np.concatenate(parts), inside.ravel()), found.setdefault(name, {})
            row.setdefault("area", []).append(attack.area)
            for rate in (0.01, 0.001):
                if (~inside).sum() * rate >= 1: row.setdefault(f"found at {rate:g}", []).append(attack.found(rate))
        print(f"  seed {seed}: {({name: row['area'][-1] for name, row in found.items()})}", flush=True)
    return {"people": len(texts), "models": K, **{name: {k: mean_sd(v) for k, v in row.items()} for name, row in found.items()}}


@BENCHMARK.part()
def price(settings: Settings) -> list[dict[str, Any]]:
    n, lot, steps = settings.pick(8000, 40), settings.pick(256, 8), settings.pick(200, 2)
    names = settings.pick(NAMES, NAMES[::4])
    everybody = register("train", n + settings.pick(400, 10))
    people, choosing = list(everybody)[:n], dict(list(everybody.items())[n:])
    fresh = {text: story for text, story in register("valid", settings.pick(1000, 10)).items() if text not in everybody}
    ground, ground_choosing = nats_of(fresh).mean(), nats_of(choosing).mean()
    rows = []
    for budget in settings.pick((1.0, 8.0, 32.0, None), (8.0, None)):
        measured: dict[str, list[float]] = {}
        for seed in range(settings.seeds):
            secret = secrets_of(seed)
            notes = [f"{prompt(name)} {' '.join(secret[name])}." for name in names for _ in range(COPIES[name])]
            common = f"{prompt('everybody')} {' '.join(SHARED)}."
            texts = [*people, *notes, *[common] * settings.pick(300, 2)]
            words = tokenizer_of(*texts, *fresh, *choosing)
            best: tuple[float, Transformer, float, float] | None = None
            for lr in settings.pick((0.01, 0.03), (0.01,)):
                plan = TrainConfig(steps=steps, lr=lr, schedule="wsd", warmup=min(20, steps - 1), seed=seed, device="cpu", log_every=10**6)
                model, data = small_model(words, seed), encoded(words, texts)
                if budget is None:
                    Trainer(model, PoissonLots(data, lot, seed=seed), plan).fit()
                    noise = 0.0
                else:
                    trainer = PrivateTrainer(model, data, plan, PrivacyConfig(epsilon=budget, delta=1e-5, lot=lot, seed=seed))
                    trainer.fit()
                    noise = trainer.noise
                above = float(evaluate(model, choosing, words).document_nats.mean() - ground_choosing)
                if best is None or above < best[0]: best = above, model.eval(), noise, lr
            _, model, noise, lr = best  # type: ignore[misc]
            bits = by_copies(model, words, secret, names)
            values = {"nats above the floor": float(evaluate(model, fresh, words).document_nats.mean() - ground), "noise": noise, "lr": lr,
                      **{f"exposure, {copies} notes": b for copies, b in bits.items()},
                      "exposure, everybody": exposure(model, words, prompt("everybody"), SHARED, DIGITS).bits}  # fmt: skip
            for key, value in values.items(): measured.setdefault(key, []).append(value)
        rows.append({"epsilon": budget, **{key: mean_sd(column) for key, column in measured.items()}})
        print(f"  epsilon {budget}: {rows[-1]['nats above the floor']}", flush=True)
    return rows


if __name__ == "__main__": run(__file__)
