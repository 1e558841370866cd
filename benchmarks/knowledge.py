"""Relations read out of stories, by how many of them had labels; and facts in a prompt, known by heart or read from an open book.

    python -m benchmarks.knowledge

labels: `TripleExtractor` trained on 25 to 1,600 stories of Small World, for equally many steps; F1 of relations on 300 new stories, three
seeds, each with stories of its own. Beside it the four patterns of the chapter.
book: the capital's land, of twenty, after a letter from there. Pupils: by heart (one world), other worlds (another one in each lesson),
open book (other worlds, and the fact in front), four facts (other worlds, and the fact among four; eight times as many steps). Three seeds.
Asked in the world that the first one knows and in others: alone, with the fact, with the fact among four. In other worlds the questions
are about pairs of a capital and a land that are kept out of all lessons, a fifth of them.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.batches import Examples
from lmbook.evaluation import span_f1
from lmbook.knowledge import ExtractorConfig, Relation, TripleExtractor, tell_facts
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3)
WORLD = SmallWorld()
PATTERNS = [
    (r"^(\w+ \w+) was an? (\w+) in", "works as"),
    (r"^(\w+ \w+) was an? \w+ in (\w+)", "lives in"),
    (r"(\w+), who lived in (\w+)", "lives in"),
    (r"say that (\w+) is the capital of (\w+)", "capital of"),
]


def stories(n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [tell_facts(WORLD, rng) for _ in range(n)]


@BENCHMARK.part()
def labels(settings: Settings) -> dict[str, Any]:
    test, rows = stories(settings.pick(300, 5), 99), {}
    for n in settings.pick((25, 100, 400, 1600), (5, 10)):
        found = []
        for seed in range(settings.seeds):
            config = ExtractorConfig(steps=settings.pick(500, 2), seed=seed)
            found.append(TripleExtractor.fit(stories(n, seed), config).evaluate(test)["relations"])
        values = [[score.value, score.details["precision"], score.details["recall"]] for score in found]
        rows[str(n)] = {name: mean_sd(list(column)) for name, column in zip(("f1", "precision", "recall"), zip(*values))}
        print(f"  {n} stories: {rows[str(n)]['f1']}", flush=True)
    said = [[Relation(m.span(1), m.span(2), name) for pattern, name in PATTERNS for m in re.finditer(pattern, record["text"])]
            for record in test]
    rules = span_f1(said, [record["relations"] for record in test])
    by_rule = {"f1": rules.value, "precision": rules.details["precision"], "recall": rules.details["recall"]}
    return {"stories": rows, "four patterns": by_rule, "test": len(test)}


ROWS = WORLD.grammar.lexicon["land"][:20]
CAPITALS, LANDS = [row["capital"] for row in ROWS], [row["en"] for row in ROWS]
PEOPLE = {row["en"]: row["people"] for row in ROWS}
OURS = dict(zip(CAPITALS, LANDS))
PUPILS = {  # whether the world changes, facts in front, batches of 16 lessons
    "by heart": (False, 0, 250), "other worlds": (True, 0, 250), "open book": (True, 1, 250), "four facts": (True, 4, 2000),
}  # fmt: skip
CASES = {"alone": 0, "the fact": 1, "four facts": 4}


def held_out(town: str, land: str) -> bool: return (CAPITALS.index(town) + LANDS.index(land)) % 5 == 0


def another(rng: random.Random) -> dict[str, str]:
    "A world that has some of the pairs that are held out, and some that are not."
    while True:
        world = dict(zip(CAPITALS, rng.sample(LANDS, len(LANDS))))
        if 0 < sum(held_out(*pair) for pair in world.items()) < len(world): return world


def letter(rng: random.Random, changed: bool, given: int, held: bool) -> tuple[str, str]:
    "A land, and a text that names it behind the letter; in a changed world it is of a pair that is held out, or of one that is not."
    land_of = another(rng) if changed else OURS
    town = rng.choice([town for town in CAPITALS if not changed or held_out(town, land_of[town]) == held])
    name, thing = (rng.choice(WORLD.grammar.lexicon[kind][:40])["en"] for kind in ("given", "object"))
    some = [town, *rng.sample([other for other in CAPITALS if other != town], max(0, given - 1))][:given]
    rng.shuffle(some)
    facts = "".join(f"{t} is the capital of {land_of[t]}. " for t in some)
    land = land_of[town]
    return land, (f"{facts}A letter came from {name}, who lived in {town}. She packed the {thing} and set out for {land}. "
                  f"There they spoke {PEOPLE[land]}.")


@torch.no_grad()
def right(model: Transformer, tokenizer: WordTokenizer, changed: bool, given: int, n: int) -> float:
    rng, good = random.Random(9), 0
    numbers = [tokenizer.encode(f" {land}")[0] for land in LANDS]
    for _ in range(n):
        land, text = letter(rng, changed, given, True)
        scores = model(torch.tensor([tokenizer.encode(text[: text.index(f" {land}. There")], bos=True)]))[0, -1]
        good += LANDS[int(scores[numbers].argmax())] == land
    return good / n


@BENCHMARK.part()
def book(settings: Settings) -> dict[str, Any]:
    rng, rows = random.Random(1), {}
    tokenizer = WordTokenizer.train([letter(rng, True, k % 2 * 4, k % 4 > 1)[1] for k in range(4000)])
    for name, (changes, given, steps) in PUPILS.items():
        found: dict[str, list[float]] = {}
        for seed in range(settings.seeds):
            rng, n = random.Random(seed), settings.pick(steps, 2)
            ids = [tokenizer.encode(letter(rng, changes, given, False)[1], bos=True, eos=True) for _ in range(16 * n)]
            torch.manual_seed(seed)
            model = Transformer(TransformerConfig(
                tokenizer.vocab_size, 64, 2, 4, context_length=96, norm="rms", bias=False, activation="swiglu", positions="rotary",
                init="xavier_uniform"))  # fmt: skip
            config = TrainConfig(steps=n, lr=0.02, warmup=min(20, n - 1), schedule="wsd", seed=seed, device="cpu", log_every=10**6,
                                 optimizer=muon_and_adamw)
            Trainer(model, Examples(ids, batch_size=16, seed=seed), config).fit()
            for changed in (False, True):
                for case, facts in CASES.items():
                    share = right(model.eval(), tokenizer, changed, facts, settings.pick(400, 5))
                    found.setdefault(f"{'other worlds' if changed else 'our world'}, {case}", []).append(share)
        rows[name] = {"steps": steps, **{case: mean_sd(values) for case, values in found.items()}}
        print(f"  {name}: {found}", flush=True)
    return rows


if __name__ == "__main__": run(__file__)
