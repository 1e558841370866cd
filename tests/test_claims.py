"""The list of the documents' claims: complete, and each verdict shown by exactly one executed cell, where the list says so."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.pages import PREFACE, ROOT, Page, book, called, syntax
from tools.notebooks import findings

CLAIMS = tomllib.loads((ROOT / "lmbook/data/claims.toml").read_text(encoding="utf-8"))["claim"]
PER_DOCUMENT = {"D1": 26, "D2": 23, "D3": 24, "D4": 14, "D5": 20}  # 107 in all
VERDICT = r"holds|holds if \S.*|wrong|cannot be checked here"
KINDS = {"listing", "formula", "number", "method", "fact"}
WANTED = {"id", "where", "kind", "chapter", "says", "look"}
JUDGED = {"verdict", "finding", "evidence"}


def slug(text: str) -> str:
    "A heading as the last part of an address."
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


@dataclass(frozen=True)
class Call:
    "A call of check_claim in a notebook."

    id: str
    page: str  # the notebook's name
    headings: list[str]  # above it, outermost first
    shown: bool  # whether the cell was run and the claim's box is in its output
    found: str  # the finding in that box


def calls(page: Page) -> Iterator[Call]:
    "The calls that judge claims of the book's list. The preface also shows the machinery on a list of its own, `claims=...`."
    for cell, headings in zip(page.nb.cells, page.sections()):
        if cell.cell_type != "code": continue
        outputs = [text for out in cell.outputs for text in out.get("data", {}).values()]
        for node in ast.walk(syntax(cell.source)):
            if not isinstance(node, ast.Call) or called(node) != "check_claim": continue
            if page.stem == PREFACE and any(k.arg == "claims" for k in node.keywords): continue
            first = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "claim_id"), None)
            claim = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ast.unparse(node)[:60]
            shown = cell.execution_count is not None and any(claim in str(text) for text in outputs)
            yield Call(claim, page.stem, headings, shown, findings(page.nb).get(claim, ""))


def list_problems(claims: list[dict]) -> Iterator[str]:
    "What is wrong with the list itself."
    ids = [c.get("id", "") for c in claims]
    wanted = [f"{d}-{n:02}" for d, count in PER_DOCUMENT.items() for n in range(1, count + 1)]
    yield from (f"{i} occurs {n} times" for i, n in Counter(ids).items() if n > 1)
    yield from (f"{i} is missing" for i in wanted if i not in ids)
    yield from (f"{i!r} is no claim of the documents" for i in ids if i not in wanted)
    for claim in claims:
        name, filled = claim.get("id"), {k for k, v in claim.items() if str(v).strip()}
        if WANTED - filled: yield f"{name}: without {sorted(WANTED - filled)}"
        if claim.keys() - WANTED - JUDGED: yield f"{name}: unknown fields {sorted(claim.keys() - WANTED - JUDGED)}"
        if claim.get("kind") not in KINDS: yield f"{name}: kind {claim.get('kind')!r}"
        given = JUDGED & filled
        if given and given != JUDGED: yield f"{name}: has {sorted(given)}, but no {sorted(JUDGED - given)}"
        if "verdict" in given and not re.fullmatch(VERDICT, claim["verdict"]): yield f"{name}: verdict {claim['verdict']!r}"
        if "evidence" in given and not re.fullmatch(r"[^#\s]+#\S.*", claim["evidence"]): yield f"{name}: evidence is not notebook#heading"


def evidence_problems(claims: list[dict], pages: list[Page]) -> Iterator[str]:
    "What does not fit between the list and the cells: verdicts that no cell shows where they say, cells that judge what has no verdict."
    found = [call for page in pages for call in calls(page)]
    judged = {c["id"]: c for c in claims if c.get("verdict")}
    for call in found:
        if call.id not in judged: yield f"{call.page}: check_claim({call.id!r}) has no verdict on file"
    for name, claim in judged.items():
        mine = [call for call in found if call.id == name]
        if len(mine) != 1:
            where = ", ".join(c.page for c in mine)
            yield f"{name}: has the verdict {claim['verdict']!r}, and {len(mine)} cells that check it ({where}), not one"
            continue
        [call], (notebook, _, heading) = mine, claim.get("evidence", "").partition("#")
        if notebook.removesuffix(".ipynb") != call.page: yield f"{name}: checked in {call.page}, the evidence says {notebook!r}"
        elif slug(heading) not in map(slug, call.headings): yield f"{name}: checked under {call.headings}, the evidence says {heading!r}"
        if not call.shown: yield f"{name}: the cell in {call.page} that checks it was not run, or does not show its box"
        elif call.found != claim["finding"]:
            yield f"{name}: {call.page} found {call.found!r}, the list says {claim['finding']!r}: `make run` writes it"


def summary(claims: list[dict] | None = None) -> str:
    "How far the book is, for the end of a test run."
    claims = CLAIMS if claims is None else claims
    waiting = [c["id"] for c in claims if not c.get("verdict")]
    head = f"claims judged {len(claims) - len(waiting)} of {len(claims)}"
    if not waiting: return f"{head}; all are reached"
    rows = [f"not reached yet, {d}: {' '.join(i[3:] for i in waiting if i.startswith(d))}" for d in sorted({i[:2] for i in waiting})]
    return "\n".join([head, *(textwrap.fill(row, 100, initial_indent="  ", subsequent_indent=" " * 23) for row in rows)])


# ---------------------------------------------------------------- on the book


def test_the_list_is_complete_and_well_formed():
    assert sum(PER_DOCUMENT.values()) == 107
    assert list(list_problems(CLAIMS)) == []


def test_each_verdict_is_shown_by_one_cell():
    assert list(evidence_problems(CLAIMS, book())) == []


# ---------------------------------------------------------------- on broken ones

CHECK = "check_claim('D1-01', holds=True, finding='Found.')"


def small(verdict: str = "wrong", finding: str = "It is.", evidence: str = "01_one#The claim", **more) -> list[dict]:
    "All claims unjudged, but for the first."
    rows = [{k: v for k, v in c.items() if k in WANTED} for c in CLAIMS]
    judged = {k: v for k, v in {"verdict": verdict, "finding": finding, "evidence": evidence}.items() if v}
    return [rows[0] | judged | more, *rows[1:]]


def cell(source: str = CHECK, count: int | None = 1, box: str = "D1-01 wrong\n  says:  It is not.\n  found: It is."):
    outputs = [new_output("execute_result", {"text/plain": box}, execution_count=1)] if box else []
    return new_code_cell(source, execution_count=count, outputs=outputs)


def chapter(*cells, stem: str = "01_one", heading: str = "## The *claim*") -> Page:
    return Page(stem, new_notebook(cells=[new_markdown_cell("# Title"), new_markdown_cell(heading), *cells, new_markdown_cell("## Later")]))


LISTS: list[tuple[list[dict], str]] = [
    (small()[1:], "D1-01 is missing"),
    ([*small(), small()[5]], "D1-06 occurs 2 times"),
    ([*small(), small()[5] | {"id": "D1-27"}], "'D1-27' is no claim"),
    (small(says=""), "D1-01: without ['says']"),
    (small(kind="opinion"), "kind 'opinion'"),
    (small(note="x"), "unknown fields ['note']"),
    (small(verdict="maybe"), "verdict 'maybe'"),
    (small(verdict="holds if "), "verdict 'holds if '"),
    (small(finding=""), "but no ['finding']"),
    (small(evidence=""), "but no ['evidence']"),
    (small(verdict=""), "but no ['verdict']"),
    (small(evidence="01_one"), "is not notebook#heading"),
]
EVIDENCE: list[tuple[list[dict], Callable[[], list[Page]], str]] = [
    (small(), lambda: [chapter()], "and 0 cells that check it"),
    (small(), lambda: [chapter(cell(), cell())], "and 2 cells that check it"),
    (small(), lambda: [chapter(cell()), chapter(cell(), stem="02_two")], "(01_one, 02_two), not one"),
    (small(), lambda: [chapter(cell(), stem="02_two")], "checked in 02_two, the evidence says '01_one'"),
    (small(evidence="01_one#later"), lambda: [chapter(cell())], "the evidence says 'later'"),
    (small(), lambda: [chapter(cell(count=None))], "was not run"),
    (small(), lambda: [chapter(cell(box=""))], "does not show its box"),
    (small(), lambda: [chapter(cell(box="D1-02 wrong"))], "does not show its box"),
    (
        small(finding="It is 0.12."),
        lambda: [chapter(cell(box="D1-01 wrong\n  says:  No.\n  found: It is 0.13."))],
        "01_one found 'It is 0.13.', the list says",
    ),
    (small(), lambda: [chapter(cell(f"'''{CHECK}'''"))], "and 0 cells"),
    (small(verdict="", finding="", evidence=""), lambda: [chapter(cell())], "check_claim('D1-01') has no verdict on file"),
    (small(), lambda: [chapter(cell(), cell(CHECK.replace("D1-01", "D9-01")))], "check_claim('D9-01') has no verdict"),
    (small(), lambda: [chapter(cell(), cell("for i in 'ab': check_claim(i, wrong=True, finding='')"))], "has no verdict on file"),
    (small(), lambda: [chapter(cell(), cell("check_claim('D0-01', claims=ours, wrong=True, finding='')"))], "'D0-01') has no verdict"),
]


@pytest.mark.parametrize("claims, says", LISTS, ids=[says for _, says in LISTS])
def test_a_broken_list(claims, says):
    assert says in "\n".join(list_problems(claims))


@pytest.mark.parametrize("claims, pages, says", EVIDENCE)
def test_broken_evidence(claims, pages, says):
    assert says in "\n".join(evidence_problems(claims, pages()))


@pytest.mark.parametrize("evidence", ["01_one#The claim", "01_one#the-claim", "01_one.ipynb#the-claim"])
@pytest.mark.parametrize("verdict", ["wrong", "holds", "holds if it is small", "cannot be checked here"])
def test_good_evidence(evidence, verdict):
    claims, own = small(verdict, evidence=evidence), cell("check_claim('D0-01', claims=ours, wrong=True, finding='')")
    magic = cell("%time 1\nresult = lmbook.claims.check_claim(claim_id='D1-01', wrong=True, finding='')\nresult")
    closer = chapter(cell(), heading="## The claim\n\n### Closer")
    for pages in ([chapter(cell())], [chapter(magic)], [closer], [chapter(own, stem=PREFACE), chapter(cell())]):
        assert list(list_problems(claims)) == [] and list(evidence_problems(claims, pages)) == []


def test_what_is_not_reached_is_listed():
    text = summary(small())
    assert text.startswith("claims judged 1 of 107\n") and max(map(len, text.splitlines())) <= 100
    named = re.findall(r"\b\d\d\b", text.partition("\n")[2])
    assert len(named) == 106 and "D1: 02 03" in text
    assert "all are reached" in summary([c | {"verdict": "wrong"} for c in small()])
