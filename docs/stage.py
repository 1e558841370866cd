"""From notebooks to what Sphinx reads.

The notebooks stay as they are. A copy of each goes to a folder of its own, without the lines that speak to nbdev and nbval (`#| export`,
`# NBVAL_...`) and without hidden cells; what those lines said is kept as cell metadata, which `docs._ext.cells` and MyST-NB read.
Beside the copies this writes the pages that are made from data: the list of claims, and one API page per exported module.
"""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

from tools.notebooks import notebooks

DIRECTIVE = re.compile(r"\s*#\s*\|(?P<text>.*)")
NBVAL = re.compile(r"\s*#\s*(NBVAL_|PYTEST_VALIDATE_)")
EXPORT = re.compile(r"exports?(\s+(?P<module>[\w.]+))?\s*$")
GLOSSARY = "glossary"  # the notebook that explains the terms: a page of the reference, as the index is the first of all
ENTRY = re.compile(r"^- \*\*(?P<term>[^*]+)\*\*[^(]*\((?P<chinese>[^)]*)\): (?P<says>.*?) \[[^\]]*\]\((?P<chapter>\w+)\.ipynb\)$", re.M)
BOLD = re.compile(r"(?<!\[)\*\*(?P<term>[^*\n]+)\*\*")
EVIDENCE = re.compile(r'<a href="(\w+)\.ipynb#[^"]*" title="(D\d-\d\d)"')  # as `lmbook.documents.ClaimTable` writes it
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`|^#.*?$", re.M | re.S)  # no bold in these is a term: fences, code, headings


def split_directives(source: str) -> tuple[list[str], str]:
    "The directives of a cell (`#| export` gives `export`), and the source that a reader should see."
    directives: list[str] = []
    shown: list[str] = []
    for line in source.splitlines():
        if match := DIRECTIVE.match(line):
            text = match["text"].removeprefix(" ")
            # A caption may run over several lines; the following ones are indented, as in YAML.
            if text.startswith(" ") and directives: directives[-1] += f" {text.strip()}"
            else: directives.append(text.strip())
        elif not NBVAL.match(line): shown.append(line)
    return directives, "\n".join(shown).strip("\n")


def options(directives: list[str]) -> dict[str, Any]:
    'The `key: value` directives, for example `fig-cap: "Loss against steps"`.'
    found: dict[str, Any] = {}
    for text in directives:
        if re.match(r"[\w-]+:(\s|$)", text): found |= yaml.safe_load(text)
    return found


def defined_names(source: str) -> list[str]:
    "What the source defines at its top level; a function patched into a class by `@patch` is named `Class.function`."
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef): names.append(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
            owner = node.args.args[0].annotation if "patch" in decorators and node.args.args else None
            names.append(f"{ast.unparse(owner)}.{node.name}" if owner is not None else node.name)
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names += [t.id for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)]
    return [n for n in names if not n.startswith("_")]


def checked_claims(source: str) -> list[str]:
    'The ids in the calls `check_claim("D1-13", ...)` of a cell.'
    return re.findall(r"""\bcheck_claim\(\s*["'](D\d+-\d+)["']""", source)


def heading_anchor(text: str) -> str:
    "The anchor of a heading as JupyterLab makes it, so that a link within the book works there and on the site."
    return text.strip().replace(" ", "-")


@dataclass(frozen=True)
class Term:
    "An entry of the glossary."

    name: str  # as the chapters write it in bold, but for capitals and the s of a plural
    chinese: str
    says: str  # one sentence
    chapter: str  # the notebook that explains it

    @property
    def anchor(self) -> str: return "term-" + re.sub(r"\W+", "-", self.name.casefold()).strip("-")


def glossary(notebook: nbformat.NotebookNode) -> dict[str, Term]:
    "The entries of the glossary, by their names in small letters."
    found = [m for cell in notebook.cells if cell.cell_type == "markdown" for m in ENTRY.finditer(cell.source)]
    return {m["term"].casefold(): Term(m["term"], m["chinese"], m["says"], m["chapter"]) for m in found}


def term_of(words: str, terms: dict[str, Term]) -> Term | None:
    "The entry for words in bold type: `Kneser-Ney.` and `embeddings` are terms as `Kneser-Ney` and `embedding` are."
    name = words.strip(" .:,;").casefold()
    return terms.get(name) or terms.get(name.removesuffix("s"))


def bold(markdown: str) -> list[re.Match[str]]:
    "What a Markdown cell sets in bold type, outside code and headings."
    outside = CODE.sub(lambda m: " " * len(m[0]), markdown)
    return list(BOLD.finditer(outside))


def link_terms(chapter: Chapter, terms: dict[str, Term]) -> None:
    "Link each term to its entry, where the chapter first sets it in bold; the entries themselves get the anchors."
    linked: set[str] = set()

    def link(found: re.Match[str]) -> str:
        term = term_of(found["term"], terms)
        if term is None or term.name in linked: return found[0]
        linked.add(term.name)
        says = html.escape(re.sub(r"[$*`]", "", term.says))
        return f'<a class="reference internal term" href="{GLOSSARY}.html#{term.anchor}" title="{says}">{found[0]}</a>'

    for cell in chapter.notebook.cells:
        if cell.cell_type != "markdown": continue
        if chapter.name == GLOSSARY:
            cell.source = ENTRY.sub(lambda m: m[0].replace("- ", f'- <a id="{terms[m["term"].casefold()].anchor}"></a>', 1), cell.source)
        else:
            pieces, at = list[str](), 0
            for match in bold(cell.source):
                pieces += [cell.source[at : match.start()], link(match)]
                at = match.end()
            cell.source = "".join([*pieces, cell.source[at:]])


def plain(markdown: str) -> str:
    "The text of a heading without emphasis, code marks and link targets."
    return re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", markdown).strip()


@dataclass
class Chapter:
    "A notebook on its way to the site."

    name: str  # file name without extension, which is also the name of the page
    notebook: nbformat.NotebookNode
    title: str = ""
    module: str = ""  # what `#| default_exp` says; empty if the chapter exports nothing
    headings: list[str] = field(default_factory=list)
    definitions: dict[str, list[str]] = field(default_factory=dict)  # module -> names, in the order of the chapter

    @property
    def number(self) -> str:
        "'15' for 15_tokenization, '12b' for 12b_quality (the second sitting of 12), empty for the preface."
        return m[0] if (m := re.match(r"\d+[a-z]?(?=_)", self.name)) else ""


def read_chapter(path: Path, package: str) -> Chapter:
    "Read a notebook and prepare it for the site (in memory)."
    notebook = nbformat.read(path, as_version=4)
    code = [split_directives(c.source)[0] for c in notebook.cells if c.cell_type == "code"]
    module = next((d.split()[1] for directives in code for d in directives if d.startswith("default_exp ")), "")
    chapter = Chapter(path.stem, notebook, module=f"{package}.{module}" if module else "")
    # Cells may hold magics, which are no Python; and a notebook that no kernel has run names no language at all.
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.cells = [cell for cell in notebook.cells if _prepare(cell, chapter, package)]
    chapter.title = chapter.headings[0] if chapter.headings else path.stem
    if chapter.number: _say_how_long(chapter)
    return chapter


def reading(notebook: nbformat.NotebookNode) -> tuple[int, int, int]: # minutes, words, cells that are not folded
    """How long a chapter is for a reader: 200 words of prose a minute, and three quarters of a minute for each cell that is seen.

    The list of references at its end is looked up and not read.
    """
    told = (re.sub(r"^## References\s*$.*", "", c.source, flags=re.M | re.S) for c in notebook.cells if c.cell_type == "markdown")
    prose = [re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S) for text in told]
    words = sum(len(text.split()) for text in prose)
    cells = sum(c.cell_type == "code" and "hide-input" not in c.metadata.get("tags", ()) for c in notebook.cells)
    return round(words / 200 + 0.75 * cells), words, cells


def _say_how_long(chapter: Chapter) -> None:
    "Under the promise of a chapter: how long it takes to read."
    minutes, words, cells = reading(chapter.notebook)
    first = chapter.notebook.cells[0]
    lines = first.source.split("\n")
    promise = next((i for i, line in enumerate(lines) if line.startswith(">")), None)
    if promise is None: return
    end = next((i for i in range(promise, len(lines)) if not lines[i].startswith(">")), len(lines))
    lines[end:end] = ["", f"*About {max(5, 5 * round(minutes / 5))} minutes: {words:,} words and {cells} cells.*", ""]
    first.source = "\n".join(lines).strip()


def _prepare(cell: nbformat.NotebookNode, chapter: Chapter, package: str) -> bool:
    "Make the cell fit to be shown; False if it is not to be shown at all."
    if cell.cell_type == "markdown":
        text = re.sub(r"^(```|~~~).*?^\1", "", cell.source, flags=re.M | re.S)
        chapter.headings += [plain(h) for h in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", text, flags=re.M)]
    if cell.cell_type != "code": return True
    for out in cell.outputs:  # links from a cell's HTML to the cells that check claims
        if page := out.get("data", {}).get("text/html"): out.data["text/html"] = EVIDENCE.sub(r'<a href="\1.html#check-\2"', page)
    directives, cell.source = split_directives(cell.source)
    words = {d.split(":")[0].split()[0] for d in directives if d}
    if "hide" in words or not (cell.source or cell.outputs): return False
    opts = options(directives)
    tags = list(cell.metadata.get("tags", []))
    if opts.get("echo") is False: tags.append("remove-input")
    if opts.get("output") is False: tags.append("remove-output")
    if opts.get("code-fold") and "hide-input" not in tags: tags.append("hide-input")
    render: dict[str, Any] = {}
    caption, alt = opts.get("fig-cap"), opts.get("fig-alt")
    if caption: render["figure"] = {"caption": str(caption)}
    if caption or alt: render["image"] = {"alt": plain(str(alt or caption))}
    if "hide-input" in tags: render |= {"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}
    book: dict[str, Any] = {}
    exported = next((m for d in directives if (m := EXPORT.match(d))), None)
    if exported:
        module = f"{package}.{exported['module']}" if exported["module"] else chapter.module
        book |= {"module": module, "defines": (names := defined_names(cell.source))}
        chapter.definitions.setdefault(module, []).extend(names)
        tags.append("exported")
    if ids := checked_claims(cell.source): book["claims"] = ids
    if tags: cell.metadata["tags"] = tags
    if render: cell.metadata["mystnb"] = render
    if book: cell.metadata["lmbook"] = book
    return True


# --- pages made from data -------------------------------------------------------------------------------------------------------


def claims_page(claims: list[dict[str, str]], chapters: list[Chapter]) -> str:
    "The list of all claims, one section per verdict, those not reached yet at the end, as MyST Markdown."
    names = ["Holds", "Holds if", "Wrong", "Cannot be checked here", "Not reached yet"]
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for claim in claims:
        verdict = claim.get("verdict", "")
        name = "Holds if" if verdict.startswith("holds if") else verdict.capitalize() or "Not reached yet"
        groups[name].append(claim)  # an unknown verdict is a KeyError: the build stops
    counts = [f"| [{name}](#{heading_anchor(name)}) | {len(rows)} |" for name, rows in groups.items() if rows]
    text = [
        "# The claims by verdict", "",
        f"The five documents make {len(claims)} statements that can be checked. A verdict links to the cell that found it.", "",
        "| Verdict | Claims |", "| :-- | --: |", *counts, f"| **All** | **{len(claims)}** |", "",
    ]  # fmt: skip
    for name, rows in groups.items():
        if rows: text += [f"## {name}", "", *[line for claim in rows for line in _claim(claim, chapters)]]
    return "\n".join(text) + "\n"


def _claim(claim: dict[str, str], chapters: list[Chapter]) -> list[str]:
    verdict = claim.get("verdict", "")
    style = "open" if not verdict else "holds" if verdict.startswith("holds") else "wrong" if verdict == "wrong" else "unchecked"
    lines = [
        f"(claim-{claim['id']})=", f"::::{{container}} claim claim-{style}", ":::{container} claim-head",
        f"**{claim['id']}** document {claim['id'][1]}, section {claim['where']} · {claim['kind']}", ":::", "", escape(claim["says"]), "",
    ]  # fmt: skip
    if verdict:
        said = escape(verdict[0].upper() + verdict[1:])
        lines += [f"**{said}.** {escape(claim['finding'])} {evidence_link(claim, chapters)}", ""]
    else:
        home = next((c for c in chapters if c.name.split("_", 1)[-1] == claim["chapter"]), None)
        where = f"[{escape(home.title)}]({home.name}.ipynb)" if home else f"*{claim['chapter'].replace('_', ' ')}* (not written yet)"
        lines += [f"To test, in the chapter {where}: {escape(claim['look'])}", ""]
    return [*lines, "::::", ""]


def evidence_link(claim: dict[str, str], chapters: list[Chapter]) -> str:
    "A link to the heading that `evidence` names; ValueError if there is no such chapter or heading."
    name, _, heading = claim["evidence"].partition("#")
    chapter = next((c for c in chapters if c.name == name.removesuffix(".ipynb")), None)
    if chapter is None: raise ValueError(f"{claim['id']}: its evidence is in {name!r}, but there is no such notebook")

    def key(text: str) -> str: return re.sub(r"\W", "", text).casefold()

    match = next((h for h in chapter.headings if key(h) == key(heading)), None)
    if match is None: raise ValueError(f"{claim['id']}: its evidence is under {heading!r}, but {name} has no such heading")
    return f'<a class="reference internal" href="{chapter.name}.html#check-{claim["id"]}">{html.escape(f"{chapter.title}: {match}")}</a>'


def escape(text: str) -> str:
    "Plain text as Markdown that shows exactly this text. Code in backticks stays code."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*_\[\]<>$#|~{}@])", r"\\\1", p) for i, p in enumerate(parts))


def api_page(module: str, chapter: Chapter) -> str:
    "The API page of a module, as reStructuredText (`docs._ext.api` fills it in)."
    return "\n".join([
        module, "=" * len(module), "",
        f"From the chapter :doc:`{chapter.title} <../{chapter.name}>`.", "",
        f".. chapter-module:: {module}", "",
    ])  # fmt: skip


def part_of(number: int, layout: dict[str, Any]) -> str:
    "The part of the book that a chapter of this number belongs to."
    return [part["caption"] for part in layout["parts"] if part["from"] <= number][-1]


def toc(layout: dict[str, Any], chapters: list[Chapter], modules: list[str]) -> dict[str, Any]:
    "The table of contents for sphinx-external-toc: the chapters, in the order given, by the parts of their numbers; then the reference."
    entries: dict[str, list[dict[str, str]]] = {part["caption"]: [] for part in layout["parts"]}
    for c in chapters:
        if c.name in (layout["root"], GLOSSARY): continue
        if not c.number: raise ValueError(f"{c.name}.ipynb has no number, so it has no place in the book")
        entries[part_of(int(c.number[:2]), layout)].append({"file": c.name, "title": f"{c.number.removeprefix('0')}. {c.title}"})
    parts = [{"caption": caption, "chapters": rows} for caption, rows in entries.items() if rows]
    reference: list[dict[str, Any]] = [{"file": GLOSSARY}] * any(c.name == GLOSSARY for c in chapters) + [{"file": "claims"}]
    if modules: reference.append({"file": "api/index", "sections": [{"file": f"api/{m}", "title": m} for m in modules]})
    return {"format": "jb-book", "root": layout["root"], "parts": [*parts, {"caption": "Reference", "chapters": reference}]}


# --- writing --------------------------------------------------------------------------------------------------------------------


def write_sources(root: Path, layout: dict[str, Any], out: Path, package: str = "lmbook") -> list[Chapter]:
    """Write everything that Sphinx reads to `out`, and delete from it what is no longer wanted.

    root: the project, with `nbs/` and the package.  layout: `docs/_toc.yml`.  A file that would not change is left alone, so that
    Sphinx reads again only what did.
    """
    chapters = [read_chapter(p, package) for p in notebooks(folder=root / "nbs")]
    terms = next((glossary(c.notebook) for c in chapters if c.name == GLOSSARY), {})
    for chapter in chapters: link_terms(chapter, terms)
    homes = {c.module: c for c in chapters if c.module}
    with (root / package / "data" / "claims.toml").open("rb") as f: claims = tomllib.load(f)["claim"]
    files: dict[str, str] = {f"{c.name}.ipynb": nbformat.writes(c.notebook) + "\n" for c in chapters}
    files["claims.md"] = claims_page(claims, chapters)
    for module, chapter in homes.items(): files[f"api/{module}.rst"] = api_page(module, chapter)
    if homes:
        rows = [f"* :doc:`{m} <{m}>`: :doc:`{c.title} <../{c.name}>`" for m, c in homes.items()]
        files["api/index.rst"] = "\n".join(["API", "===", "", "One module per chapter.", "", *rows, ""])
    files["_toc.yml"] = yaml.safe_dump(toc(layout, chapters, list(homes)), sort_keys=False, allow_unicode=True)
    where: dict[str, dict[str, str]] = {}
    for c in chapters:
        for m, names in c.definitions.items(): where.setdefault(m, {}).update(dict.fromkeys(names, c.name))
    files["book.json"] = json.dumps({"definitions": where, "modules": {m: c.name for m, c in homes.items()}}, indent=1)
    pictures = {p.relative_to(root / "nbs") for p in (root / "nbs").rglob("*") if p.suffix in {".png", ".svg", ".jpg", ".gif", ".webp"}}
    pictures = {p for p in pictures if not any(part.startswith(".") for part in p.parts)}

    wanted = {out / name for name in files} | {out / p for p in pictures}
    if out.exists():
        for old in out.rglob("*"):
            if old.is_file() and old not in wanted: old.unlink()
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8", newline="\n")
    for picture in pictures:
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / "nbs" / picture, out / picture)
    return chapters
