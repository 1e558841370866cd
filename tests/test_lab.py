"""The real JupyterLab: `make lab` on machines of many kinds, and a reader who opens the tour in a real browser and runs all cells.

Each server has settings and a port of its own. In the browser it shows a copy of `nbs/`; `LMBOOK_LAB_NOTEBOOK` names another notebook.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns, which
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import nbformat
import pytest

pytest.importorskip("playwright", reason="the browser tests need playwright (pip install -e '.[dev]')")
pytest.importorskip("jupyterlab", reason="this test needs jupyterlab (pip install -e '.[dev]')")
from jupyter_client import BlockingKernelClient

from tests import browser as br
from tools import lab as tool

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = Path(os.environ.get("LMBOOK_LAB_NOTEBOOK", ROOT / "nbs" / "00_tour.ipynb")).resolve()
MINUTES = 8  # for all cells, on a slow and busy machine

pytestmark = pytest.mark.slow
CELL = "import matplotlib.pyplot; print('ran')"  # matplotlib, like IPython, warns about a home that it cannot write
needs_make = pytest.mark.skipif(not which("make") or os.name == "nt", reason="no make here: the README gives the plain lines")


# ------------------------------------------------------------------------------------------------------------------------------- make lab

class MakeLab:
    "A running `make lab`: the process, and what it has printed so far."

    def __init__(self, process: subprocess.Popen, log: Path) -> None: self.process, self.log = process, log

    @property
    def printed(self) -> str: return self.log.read_text(encoding="utf-8")

    def wait_for(self, pattern: str) -> re.Match:
        "The first place that fits, once it has been printed."
        wait_until(lambda: re.search(pattern, self.printed) or self.process.poll() is not None, lambda: self.printed)
        found = re.search(pattern, self.printed)
        assert found, f"it ended without {pattern!r}:\n{self.printed}"
        return found

    def address(self) -> str:
        "The address that it prints, and nothing but once; the rest of what it has to say stands in lines of their own."
        self.wait_for("To stop it:")
        addresses = re.findall(r"https?://\S+", self.printed)
        assert len(addresses) == 1, self.printed
        return addresses[0]

    def stop(self) -> str:
        "End it as `docker stop` would; all that it printed."
        self.process.terminate()
        self.process.wait(60)
        return self.printed


def wait_until(done: Callable[[], object], state: Callable[[], object] = lambda: "") -> None:
    "Look again and again. The limit is for a test that hangs, not a measure of speed."
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, state()
        time.sleep(0.2)


def hold_port() -> socket.socket:
    "A listening socket on some port, below those that systems hand out by themselves: nobody takes its neighbours by chance."
    while True:
        try: return socket.create_server(("127.0.0.1", 20_000 + secrets.randbelow(10_000)))
        except OSError: pass


@contextmanager
def make_lab(folder: Path, stdin: int = subprocess.DEVNULL, **env: str) -> Iterator[MakeLab]:
    """The real `make lab`, with this interpreter for the environment's, as a user whose home is empty and who has no display.

    The port was free a moment ago: a test does not depend on what else runs on this machine.
    """
    unwanted = ("MAKE", "MFLAGS", "PYTHON", "COV", "JUPYTER", "IPYTHON", "XDG_", "LAB_", "SSH_", "CI", "DISPLAY", "WAYLAND", "BROWSER")
    home = folder / "home"
    home.mkdir()
    with hold_port() as free: port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)} | {"HOME": str(home), "LAB_PORT": str(port)} | env
    log = folder / "make-lab.log"
    command = ["make", "--old-file=.venv/installed-python3", f"PY={sys.executable}", "lab"]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=stdin, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try: yield MakeLab(process, log)
    finally:
        process.terminate()
        try: process.wait(60)
        finally:
            try: os.killpg(process.pid, signal.SIGKILL)  # whatever is left
            except ProcessLookupError: pass


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=60) as answer: return answer.status
    except HTTPError as e: return e.code


def check_answers(address: str) -> None:
    "The address leads to the tour with its token, and to nothing without it or with another one."
    parts = urlsplit(address)
    assert parts.path == "/lab/tree/00_tour.ipynb" and re.fullmatch(r"token=\w{40,}", parts.query)
    with urlopen(address, timeout=60) as page: assert page.status == 200 and urlsplit(page.url).path == parts.path, "it asked to log in"
    with urlopen(f"{parts.scheme}://{parts.netloc}{parts.path}", timeout=60) as page: assert urlsplit(page.url).path == "/login"
    tour = f"{parts.scheme}://{parts.netloc}/api/contents/00_tour.ipynb"
    assert [status(tour + query) for query in (f"?{parts.query}", "", "?token=", "?token=wrong")] == [200, 403, 403, 403]


def run_cell(address: str, folder: Path, code: str) -> str:
    "Run a cell in a kernel that the server starts for it; all that it printed, warnings included."
    parts = urlsplit(address)
    headers = {"Authorization": "token " + parts.query.removeprefix("token=")}
    request = Request(f"{parts.scheme}://{parts.netloc}/api/kernels", data=b"{}", headers=headers)
    with urlopen(request, timeout=60) as answer: kernel = json.load(answer)["id"]
    [connection] = folder.rglob(f"kernel-{kernel}.json")
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels(hb=False)  # on a busy machine a heartbeat is late, and the kernel is taken for dead
    printed: list[str] = []

    def note(message: dict) -> None: printed.extend([message["content"].get("text", ""), *message["content"].get("traceback", [])])

    try:
        client.wait_for_ready(timeout=120)
        client.execute_interactive(code, timeout=120, output_hook=note)
    finally: client.stop_channels()
    return "".join(printed)


@needs_make
def test_make_lab_prints_an_address_that_answers(tmp_path):
    "In an empty home, without a display, as whoever runs the tests: root, too."
    with make_lab(tmp_path) as lab:
        check_answers(lab.address())
        assert run_cell(lab.address(), tmp_path, CELL) == "ran\n"
        said = lab.stop()
    assert len(re.findall("^Running as root", said, re.MULTILINE)) == said.count("--allow-root") == (os.geteuid() == 0)
    assert ("LAB_IP=0.0.0.0 make lab" in said) == tool.in_container() and "cannot be written" not in said
    assert "Traceback" not in said and "is taken" not in said


@needs_make
@pytest.mark.parametrize("busy", [1, 50])
def test_a_busy_port_is_passed_over(tmp_path, busy: int):
    "What holds the ports is not Jupyter and never answers."
    with ExitStack() as stack:
        first = stack.enter_context(hold_port()).getsockname()[1]
        for port in range(first + 1, first + busy):
            try: stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError: pass  # somebody has it already
        with make_lab(tmp_path, LAB_PORT=str(first)) as lab:
            address = lab.address()
            check_answers(address)
            port = urlsplit(address).port
            assert port not in range(first, first + busy) and f"Port {first} is taken: this is {port}.\n" in lab.printed


@needs_make
def test_another_interface_is_served_with_the_token_too(tmp_path):
    "As in a container whose port is published. The address printed is one that can be gone to."
    with make_lab(tmp_path, LAB_IP="0.0.0.0") as lab:
        address = lab.address()
        assert urlsplit(address).hostname == "127.0.0.1" and "From outside" not in lab.printed
        check_answers(address)


@needs_make
def test_a_home_that_cannot_be_written_is_replaced(tmp_path):
    "Not even root makes a folder below a file."
    (tmp_path / "file").touch()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with make_lab(tmp_path, HOME=str(tmp_path / "file" / "home"), TMPDIR=str(temporary)) as lab:
        check_answers(lab.address())
        assert run_cell(lab.address(), temporary, CELL) == "ran\n"
        assert [*temporary.glob("lmbook-home-*")]
        said = lab.stop()
    assert said.count("cannot be written") == 1 and "Traceback" not in said
    assert not [*temporary.glob("lmbook-home-*")], "it is left behind"


@needs_make
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a display is always there")
@pytest.mark.parametrize(("env", "opens"), [({}, False), ({"DISPLAY": ":99"}, True), ({"DISPLAY": ":99", "CI": "true"}, False)])
def test_a_browser_is_opened_where_there_is_a_display(tmp_path, env: dict[str, str], opens: bool):
    "The browser is a script that notes that it was called. The server's process does not end before it, so nothing comes later."
    note, browser = tmp_path / "note", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {note}\n', encoding="utf-8")
    browser.chmod(0o755)
    with make_lab(tmp_path, BROWSER=str(browser), **env) as lab:
        lab.address()
        lab.stop()
    assert note.exists() == opens


@needs_make
@pytest.mark.parametrize("answer", ["y", "Ctrl-C"])
def test_ctrl_c_asks_and_then_stops_it(tmp_path, answer: str):
    "In a terminal, where the signal goes to make and to the server."
    terminal, stdin = os.openpty()
    try:
        with make_lab(tmp_path, stdin=stdin) as lab:
            lab.address()
            os.killpg(lab.process.pid, signal.SIGINT)
            lab.wait_for(r"Shut down this Jupyter server \(y/\[n\]\)\?")
            assert lab.process.poll() is None
            if answer == "y": os.write(terminal, b"y\n")
            else: os.killpg(lab.process.pid, signal.SIGINT)
            lab.process.wait(60)
            assert "Traceback" not in lab.printed and "Error" not in lab.printed
            with pytest.raises(OSError): urlopen(lab.address(), timeout=60)
    finally:
        os.close(terminal)
        os.close(stdin)


@pytest.mark.parametrize(
    ("platform", "env", "name", "opens"),
    [
        ("linux", {}, "firefox", False),
        ("linux", {"DISPLAY": ":0"}, "firefox", True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, "xdg-open", True),
        ("linux", {"DISPLAY": ":0"}, "/usr/bin/w3m", False),
        ("linux", {"DISPLAY": ":0"}, None, False),
        ("linux", {"DISPLAY": "localhost:10.0", "SSH_CONNECTION": "a 1 b 22"}, "firefox", False),
        ("linux", {"DISPLAY": ":0", "CI": "true"}, "firefox", False),
        ("darwin", {}, None, True),
        ("win32", {}, None, True),
        ("darwin", {"SSH_CONNECTION": "a 1 b 22"}, None, False),
    ],
)
def test_who_gets_a_browser(monkeypatch, platform: str, env: dict[str, str], name: str | None, opens: bool):
    def get() -> webbrowser.BaseBrowser:
        if name is None: raise webbrowser.Error("could not locate runnable browser")
        return webbrowser.GenericBrowser(name)

    monkeypatch.setattr(webbrowser, "get", get)
    assert tool.opens_browser(env, platform) == opens
    assert ("--no-browser" in tool.arguments(env)) == (not tool.opens_browser(env))


@pytest.mark.parametrize(
    ("file", "text", "env", "inside"),
    [
        ("proc/1/cgroup", "0::/init.scope\n", {}, False),
        ("proc/1/cgroup", "12:cpuset:/docker/3f2a\n", {}, True),
        ("proc/1/cgroup", "1:name=systemd:/kubepods/besteffort/pod7\n", {}, True),
        (".dockerenv", "", {}, True),
        ("run/.containerenv", "", {}, True),
        ("etc/hostname", "book\n", {}, False),
        ("etc/hostname", "book\n", {"container": "podman"}, True),
    ],
)
def test_what_a_container_looks_like(tmp_path, file: str, text: str, env: dict[str, str], inside: bool):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert tool.in_container(tmp_path, env) == inside


# -------------------------------------------------------------------------------------------------------------------------- in the browser



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
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(settings(tmp_path / "settings")),
        "JUPYTER_TOKEN": token,
        "OMP_NUM_THREADS": "1",
    }  # another worker tests beside this one
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


@pytest.mark.browser
def test_a_reader_runs_all_cells_of_the_tour(lab):
    if not (lab.folder / NOTEBOOK.name).exists(): pytest.fail(f"there is no {NOTEBOOK}")
    with br.launched() as chrome:
        page = chrome.new_page(viewport={"width": 1400, "height": 1000})
        nb = run_all(page, lab, NOTEBOOK.name)
        assert not errors(nb)
        assert not counts_problems(nb)
        assert any("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])), "the tour draws at least one figure"
        assert not unseen(page, nb)


@pytest.mark.browser
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
