"""Ranks of the Trainer: under any strategy and on any number of ranks a run is the run of one process, and its checkpoints are whole.

Most ranks are threads over gloo, which start at once. Each proof has been seen to fail: `test_the_proofs_are_seen_to_fail` and its
neighbours plant the faults.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lmbook.data_parallel
import lmbook.optimizers
import lmbook.schedules
from lmbook.batches import IGNORE, Batch, Examples
from lmbook.checkpoints import Checkpoints, load_weights
from lmbook.data_parallel import STRATEGIES, CommunicationLog, DataParallel, FullySharded, SeveralRanks, blocks_of, ranks_of
from lmbook.distributed import DistributedError, run_ranks
from lmbook.optimizers import AdamW, Muon, Together
from lmbook.schedules import clip_gradients
from lmbook.training import Ranks, TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig

from .ranks import V, rows

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    torch.use_deterministic_algorithms(False)


def model(seed: int = 1, dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    "Two blocks, a tied matrix, and sizes that no number of ranks divides."
    torch.manual_seed(seed)
    config = TransformerConfig(**{"vocab_size": V, "d_model": 10, "n_layer": 2, "n_head": 2, "context_length": 16, **changes})
    return Transformer(config).to(dtype)


def trainer(
    ranks: Ranks | None, start: nn.Module, folder: Any = None, batches: Any = None, callbacks: Any = (), loss: Any = next_token_loss,
    **changes: Any,
) -> Trainer:
    "As in tests/ranks.py: 25 rows, four to a batch, two batches to a step, and a last step of a single row."
    config = TrainConfig(**{
        "epochs": 1, "accumulate": 2, "lr": 2e-2, "weight_decay": 0.1, "clip": 0.3, "eval_every": 3, "log_every": 2,
        "device": "cpu", **changes,
    })  # fmt: skip
    judge = Examples(rows(9, 1), batch_size=4, shuffle=False)
    given = Examples(rows(25, 0), batch_size=4) if batches is None else batches
    return Trainer(
        copy.deepcopy(start), given, config, evaluate=judge, ranks=ranks, callbacks=callbacks, loss=loss,
        checkpoints=folder and Checkpoints(folder),
    )


def unfused(model: nn.Module) -> torch.optim.Optimizer: return AdamW(model.parameters(), lr=2e-2, fused=False)


def ranks(n: int, fn: Any, *args: Any, **options: Any) -> list[Any]:
    "On threads, which wait for each other no longer than a test should."
    return run_ranks(lambda: fn(*args, **options), n, how="threads", timeout=20)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in model.state_dict().items()}


def run(make: Any, start: nn.Module, **options: Any) -> tuple[dict[str, Tensor], Any]:
    "On this rank: weights and history of a whole run."
    one = trainer(make() if make else None, start, **options)
    history = one.fit()
    return weights(one.model), history


def same(got: Any, wanted: Any, exact: bool = False, rtol: float = 1e-10) -> None:
    close = {"rtol": 0 if exact else rtol, "atol": 0 if exact else rtol}
    for name, value in wanted[0].items(): torch.testing.assert_close(got[0][name], value, **close, msg=lambda m, n=name: f"{n}: {m}")
    assert [row.keys() for row in got[1].rows] == [row.keys() for row in wanted[1].rows]
    for a, b in zip(got[1].rows, wanted[1].rows): assert a == pytest.approx(b, rel=1e-6 if exact else rtol)
    assert got[1].stopped == wanted[1].stopped


KINDS = {**STRATEGIES, "zero-2": lambda: FullySharded(reshard=False)}


@pytest.fixture(scope="module")
def start() -> nn.Module: return model()


@pytest.fixture(scope="module")
def alone(start) -> Any: return run(None, start)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_one_process(kind, n, start, alone):
    "AdamW, clipping, accumulation, uneven rows, ranks without rows: in double precision to ten digits, log included."
    for got in ranks(n, run, KINDS[kind], start): same(got, alone)


def test_on_a_mesh(start, alone):
    "HSDP: two replicas of two parts each."
    for got in ranks(4, run, lambda: FullySharded(replicas=2), start): same(got, alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_as_processes(kind, start, alone):
    for got in run_ranks(run, 2, STRATEGIES[kind], start, how="processes"): same(got, alone)


def halves() -> list[Batch]:
    "Each batch as the two halves that two ranks have of it, one after the other."
    parts = []
    for batch in Examples(rows(24, 0), batch_size=4).read():
        for rank in range(2):
            mine = copy.copy(batch)
            for name in ("ids", "targets", "segments"): setattr(mine, name, getattr(batch, name)[rank::2])
            mine.tokens = int((mine.targets != IGNORE).sum())
            parts.append(mine)
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_bitwise(kind):
    """In single precision, without clipping, two ranks are one process that accumulates the same halves: to the last bit.

    The optimizer is not the fused one: such a kernel rounds the last numbers of a row of memory otherwise, and a part has other last ones.
    """
    start, whole = model(dtype=torch.float32), list(Examples(rows(24, 0), batch_size=4).read())
    plain: dict[str, Any] = {"clip": None, "log_every": 1, "eval_every": None, "optimizer": unfused, "weight_decay": 0.0}
    one = run(None, start, batches=halves(), **plain)
    for got in ranks(2, run, KINDS[kind], start, batches=whole, accumulate=1, **plain): same(got, one, exact=True)


def legs(folder: Any, **options: Any) -> Any: # a function: from a step to the options of a run of four epochs that is interrupted there
    def leg(step: int) -> Any:
        def stop(trainer: Trainer, event: str, row: Any) -> None:
            if event == "step" and row["step"] == step: trainer.stop("interrupted")

        return {"folder": folder, "callbacks": [stop], "epochs": 4, **options}

    return leg


def test_checkpoints_are_whole_and_go_on_anywhere(start, alone, tmp_path):
    "Begun by two ranks under FSDP, gone on with by one process, by four under DDP with ZeRO-1, by a mesh, ended by two under FSDP."
    leg = legs(tmp_path / "run")

    wanted = run(None, start, epochs=4)
    assert len(wanted[1].rows) and wanted[1].rows[-1]["step"] == 14
    ranks(2, run, FullySharded, start, **leg(2))
    one = model(seed=5)
    load_weights(one, tmp_path / "run" / "step-000003")  # a wish to stop is everybody's one step later
    assert one.out.weight is one.embed.tokens.weight
    run(None, model(seed=2), **leg(4))
    ranks(4, run, STRATEGIES["zero"], model(seed=3), **leg(6))
    ranks(4, run, lambda: FullySharded(replicas=2), model(seed=3), **leg(9))
    for got in ranks(2, run, FullySharded, model(seed=4), **leg(99)): same(got, wanted)
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {"log.jsonl", *(f"step-{i:06}" for i in range(15))}


def test_a_checkpoint_does_not_show_who_made_it(start, tmp_path):
    "The files of two ranks under FSDP have the names, shapes and types of those of one process."
    from safetensors.torch import load_file

    run(None, start, folder=tmp_path / "one")
    ranks(2, run, FullySharded, start, folder=tmp_path / "two")
    for name in ("model.safetensors", "state.safetensors"):
        a, b = (load_file(tmp_path / who / "step-000004" / name) for who in ("one", "two"))
        assert a.keys() == b.keys() and [v.shape for v in a.values()] == [v.shape for v in b.values()]
        for key in a.keys() if name.startswith("model") else (): torch.testing.assert_close(a[key], b[key], **CLOSE)
    a, b = (json.loads((tmp_path / who / "step-000004" / "state.json").read_text()) for who in ("one", "two"))
    assert a["state"]["dict"][0] == b["state"]["dict"][0]  # the configuration


def in_double(matrix: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    "Muon's polynomial without its bfloat16."
    a, b, c = coefficients
    x = matrix.double() / torch.linalg.matrix_norm(matrix.double(), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return Together(Muon(matrices, lr=0.02), AdamW(rest, lr=0.02))


@pytest.mark.parametrize("n, replicas", [(2, 1), (4, 2)])
def test_muon_orthogonalizes_whole_matrices(n, replicas, start, monkeypatch):
    monkeypatch.setattr(lmbook.optimizers, "orthogonalize", in_double)
    options: dict[str, Any] = {"optimizer": muon, "weight_decay": 0.0}
    wanted = run(None, start, **options)
    for got in ranks(n, run, lambda: FullySharded(replicas=replicas), start, **options): same(got, wanted, rtol=1e-12)


def test_zero_divides_optimizers_that_step_together(start, tmp_path, monkeypatch):
    "Muon and AdamW: as one process; and begun by two ranks, gone on with by four, ended by one."
    monkeypatch.setattr(lmbook.optimizers, "orthogonalize", in_double)
    options: dict[str, Any] = {"optimizer": muon, "weight_decay": 0.0}
    wanted = run(None, start, **options)
    for got in ranks(2, run, STRATEGIES["zero"], start, **options): same(got, wanted, rtol=1e-12)
    leg = legs(tmp_path / "run", **options)
    ranks(2, run, STRATEGIES["zero"], start, **leg(3))
    ranks(4, run, STRATEGIES["zero"], model(seed=3), **leg(7))
    same(run(None, model(seed=4), **leg(99)), run(None, start, epochs=4, **options))


@pytest.mark.parametrize("name", lmbook.optimizers.OPTIMIZERS)
def test_every_optimizer_works_on_parts(name, monkeypatch):
    "On ones of a layer each: what is divided, is updated as the whole is. Four ranks and three rows: one of them has nothing."
    monkeypatch.setattr(lmbook.optimizers, "orthogonalize", in_double)
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(7, 5, dtype=torch.float64)

    def steps(kind: Any) -> Tensor:
        mine = copy.deepcopy(layer)
        mine = kind().join(mine) if kind else mine
        optimizer = lmbook.optimizers.OPTIMIZERS[name](mine.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            mine(x).square().sum().backward()
            clip_gradients(mine.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return weights(mine)["weight"]

    wanted = steps(None)
    for got in ranks(4, steps, FullySharded): torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_clipping_over_two_meshes():
    "One layer is divided among all, one among pairs, one stands whole on each: one norm."
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4).double() for _ in range(3)]
    for layer in layers:
        for p in layer.parameters(): p.grad = torch.randn_like(p)
    plain = copy.deepcopy(layers)
    for a, b in zip(plain, layers):
        for p, q in zip(a.parameters(), b.parameters()): p.grad = q.grad.clone()
    norm = clip_gradients([p for layer in plain for p in layer.parameters()], 0.5)

    def clipped() -> tuple[Tensor, list[Tensor]]:
        mine = [nn.Linear(5, 4).double() for _ in layers]
        for kind, layer in zip((FullySharded(), FullySharded(replicas=2)), mine): kind.join(layer)
        for layer, given in zip(mine, layers):
            for p, q in zip(layer.parameters(), given.parameters()):
                whole = q.grad.clone()
                p.grad = lmbook.data_parallel._divided(whole, p) if hasattr(p, "full_tensor") else whole
        found = clip_gradients([p for layer in mine for p in layer.parameters()], 0.5)
        return found, [g.full_tensor() if hasattr(g, "full_tensor") else g for layer in mine for g in (p.grad for p in layer.parameters())]

    for found, gradients in ranks(4, clipped):
        torch.testing.assert_close(found, norm, **CLOSE)
        for g, p in zip(gradients, (p for layer in plain for p in layer.parameters())): torch.testing.assert_close(g, p.grad, **CLOSE)


# ---------------------------------------------------------------- what is seen to fail


def own_mean(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    "The fault of many a script: each rank divides by its own tokens, and the means are averaged."
    value, count = next_token_loss(model, batch)
    return value / max(count, 1), 1


class Misplaced(DataParallel):
    "The last backward pass is held, and the first is not."

    def hold(self, forward: Any, last: bool) -> Any: return super().hold(forward, not last)


class Untied(FullySharded):
    def join(self, model: nn.Module) -> Any:
        model.out.weight = nn.Parameter(model.out.weight.detach().clone())
        return super().join(model)


class LocalCount(FullySharded):
    "The count of tokens of this rank alone."

    def total(self, *values: Any) -> tuple[Any, ...]: return (super().total(*values)[0], max(1, values[1]), *values[2:])


@pytest.mark.parametrize("fault, options", [
    (DataParallel, {"loss": own_mean}), (FullySharded, {"loss": own_mean}), (Misplaced, {}), (Untied, {}), (LocalCount, {}),
])  # fmt: skip
def test_the_proofs_are_seen_to_fail(fault, options, start, alone):
    got = ranks(2, run, fault, start, **options)[0]
    with pytest.raises(AssertionError): same(got, alone)
    difference = max((got[0][name] - value).abs().max().item() for name, value in alone[0].items())
    assert difference > 1e-4


def test_a_norm_of_one_part_is_seen_to_fail(start, alone, monkeypatch):
    monkeypatch.setattr(lmbook.schedules, "_norms", lambda gs: list(torch._foreach_norm([lmbook.optimizers.own_part(g) for g in gs])))
    with pytest.raises(AssertionError): same(ranks(2, run, FullySharded, start)[0], alone)


def test_muon_on_parts_is_seen_to_fail(start, monkeypatch):
    monkeypatch.setattr(lmbook.optimizers, "orthogonalize", in_double)
    options: dict[str, Any] = {"optimizer": muon, "weight_decay": 0.0}
    wanted = run(None, start, **options)
    monkeypatch.setattr(lmbook.optimizers, "whole_of", lambda part, like: part)
    monkeypatch.setattr(lmbook.optimizers, "part_of", lambda whole, like: whole)
    with pytest.raises(AssertionError): same(ranks(2, run, FullySharded, start, **options)[0], wanted)


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_stops_all(kind, start):
    def stopped() -> tuple[int, str]:
        ours = ranks_of(kind)

        def stop(trainer: Trainer, event: str, row: Any) -> None:
            if event == "step" and row["step"] == 1 and ours.rank == 1: trainer.stop("enough")

        one = trainer(ours, start, callbacks=[stop])
        return one.step, one.fit().stopped

    assert {why for _, why in ranks(2, stopped)} == {"enough"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_patience_is_everybodys(kind, start):
    "An evaluation that differs between ranks, as by a rounding, is that of the first."
    def patient() -> tuple[int, str, list[float]]:
        ours = ranks_of(kind)
        one = trainer(ours, start, eval_every=1, patience=2)
        one.evaluate = lambda model: 1.0 + (one.step if ours.rank == 0 else -one.step)
        history = one.fit()
        return one.step, history.stopped, [row["valid"] for row in history.rows if "valid" in row]

    first, second = ranks(2, patient)
    assert first == second == (3, "patience", [2.0, 3.0, 4.0])


def test_load_best_under_fsdp(start, tmp_path):
    wanted = run(None, start, eval_every=1, load_best=True, min_delta=5.0)
    assert wanted[1].best_step == 1
    for folder in (None, tmp_path / "run"):
        for got in ranks(2, run, FullySharded, start, folder=folder, eval_every=1, load_best=True, min_delta=5.0): same(got, wanted)


def test_dice_differ(tmp_path):
    "Each rank drops activations of its own: two processes, which have a generator each."
    def thrown() -> float:
        dice: list[float] = []
        def throw(trainer: Trainer, event: str, row: Any) -> None:
            if event == "start": dice.append(torch.rand(()).item())

        trainer(DataParallel(), model(dropout=0.5), callbacks=[throw]).fit()
        return dice[0]

    a, b = run_ranks(thrown, 2, how="processes")
    assert a != b


# ---------------------------------------------------------------- blocks, and what cannot be


def test_blocks_are_found():
    one = model()
    assert blocks_of(one) == list(one.decoder.blocks)
    both = model(kind="encoder-decoder")
    assert blocks_of(both) == [*both.encoder.blocks, *both.decoder.blocks]
    one.decoder.blocks[1].mlp.up.weight = one.decoder.blocks[0].mlp.up.weight  # tied across blocks: gathered with the rest
    assert blocks_of(one) == []
    assert blocks_of(nn.Linear(2, 2)) == [] and blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 3, enable_nested_tensor=False)
    assert blocks_of(layers) == list(layers.layers)


def test_weights_tied_across_blocks_stay_tied(start):
    def tied() -> nn.Module:
        one = model()
        one.decoder.blocks[1].mlp.up.weight = one.decoder.blocks[0].mlp.up.weight
        return one

    wanted = run(None, tied())
    for got in ranks(2, run, FullySharded, tied()): same(got, wanted)


def test_ranks_begin_alike(start, alone):
    "Whatever each rank drew: the weights of the first count."
    def own() -> Any: return run(DataParallel if dist.get_rank() < 9 else None, [start, model(seed=7)][dist.get_rank()])
    def own_parts() -> Any: return run(FullySharded, [start, model(seed=7)][dist.get_rank()])

    for fn in (own, own_parts):
        for got in ranks(2, fn): same(got, alone)


def test_without_a_group():
    for kind in STRATEGIES:
        with pytest.raises(DistributedError, match="no process group.*torchrun"): ranks_of(kind)
    assert type(ranks_of(None)) is Ranks and ranks_of(ours := Ranks()) is ours
    with pytest.raises(DistributedError, match="Did you mean 'fsdp'"): ranks_of("fsdpp")  # type: ignore[arg-type]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class Odd(torch.optim.Optimizer):
    "Its constructor asks for something that its groups do not tell."

    def __init__(self, params: Any, odd: Any) -> None: super().__init__(params, {"lr": 0.1})


@pytest.mark.parametrize("wrong, says", [
    (lambda: FullySharded(replicas=2), "3 ranks cannot be cut into replicas=2 equal"),
    (lambda: FullySharded(replicas=0), "replicas=0 must be a whole number"),
    (lambda: DataParallel(bucket=0), "bucket=0 must be above 0"),
    (lambda: FullySharded().join(Scalar()), "FSDP cannot divide this Scalar.*DataParallel"),
    (lambda: FullySharded().join(nn.ModuleList([nn.Linear(1, 1)])), "FSDP cannot divide this ModuleList"),
    (lambda: FullySharded().join(FullySharded().join(nn.Linear(4, 4))), "divided already"),
    (lambda: DataParallel(zero=True).optimize(Odd(model().parameters(), {})), "ZeRO-1 cannot divide the state of Odd"),
    (lambda: DataParallel().share([1, 2]), "a list does not say what its rows are"),
    (lambda: DataParallel().share(carried()), "cannot be shared"),
])  # fmt: skip
def test_what_cannot_be_is_one_error(wrong, says):
    with pytest.raises(DistributedError, match=says): ranks(3, wrong)


def carried() -> Batch:
    batch = Batch(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    batch.carry = True
    return batch


def test_what_fails_where_it_is_written_fails_everywhere(start, tmp_path):
    (tmp_path / "file").write_text("")

    def fails() -> str:
        try: run(FullySharded, start, folder=tmp_path / "file" / "run")
        except Exception as error: return f"{type(error).__name__}: {error}"
        return ""

    a, b = ranks(2, fails)
    assert a == b and "CheckpointError" in a and "Nothing can be written" in a

    def broken() -> str:
        def action() -> None: raise KeyError("x")

        try: DataParallel().write(action)
        except Exception as error: return f"{type(error).__name__}: {error}"
        return ""

    assert ranks(2, broken) == ["KeyError: 'x'", "DistributedError: Rank 0, which writes, failed: KeyError: 'x'"]


def test_totals_are_exact():
    "Whole numbers stay whole, and exact where single precision would round."
    def totals() -> Any: return SeveralRanks().total(2**24 + 1, torch.tensor(0.5), 1)

    for count, value, one in ranks(3, totals): assert (count, value.item(), one) == (3 * 2**24 + 3, 1.5, 3) and type(count) is int


def test_the_log_is_exact():
    "Sizes in bytes of what is reduced, gathered, scattered: tensors, lists of them, and those of FSDP, which come out of DTensors."
    def said() -> Any:
        n, x = dist.get_world_size(), torch.ones(7, dtype=torch.float64)
        with CommunicationLog() as log:
            dist.all_reduce(x)
            dist.all_gather([torch.empty(5) for _ in range(n)], torch.ones(5))
            dist.reduce_scatter(torch.empty(2), [torch.ones(2) for _ in range(n)])
            dist.broadcast(torch.ones(9), 0)
            dist.barrier()
        return dict(log.calls), dict(log.bytes), log.sent(n)

    once = dict.fromkeys(("allreduce", "allgather", "reduce_scatter", "broadcast"), 1)
    for found in ranks(3, said): assert found == (once, {"allreduce": 56, "allgather": 60, "reduce_scatter": 24, "broadcast": 36}, 464 / 3)


@pytest.mark.parametrize("kind, formula", [
    ("ddp", lambda size, blocks: {"allreduce": size}),
    ("zero", lambda size, blocks: {"allreduce": size, "broadcast": size}),
    ("fsdp", lambda size, blocks: {"allgather": size + blocks, "reduce_scatter": size}),
    ("zero-2", lambda size, blocks: {"allgather": size, "reduce_scatter": size}),
])  # fmt: skip
def test_bytes_are_those_of_the_formulas(kind, formula):
    start = model(vocab_size=32, d_model=8)
    [batch] = Examples(rows(8, 3), batch_size=8).read()

    def said() -> dict[str, int]:
        ours, one = KINDS[kind](), copy.deepcopy(start)
        forward = ours.join(one)
        optimizer = ours.optimize(AdamW(one.parameters()))
        for _ in range(3):
            optimizer.zero_grad()
            with CommunicationLog() as log:
                next_token_loss(forward, ours.share(batch))[0].backward()
                optimizer.step()
        return dict(log.bytes)

    size, blocks = sum(p.nbytes for p in start.parameters()), sum(p.nbytes for b in blocks_of(start) for p in b.parameters())
    for found in ranks(4, said): assert found == formula(size, blocks)
