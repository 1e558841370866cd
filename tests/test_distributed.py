"""Ranks: each failure is one error that names the rank and the remedy, and threads and processes do the same. Nothing here is made up:
ranks are real, they talk over gloo, ports are in use, processes are killed.

What was seen to fail: without `from` in `_failed`, the cause; with PyTorch's check for messages between two ranks, the uneven ones; with
`sys.stdin` read by a thread, every process at its end; without `_knock` and the answer that `_store` insists on, the stranger (it hung).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmbook import distributed
from lmbook.core import LmbookError
from lmbook.distributed import (
    DistributedError,
    Event,
    Link,
    Post,
    doubling_all_reduce,
    explain,
    fit_link,
    join_ranks,
    replay,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    run_ranks,
    tree_all_reduce,
    tree_broadcast,
    tree_reduce,
)

ROOT = Path(__file__).resolve().parent.parent
HOWS = ("threads", "processes")
ALL_REDUCE = {"tree": tree_all_reduce, "doubling": doubling_all_reduce, "ring": ring_all_reduce}


def failure(fn: Any, n: int = 2, **options: Any) -> DistributedError:
    with pytest.raises(DistributedError) as caught: run_ranks(fn, n, **options)
    return caught.value


# ---------------------------------------------------------------- ranks as threads and as processes


class Odd(Exception):
    "Can be sent to another process, and not be received."

    def __init__(self, a: str, b: int): super().__init__(a)


def all_in_one(shift: float) -> tuple[Any, ...]:
    "Every kind of operation, for the comparison of the two ways."
    me, n = dist.get_rank(), dist.get_world_size()
    x = torch.arange(6, dtype=torch.float64) * (me + 1) + shift
    summed, told, said = x.clone(), x.clone(), [None] * n
    dist.all_reduce(summed)
    dist.broadcast(told, n - 1)
    dist.all_gather_object(said, {"rank": me})
    post, by_hand = Post(), x.clone()
    tree_all_reduce(by_hand, post)  # ranks send different numbers of messages,
    dist.barrier()  # and the check must not mind
    model = DistributedDataParallel(nn.Linear(6, 1, dtype=torch.float64))
    with torch.no_grad(): model.module.weight.fill_(0.5)
    model(x[None]).sum().backward()
    print(f"rank {me} was here")
    return summed, told, said, by_hand, model.module.weight.grad, post.events


@pytest.mark.parametrize("n", [1, 3])
def test_threads_and_processes_give_the_same(n, capsys):
    "Results to the last bit, and what ranks print."
    found, printed = [], []
    for how in HOWS:
        found.append(run_ranks(all_in_one, n, 0.1, how=how))
        printed.append(sorted(capsys.readouterr().out.split("\n")))
    assert printed[0] == printed[1] == ["", *(f"rank {r} was here" for r in range(n))]
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True): assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    torch.testing.assert_close(found[0][0][0], found[0][0][3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_eight_ranks(how):
    def fn():
        dist.all_reduce(x := torch.tensor(float(dist.get_rank())))
        return x.item()

    assert run_ranks(fn, 8, how=how) == [28.0] * 8


@pytest.mark.parametrize("check", [True, False])
def test_uneven_numbers_of_messages_are_no_fault(check):
    "PyTorch's own check takes them for one: it says 'Sequence number: 1vs 2'."
    def fn():
        me = dist.get_rank()
        if me == 0:
            for r in (1, 2): dist.send(torch.ones(1), r)
        else: dist.recv(torch.ones(1), 0)
        dist.all_reduce(x := torch.ones(1))
        return x.item()

    assert run_ranks(fn, 3, check=check) == [3.0] * 3


def test_everything_is_put_back():
    def raises(): raise ValueError

    def state() -> tuple[Any, ...]:
        return (
            sys.excepthook, dist.get_debug_level(), DistributedDataParallel.__init__, dist.ProcessGroup.send, dist.distributed_c10d._world,
        )  # fmt: skip

    before = state()
    run_ranks(dist.barrier, 2)
    failure(raises)
    assert state() == before
    assert not dist.is_initialized() and run_ranks(dist.get_rank, 2) == [0, 1]


def test_what_is_asked_wrongly():
    for wrong in ({"n": 0}, {"n": 1.5}, {"n": 2, "timeout": 0}, {"n": 2, "how": "thread"}):
        with pytest.raises(DistributedError, match="must be|Did you mean 'threads'"): run_ranks(dist.barrier, **wrong)
    assert issubclass(DistributedError, LmbookError)


def test_without_the_private_switches_processes_take_over(monkeypatch):
    monkeypatch.setattr(distributed, "_threads_work", lambda: False)
    assert os.getpid() not in run_ranks(os.getpid, 2)
    assert "how='processes' can" in str(failure(os.getpid, how="threads"))


@pytest.mark.parametrize("how", HOWS)
def test_a_call_inside_a_call(how):
    assert "call `run_ranks`, which starts its own, outside" in str(failure(lambda: run_ranks(dist.get_rank, 2), how=how))


def test_two_calls_at_once():
    begun, go_on = threading.Event(), threading.Event()

    def waits():
        begun.set()
        go_on.wait(30)

    other = threading.Thread(target=run_ranks, args=(waits, 1))
    other.start()
    begun.wait(30)
    try: assert "Another thread is inside" in str(failure(dist.barrier))
    finally:
        go_on.set()
        other.join()


# ---------------------------------------------------------------- failures of ranks


def raises_on_one() -> None:
    if dist.get_rank() == 1: raise KeyError("mine")
    dist.recv(torch.ones(1), 1)


@pytest.mark.parametrize("how", HOWS)
def test_an_exception_of_the_users(how):
    "It is the cause; its traceback leads to the line."
    error = failure(raises_on_one, how=how)
    assert (error.rank, str(error)) == (1, "Rank 1 of 2: KeyError: 'mine'") and isinstance(error.__cause__, KeyError)
    if how == "threads":
        trace = error.__cause__.__traceback__
        while trace.tb_next: trace = trace.tb_next
        assert trace.tb_frame.f_code is raises_on_one.__code__
    else: assert 'raise KeyError("mine")' in error.__cause__.__notes__[0]


def test_an_exception_that_cannot_be_received():
    def fn(): raise Odd("what it says", 2)

    error = failure(fn, 1, how="processes")
    assert "Odd: what it says" in str(error) and "Rank 0 of 1: Odd" in str(error) and "in fn" in error.__cause__.__notes__[0]


def test_one_fails_while_another_computes(monkeypatch):
    "It need not send anything to hear of it."
    monkeypatch.setattr(distributed, "_GRACE", 0.3)

    def fn():
        if dist.get_rank() == 1: raise ValueError("enough")
        while True: time.sleep(0.01)

    for how in HOWS:
        begin = time.monotonic()
        assert str(failure(fn, how=how)) == "Rank 1 of 2: ValueError: enough", how
        assert time.monotonic() - begin < 30
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_rank_that_is_killed(name, monkeypatch):
    monkeypatch.setattr(distributed, "_GRACE", 1.0)

    def fn():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        dist.all_reduce(torch.ones(1))

    error = failure(fn, how="processes")
    assert error.rank == 1 and f"was killed by {name}" in str(error) and "memory" in str(error)


def test_a_rank_that_exits(monkeypatch):
    monkeypatch.setattr(distributed, "_GRACE", 1.0)

    def fn():
        if dist.get_rank() == 1: os._exit(3)
        dist.barrier()

    assert "Rank 1 of 2 ended with exit code 3 and without a result" in str(failure(fn, how="processes"))


def test_a_message_that_is_too_long():
    "It ends the process, which has last words."
    def fn():
        if dist.get_rank() == 0: dist.send(torch.ones(3), 1)
        else: dist.recv(torch.ones(1), 0)

    assert "Rank 1 of 2 was ended by PyTorch. A message of 12 bytes came where a tensor of 4" in str(failure(fn, how="processes"))


def test_what_cannot_be_sent_to_a_process():
    generator = iter(x for x in [1])
    error = failure(lambda: next(generator), how="processes")
    assert "cannot be sent to another process" in str(error) and isinstance(error.__cause__, TypeError)
    assert run_ranks(lambda: next(generator), 1) == [1]  # to a thread it can


def test_a_result_that_cannot_be_sent_back():
    def fn(): return (x for x in [1])

    error = failure(fn, 1, how="processes")
    assert "its result cannot be sent back (TypeError" in str(error) and error.rank == 0
    assert next(run_ranks(fn, 1)[0]) == 1


def both_send() -> None:
    other = 1 - dist.get_rank()
    dist.send(torch.ones(10_000_000), other)
    dist.recv(torch.ones(10_000_000), other)


def other_order() -> None:
    if dist.get_rank() == 1: dist.broadcast(torch.ones(2), 0)
    dist.all_reduce(torch.ones(2))


def leaves_early() -> None:
    if dist.get_rank() == 0: dist.all_reduce(torch.ones(2))


def waits_for_one_that_left() -> None:
    if dist.get_rank() == 0: dist.recv(torch.ones(2), 1)


def other_shape() -> None: dist.all_reduce(torch.ones(2 + dist.get_rank()))


def other_dimensions() -> None: dist.all_reduce(torch.ones([2] * (1 + dist.get_rank())))


def other_type() -> None: dist.all_reduce(torch.ones(2, dtype=[torch.float32, torch.float64][dist.get_rank()]))


def slow() -> None:
    if dist.get_rank() == 1: time.sleep(1.5)
    dist.monitored_barrier(timeout=timedelta(seconds=0.5))


CONFUSED = {  # what is wrong -> what must be said, and where the ranks are
    both_send: ("until the timeout|is gone", r"ranks 0, 1 at `dist.send\(torch.ones\(10_000_000\), other\)` \(both_send"),
    other_order: ("Two ranks do not do the same.* same order", r"rank 0 at `dist.all_reduce.*rank 1 at `if .*: dist.broadcast"),
    leaves_early: ("Two ranks do not do the same", r"rank 0 at `if dist.get_rank\(\) == 0: dist.all_reduce.*; rank 1 at the end"),
    waits_for_one_that_left: ("until the timeout|is gone", "rank 0 at `if .*; rank 1 at the end"),
    other_shape: (r"shape \([23]\), float.*shape \([23]\), float.* equal shapes", "ranks 0, 1 at `def other_shape"),
    other_dimensions: ("something else.* equal shapes", "ranks 0, 1 at"),
    other_type: ("float.*double|double.*float", "ranks 0, 1 at"),
    slow: ("waited 500 ms for rank 1: that one is slow", "ranks? 0"),
}


@pytest.mark.parametrize("fn", CONFUSED, ids=lambda fn: fn.__name__)
def test_ranks_that_do_not_do_the_same(fn):
    said = str(failure(fn, timeout=2))
    for pattern in CONFUSED[fn]: assert re.search(pattern, said), said


@pytest.mark.parametrize("fn", [other_order, leaves_early])
def test_without_the_check_a_timeout_ends_it(fn):
    said = str(failure(fn, timeout=1, check=False))
    assert re.search("timeout|is gone", said) and re.search(CONFUSED[fn][1], said), said  # gone: if the other was done first


def test_the_same_in_processes():
    said = str(failure(other_order, how="processes", timeout=20))
    for pattern in CONFUSED[other_order]: assert re.search(pattern, said), said


def test_ctrl_c_in_threads():
    "A rank that waits for a message and one that computes; both end, and so does the call."
    here = threading.main_thread().ident

    def fn():
        if dist.get_rank() == 0: dist.recv(torch.ones(1), 1)
        signal.pthread_kill(here, signal.SIGINT)
        while True: time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt): run_ranks(fn, 2)
    assert time.monotonic() - begin < 20 and run_ranks(dist.get_rank, 2) == [0, 1]


def test_ctrl_c_in_processes(tmp_path):
    "None is left behind."
    def fn():
        (tmp_path / f"{os.getpid()}").touch()
        while True: time.sleep(0.05)

    def press():
        while len(list(tmp_path.iterdir())) < 2: time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt): run_ranks(fn, 2, how="processes")
    for pid in (int(p.name) for p in tmp_path.iterdir()):
        with pytest.raises(ProcessLookupError): os.kill(pid, 0)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    "Even if that one is killed."
    script = f"""
import os, pathlib, time
from lmbook.distributed import run_ranks

def fn():
    (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch()
    while True: time.sleep(0.05)

if __name__ == "__main__": run_ranks(fn, 2, how="processes")
"""
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        end = time.monotonic() + 120
        while len(pids := [int(p.name) for p in tmp_path.iterdir()]) < 2 and time.monotonic() < end: time.sleep(0.05)
    finally: parent.kill()
    parent.wait()
    for pid in pids:
        while time.monotonic() < end and (Path("/proc") / str(pid)).exists(): time.sleep(0.05)
        assert not (Path("/proc") / str(pid)).exists()


# ---------------------------------------------------------------- under a launcher

SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
from lmbook.distributed import DistributedError, join_ranks

try:
    with join_ranks(start=float(sys.argv[1]), timeout=4) as me:
        exec(sys.argv[2])
        x = torch.ones(1, device=me.device)
        dist.all_reduce(x)
        print(f"rank {me.rank} of {me.world} on {me.device} by {me.backend}: {x.item():.0f}")
except DistributedError as error:
    print(f"DistributedError {error.rank}: {error}")
    sys.exit(1)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(*ranks: dict[str, Any], start: float = 30, do: str = "pass") -> list[str]:
    "What each of some processes prints."
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    base = {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base |= {"TORCH_CPP_LOG_LEVEL": "FATAL", "CUDA_VISIBLE_DEVICES": ""}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(start), do], env=base | {k: str(v) for k, v in rank.items()}, **pipes)
        for rank in ranks
    ]  # fmt: skip
    try: return [process.communicate(timeout=200)[0].strip() for process in processes]
    finally:
        for process in processes: process.kill()


def of(rank: int, world: int, port: int, address: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    return {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": address, "MASTER_PORT": port, **more}


def test_ranks_find_each_other():
    port = free_port()
    assert launched(of(0, 2, port), of(1, 2, port)) == [f"rank {r} of 2 on cpu by gloo: 2" for r in (0, 1)]


def test_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "script.py"), "60", "pass"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for more in ({}, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}):  # the agent has the notice board, or rank 0
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=200)
        said = sorted(re.findall(r"rank \d of \d on \w+ by \w+: \d", done.stdout))  # two write at once, and a line's end may come later
        assert done.returncode == 0 and said == [f"rank {r} of 2 on cpu by gloo: 2" for r in (0, 1)], done


def refused(monkeypatch: pytest.MonkeyPatch, start: float = 0.5, **environment: Any) -> str:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, str(value))
    with pytest.raises(DistributedError) as caught, join_ranks(start=start): pass
    assert not dist.is_initialized()
    return str(caught.value)


def test_an_environment_that_is_not_one(monkeypatch):
    assert "start the script by torchrun" in refused(monkeypatch)
    assert "lacks MASTER_ADDR, MASTER_PORT" in refused(monkeypatch, RANK=0, WORLD_SIZE=2)
    assert "RANK='one'" in refused(monkeypatch, **of(0, 2, 29500) | {"RANK": "one"})
    assert "RANK=2 must be below WORLD_SIZE=2" in refused(monkeypatch, **of(2, 2, 29500))
    assert "MASTER_PORT=70000 must lie" in refused(monkeypatch, **of(0, 2, 70000))
    with pytest.raises(DistributedError, match="Did you mean 'nccl'"), join_ranks(backend="ncl"): pass  # type: ignore[arg-type]


def test_no_gpu_and_too_few(monkeypatch):
    for name, value in of(1, 2, 29500, LOCAL_RANK=1).items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DistributedError, match="needs GPUs, and PyTorch sees none"), join_ranks(backend="nccl"): pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DistributedError, match="LOCAL_RANK=1, but this machine has 1 GPUs"), join_ranks(): pass


def test_a_port_in_use_and_a_stranger_on_it(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        begin = time.monotonic()
        assert "The port is in use by another program: choose another one" in refused(monkeypatch, **of(0, 2, port))
        assert f"what answers at 127.0.0.1:{port} is another program" in refused(monkeypatch, **of(1, 2, port))
        assert time.monotonic() - begin < 15


def test_a_stranger_who_talks(monkeypatch):
    import http.server

    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert "is another program" in refused(monkeypatch, **of(1, 2, server.server_port))
        server.shutdown()


def test_wrong_addresses(monkeypatch):
    port = free_port()
    assert "the name no.such.host.invalid is not known here" in refused(monkeypatch, **of(1, 2, port, "no.such.host.invalid"))
    assert "it cannot reach itself at no.such.host.invalid" in refused(monkeypatch, **of(0, 2, port, "no.such.host.invalid"))
    assert f"nobody listens at 127.0.0.1:{port}" in refused(monkeypatch, **of(1, 2, port))


def test_missing_ranks_are_named():
    port = free_port()
    for said in launched(of(0, 4, port), of(3, 4, port), start=12):
        assert "Of 4 ranks, ranks 1, 2 did not come within 12 seconds" in said


def test_two_sizes_of_the_world():
    port = free_port()
    for said in launched(of(0, 2, port), of(1, 3, port)): assert "WORLD_SIZE is 2 at rank 0 and 3 at rank 1" in said


def test_one_rank_twice():
    port = free_port()
    for said in launched(of(0, 3, port), of(1, 3, port), of(1, 3, port)): assert "Two processes say RANK=1" in said


def test_an_interface_that_is_not_there():
    port = free_port()
    for said in launched(*(of(r, 2, port, GLOO_SOCKET_IFNAME="nope0") for r in (0, 1))):
        assert "network interface was not found" in said and "GLOO_SOCKET_IFNAME" in said


def test_a_rank_that_dies_or_is_late():
    port = free_port()
    first, _ = launched(of(0, 2, port), of(1, 2, port), do="if me.rank: os._exit(3)")
    assert "DistributedError 0: Rank 0 of 2: The connection to another rank is gone" in first
    port = free_port()
    first, _ = launched(of(0, 2, port), of(1, 2, port), do="if me.rank: time.sleep(7)")
    assert "DistributedError 0: Rank 0 of 2: It waited for another rank until the timeout" in first


def test_what_cannot_be_provoked_here():
    "Messages of PyTorch on Windows and on GPUs."
    for text, says in {
        "use_libuv was requested but PyTorch was built without libuv support, run with USE_LIBUV=0 to disable it.": "USE_LIBUV=0",
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 100000": "one for each",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)": "until the timeout",
    }.items(): assert says in explain(RuntimeError(text))
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


# ---------------------------------------------------------------- collectives by hand


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), size=st.integers(0, 40), name=st.sampled_from(sorted(ALL_REDUCE)), seed=st.integers(0, 99))
def test_all_reduce_is_the_librarys(n, size, name, seed):
    def fn():
        generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        theirs = x.clone()
        dist.all_reduce(theirs)
        ALL_REDUCE[name](x, post := Post())
        return x, theirs, post.events

    ranks = run_ranks(fn, n)
    for mine, theirs, _ in ranks:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert torch.equal(mine, ranks[0][0])
    if name != "doubling": assert sum(e.sent for *_, events in ranks for e in events) == 2 * (n - 1) * size * 8


def test_a_fault_is_noticed():
    "A ring that adds one step too few: its log and its result are wrong."
    def fn():
        x, post = torch.ones(4, dtype=torch.float64), Post()
        post.n -= 1  # what such a ring believes
        if post.rank < 3: ring_all_reduce(x, post)
        return x, len(post.events)

    for x, events in run_ranks(fn, 4): assert not torch.equal(x, torch.full_like(x, 4.0)) and events != 6


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8])
def test_parts_of_a_ring_and_of_a_tree(n):
    def fn(root):
        me = dist.get_rank()
        x = torch.arange(5.0) * (me + 1)
        part = ring_reduce_scatter(x, Post()).clone()
        gathered = torch.zeros(5)
        gathered.tensor_split(n)[me].copy_(part)
        ring_all_gather(gathered, Post())
        y = torch.full((2, 2), float(me))
        tree_reduce(y, Post(), root)
        if me == root: assert (y == n * (n - 1) / 2).all()
        y = torch.full((2, 2), float(me))
        tree_broadcast(y, Post(), root)
        return part, gathered, y

    whole = torch.arange(5.0) * n * (n + 1) / 2
    for me, (part, gathered, y) in enumerate(run_ranks(fn, n, n // 2)):
        assert torch.equal(part, whole.tensor_split(n)[me]) and torch.equal(gathered, whole) and (y == n // 2).all()


def test_a_replay_of_ranks_that_wait_for_each_other():
    with pytest.raises(DistributedError, match="messages that nobody sends"): replay([[Event(None, 0, 1, 8)], []], Link(1, 1))
    assert replay([[], []], Link(1, 1)) == []


def test_a_link():
    found = fit_link([10, 1000, 100_000], [1 + s / 50 for s in (10, 1000, 100_000)])
    assert (found.latency, found.bandwidth) == (pytest.approx(1), pytest.approx(50))
    for wrong in ({"latency": -1, "bandwidth": 1}, {"latency": 1, "bandwidth": 0}):
        with pytest.raises(DistributedError): Link(**wrong)
    with pytest.raises(DistributedError, match="two sizes"): fit_link([8, 8], [1, 2])
