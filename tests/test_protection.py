"""Tables of which everybody is one of k; files that are opened with the passphrase only, and whole; texts taken back; bad input."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lmbook.protection as protection
from lmbook.core import LmbookError
from lmbook.protection import (
    ProtectionError,
    Pseudonyms,
    ShardedModels,
    anonymise,
    decrypt_file,
    encrypt_file,
    k_anonymity,
    l_diversity,
    link,
    read_encrypted,
)
from tests.faults import planted

QUASI = ["age", "sex", "place"]
LADDERS: dict[str, list[Callable[[Any], Any]]] = {
    "age": [lambda a: a // 10, lambda a: "*"], "sex": [lambda s: "*"], "place": [lambda p: p[:2], lambda p: p[:1], lambda p: "*"],
}  # fmt: skip


def refused(call: Callable[..., Any], *arguments: Any, says: str, **options: Any) -> None:
    with pytest.raises(ProtectionError, match=says) as caught: call(*arguments, **options)
    assert isinstance(caught.value, LmbookError) and "\n" not in str(caught.value)


def people(n: int, seed: int = 0) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    return [{"name": f"p{i}", "age": dice.randrange(20, 60), "sex": dice.choice("mf"), "place": dice.choice("ab") + dice.choice("xy") +
             dice.choice("12"), "ill": dice.choice(["flu", "asthma", "gout"])} for i in range(n)]  # fmt: skip


# ---------------------------------------------------------------- tables


def brute_k(rows: list[dict[str, Any]], quasi: list[str]) -> int:
    return min(sum(all(a[q] == b[q] for q in quasi) for b in rows) for a in rows)


def test_k_and_l_are_what_counting_says():
    for seed in range(30):
        rows = people(25, seed)
        for quasi in (["sex"], ["sex", "place"], QUASI):
            assert k_anonymity(rows, quasi) == brute_k(rows, quasi)
            alike = [{b["ill"] for b in rows if all(a[q] == b[q] for q in quasi)} for a in rows]
            assert l_diversity(rows, quasi, "ill") == min(map(len, alike))
    assert k_anonymity(rows, []) == 25


def at(levels: tuple[int, ...], row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[q] if not level else LADDERS[q][level - 1](row[q]) for q, level in zip(QUASI, levels))


def test_no_finer_table_would_do(module: ModuleType = protection):
    "Against all combinations of levels, looked at one by one."
    for seed, k, suppress, l in itertools.product(range(12), (2, 4), (0.0, 0.1), (1, 2)):
        rows = people(30, seed)
        made = module.anonymise(rows, LADDERS, k, suppress=suppress, drop=["name"], sensitive="ill", l=l)
        assert k_anonymity(made.rows, QUASI) >= k and l_diversity(made.rows, QUASI, "ill") >= l
        assert len(made.rows) + made.suppressed == 30 and made.suppressed <= suppress * 30
        assert all("name" not in row and set(row) == {*QUASI, "ill"} for row in made.rows)
        possible = {}
        for levels in itertools.product(range(3), range(2), range(4)):
            looks = [at(levels, row) for row in rows]
            many, kinds = Counter(looks), {look: {r["ill"] for r, other in zip(rows, looks) if other == look} for look in looks}
            lost = sum(many[look] < k or len(kinds[look]) < l for look in looks)
            if lost <= suppress * 30: possible[levels] = (levels[0] / 2 + levels[1] + levels[2] / 3, lost)
        chosen = tuple(made.levels[q] for q in QUASI)
        assert possible[chosen] == pytest.approx(min(possible.values())) and made.suppressed == possible[chosen][1]
        kept = [row for row, look in zip(rows, [at(chosen, row) for row in rows])]
        assert Counter(tuple(row[q] for q in QUASI) for row in made.rows) <= Counter(at(chosen, row) for row in kept)


@pytest.mark.parametrize(("old", "new"), [
    ("if len(group) >= k and", "if len(group) >= k - 1 and"),
    ("len({values[i][-1] for i in group}) >= l", "len(group) >= l"),
    ("n - len(kept) > suppress * n", "n - len(kept) > n"),
    ("(cost, n - len(kept)) < best", "(cost, n - len(kept)) > best"),
])  # fmt: skip
def test_faults_in_the_coarsening_are_found(old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    faulty = planted(protection, old, new, monkeypatch)
    with pytest.raises((AssertionError, LmbookError)): test_no_finer_table_would_do(faulty)


def test_a_link_is_a_pair_that_is_alone_on_both_sides():
    left = [{"a": 1}, {"a": 2}, {"a": 2}, {"a": 3}, {"a": 5}]
    right = [{"a": 3}, {"a": 1}, {"a": 5}, {"a": 5}, {"a": 2}]
    assert link(left, right, ["a"]) == [(0, 1), (3, 0)]
    rows = people(60)
    made = anonymise(rows, LADDERS, 3)
    assert len(link(rows, rows, QUASI)) > 40 and not link(made.rows, made.rows, QUASI)


def test_tables_that_cannot_be():
    rows = people(10)
    refused(k_anonymity, [], QUASI, says="no rows")
    refused(k_anonymity, rows, ["size"], says="no column 'size'")
    refused(k_anonymity, rows, "age", says="columns is one text")
    refused(k_anonymity, "rows", ["age"], says="give a list of rows")
    refused(k_anonymity, [1, 2], ["age"], says="Row 0 is int")
    refused(k_anonymity, [{"age": [1]}], ["age"], says="cannot be compared")
    refused(anonymise, rows, LADDERS, 11, says="k=11 is more than the 10 rows")
    refused(anonymise, rows, LADDERS, 1, says="at least 2")
    refused(anonymise, rows, LADDERS, 2, suppress=1.5, says="suppress")
    refused(anonymise, rows, {}, 2, says="ladder")
    refused(anonymise, rows, {"age": [], "place": LADDERS["place"]}, 3, says="No level of the ladders gives k=3")
    refused(anonymise, rows, {"age": ["tens"]}, 2, says="list of functions")
    refused(anonymise, rows, {"age": str}, 2, says="list of functions")
    refused(anonymise, rows, LADDERS, 2, l=2, says="sensitive column: say which")
    refused(anonymise, rows, LADDERS, 2, l=4, sensitive="ill", says="No level of the ladders gives k=2, l=4")
    refused(anonymise, rows, LADDERS, 2, drop=["age"], says="cannot be both")
    refused(anonymise, rows, {f"c{i}": [str] * 20 for i in range(9)}, 2, says="no column 'c0'")
    wide = [{f"c{i}": 1 for i in range(5)}] * 3
    refused(anonymise, wide, {f"c{i}": [str] * 9 for i in range(5)}, 2, says="10,000 combinations")


# ---------------------------------------------------------------- pseudonyms


def test_pseudonyms_are_kept_by_the_key_and_hide_whole_names():
    names, text = ["Ann", "Ann Lee", "Bo", "李明"], "Ann Lee met Ann, Anna and Bo. Bo's aunt, 李明, left."
    one, two, other = Pseudonyms(names, b"k" * 16), Pseudonyms(names, b"k" * 16), Pseudonyms(names)
    hidden = one.hide(text)
    assert hidden == two.hide(text) != other.hide(text)
    assert hidden.startswith(one.of("Ann Lee") + " met " + one.of("Ann") + ", Anna and ") and hidden.count(one.of("Bo")) == 2
    assert one.of("李明") in hidden and one.of("Ann") != one.of("Bo")
    assert Pseudonyms(names, form="<NAME>").hide(text) == "<NAME> met <NAME>, Anna and <NAME>. <NAME>'s aunt, <NAME>, left."
    assert one.hide(hidden) == hidden
    refused(Pseudonyms, [], says="at least one")
    refused(Pseudonyms, ["Ann", " "], says="none of them empty")
    refused(Pseudonyms, ["Ann"], key=b"short", says="16 bytes")
    refused(Pseudonyms, ["Ann"], form="{}{}", says="at most once")
    refused(Pseudonyms, ["Ann"], form="{name}", says="at most once")


# ---------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path: Path) -> Path: return tmp_path


def written(folder: Path, data: bytes, chunk: int = 64, passphrase: str = "pass") -> bytes:
    (folder / "plain").write_bytes(data)
    encrypt_file(folder / "plain", folder / "locked", passphrase, chunk=chunk, work=10)
    return (folder / "locked").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_what_was_locked_is_opened(size: int, folder: Path):
    data = np.random.default_rng(size).bytes(size)
    locked = written(folder, data)
    assert decrypt_file(folder / "locked", folder / "again", "pass") == folder / "again"
    assert (folder / "again").read_bytes() == data
    assert b"".join(read_encrypted(folder / "locked", "pass")) == data
    assert len(locked) == 36 + 32 + size + 16 * max(1, -(-size // 64))
    assert sorted(p.name for p in folder.iterdir()) == ["again", "locked", "plain"]


def test_any_passphrase_and_the_same_file(folder: Path):
    for passphrase in ("x", "长夜漫漫", " ", "a\0b", "\ud800", "p" * 5000):
        written(folder, b"content", passphrase=passphrase)
        encrypt_file(folder / "plain", folder / "plain", passphrase, work=10)  # over itself
        decrypt_file(folder / "plain", folder / "plain", passphrase)
        assert (folder / "plain").read_bytes() == b"content"


def test_the_same_file_twice_is_different(folder: Path):
    one, two = written(folder, bytes(5000)), written(folder, bytes(5000))
    assert sum(a == b for a, b in zip(one[68:], two[68:])) < 100 and one[13:36] != two[13:36]
    counts = np.bincount(np.frombuffer(written(folder, bytes(100_000), 2**14)[68:], np.uint8), minlength=256)
    assert ((counts - counts.sum() / 256) ** 2 / (counts.sum() / 256)).sum() < 255 + 10 * 23


HEAD, STEP = 36 + 32, 64 + 16


def tampered(data: bytes) -> dict[str, bytes]:
    "A locked file of five chunks, changed in every way that keeps it looking like one."
    def part(k: int) -> bytes: return data[HEAD + k * STEP : HEAD + (k + 1) * STEP]
    head, chunks = data[:HEAD], [part(k) for k in range(5)]
    orders = {"swapped": [0, 2, 1, 3, 4], "first gone": [1, 2, 3, 4], "one gone": [0, 1, 3, 4], "last gone": [0, 1, 2, 3],
              "last two swapped": [0, 1, 2, 4, 3], "twice": [0, 1, 1, 2, 3, 4], "only the last": [4], "none": []}  # fmt: skip
    out = {name: head + b"".join(chunks[k] for k in order) for name, order in orders.items()}
    return out | {"a byte less": data[:-1], "a byte more": data + b"\0", "half a head": data[:20], "no check": data[:40], "empty": b""}


def test_a_file_that_was_tampered_with_is_refused_and_nothing_is_written(folder: Path, module: ModuleType = protection):
    data = written(folder, bytes(range(256)) + bytes(60))
    assert len(data) == HEAD + 5 * STEP - 4
    for name, wrong in tampered(data).items():
        (folder / "wrong").write_bytes(wrong)
        refused_by(module, folder / "wrong", name)
    (folder / "there").write_bytes(b"as it was")
    (folder / "wrong").write_bytes(tampered(data)["last gone"])
    with pytest.raises(LmbookError): module.decrypt_file(folder / "wrong", folder / "there", "pass")
    assert (folder / "there").read_bytes() == b"as it was"


def refused_by(module: ModuleType, path: Path, name: str) -> None:
    with pytest.raises(LmbookError, match="changed|cut|not written by") as caught: module.decrypt_file(path, path.with_name("out"), "pass")
    assert "\n" not in str(caught.value), name
    assert sorted(p.name for p in path.parent.iterdir()) == ["locked", "plain", "wrong"], name


@pytest.mark.parametrize(("old", "new"), [
    ("header[-7:] + number.to_bytes(4, \"big\") + bytes([last])", "header[-7:] + bytes(4) + bytes([last])"),
    ("+ bytes([last])", "+ bytes([0])"),
    ("if not hmac.compare_digest(check, found)", "if False"),
])  # fmt: skip
def test_faults_in_the_sealing_are_found(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    faulty = planted(protection, old, new, monkeypatch)
    monkeypatch.setitem(globals(), "encrypt_file", faulty.encrypt_file)
    def tried() -> None:
        test_a_file_that_was_tampered_with_is_refused_and_nothing_is_written(folder, faulty)
        with pytest.raises(LmbookError, match="not the passphrase"): faulty.decrypt_file(folder / "locked", folder / "out", "other")
    with pytest.raises((AssertionError, pytest.fail.Exception)): tried()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, HEAD + 5 * STEP - 5), st.integers(0, 7))
def test_every_changed_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int):
    if not hasattr(test_every_changed_bit_is_noticed, "locked"):
        place = tmp_path_factory.mktemp("bits")
        test_every_changed_bit_is_noticed.locked = place, written(place, bytes(316))  # type: ignore[attr-defined]
    place, data = test_every_changed_bit_is_noticed.locked  # type: ignore[attr-defined]
    if at in (8, 9, 10, 11, 12): return  # work and size: below
    (place / "bad").write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    refused(decrypt_file, place / "bad", place / "out", "pass", says="changed|not written by")
    assert not (place / "out").exists()


def test_a_head_that_asks_for_too_much_is_refused_at_once(folder: Path):
    data = written(folder, b"content")
    for at, value in ((8, 9), (8, 21), (8, 255), (9, 255), (12, 0), (8, 11), (11, 9)):
        (folder / "bad").write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        refused(decrypt_file, folder / "bad", folder / "out", "pass", says="head")


def test_another_passphrase_another_file(folder: Path):
    written(folder, b"content")
    for wrong in ("Pass", "pass ", "p"): refused(decrypt_file, folder / "locked", folder / "out", wrong, says="not the passphrase of")
    refused(read_encrypted, folder / "locked", "x", says="not the passphrase of")
    refused(decrypt_file, folder / "plain", folder / "out", "pass", says="was not written by encrypt_file")
    refused(decrypt_file, folder / "nowhere", folder / "out", "pass", says="there is no such file")
    refused(encrypt_file, folder / "nowhere", folder / "out", "pass", says="there is no such file")
    refused(encrypt_file, folder, folder / "out", "pass", says="is no file")
    for empty in ("", None, b"bytes"): refused(encrypt_file, folder / "plain", folder / "out", empty, says="passphrase is a text")
    for wrong_size in ({"work": 9}, {"work": 21}, {"chunk": 0}, {"chunk": 2**25}):
        refused(encrypt_file, folder / "plain", folder / "out", "pass", says=next(iter(wrong_size)), **wrong_size)
    assert not (folder / "out").exists()


def test_a_long_file_needs_little_memory(folder: Path):
    data = written(folder, bytes(4_000_000), chunk=2**14)
    tracemalloc.start()
    size = sum(map(len, read_encrypted(folder / "locked", "pass")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 4_000_000 < len(data) and peak < 300_000


def test_other_tools_open_it(folder: Path):
    "By hand, from what the docstrings say."
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    data, plain = written(folder, b"content" * 20), b"content" * 20
    keys = Scrypt(salt=data[13:29], length=64, n=2**10, r=8, p=1).derive(b"pass")
    chunks = [data[HEAD + k * STEP : HEAD + (k + 1) * STEP] for k in range(3)]
    nonces = [data[29:36] + bytes([0, 0, 0, k, k == 2]) for k in range(3)]
    assert b"".join(AESGCM(keys[:32]).decrypt(n, c, data[36:68]) for n, c in zip(nonces, chunks)) == plain


# ---------------------------------------------------------------- texts taken back


def learner(texts: list[Any], shard: int) -> nn.Module:
    "A bigram table, trained a little."
    torch.manual_seed(shard)
    model, ids = nn.Embedding(9, 9), torch.tensor(texts)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model


def held(n: int = 30) -> tuple[list[list[int]], list[str]]:
    dice = random.Random(1)
    return [[dice.randrange(9) for _ in range(5)] for _ in range(n)], [f"owner {i % 7}" for i in range(n)]


def test_to_forget_is_as_if_it_had_never_been():
    texts, owners = held()
    models = ShardedModels(texts, owners, learner, shards=3)
    others = {s: [p.clone() for p in m.parameters()] for s, m in enumerate(models.models)}
    shard = models.forget("owner 4")
    assert shard == 4 % 3
    left = [(t, o) for t, o in zip(texts, owners) if o != "owner 4" and models.where[o] == shard]
    assert all(torch.equal(p, q) for p, q in zip(models.models[shard].parameters(), learner([t for t, _ in left], shard).parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(models.models[shard].parameters(), others[shard]))
    for s in set(others) - {shard}: assert all(torch.equal(p, q) for p, q in zip(models.models[s].parameters(), others[s]))
    refused(models.forget, "owner 4", says="owns nothing here")


def test_they_answer_with_the_mean_of_their_probabilities():
    models = ShardedModels(*held(), learner, shards=3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mean = torch.stack([m(ids).softmax(-1) for m in models.models]).mean(0)
    torch.testing.assert_close(models(ids).exp(), mean)


def test_a_training_that_fails_changes_nothing():
    def fails(texts: list[Any], shard: int) -> nn.Module:
        if fails.now: raise RuntimeError("no room")  # type: ignore[attr-defined]
        return learner(texts, shard)

    fails.now = False  # type: ignore[attr-defined]
    models = ShardedModels(*held(), fails, shards=3)
    before = list(models.models)
    fails.now = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError): models.forget("owner 1")
    assert models.models == before and "owner 1" in models.where
    fails.now = False  # type: ignore[attr-defined]
    assert models.forget("owner 1") == 1


def test_shards_that_cannot_be():
    texts, owners = held()
    refused(ShardedModels, texts, owners[:-1], learner, says="one owner")
    refused(ShardedModels, texts, owners, learner, shards=8, says="shards=8 is more than the 7 owners")
    refused(ShardedModels, texts, owners, learner, shards=0, says="at least 1")
    refused(ShardedModels, texts, [[o] for o in owners], learner, says="names or numbers")
    one = ShardedModels(texts[:2], ["a", "b"], learner, shards=2)
    refused(one.forget, "a", says="owns all of shard 0")
    assert one.where == {"a": 0, "b": 1}
