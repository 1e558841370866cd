"""The docs site, built as `make docs` builds it and looked at with a real browser.

All tests of the site are in this file, so that under xdist (`--dist loadfile`) one worker builds it once.
"""

from __future__ import annotations

import base64
import json
import os
import posixpath
import re
import shutil
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import lxml.html
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("playwright", reason="the browser tests need playwright (pip install -e '.[dev]')")
from docs import build, stage
from docs._ext.search import split as split_words
from tests import browser as br
from tools.notebooks import notebooks

ROOT = Path(os.environ.get("LMBOOK_SITE_ROOT", build.DOCS.parent))  # another project, when working on the site itself
DOCS = build.DOCS
OUT = DOCS / "_build" if ROOT == DOCS.parent else ROOT / "_build"
CHAPTERS = [stage.read_chapter(p, "lmbook") for p in notebooks(folder=ROOT / "nbs")]
MODULES = [c.module for c in CHAPTERS if c.module]
PAGES = [c.name for c in CHAPTERS] + ["claims"] + ["api/index", *(f"api/{m}" for m in MODULES)] * bool(MODULES)
GENERATED = ["genindex", "py-modindex", "search"]

pytestmark = pytest.mark.browser


# --- from notebooks to sources: no browser, no build -----------------------------------------------------------------------------


def test_directives_are_taken_out_and_understood():
    source = '#| export\n#| fig-cap: "Loss: *down*\n#|    and down"\n# NBVAL_IGNORE_OUTPUT\n# a comment\nx = 1  # | not one\n'
    directives, shown = stage.split_directives(source)
    assert directives == ["export", 'fig-cap: "Loss: *down* and down"']
    assert shown == "# a comment\nx = 1  # | not one"
    assert stage.options(directives) == {"fig-cap": "Loss: *down* and down"}


def test_defined_names():
    source = "import a\nx, (y, _z) = 1, (2, 3)\nw: int = 4\n@patch\ndef f(self: Cls, n): ...\n"
    source += "class C:\n  def g(self): ...\nasync def h(): ..."
    assert stage.defined_names(source) == ["x", "y", "w", "Cls.f", "C", "h"]


def test_prepared_cells():
    def code(source: str, **keys: object) -> nbformat.NotebookNode: return new_code_cell(source, execution_count=1, **keys)

    cells = [code("#| hide\nimport a"), code("#| default_exp deep.m"), code("#| export\ndef f(): ..."), code("#| echo: false\n1"),
             code('#| fig-cap: "A $x$"\n#| fig-alt: "B"\n1'), code("check_claim('D1-02', holds=True)"),
             code("s", metadata={"tags": ["hide-input"]})]  # fmt: skip
    chapter = stage.Chapter("01_m", new_notebook(cells=cells), module="lmbook.m")
    kept = [c for c in cells if stage._prepare(c, chapter, "lmbook")]
    assert [c.source for c in kept] == ["def f(): ...", "1", "1", "check_claim('D1-02', holds=True)", "s"]
    export, echo, figure, claim, folded = [c.metadata for c in kept]
    assert export == {"tags": ["exported"], "lmbook": {"module": "lmbook.m", "defines": ["f"]}}
    assert echo["tags"] == ["remove-input"] and claim["lmbook"] == {"claims": ["D1-02"]}
    assert figure["mystnb"] == {"figure": {"caption": "A $x$"}, "image": {"alt": "B"}}
    assert folded["tags"] == ["hide-input"] and folded["mystnb"]["code_prompt_show"] == "Show the code"
    assert chapter.definitions == {"lmbook.m": ["f"]} and chapter.number == "01"


def test_headings_leave_out_comments_in_code():
    nb = new_notebook(cells=[new_markdown_cell("# A `b`\n\n```python\n# not a heading\n```\n\n## [C](d.ipynb) *e*")])
    chapter = stage.Chapter("01_m", nb)
    stage._prepare(nb.cells[0], chapter, "lmbook")
    assert chapter.headings == ["A b", "C e"]



def test_how_long_a_chapter_takes():
    text = "# Long\n\n> A promise,\n> of two lines.\n\n" + "word " * 1988 + "\n```\nnot read\n```"
    cells = [new_markdown_cell(text), new_code_cell("1"), new_code_cell("2")]
    cells[2].metadata["tags"] = ["hide-input"]
    assert stage.reading(new_notebook(cells=cells)) == (11, 1997, 1)
    books = new_markdown_cell("Last words.\n\n## References\n\n- A book.")
    assert stage.reading(new_notebook(cells=[*cells, books])) == (11, 1999, 1)
    chapter = stage.Chapter("10_long", new_notebook(cells=cells))
    stage._say_how_long(chapter)
    said = ["> A promise,", "> of two lines.", "", "*About 10 minutes: 1,997 words and 1 cells.*"]
    assert chapter.notebook.cells[0].source.split("\n")[2:6] == said


def test_a_first_reading_of_the_book_is_less_than_25_hours():
    pages = {path.stem: path for path in notebooks()}
    [table] = [cell.source for cell in nbformat.read(pages["index"], 4).cells if "| part | first reading" in cell.source]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    first = [name for row in rows for name in re.findall(r"\]\((\w+)\.ipynb\)", row[2])]
    assert len(first) > 25 and sum(stage.reading(nbformat.read(pages[name], 4))[0] for name in first) < 25 * 60


@pytest.mark.parametrize("evidence", ["01_m#what-is-it", "01_m#What is it?", "01_m.ipynb#What-is-it?"])
def test_evidence_is_found_by_heading_or_slug(evidence):
    chapter = stage.Chapter("01_m", new_notebook(), title="M", headings=["M", "What is it?"])
    assert 'href="01_m.html#check-D1-02"' in stage.evidence_link({"id": "D1-02", "evidence": evidence}, [chapter])


@pytest.mark.parametrize("evidence", ["01_m#Elsewhere", "02_other#What is it?", ""])
def test_evidence_that_is_not_there_stops_the_build(evidence):
    with pytest.raises(ValueError, match="D1-02"):
        stage.evidence_link({"id": "D1-02", "evidence": evidence}, [stage.Chapter("01_m", new_notebook(), headings=["What is it?"])])


def test_chapters_stand_in_the_parts_of_their_numbers():
    layout = {
        "root": "index",
        "parts": [{"from": 0, "caption": "Start"}, {"from": 10, "caption": "Text"}, {"from": 20, "caption": "Learning"}],
    }
    names = ["index", "00_a", "20_b", "29_c"]
    assert stage.toc(layout, [stage.Chapter(n, new_notebook(), title=n[-1].upper()) for n in names], [])["parts"][:-1] == [
        {"caption": "Start", "chapters": [{"file": "00_a", "title": "0. A"}]},
        {"caption": "Learning", "chapters": [{"file": "20_b", "title": "20. B"}, {"file": "29_c", "title": "29. C"}]}]  # fmt: skip
    with pytest.raises(ValueError, match="other.ipynb has no number"): stage.toc(layout, [stage.Chapter("other", new_notebook())], [])


def test_search_splits_chinese_into_pairs():
    assert split_words("the 词向量 of BERT模型, 熵") == ["the", "词向", "向量", "of", "BERT", "模型", "熵"]


def test_npm_packages_are_pinned_and_name_no_address():
    package, text = json.loads((DOCS / "package.json").read_text("utf-8")), (DOCS / "package-lock.json").read_text("utf-8")
    assert package["dependencies"] and all(re.fullmatch(r"\d+\.\d+\.\d+", v) for v in package["dependencies"].values())
    assert '"resolved"' not in text and '"integrity"' in text


# --- the site --------------------------------------------------------------------------------------------------------------------


def built(root: Path, out: Path) -> int:
    "Build as `make docs` does; skip where there is no npm and nothing that it installed before."
    installed = DOCS / "node_modules" / ".package-lock.json"
    if not installed.exists(): br.need(shutil.which("npm"), "npm (Node.js), for MathJax, mermaid and fonts")
    return build.build(root, out)


@pytest.fixture(scope="module")
def build_status() -> int: return built(ROOT, OUT)


@pytest.fixture(scope="module")
def site(build_status) -> Path:
    "The folder of the built site. A page with a warning is written all the same: `test_builds_without_a_warning` fails, others may pass."
    return OUT / "html"


@pytest.fixture(scope="module")
def base(site) -> Iterator[str]:
    with br.served(site) as url: yield url


@pytest.fixture(scope="module")
def chrome() -> Iterator:
    with br.launched() as browser: yield browser


@pytest.fixture
def window(chrome, base) -> Iterator[br.Watched]:
    with br.window(chrome, base) as w: yield w


def test_builds_without_a_warning(build_status):
    assert build_status == 0, "the warnings stand in the captured output"


def looked_at(w: br.Watched, path: str) -> list[str]:
    """What is wrong with a page: on a phone, then on a desk in light and in dark.

    It is loaded once, narrow: formulas are broken into lines for the width that they find.
    """
    w.page.set_viewport_size({"width": 390, "height": 844})
    page = w.open(path, quiet=True)
    problems = [f"phone: {p}" for p in br.width_problems(page)]
    problems += [*br.math_problems(page), *br.diagram_problems(page), *br.figure_problems(page)]
    page.set_viewport_size({"width": 1280, "height": 900})
    for theme in ["light", "dark"]:
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)  # what the theme's menu does
        w.settle()
        problems += [f"{theme}: {p}" for p in [*br.contrast_problems(page), *br.diagram_problems(page)]]
    return [*w.problems, *problems]


@pytest.fixture(scope="module")
def desk(chrome, base) -> Iterator[br.Watched]:
    "A window that stays open for all pages, as a reader's does; what pages share is loaded once."
    with br.window(chrome, base) as w: yield w


@pytest.mark.parametrize("name", [*PAGES, "search"])
def test_page(desk, name):
    assert not (problems := looked_at(desk, f"{name}.html")), "\n".join(problems)


def test_pages_are_the_ones_expected(site):
    have = {p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*.html") if "_static" not in p.parts}
    assert have == {*PAGES, *GENERATED} - ({"py-modindex"} if not MODULES else set())


def source_cells(page, module: str, names: list[str]) -> dict[str, tuple[str, list[str]] | None]:
    "For each name: the code of the cell that the API leads to, and the addresses of the links above it; None if there is no such cell."
    found = page.evaluate("""ids => ids.map((id) => {
        const cell = document.getElementById(id)?.closest("div.cell"), code = cell?.querySelector("div.cell_input pre");
        return code && [code.textContent, [...cell.querySelectorAll(".exported-to a")].map((a) => a.getAttribute("href"))];
    })""", [f"source-{module}.{name}" for name in names])
    return dict(zip(names, found))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=[c.name for c in CHAPTERS])
def test_chapter_shows_what_its_notebook_holds(desk, chapter):
    page = desk.open(f"{chapter.name}.html")
    text = "\n\n".join(c.source for c in chapter.notebook.cells if c.cell_type == "markdown")
    code = [c for c in chapter.notebook.cells if c.cell_type == "code"]
    # Formulas and diagrams.
    assert page.locator("pre.mermaid svg").count() == len(re.findall(r"^```mermaid", text, flags=re.M))
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    if re.search(r"(?<!\\)\$[^$\s]", prose): assert page.locator(".math mjx-container").count() > 0
    # All code, and only what is for readers.
    shown = [s.strip() for s in page.locator("div.cell_input pre").evaluate_all("all => all.map((e) => e.textContent)")]
    assert shown == [c.source.strip() for c in code if c.source]
    assert not [s for s in shown if re.search(r"^\s*#\s*(\||NBVAL_)", s, flags=re.M)]
    for module, names in chapter.definitions.items():
        missing = [name for name, cell in source_cells(page, module, names).items() if not cell]
        assert not missing, f"no anchor where {missing} are defined"
    # Captions and alt texts.
    figures = [c.metadata.get("mystnb", {}) for c in code if any("image/png" in o.get("data", {}) for o in c.outputs)]
    alts = page.locator("div.cell_output img").evaluate_all("all => all.map((e) => e.alt)")
    assert {m["image"]["alt"] for m in figures if "image" in m} <= set(alts)
    assert page.locator("div.cell_output figcaption").count() >= sum("figure" in m for m in figures)
    # Folded cells open.
    details = page.locator("div.cell details.hide")  # and not those of an output
    assert details.count() == sum("hide-input" in c.metadata.get("tags", []) for c in code)
    if details.count():
        folded = details.first.locator("pre").first
        assert not folded.is_visible()
        details.first.locator("summary").click()
        assert folded.is_visible()
    # The download is the notebook as it is in nbs/.
    link = page.locator("a.btn-download-source-button").get_attribute("href")
    assert page.request.get(urljoin(page.url, link)).body() == (ROOT / "nbs" / f"{chapter.name}.ipynb").read_bytes()


def test_copy_button_copies_the_cell(window):
    name = next(c.name for c in CHAPTERS if any(x.cell_type == "code" for x in c.notebook.cells))
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = window.open(f"{name}.html")
    cells = page.locator("div.cell_input div.highlight:visible")
    assert page.locator("div.cell_input button.copybtn").count() == page.locator("div.cell_input div.highlight").count() > 0
    cells.first.hover()
    cells.first.locator("button.copybtn").click()
    page.wait_for_function("document.querySelector('button.copybtn.success')")
    assert page.evaluate("navigator.clipboard.readText()").strip() == cells.first.locator("pre").text_content().strip()


def test_previous_and_next_walk_through_the_book(site):
    for link, pages in (("right-next", PAGES), ("left-prev", PAGES[::-1])):
        seen = [pages[0]]
        while found := re.search(rf'<a class="{link}"\s+href="([^"]+)\.html"', (site / f"{seen[-1]}.html").read_text(encoding="utf-8")):
            seen.append(posixpath.normpath(posixpath.join(posixpath.dirname(seen[-1]), found[1])))
            assert len(seen) <= len(pages), f"{link} leads in a circle: {seen}"
        assert seen == pages


def test_a_reader_turns_the_page(window):
    page = window.open("index.html")
    page.locator("a.right-next").click()
    page.wait_for_load_state("load")
    assert page.url == f"{window.base}{PAGES[1]}.html"
    page.locator("a.left-prev").click()
    page.wait_for_load_state("load")
    assert page.url == f"{window.base}index.html"


def search(page, words: str) -> list[str]:
    "Press the shortcut, type, and return the titles found."
    page.keyboard.press("Control+k")
    field = page.locator("dialog[open] input[type=search], #pst-search-dialog input[type=search]").first
    field.fill(words)
    field.press("Enter")
    page.wait_for_url("**/search.html?*")
    said = "document.querySelector('#search-results .search-summary, #search-results p')?.textContent"
    page.wait_for_function(f"/found|did not match/.test({said} || '')")
    page.wait_for_load_state("networkidle")  # the excerpts
    return page.locator("#search-results ul.search > li > a").all_text_contents()


def test_search_finds_headings(window):
    for chapter in (CHAPTERS[0], CHAPTERS[-1]):
        page = window.open("claims.html")
        heading = chapter.headings[min(1, len(chapter.headings) - 1)]
        found = [title.casefold() for title in search(page, heading)]
        assert any(heading.casefold() in title or chapter.title.casefold() in title for title in found), (heading, found)
        assert not window.problems
    assert search(window.open("index.html"), "qwxzyvword") == []


def test_dark_mode_is_a_click_and_is_kept(window):
    name = next((c.name for c in CHAPTERS if any("```mermaid" in x.source for x in c.notebook.cells)), "index")
    page = window.open(f"{name}.html")
    root, colours = page.locator("html"), {}
    for theme in ["light", "dark"]:
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={theme}]:visible").first.click()
        assert root.get_attribute("data-theme") == theme
        window.settle()
        node = page.locator("pre.mermaid svg .node :is(rect, polygon, circle)").first
        colours[theme] = (page.evaluate("getComputedStyle(document.body).backgroundColor"), node.evaluate("e => getComputedStyle(e).fill"))
    assert all(a != b for a, b in zip(*colours.values())), "page and diagrams change colour"
    assert window.open("claims.html").locator("html").get_attribute("data-theme") == "dark"
    assert not window.problems


def test_menu_on_a_phone(chrome, base):
    with br.window(chrome, base, width=390, height=844) as w:
        page = w.open("claims.html")
        link = page.locator(".bd-sidebar-primary a, dialog a").filter(has_text=CHAPTERS[-1].title).first
        assert not link.is_visible()
        page.locator("button.primary-toggle:visible").first.click()
        page.locator("a.reference.internal:visible").filter(has_text=CHAPTERS[-1].title).first.click()
        page.wait_for_url(f"**/{CHAPTERS[-1].name}.html")
        assert not w.problems


def bare(text: str) -> str:
    "Without what typography changes: quotation marks, dashes, dots; and without code marks."
    return re.sub(r"""[`'"\u2018-\u201f\u2010-\u2015\u2026.\s-]""", "", text)


def test_claims_page_lists_all_claims_by_verdict(window):
    claims = tomllib.loads((ROOT / "lmbook" / "data" / "claims.toml").read_text("utf-8"))["claim"]
    page = window.open("claims.html")
    assert page.locator("[class*='btn-download']").count() == 0, "there is no notebook to download"
    texts = page.locator("div.claim").all_text_contents()
    ids = [re.search(r"D\d-\d+", t)[0] for t in texts]
    assert len(ids) == 107 and sorted(ids) == sorted(c["id"] for c in claims)
    expected = Counter("holds if" if (v := c.get("verdict", "")).startswith("holds if") else v or "not reached yet" for c in claims)
    rows = page.locator("table tbody tr").evaluate_all("rows => rows.map((r) => [...r.cells].map((c) => c.innerText.trim()))")
    counts = {name.casefold(): int(n) for name, n in rows}
    assert counts.pop("all") == 107 and counts == dict(expected)
    by_id = {c["id"]: c for c in claims}
    judged = [bool(by_id[i].get("verdict")) for i in ids]
    assert judged == sorted(judged, reverse=True), "the ones not reached come last"
    for i, text in zip(ids, texts):
        for part in (by_id[i]["says"], by_id[i].get("finding", "")): assert bare(part) in bare(text)


class Links(HTMLParser):
    "The addresses and the anchors of a page."

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.refs: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value and (key in {"href", "src"}): self.refs.append(value)
            if value and (key == "id" or (key == "name" and tag == "a")): self.ids.add(value)


def broken_links(folder: Path) -> list[str]:
    "Links within the site whose page or anchor does not exist."
    pages = {p.resolve(): Links(p) for p in folder.rglob("*.html") if "_static" not in p.parts}
    broken = []
    for path, links in pages.items():
        for ref in links.refs:
            parts = urlsplit(ref)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists(): broken.append(f"{path.relative_to(folder.resolve())}: {ref} does not exist")
            elif anchor and target in pages and anchor not in pages[target].ids: broken.append(f"{path.name}: {ref} has no such anchor")
    return broken


def test_links_and_anchors_exist(site):
    assert not (problems := broken_links(site)), "\n".join(problems)


def test_api_documents_every_exported_name_and_leads_to_its_cell(site):
    "Read as files: it is about addresses, and to set the formulas of all pages once more would take minutes."
    def read(path: Path): return lxml.html.parse(str(path), lxml.html.HTMLParser(encoding="utf-8")).getroot()

    for chapter in CHAPTERS:
        if not any(chapter.definitions.values()): continue
        anchors = {tag.get("id"): tag for tag in read(site / f"{chapter.name}.html").xpath("//*[@id]")}
        for module, names in chapter.definitions.items():
            entries: dict[str, str] = {}  # signature -> the first link to source behind it (a `dl` in a `dt` ends that for lxml)
            last = ""
            for tag in read(site / "api" / f"{module}.html").iter("dt", "a"):
                if tag.tag == "dt" and "sig" in tag.get("class", "").split(): last = tag.get("id") or last
                elif tag.tag == "a" and tag.find_class("viewcode-link"): entries.setdefault(last, tag.get("href"))
            for name in names:
                assert entries.get(f"{module}.{name}") == f"../{chapter.name}.html#source-{module}.{name}", name
                anchor = anchors.get(f"source-{module}.{name}")
                assert anchor is not None, f"{name} has no anchor where it is defined"
                cell = next(tag for tag in (anchor, *anchor.iterancestors()) if "cell" in tag.get("class", "").split())
                code = "".join(pre.text_content() for box in cell.find_class("cell_input") for pre in box.iter("pre"))
                assert name.rpartition(".")[2] in code, f"{name} is not defined where the API says"
                links = [a.get("href") for box in cell.find_class("exported-to") for a in box.iter("a")]
                assert f"api/{module}.html#{module}.{name}" in links, f"no link from {name} to its API entry"


# --- a small site of our own: what the book may not hold today, and what must fail ------------------------------------------------

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR4nGOor6/HihiGlgQAbgBPwSJ5kd8AAAAASUVORK5CYII="
MODULE = '''"Where *text* comes from."
__all__ = ["LIMIT", "Row", "Pair", "Corpus", "entropy"]
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

LIMIT = 5
Row = dict[str, int]

class Pair(NamedTuple):
    "Two texts."
    left: str  # the English one
    right: str = ""

@dataclass(frozen=True)
class Corpus:
    "A corpus with **known** entropy $H$."
    size: int = 3  # how many `documents`
    rows: dict[str, tuple[int, str]] = field(default_factory=dict)

    def draw(self, n: int) -> str:  # the text
        "Draw `n` words; see *args_ and |pipes|."
        return "a" * n


@cache
def entropy(
    text: str,  # (T,) characters
    base: float = 2.0,
) -> float:  # in bits
    "Exact entropy."
    return 0.0
'''


def small_project(root: Path, extra: str = "") -> Path:
    "A project with a preface, a chapter with everything that a chapter may hold, a module, and the book's claims."
    (root / "nbs").mkdir(parents=True)
    (root / "lmbook" / "data").mkdir(parents=True)
    shutil.copy(DOCS.parent / "settings.ini", root)
    claims = (DOCS.parent / "lmbook" / "data" / "claims.toml").read_text("utf-8")
    claims = re.sub(r"^(verdict|finding|evidence) = .*\n", "", claims, flags=re.M)
    judged = 'id = "D1-01"\nverdict = "holds if x < 1"\nfinding = "It *is* so: `a_b`."\nevidence = "10_corpora#词向量"\n'
    (root / "lmbook" / "data" / "claims.toml").write_text(claims.replace('id = "D1-01"\n', judged), encoding="utf-8")
    (root / "lmbook" / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")
    (root / "lmbook" / "corpora.py").write_text(MODULE, encoding="utf-8")
    body = MODULE.split("\n\n", 1)[1]
    wide = "| " + " | ".join(f"a wide column {i}" for i in range(12)) + " |\n" + "| --- " * 12 + "|\n" + "| 1 " * 12 + "|"
    table = "<table border='1' class='dataframe'><tr>" + "<td>1234567890</td>" * 20 + "</tr></table>"
    figure = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure size 640x480>"})
    cells = [
        new_markdown_cell("# Corpora\n\n> Promise.\n\nInline $x^2 + \\boldsymbol{\\alpha} \\in \\mathbb{R}$, `code`, \\$5 and \\$6.\n\n$$\n"
                          "\\mathcal{L} = \\sum_{i=1}^{n} a_i" + " + b_i" * 20 + "\n$$\n\n"
                          "```mermaid\ngraph LR\n  a[Text] --> b[Tokens]\n```\n\n" + wide + "\n\n"
                          "```python\n" + "x = 1; " * 40 + "\n```\n" + extra),
        new_code_cell("#| default_exp corpora", execution_count=1),
        new_code_cell(f"#| export\n{body}", execution_count=2),
        new_markdown_cell("## 词向量\n\n一个句子的熵。 See [the top](index.ipynb#The-Book)."),
        new_code_cell("check_claim('D1-01', holds=True)", execution_count=3, outputs=[new_output("execute_result", {"text/html": table})]),
        new_code_cell('#| fig-cap: "A *black* square"\n# NBVAL_IGNORE_OUTPUT\nplot()', execution_count=4, outputs=[figure]),
        new_code_cell("assert True", execution_count=5, metadata={"tags": ["hide-input"]}),
        new_code_cell("#| hide\nsecret = 1", execution_count=6),
        new_code_cell("print('out')", execution_count=7, outputs=[new_output("stream", text="a line that is longer than a phone " * 9)]),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), root / "nbs" / "10_corpora.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# The Book\n\n[one](10_corpora.ipynb#词向量)")]), root / "nbs" / "index.ipynb")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    root = small_project(tmp_path_factory.mktemp("small"))
    assert built(root, root / "_build") == 0
    return root


def test_everything_a_chapter_may_hold(chrome, small):
    with br.served(small / "_build" / "html") as url, br.window(chrome, url) as w:
        for name in ["10_corpora", "index", "claims", "api/lmbook.corpora"]:
            assert not (problems := looked_at(w, f"{name}.html")), "\n".join(problems)
        page = w.open("10_corpora.html")
        assert page.locator("figcaption").inner_text().strip() == "A black square"
        assert page.locator("figure img").get_attribute("alt") == "A black square"
        assert "secret" not in page.content() and page.locator("div.cell details").count() == 1
        assert page.locator(".chapter-line").inner_text() == "Chapter 10 · lmbook.corpora"
        assert page.locator("[id='check-D1-01'] .text_html, [id='check-D1-01'] table").count() > 0
    assert not broken_links(small / "_build" / "html")


def test_parameters_are_documented_by_their_comments(chrome, small):
    with br.served(small / "_build" / "html") as url, br.window(chrome, url) as w:
        page = w.open("api/lmbook.corpora.html")
        names = ["entropy", "Corpus", "Corpus.draw", "LIMIT", "Pair"]
        entry = {i: page.locator(f"dl:has(> dt[id='lmbook.corpora.{i}']) > dd").first.inner_text() for i in names}
        assert "text – (T,) characters" in entry["entropy"] and "in bits" in entry["entropy"] and "Exact entropy." in entry["entropy"]
        assert "size – how many documents" in entry["Corpus"] and "the text" in entry["Corpus.draw"]
        assert "Draw n words; see *args_ and |pipes|." in entry["Corpus.draw"], "a docstring is Markdown, not reStructuredText"
        assert entry["Pair"].split()[-6:] == ["left", "–", "the", "English", "one", "right"]
        assert "Alias for field" not in page.content()
        assert entry["LIMIT"].strip() == "", "not the docstring of int"
        heads = {i: page.locator(f"dt[id='lmbook.corpora.{i}']").inner_text() for i in names}
        assert "rows: dict[str, tuple[int, str]] = ..." in " ".join(heads["Corpus"].split())
        assert "alias of dict[str, int]" in page.locator("dl:has(> dt[id='lmbook.corpora.Row']) > dd").inner_text()
        assert "new empty dictionary" not in page.content() and heads["entropy"].startswith("entropy(text: str, base: float = 2.0)")
        assert page.locator("dt[id='lmbook.corpora.Corpus.size']").count() == 0, "a field is documented with its class, once"
        link = page.locator("dt[id='lmbook.corpora.Corpus.draw'] a:has(.viewcode-link)").get_attribute("href")
        assert link.endswith("#source-lmbook.corpora.Corpus"), "a method is found with its class"


def test_search_finds_chinese(chrome, small):
    with br.served(small / "_build" / "html") as url, br.window(chrome, url) as w:
        for words in ["词向量", "句子", "一个句子"]:  # 句子 stands inside a clause: Sphinx alone does not find it
            assert any("Corpora" in title or "词向量" in title for title in search(w.open("index.html"), words)), words
        assert search(w.open("index.html"), "量子") == []


def test_works_from_a_file_without_a_server(chrome, small):
    with br.window(chrome, (small / "_build" / "html").as_uri() + "/") as w:
        page = w.open("10_corpora.html")
        problems = [*w.problems, *br.math_problems(page), *br.diagram_problems(page), *br.figure_problems(page)]
        assert not problems, "\n".join(problems)
        assert any("Corpora" in title for title in search(page, "corpora")) and not w.problems


def test_a_warning_fails_the_build_each_time(tmp_path, capfd):
    root = small_project(tmp_path / "p", extra="\n[nowhere](02_missing.ipynb)\n")
    assert [built(root, root / "_build") != 0 for _ in range(2)] == [True, True], "also when Sphinx would not read the page again"
    assert "02_missing" in capfd.readouterr().err


def test_unchanged_sources_are_left_alone(tmp_path):
    root, out = small_project(tmp_path / "p"), tmp_path / "source"
    (out / "api").mkdir(parents=True)
    (out / "api" / "stale.rst").write_text("old", encoding="utf-8")
    stage.write_sources(root, build.layout(), out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert {p.name for p in before} >= {"10_corpora.ipynb", "lmbook.corpora.rst", "claims.md"} and out / "api" / "stale.rst" not in before
    stage.write_sources(root, build.layout(), out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


BROKEN = {
    "alt": ("<img src='ok.png'>", br.figure_problems, "without alt text"),
    "alt that is a file name": ("<img src='ok.png' alt='_images/1.png'>", br.figure_problems, "only a name"),
    "picture": ("<img src='gone.png' alt='a curve'>", br.figure_problems, "did not load"),
    "math": (r"<p><span class='math'>\(x\)</span></p>", br.math_problems, "not typeset"),
    "raw math": ("<p>so $x^2$ it is</p>", br.math_problems, "raw TeX"),
    "diagram": ("<pre class='mermaid'>graph LR; a-->b</pre>", br.diagram_problems, "not drawn"),
    "diagram with an error": (
        "<pre class='mermaid'><svg width='90' height='9' aria-roledescription='error'></svg></pre>", br.diagram_problems, "error"),
    "contrast": ("<p style='color:#999;background:#fff'>pale</p>", br.contrast_problems, "contrast 2.85"),
    "contrast by opacity": ("<p style='opacity:.4'>pale</p>", br.contrast_problems, "contrast"),
    "wide": ("<div style='width:3000px;height:9px'>wide</div>", br.width_problems, "3000 px"),
    "cut off": ("<main style='overflow:hidden'><pre style='width:3000px'>wide</pre></main>", br.width_problems, "pre."),
}


@pytest.fixture(scope="module")
def scrap(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scrap")
    (folder / "ok.png").write_bytes(base64.b64decode(PIXEL))
    return folder


def page_of(folder: Path, body: str) -> str:
    "The name of a page with this body. (One name each: the browser would show the page that it has in its cache.)"
    name = f"{zlib.crc32(body.encode())}.html"
    head = "<!doctype html><html lang=en><link rel=icon href='ok.png'><title>t</title>"
    (folder / name).write_text(f"{head}<body style='margin:0;background:#fff;color:#000'>{body}</body></html>", encoding="utf-8")
    return name


@pytest.mark.parametrize("kind", BROKEN)
def test_a_check_finds_what_it_is_for(chrome, scrap, kind):
    body, check, complaint = BROKEN[kind]
    with br.served(scrap) as url, br.window(chrome, url) as w:
        problems = check(w.open(page_of(scrap, body)))
        assert problems and complaint in " ".join(problems)
        good = "<img src='ok.png' alt='a square'><p>it costs $5</p><div style='overflow:auto'><pre style='width:3000px'>w</pre></div>"
        assert check(w.open(page_of(scrap, good))) == []


@pytest.mark.parametrize("body, complaint", [
    ("<img src='http://elsewhere.invalid/x.png' alt='x'>", "request leaves the site: http://elsewhere.invalid/x.png"),
    ("<script>fetch('https://elsewhere.invalid/api').catch(() => 0)</script>", "request leaves the site"),
    ("<script>console.error('broken')</script>", "console error: broken"),
    ("<script>throw new Error('oops')</script>", "script error: oops"),
    ("<img src='gone.png' alt='x'>", "status 404"),
])  # fmt: skip
def test_the_watch_sees_what_goes_wrong(chrome, scrap, body, complaint):
    with br.served(scrap) as url, br.window(chrome, url) as w:
        w.open(page_of(scrap, body), quiet=True)
        assert any(complaint in p for p in w.problems), w.problems
        w.open(page_of(scrap, "<p>fine</p>"), quiet=True)
        assert w.problems == []


def test_the_crawl_sees_broken_links(tmp_path):
    text = "<p id='x'></p><a href='b.html'>1</a><a href='#y'>2</a><a href='a.html#x'>3</a><a href='https://e.org'>4</a>"
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    assert broken_links(tmp_path) == ["a.html: b.html does not exist", "a.html: #y has no such anchor"]


def test_the_mark_of_an_exported_cell_stands_above_it():
    "MyST-NB folds a cell only if its source comes first, so the mark comes second and is moved later. Planted: it stays behind."
    from docutils import nodes, utils

    from docs._ext.cells import on_doctree_resolved

    cell, source, mark = nodes.container(), nodes.literal_block("1", "1"), nodes.paragraph(classes=["exported-to"])
    cell += [source, mark]
    document = utils.new_document("a page")
    document += cell
    on_doctree_resolved(None, document, "a page")
    assert cell.children == [mark, source]
