"""Run, export and check the notebooks: what `make run`, `make export` and CI call.

A notebook on disk is a function of its sources alone: `run` executes it in a clean kernel from top to bottom, and `normalise` takes out
everything that would differ the next time. So running an unchanged notebook leaves the file byte-identical, figures included.
`run` executes it once more under each of several arithmetics, and keeps beside it how far each number moves (tools/spread.py).
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat

from tools.arithmetics import AS_STORED, MEASURED, Arithmetic
from tools.spread import Spread, carried, measure, place, says_nothing

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PICTURE = ROOT / "docs" / "_static" / "floor.png"  # shown by the README
BY_HAND = {"__main__.py"}  # no notebook can export a module of this name
CLAIMS = ROOT / "lmbook" / "data" / "claims.toml"

KEEP_CELL_METADATA = {"tags", "jupyter"}
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def reading_order(name: str) -> tuple[bool, str]:
    "By this the book is sorted, everywhere: the preface, then the chapters by their names, which begin with their numbers."
    return name != "index", name


def notebooks(paths: list[str] | None = None, folder: Path | None = None) -> list[Path]:
    "The notebooks named, or all of a folder (default: the book's) in reading order."
    if paths: return [Path(p) for p in paths]
    return sorted((folder or NBS).glob("*.ipynb"), key=lambda p: reading_order(p.stem))


def merge_streams(outputs: list) -> list:
    "Join neighbouring pieces of one stream: how a kernel cuts its output into messages depends on timing."
    merged: list = []
    for out in outputs:
        if merged and out.output_type == "stream" and merged[-1].output_type == "stream" and merged[-1].name == out.name:
            merged[-1].text += out.text
        else: merged.append(out)
    return merged


def normalise(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out of `nb` what depends on the machine, the clock or the editor; the same sources then give the same bytes.

    A cell's id is a hash of its source (with a counter for repeats), so ids are stable whichever editor wrote the notebook and change
    only where a cell does. Of the metadata only `tags` and `jupyter` stay (they say which cells are folded).
    """
    seen: dict[str, int] = {}
    for cell in nb.cells:
        cell.source = cell.source.strip("\n")
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = nbformat.from_dict({k: v for k, v in sorted(cell.metadata.items()) if k in KEEP_CELL_METADATA})
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for out in cell.outputs:
                if out.output_type in ("display_data", "execute_result"): out.metadata = nbformat.from_dict({})
    nb.cells = [c for c in nb.cells if c.source.strip()]
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def store(nb: nbformat.NotebookNode, path: Path) -> None:
    "Write a notebook through a temporary file, so that an interrupt leaves the old one whole."
    scratch = path.with_suffix(".ipynb.tmp")
    scratch.write_text(nbformat.writes(nb) + "\n", encoding="utf-8", newline="\n")
    scratch.replace(path)


def execute(path: Path, arithmetic: Arithmetic = AS_STORED) -> nbformat.NotebookNode:
    "The notebook executed in a clean kernel from top to bottom; nothing is stored. Raises nbclient's error where a cell fails."
    from nbclient import NotebookClient

    nb = normalise(nbformat.read(path, as_version=4))
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    folder = str(path.resolve().parent)
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}})
    client.execute(env=os.environ | arithmetic.env())
    return normalise(nb)


class Unsettled(RuntimeError):
    "A notebook whose outputs do not hold under another arithmetic: nothing is stored."


def settle(path: Path, runs: Sequence[tuple[Arithmetic, Future]]) -> list[str]:
    """Store what the first of the runs gave and, beside it, how far its numbers moved in the others; returns what a writer should know.

    With one run only (a draft) nothing is measured: an older spread goes, and the tests will ask for a new one.
    """
    nb, others = runs[0][1].result(), {}
    for arithmetic, run in runs[1:]:
        try: others[arithmetic.name] = run.result()
        except Exception as error: raise Unsettled(f"under the arithmetic {arithmetic.name!r}: {error}") from None
    spread, flips = measure(nb, others)
    if flips: raise Unsettled("\n".join(flips))
    store(nb, path)
    if others: spread.store(path)
    else: place(path).unlink(missing_ok=True)
    return list(says_nothing(nb, spread))


def run(paths: Iterable[Path], measured: Sequence[Arithmetic] = MEASURED, jobs: int = 2) -> Iterator[tuple[Path, list[str]]]:
    """Execute notebooks, `jobs` kernels at a time, and store the outputs and the spreads of those that went through.

    Gives each with what a writer should know about its numbers. The first failure is raised when all the others are stored.
    """
    failed: list[Exception] = []
    with ThreadPoolExecutor(jobs) as pool:
        rows = [(path, [(a, pool.submit(execute, path, a)) for a in (AS_STORED, *measured) if a.runs_here]) for path in paths]
        for path, runs in rows:
            try: yield path, settle(path, runs)
            except Exception as error:
                for _, waiting in runs: waiting.cancel()
                error.add_note(f"{path}: nothing was stored")
                failed.append(error)
    if failed: raise failed[0] if len(failed) == 1 else ExceptionGroup("these notebooks were not stored", failed)


def committed(commit: str = "HEAD") -> list[tuple[nbformat.NotebookNode, Spread]]:
    "The notebooks of a commit whose spreads vouch for them."
    def shown(path: Path) -> str:
        command = ["git", "show", f"{commit}:{path.relative_to(ROOT).as_posix()}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout

    listed = subprocess.run(["git", "ls-tree", "--name-only", commit, "nbs/"], cwd=ROOT, capture_output=True, text=True, check=True)
    known = []
    for name in listed.stdout.split():
        path = ROOT / name
        try: nb, spread = nbformat.reads(shown(path), as_version=4), Spread.read(shown(place(path)))
        except (subprocess.CalledProcessError, ValueError): continue  # no notebook, or one that was not measured
        if not list(spread.problems(nb)): known.append((nb, spread))
    return known


def rerun(paths: Iterable[Path], commit: str = "HEAD", jobs: int = 2) -> Iterator[tuple[Path, list[str]]]:
    """Execute notebooks whose cells were moved or renamed, and keep what was stored and measured where it still holds.

    Those that show something else are measured as by `run`.
    """
    known, failed = committed(commit), list[Exception]()
    with ThreadPoolExecutor(jobs) as pool:
        for path, waiting in [(path, pool.submit(execute, path)) for path in paths]:
            try:
                nb = waiting.result()
                own = [pair for pair in known if pair[0].cells[0].source == nb.cells[0].source]  # of the same title
                spread = carried(nb, [*own, *(pair for pair in known if pair not in own)])
                if spread is None:
                    others = [(a, pool.submit(execute, path, a)) for a in MEASURED if a.runs_here]
                    yield path, settle(path, [(AS_STORED, waiting), *others])
                    continue
                store(nb, path)
                spread.store(path)
                yield path, ["what it shows and how far that moves are what they were"]
            except Exception as error:
                error.add_note(f"{path}: nothing was stored")
                failed.append(error)
    if failed: raise failed[0] if len(failed) == 1 else ExceptionGroup("these notebooks were not stored", failed)


def spread_problems(page: Path) -> list[str]:
    "Why what was measured for a notebook does not vouch for it."
    spread = Spread.load(page)
    return list(spread.problems(nbformat.read(page, as_version=4))) if spread else ["no spread was measured for it: `make run` measures it"]


def findings(nb: nbformat.NotebookNode) -> dict[str, str]:
    "What the boxes of a notebook say was found, by claim."
    found = {}
    for out in (out for cell in nb.cells for out in cell.get("outputs", ())):
        if box := re.fullmatch(r"(D\d-\d\d) .*\n  says: .*\n  found: (.*)", out.get("data", {}).get("text/plain", "")):
            found[box[1]] = box[2]
    return found


def record_findings(pages: Iterable[Path], claims: Path = CLAIMS) -> None:
    "Let the list of claims say what the boxes say, where it names the notebook as its evidence."
    blocks = re.split(r"(?m)^(?=\[\[claim\]\])", claims.read_text(encoding="utf-8"))
    for page in pages:
        for claim, finding in findings(nbformat.read(page, as_version=4)).items():
            for i, block in enumerate(blocks):
                if f'id = "{claim}"\n' not in block or f'evidence = "{page.stem}#' not in block: continue
                line = f"finding = {json.dumps(finding, ensure_ascii=False)}"
                blocks[i] = re.sub(r"(?m)^finding = .*$", lambda _, line=line: line, block)
    claims.write_text("".join(blocks), encoding="utf-8", newline="\n")


def tidy(paths: Iterable[Path]) -> None:
    "Normalise notebooks where they stand, as after an edit of their prose: an id is a hash of its cell, and the export names cells by it."
    for path in paths:
        if is_tidy(path): continue
        store(normalise(nbformat.read(path, as_version=4)), path)


def is_tidy(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return nbformat.writes(normalise(nbformat.reads(text, as_version=4))) + "\n" == text


def export(root: Path = ROOT) -> None:
    "Export every notebook under `root` into its package with nbdev. (Never `nbdev_clean`: it deletes execution counts, nbval needs them.)"
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=root, check=True)


def readme_picture() -> bytes:
    "The README's picture: the last figure of the tour, as stored."
    outputs = [out for cell in nbformat.read(NBS / "00_tour.ipynb", as_version=4).cells for out in cell.get("outputs", ())]
    return base64.b64decode([out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})][-1])


def export_differences() -> list[str]:
    "What in `lmbook/` is not exactly what the notebooks export: changed, missing and stray modules."
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        shutil.copy(ROOT / "settings.ini", fresh)
        shutil.copytree(NBS, fresh / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        export(fresh)
        want = {p.name: p for p in (fresh / "lmbook").glob("*.py")}
        have = {p.name: p for p in (ROOT / "lmbook").glob("*.py") if p.name not in BY_HAND}
        rows = [f"lmbook/{n}: no notebook exports it" for n in sorted(have.keys() - want.keys())]
        rows += [f"lmbook/{n}: missing" for n in sorted(want.keys() - have.keys())]
        rows += [f"lmbook/{n}: differs" for n in sorted(have.keys() & want.keys()) if not filecmp.cmp(have[n], want[n], shallow=False)]
        if PICTURE.read_bytes() != readme_picture(): rows.append(f"{PICTURE.relative_to(ROOT)}: not the tour's last figure")
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_args = commands.add_parser(
        "run", help="execute notebooks in a clean kernel, store their outputs and measure how far the numbers move"
    )
    run_args.add_argument("paths", nargs="*", help="notebooks (default: all)")
    run_args.add_argument("--draft", action="store_true", help="execute once and measure nothing (the tests will ask for the rest)")
    kept = "cells were only moved or renamed since a commit (default: HEAD): measure a notebook only if it shows something else"
    run_args.add_argument("--kept", nargs="?", const="HEAD", metavar="COMMIT", help=kept)
    run_args.add_argument("--jobs", type=int, default=2, help="kernels at a time (default: 2)")
    commands.add_parser("export", help="write lmbook/ from the notebooks")
    commands.add_parser("check", help="fail if lmbook/ is not what the notebooks export")
    args = parser.parse_args()
    if args.command == "run":
        pages = notebooks(args.paths)
        tidy(pages)
        export()
        start = time.perf_counter()
        try:
            done = rerun(pages, args.kept, args.jobs) if args.kept else run(pages, [] if args.draft else MEASURED, args.jobs)
            for path, notes in done:
                print("\n  ".join([f"{path}: stored after {time.perf_counter() - start:.0f} s", *notes]), flush=True)
        finally:
            record_findings(pages)
            PICTURE.write_bytes(readme_picture())
    elif args.command == "export":
        tidy(notebooks())
        export()
        PICTURE.write_bytes(readme_picture())
    else:
        rows = export_differences()
        if rows: sys.exit("\n".join([*rows, "The package is not what the notebooks export: run `make export` and commit lmbook/."]))
        rows = [f"{page}: its cells were edited since they were stored: run `make export`" for page in notebooks() if not is_tidy(page)]
        rows += [f"{page}: {problem}" for page in notebooks() for problem in spread_problems(page)]
        if rows: sys.exit("\n".join(rows))
        print("lmbook/ is what the notebooks export, and how far their numbers move is known")


if __name__ == "__main__": main()
