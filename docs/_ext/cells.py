"""What the book adds to a rendered notebook.

- a line above the chapter with its number and module, and a mark on each exported cell, both linked to the API;
- anchors: `source-lmbook.x.Name` on the cell that defines a name, `check-D1-13` on the cell that checks a claim;
- ```mermaid fences as diagrams (`_static/diagrams.js` draws them, in the colours of the page);
- the notebook itself, as it is in `nbs/`, behind the download button.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def book(source: str | os.PathLike[str]) -> dict[str, dict]:
    "What `docs.stage` found out: {definitions: {module: {name: page}}, modules: {module: page}}, in the order of the chapters."
    return json.loads((Path(source) / "book.json").read_text(encoding="utf-8"))


def reference(target: str, text: str, docname: str, kind: str = "obj") -> addnodes.pending_xref:
    "A link into the API, or the plain text where the API has no entry for it."
    node = addnodes.pending_xref("", refdomain="py", reftype=kind, reftarget=target, refexplicit=True, refdoc=docname, refwarn=False)
    node += nodes.literal(text, text, classes=["xref", "py"])
    return node


def on_doctree_read(app: Sphinx, doctree: nodes.document) -> None:
    docname = app.env.docname
    for fence in list(doctree.findall(nodes.literal_block)):
        if fence.get("language") == "mermaid": fence.replace_self(diagram(fence))
    for cell in doctree.findall(nodes.container):
        meta = cell.get("cell_metadata", {}).get("lmbook", {}) if cell.get("nb_element") == "cell_code" else {}
        cell["ids"] += [f"source-{meta['module']}.{name}" for name in meta.get("defines", ())]
        cell["ids"] += [f"check-{claim}" for claim in meta.get("claims", ())]
        if "module" in meta: cell.insert(1, export_mark(meta, docname))  # MyST-NB folds a cell only if its source comes first
    title = next(doctree.findall(nodes.title), None)
    if title is not None and (line := chapter_line(app, docname)) is not None:
        title.parent.insert(title.parent.index(title), line)


def on_doctree_resolved(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    "Put each mark above its cell, now that the cells are folded."
    for mark in list(doctree.findall(lambda node: isinstance(node, nodes.paragraph) and "exported-to" in node["classes"])):
        cell = mark.parent
        cell.remove(mark)
        cell.insert(0, mark)


def export_mark(meta: dict, docname: str) -> nodes.paragraph:
    "`lmbook.corpora: SmallWorld, sentences`, each name linked to its API entry."
    mark = nodes.paragraph(classes=["exported-to"])
    mark += [nodes.inline("", "exported to "), reference(meta["module"], meta["module"], docname, "mod")]
    for i, name in enumerate(meta["defines"]):
        mark += [nodes.Text(": " if i == 0 else ", "), reference(f"{meta['module']}.{name}", name, docname)]
    return mark


def chapter_line(app: Sphinx, docname: str) -> nodes.paragraph | None:
    "`Chapter 15 · lmbook.tokenization` for a chapter, None for other pages."
    number = docname.partition("_")[0]
    if not number.isdecimal(): return None
    line = nodes.paragraph(classes=["chapter-line"])
    line += nodes.Text(f"Chapter {int(number)}")
    for module, home in book(app.srcdir)["modules"].items():
        if home == docname: line += [nodes.Text(" · "), reference(module, module, docname, "mod")]
    return line


def diagram(fence: nodes.literal_block) -> nodes.raw:
    code = html.escape(fence.astext())
    return nodes.raw("", f'<div class="diagram"><pre class="mermaid">{code}</pre></div>', format="html", classes=["diagram"])


def on_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    "Load mermaid where there is a diagram, and only there: it is large. Offer a download only of what a reader can use: a notebook."
    if context.get("page_source_suffix") != ".ipynb": context["page_source_suffix"] = ""
    if doctree is not None and any("diagram" in n["classes"] for n in doctree.findall(nodes.raw)):
        app.add_js_file("vendor/mermaid/mermaid.tiny.js", loading_method="defer")
        app.add_js_file("diagrams.js", loading_method="defer")


def on_finish(app: Sphinx, error: Exception | None) -> None:
    "Put the notebooks as they are in `nbs/` in the place of the copies that were made to be shown; delete pages of an earlier build."
    if error is not None: return
    out = Path(app.outdir)
    pages = {*app.env.found_docs, "search", "genindex", "py-modindex"}
    for page in out.rglob("*.html"):
        if page.relative_to(out).with_suffix("").as_posix() not in pages and "_static" not in page.parts: page.unlink()
    for notebook in (Path(os.environ["LMBOOK_SITE_ROOT"]) / "nbs").glob("*.ipynb"):
        shutil.copy2(notebook, out / "_sources" / notebook.name)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", on_doctree_read)
    app.connect("doctree-resolved", on_doctree_resolved)
    app.connect("html-page-context", on_page)
    app.connect("build-finished", on_finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
