"""Rewards that can be checked: GRPO, expert iteration and best-of-n at equal computation; steps before an answer.

    python -m benchmarks.preferences

The world is that of the chapter: the smallest Small World, without small talk, and a Transformer of 65,000 parameters that has read it.
obedience: how often a story loses something that a friend finds. The unit of computation is one answer: to write it costs 1, to learn from
it 3 (forward and backward pass). For a number of uses the best-of-n beside GRPO has the n that spends as much in all, training included.
steps: who has the ring after four exchanges: said at once, after three dots, or after saying it for each exchange; equal models, equal
updates. practice: lessons in which a step is a slip now and then, and after them GRPO on the last token. pairs: DPO from noisy preferences
between stories, with as many pairs and readings as in the chapter and with more; beside it what its formula promises. All numbers are
means over seeds, each with its standard deviation; each seed has a model of its own.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, mean_sd, run
from lmbook.batches import Examples
from lmbook.core import evaluating
from lmbook.generation import SamplingConfig, generate
from lmbook.grammar import readings, replay
from lmbook.preferences import (
    DPO,
    Answers,
    PairBatches,
    Pairs,
    PolicyConfig,
    learn_from_rewards,
    mean_best_of,
    sample_answers,
    score,
    sequence_log_probs,
    token_kl,
    token_log_probs,
)  # fmt: skip
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, preset

BENCHMARK = Benchmark(packages=("torch",), seeds=3, options=[Option("batches", 20, 1, "of 48 answers from which GRPO learns")])
WORLD = SmallWorld(SmallWorldConfig(limit=1, talk=0))
LONGEST = 110  # tokens in an answer
Row = list[int]


def cut(text: str) -> list[str]: return re.findall(r" ?[\w'-]+| ?[^\w\s]", text)


TEXTS = list(WORLD.texts("train", n=4000))
WORDS = ["<eos>", *sorted({word for text in TEXTS for word in cut(text)})]
NUMBER = {word: i for i, word in enumerate(WORDS)}
OPENINGS = [[NUMBER[word] for word in cut(text)] for text in sorted({text[: text.index(".") + 1] for text in TEXTS})]


def written(prompt: Row, answer: Row) -> str: return "".join(WORDS[i] for i in (*prompt, *answer) if i)


@cache
def rules_of(text: str) -> frozenset[tuple[str, int]]:
    "The rules of the grammar that made a text; none if it is not of this world."
    found: set[tuple[str, int]] = set()

    def visit(node: Any) -> None:
        found.add((node[0].rule, node[0].index))
        for child in node[2]: visit(child)

    for choices in readings(WORLD.grammar, text): visit(replay(WORLD.grammar, choices)[0])
    return frozenset(found)


def rules(prompt: Row, answer: Row) -> frozenset[tuple[str, int]]:
    "None for a story that has not come to its end."
    return rules_of(written(prompt, answer)) if answer[-1] == 0 else frozenset()


def obeys(prompt: Row, answer: Row) -> float: return float(("lost_find", 1) in rules(prompt, answer))


def worth(prompt: Row, answer: Row) -> float:
    "The taste of the chapter's reader: she likes a loss, likes it better if it is found again, and detests what cannot be."
    found = rules(prompt, answer)
    return 2.0 * (("lost_hide", 0) in found) + 2 * obeys(prompt, answer) if found else -4.0


@cache
def reader(seed: int, dry: bool) -> Transformer:
    "A model that has read the world."
    torch.manual_seed(seed)
    model = Transformer(preset("tiny", len(WORDS), d_model=48, n_layer=2, n_head=4, context_length=160, tie=False))
    rows = [[NUMBER[word] for word in cut(text)] + [0] for text in TEXTS]
    config = TrainConfig(steps=3 if dry else 500, lr=1.5e-2, warmup=1 if dry else 20, seed=seed)
    Trainer(model, Examples(rows, batch_size=8, seed=seed, sort=20), config).fit()
    return model


def looked(model: nn.Module, first: nn.Module, reward: Any, each: int) -> dict[str, float]:
    "How often a model obeys, and how far it is from the first one."
    answers = sample_answers(model, OPENINGS, each, LONGEST, 0, seed=99)
    with evaluating(model), evaluating(first): away = float(token_kl(model, first, answers).sum(-1).mean())
    return {"share": float(score(reward, answers).mean()), "kl": away}


def fine_tune(model: nn.Module, answers: Answers, steps: int, seed: int) -> int:
    "Make these answers likelier; how many were read in all."
    rng = torch.Generator().manual_seed(seed)

    def stream() -> Iterator[Answers]:
        while True: yield answers[torch.randint(len(answers), (16,), generator=rng)]

    def loss(model: nn.Module, batch: Answers) -> tuple[Tensor, int]: return -token_log_probs(model, batch).sum(), int(batch.mask.sum())

    Trainer(model, stream(), TrainConfig(steps=steps, lr=3e-3, schedule="constant", seed=seed), loss=loss).fit()
    return 16 * steps


def by_seed(rows: list[dict[str, float]]) -> dict[str, Any]: return {key: mean_sd([row[key] for row in rows]) for key in rows[0]}


@BENCHMARK.part()
def obedience(settings: Settings) -> dict[str, Any]:
    each, batches = settings.pick(80, 4), settings.batches
    before, grpo, expert, tries, cost = [], [], [], [], {}
    for seed in range(settings.seeds):
        first = reader(seed, settings.dry)
        many = score(obeys, sample_answers(first, OPENINGS, settings.pick(160, 40), LONGEST, 0, seed=7)).view(len(OPENINGS), -1)
        tries.append(many)
        before.append(looked(first, first, obeys, each))
        model = copy.deepcopy(first)
        learn_from_rewards(model, OPENINGS, obeys, PolicyConfig(6, 8, max_new_tokens=LONGEST, eos_id=0, seed=seed), batches, lr=3e-3)
        grpo.append(looked(model, first, obeys, each))
        cost["grpo"] = batches * 48 * 4
        model, spent = copy.deepcopy(first), 0
        for turn in range(settings.pick(4, 1)):  # write, keep what obeys, learn it; four times
            answers = sample_answers(model, OPENINGS, settings.pick(80, 4), LONGEST, 0, seed=1000 * seed + turn)
            spent += len(answers)
            kept = score(obeys, answers).nonzero()[:, 0]
            if len(kept): spent += 3 * fine_tune(model, answers[kept], settings.pick(15, 1), seed)
        expert.append(looked(model, first, obeys, each))
        cost["expert iteration"] = spent
    best = {str(n): mean_sd([mean_best_of(t, n) for t in tries]) for n in (1, 2, 4, 8, 16, 32)}
    uses = []
    for count in (100, 200, 400, 1000, 4000):
        n = min(max(1, round(1 + cost["grpo"] / count)), tries[0].shape[1])
        uses.append({"uses": count, "n": n, **{f"best of n, {k}": v for k, v in mean_sd([mean_best_of(t, n) for t in tries]).items()}})
    trained = {"grpo": by_seed(grpo), "expert iteration": by_seed(expert)}
    return {"first": by_seed(before), **trained, "cost": cost, "best of n": best, "uses": uses}


PERSONS = "ABCD"
SIGNS = ["<eos>", "?", ".", *PERSONS, *("".join(two) for two in itertools.combinations(PERSONS, 2))]
SIGN = {sign: i for i, sign in enumerate(SIGNS)}
EXCHANGES = 4


def exchange(rng: random.Random, kind: str, exchanges: int = EXCHANGES, slips: float = 0.0) -> tuple[Row, Row]:
    "Who has the ring at first, who exchange what they hold; and what is said, by a teacher who now and then names anybody."
    holder = rng.choice(PERSONS)
    prompt, holders = [holder], []
    for _ in range(exchanges):
        two = rng.choice(SIGNS[3 + len(PERSONS) :])
        if holder in two: holder = two[1 - two.index(holder)]
        if slips and rng.random() < slips: holder = rng.choice(PERSONS)
        prompt.append(two)
        holders.append(holder)
    answer = {"at once": [holder], "dots": ["."] * (exchanges - 1) + [holder], "steps": holders}[kind]
    return [SIGN[s] for s in (*prompt, "?")], [SIGN[s] for s in answer]


def player(seed: int, updates: int, kind: str, exchanges: int = EXCHANGES, slips: float = 0.0) -> Transformer:
    "A model that was shown 64 games at each update."
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = {"d_model": 32, "n_layer": 2, "n_head": 2, "context_length": 32}
    model = Transformer(preset("tiny", len(SIGNS), tie=False, **size))

    def stream() -> Iterator[Answers]:
        while True: yield Answers.of(*zip(*(exchange(rng, kind, exchanges, slips) for _ in range(64))))

    def loss(model: nn.Module, batch: Answers) -> tuple[Tensor, int]:
        return -token_log_probs(model, batch).sum(), int(batch.mask.sum())

    Trainer(model, stream(), TrainConfig(steps=updates, lr=1e-2, warmup=min(10, updates - 1), seed=seed), loss=loss).fit()
    return model


def exam(model: nn.Module, n: int, kind: str, exchanges: int = EXCHANGES) -> float:
    "The share of right last tokens, greedily."
    asked = [exchange(random.Random(10**6 + i), kind, exchanges) for i in range(n)]
    told = generate(model, [q for q, _ in asked], SamplingConfig(len(asked[0][1]), temperature=0))
    return sum(a[-1] == b[-1] for (_, a), b in zip(asked, told)) / n


@BENCHMARK.part()
def steps(settings: Settings) -> dict[str, Any]:
    updates, right = settings.pick(300, 2), {}
    for kind, tokens in (("at once", 1), ("dots", EXCHANGES), ("steps", EXCHANGES)):
        found = [exam(player(seed, updates, kind), settings.pick(500, 8), kind) for seed in range(settings.seeds)]
        right[kind] = {**mean_sd(found), "tokens": tokens}
    return {"updates": updates, "exchanges": EXCHANGES, "right": right}


@BENCHMARK.part()
def practice(settings: Settings) -> dict[str, Any]:
    "Lessons with slips, then GRPO on the last token of each answer, drawn as the model says."
    exchanges, rows = EXCHANGES, []
    for seed in range(settings.seeds):
        model = player(seed, settings.pick(400, 2), "steps", exchanges, slips=0.15)
        rng = random.Random(1000 + seed)
        answers = {tuple(q): a[-1] for q, a in (exchange(rng, "steps", exchanges) for _ in range(3000))}

        def checked(question: Row, answer: Row, answers: dict[tuple[int, ...], int] = answers) -> float:
            return float(answer[-1] == answers[tuple(question)])

        asked = [exchange(random.Random(10**6 + i), "steps", exchanges) for i in range(settings.pick(500, 8))]
        row: dict[str, float] = {}
        for stage in ("lessons", "practice"):
            if stage == "practice":
                config = PolicyConfig(16, 8, max_new_tokens=exchanges, seed=seed)
                learn_from_rewards(model, list(map(list, answers)), checked, config, settings.pick(150, 1), lr=2e-3)
            told = generate(model, [q for q, _ in asked], SamplingConfig(exchanges, seed=seed))
            row[f"{stage}: last right"] = sum(a[-1] == b[-1] for (_, a), b in zip(asked, told)) / len(asked)
            row[f"{stage}: all right"] = sum(a == b for (_, a), b in zip(asked, told)) / len(asked)
        rows.append(row)
    return {"exchanges": exchanges, "slips": 0.15, **by_seed(rows), "each": {key: [row[key] for row in rows] for key in rows[0]}}


PAIRS = [("800 pairs, once", 800, 1), ("800 pairs, four times", 800, 4), ("3,200 pairs, once", 3200, 1)]


def preferences(answers: Answers, values: Tensor, n: int, seed: int) -> Pairs:
    "Pairs of different stories with one opening, the preferred one first: the better one as often as Bradley and Terry say."
    rng, each = random.Random(seed), len(answers) // len(OPENINGS)
    prompts, told, chosen = answers.prompts(), answers.answers(), []
    while len(chosen) < n:
        group = rng.randrange(len(OPENINGS)) * each
        i, j = group + rng.randrange(each), group + rng.randrange(each)
        if told[i] == told[j]: continue
        chosen.append((i, j) if rng.random() < 1 / (1 + math.exp(values[j] - values[i])) else (j, i))
    return Pairs.of([prompts[i] for i, _ in chosen], [told[i] for i, _ in chosen], [told[j] for _, j in chosen])


@BENCHMARK.part()
def pairs(settings: Settings) -> dict[str, Any]:
    "DPO with beta = 1: how often it agrees about new pairs, how often it obeys, and what the best model of its aim would do."
    each, rates = settings.pick(120, 8), settings.pick((3e-4, 1e-3, 3e-3), (1e-3,))
    promised, found = [], {name: {lr: [] for lr in rates} for name, *_ in PAIRS}
    for seed in range(settings.seeds):
        first = reader(seed, settings.dry)
        answers = sample_answers(first, OPENINGS, each, LONGEST, 0, seed=7)
        values = score(worth, answers)
        weights = values.double().softmax(0)  # exp(r / beta), beta = 1
        promised.append(float(weights[score(obeys, answers) > 0].sum()))
        unseen = preferences(answers, values, settings.pick(300, 8), 10**6 + seed).with_reference(first)
        for (name, n, readings_), lr in itertools.product(PAIRS, rates):
            data = preferences(answers, values, settings.pick(n, 16), seed).with_reference(first)
            model, plan = copy.deepcopy(first), TrainConfig(epochs=readings_, lr=lr, schedule="linear", seed=seed)
            Trainer(model, PairBatches(data, batch_size=16, seed=seed), plan, loss=DPO(beta=1.0)).fit()
            with evaluating(model):
                gained = sequence_log_probs(model, unseen.chosen) - unseen.ref_chosen
                lost = sequence_log_probs(model, unseen.rejected) - unseen.ref_rejected
            agrees = float((gained > lost).float().mean())
            found[name][lr].append({"agrees": agrees, "chosen": float(gained.mean()), **looked(model, first, obeys, settings.pick(80, 4))})
            print(f"  seed {seed}, {name}, rate {lr}: {found[name][lr][-1]}", flush=True)
    ways = {name: {str(lr): by_seed(rows) for lr, rows in by_rate.items()} for name, by_rate in found.items()}
    return {"promised": mean_sd(promised), "ways": ways}


if __name__ == "__main__": run(__file__)
