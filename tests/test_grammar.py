"""The grammar engine against things that are not it: a scorer that works the other way round, and a proof that no text has two derivations.

(Enumeration, random grammars and what the notation refuses are in `test_small_world.py`, beside the world that it writes.)
"""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources

import pytest
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from benchmarks.common import RESULTS
from benchmarks.grammar import HERO, ambiguities, source_digest, two_paths, unsettled
from lmbook.grammar import SPACE, Grammar
from lmbook.small_world import SmallWorld, SmallWorldConfig
from tests.inside import Inside
from tests.test_small_world import Everything, RandomGrammar, exploring

LANGUAGES = tuple(SPACE)


@cache
def scorer(talk: int = 5, nested: int = 2, limit: int | None = None, far: int = 0) -> Inside:
    "The independent one, from the file as it lies in the package."
    data = tomllib.loads(resources.files("lmbook.data").joinpath("small_world.toml").read_text(encoding="utf-8"))
    tables = {}
    for name, table in data["lexicon"].items():
        lines = [line.split("|") for line in table["rows"].splitlines() if line.strip()]
        tables[name] = [{column: cell.strip() for column, cell in zip(table["columns"], line)} for line in lines]
    text = data["grammar"]
    for name, weight in (("$talk", talk), ("$nested", nested), ("$far", far)): text = text.replace(name, str(weight))
    return Inside(text, tables, limit)


# ----------------------------------------------------------------------------------------------------------------- an independent scorer

@pytest.mark.parametrize(("settings_", "n"), [({}, 8), ({"talk": 20, "nested": 10, "far": 20}, 3), ({"limit": 4}, 6)], ids=str)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_another_algorithm_finds_the_same_probability(settings_: dict, n: int, lang: str):
    world, other = SmallWorld(SmallWorldConfig(**settings_)), scorer(**settings_)
    for text in world.texts("test", lang, n=n, start=70):
        p, count = other.probability(text, lang)
        assert count == 1 and math.log(p) == pytest.approx(world.log_prob(text, lang), rel=1e-12)


def test_another_algorithm_refuses_the_same_texts():
    world, tried = SmallWorld(), 0
    for text in world.texts("test", n=12, start=200):
        for pattern, new in ((r"\bHe\b", "She"), (r"\bShe\b", "He"), (r" is (?=\w+\.)", " are "), (r"\bthe (?=\w+ by)", "a ")):
            wrong = re.sub(pattern, new, text, count=1)
            if wrong == text: continue
            tried += 1
            assert world.log_prob(wrong) == -math.inf and scorer().probability(wrong, "en") == (0, 0), wrong
    assert tried > 10


@st.composite
def written(draw: Callable, most: int) -> tuple[Everything, Inside]:
    "A random grammar with at most so many derivations, listed; and the other scorer for it."
    maker = RandomGrammar(draw)
    text, lexicon, limit = maker.grammar(), maker.lexicon(), draw(st.sampled_from([None, None, 1, 2]))
    note(f"{text}\n\n{lexicon}\n\nlimit={limit}")
    every = Everything.of(Grammar(text, lexicon, limit), most + 1)
    assume(len(every.derivations) <= most)
    return every, Inside(text, lexicon, limit)


@settings(exploring, max_examples=40)
@given(written(most=150), st.randoms(use_true_random=False))
def test_another_algorithm_adds_up_all_derivations_of_a_random_grammar(found: tuple, rng: random.Random):
    every, other = found
    for lang in LANGUAGES:
        table = every.by_text(lang)
        for text in rng.sample(sorted(table), min(3, len(table))):
            p, count = other.probability(text, lang)
            assert count == len(table[text]) and float(p) == pytest.approx(math.fsum(q for q, _ in table[text]), rel=1e-12), (lang, text)


# ------------------------------------------------------------------------------------------------------------------------------ the proof

def cut_down() -> Grammar:
    "Small World with all its rules, and the first few rows of each kind."
    data = tomllib.loads(resources.files("lmbook.data").joinpath("small_world.toml").read_text(encoding="utf-8"))
    lexicon = {}
    for name, table in data["lexicon"].items():
        every = [dict(zip(table["columns"], map(str.strip, line.split("|")))) for line in table["rows"].strip().split("\n")]
        kinds = [tuple(row.get(column) for column in ("topic", "gender", "class", "polarity", "of")) for row in every]
        lexicon[name] = [row for i, row in enumerate(every) if len(every) <= 20 or kinds[:i].count(kinds[i]) < 3]
    return Grammar(data["grammar"].replace("$talk", "1").replace("$nested", "1").replace("$far", "1"), lexicon)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_text_of_small_world_has_two_derivations(lang: str):
    "With a few rows of each kind; the benchmark proves it of all."
    found, size = ambiguities(cut_down(), lang, HERO)
    assert found == [] and size["pairs"] > 200


def test_the_whole_world_settles_its_rows():
    grammar = SmallWorld().grammar
    for lang in LANGUAGES: assert unsettled(grammar, lang) == []


def test_what_the_benchmark_proved_is_this_world():
    "As long as grammar and lexicon are those that it read, the stored proof holds."
    stored = json.loads((RESULTS / "grammar.json").read_text(encoding="utf-8"))
    for lang in LANGUAGES: assert stored["proof"][lang]["ambiguities"] == []
    assert stored["proof"]["source"] == source_digest()


def test_the_gender_of_the_hero_must_be_kept_in_mind():
    "Otherwise the automaton is too generous: 'she' could be of a hero whose name is a man's."
    assert two_paths(cut_down(), "en")[0]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_planted_town_with_two_readings_is_found(lang: str):
    "Ash + ton, and Asht + on: the forms are all different, and yet one name can be made in two ways."
    grammar = cut_down()
    first, last = grammar.lexicon["town_a"][0], next(row for row in grammar.lexicon["town_b"] if len(row["zh"]) > 1)
    grammar.lexicon["town_a"].append(first | {lang: first[lang] + last[lang][0]})
    grammar.lexicon["town_b"].append(last | {lang: last[lang][1:]})
    found, _ = two_paths(grammar, lang, HERO)
    assert any((first[lang] + last[lang])[:-1] in beginning for beginning in found), found
    assert unsettled(grammar, lang) == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_planted_form_of_two_rows_is_found(lang: str):
    grammar = cut_down()
    grammar.lexicon["animal"].append(dict(grammar.lexicon["animal"][1]))
    assert two_paths(grammar, lang, HERO)[0] == [] and unsettled(grammar, lang) == ["filler: _animal"]


PARTS = ("ab", "甲乙", "p"), ("c", "丙", "p"), ("a", "甲", "q"), ("bc", "乙丙", "q")


@pytest.mark.parametrize(("lines", "ambiguous"), [
    ("story\n 1 | Ann sang. | 安唱。 |\n 1 | {x} sang. | {x}唱。 | x ~ name", True),
    ("story\n 1 | {x} sang. | {x}唱。 | x ~ name", False),
    ("story\n 1 > a a2\na\n 1 | so. | 就。 |\n 1 | so, so. | 就，就。 |\na2\n 1 | so. | 就。 |", False),
    ("story\n 1 > a a2\na\n 1 >\n 1 > b\na2\n 1 >\n 1 > b\nb\n 1 | so. | 就。 |", True),  # one sentence: whose?
    ("story\n 1 | {x}{y}. | {x}{y}。 | x ~ part; y ~ part", True),  # ab + c, a + bc
    ("story\n 1 | {x}-{y}. | {x}·{y}。 | x ~ part; y ~ part", False),
    ("story\n 1 | {x} sang. | {x}唱。 | x ~ twin", True),  # two rows, one form
    ("story\n 1 | {x.kind} sang. | {x.kind}唱。 | x ~ part", True),  # shown in a column that does not tell
    ("story\n 1 | so. | 就。 | x ~ name", True),  # not shown at all
    ("story\n 1 | {y}. | {y}。 | x ~ name; y ~ part(kind=x.kind)", False),  # known by what it decides
])  # fmt: skip
def test_small_grammars_of_which_it_is_plain(lines: str, ambiguous: bool):
    lexicon = {
        "name": [{"en": "Ann", "zh": "安", "kind": "p"}, {"en": "Bo", "zh": "波", "kind": "q"}],
        "twin": [{"en": "Ann", "zh": "安"}, {"en": "Ann", "zh": "安"}],
        "part": [{"en": en, "zh": zh, "kind": kind} for en, zh, kind in PARTS],
    }
    if "y ~ part(kind" in lines: lexicon["name"] = [{"en": "p", "zh": "安", "kind": "p"}, {"en": "q", "zh": "波", "kind": "q"}]
    grammar = Grammar(lines, lexicon)
    for lang in LANGUAGES:
        assert bool(ambiguities(grammar, lang)[0]) == ambiguous
        listed = Everything.of(grammar).by_text(lang)
        assert any(len(ways) > 1 for ways in listed.values()) == ambiguous


def test_what_is_proved_of_a_random_grammar_is_true():
    judged = {True: 0, False: 0}

    @settings(exploring, max_examples=60)
    @given(written(most=300))
    def each(found: tuple) -> None:
        every, _ = found
        for lang in LANGUAGES:
            proved = not ambiguities(every.grammar, lang)[0]
            judged[proved] += 1
            if proved: assert all(len(ways) == 1 for ways in every.by_text(lang).values()), lang

    each()
    assert min(judged.values()) > 5, f"{judged}: nothing is shown where all are alike"
