"""What the benchmarks share: the best of some runs, and what they were made with."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def best_of(repeats: int, run: Callable[[], object]) -> float:
    "Seconds of the fastest of some runs."
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(*packages: str) -> dict[str, object]:
    "What the measurements were made with, and the versions of `packages`. No name and no path of the machine."
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "load_before": load, "system": platform.system(), "python": platform.python_version(),
            "packages": {name: version(name) for name in packages}}


def rounded(value: object, digits: int = 4) -> object:
    "The same, with floats rounded to so many significant digits."
    if isinstance(value, float): return float(f"{value:.{digits}g}")
    if isinstance(value, dict): return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list): return [rounded(item, digits) for item in value]
    return value
