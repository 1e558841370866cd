"""Convolutions: reach by formula and by gradient, padding that plays no part, a layer written out, windows as an encoder, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.batches import Examples
from lmbook.bilstm import influence
from lmbook.convolutions import ConvConfig, ConvEncoder, ConvLM, PooledEncoder, receptive_field
from lmbook.core import seed_everything
from lmbook.perplexity import evaluate
from lmbook.seq2seq import (
    BOS_ID,
    EOS_ID,
    N_SPECIAL,
    Seq2Seq,
    Seq2SeqConfig,
    Seq2SeqError,
    copy_task,
    token_mask,
)
from lmbook.training import TrainConfig, Trainer, next_token_loss

V = 14


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


stacks = st.builds(
    lambda kernel, steps, causal, gated: ConvConfig(3, kernel if causal else kernel | 1, len(steps), tuple(steps), causal, gated),
    st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans(), st.booleans(),
)  # fmt: skip


@settings(max_examples=40)
@given(stacks, st.integers(0, 10_000))
def test_the_reach_by_formula_is_that_by_gradient(config, seed):
    torch.manual_seed(seed)
    back, ahead = receptive_field(config)
    here, T = back + 2, back + ahead + 5
    pull = influence(ConvEncoder(config).double(), torch.randn(T, 3, dtype=torch.float64))[here].nonzero().flatten()
    assert (here - int(pull.min()), int(pull.max()) - here) == (back, ahead)


@pytest.mark.parametrize("dilation, back", [(1, 8), (2, 16), ("doubling", 30), ((1, 3, 1, 1), 12), ([1, 1, 1, 5], 16)])
def test_reach_of_known_stacks(dilation, back): assert receptive_field(ConvConfig(4, 3, 4, dilation)) == (back, 0)


@settings(max_examples=40)
@given(stacks, st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_text_in_a_batch_gets_what_it_gets_alone(config, lengths):
    torch.manual_seed(0)
    encoder, x = ConvEncoder(config).double(), torch.randn(len(lengths), max(lengths), 3, dtype=torch.float64)
    x[token_mask(torch.tensor(lengths), x).logical_not()] = 1e3  # whatever stands in the padding
    out = encoder(x, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        close(out[row, :n], encoder(x[row : row + 1, :n])[0])
        assert not out[row, n:].any()
    close(out, encoder(x, token_mask(torch.tensor(lengths), x)))


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_written_out(gated):
    torch.manual_seed(0)
    encoder = ConvEncoder(ConvConfig(4, kernel=3, n_layer=1, dilation=2, gated=gated)).double()
    [block], x = encoder.blocks, torch.randn(2, 9, 4, dtype=torch.float64)
    normed = F.pad(F.layer_norm(x, (4,)), (0, 0, 4, 0))
    seen = sum(normed[:, 2 * k : 2 * k + 9] @ block.conv.weight[:, :, k].T for k in range(3)) + block.conv.bias
    bent = seen[..., :4] * seen[..., 4:].sigmoid() if gated else F.gelu(seen)
    close(encoder(x), F.layer_norm(x + bent @ block.out.weight.T + block.out.bias, (4,)))


@pytest.mark.parametrize("more, message", [
    ({"kernel": 4, "causal": False}, "Take 5, or causal=True"),
    ({"kernel": 0}, "kernel=0 must be a whole number"), ({"n_layer": 1.5}, "n_layer=1.5"),
    ({"d_model": True}, "d_model=True"), ({"dilation": "triple"}, "'doubling'"), ({"dilation": (1, 2)}, "names 2 steps for 4 layers"),
    ({"dilation": 0}, "whole numbers, at least 1"), ({"dilation": (1, 1, 1, -2)}, "at least 1"), ({"dropout": 1.}, "dropout=1.0"),
])  # fmt: skip
def test_stacks_that_make_no_sense(more, message):
    with pytest.raises(Seq2SeqError, match=message): ConvConfig(**{"d_model": 8} | more)


def test_input_of_another_width():
    with pytest.raises(Seq2SeqError, match=r"\(B, T, 8\), not \(2, 3, 4\)"): ConvEncoder(ConvConfig(8))(torch.zeros(2, 3, 4))
    with pytest.raises(Seq2SeqError, match=r"\(B, T, 8\)"): ConvEncoder(ConvConfig(8))(torch.zeros(3, 8))


def test_the_convolutional_language_model_does_not_see_ahead_and_can_be_judged():
    with pytest.raises(Seq2SeqError, match="causal=True"): ConvLM(V, ConvConfig(8, causal=False))
    seed_everything(0)
    lm = ConvLM(V, ConvConfig(16, n_layer=3, dilation="doubling"))
    ids = torch.randint(N_SPECIAL, V, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = N_SPECIAL
    assert torch.equal(lm(ids)[:, :7], lm(changed)[:, :7]) and not torch.allclose(lm(ids)[:, 7:], lm(changed)[:, 7:])
    rows = [[BOS_ID, *([5, 6, 7] * 4), EOS_ID], [BOS_ID, *([8, 9] * 3), EOS_ID]] * 8
    before = evaluate(lm, rows).loss
    Trainer(lm, Examples(rows, batch_size=4), TrainConfig(steps=60, lr=1e-2)).fit()
    assert evaluate(lm, rows).loss < .3 < before
    with pytest.raises(Seq2SeqError, match="The id 14 is no token: ids run from 0 to 13"): lm(torch.tensor([[V]]))


# ---------------------------------------------------------------- windows as an encoder


def pooled(kernel=3, dilation="doubling", **more) -> Seq2Seq:
    torch.manual_seed(0)
    config = Seq2SeqConfig(V, V + 1, d_embed=5, d_hidden=6, decoder="gru", **more)
    return Seq2Seq(config, encoder=PooledEncoder(config, kernel, dilation)).double()


@pytest.mark.parametrize("n_layer", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_source_in_a_batch_is_read_as_alone(reverse, n_layer):
    dice, lengths = torch.Generator().manual_seed(1), [3, 7, 1, 5]
    source, ids = (torch.randint(N_SPECIAL, V, (4, size), generator=dice) for size in (7, 6))
    ids[:, 0] = BOS_ID
    m = pooled(reverse=reverse, n_layer=n_layer)
    memory, logits = m.encode(source, torch.tensor(lengths)), m(ids, source, torch.tensor(lengths))
    assert memory.summary.abs().max() <= 1
    for row, n in enumerate(lengths):
        alone = m.encode(source[row : row + 1, :n])
        close(memory.summary[row], alone.summary[0])
        close(memory.states[row, :n], alone.states[0])
        assert not memory.states[row, n:].any() and memory.mask[row].tolist() == [True] * n + [False] * (7 - n)
        close(logits[row], m(ids[row : row + 1], source[row : row + 1, :n])[0])


def test_the_pooled_reader_cannot_tell_twins_apart_and_a_recurrent_one_can():
    again = [8, 9]  # no window of three sees both of its neighbours
    rows = torch.tensor([[*again, 10, *again, 11, *again], [*again, 11, *again, 10, *again]])
    torch.manual_seed(0)
    models = pooled(dilation=1), Seq2Seq(Seq2SeqConfig(V, V + 1, d_embed=5, d_hidden=6)).double()
    windows, recurrent = (model.encode(rows).summary for model in models)
    close(windows[0], windows[1])
    assert (recurrent[0] - recurrent[1]).abs().max() > 1e-4


def test_every_parameter_is_trained():
    [b] = Examples(copy_task(8, (2, 5), 8), batch_size=8, join=False).read()
    config = Seq2SeqConfig(V, V, d_embed=5, d_hidden=6, n_layer=2, dropout=.1)
    m = Seq2Seq(config, encoder=PooledEncoder(config))
    total, count = next_token_loss(m, b)
    total.backward()
    assert count == b.tokens and all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@pytest.mark.parametrize("more, message", [({"kernel": 2}, "odd number"), ({"dilation": (1, 2, 3)}, "names 3 steps for 1 layers")])
def test_windows_that_make_no_sense(more, message):
    with pytest.raises(Seq2SeqError, match=message): PooledEncoder(Seq2SeqConfig(V, V), **more)


def test_sources_that_do_not_fit():
    with pytest.raises(Seq2SeqError, match="source ids run from 0 to 13"): pooled().encode(torch.tensor([[V]]))
    with pytest.raises(Seq2SeqError, match="Row 1 is empty"): pooled().encode(torch.tensor([[5, 6], [7, 8]]), torch.tensor([2, 0]))
