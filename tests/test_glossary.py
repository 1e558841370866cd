"""The glossary: every term that a chapter sets in bold type stands in it, and every entry says where it is explained."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from docs import stage
from tests.pages import UNNUMBERED, Page, book

PAGES = {page.stem: page for page in book()}
TERMS = stage.glossary(PAGES[stage.GLOSSARY].nb)


def unknown(page: Page, terms: dict[str, stage.Term]) -> Iterator[str]:
    """What a chapter sets in bold type and the glossary lacks.

    The first words of a paragraph that end in a point or a colon are its heading, and no term; neither are Chinese characters and numbers.
    """
    for cell in page.prose:
        for match in stage.bold(cell.source):
            words, before, after = match["term"], cell.source[: match.start()], cell.source[match.end() :]
            heading = words[-1] in ".:?!," or before.endswith(("\n", "- ")) and after.startswith((".", ":"))
            if heading or not re.search(r"[A-Za-z]{2}", words) or re.match(r"Exercise\b", words): continue
            if stage.term_of(words, terms) is None: yield words


@pytest.mark.parametrize("name", [n for n in PAGES if n not in UNNUMBERED])
def test_every_bold_term_stands_in_the_glossary(name):
    assert list(unknown(PAGES[name], TERMS)) == [], "set it in italics if it is no term; else nbs/glossary.ipynb wants an entry"


def test_entries_are_complete_and_in_order():
    lines = [line for cell in PAGES[stage.GLOSSARY].prose for line in cell.source.splitlines() if line.startswith("- ")]
    assert len(lines) == len(TERMS) > 200, "an entry is `- **term** (中文): One sentence. [Chapter](NN_chapter.ipynb)`, once"
    names = [t.name for t in TERMS.values()]
    assert names == sorted(names, key=str.casefold)
    assert len({t.anchor for t in TERMS.values()}) == len(TERMS)
    for term in TERMS.values():
        assert re.search(r"[\u4e00-\u9fff]", term.chinese) or term.chinese in ("SLURM", "Kubernetes", "Ray Train"), term
        assert re.fullmatch(r"[A-ZM(].*[.]", term.says), term


@pytest.mark.parametrize("term", TERMS.values(), ids=lambda t: t.anchor)
def test_a_term_is_explained_where_it_says(term):
    text = " ".join(cell.source for cell in PAGES[term.chapter].prose)
    words = [w for w in re.split(r"\W+", term.name.casefold().removesuffix("'s")) if len(w) > 1]
    assert all(re.search(re.escape(word.removesuffix("s")), text.casefold()) for word in words)


def chapter(name: str, *cells: str) -> stage.Chapter:
    return stage.Chapter(name, new_notebook(cells=[new_markdown_cell(text) for text in cells]))


def test_the_first_use_of_a_term_is_a_link():
    entries = chapter(stage.GLOSSARY, '## A\n\n- **accuracy** (准确率): The share that is "right". [Judging](60_judging.ipynb)')
    terms = stage.glossary(entries.notebook)
    once = "# **Accuracy**\n\n`**accuracy**` and **Accuracy.** [**accuracy**](x.ipynb)"
    page = chapter("10_a", once, "**accuracies** **accuracy**\n\n```\n**accuracy**\n```")
    for c in (entries, page): stage.link_terms(c, terms)
    assert '- <a id="term-accuracy"></a>**accuracy**' in entries.notebook.cells[0].source
    first, second = (cell.source for cell in page.notebook.cells)
    says = "The share that is &quot;right&quot;."
    link = f'<a class="reference internal term" href="glossary.html#term-accuracy" title="{says}">**Accuracy.**</a>'
    assert first == f"# **Accuracy**\n\n`**accuracy**` and {link} [**accuracy**](x.ipynb)"
    assert second == "**accuracies** **accuracy**\n\n```\n**accuracy**\n```"


def test_a_term_without_an_entry_is_found():
    page = Page("10_a", chapter("10_a", "**Keep.** and **new word**, **Accuracies**: **把** `**x y**`").notebook)
    assert list(unknown(page, {"accuracy": stage.Term("accuracy", "准确率", "It.", "x")})) == ["new word", "Accuracies"]
