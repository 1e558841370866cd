"""Chapters 56 and 59: a model in pieces is the whole model, forward and backward, to 1e-10 in float64.

Ranks are threads; each kind of parallelism runs once as processes, too. The proofs are seen to fail: tests named `..._is_seen` plant a
fault and find it.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from lmbook.attention import attention
from lmbook.batches import IGNORE, Batch
from lmbook.checkpoints import load_weights, save_weights
from lmbook.distributed import DistributedError, run_ranks
from lmbook.experts import (
    MoE,
    MoEConfig,
    MoEError,
    context_parallel,
    expert_parallel,
    moe_loss,
    ring_attention,
    ulysses_attention,
    with_experts,
)
from lmbook.model_parallel import (
    ModelParallelError,
    Schedule,
    Task,
    bubble,
    clip_over_ranks,
    make_mesh,
    make_schedule,
    norm_over_ranks,
    simulate,
    split_stages,
    tensor_parallel,
    vocabulary_parallel_loss,
)
from lmbook.pretrained import save_pretrained
from lmbook.transformer import Transformer, TransformerConfig, TransformerError
from tests import models

V = 24
TOLERANCE = 1e-10


def small(kind: Any = "decoder", variant: str = "llama", **changes: Any) -> Transformer:
    "In double precision, with weights so large that every part matters."
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(V, kind=kind, **{**models.SIZES, "n_layer": 4, **models.VARIANTS[variant], **changes}))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.2) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.2)
    return model.double()


def texts(rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_of(model: nn.Module, ids: Tensor, targets: Tensor, reduction: str = "mean", **inputs: Any) -> Tensor:
    return F.cross_entropy(model(ids, **inputs).flatten(0, 1), targets.flatten(), reduction=reduction)


def whole(x: Tensor) -> Tensor: return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, Tensor]: return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_one(model: Transformer, ids: Tensor, targets: Tensor, **inputs: Any) -> tuple[float, dict[str, Tensor]]:
    own = copy.deepcopy(model)
    loss = loss_of(own, ids, targets, **inputs)
    loss.backward()
    return loss.item(), gradients(own)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() <= expected.keys()
    return max((whole(g) - expected[name]).abs().max().item() for name, g in found.items())


def close(a: Any, b: Any) -> None: torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------- tensor parallel

CUTS = [("decoder", "gpt2", 4), ("decoder", "llama", 2), ("decoder", "window", 2), ("decoder", "bare", 4), ("encoder", "bert", 2),
        ("encoder-decoder", "2017", 2), ("encoder-decoder", "llama", 2)]  # fmt: skip


def cut(model: Transformer, ids: Tensor, targets: Tensor, inputs: dict[str, Any], **options: Any) -> tuple[float, dict[str, Tensor]]:
    own = copy.deepcopy(model)
    tensor_parallel(own, make_mesh(tp=dist.get_world_size()), **options)
    loss = loss_of(own, ids, targets, **inputs)
    loss.backward()
    return loss.item(), {name: whole(g).detach() for name, g in gradients(own).items()}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind, variant, n", CUTS)
def test_tensor_parallel_is_the_whole_model(kind, variant, n, sequence):
    model, (ids, targets) = small(kind, variant, n_layer=2), texts()
    inputs = {"source": texts(4, 5)[0]} if kind == "encoder-decoder" else {}
    loss, expected = of_one(model, ids, targets, **inputs)

    def rank(): return cut(model, ids, targets, inputs, sequence=sequence)

    for found, grads in run_ranks(rank, n):
        assert abs(found - loss) < TOLERANCE and grads.keys() == expected.keys()
        assert error(grads, expected) < TOLERANCE


def test_tensor_parallel_by_processes():
    model, (ids, targets) = small(), texts()
    loss, expected = of_one(model, ids, targets)
    for found, grads in run_ranks(cut, 2, model, ids, targets, {}, how="processes"):
        assert abs(found - loss) < TOLERANCE and error(grads, expected) < TOLERANCE


def test_an_untied_pair_is_seen():
    "Gradients show it, the first loss does not."
    model, (ids, targets) = small(), texts()
    loss, expected = of_one(model, ids, targets)

    def rank():
        own = copy.deepcopy(model)
        tensor_parallel(own, make_mesh(tp=2))
        assert own.out.weight is own.embed.tokens.weight
        own.out.weight = nn.Parameter(own.out.weight.detach().clone())
        found = loss_of(own, ids, targets)
        found.backward()
        grads = {name: whole(g) for name, g in gradients(own).items() if name in expected}
        return found.item(), error(grads, expected)

    found, wrong = run_ranks(rank, 2)[0]
    assert abs(found - loss) < TOLERANCE and wrong > 0.005


def test_each_rank_holds_its_share():
    model = small(variant="llama")
    total = sum(p.numel() for p in model.parameters())

    def rank():
        own = tensor_parallel(copy.deepcopy(model), make_mesh(tp=2))
        return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in own.parameters())

    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert run_ranks(rank, 2) == [norms + (total - norms) // 2] * 2


def test_a_shared_vocabulary_with_the_model():
    model, (ids, targets) = small(), texts()
    _, expected = of_one(model, ids, targets)

    def rank():
        own = tensor_parallel(copy.deepcopy(model), make_mesh(tp=2), whole_scores=False)
        scores = own(ids)
        assert scores.shape == (*ids.shape, V // 2)
        (vocabulary_parallel_loss(scores, targets) / targets.numel()).backward()
        return {name: whole(g) for name, g in gradients(own).items()}

    for grads in run_ranks(rank, 2): assert error(grads, expected) < TOLERANCE


@pytest.mark.parametrize("n", [1, 2, 3])
def test_vocabulary_parallel_loss(n):
    torch.manual_seed(0)
    scores, targets = torch.randn(2, 5, V, dtype=torch.float64) * 30, torch.randint(V, (2, 5))
    targets[1, 3:] = IGNORE
    leaf = scores.clone().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE)
    expected.backward()

    def rank():
        mine = scores.chunk(n, -1)[dist.get_rank()].clone().requires_grad_()
        loss = vocabulary_parallel_loss(mine, targets)
        loss.backward()
        return loss.detach(), mine.grad

    losses, grads = zip(*run_ranks(rank, n))
    for loss in losses: close(loss, expected.detach())
    close(torch.cat(grads, -1), leaf.grad)


def both_losses(model: Transformer, ids: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    "Ours and PyTorch's `loss_parallel`, with the gradient of the embedding."
    found, mesh = [], make_mesh(tp=2)
    for ours in (True, False):
        own = tensor_parallel(copy.deepcopy(model), mesh, whole_scores=False)
        scores = own(ids)
        if ours: loss = vocabulary_parallel_loss(scores, targets) / targets.numel()
        else:
            shared = DTensor.from_local(scores, mesh, [Shard(-1)]).flatten(0, 1)
            with loss_parallel():
                loss = F.cross_entropy(shared, targets.flatten())
                loss.backward()
        if ours: loss.backward()
        found.append((whole(loss).detach(), whole(own.out.weight.grad)))
    return found


def test_a_shared_vocabulary_is_that_of_pytorch():
    model, (ids, targets) = small(), texts()
    for ours, theirs in run_ranks(both_losses, 2, model, ids, targets, how="processes"):
        close(ours[0], theirs[0])
        close(ours[1], theirs[1])


def said(rank: Any, n: int, **options: Any) -> str:
    "The message of what goes wrong on ranks: an error of this chapter, which names its rank."
    with pytest.raises(ModelParallelError) as caught: run_ranks(rank, n, **options)
    assert caught.value.rank is not None and f"Rank {caught.value.rank} of {n}" in str(caught.value)
    assert isinstance(caught.value, DistributedError)
    return str(caught.value)


@pytest.mark.parametrize("changes, n, word", [
    ({}, 3, "n_head=4"), ({"n_kv_head": 2}, 4, "n_kv_head=2"), ({"n_kv_head": None, "d_ff": 50}, 4, "d_ff=50"),
    ({"n_head": 5, "n_kv_head": None, "d_head": 8, "d_ff": 20}, 5, "vocab_size=24"), ({"dropout": 0.1}, 2, "dropout=0.1"),
    ({"positions": "alibi"}, 2, "ALiBi"),
])  # fmt: skip
def test_what_cannot_be_cut(changes, n, word):
    model = small(**changes)
    assert word in said(lambda: tensor_parallel(copy.deepcopy(model), make_mesh(tp=n)), n)


def test_meshes_that_do_not_fit():
    model, (ids, _) = small(), texts(2, 8)
    assert "3 ranks, but 2 were started" in said(lambda: make_mesh(tp=3), 2)
    assert "one of them" in said(lambda: tensor_parallel(copy.deepcopy(model), make_mesh(dp=2, tp=1)), 2)
    assert "T=7" in said(lambda: tensor_parallel(copy.deepcopy(model), make_mesh(tp=2), sequence=True)(ids), 2)

    def twice():
        own = tensor_parallel(copy.deepcopy(model), make_mesh(tp=2))
        return tensor_parallel(own, make_mesh(tp=2))

    assert "already" in said(twice, 2)
    with pytest.raises(ModelParallelError, match="run_ranks"): make_mesh(tp=1)
    with pytest.raises(ModelParallelError, match="tp=0"): make_mesh(tp=0)


def test_targets_that_do_not_fit():
    scores, targets = torch.randn(2, 3, 4), torch.full((2, 3), 8)
    assert "target 8" in said(lambda: vocabulary_parallel_loss(scores, targets), 2)
    assert "(2, 3)" in said(lambda: vocabulary_parallel_loss(scores, targets[:, :2]), 2)


# ---------------------------------------------------------------- pipelines

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (p, 2 * p, 3 * p, 4 * p)]


KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1)]


@pytest.mark.parametrize("name, chunks", KINDS)
def test_bubbles_are_those_of_the_formulas(name, chunks):
    for (p, m), costs in itertools.product(SIZES, [(1, 1, 1), (2, 3, 2), (1, 1.5, 0.5)]):
        line = simulate(make_schedule(name, p, m, chunks), *costs)
        assert math.isclose(line.bubble, bubble(name, p, m, chunks, *costs), abs_tol=1e-9), (p, m, costs)


def test_what_ranks_hold():
    for p, m in SIZES:
        lines = {name: simulate(make_schedule(name, p, m)) for name in ("gpipe", "1f1b", "zero-bubble")}
        assert [lines["gpipe"].held(r) for r in range(p)] == [m] * p
        assert [lines["1f1b"].held(r) for r in range(p)] == [min(p - r, m) for r in range(p)]
        assert [lines["zero-bubble"].held(r) for r in range(p)] == [min(p, m)] * p


@pytest.mark.parametrize("name, chunks", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_a_timeline_keeps_the_rules(name, chunks):
    p, m = 4, 8
    line = simulate(make_schedule(name, p, m, chunks), 1, 1.25, 0.75, send=0.1)
    ends = {slot.task: slot.end for slot in line.slots}
    kinds = ("forward", "input", "weight") if name == "zero-bubble" else ("forward", "backward")
    assert ends.keys() == {Task(kind, s, i) for kind in kinds for s in range(p * chunks) for i in range(m)}
    for rank, task, start, _ in line.slots:
        assert rank == task.stage % p
        before, after = Task("forward", task.stage - 1, task.micro), Task(kinds[1], task.stage + 1, task.micro)
        if task.kind == "forward" and task.stage: assert start >= ends[before] + 0.1 - 1e-9
        if task.kind == kinds[1] and task.stage < p * chunks - 1: assert start >= ends[after] + 0.1 - 1e-9
    for r in range(p):
        own = sorted((slot.start, slot.end) for slot in line.slots if slot.rank == r)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(own))


def test_schedules_that_cannot_be():
    stuck = Schedule("stuck", 2, ((Task("backward", 0, 0), Task("forward", 0, 0)), (Task("forward", 1, 0), Task("backward", 1, 0))))
    with pytest.raises(ModelParallelError, match="Rank 0 of 2 waits for ever: backward of stage 0") as caught: simulate(stuck)
    assert caught.value.rank == 0
    for wrong, word in (
        (lambda: make_schedule("1f1b", 2, 4, 2), "one stage on each"), (lambda: make_schedule("interleaved", 4, 6, 2), "n_micro=6"),
        (lambda: make_schedule("zero_bubble", 2, 4), "Did you mean"), (lambda: make_schedule("gpipe", 0, 4), "n_rank=0"),
        (lambda: bubble("pipe", 2, 4), "schedule='pipe'"), (lambda: simulate(Schedule("x", 3, ((), ()))), "3 stages"),
    ):  # fmt: skip
        with pytest.raises(ModelParallelError, match=word): wrong()


def test_stages_are_the_model_and_what_cannot_be_cut():
    for variant in ("llama", "gpt2", "2017", "bare"):
        model, (ids, _) = small(variant=variant, tie=False), texts()
        for n in (1, 2, 4):
            x = ids
            for stage in split_stages(model, n): x = stage(x)
            torch.testing.assert_close(x, model(ids), rtol=0, atol=1e-12)
    for wrong, n, word in ((small(tie=False), 3, "n_layer=4"), (small(), 2, "tie=False"), (small("encoder"), 2, "decoder")):
        with pytest.raises(ModelParallelError, match=word): split_stages(wrong, n)
    with pytest.raises(ModelParallelError, match="context_length=24"): split_stages(small(), 1)[0](torch.zeros(1, 25, dtype=torch.long))


def ragged() -> tuple[Tensor, Tensor]:
    ids, targets = texts(8)
    targets[3:, 4:] = IGNORE
    return ids, targets


def cross_entropy(how: str) -> Any:
    def loss(scores: Tensor, targets: Tensor) -> Tensor: return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction=how)

    return loss


def pipelined(model: Transformer, kind: Any, chunks: int, how: str, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    "Gradients of this rank's stages, and in which order it worked, as PyTorch writes it."
    own, rank, n = copy.deepcopy(model), dist.get_rank(), dist.get_world_size()
    ids, targets = ragged()
    stages = split_stages(own, n * chunks)
    mine = [PipelineStage(stages[i], i, len(stages), torch.device("cpu")) for i in range(rank, len(stages), n)]
    single = kind in (ScheduleGPipe, Schedule1F1B)
    schedule = kind(mine[0] if single else mine, 8, loss_fn=cross_entropy(how), **options)
    schedule.step(*([ids] if rank == 0 else []), **({"target": targets} if rank == n - 1 else {}))
    tokens = (targets != IGNORE).sum() if how == "sum" else 1
    order = [str(action) for action in getattr(schedule, "pipeline_order", {rank: []})[rank]]
    return {name: g / tokens for name, g in gradients(own).items()}, order


PIPELINES = [("gpipe", ScheduleGPipe, 2, 1), ("gpipe", ScheduleGPipe, 4, 1), ("1f1b", Schedule1F1B, 2, 1), ("1f1b", Schedule1F1B, 4, 1),
             ("interleaved", ScheduleInterleaved1F1B, 2, 2), ("", ScheduleInterleavedZeroBubble, 2, 2)]  # fmt: skip


@pytest.mark.parametrize("name, kind, n, chunks", PIPELINES)
def test_pipelines_are_the_whole_model(name, kind, n, chunks):
    model = small(tie=False)
    _, expected = of_one(model, *ragged())
    found: dict[str, Tensor] = {}
    ours = make_schedule(name, n, 8, chunks) if name else None
    for r, (grads, order) in enumerate(run_ranks(lambda: pipelined(model, kind, chunks, "sum", scale_grads=False), n, check=False)):
        assert not found.keys() & grads.keys()
        found |= grads
        theirs = [action for action in order if action != "None" and "REDUCE" not in action]
        if kind is Schedule1F1B and r == n - 1: continue  # whose list (not whose work) PyTorch numbers from 1
        if ours and theirs: assert theirs == [f"{t.stage}{t.kind[0].upper()}{t.micro}" for t in ours.ranks[r]]
    assert found.keys() == expected.keys() and error(found, expected) < TOLERANCE


def test_pipelines_by_processes():
    model = small(tie=False)
    _, expected = of_one(model, *ragged())
    found: dict[str, Tensor] = {}
    for grads, _ in run_ranks(lambda: pipelined(model, Schedule1F1B, 1, "sum", scale_grads=False), 2, how="processes", check=False):
        found |= grads
    assert found.keys() == expected.keys() and error(found, expected) < TOLERANCE


def test_a_mean_of_means_is_seen():
    "What `scale_grads`, the default, makes of micro-batches with unequal numbers of tokens."
    model = small(tie=False)
    _, expected = of_one(model, *ragged())
    results = run_ranks(lambda: pipelined(model, Schedule1F1B, 1, "mean"), 2, check=False)
    assert max(error(grads, expected) for grads, _ in results) > 0.01


# ---------------------------------------------------------------- several kinds at once


@pytest.fixture
def _quiet():
    log = logging.getLogger("torch.distributed.tensor._redistribute")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


def in_three_ways(model: Transformer) -> tuple[float, float, float, float]:
    "Data, pipeline and tensor parallel; the error of the gradients, and norms."
    mesh = make_mesh(dp=2, pp=2, tp=2)
    dp, pp, tp = (mesh[axis] for axis in ("dp", "pp", "tp"))
    own, (ids, targets) = copy.deepcopy(model), texts(8)
    stage = split_stages(own, 2)[pp.get_local_rank()]
    tensor_parallel(stage, tp)
    mine, told = (t.chunk(2)[dp.get_local_rank()].contiguous() for t in (ids, targets))
    line = PipelineStage(stage, pp.get_local_rank(), 2, torch.device("cpu"), group=pp.get_group())
    schedule = Schedule1F1B(line, 2, loss_fn=cross_entropy("sum"), scale_grads=False)
    schedule.step(*([] if pp.get_local_rank() else [mine]), **({"target": told} if pp.get_local_rank() else {}))
    for p in stage.parameters():
        local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        dist.all_reduce(local, group=dp.get_group())
        local.div_(targets.numel())
    _, expected = of_one(model, ids, targets)
    wrong = error(gradients(own), expected)
    of_stage = norm_over_ranks(stage.parameters()).item()
    norm = clip_over_ranks(stage.parameters(), 0.01, pp.get_group()).item()
    return wrong, norm, norm_over_ranks(stage.parameters(), pp.get_group()).item(), of_stage


def test_three_kinds_at_once():
    "And that a norm of one stage alone is seen."
    model = small(tie=False)
    _, expected = of_one(model, *texts(8))
    total = torch.stack([g.norm() for g in expected.values()]).norm().item()
    for wrong, norm, clipped, of_stage in run_ranks(lambda: in_three_ways(model), 8, check=False):
        assert wrong < TOLERANCE and abs(norm - total) < TOLERANCE
        assert abs(clipped - 0.01) < 1e-5
        assert abs(of_stage - total) > 0.01


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("sequence", [False, True])
def test_fsdp_and_tensor_parallel(sequence):
    model, (ids, targets) = small(), texts()
    _, expected = of_one(model, ids, targets)
    total = torch.stack([g.norm() for g in expected.values()]).norm().item()

    def rank():
        mesh = make_mesh(dp=2, tp=2)
        own = tensor_parallel(copy.deepcopy(model), mesh["tp"], sequence=sequence)
        for block in own.decoder.blocks: fully_shard(block, mesh=mesh["dp"])
        fully_shard(own, mesh=mesh["dp"])
        loss_of(own, *(t.chunk(2)[mesh["dp"].get_local_rank()] for t in (ids, targets))).backward()
        return error(gradients(own), expected), norm_over_ranks(own.parameters()).item()

    for wrong, norm in run_ranks(rank, 4): assert wrong < TOLERANCE and abs(norm - total) < TOLERANCE


def test_norms_of_plain_gradients():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    assert norm_over_ranks([p]) == 0
    p.grad = torch.tensor([3.0, 4.0])
    assert norm_over_ranks([p, q]) == 5 and clip_over_ranks([p, q], 1.0) == 5
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    assert clip_over_ranks([p], 10.0) == pytest.approx(1) and p.grad.tolist() == pytest.approx([0.6, 0.8])
    with pytest.raises(ModelParallelError, match="max_norm"): clip_over_ranks([p], 0)


# ---------------------------------------------------------------- long texts


def heads(H: int, H_kv: int, T: int = 12) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, T, 6, dtype=torch.float64) for h in (H, H_kv, H_kv, H)]


def with_gradients(attend: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def on_one_text(attend: Any, tensors: list[Tensor], causal: bool, of: int) -> list[Tensor]:
    "Groups of so many ranks each share a text, the same one."
    groups = [dist.new_group(list(range(first, first + of))) for first in range(0, dist.get_world_size(), of)]
    group = groups[dist.get_rank() // of] if len(groups) > 1 else None
    part = [x.chunk(of, 2)[dist.get_rank(group)] for x in tensors]
    return with_gradients(lambda *x: attend(*x, group, causal=causal), *part)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend, H, H_kv, n, of", [
    (ring_attention, 4, 4, 1, 1), (ring_attention, 4, 4, 2, 2), (ring_attention, 3, 1, 3, 3), (ring_attention, 4, 2, 4, 4),
    (ring_attention, 4, 4, 4, 2), (ulysses_attention, 4, 4, 2, 2), (ulysses_attention, 4, 2, 2, 2), (ulysses_attention, 4, 4, 4, 4),
    (ulysses_attention, 4, 4, 4, 2),
])  # fmt: skip
def test_attention_over_ranks_is_the_whole(attend, H, H_kv, n, of, causal):
    tensors = heads(H, H_kv)
    expected = with_gradients(lambda *x: attention(*x, causal=causal), *tensors)
    results = run_ranks(lambda: on_one_text(attend, tensors, causal, of), n)
    for first in range(0, n, of):
        for parts, right in zip(zip(*results[first : first + of]), expected): close(torch.cat(parts, 2), right)


def test_attention_over_processes():
    tensors = heads(4, 4)
    expected = with_gradients(lambda *x: attention(*x, causal=True), *tensors)
    for attend in (ring_attention, ulysses_attention):
        results = run_ranks(on_one_text, 2, attend, tensors, True, 2, how="processes")
        for parts, right in zip(zip(*results), expected): close(torch.cat(parts, 2), right)


def test_parts_in_another_order_are_seen():
    "The causal mask follows the ranks: parts that are swapped give another result."
    q, k, v, _ = heads(4, 4)
    right = attention(q, k, v, causal=True).chunk(2, 2)

    def rank(): return ring_attention(*(x.chunk(2, 2)[1 - dist.get_rank()] for x in (q, k, v)))

    for found, part in zip(run_ranks(rank, 2)[::-1], right): assert (found - part).abs().max() > 0.1


def test_attention_that_cannot_be_shared():
    q, k, v, _ = heads(3, 3)
    assert "3 heads of queries" in said(lambda: ulysses_attention(q, k, v), 2)
    assert "same part" in said(lambda: ring_attention(q, k[:, :, :3], v), 2)
    assert "same part" in said(lambda: ring_attention(q, k[:, :2], v[:, :2]), 2)


@pytest.mark.parametrize("kind, variant, how, n", [
    ("decoder", "llama", "ring", 4), ("decoder", "llama", "ulysses", 2), ("decoder", "gpt2", "ulysses", 4), ("decoder", "2017", "ring", 2),
    ("encoder", "gpt2", "ring", 2),
])  # fmt: skip
def test_a_model_that_reads_parts(kind, variant, how, n):
    model, (ids, targets) = small(kind, variant, n_layer=2), texts()
    _, expected = of_one(model, ids, targets)

    def rank():
        own = context_parallel(copy.deepcopy(model), how=how)
        mine, told = (t.chunk(n, 1)[dist.get_rank()].contiguous() for t in (ids, targets))
        (loss_of(own, mine, told, "sum") / targets.numel()).backward()
        for p in own.parameters(): dist.all_reduce(p.grad)
        return gradients(own)

    for grads in run_ranks(rank, n): assert grads.keys() == expected.keys() and error(grads, expected) < TOLERANCE


def test_models_that_cannot_read_parts():
    for kind, variant, changes, word in (
        ("decoder", "window", {}, "window=4"), ("decoder", "alibi", {}, "alibi"), ("encoder-decoder", "gpt2", {}, "encoder-decoder"),
        ("decoder", "gpt2", {"dropout": 0.1}, "dropout"),
    ):  # fmt: skip
        model = small(kind, variant, **changes)
        with pytest.raises(ModelParallelError, match=word): context_parallel(model)
    with pytest.raises(ModelParallelError, match="how='rings'"): context_parallel(small(), how="rings")
    model, (ids, _) = small(), texts()
    assert "no segments" in said(lambda: context_parallel(copy.deepcopy(model))(ids, segments=torch.ones_like(ids)), 2)


# ---------------------------------------------------------------- experts

ONE = TransformerConfig(V, d_model=16, n_layer=2, n_head=4, d_ff=12)


def layer(moe: MoEConfig, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    made = MoE(ONE, moe).double()
    with torch.no_grad():
        for p in made.parameters(): p.normal_(0, 0.5)
    return made


def dense(moe: MoE, x: Tensor) -> Tensor:
    "All experts for all tokens."
    chances = moe.router(x).softmax(-1)
    best, chosen = chances.topk(moe.moe.top_k)
    gates = torch.zeros_like(chances).scatter(-1, chosen, best)
    if moe.moe.top_k > 1: gates = gates / gates.sum(-1, keepdim=True)
    return sum(gates[..., e, None] * expert(x) for e, expert in enumerate(moe.experts))


@pytest.mark.parametrize("E, k", [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
def test_sparse_is_dense(E, k):
    moe, x = layer(MoEConfig(E, k)), torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outs, grads = [], []
    for way in (moe, lambda x: dense(moe, x)):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        outs.append(way(leaf))
        outs[-1].square().sum().backward()
        grads.append({"x": leaf.grad, **{name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moe.named_parameters()}})
    close(*outs)
    for name in grads[0]: close(grads[0][name], grads[1][name])
    if E > k or k == 1 < E: assert grads[0]["router.weight"].abs().max() > 1e-3


def test_capacity_drops_the_last_choices():
    "Six tokens that all want expert 0 first and expert 1 second; there is room for three choices each."
    moe = layer(MoEConfig(2, 2, capacity=0.5))
    with torch.no_grad(): moe.router.weight.copy_(torch.zeros(2, 16)).select(0, 0).fill_(1.0)
    x = torch.rand(1, 6, 16, dtype=torch.float64) + 0.1
    out = moe(x)
    assert moe.routing.dropped == 0.5 and (out[0, 3:] == 0).all() and (out[0, :3] != 0).any(-1).all()
    close(out[:, :3], dense(moe, x)[:, :3])
    moe.eval()
    close(moe(x), dense(moe, x))
    assert moe.routing.dropped == 0


def test_first_choices_come_first():
    moe = layer(MoEConfig(2, 2, capacity=0.5))
    with torch.no_grad(): moe.router.weight.zero_()[:, 0] = torch.tensor([1.0, -1.0])
    x = torch.rand(1, 4, 16, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])  # two for each expert, and room for two
    token, expert, _ = moe._choose(x[0])
    assert token.tolist() == [0, 1, 2, 3] and expert.tolist() == [0, 0, 1, 1]


def test_balance_and_z():
    E, N = 4, 32
    moe, x = layer(MoEConfig(E, 1)), torch.randn(1, N, 16, dtype=torch.float64)
    moe(x)
    scores = moe.router(x)[0]
    share = F.one_hot(scores.argmax(-1), E).double().mean(0)
    close(moe.routing.balance, E * (share * scores.softmax(-1).mean(0)).sum())
    close(moe.routing.z, scores.exp().sum(-1).log().square().mean())
    with torch.no_grad(): moe.router.weight.zero_()
    moe(x)
    assert moe.routing.balance.item() == pytest.approx(1) and moe.routing.z.item() == pytest.approx(math.log(E) ** 2)


def test_a_model_with_experts(tmp_path):
    torch.manual_seed(0)
    plain = Transformer(ONE)
    model = with_experts(copy.deepcopy(plain), MoEConfig(4, 2, balance=0.5, z=0.25), every=2)
    assert [isinstance(b.mlp, MoE) for b in model.decoder.blocks] == [False, True]
    torch.testing.assert_close(model.decoder.blocks[1].mlp.experts[0].up.weight, plain.decoder.blocks[1].mlp.up.weight)
    sizes = [e.down.weight.std().item() for e in model.decoder.blocks[1].mlp.experts]
    assert max(sizes) < 1.3 * min(sizes)
    batch = Batch(*texts())
    loss, tokens = moe_loss(model, batch)
    routing = model.decoder.blocks[1].mlp.routing
    expected = F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected + tokens * (0.5 * routing.balance + 0.25 * routing.z))
    assert tokens == 32 and copy.deepcopy(model).decoder.blocks[1].mlp.routing is None
    with pytest.raises(MoEError, match="already"): with_experts(model, MoEConfig())
    with pytest.raises(TransformerError, match="save_weights"): save_pretrained(model, tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_experts_are_saved(tmp_path):
    torch.manual_seed(0)
    one, other = (with_experts(Transformer(ONE), MoEConfig(4, 1)) for _ in range(2))
    save_weights(one, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(one.eval()(texts()[0]), other.eval()(texts()[0]))


@pytest.mark.parametrize("fields, word", [
    ({"n_expert": 0}, "n_expert=0"), ({"top_k": 9}, "top_k=9"), ({"capacity": 0.0}, "capacity"), ({"balance": -1.0}, "balance"),
])  # fmt: skip
def test_mixtures_that_cannot_be(fields, word):
    with pytest.raises(MoEError, match=word): MoEConfig(**fields)


class Forgetful(MoE):
    "A fault: loads are not added up."

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.spread = False
        found = super()._choose(x)
        self.spread = True
        return found


def spread(model: nn.Module, batch: Batch, local: bool = False) -> dict[str, Tensor]:
    "Gradients of a model whose experts are spread, under the names of the whole. `local`: with the fault."
    rank, n = dist.get_rank(), dist.get_world_size()
    own = expert_parallel(copy.deepcopy(model))
    for m in own.modules():
        if local and isinstance(m, MoE): m.__class__ = Forgetful
    loss, _ = moe_loss(own, Batch(*(t.chunk(n)[rank] for t in (batch.ids, batch.targets))))
    (loss / batch.targets.numel()).backward()
    found = {}
    for name, p in own.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if ".experts." in name:
            before, after = name.split(".experts.")
            number, rest = after.split(".", 1)
            name = f"{before}.experts.{int(number) + rank * 4 // n}.{rest}"
        else: dist.all_reduce(grad)
        found[name] = grad
    return found


def model_with_experts(router: float = 1.0) -> tuple[nn.Module, Batch, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = with_experts(Transformer(ONE), MoEConfig(4, 2, balance=0.3, z=0.1)).double(), Batch(*texts())
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MoE): m.router.weight.normal_(0, router)
    one = copy.deepcopy(model)
    loss, tokens = moe_loss(one, batch)
    (loss / tokens).backward()
    return model, batch, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in one.named_parameters()}


@pytest.mark.parametrize("n, how", [(1, "threads"), (2, "threads"), (4, "threads"), (2, "processes")])
@pytest.mark.parametrize("router", [1.0, 0.0])  # with 0 all are equal, and two experts get everything: the others, and their ranks, nothing
def test_experts_over_ranks_are_those_of_one(n, how, router):
    if how == "processes" and not router: return
    model, batch, expected = model_with_experts(router)
    found: dict[str, Tensor] = {}
    for grads in run_ranks(spread, n, model, batch, how=how): found |= grads
    assert found.keys() == expected.keys() and error(found, expected) < TOLERANCE


def test_loads_of_one_rank_are_seen():
    "The balance loss of each rank's own loads is another one."
    model, batch, expected = model_with_experts()
    found: dict[str, Tensor] = {}
    for grads in run_ranks(spread, 2, model, batch, True): found |= grads
    assert error(found, expected) > 1e-4


def test_experts_that_cannot_be_spread():
    three, plain = layer(MoEConfig(3, 1)), Transformer(ONE)
    assert "n_expert=3" in said(lambda: expert_parallel(copy.deepcopy(three)), 2)
    assert "no experts" in said(lambda: expert_parallel(plain), 2)
    assert "already" in said(lambda: expert_parallel(expert_parallel(copy.deepcopy(three))), 1)
