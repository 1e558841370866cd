"""Secrets against brute force; attacks against their formulas; private gradients and budgets against Opacus, integrals and closed forms."""

from __future__ import annotations

import itertools
import math
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmbook.privacy as privacy
from lmbook.batches import IGNORE, Batch
from lmbook.checkpoints import Checkpoints
from lmbook.core import LmbookError
from lmbook.privacy import (
    Attack,
    PoissonLots,
    PrivacyAccountant,
    PrivacyConfig,
    PrivacyError,
    PrivateLoss,
    PrivateTrainer,
    clip_examples,
    exposure,
    membership_attack,
    per_example_gradients,
    sampled_gaussian_rdp,
)
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted

WORDS = WordTokenizer.train(["the safe of Emma opens with zero one two three"])
CHOICES = ["zero", "one", "two", "three"]
V = WORDS.vocab_size


def small(seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "n_layer": 1, "n_head": 2, "context_length": 16, "init": "xavier_uniform"} | changes
    return Transformer(TransformerConfig(changes.pop("vocab_size", V), **{k: v for k, v in sizes.items() if k != "vocab_size"}))


def texts(n: int = 6, T: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    ids, targets = torch.randint(V, (2, n, T), generator=dice)
    targets[1, 3:] = IGNORE
    return ids, targets


# ---------------------------------------------------------------- secrets


class Fixed(nn.Module):
    "Gives each digit a probability of its own, whatever stands before it."

    def __init__(self, scores: list[float]):
        super().__init__()
        self.scores = torch.full((V,), -20.0)
        for digit, score in zip(CHOICES, scores): self.scores[WORDS.encode(f" {digit}")[0]] = score

    def forward(self, ids: torch.Tensor) -> torch.Tensor: return self.scores.expand(*ids.shape, -1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_rank_is_what_brute_force_finds(length, module=privacy):
    model = small().eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)  # so that candidates differ
    for secret in itertools.islice(itertools.product(CHOICES, repeat=length), 0, None, 7):
        found = module.exposure(model, WORDS, "the safe of Emma", secret, CHOICES, batch_size=3)
        scores = {}
        for other in itertools.product(CHOICES, repeat=length):
            ids = torch.tensor([WORDS.encode("the safe of Emma " + " ".join(other), bos=True)])
            with torch.no_grad(): log_p = model(ids).log_softmax(-1)[0]
            scores[other] = sum(log_p[t - 1, ids[0, t]].item() for t in range(ids.shape[1] - length, ids.shape[1]))
        rank = 1 + sum(score > scores[tuple(secret)] + 1e-6 for score in scores.values())
        assert (found.rank, found.candidates) == (rank, 4**length)
        assert found.bits == pytest.approx(math.log2(4**length / rank))
        assert found.probability == pytest.approx(math.exp(scores[secret]), 1e-4)


def test_who_prefers_nothing_knows_nothing_and_equals_count_half(module=privacy):
    even = module.exposure(Fixed([0, 0, 0, 0]), WORDS, "the", ["two", "three"], CHOICES)
    assert even.rank == 8.5 and even.bits < 1
    some = module.exposure(Fixed([5, 1, 1, 0]), WORDS, "the", ["one"], CHOICES)
    assert some.rank == 2.5
    assert module.exposure(Fixed([5, 1, 1, 0]), WORDS, "the", ["zero"] * 3, CHOICES).bits == 6.0


def test_a_mode_stays_as_it_was():
    model = small(dropout=0.5)
    assert exposure(model, WORDS, "the", ["one"], CHOICES) == exposure(model, WORDS, "the", ["one"], CHOICES) and model.training


@pytest.mark.parametrize(("change", "says"), [
    ({"secret": ["seven"]}, "'seven' is not one token"), ({"secret": []}, "secret is a list"), ({"secret": "one"}, "secret is a list"),
    ({"secret": [""]}, "is no word"), ({"secret": ["safe"]}, "'safe' is not among the choices"),
    ({"choices": ["one", "nine"]}, "'nine' is not one"),
    ({"secret": ["one"] * 11}, "more than a million"), ({"batch_size": 0}, "batch_size=0"),
])  # fmt: skip
def test_a_secret_that_cannot_be(change, says):
    with pytest.raises(PrivacyError, match=says):
        exposure(small(), WORDS, **({"prompt": "the", "secret": ["one"], "choices": CHOICES} | change))


def test_an_encoder_tells_no_secrets():
    with pytest.raises(PrivacyError, match="next token"): exposure(small(kind="encoder"), WORDS, "the", ["one"], CHOICES)
    with pytest.raises(PrivacyError, match="NaN"): exposure(Fixed([math.nan, 0, 0, 0]), WORDS, "the", ["one"], CHOICES)


# ---------------------------------------------------------------- membership


def test_attacks_are_their_formulas(module=privacy):
    rng = np.random.default_rng(0)
    losses, members, known = rng.normal(size=40), rng.random(40) < 0.5, rng.normal(size=40)
    others, inside = rng.normal(size=(9, 40)), np.tile(np.arange(9)[:, None] % 2 == 0, (1, 40))
    assert np.array_equal(module.membership_attack(losses, members).scores, -losses)
    assert np.allclose(module.membership_attack(losses, members, known=known).scores, known - losses)
    assert np.allclose(module.membership_attack(losses, members, others=others).scores, others.mean(0) - losses)
    by = module.membership_attack(losses, members, others=others, inside=inside, by="difference").scores
    assert np.allclose(by, others[1::2].mean(0) - losses)
    ratio = module.membership_attack(losses, members, others=others, inside=inside).scores
    terms = []
    for table in (others[::2], others[1::2]):
        mean, variance = table.mean(0), ((table - table.mean(0)) ** 2).sum() / (table.size - 40)
        terms.append(-((losses - mean) ** 2) / 2 / variance - math.log(2 * math.pi * variance) / 2)
    assert np.allclose(ratio, terms[0] - terms[1])


def test_the_likelihood_ratio_finds_what_the_loss_cannot(module=privacy):
    "Texts of very different costs, of which each reader pays half a nat less."
    rng = np.random.default_rng(1)
    cost, inside = rng.normal(0, 5, 200), rng.random((20, 200)) < 0.5
    table = cost - 0.5 * inside + 0.1 * rng.normal(size=(20, 200))
    loss = module.membership_attack(table[0], inside[0])
    ratio = module.membership_attack(table[0], inside[0], others=table[1:], inside=inside[1:])
    assert loss.area < 0.65 and ratio.area > 0.99 and ratio.found(0.05) > 0.95


def test_the_share_found_is_read_off_the_curve(module=privacy):
    members = np.array([1, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    attack = module.Attack(-np.arange(8.0), members)
    assert [attack.found(rate) for rate in (0.25, 0.5, 0.74, 0.75, 1.0)] == [0.75, 0.75, 0.75, 1.0, 1.0]
    assert attack.area == pytest.approx(12 / 16)
    with pytest.raises(PrivacyError, match="at least 100"): attack.found(0.01)


@pytest.mark.parametrize(("arguments", "says"), [
    (([1.0, 2.0], [True, True]), "nothing to tell apart"), (([1.0, 2.0], [True]), "one score for each"), (([], []), "one number for each"),
    (([1.0, math.nan], [True, False]), "NaN"), (([1.0, 2.0], [1, 0]), "true or false"),
])  # fmt: skip
def test_an_attack_that_cannot_be(arguments, says):
    with pytest.raises(PrivacyError, match=says): membership_attack(*arguments)


def test_other_models_that_do_not_help():
    losses, members, table = np.arange(2.0), np.array([True, False]), np.ones((3, 2))
    inside = np.array([[True, False], [False, True], [True, True]])
    for more, says in (({"known": losses, "others": table}, "not with both"), ({"inside": inside}, "give others="),
                       ({"others": table[0]}, "others is"), ({"others": table, "inside": inside[:2]}, "inside is"),
                       ({"others": table, "inside": inside}, "do not differ"), ({"others": table, "inside": ~inside & inside}, "none of"),
                       ({"others": table, "inside": inside | True}, "all other models"), ({"known": [1.0]}, "known has")):  # fmt: skip
        with pytest.raises(PrivacyError, match=says): membership_attack(losses, members, **more)


# ---------------------------------------------------------------- gradients


KINDS = {"gpt2": {}, "llama": {"norm": "rms", "positions": "rotary", "activation": "swiglu", "bias": False}, "shared": {"n_kv_head": 1}}


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_has_a_gradient_of_its_own(kind, module=privacy):
    model, (ids, targets) = small(**KINDS[kind]), texts()
    together, losses = module.per_example_gradients(model, ids, targets)
    alone, their_losses = module.per_example_gradients(model, ids, targets, method="loop")
    torch.testing.assert_close(losses, their_losses)
    assert together.keys() == dict(model.named_parameters()).keys()
    for name in together: torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()
    counts = (targets != IGNORE).sum(1, keepdim=True)
    nats = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(ids)
    (nats / counts).sum().backward()
    for name, p in model.named_parameters(): torch.testing.assert_close(together[name].sum(0), p.grad, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_have_none():
    model, (ids, targets) = small(), texts()
    model.embed.requires_grad_(False)
    found, _ = per_example_gradients(model, ids, targets)
    assert not any(name.startswith("embed") for name in found) and found
    model.requires_grad_(False)
    with pytest.raises(PrivacyError, match="no parameter"): per_example_gradients(model, ids, targets)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_opacus():
    module = pytest.importorskip("opacus").GradSampleModule
    ids, targets = texts()
    targets[targets == IGNORE] = 0
    here = {"tie": False, "positions": "rotary"}  # it takes the first axis of whatever a layer reads for the batch, of positions, too
    for model in (small(**here), nn.Sequential(nn.Embedding(V, 6), nn.LayerNorm(6), nn.Linear(6, V))):
        found, _ = per_example_gradients(model, ids, targets)
        theirs = module(model, loss_reduction="sum")
        F.cross_entropy(theirs(ids).flatten(0, 1), targets.flatten(), reduction="sum").backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name] * ids.shape[1], p.grad_sample, rtol=1e-3, atol=1e-5)
        theirs.remove_hooks()


def test_nobody_changes_the_sum_by_more_than_the_clip(module=privacy):
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        sizes = torch.linspace(0.1, 3, 7)  # some are longer than the clip, some are not
        rows = {"a": sizes[:, None, None] * torch.randn(7, 2, 3, generator=dice), "b": sizes * torch.randn(7, generator=dice)}
        whole, norms = module.clip_examples(rows, 1.5)
        expected = torch.cat([rows["a"].flatten(1), rows["b"][:, None]], 1).norm(dim=1)
        torch.testing.assert_close(norms, expected)
        for i in range(7):
            rest, _ = module.clip_examples({name: torch.cat([g[:i], g[i + 1 :]]) for name, g in rows.items()}, 1.5)
            change = torch.cat([(whole[name] - rest[name]).flatten() for name in rows]).norm().item()
            assert change == pytest.approx(min(1.5, norms[i].item()), rel=1e-4)


def test_no_norm_bounds_what_is_no_number():
    with pytest.raises(PrivacyError, match="NaN or infinite"): clip_examples({"a": torch.tensor([[1.0], [math.inf]])}, 1.0)
    with pytest.raises(PrivacyError, match="clip=0.0"): clip_examples({"a": torch.ones(2, 2)}, 0.0)
    zero, _ = clip_examples({"a": torch.zeros(2, 2)}, 1.0)
    assert not zero["a"].any()


class Mixes(nn.Module):
    "Looks at the other texts of its batch."

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, 4), nn.Linear(4, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.out(x - x.mean(0, keepdim=True))


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(V, 4), nn.BatchNorm1d(4), nn.Linear(4, V)

    def forward(self, ids: torch.Tensor) -> torch.Tensor: return self.out(self.norm(self.embed(ids).mT).mT)


ROWS = [[1, *(int(i) for i in row), 2] for row in np.random.default_rng(0).integers(4, V, (40, 5))]
PLAN = TrainConfig(steps=4, lr=0.01, device="cpu")


@pytest.mark.parametrize(("model", "plan", "config", "says"), [
    (WithBatchNorm, {}, {}, "BatchNorm1d: it mixes"), (Mixes, {}, {}, "depends on the other texts"),
    (small, {}, {"delta": 0.03}, "below 1 / 40"), (small, {}, {"lot": 41}, "above 1"), (small, {}, {"group": 41}, "more than the 40"),
    (small, {"accumulate": 2}, {}, "accumulate="), (small, {"dtype": "bfloat16"}, {}, "dtype="),
    (lambda: small(kind="encoder"), {}, {}, "next token"),
])  # fmt: skip
def test_what_would_break_the_promise_is_refused_before_anything_is_trained(model, plan, config, says):
    made = model()
    before = {name: p.clone() for name, p in made.named_parameters()}
    with pytest.raises(PrivacyError, match=says):
        config = PrivacyConfig(**{"noise": 1.0, "lot": 8, **config})
        PrivateTrainer(made, ROWS, TrainConfig(**{"steps": 4, "device": "cpu", **plan}), config).fit()
    assert all(torch.equal(before[name], p) for name, p in made.named_parameters())


@pytest.mark.parametrize(("settings", "says"), [
    ({}, "either epsilon= or noise="), ({"epsilon": 1.0, "noise": 1.0}, "not both"), ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"epsilon": -1.0}, "epsilon=-1.0"), ({"noise": 0.0}, "noise=0.0"), ({"noise": 1.0, "clip": 0.0}, "clip=0.0"),
    ({"noise": 1.0, "delta": 0.0}, "delta=0.0"), ({"noise": 1.0, "delta": 1.0}, "delta=1.0"), ({"noise": 1.0, "lot": 0}, "lot=0"),
    ({"noise": 1.0, "method": "both"}, "method='both'"), ({"noise": 1.0, "group": 2, "accounting": "rdp"}, "accounting='pld'"),
    ({"noise": 1.0, "seed": -1}, "seed=-1"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(PrivacyError, match=says): PrivacyConfig(**settings)


# ---------------------------------------------------------------- lots and training


def test_each_example_has_dice_of_its_own(module=privacy):
    lots = module.PoissonLots(ROWS, 8, seed=3)
    drawn = np.zeros((0, 40), dtype=bool)
    for epoch in range(400):
        for lot in lots.plan(epoch): drawn = np.vstack([drawn, np.isin(np.arange(40), [i for [i] in lot])])
    assert len(drawn) == 2000 and abs(drawn.mean() - 0.2) < 0.01
    assert drawn.sum(1).std() == pytest.approx(math.sqrt(40 * 0.2 * 0.8), rel=0.1)  # a binomial number, not always 8
    pairs = np.corrcoef(drawn.T.astype(float)) - np.eye(40)
    assert np.abs(pairs).max() < 0.12


def test_an_empty_lot_is_a_lot():
    lots = PoissonLots(ROWS[:4], 1, seed=0)
    sizes = {len(item) for epoch in range(30) for item in lots.plan(epoch)}
    assert 0 in sizes
    batch = lots.make([])
    assert batch.tokens == 0
    found, _ = PrivateLoss(2.0, 0.5, 4, seed=0).gradient(small(), batch)
    values = torch.cat([g.flatten() for g in found.values()])
    assert values.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.1) and abs(values.mean()) < 0.03  # noise, and nothing else
    loss, count = PrivateLoss(2.0, 0.5, 4, seed=0)(small(), batch)
    assert loss.item() == 0 and count == 1


def test_seeds_are_secret_unless_told():
    one, two = PoissonLots(ROWS, 8), PoissonLots(ROWS, 8)
    assert one.seed != two.seed and PrivateLoss(1.0, 1.0, 8).seed != PrivateLoss(1.0, 1.0, 8).seed


def test_a_private_gradient_is_clipped_and_noisy(module=privacy):
    model, (ids, targets) = small(), texts()
    batch = Batch(ids, targets)
    each, losses = per_example_gradients(model, ids, targets)
    norms = sum(g.flatten(1).pow(2).sum(1) for g in each.values()).sqrt()
    C = norms.median().item()
    expected = {name: torch.stack([row * min(1.0, C / n) for row, n in zip(g, norms.tolist())]).sum(0) / 5 for name, g in each.items()}
    quiet, values = module.PrivateLoss(1e-9, C, 5, at_once=4).gradient(model, batch)
    torch.testing.assert_close(values, losses)
    for name in quiet: torch.testing.assert_close(quiet[name], expected[name], rtol=1e-3, atol=1e-6)
    noise = torch.cat([(g - expected[name]).flatten() for name, g in module.PrivateLoss(3.0, C, 5).gradient(model, batch)[0].items()])
    assert noise.std().item() == pytest.approx(3.0 * C / 5, rel=0.1)


def test_training_takes_the_private_gradient(module=privacy):
    model, twin = small(), small()
    plan = TrainConfig(steps=3, lr=0.5, optimizer="sgd", schedule=lambda step, total: 1.0, clip=None, device="cpu")
    config = module.PrivacyConfig(noise=0.7, clip=0.3, lot=8, seed=5)
    trainer = module.PrivateTrainer(model, ROWS, plan, config)
    trainer.fit()
    lots, loss = PoissonLots(ROWS, 8, seed=5), PrivateLoss(0.7, 0.3, 8, seed=5)
    for item in lots.plan(0)[:3]:
        found, _ = loss.gradient(twin, lots.make(item))
        with torch.no_grad():
            for name, p in twin.named_parameters(): p -= 0.5 * found[name]
    for mine, theirs in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert trainer.spent() == PrivacyAccountant().add(0.7, 0.2, 3).epsilon(1e-5) and trainer.spent(0) == 0


def test_a_run_that_was_stopped_goes_on_with_the_same_dice(tmp_path):
    def trainer(folder: str, seed: int | None, stop: int | None = None) -> PrivateTrainer:
        def end(trainer: Trainer, event: str, row: Any) -> None:
            if event == "step" and trainer.step == stop: trainer.stop("interrupted")

        config = PrivacyConfig(epsilon=3.0, lot=8, seed=seed)
        made = PrivateTrainer(small(), ROWS, TrainConfig(steps=6, lr=0.01, device="cpu"), config, callbacks=[end],
                              checkpoints=Checkpoints(tmp_path / folder))
        made.fit()
        return made

    whole = trainer("whole", 4)
    trainer("parts", 4, stop=2)
    again = trainer("parts", None)  # another secret seed: the checkpoint's is taken
    assert again.step == 6 and again.noise == whole.noise
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters()): torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_budget_becomes_noise(module=privacy):
    trainer = module.PrivateTrainer(small(), ROWS, PLAN, module.PrivacyConfig(epsilon=2.0, lot=8, seed=0))
    trainer.fit()
    assert 1.9 < trainer.spent() <= 2.0 and trainer.spent(2) < trainer.spent() and trainer.loss.noise == trainer.noise
    careful = module.PrivateTrainer(small(), ROWS, PLAN, module.PrivacyConfig(epsilon=2.0, lot=8, group=3, seed=0))
    assert careful.noise > 2 * trainer.noise and careful.spent(4) <= 2.0


def test_an_evaluation_has_no_noise():
    model, (ids, targets) = small(), texts()
    with torch.no_grad():
        value, count = PrivateLoss(5.0, 1.0, 8)(model, Batch(ids, targets))
        expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert count == (targets != IGNORE).sum() and torch.equal(value, expected)


# ---------------------------------------------------------------- budgets

CASES = [(1.0, 0.05, 200), (0.8, 0.01, 1000), (2.0, 0.25, 100), (0.6, 0.002, 3000), (4.0, 0.5, 500)]


def _quiet() -> Any: return warnings.catch_warnings(action="ignore")


def gaussian_delta(epsilon: float, noise: float) -> float: # Balle and Wang 2018, theorem 8
    def phi(x: float) -> float: return math.erfc(-x / math.sqrt(2)) / 2

    return phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)


@pytest.mark.parametrize(("noise", "rate", "steps"), CASES)
def test_moments_are_those_of_opacus(noise, rate, steps, module=privacy):
    theirs = pytest.importorskip("opacus.accountants").RDPAccountant()
    orders = [order for order in module.ORDERS if order <= 256]  # beyond, their binomials overflow
    theirs.history = [(noise, rate, steps)]
    with _quiet(): expected = theirs.get_epsilon(1e-5, alphas=orders)
    assert module.PrivacyAccountant("rdp", orders).add(noise, rate, steps).epsilon(1e-5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("noise", "rate", "steps"), CASES)
def test_the_loss_distribution_is_that_of_opacus(noise, rate, steps, module=privacy):
    theirs = pytest.importorskip("opacus.accountants").PRVAccountant()
    theirs.history = [(noise, rate, steps)]
    with _quiet(): expected = theirs.get_epsilon(1e-5, eps_error=0.001)
    assert module.PrivacyAccountant().add(noise, rate, steps).epsilon(1e-5) == pytest.approx(expected, rel=0.01)


def test_a_moment_is_an_integral(module=privacy):
    z = np.linspace(-40, 60, 1_000_001)
    for noise, rate in ((1.0, 0.1), (2.5, 0.6), (0.9, 1.0)):
        zero = -(z**2) / 2 / noise**2 - math.log(noise * math.sqrt(2 * math.pi))
        ratio = np.log(1 - rate + rate * np.exp((2 * z - 1) / 2 / noise**2))
        for order in (2, 3, 7):
            values = np.exp(zero + order * ratio)
            found = module.sampled_gaussian_rdp(noise, rate, [order])[0]
            assert found == pytest.approx(math.log(values.sum() * (z[1] - z[0])) / (order - 1), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_without_sampling_it_is_one_gaussian(steps, module=privacy):
    for noise in (0.7, 2.0, 9.0):
        spent = module.PrivacyAccountant().add(noise * math.sqrt(steps), 1.0, steps)
        for epsilon in (0.0, 0.3, 1.0, 2.5):
            exact = gaussian_delta(epsilon, noise)
            if exact > 1e-12: assert spent.delta(epsilon) == pytest.approx(exact, rel=1e-3)
            if exact > 1e-12: assert spent.delta(epsilon) > exact * (1 - 1e-6)  # a bound from above


@pytest.mark.parametrize("group", [1, 2, 5])
def test_one_step_is_an_integral(group, module=privacy):
    noise, rate = 1.3, 0.3
    z = np.linspace(-20, 30, 2_000_001)
    parts = [math.comb(group, j) * rate**j * (1 - rate) ** (group - j) for j in range(group + 1)]
    density = [np.exp(-((z - j) ** 2) / 2 / noise**2) / noise / math.sqrt(2 * math.pi) for j in range(group + 1)]
    mixed = sum(p * d for p, d in zip(parts, density))
    spent = module.PrivacyAccountant().add(noise, rate, 1, group)
    for epsilon in (0.1, 0.5, 1.5):
        areas = [np.maximum(0, p - math.exp(epsilon) * q).sum() * (z[1] - z[0]) for p, q in ((mixed, density[0]), (density[0], mixed))]
        assert spent.delta(epsilon) == pytest.approx(max(areas), rel=1e-3)


def test_a_group_without_sampling_is_less_noise(module=privacy):
    for group in (2, 7):
        mine, one = module.PrivacyAccountant().add(3.0, 1.0, 5, group), module.PrivacyAccountant().add(3.0 / group, 1.0, 5)
        assert mine.epsilon(1e-6) == pytest.approx(one.epsilon(1e-6), rel=1e-3)


def test_group_privacy_is_no_better_than_k_times(module=privacy):
    budgets = [module.PrivacyAccountant().add(1.0, 0.05, 200, group=k).epsilon(1e-5) for k in (1, 2, 3, 4)]
    assert all(budget > k * budgets[0] for k, budget in enumerate(budgets[1:], 2))
    for k in (2, 3, 4):  # and no worse than the general bound (Vadhan 2017, lemma 2.2)
        one = module.PrivacyAccountant().add(1.0, 0.05, 200)
        assert module.PrivacyAccountant().add(1.0, 0.05, 200, group=k).delta(k * 2.0) <= k * math.exp(k * 2.0) * one.delta(2.0)


def test_steps_of_different_kinds_add_up_in_any_order(module=privacy):
    kinds = [(1.0, 0.1, 30), (2.0, 0.3, 20), (1.5, 1.0, 2)]
    a, b = module.PrivacyAccountant(), module.PrivacyAccountant()
    for kind in kinds: a.add(*kind)
    for noise, rate, steps in reversed(kinds):
        for _ in range(2): b.add(noise, rate, steps // 2)
    assert a.epsilon(1e-5) == pytest.approx(b.epsilon(1e-5), rel=1e-9)
    assert a.epsilon(1e-5) > max(module.PrivacyAccountant().add(*kind).epsilon(1e-5) for kind in kinds)
    assert a.delta(a.epsilon(1e-5)) == pytest.approx(1e-5, rel=1e-3)
    assert module.PrivacyAccountant("rdp").add(*kinds[0]).add(*kinds[1]).epsilon(1e-5) > a.epsilon(1e-4) * 0.5


def test_the_two_accountings_agree_on_the_order():
    for noise, rate, steps in CASES:
        pld, rdp = (PrivacyAccountant(method).add(noise, rate, steps) for method in ("pld", "rdp"))
        assert pld.epsilon(1e-5) < rdp.epsilon(1e-5) < 1.4 * pld.epsilon(1e-5)
        assert rdp.delta(rdp.epsilon(1e-5)) == pytest.approx(1e-5, rel=1e-6)


def test_more_noise_and_fewer_steps_spend_less(module=privacy):
    def spent(noise: float, rate: float, steps: int) -> float: return module.PrivacyAccountant().add(noise, rate, steps).epsilon(1e-5)

    base = spent(1.0, 0.05, 100)
    assert spent(1.1, 0.05, 100) < base < spent(1.0, 0.06, 100) and spent(1.0, 0.05, 90) < base
    assert module.PrivacyAccountant().epsilon(1e-5) == 0 == module.PrivacyAccountant().delta(0.0)
    assert spent(0.001, 0.5, 1) == math.inf


def test_noise_is_found_for_a_budget(module=privacy):
    for epsilon, rate, steps, group in ((1.0, 0.1, 100, 1), (8.0, 0.02, 500, 1), (3.0, 1.0, 1, 1), (3.0, 0.05, 50, 4)):
        noise = module.PrivacyAccountant.noise_for(epsilon, 1e-5, rate, steps, group)
        spent = [module.PrivacyAccountant().add(s, rate, steps, group).epsilon(1e-5) for s in (noise, noise * 0.99)]
        assert spent[0] <= epsilon < spent[1]
    by_moments = module.PrivacyAccountant.noise_for(1.0, 1e-5, 0.1, 100, method="rdp")
    assert by_moments > module.PrivacyAccountant.noise_for(1.0, 1e-5, 0.1, 100)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: PrivacyAccountant().add(1.0, 1.1), "sample_rate=1.1"), (lambda: PrivacyAccountant().add(0.0, 0.5), "noise=0.0"),
    (lambda: PrivacyAccountant().add(1.0, 0.0), "sample_rate=0.0"), (lambda: PrivacyAccountant().add(1.0, 0.5, 0), "steps=0"),
    (lambda: PrivacyAccountant("rdp").add(1.0, 0.5, 1, 2), "method='pld'"), (lambda: PrivacyAccountant("exact"), "method='exact'"),
    (lambda: PrivacyAccountant().epsilon(0.0), "delta=0.0"), (lambda: PrivacyAccountant().delta(-1.0), "epsilon=-1.0"),
    (lambda: PrivacyAccountant.noise_for(0.0, 1e-5, 0.1, 10), "epsilon=0.0"), (lambda: PrivacyAccountant("rdp", [1]), "order=1"),
    (lambda: PrivacyAccountant.noise_for(1e-9, 1e-9, 1.0, 10**6), "No noise"),
    (lambda: sampled_gaussian_rdp(1.0, 0.5, []), "there are none"),
    (lambda: PoissonLots([], 1), "no examples"), (lambda: PrivateLoss(1.0, 0.0, 8), "clip=0.0"), (lambda: Attack([1.0], [True]), "members"),
])  # fmt: skip
def test_what_cannot_be_counted(call, says):
    with pytest.raises(LmbookError, match=says): call()


# ---------------------------------------------------------------- planted faults


def once(length: int) -> Any: return lambda module: test_a_rank_is_what_brute_force_finds(length, module)
def opacus(module: ModuleType) -> None: test_moments_are_those_of_opacus(*CASES[0], module)
def step(module: ModuleType) -> None: test_one_step_is_an_integral(2, module)
def gauss(module: ModuleType) -> None: test_without_sampling_it_is_one_gaussian(4, module)


FAULTS: dict[str, tuple[str, str, Any]] = {
    "the last word only": ("so_far[:, None] + scores[:, -1, options]", "scores[:, -1, options]", once(3)),
    "off by one": ("[:, len(start) - 1 :].log_softmax", "[:, len(start) - 2 : -1].log_softmax", once(2)),
    "equals count nothing": ("(int((log_p == here).sum()) - 1) / 2", "0", test_who_prefers_nothing_knows_nothing_and_equals_count_half),
    "members inside out": ("((there, 1.0), (~there, -1.0))", "((there, -1.0), (~there, 1.0))", test_attacks_are_their_formulas),
    "one variance": ("- math.log(variance) / 2)", ")", test_attacks_are_their_formulas),
    "no clipping": ("share = (clip / norms).clamp(max=1.0)", "share = torch.ones_like(norms)",
                    test_nobody_changes_the_sum_by_more_than_the_clip),
    "all have norm C": ("(clip / norms).clamp(max=1.0)", "(clip / norms)", test_nobody_changes_the_sum_by_more_than_the_clip),
    "each tensor by itself": ("norms = torch.stack(squares).sum(0).sqrt()", "norms = torch.stack(squares).amax(0).sqrt()",
                              test_nobody_changes_the_sum_by_more_than_the_clip),
    "noise without clip": ("self.noise * self.clip * torch.randn", "self.noise * torch.randn",
                           test_a_private_gradient_is_clipped_and_noisy),
    "noise after the mean": (") / self.lot", ")", test_a_private_gradient_is_clipped_and_noisy),
    "a fixed number": ("np.flatnonzero(rng.random(n) < self.rate).tolist()", "rng.permutation(n)[: self.lot].tolist()",
                       test_each_example_has_dice_of_its_own),
    "the loss has other slopes": ("nats + tokens * hook, tokens", "nats + hook, tokens", test_training_takes_the_private_gradient),
    "the noise stays at one": ("        loss.noise = self.noise\n", "", test_a_budget_becomes_noise),
    "the user is forgotten": ("lots.rate, self.total, privacy.group, privacy.accounting", "lots.rate, self.total, 1, privacy.accounting",
                              test_a_budget_becomes_noise),
    "one moment less": ("k = np.arange(order + 1.0)", "k = np.arange(float(order))", opacus),
    "no sampling": ("terms = choose + k * math.log(q) + (order - k) * math.log1p(-q)", "terms = choose * 0 + k", opacus),
    "one direction": ("for added in (True, False)]", "for added in (False,)]", step),
    "not from above": ("to_low = np.clip((upper - inner_p) / math.expm1(width), 0.0, inner_p)", "to_low = inner_p", gauss),
    "steps are forgotten": ("product *= np.fft.rfft(ring) ** n", "product *= np.fft.rfft(ring)", gauss),
    "groups are forgotten": ("j = np.arange(g + 1.0) if q < 1", "j = np.arange(2.0) if q < 1", step),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(privacy, old, new, monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)): check(module=faulty)
