"""A small text, and a small run over it."""

from __future__ import annotations

from pathlib import Path

from lmbook.runs import RunConfig
from lmbook.small_world import SmallWorld, SmallWorldConfig

STORIES = list(SmallWorld(SmallWorldConfig(limit=20)).texts("train", n=60))
SMALL = {"d_model": 32, "n_layer": 1, "n_head": 2, "context_length": 32}
CPU = {"device": "cpu"}


def write_stories(folder: Path) -> Path:
    "The text, in a file."
    path = folder / "mine.txt"
    path.write_text("".join(story + "\n" for story in STORIES), encoding="utf-8", newline="\n")
    return path


def config(text: Path | str, **changes) -> RunConfig:
    return RunConfig(**({"text": (str(text),), "by": "line", "steps": 12, "batch_size": 4, "model": SMALL, "train": CPU} | changes))
