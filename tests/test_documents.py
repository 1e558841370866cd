"""The claims as a table: rules, selections, counts, JSON, and links that lead to the cells; lists that are wrong; planted faults."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

import lmbook.documents as documents
from docs import stage
from lmbook.claims import Claim, load_claims
from lmbook.documents import VERDICT_NAMES, ClaimTable, DocumentsError, evidence_link, verdict_name
from tests.faults import planted
from tests.pages import ROOT, book, called, syntax

CLAIM = Claim("D1-01", "2.1", "fact", "core", "One <b> is two & more.", "Count.", "wrong", "It is not.", "01_core#What a test needs")
PAGES = {page.stem: page for page in book()}
CHAPTER = PAGES["90_documents"]
RAW = tomllib.loads((ROOT / "lmbook/data/claims.toml").read_text(encoding="utf-8"))["claim"]
# Claims that had no verdict when this chapter was written; the set may only become smaller, and is empty when the book is whole.
WAITING: set[str] = set()


def small(**changes: str) -> ClaimTable: return ClaimTable([replace(CLAIM, **changes)])


# ---------------------------------------------------------------- the book's own list


def check_counts(module: ModuleType = documents) -> None:
    table = module.ClaimTable()
    for by, key in (("document", lambda row: row["id"][:2]), ("kind", lambda row: row["kind"])):
        expected: Counter[tuple[str, str]] = Counter()
        for row in RAW:
            verdict = row.get("verdict", "open")
            expected[key(row), "holds if" if verdict.startswith("holds if ") else verdict] += 1
        found = table.counts(by)
        assert list(found) == sorted({name for name, _ in expected}) and all(tuple(row) == VERDICT_NAMES for row in found.values())
        assert {(r, v): n for r, row in found.items() for v, n in row.items() if n} == dict(expected)


def test_counts_are_those_of_the_file(): check_counts()


def check_json(module: ModuleType = documents) -> None:
    rows = json.loads(module.ClaimTable().to_json())
    assert [row["id"] for row in rows] == [row["id"] for row in RAW] and len(rows) == 107
    for row, raw in zip(rows, RAW):
        verdict = " ".join(filter(None, [row["verdict"], row["condition"]]))
        assert verdict == raw.get("verdict", "") and (row["finding"] or "") == raw.get("finding", "")
        assert (row["says"], row["test"], row["section"], row["kind"], row["document"]) == (
            raw["says"], raw["look"], raw["where"], raw["kind"], raw["id"][:2],
        )  # fmt: skip


def test_the_json_says_all_that_the_file_says(): check_json()


def test_only_claims_that_wait_for_their_chapter_are_open():
    assert {claim.id for claim in ClaimTable().only(verdict="open")} <= WAITING


def headings(stem: str) -> set[str]: return {stage.heading_anchor(stage.plain(text)) for _, _, text in PAGES[stem].headings()}


def check_links(module: ModuleType = documents) -> None:
    for claim in module.ClaimTable():
        if not claim.verdict: continue
        page, _, anchor = module.evidence_link(claim).partition(".ipynb#")
        assert anchor in headings(page), f"{claim.id}: {page} has no heading {anchor}"


def test_each_link_leads_to_a_heading(): check_links()


def test_links_of_the_chapter_lead_to_headings():
    links = [link for cell in CHAPTER.prose for link in re.findall(r"\]\((\w+)\.ipynb(?:#([^)\s]+))?\)", cell.source)]
    assert len(links) > 40
    for page, anchor in links: assert page in PAGES and (not anchor or anchor in headings(page)), (page, anchor)


def test_what_the_chapter_calls_right_is_linked_where_it_was_found():
    "Three claims for each document; the paragraph above the cell links the evidence of each."
    cells, seen = CHAPTER.nb.cells, []
    for above, cell in zip(cells, cells[1:]):
        if cell.cell_type != "code" or not cell.source.startswith("right("): continue
        ids = re.findall(r"D\d-\d\d", cell.source)
        for id in ids: assert evidence_link(load_claims()[id]) in above.source
        seen.append({id[:2] for id in ids})
        assert len(ids) == 3
    assert seen == [{f"D{n}"} for n in range(1, 6)]


def test_every_document_has_its_repair():
    "Between the cell of what is right and the next document: a cell of code that asserts."
    for n in range(1, 6):
        here = [c for c, heads in zip(CHAPTER.nb.cells, CHAPTER.sections()) if any(h.startswith(f"D{n}:") for h in heads)]
        within = [c for c in here if c.cell_type == "code"]
        assert any("assert" in cell.source for cell in within) and len(within) >= 2


def cited() -> list[tuple[str, ...]]:
    "The table of the reading lists, from the cell that holds it."
    [cell] = [c for c in CHAPTER.code if c.source.startswith("CITED")]
    scope: dict = {}
    exec(cell.source, scope)
    return scope["CITED"]


def test_the_reading_lists_are_complete_and_judged():
    rows = cited()
    assert all(len(row) == 6 and row[0] in {"D1", "D2", "D3", "D4", "D5"} and row[2] and row[3] for row in rows)
    assert len({(row[0], row[2]) for row in rows}) == len(rows)
    assert all(row[5] for row in rows if row[4] != "not found"), "what there is has to be said"
    documents = ROOT.parent / "shared" / "documents"  # they are no part of the repository
    if not documents.is_dir(): pytest.skip("the documents are not here")
    for row in rows:
        [path] = documents.glob(f"{row[0]}-*.txt")
        text = re.sub(r"\W+", "", path.read_text(encoding="utf-8")).casefold()
        title = re.split(r" \(|, | \.\.\.", row[2])[0]
        english = re.search(r"\((.*)\)", row[2])
        names = [title, *([english[1]] if english else [])]
        cut = re.sub(r"\W+", "", row[2]).casefold()
        assert any(re.sub(r"\W+", "", name).casefold() in text for name in names) or cut in text, row[2]


def test_the_checks_sort_wrong_claims_only_once():
    [cell] = [c for c in CHAPTER.code if c.source.startswith("FOUND_BY")]
    ids = re.findall(r"D\d-\d\d", cell.source)
    wrong = {c.id for c in ClaimTable().only(verdict="wrong")}
    assert len(ids) == len(set(ids)) and set(ids) <= wrong and wrong - set(ids) <= WAITING


# ---------------------------------------------------------------- names, selections, what it shows


@pytest.mark.parametrize("verdict, name", [("", "open"), ("holds", "holds"), ("wrong", "wrong"), ("holds if x is one-hot", "holds if"),
                                           ("cannot be checked here", "cannot be checked here")])  # fmt: skip
def test_the_name_of_a_verdict(verdict, name): assert verdict_name(replace(CLAIM, verdict=verdict)) == name


@pytest.mark.parametrize("verdict", ["maybe", "holds if", "holds if ", "open", "holdsif x", "HOLDS", " "])
def test_other_verdicts_are_refused(verdict):
    with pytest.raises(DocumentsError, match="has the verdict"): verdict_name(replace(CLAIM, verdict=verdict))


def test_links_of_evidence():
    for evidence in (CLAIM.evidence, "01_core.ipynb#What a test needs"):
        assert evidence_link(replace(CLAIM, evidence=evidence)) == "01_core.ipynb#What-a-test-needs"
    assert evidence_link(replace(CLAIM, evidence="")) == ""
    for bad in ("01_core", "#heading", "01_core#", "../x#y", "01_core# ", 'a"b#c'):
        with pytest.raises(DocumentsError, match="notebook#heading"): evidence_link(replace(CLAIM, evidence=bad))


def test_selections():
    table = ClaimTable()
    assert [c.id for c in table.pick("D3-13", "D1-01")] == ["D3-13", "D1-01"] and len(table.pick()) == 0
    wrong = table.only(document="D3", kind="number", verdict="wrong")
    assert {c.id for c in wrong} == {"D3-11", "D3-12", "D3-13"} and len(table.only()) == 107
    assert sum(len(table.only(document=f"D{n}")) for n in range(1, 6)) == 107 and len(table.only(document="D9")) == 0
    for say, call in {
        "no claim 'D9-01'": lambda: table.pick("D9-01"), "give a name like 'D3'": lambda: table.only(document="3"),
        "kind='opinion'": lambda: table.only(kind="opinion"), "verdict='right'": lambda: table.only(verdict="right"),
        "by='chapter'": lambda: table.counts("chapter"),
    }.items():  # fmt: skip
        with pytest.raises(DocumentsError, match=re.escape(say)): call()


@pytest.mark.parametrize("claims, says", [
    (3, "claims is int"), (["D1-01"], "claims holds str"), ([replace(CLAIM, id="D1-1")], "an id is like"),
    ([CLAIM, CLAIM], "is there twice"),
    ([replace(CLAIM, evidence="")], "give both or none"), ([replace(CLAIM, verdict="")], "give both or none"),
    ([replace(CLAIM, verdict="yes")], "has the verdict 'yes'"),
])  # fmt: skip
def test_lists_that_do_not_hold_together(claims, says):
    with pytest.raises(DocumentsError, match=re.escape(says)): ClaimTable(claims)


def check_html(module: ModuleType = documents) -> None:
    shown = module.ClaimTable([CLAIM])._repr_html_()
    assert "One &lt;b&gt; is two &amp; more." in shown and "<details open>" in shown
    assert '<a href="01_core.ipynb#What-a-test-needs" title="D1-01">01 core: What a test needs</a>' in shown
    whole = module.ClaimTable()._repr_html_()
    assert whole.count("<tr>") == 107 and "<details open>" not in whole
    assert whole.count("<a ") == sum("verdict" in row for row in RAW) == len(stage.EVIDENCE.findall(whole))


def test_what_it_shows():
    check_html()
    assert repr(small()) == "wrong (1): D1-01" and repr(ClaimTable([])) == "no claims" == ClaimTable([])._repr_html_()
    text = repr(ClaimTable())
    assert max(map(len, text.splitlines())) <= 88 and len(re.findall(r"D\d-\d\d", text)) == 107


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "claims.json"
    path.write_text("old", encoding="utf-8")
    ClaimTable().save(path)
    assert path.read_text(encoding="utf-8") == ClaimTable().to_json() and [p.name for p in tmp_path.iterdir()] == ["claims.json"]
    for bad in (tmp_path, path / "x.json", "a\0b"):
        with pytest.raises(DocumentsError): ClaimTable().save(bad)


# ---------------------------------------------------------------- the site


def test_the_site_links_the_cell_that_checks_a_claim():
    shown = {"text/html": ClaimTable([CLAIM])._repr_html_(), "text/plain": "x"}
    cell = new_code_cell("book", outputs=[new_output("execute_result", shown)])
    stage._prepare(cell, stage.Chapter("90_x", nbformat.v4.new_notebook()), "lmbook")
    assert '<a href="01_core.html#check-D1-01"' in cell.outputs[0].data["text/html"] and ".ipynb" not in cell.outputs[0].data["text/html"]


def calls(source: str) -> Iterator[ast.Call]:
    for node in ast.walk(syntax(source)):
        if isinstance(node, ast.Call) and called(node) == "check_claim" and node.args and isinstance(node.args[0], ast.Constant): yield node


def test_the_anchors_of_those_links_are_there():
    "Each claim with a verdict is checked in a cell of the notebook to which its link leads."
    checked = {(page.stem, node.args[0].value) for page in PAGES.values() for cell in page.code for node in calls(cell.source)}
    for claim in ClaimTable():
        if claim.verdict: assert (evidence_link(claim).partition(".ipynb")[0], claim.id) in checked


# ---------------------------------------------------------------- planted faults


@pytest.mark.parametrize("old, new, check", [
    ('c.verdict[9:] if name == "holds if"', 'c.verdict[8:] if name == "holds if"', check_json),
    ('"finding": c.finding or None', '"finding": c.says', check_json),
    ('row[verdict_name(claim)] += 1', 'row[claim.verdict.split(" ")[0] if claim.verdict != "holds if" else ""] = 1', check_counts),
    ('claim.id[:2] if by == "document" else claim.kind, dict', 'claim.id[:2], dict', check_counts),
    (".replace(' ', '-')", ".replace(' ', '-').lower()", check_links),
    ('html.escape(c.says) + (', 'c.says + (', check_html),
    ('title="{c.id}"', 'title="{name}"', check_html),
])  # fmt: skip
def test_planted_faults_are_found(old, new, check, monkeypatch):
    faulty = planted(documents, old, new, monkeypatch)
    with pytest.raises((AssertionError, KeyError)): check(faulty)
