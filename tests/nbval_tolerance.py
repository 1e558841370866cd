"""A pytest plugin that makes nbval strict where the book needs it, and lenient only as far as a number was seen to move.

nbval runs the cells and collects their outputs. Here we decide what counts as equal (tools/compare.py, with the spreads that `make run`
measured), and fail a cell that was never run, whose count is not its place, that stores or writes an error or a warning, or that skips or
ignores without a check behind it; and a notebook whose spread is missing or was measured for something else. At the end stands a table:
each notebook's cells, time and peak memory, and the share of the cells with output that were really compared.

`--nbval-arithmetic NAME` lets the kernels compute as another processor would (tools/arithmetics.py); `make elsewhere` does it for several.

Not seen by nbval: `clear_output` and updates of a display. A cell that uses them cannot be compared as it is.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from unittest.mock import patch

import nbformat
import nbval.plugin
import psutil
import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError

from tests.pages import contains_check
from tools.arithmetics import ALL, AS_STORED
from tools.compare import Moved, Tolerance, compare_outputs
from tools.spread import Spread

MIB = 2**20
BUSY = 0.1  # a notebook that waited for a processor this share of its time was measured beside other work
PROPERTY = "lmbook-cell"  # under which a cell's numbers travel in its report, from an xdist worker too


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nbval", "Jupyter Notebook validation")
    group.addoption("--nbval-output-timeout", type=float, default=120, help="seconds to wait for an output (nbval waits 5)")
    group.addoption("--nbval-min-compared", type=float, default=85, help="least share of cells with output that are compared, in %%")
    group.addoption("--nbval-memory-limit", type=float, default=4096, help="most memory of a notebook's kernel and its children, in MiB")
    group.addoption("--nbval-arithmetic", choices=ALL, default=AS_STORED.name, help="how the kernels compute (tools/arithmetics.py)")
    group.addoption("--nbval-report", metavar="FILE", help="write what moved, and how far, into this file (JSON)")
    group.addoption("--nbval-time-budget", type=float, default=90, help="seconds per notebook (a warning; LMBOOK_BUDGET=strict: a failure)")


def pytest_configure(config: pytest.Config) -> None:
    if not (config.option.nbval or config.option.nbval_lax) or hasattr(config, "workerinput"): return
    if getattr(config.option, "numprocesses", None) and config.option.dist not in ("loadfile", "loadscope", "no"):
        raise pytest.UsageError("a notebook's cells run in one kernel: with -n, also give --dist loadfile")
    config.pluginmanager.register(Totals(config), "lmbook-totals")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(parent: pytest.Collector) -> Generator[None, list, list]:
    "The one place where nbval's classes give way to ours."
    found = yield
    return [BookFile.from_parent(parent, path=c.path) if type(c) is IPyNbFile else c for c in found]


class KernelDied(RuntimeError):
    "The process behind a notebook is gone."


class BookKernel(RunningKernel):
    """A kernel that runs cells as Jupyter does, and whose death is noticed at once.

    nbval would wait for the answer of a dead kernel until the timeout of the cell, 2000 s; and it keeps cells out of the history, where
    IPython looks for the semicolon that silences a last line.
    """

    def execute_cell_input(self, cell_input: str, allow_stdin: bool | None = None) -> str:
        return self.kc.execute(cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try: return super().get_message(stream, timeout=min(2.0, max(0.0, end - time.monotonic())))
            except Empty:
                if not self.is_alive(): raise KernelDied("the kernel died while this cell ran (out of memory, perhaps)") from None
                if time.monotonic() >= end: raise


def waited(pid: int) -> float:
    """Seconds for which a process (its first thread, in which cells run) was ready and had no processor; 0 where the system does not tell.

    What other programs take from a notebook's time, or the notebook beside it: not its own slowness.
    """
    try: return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    except (OSError, IndexError, ValueError): return 0.0


class PeakMemory:
    """The most memory that a process and its children held at once, in MiB.

    The system's own high-water mark where there is one (Linux, Windows), which misses nothing; and samples of process and children
    together, which may miss a short peak, and count pages that they share twice.
    """

    def __init__(self, pid: int, interval: float = 0.25):
        self.process, self.sampled, self.interval = psutil.Process(pid), 0.0, interval
        self.stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.stopped.wait(self.interval): self._sample()

    def _sample(self) -> None:
        total = 0
        try:
            for process in [self.process, *self.process.children(recursive=True)]:
                try: total += process.memory_info().rss
                except psutil.Error: pass  # a child that has just ended
        except psutil.Error: pass  # the kernel itself has
        self.sampled = max(self.sampled, total / MIB)

    def _high_water(self) -> float:
        try:
            if sys.platform == "linux":
                status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
                return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[1]) / 1024
            return getattr(self.process.memory_info(), "peak_wset", 0) / MIB
        except (OSError, TypeError, psutil.Error): return 0.0

    def read(self) -> float:
        self._sample()
        return max(self.sampled, self._high_water())

    def stop(self) -> None: self.stopped.set()


class BookFile(IPyNbFile):
    "A notebook: nbval's, with our cells, the book's environment in its kernel, and its memory watched."

    memory: PeakMemory | None = None
    over_memory = False
    spread: Spread | None = None
    spread_problems: list[str]

    def collect(self) -> Iterator[BookCell]:
        nb = nbformat.read(self.path, as_version=4)
        try:
            self.spread = Spread.load(self.path)
            self.spread_problems = (
                list(self.spread.problems(nb)) if self.spread else ["no spread was measured for this notebook: `make run` measures it"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.spread_problems = [f"the spread beside this notebook is none: {error}"]
        cells = [BookCell.from_parent(self, name=c.name, cell_num=c.cell_num, cell=c.cell, options=c.options) for c in super().collect()]
        written = [c for c in cells if c.cell.source.strip()]
        for place, (cell, after) in enumerate(zip(written, [*written[1:], None]), 1):
            cell.place, cell.checked_after = place, after is not None and contains_check(after.cell.source)
        return iter(cells)

    def setup(self) -> None:
        with (
            patch.dict(os.environ, ALL[self.config.option.nbval_arithmetic].env()),
            patch.object(nbval.plugin, "RunningKernel", BookKernel),
        ):
            super().setup()
        self.pid = pid = getattr(self.kernel.km.provisioner, "pid", None)  # None: a kernel that is no process of this machine
        self.memory = PeakMemory(pid) if pid else None

    def teardown(self) -> None:
        if self.memory: self.memory.stop()
        super().teardown()


class BookCell(IPyNbCell):
    "A code cell: nbval runs it, we judge it."

    place: int | None = None  # among the code cells that hold anything, from 1: the count it must be stored with
    checked_after = False  # whether the next of these asserts something

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.output_timeout = self.config.option.nbval_output_timeout
        self.coloured = self.config.option.color == "yes"  # nbval and IPython colour logs, too
        if not self.coloured: self.colors = nbval.plugin.nocolors
        self.marked_skip = self.options.pop("skip", False)  # else nbval would obey
        self.moved: list[Moved] = []

    def stored_problems(self) -> Iterator[str]:
        "What is wrong with the cell as it is on disk."
        raises = self.options["check_exception"]
        if self.place == 1: yield from self.parent.spread_problems  # said once; the cells are then compared as strictly as can be
        if self.place is not None and self.cell.execution_count is None: yield "this cell was never run (no execution count)"
        elif self.cell.execution_count != self.place:
            yield f"execution count {self.cell.execution_count}, should be {self.place}: run the notebook from top to bottom"
        for out in self.cell.outputs:
            if out.output_type == "error" and not raises: yield f"a stored error, {out.ename}, without `# NBVAL_RAISES_EXCEPTION`"
            if out.get("name") == "stderr": yield f"a stored warning or message on stderr: {out.text.strip()[:300]!r}"
        if raises and not any(o.output_type == "error" for o in self.cell.outputs):
            yield "marked as raising an exception, but none is stored"
        if self.marked_skip: yield "NBVAL_SKIP: every cell of the book is run"
        if not self.options["check"] and not self.checked_after:
            yield "NBVAL_IGNORE_OUTPUT, and the next code cell does not assert what the output showed"
        try: Tolerance.of(self.cell.source)
        except ValueError as error: yield str(error)

    def produced_problems(self, stored: bool) -> Iterator[str]:
        "What is wrong with what the cell has just done, whether its output is compared or not."
        produced = self.test_outputs or []
        for out in produced:
            if out.get("name") == "stderr": yield f"a warning or message on stderr: {out.text.strip()[:300]!r}"
        if not self.options["check"] and bool(produced) != stored:
            how = "produced, but none stored" if produced else "stored, but none produced"
            yield f"an output is {how} (ignored ones too must be there)"
        memory, limit = self.parent.memory, self.config.option.nbval_memory_limit
        if memory and memory.read() > limit and not self.parent.over_memory:
            self.parent.over_memory = True  # the first cell that goes over is the one to look at
            yield f"peak memory {memory.read():,.0f} MiB, over the limit of {limit:,.0f} MiB per notebook (--nbval-memory-limit)"

    def compare_outputs(self, test: list, ref: list, skip_compare=None) -> bool:
        "Called by nbval, with streams merged; it prints `comparison_traceback`."
        try: tolerance = Tolerance.of(self.cell.source)
        except ValueError: tolerance = Tolerance()  # complained about above
        spread = self.parent.spread
        if self.parent.spread_problems: spread = None
        measured, unsettled = (spread.cells.get(self.cell.id), spread.unsettled(self.cell.id)) if spread else (None, False)
        self.comparison_traceback = compare_outputs(ref, test, tolerance, measured, unsettled, self.moved)
        return not self.comparison_traceback

    def runtest(self) -> None:
        stored = bool(self.cell.outputs)
        problems, traceback = list(self.stored_problems()), []
        try: super().runtest()
        except NbCellError as error: problems, traceback = [str(error), *problems], [error.inner_traceback or ""]
        except KernelDied as error: problems = [str(error), *problems]
        finally: self._note(stored or bool(self.test_outputs))
        problems += self.produced_problems(stored)
        if problems: self.raise_cell_error("\n        ".join(problems), *traceback)

    def repr_failure(self, excinfo: pytest.ExceptionInfo) -> str:
        text = super().repr_failure(excinfo)
        return text if self.coloured else re.sub(r"\x1b\[[0-9;]*m", "", text)

    def _note(self, with_output: bool) -> None:
        check = bool(self.options["check"])
        row = {"with_output": with_output, "compared": with_output and check, "ignored": with_output and not check}
        row |= {
            "peak": self.parent.memory.read() if self.parent.memory else 0.0,
            "waited": waited(self.parent.pid) if self.parent.pid else 0.0,
        }
        far = sorted(self.moved, key=lambda m: -m.used)
        row |= {"moved": len(far), "half": sum(m.used > 0.5 for m in far), "nearest": [asdict(m) | {"cell": self.cell.id} for m in far]}
        self.user_properties.append((PROPERTY, row))


@dataclass
class Row:
    "The numbers of one notebook."

    run: int = 0
    with_output: int = 0
    compared: int = 0
    ignored: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of these without a processor
    peak: float = 0.0  # MiB
    moved: int = 0  # numbers that were not as stored
    half: int = 0  # of these, how many used more than half of what they are allowed
    failed: int = 0  # cells

    @property
    def busy(self) -> bool:
        "Whether it was measured beside other work."
        return self.waited > BUSY * self.seconds


class Totals:
    "Adds up what the reports of the cells bring, in the process that prints the result (with xdist: not in the workers)."

    def __init__(self, config: pytest.Config):
        self.options, self.rows = config.option, dict[str, Row]()
        self.nearest: list[dict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::")[0]
        if not name.endswith(".ipynb"): return
        row = self.rows.setdefault(name, Row())
        row.seconds += report.duration  # start and end of the kernel included: they are the set-up and teardown of cells
        cell = dict(report.user_properties).get(PROPERTY)
        row.failed += report.failed
        if report.when != "call" or cell is None: return
        row.run += 1
        for key in ("with_output", "compared", "ignored", "moved", "half"): setattr(row, key, getattr(row, key) + cell[key])
        row.peak, row.waited = max(row.peak, cell["peak"]), max(row.waited, cell["waited"])
        self.nearest = sorted([*self.nearest, *({"notebook": name} | m for m in cell["nearest"])], key=lambda m: -m["used"])

    @property
    def share(self) -> float:
        "Of the cells with output, how many per cent are compared."
        with_output = sum(r.with_output for r in self.rows.values())
        return 100 * sum(r.compared for r in self.rows.values()) / with_output if with_output else 100.0

    def failures(self) -> Iterator[str]:
        if self.share < self.options.nbval_min_compared:
            yield f"only {self.share:.1f} % of the cells with output are compared, {self.options.nbval_min_compared:g} % have to be"
        if os.environ.get("LMBOOK_BUDGET") == "strict": yield from self.slow()

    def slow(self) -> Iterator[str]:
        "The notebooks over their budget. What they waited for a processor is not theirs."
        budget = self.options.nbval_time_budget
        for name, row in self.rows.items():
            own = row.seconds - row.waited
            if own > budget: yield f"{name} took {own:.0f} s, its budget is {budget:g} s"

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.options.nbval_report:
            data = {"notebooks": {name: asdict(row) for name, row in self.rows.items()}, "nearest": self.nearest}
            Path(self.options.nbval_report).write_text(json.dumps(data), encoding="utf-8")
        if exitstatus == pytest.ExitCode.OK and any(self.failures()): session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not self.rows: return
        write, wide = terminalreporter.write_line, max(map(len, self.rows))
        terminalreporter.write_sep("=", "notebooks")
        write(f"{'':{wide}}  cells run  with output  compared  ignored  seconds    peak MiB  moved")
        for name, r in sorted(self.rows.items()):
            counts = f"{r.run:9}  {r.with_output:11}  {r.compared:8}  {r.ignored:7}"
            write(f"{name:{wide}}  {counts}  {r.seconds:7.1f}{' *' if r.busy else '  '}  {r.peak:8.0f}  {r.moved:5}")
        if any(r.busy for r in self.rows.values()):
            write("* beside other work: for a tenth of this time or more its kernel had no processor")
        total = {k: sum(getattr(r, k) for r in self.rows.values()) for k in ("run", "with_output", "compared", "ignored")}
        write(
            f"notebooks {len(self.rows)}, cells run {total['run']}, cells with output {total['with_output']}, "
            f"compared {total['compared']} ({self.share:.1f} %), ignored {total['ignored']}"
        )
        failures = list(self.failures())
        for line in self.slow():
            if line not in failures: write(f"WARNING: {line}", yellow=True)
        for line in failures: write(f"FAILED: {line}", red=True)
