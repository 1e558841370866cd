"""How far each number of a notebook moves from one arithmetic to another: measured when its outputs are stored.

The spread of a number is its largest distance from the stored one under the arithmetics of `tools.arithmetics.MEASURED`. It stands in a
file beside the notebook, `nbs/.spread/NAME.json`, and not in the cells' metadata: an editor keeps metadata when a cell changes, so they
would go on vouching for an output that is gone; and a notebook remains a function of its sources, readable in a diff. The file names the
cells by their ids, and carries a digest of all cells and outputs: it vouches for these and no others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode

from tools.compare import FACTOR, Number, Tolerance, compare_outputs, spreads_of, texts, tokenise

IGNORE = "NBVAL_IGNORE_OUTPUT"


def place(notebook: Path) -> Path:
    "Where the spread of a notebook stands."
    return notebook.parent / ".spread" / f"{notebook.stem}.json"


def digest(nb: NotebookNode) -> str:
    "A name for the code cells with what they show."
    shown = [
        [c.id, c.source, *(t for out in c.outputs for t in texts(out))] for c in nb.cells if c.cell_type == "code" and c.source.strip()
    ]
    return hashlib.sha256(json.dumps(shown, ensure_ascii=False).encode()).hexdigest()[:16]


def compared(cell: NotebookNode) -> bool:
    "Whether a cell has an output that is compared as text."
    return cell.cell_type == "code" and IGNORE not in cell.source and any(True for out in cell.outputs for _ in texts(out))


@dataclass
class Spread:
    "The spreads of one notebook's numbers: of each cell, of each of its texts (`0 text/plain`: of its first output), of the i-th number."

    notebook: str  # its digest
    arithmetics: list[str]  # under which it was measured, beside the one that is stored
    cells: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # only the numbers that moved

    @classmethod
    def load(cls, notebook: Path) -> Spread | None:
        "What was measured for a notebook; None where nothing was. ValueError for a file that is none."
        try: return cls.read(place(notebook).read_text(encoding="utf-8"))
        except FileNotFoundError: return None
        except ValueError as error: raise ValueError(f"{place(notebook)} cannot be read: {error}") from None

    @classmethod
    def read(cls, text: str) -> Spread:
        "From the text of such a file."
        data = json.loads(text)
        cells = {c: {key: {int(i): float(s) for i, s in row.items()} for key, row in rows.items()} for c, rows in data["cells"].items()}
        return cls(data["notebook"], data["arithmetics"], cells)

    def store(self, notebook: Path) -> None:
        "Write it beside the notebook, a line for each cell."
        rows = ",\n".join(f"  {json.dumps(cell)}: {json.dumps(texts)}" for cell, texts in self.cells.items())
        head = f' "notebook": {json.dumps(self.notebook)},\n "arithmetics": {json.dumps(self.arithmetics)}'
        place(notebook).parent.mkdir(exist_ok=True)
        place(notebook).write_text(f'{{\n{head},\n "cells": {{\n{rows}\n }}\n}}\n', encoding="utf-8", newline="\n")

    def unsettled(self, cell: str) -> bool:
        "Whether a number moved in this cell or in one before it: what follows may have moved by less than it shows."
        before = list(self.cells)[: list(self.cells).index(cell) + 1] if cell in self.cells else []
        return any(self.cells[c] for c in before)

    def problems(self, nb: NotebookNode) -> Iterator[str]:
        "Why it does not vouch for this notebook."
        if self.notebook != digest(nb):
            yield "the spread beside this notebook was measured for other cells or outputs: `make run` measures it"
        elif missing := [c.id for c in nb.cells if compared(c) and c.id not in self.cells]:
            yield f"no spread was measured for the cells {', '.join(missing)}: `make run` measures it"


def measure(stored: NotebookNode, others: dict[str, NotebookNode]) -> tuple[Spread, list[str]]:
    """The spread of the numbers of `stored` among runs of the same notebook, by arithmetic; and what no tolerance covers, in words.

    That is a word, an order or a number of outputs that is another one under some arithmetic: the cell shows a decision that hangs on a
    last bit. It has to show what holds on every machine (rounded, sorted by name, asserted with a margin), or be marked with its reason.
    """
    spread, flips = Spread(digest(stored), list(others)), []
    for i, cell in enumerate(stored.cells):
        if cell.cell_type != "code" or IGNORE in cell.source: continue
        rows: dict[str, dict[int, float]] = {}
        for name, other in others.items():
            problems = compare_outputs(cell.outputs, other.cells[i].outputs, Tolerance(rel=math.inf, abs=math.inf, integers=True))
            if problems:
                flips.append("\n    ".join([f"cell {cell.id} shows something else under the arithmetic {name!r}:", *problems]))
                continue
            for number, out in enumerate(cell.outputs):
                for (key, text, html), (_, new, _) in zip(texts(out), texts(other.cells[i].outputs[number])):
                    row = rows.setdefault(f"{number} {key}", {})
                    for j, (a, b) in enumerate(zip(tokenise(text, html)[1], tokenise(new, html)[1])):
                        if a.value != b.value: row[j] = max(row.get(j, 0.0), float(f"{abs(a.value - b.value):.3g}"))
        if compared(cell): spread.cells[cell.id] = {key: dict(sorted(row.items())) for key, row in rows.items() if row}
    return spread, flips


def carried(nb: NotebookNode, known: Sequence[tuple[NotebookNode, Spread]]) -> Spread | None:
    """The spread of a notebook whose cells were moved or renamed, and compute what they did: then nothing need be measured again.

    Each cell must show, within what was allowed, what a measured cell of the `known` notebooks shows: the one with its source, or else
    one whose source is gone, those of the notebook that stands first in `known` first. `nb` gets the outputs that were stored, since the
    last digits of this machine are no news; the pictures stay as they are. None where some cell shows what was not measured.
    """
    here = {cell.id for cell in nb.cells}
    old = {c.id: (c, spread) for page, spread in reversed(known) for c in page.cells if compared(c)}
    gone = [(c, spread) for page, spread in known for c in page.cells if compared(c) and c.id not in here]
    result = Spread("", [a for a in known[0][1].arithmetics if all(a in spread.arithmetics for _, spread in known)] if known else [])
    for cell in filter(compared, nb.cells):
        for was, spread in [old[cell.id]] if cell.id in old else gone:
            rows = spread.cells.get(was.id, {})
            if compare_outputs(was.outputs, cell.outputs, Tolerance.of(cell.source), rows, spread.unsettled(was.id)): continue
            result.cells[cell.id] = rows
            gone = [pair for pair in gone if pair[0] is not was]
            for new, stored in zip(cell.outputs, was.outputs):
                if "data" not in new: new.text = stored.text
                else: new.data |= {kind: value for kind, value in stored.data.items() if not kind.startswith("image/")}
            break
        else: return None
    result.notebook = digest(nb)
    return result


def says_nothing(nb: NotebookNode, spread: Spread) -> Iterator[str]:
    "The numbers that may be anything: what is allowed is half of the number or more. And the whole numbers that moved."
    for cell in nb.cells:
        if not compared(cell): continue
        tolerance = Tolerance.of(cell.source)
        for i, out in enumerate(cell.outputs):
            for key, text, html in texts(out):
                numbers = tokenise(text, html)[1]
                measured = spread.cells.get(cell.id, {}).get(f"{i} {key}", {})
                if html and "text/plain" in out.data: continue  # the same once more
                wide = [
                    _said(n, s, tolerance)
                    for n, s in zip(numbers, spreads_of(numbers, measured, spread.unsettled(cell.id)))
                    if s and _wide(n, s, tolerance)
                ]
                whole = [_said(n, measured[j], tolerance) for j, n in enumerate(numbers) if n.whole and j in measured]
                if wide:
                    yield f"cell {cell.id}: {len(wide)} of {len(numbers)} numbers may be half as large: {', '.join(wide[:6])}"
                if whole: yield f"cell {cell.id}: whole numbers that moved: {', '.join(whole[:6])}"


def _wide(number: Number, spread: float, tolerance: Tolerance) -> bool:
    return (
        not number.whole and number.value != 0 and number.allowed(tolerance, spread) >= abs(number.value) / 2 and spread > number.half_unit
    )


def _said(number: Number, spread: float, tolerance: Tolerance) -> str: return f"{number.text} ± {FACTOR * spread:.2g}"
