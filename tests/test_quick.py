"""`make quick`: what a notebook or a test file is said to depend on, what is run after a change, and what is written down."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tools.inputs
import tools.quick
from tools.inputs import Tree
from tools.quick import FORMAT, OPTIONS, RECORD, fingerprints, load, main, save, why

HERE = Path(__file__).resolve().parent.parent
CELLS = {
    "nbs/01_one.ipynb": ["# One", "from lmbook.one import f\nf()"],
    "nbs/02_two.ipynb": ["# Two", "%time 1\nimport lmbook.two as two\nawait g()"],
    "nbs/03_lazy.ipynb": ["# Lazy", "def f():\n    from lmbook import lazy\n"],
    "nbs/04_free.ipynb": ["# Free", "print('one')"],
    "nbs/05_reads.ipynb": [
        "# Reads", 'from lmbook.claims import check_claim\ncheck_claim("D1-01")', 'open("../benchmarks/results/speed.json")',
    ],
    "nbs/06_claims.ipynb": ["# Claims", "from lmbook.claims import load_claims"],
}
FILES = {
    ".gitignore": ".venv/\ndocs/_build/\n.quick.json*\n__pycache__/\n.pytest_cache/\n",
    "README.md": "Read me.\n",
    "constraints.txt": "torch==2\n",
    "pyproject.toml": "[tool.pytest.ini_options]\n",
    "conftest.py": 'pytest_plugins = ["tests.plugin"]\n',
    "lmbook/__init__.py": "",
    "lmbook/base.py": "",
    "lmbook/one.py": "from lmbook.base import x\n",
    "lmbook/two.py": "from .one import f\nfrom . import base\n",
    "lmbook/lazy.py": 'def f():\n    "See lmbook.alone."\n    import lmbook.two\n    raise ValueError("use lmbook.alone")\n',
    "lmbook/alone.py": "",
    "lmbook/claims.py": 'from importlib import resources\nresources.files("lmbook.data").joinpath("claims.toml")\n',
    "lmbook/data/claims.toml": '[[claim]]\nid = "D1-01"\nverdict = "holds"\n\n[[claim]]\nid = "D1-02"\nverdict = "wrong"\n',
    "lmbook/data/other.toml": "",
    "benchmarks/results/speed.json": "{}",
    "benchmarks/results/size.json": "{}",
    "nbs/.spread/01_one.json": "{}",
    "tools/__init__.py": "",
    "tools/judge.py": "",
    "tests/__init__.py": "",
    "tests/plugin.py": "import tools.judge\n",
    "tests/helper.py": "from lmbook import alone\n",
    "tests/where.py": "from pathlib import Path\nROOT = Path(__file__).resolve().parent.parent\n",
    "tests/test_one.py": "from lmbook.one import f\n",
    "tests/test_two.py": "import lmbook\ndef test_it(): lmbook.two.f\n",
    "tests/test_helped.py": "from tests import helper\n",
    "tests/test_program.py":
        'from tests.where import ROOT\nimport subprocess\nsubprocess.run(["x", "-c", "from lmbook.alone import y"], cwd=ROOT)\n',
    "tests/test_all.py": "from tests.where import ROOT\nfor page in pages: (ROOT / page).read_text()\n",
    "tests/test_named.py": 'from tests.where import ROOT\nTEXT = (ROOT / "README.md").read_text()\n',
}
ALL = {name for name in [*CELLS, *FILES] if name.endswith(".ipynb") or "/test_" in name}
READS_ALL = {"tests/test_all.py"}


def page(*cells: str) -> str:
    "A notebook, its first cell prose."
    kinds = ["markdown", *["code"] * len(cells)]
    return json.dumps({"cells": [{"cell_type": k, "source": c.splitlines(keepends=True)} for k, c in zip(kinds, cells)]})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in (FILES | {name: page(*cells) for name, cells in CELLS.items()}).items(): write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def touched(root: Path, change: Callable[[], object]) -> set[str]:
    "What has to run after a change, if all had passed before it."
    before = fingerprints(Tree(root))
    assert set(before) == ALL
    change()
    return {unit for unit, now in fingerprints(Tree(root)).items() if why(now, before.get(unit))}


# ------------------------------------------------------------------------------------------------------------------- what a change touches

ONE = {"nbs/01_one.ipynb", "tests/test_one.py"}
TWO = {"nbs/02_two.ipynb", "nbs/03_lazy.ipynb", "tests/test_two.py"}


@pytest.mark.parametrize("name, units", [
    ("lmbook/base.py", ONE | TWO),  # two steps away
    ("lmbook/one.py", ONE | TWO),
    ("lmbook/two.py", TWO),
    ("lmbook/lazy.py", {"nbs/03_lazy.ipynb"}),
    ("lmbook/alone.py", {"tests/test_helped.py", "tests/test_program.py"}),  # not those in whose messages it stands
    ("lmbook/__init__.py", ALL - {"nbs/04_free.ipynb", "tests/test_named.py"}),
    ("lmbook/claims.py", {"nbs/05_reads.ipynb", "nbs/06_claims.ipynb"}),
    ("lmbook/data/other.toml", set()),
    ("benchmarks/results/speed.json", {"nbs/05_reads.ipynb"}),
    ("benchmarks/results/size.json", set()),
    ("README.md", {"tests/test_named.py"}),
    ("tests/helper.py", {"tests/test_helped.py"}),
    ("tests/where.py", {"tests/test_program.py", "tests/test_named.py"}),
    ("nbs/.spread/01_one.json", {"nbs/01_one.ipynb"}),
    *((name, {name}) for name in sorted(ALL - READS_ALL)),
    *((name, ALL) for name in ("constraints.txt", "pyproject.toml", "conftest.py", "tests/plugin.py")),
    *((name, ALL) for name in ("tools/judge.py", "tools/__init__.py")),
])  # fmt: skip
def test_a_change_touches_what_reaches_it(root: Path, name: str, units: set[str]):
    text = (root / name).read_text(encoding="utf-8")
    assert touched(root, lambda: (root / name).write_text(text + "\n", encoding="utf-8")) == units | READS_ALL


def test_a_markdown_cell_is_part_of_its_notebook(root: Path):
    name = "nbs/01_one.ipynb"
    assert touched(root, lambda: write(root / name, page("# Uno", CELLS[name][1]))) == {name} | READS_ALL


def test_nothing_touches_nothing(root: Path):
    assert touched(root, lambda: None) == set()
    assert touched(root, lambda: write(root / "docs/_build/x.html", "")) == set(), "what git ignores is no input"


@pytest.mark.parametrize("claim, units", [("D1-01", {"nbs/05_reads.ipynb", "nbs/06_claims.ipynb"}), ("D1-02", {"nbs/06_claims.ipynb"})])
def test_a_verdict_touches_the_notebooks_that_check_it(root: Path, claim: str, units: set[str]):
    path = root / "lmbook/data/claims.toml"
    text = re.sub(rf'(id = "{claim}"\nverdict = )".*"', r'\1"holds if it rains"', path.read_text(encoding="utf-8"))
    assert touched(root, lambda: write(path, text)) == units | READS_ALL


def test_a_deleted_file_touches_what_reached_it(root: Path):
    assert touched(root, (root / "lmbook/two.py").unlink) == TWO | READS_ALL
    now, before = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0", "d": "4"}
    assert why(now, before) == ["b changed", "c is new", "d is gone"] and why(now, now) == [] and why(now, None)


def test_a_new_module_touches_what_had_asked_for_it(root: Path):
    write(root / "tests/test_one.py", "try: import lmbook.late\nexcept ImportError: pass\n")
    assert touched(root, lambda: write(root / "lmbook/late.py", "")) == {"tests/test_one.py"} | READS_ALL


def test_a_module_that_became_a_package_is_another(root: Path):
    assert touched(root, lambda: write(root / "lmbook/one/__init__.py", "")) == ONE | TWO | READS_ALL


def test_a_renamed_notebook_is_run(root: Path):
    assert touched(root, lambda: (root / "nbs/04_free.ipynb").rename(root / "nbs/05_free.ipynb")) == {"nbs/05_free.ipynb"} | READS_ALL


def test_python_and_the_installed_packages_touch_all(root: Path, monkeypatch: pytest.MonkeyPatch):
    assert touched(root, lambda: monkeypatch.setattr("platform.python_version", lambda: "3.99")) == ALL
    write(root / "site/new-1.0.dist-info/METADATA", "")
    assert touched(root, lambda: monkeypatch.syspath_prepend(root / "site")) == ALL


PLACE = "import os\nfrom pathlib import Path\nROOT = Path(__file__).parents[1]\n"
MODULES = {f"lmbook/{name}.py" for name in ("__init__", "base", "one", "two", "lazy", "alone", "claims")}
DATA = {"lmbook/data/claims.toml", "lmbook/data/other.toml"}
RESULTS = {"benchmarks/results/speed.json", "benchmarks/results/size.json"}


@pytest.mark.parametrize("source, named", [
    ("import lmbook.alone, os", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("from lmbook import (alone, nothing)", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("from lmbook.alone import *", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("from lmbook import *", MODULES | {"lmbook/data/claims.toml"}),
    ("class A:\n  def f(self):\n    if 1: import lmbook.alone", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("from . import helper", {"tests/__init__.py", "tests/helper.py", "lmbook/__init__.py", "lmbook/alone.py"}),
    ("from .helper import x", {"tests/__init__.py", "tests/helper.py", "lmbook/__init__.py", "lmbook/alone.py"}),
    ("import torch, lmbookish", set()),
    ("import importlib\nimportlib.import_module('lmbook.alone')", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("import importlib\nimportlib.import_module(f'lmbook.{name}')", MODULES | DATA),
    ("import importlib\nimportlib.import_module('lmbook.' + name)", MODULES | DATA),
    ("import importlib\nimportlib.import_module('.one', 'lmbook')", None),
    ("P = 'import os; from lmbook import alone'", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("P = f'from lmbook import {name}'", MODULES | DATA),
    ("P = ['-m', 'lmbook.alone']", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("P = ['-m', 'tools.judge']", set()),  # a judge of all in any case
    ('def f(): "As lmbook.alone does."', set()),
    ("from importlib import resources\nresources.files('lmbook.data')", {"lmbook/__init__.py"} | DATA),
    ("from importlib import resources\nresources.files('lmbook.data') / 'other.toml'", {"lmbook/__init__.py", "lmbook/data/other.toml"}),
    ("from importlib import resources\nresources.files('lmbook')", MODULES | DATA),
    ("style.use('lmbook.data.other')", {"lmbook/__init__.py", "lmbook/data/other.toml"}),
    ("open('benchmarks/results/size.json')", {"benchmarks/results/size.json"}),
    ("open(f'benchmarks/results/{name}.json')", RESULTS),
    ("open('README.md')", {"README.md"}),
    ("def f(tmp_path): (tmp_path / 'README.md').read_text()", set()),
    (PLACE + "(ROOT / 'benchmarks' / 'results' / 'size.json').read_text()", {"benchmarks/results/size.json"}),
    (PLACE + "FOLDER = ROOT / 'benchmarks'\nFOLDER.glob('*')", RESULTS),
    (PLACE + "(ROOT / 'benchmarks' / name).read_text()", RESULTS),
    (PLACE + "env = {'PYTHONPATH': str(ROOT)}; run(cwd=ROOT); f'{ROOT}'; os.chdir(ROOT); home, x = Path.cwd(), 1", set()),
    ("import torch\nopen(torch.__file__)", set()),
    (PLACE + "(ROOT / name).read_text()", None),  # any file
    (PLACE + "ROOT.glob('*')", None),
    (PLACE + "FILE = ROOT / 'README.md'\nFILE.parent.iterdir()", None),
    (PLACE + "read(ROOT)", None),
    ("import os\nopen(os.path.join(os.path.dirname(__file__), name))", None),
    ("import os\nos.listdir(os.getcwd())", None),
    ("from pathlib import Path\n[*Path('..').iterdir()]", None),
    ("from tests import where\nwhere.ROOT.glob('*')", None),
    ("from tests.where import ROOT as R, ROOT\n[ROOT]", None),
    ("import lmbook, pkgutil\npkgutil.walk_packages(lmbook.__path__)", None),
    ("this is no Python", None),
])  # fmt: skip
def test_what_a_file_depends_on(root: Path, source: str, named: set[str] | None):
    write(root / "tests/test_it.py", source)
    tree = Tree(root)
    always = tree.judges | {"constraints.txt", "pyproject.toml", "tests/test_it.py", "tests/where.py"}
    assert tree.reached("tests/test_it.py") - always == (set(tree.files) if named is None else named) - always


def test_the_package_runs_what_its_strings_name_only_if_it_runs_strings(root: Path):
    write(root / "lmbook/one.py", 'import importlib\nimportlib.import_module("." + "alone", __package__)\n')
    assert Tree(root).reached("tests/test_one.py") >= MODULES
    write(root / "lmbook/one.py", 'HELP = "see lmbook.alone"\n')
    assert "lmbook/alone.py" not in Tree(root).reached("tests/test_one.py")
    write(root / "lmbook/one.py", 'import subprocess\nsubprocess.run(["-c", "import lmbook.alone"])\n')
    assert "lmbook/alone.py" in Tree(root).reached("tests/test_one.py")


@pytest.mark.parametrize("cell, named", [
    ("!python -m lmbook.alone", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("%%bash\npython -c 'import lmbook.alone'", {"lmbook/__init__.py", "lmbook/alone.py"}),
    ("from pathlib import Path\nPath.cwd().parent / 'benchmarks/results/size.json'", {"benchmarks/results/size.json"}),
    ("open('01_one.ipynb')", {"nbs/01_one.ipynb"}),
    ("home = Path.cwd()\nhome.parent.rglob('*')", None),
    ("a b", None),
])  # fmt: skip
def test_what_a_cell_depends_on(root: Path, cell: str, named: set[str] | None):
    write(root / "nbs/09_it.ipynb", page("# It", cell))
    tree = Tree(root)
    always = tree.judges | {"constraints.txt", "pyproject.toml", "nbs/09_it.ipynb"}
    assert tree.reached("nbs/09_it.ipynb") - always == (set(tree.files) - always if named is None else named)


def test_of_this_book():
    "What every chapter needs is found, and what reads the whole checkout depends on all of it."
    tree = Tree(HERE)
    found = {unit: tree.reached(unit) for unit in tools.quick.units(tree)}
    assert f"tests/{Path(__file__).name}" in found and len(found) > 20
    for name in ("tests/nbval_tolerance.py", "tools/compare.py", "tools/spread.py", "conftest.py", "constraints.txt"):
        assert all(name in files for files in found.values()), name
    for name in ("test_package", "test_layout", "test_site", "test_claims"): assert found[f"tests/{name}.py"] == set(tree.files), name
    pages = [unit for unit in found if unit.endswith(".ipynb")]
    assert all(f"nbs/.spread/{Path(p).stem}.json" in found[p] for p in pages) and not any(set(tree.files) == found[p] for p in pages)
    assert not any(f.startswith((".venv/", ".git/", "docs/_build/")) or "__pycache__" in f for f in tree.files)


# ---------------------------------------------------------------------------------------------------------------------------- the record


def test_the_record_is_written_whole_or_not_at_all(root: Path, monkeypatch: pytest.MonkeyPatch):
    save(root, {"tests/test_one.py": {"a": "1"}, "tests/test_gone.py": {"a": "1"}})
    assert load(root) == {"tests/test_one.py": {"a": "1"}}, "what is no longer there is forgotten"

    def interrupted(*args): raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt): save(root, {})
    assert load(root) == {"tests/test_one.py": {"a": "1"}} and not list(root.glob(RECORD + ".*"))


UNREADABLE = ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "passed": {"a": 1}}', '{"format": 1, "passed": 3}']


@pytest.mark.parametrize("text", UNREADABLE)
def test_a_record_that_cannot_be_read_is_none(root: Path, text: str, capsys: pytest.CaptureFixture):
    write(root / RECORD, text)
    assert load(root) == {} and "everything is run" in capsys.readouterr().err


def test_the_record_of_another_format_is_none(root: Path):
    write(root / RECORD, json.dumps({"format": FORMAT + 1, "passed": {"tests/test_one.py": {}}}))
    assert load(root) == {}


# --------------------------------------------------------------------------------------------------------------------------- what is run

BOOK = {
    ".gitignore": FILES[".gitignore"],
    "pyproject.toml": "[tool.pytest.ini_options]\n",
    "lmbook/__init__.py": "",
    "lmbook/one.py": "X = 1\n",
    "tests/__init__.py": "",
    "tests/test_a.py": "from lmbook.one import X\ndef test_x(): assert X == 1\ndef test_y(): pass\n",
    "tests/test_b.py": "def test_b(): pass\n",
}
MAIN = "import sys; from pathlib import Path; from tools.quick import main; sys.exit(main(sys.argv[1:], Path.cwd()))"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name, text in BOOK.items(): write(tmp_path / name, text)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHON"))}
    return kept | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"} | more


def python(root: Path, *args: str, code: int = 0, **env: str) -> str:
    done = subprocess.run([sys.executable, *args], cwd=root, env=environment(**env), text=True, encoding="utf-8", capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def recorded(root: Path, *args: str, code: int = 0) -> set[str]:
    "Run pytest with the recorder; what stands in the record then."
    options = ["-p", "tools.quick", "-p", "no:cacheprovider", *args]
    python(root, "-m", "pytest", *options, code=code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # the plugins take seconds to load
    return set(load(root))


def executed(output: str) -> str:
    "A notebook of one cell, 1 + 1, with an output stored."
    out = {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": output}}
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": 1, "source": "1 + 1", "outputs": [out]}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": [cell]})


def test_the_command(small: Path):
    "From end to end, with the workers and the options of the real one."
    write(small / "nbs/01_right.ipynb", executed("2"))
    write(small / "nbs/02_wrong.ipynb", executed("3"))
    inputs = fingerprints(Tree(small))["tests/test_b.py"]
    save(small, {"tests/test_b.py": inputs, "tests/test_a.py": inputs | {"lmbook/one.py": "0"}})
    out = python(small, "-c", MAIN, code=1)
    assert "To run, 3 of 4" in out and "Left out, 1 " in out and "1 failed, 3 passed" in out
    assert out.endswith("quick: 2 passed, 1 left out; failed, not finished, or changed meanwhile: nbs/02_wrong.ipynb\n")
    assert set(load(small)) == {"nbs/01_right.ipynb", "tests/test_a.py", "tests/test_b.py"}
    assert python(small, "-c", MAIN, "nbs/01_right.ipynb", "tests/test_a.py").endswith("\nquick: nothing to run\n")


def test_what_the_command_says(small: Path, capsys: pytest.CaptureFixture):
    now = fingerprints(Tree(small))
    save(small, {unit: inputs for unit, inputs in now.items() if unit == "tests/test_b.py"})
    assert main(["--list"], small) == 0
    out = capsys.readouterr().out
    assert "To run, 1 of 2:\n  tests/test_a.py: it has not passed here yet\nLeft out, 1 " in out and "\n  tests/test_b.py\n" in out
    assert main(["--list", "--all"], small) == 0 and "  tests/test_b.py: --all\n" in capsys.readouterr().out
    assert main(["--list", str(small / "tests" / "test_b.py")], small) == 0 and "nothing to run" in capsys.readouterr().out
    with pytest.raises(SystemExit): main(["--list", "tests/test_c.py"], small)
    for i in range(9): write(small / f"lmbook/m{i}.py", "")
    write(small / "tests/test_b.py", "from lmbook import *\n")
    assert main(["--list"], small) == 0
    assert re.search(r"tests/test_b.py: tests/test_b.py changed, \S+ is new, \S+ is new and \d+ more\n", capsys.readouterr().out)


def test_a_failure_is_not_recorded(small: Path):
    assert recorded(small) == {"tests/test_a.py", "tests/test_b.py"}
    write(small / "tests/test_a.py", "def test_x(): assert 0\ndef test_y(): pass\n")
    assert recorded(small, code=1) == {"tests/test_b.py"}, "and what had passed before is forgotten"
    late = "import pytest\n@pytest.fixture(scope='module')\ndef f():\n    yield\n    1 / 0\ndef test_x(f): pass\n"
    write(small / "tests/test_a.py", late)
    assert recorded(small, code=1) == {"tests/test_b.py"}, "after the last test"
    write(small / "tests/test_a.py", "import nowhere\n")
    assert recorded(small, code=2) == {"tests/test_b.py"}, "it cannot be collected"


def test_a_part_of_a_file_is_not_recorded(small: Path):
    assert recorded(small, "-k", "test_x") == set()
    assert recorded(small, "tests/test_a.py::test_x") == set()
    assert recorded(small, "--deselect", "tests/test_a.py::test_x") == set()
    write(small / "tests/test_a.py", "def test_x(): pass\ndef test_y(): assert 0\n")
    assert recorded(small, "--maxfail=1", code=1) == set(), "test_b was not reached"


def test_an_interrupt_keeps_what_had_passed(small: Path):
    write(small / "tests/test_b.py", "def test_b(): raise KeyboardInterrupt\n")
    assert recorded(small, code=2) == {"tests/test_a.py"}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_command_waits_until_pytest_has_ended_after_an_interrupt(tmp_path: Path):
    started, ended = (f"pathlib.Path({name!r}).touch()" for name in ("started", "ended"))
    child = f"import pathlib, time\ntry:\n    {started}; time.sleep(60)\nfinally: time.sleep(1); {ended}"
    parent = "import sys; from pathlib import Path; from tools.quick import run; "
    parent += f"sys.exit(run([sys.executable, '-c', {child!r}], Path.cwd()))"
    command = [sys.executable, "-c", parent]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "started").exists() and process.poll() is None: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(120) and (tmp_path / "ended").exists()


def test_what_changed_while_it_ran_is_not_recorded(small: Path):
    write(small / "tests/test_a.py", BOOK["tests/test_a.py"] + "def test_z(): open('lmbook/one.py', 'a').write('# more')\n")
    assert recorded(small) == {"tests/test_b.py"}


def test_what_fails_the_book_as_a_whole_fails_its_notebooks(root: Path):
    class Totals:
        def failures(self): return ["too little is compared"]

    class Session:
        class config:
            class pluginmanager:
                get_plugin = staticmethod({"lmbook-totals": Totals()}.get)

    recorder = tools.quick.Recorder(root)
    save(root, recorder.inputs)
    recorder.done["nbs/01_one.ipynb"].add("nbs/01_one.ipynb::Cell 0")
    recorder.done["tests/test_one.py"].add("tests/test_one.py::test")
    recorder.pytest_sessionfinish(Session)
    assert set(load(root)) == ALL - {"nbs/01_one.ipynb"}


def test_the_record_that_cannot_be_written_fails_no_test(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    recorder = tools.quick.Recorder(root)

    def full(*args): raise OSError("disk full")

    monkeypatch.setattr("tools.quick.save", full)
    recorder.passed("tests/test_one.py")
    assert "cannot be written: disk full" in capsys.readouterr().err


def test_it_runs_as_make_test_does():
    [line] = re.findall(r"-m pytest (.*)", (HERE / "Makefile").read_text(encoding="utf-8"))
    assert line == f"-p tools.quick -n $(JOBS) {' '.join(OPTIONS)} nbs tests"


def test_of_the_benchmarks_those_count_whose_results_are_shown():
    "The function that shows them looks for a folder; what it reads there its caller says."
    tree = Tree(HERE)
    assert len(tree.reached("nbs/40_cache.ipynb")) < len(tree.files) / 2
    shown = {'measured_once("bilstm")': {"benchmarks/results/bilstm.json"}, "x = 1": set(), "measured_once(name)": None}
    for source, expected in shown.items():
        found = tools.inputs._Reader(tree, "nbs/new.ipynb", ast.parse(f"from lmbook.core import measured_once\n{source}")).found
        assert found.anything == (expected is None)
        if expected is not None: assert {f for f in found.named if f.startswith("benchmarks/")} == expected
