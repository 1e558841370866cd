"""Facts against brute force over triples; an extractor that learns what it is shown, in both languages; bad input; planted faults."""

from __future__ import annotations

import json
import random
from types import ModuleType
from typing import Any

import pytest
import torch

import lmbook.knowledge as knowledge
from lmbook.core import LmbookError
from lmbook.knowledge import ExtractorConfig, KnowledgeError, KnowledgeGraph, Relation, Source, Triple, TripleExtractor
from tests.faults import planted

SMALL = ExtractorConfig(d_model=32, n_layer=1, n_head=2, d_role=16, context_length=32, steps=80, batch_size=8)
NAMES, RELATIONS = "abcde", ("r", "s")


def graph_of(facts: Any, module: ModuleType = knowledge) -> Any:
    return module.KnowledgeGraph((module.Triple(s, r, o), module.Source(d)) for s, r, o, d in facts)


def records(n: int, seed: int, lang: str = "en") -> list[dict[str, Any]]:
    "Who lives where, and who likes whom; a sentence that says nothing comes between now and then."
    dice, out = random.Random(seed), []
    people = {"en": ["Ann", "Bo", "Cy", "Di", "Ed"], "zh": ["小明", "小红", "王五"]}[lang]
    towns = {"en": ["Ulm", "Lyon", "Oslo", "Rome"], "zh": ["北京", "上海"]}[lang]
    for _ in range(n):
        a, b = dice.sample(people, 2)
        town = dice.choice(towns)
        if lang == "en": parts = [a, " lives in ", town, ". It rains. " if dice.random() < .5 else ". ", b, " likes ", a, "."]
        else: parts = [a, "住在", town, "。下雨了。" if dice.random() < .5 else "。", b, "喜欢", a, "。"]
        starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
        at = [(start, start + len(part)) for start, part in zip(starts, parts)]
        relations = [Relation(at[0], at[2], "lives in"), Relation(at[4], at[6], "likes")]
        out.append({"text": "".join(parts), "relations": relations})
    return out


# ---------------------------------------------------------------- the graph


def any_facts(dice: random.Random) -> list[tuple[str, str, str, str]]:
    return [(dice.choice(NAMES), dice.choice(RELATIONS), dice.choice(NAMES), dice.choice("xyz")) for _ in range(dice.randint(0, 25))]


def test_a_walk_is_what_brute_force_finds(module=knowledge):
    for seed in range(300):
        dice = random.Random(seed)
        facts, start, path = any_facts(dice), dice.choice(NAMES), dice.choices(["r", "s", "~r", "~s"], k=dice.randint(1, 3))
        graph, chains = graph_of(facts, module), [[]]
        for relation in path:
            longer = []
            for chain in chains:
                here = chain[-1][1] if chain else start
                for s, r, o in {fact[:3] for fact in facts}:
                    if r != relation.lstrip("~"): continue
                    if relation[0] == "~" and o == here: longer.append([*chain, ((s, r, o), s)])
                    if relation[0] != "~" and s == here: longer.append([*chain, ((s, r, o), o)])
            chains = longer
        found = graph.follow(start, path)
        assert sorted([tuple(map(tuple, chain)) for chain in found]) == sorted([tuple(step[0] for step in chain) for chain in chains])
        assert sorted(graph.ask(start, path)) == sorted({chain[-1][1] for chain in chains})


def test_what_one_document_told_is_forgotten_and_nothing_else(module=knowledge):
    for seed in range(200):
        dice = random.Random(seed)
        facts, document = any_facts(dice), dice.choice("xyz")
        graph, other = graph_of(facts, module), graph_of([fact for fact in facts if fact[3] != document], module)
        before = len(graph)
        assert graph.forget(document) == before - len(graph)
        assert set(graph) == set(other) and len(graph) == len(other)
        for fact in graph: assert set(graph.sources(fact)) == set(other.sources(fact))
        for name in NAMES:
            for relation in ("r", "~s"): assert sorted(graph.about(name, relation)) == sorted(other.about(name, relation))
        assert {k: set(v) for k, v in graph.conflicts("r").items()} == {k: set(v) for k, v in other.conflicts("r").items()}


def test_conflicts_and_the_order_of_answers(module=knowledge):
    graph = graph_of([("a", "r", "b", "x"), ("a", "r", "c", "x"), ("a", "r", "c", "y"), ("d", "r", "b", "x"), ("a", "s", "e", "x")], module)
    assert graph.conflicts("r") == {"a": [Triple("a", "r", "b"), Triple("a", "r", "c")]}
    assert graph.ask("a", ["r"]) == ["c", "b"]  # two sources first
    graph.add(("a", "r", "b"), Source("x"))  # the same one again counts once
    assert len(graph.sources(("a", "r", "b"))) == 1
    graph.add(("a", "r", "b"), Source("x", 5, 9))  # another place in it
    assert graph.sources(("a", "r", "b")) == [Source("x"), Source("x", 5, 9)]


@pytest.mark.parametrize("fact", [("a", "r", "b"), ("小明", "住在", "北京"), ('"', "\\", "\u2028"), ("a\nb", "r", " ")])
def test_a_file_gives_the_same_graph(tmp_path, fact):
    graph = KnowledgeGraph([(Triple(*fact), Source("one", 2, 3)), (Triple(*fact), Source("two")), (Triple("x", "r", "y"), Source("one"))])
    graph.save(tmp_path / "g.jsonl")
    again = KnowledgeGraph.load(tmp_path / "g.jsonl")
    assert list(again) == list(graph) and [again.sources(f) for f in again] == [graph.sources(f) for f in graph]


START = '{"subject": "a", "relation": "r", "object": '


@pytest.mark.parametrize("line", ["{", "[]", "3", "[" * 3000, '{"subject": "a"}', START + '"", "sources": [["x", 0, 1]]}',
                                  START + '"b", "sources": [["x"]]}', START + '"b", "sources": 3}'])
def test_a_line_that_is_no_fact_is_named(tmp_path, line):
    path = tmp_path / "g.jsonl"
    path.write_text(f'{START}"b", "sources": [["x", 0, 1]]}}\n{line}\n')
    with pytest.raises(KnowledgeError, match="Line 2 of"): KnowledgeGraph.load(path)


BAD_FACTS = [("a", "r"), "abc", ("a", "r", 3), ("", "r", "b"), ("a", "~r", "b"), None, 7]


@pytest.mark.parametrize("fact", BAD_FACTS)
def test_what_is_no_fact(fact):
    with pytest.raises(KnowledgeError, match="is no fact|reads a relation backwards"): KnowledgeGraph().add(fact, Source("x"))


@pytest.mark.parametrize("source", ["x", None, (), ("x",), (1, 2, 3), ("", 0, 0)])
def test_what_is_no_source(source):
    with pytest.raises(KnowledgeError, match="is no source"): KnowledgeGraph().add(("a", "r", "b"), source)


def test_paths_that_cannot_be():
    graph = graph_of([("a", "r", "b", "x")])
    with pytest.raises(KnowledgeError, match="path is one text"): graph.follow("a", "r")
    with pytest.raises(KnowledgeError, match="path is empty"): graph.follow("a", [])
    with pytest.raises(KnowledgeError, match="are texts"): graph.follow("a", [3])
    assert graph.follow("nobody", ["r"]) == [] and graph.ask("a", ["r", "r"]) == []


# ---------------------------------------------------------------- the extractor


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_it_learns_what_it_is_shown(lang, module=knowledge):
    reader = module.TripleExtractor.fit(records(60, 0, lang), module.ExtractorConfig(**vars(SMALL)))
    scores = reader.evaluate(records(30, 1, lang))
    assert scores["relations"].value > .95 and scores["places"].value > .95


def test_pairs_are_the_formula():
    torch.manual_seed(0)
    model = knowledge._Pairs(9, 2, SMALL)
    states = torch.randn(3, 32)
    found = model.pairs(states)
    for r in range(2):
        for i in range(3):
            for j in range(3):
                u = torch.cat([torch.relu(model.subject(states[i])), torch.ones(1)])
                v = torch.cat([torch.relu(model.object(states[j])), torch.ones(1)])
                torch.testing.assert_close(found[r, i, j], u @ model.between[r] @ v)


def test_scores_are_counted_as_by_hand():
    reader = TripleExtractor.fit(records(40, 0), ExtractorConfig(**vars(SMALL) | {"steps": 12}))
    some = records(20, 1)
    said = [set(found) for found in reader.predict([record["text"] for record in some])]
    true = [set(record["relations"]) for record in some]
    hits, n, m = sum(len(a & b) for a, b in zip(said, true)), sum(map(len, said)), sum(map(len, true))
    assert reader.evaluate(some)["relations"].value == pytest.approx(2 * hits / (n + m))


def test_saved_and_loaded_it_says_the_same(tmp_path):
    reader = TripleExtractor.fit(records(40, 0), SMALL)
    texts = [record["text"] for record in records(10, 3)] + ["", "Ann", "Zed lives in Nowhere 3!"]
    reader.save(tmp_path / "r")
    again = TripleExtractor.load(tmp_path / "r")
    assert again.predict(texts) == reader.predict(texts) and again.relations == ("likes", "lives in") and again.config == SMALL
    assert reader.predict(texts)[-3] == []


def test_the_seed_decides():
    a, b = (TripleExtractor.fit(records(20, 0), ExtractorConfig(**vars(SMALL) | {"steps": 5, "seed": seed})) for seed in (0, 0))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))


def test_a_new_word_is_known_by_its_shape():
    reader = TripleExtractor.fit(records(60, 0) + [{"text": "Zoe lives in Bonn.", "relations": [((0, 3), (13, 17), "lives in")]}] , SMALL)
    assert {"Zoe", "Bonn"}.isdisjoint(reader.vocabulary) and "Ann" in reader.vocabulary
    assert reader._ids("Zoe zoe z3 ≈", [(0, 3), (4, 7), (8, 10), (11, 12)], "text") == [1, 2, 3, 4]


def ask(text: Any, relations: Any) -> None: TripleExtractor.fit([{"text": text, "relations": relations}], SMALL)


BAD = {
    "no records": (lambda: TripleExtractor.fit([]), "There are no records"),
    "a text": (lambda: TripleExtractor.fit("abc"), "give a list of records"),
    "a number": (lambda: TripleExtractor.fit(3), "give a list of records"),
    "no relations": (lambda: ask("Ann lives.", []), "No record has a relation"),
    "no text": (lambda: TripleExtractor.fit([{"relations": []}]), "Record 0 is none"),
    "outside": (lambda: ask("Ann", [((0, 3), (4, 9), "r")]), "is no place in a text of 3 characters"),
    "backwards": (lambda: ask("Ann", [((3, 0), (0, 3), "r")]), "is no place"),
    "not whole": (lambda: ask("Ann Bo", [((0, 2.5), (4, 6), "r")]), "is no place"),
    "two parts": (lambda: ask("Ann Bo", [((0, 3), (4, 6))]), "triples of two places"),
    "half a word": (lambda: ask("Ann Bo", [((0, 2), (4, 6), "r")]), "Record 0: The span .* does not begin and end with a token"),
    "overlap": (lambda: ask("Ann Bo", [((0, 3), (0, 6), "r")]), "overlaps another"),
    "too long": (lambda: ask("a " * 40 + "b", [((0, 1), (2, 3), "r")]), "Record 0 has 41 tokens and the model reads 32: cut it"),
    "one text": (lambda: TripleExtractor.fit(records(5, 0), SMALL).predict("abc"), "texts is one text"),
    "a number to read": (lambda: TripleExtractor.fit(records(5, 0), SMALL).predict([3]), "Text 0 is int"),
    "heads": (lambda: ExtractorConfig(d_model=30), "must be a multiple of n_head"),
    "no steps": (lambda: ExtractorConfig(steps=0), "steps=0 must be"),
    "no rate": (lambda: ExtractorConfig(lr=0.), "lr=0.0 must be above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case):
    function, message = BAD[case]
    with pytest.raises(KnowledgeError, match=message): function()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {}, "relations": ["r"], "vocabulary": ["a"]}',
                                     '{"config": {"d_model": 0}, "relations": ["r"], "vocabulary": []}', "[" * 3000])
def test_a_folder_that_holds_no_extractor(tmp_path, content):
    with pytest.raises(KnowledgeError, match="holds no extractor"): TripleExtractor.load(tmp_path)
    (tmp_path / "extractor.json").write_text(content)
    with pytest.raises(LmbookError, match="holds no extractor"): TripleExtractor.load(tmp_path)
    reader = TripleExtractor.fit(records(5, 0), ExtractorConfig(**vars(SMALL) | {"steps": 1}))
    reader.save(tmp_path / "r")
    about = json.loads((tmp_path / "r" / "extractor.json").read_text())
    (tmp_path / "r" / "extractor.json").write_text(json.dumps(about | {"relations": ["one"]}))
    with pytest.raises(LmbookError): TripleExtractor.load(tmp_path / "r")  # the weights are those of two relations


# ---------------------------------------------------------------- planted faults

walks, forgets = test_a_walk_is_what_brute_force_finds, test_what_one_document_told_is_forgotten_and_nothing_else
orders = test_conflicts_and_the_order_of_answers
RIGHT = "true[self.relations.index(name), number[subject], number[object]]"


def learns(module: ModuleType) -> None: test_it_learns_what_it_is_shown("en", module)


FAULTS = {
    "backwards is forwards": ("fact.subject if relation.startswith", "fact.object if relation.startswith", walks),
    "the other index": ("list(self._to.get((subject, relation[1:]), ()))", "list(self._from.get((subject, relation[1:]), ()))", walks),
    "an edge stays": (", self._to[fact.object, fact.relation][fact]", "", forgets),
    "all is forgotten": ("if source.document != document]", "if source.document == document]", forgets),
    "few sources first": ("key=lambda name: -ends[name]", "key=lambda name: ends[name]", orders),
    "one is a conflict": ("if len(facts) > 1}", "if len(facts) > 0}", orders),
    "subject and object": (RIGHT, "true[self.relations.index(name), number[object], number[subject]]", learns),
    "no tags are learned": ("total = F.cross_entropy(told[there", "total = 0 * F.cross_entropy(told[there", learns),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(knowledge, old, new, monkeypatch)
    with pytest.raises((AssertionError, KeyError)): check(module=faulty)
