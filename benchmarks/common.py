"""What the benchmarks share: the command line, timing in turns, facts about the machine, tables, and the file of results.

A benchmark is a module with a docstring, whose first line says what is measured, and with

    BENCHMARK = Benchmark(packages=("torch",), seeds=3, options=[Option("rounds", 5, dry=1, help="rounds in which all take turns")])

    @BENCHMARK.part()
    def speed(settings: Settings) -> list[dict]: ...

    if __name__ == "__main__": run(__file__)

Each part is a function from the settings to something that JSON can hold; what it returns stands in `benchmarks/results/NAME.json` under
the name of the part. `run` does the rest: it reads the options, runs the parts, prints what they return, and writes the file after each of
them. Parts that were not measured this time stay in the file as they are; `measured` says when, how and on what machine each part was
measured.

With `--dry` everything runs at a tiny size (`settings.pick(full, tiny)`, the `dry` of an option) on made-up data (`benchmarks/made_up.py`),
in seconds, and nothing is written unless `--out` says where.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NO_BENCHMARKS = ("__init__", "__main__", "common", "made_up")
T = TypeVar("T")

# ---------------------------------------------------------------- what a benchmark declares


class Settings(argparse.Namespace):
    "What a part is told: the options of the command line, each under its name, and what follows."

    dry: bool  # a tiny version of everything
    seeds: int  # how many times a training is repeated (where the benchmark has seeds)
    data: Path | None  # the folder of the real data sets, in a dry run of made-up ones
    before: Any  # what the file of results says of this part, or None
    workers: ExitStack  # holds the process that a dry run uses again and again

    def pick(self, full: T, tiny: T) -> T:
        "A size: that of a real run, or that of a dry one."
        return tiny if self.dry else full

    def folder(self, name: str) -> Path:
        "Where a data set is: in the folder that --data names, or that folder itself."
        return self.data if self.data.name == name else self.data / name

    def alone(self, function: Callable[..., T], *arguments: object) -> T:
        "Call a function of a module in a process of its own. (A dry run starts one process for all calls, since starting takes seconds.)"
        def start() -> ProcessPoolExecutor: return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

        if self.dry:
            if not hasattr(self, "worker"): self.worker = self.workers.enter_context(start())
            return self.worker.submit(function, *arguments).result()
        with start() as pool: return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Option:
    "An option of the command line whose value is a number, or a list of whole numbers."

    name: str  # "copy-steps" is --copy-steps on the command line and settings.copy_steps in a part
    default: int | float | list[int]
    dry: int | float | list[int]  # its default in a dry run
    help: str = ""


@dataclass(frozen=True)
class Part:
    "Something that is measured: a key of the file of results, and the function that returns its value."

    measure: Callable[[Settings], object]
    data: tuple[str, ...]  # folders of --data that it reads
    needs: tuple[str, ...]  # optional packages without which it is left out


@dataclass
class Benchmark:
    "What a benchmark measures, and with which options."

    packages: Sequence[str]  # whose versions are noted
    options: Sequence[Option] = ()
    seeds: int = 0  # the default of --seeds; 0: there is no such option
    threads: int = 1  # of PyTorch
    facts: Callable[[Settings], dict[str, object]] = lambda settings: {}  # constants that stand in the results, too
    parts: dict[str, Part] = field(default_factory=dict)

    def part(self, name: str = "", data: Sequence[str] = (), needs: Sequence[str] = ()) -> Callable[[Callable], Callable]:
        "Declare a function as a part. Without a name, it is that of the function."
        def declare(function: Callable[[Settings], object]) -> Callable[[Settings], object]:
            self.parts[name or function.__name__] = Part(function, tuple(data), tuple(needs))
            return function

        return declare


# ---------------------------------------------------------------- the command line


def names() -> dict[str, str]:
    "The benchmarks, and the first line of what each says of itself. None of them is imported."
    files = sorted(path for path in HERE.glob("*.py") if path.stem not in NO_BENCHMARKS)
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0] for path in files}


class Parser(argparse.ArgumentParser):
    "An error is one line."

    def error(self, message: str) -> NoReturn: self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse(name: str, benchmark: Benchmark, about: str, argv: Sequence[str] | None) -> Settings:
    "Read the command line of a benchmark. What it does not say is filled in."
    parser = Parser(f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--dry", action="store_true", help="a tiny version of everything, on made-up data; writes nothing, unless to --out")
    parser.add_argument("--out", type=Path, help=f"file of results (default: benchmarks/results/{name}.json)")
    if len(benchmark.parts) > 1:
        parser.add_argument("--only", nargs="+", default=[], metavar="PART",
                            help=f"measure these, and keep what the file says of the others: {', '.join(benchmark.parts)}")
    if any(part.data for part in benchmark.parts.values()): parser.add_argument("--data", type=Path, help="folder of the real data sets")
    options = list(benchmark.options)
    if benchmark.seeds: options.insert(0, Option("seeds", benchmark.seeds, 1, "how many times each training is repeated"))
    for option in options:
        many = isinstance(option.default, list)
        parser.add_argument(f"--{option.name}", type=type(option.default[0] if many else option.default), nargs="+" if many else None,
                            help=f"{option.help} (default: {option.default}, in a dry run {option.dry})")
    settings = parser.parse_args(argv, Settings(only=[], data=None, before=None))
    settings.only = [part for text in settings.only for part in text.split(",")]
    if unknown := [part for part in settings.only if part not in benchmark.parts]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(benchmark.parts)}")
    if settings.data and not settings.data.is_dir(): parser.error(f"--data: there is no folder {settings.data}")
    if settings.data and settings.dry: parser.error("--dry makes up its own data, so leave out --data")
    if settings.out and not settings.out.parent.is_dir(): parser.error(f"--out: there is no folder {settings.out.parent}")
    usual, said = {}, f"python -m benchmarks.{name}" + " --dry" * settings.dry + " --data DATA" * bool(settings.data)
    for option in options:
        key = option.name.replace("-", "_")
        usual[key] = option.dry if settings.dry else option.default
        value = getattr(settings, key)
        if value is None: setattr(settings, key, value := usual[key])
        if option.name == "seeds" and value < 1: parser.error("--seeds: at least 1")
        if value != usual[key]: said += f" --{option.name} " + (" ".join(map(str, value)) if isinstance(value, list) else str(value))
    settings.options, settings.command = {key: getattr(settings, key) for key in usual}, said
    return settings


def missing(part: Part, settings: Settings) -> str:
    "Why a part cannot be measured here; empty if it can."
    for package in part.needs:
        if not find_spec(package): return f"the package {package} is not installed"
    for folder in part.data:
        if not settings.data: return f"it needs the data set {folder}: pass --data, the folder of the real data sets"
        if not settings.folder(folder).is_dir(): return f"there is no folder {folder} in that of --data"
    return ""


def run(program: str | Path, argv: Sequence[str] | None = None) -> None:
    "Run a benchmark, given by its name or its file, with the options of the command line."
    name = Path(program).stem
    try: module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "lmbook"): raise
        raise SystemExit(f"benchmarks.{name} needs the package {error.name}, which is not installed") from None
    benchmark: Benchmark = module.BENCHMARK
    settings = parse(name, benchmark, module.__doc__, argv)
    out = settings.out or (None if settings.dry else RESULTS / f"{name}.json")
    read_results(out, settings.dry)  # an unreadable file is an error now, and not after an hour
    left_out = 0
    with ExitStack() as stack:
        settings.workers = stack
        if settings.dry: settings.data = made_up(stack, benchmark)
        for title in settings.only or benchmark.parts:
            part = benchmark.parts[title]
            if why := missing(part, settings):
                left_out += 1
                print(f"\n{title}: left out, since {why}")
                continue
            print(f"\n{title}", flush=True)
            settings.before = read_results(out, settings.dry).get(title)
            if torch := sys.modules.get("torch"):
                torch.set_num_threads(settings.pick(benchmark.threads, 1))
                torch.manual_seed(0)
            made, start = machine(*benchmark.packages), time.perf_counter()
            found = rounded(part.measure(settings))
            facts = {"command": settings.command, "date": datetime.date.today().isoformat(),
                     "seconds": rounded(time.perf_counter() - start), "machine": made, "threads": settings.pick(benchmark.threads, 1),
                     "options": settings.options}
            show(found)
            if out: write_whole(out, text_of(merged(benchmark, settings, read_results(out, settings.dry), title, found, facts)))
    if left_out == len(settings.only or benchmark.parts): raise SystemExit(f"benchmarks.{name}: nothing was measured")
    print(f"\nwritten: {out}" if out else "\nnothing is written: a dry run")


def main(argv: Sequence[str] | None = None) -> None:
    "`python -m benchmarks`: list the benchmarks, or run the one that the first argument names."
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    known = names()
    if name in ("", "-h", "--help"):
        print("python -m benchmarks NAME [--dry] [options]   or   python -m benchmarks.NAME [--dry] [options]\n")
        for key, line in known.items(): print(f"  {key:{max(map(len, known))}}  {line}")
    elif name not in known: raise SystemExit(f"python -m benchmarks: there is no benchmark {name!r}; there are {', '.join(known)}")
    else: run(name, rest)


def made_up(stack: ExitStack, benchmark: Benchmark) -> Path:
    "A folder with small made-up versions of the data sets that the parts read."
    from benchmarks.made_up import make

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in {name for part in benchmark.parts.values() for name in part.data}: make(name, folder / name)
    return folder


# ---------------------------------------------------------------- the file of results


def read_results(path: Path | None, dry: bool) -> dict[str, Any]:
    "What the file says so far. Results of dry runs and of real ones are never mixed."
    if not path or not path.exists(): return {}
    try: found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError: raise SystemExit(f"{path} is not a file of results: move it away, or write elsewhere with --out") from None
    return found if found.get("dry", False) == dry else {}


def merged(benchmark: Benchmark, settings: Settings, before: dict, title: str, found: object, facts: dict) -> dict[str, object]:
    "The file of results with one part measured anew. At the top stand the facts of the last measurement."
    measured, parts = before.get("measured", {}) | {title: facts}, before | {title: found}
    top = {key: facts[key] for key in ("command", "date", "machine", "threads", "options")} | ({"dry": True} if settings.dry else {})
    kept = [part for part in benchmark.parts if part in parts]
    return {**top, **rounded(benchmark.facts(settings)), "measured": {part: measured[part] for part in kept if part in measured},
            **{part: parts[part] for part in kept}}


def text_of(results: dict[str, object]) -> str: return json.dumps(results, indent=1, ensure_ascii=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    "Write a file so that at each moment all of the old text or all of the new stands there."
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    finally: beside.unlink(missing_ok=True)


def rounded(value: object, digits: int = 4) -> Any:
    "The same, with floats rounded to so many significant digits. What is not finite becomes None, since JSON has no word for it."
    if isinstance(value, float): return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict): return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple): return [rounded(item, digits) for item in value]
    return value


# ---------------------------------------------------------------- the machine


def machine(*packages: str) -> dict[str, object]:
    "What the measurements were made with, and the versions of those of `packages` that are installed. No name and no path of the machine."
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = found[0] if found else model
    versions = {}
    for name in packages:
        try: versions[name] = version(name)
        except PackageNotFoundError: pass
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "load_before": load, "system": platform.system(), "python": platform.python_version(),
            "packages": versions}


def memory(peak: bool = False) -> int:
    "Bytes that this process holds, or the most that it has held. (Not by getrusage under Linux: a process inherits its parent's peak.)"
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
    import psutil

    info = psutil.Process().memory_info()
    if not peak: return info.rss
    if hasattr(info, "peak_wset"): return info.peak_wset  # Windows
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- time


def best_of(repeats: int, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    "Seconds of the fastest of some runs."
    return min(in_turns({"": work}, repeats, clock=clock, warm_up=False)[""])


def in_turns(
    ways: dict[str, Callable[[], object]],  # what is compared
    rounds: int,  # in each of which every way has its turn
    repeat: int = 1,  # calls in a turn
    clock: Callable[[], float] = time.perf_counter,  # or time.process_time, which a busy machine changes less
    warm_up: bool = True,  # call each once before
) -> dict[str, list[float]]:  # seconds of a call, for each round
    "Time several ways by turns, in alternating order, so that what else the machine does meets all of them alike."
    times: dict[str, list[float]] = {name: [] for name in ways}
    if warm_up:
        for work in ways.values(): work()
    for i in range(rounds):
        for name in list(ways)[:: -1 if i % 2 else 1]:
            start = clock()
            for _ in range(repeat): ways[name]()
            times[name].append((clock() - start) / repeat)
    return times


def fastest(times: dict[str, list[float]]) -> dict[str, float]: return {name: min(values) for name, values in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]: return {name: statistics.median(values) for name, values in times.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    "The median of the ratios within a round."
    return statistics.median(a / b for a, b in zip(above, below))


# ---------------------------------------------------------------- numbers and tables


def spread(values: Sequence[float]) -> list[float]:
    "Mean, least and most."
    return [statistics.fmean(values), min(values), max(values)]


def mean_sd(values: Sequence[float]) -> dict[str, float]:
    "Mean and standard deviation, which is 0 for a single value."
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def mean(values: Any) -> float | None:
    "The mean of an array; None of an empty one."
    return float(values.mean()) if len(values) else None


def cell(value: object) -> str:
    "A value as it stands in a table."
    if isinstance(value, bool) or value is None: return str(value)
    if isinstance(value, int): return f"{value:,}"
    if isinstance(value, float): return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict): return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    if isinstance(value, list): return " ".join(map(cell, value))
    return str(value)


def table(rows: Sequence[dict[str, object]], indent: str = "") -> None:
    "Print rows under their columns; text to the left, numbers to the right."
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([cell(row[key]) if key in row else "" for key in columns] for row in rows)]
    left = [all(isinstance(row.get(key, ""), str) for row in rows) for key in columns]
    widths = [max(map(len, map(str, column))) for column in zip(*lines)]
    for line in lines:
        print(indent + "  ".join(str(x).ljust(w) if to_left else str(x).rjust(w) for x, w, to_left in zip(line, widths, left)).rstrip())


def show(value: object, indent: str = "  ") -> None:
    "Print a result: rows as a table, the rest by key."
    def nested(item: object) -> bool: return isinstance(item, dict) or isinstance(item, list) and any(isinstance(x, dict) for x in item)

    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value): table(value, indent)
    elif isinstance(value, dict) and value and all(isinstance(row, dict) and not any(map(nested, row.values())) for row in value.values()):
        columns = list(dict.fromkeys(key for row in value.values() for key in row))
        if len(columns) > max(8, len(value)):  # too wide: a line for each column
            table([{"": str(key), **{str(name): row[key] for name, row in value.items() if key in row}} for key in columns], indent)
        else: table([{"": str(name), **row} for name, row in value.items()], indent)
    elif isinstance(value, dict):
        for key, item in value.items():
            if nested(item):
                print(f"{indent}{key}")
                show(item, indent + "  ")
            else: print(f"{indent}{key}: {cell(item)}")
    else: print(indent + cell(value))
