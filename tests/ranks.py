"""Two real ranks, processes that talk over gloo, for test_ranks.py: what they do is written down, one file for each."""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmbook.batches import Batch, Examples
from lmbook.checkpoints import Checkpoints
from lmbook.data_parallel import DataParallel
from lmbook.training import JsonLog, Ranks, TrainConfig, Trainer, TrainingError

V, WORLD = 30, 2
# nothing that would hide a wrong factor of the gradient, as Adam and clipping do; and one batch to a step
PLAIN: dict[str, Any] = {
    "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "clip": None, "schedule": "constant", "accumulate": 1, "epochs": 2,
}  # fmt: skip


class Model(nn.Module):
    "Guess the next token from this one, in double precision."

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(V, 8), nn.Dropout(dropout), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, V)).double()

    def forward(self, ids: Tensor) -> Tensor: return self.layers(ids)


def rows(n: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, length).tolist() for length in rng.integers(2, 12, n)]


def trainer(
    ranks: Ranks | None,
    folder: Path | None = None,
    callbacks: Any = (),
    dropout: float = 0.0,
    evaluate: Any = None,
    loss: Any = None,
    **changes: Any,
) -> Trainer:
    """Three epochs of 25 rows, four to a batch, two batches to a step.

    The last batch of an epoch has one row, so that a rank has none; the last step has this batch only.
    """
    torch.manual_seed(1)
    config = TrainConfig(**{
        "epochs": 3, "accumulate": 2, "lr": 2e-2, "weight_decay": 0.1, "clip": 0.3, "eval_every": 4, "log_every": 2, "device": "cpu",
        **changes,
    })  # fmt: skip
    judge = Examples(rows(9, 1), batch_size=4, shuffle=False) if evaluate is None else evaluate
    return Trainer(
        Model(dropout), Examples(rows(25, 0), batch_size=4), config, evaluate=judge, callbacks=callbacks,
        checkpoints=folder and Checkpoints(folder), ranks=ranks, **({} if loss is None else {"loss": loss}),
    )  # fmt: skip


def found(trainer: Trainer) -> dict[str, Any]:
    "What a run came to, as JSON keeps it: to the last bit."
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
    return {"step": trainer.step, "tokens": int(trainer.tokens), "history": vars(trainer.history), "weights": weights}


def at(rank: int, mine: int, step: int, do: Callable[[Trainer], Any]) -> Callable[..., None]:
    "A callback that does something after a step, on one rank."

    def callback(trainer: Trainer, event: str, row: Any) -> None:
        if rank == mine and event == "step" and row["step"] == step: do(trainer)

    return callback


def main(folder: Path, rank: int) -> dict[str, Any]:
    "Everything that test_ranks.py looks at."
    store = f"file://{folder}/store" if os.name != "nt" else f"file:///{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=120))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ranks, out, touched = DataParallel(), {}, []

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(folder / "runs") in str(arguments[0]): touched.append(f"{event} {arguments[0]}")

    sys.addaudithook(heard)
    runs = folder / "runs"

    whole = trainer(ranks, runs / "whole", [JsonLog(runs / "log.jsonl")], save_every=3, keep=2, load_best=True)
    whole.fit()
    out["whole"] = found(whole)

    plain = trainer(ranks, None, **PLAIN)
    plain.fit()
    out["plain"] = found(plain)

    stops = trainer(ranks, None, [at(rank, 1, 3, lambda t: t.stop("enough"))])
    stops.fit()
    out["stop"] = found(stops)

    pressed = at(rank, 1, 5, lambda t: signal.raise_signal(signal.SIGINT))
    broken_off = trainer(ranks, runs / "broken off", [pressed])
    broken_off.fit()
    out["ctrl-c"] = found(broken_off)

    goes_on = trainer(ranks, runs / "of one", [lambda *_: None])
    goes_on.fit()
    out["goes on"] = found(goes_on)

    patient = trainer(ranks, None, evaluate=lambda model: 1.0 + rank * (ranks.world - 1) * torch.rand(()).item(), eval_every=1, patience=2)
    patient.fit()
    out["patience"] = found(patient)

    dice: list[list[float]] = []
    throw = [lambda trainer, event, row: dice.append(torch.rand(2).tolist()) if event in ("start", "end") else None]
    trainer(ranks, runs / "dice", throw, dropout=0.5, eval_every=None, epochs=1).fit()
    trainer(ranks, runs / "dice", throw, dropout=0.5, eval_every=None, epochs=2).fit()
    out["dice"] = dice

    def nothing_counts(model: nn.Module, batch: Batch) -> tuple[Tensor, int]: return model(batch.ids).sum() * 0, 0

    (folder / "a file").write_text("")
    for name, wrong in (
        ("no folder", lambda: trainer(ranks, folder / "a file" / "run").fit()),
        ("nothing counts", lambda: trainer(ranks, loss=nothing_counts).fit()),
    ):
        try: wrong()
        except TrainingError as error: out[name] = str(error)
    out["touched"] = touched
    dist.barrier()
    dist.destroy_process_group()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, number = Path(sys.argv[1]), int(sys.argv[2])
    (where / f"rank {number}.json").write_text(json.dumps(main(where, number)), encoding="utf-8")
