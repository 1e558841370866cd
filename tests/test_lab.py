"""The real JupyterLab in a real browser: a reader opens the tour and runs all cells.

It runs on a copy of `nbs/`, with settings of its own, and on a port that is free. `LMBOOK_LAB_NOTEBOOK` names another notebook to try.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from urllib.request import Request, urlopen

import nbformat
import pytest

pytest.importorskip("playwright", reason="the browser tests need playwright (pip install -e '.[dev]')")
pytest.importorskip("jupyterlab", reason="this test needs jupyterlab (pip install -e '.[dev]')")
from tests import browser as br

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(os.environ.get("LMBOOK_LAB_NOTEBOOK", ROOT / "nbs" / "00_tour.ipynb")).resolve()
MINUTES = 8  # for all cells, on a slow and busy machine

pytestmark = [pytest.mark.browser, pytest.mark.slow]


class Lab:
    "A running JupyterLab: its address, its token, and the folder that it shows."

    def __init__(self, url: str, token: str, folder: Path) -> None:
        self.url, self.token, self.folder = url, token, folder

    def kernels(self) -> list[dict]:
        request = Request(f"{self.url}api/kernels", headers={"Authorization": f"token {self.token}"})
        with urlopen(request, timeout=60) as answer: return json.load(answer)


def settings(folder: Path) -> Path:
    "All cells are in the page, also those that are scrolled out of sight, so that the test can look at them."
    file = folder / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"windowingMode": "none", "kernelShutdown": True}), encoding="utf-8")
    return folder


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    folder = copytree(NOTEBOOK.parent, tmp_path / "nbs", ignore=ignore_patterns(".*"))
    token = secrets.token_hex(16)
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython",
           "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "XDG_CACHE_HOME": "cache"}  # fmt: skip
    env = os.environ | {name: str(tmp_path / where) for name, where in own.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(settings(tmp_path / "settings")), "JUPYTER_TOKEN": token, "OMP_NUM_THREADS": "1"}  # another worker tests beside this one
    # A reader has the project installed; here it need not be, so the kernel is told where it is.
    env["PYTHONPATH"] = os.pathsep.join(p for p in [str(NOTEBOOK.parent.parent), str(ROOT), env.get("PYTHONPATH", "")] if p)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.root_dir={folder}", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    log = tmp_path / "lab.log"
    with log.open("w", encoding="utf-8") as out: process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield Lab(wait_for_server(tmp_path / "runtime", process, log), token, folder)
    finally:
        process.terminate()  # JupyterLab ends its kernels with it
        try: process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_server(runtime: Path, process: subprocess.Popen, log: Path) -> str:
    "The address of the server, from the file that it writes when it listens."
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            try: return json.loads(file.read_text(encoding="utf-8"))["url"]
            except (json.JSONDecodeError, KeyError): pass  # half written
        time.sleep(0.2)
    raise AssertionError("JupyterLab did not start:\n" + log.read_text(encoding="utf-8")[-3000:])


def run_all(page, lab: Lab, name: str, minutes: float = MINUTES) -> nbformat.NotebookNode:
    "Run all cells through the menu, as a reader does; the saved notebook when the kernel has come to rest."
    page.goto(f"{lab.url}lab/tree/{name}?token={lab.token}", wait_until="load", timeout=120_000)
    page.locator(".jp-NotebookPanel .jp-Notebook").wait_for(timeout=120_000)
    deadline = time.monotonic() + 120
    while not any(k["execution_state"] in {"idle", "busy"} for k in lab.kernels()):
        assert time.monotonic() < deadline, "the kernel did not start"
        page.wait_for_timeout(500)
    # Forget the stored outputs first: what is seen at the end was made by this run.
    menu(page, "Edit", "Clear Outputs of All Cells")
    menu(page, "Run", "Run All Cells")
    deadline = time.monotonic() + 60 * minutes
    waiting = None
    while True:
        assert time.monotonic() < deadline, f"after {minutes} minutes {waiting} cells had not run"
        page.wait_for_timeout(2000)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        try: nb = nbformat.read(lab.folder / name, as_version=4)
        except nbformat.reader.NotJSONError: continue  # the lab is writing it just now
        code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
        waiting = sum(not c.execution_count for c in code)
        failed = any(o.output_type == "error" for c in code for o in c.outputs)
        if all(k["execution_state"] == "idle" for k in lab.kernels()) and (failed or not waiting): return nb


def menu(page, name: str, entry: str) -> None:
    page.get_by_role("menuitem", name=name, exact=True).first.click()
    page.locator(".lm-Menu").get_by_role("menuitem", name=entry).first.click()


def errors(nb: nbformat.NotebookNode) -> list[str]:
    "The errors among the outputs, in words."
    return [f"cell {i}: {o.ename}: {o.evalue}" for i, c in enumerate(nb.cells) for o in c.get("outputs", []) if o.output_type == "error"]


def counts_problems(nb: nbformat.NotebookNode) -> list[str]:
    "Code cells that did not run exactly once, from top to bottom."
    counts = [c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts {counts}"]


def unseen(page, nb: nbformat.NotebookNode) -> list[str]:
    "Outputs in the file that a reader of the page does not see: pictures that did not load, and texts that are not there."
    problems = []
    cells = page.locator(".jp-NotebookPanel .jp-Notebook .jp-Cell")
    if cells.count() != len(nb.cells): return [f"the page shows {cells.count()} cells of {len(nb.cells)}"]
    for i, cell in enumerate(nb.cells):
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data or "image/svg+xml" in data:
                cells.nth(i).scroll_into_view_if_needed()
                widths = cells.nth(i).locator(".jp-OutputArea img").evaluate_all("all => all.map((e) => e.naturalWidth)")
                if not widths or 0 in widths: problems.append(f"cell {i}: a figure is not shown")
                continue
            text = out.get("text") or ("" if "text/html" in data else data.get("text/plain", ""))
            words = " ".join(text.split())[:60]
            shown = " ".join(" ".join(cells.nth(i).locator(".jp-OutputArea").all_inner_texts()).split())
            if words and words not in shown: problems.append(f"cell {i}: {words!r} is not shown")
    return problems


def test_a_reader_runs_all_cells_of_the_tour(lab):
    if not (lab.folder / NOTEBOOK.name).exists(): pytest.fail(f"there is no {NOTEBOOK}")
    with br.launched() as chrome:
        page = chrome.new_page(viewport={"width": 1400, "height": 1000})
        nb = run_all(page, lab, NOTEBOOK.name)
        assert not errors(nb)
        assert not counts_problems(nb)
        assert any("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])), "the tour draws at least one figure"
        assert not unseen(page, nb)


def test_a_cell_that_fails_and_a_picture_that_is_missing_are_seen(lab):
    cells = [nbformat.v4.new_code_cell("1 / 1"), nbformat.v4.new_code_cell("1 / 0"), nbformat.v4.new_code_cell("2")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / "fails.ipynb")
    with br.launched() as chrome:
        page = chrome.new_page(viewport={"width": 1400, "height": 1000})
        nb = run_all(page, lab, "fails.ipynb", minutes=2)
        assert errors(nb) == ["cell 1: ZeroDivisionError: division by zero"] and counts_problems(nb) == ["execution counts [1, 2, None]"]
        assert unseen(page, nb) == []
        nb.cells[0].outputs[0].data["text/plain"] = "something else"
        nb.cells[1].outputs = [nbformat.v4.new_output("display_data", {"image/png": "x"})]
        assert unseen(page, nb) == ["cell 0: 'something else' is not shown", "cell 1: a figure is not shown"]
