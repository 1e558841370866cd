"""Re-run the notebooks under arithmetics from which no tolerance was learned: `make elsewhere`.

The spreads beside the notebooks say how far each number moved under some arithmetics. Whether that is more than a memory of these shows
under others. All notebooks under all of them take long, so the tests run a part each time (`--part`), another one at each commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.arithmetics import ALL, ELSEWHERE, Arithmetic
from tools.notebooks import NBS, ROOT, notebooks

PART = 3  # notebooks in a part
SHOWN = 12  # numbers that the table names


@dataclass(frozen=True)
class Outcome:
    "What one arithmetic did to the notebooks."

    arithmetic: str
    code: int  # pytest's exit status
    report: dict  # as the plugin of the tests writes it

    def row(self) -> str:
        pages = self.report["notebooks"].values()
        counts = {k: sum(p[k] for p in pages) for k in ("run", "compared", "moved", "half", "failed")}
        numbers = [f"{len(pages):9}", *(f"{n:{10 if k == 'compared' else 8}}" for k, n in counts.items())]
        return f"{self.arithmetic:15}{''.join(numbers)}"


HEAD = f"{'arithmetic':15}{'notebooks':>9}{'cells':>8}{'compared':>10}{'moved':>8}{'> half':>8}{'failed':>8}"


def run(arithmetic: Arithmetic, pages: list[Path], jobs: int) -> Outcome:
    "Compare the notebooks with what is stored while their kernels compute in another way."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--nbval", "--nbval-current-env", "--nbval-min-compared", "0"]
        options += ["--nbval-arithmetic", arithmetic.name, "--nbval-report", str(report)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(jobs), "--dist", "loadfile"]
        command += [*options, *map(str, pages)]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"LMBOOK_BUDGET": ""}).returncode
        return Outcome(arithmetic.name, code, json.loads(report.read_text()) if report.exists() else {"notebooks": {}, "nearest": []})


def table(outcomes: list[Outcome]) -> str:
    "What differs, and by how much of what it is allowed."
    nearest = sorted(({"arithmetic": o.arithmetic} | m for o in outcomes for m in o.report["nearest"]), key=lambda m: -m["used"])[:SHOWN]
    rows = [HEAD, *(o.row() for o in outcomes)]
    if nearest: rows += ["", "The numbers that came nearest to what they are allowed (1.00: all of it):"]
    for m in nearest:
        name = Path(m["notebook"]).stem
        rows.append(
            f"{m['used']:6.2f}  {name:20} {m['cell']:14} {m['arithmetic']:15} stored {m['stored']}, new {m['new']}:  {m['where'].strip()}"
        )
    return "\n".join(rows)


def part(commit: str) -> tuple[Arithmetic, list[Path]]:
    "An arithmetic and some notebooks, chosen by the name of a commit, so that each commit looks elsewhere and can be looked at again."
    number, pages = int(hashlib.sha256(commit.encode()).hexdigest(), 16), notebooks()
    arithmetics = [a for a in ELSEWHERE if a.runs_here]
    arithmetic, start = arithmetics[number % len(arithmetics)], number // len(arithmetics) % len(pages)
    step = len(pages) // PART
    return arithmetic, [pages[(start + i * step) % len(pages)] for i in range(min(PART, len(pages)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks (default: all)")
    parser.add_argument("--arithmetic", action="append", choices=ALL, help="one of these only (default: those of ELSEWHERE)")
    parser.add_argument(
        "--part",
        nargs="?",
        const="",
        metavar="COMMIT",
        help=f"{PART} notebooks under one arithmetic, chosen by the commit (default: this one)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="kernels at a time (default: 2)")
    args = parser.parse_args()
    if args.part is None:
        outcomes = [
            run(ALL[name], args.notebooks or [NBS], args.jobs) for name in args.arithmetic or [a.name for a in ELSEWHERE if a.runs_here]
        ]
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)  # not a clone: always the same part
        commit = args.part or head.stdout.strip()
        arithmetic, pages = part(commit)
        print(f"the part of {commit[:12] or 'no commit'}: {', '.join(p.stem for p in pages)} under {arithmetic.name!r}", flush=True)
        outcomes = [run(arithmetic, pages, args.jobs)]
    print(f"\n{table(outcomes)}")
    if any(o.code for o in outcomes): sys.exit("Some outputs do not hold elsewhere.")


if __name__ == "__main__": main()
