"""Masks and losses against PyTorch's, SparseGPT against least squares, smaller models against masked ones; bad input, planted faults."""

from __future__ import annotations

import copy
import warnings
from itertools import combinations
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import lmbook.compression as compression
from lmbook.batches import Batch, Examples
from lmbook.cache import KVCache
from lmbook.compression import (
    CompressionError,
    DistillConfig,
    LowRankLinear,
    PruneConfig,
    SparseTraining,
    distill_loss,
    distilling,
    importance,
    keep_mask,
    low_rank,
    low_rank_factors,
    prune,
    shrink,
    sparse_gpt,
    sparsity_of,
    stored_bytes,
)
from lmbook.experts import MoEConfig, with_experts
from lmbook.finetuning import LoraConfig, apply_lora
from lmbook.generation import SamplingConfig, generate
from lmbook.quantization import QuantizeConfig, pack, quantize
from lmbook.runs import muon_and_adamw
from lmbook.tokenization import CharTokenizer
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig, count_parameters
from tests import models
from tests.faults import planted

ROWS = [models.ids(1, 12, seed)[0].tolist() for seed in range(6)]
NO_GROUPS = {"n_kv_head": None}


def plain(**changes: Any) -> Transformer: return models.make("decoder", "llama", **{**NO_GROUPS, **changes})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".blocks." in name}


def matrix(N: int = 6, K: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(K: int = 16, n: int = 200, seed: int = 1) -> Tensor:
    X = matrix(n, K, seed) @ matrix(K, K, seed + 1)
    return X.T @ X / n


def change(new: Tensor, W: Tensor, H: Tensor) -> float: return float((((new - W) @ H) * (new - W)).sum())


# ---------------------------------------------------------------- which weights go


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.77])
def test_masks_are_those_of_pytorch(share):
    model = plain()
    one, all_ = copy.deepcopy(model), copy.deepcopy(model)
    for layer in linears(one).values(): torch_prune.l1_unstructured(layer, "weight", share)
    torch_prune.global_unstructured([(m, "weight") for m in linears(all_).values()], torch_prune.L1Unstructured, amount=share)
    for scope, theirs in (("matrix", one), ("global", all_)):
        ours = prune(model, PruneConfig(share, scope=scope))
        for name, layer in linears(ours).items(): assert torch.equal(layer.weight, theirs.get_submodule(name).weight)


def test_as_many_go_as_are_asked_for_even_if_all_are_alike(module: ModuleType = compression):
    for s in (torch.ones(5, 7), matrix(5, 7)):
        for share in (0, 0.2, 0.5, 0.99):
            for scope, n in (("matrix", round(share * 35)), ("row", 5 * round(share * 7)), ("global", round(share * 35))):
                stays = module.keep_mask({"a": s}, module.PruneConfig(share, scope=scope))["a"]
                assert int((~stays).sum()) == n
    stays = module.keep_mask({"a": matrix(5, 7).abs()}, module.PruneConfig(0.4))["a"]
    assert matrix(5, 7).abs()[~stays].max() < matrix(5, 7).abs()[stays].min()


def test_two_of_four_keeps_the_best_pair_of_each_four(module: ModuleType = compression):
    W = matrix()
    stays = module.keep_mask({"a": W.abs()}, module.PruneConfig(pattern="2:4"))["a"].unflatten(1, (-1, 4))
    for four, mask in zip(W.unflatten(1, (-1, 4)).flatten(0, 1), stays.flatten(0, 1)):
        best = max(combinations(range(4), 2), key=lambda pair: sum(abs(four[i]) for i in pair))
        assert tuple(mask.nonzero().flatten().tolist()) == best


def test_the_model_stays_as_it_is_and_only_its_blocks_are_pruned():
    model = plain().train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    model.decoder.blocks[0].mlp.up.weight.requires_grad_(False)
    before, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    for method in ("magnitude", "random", "taylor", "wanda", "sparsegpt"):
        new = prune(model, PruneConfig(0.5, method), ROWS)
        assert abs(sparsity_of(new) - 0.5) < 0.01 and new.training and new is not model
        for name, p in new.named_parameters():
            if name.removesuffix(".weight") not in linears(new): assert torch.equal(p, before[name])
        for name, p in model.state_dict().items(): assert torch.equal(p, before[name])
        assert all(p.grad is g for p, g in zip(model.parameters(), grads)) and model.training
        assert not model.decoder.blocks[0].mlp.up.weight.requires_grad
    some = prune(model, PruneConfig(0.5, targets=("down", "decoder.blocks.1.mlp.up")))
    zeros = {name for name, m in linears(some).items() if (m.weight == 0).any()}
    assert zeros == {"decoder.blocks.0.mlp.down", "decoder.blocks.1.mlp.down", "decoder.blocks.1.mlp.up"}
    assert sparsity_of(some) < sparsity_of(some, ("down",)) == 0.5


def test_by_gradient_is_as_by_hand(module: ModuleType = compression):
    model = plain()
    new, name = module.prune(model, module.PruneConfig(0.5, "taylor"), ROWS), "decoder.blocks.1.attention.value"
    score = torch.zeros_like(model.get_submodule(name).weight)
    for row in ROWS:
        model.zero_grad()
        ids = torch.tensor([row])
        F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).backward()
        score += (model.get_submodule(name).weight.grad * model.get_submodule(name).weight).square()
    stays = keep_mask({"": score.detach()}, PruneConfig(0.5))[""]
    assert ((new.get_submodule(name).weight != 0) == stays).float().mean() > 0.999


def test_wanda_is_as_by_hand(module: ModuleType = compression):
    model, seen = plain(), []
    layer = model.decoder.blocks[0].attention.query
    hook = layer.register_forward_pre_hook(lambda m, given: seen.append(given[0].detach()[0]))
    for row in ROWS: model(torch.tensor([row]))
    hook.remove()
    score = layer.weight.detach().abs() * torch.cat(seen).norm(dim=0)
    new = module.prune(model, module.PruneConfig(0.25, "wanda", "row"), ROWS)
    assert torch.equal(new.decoder.blocks[0].attention.query.weight != 0, keep_mask({"": score}, PruneConfig(0.25, scope="row"))[""])


# ---------------------------------------------------------------- SparseGPT


def least_squares(W: Tensor, H: Tensor, stays: Tensor) -> Tensor:
    "Column by column, and solved anew each time for what is to the right."
    new = W.clone()
    for j in range(W.shape[1]):
        new[:, j] *= stays[:, j]
        done, free = slice(0, j + 1), slice(j + 1, None)
        if j + 1 < W.shape[1]: new[:, free] = W[:, free] - (new[:, done] - W[:, done]) @ H[done, free] @ H[free, free].inverse()
    return new


@pytest.mark.parametrize("K", [8, 16, 36, 70])
def test_sparse_gpt_is_least_squares_column_by_column(K, module: ModuleType = compression):
    W, H = matrix(6, K), hessian(K)
    for config in (module.PruneConfig(0.5, "sparsegpt", damping=0), module.PruneConfig(0.3, "sparsegpt", damping=0),
                   *([module.PruneConfig(0.5, "sparsegpt", pattern="2:4", damping=0)] if not K % 4 else [])):
        new = module.sparse_gpt(W, H, config)
        torch.testing.assert_close(new, least_squares(W, H, new != 0), rtol=1e-5, atol=1e-6)
        if config.pattern == "2:4": assert ((new == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        elif K <= 32: assert int((new == 0).sum()) == round(config.sparsity * W.numel())


def test_the_last_column_that_goes_is_the_best_one():
    "With one block, one row and one weight to lose, and all to its right free, no other choice in the first column is better."
    H, W = hessian(4), matrix(1, 4)
    first = W.clone()
    first[0, 1:] = W[0, 1:] + W[0, :1] @ H[:1, 1:] @ H[1:, 1:].inverse()
    first[0, 0] = 0
    for _ in range(50):
        other = first + torch.randn(1, 4, dtype=torch.float64) * torch.tensor([0, 1, 1, 1])
        assert change(first, W, H) <= change(other, W, H)


def test_making_up_for_others_pays():
    "For inputs that are correlated as those of layers are. (For nearly dependent ones it need not: what is settled is not changed again.)"
    ours, masked = 0.0, 0.0
    for seed in range(20):
        W, H = matrix(6, 16, seed), hessian(16, seed=100 + 3 * seed)
        H = H + H.diagonal().mean() * torch.eye(16, dtype=H.dtype)
        new = sparse_gpt(W, H)
        ours, masked = ours + change(new, W, H), masked + change(W * (new != 0), W, H)
    assert ours < masked


def test_sparse_gpt_takes_any_type_and_inputs_that_never_came():
    H = hessian()
    H[3], H[:, 3] = 0, 0
    for dtype in (torch.float32, torch.bfloat16):
        new = sparse_gpt(matrix().to(dtype), H)
        assert new.dtype == dtype and new.isfinite().all() and int((new == 0).sum()) >= 48
    assert torch.equal(sparse_gpt(matrix(), torch.zeros(16, 16), PruneConfig(0.5, "sparsegpt")) != 0,
                       keep_mask({"": matrix().square()}, PruneConfig(0.5))[""])  # nothing came: by size


# ---------------------------------------------------------------- training


def train(model: nn.Module, steps: int = 12, optimizer: Any = "adamw", **more: Any) -> Trainer:
    config = TrainConfig(steps=steps, lr=0.05, optimizer=optimizer, weight_decay=0.1 if isinstance(optimizer, str) else 0.0, device="cpu")
    trainer = Trainer(model, Examples(ROWS, batch_size=3), config, **more)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", muon_and_adamw])
def test_zeros_stay_zero_and_all_else_learns(optimizer, module: ModuleType = compression):
    model = prune(plain(), PruneConfig(0.6))
    before = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    train(model, optimizer=optimizer, callbacks=[module.SparseTraining()])
    for name, m in linears(model).items():
        assert torch.equal(m.weight == 0, before[name] == 0)
        assert (m.weight - before[name])[before[name] != 0].abs().min() > 0
        assert not m.weight._backward_hooks


def test_masked_gradients_are_zero():
    model, seen = prune(plain(), PruneConfig(0.5)), []
    layer = model.decoder.blocks[0].mlp.up
    mask = layer.weight.detach() != 0

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(layer.weight.grad.clone())
            return super().step(closure)

    train(model, 3, optimizer=lambda m: Watch(m.parameters(), 0.1), callbacks=[SparseTraining()])
    assert all(not g[~mask].any() and g[mask].any() for g in seen)


def test_gradual_pruning_follows_its_schedule_and_nothing_comes_back(module: ModuleType = compression):
    model, seen = plain(), []
    pruning = module.SparseTraining(module.PruneConfig(0.8), begin=2, end=10, every=2)

    def watch(trainer, event, row):
        if event == "step": seen.append(copy.deepcopy({name: m.weight.detach() == 0 for name, m in linears(trainer.model).items()}))

    train(model, 14, callbacks=[pruning, watch])
    shares = [sum(int(z.sum()) for z in s.values()) / sum(z.numel() for z in s.values()) for s in seen]
    for step, share in enumerate(shares, 1):
        at = min(10, max(2, step)) // 2 * 2
        assert abs(share - 0.8 * (1 - (1 - (at - 2) / 8) ** 3)) < 0.01
    for earlier, later in zip(seen, seen[1:]): assert all((earlier[name] <= later[name]).all() for name in earlier)
    assert abs(sparsity_of(model) - 0.8) < 0.01


def test_gradual_pruning_ends_in_two_of_four():
    model = plain()
    train(model, callbacks=[SparseTraining(PruneConfig(pattern="2:4"), end=8, every=2)])
    for m in linears(model).values(): assert (m.weight == 0).unflatten(1, (-1, 4)).sum(-1).min() >= 2


# ---------------------------------------------------------------- bytes


def test_bytes_are_those_of_real_storage():
    model = plain()
    assert stored_bytes(model, "dense") == sum(p.nbytes for p in model.parameters())
    new = prune(model, PruneConfig(0.9))
    rest = sum(p.nbytes for p in new.parameters()) - sum(m.weight.nbytes for m in linears(new).values())
    bitmap, csr = rest, rest
    for m in linears(new).values():
        W = m.weight.detach()
        bitmap += pack((W != 0).flatten()[None].to(torch.uint8), 1).nbytes + W[W != 0].nbytes
        with warnings.catch_warnings():  # "in beta state"
            warnings.simplefilter("ignore")
            sparse = W.to_sparse_csr()
        csr += sparse.values().nbytes + sparse.col_indices().int().nbytes + sparse.crow_indices().int().nbytes
    assert stored_bytes(new, "bitmap") == bitmap and stored_bytes(new, "csr") == csr
    two = prune(model, PruneConfig(pattern="2:4"))
    n = sum(m.weight.numel() for m in linears(two).values())
    assert stored_bytes(two, "2:4") == rest + n // 2 * 4 + n // 8
    for layout in ("csr", "bitmap"): assert stored_bytes(model, layout) == stored_bytes(model, "dense")  # never more


# ---------------------------------------------------------------- smaller matrices

SHRINKABLE = [(kind, name) for kind, name in models.CASES if kind != "encoder-decoder" and name != "alibi"]


def silenced(model: Transformer, heads: list[list[int]], channels: list[list[int]]) -> Transformer:
    new, size = copy.deepcopy(model), model.config.attention.size
    for block, h, c in zip((new.decoder or new.encoder).blocks, heads, channels):
        for i in set(range(model.config.n_head)) - set(h): block.attention.out.weight.data[:, i * size : (i + 1) * size] = 0
        for i in set(range(model.config.hidden)) - set(c): block.mlp.down.weight.data[:, i] = 0
    return new


@pytest.mark.parametrize("kind, variant", SHRINKABLE)
def test_a_smaller_model_equals_the_masked_one(kind, variant, module: ModuleType = compression):
    model = models.make(kind, variant, **NO_GROUPS)
    heads, channels = [[0, 3], [1, 2]], [[0, 5, 7, 30], [1, 2, 3, 4]]
    small, ids = module.shrink(model, heads, channels), models.ids(2, 9)
    models.close(small(ids), silenced(model, heads, channels)(ids), 1e-4)
    assert type(small) is Transformer and (small.config.n_head, small.config.d_ff, small.config.n_layer) == (2, 4, 2)
    assert sum(p.numel() for p in small.parameters()) == count_parameters(small.config) < count_parameters(model.config)
    assert (small.out.weight is small.embed.tokens.weight) == model.config.tie
    assert TransformerConfig.from_dict(small.config.to_dict()) == small.config


def test_a_layer_that_goes_adds_nothing(module: ModuleType = compression):
    model, ids = models.make("decoder", "gpt2", n_layer=3), models.ids(2, 9)
    quiet = copy.deepcopy(model)
    block = quiet.decoder.blocks[1]
    for layer in (block.attention.out, block.mlp.down):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    small = module.shrink(model, layers=[0, 2])
    models.close(small(ids), quiet(ids), 1e-4)
    both = module.shrink(model, heads=[[0], [2]], layers=[0, 2])
    models.close(both(ids), silenced(small, [[0], [2]], [range(model.config.hidden)] * 2)(ids), 1e-4)


def test_a_smaller_model_is_used_and_trained_as_any_other():
    model = plain()
    small = shrink(model, 2, 8, by=importance(model, ROWS))
    ids = models.ids(2, 9)
    cache = KVCache(2)
    models.close(torch.cat([small(ids[:, t : t + 1], cache=cache) for t in range(9)], 1), small(ids), 1e-4)
    assert len(generate(small, [1, 2], SamplingConfig(max_new_tokens=5))[0]) == 5
    before = copy.deepcopy(small.state_dict())
    train(small, 2)
    assert all(not torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(plain().parameters(), model.parameters()))
    assert shrink(model).config.n_layer == 2 and shrink(copy.deepcopy(model).train(), 2, by=importance(model, ROWS)).training


def test_a_body_without_scores_and_the_dice_stay_as_they_are():
    model, ids = plain(), models.ids(2, 9)
    whole = shrink(model, channels=[[0, 1]] * 2).hidden(ids)
    model.drop_scores()
    state = torch.get_rng_state()
    body = shrink(model, channels=[[0, 1]] * 2)
    assert torch.equal(torch.get_rng_state(), state) and not body.has_scores
    models.close(body.hidden(ids), whole)


def test_importance_is_the_slope_of_a_gate(module: ModuleType = compression):
    model = models.make("decoder", "gpt2")
    found, c = module.importance(model, ROWS), model.config
    heads, channels, layers = torch.zeros(2, c.n_head), torch.zeros(2, c.hidden), torch.zeros(2)
    for row in ROWS:
        gates = [(torch.ones(c.n_head, requires_grad=True), torch.ones(c.hidden, requires_grad=True), torch.ones((), requires_grad=True))
                 for _ in range(2)]
        hooks = []
        for block, (h, f, all_) in zip(model.decoder.blocks, gates):
            hooks += [
                block.attention.out.register_forward_pre_hook(lambda m, x, h=h: (x[0] * h.repeat_interleave(x[0].shape[-1] // len(h)),)),
                block.mlp.down.register_forward_pre_hook(lambda m, x, f=f: (x[0] * f,)),
                block.attention.out.register_forward_hook(lambda m, x, y, g=all_: y * g),
                block.mlp.down.register_forward_hook(lambda m, x, y, g=all_: y * g),
            ]
        ids = torch.tensor([row])
        F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).backward()
        for hook in hooks: hook.remove()
        for i, (h, f, all_) in enumerate(gates):
            for total, gate in ((heads[i], h), (channels[i], f), (layers[i], all_)): total += gate.grad.abs() / len(ROWS)
    for ours, theirs in zip(found, (heads, channels, layers)): torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- low rank


def test_factors_are_the_best_of_their_rank(module: ModuleType = compression):
    W, H = matrix(10, 16), hessian()
    L = torch.linalg.cholesky(H)
    for rank in (1, 4, 9):
        left, right = module.low_rank_factors(W, rank)
        assert left.shape == (10, rank) and right.shape == (rank, 16)
        assert float((left @ right - W).square().sum()) == pytest.approx(float(torch.linalg.svdvals(W)[rank:].square().sum()))
        left, right = module.low_rank_factors(W, rank, H, damping=0)
        assert change(left @ right, W, H) == pytest.approx(float(torch.linalg.svdvals(W @ L)[rank:].square().sum()), rel=1e-6)
    for H_ in (None, H, torch.zeros(16, 16)):
        left, right = module.low_rank_factors(W, 10, H_)
        torch.testing.assert_close(left @ right, W)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_a_model_of_thin_matrices(variant):
    model, ids = models.make("decoder", variant), models.ids(2, 9)
    for texts in (None, ROWS):
        new = low_rank(model, 0.6, texts)
        layers = [m for m in new.modules() if isinstance(m, LowRankLinear)]
        assert len(layers) == len(linears(model))
        for m in layers:
            x = torch.randn(3, m.in_features)
            torch.testing.assert_close(m(x), F.linear(x, m.weight, m.low_rank[1].bias), rtol=1e-3, atol=1e-4)
            assert m.rank * (m.in_features + m.out_features) <= 0.6 * m.in_features * m.out_features
        assert sum(p.numel() for p in new.parameters()) < sum(p.numel() for p in model.parameters())
    one = low_rank(model, 0.6, targets=("decoder.blocks.0.mlp.up",))
    swapped, layer = copy.deepcopy(model), one.decoder.blocks[0].mlp.up
    swapped.decoder.blocks[0].mlp.up.weight.data = layer.weight.detach()
    models.close(one(ids), swapped(ids), 1e-4)
    train(new, 2)
    assert len(generate(new, [1, 2], SamplingConfig(max_new_tokens=5))[0]) == 5
    quantize(new, QuantizeConfig(8, None))
    assert 0.4 < sparsity_of(prune(new)) < 0.6


# ---------------------------------------------------------------- a teacher


def test_the_loss_is_kl_div_of_pytorch(module: ModuleType = compression):
    a, b = matrix(5, 30), matrix(5, 30, 1)
    for T in (0.5, 1.0, 4.0):
        theirs = F.kl_div((a / T).log_softmax(-1), (b / T).log_softmax(-1), reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(module.distill_loss(a, b, T), T**2 * theirs)
    assert module.distill_loss(a, a).abs().max() < 1e-12 and (module.distill_loss(a, b) > 0).all()
    z = a.clone().requires_grad_()
    module.distill_loss(z, b).sum().backward()
    torch.testing.assert_close(z.grad, a.softmax(-1) - b.softmax(-1))
    assert module.distill_loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def batch() -> Batch: return next(iter(Examples([ROWS[0], ROWS[1][:5]], batch_size=2)))


def test_padding_is_not_learned_and_a_twin_has_nothing_to_learn(module: ModuleType = compression):
    teacher = plain(seed=3)
    for config in (module.DistillConfig(1), module.DistillConfig(1, 2.0, 3.0)):
        with module.distilling(copy.deepcopy(teacher), teacher, config): pass
        twin = copy.deepcopy(teacher)
        with module.distilling(twin, teacher, config) as loss: total, n = loss(twin, batch())
        assert n == 15 and abs(total.item()) < 1e-3
    student = plain(seed=4)
    with module.distilling(student, teacher, module.DistillConfig(0)) as loss:
        ours, theirs = loss(student, batch()), next_token_loss(student, batch())
        torch.testing.assert_close(ours[0], theirs[0])
    with module.distilling(student, teacher, module.DistillConfig(1)) as loss: both = loss(student, batch())[0]
    alone = 0.0
    for row in (ROWS[0], ROWS[1][:5]):
        ids = torch.tensor([row[:-1]])
        alone += distill_loss(student(ids), teacher(ids)).sum()
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def test_packed_rows_are_told_apart():
    teacher, student = plain(seed=3), plain(seed=4)
    packed = next(iter(Examples([ROWS[0][:6], ROWS[1][:5]], batch_size=1, length=12, pack=True)))
    apart = [torch.tensor([row[:-1]]) for row in (ROWS[0][:6], ROWS[1][:5])]
    with distilling(student, teacher, DistillConfig(1)) as loss: together = loss(student, packed)[0]
    torch.testing.assert_close(together, sum(distill_loss(student(x), teacher(x)).sum() for x in apart), rtol=1e-4, atol=1e-4)


def test_a_student_learns_and_its_teacher_stays():
    teacher, before = plain(seed=3).train(), copy.deepcopy(plain(seed=3).state_dict())
    for d_model in (32, 16):
        student = plain(seed=4, d_model=d_model)
        names = {name for name, _ in student.named_parameters()}
        with distilling(student, teacher, DistillConfig(0.9, 2.0, 1.0)) as loss:
            first = float(loss(student, batch())[0].detach())
            train(student, 40, loss=loss)
            assert float(loss(student, batch())[0].detach()) < first
        assert {name for name, _ in student.named_parameters()} == names
        assert teacher.training and all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())


# ---------------------------------------------------------------- bad input


def with_nan() -> Transformer:
    model = plain()
    model.decoder.blocks[1].mlp.down.weight.data[0, 0] = torch.nan
    return model


def with_lora() -> Transformer:
    model = plain()
    apply_lora(model, LoraConfig(rank=2))
    return model


def teach(student: nn.Module, teacher: nn.Module, **config: Any) -> None:
    with distilling(student, teacher, DistillConfig(**config)): pass


WRONG = [
    (lambda: PruneConfig(1.0), "sparsity=1.0 must be at least 0 and below 1"),
    (lambda: PruneConfig(-0.1), "sparsity=-0.1 must be"), (lambda: PruneConfig(float("nan")), "sparsity=nan"),
    (lambda: PruneConfig(0.5, "size"), "There is no method='size'"),
    (lambda: PruneConfig(0.6, pattern="2:4"), "take sparsity=0.5, not 0.6"),
    (lambda: PruneConfig(0.5, "sparsegpt", "row"), "take scope='matrix'"), (lambda: PruneConfig(0.5, "wanda", "global"), "do not compare"),
    (lambda: PruneConfig(targets="down"), "give a tuple"),
    (lambda: prune(plain(d_model=20, d_ff=30, d_head=6), PruneConfig(pattern="2:4")), "has 30 inputs, and 2:4 takes them four by four"),
    (lambda: prune(plain(), PruneConfig(targets=("keys",))), "no linear layer 'keys'"),
    (lambda: prune(with_nan()), "decoder.blocks.1.mlp.down holds a weight that is NaN"),
    (lambda: prune(with_lora()), "merge_lora"), (lambda: prune(quantize(plain(), QuantizeConfig(8, None))), "is quantised"),
    (lambda: prune(nn.Sequential(nn.ReLU())), "no plain linear layer"),
    (lambda: prune(plain(), PruneConfig(method="wanda")), "give calibration="),
    (lambda: prune(plain(), PruneConfig(method="taylor"), []), "No calibration text has two tokens"),
    (lambda: prune(plain(), PruneConfig(method="taylor"), [[3]]), "No calibration text has two tokens"),
    (lambda: prune(plain(), PruneConfig(method="sparsegpt"), "a text"), "give a list of texts"),
    (lambda: prune(plain(), PruneConfig(method="sparsegpt"), ["a text"]), "pass the model's tokenizer="),
    (lambda: prune(plain(), PruneConfig(method="sparsegpt"), [[1, 2, 99]]), "The id 99 is no token"),
    (lambda: prune(plain(), PruneConfig(method="taylor"), ["abc"], CharTokenizer.train(["abc"])), "do they belong together"),
    (lambda: prune(models.make("encoder", "bert"), PruneConfig(method="taylor"), ROWS), "needs a model that predicts"),
    (lambda: keep_mask({"a": torch.full((2, 2), torch.nan)}, PruneConfig()), "must be a matrix of numbers"),
    (lambda: sparse_gpt(matrix(), hessian(8)), "is \\(16, 16\\), not \\(8, 8\\)"),
    (lambda: sparse_gpt(matrix() / 0, hessian()), "NaN or infinity"),
    (lambda: sparse_gpt(matrix(), hessian() * torch.nan), "Hessian is not finite"),
    (lambda: sparse_gpt(matrix(), -hessian(), PruneConfig(method="sparsegpt")), "no inverse"),
    (lambda: sparse_gpt(matrix(), hessian(), block=6), "multiple of 4"),
    (lambda: SparseTraining(PruneConfig(method="random"), end=5), "take method='magnitude'"),
    (lambda: SparseTraining(PruneConfig(), begin=5, end=5), "a step after begin=5"),
    (lambda: train(plain(), 4, callbacks=[SparseTraining(PruneConfig(), end=9)]), "ends at step 9, and the training at 4"),
    (lambda: stored_bytes(plain(), "zip"), "There is no layout='zip'"), (lambda: stored_bytes(plain(), "2:4"), "is not 2:4"),
    (lambda: shrink(plain(), [[], []]), "leaves a layer with none"), (lambda: shrink(plain(), [[0, 1], [0]]), "as many in each layer"),
    (lambda: shrink(plain(), [[0], [4]]), "heads run from 0 to 3"), (lambda: shrink(plain(), [[0]]), "for each of the 2 layers"),
    (lambda: shrink(plain(), 2), "give by=importance"), (lambda: shrink(plain(), 0, by=importance(plain(), ROWS)), "at least 1"),
    (lambda: shrink(plain(), 5, by=importance(plain(), ROWS)), "no more can stay"),
    (lambda: shrink(plain(), layers=[]), "leave"), (lambda: shrink(plain(), layers=[2]), "layers run from 0 to 1"),
    (lambda: shrink(plain(), 2, by=importance(plain(n_head=2), ROWS)), "of another model"),
    (lambda: shrink(models.make("decoder", "llama"), [[0], [0]]), "share keys"),
    (lambda: shrink(models.make("decoder", "alibi", n_kv_head=None), [[0], [0]]), "ALiBi"),
    (lambda: shrink(models.make("encoder-decoder", "gpt2"), layers=[0]), "two stacks"), (lambda: shrink(nn.Linear(2, 2)), "not a Linear"),
    (lambda: shrink(with_experts(plain(), MoEConfig(n_expert=2, top_k=1)), [[0], [0]]), "shrink first"),
    (lambda: shrink(low_rank(plain(), 0.6), [[0], [0]]), "shrink first"),
    (lambda: low_rank(plain(), 1.0), "below 1"), (lambda: low_rank(plain(), 0.01), "leaves no rank"),
    (lambda: low_rank_factors(matrix(), 7), "at most rank 6, not 7"), (lambda: low_rank_factors(matrix(), 0), "rank=0"),
    (lambda: low_rank_factors(matrix(), 3, hessian(8)), "not \\(8, 8\\)"),
    (lambda: distill_loss(torch.ones(2, 3), torch.ones(2, 4)), "need one vocabulary"),
    (lambda: distill_loss(torch.ones(2, 3), torch.ones(5, 3)), "not of the same positions"),
    (lambda: distill_loss(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature=0.0 must be above 0"),
    (lambda: DistillConfig(1.5), "from 0 to 1"), (lambda: DistillConfig(temperature=-1.0), "temperature"),
    (lambda: teach(plain(), Transformer(TransformerConfig(50, 8, 1, 2))), "scores 41 tokens and the teacher 50"),
    (lambda: teach(plain(), models.make("encoder", "bert")), "needs a model that predicts"),
    (lambda: teach(plain(), nn.Embedding(41, 41), hidden=1.0), "take hidden=0"),
    (lambda: teach(*[plain()] * 2), "its own teacher"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(CompressionError, match=message): call()


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("old, new, check", [
    ("s.topk(n, 1, largest=False)", "s.topk(n, 1)", test_as_many_go_as_are_asked_for_even_if_all_are_alike),
    ("s.unflatten(1, (-1, 4)).flatten(0, 1)).view(s.shape)", "s.view(-1, 2, 2).mT.reshape(-1, 4)).view(s.shape)",
     test_two_of_four_keeps_the_best_pair_of_each_four),
    ("layer.weight.grad).square()", "layer.weight.grad)", test_by_gradient_is_as_by_hand),
    ("seen.hessian.diagonal().sqrt()", "seen.mean", test_wanda_is_as_by_hand),
    ("(gone / U[j, j])[:, None]", "(gone / U[j, j].square())[:, None]",
     lambda module: test_sparse_gpt_is_least_squares_column_by_column(16, module)),
    ("left = 1 - min(1.0,", "left = 1.1 - min(1.0,", test_gradual_pruning_follows_its_schedule_and_nothing_comes_back),
    ("m.weight.detach().abs(), -1)", "m.weight.detach().abs(), 9)", test_gradual_pruning_follows_its_schedule_and_nothing_comes_back),
    ("            self._put()\n", "            pass\n", lambda module: test_zeros_stay_zero_and_all_else_learns(muon_and_adamw, module)),
    ("_take(block.attention.out, index, 1)", "_take(block.attention.out, index.flip(0), 1)",
     lambda module: test_a_smaller_model_equals_the_masked_one("decoder", "gpt2", module)),
    ('"d_head": c.attention.size}', '"d_head": None}',
     lambda module: test_a_smaller_model_equals_the_masked_one("decoder", "window", module)),
    ("layers[i] += (out.sum() + down.sum() + rest).abs()", "layers[i] += (out.sum() + down.sum()).abs()",
     test_importance_is_the_slope_of_a_gate),
    ("torch.linalg.svd(W @ L,", "torch.linalg.svd(W @ L.T,", test_factors_are_the_best_of_their_rank),
    ("temperature**2 * F.kl_div", "temperature * F.kl_div", test_the_loss_is_kl_div_of_pytorch),
    ("there = batch.targets != IGNORE", "there = batch.targets != -1", test_padding_is_not_learned_and_a_twin_has_nothing_to_learn),
])  # fmt: skip
def test_a_fault_is_found(old, new, check, monkeypatch):
    faulty = planted(compression, old, new, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError, pytest.fail.Exception)): check(module=faulty)


def test_low_rank_takes_a_hessian_that_rounding_has_made_indefinite(module=compression):
    "Inputs that span few directions, added up in float32, as real calibration texts are."
    torch.manual_seed(0)
    x = (torch.randn(4000, 6) @ torch.randn(6, 128) * 100).float()
    H = (x.T @ x / len(x)).float()
    assert torch.linalg.eigvalsh(H.double()).min() < 0
    W = torch.randn(32, 128)
    left, right = module.low_rank_factors(W, 6, H)
    assert ((left @ right - W) @ x.T).norm() < 1e-3 * (W @ x.T).norm()  # six directions are all there is to keep
    with pytest.raises(module.CompressionError, match="has no inverse: take more than damping=0"):
        module.low_rank_factors(W, 6, torch.diag(torch.tensor([1.0] * 127 + [0.0])), damping=0)
