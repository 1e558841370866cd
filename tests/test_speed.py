"""Speed: counts by formula and by counter, memory by the log, by hand and by the profiler, tiles against the matrix, batches made ahead."""

from __future__ import annotations

import copy
import gc
import threading
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmbook.attention import attention, attention_weights
from lmbook.batches import Batch, Batches, Examples, TokenStream
from lmbook.core import LmbookError
from lmbook.speed import (
    MemoryLog,
    Prefetch,
    Roofline,
    SpeedError,
    checkpointing,
    count_flops,
    flash_attention,
    measure_roofline,
    mfu,
    prefetch,
    train_flops,
)
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig, count_parameters, flops, preset

SMALL = {"d_model": 24, "n_layer": 3, "n_head": 3, "context_length": 32}


def model_of(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(50, **(SMALL | changes)))


def batch_of(rows: int = 4, length: int = 32) -> Batch:
    ids = torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def gradient(model: nn.Module, batch: Batch) -> None:
    loss, n = next_token_loss(model, batch)
    (loss / n).backward()


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "bias": False}, {"n_kv_head": 1}, {"d_head": 4}, {"tie": False}])
def test_the_formula_is_what_plain_attention_executes(changes):
    model, batch = model_of(**changes), batch_of()
    with sdpa_kernel(SDPBackend.MATH): found = count_flops(lambda: gradient(model, batch))
    assert found == train_flops(model.config, 4, 32) == 3 * 4 * flops(model.config, 32)


def test_fused_attention_is_counted_and_pytorchs_counter_misses_it():
    model, batch = model_of(), batch_of()
    scores = 2 * 4 * 32 * 32 * 24 * 3  # one product with the scores, over batch and layers
    must = train_flops(model.config, 4, 32)
    with FlopCounterMode(display=False) as theirs: gradient(model, batch)
    assert theirs.get_total_flops() == must - 6 * scores
    assert count_flops(lambda: gradient(model, batch)) == must + scores  # recomputed on the way back
    with torch.no_grad(): assert count_flops(lambda: model(batch.ids)) == must / 3


def test_an_encoder_decoder_needs_its_source():
    config = TransformerConfig(50, **SMALL, kind="encoder-decoder")
    model = Transformer(config)
    ids = torch.randint(50, (2, 16))
    with sdpa_kernel(SDPBackend.MATH): found = count_flops(lambda: model(ids, source=ids[:, :8]).sum().backward())
    assert found == train_flops(config, 2, 16, source=8)
    with pytest.raises(LmbookError, match="source="): train_flops(config, 2, 16)


def test_mfu_is_a_share_of_the_peak():
    config = preset("tiny", 512)
    peak = 1e12
    perfect = peak / (train_flops(config, 1, 256) / 256)  # tokens a second
    assert mfu(config, perfect, peak) == pytest.approx(1)
    assert mfu(config, perfect / 4, peak, tokens=256) == pytest.approx(.25)
    assert mfu(config, perfect, peak, tokens=32) < 1 and mfu(config, 0, peak) == 0


@pytest.mark.parametrize(("work", "message"), [
    (lambda: train_flops(preset("tiny", 512), 0, 8), "rows=0"), (lambda: train_flops(preset("tiny", 512), 1, 2.5), "tokens=2.5"),
    (lambda: mfu(preset("tiny", 512), -1, 1e9), "tokens_per_s"), (lambda: mfu(preset("tiny", 512), 1, 0), "peak"),
    (lambda: Roofline(0, 1), "peak"), (lambda: Roofline(1, float("inf")), "bandwidth"),
    (lambda: Roofline(1, 1).attainable(-1), "intensity"),
    (lambda: measure_roofline(size=0), "size"), (lambda: measure_roofline(rounds=0), "rounds"),
])  # fmt: skip
def test_bad_numbers_are_named(work, message):
    with pytest.raises(SpeedError, match=message): work()


# ---------------------------------------------------------------- memory


def test_a_storage_counts_once_and_as_long_as_it_lives():
    with MemoryLog() as log:
        x = torch.ones(1000)
        y = x.view(10, 100)[2:, ::2].T
        assert log.now == 4000
        del x
        assert log.now == 4000  # the view holds it
        del y
        assert log.now == 0
        z = torch.zeros(10, dtype=torch.int16)
        z.add_(1)
    assert (log.now, log.peak) == (20, 4000) and max(log.timeline) == 4000 and log.timeline[-1] == 20


def test_what_is_read_counts_from_when_it_is_read_and_what_is_held_from_the_beginning():
    x, late = torch.ones(100), torch.ones(50)
    with MemoryLog(x) as log:
        assert log.now == 400
        x + 1
        assert log.now == 400  # the sum is gone
        late.sum()
    assert (log.now, log.peak) == (600, 800)


def test_parameters_gradients_and_adam_by_hand():
    model, batch = model_of(), batch_of()
    n = 4 * count_parameters(model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert MemoryLog(model).now == n
    gradient(model, batch)
    assert MemoryLog(model).now == 2 * n  # gradients are found
    optimizer.step()
    assert MemoryLog(model, optimizer).now == 4 * n + 4 * len(optimizer.state)
    with MemoryLog(model, optimizer, batch.ids, batch.targets) as log:
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        gradient(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert log.now == 3 * n + 4 * len(optimizer.state) + batch.ids.nbytes + batch.targets.nbytes


def test_what_a_linear_layer_keeps():
    layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(32, 16)
    with MemoryLog(layers, x) as log: out = layers(x)
    held = sum(4 * p.numel() for p in layers.parameters()) + 4 * 32 * 16
    assert log.now == held + 4 * 32 * 64 + 4 * 32 * 16  # the ReLU's output, which it and the second map keep, and what came out
    del out


def test_storages_that_are_resized_as_fsdp_does():
    x = torch.ones(1000)
    with MemoryLog(x) as log:
        x.untyped_storage().resize_(0)
        assert log.now == 0
        x.untyped_storage().resize_(8000)
        assert (log.now, log.peak) == (8000, 8000)
        y = torch.ones(10)
        y.resize_(100)
        assert log.now == 8400
    before = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), MemoryLog(): 1 / 0  # noqa: B018
    assert torch.UntypedStorage.resize_ is before  # and not the log's


def test_fake_tensors_have_bytes_too():
    with FakeTensorMode(), MemoryLog() as log:
        x = torch.empty(10**6, 10**4)
        y = x @ x.T[:, :10]
    assert log.now == 4 * (10**10 + 10**7) and y.shape == (10**6, 10)


def test_the_log_changes_nothing():
    model, batch = model_of(dropout=.1), batch_of()
    other = copy.deepcopy(model)
    for which, log in ((model, None), (other, MemoryLog(other))):
        torch.manual_seed(3)
        if log is None: gradient(which, batch)
        else:
            with log: gradient(which, batch)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))


def test_two_logs_at_once_and_one_twice():
    with MemoryLog() as outer:
        x = torch.ones(10)
        with MemoryLog() as inner: y = torch.ones(100)
        assert inner.now == 400 and outer.now == 440
        del x, y
    assert outer.now == 0
    with outer: z = torch.ones(5)
    assert outer.now == 20 and z.sum() == 5


# ---------------------------------------------------------------- roofline


def test_the_roof():
    roof = Roofline(peak=100., bandwidth=10.)
    assert roof.ridge == 10 and roof.attainable(5) == 50 and roof.attainable(20) == 100 and roof.attainable(0) == 0
    assert roof.seconds(100, 1) == 1 and roof.seconds(1, 100) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_roof_has_sensible_sides(dtype):
    times = iter(range(1000))  # a clock on which everything takes a second
    roof = measure_roofline(dtype=dtype, size=8, megabytes=1, rounds=2, clock=lambda: next(times))
    assert roof == Roofline(2 * 8**3, 2 * 2**20)


# ---------------------------------------------------------------- attention in tiles


def by_matrix(q, k, v, causal, scale=None):
    weights = attention_weights(q, k, causal=causal, scale=scale)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S", "block"), [(1, 1, 64), (1, 9, 4), (7, 7, 3), (8, 8, 4), (5, 13, 4), (16, 17, 64), (33, 40, 8)])
def test_tiles_equal_the_matrix_with_their_gradients(T, S, block, causal):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, h, n, e, dtype=torch.double, requires_grad=True) for h, n, e in ((4, T, 6), (2, S, 6), (2, S, 5)))
    for scale in (None, 1.7):
        ours, theirs = flash_attention(q, k, v, causal=causal, block=block, scale=scale), by_matrix(q, k, v, causal, scale)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
        out = torch.randn_like(ours)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), out), torch.autograd.grad(theirs, (q, k, v), out)):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_large_scores_do_not_overflow():
    q, k, v = (torch.randn(1, 1, 20, 4) * 100 for _ in range(3))
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, block=6), attention(q, k, v, causal=True))


def test_bfloat16_is_added_up_in_float32():
    torch.manual_seed(0)
    q, k, v = ((torch.randn(1, 2, 400, 16) + more).bfloat16().requires_grad_() for more in (0, 0, 3))
    out = flash_attention(q, k, v, block=16)
    assert out.dtype == torch.bfloat16
    exact = by_matrix(q.double(), k.double(), v.double(), False)
    assert (out.double() - exact).abs().max() < .009  # half a step of bfloat16 between 2 and 4, and a little
    out.float().sum().backward()
    assert q.grad.dtype == torch.bfloat16


def test_nothing_as_large_as_the_matrix_is_ever_there():
    peaks = {}
    for T in (64, 128, 256):
        q, k, v = (torch.randn(1, 1, T, 4, requires_grad=True) for _ in range(3))
        with MemoryLog(q, k, v) as log: flash_attention(q, k, v, block=16).sum().backward()
        peaks[T] = log.peak
    assert peaks[256] < 4 * 256 * 256 and peaks[256] / peaks[128] < 2.1


def test_a_second_derivative_is_refused():
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    [first] = torch.autograd.grad(flash_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError): first.sum().backward()


@pytest.mark.parametrize(("shapes", "options", "message"), [
    (((2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)), {}, "queries must be floats"),
    (((1, 1, 3, 4), (1, 1, 3, 5), (1, 1, 3, 5)), {}, "head size"),
    (((1, 1, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4)), {}, "rows"),
    (((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 2, 4)), {}, "one value"),
    (((1, 1, 3, 4), (1, 1, 0, 4), (1, 1, 0, 4)), {}, "at least one"),
    (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {}, "equally many"),
    (((1, 1, 5, 4), (1, 1, 3, 4), (1, 1, 3, 4)), {"causal": True}, "5 queries and 3 keys"),
    (((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)), {"block": 0}, "block=0"),
])  # fmt: skip
def test_shapes_that_do_not_fit(shapes, options, message):
    with pytest.raises(SpeedError, match=message): flash_attention(*(torch.randn(s) for s in shapes), **options)


def test_whole_numbers_are_refused():
    with pytest.raises(SpeedError, match="int64"): flash_attention(*(torch.ones(1, 1, 3, 4, dtype=torch.long) for _ in range(3)))


# ---------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("changes", [{}, {"dropout": .2}, {"kind": "encoder"}, {"positions": "rotary", "norm": "rms"}])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_checkpointed_gradients_are_the_same_to_the_last_bit(changes, every):
    model, batch, found = model_of(**changes), batch_of(), []
    for checkpoints in (False, True):
        torch.manual_seed(4)
        if checkpoints:
            with checkpointing(model, every=every): gradient(model, batch)
        else: gradient(model, batch)
        found.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert not any("forward" in vars(module) for module in model.modules())


def test_checkpointing_saves_memory_and_costs_flops():
    model, batch = model_of(n_layer=6, context_length=128), batch_of(4, 128)
    peaks, work = [], []
    for every in (None, 2, 1):
        def run(every: int | None = every) -> None:
            if every is None: gradient(model, batch)
            else:
                with checkpointing(model, every=every): gradient(model, batch)
            model.zero_grad(set_to_none=True)

        with MemoryLog(model) as log: run()
        peaks.append(log.peak)
        work.append(count_flops(run))
    assert peaks[0] > peaks[1] > peaks[2] and work[0] < work[1] < work[2] < 1.34 * work[0]


def test_checkpointing_within_itself_and_after_an_error():
    model = model_of()
    with checkpointing(model), checkpointing(model): gradient(model, batch_of())
    with pytest.raises(ZeroDivisionError), checkpointing(model): 1 / 0  # noqa: B018
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_has_no_blocks_is_told_so():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(SpeedError, match="has no Block"), checkpointing(plain): pass
    with checkpointing(plain, kind=nn.Linear): plain(torch.randn(2, 4, requires_grad=True)).sum().backward()
    with pytest.raises(SpeedError, match="every=0"), checkpointing(model_of(), every=0): pass


# ---------------------------------------------------------------- made ahead


def workers() -> int: return sum(t.name == "lmbook-prefetch" for t in threading.enumerate())


@pytest.mark.parametrize("ahead", [1, 2, 100])
def test_order_stays_and_nothing_is_lost(ahead):
    for items in (list(range(50)), [], [None]): assert list(prefetch(items, ahead)) == items
    assert workers() == 0


def test_no_more_is_made_than_may_wait():
    made = []

    def making():
        for i in range(20):
            made.append(i)
            yield i

    coming = prefetch(making(), 3)
    assert next(coming) == 0
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline: time.sleep(.005)
    time.sleep(.15)
    assert len(made) == 5  # one given out, three that wait, and one in the thread's hand
    coming.close()
    assert workers() == 0


def test_an_error_comes_where_its_item_would_have_come():
    def making():
        yield 1
        yield 2
        raise LookupError("the shelf is empty")

    coming = prefetch(making(), 5)
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(LookupError, match="shelf"): next(coming)
    assert workers() == 0


def test_who_stops_early_ends_the_thread():
    for item in prefetch(iter(int, 1), 2):  # zeros without end
        assert item == 0
        break
    gc.collect()
    assert workers() == 0


def test_ahead_is_at_least_one():
    with pytest.raises(SpeedError, match="ahead=0"): list(prefetch([1], 0))
    with pytest.raises(SpeedError, match="ahead=-1"): Prefetch(stream(), -1)
    with pytest.raises(SpeedError, match="`prefetch`"): Prefetch([1, 2])


def stream(seed: int = 0) -> TokenStream: return TokenStream(list(range(50)) * 20, 4, 16, seed=seed)


def test_prefetched_batches_are_the_same_for_several_epochs():
    plain, ahead = stream(), Prefetch(stream())
    for _ in range(3):
        pairs = list(zip(plain, ahead, strict=True))
        assert len(pairs) == len(plain) and all(torch.equal(a.ids, b.ids) for a, b in pairs)
        assert plain.state_dict() == ahead.state_dict()
    assert ahead.epoch == 3 and workers() == 0


def test_the_state_is_of_what_was_given_out():
    ahead = Prefetch(stream(), ahead=4)
    source = iter(ahead)
    first = [next(source) for _ in range(3)]
    assert ahead.state_dict()["position"] == 3  # and not seven
    source.close()
    again = Prefetch(stream(), ahead=2)
    again.load_state_dict(ahead.state_dict())
    rest = list(again)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip([*first, *rest], stream().read(), strict=True))


def test_a_source_that_has_begun_goes_on():
    inner = stream()
    source = iter(inner)
    next(source)
    ahead = Prefetch(inner)
    assert ahead.position == 1 and len(list(ahead)) == len(inner) - 1


@pytest.mark.parametrize("source", [lambda: Examples([[1, 2, 3, 4]] * 9 + [[1, 2]] * 4, batch_size=3), stream])
def test_training_is_the_same(source):
    rows = []
    for wrap in (lambda b: b, Prefetch):
        model = model_of()
        batches: Batches = wrap(source())
        rows.append(Trainer(model, batches, TrainConfig(steps=12, log_every=1, device="cpu")).fit().rows)
    assert rows[0] == rows[1] and workers() == 0
