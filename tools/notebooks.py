"""Run, export and check the notebooks: what `make run`, `make export` and CI call.

A notebook on disk is a function of its sources alone: `run` executes it in a clean kernel from top to bottom, and `normalise` takes out
everything that would differ the next time. So running an unchanged notebook leaves the file byte-identical, figures included.
"""

from __future__ import annotations

import argparse
import base64
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PICTURE = ROOT / "docs" / "_static" / "floor.png"  # shown by the README

# The environment of every kernel, when outputs are stored and when they are compared. Not needed by readers: it makes runs alike.
KERNEL_ENV = {
    "OMP_NUM_THREADS": "1",  # two notebooks run side by side on two cores; the number of threads also changes float sums
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the order in which a set prints
    "TQDM_DISABLE": "1",  # a progress bar is for people, not for a stored output
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",  # the book needs no network, so it must not find one by chance
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "default",
    "COLUMNS": "120",
}

KEEP_CELL_METADATA = {"tags", "jupyter"}
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def notebooks(paths: list[str] | None = None) -> list[Path]:
    "The notebooks named, or all chapters in reading order (the preface first)."
    if paths: return [Path(p) for p in paths]
    return sorted(NBS.glob("*.ipynb"), key=lambda p: (p.stem != "index", p.stem))


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


def run(path: Path) -> float:
    "Execute the notebook in a clean kernel from top to bottom and store its outputs; returns the seconds it took."
    from nbclient import NotebookClient

    nb = normalise(nbformat.read(path, as_version=4))
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    client = NotebookClient(
        nb, timeout=900, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(path.resolve().parent)}}
    )
    client.execute(env=os.environ | KERNEL_ENV)
    seconds = time.perf_counter() - start
    store(normalise(nb), path)  # only a run that went through
    return seconds


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
        have = {p.name: p for p in (ROOT / "lmbook").glob("*.py")}
        rows = [f"lmbook/{n}: no notebook exports it" for n in sorted(have.keys() - want.keys())]
        rows += [f"lmbook/{n}: missing" for n in sorted(want.keys() - have.keys())]
        rows += [f"lmbook/{n}: differs" for n in sorted(have.keys() & want.keys()) if not filecmp.cmp(have[n], want[n], shallow=False)]
        if PICTURE.read_bytes() != readme_picture(): rows.append(f"{PICTURE.relative_to(ROOT)}: not the tour's last figure")
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run_args = commands.add_parser("run", help="execute notebooks in a clean kernel and store their outputs")
    run_args.add_argument("paths", nargs="*", help="notebooks (default: all)")
    commands.add_parser("export", help="write lmbook/ from the notebooks")
    commands.add_parser("check", help="fail if lmbook/ is not what the notebooks export")
    args = parser.parse_args()
    if args.command == "run":
        for path in notebooks(args.paths): store(normalise(nbformat.read(path, as_version=4)), path)  # the export names cells by their ids
        export()
        for path in notebooks(args.paths):
            print(f"{path}: {run(path):.1f} s", flush=True)
        PICTURE.write_bytes(readme_picture())
    elif args.command == "export":
        export()
        PICTURE.write_bytes(readme_picture())
    else:
        rows = export_differences()
        if rows: sys.exit("\n".join([*rows, "The package is not what the notebooks export: run `make export` and commit lmbook/."]))
        print("lmbook/ is what the notebooks export")


if __name__ == "__main__": main()
