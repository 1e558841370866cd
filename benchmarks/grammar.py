"""Whether a grammar can write any text in two ways: a proof, by searching for two derivations of one text.

    python -m benchmarks.grammar

The entropy that `lmbook.grammar` computes is that of the choices. It is the entropy of the *text* only if every text has one derivation.
Reading stories shows it for these stories; here it is shown for all of them, of a world of any size (`limit`) and with any weights.

**The structure.** An automaton reads a text letter by letter. A configuration of it is what is still to come: a stack of letters, of rules
to be expanded, and of places in tries of forms. It is more generous than the grammar, since each slot may show any form of its category
that the conditions allow at all, whatever was shown before: it forgets. (One feature of the grammar can be kept in mind, a variable's
column: which value it has is guessed at the beginning.) So its paths are a superset of the grammar's derivations, and there are finitely
many configurations. Then two copies of it read the same text. From every configuration in which it can be continued in two ways by one
letter, the pair is followed as far as both find a common letter. If no pair ever meets again in one configuration and no two end
together, then no text has two paths: a text decides which alternatives were chosen, and which form each slot shows (Book, Even, Greibach
and Ott 1971 do the same with regular expressions).

**The rows.** It remains that the forms decide the rows of the lexicon. A sentence settles a variable that it draws if it shows it in a
column whose forms are all different, among the rows that agree in what is settled already; or if what it settles names it in a condition.

Both are sufficient and not necessary: "no ambiguity found" is a proof, an ambiguity that is found may be one of the generous automaton
only. Weights play no part, and a smaller `limit` or an alternative of weight zero takes paths away; so one proof holds for all of them.
"""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from benchmarks.common import Benchmark, Settings, run
from lmbook.grammar import SPACE, Alternative, Call, Grammar, Row, Slot
from lmbook.small_world import SmallWorld, SmallWorldConfig

BENCHMARK = Benchmark(packages=("numpy",))
MOST = 20  # ambiguities that are told; the search ends there

# What is still to come, first things first: a linked list of items. An item is a text, (CAPITAL,), (SENTENCE, rule), (PHRASE, rule),
# (FORMS, trie), (GUESS,).
Stack = tuple[Any, "Stack"] | None
CAPITAL, SENTENCE, PHRASE, FORMS, GUESS = "capital", "sentence", "phrase", "forms", "guess"


@dataclass(frozen=True, eq=False, slots=True)
class Trie:
    "Forms, merged where they begin alike."

    more: dict[str, Trie]
    ends: bool

    @classmethod
    def of(cls, forms: Iterable[str]) -> Trie:
        by_first, ends = defaultdict(list), False
        for form in sorted(set(forms)):
            if form: by_first[form[0]].append(form[1:])
            else: ends = True
        return cls({letter: cls.of(rest) for letter, rest in by_first.items()}, ends)


@dataclass(frozen=True, slots=True)
class Place:
    "A configuration of the automaton."

    guess: str | None  # the value of the feature that is kept in mind
    begun: bool  # whether a sentence was written before, so that a space comes before the next
    capital: bool  # whether the next letter is the first of a sentence
    stack: Stack


class Automaton:
    "Reads what the grammar writes, and more. `mind` is the feature that it does not forget: a variable and its column."

    def __init__(self, grammar: Grammar, lang: str, mind: tuple[str, str] | None = None):
        self.grammar, self.lang, self.mind = grammar, lang, mind
        self.draws: dict[str, list] = defaultdict(list)  # of each variable, wherever it is drawn
        for choice in grammar.rules.values():
            for alternative in choice.options:
                for draw in alternative.draws: self.draws[draw.var].append(draw)
        self.guesses: list[str | None] = [None]
        if mind: self.guesses = sorted({row[mind[1]] for row in grammar.lexicon[grammar.category[mind[0]]]})
        self.rows = {guess: self._possible(guess) for guess in self.guesses}
        self._tries: dict[Any, Trie] = {}
        self._known: dict[Place, Place] = {}
        self._steps: dict[Place, tuple[dict[str, list[Place]], int]] = {}

    def _possible(self, guess: str | None) -> dict[str, list[Row]]:
        "The rows that each variable may have: those that meet every condition for some rows of the variables that it names."
        category, lexicon = self.grammar.category, self.grammar.lexicon
        rows = {var: lexicon[category[var]] for var in self.draws}
        if self.mind: rows[self.mind[0]] = [row for row in rows[self.mind[0]] if row[self.mind[1]] == guess]
        while True:
            values: dict[tuple[str, str], set[str]] = {}

            def fits(row: Row, var: str, rows: dict = rows, values: dict = values) -> bool:
                for draw in self.draws[var]:
                    for _, other, k in draw.where:
                        if other and (other, k) not in values: values[other, k] = {r[k] for r in rows[other]}
                    if all(row[column] in values[other, k] if other else row[column] == k for column, other, k in draw.where): return True
                return False

            kept = {var: [row for row in rows[var] if fits(row, var)] for var in rows}
            if all(len(kept[var]) == len(rows[var]) for var in rows): return kept
            rows = kept

    def trie(self, slot: Slot, guess: str | None) -> Trie:
        "The forms that a slot may show."
        if (slot, guess) not in self._tries:
            rows, columns = self.rows[guess], {slot.column}
            if slot.by: columns = {row[slot.column] for row in rows[slot.by]} if self.lang == "en" else {self.lang}
            forms = frozenset(row[column] for row in rows[slot.var] for column in columns)
            if forms not in self._tries: self._tries[forms] = Trie.of(forms)
            self._tries[slot, guess] = self._tries[forms]
        return self._tries[slot, guess]

    def known(self, guess: str | None, begun: bool, capital: bool, stack: Stack) -> Place:
        "The configuration: each exists once, so that two are equal if they are the same."
        place = Place(guess, begun, capital, stack)
        return self._known.setdefault(place, place)

    def start(self) -> Place: return self.known(None, False, False, ((GUESS,), ((SENTENCE, self.grammar.start), None)))

    def phrase(self, alternative: Alternative, guess: str | None, rest: Stack) -> Stack:
        for part in reversed(alternative.parts[self.lang]):
            if isinstance(part, str): rest = (part, rest)
            elif isinstance(part, Call): rest = ((PHRASE, part.rule), rest)
            elif isinstance(part, Slot): rest = ((FORMS, self.trie(part, guess)), rest)
        return rest

    def expand(self, place: Place) -> Iterator[Place | tuple[str, Place]]:
        "One step: to places that have read nothing more, or by a letter to the next place. Each way to go on is yielded once."
        guess, begun, capital = place.guess, place.begun, place.capital
        assert place.stack is not None
        item, rest = place.stack

        def letter(letters: str, after: Stack) -> tuple[str, Place]:
            if capital: letters = letters[0].upper() + letters[1:]
            return letters[0], self.known(guess, begun, False, (letters[1:], after) if letters[1:] else after)

        if isinstance(item, str): yield letter(item, rest)
        elif item[0] == CAPITAL: yield Place(guess, begun, True, rest)
        elif item[0] == GUESS:
            for value in self.guesses: yield Place(value, begun, capital, rest)
        elif item[0] == FORMS:
            if item[1].ends: yield Place(guess, begun, capital, rest)
            for first, trie in item[1].more.items(): yield letter(first, ((FORMS, trie), rest) if trie.more else rest)
        else:
            for alternative in self.grammar.rules[item[1]].options:
                if alternative.sequence is not None:
                    stack = rest
                    for step in reversed(alternative.sequence): stack = ((SENTENCE, step), stack)
                    yield Place(guess, begun, capital, stack)
                else:
                    stack = self.phrase(alternative, guess, rest)
                    if item[0] == SENTENCE:
                        stack = ((CAPITAL,), stack)
                        if begun and SPACE[self.lang]: stack = (SPACE[self.lang], stack)
                    yield Place(guess, begun or item[0] == SENTENCE, capital, stack)

    def steps(self, place: Place) -> tuple[dict[str, list[Place]], int]:
        "By each letter the places that come next, one for each way to get there; and in how many ways the text may end here."
        if place not in self._steps:
            out, ends, todo = defaultdict(list), 0, [place]
            while todo:
                here = todo.pop()
                if here.stack is None:
                    ends += 1
                    continue
                for step in self.expand(here):
                    if isinstance(step, Place): todo.append(step)
                    else: out[step[0]].append(step[1])
            self._steps[place] = dict(out), ends
        return self._steps[place]


def two_paths(grammar: Grammar, lang: str, mind: tuple[str, str] | None = None) -> tuple[list[str], dict[str, int]]:
    "Beginnings of texts that the automaton reads along two paths (none: the structure is unambiguous); and how much was searched."
    automaton, found = Automaton(grammar, lang, mind), []
    start = automaton.start()
    back: dict[Place, tuple[Place, str] | None] = {start: None}
    pairs: dict[tuple[int, int], tuple[Any, str]] = {}  # how a pair was reached: from another one by a letter, or (None, the whole text)
    waiting: deque[tuple[Place, Place]] = deque()

    def text_to(place: Place) -> str:
        letters = []
        while (step := back[place]) is not None:
            letters.append(step[1])
            place = step[0]
        return "".join(reversed(letters))

    def text_of(key: tuple[int, int]) -> str:
        letters = []
        while True:
            before, letter = pairs[key]
            letters.append(letter)
            if before is None: return "".join(reversed(letters))
            key = before

    def meet(a: Place, b: Place, before: Any, letter: str) -> None:
        "Two paths that have read the same: they have met, or they are followed."
        if a is b:
            found.append((text_of(before) if before else "") + letter)
            return
        key = (id(a), id(b)) if id(a) < id(b) else (id(b), id(a))
        if key in pairs: return
        pairs[key] = before, letter
        waiting.append((a, b) if id(a) < id(b) else (b, a))

    todo = [start]
    while todo and len(found) < MOST:
        place = todo.pop()
        following, ends = automaton.steps(place)
        if ends > 1: found.append(text_to(place))
        for letter, places in following.items():
            for i, a in enumerate(places):
                for b in places[:i]: meet(a, b, None, text_to(place) + letter)
                if a not in back:
                    back[a] = place, letter
                    todo.append(a)
    divergences = len(pairs)
    while waiting and len(found) < MOST:
        a, b = waiting.popleft()
        (from_a, a_ends), (from_b, b_ends) = automaton.steps(a), automaton.steps(b)
        key = id(a), id(b)
        if a_ends and b_ends: found.append(text_of(key))
        for letter in from_a.keys() & from_b.keys():
            for x in from_a[letter]:
                for y in from_b[letter]: meet(x, y, key, letter)
    return found[:MOST], {"configurations": len(back), "divergences": divergences, "pairs": len(pairs)}


def _different(rows: Iterable[Row], forms: list[str], known: list[str]) -> bool:
    "Whether rows that agree in the columns `known` all differ in what they show."
    cells = defaultdict(list)
    for row, form in zip(rows, forms, strict=True): cells[tuple(row[column] for column in known)].append(form)
    return all(len(set(cell)) == len(cell) for cell in cells.values())


def unsettled(grammar: Grammar, lang: str) -> list[str]:
    "Variables that the sentence or phrase which draws them does not settle, as 'rule: variable'. None: what is shown decides the rows."
    lexicon, category, out, todo, reached = grammar.lexicon, grammar.category, [], [grammar.start], {grammar.start}
    while todo:
        rule = todo.pop()
        for alternative in grammar.rules[rule].options:
            for step in (*(alternative.sequence or ()), *alternative.calls):
                if step not in reached:
                    reached.add(step)
                    todo.append(step)
            own = {draw.var: draw for draw in alternative.draws}
            settled: set[str] = set()

            def known(var: str, own: dict = own, settled: set = settled) -> bool: return var not in own or var in settled

            def conditions(var: str, own: dict = own) -> list[str]:
                "The columns of a variable that are settled before it is seen, because its draw fixes them."
                return [column for column, other, _ in own[var].where if not other or known(other)]  # noqa: B023

            before = -1
            while before < len(settled):
                before = len(settled)
                for slot in (part for part in alternative.parts.get(lang, ()) if isinstance(part, Slot)):
                    var, by, column = slot.var, slot.by, slot.column
                    rows = lexicon[category[var]]
                    if by and lang == "en":
                        columns = sorted({row[column] for row in lexicon[category[by]]})
                        if known(by):
                            if not known(var) and all(_different(rows, [row[c] for row in rows], conditions(var)) for c in columns):
                                settled.add(var)
                        elif _different(lexicon[category[by]], [row[column] for row in lexicon[category[by]]], conditions(by)):
                            shown = [row[c] for row in rows for c in columns]
                            apart = all(len({row[c] for c in columns}) == len(columns) for row in rows)
                            if known(var) and apart: settled.add(by)
                            elif not known(var) and len(set(shown)) == len(shown): settled |= {var, by}
                    elif not known(var):
                        forms = [row[lang if by else column] for row in rows]
                        if _different(rows, forms, conditions(var)): settled.add(var)
                for var in list(settled):  # a row that is known names others in the conditions of its draw
                    for column, other, k in own[var].where:
                        if other and not known(other) and column:
                            rows = lexicon[category[other]]
                            if _different(rows, [row[k] for row in rows], conditions(other)): settled.add(other)
            out += [f"{rule}: {var}" for var in own if var not in settled]
    return sorted(set(out))


def ambiguities(grammar: Grammar, lang: str, mind: tuple[str, str] | None = None) -> tuple[list[str], dict[str, int]]:
    "What stands in the way of 'every text has one derivation' (nothing: it is proved), and how much was searched."
    found, size = two_paths(grammar, lang, mind)
    return found + unsettled(grammar, lang), size


HERO = "hero", "gender"  # who is she and who is he must not be forgotten: "she" would be the hero or nobody


def source_digest() -> str:
    "Of the grammar and the lexicon, without their comments: a stored proof is of these."
    data = tomllib.loads(resources.files("lmbook.data").joinpath("small_world.toml").read_text(encoding="utf-8"))
    data["grammar"] = [line for line in data["grammar"].splitlines() if not line.startswith("#")]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@BENCHMARK.part()
def proof(settings: Settings) -> dict[str, Any]:
    "Small World: in each language."
    out: dict[str, Any] = {"source": source_digest()}
    for lang in SPACE:
        began = time.perf_counter()
        # The weights only have to be above zero: an alternative that is never taken would not be searched.
        world = SmallWorld(SmallWorldConfig(limit=settings.pick(None, 2), talk=1, nested=1, far=1))
        if settings.dry: world.grammar.lexicon |= {name: rows[:6] for name, rows in world.grammar.lexicon.items() if len(rows) > 20}
        found, size = ambiguities(world.grammar, lang, HERO)
        out[lang] = {"ambiguities": found, **size, "seconds": round(time.perf_counter() - began, 1)}
    return out


if __name__ == "__main__": run(__file__)
