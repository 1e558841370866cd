"""Training: batches by enumeration, one division over accumulated batches, resuming to the same bits, kills, faults of disks, bad input."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmbook import checkpoints, core, training
from lmbook.batches import IGNORE, Batch, BatchError, Batches, Examples, TokenStream, open_tokens, pack_rows, write_tokens
from lmbook.checkpoints import (
    CheckpointError,
    Checkpoints,
    Found,
    checkpoint_problem,
    latest,
    load_state,
    load_weights,
    save_checkpoint,
    save_weights,
    steps_in,
)
from lmbook.core import LmbookError, best_device, evaluating, random_state, seed_everything, set_random_state
from lmbook.experiments import Table, ablate, over_seeds
from lmbook.tokenization import ByteTokenizer, CharTokenizer
from lmbook.training import History, TensorBoard, TrainConfig, Trainer, TrainingError, mean_loss, next_token_loss, read_log

V = 30
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
    yield
    signal.signal(signal.SIGINT, sigint)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def tiny(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, 8), nn.Dropout(dropout), nn.Linear(8, V))


def sentences(n: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, length).tolist() for length in rng.integers(2, 12, n)]


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 24, "lr": 1e-2, "warmup": 3, "log_every": 3, "device": "cpu", **changes})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def message(function, *arguments, error=TrainingError, **options) -> str:
    with pytest.raises(error) as caught: function(*arguments, **options)
    return str(caught.value)


# ---------------------------------------------------------------- batches

lengths = st.lists(st.integers(2, 9), min_size=1, max_size=40)


@given(lengths, st.integers(0, 3), st.sampled_from(["rows", "places", "pack"]), st.booleans())
@settings(max_examples=150)
def test_an_epoch_teaches_each_token_once_whatever_the_rows(sizes, sort, how, shuffle):
    examples, start = [], 1
    for size in sizes: examples.append(list(range(start, start + size))); start += size  # each id once in the data
    options = {"rows": {"batch_size": min(4, len(sizes)), "sort": sort}, "places": {"tokens": 20, "sort": sort},
               "pack": {"batch_size": 2, "pack": True, "length": 12}}[how]  # fmt: skip
    source = Examples(examples, shuffle=shuffle, **options)
    for epoch in (0, 1):
        wanted = {(a, b) for e in examples for a, b in zip(e, e[1:])}
        found = Counter()
        for batch in source.read(epoch):
            assert batch.tokens == int((batch.targets != IGNORE).sum()) and (batch.targets[batch.segments == 0] == IGNORE).all()
            if how == "places": assert batch.ids.numel() <= 20
            if how == "pack": assert batch.ids.shape[1] == 12
            found.update((int(i), int(t)) for i, t in zip(batch.ids.flatten(), batch.targets.flatten()) if t != IGNORE)
            if batch.positions is not None:
                for ids, segments, positions in zip(batch.ids, batch.segments, batch.positions):
                    for number in range(1, int(segments.max()) + 1):  # each document of a row is one example, whole and in order
                        place = segments == number
                        assert ids[place].tolist() in [e[:-1] for e in examples]
                        assert positions[place].tolist() == list(range(int(place.sum())))
        assert found == Counter(wanted)


@given(st.lists(st.integers(1, 10), max_size=60))
def test_packing_keeps_to_the_length_and_leaves_no_two_rows_that_fit_together(sizes):
    rows = pack_rows(sizes, 10)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[i] for i in row) for row in rows)
    assert all(n <= 10 for n in filled)
    assert len(filled) < 2 or sum(filled[:2]) > 10  # best fit opens a row only where nothing has room


def test_packing_a_hundred_thousand_examples_is_quick_and_tight():
    sizes = np.random.default_rng(0).integers(1, 200, 100_000).tolist()
    rows = pack_rows(sizes, 2048)
    assert len(rows) < 1.005 * sum(sizes) / 2048 + 2


def test_pairs_teach_only_the_answer():
    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    batch = next(Examples(pairs, batch_size=2, shuffle=False).read())
    assert batch.ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, 4, 5], [7, 8, 9, IGNORE]]
    assert batch.segments.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]] and batch.tokens == 5
    packed = next(Examples(pairs, batch_size=1, pack=True, length=7, shuffle=False).read())
    assert packed.targets.tolist() == [[IGNORE, IGNORE, 4, 5, 7, 8, 9]] and packed.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2]]


def test_pairs_kept_apart():
    batch = next(Examples([([1, 2, 3], [4, 5, 6]), ([6], [7, 8])], batch_size=2, join=False, shuffle=False, pad_id=9).read())
    assert batch.source.tolist() == [[1, 2, 3], [6, 9, 9]] and batch.source_segments.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.ids.tolist() == [[4, 5], [7, 9]] and batch.targets.tolist() == [[5, 6], [8, IGNORE]]


def test_sorting_brings_equals_together_but_keeps_chance():
    source = Examples(sentences(400), batch_size=8, sort=10)
    spread = [float(b.segments.sum(1).double().std()) for b in source.read()]
    assert np.mean(spread) < 0.5
    order = [b.ids[0].tolist() for b in source.read()]
    assert [b.ids[0].tolist() for b in source.read(1)] != order == [b.ids[0].tolist() for b in source.read()]
    widths = [b.ids.shape[1] for b in source.read()]
    assert widths != sorted(widths)


@given(st.integers(10, 80), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_a_stream_predicts_the_next_token_and_covers_the_text(n, rows, length, shuffle):
    if (n - 1) // length < rows: return
    for batch in TokenStream(np.arange(n), rows, length, shuffle=shuffle).read(): assert torch.equal(batch.targets, batch.ids + 1)
    found = [t for b in TokenStream(np.arange(n), rows, length, shuffle=shuffle).read(3) for t in b.targets.flatten().tolist()]
    assert len(found) == len(set(found)) == (n - 1) // length * length  # all but what does not fill a window


def test_the_same_weights_are_the_same_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    for i in range(20): save_weights(model, tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(20)}) == 1
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    load_weights(other, tmp_path / "0.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_what_fills_no_window_is_left_out_now_here_now_there():
    "57 tokens make 11 windows of 5 and a rest; over some epochs each token is asked, and not always the same are left out."
    stream = TokenStream(np.arange(57), 2, 5, shuffle=True)
    epochs = [{t for b in stream.read(epoch) for t in b.targets.flatten().tolist()} for epoch in range(40)]
    assert set().union(*epochs) == set(range(1, 57)) and len({frozenset(e) for e in epochs}) == 2


def test_tokens_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    real, synced = os.fsync, set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), real(descriptor)))
    write_tokens(tmp_path / "tokens.npy", range(100), 100)
    assert (tmp_path / "tokens.npy").stat().st_ino in synced


@given(st.integers(10, 80), st.integers(1, 4), st.integers(1, 6))
def test_a_contiguous_stream_goes_on_row_by_row(n, rows, length):
    if (n - 1) // length < rows: return
    batches = list(TokenStream(np.arange(n), rows, length, contiguous=True).read())
    assert [b.carry for b in batches] == [False] + [True] * (len(batches) - 1)
    for before, after in zip(batches, batches[1:]): assert torch.equal(after.ids[:, 0], before.targets[:, -1])
    assert sum(b.tokens for b in batches) == (n - 1) // rows * rows


@pytest.mark.parametrize("taken", [0, 1, 5, 7, 8, 15])
@pytest.mark.parametrize("make", [
    lambda: Examples(sentences(), batch_size=8, sort=2), lambda: Examples(sentences(), batch_size=2, pack=True, length=24),
    lambda: TokenStream(np.arange(200) % V, 4, 6), lambda: TokenStream(np.arange(200) % V, 4, 6, contiguous=True),
    lambda: TokenStream(np.arange(200) % V, 4, 6).map(lambda b: b),
])  # fmt: skip
def test_a_source_is_entered_in_the_middle(make, taken):
    def endless(source):
        while True: yield from source

    whole, part, other = make(), make(), make()
    want = [b.ids.tolist() for b in islice(endless(whole), 30)]
    for _ in islice(endless(part), taken): pass
    other.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert [b.ids.tolist() for b in islice(endless(other), 30 - taken)] == want[taken:]
    assert sum(len(list(make().read(e))) for e in range(3)) == make().count(3)


def test_map_changes_each_batch():
    def hide(batch): return Batch(batch.ids * 0, batch.targets)

    source = Examples(sentences(), batch_size=8).map(hide)
    assert all(b.ids.sum() == 0 for b in source) and source.epoch == 1


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Examples([], batch_size=1), "no examples"),
    (lambda: Examples([[1]], batch_size=1), "Example 0 has 1 tokens"),
    (lambda: Examples([[1, 2], []], batch_size=1), "Example 1 has 0 tokens"),
    (lambda: Examples([[1, 2]], batch_size=2), "batch_size=2 is more than the 1 examples"),
    (lambda: Examples([[1, 2]]), "either batch_size= (rows) or tokens="),
    (lambda: Examples([[1, 2]], batch_size=0), "at least 1"),
    (lambda: Examples([[1, 2]], batch_size=1, tokens=3), "either batch_size="),
    (lambda: Examples([[1, 2]], batch_size=1, pack=True), "Packing needs length="),
    (lambda: Examples([[1, 2, 3]], batch_size=1, pack=True, length=1), "Example 0 takes 2 places, 1 are allowed"),
    (lambda: Examples([[1, 2], [1, 2, 3, 4, 5]], tokens=3), "Example 1 takes 4 places, 3 are allowed"),
    (lambda: Examples([[1, 2]], batch_size=1, pack=True, length=9, sort=2), "leave out sort="),
    (lambda: Examples([[1.5, 2.5]], batch_size=1), "array of float64"),
    (lambda: Examples([[1, 2]], batch_size=1, join=False), "Example 0 has no source"),
    (lambda: Examples([([1], [])], batch_size=1), "Example 0 has 0 tokens"),
    (lambda: TokenStream([], 1, 1), "0 tokens make 0 windows"),
    (lambda: TokenStream([1, 2, 3], 2, 2), "too few for one batch of 2"),
    (lambda: TokenStream([[1, 2]], 1, 1), "shape (1, 2)"),
    (lambda: TokenStream(np.arange(9), 1, 0), "at least 1"),
    (lambda: TokenStream(np.arange(9), 1, 2, shuffle=True, contiguous=True), "either shuffled or contiguous"),
    (lambda: TokenStream(np.arange(99), 1, 2).load_state_dict(TokenStream(np.arange(50), 1, 2).state_dict()), "not the data of the che"),
    (lambda: TokenStream.of("one text", ByteTokenizer(), batch_size=1, length=2), "Give several texts"),
    (lambda: TokenStream.of(["no ids"], batch_size=1, length=2), "Text 0 should be a row of token ids"),
    (lambda: Examples([[1, 2, IGNORE]], batch_size=1), "The id -100 is no token: ids run from 0"),
    (lambda: Examples([([1, -2], [3])], batch_size=1), "The id -2 is no token: ids run from 0"),
    (lambda: TokenStream([1, 2, 3, IGNORE], batch_size=1, length=3), "The id -100 is no token: ids run from 0"),
    (lambda: TokenStream.of([[1, 2], [3, IGNORE]], batch_size=1, length=3), "The id -100 is no token: ids run from 0"),
    (lambda: Examples([[[1, 2], 3]], batch_size=1), "Example 0 should be a row of token ids, but holds rows"),
    (lambda: TokenStream.of([], batch_size=1, length=2), "0 tokens make 0 windows"),
    (lambda: TokenStream(np.arange(9), 1, 2).load_state_dict(TokenStream(np.arange(9), 1, 2, seed=4).state_dict()), "'seed': 4"),
])  # fmt: skip
def test_bad_data_get_one_clear_error(call, says): assert says in message(call, error=BatchError)


def test_tokens_on_disk(tmp_path):
    documents = sentences(3000)
    flat = [t for d in documents for t in d]
    for kind in (iter(documents), (np.array(d) for d in documents), map(torch.tensor, documents), iter(flat), np.array(flat)):
        tokens = write_tokens(tmp_path / "a.npy", kind, V)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.tolist() == flat
    assert write_tokens(tmp_path / "b.npy", [[70_000]], 100_000).dtype == np.uint32 and np.load(tmp_path / "b.npy").tolist() == [70_000]
    assert open_tokens(tmp_path / "a.npy").tolist() == flat and sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_faults_of_token_files(tmp_path):
    path = tmp_path / "a.npy"
    write_tokens(path, [[1, 2, 3]], V)
    before = path.read_bytes()
    assert f"The id {V} is not in a vocabulary of {V}" in message(write_tokens, path, [[1], [V]], V, error=BatchError)
    assert "The id -1 is" in message(write_tokens, path, [[-1]], V, error=BatchError)
    assert "no tokens" in message(write_tokens, path, [], V, error=BatchError)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.npy"]  # nothing was replaced, nothing is left over
    path.write_bytes(before[:-1])
    assert "is torn" in message(open_tokens, path, error=BatchError)
    path.write_bytes(b"tokens")
    assert "is torn, or is no file of tokens" in message(open_tokens, path, error=BatchError)
    np.save(path, np.ones((2, 2)))
    assert "no row of token ids" in message(open_tokens, path, error=BatchError)
    assert "`write_tokens` makes one" in message(open_tokens, tmp_path / "b.npy", error=BatchError)
    assert "cannot be written" in message(write_tokens, path / "a.npy", [1], V, error=BatchError)  # below a file


def test_a_file_of_somebody_else_is_looked_at_batch_by_batch(tmp_path):
    "A file of `write_tokens` has no room for a sign. Any other is not read before it is used, and then each batch is looked at."
    np.save(tmp_path / "a.npy", np.array([1, 2, 3, 4, 5, IGNORE, 1], dtype=np.int64))
    stream = TokenStream(open_tokens(tmp_path / "a.npy"), batch_size=1, length=3, shuffle=False)
    first, second = stream.plan(0)
    assert stream.make(first).tokens == 3
    assert "The id -100 is no token" in message(stream.make, second, error=BatchError)


@given(st.lists(st.text("ab. ", max_size=9), min_size=1, max_size=20), st.sampled_from([None, True, False]))
def test_texts_become_one_stream(texts, marks):
    tokenizer = ByteTokenizer()
    ends = marks is not False  # None: where the tokenizer has them, and this one has
    wanted = [i for text in texts for i in tokenizer.encode(text, bos=ends, eos=ends)]
    if len(wanted) < 2: return
    stream = TokenStream.of(iter(texts), tokenizer, batch_size=1, length=1, bos=marks, eos=marks, seed=3, shuffle=False)
    assert stream.tokens.tolist() == wanted and stream.seed == 3 and not stream.shuffle
    rows = [tokenizer.encode(text, bos=ends, eos=ends) for text in texts]
    for kind in (rows, map(np.array, rows), map(torch.tensor, rows)):
        assert TokenStream.of(kind, batch_size=1, length=1, contiguous=True).tokens.tolist() == wanted
    bare = CharTokenizer(sorted("ab. "), specials=("<unk>",))  # it has no marks
    plain = [i for text in texts for i in bare.encode(text)]
    if len(plain) > 1: assert TokenStream.of(texts, bare, batch_size=1, length=1).tokens.tolist() == plain


# ---------------------------------------------------------------- losses


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(0, 2**31))
@settings(max_examples=50)
def test_padded_and_packed_batches_have_the_losses_of_single_sentences(sizes, seed):
    examples = [np.random.default_rng([seed, i]).integers(1, V, n).tolist() for i, n in enumerate(sizes)]
    model = tiny(0.0).double()
    alone = sum(float(F.cross_entropy(model(torch.tensor(e[:-1])), torch.tensor(e[1:]), reduction="sum").detach()) for e in examples)
    count = sum(sizes) - len(sizes)
    for source in (Examples(examples, batch_size=len(sizes)), Examples(examples, tokens=16, sort=3)):
        assert math.isclose(mean_loss(model, source), alone / count, rel_tol=1e-12)

    class Told(nn.Module):  # is told of packed rows
        def __init__(self): super().__init__(); self.inner = model

        def forward(self, ids, segments, positions): return self.inner(ids)

    assert math.isclose(mean_loss(Told(), Examples(examples, batch_size=1, pack=True, length=10)), alone / count, rel_tol=1e-12)


def test_a_model_that_knows_nothing_of_packed_rows_is_not_given_them_quietly():
    with pytest.raises(TypeError, match="segments"): mean_loss(tiny(), Examples(sentences(), batch_size=2, pack=True, length=12))


def test_logits_of_a_wrong_shape():
    batch = next(Examples(sentences(), batch_size=4).read())
    assert "(B, T, V) is needed" in message(next_token_loss, lambda ids: tiny()(ids)[:, -1], batch)


def test_evaluation_leaves_the_modes_of_all_parts_as_they_were():
    model = tiny()
    model.train()
    model[1].eval()
    with evaluating(model): assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
    assert model.training and not model[1].training and model[2].training
    source = Examples(sentences(), batch_size=8)
    for _ in islice(source, 3): pass
    assert mean_loss(model, source) == mean_loss(model, list(source.read())) and source.position == 3
    assert "nothing to evaluate on" in message(mean_loss, model, [])


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulated_batches_are_one_large_batch(clip):
    data = sentences(48)
    rows = [Examples(data, batch_size=n, shuffle=False) for n in (24, 6)]
    models = [tiny(0.0).double() for _ in rows]
    for model, source, accumulate in zip(models, rows, (1, 4)):
        Trainer(model, source, config(steps=6, lr=0.3, optimizer="sgd", accumulate=accumulate, clip=clip)).fit()
    for a, b in zip(models[0].parameters(), models[1].parameters()): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    wrong = tiny(0.0).double()  # the mean of means is another model: the test can fail
    for batches in zip(*[iter(list(rows[1].read()) * 3)] * 4):
        grads = [torch.autograd.grad(next_token_loss(wrong, b)[0] / b.tokens / 4, list(wrong.parameters())) for b in batches]
        with torch.no_grad():
            for p, *g in zip(wrong.parameters(), *grads): p -= 0.3 * sum(g)
    assert max((a - b).abs().max().item() for a, b in zip(models[0].parameters(), wrong.parameters())) > 1e-4


@pytest.mark.parametrize(("accumulate", "epochs", "steps"), [(1, 2, 16), (3, 2, 6), (16, 1, 1), (5, 1, 2)])
def test_epochs_are_whole(accumulate, epochs, steps):
    data = sentences(60)
    trainer = Trainer(tiny(), Examples(data, batch_size=8), TrainConfig(epochs=epochs, accumulate=accumulate, device="cpu"))
    assert trainer.fit().stopped == "steps" and trainer.step == trainer.total == steps
    assert trainer.tokens == epochs * sum(len(s) - 1 for s in data)


def test_the_schedule_multiplies_the_rate_of_each_group():
    def two_rates(model):
        return torch.optim.SGD([{"params": [model[0].weight], "lr": 0.1}, {"params": list(model[2].parameters()), "lr": 0.01}], lr=1.0)

    seen = []
    def listen(trainer, event, row):
        if event == "step": seen.append([g["lr"] for g in trainer.optimizer.param_groups])

    straight = config(warmup=0, steps=4, optimizer=two_rates, schedule=lambda step, total: 1 - step / total)
    Trainer(tiny(), Examples(sentences(), batch_size=8), straight, callbacks=[listen]).fit()
    assert np.allclose(seen, [[0.1 * f, 0.01 * f] for f in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("schedule", list(training.SCHEDULES))
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rmsprop", "adam", "adamw", "lion"])
def test_every_schedule_and_optimizer_by_name(schedule, optimizer):
    how = config(steps=6, schedule=schedule, optimizer=optimizer, warmup=0, weight_decay=0.1)
    trainer = Trainer(tiny(), Examples(sentences(), batch_size=8), how)
    assert len(trainer.fit().rows) == 2


def test_bfloat16_trains_with_weights_in_float32():
    trainer = Trainer(tiny(), Examples(sentences(), batch_size=8), config(steps=60, lr=0.1, dtype="bfloat16"))
    history = trainer.fit()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert history.curve("loss")[1][-1] < history.curve("loss")[1][0]


def test_patience_and_the_best_weights():
    values = iter([3.0, 2.0, 2.5, 1.99, 2.6, 2.7])
    kept = {}

    def evaluate(model):
        kept[len(kept)] = [p.clone() for p in model.parameters()]
        return {"loss aside": next(values), "other": 1.0}

    how = config(eval_every=2, patience=2, min_delta=0.05, load_best=True)
    trainer = Trainer(tiny(), Examples(sentences(), batch_size=8), how, evaluate=evaluate)
    history = trainer.fit()
    assert (history.best, history.best_step, history.stopped, trainer.step) == (2.0, 4, "patience", 8)  # 1.99 is not better by 0.05
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), kept[1]))
    assert trainer.fit() is history and trainer.step == 8  # what has lost patience stays stopped


def test_a_callback_hears_everything_and_may_stop():
    heard = []

    def callback(trainer, event, row):
        heard.append(event)
        if event == "log" and row["step"] == 6: trainer.stop("enough")

    history = Trainer(tiny(), Examples(sentences(), batch_size=8), config(eval_every=4), evaluate=lambda m: 1.0, callbacks=[callback]).fit()
    assert history.stopped == "enough"
    assert Counter(heard) == {"start": 1, "step": 6, "log": 2, "evaluate": 1, "end": 1}


def modes(model: nn.Module) -> list[bool]: return [module.training for module in model.modules()]


@pytest.mark.parametrize("frozen", ["nothing", "a part", "all but a part", "everything"])
def test_each_module_keeps_its_mode(frozen, tmp_path):
    "Parts that are frozen stay so while the others are trained; a model that comes from writing is trained all the same."
    model, seen = tiny(), []
    if frozen in ("all but a part", "everything"): model.eval()
    if frozen == "a part": model[1].eval()
    if frozen == "all but a part": model[1].train()
    before = modes(model)

    def callback(trainer, event, row):
        seen.append(modes(trainer.model))
        if event == "step" and row["step"] == 5: trainer.stop("interrupted")
        if event == "step" and row["step"] == 8: raise RuntimeError("no power")

    trainer = Trainer(
        model, Examples(sentences(), batch_size=8), config(eval_every=2), evaluate=Examples(sentences(5), batch_size=2),
        callbacks=[callback], checkpoints=Checkpoints(tmp_path),
    )  # fmt: skip
    trainer.fit()
    assert modes(model) == before and trainer.step == 5
    with pytest.raises(RuntimeError, match="no power"): trainer.fit()
    assert modes(model) == before
    during = [True] * len(before) if frozen == "everything" else before
    assert len(seen) > 10 and all(mode == during for mode in seen)


@pytest.mark.parametrize("kind", ["list", "iterable", "loader"])
def test_other_iterables_of_batches(kind):
    ready = list(Examples(sentences(), batch_size=8).read())

    class Again:
        def __iter__(self): return iter(ready)

    batches = {"list": ready, "iterable": Again(), "loader": torch.utils.data.DataLoader(ready, batch_size=None)}[kind]
    trainer = Trainer(tiny(), batches, config())
    assert trainer.fit().stopped == "steps" and trainer.batches.epoch >= 2


def test_a_generator_is_read_once_and_says_so():
    once = (b for b in Examples(sentences(), batch_size=8).read())
    assert "A generator can be read only once" in message(Trainer(tiny(), once, config()).fit)
    assert "give steps=" in message(Trainer, tiny(), (b for b in ()), TrainConfig(epochs=1, device="cpu"))
    assert "no batches" in message(Trainer, tiny(), [], TrainConfig(epochs=1, device="cpu"))
    assert "no more batches" in message(Trainer(tiny(), [], config()).fit)


def test_a_loss_that_is_no_number_stops_the_run():
    def broken(model, batch):
        total, count = next_token_loss(model, batch)
        return total * math.nan, count

    assert "Step 3: the loss is nan" in message(Trainer(tiny(), Examples(sentences(), batch_size=8), config(), loss=broken).fit)
    nothing = [Batch(torch.ones(2, 2, dtype=torch.long), torch.full((2, 2), IGNORE))]
    assert "no target of this batch counts" in message(Trainer(tiny(), nothing, config()).fit)
    trainer = Trainer(tiny(), Examples(sentences(), batch_size=8), config(eval_every=1), evaluate=lambda model: math.inf)
    assert "the evaluation is inf" in message(trainer.fit)


def test_nan_is_never_saved(tmp_path):
    def breaks(model, batch, calls=[]):  # noqa: B006 (counts its calls)
        calls.append(1)
        total, count = next_token_loss(model, batch)
        return total * (math.nan if len(calls) > 4 else 1), count

    data, how = Examples(sentences(), batch_size=8), config(save_every=1, log_every=20)
    trainer = Trainer(tiny(), data, how, loss=breaks, checkpoints=Checkpoints(tmp_path))
    assert "Step 5: the loss is nan. The checkpoint of step 4 is from before" in message(trainer.fit)
    assert latest(tmp_path).step == 4


@pytest.mark.parametrize(("options", "says"), [
    ({}, "either steps= or epochs="), ({"steps": 1, "epochs": 1}, "either steps= or epochs="),
    ({"steps": 0}, "steps=0 must be a whole number, at least 1"), ({"steps": 9, "keep": 0}, "keep=0 must be a whole number, at least 1"),
    ({"steps": 9, "lr": 0.0}, "lr=0.0 must be above 0"), ({"steps": 9, "lr": math.nan}, "lr=nan must be above 0"),
    ({"steps": 9, "weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"), ({"steps": 9, "warmup": 9}, "must be shorter"),
    ({"steps": 9, "patience": 2}, "give eval_every="), ({"steps": 9, "clip": 0.0}, "clip must be above 0"),
    ({"steps": 9, "schedule": "cosinus"}, "There is no schedule='cosinus'. Choose one of: constant, linear, cosine"),
    ({"steps": 9, "optimizer": "adamm"}, "no optimizer='adamm'. Choose one of: sgd, adagrad"),
    ({"steps": 9, "dtype": "float8"}, "no dtype='float8'. Choose one of: float32, bfloat16"),
    ({"steps": 9, "warmup": 2, "schedule": lambda s, t: 1.0}, "put it into your function"),
    ({"steps": 9, "weight_decay": 0.1, "optimizer": lambda m: None}, "put it into your function"),
])  # fmt: skip
def test_a_configuration_that_disagrees_with_itself(options, says): assert says in message(TrainConfig, **options)


def test_relations_with_what_is_trained(tmp_path):
    data = Examples(sentences(), batch_size=8)
    assert "give evaluate=" in message(Trainer, tiny(), data, config(eval_every=2))
    assert "give checkpoints=" in message(Trainer, tiny(), data, config(save_every=2))
    long = TrainConfig(epochs=1, warmup=8, device="cpu")
    assert "warmup (8) must be shorter than the training (8 steps)" in message(Trainer, tiny(), data, long)


# ---------------------------------------------------------------- chance and devices


def test_all_dice_are_put_back():
    def throw():
        ours = np.random.rand(), np.random.randn()  # noqa: NPY002
        return *ours, torch.rand(2).tolist(), torch.randn(1).item(), random.gauss(0, 1)

    seed_everything(3)
    throw()  # leaves half a pair of normal numbers behind
    state = random_state()
    first = throw()
    set_random_state(state)
    assert throw() == first
    seed_everything(3)
    a = throw()
    seed_everything(3)
    assert throw() == a
    assert "2**32 - 1, not -1" in message(seed_everything, -1, error=LmbookError)


def test_devices():
    assert best_device("cpu") == torch.device("cpu") and best_device().type in ("cpu", "cuda", "mps")
    assert "knows no device 'gpu'" in message(best_device, "gpu", error=LmbookError)
    beyond = f"cuda:{torch.cuda.device_count()}"
    assert f"{beyond!r} here: PyTorch sees" in message(best_device, beyond, error=LmbookError)
    if not torch.backends.mps.is_available(): assert "no 'mps' here" in message(best_device, "mps", error=LmbookError)


# ---------------------------------------------------------------- resuming


def run(folder=None, callbacks=(), model=None, data=None, **changes) -> Trainer:
    options = {"eval_every": 4, "patience": 5, "accumulate": 2, "weight_decay": 0.1, **changes}
    if folder is not None: options.setdefault("save_every", 5)
    return Trainer(model or tiny(), data or Examples(sentences(), batch_size=8, sort=2), config(**options), callbacks=callbacks,
                   evaluate=Examples(sentences(20, seed=1), batch_size=5), checkpoints=kept(folder))  # fmt: skip


def kept(folder) -> Checkpoints | None: return None if folder is None else Checkpoints(folder)


class Unplugged(Exception): pass


def unplug(at: int):
    def callback(trainer, event, row):
        if event == "step" and row["step"] == at: raise Unplugged

    return callback


@pytest.mark.parametrize("at", [1, 5, 6, 8, 12, 23, 24])
def test_a_run_that_broke_off_goes_on_to_the_same_bits(tmp_path, at):
    whole = run()
    whole.fit()
    with pytest.raises(Unplugged): run(tmp_path, [unplug(at)]).fit()
    again = run(tmp_path, [lambda *_: None])
    assert again.fit() == whole.history and same(again.model, whole.model)
    steps = [(row["step"], "loss" in row) for row in read_log(tmp_path / "log.jsonl")]
    assert steps == [(row["step"], "loss" in row) for row in whole.history.rows]


def test_a_recurrent_model_carries_its_state_over_a_break(tmp_path):
    class Recurrent(nn.Module):
        "Keeps its state as a buffer, so that it is saved."

        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.token, self.cell, self.out = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, V)
            self.register_buffer("state", torch.zeros(1, 4, 8))

        def forward(self, ids: Tensor, carry: bool) -> Tensor:
            out, state = self.cell(self.token(ids), self.state if carry else torch.zeros_like(self.state))
            if self.training: self.state = state.detach()
            return self.out(out)

    def loss(model, batch):
        logits = model(batch.ids, batch.carry)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"), batch.tokens

    def make(folder=None, callbacks=()):
        stream = TokenStream(np.random.default_rng(0).integers(0, V, 400), 4, 8, contiguous=True)
        return Trainer(Recurrent(), stream, config(steps=20), loss=loss, checkpoints=kept(folder), callbacks=callbacks)

    whole = make()
    whole.fit()
    (tmp := make(tmp_path)).config.__dict__["save_every"] = 3  # (a frozen config: only this test knows better)
    tmp.callbacks.append(unplug(11))
    with pytest.raises(Unplugged): tmp.fit()
    again = make(tmp_path)
    assert again.fit() == whole.history and same(again.model, whole.model) and again.model.state.abs().sum() > 0


def test_callbacks_and_losses_with_a_state_are_saved_too(tmp_path):
    class Counting:
        def __init__(self): self.calls = 0

        def __call__(self, model, batch):
            self.calls += 1
            return next_token_loss(model, batch)

        def state_dict(self): return {"calls": self.calls, "nested": [(1, None, True), torch.ones(2), {3: "x"}]}

        def load_state_dict(self, state):
            assert state["nested"][0] == (1, None, True) and state["nested"][2] == {3: "x"}
            self.calls = state["calls"]

    def make(callbacks=()):
        return Trainer(tiny(), Examples(sentences(), batch_size=8), config(save_every=4), loss=Counting(), callbacks=callbacks,
                       checkpoints=Checkpoints(tmp_path))  # fmt: skip

    with pytest.raises(Unplugged): make([unplug(10)]).fit()
    again = make()
    again.fit()
    assert again.loss.calls == 24
    other = Trainer(tiny(), Examples(sentences(), batch_size=8), config(steps=30, save_every=4), checkpoints=Checkpoints(tmp_path))
    assert "give the same loss and callbacks" in message(other.fit)


def test_a_plain_iterable_begins_its_epoch_anew(tmp_path):
    class Again:
        def __iter__(self): return iter(list(Examples(sentences(), batch_size=8).read()))

    def make(callbacks=()):
        return Trainer(tiny(), Again(), config(save_every=5), checkpoints=Checkpoints(tmp_path), callbacks=callbacks)

    with pytest.raises(Unplugged): make([unplug(12)]).fit()
    again = make()
    assert again.fit().stopped == "steps" and again.step == 24


def test_a_finished_run_is_not_trained_again_and_gives_its_best_weights(tmp_path):
    first = run(tmp_path, load_best=True)
    history = first.fit()
    again = run(tmp_path, load_best=True)
    assert again.fit() == history and again.step == first.step and same(again.model, first.model)
    best = tiny()
    load_weights(best, tmp_path / f"step-{history.best_step:06}")
    assert same(best, again.model)


def test_only_wanted_checkpoints_stay(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    how = config(save_every=2, keep=2, eval_every=4)
    data = Examples(sentences(), batch_size=8)
    Trainer(tiny(), data, how, evaluate=lambda m: next(values), checkpoints=Checkpoints(tmp_path)).fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "step-000008", "step-000022", "step-000024"]
    assert not any(checkpoint_problem(p) for p in tmp_path.glob("step-*"))


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"seed": 1}, {"accumulate": 1}, {"schedule": "linear"}])
def test_another_run_in_the_folder_is_left_alone(tmp_path, change):
    run(tmp_path).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert f"configuration: {next(iter(change))} was" in message(run(tmp_path, **{"steps": 48, **change}).fit, error=CheckpointError)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_more_steps_go_on(tmp_path):
    run(tmp_path, schedule="constant", patience=None).fit()
    longer, whole = run(tmp_path, schedule="constant", patience=None, steps=40), run(schedule="constant", patience=None, steps=40)
    assert longer.fit().curve("loss")[1].tolist() == whole.fit().curve("loss")[1].tolist() and same(longer.model, whole.model)


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_finishes_the_step_saves_and_goes_on(tmp_path):
    def press(trainer, event, row):
        if event == "step" and row["step"] == 7 and not trainer.pressed:
            trainer.pressed = True
            signal.raise_signal(signal.SIGINT)

    whole, stopped = run(), run(tmp_path, [press])
    whole.fit()
    stopped.pressed = False
    before = signal.getsignal(signal.SIGINT)
    assert stopped.fit().stopped == "interrupted" and stopped.step == 7 and latest(tmp_path).step == 7
    assert signal.getsignal(signal.SIGINT) is before
    other = run(tmp_path, [lambda *_: None])  # in a new process
    torch.rand(3)
    np.random.rand()  # noqa: NPY002 (somebody throws dice in between)
    assert stopped.fit() == whole.history and same(stopped.model, whole.model)  # in this one
    for path in tmp_path.glob("step-*"):
        if path.name > "step-000007": checkpoints._remove(path)
    assert other.fit() == whole.history and same(other.model, whole.model)


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path, monkeypatch):
    "Killed while its files are deleted: what is left has another name, and nobody calls it torn."
    for step in (1, 2): save_checkpoint(tmp_path, step, nn.Linear(2, 2), {"step": step})
    real = shutil.rmtree

    def killed(path, **more):
        if not Path(path).exists(): return real(path, **more)
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt): checkpoints._remove(tmp_path / "step-000002")
    monkeypatch.undo()
    assert list(checkpoints.steps_in(tmp_path)) == [1] and not latest(tmp_path).torn and latest(tmp_path).step == 1


def test_a_second_ctrl_c_stops_at_once():
    def press(trainer, event, row):
        if event == "step" and row["step"] == 7: signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt): run(callbacks=[press]).fit()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_ctrl_c_is_ignored_it_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    callback = lambda trainer, event, row: signal.raise_signal(signal.SIGINT) if event == "step" else None  # noqa: E731
    assert run(callbacks=[callback]).fit().stopped == "steps"


def test_training_in_another_thread_leaves_signals_alone():
    done = []
    thread = threading.Thread(target=lambda: done.append(run().fit().stopped))
    thread.start()
    thread.join()
    assert done == ["steps"]


def test_sigterm_saves_and_ends_the_program(tmp_path):
    "What `kill` and clusters send. Whoever has a handler of their own keeps it, and so does a run that nobody keeps."
    def end(trainer, event, row):
        if event == "step" and row["step"] == 7: signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended: run(tmp_path, [end]).fit()
    assert ended.value.code == 128 + signal.SIGTERM and latest(tmp_path).step == 7
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole, again = run(), run(tmp_path, [lambda *_: None])
    assert again.fit() == whole.fit() and same(again.model, whole.model)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        for folder in (None, tmp_path / "other"): assert run(folder, [end]).fit().stopped == "steps"
    finally: signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGTERM] * 2
    seen = []
    run(callbacks=[lambda *_: seen.append(signal.getsignal(signal.SIGTERM))]).fit()
    assert set(seen) == {signal.SIG_DFL}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_learning_rate_that_jumps_back_up_is_said(tmp_path, schedule):
    run(tmp_path, schedule=schedule, patience=None).fit()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(tmp_path, schedule=schedule, patience=None).fit()  # as it was
        assert not said
        run(tmp_path, schedule=schedule, patience=None, steps=48).fit()
    jumps = [str(w.message) for w in said if "jumps back to" in str(w.message)]
    assert len(jumps) == (schedule != "constant") and all("24 steps and now for 48" in line for line in jumps)


def test_what_may_differ_when_a_run_goes_on(tmp_path):
    run(tmp_path, patience=None).fit()
    gentle = lambda step, total: 0.1  # noqa: E731
    longer = run(tmp_path, patience=None, steps=30, schedule=gentle, warmup=0)
    longer.checkpoints.may_differ = Checkpoints(tmp_path, may_differ=["schedule", "warmup"]).may_differ
    assert longer.fit().curve("lr")[1][-1] == pytest.approx(0.1 * longer.config.lr)


# ---------------------------------------------------------------- checkpoints and their faults


@pytest.mark.filterwarnings("ignore:.*is passed over")
def test_a_damaged_newer_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    "With keep=1 the one that was just written must not go because one that is damaged has a higher number."
    plain = {"eval_every": None, "patience": None}
    with pytest.raises(Unplugged): run(tmp_path, [unplug(16)], keep=2, **plain).fit()
    (tmp_path / "step-000015" / "state.json").unlink()
    with pytest.raises(Unplugged): run(tmp_path, [unplug(14)], keep=1, save_every=1, **plain).fit()
    assert latest(tmp_path).step == 13 and list(steps_in(tmp_path)) == [15, 13]


def test_what_a_killed_process_left_is_swept_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_remove", lambda path: (_ for _ in ()).throw(Unplugged))  # killed before it came to that
    plain = {"keep": 1, "eval_every": None, "patience": None}
    with pytest.raises(Unplugged): run(tmp_path, **plain).fit()
    monkeypatch.undo()
    assert len(steps_in(tmp_path)) == 2
    (tmp_path / ".log.jsonl.abcdefgh").write_text("half")
    (tmp_path / ".writing-step-000015").mkdir()
    (tmp_path / ".hidden").write_text("somebody's")
    with pytest.raises(Unplugged): run(tmp_path, [unplug(11)], **plain).fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "log.jsonl", "step-000010"]


@pytest.mark.parametrize("name", ["log.jsonl", "step-000005"])
def test_no_link_is_followed(tmp_path, name):
    with pytest.raises(Unplugged): run(tmp_path / "run", [unplug(7)]).fit()
    victim = tmp_path / "victim"
    (tmp_path / "run" / name).rename(victim)
    (tmp_path / "run" / name).symlink_to(victim)
    before = victim.read_bytes() if victim.is_file() else len([*victim.iterdir()])
    assert f"links in place of files: {name}" in message(run(tmp_path / "run").fit, error=CheckpointError)
    assert before == (victim.read_bytes() if victim.is_file() else len([*victim.iterdir()]))


def test_a_folder_has_one_process(tmp_path):
    hold = "import sys; from lmbook.checkpoints import claim; held = claim(sys.argv[1]); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert "Another process is training in" in message(run(tmp_path).fit, error=CheckpointError)
    finally: other.kill(); other.wait()
    assert run(tmp_path).fit().stopped  # a lock goes with its process



@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "flip", "gone", "empty"])
def test_a_torn_checkpoint_is_found_out_and_passed_over(tmp_path, name, fault):
    whole = run()
    whole.fit()
    with pytest.raises(Unplugged): run(tmp_path, [unplug(17)]).fit()
    newest = latest(tmp_path)
    path = newest.path / name
    data = path.read_bytes()
    if fault == "gone": path.unlink()
    else: path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flip": data[:30] + bytes([data[30] ^ 1]) + data[31:]}[fault])
    found = latest(tmp_path)
    assert 0 < found.step < newest.step and [torn for torn, _ in found.torn] == [newest.path.name]
    assert name in found.torn[0][1] + "manifest.json"
    assert "`latest` finds one that is whole" in message(load_state, newest.path, error=CheckpointError)
    again = run(tmp_path, [lambda *_: None])
    with pytest.warns(UserWarning, match=f"{newest.path.name} is passed over"): again.fit()
    assert again.history == whole.history and same(again.model, whole.model) and not latest(tmp_path).torn


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], core._to_disk, Path.rename

    def watched_sync(path):
        sync(path)
        done.append(("sync", path.name))

    def watched_rename(path, target):
        done.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(core, "_to_disk", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    path = save_checkpoint(tmp_path, 3, tiny(), {"a": 1})
    at = done.index(("rename", ".writing-step-000003"))
    assert {name for what, name in done[:at] if what == "sync"} == {*(p.name for p in path.iterdir()), ".writing-step-000003"}
    assert done[at + 1 :] == [("sync", tmp_path.name)]


def test_nothing_but_torn_checkpoints(tmp_path):
    assert latest(tmp_path / "nothing") == Found(None, 0)
    save_checkpoint(tmp_path, 3, tiny(), {})
    (tmp_path / "step-000003" / "manifest.json").unlink()
    assert latest(tmp_path) == Found(None, 0, (("step-000003", "manifest.json is missing"),))


def test_nothing_is_pickled(tmp_path):
    run(tmp_path).fit()
    for path in tmp_path.rglob("*"):
        if not path.is_file(): continue
        assert path.suffix in (".json", ".jsonl", ".safetensors")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
        if path.suffix == ".json": json.loads(path.read_text(encoding="utf-8"))
    state = {"thing": print and (lambda: 0)}
    assert "state.thing is a function" in message(save_checkpoint, tmp_path, 99, tiny(), state, error=CheckpointError)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.out, self.bias = nn.Embedding(V, 8), nn.Linear(8, V, bias=False), nn.Parameter(torch.zeros(V))
        self.out.weight = self.token.weight
        both = torch.randn(2, 4)
        self.register_buffer("first", both[0])  # two views of one memory, which are not the same
        self.register_buffer("second", both[1])
        self.register_buffer("across", torch.randn(3, 2).T)  # not contiguous
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, ids): return self.out(self.token(ids)) + self.bias


def test_tied_shared_and_crossed_tensors_come_back(tmp_path):
    torch.manual_seed(0)
    one, two = TwoNames(), TwoNames()
    save_weights(one, tmp_path / "a.safetensors")
    load_weights(two, tmp_path / "a.safetensors")
    assert same(one, two) and two.out.weight is two.token.weight
    from safetensors.torch import load_file

    assert "out.weight" not in load_file(tmp_path / "a.safetensors")
    trainer = Trainer(TwoNames(), Examples(sentences(), batch_size=8), config(save_every=5), checkpoints=Checkpoints(tmp_path / "run"))
    trainer.fit()
    assert trainer.model.out.weight is trainer.model.token.weight


def test_two_matrices_do_not_become_one(tmp_path):
    torch.manual_seed(0)
    tied, apart = TwoNames(), TwoNames()
    apart.out.weight = nn.Parameter(apart.token.weight.detach().clone())
    save_weights(apart, tmp_path / "equal.safetensors")
    load_weights(tied, tmp_path / "equal.safetensors")  # twice the same is no loss
    assert same(tied, apart)
    with torch.no_grad(): apart.out.weight[0, 0] += 1
    save_weights(apart, tmp_path / "differ.safetensors")
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    text = message(load_weights, tied, tmp_path / "differ.safetensors", error=CheckpointError)
    assert "tied in the model, and different in the file: " in text and "out.weight" in text and "token.weight" in text
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from safetensors import torch as files

    path = tmp_path / "new folder" / "a.safetensors"
    save_weights(tiny(), path)
    before = path.read_bytes()

    def half(failure, tensors, where, metadata=None):
        Path(where).write_bytes(before[:100])
        raise failure

    for failure, says in ((OSError(28, "No space left"), "No space left"), (SafetensorError("I/O error: full"), "I/O error: full")):
        monkeypatch.setattr(files, "save_file", partial(half, failure))
        text = message(save_weights, tiny(), path, error=CheckpointError)
        assert "cannot be written" in text and says in text and "untouched" in text
        assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
        text = message(save_checkpoint, tmp_path / "run", 3, tiny(), {}, error=CheckpointError)
        assert text.startswith(f"The checkpoint of step 3 cannot be written to {tmp_path / 'run'}: ") and says in text
        assert text.count("cannot be written") == 1 and not steps_in(tmp_path / "run")


def test_weights_that_another_library_wrote(tmp_path):
    from safetensors.torch import save_model

    torch.manual_seed(0)
    one, two = TwoNames(), TwoNames()
    for model in (one, two): model.first, model.second = model.first.clone(), model.second.clone()  # save_model takes no views
    save_model(one, str(tmp_path / "a.safetensors"))
    load_weights(two, tmp_path / "a.safetensors")
    assert same(one, two)


def test_another_architecture_is_described_and_changes_nothing(tmp_path):
    save_weights(tiny(), tmp_path / "a.safetensors")
    torch.manual_seed(5)
    other = nn.Sequential(nn.Embedding(V, 9), nn.Dropout(0.1), nn.Identity(), nn.Linear(9, V))
    before = [p.clone() for p in other.parameters()]
    text = message(load_weights, other, tmp_path / "a.safetensors", error=CheckpointError)
    assert "missing in the file: 3.weight, 3.bias" in text and "not in the model: 2." in text
    assert "0.weight (30, 8) in the file, (30, 9)" in text
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert "cannot be read" in message(load_weights, other, tmp_path / "a.safetensors", error=CheckpointError)
    assert "cannot be read" in message(load_weights, other, tmp_path / "b.safetensors", error=CheckpointError)


def test_a_run_with_another_architecture_is_refused(tmp_path):
    run(tmp_path).fit()
    other = nn.Sequential(nn.Embedding(V, 9), nn.Dropout(0.3), nn.Linear(9, V))
    assert "another architecture" in message(run(tmp_path, model=other, steps=48).fit, error=CheckpointError)


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = run(tmp_path / "file" / "run")
    assert "so nothing was trained. Give another folder=." in message(trainer.fit, error=CheckpointError) and trainer.step == 0


@pytest.mark.skipif(os.name == "nt", reason="folders have no write permission on Windows")
def test_a_read_only_folder():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    me = os.geteuid()
    try:
        if me == 0: os.seteuid(65534)  # the superuser may write anywhere: be nobody
        trainer = run(folder)
        assert "Permission denied), so nothing was trained" in message(trainer.fit, error=CheckpointError) and trainer.step == 0
    finally:
        if me == 0: os.seteuid(me)
        folder.chmod(0o755)
        folder.rmdir()


DISK_FULL = """
import resource, sys, torch
from pathlib import Path
from tests.test_training import run, same, latest, CheckpointError, config, Examples, sentences
from torch import nn
from lmbook.checkpoints import Checkpoints, steps_in
from lmbook.training import Trainer
torch.set_num_threads(1)

def make(folder, callbacks=()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Dropout(.3), nn.Linear(8, 30))
    how = config(steps=20, save_every=5)
    return Trainer(model, Examples(sentences(), batch_size=8), how, checkpoints=Checkpoints(folder), callbacks=callbacks)

def fills_up(trainer, event, row):  # from here on no file may grow beyond 2,000 bytes
    if event == "step" and row["step"] == 13: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

whole = make(sys.argv[1] + "/whole")
whole.fit()
full = make(sys.argv[1] + "/full", [fills_up])
try: full.fit()
except CheckpointError as error: print(error)
assert full.step == 15 and latest(sys.argv[1] + "/full").step == 10 and not latest(sys.argv[1] + "/full").torn
assert not list(Path(sys.argv[1]).rglob(".writing*"))  # what was half written is gone
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
full.fit()  # there is room again: what could not be saved is saved first
assert list(steps_in(sys.argv[1] + "/full")) == [20, 15]
assert full.history == whole.history and same(full.model, whole.model) and latest(sys.argv[1] + "/full").step == 20
print("the same")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_full_disk_loses_nothing(tmp_path):
    environment, command = os.environ | {"TQDM_DISABLE": "1"}, [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 15 cannot be written" in done.stdout and "File too large" in done.stdout and "the same" in done.stdout
    assert "The newest whole one is step-000010. Make room" in done.stdout
    assert not list(tmp_path.rglob(".writing*"))


def test_killed_at_random_moments_it_ends_with_the_same_bits():
    from benchmarks.training import kills

    result = kills(20, seed=int.from_bytes(os.urandom(2), "big"))
    assert result["kills"] >= 20 and result["equal"] == result["runs"] >= 1


# ---------------------------------------------------------------- logs and tables


def test_the_log_leaves_out_a_line_that_was_being_written(tmp_path):
    run(tmp_path).fit()
    path = tmp_path / "log.jsonl"
    rows = read_log(path)
    path.write_bytes(path.read_bytes() + b'{"step": 99, "lo')
    assert read_log(path) == rows and {"time", "tokens_per_s"} <= rows[0].keys()


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(callbacks=[TensorBoard(tmp_path)])
    history = trainer.fit()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert np.allclose([e.value for e in board.Scalars("loss")], history.curve("loss")[1])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install 'lmbook[tensorboard]'" in message(TensorBoard, tmp_path)


def test_history():
    history = History([{"step": 1, "loss": 2.0}, {"step": 2, "valid": 1.0}, {"step": 2, "loss": 1.5}])
    assert history.curve("loss")[0].tolist() == [1, 2] and "stopped: not yet" in repr(history)
    assert "no 'lr' in the history; it has loss, step, valid" in message(history.curve, "lr")


def test_over_seeds():
    table = over_seeds(lambda seed: {"a": seed, "b": 2 * seed}, [1, 2, 3])
    assert table.rows == {"a": (2, 1, 1, 3, 3), "b": (4, 2, 2, 6, 3)} and table["b", "sd"] == 2
    assert math.isnan(over_seeds(lambda seed: 1, [0])["result", "sd"])
    assert "at least one seed" in message(over_seeds, lambda seed: 1, [])


def test_ablation_changes_one_thing_and_compares_within_a_seed():
    @dataclass(frozen=True)
    class Base:
        a: float = 1.0
        b: float = 0.0

    seen = []

    def measure(base, seed):
        seen.append((base, seed))
        return base.a + base.b + 10 * seed

    table = ablate(Base(), {"more a": {"a": 2.0}, "more b": {"b": 3.0}}, measure, [0, 1, 2])
    assert Counter(base for base, _ in seen) == {Base(): 3, Base(a=2.0): 3, Base(b=3.0): 3}
    assert table["more b", "difference"] == 3 and table["more b", "se"] == 0 and table["base", "sd"] == 10
    assert "changes ['c'], which the base does not have" in message(ablate, Base(), {"c": {"c": 1}}, measure, [0])
    assert "at least one seed" in message(ablate, Base(), {}, measure, [])
    assert "<td>more a</td>" in table._repr_html_() and len(repr(table).split("\n")) == 4
    assert "&lt;b&gt;" in Table(("x",), {"<b>": (1.0,)})._repr_html_()


def test_batches_is_a_base_for_others():
    class Squares(Batches):
        def plan(self, epoch): return range(5)

        def make(self, item): return item**2

    squares = Squares()
    assert list(squares) == [0, 1, 4, 9, 16] and list(islice(squares, 2)) == [0, 1] and squares.state_dict()["position"] == 2
    assert len(squares) == 5 and squares.count(3) == 15


def test_importing_is_light():
    "The core is enough: no TensorBoard, no data sets, no pictures."
    code = textwrap.dedent("""
        import sys
        import lmbook.checkpoints, lmbook.experiments, lmbook.training
        print([m for m in ("tensorboard", "datasets", "matplotlib", "IPython") if m in sys.modules])
    """)
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
