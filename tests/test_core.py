"""What every chapter stands on: that it holds where a chapter would not show it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from lmbook import core
from lmbook.core import (
    Box,
    Check,
    Drawing,
    LmbookError,
    TokenModel,
    at_least_float32,
    best_device,
    check_task,
    evaluating,
    measured_once,
    optional,
    random_state,
    scores_of,
    seed_everything,
    set_random_state,
    whole_file,
    whole_folder,
    write_whole,
)


class OwnError(LmbookError): "A module's own."


check = Check(OwnError)


@dataclass(frozen=True)
class Config:
    n: int = 1
    m: int | None = None
    share: float = 0.0
    rate: float = 1.0
    limit: float | None = None
    kind: Literal["a", "b"] = "a"
    perhaps: Literal["x", "y"] | None = None  # no Literal of its own: not looked at

    def __post_init__(self) -> None:
        check.counts(self, "n", "m")
        check.shares(self, "share")
        check.positive(self, "rate", "limit")
        check.choices(self)


# ---------------------------------------------------------------- errors and checks


def test_importing_the_floor_is_light():
    "Whoever reads files need not wait for PyTorch or matplotlib."
    code = "import sys, lmbook.core; print([m for m in ('torch', 'matplotlib', 'pandas', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number, at least 1."),
        ({"n": True}, "n=True must be a whole number"),
        ({"n": 2.0}, "n=2.0 must be a whole number"),
        ({"n": "2"}, "n='2' must be a whole number"),
        ({"n": None}, "n=None must be a whole number"),
        ({"m": 0}, "m=0 must be"),
        ({"share": 1}, "share=1 must be at least 0 and below 1"),
        ({"share": -0.1}, "share=-0.1 must be"),
        ({"share": float("nan")}, "share=nan must be"),
        ({"rate": 0}, "rate=0 must be above 0, and finite"),
        ({"rate": float("inf")}, "rate=inf must be above 0"),
        ({"rate": float("nan")}, "rate=nan must be above 0"),
        ({"limit": 0.0}, "limit=0.0 must be above 0"),
        ({"kind": "c"}, "There is no kind='c'. Choose one of: a, b."),
        ({"kind": None}, "There is no kind=None"),
        ({"kind": ["a"]}, r"There is no kind=\['a'\]"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said(change, message):
    with pytest.raises(OwnError, match=message): Config(**change)


@pytest.mark.parametrize("change", [{}, {"m": 3}, {"m": None}, {"share": 0}, {"limit": None}, {"limit": 2}, {"kind": "b"}])
def test_what_is_right_passes(change):
    assert Config(**change) == Config(**change)


def test_zero_may_be_allowed():
    check.positive(Config(share=0.0), "share", zero=True)
    with pytest.raises(OwnError, match="at least 0"):
        check.positive(type("C", (Config,), {"__post_init__": lambda self: None})(share=-1), "share", zero=True)
    check.counts(type("C", (Config,), {"__post_init__": lambda self: None})(n=0), "n", least=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_of_a_vocabulary_pass(dtype):
    check.ids(torch.tensor([[0, 9]], dtype=dtype), 10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[10]]), "The id 10 is no token: ids run from 0 to 9"),
        (torch.tensor([[-1, 3]]), "The id -1 is no token"),
        (torch.tensor([1, 2]), r"shape \(B, T\) and hold something, not \(2,\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"not \(1, 0\)"),
        (torch.tensor([[1.0]]), "whole numbers, not torch.float32"),
        (torch.tensor([[True]]), "whole numbers, not torch.bool"),
        (torch.tensor([[1j]]), "whole numbers, not torch.complex64"),
        (torch.tensor([[1]], dtype=torch.int16), r"not torch.int16: write ids.long\(\)"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message):
    with pytest.raises(OwnError, match=message): check.ids(ids, 10)


@pytest.mark.parametrize("row", [[3, 1], (3, 1), np.array([3, 1], dtype=np.uint16), torch.tensor([3, 1], dtype=torch.int32)])
def test_a_row_of_ids_becomes_an_array(row):
    out = check.row(row, 4)
    assert out.tolist() == [3, 1] and out.dtype == np.int64
    assert check.row(row[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ab", "a row is a text"), (5, "a row is 5, not a row of ids"), ([1, [2]], "not one row of ids"), ([.5], "not float64 of shape"),
        ([[1]], r"not int64 of shape \(1, 1\)"), ([True], "not bool"), ([1, 4], "The id 4 is no token: a row's ids run from 0 to 3"),
        ([1, -1], "The id -1 is no token"), (torch.tensor(2), "a row is 2"),
    ],
)  # fmt: skip
def test_what_is_no_row_of_ids_is_refused(row, message):
    with pytest.raises(OwnError, match=message): check.row(row, 4)


def test_a_model_says_what_it_predicts():
    class Says:
        task, vocab_size, takes_segments = "masked", 5, True

    check_task(Says(), "next", "masked", what="this")
    for other in (nn.Linear(2, 2), lambda ids: ids, object()): check_task(other, "next", what="this")  # who says nothing passes
    with pytest.raises(OwnError, match=r"^this needs .* the next token or a tag .* This Says predicts .* both sides: .*`unmask`"):
        check_task(Says(), "next", "tags", what="this", error=OwnError)

    class Net(nn.Module):
        task, vocab_size, takes_segments = "masked", 5, True

    assert isinstance(torch.compile(Net()), TokenModel)  # what wraps a model says what the model says


def test_scores_are_found_in_what_a_model_gives():
    ids, scores = torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 3, 4)
    for out in (scores, (scores, "a state"), type("Out", (), {"logits": scores})): assert scores_of(out, ids) is scores
    for out, found in ((scores[:1], r"\(1, 3, 4\)"), (scores[0], r"\(3, 4\)"), (None, "NoneType"), ((), "tuple"), ("ab", "str")):
        with pytest.raises(OwnError, match=rf"for ids \(2, 3\), not {found}"): scores_of(out, ids, OwnError)


def test_half_precision_is_added_up_in_single():
    kinds = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {kind: at_least_float32(torch.ones(1, dtype=kind)).dtype for kind in kinds} == kinds


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(OwnError, match=r"package nowhere_to_be_found, .* pip install 'lmbook\[more\]'"):
        optional("nowhere_to_be_found", "more", OwnError)
    (tmp_path / "half_there.py").write_text("import something_that_it_wants")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LmbookError, match="package something_that_it_wants,"): optional("half_there", "more")
    assert optional("json", "more") is json


# ---------------------------------------------------------------- files


def listing(folder: Path) -> list[str]: return sorted(p.name for p in folder.rglob("*"))


class Stop(BaseException): "As sudden as Ctrl-C."


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_whole(path, "one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o644
    for failure in (Stop, ValueError, KeyboardInterrupt):
        with pytest.raises(failure), whole_file(path) as scratch:
            scratch.write_text("thr")
            raise failure
    assert path.read_bytes() == b"two" and listing(path.parent) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("block", [whole_file, whole_folder])
def test_no_room_is_the_users_error_and_what_was_read_is_not(tmp_path, block):
    with pytest.raises(OwnError,
        match="x cannot be written: No space left on device. What was there before is untouched"), block(tmp_path / "x", OwnError):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="other"), block(tmp_path / "x", OwnError): open(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(OwnError, match="cannot be written"), block(tmp_path / "file" / "x", OwnError): pass
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("block", [whole_file, whole_folder])
def test_renaming_that_fails_leaves_the_old_one(tmp_path, block, monkeypatch):
    def fill(word: str) -> None:
        with block(tmp_path / "x") as scratch: (scratch / "part" if scratch.is_dir() else scratch).write_text(word)

    def refuse(*args): raise PermissionError(errno.EPERM, "Operation not permitted")

    fill("old")
    before = {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(core, "_to_disk", refuse)
    with pytest.raises(LmbookError, match="not permitted"): fill("new")
    assert {p.name: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_is_not_written_over_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    for _ in range(2):
        with pytest.raises(LmbookError, match="names no folder that could be replaced"):
            with whole_folder(tmp_path / "run") as scratch: (scratch / "a").write_text("new")
    assert (tmp_path / "run").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("at", range(8))
def test_a_process_that_dies_leaves_a_whole_folder(tmp_path, at):
    """Killed at each call of the system that changes names: what the name means is the old folder or the new one.

    Between two renames it means nothing, and the old one lies beside.
    """
    code = f"""
import os, sys
from pathlib import Path
from lmbook.core import whole_folder
calls = 0
def counted(function):
    def call(*args, **options):
        global calls
        if calls == {at}: os._exit(9)
        calls += 1
        return function(*args, **options)
    return call
with whole_folder("run") as scratch: (scratch / "a").write_text("old")
os.rename, os.fsync, os.mkdir = counted(os.rename), counted(os.fsync), counted(os.mkdir)
Path.rename = counted(Path.rename)
with whole_folder("run") as scratch:
    (scratch / "a").write_text("new"); (scratch / "b").write_text("new")
"""
    code = subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode
    assert code in (0, 9)
    found = [tmp_path / name for name in ("run", ".old-run") if (tmp_path / name).is_dir()]
    assert [p.read_text() for p in sorted(found[0].iterdir())] in (["old"], ["new", "new"])
    if code == 0: assert listing(tmp_path) == ["a", "b", "run"]


def test_leftovers_of_a_killed_writer_are_cleared_away(tmp_path):
    for name in (".writing-run", ".old-run"): (tmp_path / name / "deep").mkdir(parents=True)
    with whole_folder(tmp_path / "run") as scratch: (scratch / "a").write_text("new")
    assert listing(tmp_path) == ["a", "run"]


# ---------------------------------------------------------------- the same numbers again


def test_all_three_generators_go_on_where_they_stood():
    import random

    def draw(): return random.random(), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))  # noqa: NPY002

    before = random_state()
    seed_everything(3)
    draw()  # so that each generator has half of a pair of normal numbers in hand
    middle, then = random_state(), [draw(), draw()]
    set_random_state(middle)
    assert [draw(), draw()] == then
    set_random_state(before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(LmbookError, match=r"from 0 to 2\*\*32 - 1"): seed_everything(seed)


@pytest.mark.parametrize(("name", "message"), [("cuda:99", "There is no 'cuda:99' here"), ("gpu", "PyTorch knows no device 'gpu'")])
def test_a_device_that_is_not_there(name, message):
    with pytest.raises(LmbookError, match=message): best_device(name)


@pytest.mark.parametrize("gradients", [False, True])
def test_each_module_comes_back_as_it_was(gradients):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    net[1].eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(net, gradients=gradients):
        assert not any(m.training for m in net.modules()) and torch.is_grad_enabled() == gradients
        1 / 0  # noqa: B018
    assert [m.training for m in net.modules()] == modes and torch.is_grad_enabled()
    with torch.no_grad(), evaluating(net, gradients=True): assert not torch.is_grad_enabled()  # who switched them off meant it
    with evaluating(lambda ids: ids): pass


def test_two_may_evaluate_a_model_at_a_time():
    "Whoever ends first leaves it to the other; what was frozen stays so."
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    net[1].eval()
    one, two = evaluating(net), evaluating(net, gradients=None)
    one.__enter__()
    two.__enter__()
    assert torch.is_grad_enabled() is False
    one.__exit__(None, None, None)
    assert not any(m.training for m in net.modules())
    two.__exit__(None, None, None)
    assert [m.training for m in net.modules()] == [True, True, False] and not len(core._resting)


# ---------------------------------------------------------------- drawings


def test_one_of_each_is_drawn_where_it_was_asked_for(tmp_path):
    drawing = Drawing(6, 3)
    a = drawing.box(1, 1.5, "from", width=1, height=0.5, colour="data")
    b = drawing.grid(4, 1.5, [[1.0, -2.0], [None, float("nan")]], "numbers", "T C", rows=["r", "s"], columns=["u", "v"], cell=0.5)
    drawing.arrow(a, b, "goes to", bend=0.2)
    drawing.arrow(a, (1, 0.2), dashed=True)
    frame = drawing.frame([a, b], "all of it")
    drawing.text(3, 2.8, "a title")
    assert drawing.parts == [
        ("box", "from"),
        ("grid", "numbers"),
        ("arrow", "goes to"),
        ("arrow", ""),
        ("frame", "all of it"),
        ("text", "a title"),
    ]
    assert repr(drawing) == "Drawing(1 box, 1 grid, 2 arrow, 1 frame, 1 text)"
    assert (a.left, a.right, a.top, a.bottom) == ((0.5, 1.5), (1.5, 1.5), (1, 1.75), (1, 1.25))
    assert (b.width, b.height) == (1, 1) and frame.left[0] < a.left[0] and frame.right[0] > b.right[0] and frame.top[1] > b.top[1]
    words = [t.get_text() for t in drawing.axes.texts]
    for word in ("from", "1.0", "-2.0", "numbers", "(T=2, C=2)", "r", "v", "goes to", "all of it", "a title"): assert word in words
    assert "nan" not in words
    drawing.figure.canvas.draw()
    arrow = next(p for p in drawing.axes.patches if type(p).__name__ == "FancyArrowPatch")
    ends = arrow.get_path().vertices  # in inches: between the parts, not in them
    assert a.right[0] - 0.05 <= ends[0][0] <= a.right[0] + 0.2
    for name in ("a.png", "a.svg", "a.pdf"):
        drawing.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert drawing._repr_png_()[:4] == b"\x89PNG" == (tmp_path / "a.png").read_bytes()[:4]


def test_the_larger_a_number_the_darker_its_cell():
    drawing = Drawing()
    drawing.grid(2, 1, torch.tensor([[0.0, 1.0, -4.0]], requires_grad=True))
    depth = [p.get_facecolor()[3] for p in drawing.axes.patches[:3]]
    assert depth == [0, 0.15, 0.6] and drawing.axes.patches[1].get_facecolor()[2] > drawing.axes.patches[1].get_facecolor()[0]
    plain = Drawing()
    plain.grid(2, 1, np.array([1, 2]), shade=False)
    assert all(p.get_facecolor()[3] == 0 for p in plain.axes.patches[:2])
    words = Drawing()
    words.grid(2, 1, [["the", "cat"]])
    assert [t.get_text() for t in words.axes.texts] == ["the", "cat"]


def test_a_shape_that_does_not_fit_its_letters_is_noticed():
    with pytest.raises(ValueError): Drawing().grid(1, 1, [[1.0]], axes="B T C")


def test_a_drawing_is_laid_out_by_hand_in_every_style():
    import matplotlib.pyplot as plt

    with plt.style.context("lmbook.data.book"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Drawing()._repr_png_()


def test_a_box_is_a_value(): assert Box(1, 2, 3, 4, None).left == (-0.5, 2)


# ---------------------------------------------------------------- measured once


def test_every_stored_result_has_a_badge():
    for path in (Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"):
        measured = measured_once(path.stem)
        when, on, command = repr(measured).split("\n")
        assert when.startswith("measured once, 20") and "core" in on and f"python -m benchmarks.{path.stem}" in command
        assert when in measured._repr_html_() and "lmbook-measured" in measured._repr_html_()


def test_results_that_are_not_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "kettle.json", json.dumps({"seconds": 3, "machine": {}}))
    assert measured_once("kettle", tmp_path)["seconds"] == 3 and "at an unknown date" in repr(measured_once("kettle", tmp_path))
    with pytest.raises(LmbookError, match="stored no 'minutes', but: seconds, machine"): measured_once("kettle", tmp_path)["minutes"]
    with pytest.raises(LmbookError, match="Did you mean 'kettle'"): measured_once("kettel", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LmbookError, match="come with the book's repository"): measured_once("nothing_of_the_kind")
    parts = {"a": {"date": "2026-01-02", "machine": {"cores": 1}}, "b": {"date": "2026-03-04"}}
    write_whole(tmp_path / "parts.json", json.dumps({"date": "2026-03-04", "measured": parts, "a": 1, "b": [2]}))
    assert "2026-01-02 to 2026-03-04\n  1 core\n" in repr(measured_once("parts", tmp_path))
    (tmp_path / "evil.json").write_text(json.dumps({"date": "<b>", "command": "<script>"}))
    assert "<script>" not in measured_once("evil", tmp_path)._repr_html_()


def test_the_notes_of_a_weights_file_are_brought_into_order():
    "Its writer shuffles them; so the same weights would be other bytes."
    import io

    from lmbook.core import settle_header

    text = b'{"__metadata__":{"b":"2","a":"1"},"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    file = io.BytesIO(len(text).to_bytes(8, "little") + text)
    settle_header(file)
    assert b'{"a":"1","b":"2"}' in file.getvalue() and len(file.getvalue()) == len(text) + 8
