"""The seams of the Trainer: two processes that share each batch learn what one learns from the whole of it, and agree with each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lmbook.checkpoints import latest
from lmbook.training import JsonLog, Ranks, TensorBoard, read_log

from .ranks import PLAIN, WORLD, found, trainer

ROOT = Path(__file__).resolve().parent.parent
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Two(NamedTuple):
    "What two ranks did: what each says of it, and the folder that they were given."

    first: dict[str, Any]
    second: dict[str, Any]
    folder: Path
    printed: list[str]  # by each


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Two:
    "One start of two processes for all tests: most of its time is the import of PyTorch."
    folder = tmp_path_factory.mktemp("ranks")
    trainer(None, folder / "runs" / "of one", [lambda t, e, row: t.stop("interrupted") if row["step"] == 5 else None]).fit()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TQDM_DISABLE", None)
    command = [sys.executable, "-m", "tests.ranks", str(folder)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": environment}
    processes = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(WORLD)]
    try: said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes: process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    first, second = (json.loads((folder / f"rank {rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD))
    return Two(first, second, folder, said)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    "Weights to ten digits, and a history with the same rows."
    for name, value in a["weights"].items():
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), torch.tensor(b["weights"][name], dtype=torch.float64), **CLOSE)
    (one, other), names = (a["history"], b["history"]), ("best_step", "waiting", "stopped")
    assert [one[name] for name in names] == [other[name] for name in names]
    assert [row.keys() for row in one["rows"]] == [row.keys() for row in other["rows"]]
    for left, right in zip(one["rows"], other["rows"]): assert left == pytest.approx(right, rel=1e-10, abs=1e-10)
    assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])


def alone(**changes: Any) -> dict[str, Any]:
    one = trainer(None, **changes)
    one.fit()
    return found(one)


def test_two_ranks_learn_what_one_learns(two):
    "AdamW, clipping, two batches to a step, a last step in which one rank has no row; the evaluation is shared, too."
    one = alone(load_best=True)
    assert one["step"] == 11 and min(row["norm"] for row in one["history"]["rows"] if "norm" in row) > 0.3  # all are clipped
    same(two.first["whole"], one)
    assert two.first["whole"] == two.second["whole"]  # to the last bit


def test_gradients_are_those_of_the_mean_over_all_tokens(two):
    "Not of the mean over ranks of their means: rows are of different lengths, and the last batch has one row."
    one = alone(**PLAIN)
    assert one["step"] == 14
    same(two.first["plain"], one)
    assert two.first["plain"] == two.second["plain"]


def test_a_wish_to_stop_is_everybodys(two):
    "It is added up with the next step's losses."
    for name, step, reason in (("stop", 4, "enough"), ("ctrl-c", 6, "interrupted"), ("patience", 3, "patience")):
        a, b = two.first[name], two.second[name]
        assert a == b and (a["step"], a["history"]["stopped"]) == (step, reason), name


def test_the_first_rank_writes(two):
    assert two.first["touched"] and two.second["touched"] == []
    assert "11/11" in two.printed[0] and "step" not in two.printed[1]  # the progress bar
    for log in ("log.jsonl", "whole/log.jsonl"):
        rows = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_s")} for row in read_log(two.folder / "runs" / log)]
        assert rows == two.first["whole"]["history"]["rows"]


def test_what_two_have_begun_one_can_end(two):
    assert latest(two.folder / "runs" / "broken off").step == 6
    again = trainer(None, two.folder / "runs" / "broken off", [lambda *_: None])
    again.fit()
    same(found(again), alone())


def test_what_one_has_begun_two_can_end(two):
    assert two.first["goes on"] == two.second["goes on"]
    same(two.first["goes on"], alone())


def test_what_fails_on_the_first_rank_fails_on_all(two):
    assert "Nothing can be written" in two.first["no folder"] and two.first["no folder"] == two.second["no folder"]
    assert "no target of this batch counts" in two.first["nothing counts"] and two.first["nothing counts"] == two.second["nothing counts"]


def test_each_rank_has_dice_of_its_own(two):
    "At the start, and after it has gone on from a checkpoint."
    assert len(two.first["dice"]) == 4 and not any(a == b for a, b in zip(two.first["dice"], two.second["dice"]))


def test_gradients_are_held_until_the_last_batch_of_a_step():
    "What ranks would tell each other earlier, they would have to tell again."
    class Noted(Ranks):
        def hold(self, forward, last):
            noted.append(last)
            return super().hold(forward, last)

    noted: list[bool] = []
    trainer(Noted()).fit()
    assert noted == [False, True] * 10 + [True]


def test_of_several_ranks_the_others_write_no_log(tmp_path):
    class Second(Ranks): rank = 1

    one = trainer(Second(), None, [JsonLog(tmp_path / "log.jsonl"), TensorBoard(tmp_path / "board")], epochs=1)
    one.fit()
    assert one.history.stopped == "steps" and list(tmp_path.iterdir()) == []


def test_one_process_has_nobody_to_talk_to():
    ranks, model, batch = Ranks(), torch.nn.Linear(1, 1), object()
    assert (ranks.rank, ranks.world) == (0, 1) and ranks.share(batch) is batch and ranks.join(model) is model
    assert ranks.total(1, 2.5, model) == (1, 2.5, model) and ranks.agree("") == "" and ranks.agree(batch) is batch
    with ranks.hold(model, last=False): pass
    done: list[int] = []
    ranks.write(lambda: done.append(1))
    assert done == [1]
