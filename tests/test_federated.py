"""Federated training against training in one place; sums of masked vectors, whoever is lost; texts rebuilt from gradients; bad input."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lmbook.federated as federated
from lmbook.batches import IGNORE, Batch, Batches, Examples
from lmbook.core import LmbookError
from lmbook.data_parallel import DataParallel
from lmbook.distributed import run_ranks
from lmbook.federated import (
    FederatedConfig,
    FederatedError,
    Federation,
    SecureClient,
    SecureConfig,
    SecureSum,
    Span,
    flower_app,
    join_secret,
    mask_stream,
    plain_total,
    rebuild_texts,
    secure_sum,
    split_secret,
    tokens_in,
)
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted

V = 40
PHASES = ("keys", "shares", "masked", "reveal")


def texts(n: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    dice = np.random.default_rng(seed)
    return [dice.integers(1, V, dice.integers(3, longest)).tolist() for _ in range(n)]


def decoder(seed: int = 0, **settings: Any) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(V, **{"d_model": 48, "n_layer": 2, "n_head": 4, "context_length": 16, "tie": False} | settings))


def whole(rows: list[list[int]]) -> Examples: return Examples(rows, batch_size=len(rows), shuffle=False)


def flat(model: nn.Module) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in model.parameters()])


def sgd_step(model: nn.Module, batch: Batch, lr: float) -> None:
    model.zero_grad()
    total, count = next_token_loss(model, batch)
    (total / count).backward()
    with torch.no_grad():
        for p in model.parameters(): p -= lr * p.grad


# ---------------------------------------------------------------- federated averaging


def owned() -> dict[str, list[list[int]]]:
    rows = texts(30)
    return {"a": rows[:18], "b": rows[18:20], "c": rows[20:29], "d": rows[29:]}


def test_one_local_step_is_training_on_all_data_at_once(module: ModuleType = federated):
    parts = owned()
    one, all_data = decoder().double(), [row for rows in parts.values() for row in rows]
    central = copy.deepcopy(one)
    module.Federation(one, {k: whole(rows) for k, rows in parts.items()}, module.FederatedConfig(rounds=5, lr=0.3)).fit()
    for _ in range(5): sgd_step(central, next(whole(all_data).read()), 0.3)
    assert (flat(one) - flat(central)).abs().max() < 1e-10
    assert (flat(one) - flat(decoder().double())).abs().max() > 1e-3


def test_one_local_step_is_what_ranks_do():
    "Rank r of DataParallel has the rows r, r + 2, ...: as two clients have."
    rows = texts(12, 3)
    plan = TrainConfig(steps=3, optimizer="sgd", lr=0.5, weight_decay=0.0, clip=None, schedule="constant", device="cpu")
    start = decoder().double()

    def run() -> torch.Tensor:
        model = copy.deepcopy(start)
        Trainer(model, whole(rows), plan, ranks=DataParallel()).fit()
        return flat(model)

    ranks = run_ranks(run, 2, how="threads", timeout=20)
    clients = {"even": whole(rows[::2]), "odd": whole(rows[1::2])}
    Federation(start, clients, FederatedConfig(rounds=3, lr=0.5)).fit()
    assert (ranks[0] - flat(start)).abs().max() < 1e-10


class Bowl(nn.Module):
    "A loss with its lowest point where a client's data are."

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)


class Points(Batches):
    "Each batch is (steepness, lowest point)."

    def __init__(self, steep: tuple[float, float], low: tuple[float, float], tokens: int = 1) -> None:
        self.batch = Batch(torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, tokens, dtype=torch.long))
        self.steep, self.low = (torch.tensor(x, dtype=torch.float64) for x in (steep, low))

    def plan(self, epoch: int) -> list[int]: return [0]

    def make(self, item: int) -> Batch:
        batch = copy.copy(self.batch)
        batch.steep, batch.low = self.steep, self.low  # type: ignore[attr-defined]
        return batch


def bowl_loss(model: Any, batch: Any) -> tuple[torch.Tensor, int]:
    return (0.5 * batch.steep * (model.w - batch.low) ** 2).sum() * batch.tokens, batch.tokens


BOWLS = {"a": Points((3.0, 0.5), (0.0, 1.0), 4), "b": Points((0.5, 2.0), (1.0, -1.0), 1)}


def by_hand(rounds: int, steps: int, lr: float, mu: float, server: float, momentum: float) -> np.ndarray:
    "FedAvg on two bowls, with numpy."
    w, speed = np.array([2.0, -1.0]), np.zeros(2)
    for _ in range(rounds):
        mean = np.zeros(2)
        for client in BOWLS.values():
            here, A, low = w.copy(), client.steep.numpy(), client.low.numpy()
            for _ in range(steps): here = here - lr * (A * (here - low) + mu * (here - w))
            mean += client.batch.tokens / 5 * (here - w)
        speed = momentum * speed + mean
        w = w + server * speed
    return w


CASES = [
    (4, 1, 0.1, 0.0, 1.0, 0.0), (4, 7, 0.1, 0.0, 1.0, 0.0), (5, 7, 0.1, 2.0, 1.0, 0.0),
    (5, 3, 0.2, 0.0, 0.7, 0.6), (6, 4, 0.1, 0.5, 0.5, 0.9),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_several_steps_leash_and_momentum_are_what_numpy_computes(case: tuple, module: ModuleType = federated):
    rounds, steps, lr, mu, server, momentum = case
    plan = module.FederatedConfig(rounds, steps, lr, proximal=mu, server_lr=server, server_momentum=momentum)
    model = Bowl()
    module.Federation(model, BOWLS, plan, loss=bowl_loss).fit()
    assert np.abs(model.w.detach().numpy() - by_hand(rounds, steps, lr, mu, server, momentum)).max() < 1e-12
    assert torch.equal(model.fixed, torch.ones(3))  # what needs no gradient stays


@pytest.mark.parametrize(("old", "new"), [
    ("moved[name]]) * self.weights[name]", "moved[name]])"),
    ("c.proximal * (p.detach() - before)", "c.proximal * (before - p.detach())"),
    ("c.server_momentum * self._velocity + mean", "c.server_momentum * self._velocity"),
    ("mean = summed[1:] / summed[0]", "mean = summed[1:] / len(names)"),
    ("(total / max(count, 1)).backward()", "total.backward()"),
])  # fmt: skip
def test_faults_in_federated_averaging_are_found(old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    faulty = planted(federated, old, new, monkeypatch)
    def tried() -> None:
        for case in CASES: test_several_steps_leash_and_momentum_are_what_numpy_computes(case, faulty)
    with pytest.raises(AssertionError): tried()


def test_momentum_moves_no_resting_place_and_a_leash_does():
    def rest(**how: float) -> np.ndarray:
        model = Bowl()
        Federation(model, BOWLS, FederatedConfig(60, 20, 0.1, **how), loss=bowl_loss).fit()
        return model.w.detach().numpy()

    shares = (("a", 0.8), ("b", 0.2))
    best = (sum(s * BOWLS[k].steep * BOWLS[k].low for k, s in shares) / sum(s * BOWLS[k].steep for k, s in shares)).numpy()
    plain, prox = rest(), rest(proximal=3.0)
    assert np.abs(rest(server_momentum=0.4) - plain).max() < 1e-6
    assert np.linalg.norm(prox - best) < 0.7 * np.linalg.norm(plain - best)


def test_one_client_alone_trains_as_ever():
    rows, alone = texts(10), decoder().double()
    Federation(fed := copy.deepcopy(alone), {"only": whole(rows)}, FederatedConfig(3, 2, 0.2)).fit()
    for _ in range(6): sgd_step(alone, next(whole(rows).read()), 0.2)
    assert (flat(fed) - flat(alone)).abs().max() < 1e-12


def test_who_is_drawn_and_what_a_round_says():
    clients = {k: whole(texts(4, i)) for i, k in enumerate("abcdef")}
    plan = FederatedConfig(rounds=40, per_round=2, lr=1e-3, seed=4)
    one, two = (Federation(decoder(d_model=8, n_layer=1), clients, plan) for _ in range(2))
    rounds = one.fit()
    assert [r.clients for r in rounds] == [r.clients for r in two.fit()] and len(rounds) == 40
    counted = {k: sum(k in r.clients for r in rounds) for k in clients}
    assert all(len(set(r.clients)) == 2 for r in rounds) and min(counted.values()) > 4
    assert all(r.step > 0 and r.drift >= 0 and 3 < r.loss < 4.5 for r in rounds)
    assert one.fit() is one.rounds and len(one.rounds) == 40  # nothing more to do


def test_a_client_leaves_the_model_as_it_is():
    model = decoder()
    before, fed = flat(model).clone(), Federation(model, {"a": whole(texts(5))}, FederatedConfig(local_steps=3))
    moved, loss = fed.local("a")
    assert torch.equal(flat(model), before) and moved.norm() > 0 and loss == pytest.approx(np.log(V), abs=0.3)


def test_a_secure_sum_changes_only_roundings():
    models = []
    for total in (plain_total, SecureSum(), SecureSum(SecureConfig(threshold=4, fraction=40))):
        model = decoder().double()
        Federation(model, {k: whole(r) for k, r in owned().items()}, FederatedConfig(2, 3), total=total).fit()
        models.append(flat(model))
    assert 0 < (models[0] - models[1]).abs().max() < 1e-6
    assert (models[0] - models[2]).abs().max() < 1e-11


def refused(call: Callable[..., Any], *arguments: Any, says: str, **options: Any) -> None:
    with pytest.raises(FederatedError, match=says) as caught: call(*arguments, **options)
    assert isinstance(caught.value, LmbookError) and "\n" not in str(caught.value)


def test_federations_that_cannot_be():
    model, good = decoder(), {"a": whole(texts(3)), "b": whole(texts(3))}
    nothing = Examples([[1, 2]], batch_size=1).map(lambda batch: Batch(batch.ids, torch.full_like(batch.targets, IGNORE)))
    refused(Federation, model, {}, says="at least one")
    refused(Federation, model, [whole(texts(3))], says="at least one")
    refused(Federation, model, {"a": texts(3)}, says="'a' has list, not Batches")
    refused(Federation, model, {"a": nothing}, says="'a' has no data")
    refused(Federation, model, good, weights={"a": 1.0}, says="'b' has no data, or no weight")
    refused(Federation, model, good, weights={"a": 1.0, "b": -2.0}, says="'b' weighs -2")
    refused(Federation, model, good, weights={"a": 1.0, "b": float("nan")}, says="'b' weighs nan")
    refused(Federation, model, good, weights={"a": 1.0, "b": 1.0, "c": 1.0}, says="Weights are of")
    refused(Federation, model, good, FederatedConfig(per_round=3), says="per_round=3 is more than the 2 clients")
    refused(Federation(model, good, FederatedConfig(local_steps=30, lr=1e20)).fit, says="lower lr")
    refused(Federation(model, good).local, "x", says="no client 'x'")
    for wrong in ({"rounds": 0}, {"local_steps": 1.5}, {"lr": 0.0}, {"proximal": -1.0}, {"server_momentum": 1.0}, {"optimizer": "sgd"}):
        with pytest.raises(FederatedError): FederatedConfig(**wrong)
    refused(plain_total, {}, says="no client")
    refused(plain_total, {"a": torch.ones(2), "b": torch.ones(3)}, says="different shapes")


# ---------------------------------------------------------------- sums that nobody can open


def vectors(n: int = 4, size: int = 50, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"c{i}": torch.randn(size, dtype=torch.float64) * 10 ** (i % 3) for i in range(n)}


def exact(config: SecureConfig, given: dict[str, torch.Tensor], names: Any) -> torch.Tensor:
    "Each rounded to fixed point, added up as whole numbers of Python."
    rows = [[round(x * 2**config.fraction) for x in given[name].tolist()] for name in names]
    return torch.tensor([sum(column) / 2**config.fraction for column in zip(*rows)], dtype=torch.float64)


def test_the_sum_is_exact_whoever_is_lost_in_whatever_phase(module: ModuleType = federated):
    given, config = vectors(), module.SecureConfig(threshold=2)
    tried = [{}] + [dict(zip(pair, phases)) for pair in itertools.combinations(given, 2) for phases in itertools.product(PHASES, repeat=2)]
    for leaves in tried + [{name: phase} for name in given for phase in PHASES]:
        result = module.secure_sum(given, config, leaves)
        assert result.clients == tuple(name for name in given if leaves.get(name) in (None, "reveal")), leaves
        assert torch.equal(result.total, exact(config, given, result.clients)), leaves
        assert set(result.seen) == set(result.clients)


@pytest.mark.parametrize(("old", "new"), [
    ("out = out + mask if other > self.number else out - mask", "out = out + mask"),
    ("total = total - mask if i > other else total + mask", "total = total + mask if i > other else total - mask"),
    ("total = total - mask_stream(secret, len(total), config.bits)", "total = total + 0"),
    ("text[:66] if other in there else text[66:]", "text[66:] if other in there else text[:66]"),
    ("np.rint(x * 2.0**self.fraction)", "np.floor(x * 2.0**self.fraction)"),
    ("value * x + coefficient", "value + x * coefficient"),
])  # fmt: skip
def test_faults_in_the_sum_are_found(old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    faulty = planted(federated, old, new, monkeypatch)
    with pytest.raises((AssertionError, LmbookError)): test_the_sum_is_exact_whoever_is_lost_in_whatever_phase(faulty)


@pytest.mark.parametrize("bits", [32, 64])
def test_any_sizes_and_places(bits: Any):
    for n, fraction, size in ((2, 0, 1), (3, 10, 7), (7, bits - 20, 300)):
        config, given = SecureConfig(bits=bits, fraction=fraction), vectors(n, size, n)
        assert torch.equal(secure_sum(given, config).total, exact(config, given, given))


def chi_squared(numbers: np.ndarray, bits: int) -> list[float]:
    "Of each byte of the numbers, against even odds; 255 on average, with a standard deviation of 23."
    out = []
    for k in range(bits // 8):
        counts = np.bincount((numbers >> numbers.dtype.type(8 * k)).astype(np.int64) & 255, minlength=256)
        out.append(float(((counts - len(numbers) / 256) ** 2 / (len(numbers) / 256)).sum()))
    return out


@pytest.mark.parametrize("bits", [32, 64])
def test_what_the_server_sees_of_a_vector_looks_like_dice(bits: Any, module: ModuleType = federated):
    "Also of a vector of zeros, and also together with what it gets to know of those who are lost; and never the same again."
    given = {f"c{i}": torch.full((20_000,), float(i % 2)) for i in range(4)}
    config = module.SecureConfig(threshold=2, bits=bits, fraction=8)
    one, two = (module.secure_sum(given, config, {"c3": "masked"}) for _ in range(2))
    for name, seen in one.seen.items():
        assert max(chi_squared(seen, bits)) < 255 + 10 * 23 and (seen == two.seen[name]).mean() < 0.01
        others = np.sum([v for n, v in one.seen.items() if n != name], axis=0, dtype=config.dtype)
        assert max(chi_squared(others, bits)) < 255 + 10 * 23  # a sum over fewer is still masked
    assert min(max(chi_squared(config.encode(v, 4), bits)) for v in given.values()) > 1e6


def test_a_sum_without_masks_is_found_out(monkeypatch: pytest.MonkeyPatch):
    faulty = planted(federated, "out = self._vector + mask_stream(self._own, n, c.bits)", "out = self._vector + 0", monkeypatch)
    monkeypatch.setattr(faulty, "mask_stream", lambda seed, n, bits=64: np.zeros(n, np.uint32 if bits == 32 else np.uint64))
    with pytest.raises(AssertionError): test_what_the_server_sees_of_a_vector_looks_like_dice(64, faulty)


def begun(n: int = 3, threshold: int = 2) -> tuple[list[SecureClient], dict[int, dict[int, bytes]]]:
    config = SecureConfig()
    clients = [SecureClient(i, config.encode(torch.ones(4), n), threshold, config) for i in range(1, n + 1)]
    keys = {client.number: client.keys() for client in clients}
    return clients, {client.number: client.shares(keys) for client in clients}


def inbox(sent: dict[int, dict[int, bytes]], number: int) -> dict[int, bytes]:
    return {i: out[number] for i, out in sent.items() if i != number}


def test_a_client_gives_a_share_of_one_secret_only_and_once():
    clients, sent = begun()
    for client in clients: client.masked(inbox(sent, client.number))
    told = [client.reveal({1, 2}) for client in clients[:2]]
    own, key = (join_secret([answer[i] for answer in told], 2, 32) for i in (1, 3))
    assert own == clients[0]._own and key == clients[2]._mask.private_bytes_raw()
    assert all(set(answer) == {1, 2, 3} for answer in told)
    refused(clients[0].reveal, {1, 2, 3}, says="answered once")
    clients, sent = begun()
    for client in clients: client.masked(inbox(sent, client.number))
    refused(clients[0].reveal, {1}, says="1 vectors have come, and threshold=2")
    refused(clients[0].reveal, {1, 9}, says="not the clients of this sum")
    refused(clients[0].reveal, {2, 3}, says="not the clients of this sum")


def test_messages_that_were_changed_or_exchanged_are_refused():
    clients, sent = begun()
    changed = bytearray(sent[2][1])
    changed[20] ^= 1
    for wrong in (bytes(changed), sent[3][1], sent[2][3], b"", sent[2][1][:-1]):
        one, box = copy.copy(clients[0]), {2: wrong, 3: sent[3][1]}
        one.masked(box)
        refused(one.reveal, {1, 2}, says="from client 2 to 1 was changed")
    refused(clients[0].masked, {7: b"x", 2: b"y"}, says="sent no keys")
    refused(clients[0].masked, {}, says="1 clients are left")


def test_lists_of_keys_that_cannot_be():
    config = SecureConfig()
    a, b = (SecureClient(i, config.encode(torch.ones(4), 2), 2, config) for i in (1, 2))
    refused(a.shares, {1: a.keys()}, says="threshold=2: begin again")
    refused(a.shares, {1: b.keys(), 2: b.keys()}, says="does not find its own keys")
    refused(a.shares, {1: a.keys(), 2: a.keys()}, says="same key")


def test_sums_that_cannot_be():
    given = vectors(4)
    refused(secure_sum, {"a": torch.ones(2)}, says="at least two clients")
    refused(secure_sum, {}, says="at least two clients")
    refused(secure_sum, {"a": torch.ones(2), "b": torch.ones(3)}, says="different shapes")
    refused(secure_sum, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, says="one row of numbers")
    refused(secure_sum, {"a": torch.ones(0), "b": torch.ones(0)}, says="at least one")
    refused(secure_sum, given, SecureConfig(threshold=5), says="threshold=5 is more than the 4 clients")
    refused(secure_sum, given, leaves={"x": "keys"}, says="no client 'x'")
    refused(secure_sum, given, leaves={"c1": "later"}, says="no phase='later'")
    for phase in PHASES:
        refused(secure_sum, given, leaves={"c0": phase, "c2": phase}, says=f"2 of 4 clients are left in phase '{phase}', 3 are needed")
    for wrong in ({"bits": 16}, {"fraction": 64}, {"fraction": -1}, {"threshold": 1}):
        with pytest.raises(FederatedError): SecureConfig(**wrong)


def test_a_sum_at_the_edge_is_right_and_beyond_it_refused():
    for bits, fraction in ((32, 8), (64, 30)):
        config = SecureConfig(bits=bits, fraction=fraction)
        limit = 2.0 ** (bits - 1 - fraction) / 4
        for sign in (1, -1):
            below = torch.tensor([sign * (limit - 2.0 ** ((0 if bits == 32 else 30) - fraction))], dtype=torch.float64)
            near = {f"c{i}": below for i in range(4)}
            assert torch.equal(secure_sum(near, config).total, plain_total(near))
            for value in (limit, 1e300, float("inf"), float("nan")):
                refused(secure_sum, near | {"c2": torch.tensor([sign * value], dtype=torch.float64)}, config, says="too large")


def test_masks_are_those_of_the_seed():
    a, b = bytes(32), bytes(31) + b"\1"
    assert np.array_equal(mask_stream(a, 100), mask_stream(a, 200)[:100]) and not np.array_equal(mask_stream(a, 9), mask_stream(b, 9))
    assert mask_stream(a, 2).tobytes().hex().startswith("dc95c078a2408989ad48a21492842087")  # AES-256 of zeros, as FIPS 197's tools give it
    refused(mask_stream, b"short", 3, says="32 bytes")


# ---------------------------------------------------------------- shared secrets


def test_any_of_the_shares_give_the_secret_back():
    for secret in (b"\0", b"a seed of masks", bytes(32), b"\xff" * 64):
        for n, threshold in ((1, 1), (3, 2), (5, 3), (5, 5)):
            shares = split_secret(secret, n, threshold)
            for chosen in itertools.combinations(shares, threshold): assert join_secret(chosen, threshold, len(secret)) == secret
            assert join_secret(shares[::-1], threshold, len(secret)) == secret


def test_one_share_less_fits_any_secret():
    "For each other secret there is a last share that would give it: so what is there says nothing."
    shares, prime = split_secret(b"\5", 3, 3), 2**521 - 1
    (x1, y1), (x2, y2) = shares[:2]
    for other in (0, 77, 255):
        weights = {1: 3, 2: -3, 3: 1}  # Lagrange at 0 for the points 1, 2, 3
        y3 = (other - weights[x1] * y1 - weights[x2] * y2) % prime
        assert join_secret([*shares[:2], (3, y3)], 3, 1) == bytes([other])
    assert len({y for _ in range(20) for _, y in split_secret(b"\5", 2, 2)}) == 40  # drawn anew each time


def test_shares_that_cannot_be():
    shares = split_secret(b"secret", 4, 3)
    refused(join_secret, shares[:2], 3, 6, says="2 shares of a secret that needs 3")
    refused(join_secret, [*shares[:2], shares[0]], 3, 6, says="2 shares of a secret that needs 3")
    refused(join_secret, [*shares[:2], (3, 12345)], 3, 6, says="do not belong to one secret")
    refused(split_secret, b"", 3, 2, says="1 to 64 bytes")
    refused(split_secret, b"x" * 65, 3, 2, says="1 to 64 bytes")
    refused(split_secret, b"x", 2, 3, says="at least 3")
    refused(split_secret, b"x", 2, 0, says="at least 1")


# ---------------------------------------------------------------- texts in gradients


def gradients(model: Transformer, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total, count = next_token_loss(model, next(whole(rows).read()))
    (total / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PARTS: list[dict[str, Any]] = [
    {}, {"positions": "rotary", "norm": "rms", "bias": False, "activation": "swiglu"}, {"positions": "sinusoidal", "n_kv_head": 2},
    {"norm_first": False}, {"tie": True}, {"positions": "alibi", "n_layer": 3},
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_batch_is_read_back_whatever_the_model_is_made_of(parts: dict, module: ModuleType = federated):
    for n in (1, 3):
        model, rows = decoder(n, **parts), [[0, *row] for row in texts(n, 20 + n, 6)]  # 0 begins a text
        found = module.rebuild_texts(model, gradients(model, rows))
        assert sorted(found) == sorted(row[:-1] for row in rows)
        assert not model.zero_grad() and model.training


@pytest.mark.parametrize(("old", "new"), [
    ("[1][:, -1] for part", "[1][:, 0] for part"), ("near = found[spans[1].distance(second) < within]", "near = found"),
    ("_layer_inputs(model, part, t)", "_layer_inputs(model, part, 0)"),
])  # fmt: skip
def test_faults_in_the_reading_are_found(old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    faulty = planted(federated, old, new, monkeypatch)
    with pytest.raises(AssertionError): test_a_batch_is_read_back_whatever_the_model_is_made_of({}, faulty)


def test_texts_that_begin_alike_repeat_themselves_or_are_short():
    model = decoder(5)
    rows = [[0, 5, 6, 7, 8], [0, 5, 6, 9, 9], [0, 5, 5, 5, 1]]
    assert sorted(rebuild_texts(model, gradients(model, rows))) == sorted(row[:-1] for row in rows)
    assert rebuild_texts(model, gradients(model, [[3, 4]])) == [[3]]
    turned = decoder(6, positions="rotary", norm="rms")
    assert rebuild_texts(turned, gradients(turned, [[7, 7, 9]])) == [[7]]  # without positions, a word repeated looks like the word alone
    assert rebuild_texts(turned, gradients(turned, [[7, 8, 7, 8, 1]])) == [[7, 8, 7, 8]]


def test_scaling_changes_nothing_and_too_many_tokens_end_it():
    model = decoder(7)
    rows = [[0, *row] for row in texts(3, 5, 6)]
    sent = gradients(model, rows)
    assert sorted(rebuild_texts(model, {k: 1e-4 * g for k, g in sent.items()})) == sorted(row[:-1] for row in rows)
    many = gradients(model, [[0, *row] for row in texts(40, 6)])
    assert rebuild_texts(model, many) == []
    noisy = {k: g + 0.3 * g.std() * torch.randn_like(g) for k, g in sent.items()}
    assert not set(map(tuple, rebuild_texts(model, noisy))) & {tuple(row[:-1]) for row in rows}
    empty = {k: torch.zeros_like(g) for k, g in sent.items()}
    assert rebuild_texts(model, empty) == []


def test_the_span_of_a_gradient():
    torch.manual_seed(0)
    x, dy = torch.randn(5, 20, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
    span = Span.of(dy.T @ x)
    assert span.rank == 5 and not span.full
    assert span.distance(x).max() < 1e-12 and span.distance(torch.randn(100, 20)).min() > 0.3
    assert span.distance(torch.zeros(20)) == 0
    assert Span.of(torch.randn(30, 20)).full and Span.of((dy.T @ x).float()).distance(x).max() < 1e-5
    refused(Span.of, says="Give gradients")
    refused(Span.of, torch.ones(3), says="Give gradients")
    refused(Span.of, torch.ones(2, 3), torch.ones(2, 4), says="Give gradients")
    refused(Span.of, torch.full((2, 3), float("nan")), says="not finite")
    refused(span.distance, torch.ones(3), says="20 numbers")


def test_which_tokens_occurred():
    model = decoder(1)
    rows = texts(4, 9)
    table = gradients(model, rows)["embed.tokens.weight"]
    assert tokens_in(table) == sorted({i for row in rows for i in row[:-1]})
    assert tokens_in(gradients(decoder(1, tie=True), rows)["embed.tokens.weight"]) == list(range(V))  # scoring touches all rows
    assert tokens_in(torch.zeros(4, 2)) == [] == tokens_in(torch.zeros(0, 2))
    refused(tokens_in, torch.ones(3), says=r"is \(V, D\)")
    refused(tokens_in, torch.full((2, 2), float("inf")), says="not finite")


def test_models_that_cannot_be_read():
    model = decoder()
    sent = gradients(model, texts(1))
    refused(rebuild_texts, decoder(n_layer=1), sent, says="at least two layers")
    refused(rebuild_texts, decoder(kind="encoder"), sent, says="at least two layers")
    refused(rebuild_texts, model, {}, says="no gradient of decoder.blocks.0.attention.query.weight")
    refused(rebuild_texts, decoder(d_model=16), sent, says="of another model")
    refused(rebuild_texts, model, sent, within=0.0, says="within")


# ------------------------------------------------------------------------------------------------------------------------------- Flower


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is installed here")
def test_without_flower_it_is_said_how_to_get_it():
    "What it does with Flower is measured by benchmarks/federated.py, in an environment of its own."
    with pytest.raises(FederatedError, match=r"pip install 'lmbook\[flower\]'"): flower_app(lambda: Federation(decoder(), {}))
