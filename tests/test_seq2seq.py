"""Sequence to sequence: padding that plays no part, parity with plain PyTorch, games, bad input."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.batches import Examples
from lmbook.cache import GenerationError
from lmbook.checkpoints import load_weights, save_weights
from lmbook.core import seed_everything
from lmbook.generation import SamplingConfig, generate
from lmbook.seq2seq import (
    BOS_ID,
    ENCODERS,
    EOS_ID,
    N_SPECIAL,
    Encoded,
    Seq2Seq,
    Seq2SeqConfig,
    Seq2SeqError,
    copy_task,
    greedy_accuracy,
    recall_task,
    reverse_rows,
    reverse_task,
    token_mask,
)
from lmbook.training import TrainConfig, Trainer, next_token_loss

V = 14


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def model(kind="lstm", **more) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Seq2SeqConfig(V, V + 1, d_embed=5, d_hidden=6, **{"encoder": kind} | more)).double()


def batch(lengths=(3, 7, 1, 5), T=6):
    dice = torch.Generator().manual_seed(1)
    source, ids = (torch.randint(N_SPECIAL, V, (len(lengths), size), generator=dice) for size in (max(lengths), T))
    ids[:, 0] = BOS_ID
    return source, torch.tensor(lengths), ids


# ---------------------------------------------------------------- masks

@pytest.mark.parametrize("given, message", [
    (torch.tensor([4, 0]), "Row 1 is empty"), (torch.tensor([4, 6]), "said to have 6 tokens, but there are 5 places"),
    (torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]), "Row 1 is empty"),
    (torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]), "In row 1 padding stands before"),
    (torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 0, 0]]), "In row 0 padding"), (torch.ones(2, 4), "that shape, or is 2 lengths"),
    (torch.tensor([1, 2, 3]), "or is 2 lengths"), (torch.tensor([1., 2.]), "whole numbers"), (torch.tensor([-1, 2]), "empty"),
])  # fmt: skip
def test_masks_that_do_not_fit(given, message):
    with pytest.raises(Seq2SeqError, match=message): token_mask(given, torch.zeros(2, 5))


# ---------------------------------------------------------------- games

@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 4), st.integers(2, 20), st.integers(0, 1000))
def test_games(n, low, more, letters, seed):
    same = partial(copy_task, n, (low, low + more), letters, seed)
    for (given_, wanted), (_, backwards), (again, _) in zip(same(), reverse_task(n, (low, low + more), letters, seed), same()):
        assert low <= len(given_) <= low + more and N_SPECIAL <= given_.min() <= given_.max() < N_SPECIAL + letters
        assert wanted.tolist() == [BOS_ID, *given_, EOS_ID] and backwards.tolist() == [BOS_ID, *given_[::-1], EOS_ID]
        assert np.array_equal(given_, again)
    for distance in (None, 0, low - 1):
        for given_, wanted in recall_task(n, (low, low + more), letters, distance, seed):
            row = given_.tolist()
            at = row.index(N_SPECIAL + letters)
            assert row.count(N_SPECIAL + letters) == 1 and wanted.tolist() == [BOS_ID, row[at + 1], EOS_ID]
            assert distance is None or len(row) - 2 - at == distance


def test_games_are_what_examples_take():
    for task in (copy_task, reverse_task, recall_task):
        [b] = Examples(task(6, (1, 5), 8), batch_size=6, join=False).read()
        assert b.source.shape == b.source_segments.shape and (b.ids[:, 0] == BOS_ID).all() and b.tokens == int((b.segments > 0).sum())


@pytest.mark.parametrize("call", [
    lambda: copy_task(0, 3), lambda: copy_task(3, 0), lambda: copy_task(3, (4, 2)),
    lambda: reverse_task(2, 3, letters=1), lambda: recall_task(1, (0, 2)),
])  # fmt: skip
def test_games_that_make_no_sense(call):
    with pytest.raises(Seq2SeqError, match="at least 1 pair"): call()


def test_a_distance_beyond_the_row():
    with pytest.raises(Seq2SeqError, match="distance=3 must be from 0 to 2"): recall_task(2, 3, distance=3)


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_padding_plays_no_part_and_a_batch_is_its_rows(kind, reverse, n_layer):
    source, lengths, ids = batch()
    m = model(kind, reverse=reverse, n_layer=n_layer, decoder="gru")
    memory, logits = m.encode(source, lengths), m(ids, source, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = m.encode(source[row : row + 1, :n])
        close(memory.summary[row], alone.summary[0])
        close(memory.states[row, :n], alone.states[0])
        assert not memory.states[row, n:].any() and memory.mask[row].tolist() == [True] * n + [False] * (7 - n)
        close(logits[row], m(ids[row : row + 1], source[row : row + 1, :n])[0])
    close(logits, m(ids, source, memory.mask.long()))


@pytest.mark.parametrize("decoder", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("n_layer", [1, 3])
def test_teacher_forcing_is_step_by_step(decoder, n_layer):
    source, lengths, ids = batch()
    m = model(decoder=decoder, n_layer=n_layer)
    memory, state, steps = m.encode(source, lengths), None, []
    for part in (ids[:, :1], ids[:, 1:4], ids[:, 4:]):
        out, state = m.decoder(part, memory, state)
        steps.append(out)
    close(torch.cat(steps, 1), m(ids, source, lengths))


@pytest.mark.parametrize("kind", ["gru", "bigru"])
def test_the_model_written_out_in_plain_pytorch(kind):
    source, _, ids = batch((4, 4))
    m = model(kind, decoder="gru", d_vector=3)
    e, d = m.encoder, m.decoder
    output, last = e.body.rnn(e.embed(source))
    summary = torch.tanh(e.vector(torch.cat([*last], -1)))
    close(m.encode(source).summary, summary)
    x = torch.cat([d.embed(ids), summary[:, None].expand(-1, ids.shape[1], -1)], -1)
    close(m(ids, source), d.out(d.body.rnn(x, torch.tanh(d.start(summary))[None])[0]))
    close(m.encode(source).states, output)


def test_reading_backwards_is_reading_the_reversed_text():
    source, lengths, _ = batch()
    forwards, backwards = model(), model(reverse=True)
    backwards.load_state_dict(forwards.state_dict())
    turned = reverse_rows(source, token_mask(lengths, source))
    a, b = forwards.encode(turned, lengths), backwards.encode(source, lengths)
    close(a.summary, b.summary)
    close(reverse_rows(a.states, a.mask), b.states)
    assert torch.equal(reverse_rows(turned, a.mask), source) and turned[0, :3].tolist() == source[0, :3].flip(0).tolist()


def test_all_that_the_decoder_knows_comes_through_the_vector():
    source, lengths, ids = batch()
    m = model()
    memory = m.encode(source, lengths)
    memory.states.retain_grad()
    cut = memory._replace(summary=memory.summary.detach().requires_grad_())
    m.decoder(ids, cut)[0].sum().backward()
    assert memory.states.grad is None and cut.summary.grad.abs().min() > 0 and cut.summary.abs().max() <= 1


class Looking(nn.Module):
    "A decoder that reads all states: what the next chapter builds."

    def __init__(self, d, V):
        super().__init__()
        self.embed, self.out = nn.Embedding(V, d), nn.Linear(d, V)

    def forward(self, ids, memory: Encoded, state=None):
        weights = (self.embed(ids) @ memory.states.mT).masked_fill(~memory.mask[:, None], -torch.inf).softmax(-1)
        return self.out(weights @ memory.states), state


def test_another_decoder_can_take_the_place():
    source, lengths, ids = batch()
    torch.manual_seed(0)
    m = Seq2Seq(Seq2SeqConfig(V, V, d_embed=5, d_hidden=6), decoder=Looking(6, V))
    assert m(ids, source, lengths).shape == (4, 6, V)
    rows = [row[:n] for row, n in zip(source.tolist(), lengths)]
    assert written(m, rows, 5) == [written(m, [row], 5)[0] for row in rows]


# ---------------------------------------------------------------- writing

def written(model: Seq2Seq, sources: list, most: int) -> list[list[int]]: # without <bos> and <eos>
    config = SamplingConfig(max_new_tokens=most, temperature=0, eos_id=EOS_ID)
    rows = generate(model, [[BOS_ID]] * len(sources), config, source=sources)
    return [row[:-1] if row[-1] == EOS_ID else row for row in rows]


@pytest.fixture(scope="module")
def trained() -> Seq2Seq:
    seed_everything(0)
    m = Seq2Seq(Seq2SeqConfig(V, V, d_embed=12, d_hidden=32, encoder="gru", decoder="gru"))
    Trainer(m, Examples(reverse_task(4000, (1, 3), 6), batch_size=50, join=False), TrainConfig(steps=250, lr=2e-2)).fit()
    return m


def test_it_learns_and_is_judged_right(trained):
    pairs = reverse_task(200, (1, 3), 6, seed=5)
    right = greedy_accuracy(trained, pairs, batch_size=64)
    assert right.exact.mean() > .9 and (right.tokens[right.exact] == 1).all() and (right.tokens[~right.exact] < 1).all()
    for (given_, wanted), exact, share in list(zip(pairs, *right))[:40]:
        [said] = written(trained, [given_.tolist()], len(wanted) + 1)
        said, wanted = [*said, EOS_ID], wanted[1:].tolist()
        assert exact == (said == wanted)
        assert share == pytest.approx(sum(i < len(said) and said[i] == t for i, t in enumerate(wanted)) / len(wanted))
    wrong = greedy_accuracy(trained, copy_task(200, 3, 6, seed=5))
    assert wrong.exact.mean() < .5 and wrong.tokens.mean() > wrong.exact.mean()  # the middle letter and the end stand where they should


def test_rows_stop_by_themselves(trained):
    pairs = reverse_task(60, (1, 3), 6, seed=6)
    sources = [given_.tolist() for given_, _ in pairs]
    trained.train()
    rows = written(trained, sources, 20)
    assert trained.training and not any({BOS_ID, EOS_ID} & set(row) for row in rows) and {len(row) for row in rows} >= {1, 2, 3}
    for one, row in zip(sources, rows): assert written(trained, [one], 20) == [row]
    assert [row[:2] for row in rows] == written(trained, sources, 2)
    with pytest.raises(GenerationError, match="give source="): generate(trained, [BOS_ID])


def test_weights_go_to_a_file_and_back(trained, tmp_path):
    save_weights(trained, tmp_path / "m.safetensors")
    again = Seq2Seq(trained.config)
    load_weights(again, tmp_path / "m.safetensors")
    source = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.encode(source).summary, trained.encode(source).summary)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_parameter_is_trained(kind):
    [b] = Examples(copy_task(8, (2, 5), 8), batch_size=8, join=False).read()
    m = Seq2Seq(Seq2SeqConfig(V, V, d_embed=5, d_hidden=6, n_layer=2, encoder=kind, dropout=.1))
    total, count = next_token_loss(m, b)
    total.backward()
    assert count == b.tokens and all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("more, message", [
    ({"encoder": "transformer"}, "There is no encoder='transformer'. Choose one of: lstm, gru, rnn, bilstm, bigru"),
    ({"decoder": "bilstm"}, "There is no decoder='bilstm'. Choose one of: rnn, lstm, gru. Did you mean 'lstm'"),
    ({"source_vocab": 0}, "source_vocab=0"), ({"d_vector": 0}, "d_vector=0"), ({"n_layer": "2"}, "n_layer='2'"),
    ({"dropout": -.1}, "dropout=-0.1"),
    ({"eos_id": V}, f"eos_id={V} is not in the target's vocabulary of {V}"), ({"bos_id": -1}, "bos_id=-1"),
])  # fmt: skip
def test_configurations_that_make_no_sense(more, message):
    with pytest.raises(Seq2SeqError, match=message): Seq2SeqConfig(**{"source_vocab": V, "target_vocab": V} | more)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError): Seq2SeqConfig(V, V).layers = 3


@pytest.mark.parametrize("change, message", [
    (lambda s, n, t: (t, s, n * 0 + torch.tensor([3, 7, 0, 5])), "Row 2 is empty"),
    (lambda s, n, t: (t, s, n + 1), "said to have 8 tokens, but there are 7"),
    (lambda s, n, t: (t, s + V, n), r"The id \d+ is no token: source ids run from 0 to 13"), (lambda s, n, t: (t, s - V, n), "The id -"),
    (lambda s, n, t: (t + V, s, n), r"The id \d+ is no token: target ids run from 0 to 14"),
    (lambda s, n, t: (t[:, 1:], s, n), "Target 0 begins with the id .* not with <bos>"),
    (lambda s, n, t: (t[:3], s, n), "4 sources and 3 targets"),
    (lambda s, n, t: (t, s[:, :0], None), r"source ids must have the shape \(B, T\) and hold something, not \(4, 0\)"),
    (lambda s, n, t: (t[0], s, n), r"target ids must have the shape \(B, T\)"),
    (lambda s, n, t: (t, s.float(), n), "source ids are whole numbers"),
    (lambda s, n, t: (t, s[0], None), r"source ids must have the shape"),
])  # fmt: skip
def test_batches_that_do_not_fit(change, message):
    source, lengths, ids = batch()
    with pytest.raises(Seq2SeqError, match=message): model()(*change(source, lengths, ids))


def test_one_letter_one_place_one_row():
    m = model("bilstm")
    assert m(torch.tensor([[BOS_ID]]), torch.tensor([[5]])).shape == (1, 1, V + 1)
