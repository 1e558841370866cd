"""The form of a notebook: what every chapter has, and what none may have. Each rule is a function from a page to its problems.

Every rule runs on every notebook of the book; and every rule is shown to fail, on a small notebook that breaks it and nothing else.
"""

from __future__ import annotations

import ast
import base64
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbformat.validator import iter_validate

from docs import build, stage
from tests.pages import NBS, PREFACE, ROOT, UNNUMBERED, Page, book, contains_check, directive, markdown, syntax
from tools.notebooks import reading_order

FIGURE_LIMIT = 100_000  # bytes, decoded
EXERCISES = 3
MODULE = 700  # lines of a module that is read in a sitting
SITTING = 60, 4000  # code cells, and words without the references, of a chapter
TOUR = "00_tour"
IMAGES = ("image/png", "image/svg+xml", "image/jpeg", "image/gif")
SIMPLE_HTML = set("details summary br sub sup kbd b i em strong small p div span a table thead tbody tr th td".split())


def place(page: Page, cell: NotebookNode) -> str:
    "Where a cell is, for people: its count or index, and how it begins."
    count = cell.get("execution_count")
    return f"cell [{count}] {cell.source[:40]!r}" if count else f"cell {page.nb.cells.index(cell)} {cell.source[:40]!r}"


def texts(cell: NotebookNode) -> Iterator[str]:
    "All text in the outputs of a cell."
    for out in cell.get("outputs", []):
        if out.output_type == "stream": yield out.text
        elif out.output_type == "error": yield "\n".join([out.evalue, *out.traceback])
        else: yield from (v for k, v in out.data.items() if isinstance(v, str) and (not k.startswith("image/") or k == "image/svg+xml"))


def images(cell: NotebookNode) -> Iterator[tuple[str, int]]:
    "The images stored in a cell's outputs: kind and size in bytes."
    for out in cell.get("outputs", []):
        for mime, data in out.get("data", {}).items():
            if mime in IMAGES: yield mime, len(data.encode()) if mime == "image/svg+xml" else len(base64.b64decode(data))


# ---------------------------------------------------------------- the rules


def name(page: Page) -> Iterator[str]:
    "NN_topic.ipynb, exporting to lmbook/topic.py if to anything; or the index, or the glossary."
    if page.stem in UNNUMBERED: return
    if not re.fullmatch(r"\d\d[b-z]?_[a-z][a-z0-9_]*", page.stem): yield f"{page.stem}.ipynb is not NN_topic.ipynb"
    elif page.module and page.module != (topic := page.stem.partition("_")[2]): yield f"exports to {page.module}, its topic is {topic}"


def title_and_promise(page: Page) -> Iterator[str]:
    "The first cell is `# Title` with a `> promise` below, and there is no second title."
    first = page.nb.cells[0] if page.nb.cells else None
    lines = [line for line in first.source.splitlines() if line.strip()] if first and first.cell_type == "markdown" else []
    if not lines or not re.match(r"# \S", lines[0]): yield "the first cell does not begin with `# Title`"
    elif len(lines) < 2 or not re.match(r"> ?\S", lines[1]): yield "no `> promise` under the title"
    titles = [text for _, level, text in page.headings() if level == 1]
    if len(titles) > 1: yield f"more than one title: {titles}"


def imports(page: Page) -> Iterator[str]:
    "From lmbook only modules of earlier notebooks; nothing with a star. (The tour looks ahead: it exports nothing that could be built on.)"
    for cell in page.code:
        for node in ast.walk(syntax(cell.source)):
            names: list[str] = []
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                if any(a.name == "*" for a in node.names): yield f"from {node.module} import *"
                if node.level: yield f"a relative import: {ast.unparse(node)}"
                names = [f"lmbook.{a.name}" for a in node.names] if node.module == "lmbook" else [node.module or ""]
            for full in names:
                parts = full.split(".")
                if parts[0] != "lmbook" or len(parts) < 2 or parts[1].startswith("__"): continue
                home = page.homes.get(parts[1])
                if home is None: yield f"imports {full}, which no notebook exports"
                elif reading_order(home) >= reading_order(page.stem) and page.stem != TOUR:
                    yield f"imports {full}, which is not from an earlier chapter"


def figures(page: Page) -> Iterator[str]:
    "Every stored image has a caption (its alternative text) and is small."
    for cell in page.code:
        for mime, size in images(cell):
            if not directive(cell.source, "fig-cap"): yield f"{place(page, cell)}: an image without `#| fig-cap:`"
            if size > FIGURE_LIMIT: yield f"{place(page, cell)}: {mime} of {size / 1000:.0f} kB, at most {FIGURE_LIMIT / 1000:.0f}"


def has_figure(page: Page) -> Iterator[str]:
    "At least one figure."
    if not any(mime in IMAGES[:2] for cell in page.code for mime, _ in images(cell)): yield "no figure (PNG or SVG) is stored"


def exercises(page: Page) -> Iterator[str]:
    "At least three, each in a cell of its own and followed, before the next, by a code cell that checks it."
    begins = r"^\*\*Exercise|^#{2,6} Exercise\b"
    listed = begins + r"|^(?:\d+[.)]|[-*]) "
    count, open_exercise = 0, ""
    for cell, sections in zip(page.nb.cells, page.sections()):
        if cell.cell_type == "markdown":
            pattern = listed if any(re.match("Exercises", s) for s in sections) else begins
            found = [line for line in cell.source.splitlines() if re.match(pattern, line)]
            if not found: continue
            if len(found) > 1: yield f"{len(found)} exercises in one cell ({found[1][:40]!r}): each needs a check below it"
            if open_exercise: yield f"no code cell with an assert after {open_exercise!r}"
            count, open_exercise = count + len(found), found[-1][:60]
        elif contains_check(cell.source): open_exercise = ""
    if open_exercise: yield f"no code cell with an assert after {open_exercise!r}"
    if count < EXERCISES: yield f"{count} exercises, at least {EXERCISES} are wanted"


def references(page: Page) -> Iterator[str]:
    "The last section is `## References`, and says something."
    heads = [(i, level, text) for i, level, text in page.headings() if level <= 2]
    if not heads or heads[-1][1:] != (2, "References"): yield "the last section is not `## References`"
    else:
        rest = page.nb.cells[heads[-1][0] :]
        text = "\n".join(c.source for c in rest if c.cell_type == "markdown").rpartition("## References")[2]
        if not text.strip(): yield "`## References` is empty"


def self_contained(page: Page) -> Iterator[str]:
    "No image from the network or from an attachment, and each with alternative text."
    for cell in page.prose:
        if cell.get("attachments"): yield f"{place(page, cell)}: an attachment"
        for token in markdown(cell.source):
            for child in token.children or []:
                if child.type != "image": continue
                source = str(child.attrs["src"])
                if re.match(r"(https?:)?//|attachment:|data:", source): yield f"{place(page, cell)}: image from {source[:60]}"
                if not child.content.strip(): yield f"{place(page, cell)}: image {source[:60]} without alternative text"
    for cell in page.nb.cells:
        for text in [cell.source] if cell.cell_type == "markdown" else texts(cell):
            for tag in re.findall(r"<(?:img|image|source|video|iframe|script|link)\b[^>]*>", text):
                if re.search(r"""=\s*["']?(https?:)?//""", tag): yield f"{place(page, cell)}: loads from the network: {tag[:80]}"


def absolute_paths() -> re.Pattern:
    "Paths that exist on one machine only: the usual places, and the home, project and temporary folder of this one."
    here = [p.as_posix() for p in (Path.home(), ROOT, Path(tempfile.gettempdir())) if len(p.parts) > 1]
    usual = [r"/(?:home|Users|private|mnt)/\w", r"/(?:root|tmp|var/folders)\b", r"[A-Za-z]:\\{1,2}(?:Users|Windows|Program|Temp)"]
    return re.compile(r"(?<![\w.~-])(?:file://)?(?:" + "|".join([*usual, *(re.escape(p) + r"\b" for p in here)]) + ")")


def portable(page: Page) -> Iterator[str]:
    "No absolute path of a machine in sources or outputs."
    pattern = absolute_paths()
    for cell in page.nb.cells:
        for text in [cell.source, *texts(cell)]:
            if not (match := pattern.search(text)): continue
            yield f"{place(page, cell)}: {text[match.start() : match.start() + 40]!r} is a path of one machine"


def executed(page: Page) -> Iterator[str]:
    "Every code cell was run, in order, and left no error and no warning."
    counts = [c.execution_count for c in page.code]
    if counts != list(range(1, len(counts) + 1)): yield f"execution counts are {counts}: run the notebook from top to bottom"
    for cell in page.code:
        meant = "NBVAL_RAISES_EXCEPTION" in cell.source or "raises-exception" in cell.metadata.get("tags", [])
        for out in cell.outputs:
            if out.get("name") == "stderr": yield f"{place(page, cell)}: stderr: {out.text[:80]!r}"
            if out.output_type == "error" and not meant: yield f"{place(page, cell)}: an error, {out.ename}"


def plain_markdown(page: Page) -> Iterator[str]:
    "CommonMark with tables, $math$ and ```mermaid only: what JupyterLab shows too. No MyST directives or roles, only simple HTML."
    for cell in page.prose:
        where = place(page, cell)
        for token in markdown(cell.source):
            if token.type == "fence" and token.info.lstrip().startswith("{"): yield f"{where}: a MyST directive, ```{token.info}"
            tokens = [token, *(token.children or [])]
            for before, after in zip(tokens[1:], tokens[2:]):
                if before.type == "text" and after.type == "code_inline" and re.search(r"\{[\w:+-]+\}$", before.content):
                    yield f"{where}: a MyST role, {before.content[-20:]}`{after.content}`"
            if token.type == "inline" and re.search(r"^(:{3,}|\([\w:.-]+\)=$|%{1,3} |\+\+\+)", token.content, re.MULTILINE):
                yield f"{where}: MyST syntax, {token.content[:40]!r}"
            for part in tokens:
                if part.type not in ("html_block", "html_inline"): continue
                for tag in re.findall(r"</?([A-Za-z][\w-]*)", part.content):
                    if tag.lower() not in SIMPLE_HTML: yield f"{where}: <{tag}>"


def ids(page: Page) -> Iterator[str]:
    "A valid notebook whose cells each have an id of their own."
    found = [c.get("id") for c in page.nb.cells]
    if None in found: yield f"{found.count(None)} cells without id"
    yield from (f"id {i} occurs {n} times" for i, n in Counter(found).items() if i and n > 1)
    yield from (f"not a valid notebook: {str(error)[:200]}" for error in iter_validate(page.nb))  # `validate` would repair it


Rule = Callable[[Page], Iterator[str]]
RULES: list[Rule] = [
    name, title_and_promise, imports, figures, has_figure, exercises, references, self_contained, portable, executed, plain_markdown, ids,
]  # fmt: skip
NOT_FOR_THE_UNNUMBERED = {has_figure, exercises, references}

# ---------------------------------------------------------------- on the book

PAGES = book()


def test_there_are_notebooks():
    assert PAGES, f"no notebook in {NBS.name}/"


def test_the_site_has_every_notebook_in_order():
    [*parts, _] = stage.toc(build.layout(), [stage.Chapter(p.stem, p.nb) for p in PAGES], [])["parts"]
    assert [entry["file"] for part in parts for entry in part["chapters"]] == [p.stem for p in PAGES if p.stem not in UNNUMBERED]


def test_the_preface_names_every_chapter():
    linked = [stem for cell in next(p for p in PAGES if p.stem == "index").prose for stem in re.findall(r"\]\((\w+)\.ipynb\)", cell.source)]
    assert [p.stem for p in PAGES if p.stem not in UNNUMBERED and p.stem not in linked] == []


def shared_numbers(pages: list[Page]) -> Iterator[str]:
    "Numbers on which more than one chapter stands."
    for number, count in Counter(p.number for p in pages).items():
        if number is not None and count > 1: yield f"{number}: {', '.join(p.stem for p in pages if p.number == number)}"


def test_no_two_chapters_share_a_number(): assert list(shared_numbers(PAGES)) == []


def test_the_number_says_the_part():
    begins = [part["from"] for part in build.layout()["parts"]]
    assert begins[0] == 0 and begins == sorted(set(begins)) and [n for n in begins if n % 10] == [28, 49, 77]  # the tens are full


# Modules that are still longer than a sitting, with the lines that they have: a number here may only fall.
STILL_LONG: dict[str, int] = {}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_notebook(page, rule):
    if page.stem in UNNUMBERED and rule in NOT_FOR_THE_UNNUMBERED: return
    assert list(rule(page)) == [], rule.__doc__


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in UNNUMBERED], ids=lambda p: p.stem)
def test_a_chapter_is_a_sitting_long(page):
    _, words, _ = stage.reading(page.nb)
    cells = len(page.code)
    assert cells <= SITTING[0] and words <= SITTING[1], f"{cells} cells and {words} words: divide it (NNb_topic), or cut"


def test_a_module_is_a_sitting_long():
    lines = {p.stem: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "lmbook").glob("*.py") if p.stem != "_modidx"}
    assert {name: n for name, n in lines.items() if n >= MODULE} == STILL_LONG


# ---------------------------------------------------------------- on notebooks that break one rule each

HOMES = {"claims": "index", "early": "01_early", "middle": "02_middle", "late": "03_late"}
PIXEL = base64.b64encode(b"\x89PNG").decode()
FIGURE = '#| fig-cap: "A line."\nplot()'


def figure(source: str = FIGURE, data: str = PIXEL, mime: str = "image/png"):
    return new_code_cell(source, execution_count=1, outputs=[new_output("display_data", {mime: data, "text/plain": "<Figure>"})])


def good() -> NotebookNode:
    "A chapter, 02_middle, with nothing wrong."
    m, c = new_markdown_cell, new_code_cell
    cells = [
        m("# Title\n\n> A promise.\n\nSee [here](01_early.ipynb) and $a < b$, `{x}`.\n\n```mermaid\ngraph LR\n a --> b<img>\n```"),
        c("#| default_exp middle"),
        c("%time 1\nimport numpy as np\nfrom lmbook.early import thing\nimport lmbook.claims\nfrom lmbook import early, __version__"),
        figure(),
        m("## Exercises\n\n<details><summary>How</summary>\n\nH<sub>2</sub>O\n\n</details>"),
        *(x for i in range(3) for x in (m(f"**Exercise {i}.** Do it."), c("def f(): ..."), c("assert f() is None"))),
        m("## References\n\n- Somebody, https://example.org/home/x.html"),
    ]
    nb = new_notebook(cells=cells)
    for i, cell in enumerate((x for x in nb.cells if x.cell_type == "code"), 1): cell.execution_count = i
    return nb


def with_cell(cell: NotebookNode, at: int = 4) -> Callable[[NotebookNode], None]:
    "Put a cell into the good notebook and count anew."

    def change(nb: NotebookNode) -> None:
        nb.cells.insert(at, cell)
        for i, c in enumerate((c for c in nb.cells if c.cell_type == "code"), 1): c.execution_count = i

    return change


def code(source: str, *outputs) -> Callable[[NotebookNode], None]: return with_cell(new_code_cell(source, outputs=list(outputs)))
def prose(source: str, **more) -> Callable[[NotebookNode], None]: return with_cell(new_markdown_cell(source, **more))


def without(text: str, new: str = "") -> Callable[[NotebookNode], None]:
    "Replace a piece of a source everywhere."

    def change(nb: NotebookNode) -> None:
        assert any(text in c.source for c in nb.cells)
        for c in nb.cells: c.source = c.source.replace(text, new)

    return change


def field(i: int, key: str, value) -> Callable[[NotebookNode], None]:
    "Set (or with None delete) a field of cell i."

    def change(nb: NotebookNode) -> None:
        nb.cells[i][key] = value
        if value is None and key == "id": del nb.cells[i][key]

    return change


def unchanged(nb: NotebookNode) -> None: "Only the name is wrong."


STDOUT, ERROR = new_output("stream", text="in /home/somebody/x"), new_output("error", ename="ValueError", evalue="no", traceback=[])
BROKEN: list[tuple[Rule, str, Callable[[NotebookNode], None], str]] = [
    (name, "2_middle", unchanged, "is not NN_topic"),
    (name, "02_Middle", unchanged, "is not NN_topic"),
    (name, "02_other", unchanged, "exports to middle"),
    (title_and_promise, "", without("# Title\n\n", ""), "does not begin with"),
    (title_and_promise, "", without("# Title", "## Title"), "does not begin with"),
    (title_and_promise, "", without("> A promise.\n", ""), "no `> promise`"),
    (title_and_promise, "", with_cell(new_code_cell("1"), at=0), "does not begin with"),
    (title_and_promise, "", prose("# Another"), "more than one title"),
    (imports, "", code("from lmbook.late import x"), "lmbook.late, which is not from an earlier"),
    (imports, "", code("from lmbook.middle import x"), "not from an earlier"),
    (imports, "", code("%matplotlib inline\nimport os, lmbook.late as l"), "not from an earlier"),
    (imports, "", code("def f():\n    from lmbook import late"), "not from an earlier"),
    (imports, "", code("from lmbook.nowhere.x import y"), "which no notebook exports"),
    (imports, "", code("from math import *"), "from math import *"),
    (imports, "", code("from .early import x"), "relative import"),
    (figures, "", with_cell(figure("plot()")), "without `#| fig-cap:`"),
    (figures, "", with_cell(figure("#| fig-cap:\nplot()")), "without `#| fig-cap:`"),
    (figures, "", with_cell(figure("plot()", "<svg/>", "image/svg+xml")), "without `#| fig-cap:`"),
    (figures, "", with_cell(figure(data=base64.b64encode(bytes(100_001)).decode())), "of 100 kB"),
    (figures, "", with_cell(figure(data=f"<svg>{' ' * 100_000}</svg>", mime="image/svg+xml")), "svg+xml of 100 kB"),
    (has_figure, "", field(3, "outputs", []), "no figure"),
    (exercises, "", without("**Exercise 1.** Do it.", "Now **Exercise 1.**"), "2 exercises, at least 3"),
    (exercises, "", prose("**Exercise.** Without a check."), "no code cell with an assert after '**Exercise.**"),
    (exercises, "", without("assert f()", "print('assert', f()"), "no code cell with an assert"),
    (exercises, "", with_cell(new_markdown_cell("3. A third in a list"), at=-1), "no code cell with an assert after '3. A third"),
    (exercises, "", without("**Exercise 1.** Do it.", "**Exercise 1.** Do it.\n\n**Exercise 1b.** And this."), "2 exercises in one cell"),
    (references, "", without("## References", "References"), "the last section is not"),
    (references, "", with_cell(new_markdown_cell("## Afterword"), at=99), "the last section is not"),
    (references, "", without("- Somebody, https://example.org/home/x.html"), "is empty"),
    (self_contained, "", prose("![a plot](https://example.org/x.png)"), "image from https"),
    (self_contained, "", prose("![a plot][p]\n\n[p]: //example.org/x.png"), "image from //"),
    (self_contained, "", prose("![a plot](attachment:x.png)"), "image from attachment"),
    (self_contained, "", prose("![](x.png)"), "without alternative text"),
    (self_contained, "", prose("text", attachments={"x.png": {"image/png": PIXEL}}), "an attachment"),
    (self_contained, "", prose("<img alt='x' src='http://example.org/x.png'>"), "loads from the network"),
    (self_contained, "", code("x", new_output("display_data", {"text/html": '<script src="https://example.org/x.js">'})), "loads from"),
    (portable, "", code("open('/home/somebody/x')"), "'/home/somebody/x')"),
    (portable, "", code("p", STDOUT), "/home/somebody"),
    (portable, "", code("p", new_output("execute_result", {"text/plain": f"PosixPath('{Path.home()}/x')"})), "path of one machine"),
    (portable, "", code("p", new_output("execute_result", {"text/plain": f"{ROOT.as_posix()}/nbs"})), "path of one machine"),
    (portable, "", code(r"open('C:\\Users\\x')"), "path of one machine"),
    (portable, "", prose("Look into `/tmp/x`."), "path of one machine"),
    (portable, "", prose("Look into file:///Users/x."), "path of one machine"),
    (executed, "", field(2, "execution_count", None), "execution counts are [1, None, 3"),
    (executed, "", field(2, "execution_count", 7), "execution counts are [1, 7, 3"),
    (executed, "", code("x", ERROR), "an error, ValueError"),
    (executed, "", code("x", new_output("stream", name="stderr", text="careful")), "stderr: 'careful'"),
    (plain_markdown, "", prose("```{note}\nx\n```"), "MyST directive, ```{note}"),
    (plain_markdown, "", prose(":::{note}\nx\n:::"), "MyST syntax"),
    (plain_markdown, "", prose("see {ref}`there`"), "MyST role, see {ref}`there`"),
    (plain_markdown, "", prose("(here)=\n"), "MyST syntax"),
    (plain_markdown, "", prose("<iframe></iframe>"), "<iframe>"),
    (plain_markdown, "", prose("text with an <img src='x.png' alt='x'> in it"), "<img>"),
    (plain_markdown, "", prose("<details>\n<script>x</script></details>"), "<script>"),
    (ids, "", field(1, "id", None), "1 cells without id"),
    (ids, "", lambda nb: nb.cells[1].update(id=nb.cells[2].id), "occurs 2 times"),
    (ids, "", field(1, "outputs", [{"output_type": "unknown"}]), "not a valid notebook"),
]  # fmt: skip


def test_the_good_notebook_breaks_no_rule():
    page = Page("02_middle", good(), HOMES)
    assert {rule.__name__: found for rule in RULES if (found := list(rule(page)))} == {}


def test_what_is_allowed():
    "Cases near the border, on the right side of it."
    for change in [
        code("# NBVAL_RAISES_EXCEPTION\n1 / 0", ERROR),
        prose("```python\nfrom lmbook.late import *\n# Not a title\n```"),
        prose("`<img>` and `{ref}` in code, {braces}, a 5 % share, 2 < 3 > 1, ~/.cache, a/tmp/b, \"Q:\\nA:\""),
        without("**Exercise 1.**", "### Exercise 1\n\n"),
        without("**Exercise 1.**", "1."),
    ]:
        nb = good(); change(nb)
        assert {rule.__name__: found for rule in RULES if (found := list(rule(Page("02_middle", nb, HOMES))))} == {}


@pytest.mark.parametrize("rule, stem, change, says", BROKEN, ids=lambda x: getattr(x, "__name__", None) if x in RULES else None)
def test_a_broken_notebook_breaks_the_rule(rule, stem, change, says):
    nb = good(); change(nb)
    assert says in "\n".join(rule(Page(stem or "02_middle", nb, HOMES)))


def test_a_shared_number_is_noticed():
    pages = [Page(stem, good()) for stem in (PREFACE, "02_early", "02_middle", "20_late")]
    assert list(shared_numbers(pages)) == ["02: 02_early, 02_middle"] and pages[0].number is None


def test_a_second_sitting_has_a_letter():
    pages = [Page(stem, good()) for stem in ("02_middle", "02b_later", "03_late")]
    assert list(shared_numbers(pages)) == [] and [p.number for p in pages] == ["02", "02b", "03"]
    assert sorted(p.stem for p in reversed(pages)) == [p.stem for p in pages]
    assert stage.toc(build.layout(), [stage.Chapter(p.stem, p.nb, title="T") for p in pages], [])["parts"][0]["chapters"] == [
        {"file": "02_middle", "title": "2. T"}, {"file": "02b_later", "title": "2b. T"}, {"file": "03_late", "title": "3. T"}]  # fmt: skip


def test_every_rule_is_broken_once():
    assert {rule for rule, *_ in BROKEN} == set(RULES)
