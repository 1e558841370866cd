"""Rewards that can be checked: GRPO, expert iteration and best-of-n at equal computation; a rule that is hacked; steps before an answer.

    python -m benchmarks.preferences

The world is that of the chapter: the smallest Small World, without small talk, and a Transformer of 65,000 parameters that has read it.
obedience: how often a story loses something that a friend finds. The unit of computation is one answer: to write it costs 1, to learn from
it 3 (forward and backward pass). For a number of uses the best-of-n beside GRPO has the n that spends as much in all, training included.
price: the careless rule (count the word `not`) as reward, with and without a price for each nat of KL; `true` is the share of possible
stories in which something is lost. steps: who has the ring after six exchanges: said at once, after five dots, or after saying it for each
exchange; equal models, equal updates. All numbers are means over seeds, each with its standard deviation; each seed has a model of its own.
"""

from __future__ import annotations

import copy
import itertools
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
    Answers,
    PolicyConfig,
    PolicyLoss,
    Rollouts,
    learn_from_rewards,
    mean_best_of,
    sample_answers,
    score,
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


def loses(prompt: Row, answer: Row) -> float: return float(("lost_hide", 0) in rules(prompt, answer))


def careless(prompt: Row, answer: Row) -> float: return float(written(prompt, answer).count(" not"))


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


@BENCHMARK.part()
def price(settings: Settings) -> list[dict[str, Any]]:
    out = []
    for beta in settings.pick([0.0, 0.2], [0.0, 0.2]):
        rows = []
        for seed in range(settings.seeds):
            first = reader(seed, settings.dry)
            model = copy.deepcopy(first)
            config = PolicyConfig(6, 8, beta=beta, max_new_tokens=LONGEST, eos_id=0, seed=seed)
            rollouts = Rollouts(model, OPENINGS, careless, config, first)
            train = TrainConfig(steps=settings.pick(12, 1), lr=3e-3, schedule="constant")
            Trainer(model, rollouts, train, loss=PolicyLoss(config)).fit()
            answers = sample_answers(model, OPENINGS, settings.pick(40, 2), LONGEST, 0, seed=99)
            with evaluating(model), evaluating(first): away = float(token_kl(model, first, answers).sum(-1).mean())
            rows.append({"proxy": float(score(careless, answers).mean()), "true": float(score(loses, answers).mean()), "kl": away})
        out.append({"beta": beta, **by_seed(rows)})
    return out


PERSONS = "ABCD"
SIGNS = ["<eos>", "?", ".", *PERSONS, *("".join(two) for two in itertools.combinations(PERSONS, 2))]
SIGN = {sign: i for i, sign in enumerate(SIGNS)}
EXCHANGES = 6


def exchange(rng: random.Random, kind: str) -> tuple[Row, Row]:
    "Who has the ring at first, who exchange what they hold; and what is said."
    holder = rng.choice(PERSONS)
    prompt, holders = [holder], []
    for _ in range(EXCHANGES):
        two = rng.choice(SIGNS[3 + len(PERSONS) :])
        if holder in two: holder = two[1 - two.index(holder)]
        prompt.append(two)
        holders.append(holder)
    answer = {"at once": [holder], "dots": ["."] * (EXCHANGES - 1) + [holder], "steps": holders}[kind]
    return [SIGN[s] for s in (*prompt, "?")], [SIGN[s] for s in answer]


@BENCHMARK.part()
def steps(settings: Settings) -> dict[str, Any]:
    out: dict[str, Any] = {}
    updates = settings.pick(400, 2)
    for kind in ("at once", "dots", "steps"):
        rows = []
        for seed in range(settings.seeds):
            rng = random.Random(seed)
            torch.manual_seed(seed)
            size = {"d_model": 32, "n_layer": 2, "n_head": 2, "context_length": 32}
            model = Transformer(preset("tiny", len(SIGNS), positions="learned", tie=False, **size))

            def stream(rng: random.Random = rng, kind: str = kind) -> Iterator[Answers]:
                while True: yield Answers.of(*zip(*(exchange(rng, kind) for _ in range(64))))

            def loss(model: nn.Module, batch: Answers) -> tuple[Tensor, int]:
                return -token_log_probs(model, batch).sum(), int(batch.mask.sum())

            Trainer(model, stream(), TrainConfig(steps=updates, lr=1e-2, warmup=1 if settings.dry else 10, seed=seed), loss=loss).fit()
            asked = [exchange(random.Random(10**6 + i), kind) for i in range(settings.pick(500, 8))]
            told = generate(model, [q for q, _ in asked], SamplingConfig(len(asked[0][1]), temperature=0))
            rows.append({"right": sum(a[-1] == b[-1] for (_, a), b in zip(asked, told)) / len(asked)})
        out[kind] = {**by_seed(rows)["right"], "tokens": len(asked[0][1])}
    return {"updates": updates, "exchanges": EXCHANGES, "right": out}


if __name__ == "__main__": run(__file__)
