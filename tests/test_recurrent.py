"""Recurrent networks: equal to PyTorch's in values, states and gradients; padding that changes nothing; how far back; bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmbook.batches import Examples
from lmbook.core import LmbookError
from lmbook.recurrent import (
    CELLS,
    GRUCell,
    LSTMCell,
    Recurrent,
    RecurrentConfig,
    RecurrentError,
    RNNCell,
    detach_state,
    gradient_by_distance,
    reset_state,
    select_state,
    unroll,
)

CLOSE = {"rtol": 0.0, "atol": 1e-12}
PAIRS = {"rnn": (RNNCell, nn.RNNCell), "lstm": (LSTMCell, nn.LSTMCell), "gru": (GRUCell, nn.GRUCell)}
KINDS = [(cell, n_layer, both) for cell in CELLS for n_layer in (1, 2) for both in (False, True)]


def parts(state: Tensor | tuple[Tensor, ...]) -> list[Tensor]: return list(state) if isinstance(state, tuple) else [state]


def made(cell: str = "lstm", n_layer: int = 1, both: bool = False, d_in: int = 5, d_hidden: int = 4, **more) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(RecurrentConfig(d_in, d_hidden, n_layer, cell, both, **more)).double()


# ---------------------------------------------------------------- cells


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("B", "T", "D", "H"), [(3, 7, 5, 4), (1, 1, 1, 1), (2, 30, 4, 9)])
def test_a_cell_is_pytorchs_in_states_and_gradients(name, B, T, D, H):
    ours, theirs = (kind(D, H).double() for kind in PAIRS[name])
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())  # and back
    x = torch.randn(B, T, D, dtype=torch.float64)
    grads, states = [], []
    for cell, step in ((ours, ours), (theirs, theirs)):
        leaf, state = x.clone().requires_grad_(), None
        for t in range(T): state = step(leaf[:, t], state)
        states.append(parts(state))
        grads.append(torch.autograd.grad(sum((p * (i + 1)).sum() for i, p in enumerate(states[-1])), [leaf, *cell.parameters()]))
    torch.testing.assert_close(states[0], states[1], **CLOSE)
    for a, b in zip(*grads): torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(parts(unroll(ours, x)[1]), states[1], **CLOSE)


@pytest.mark.parametrize("name", PAIRS)
def test_a_cell_unrolled_is_pytorchs_layer(name):
    cell, layer = PAIRS[name][0](5, 4).double(), CELLS[name](5, 4, batch_first=True).double()
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    output, state = unroll(cell, x)
    expected, last = layer(x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(parts(state), [p[0] for p in parts(last)], **CLOSE)
    again, _ = unroll(cell, x[:, 3:], unroll(cell, x[:, :3])[1])  # in two pieces, with a state that is carried
    torch.testing.assert_close(again, output[:, 3:], **CLOSE)


# ---------------------------------------------------------------- Recurrent


@pytest.mark.parametrize(("cell", "n_layer", "both"), KINDS)
def test_recurrent_is_pytorchs_module(cell, n_layer, both):
    model = made(cell, n_layer, both, forget_bias=None)
    theirs = CELLS[cell](5, 4, n_layer, batch_first=True, bidirectional=both).double()
    theirs.load_state_dict(model.rnn.state_dict())
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    (output, state), (expected, last) = model(x), theirs(x)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(parts(state), parts(last), **CLOSE)
    assert output.shape == (3, 6, model.d_out) and model.d_out == (8 if both else 4)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    spare=st.integers(0, 2),
    as_mask=st.booleans(),
    carried=st.booleans(),
)
@example(kind=("lstm", 1, True), lengths=[4, 3], spare=0, as_mask=False, carried=False)  # one place of padding
def test_in_a_padded_batch_each_sentence_is_as_if_alone(kind, lengths, spare, as_mask, carried):
    cell, n_layer, both = kind
    model, T = made(cell, n_layer, both), max(lengths) + spare  # padding behind the longest, too
    x = torch.randn(len(lengths), T, 5, dtype=torch.float64)
    start = [torch.randn(n_layer * (2 if both else 1), len(lengths), 4, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)]
    start = None if not carried else tuple(start) if cell == "lstm" else start[0]
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    output, state = model(x, start, **({"segments": mask} if as_mask else {"lengths": lengths}))
    for b, n in enumerate(lengths):
        row = torch.tensor([b])
        alone, last = model(x[b : b + 1, :n], None if start is None else select_state(start, row))
        torch.testing.assert_close(output[b, :n], alone[0], **CLOSE)
        torch.testing.assert_close(parts(select_state(state, row)), parts(last), **CLOSE)
        assert not output[b, n:].any()


def test_what_stands_at_padding_plays_no_part_not_even_in_gradients():
    model = made(both=True, n_layer=2)
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    edited = x.clone()
    edited[1, 2:] = 1e6
    outs = []
    for batch in (x, edited):
        leaf = batch.clone().requires_grad_()
        output, _ = model(leaf, lengths=[5, 2])
        outs.append((output, *torch.autograd.grad(output.square().sum(), [leaf, *model.parameters()])))
    for a, b in zip(*outs): torch.testing.assert_close(a, b, **CLOSE)
    assert not outs[0][1][1, 2:].any()


def test_two_passes_by_hand_are_the_bidirectional_layer():
    for cell, (kind, _) in PAIRS.items():
        left, right, layer = kind(5, 4).double(), kind(5, 4).double(), CELLS[cell](5, 4, batch_first=True, bidirectional=True).double()
        names = {f"{key}_l0{end}": value for end, c in (("", left), ("_reverse", right)) for key, value in c.state_dict().items()}
        layer.load_state_dict(names)
        x = torch.randn(2, 6, 5, dtype=torch.float64)
        by_hand = torch.cat([unroll(left, x)[0], unroll(right, x.flip(1))[0].flip(1)], -1)
        torch.testing.assert_close(by_hand, layer(x)[0], **CLOSE)


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.5])
def test_the_forget_bias_is_the_sum_of_both_biases(bias):
    model, plain = made("lstm", 2, True, forget_bias=bias), made("lstm", 2, True, forget_bias=None)
    for suffix in ("l0", "l1", "l0_reverse", "l1_reverse"):
        both = [getattr(model.rnn, f"bias_{part}_{suffix}").detach() for part in ("ih", "hh")]
        assert (sum(both)[4:8] == bias).all()
        for part, now in zip(("ih", "hh"), both):  # and nothing else changed
            drawn = getattr(plain.rnn, f"bias_{part}_{suffix}").detach()
            assert torch.equal(now[:4], drawn[:4]) and torch.equal(now[8:], drawn[8:])


def test_dropout_is_between_layers_and_only_in_training():
    model = made(n_layer=2, dropout=0.5)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_states_are_selected_reset_and_cut(cell):
    model = made(cell, 2)
    _, state = model(torch.randn(3, 4, 5, dtype=torch.float64))
    chosen, cut = select_state(state, torch.tensor([2, 0, 2])), detach_state(state)
    emptied = reset_state(state, torch.tensor([False, True, False]))
    for s, c, e, d in zip(*map(parts, (state, chosen, emptied, cut))):
        assert torch.equal(c, s[:, [2, 0, 2]])
        assert not e[:, 1].any() and torch.equal(e[:, ::2], s[:, ::2])
        assert torch.equal(d, s) and not d.requires_grad
        assert s.requires_grad  # the state itself was not touched
    assert isinstance(chosen, tuple) == isinstance(emptied, tuple) == (cell == "lstm")


def test_truncated_gradients_are_whole_within_the_window_and_zero_before():
    model, x = made(), torch.randn(1, 9, 5, dtype=torch.float64).requires_grad_()
    [whole] = torch.autograd.grad(model(x)[0][:, -1].sum(), x)
    _, state = model(x[:, :5])
    [cut] = torch.autograd.grad(model(x[:, 5:], detach_state(state))[0][:, -1].sum(), x)
    torch.testing.assert_close(cut[:, 5:], whole[:, 5:], **CLOSE)
    assert not cut[:, :5].any() and whole[:, :5].abs().amin() > 0


# ---------------------------------------------------------------- how far back


@pytest.mark.parametrize(("cell", "n_layer", "both"), KINDS)
def test_gradient_by_distance_is_the_jacobian(cell, n_layer, both):
    model = made(cell, n_layer, both).train()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda leaf: model(leaf)[0][:, -1], x)  # (B, K, B, T, D)
    expected = torch.stack([jacobian[b, :, b].square().sum((0, 2)).sqrt() for b in range(2)]).flip(1)
    torch.testing.assert_close(gradient_by_distance(model, x), expected, rtol=1e-9, atol=1e-12)
    with torch.no_grad(): torch.testing.assert_close(gradient_by_distance(model, x), expected, rtol=1e-9, atol=1e-12)
    assert model.training and all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------- bad input

CONFIGS = [
    (lambda: RecurrentConfig(0, 4), "d_in=0 must be a whole number"),
    (lambda: RecurrentConfig(4, 2.0), "d_hidden=2.0"),
    (lambda: RecurrentConfig(4, 4, n_layer=True), "n_layer=True"),
    (lambda: RecurrentConfig(4, 4, cell="LSTM"), "There is no cell='LSTM'. Choose one of: rnn, lstm, gru"),
    (lambda: RecurrentConfig(4, 4, 2, dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
    (lambda: RecurrentConfig(4, 4, dropout=0.1), "with n_layer=1 there is no between"),
    (lambda: LSTMCell(3, 0), "d_hidden=0"),
]
X = torch.zeros(2, 3, 5)
H = torch.zeros(1, 2, 4)
INPUTS = [
    ("lstm", (torch.zeros(2, 3, 6),), {}, "6 numbers in a vector, this network was made for d_in=5"),
    ("lstm", (torch.zeros(3, 5),), {}, r"shape \(3, 5\); \(B, T, D\) is needed"),
    ("lstm", (X.long(),), {}, "embed ids first"),
    ("lstm", (torch.zeros(2, 0, 5),), {}, "nothing to read"),
    ("lstm", (torch.zeros(0, 3, 5),), {}, "nothing to read"),
    ("lstm", (X,), {"lengths": [3, 0]}, r"Sentence 1 of the batch is empty \(length 0\). Leave it out"),
    ("lstm", (X,), {"segments": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "Sentence 1 of the batch is empty"),
    ("lstm", (X,), {"lengths": [4, 1]}, "Sentence 0 has the length 4, but the input has only T=3"),
    ("lstm", (X,), {"lengths": [1, -1]}, "is empty"),
    ("lstm", (X,), {"lengths": [3]}, "There are 2 sentences, and lengths of the shape"),
    ("lstm", (X,), {"lengths": torch.tensor([1.0, 2.0])}, "Lengths are whole numbers"),
    ("lstm", (X,), {"segments": torch.ones(2, 4)}, r"The segments have the shape \(2, 4\)"),
    ("lstm", (X,), {"segments": torch.tensor([[1, 0, 1], [1, 1, 1]])}, "a token behind padding"),
    ("lstm", (X,), {"segments": torch.tensor([[1, 1, 2], [1, 1, 1]])}, "several documents each"),
    ("lstm", (X,), {"lengths": torch.ones(2, 3, dtype=torch.long)}, "lengths of the shape"),
    ("lstm", (X,), {"lengths": [3, 2], "segments": torch.ones(2, 3)}, "not both"),
    ("lstm", (X, H), {}, r"a pair \(h, c\), but a Tensor was given. Was it made by another kind of cell"),
    ("gru", (X, (H, H)), {}, "one tensor h, but a pair was given"),
    ("lstm", (X, (H[:, :1], H[:, :1])), {}, r"state has the shape \(1, 1, 4\), this batch and network need \(1, 2, 4\)"),
    ("gru", (X, torch.zeros(2, 2, 4)), {}, "this batch and network need"),
    ("gru", (X, H.double()), {}, "move the state"),
    ("rnn", (X, "state"), {}, "A state is made of tensors"),
]


@pytest.mark.parametrize(("make", "message"), CONFIGS)
def test_a_bad_configuration_says_what_to_change(make, message):
    with pytest.raises(RecurrentError, match=message): make()


@pytest.mark.parametrize(("cell", "args", "options", "message"), INPUTS)
def test_bad_input_says_what_is_wrong(cell, args, options, message):
    with pytest.raises(RecurrentError, match=message): Recurrent(RecurrentConfig(5, 4, cell=cell))(*args, **options)


def test_bad_input_elsewhere():
    bad = [
        (lambda: gradient_by_distance(Recurrent(RecurrentConfig(5, 4)), torch.zeros(3, 5)), "x holds floats and has the shape"),
        (lambda: unroll(RNNCell(5, 4), torch.zeros(2, 0, 5)), "nothing to read"),
        (lambda: LSTMCell(5, 4)(torch.zeros(2, 5), torch.zeros(2, 4)), "a pair"),
        (lambda: GRUCell(5, 4)(torch.zeros(2, 5), torch.zeros(3, 4)), r"need \(2, 4\)"),
        (lambda: RNNCell(5, 4)(torch.zeros(5)), r"\(B, D\) is needed"),
    ]
    for call, message in bad:
        with pytest.raises(RecurrentError, match=message): call()


def test_packed_rows_of_examples_are_refused_and_padded_ones_read():
    model = Recurrent(RecurrentConfig(5, 4))
    packed = next(iter(Examples([[1, 2, 3], [4, 5]], batch_size=1, length=8, pack=True)))
    with pytest.raises(RecurrentError, match="pack=False"): model(torch.zeros(*packed.ids.shape, 5), segments=packed.segments)
    padded = next(iter(Examples([[1, 2, 3], [4, 5]], batch_size=2)))
    assert model(torch.zeros(*padded.ids.shape, 5), segments=padded.segments)[0].shape == (2, 2, 4)


def test_the_error_is_the_books(): assert issubclass(RecurrentError, LmbookError)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("lengths", [None, [4, 2]])
def test_every_processor_can_train_in_bfloat16(cell, lengths):
    "PyTorch's LSTM refuses to where oneDNN has no bfloat16; then it computes in float32, and gives exactly what it gives without autocast."
    torch.manual_seed(0)
    network, x = Recurrent(RecurrentConfig(3, 4, cell=cell)), torch.randn(2, 4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): out, state = network(x, None, lengths)
    out.float().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16): network(x, state, lengths)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported(): assert torch.equal(out, network(x, None, lengths)[0])
