"""Notebooks as the tests see them: as they are on disk (nothing repaired), their code as syntax trees, their prose as tokens."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from markdown_it import MarkdownIt
from markdown_it.token import Token
from nbformat import NotebookNode

import tools.notebooks

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PREFACE = "index"  # stands before chapter 00
UNNUMBERED = {PREFACE, "glossary"}


def syntax(source: str) -> ast.Module:
    "The syntax tree of a cell, its magics turned into calls. A cell that is no Python gives an empty tree: running it shows the error."
    try: return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError: return ast.Module([], [])


def called(call: ast.Call) -> str:
    "The name under which something is called: `f` of `f(...)` and of `a.b.f(...)`."
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def contains_check(source: str) -> bool:
    "Whether a cell asserts something: `assert`, `check_claim(...)`, `assert_close(...)` and its relatives."
    nodes = list(ast.walk(syntax(source)))
    calls = {called(n) for n in nodes if isinstance(n, ast.Call)}
    return any(isinstance(n, ast.Assert) for n in nodes) or "check_claim" in calls or any(c.startswith("assert_") for c in calls)


def directive(source: str, name: str) -> str | None:
    "The value of `#| name: value` (or `#| name value`, as nbdev writes it) in a cell; None where there is none."
    match = re.search(rf"^#\|[ \t]*{re.escape(name)}\b:?[ \t]*(.*)$", source, re.MULTILINE)
    return match[1].strip().strip("\"'") if match else None


def markdown(source: str) -> list[Token]:
    "The CommonMark tokens of a Markdown cell (with tables)."
    return MarkdownIt("commonmark").enable("table").parse(source)


@dataclass(frozen=True)
class Page:
    "A notebook with its name, and the homes of the book's modules."

    stem: str  # "10_corpora"
    nb: NotebookNode
    homes: dict[str, str] = field(default_factory=dict)  # module -> name of the notebook that exports it

    @property
    def number(self) -> str | None:
        "The number in its name, with its letter if it has one; None for the preface."
        return m[0] if (m := re.match(r"\d+[a-z]?(?=_)", self.stem)) else None

    @property
    def code(self) -> list[NotebookNode]: return [c for c in self.nb.cells if c.cell_type == "code" and c.source.strip()]

    @property
    def prose(self) -> list[NotebookNode]: return [c for c in self.nb.cells if c.cell_type == "markdown"]

    @cached_property
    def module(self) -> str | None:
        "The module that this notebook exports to: `corpora`."
        return next((d for c in self.code if (d := directive(c.source, "default_exp"))), None)

    def headings(self) -> Iterator[tuple[int, int, str]]:
        "Each heading: the index of its cell, its level, its text."
        for i, cell in enumerate(self.nb.cells):
            if cell.cell_type != "markdown": continue
            tokens = markdown(cell.source)
            for opened, inline in zip(tokens, tokens[1:]):
                if opened.type == "heading_open": yield i, int(opened.tag[1]), inline.content

    def sections(self) -> list[list[str]]:
        "For each cell the headings above it from level 2 down, outermost first."
        found, stack, rows = list(self.headings()), [], []
        for i in range(len(self.nb.cells)):
            for _, level, text in (h for h in found if h[0] == i): stack = [*(h for h in stack if h[0] < level), (level, text)]
            rows.append([text for level, text in stack if level > 1])
        return rows


def read(path: Path) -> NotebookNode:
    "A notebook as it is on disk: `nbformat.read` would quietly give a cell without an id a random one."
    return nbformat.v4.reads(path.read_text(encoding="utf-8"))


def book(folder: Path = NBS) -> list[Page]:
    "All notebooks in reading order."
    homes: dict[str, str] = {}
    pages = [Page(p.stem, read(p), homes) for p in tools.notebooks.notebooks(folder=folder)]
    homes |= {p.module: p.stem for p in pages if p.module}
    return pages
