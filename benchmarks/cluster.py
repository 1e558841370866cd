"""Large clusters, as far as two cores show them: runs whose ranks are killed again and again, and the bytes of one rank among thousands.

`kills`: two processes train a small decoder under torchrun's agent. At a random moment of each attempt one of them, by turns of a die, gets
SIGKILL: while it joins, computes, waits for the other or writes a checkpoint. What the run ends with is compared with an undisturbed one.
`simulate`: what rank 0 of 8 to 4,096 would hold of Llama 2's 7B and 70B models, on tensors without numbers, beside the formula.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Benchmark, Option, Settings, run
from lmbook.cluster import parameter_count, sharded_need, simulated_need
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch",), options=[
    Option("kills", 100, dry=2, help="how often a rank is killed"),
    Option("ranks", [8, 64, 512, 4096], dry=[4], help="sizes of the cluster"),
])  # fmt: skip
STEPS = 60


def train(folder: str, kills: int) -> int: # which attempt it was that came to the end
    "One rank of a run that is killed in its first so many attempts."
    from lmbook.batches import Examples
    from lmbook.checkpoints import Checkpoints
    from lmbook.data_parallel import DataParallel
    from lmbook.distributed import join_ranks
    from lmbook.training import TrainConfig, Trainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(32, d_model=16, n_layer=1, n_head=2, context_length=16))
    rows = torch.randint(32, (64, 12), generator=torch.Generator().manual_seed(1)).tolist()
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    dice = random.Random(attempt)
    victim, after = dice.randrange(2), dice.uniform(0, 0.15)
    if attempt < kills and rank == victim:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, after)
    config = TrainConfig(steps=STEPS, save_every=2, keep=2, log_every=1, device="cpu")
    try:
        with join_ranks(timeout=20, start=20):
            Trainer(model, Examples(rows, batch_size=8), config, checkpoints=Checkpoints(folder), ranks=DataParallel()).fit()
    except Exception: os._exit(1)  # the other rank is gone
    return attempt


def agent(folder: str, kills: int) -> None:
    "Start two ranks, and again whenever one has died. Prints the number of attempts that were killed."
    import warnings

    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lmbook.cluster import quiet_agents

    warnings.simplefilter("ignore")
    quiet_agents()
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TQDM_DISABLE": "1"}
    config = LaunchConfig(
        1, 1, 2, run_id="kills", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=kills + 5, monitor_interval=0.02,
        start_method="fork",  # quick; this process has computed nothing yet
    )
    print(max(elastic_launch(config, train)(folder, kills).values()))


def killed_run(folder: Path, kills: int) -> int: # attempts that were killed; the run's folder is left behind
    "In a process of its own, which has no threads that a fork would lose."
    program = "import sys; from benchmarks.cluster import agent; agent(sys.argv[1], int(sys.argv[2]))"
    words = [sys.executable, "-c", program, str(folder), str(kills)]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def what_it_came_to(folder: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    "Weights at the end, and the losses of all steps."
    from safetensors.torch import load_file

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_file(folder / f"step-{STEPS:06}" / "model.safetensors"), [(row["step"], row["loss"]) for row in rows]


@BENCHMARK.part()
def kills(settings: Settings) -> dict[str, Any]:
    "A run of two ranks, one of which is killed again and again, beside one that nobody disturbs."
    with tempfile.TemporaryDirectory() as name:
        quiet, disturbed = Path(name) / "quiet", Path(name) / "killed"
        killed_run(quiet, 0)
        begun = time.perf_counter()
        killed = killed_run(disturbed, settings.kills)
        seconds = time.perf_counter() - begun
        (one, rows), (other, others) = what_it_came_to(quiet), what_it_came_to(disturbed)
    same = all(torch.equal(one[key], other[key]) for key in one)
    return {"killed": killed, "same weights": same, "same log": rows == others, "seconds of an attempt": seconds / (killed + 1)}


@BENCHMARK.part()
def simulate(settings: Settings) -> list[dict[str, Any]]:
    "Bytes of one rank of many, by simulation and by formula."
    llama: dict[str, Any] = {
        "vocab_size": 32000, "context_length": 2048, "norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False,
        "tie": False,
    }  # fmt: skip
    sizes = {
        "7B": {"d_model": 4096, "n_layer": 32, "n_head": 32, "d_ff": 11008},
        "70B": {"d_model": 8192, "n_layer": 80, "n_head": 64, "n_kv_head": 8, "d_ff": 28672},
    }
    if settings.dry: sizes = {"tiny": {"d_model": 64, "n_layer": 5, "n_head": 4, "d_ff": 128}}
    rows = []
    for size, shape in sizes.items():
        config = TransformerConfig(**llama, **shape)
        for ranks in settings.ranks:
            begun = time.perf_counter()
            seen, formula = simulated_need(config, ranks), sharded_need(config, ranks)
            rows.append({
                "model": size, "parameters": parameter_count(config), "ranks": ranks, "states": seen.states,
                "by the formula": formula.states, "peak": seen.peak, "seconds": time.perf_counter() - begun,
            })  # fmt: skip
    return rows


if __name__ == "__main__": run(__file__)
