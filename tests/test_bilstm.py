"""Both directions: who sees whom, and what is around a word; tags, taggers and their batches; bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmbook.batches import IGNORE
from lmbook.bilstm import TaggedSentences, Tagger, TaggerConfig, around, bio_spans, bio_tags, influence, tag_loss
from lmbook.checkpoints import load_weights, save_weights
from lmbook.recurrent import Recurrent, RecurrentConfig, RecurrentError, sentence_lengths
from lmbook.training import TrainConfig, Trainer, mean_loss

CLOSE = {"rtol": 0.0, "atol": 1e-12}


def made(n_layer: int = 1, both: bool = False) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(RecurrentConfig(5, 4, n_layer, bidirectional=both)).double()


# ---------------------------------------------------------------- who sees whom


def test_influence_is_the_jacobian_and_shows_the_leaks():
    x = torch.randn(6, 5, dtype=torch.float64)
    for both, n_layer in itertools.product((False, True), (1, 2)):
        model = made(both=both, n_layer=n_layer)
        jacobian = torch.autograd.functional.jacobian(lambda leaf: model(leaf[None])[0][0], x)  # noqa: B023 (S, K, T, D)
        seen = influence(model, x)
        torch.testing.assert_close(seen, jacobian.square().sum((1, 3)).sqrt(), rtol=1e-9, atol=1e-12)
        assert (seen.triu(1) > 0).any().item() == both
        if both:
            beside = influence(lambda leaf: around(model(leaf)[0]), x).diagonal()  # noqa: B023
            assert (beside > 0).any().item() == (n_layer == 2)


def test_around_with_padding_leaves_out_the_word_and_sees_the_rest():
    model, lengths = made(both=True), [5, 3, 1]
    x = torch.randn(3, 5, 5, dtype=torch.float64)
    output = around(model(x, lengths=lengths)[0])
    for b, n in enumerate(lengths):
        alone = around(model(x[b : b + 1, :n])[0])
        torch.testing.assert_close(output[b, :n], alone[0], **CLOSE)
    assert not output[2, 0].any()  # a sentence of one word: nothing is around it


# ---------------------------------------------------------------- tags


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["O", "A", "B"])), max_size=12))
def test_spans_to_tags_and_back(pieces):
    places, spans, at = [], [], 0
    for n, kind in pieces:
        if kind != "O": spans.append((at, at + n, kind))
        places += [(i, i + 1) for i in range(at, at + n)]
        at += n
    tags = bio_tags("x" * at, places, spans)
    assert bio_spans(tags) == spans and len(tags) == at


def test_a_token_may_begin_with_its_space():
    text, places = "In New York now", [(0, 2), (2, 6), (6, 11), (11, 15)]
    assert bio_tags(text, places, [(3, 11, "LOC")]) == ["O", "B-LOC", "I-LOC", "O"]
    assert bio_tags(text, places, []) == ["O"] * 4 and bio_tags("", [], []) == []


def test_a_span_may_begin_with_inside():
    assert bio_spans(["I-A", "I-A", "I-B", "O", "I-B", "B-B"]) == [(0, 2, "A"), (2, 3, "B"), (4, 5, "B"), (5, 6, "B")]


def toy(n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    "The tag of a word is the word behind it (0 at the end): not to be known from the left."
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 5, rng.integers(1, 9)).tolist() for _ in range(n)]
    return [(row, [*row[1:], 0]) for row in rows]


def test_a_tagger_learns_what_only_the_right_side_says():
    losses = {}
    for both in (True, False):
        torch.manual_seed(0)
        model = Tagger(TaggerConfig(5, 5, 16, 24, bidirectional=both))
        Trainer(model, TaggedSentences(toy(300, 0), 16, sort=4), TrainConfig(epochs=10, lr=1e-2), loss=tag_loss).fit()
        losses[both] = mean_loss(model, TaggedSentences(toy(60, 1), 16), tag_loss)
    assert losses[True] < 0.1 < 0.9 < losses[False]


def test_predict_keeps_order_and_gives_each_sentence_its_own_tags():
    torch.manual_seed(0)
    model = Tagger(TaggerConfig(9, 4, 6, 5, n_layer=2, dropout=0.5)).train()
    rows = [[1, 2, 3], [], [4], list(range(9)), [5, 6]]
    with torch.no_grad():
        model.eval()
        expected = [model(torch.tensor([row]))[0].argmax(-1).tolist() if row else [] for row in rows]
        model.train()
    assert model.predict(rows, batch_size=2) == model.predict(iter(rows)) == expected and model.training
    assert model.predict([]) == []


def test_batches_of_tagged_sentences_hold_each_sentence_once():
    rows = toy(53, 2)
    for sort in (0, 3):
        batches = TaggedSentences(rows, 8, sort=sort, seed=5)
        found = []
        for batch in batches:
            n = sentence_lengths(batch.segments)
            assert (batch.targets[batch.segments == 0] == IGNORE).all() and (batch.targets[batch.segments == 1] != IGNORE).all()
            found += [(ids[:k].tolist(), tags[:k].tolist()) for ids, tags, k in zip(batch.ids, batch.targets, n.tolist())]
        assert sorted(found) == sorted(rows) and batches.epoch == 1
        assert [b.ids.tolist() for b in batches.read(1)] == [b.ids.tolist() for b in TaggedSentences(rows, 8, sort=sort, seed=5).read(1)]
    width = lambda sort: sum(b.ids.numel() for b in TaggedSentences(rows, 8, sort=sort).read())  # noqa: E731
    assert width(10) < width(0)


def test_a_checkpoint_brings_the_weights_back(tmp_path):
    one, other = Tagger(TaggerConfig(9, 3, 6, 5)), Tagger(TaggerConfig(9, 3, 6, 5))
    save_weights(one, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    ids = torch.randint(9, (2, 4))
    assert torch.equal(one(ids), other(ids))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TaggerConfig(0, 2), "vocab_size=0"),
    (lambda: TaggerConfig(9, 2, cell="no"), "There is no cell"),
    (lambda: TaggerConfig(9, 2, dropout=-0.1), "dropout=-0.1"),
    (lambda: TaggerConfig(9, 2, n_layer=0), "n_layer=0"),
])
def test_a_bad_configuration_says_what_to_change(make, message):
    with pytest.raises(RecurrentError, match=message): make()


def test_bad_input_elsewhere():
    tagger = Tagger(TaggerConfig(9, 3, 6, 5))
    bad = [
        (lambda: tagger(torch.zeros(4, dtype=torch.long)), r"ids must have the shape \(B, T\)"),
        (lambda: tagger(torch.tensor([[9]])), "The id 9 is no token: ids run from 0 to 8"),
        (lambda: tagger(torch.zeros(2, 3)), "ids are whole numbers, not torch.float32"),
        (lambda: TaggedSentences([([1, 2], [0])], 2), "Sentence 0 has 2 words and 1 tags"),
        (lambda: TaggedSentences([([1], [0]), ([], [])], 2), "Sentence 1 is empty"),
        (lambda: TaggedSentences([], 2), "There are no sentences"),
        (lambda: TaggedSentences([([1], [0])], 0), "batch_size=0 must be a whole number, at least 1"),
        (lambda: bio_tags("New York", [(0, 3), (3, 8)], [(0, 5, "LOC")]), "does not begin and end with a token"),
        (lambda: bio_tags("New York", [(0, 3)], [(4, 8, "LOC")]), "does not begin and end with a token"),
        (lambda: bio_tags("New York", [(0, 3), (3, 8)], [(0, 3, "A"), (0, 8, "B")]), "overlaps another"),
        (lambda: bio_spans(["B"]), "is no tag"),
        (lambda: bio_spans(["E-LOC"]), "is no tag"),
        (lambda: around(torch.zeros(2, 3, 5)), "The output of a bidirectional layer"),
        (lambda: influence(nn.Identity(), torch.zeros(1, 2, 3)), "x is one sequence"),
    ]
    for call, message in bad:
        with pytest.raises(RecurrentError, match=message): call()


def test_one_real_file_of_tags_is_read(data_dir):
    from benchmarks.bilstm import WNUT, conll

    train = list(conll(data_dir / "wnut17" / WNUT["train"]))
    assert len(train) == 3394 and all(len(words) == len(tags) for words, tags in train)
    assert sum(len(bio_spans(tags)) for _, tags in train) == sum(tag.startswith("B-") for _, tags in train for tag in tags)
