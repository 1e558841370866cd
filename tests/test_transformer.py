"""Invariants of the Transformer, its arithmetic, its precision and its cache protocol."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lmbook.batches import Examples, TokenStream
from lmbook.cache import KVCache
from lmbook.networks import gradient_check
from lmbook.positions import LearnedPositions
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import (
    _ACTIVATIONS,
    GATED,
    PRESETS,
    Block,
    Memory,
    MLPActivation,
    PresetName,
    Stack,
    Transformer,
    TransformerConfig,
    TransformerError,
    count_parameters,
    flops,
    preset,
)
from tests.models import CASES, KINDS, SIZES, VARIANTS, SlowCache, V, close, given_source, ids, make

# ---------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("decoder", "encoder-decoder"))
@torch.no_grad()
def test_the_future_does_not_matter(kind, variant):
    model, x = make(kind, variant), ids(2, 12)
    before = model(x, **given_source(model, 2))
    for t in (0, 1, 5, 11):
        edited = x.clone()
        edited[:, t] = (edited[:, t] + 1 + torch.arange(2)) % V
        moved = (model(edited, **given_source(model, 2)) - before).abs().amax((0, 2))
        assert (moved[:t] < 1e-6).all() and moved[t] > 1e-3


@torch.no_grad()
def test_an_encoder_sees_both_ways():
    model, x = make("encoder", "bert"), ids(2, 12)
    edited = x.clone()
    edited[:, 6] = (edited[:, 6] + 1) % V
    assert ((model(edited) - model(x)).abs().amax((0, 2)) > 1e-4).all()


@pytest.mark.parametrize(("kind", "variant"), CASES)
@torch.no_grad()
def test_padding_and_company_do_not_matter(kind, variant):
    model, lengths, T = make(kind, variant), (9, 5, 6, 1), 9
    x, segments = ids(4, T), torch.zeros(4, T, dtype=torch.long)
    spans = [slice(0, 9), slice(4, 9), slice(0, 6), slice(3, 4)]  # full, padded on the left, on the right, on both sides
    for row, span in zip(segments, spans): row[span] = 1
    source, there = ids(4, 8, 3), torch.arange(8) < torch.tensor([8, 3, 5, 1])[:, None]
    more = {"source": source, "source_segments": there.long()} if kind == "encoder-decoder" else {}
    together = model(x, segments=segments, **more)
    for b, span in enumerate(spans):
        own = {"source": source[b : b + 1, there[b]]} if more else {}
        close(together[b, span], model(x[b : b + 1, span], **own)[0])
    other = x.clone()
    other[segments == 0] = 0
    again = model(other, segments=segments.bool(), **more)
    for b, span in enumerate(spans): assert torch.equal(again[b, span], together[b, span])
    assert lengths == tuple(segments.sum(1).tolist()) and together.isfinite().all()


@pytest.mark.parametrize(("kind", "variant"), [(k, v) for k, v in CASES if k != "encoder-decoder"])
@torch.no_grad()
def test_packed_rows_are_the_texts_alone(kind, variant):
    model, x = make(kind, variant), ids(1, 14)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0]])
    packed = model(x, segments=segments, positions=positions)
    for span in (slice(0, 4), slice(4, 10), slice(10, 11)): close(packed[:, span], model(x[:, span]))
    close(model(x, segments=segments)[:, :11], packed[:, :11])  # positions that were not given are counted in each document


@torch.no_grad()
def test_a_row_may_be_longer_than_the_context_if_its_documents_are_not():
    model = make(context_length=6)
    segments, positions = torch.arange(12)[None] // 6 + 1, torch.arange(12)[None] % 6
    close(model(ids(1, 12), segments=segments, positions=positions)[:, 6:], model(ids(1, 12)[:, 6:]))


@pytest.mark.parametrize("variant", ("gpt2", "llama", "2017"))
@torch.no_grad()
def test_encoder_decoder_is_a_slow_loop(variant):
    "One source, one place of the target at a time, from nothing but the tokens before it; blocks with loops over places and heads."
    model, source, x = make("encoder-decoder", variant), ids(2, 6, 2), ids(2, 5)
    segments = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    fast = model(x, source=source, source_segments=segments)
    for b in range(2):
        memory = slow_stack(model, model.encoder, slow_embed(model, source[b, : segments[b].sum()]), None)
        for t in range(5):
            h = slow_stack(model, model.decoder, slow_embed(model, x[b, : t + 1]), memory)
            close(fast[b, t], model.out.weight @ h[-1], 1e-4)


def slow_embed(model, row):
    places, D = torch.arange(len(row)), model.config.d_model
    x = model.embed.tokens.weight[row]
    if model.config.positions == "learned": return x + model.embed.positions.table.weight[places]
    if model.config.positions != "sinusoidal": return x
    waves = torch.tensor([[(math.sin, math.cos)[i % 2](p / 10_000 ** (i // 2 * 2 / D)) for i in range(D)] for p in places.tolist()])
    return x * D**.5 + waves


def slow_attention(module, x, memory, causal, turn):
    c, out = module.config, []
    d, share = c.size, c.n_head // c.n_kv
    for t in range(len(x)):
        heads = []
        for h in range(c.n_head):
            q = module.query(x[t])[h * d : (h + 1) * d]
            scores, values = [], []
            for s in range(len(memory)):
                if causal and s > t: continue
                k, v = (m(memory[s])[h // share * d : (h // share + 1) * d] for m in (module.key, module.value))
                scores.append((turned(q, t) @ turned(k, s) if turn else q @ k) / d**.5)
                values.append(v)
            w = torch.stack(scores).exp()
            heads.append((w / w.sum()) @ torch.stack(values))
        out.append(module.out(torch.cat(heads)))
    return torch.stack(out)


def turned(x, place):
    a, b = x.chunk(2)
    angle = place * 10_000. ** (-torch.arange(len(a)) / len(a))
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def slow_stack(model, stack, x, memory):
    turn, causal = model.config.positions == "rotary", stack is model.decoder
    for block in stack.blocks:
        branches = [(block.attention_norm, lambda h, b=block: slow_attention(b.attention, h, h, causal, turn))]
        if memory is not None: branches.append((block.cross_norm, lambda h, b=block: slow_attention(b.cross, h, memory, False, False)))
        for norm, branch in [*branches, (block.mlp_norm, block.mlp)]:
            x = x + branch(norm(x)) if model.config.norm_first else norm(x + branch(x))
    return stack.norm(x)


@pytest.mark.parametrize("norm_first", (True, False))
@torch.no_grad()
def test_blocks_are_those_of_pytorch(norm_first):
    c = TransformerConfig(V, **SIZES, norm_first=norm_first)
    for cross, theirs in ((False, nn.TransformerEncoderLayer), (True, nn.TransformerDecoderLayer)):
        torch.manual_seed(0)
        their, ours = theirs(32, 4, 128, 0., "gelu", batch_first=True, norm_first=norm_first).eval(), Block(c, cross).eval()
        pairs = [(ours.attention, their.self_attn), *([(ours.cross, their.multihead_attn)] if cross else [])]
        for mine, other in pairs:
            other.in_proj_bias.normal_()
            for i, part in enumerate((mine.query, mine.key, mine.value)):
                part.weight.copy_(other.in_proj_weight[32 * i : 32 * i + 32]), part.bias.copy_(other.in_proj_bias[32 * i : 32 * i + 32])
            mine.out.load_state_dict(other.out_proj.state_dict())
        ours.mlp.up.load_state_dict(their.linear1.state_dict()), ours.mlp.down.load_state_dict(their.linear2.state_dict())
        x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        ahead = torch.ones(5, 5).triu(1).bool()
        if cross: close(ours(x, causal=True, memory=memory), their(x, memory, tgt_mask=ahead, tgt_is_causal=False))
        else: close(ours(x), their(x))


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("kind", "variant"), CASES)
@torch.no_grad()
def test_formulas_are_counts(kind, variant):
    changes = {"source_vocab": 23} if kind == "encoder-decoder" and variant in ("gpt2", "bert") else {}
    model = make(kind, variant, **changes)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    more = {"source": ids(3, 7) % 23} if kind == "encoder-decoder" else {}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): model(ids(3, 10), **more)
    assert counter.get_total_flops() == 3 * flops(model.config, 10, source=7)


@torch.no_grad()
def test_one_more_token_costs_less_than_all():
    model = make()
    cache = SlowCache(model.config.n_layer)
    model(ids(1, 10), cache=cache)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): model(ids(1, 1), cache=cache)
    assert counter.get_total_flops() == flops(model.config, 1, 11) < flops(model.config, 11) / 10


def test_no_choice_is_forgotten():
    assert get_args(PresetName) == tuple(PRESETS)
    assert set(get_args(MLPActivation)) == {*_ACTIVATIONS, *GATED}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name, 1000)
    assert config.gated and config.norm == "rms" and config.positions == "rotary" and config.tie and not config.bias
    with torch.device("meta"): assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())
    assert preset(name, 1000, dropout=.1, n_layer=1) == replace(config, dropout=.1, n_layer=1)


def test_the_sizes_of_well_known_models():
    t = pytest.importorskip("transformers")
    llama = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "tie": False}
    bert = {"kind": "encoder", "types": 2, "norm_first": False, "embed_norm": True, "head": "bert"}
    with torch.device("meta"):
        for theirs, ours in (
            (t.GPT2LMHeadModel(t.GPT2Config()), TransformerConfig(50257, 768, 12, 12, context_length=1024)),
            (t.BertForMaskedLM(t.BertConfig()), TransformerConfig(30522, 768, 12, 12, context_length=512, **bert)),
            (t.LlamaForCausalLM(t.LlamaConfig()), TransformerConfig(32000, 4096, 32, 32, d_ff=11008, **llama)),
        ):  # fmt: skip
            assert theirs.num_parameters() == count_parameters(ours)


@pytest.mark.parametrize("norm_first", (True, False))
@pytest.mark.parametrize("today", (True, False))
@pytest.mark.parametrize("d_model", (32, 128, 512))
@torch.no_grad()
def test_the_first_loss_is_that_of_knowing_nothing(d_model, today, norm_first):
    torch.manual_seed(0)
    kind = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False} if today else {}
    model = Transformer(TransformerConfig(500, d_model, 3, 4, norm_first=norm_first, context_length=64, **kind))
    x = torch.randint(0, 500, (8, 65))
    assert abs(F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).item() - math.log(500)) < .06


def test_every_parameter_learns():
    for kind, variant in CASES:
        model = make(kind, variant).train()
        model(ids(2, 9), **given_source(model, 2), **({"types": ids(2, 9) % 2} if model.config.types else {})).square().sum().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        silent = [name for name in silent if not name.endswith("key.bias")]  # a bias of all keys moves no softmax
        assert not silent, (kind, variant, silent)


# ---------------------------------------------------------------- training


def test_all_kinds_train():
    torch.manual_seed(0)
    rows = [np.random.default_rng(i).integers(3, 20, 3 + i % 4) for i in range(32)]
    pairs = [(row, np.concatenate([[1], row[::-1], [2]])) for row in rows]
    runs = {
        "stream": ("decoder", TokenStream([i % 17 for i in range(2000)], 8, 16)),
        "packed": ("decoder", Examples([list(p) for _, p in pairs], batch_size=4, length=20, pack=True)),
        "pairs": ("encoder-decoder", Examples(pairs, batch_size=8, join=False)),
    }
    for name, (kind, batches) in runs.items():
        model = Transformer(TransformerConfig(20, 32, 1, 4, kind=kind, context_length=24, dropout=.1))
        history = Trainer(model, batches, TrainConfig(steps=40, lr=3e-3, log_every=1, device="cpu")).fit()
        losses = [row["loss"] for row in history.rows if "loss" in row]
        assert np.mean(losses[-5:]) < losses[0] - .5, name


@torch.no_grad()
def test_the_loss_of_packed_examples_is_that_of_padded_ones():
    model = make()
    texts = [ids(1, n, n)[0].tolist() for n in (5, 9, 3, 12, 7)]
    sums = []
    for batches in (Examples(texts, batch_size=2), Examples(texts, batch_size=2, length=16, pack=True), Examples(texts, batch_size=1)):
        sums.append(sum(next_token_loss(model, batch)[0].item() for batch in batches.read()))
    assert max(sums) - min(sums) < 1e-3


def test_mixed_precision_and_double():
    model = make("encoder-decoder", "llama")
    with torch.autocast("cpu", torch.bfloat16): low = model(ids(2, 9), **given_source(model, 2))
    high = model.double()(ids(2, 9), **given_source(model, 2))
    assert low.dtype == torch.bfloat16 and high.dtype == torch.float64
    assert (low - high).abs().max() < .1 * high.abs().max()


def test_dropout_acts_in_training_only():
    model = make(dropout=.5)
    assert torch.equal(model(ids(1, 9)), model(ids(1, 9)))
    model.train()
    assert not torch.equal(model(ids(1, 9)), model(ids(1, 9)))


# ---------------------------------------------------------------- float64 stays float64


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_a_double_model_computes_in_double(kind, variant):
    "Every activation of the model is float64, and gradients agree with differences as they can only if nothing was rounded to float32."
    n_kv_head = 1 if variant in ("llama", "alibi") else None
    model = make(kind, variant, loud=.4, d_model=8, n_head=2, d_head=4, d_ff=6, n_layer=1, n_kv_head=n_kv_head).double()
    narrow, hooks = [], []

    def listen(module, args, out):
        out = out if isinstance(out, tuple) else (out,)
        narrow.extend(type(module).__name__ for x in out if isinstance(x, torch.Tensor) and x.dtype != torch.float64)

    for module in model.modules(): hooks.append(module.register_forward_hook(listen))
    more = given_source(model, 2, 4)
    assert model(ids(2, 4), **more).dtype == torch.float64 and not narrow
    for hook in hooks: hook.remove()
    leaves = [p for p in model.parameters() if p.ndim > 1]
    assert max(gradient_check(lambda: model(ids(2, 4), **more).sin().sum(), leaves, samples=2)) < 1e-5


@pytest.mark.parametrize("variant", ("llama", "2017"))
@torch.no_grad()
def test_a_double_model_is_exact(variant):
    "Far out, where float32 has four digits of an angle left: waves are those of NumPy, and moving all places changes nothing."
    model = make("decoder", variant, context_length=10_000).double()
    x, places = ids(2, 6), torch.arange(6)
    if variant == "2017":
        wide = model.embed(x, places + 5000) - model.embed.tokens(x) * 32**.5
        angles = (places.numpy()[:, None] + 5000) / 10_000 ** (np.arange(0, 32, 2) / 32)
        assert np.abs(wide[0].numpy() - np.stack([np.sin(angles), np.cos(angles)], -1).reshape(6, 32)).max() < 1e-10
    else: torch.testing.assert_close(model(x, positions=places + 5000), model(x), atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------- no look at what numbers hold, token by token


class Looks(TorchFunctionMode):
    "Counts what makes Python wait for a number of a tensor."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        looks = ("__int__", "__bool__", "__float__", "__index__", "item", "tolist")
        if getattr(function, "__name__", "") in looks: self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize(("kind", "variant"), [case for case in CASES if case[0] != "encoder"])
@torch.no_grad()
def test_one_more_token_is_read_without_looking_at_it(kind, variant, padded):
    model, cache = make(kind, variant), KVCache(SIZES["n_layer"])
    more = {"memory": model.encode(ids(2, 6, 4))} if kind == "encoder-decoder" else {}
    model(ids(2, 5), cache=cache, segments=torch.tensor([[0] + [1] * 4, [1] * 5]) if padded else None, **more)
    with Looks() as looks: model(ids(2, 1), cache=cache, **more)
    assert not looks.found
    with Looks() as looks: int(torch.tensor(3))
    assert looks.found  # it does count


# ---------------------------------------------------------------- the cache's protocol


@pytest.mark.parametrize("pieces", ((1,) * 9, (4, 1, 4), (5, 4), (9,)))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("decoder", "encoder-decoder"))
@torch.no_grad()
def test_with_a_cache_as_without(kind, variant, pieces):
    model, x = make(kind, variant), ids(3, 9)
    segments = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [0] + [1] * 8])  # padded on the left, as prompts are
    there = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    more = {"memory": model.encode(ids(3, 6, 4), there)} if kind == "encoder-decoder" else {}
    for some in (None, segments):
        whole, cache, parts = model(x, segments=some, **more), SlowCache(model.config.n_layer), []
        for piece, tokens in zip(x.split(pieces, 1), (x if some is None else some).split(pieces, 1)):
            parts.append(model(piece, segments=None if some is None else tokens, cache=cache, **more))
            if len(parts) == 1: first = cache.cross[0]
        there = segments > 0 if some is not None else torch.ones_like(x, dtype=torch.bool)
        close(torch.cat(parts, 1)[there], whole[there], 1e-4)
        assert kind == "decoder" or (all(kv is not None for kv in cache.cross) and cache.cross[0] is first)  # made once, and used again


@torch.no_grad()
def test_memory_is_made_once_and_fits_other_tuples():
    model = make("encoder-decoder")
    memory = model.encode(ids(2, 6, 4))
    assert isinstance(memory, Memory) and memory.mask.all() and memory.states.shape == (2, 6, 32)
    assert torch.equal(model(ids(2, 5), memory=memory), model(ids(2, 5), source=ids(2, 6, 4)))


@torch.no_grad()
def test_hidden_and_score_are_forward():
    for kind, variant in CASES:
        model = make(kind, variant)
        h = model.hidden(ids(2, 9), **given_source(model, 2))
        assert torch.equal(model.score(h), model(ids(2, 9), **given_source(model, 2))) and h.shape == (2, 9, 32)
        close(model.score(h[:, -1]), model.score(h)[:, -1])


# ---------------------------------------------------------------- bad input

BAD_CONFIG = [
    ({"vocab_size": 0}, "vocab_size=0 must be a whole number"),
    ({"n_layer": True}, "n_layer=True must be a whole number"),
    ({"d_model": 32.}, "d_model=32.0 must be a whole number"),
    ({"context_length": None}, "context_length=None must be"),
    ({"n_head": 5}, "n_head=5 does not divide d_model=32"),
    ({"n_kv_head": 3}, "n_kv_head=3 does not divide n_head=4"),
    ({"d_head": 7, "positions": "rotary"}, "must be even"),
    ({"d_model": 33, "n_head": 3, "positions": "sinusoidal"}, "even d_model"),
    ({"kind": "decoder-encoder"}, "no kind='decoder-encoder'. Choose one of: decoder, encoder"),
    ({"norm": "batch"}, "no norm='batch'"),
    ({"activation": "swish"}, "no activation='swish'"),
    ({"positions": "absolute"}, "no positions='absolute'"),
    ({"head": "gpt"}, "no head='gpt'"),
    ({"init": "zero"}, "no init='zero'"),
    ({"dropout": 1.}, "dropout=1.0 must be at least 0 and below 1"),
    ({"norm_eps": 0}, "norm_eps=0 must be above 0"),
    ({"types": -1}, "types=-1"),
    ({"source_vocab": 9}, "source_vocab is for kind='encoder-decoder'"),
    ({"window": 0}, "window=0"),
]


@pytest.mark.parametrize(("change", "says"), BAD_CONFIG)
def test_bad_configurations(change, says):
    with pytest.raises(TransformerError) as error: TransformerConfig(**{"vocab_size": V, **SIZES, **change})
    assert says in str(error.value)


def bad_input() -> Iterator[tuple[str, object]]:
    decoder, encoder, both, bert = make(context_length=9), make("encoder"), make("encoder-decoder"), make("encoder", "bert")
    x = ids(2, 5)
    memory = both.encode(x)
    yield "The id 41 is no token: ids run from 0 to 40", lambda: decoder(x.clamp(max=0) + V)
    yield "The id -1 is no token", lambda: decoder(x.clamp(max=0) - 1)
    yield "The id 99 is no token: the source's ids", lambda: both(x, source=x * 0 + 99)
    yield "has 10 tokens, the model reads context_length=9", lambda: decoder(ids(1, 10))
    yield "has 10 tokens, the model reads context_length=9", lambda: decoder(ids(1, 10), segments=torch.ones(1, 10))
    yield "has 21 tokens", lambda: decoder(x, segments=torch.ones(2, 5), positions=torch.arange(16, 21).expand(2, 5))
    yield "For one text pass ids[None]", lambda: decoder(x[0])
    yield "hold something", lambda: decoder(x[:, :0])
    yield "whole numbers, not torch.float32", lambda: decoder(x.float())
    yield "Segments have the shape of the ids, (2, 5), not (2, 4)", lambda: decoder(x, segments=x[:, 1:])
    yield "Positions have the shape of the ids", lambda: decoder(x, positions=torch.arange(4))
    yield "This is a decoder: it takes no source", lambda: decoder(x, memory=memory)
    yield "This is a decoder: it has nothing that reads a source", lambda: decoder(x, source=x)
    yield "This is a decoder: it has nothing", lambda: decoder.encode(x)
    yield "This is an encoder: it takes no source", lambda: encoder(x, source=x)
    yield "This is an encoder: it takes no source, no memory and no cache", lambda: encoder(x, cache=SlowCache(2))
    yield "give source=, or memory=", lambda: both(x)
    yield "2 sources and 1 targets", lambda: both(x[:1], memory=memory)
    yield "do not pack pairs", lambda: both(x, source=x, segments=torch.tensor([[1, 1, 1, 2, 2]] * 2))
    yield "leave out types=", lambda: decoder(x, types=x)
    yield "The type 3 is none: they run from 0 to 1", lambda: bert(x, types=x * 0 + 3)
    yield "types have the shape", lambda: bert(x, types=x[:, 1:])
    yield "leave out positions=", lambda: decoder(x, positions=torch.arange(5), cache=SlowCache(2))
    yield "no preset='huge'", lambda: preset("huge", 9)
    yield "no field width", lambda: preset("tiny", 9, width=3)
    yield "with source=", lambda: flops(both.config, 3)

    def long():
        cache = SlowCache(2)
        for _ in range(10): decoder(x[:, :1], cache=cache)

    def long_and_padded():
        cache = SlowCache(2)
        decoder(ids(2, 8), segments=torch.tensor([[0] * 4 + [1] * 4, [1] * 8]), cache=cache)
        for _ in range(2): decoder(x[:, :1], cache=cache)

    yield "has 10 tokens, the model reads", long
    yield "has 10 tokens, the model reads", long_and_padded
    yield "The id 41 is no token: ids run from 0 to 40", lambda: decoder(x * 0 + V, cache=SlowCache(2))
    yield "whole numbers, not torch.bool", lambda: decoder(x > 0, cache=SlowCache(2))
    yield "For one text pass ids[None]", lambda: decoder(x[0], cache=SlowCache(2))


BAD_INPUT = list(bad_input())


@pytest.mark.parametrize(("says", "call"), BAD_INPUT, ids=[says[:40] for says, _ in BAD_INPUT])
def test_bad_input(says, call):
    with pytest.raises(TransformerError) as error: call()
    assert says in str(error.value)


def test_a_learned_place_has_an_error_of_its_own_on_any_path():
    with pytest.raises(ValueError, match="has no vector"): LearnedPositions(4, 8)(torch.tensor([4]))


# ---------------------------------------------------------------- configurations as values


@given(st.builds(
    TransformerConfig, vocab_size=st.integers(1, 10**6), d_model=st.just(32), n_head=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["decoder", "encoder"]), norm=st.sampled_from(["layer", "rms", "none"]),
    activation=st.sampled_from(get_args(MLPActivation)), dropout=st.floats(0, .9), d_ff=st.none() | st.integers(1, 99),
    mlp_bias=st.none() | st.booleans(), tie=st.booleans(), norm_eps=st.floats(1e-12, 1e-3),
))  # fmt: skip
@settings(deadline=None)
def test_a_configuration_goes_through_json(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_dictionary_that_is_no_configuration():
    with pytest.raises(TransformerError, match="no field colour"): TransformerConfig.from_dict({"vocab_size": 3, "colour": 1})
    with pytest.raises(TransformerError, match="needs vocab_size"): TransformerConfig.from_dict({})


def test_a_stack_is_what_a_kind_is_made_of():
    assert {kind: [name for name in ("encoder", "decoder") if isinstance(getattr(make(kind), name), Stack)] for kind in KINDS} == {
        "decoder": ["decoder"], "encoder": ["encoder"], "encoder-decoder": ["encoder", "decoder"]}  # fmt: skip
