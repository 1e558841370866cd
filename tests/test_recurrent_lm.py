"""Recurrent language models: parity with PyTorch's own modules, states that go on, dropout's masks, runs that are killed, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.batches import IGNORE, Batch, Examples, TokenStream
from lmbook.checkpoints import Checkpoints, load_weights, save_weights
from lmbook.generation import SamplingConfig, generate
from lmbook.perplexity import evaluate
from lmbook.recurrent import RecurrentError
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig, RecurrentLMError, same_mask
from lmbook.training import TrainConfig, Trainer, TrainingError, mean_loss

V = 23
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def model(seed: int = 0, **changes) -> RecurrentLM:
    torch.manual_seed(seed)
    return RecurrentLM(RecurrentLMConfig(**{"vocab_size": V, "d_embed": 8, "d_hidden": 12, "n_layer": 2, **changes}))


def some(B: int = 3, T: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def flat(states) -> list[torch.Tensor]: return [part for state in states for part in (state if isinstance(state, tuple) else (state,))]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tie", [True, False])
def test_equal_to_pytorch_with_gradients(cell, tie):
    ours = model(cell=cell, tie=tie, d_embed=12).double()  # equal widths, so that PyTorch can stack both layers in one module
    theirs = CELLS[cell](12, 12, 2, batch_first=True).double()
    weights = [(i, *row) for i, layer in enumerate(ours.layers) for row in layer.rnn.state_dict().items()]
    theirs.load_state_dict({name.replace("l0", f"l{i}"): p for i, name, p in weights})
    ids = some()
    scores = F.linear(theirs(F.embedding(ids, ours.embed.weight))[0], ours.out.weight, ours.out.bias)
    torch.testing.assert_close(ours(ids), scores, rtol=1e-12, atol=1e-12)
    for loss in (ours(ids), scores): loss.logsumexp(-1).sum().backward(retain_graph=True)
    for i, layer in enumerate(ours.layers):
        for name, p in layer.rnn.named_parameters():
            torch.testing.assert_close(p.grad, getattr(theirs, name.replace("l0", f"l{i}")).grad, rtol=1e-10, atol=1e-10)


def test_tied_is_one_tensor():
    tied, untied = model(), model(tie=False)
    assert tied.out.weight is tied.embed.weight and untied.out.weight is not untied.embed.weight
    assert tied.config.widths == (12, 8) and untied.config.widths == (12, 12)
    assert sum(p.numel() for p in untied.parameters()) > sum(p.numel() for p in tied.parameters())


def test_vectors_have_a_length_of_about_two():
    for m in (model(vocab_size=5000, d_embed=50), model(vocab_size=5000, d_embed=50, d_hidden=70, tie=False)):
        for weight in (m.embed.weight, m.out.weight): assert abs(weight.norm(dim=1).mean().item() - 2) < .05


def test_forget_gates_start_open():
    for bias, expected in ((1., 1.), (0., 0.), (2., 2.)):
        for layer in model(forget_bias=bias).layers:
            H = layer.config.d_hidden
            assert torch.equal((layer.rnn.bias_ih_l0 + layer.rnn.bias_hh_l0)[H : 2 * H], torch.full((H,), expected))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(list(CELLS)), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_in_pieces_as_at_once(sizes, cell, n_layer):
    m, ids = model(cell=cell, n_layer=n_layer, d_hidden=8 if n_layer == 1 else 12).eval(), some(2, sum(sizes))
    with torch.no_grad():
        states, scores = m.initial_state(2), []
        for piece in ids.split(sizes, 1):
            out, states = m.step(piece, states)
            scores.append(out)
        torch.testing.assert_close(torch.cat(scores, 1), m(ids))
        for ours, expected in zip(flat(states), flat(m.features(ids)[1])): torch.testing.assert_close(ours, expected)


def test_no_later_word_is_seen():
    m, ids = model().eval(), some()
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 1) % V
    moved = (m(ids) - m(other)).abs().amax((0, 2))
    assert moved[:9].max() == 0 < moved[9]


@pytest.mark.parametrize("piece", [1, 3 * V, 10 * 3 * V, 2**22])
def test_scores_of_a_few_places_at_a_time(piece):
    m, ids = model().eval(), some()
    with torch.no_grad():
        expected = m(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(m.token_log_probs(ids, piece), expected)


def test_a_text_of_one_word_has_nothing_to_score():
    assert model().token_log_probs(some(2, 1)).shape == (2, 0)
    assert [len(nats) for nats in evaluate(model(), [[1], [1, 2]]).token_nats] == [0, 1]


def test_evaluate_carries_the_state_through_a_long_text():
    m, text = model().eval(), some(1, 3001)
    states, total = None, 0.
    with torch.no_grad():
        for start in range(0, 3000, 250):
            scores, states = m.step(text[:, start : start + 250], states)
            total += F.cross_entropy(scores[0], text[0, start + 1 : start + 251], reduction="sum").item()
    assert math.isclose(evaluate(m, [text[0].tolist()]).nats, total, rel_tol=1e-5)


def test_weights_make_a_round_trip(tmp_path):
    first, second = model(0), model(1)
    save_weights(first, tmp_path / "m.safetensors")
    load_weights(second, tmp_path / "m.safetensors")
    assert torch.equal(first.eval()(some()), second.eval()(some())) and second.out.weight is second.embed.weight


# ---------------------------------------------------------------- dropout


def test_one_mask_for_a_row():
    torch.manual_seed(0)
    x = same_mask(torch.ones(50, 7, 40), .25)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert len({tuple(row.tolist()) for row in x[:, 0]}) == 50
    torch.testing.assert_close(x.unique(), torch.tensor([0., 4 / 3]))
    assert abs(x.mean().item() - 1) < .05
    assert torch.equal(same_mask(x, .25, training=False), x) and same_mask(x, 0.) is x


def test_a_word_is_silenced_wherever_it_stands():
    m = model(dropout_words=.5)
    read = []
    m.layers[0].register_forward_pre_hook(lambda layer, args: read.append(args[0].detach()))
    m(torch.arange(V).repeat(2, 2))
    [x] = read
    silent = (x == 0).all(-1)
    assert torch.equal(silent[0], silent[1]) and torch.equal(silent[:, :V], silent[:, V:]) and 3 < int(silent[0, :V].sum()) < 20
    kept = ~silent[0, :V]
    torch.testing.assert_close(x[0, :V][kept], 2 * m.embed.weight[kept])


@pytest.mark.parametrize("cell", CELLS)
def test_dropped_weights_are_used_and_pass_no_gradient(cell):
    m, ids = model(cell=cell, weight_drop=.5), some()
    full = model(cell=cell).eval()(ids)
    torch.manual_seed(1)
    dropped = m(ids)
    torch.manual_seed(1)
    weights = [F.dropout(layer.rnn.weight_hh_l0, .5) for layer in m.layers]
    assert not torch.allclose(dropped, full) and torch.equal(m.eval()(ids), full)
    dropped.logsumexp(-1).sum().backward()
    for layer, weight in zip(m.layers, weights):
        grad = layer.rnn.weight_hh_l0.grad
        assert (grad[weight == 0] == 0).all() and (grad[weight != 0] != 0).float().mean() > .9
    assert list(m.state_dict()) == list(model(cell=cell).state_dict())


@pytest.mark.parametrize("name", ["dropout_words", "dropout_in", "dropout_hidden", "dropout_out", "weight_drop"])
def test_each_dropout_acts_in_training_only(name):
    m, ids = model(**{name: .3}), some()
    assert not torch.equal(m(ids), m(ids))
    assert torch.equal(m.eval()(ids), model().eval()(ids))


# ---------------------------------------------------------------- the state that goes on


def test_windows_that_carry_add_up_to_the_whole():
    m, ids = model(), np.arange(121) * 7 % V
    stream, loss = TokenStream(ids, 2, 13, contiguous=True), CarriedState()
    total = sum(loss(m, batch)[0].item() for batch in stream.read())
    whole = torch.from_numpy(np.stack([ids[:61], ids[60:]]))
    expected = F.cross_entropy(m(whole[:, :-1]).flatten(0, 1), whole[:, 1:].flatten(), reduction="sum").item()
    assert math.isclose(total, expected, rel_tol=1e-5)
    again = sum(loss(m, batch)[0].item() for batch in stream.read())  # a new epoch begins from zero
    assert math.isclose(total, again, rel_tol=1e-6)


def test_no_gradient_crosses_the_edge():
    m, loss = model(tie=False), CarriedState()
    a, b = (Batch(torch.tensor([x]), torch.tensor([x])) for x in ([1, 2, 3], [4, 5, 6]))
    b.carry = True
    before = loss(m, b)[0].item()  # nothing was read before: from zero
    loss(m, a)
    value = loss(m, b)[0]
    value.backward()
    assert abs(value.item() - before) > 1e-4
    assert m.embed.weight.grad[[1, 2, 3]].abs().sum() == 0 < m.embed.weight.grad[[4, 5, 6]].abs().sum()


def test_an_evaluation_in_between_disturbs_nothing():
    m, loss, stream = model(), CarriedState(), TokenStream(np.arange(200) % V, 2, 7, contiguous=True)
    for batch in list(stream.read())[:3]: loss(m, batch)
    before = [part.clone() for part in flat(loss.states["train"])]
    first = mean_loss(m, stream, loss)
    assert all(map(torch.equal, before, flat(loss.states["train"]))) and mean_loss(m, stream, loss) == first


def test_only_targets_that_count_are_scored():
    m, examples = model(), Examples([[1, 2, 3, 4, 5], ([6, 7, 8], [9]), [3, 1]], batch_size=3, shuffle=False)
    [batch] = list(examples.read())
    scored = []
    m.out.register_forward_hook(lambda layer, args, out: scored.append(len(out)))
    value, count = CarriedState()(m, batch)
    assert scored == [count] == [4 + 1 + 1] and count < batch.targets.numel()
    expected = F.cross_entropy(m(batch.ids).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, cell):
    ids = np.random.default_rng(0).integers(0, V, 700)

    def run(folder, until=None):
        m, loss = model(cell=cell, dropout_in=.2, weight_drop=.3, dropout_words=.1), CarriedState()
        def stop(trainer, event, row):
            if event == "step" and trainer.step == until: trainer.stop("interrupted")
        config = TrainConfig(steps=24, lr=1e-2, eval_every=5, log_every=3, device="cpu")
        stream, judged = TokenStream(ids, 4, 9, contiguous=True), TokenStream(ids[:200], 2, 9, contiguous=True)
        trainer = Trainer(m, stream, config, loss=loss, evaluate=judged, checkpoints=Checkpoints(folder), callbacks=[stop])
        history = trainer.fit()
        return m, loss, history

    straight, loss, history = run(tmp_path / "one")
    run(tmp_path / "two", 7)
    _, _, part = run(tmp_path / "two", 16)
    assert part.stopped == "interrupted"
    resumed, again, history2 = run(tmp_path / "two")
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))
    assert all(map(torch.equal, flat(loss.states["train"]), flat(again.states["train"]))) and history == history2


def test_without_its_state_a_run_would_not_go_on():
    "The test above can fail: the state matters to the next step."
    m, stream = model(), list(TokenStream(np.arange(300) % V, 2, 7, contiguous=True).read())
    kept, lost = CarriedState(), CarriedState()
    for batch in stream[:3]: kept(m, batch)
    assert kept(m, stream[3])[0].item() != lost(m, stream[3])[0].item()


def test_in_bfloat16():
    m = model()
    config = TrainConfig(steps=6, dtype="bfloat16", device="cpu")
    Trainer(m, TokenStream(np.arange(400) % V, 4, 9, contiguous=True), config, loss=CarriedState()).fit()
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in m.parameters())


def test_it_learns():
    m = model(cell="gru")
    config = TrainConfig(steps=150, lr=.02, device="cpu")
    Trainer(m, TokenStream(np.arange(2000) % V, 4, 16, contiguous=True), config, loss=CarriedState()).fit()
    assert evaluate(m, [(np.arange(200) % V).tolist()]).loss < .2


# ---------------------------------------------------------------- vectors, and writing


def test_vectors_arrive():
    matrix = np.random.default_rng(0).normal(size=(V, 8)).astype(np.float32)
    for given_ in (matrix, torch.from_numpy(matrix), matrix.tolist(), nn.Embedding.from_pretrained(torch.from_numpy(matrix)).weight):
        m = model().set_embedding(given_)
        assert torch.equal(m.embed.weight.detach(), torch.from_numpy(matrix))
        assert m.out.weight is m.embed.weight and m.embed.weight.requires_grad
    frozen = model(tie=False).set_embedding(matrix, freeze=True)
    Trainer(frozen, TokenStream(np.arange(200) % V, 2, 7), TrainConfig(steps=3, device="cpu"), loss=CarriedState()).fit()
    assert torch.equal(frozen.embed.weight, torch.from_numpy(matrix)) and not torch.equal(frozen.out.weight, model(tie=False).out.weight)


def test_sampling():
    m = model(dropout_out=.5, weight_drop=.5)  # in training mode: no dropout all the same, and training it stays
    def drawn(seed): return generate(m, [1, 2], SamplingConfig(max_new_tokens=20, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2) and m.training
    config, text = SamplingConfig(max_new_tokens=12, temperature=0), [1, 2]
    [greedy] = generate(m, text, config)
    assert m.training
    with torch.no_grad():
        for _ in range(12): text.append(int(m.eval()(torch.tensor([text]))[0, -1].argmax()))  # reading all of it anew each time
    assert text[2:] == greedy
    assert generate(m, [1, 2], replace(config, eos_id=greedy[4])) == [greedy[: greedy.index(greedy[4]) + 1]]
    assert len(generate(m, np.array([3]), config)[0]) == len(generate(m, torch.tensor([3]), config)[0]) == 12


def test_samples_follow_the_scores():
    m = model()
    expected = m.eval()(torch.tensor([[1]]))[0, -1].softmax(0)
    drawn = generate(m, [[1]] * 3000, SamplingConfig(max_new_tokens=1, seed=0))
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=V) / 3000
    assert (counts - expected).abs().max() < 4 * (0.25 / 3000) ** .5


# ---------------------------------------------------------------- bad input

BAD = [
    (lambda: RecurrentLMConfig(0), "vocab_size=0 must be a whole number"),
    (lambda: RecurrentLMConfig(V, d_embed=2.5), "d_embed=2.5 must be a whole number"),
    (lambda: RecurrentLMConfig(V, n_layer=True), "n_layer=True must be"),
    (lambda: RecurrentLMConfig(V, cell="LSTM"), "There is no cell='LSTM'. Choose one of: rnn, lstm, gru"),
    (lambda: RecurrentLMConfig(V, weight_drop=1.), "weight_drop=1.0 must be at least 0 and below 1"),
    (lambda: RecurrentLMConfig(V, dropout_words=-.1), "dropout_words=-0.1"),
    (lambda: RecurrentLMConfig(V, dropout_hidden=.1), "with n_layer=1 there is no between"),
    (lambda: RecurrentLMConfig(V, d_embed=8, d_hidden=12), "Write d_hidden=8, or n_layer=2, or tie=False"),
    (lambda: model()(torch.tensor([1, 2])), "For one text pass ids[None]"),
    (lambda: model()(torch.zeros(2, 0, dtype=torch.long)), "hold something"),
    (lambda: model()(torch.zeros(2, 3)), "ids are whole numbers, not torch.float32"),
    (lambda: model()(torch.tensor([[1, V]])), f"The id {V} is no token: ids run from 0 to {V - 1}"),
    (lambda: model()(torch.tensor([[1, -1]])), "The id -1 is no token"),
    (lambda: model().step(some(3), model().initial_state(2)), "The state has the shape (1, 2, 12), this batch and network need (1, 3, 12)"),
    (lambda: model().step(some(3), model(n_layer=3).initial_state(3)), "The state is of 3 layers, the model has 2"),
    (lambda: model().step(some(3), model(cell="gru").initial_state(3)), "another kind of cell"),
    (lambda: model().step(some(3), model(d_hidden=9).initial_state(3)), "(1, 3, 9)"),
    (lambda: model().set_embedding(np.zeros((V, 100))),
     "The vectors have 100 numbers, the model was made for d_embed=8, which is also how wide the last layer is"),
    (lambda: model().set_embedding(np.zeros((V + 1, 8))), f"one row for each of the {V} ids"),
    (lambda: model().set_embedding(np.zeros(V)), "one row for each"),
    (lambda: model().set_embedding(np.full((V, 8), np.nan)), "The vector of id 0 holds a number that is not finite"),
    (lambda: CarriedState()(model(), next(iter(Examples([[1, 2, 3]] * 4, batch_size=2, length=8, pack=True)))), "batch with pack=False"),
    (lambda: CarriedState()(model(), next(iter(Examples([([1, 2], [3, 4])], batch_size=1, join=False)))), "pairs that are kept apart"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, says", BAD, ids=[says[:40] for _, says in BAD])
def test_bad_input(wrong, says):
    with pytest.raises((RecurrentLMError, RecurrentError)) as caught: wrong()
    assert says in str(caught.value), str(caught.value)


def test_a_batch_with_fewer_rows_cannot_carry():
    m, loss = model(), CarriedState()
    loss(m, Batch(some(3), some(3)))
    short = Batch(some(2), some(2))
    short.carry = True
    with pytest.raises(RecurrentError, match="this batch and network need"): loss(m, short)


def test_another_loss_in_the_folder(tmp_path):
    stream, config = TokenStream(np.arange(300) % V, 2, 7, contiguous=True), TrainConfig(steps=3, device="cpu")
    Trainer(model(), stream, config, loss=CarriedState(), checkpoints=Checkpoints(tmp_path)).fit()
    again = TokenStream(np.arange(300) % V, 2, 7, contiguous=True)
    with pytest.raises(TrainingError, match="give the same loss"): Trainer(model(), again, config, checkpoints=Checkpoints(tmp_path)).fit()
