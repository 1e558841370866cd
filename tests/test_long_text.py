"""Windows by brute force, a memory against one pass, joinings by hand; what comes back from a folder; bad input; planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmbook.long_text as long_text
from lmbook.batches import Batch, Examples, TokenStream
from lmbook.core import LmbookError
from lmbook.long_text import (
    CarriedMemory,
    LongClassifier,
    LongConfig,
    LongTextError,
    MemoryReader,
    read_with_memory,
    window_loss,
    windows,
)
from lmbook.perplexity import evaluate
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted

V = 30
SMALL = LongConfig(size=8, overlap=2, vocab_size=260, d_model=16, n_head=2, steps=3, batch_size=4)
RECORDS = [{"text": f"{word} " * n, "label": label} for n in (1, 3, 9) for word, label in (("aaa", "yes"), ("bbb", "no"))]


def decoder(positions: str = "rotary", **more) -> Transformer:
    torch.manual_seed(0)
    parts = {"context_length": 40, "norm": "rms", "init": "xavier_uniform", "positions": positions, **more}
    return Transformer(TransformerConfig(V, 16, 2, 2, **parts)).double().eval()


def text(n: int, rows: int = 1) -> torch.Tensor: return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(n))


# ---------------------------------------------------------------- windows


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_each_position_is_new_in_one_window(n: int, size: int, stride: int):
    if stride > size: return
    cut = windows(range(n), size, stride)
    assert [t for w in cut for t in range(w.new, w.end)] == list(range(n))
    assert all(w.begin <= w.new < w.end <= n and w.end - w.begin <= size for w in cut)
    assert [w.begin for w in cut] == [i * stride for i in range(len(cut))]
    assert all(w.end - w.begin == size for w in cut[:-1])  # only the last may be shorter


def test_a_text_shorter_than_a_window_is_one_window():
    assert windows([5], 8, 3) == [(0, 1, 0)] and windows(range(8), 8, 3) == [(0, 8, 0)]
    assert windows(range(9), 8, 3) == [(0, 8, 0), (3, 9, 8)]


@pytest.mark.parametrize("size, stride", [(8, 7), (8, 4), (8, 1), (5, 2), (40, 20)])
def test_window_loss_is_that_of_each_window_by_hand(size, stride):
    model, row = decoder(), text(31)[0]
    by_hand = np.full(30, np.nan)
    with torch.no_grad():
        for begin, end, new in windows(row, size, stride):
            log_p = model(row[None, begin:end])[0].log_softmax(-1)
            for t in range(max(new, 1), end): by_hand[t - 1] = -log_p[t - 1 - begin, row[t]]
    found = window_loss(model, row, size, stride)
    np.testing.assert_allclose(found, by_hand, rtol=1e-9)
    assert np.array_equal(found, evaluate(model, [row], context_length=size, stride=stride).token_nats[0])


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("segment", [1, 5, 8, 20])
def test_memory_equals_one_pass_with_a_sliding_window(positions, segment):
    model, ids = decoder(positions, window=7), text(37, rows=3)
    reader = MemoryReader(model, 6)
    with torch.no_grad(): pieces, whole = torch.cat([reader(x) for x in ids.split(segment, 1)], 1), model(ids)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
    assert reader.read == 37 and reader.length == 6


def test_a_memory_that_holds_all_equals_one_pass():
    model, ids = decoder(), text(37)
    whole = evaluate(model, [ids[0]]).token_nats[0]
    np.testing.assert_allclose(read_with_memory(model, ids[0], 5, 35), whole, rtol=1e-9)
    assert np.abs(read_with_memory(model, ids[0], 5, 4) - whole).max() > 0.01


def test_a_text_beyond_the_context_is_read():
    model, row = decoder(), text(200)[0]
    assert read_with_memory(model, row, 8, 16).shape == (199,) and np.isfinite(read_with_memory(model, row, 8, 16)).all()


def test_the_gradient_stops_at_the_memory():
    model, ids = decoder(tie=False), torch.tensor([[1, 2, 3, 4, 5, 6]])
    reader = MemoryReader(model, 4)
    reader(ids[:, :3])
    reader(ids[:, 3:]).sum().backward()
    length = model.embed.tokens.weight.grad.norm(dim=1)
    assert (length[1:4] == 0).all() and (length[4:7] > 0).all()


def test_a_call_that_fails_has_read_nothing():
    model, ids = decoder(), text(12)
    reader, other = MemoryReader(model, 8), MemoryReader(model, 8)
    with torch.no_grad():
        reader(ids[:, :5]), other(ids[:, :5])
        for wrong in (torch.full((1, 3), V), text(3, rows=2), text(36)):
            with pytest.raises(LmbookError): reader(wrong)
        block = model.decoder.blocks[1].forward

        def broken(*_, **__): raise RuntimeError("half-way")

        model.decoder.blocks[1].forward = broken
        with pytest.raises(RuntimeError): reader(ids[:, 5:])
        model.decoder.blocks[1].forward = block
        assert torch.equal(reader(ids[:, 5:]), other(ids[:, 5:]))
        reader.forget()
        assert torch.equal(reader(ids[:, :5]), MemoryReader(model, 8)(ids[:, :5]))


def stream() -> TokenStream: return TokenStream(text(400)[0].numpy(), 4, 8, contiguous=True)


def test_carried_memory_is_reading_on():
    model, loss = decoder().train(), CarriedMemory(6)
    reader, total, tokens = MemoryReader(model, 6), 0.0, 0
    for batch in stream().read():
        value, n = loss(model, batch)
        scores = reader(batch.ids)
        expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")
        torch.testing.assert_close(value, expected)
        total, tokens = total + float(value.detach()), tokens + n
    first = next(stream().read())
    again, _ = loss(model, first)  # carry is False: it begins anew
    torch.testing.assert_close(again, CarriedMemory(6)(model, first)[0])
    assert tokens == 4 * 99 and total > 0


def test_an_interrupted_training_goes_on_as_if_nothing_had_been():
    def run(steps: int) -> tuple[Transformer, CarriedMemory, TokenStream]:
        model, loss, batches = decoder().float(), CarriedMemory(6), stream()
        Trainer(model, batches, TrainConfig(steps=steps, device="cpu"), loss=loss).fit()
        return model, loss, batches

    model, loss, batches = run(3)
    batch = batches.make(batches.plan(0)[3])
    fresh = CarriedMemory(6)
    fresh.load_state_dict(loss.state_dict())
    model.train()
    torch.testing.assert_close(fresh(model, batch)[0], loss(model, batch)[0])
    assert (CarriedMemory(6)(model, batch)[0] - loss(model, batch)[0]).abs() > 1e-6


# ---------------------------------------------------------------- a label for a long text


@pytest.fixture(scope="module", params=["truncate", "mean", "max", "hierarchy"])
def classifier(request) -> LongClassifier:
    return LongClassifier.fit(RECORDS, LongConfig(request.param, 8, 2, 260, 16, n_head=2, steps=3, batch_size=4))


def test_alone_as_in_a_batch(classifier):
    texts = [record["text"] for record in RECORDS]
    together = classifier.scores(texts)
    for i, one in enumerate(texts): np.testing.assert_allclose(classifier.scores([one])[0], together[i], atol=1e-5)
    assert classifier.scores([]).shape == (0, 2) and classifier.predict([]) == []
    assert not classifier.model.training


def test_joinings_by_hand(classifier):
    joining, one = classifier.config.joining, "abc " * 12
    ids = classifier.tokenizer.encode(one)
    pieces = [classifier.tokenizer.decode(ids[w.begin : w.end]) for w in windows(ids, 8, 6)]
    alone = classifier.scores(pieces)
    if joining == "hierarchy":
        there = classifier.scores([one])[0]
        assert np.abs(there - alone.mean(0)).max() > 1e-6
        return
    wanted = {"truncate": alone[0], "mean": alone.mean(0), "max": alone.max(0)}[joining]
    np.testing.assert_allclose(classifier.scores([one])[0], wanted, atol=1e-5)


def test_what_comes_back_says_the_same(classifier, tmp_path):
    classifier.save(tmp_path / "saved")
    back = LongClassifier.load(tmp_path / "saved")
    texts = [record["text"] for record in RECORDS]
    assert np.array_equal(back.scores(texts), classifier.scores(texts)) and back.config == classifier.config
    assert classifier.evaluate(RECORDS)["accuracy"].n == len(RECORDS)


def test_the_same_seed_gives_the_same_and_a_very_long_text_is_read(classifier):
    again = LongClassifier.fit(RECORDS, classifier.config)
    assert np.array_equal(again.scores(["aaa"]), classifier.scores(["aaa"]))
    assert np.isfinite(classifier.scores(["word " * 2000])).all()


def test_it_learns():
    records = [{"text": "xyz " * (i % 7) + word + " xyz" * (i % 5), "label": word} for i in range(40) for word in ("yes", "no")]
    config = LongConfig("max", 8, 6, 300, 16, n_head=2, steps=80, batch_size=8, lr=0.01)
    assert LongClassifier.fit(records, config).evaluate(records)["accuracy"].value > 0.9


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("call, says", [
    (lambda: windows(range(9), 4, 5), "stride=5 is above size=4"),
    (lambda: windows([], 4, 2), "The text is empty"),
    (lambda: windows("a text", 4, 2), "is a text, not ids"),
    (lambda: windows(range(9), 0, 1), "size=0"),
    (lambda: window_loss(decoder(), [1, 2, 3], 4, 4), "stride=4 must be below size=4"),
    (lambda: window_loss(decoder(), [1], 4, 2), "The text has one token"),
    (lambda: read_with_memory(decoder(), [1, 2, 3], 2, 0), "memory=0"),
    (lambda: read_with_memory(decoder(), [1, 2, 3], 0, 4), "segment=0"),
    (lambda: read_with_memory(decoder(), [1, V], 2, 4), f"{V}"),
    (lambda: read_with_memory(decoder(), range(30), 39, 2), None),
    (lambda: read_with_memory(decoder(), list(range(30)) * 3, 39, 2), "context_length=40"),
    (lambda: MemoryReader(decoder("learned"), 4), "positions='rotary'"),
    (lambda: MemoryReader(decoder(kind="encoder"), 4), "Only a decoder"),
    (lambda: MemoryReader(decoder(), 40), "leaves no room"),
    (lambda: CarriedMemory(0), "memory=0"),
    (lambda: CarriedMemory(4)(decoder(), next(iter(Examples([[1, 2, 3], [1, 2]], batch_size=2)))), "padded, packed or pairs"),
    (lambda: LongConfig(overlap=64), "overlap=64 must be less than size=64"),
    (lambda: LongConfig(joining="sum"), "joining"),
    (lambda: LongClassifier.fit(RECORDS[:1], SMALL), "All texts have the label 'yes'"),
    (lambda: LongClassifier.fit([], SMALL), "There are no records"),
    (lambda: LongClassifier.fit("text", SMALL), "a list of dicts"),
    (lambda: LongClassifier.fit([{"text": "a", "label": 1}], SMALL), "Record 0 is no dict"),
    (lambda: LongClassifier.fit([{"text": "", "label": "a"}, {"text": "b", "label": "b"}], SMALL), "Text 0 is empty"),
    (lambda: LongClassifier.load("nowhere"), "holds no classifier"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(call, says):
    if says is None:
        call()
        return
    with pytest.raises(LmbookError) as error: call()
    assert says in str(error.value)


def test_bad_texts_and_damaged_folders(classifier, tmp_path: Path):
    for wrong, says in (("a text", "is one text"), ([1], "Text 0 is int"), (["", "a"], "Text 0 is empty")):
        with pytest.raises(LongTextError, match=says): classifier.predict(wrong)
    classifier.save(tmp_path / "saved")
    file = tmp_path / "saved" / "long_text.json"
    good = json.loads(file.read_text())
    other = [json.dumps({**good, "config": config}) for config in ({"joining": "sum"}, {"x": 1}, {"size": "8"})]
    for bad in ("{", "[]", '{"labels": ["a"]}', *other):
        file.write_text(bad)
        with pytest.raises(LmbookError): LongClassifier.load(tmp_path / "saved")


def test_a_batch_that_is_not_carried_remembers_nothing():
    model, loss = decoder(), CarriedMemory(6)
    ids = text(9)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    assert torch.equal(loss(model, batch)[0], loss(model, batch)[0])


# ---------------------------------------------------------------- planted faults


def memory_is_right(module: ModuleType) -> bool:
    model, ids = decoder(window=7), text(37)
    reader = module.MemoryReader(model, 6)
    with torch.no_grad(): pieces, whole = torch.cat([reader(x) for x in ids.split(5, 1)], 1), model(ids)
    return torch.allclose(pieces, whole)


def windows_are_right(module: ModuleType) -> bool:
    cut = module.windows(range(24), 8, 3)
    return [t for w in cut for t in range(w.new, w.end)] == list(range(24))


def classes_are_right(module: ModuleType) -> bool:
    made = module.LongClassifier.fit(RECORDS, module.LongConfig("mean", 8, 2, 260, 16, n_head=2, steps=1))
    texts = [record["text"] for record in RECORDS]
    return bool(np.allclose(made.scores(texts)[0], made.scores(texts[:1])[0], atol=1e-5))


@pytest.mark.parametrize("check, old, new", [
    (memory_is_right, "torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)", "torch.cat([k, self.k], 2), torch.cat([v, self.v], 2)"),
    (memory_is_right, "torch.arange(self.read, self.read + T, device=device)", "torch.arange(T, device=device)"),
    (memory_is_right, "self.k, self.v = k[:, :, -self.memory :].detach()", "self.k, self.v = k[:, :, : self.memory].detach()"),
    (windows_are_right, "(i - 1) * stride + size if i else 0", "i * stride if i else 0"),
    (windows_are_right, "last = max(0, -(-(N - size) // stride))", "last = max(0, (N - size) // stride)"),
    (classes_are_right, "return table.sum(1) / there.sum(1, keepdim=True)", "return table.mean(1)"),
])  # fmt: skip
def test_planted_faults_are_found(check, old, new, monkeypatch):
    assert check(long_text) and not check(planted(long_text, old, new, monkeypatch))
