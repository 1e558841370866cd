"A copy of a module with one fault in it, so that a test can show that its check would have found it."

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def planted(
    module: ModuleType,
    old: str,  # stands in its source exactly once
    new: str,
    monkeypatch: pytest.MonkeyPatch,
) -> ModuleType:
    "The module, made anew from its source with `old` replaced by `new`; the module itself stays as it is."
    path = Path(str(module.__file__))
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {path.name}: plant the fault elsewhere."
    faulty = ModuleType(f"{module.__name__}_faulty")
    faulty.__package__ = module.__package__
    monkeypatch.setitem(sys.modules, faulty.__name__, faulty)  # dataclasses look their module up
    exec(compile(source.replace(old, new), str(path), "exec"), faulty.__dict__)
    return faulty
