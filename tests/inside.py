"""A second scorer of grammars in the notation of `04_grammar`, for the tests: written from the notation, with nothing of `lmbook.grammar`.

It works from the bottom up, as the inside algorithm does, where the library reads from the top down. For a text it lists where each form
of the lexicon stands; joins neighbours into phrases, phrases into longer ones, keeping only what agrees about the variables; and at last
adds up the probability of *every* derivation, in fractions. So it needs no derivation to be the only one.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

PART = re.compile(r"\[[A-Za-z]+:|\]|\{(\w+)(?:\[(\w+)\.(\w+)\]|\.([\w.]+))?\}|([^{}\[\]]+)")
SPACES = {"en": " ", "zh": ""}


class Way(NamedTuple):
    "One line of a rule."

    steps: tuple[str, ...] | None  # of a sequence
    templates: Mapping[str, list[tuple]]  # by language: ("text", t), ("show", var, column), ("agree", var, by, column), ("call", rule)
    draws: list[tuple[str, str, list[tuple[str, str | tuple[str, str]]]]]  # (variable, category, conditions)


class Span(NamedTuple):
    "A phrase that stands somewhere."

    end: int
    rows: Mapping[str, int]  # of variables that the phrase did not draw: the row that each has to have
    tree: Any  # (rule, number of the way, rows of its own variables, trees of the phrases within, rows)


@dataclass
class Inside:
    text: str  # the grammar
    tables: Mapping[str, Sequence[Mapping[str, str]]]  # its lexicon
    limit: int | None = None
    ways: dict[str, list[Way]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[str, list[Fraction]] = field(default_factory=dict)
    category: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {name: [dict(row) for row in rows] for name, rows in self.tables.items()}
        for rows in self.rows.values():
            for number, row in enumerate(rows):
                row["half"] = "b" if number % 2 else "a"
                row["a"] = ("an " if row["en"][0] in "aeiou" else "a ") + row["en"]
        for name, rows in self.rows.items():
            for row, link in itertools.product(rows, self.rows):
                if link == name or link not in row: continue
                [*named] = [other for other in self.rows[link] if other["en"] == row[link]]
                row.update({f"{link}.{column}": value for column, value in named[0].items()})
        weights, rule = defaultdict(list), ""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.strip().startswith("#")]
        names = {line.strip() for line in lines if not line[0].isspace()}
        for line in lines:
            if not line[0].isspace():
                rule = line.strip()
                continue
            if ">" in line.partition("|")[0]:
                weight, _, steps = line.partition(">")
                way = Way(tuple(steps.split()), {}, [])
            else:
                weight, *fields = line.split("|")
                draws = [self.draw(draw) for draw in (fields[2] if len(fields) > 2 else "").split(";") if draw.strip()]
                way = Way(None, {lang: self.template(fields[i].strip(), lang, names) for i, lang in enumerate(SPACES)}, draws)
            if not int(weight): continue
            weights[rule].append(int(weight))
            self.ways[rule].append(way)
        self.shares = {rule: self.split(w) for rule, w in weights.items()}
        self.start = next(iter(self.ways))

    def draw(self, text: str) -> tuple:
        var, category, conditions = re.fullmatch(r"\s*(\w+) *~ *(\w+)(?:\((.*)\))?\s*", text).groups()
        self.category[var] = category
        pairs = [tuple(x.strip() for x in condition.split("=")) for condition in (conditions or "").split(",") if condition]
        return var, category, [(column, tuple(value.split(".", 1)) if "." in value else value) for column, value in pairs]

    @staticmethod
    def template(text: str, lang: str, names: set[str]) -> list[tuple]:
        out = []
        for part in PART.finditer(text):
            name, by, agreeing, column, literal = part.groups()
            if literal: out.append(("text", literal))
            elif name and by: out.append(("agree", name, by, agreeing))
            elif name in names: out.append(("call", name))
            elif name: out.append(("show", name, column or lang))
        return out

    @staticmethod
    def split(weights: Sequence[int]) -> list[Fraction]:
        "Shares of the dice, which have 2**32 faces."
        upper = [0, *(b * 2**32 // sum(weights) for b in itertools.accumulate(weights))]
        return [Fraction(b - a, 2**32) for a, b in itertools.pairwise(upper)]

    # ---- from the bottom up

    def standing(self, text: str, lang: str, part: tuple) -> dict[int, list[tuple[int, dict[str, int]]]]:
        "Where a text or a slot may stand: by beginning, (end, rows that it shows)."
        key = (text, lang, part)
        if key not in self.memo:
            options: dict[str, list[dict[str, int]]] = defaultdict(list)
            if part[0] == "text": options[part[1]] = [{}]
            else:
                var, rows = part[1], self.rows[self.category[part[1]]]
                for i, row in enumerate(rows):
                    if part[0] == "show": options[row[part[2]]].append({var: i})
                    elif lang == "zh": options[row["zh"]].append({var: i})
                    else:
                        for j, other in enumerate(self.rows[self.category[part[2]]]):
                            options[row[other[part[3]]]].append({var: i, part[2]: j})
            out = defaultdict(list)
            for form, meanings in options.items():
                at = text.find(form)
                while at >= 0:
                    out[at] += [(at + len(form), rows) for rows in meanings]
                    at = text.find(form, at + 1)
            self.memo[key] = out
        return self.memo[key]

    def spans(self, text: str, lang: str, rule: str) -> dict[int, list[Span]]:
        "All phrases of a rule that stand anywhere in the text, by beginning."
        key = (text, lang, rule)
        if key not in self.memo:
            out = defaultdict(list)
            for number, way in enumerate(self.ways[rule]):
                for begin in range(len(text) + 1): out[begin] += self.joined(text, lang, rule, number, way, begin)
            self.memo[key] = out
        return self.memo[key]

    def joined(self, text: str, lang: str, rule: str, number: int, way: Way, begin: int) -> Iterator[Span]:
        "The ways in which one line of a rule may stand at one place."
        rows_of: dict[str, int]
        found: list[tuple[int, dict[str, int], tuple]] = [(begin, {}, ())]
        for part in way.templates[lang]:
            longer = []
            for end, rows, trees in found:
                if part[0] == "call": nexts = [(s.end, s.rows, (s.tree,)) for s in self.spans(text, lang, part[1])[end]]
                else: nexts = [(stop, shown, ()) for stop, shown in self.standing(text, lang, part)[end]]
                for stop, rows_of, inner in nexts:
                    if all(rows.get(var, i) == i for var, i in rows_of.items()): longer.append((stop, {**rows, **rows_of}, trees + inner))
            found = longer
            if not found: return
        own = [var for var, *_ in way.draws]
        for end, rows, trees in found:
            hidden = [range(len(self.rows[self.category[var]])) for var in own if var not in rows]
            for picked in itertools.product(*hidden):
                full = {**rows, **dict(zip([var for var in own if var not in rows], picked))}
                outer = {var: i for var, i in rows.items() if var not in own}
                yield Span(end, outer, (rule, number, {var: full[var] for var in own}, trees, outer))

    # ---- and what it is worth

    def weigh(self, tree: Any, known: dict[str, int]) -> tuple[Fraction, dict[str, int]] | None:
        "The probability of a phrase, given the variables known before it, and those that are known after it. None: it cannot be."
        rule, number, own, trees, outer = tree
        if any(known.get(var) != i for var, i in outer.items() if var not in own): return None
        p, here = self.shares[rule][number], dict(known)
        for var, category, conditions in self.ways[rule][number].draws:
            rows = self.rows[category]
            wanted = [(c, v if isinstance(v, str) else self.rows[self.category[v[0]]][here[v[0]]][v[1]]) for c, v in conditions]
            fitting = [i for i, row in enumerate(rows) if all(row[c] == v for c, v in wanted)][: self.limit]
            if own[var] not in fitting: return None
            p *= self.split([10**6 // (rank + 2) for rank in range(len(fitting))])[fitting.index(own[var])]
            here[var] = own[var]
        for inner in trees:
            below = self.weigh(inner, here)
            if below is None: return None
            p *= below[0]
        return p, known | {var: i for var, i in own.items() if var[0] != "_"}

    def sentence(self, text: str, lang: str, rule: str, at: int, known: dict) -> Iterator[tuple[int, Fraction, dict]]:
        if at:
            if not text.startswith(SPACES[lang], at): return
            at += len(SPACES[lang])
        rest = text[at:]
        for before in {rest, rest[:1].lower() + rest[1:]}:  # as it was before it got its capital letter
            if not before or before[0].upper() + before[1:] != rest: continue
            for number, way in enumerate(self.ways[rule]):
                for span in self.joined(before, lang, rule, number, way, 0):
                    if (found := self.weigh(span.tree, known)) is not None: yield at + span.end, *found

    def told(self, text: str, lang: str, rule: str, at: int, known: dict) -> Iterator[tuple[int, Fraction, dict]]:
        "Every way to tell a rule from a place on: where it ends, its probability, the variables known after it."
        if self.ways[rule][0].steps is None:
            yield from self.sentence(text, lang, rule, at, known)
            return
        for share, way in zip(self.shares[rule], self.ways[rule]):
            found = [(at, share, known)]
            for step in way.steps: found = [(e, p * q, k2) for b, p, k in found for e, q, k2 in self.told(text, lang, step, b, k)]
            yield from found

    def probability(self, text: str, lang: str) -> tuple[Fraction, int]:
        "Of a text, summed over its derivations, and how many there are."
        self.memo: dict[tuple, Any] = {}
        whole = [p for end, p, _ in self.told(text, lang, self.start, 0, {}) if end == len(text)]
        return sum(whole, Fraction(0)), len(whole)
