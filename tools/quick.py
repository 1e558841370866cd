"""Run only the notebooks and test files that a change touches: `make quick`.

Each is known by its inputs (tools/inputs.py): the files that it depends on, Python's version, and the packages that are installed. The
record of those with which it last passed stands in `.quick.json`; what has other inputs now is run. `make test` runs everything and keeps
the same record, through the plugin that this module is to pytest (`-p tools.quick`). A file of tests counts as passed when all its tests
ran and none failed, and if nothing that it depends on changed while it ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tools.inputs import Tree, digest, is_test

ROOT = Path(__file__).resolve().parent.parent
RECORD = ".quick.json"
FORMAT = 1
OPTIONS = ["--dist", "loadfile", "--nbval", "--nbval-current-env"]  # as in `make test`
SHOWN = 3  # reasons named for a notebook
Inputs = dict[str, str]


def units(tree: Tree) -> list[str]:
    "What can be run by itself: the notebooks and the files of tests."
    return [f for f in tree.files if is_test(f) or f.startswith("nbs/") and f.count("/") == 1 and f.endswith(".ipynb")]


def environment() -> Inputs:
    "What is no file of the checkout and matters to all: Python, and the names and versions of the installed packages."
    installed = sorted({p.name for folder in sys.path if folder for p in Path(folder).glob("*.dist-info")})
    return {"Python": platform.python_version(), "the installed packages": hashlib.sha256("\n".join(installed).encode()).hexdigest()[:16]}


def fingerprints(tree: Tree) -> dict[str, Inputs]:
    "The inputs of all notebooks and files of tests."
    shared = environment()
    return {unit: tree.inputs(unit) | shared for unit in units(tree)}


def why(now: Mapping[str, str], before: Mapping[str, str] | None) -> list[str]:
    "What has changed, in words; nothing where it need not run."
    if before is None: return ["it has not passed here yet"]
    rows = [f"{name} is new" for name in now if name not in before] + [f"{name} is gone" for name in before if name not in now]
    return [f"{name} changed" for name in now if name in before and now[name] != before[name]] + rows


def load(root: Path) -> dict[str, Inputs]:
    "The inputs with which each passed; nothing where there is no record, or none that can be read."
    try:
        data = json.loads((root / RECORD).read_text(encoding="utf-8"))
        passed = data["passed"] if data["format"] == FORMAT else {}
        return {str(unit): {str(k): str(v) for k, v in inputs.items()} for unit, inputs in passed.items()}
    except FileNotFoundError: return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{RECORD} cannot be read, so everything is run ({error!r})", file=sys.stderr)
        return {}


def save(root: Path, passed: Mapping[str, Inputs]) -> None:
    "Write the record through a temporary file, so that an interrupt leaves the old one whole."
    rows = ",\n".join(f"  {json.dumps(unit)}: {json.dumps(inputs)}" for unit, inputs in sorted(passed.items()) if (root / unit).exists())
    scratch = root / f"{RECORD}.{os.getpid()}"
    try:
        scratch.write_text(f'{{"format": {FORMAT}, "passed": {{\n{rows}\n}}}}\n', encoding="utf-8")
        scratch.replace(root / RECORD)
    finally: scratch.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------------------ the pytest plugin


class Recorder:
    "Notes which files passed, in the process that hears of all tests (with xdist: not in the workers)."

    def __init__(self, root: Path):
        self.root = root
        self.tree = Tree(root)
        self.inputs = fingerprints(self.tree)  # as they are before the first test
        self.expected: dict[str, set[str]] = defaultdict(set)
        self.done: dict[str, set[str]] = defaultdict(set)
        self.failed: set[str] = set()
        self.note({unit: None for unit in load(root) if unit not in self.inputs})

    def note(self, changes: Mapping[str, Inputs | None]) -> None:
        "Change the record; None takes a file out of it."
        if not changes: return
        try: save(self.root, {unit: inputs for unit, inputs in (load(self.root) | changes).items() if inputs is not None})
        except OSError as error: print(f"{RECORD} cannot be written: {error}", file=sys.stderr)

    def expect(self, ids: Iterable[str]) -> None:
        for i in ids: self.expected[i.split("::")[0]].add(i)

    def pytest_collection_finish(self, session: pytest.Session) -> None: self.expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None: self.expect(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed: self.fail(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        unit = report.nodeid.split("::")[0]
        if report.failed: self.fail(unit)
        if report.when == "teardown": self.done[unit].add(report.nodeid)
        if unit not in self.inputs or unit in self.failed or not self.expected[unit]: return
        if self.done[unit] >= self.expected[unit]: self.passed(unit)

    def fail(self, unit: str) -> None:
        if unit in self.failed: return
        self.failed.add(unit)
        self.note({unit: None})

    def passed(self, unit: str) -> None:
        "Unless a file was saved in the meantime: then nobody knows which of its contents was tested."
        if all(digest(self.root / f) == self.tree.digest(f) for f in self.tree.reached(unit)): self.note({unit: self.inputs[unit]})

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        "What is judged of all notebooks together (Totals in tests/nbval_tolerance.py) fails them all."
        totals = session.config.pluginmanager.get_plugin("lmbook-totals")
        if totals and any(totals.failures()): self.note({unit: None for unit in self.done if unit.endswith(".ipynb")})


def pytest_configure(config: pytest.Config) -> None:
    chosen = [config.option.keyword, config.option.markexpr, getattr(config.option, "deselect", None), getattr(config.option, "lf", False)]
    chosen += [config.option.collectonly, *("::" in arg for arg in config.args)]
    if hasattr(config, "workerinput") or any(chosen): return  # a choice of tests says nothing about their files
    config.pluginmanager.register(Recorder(config.rootpath), "lmbook-quick")


# ----------------------------------------------------------------------------------------------------------------------------- the command


def run(command: list[str], root: Path) -> int:
    "Run a command to its end; after Ctrl-C, which it hears itself, wait until it has cleaned up."
    process = subprocess.Popen(command, cwd=root)
    while True:
        try: return process.wait()
        except KeyboardInterrupt: pass


def listed(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(names), 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser("python -m tools.quick", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="look only at these notebooks and files of tests (default: all)")
    parser.add_argument("--all", action="store_true", help="run also what passed with these very inputs")
    parser.add_argument("--list", action="store_true", help="only say what would be run, and why")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    args = parser.parse_args(argv)

    before, now = load(root), fingerprints(Tree(root))
    wanted = [Path(os.path.relpath(Path(p).resolve(), root)).as_posix() for p in args.paths] or list(now)
    if unknown := [p for p in wanted if p not in now]: parser.error(f"neither a notebook of nbs/ nor a file of tests: {', '.join(unknown)}")
    reasons = {unit: why(now[unit], before.get(unit)) or ["--all"] * args.all for unit in wanted}
    to_run = [unit for unit in wanted if reasons[unit]]
    left_out = [unit for unit in wanted if not reasons[unit]]
    if to_run: print(f"To run, {len(to_run)} of {len(now)}:")
    for unit in to_run:
        more = len(reasons[unit]) - SHOWN
        print(f"  {unit}: {', '.join(reasons[unit][:SHOWN])}{f' and {more} more' if more > 0 else ''}")
    if left_out: print(f"Left out, {len(left_out)} (nothing that they depend on has changed since they passed):\n{listed(left_out)}")
    sys.stdout.flush()
    if args.list or not to_run:
        if not to_run: print("quick: nothing to run")
        return 0

    pages = [unit for unit in to_run if unit.endswith(".ipynb")]
    some = 0 < len(pages) < sum(unit.endswith(".ipynb") for unit in now)
    share = ["--nbval-min-compared", "0"] if some else []  # this share is one of the whole book
    jobs = ["-n", str(min(args.jobs, len(to_run)))]
    code = run([sys.executable, "-m", "pytest", "-p", "tools.quick", *jobs, *OPTIONS, *share, *to_run], root)
    after = load(root)
    missing = [unit for unit in to_run if after.get(unit) != now[unit]]
    rest = f", {len(left_out)} left out" if left_out else ""
    if missing: print(f"quick: {len(to_run) - len(missing)} passed{rest}; failed, not finished, or changed meanwhile: {', '.join(missing)}")
    else: print(f"quick: {len(to_run)} passed{rest}" + f", but pytest ended with {code}" * bool(code))
    return code or bool(missing)


if __name__ == "__main__": sys.exit(main())
