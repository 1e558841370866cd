"""A decoder that looks back, beyond its chapter: word by word as at once, padding, precision, bad input."""

from __future__ import annotations

import pytest
import torch

from lmbook.alignment import AttentionDecoder
from lmbook.attention import AttentionError
from lmbook.networks import gradient_check
from lmbook.seq2seq import Seq2Seq, Seq2SeqConfig


def test_decoder_writes_what_it_scores():
    "Word by word, with a state, gives the scores that the true target gives at once; padding of the source plays no part."
    for score in ("additive", "dot"):
        for cell in ("lstm", "gru"):
            for encoder in (cell, "bi" + cell if cell == "gru" else "bilstm"):
                torch.manual_seed(0)
                config = Seq2SeqConfig(10, 10, d_embed=6, d_hidden=8, n_layer=2, encoder=encoder, decoder=cell)
                model = Seq2Seq(config, AttentionDecoder(config, score)).eval()
                source, ids = torch.tensor([[4, 5, 6], [7, 8, 0]]), torch.tensor([[1, 4, 5, 6], [1, 7, 8, 9]])
                lengths = torch.tensor([3, 2])
                at_once, memory, state = model(ids, source, lengths), model.encode(source, lengths), None
                for t in range(4):
                    step, state = model.decoder(ids[:, t : t + 1], memory, state)
                    torch.testing.assert_close(step[:, 0], at_once[:, t])
                torch.testing.assert_close(model(ids[1:], source[1:, :2]), at_once[1:])
                weights = model.decoder.weights(ids, memory)
                assert weights.shape == (2, 4, 3) and torch.allclose(weights.sum(-1), torch.ones(2, 4)) and weights[1, :, 2].max() == 0


@pytest.mark.parametrize("score", ("additive", "dot"))
def test_a_double_decoder_computes_in_double(score):
    torch.manual_seed(0)
    config = Seq2SeqConfig(8, 8, d_embed=3, d_hidden=3)
    model = Seq2Seq(config, AttentionDecoder(config, score)).double().eval()
    source, ids, lengths = torch.tensor([[4, 5, 6], [7, 5, 0]]), torch.tensor([[1, 4, 5], [1, 7, 6]]), torch.tensor([3, 2])
    assert model(ids, source, lengths).dtype == model.decoder.weights(ids, model.encode(source, lengths)).dtype == torch.float64
    leaves = list(model.decoder.parameters())
    assert max(gradient_check(lambda: model(ids, source, lengths).sin().sum(), leaves, samples=4)) < 1e-6


def test_bad_input_is_one_clear_error():
    with pytest.raises(AttentionError, match="There is no score='cosine'. Choose one of: additive, dot"):
        AttentionDecoder(Seq2SeqConfig(9, 9), "cosine")
