"""`make run` stores the same bytes each time, and stores nothing of a run that failed. On a small notebook, with real kernels."""

from __future__ import annotations

import base64
import random
import struct
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

import tools.notebooks
from tools.arithmetics import KERNEL_ENV
from tools.notebooks import Unsettled, export, normalise, record_findings, run, store
from tools.spread import Spread, digest, place

TITLE, REPEATED = "# Tiny\n\n> A chapter to be run.", "1 + 1"
EXPORT, PIECES, BAR, FIGURE, SETTLED, TABLE, FOLDER = SOURCES = [
    "#| export\ndef double(x: int) -> int:\n    'Twice `x`.'\n    return 2 * x",
    # flushed piece by piece, so that the kernel sends several messages
    "import sys, time\nfor i in range(4): print(i, flush=True); time.sleep(.05)\nprint('end')",
    "from tqdm import tqdm\nsum(x for x in tqdm(range(1000)))",
    "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([0, 1, 4, 9]); ax.set(xlabel='x', title='squares');",
    "import os\nprint({'set', 'of', 'strings', 'in', 'some', 'order'}, os.environ['PYTHONHASHSEED'])",
    "import pandas as pd\npd.DataFrame({'n': [1, 2]}, index=['a', 'b'])",
    "from pathlib import Path\nPath.cwd().name",
]


def messy_notebook(seed: int) -> nbformat.NotebookNode:
    "The same sources each time, in the state in which different editors leave them."
    rng = random.Random(seed)
    cells = [new_markdown_cell(TITLE), new_code_cell("#| default_exp tiny"), *map(new_code_cell, SOURCES), new_raw_cell("raw")]
    cells += [new_code_cell(REPEATED), new_markdown_cell(TITLE), new_code_cell(f"\n{REPEATED}\n\n")]
    cells += [new_code_cell("  \n"), new_markdown_cell("")]
    for cell in cells:
        cell["id"] = f"{rng.getrandbits(40):x}"
        cell.metadata |= {"scrolled": bool(seed), "ExecuteTime": {"start_time": str(rng.random())}, "vscode": {"languageId": "python"}}
        if cell.cell_type == "code": cell.execution_count = rng.randrange(1, 100)
    cells[2].metadata |= {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}
    cells[3].outputs = [new_output("stream", name="stdout", text=f"stale {rng.random()}")]
    kernel = {"display_name": f"mine {seed}", "language": "python", "name": f"kernel-{seed}"}
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {"x": rng.random()}}}
    language = {"name": "python", "version": f"3.{seed}"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": language, "widgets": widgets})


def code_cells(nb: nbformat.NotebookNode) -> list[nbformat.NotebookNode]: return [c for c in nb.cells if c.cell_type == "code"]


def cell_of(nb: nbformat.NotebookNode, source: str) -> nbformat.NotebookNode:
    [cell] = [c for c in nb.cells if c.source == source]
    return cell


def renormalised(text: str) -> str: return nbformat.writes(normalise(nbformat.reads(text, as_version=4))) + "\n"


class Twice:
    "A notebook, run, and run again; and another editor's copy of it, run once."

    def __init__(self, folder: Path):
        self.path, other = folder / "nbs" / "tiny.ipynb", folder / "nbs" / "other.ipynb"
        self.path.parent.mkdir()
        nbformat.write(messy_notebook(1), self.path)
        nbformat.write(messy_notebook(2), other)
        stored = [list(run([self.path]))]
        self.first, self.spread = self.path.read_bytes(), place(self.path).read_bytes()
        stored += [list(run([self.path])), list(run([other]))]
        assert stored == [[(self.path, [])], [(self.path, [])], [(other, [])]], "and nothing to be said about its numbers"
        self.second, self.spread_again = self.path.read_bytes(), place(self.path).read_bytes()
        self.other = other.read_bytes()
        self.nb = nbformat.read(self.path, as_version=4)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Twice: return Twice(tmp_path_factory.mktemp("run"))


def test_running_again_leaves_the_bytes_as_they_were(twice: Twice):
    assert twice.first == twice.second and twice.spread == twice.spread_again
    assert b"\r" not in twice.first and twice.first.endswith(b"}\n")
    twice.first.decode("utf-8")


def test_the_editor_that_wrote_it_leaves_no_trace(twice: Twice): assert twice.first == twice.other


def test_the_notebook_is_valid_and_a_second_normalising_changes_nothing(twice: Twice):
    nbformat.validate(twice.nb)
    assert renormalised(twice.first.decode()) == twice.first.decode()


def test_cells_are_counted_in_order(twice: Twice):
    assert [c.execution_count for c in code_cells(twice.nb)] == list(range(1, len(SOURCES) + 4))  # default_exp, twice the repeated one
    results = [out for c in code_cells(twice.nb) for out in c.outputs if out.output_type == "execute_result"]
    assert results and all(out.execution_count == c.execution_count for c in code_cells(twice.nb) for out in c.outputs if out in results)


def test_empty_cells_are_dropped_and_nothing_else_is(twice: Twice):
    assert [c.source for c in twice.nb.cells] == [TITLE, "#| default_exp tiny", *SOURCES, "raw", REPEATED, TITLE, REPEATED]


def test_ids_are_unique_and_follow_the_sources(twice: Twice):
    ids = [c.id for c in twice.nb.cells]
    assert len(set(ids)) == len(ids)
    changed = messy_notebook(3)
    cell_of(changed, PIECES).source += "\n"  # no change
    cell_of(changed, BAR).source += "  # a change"
    new = [c.id for c in normalise(changed).cells]
    at = 2 + SOURCES.index(BAR)
    assert [i for i, (a, b) in enumerate(zip(ids, new, strict=True)) if a != b] == [at]
    [text], [code] = (normalise(new_notebook(cells=[new(REPEATED)])).cells for new in (new_markdown_cell, new_code_cell))
    assert text.id != code.id, "a cell that was text and is code now has changed"


def test_metadata_is_what_the_notebook_says_and_no_more(twice: Twice):
    assert twice.nb.metadata == {"kernelspec": tools.notebooks.KERNELSPEC, "language_info": {"name": "python"}}
    assert (twice.nb.nbformat, twice.nb.nbformat_minor) == (4, 5)
    kept = {"tags": ["hide-input"], "jupyter": {"source_hidden": True}}
    assert [c.metadata for c in twice.nb.cells if c.metadata] == [kept] and cell_of(twice.nb, EXPORT).metadata == kept
    assert all(out.metadata == {} for c in code_cells(twice.nb) for out in c.outputs if "metadata" in out)


def test_pieces_of_a_stream_are_joined(twice: Twice):
    [out] = cell_of(twice.nb, PIECES).outputs
    assert (out.output_type, out.name, out.text) == ("stream", "stdout", "0\n1\n2\n3\nend\n")


def test_only_neighbours_of_one_stream_are_joined():
    "What stands between them, or on the other stream, keeps its place."
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d"), (None, "e"), ("stdout", "f"), ("stdout", "g")]
    shown = new_output("display_data", {"text/plain": "e"})
    outputs = [new_output("stream", name=name, text=text) if name else shown for name, text in pieces]
    [cell] = normalise(new_notebook(cells=[new_code_cell("x", outputs=outputs)])).cells
    assert [out.get("text", "e") for out in cell.outputs] == ["ab", "c", "d", "e", "fg"]


def test_a_progress_bar_leaves_nothing(twice: Twice):
    [out] = cell_of(twice.nb, BAR).outputs
    assert out.output_type == "execute_result" and out.data["text/plain"] == "499500"


def test_the_figure_is_stored(twice: Twice):
    [picture] = [out.data["image/png"] for out in cell_of(twice.nb, FIGURE).outputs if "image/png" in out.get("data", {})]
    png = base64.b64decode(picture)
    width, height = struct.unpack(">II", png[16:24])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and width > 300 and height > 200 and len(png) > 5000


def test_the_kernel_stands_in_the_notebooks_folder_and_hashes_alike(twice: Twice):
    assert cell_of(twice.nb, FOLDER).outputs[0].data["text/plain"] == "'nbs'"
    assert cell_of(twice.nb, SETTLED).outputs[0].text.endswith(f" {KERNEL_ENV['PYTHONHASHSEED']}\n")
    assert KERNEL_ENV["PYTHONHASHSEED"].isdigit(), "a random hash seed prints sets in random order"


def test_a_rich_output_keeps_all_its_forms(twice: Twice):
    [out] = cell_of(twice.nb, TABLE).outputs
    assert set(out.data) == {"text/plain", "text/html"}


def test_an_export_does_not_touch_the_notebook(twice: Twice, tmp_path: Path):
    "nbdev reads the notebooks and writes modules; outputs and counts stay (nbdev_clean would delete the counts)."
    (tmp_path / "settings.ini").write_bytes((tools.notebooks.ROOT / "settings.ini").read_bytes())
    page = tmp_path / "nbs" / "tiny.ipynb"
    page.parent.mkdir()
    page.write_bytes(twice.first)
    export(tmp_path)
    assert page.read_bytes() == twice.first
    module = (tmp_path / "lmbook" / "tiny.py").read_text(encoding="utf-8")
    assert "def double(x: int) -> int:" in module and REPEATED not in module
    assert f"# %% ../nbs/tiny.ipynb #{cell_of(twice.nb, EXPORT).id}" in module, "the export names cells by their stable ids"
    export(tmp_path)
    assert (tmp_path / "lmbook" / "tiny.py").read_text(encoding="utf-8") == module


def test_a_cell_that_fails_stores_nothing(tmp_path: Path):
    path = tmp_path / "fails.ipynb"
    sources = "print('before')", "assert False, 'this is wrong'", "print('after')"
    kept = [new_output("stream", name="stdout", text="of an earlier run")]
    store(normalise(new_notebook(cells=[new_code_cell(source, outputs=kept, execution_count=7) for source in sources])), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="this is wrong"): list(run([path]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# What a machine with two threads makes of them stands for what another processor does. The first two are fine.
THREADS = "import os\nthreads = int(os.environ['OMP_NUM_THREADS'])"
MOVES, WHOLE, WORD, OUTPUTS, FAILS, WIDE = [
    "print(f'{2 + threads / 100:.3f} and {3 + threads / 1000:.3f} of 7')",
    "print(f'{100 + threads} steps')",
    "print('the best is', 'ab'[threads - 1])",
    "if threads == 2: print('more')",
    "assert threads == 1, 'a last bit decides'",
    "print(f'{threads - 1.95:.2f}')",
]


def page_of(folder: Path, *sources: str) -> Path:
    path = folder / "nbs" / "page.ipynb"
    path.parent.mkdir(exist_ok=True)
    store(normalise(new_notebook(cells=[new_code_cell(source) for source in (THREADS, *sources)])), path)
    return path


def test_how_far_numbers_move_is_kept_beside_the_notebook(tmp_path: Path):
    path = page_of(tmp_path, MOVES, WHOLE)
    [(_, notes)] = run([path])
    spread, nb = Spread.load(path), nbformat.read(path, as_version=4)
    moves, whole = (cell_of(nb, source).id for source in (MOVES, WHOLE))
    assert spread == Spread(
        digest(nb), ["oldest", "AVX2", "two threads"], {moves: {"0 stdout": {0: 0.01, 1: 0.001}}, whole: {"0 stdout": {0: 1.0}}}
    )
    assert notes == [f"cell {whole}: whole numbers that moved: 101 ± 4"], "a writer should know"
    assert not list(spread.problems(nb))


def test_a_number_that_says_nothing_is_reported(tmp_path: Path):
    [(_, [note])] = run([page_of(tmp_path, WIDE)])
    assert "1 of 1 numbers may be half as large: -0.95 ± 4" in note


@pytest.mark.parametrize(
    "source, says",
    [(WORD, "the text differs"), (OUTPUTS, "unexpected output"), (FAILS, "under the arithmetic 'two threads'")],
    ids=["a word", "an output", "an assert"],
)
def test_what_no_tolerance_covers_is_not_stored(tmp_path: Path, source: str, says: str):
    path, good = page_of(tmp_path, source), tmp_path / "nbs" / "good.ipynb"
    good.write_bytes(page_of(tmp_path / "nbs", MOVES).read_bytes())
    before, stored = path.read_bytes(), []
    with pytest.raises(Unsettled, match=says):
        for page, _ in run([path, good]): stored.append(page)
    assert path.read_bytes() == before and not place(path).exists()
    assert stored == [good] and place(good).exists(), "and the others are"


def test_a_draft_measures_nothing_and_lets_no_old_spread_stand(tmp_path: Path):
    path = page_of(tmp_path, MOVES)
    list(run([path]))
    assert place(path).exists()
    [(_, notes)] = run([path], measured=[])
    assert not notes and not place(path).exists() and cell_of(nbformat.read(path, as_version=4), MOVES).outputs


def test_a_spread_vouches_for_one_state_of_one_notebook(tmp_path: Path):
    path = page_of(tmp_path, MOVES)
    list(run([path]))
    nb, spread = nbformat.read(path, as_version=4), Spread.load(path)
    cell = cell_of(nb, MOVES)
    shown = cell.outputs[0].text
    cell.outputs[0].text = shown.replace("2.01", "2.02")
    assert "other cells or outputs" in "".join(spread.problems(nb)), "an output was edited"
    cell.outputs[0].text, cell.source = shown, cell.source + " "
    assert "other cells or outputs" in "".join(spread.problems(nb)), "a cell was edited"
    spread = Spread(digest(nb), spread.arithmetics, {})
    assert cell.id in "".join(spread.problems(nb)), "a cell was left out"
    place(path).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"\.spread/page\.json cannot be read"): Spread.load(path)


BOX = "D1-02 wrong\n  says:  It does.\n  found: It takes 1.25 \"bits\", not 2."


def test_the_list_of_claims_gets_the_findings_that_were_stored(tmp_path: Path):
    claims, page = tmp_path / "claims.toml", tmp_path / "02_two.ipynb"
    block = '[[claim]]\nid = "{}"\nfinding = "old"\nevidence = "{}#Heading"\n\n'
    claims.write_text(
        block.format("D1-01", "02_two") + block.format("D1-02", "02_two") + block.format("D1-03", "03_three"), encoding="utf-8"
    )
    outputs = [new_output("execute_result", {"text/plain": text}, execution_count=1) for text in (BOX, BOX.replace("D1-02", "D1-03"))]
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=outputs, execution_count=1)]), page)
    record_findings([page], claims)
    found = {row["id"]: row["finding"] for row in tomllib.loads(claims.read_text(encoding="utf-8"))["claim"]}
    assert found == {"D1-01": "old", "D1-02": 'It takes 1.25 "bits", not 2.', "D1-03": "old"}, "only where the notebook is the evidence"


def test_an_interrupt_while_storing_leaves_the_old_notebook_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.ipynb"
    store(normalise(new_notebook(cells=[new_code_cell("1")])), path)
    before = path.read_bytes()

    def interrupted(self: Path, *_: object, **__: object) -> None:
        with open(self, "w", encoding="utf-8") as f: f.write('{"cells": [')
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt): store(normalise(new_notebook(cells=[new_code_cell("2")])), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("page", tools.notebooks.notebooks(), ids=lambda path: path.stem)
def test_every_chapter_is_stored_as_a_run_leaves_it(page: Path):
    text = page.read_text(encoding="utf-8")
    assert renormalised(text) == text, f"make run NB=nbs/{page.name}"


def test_chapters_are_read_in_order(): assert [p.stem for p in tools.notebooks.notebooks()][:2] == ["index", "00_tour"]
