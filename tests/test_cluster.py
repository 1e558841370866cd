"""Chapter 57: what one rank of thousands holds, a program on several ranks, runs whose ranks are killed, checkpoints in pieces."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.cluster import killed_run, what_it_came_to
from lmbook.cluster import (
    Machines,
    kubernetes_job,
    launch,
    load_sharded,
    parameter_count,
    plans,
    report,
    save_sharded,
    sharded_need,
    simulated_need,
    slurm_script,
)
from lmbook.distributed import DistributedError, run_ranks
from lmbook.small_world import SmallWorld
from lmbook.transformer import Transformer, TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = TransformerConfig(64, d_model=32, n_layer=5, n_head=4, context_length=16, tie=False)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    "changes", [{}, {"tie": True}, {"n_layer": 1}, {"n_kv_head": 1, "activation": "swiglu", "norm": "rms", "bias": False}], ids=str
)
def test_weights_are_counted_without_building_them(changes):
    config = replace(TINY, **changes)
    assert parameter_count(config) == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("ranks", [1, 4, 16])
def test_a_simulated_rank_holds_what_the_formula_says(ranks):
    seen, formula = simulated_need(TINY, ranks), sharded_need(TINY, ranks)
    tensors = len(list(Transformer(TINY).parameters()))
    assert seen.parameters == formula.parameters
    assert 0 <= seen.optimizer - formula.optimizer <= 4 * tensors  # a step counter for each tensor
    assert seen.peak > formula.states


def test_what_does_not_divide_costs_more_than_the_formula():
    assert simulated_need(TINY, 7).parameters > sharded_need(TINY, 7).parameters


def test_all_depths_lie_on_one_line():
    ends = simulated_need(TINY, 4, layers=(3, 4)), simulated_need(TINY, 4, layers=(4, 5))
    for name in ("parameters", "gradients", "optimizer"): assert getattr(ends[0], name) == pytest.approx(getattr(ends[1], name))


def test_a_model_that_is_not_cut_is_seen(monkeypatch):
    "The proof above can fail: without sharding a rank holds everything."
    import torch.distributed.fsdp as fsdp

    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: module)
    assert simulated_need(TINY, 4).parameters == 4 * parameter_count(TINY) > sharded_need(TINY, 4).parameters


def test_recomputing_saves_memory():
    deep = replace(TINY, d_model=64, context_length=128)
    assert simulated_need(deep, 4, rows=4).peak < 0.8 * simulated_need(deep, 4, rows=4, checkpointing=False).peak


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: simulated_need(TINY, 0), "ranks"),
        (lambda: simulated_need(TINY, 2, rows=0), "rows"),
        (lambda: simulated_need(TINY, 2, layers=(4, 4)), "layers"),
        (lambda: simulated_need(replace(TINY, kind="encoder"), 2), "only decoders"),
        (lambda: Machines(nodes=0), "nodes"),
        (lambda: Machines(memory=-1), "memory"),
        (lambda: plans(TINY, Machines(), tokens=0), "tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(DistributedError, match=says): call()


def test_nothing_is_simulated_inside_a_real_group():
    with pytest.raises(DistributedError, match="rank of a real group"): run_ranks(lambda: simulated_need(TINY, 2), 1)


# ---------------------------------------------------------------- plans


def test_plans_by_hand():
    config = TransformerConfig(32000, d_model=4096, n_layer=32, n_head=32, d_ff=11008, context_length=2048, tie=False)
    N, T = parameter_count(config), 2**22
    found = {p.strategy: p for p in plans(config, Machines(nodes=4), T)}
    assert found["one device"].states == 16 * N and not found["one device"].fits
    assert found["data parallel"].states == 16 * N and found["data parallel"].network == pytest.approx(8 * N * 31 / 32 / 50e9)
    assert found["fully sharded"].states == 16 * N / 32 and found["fully sharded"].fits
    assert found["sharded in each node"].states == 16 * N / 8
    assert found["fully sharded"].compute == pytest.approx(6 * N * T / (32 * 989e12 * 0.4))
    assert found["one device"].compute == pytest.approx(32 * found["fully sharded"].compute)


def test_the_best_that_fits_comes_first_and_more_memory_never_hurts():
    config = TransformerConfig(32000, d_model=4096, n_layer=32, n_head=32, d_ff=11008, context_length=2048, tie=False)
    for nodes in (1, 2, 16):
        one, two = (plans(config, Machines(nodes=nodes, memory=m), 2**21) for m in (80e9, 160e9))
        fits = [p.fits for p in one]
        assert fits == sorted(fits, reverse=True)
        good = [p.seconds for p in one if p.fits]
        assert good == sorted(good)
        assert {p.strategy for p in one if p.fits} <= {p.strategy for p in two if p.fits}
        assert min(p.seconds for p in two if p.fits) <= min(good)


def test_fewer_rows_than_ranks_fit_only_where_rows_are_cut():
    config = replace(TINY, n_head=8)
    found = {p.strategy: p.fits for p in plans(config, Machines(nodes=2), tokens=4 * 16)}  # four rows for sixteen ranks
    assert found == {
        "one device": True, "data parallel": False, "fully sharded": False, "sharded in each node": False,
        "tensor parallel in each node": True,
    }  # fmt: skip


# ---------------------------------------------------------------- a program on several ranks


def script(folder: Path, text: str, name: str = "script.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


@pytest.mark.parametrize(
    "text, says",
    [
        ("if me: os.kill(os.getpid(), signal.SIGKILL)", r"^Rank 1 of 2 was killed by signal 9 .*memory"),
        ("if me: raise KeyError('the column text')", r"^Rank 1 of 2 ended with exit code 1: KeyError: 'the column text'"),
        ("from lmbook.cluster import report\nif me: report(ValueError('two\\nlines')); sys.exit(3)", r"^two lines$"),
    ],
    ids=["killed", "traceback", "reported"],
)  # fmt: skip
def test_one_message_names_the_rank_that_failed_first(tmp_path, text, says, capfd):
    text = f"import os, signal, sys, time\nme = os.environ['RANK'] == '1'\n{text}\ntime.sleep(30)"
    with pytest.raises(DistributedError, match=says) as caught: launch(script(tmp_path, text), 2)
    assert caught.value.rank == 1
    assert "Traceback" not in capfd.readouterr().err  # the others were ended within the 30 seconds that they sleep


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"program": "no such script.py"}, "no script"),
        ({"processes": 0}, "processes"),
        ({"restarts": -1}, "restarts"),
        ({"rendezvous": "node1"}, "host:port"),
        ({"nodes": 2}, "port that all of them know"),
    ],
)
def test_what_cannot_be_launched(tmp_path, arguments, says):
    given: dict[str, Any] = {"program": script(tmp_path, "pass"), "processes": 1, **arguments}
    with pytest.raises(DistributedError, match=says): launch(**given)


def test_without_a_launcher_nothing_is_reported(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert report(ValueError("x")) is False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_twenty_kills_at_any_moment_lose_nothing(tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    assert killed_run(quiet, 0) == 0
    assert killed_run(killed, 20) == 20
    (one, rows), (other, others) = what_it_came_to(quiet), what_it_came_to(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert rows == others


# ---------------------------------------------------------------- the command

SMALL = [
    "--by", "paragraph", "--tokenizer", "chars", "--set", "device=cpu", "n_layer=1", "d_model=32", "n_head=2", "context_length=32",
    "optimizer=adamw", "lr=0.003",
]  # fmt: skip


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text("\n\n".join(SmallWorld().texts("train", n=40)), encoding="utf-8")
    return path


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def command(*words: Any, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *launcher, "-m", "lmbook", *map(str, words)]
    return subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def trained(novel: Path, folder: Path, *words: Any, **options: Any) -> dict[str, Any]:
    done = command("train", "--text", novel, "--out", folder, *SMALL, *words, **options)
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.count("held-out text") == 1 and done.stderr.count("parameters;") <= 1  # one of them speaks
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def alone(novel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    return folder, trained(novel, folder, "--steps", 12)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize(
    "words, launcher",
    [(["--processes", 2], ()), (["--processes", 2, "--strategy", "fsdp"], ()), (["--strategy", "zero"], TORCHRUN)],
    ids=["processes", "fsdp", "torchrun"],
)
def test_a_run_does_not_show_how_many_trained_it(novel, alone, tmp_path, words, launcher):
    folder, expected = alone
    info = trained(novel, tmp_path / "run", "--steps", 12, *words, launcher=launcher)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(p.name for p in folder.iterdir())
    assert info["result"]["loss"] == pytest.approx(expected["result"]["loss"], rel=1e-4)
    assert {k: v for k, v in info.items() if k != "result"} == {k: v for k, v in expected.items() if k != "result"}
    logs = [[json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()] for where in (folder, tmp_path / "run")]
    for one, other in zip(*logs, strict=True):
        assert (one["step"], one.get("tokens")) == (other["step"], other.get("tokens"))
        for name in {"loss", "valid"} & one.keys(): assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_another_number_of_processes_goes_on(novel, tmp_path):
    words = ["train", "--text", novel, "--out", tmp_path / "run", *SMALL, "--set", "save_every=2", "--steps", 400]
    start = [sys.executable, "-m", "lmbook", *map(str, words), "--processes", "2"]
    process = subprocess.Popen(start, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = time.monotonic() + 200
    while not list((tmp_path / "run").glob("step-*")) and time.monotonic() < last and process.poll() is None: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr[-2000:]
    assert list((tmp_path / "run").glob("step-*"))
    done = command(*words)
    assert not done.returncode, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 400


@pytest.mark.parametrize(
    "words, says",
    [
        (["--processes", 0], "--processes"),
        (["--processes", 2, "--set", "lr=abc"], "lr="),
        (["--processes", 2, "--steps", 5, "--set", "context_length=100000"], "too short"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_once(novel, tmp_path, words, says):
    done = command("train", "--text", novel, "--out", tmp_path / "run", *SMALL, *words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("lmbook:")]
    assert done.returncode == 1 and len(lines) == 1 and says in lines[0] and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run").exists()


def test_standard_input_is_for_one_process(tmp_path):
    done = command("train", "--text", "-", "--out", tmp_path / "run", "--processes", 2, input="some text")
    assert done.returncode == 1 and "Standard input" in done.stderr


def test_a_launcher_around_a_command_that_is_not_parallel(alone):
    done = command("generate", alone[0], launcher=TORCHRUN)
    assert done.returncode and "runs in one process" in done.stderr


# ---------------------------------------------------------------- checkpoints in pieces


torch.manual_seed(0)
START = Transformer(TransformerConfig(50, d_model=16, n_layer=2, n_head=2, context_length=16)).double()
IDS = torch.randint(50, (4, 13))


def begin(shape: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = copy.deepcopy(START)
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for part in (*model.decoder.blocks, model): fully_shard(part, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    mine = IDS[dist.get_rank() :: dist.get_world_size()]
    F.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for k, v in model.state_dict().items()}


def first(folder: Path, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model, optimizer = begin(shape)
    for _ in range(2): step(model, optimizer)
    save_sharded(folder, model, optimizer)
    step(model, optimizer)
    return whole(model)


def again(folder: Path, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model, optimizer = begin(shape)
    load_sharded(folder, model, optimizer)
    step(model, optimizer)
    return whole(model)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces") / "four"
    return folder, run_ranks(first, 4, folder, (4,))[0]


@pytest.mark.parametrize("shape", [(4,), (2,), (1,), (2, 2)], ids=str)
def test_another_number_of_ranks_goes_on(pieces, shape):
    folder, expected = pieces
    got = run_ranks(again, torch.Size(shape).numel(), folder, shape)
    for weights in got:
        for name in expected: torch.testing.assert_close(weights[name], expected[name], rtol=1e-10, atol=1e-10)


def test_without_the_moments_the_next_step_is_another(pieces):
    "The proof above can fail: weights alone are not the state of a training."
    folder, expected = pieces

    def forgetful() -> dict[str, torch.Tensor]:
        model, optimizer = begin((1,))
        load_sharded(folder, model)
        step(model, optimizer)
        return whole(model)

    got = run_ranks(forgetful, 1)[0]
    assert max((got[name] - expected[name]).abs().max() for name in expected) > 1e-3


def test_what_is_no_checkpoint_of_this_model(pieces, tmp_path):
    folder, _ = pieces

    def load(path: Path, model: nn.Module | None = None) -> None: run_ranks(lambda: load_sharded(path, model or copy.deepcopy(START)), 1)

    with pytest.raises(DistributedError, match="no folder"): load(tmp_path / "nothing")
    with pytest.raises(DistributedError, match="metadata is missing"): load(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"none")
    with pytest.raises(DistributedError, match="damaged"): load(tmp_path)
    for changes, says in (({"n_layer": 3}, ".*not there"), ({"n_layer": 1}, ".*not here"), ({"d_model": 32}, "")):
        other = Transformer(replace(START.config, **changes)).double()
        with pytest.raises(DistributedError, match=f"another model{says}"): load(folder, other)
    with pytest.raises(DistributedError, match="holds a checkpoint"): run_ranks(lambda: save_sharded(folder, copy.deepcopy(START)), 1)


def in_the_background(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    group = dist.new_group(backend="gloo")
    model, optimizer = begin((2,))
    step(model, optimizer)
    before = whole(model)
    saving = save_sharded(folder, model, optimizer, background=True, group=group)
    for _ in range(3): step(model, optimizer)  # training goes on
    assert saving is not None
    saving.result()
    load_sharded(folder, model, optimizer)
    return before, whole(model)


def test_the_background_keeps_the_moment_at_which_it_was_asked(tmp_path):
    for before, after in run_ranks(in_the_background, 2, tmp_path / "b", how="processes", check=False):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_background_wants_a_group_of_its_own(tmp_path):
    with pytest.raises(DistributedError, match="group of its own"):
        run_ranks(lambda: save_sharded(tmp_path / "x", copy.deepcopy(START), background=True), 2)


def killed_while_writing(folder: Path) -> None:
    model, optimizer = begin((2,))
    step(model, optimizer)
    save_sharded(folder / "one", model, optimizer)
    step(model, optimizer)
    if dist.get_rank() == 1:
        import torch.distributed.checkpoint as dcp

        dcp.FileSystemWriter.finish = lambda *_, **__: None  # type: ignore[method-assign]
        import torch.distributed.checkpoint.filesystem as fs

        def die(*_: Any, **__: Any) -> None: os.kill(os.getpid(), signal.SIGKILL)

        fs.FileSystemWriter.write_data = die  # type: ignore[method-assign, assignment]
    save_sharded(folder / "two", model, optimizer)


def test_a_rank_that_dies_while_it_writes_leaves_the_older_one(tmp_path):
    with pytest.raises(DistributedError): run_ranks(killed_while_writing, 2, tmp_path, how="processes", check=False, timeout=20)
    with pytest.raises(DistributedError, match="metadata is missing"): load_sharded(tmp_path / "two", copy.deepcopy(START))
    run_ranks(lambda: load_sharded(tmp_path / "one", copy.deepcopy(START)), 1)


# ---------------------------------------------------------------- schedulers


def test_a_slurm_job_is_a_script_that_starts_an_agent_on_each_node(tmp_path):
    """Run by bash, with an srun that starts two of what it is given, as two nodes would, and an scontrol that names this machine."""
    hello = script(tmp_path, """
        import os, torch.distributed as dist
        dist.init_process_group("gloo")
        open(os.path.join(os.path.dirname(__file__), f"rank {dist.get_rank()} of {dist.get_world_size()}"), "w")
        dist.destroy_process_group()
    """, "hello world.py")  # fmt: skip
    port = 20000 + os.getpid() % 20000
    text = slurm_script([hello, "--an", "argument with spaces"], nodes=2, per_node=2, hours=1.5, port=port, restarts=0)
    assert "#SBATCH --time=01:30:00" in text and "#SBATCH --nodes=2" in text
    job = tmp_path / "job.sh"
    job.write_text(text)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, body in {
        "srun": '"$@" & "$@" & wait %1 && wait %2', "scontrol": "echo 127.0.0.1", "python": f'exec {sys.executable} "$@"',
    }.items():  # fmt: skip
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(stat.S_IRWXU)
    environment = {
        **os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", str(job)], env=environment, capture_output=True, text=True, timeout=200)
    assert not done.returncode, done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.glob("rank*")) == [f"rank {r} of 4" for r in range(4)]


@pytest.mark.parametrize("changes", [{}, {"claim": "checkpoints"}, {"per_node": 0}, {"nodes": 64, "name": "large-7b"}], ids=str)
def test_a_kubernetes_job_keeps_the_schema(changes):
    validate = pytest.importorskip("kubernetes_validate")
    given = {"nodes": 2, "per_node": 8, **changes}
    job = kubernetes_job("registry.example/lmbook:1", ["-m", "lmbook", "train"], **given)
    json.dumps(job)
    for part in job["items"]: validate.validate(part, "1.29", strict=True)
    service, batch = job["items"]
    pod = batch["spec"]["template"]
    assert pod["metadata"]["labels"] == service["spec"]["selector"] and pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert batch["spec"]["completions"] == batch["spec"]["parallelism"] == given["nodes"]
    broken = copy.deepcopy(batch)
    broken["spec"]["completion"] = 1
    with pytest.raises(Exception, match="completion"): validate.validate(broken, "1.29", strict=True)


@pytest.mark.parametrize("name", ["", "Large", "a_b", "-a", "a-", "7b", "x" * 51])
def test_names_that_kubernetes_refuses(name):
    with pytest.raises(DistributedError, match="name="): kubernetes_job("image", "x.py", nodes=1, per_node=1, name=name)


def test_ray_train_starts_the_same_training(tmp_path):
    train = pytest.importorskip("ray.train.torch")
    import ray
    from ray.train import RunConfig, ScalingConfig

    folder = tmp_path / "run"

    def loop() -> None:
        from lmbook.batches import Examples
        from lmbook.checkpoints import Checkpoints
        from lmbook.data_parallel import DataParallel
        from lmbook.training import TrainConfig, Trainer

        torch.manual_seed(0)
        model = Transformer(TransformerConfig(32, d_model=16, n_layer=1, n_head=2, context_length=16))
        rows = torch.randint(32, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
        config = TrainConfig(steps=4, save_every=4, device="cpu")
        Trainer(model, Examples(rows, batch_size=4), config, checkpoints=Checkpoints(folder), ranks=DataParallel()).fit()

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        where = RunConfig(storage_path=str(tmp_path / "ray"))
        train.TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=2), run_config=where).fit()
    finally: ray.shutdown()
    assert (folder / "step-000004" / "manifest.json").exists()
