"""The API reference: docstrings are Markdown, parameters are documented by their comments, sources are cells of chapters.

nbdev's style (`docments`) documents a parameter by the comment beside it, and what is returned by the comment beside the return type.
They are added to the docstring as a field list. A dataclass is documented by its fields in the same way.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import os
import re
import textwrap
import tokenize
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils import new_document
from fastcore.docments import docments
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from docs._ext.cells import book


class MarkdownDirective(SphinxDirective):
    "Its content is Markdown: docstrings are written like the chapters around them."

    has_content = True

    def run(self) -> list[nodes.Node]:
        source, _ = self.state_machine.get_source_and_line(self.lineno)
        document = new_document(source or self.env.docname, self.state.document.settings)
        # A docstring opens no section; a line such as `# (B, T)` in it is text.
        MystParser().parse("\n".join(self.content), document)
        return document.children


def field_names(obj: Any) -> list[str]:
    "The fields of a dataclass or a named tuple."
    if not inspect.isclass(obj): return []
    return [f.name for f in dataclasses.fields(obj)] if dataclasses.is_dataclass(obj) else list(getattr(obj, "_fields", ()))


def comments(obj: Any) -> dict[str, str]:
    "The comment beside each parameter of `obj`, and beside what it returns (`return`); empty where there is none."
    obj = inspect.unwrap(obj)
    try:
        if not (names := field_names(obj)) or dataclasses.is_dataclass(obj):
            return {name: " ".join((text or "").split()) for name, text in docments(obj).items()}
        source = textwrap.dedent(inspect.getsource(obj))  # docments knows no named tuples
    except (TypeError, ValueError, OSError): return {}  # no source, or no signature
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    beside = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    fields = {n.target.id: n.end_lineno for n in ast.parse(source).body[0].body if isinstance(n, ast.AnnAssign)}
    return {name: beside.get(fields.get(name), "") for name in names}


def parameters(obj: Any) -> list[str]:
    "The comments of `obj` as Markdown field list. Fields are listed even without one, for they are documented nowhere else."
    fields = field_names(obj)
    found = [(f"param {name}" if name != "return" else "returns", name, text) for name, text in comments(obj).items()]
    return [f":{what}: {text}".rstrip() for what, name, text in found if text or name in fields]


def on_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    "Turn a docstring into Markdown with the parameters below."
    text = list(lines)
    if what in {"function", "method", "class", "exception"}:
        # The docstring that @dataclass invents repeats the signature.
        if what == "class" and dataclasses.is_dataclass(obj) and (obj.__doc__ or "").startswith(f"{obj.__name__}("): text = []
        while text and not text[-1].strip(): text.pop()
        if fields := parameters(obj): text += ["", *fields]
    if what in {"data", "attribute"} and "\n".join(text).strip() in {(inspect.getdoc(o) or "").strip() for o in (obj, type(obj))}:
        text = []  # what autodoc found is the docstring of int, of dict, ...
    lines.clear()
    if any(text): lines[:] = [".. markdown::", "", *(f"   {line}" for line in text), ""]


def on_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    "A default that Python shows as `<factory>` is no Python, and Sphinx would cut the whole signature at its commas."
    return signature and re.sub(r"=\s*<[^<>]*>", "=...", signature), returns


class ModuleDirective(SphinxDirective):
    "The exported names of a module in the order of its chapter, each with the autodoc directive of its kind."

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        text = [f".. automodule:: {module.__name__}", "   :no-members:", ""]
        self.env.note_dependency(inspect.getfile(module))
        for name in dict.fromkeys(book(self.env.srcdir)["definitions"].get(module.__name__, ())):
            if "." in name: continue  # a method that a later cell patched in: its class lists it
            text += entry(f"{module.__name__}.{name}", getattr(module, name))
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=False)


def entry(name: str, obj: Any) -> list[str]:
    "The autodoc directive for `obj`."
    if inspect.isclass(obj):
        fields = field_names(obj)
        members = ["members:", "undoc-members:", "member-order: bysource", "special-members: __call__, __iter__, __getitem__"]
        if fields: members.append(f"exclude-members: {', '.join(fields)}")
        return [f".. autoclass:: {name}", *(f"   :{m}" for m in members), ""]
    # An alias such as `Row = dict[str, str]` can be called too, but is none.
    if inspect.isroutine(obj) or hasattr(obj, "__wrapped__"): return [f".. autofunction:: {name}", ""]
    return [f".. autodata:: {name}", *(["   :no-value:"] if len(repr(obj)) > 200 else []), ""]


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    "The cell that defines an API entry, as a link from its page; a method is found with its class, unless it was patched in elsewhere."
    if domain != "py": return None
    found = book(Path(os.environ["LMBOOK_SITE_OUT"]) / "source")
    names = found["definitions"].get(info["module"], {})
    name = info["fullname"]
    while name and name not in names: name = name.rpartition(".")[0]
    return f"../{names[name]}.html#source-{info['module']}.{name}" if name else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown", MarkdownDirective)
    app.add_directive("chapter-module", ModuleDirective)
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
