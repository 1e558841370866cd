"""Reading once: caches equal to none, padding that nobody notices, steps written down equal to the model's, every kind of model read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lmbook.cache import GenerationError, KVCache, _Cached
from lmbook.deep_networks import LayerNorm
from lmbook.generation import SamplingConfig, beam_search, generate
from lmbook.language_models import NGram, NGramConfig
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.transformer import Transformer
from tests.writers import GREEDY, Table, V, slowly, transformer

VARIANTS = {
    "multi-head, learned": {},
    "grouped-query, rotary": {"n_kv_head": 2, "positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},
    "multi-query, alibi": {"n_kv_head": 1, "positions": "alibi"},
    "sinusoidal, post-norm": {"positions": "sinusoidal", "norm_first": False},
    "no positions": {"positions": "none"},
    "window, rotary": {"positions": "rotary", "window": 5},
    "window, alibi, grouped": {"positions": "alibi", "window": 3, "n_kv_head": 2},
    "window of one": {"positions": "rotary", "window": 1},
    "window, learned": {"window": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cache_changes_nothing(name):
    model = transformer(1, **VARIANTS[name])
    ids = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, cache, at, got = model(ids), KVCache(2, model.config.window, capacity=4, slack=2), 0, []
        for n in (7, 1, 1, 5, 1, 1, 1, 12, *[1] * 11):
            got.append(model(ids[:, at : at + n], cache=cache))
            at += n
            assert cache.length == at
    torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-5, rtol=1e-4)
    if model.config.window and name != "window of one": assert cache.first > 0 and cache.capacity < 40


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_with_padding_is_each_row_alone(name):
    model = transformer(2, **VARIANTS[name])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12], [3, 3, 3, 3]]
    together = generate(model, prompts, GREEDY)
    assert together == [slowly(model, prompt, 12) for prompt in prompts]
    assert together == [generate(model, prompt, GREEDY)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) > 1


def quick(reader: _Cached) -> list:
    "Of which shapes the steps are written down."
    return [key for key, known in reader.steps.known.items() if callable(known)]


def test_a_model_that_looks_at_numbers_runs_itself(monkeypatch):
    "Also where it looks after the cache has taken the step in: no token is read twice."
    plain = LayerNorm.forward
    monkeypatch.setattr(LayerNorm, "forward", lambda self, x: plain(self, x) * (2 if float(x.flatten()[0]) > -1e9 else 1))
    model, ids = transformer(12), torch.randint(V, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reader = _Cached(model, None, 4)
        got = [reader.start(ids[:, :5].tolist())[:, None], *(reader.read(ids[:, t : t + 1]) for t in range(5, 20))]
        assert not quick(reader) and reader.cache.length == 20
        torch.testing.assert_close(torch.cat(got, 1), model(ids[:, :20])[:, 4:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [
    {}, {"positions": "rotary", "norm": "rms", "activation": "swiglu", "n_kv_head": 2, "bias": False, "tie": True},
    {"positions": "none", "n_kv_head": 1, "mlp_bias": False}, {"d_head": 12, "activation": "geglu"}, {"positions": "sinusoidal"},
    {"norm_first": False}, {"residual": False}, {"embed_norm": True, "types": 2, "head": "bert"},
    {"positions": "rotary", "window": 4}, {"positions": "alibi", "window": 3},
])  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_what_was_written_down_is_the_model(changes, padded):
    model = transformer(12, **changes)
    ids = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    if padded: segments[0, :2] = 0
    rows = [row[row_segments > 0].tolist() for row, row_segments in zip(ids[:, :5], segments[:, :5])]
    with torch.inference_mode():
        reader, at = _Cached(model, None, 4), 5
        got = [reader.start(rows)[:, None]]
        for n in (1,) * 8 + (3,) * 7:
            got.append(reader.read(ids[:, at : at + n]))
            at += n
        assert {key[:2] for key in quick(reader)} == {(3, 1), (3, 3)}
        want = model(ids, segments=segments if padded else None)
        torch.testing.assert_close(torch.cat(got, 1), want[:, 4:at], atol=2e-5, rtol=1e-4)
        if changes.get("window"): return
        order = torch.tensor([2, 1, 0])  # steps that were written down further on, with the rows in another order
        reader.crop(7)
        reader.select(order)
        again = [reader.read(ids[order, t : t + 1]) for t in range(7, 10)]
        torch.testing.assert_close(torch.cat(again, 1), want[order, 7:10], atol=2e-5, rtol=1e-4)


def test_a_step_that_depends_on_the_place_is_left_to_the_model():
    model = transformer(0, positions="alibi")
    with torch.inference_mode():
        reader = _Cached(model, None, 20)
        reader.start([[1, 2]])
        for _ in range(10):
            reader.crop(2)  # at the same place a step is the same
            reader.read(torch.tensor([[3]]))
        assert not quick(reader)
        for _ in range(10): reader.read(torch.tensor([[3]]))
    assert not quick(reader) and reader.steps.plain
    assert generate(model, [1, 2], GREEDY)[0] == slowly(model, [1, 2], 12)


def test_a_window_that_is_not_yet_full_again():
    model = transformer(3, positions="rotary", window=6)
    ids = torch.randint(V, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reader = _Cached(model, None, 20)
        reader.start([ids[0, :2].tolist()])
        for t in range(2, 16): reader.read(ids[:, t : t + 1])
        assert quick(reader)
        reader.crop(2)
        got = torch.cat([reader.read(ids[:, t : t + 1]) for t in range(2, 16)], 1)
        torch.testing.assert_close(got, model(ids)[:, 2:16], atol=2e-5, rtol=1e-4)


def test_float64_stays_float64():
    model = transformer(4, positions="rotary", norm="rms").double()
    ids = torch.randint(V, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reader = _Cached(model, None, 20)
        reader.start([ids[0, :2].tolist()])
        got = torch.cat([reader.read(ids[:, t : t + 1]) for t in range(2, 20)], 1)
        assert quick(reader) and got.dtype == torch.float64
        torch.testing.assert_close(got, model(ids)[:, 2:], atol=1e-12, rtol=1e-10)


def test_parts_of_another_make_are_asked_at_each_step():
    model, called = transformer(), []
    model.decoder.blocks[0].mlp.register_forward_hook(lambda *_: called.append(1))
    generate(model, [1], SamplingConfig(max_new_tokens=15))
    assert len(called) == 15

    model, called = transformer(), []
    usual = model.out.forward
    model.out.forward = lambda x: called.append(1) or usual(x)  # of this very module
    generate(model, [1], SamplingConfig(max_new_tokens=15))
    assert len(called) == 15

    class Scaled(nn.Linear):  # as adapters do
        def forward(self, x): return 2 * super().forward(x)

    class Counting(nn.Linear):  # something else each time
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (-1) ** (self.calls // 6)

    class Own(Transformer):  # a subclass may compute anything
        def score(self, hidden): return -super().score(hidden)

    model = transformer()
    model.decoder.blocks[1].mlp.up.__class__ = Scaled
    assert generate(model, [1, 2], GREEDY)[0] == slowly(model, [1, 2], 12)
    model.decoder.blocks[1].mlp.up.__class__ = Counting
    generate(model, [1, 2], GREEDY)
    assert model.decoder.blocks[1].mlp.up.calls == 12
    model = transformer()
    model.__class__ = Own
    assert generate(model, [1, 2], GREEDY)[0] == slowly(model, [1, 2], 12) != generate(transformer(), [1, 2], GREEDY)[0]


def test_cross_attention_with_a_cache():
    model = transformer(3, kind="encoder-decoder", positions="sinusoidal")
    sources, prompts = [[1, 2, 3, 4, 5], [6, 7]], [[1, 5], [1]]
    together = generate(model, prompts, GREEDY, source=sources)
    assert together == [slowly(model, p, 12, source=torch.tensor([s])) for p, s in zip(prompts, sources)]
    other = generate(model, prompts, GREEDY, source=[[9, 9, 9], [6, 7]])
    assert other[1] == together[1] and other[0] != together[0]
    best = beam_search(model, prompts[0], 3, 6, source=sources[0])
    with torch.no_grad(): log_p = model(torch.tensor([prompts[0] + best[0].ids]), source=torch.tensor([sources[0]])).log_softmax(-1)[0]
    assert math.isclose(best[0].log_prob, sum(float(log_p[1 + i, id]) for i, id in enumerate(best[0].ids)), abs_tol=1e-3)


@pytest.mark.parametrize("window", [None, 6])
def test_crop_and_select(window):
    model = transformer(4, positions="rotary", window=window)
    ids = torch.randint(V, (3, 30), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    segments[0, :4] = 0
    with torch.no_grad():
        cache = KVCache(2, window, capacity=8, slack=8)
        model(ids[:, :20], segments=segments[:, :20], cache=cache)
        model(ids[:, 20:25], cache=cache)
        cache.crop(21)
        cache.select(torch.tensor([2, 0, 0]))
        got = model(ids[[2, 0, 0], 21:], cache=cache)
        want = model(ids, segments=segments)[[2, 0, 0], 21:]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    with pytest.raises(GenerationError, match="cannot be cut"): cache.crop(31)
    if window:
        with torch.no_grad():
            for t in range(30): model(ids[:, t : t + 1], cache=cache)
        with pytest.raises(GenerationError, match="slack="): cache.crop(cache.length - 25)


def test_a_call_that_fails_has_read_nothing():
    model = transformer(5)
    with torch.no_grad():
        cache = KVCache(2)
        model(torch.tensor([[1, 2, 3]]), cache=cache)
        with pytest.raises(ValueError, match="context_length"): model(torch.ones(1, 70, dtype=torch.long), cache=cache)
        assert cache.length == 3
        want = model(torch.tensor([[1, 2, 3, 4]]))[:, -1:]
        torch.testing.assert_close(model(torch.tensor([[4]]), cache=cache), want, atol=1e-5, rtol=1e-4)
    assert cache.nbytes == 2 * 2 * 128 * 32 * 4
    with pytest.raises(GenerationError, match="at least 1"): KVCache(0)


def test_a_full_context_slides_or_stops():
    model, short = transformer(6, context_length=16), [[1, 2], [3, 4, 5, 6, 7, 8, 9]]
    config = SamplingConfig(max_new_tokens=40, temperature=0)
    assert generate(model, short, config) == [slowly(model, p, 40, 16) for p in short]
    stopped = generate(model, short, SamplingConfig(max_new_tokens=40, temperature=0, on_full="stop"))
    assert [len(row) for row in stopped] == [15, 10]  # 16 read, and one more that was not read
    assert generate(model, [1] * 16, SamplingConfig(max_new_tokens=3, temperature=0))[0] == slowly(model, [1] * 16, 3, 16)


def test_other_models_write_too():
    lstm = RecurrentLM(RecurrentLMConfig(V, 16, 16, n_layer=2)).eval()
    gru = RecurrentLM(RecurrentLMConfig(V, 16, 16, cell="gru")).eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    for model in (lstm, gru, Table(V, 0)): assert generate(model, prompts, GREEDY) == [slowly(model, p, 12) for p in prompts]
    rows = [[1, 2, 3, 4, 2, 3, 5], [1, 2, 3, 4, 2, 3, 4]]
    ngram = NGram.fit(rows, V, NGramConfig(order=3))
    greedy = [1]
    for _ in range(5): greedy.append(int(ngram.next_log_probs(greedy).argmax()))
    assert generate(ngram, [1], SamplingConfig(max_new_tokens=5, temperature=0)) == [greedy[1:]]
