"""Invariants of the Transformer, its arithmetic, its cache protocol, and files that go to other libraries and come back."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmbook.attention import LearnedPositions
from lmbook.batches import Examples, TokenStream
from lmbook.checkpoints import load_weights, save_weights
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import (
    BENDS,
    GATED,
    LAYOUTS,
    PRESETS,
    Block,
    Memory,
    Stack,
    Transformer,
    TransformerConfig,
    TransformerError,
    count_parameters,
    flops,
    load_pretrained,
    preset,
    save_pretrained,
)  # fmt: skip

V = 41
SIZES = {"d_model": 32, "layers": 2, "heads": 4, "context_length": 24}
VARIANTS = {
    "gpt2": {"activation": "gelu_tanh"},
    "llama": {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "kv_heads": 2},
    "bert": {"norm_first": False, "types": 2, "embed_norm": True, "head": "bert"},
    "2017": {"norm_first": False, "positions": "sinusoidal", "activation": "relu"},
    "alibi": {"positions": "alibi", "tie": False, "mlp_bias": True, "bias": False, "kv_heads": 1},
    "window": {"positions": "rotary", "window": 4, "d_head": 12, "d_ff": 50, "activation": "geglu"},
    "bare": {"positions": "none", "norm": "none", "activation": "tanh", "tie": False},
}
KINDS = ("decoder", "encoder", "encoder-decoder")
CASES = [(kind, name) for kind in KINDS for name in VARIANTS]


def make(kind: str = "decoder", variant: str = "llama", seed: int = 0, loud: float = .2, **changes) -> Transformer:
    "A small random model whose parts all matter: drawn as for training they would be so quiet that an error drowns."
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(V, kind=kind, **{**SIZES, **VARIANTS[variant], **changes}))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, loud) if p.ndim > 1 else p.add_(torch.randn_like(p) * .2)
    return model.eval()


def ids(B: int, T: int, seed: int = 1) -> torch.Tensor: return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def given_source(model: Transformer, B: int, S: int = 7) -> dict: return {"source": ids(B, S, 5)} if model.config.kind == "encoder-decoder" else {}


def close(a, b, tol: float = 1e-5) -> None: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


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
    "One source, one place of the target at a time, each from nothing but the tokens before it; blocks written out with loops over places and heads."
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
    d, share = c.size, c.heads // c.n_kv
    for t in range(len(x)):
        heads = []
        for h in range(c.heads):
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
    cache = SlowCache(model.config.layers)
    model(ids(1, 10), cache=cache)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): model(ids(1, 1), cache=cache)
    assert counter.get_total_flops() == flops(model.config, 1, 11) < flops(model.config, 11) / 10


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = preset(name, 1000)
    assert config.gated and config.norm == "rms" and config.positions == "rotary" and config.tie and not config.bias
    with torch.device("meta"): assert count_parameters(config) == sum(p.numel() for p in Transformer(config).parameters())
    assert preset(name, 1000, dropout=.1, layers=1) == replace(config, dropout=.1, layers=1)


def test_the_sizes_of_well_known_models():
    t = pytest.importorskip("transformers")
    llama = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "tie": False}
    with torch.device("meta"):
        for theirs, ours in (
            (t.GPT2LMHeadModel(t.GPT2Config()), TransformerConfig(50257, 768, 12, 12, context_length=1024)),
            (t.BertForMaskedLM(t.BertConfig()), TransformerConfig(30522, 768, 12, 12, kind="encoder", context_length=512, types=2, norm_first=False, embed_norm=True, head="bert")),
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
        assert not [name for name in silent if not name.endswith("key.bias")], (kind, variant, silent)  # a bias of all keys moves no softmax


# ---------------------------------------------------------------- training


def test_all_kinds_train():
    torch.manual_seed(0)
    pairs = [(row, np.concatenate([[1], row[::-1], [2]])) for row in (np.random.default_rng(i).integers(3, 20, 3 + i % 4) for i in range(32))]
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


# ---------------------------------------------------------------- the cache's protocol


class SlowCache:
    "What `Transformer.forward` asks of a cache, in a few lines: keys and values are glued on."

    def __init__(self, layers):
        self.layers, self.cross, self.length, self.there = [Layer() for _ in range(layers)], [None] * layers, 0, None

    def __getitem__(self, i): return self.layers[i]

    def extend(self, B, T, segments, device):
        self.length = 0 if self.there is None else self.there.shape[1]
        new = torch.ones(B, T, dtype=torch.bool) if segments is None else segments > 0
        self.there = new if self.there is None else torch.cat([self.there, new], 1)
        positions = (self.there.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        return (None, positions[0]) if self.there.all() else (self.there[:, None, None], positions)


class Layer:
    def __init__(self): self.kv = None

    def append(self, k, v):
        self.kv = (k, v) if self.kv is None else tuple(torch.cat(pair, 2) for pair in zip(self.kv, (k, v)))
        return self.kv


@pytest.mark.parametrize("pieces", ((1,) * 9, (4, 1, 4), (5, 4), (9,)))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ("decoder", "encoder-decoder"))
@torch.no_grad()
def test_with_a_cache_as_without(kind, variant, pieces):
    model, x = make(kind, variant), ids(3, 9)
    segments = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6, [0] + [1] * 8])  # padded on the left, as prompts are
    more = {"memory": model.encode(ids(3, 6, 4), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]))} if kind == "encoder-decoder" else {}
    for some in (None, segments):
        whole, cache, parts = model(x, segments=some, **more), SlowCache(model.config.layers), []
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
    ({"layers": True}, "layers=True must be a whole number"),
    ({"d_model": 32.}, "d_model=32.0 must be a whole number"),
    ({"context_length": None}, "context_length=None must be"),
    ({"heads": 5}, "heads=5 does not divide d_model=32"),
    ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
    ({"d_head": 7, "positions": "rotary"}, "must be even"),
    ({"d_model": 33, "heads": 3, "positions": "sinusoidal"}, "even d_model"),
    ({"kind": "decoder-encoder"}, "no kind 'decoder-encoder'. Choose one of: decoder, encoder"),
    ({"norm": "batch"}, "no norm 'batch'"),
    ({"activation": "swish"}, "no activation 'swish'"),
    ({"positions": "absolute"}, "no kind of positions"),
    ({"head": "gpt"}, "no head 'gpt'"),
    ({"init": "zero"}, "no scheme of initialisation"),
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
    yield "no preset 'huge'", lambda: preset("huge", 9)
    yield "no field width", lambda: preset("tiny", 9, width=3)
    yield "with source=", lambda: flops(both.config, 3)

    def long():
        cache = SlowCache(2)
        for _ in range(10): decoder(x[:, :1], cache=cache)

    yield "has 10 tokens, the model reads", long


BAD_INPUT = list(bad_input())


@pytest.mark.parametrize(("says", "call"), BAD_INPUT, ids=[says[:40] for says, _ in BAD_INPUT])
def test_bad_input(says, call):
    with pytest.raises(TransformerError) as error: call()
    assert says in str(error.value)


def test_a_learned_place_has_an_error_of_its_own_on_any_path():
    with pytest.raises(ValueError, match="has no vector"): LearnedPositions(4, 8)(torch.tensor([4]))


# ---------------------------------------------------------------- configurations as values


@given(st.builds(
    TransformerConfig, vocab_size=st.integers(1, 10**6), d_model=st.just(32), heads=st.sampled_from([1, 2, 4]), kind=st.sampled_from(["decoder", "encoder"]),
    norm=st.sampled_from(["layer", "rms", "none"]), activation=st.sampled_from([*BENDS, *GATED]), dropout=st.floats(0, .9), d_ff=st.none() | st.integers(1, 99),
    mlp_bias=st.none() | st.booleans(), tie=st.booleans(), norm_eps=st.floats(1e-12, 1e-3),
))  # fmt: skip
@settings(deadline=None)
def test_a_configuration_goes_through_json(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_dictionary_that_is_no_configuration():
    with pytest.raises(TransformerError, match="no field colour"): TransformerConfig.from_dict({"vocab_size": 3, "colour": 1})
    with pytest.raises(TransformerError, match="needs vocab_size"): TransformerConfig.from_dict({})


# ---------------------------------------------------------------- files of our own


@pytest.mark.parametrize(("kind", "variant"), CASES)
@torch.no_grad()
def test_own_files_go_out_and_in(kind, variant, tmp_path):
    model = make(kind, variant)
    save_pretrained(model, tmp_path / "new" / "folder")
    again = load_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training and sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(again(ids(2, 9), **given_source(model, 2)), model(ids(2, 9), **given_source(model, 2)))
    assert (again.out.weight is again.embed.tokens.weight) == model.config.tie and all(p.requires_grad for p in again.parameters())
    with torch.enable_grad(): again.train()(ids(2, 9), **given_source(model, 2)).sum().backward()
    again.load_state_dict(model.state_dict())


def test_weights_of_a_checkpoint_are_the_same_file(tmp_path):
    model, other = make(), make(seed=9)
    save_pretrained(model, tmp_path)
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other(ids(1, 5)), model(ids(1, 5)))
    save_weights(make(seed=3), tmp_path / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 5)), make(seed=3)(ids(1, 5)))


def test_reading_draws_no_random_numbers_and_saving_over_what_was_read_works(tmp_path):
    save_pretrained(make(variant="alibi"), tmp_path)
    before = torch.random.get_rng_state()
    model = load_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad(): model.out.weight.mul_(2)
    save_pretrained(model, tmp_path)
    assert torch.equal(load_pretrained(tmp_path).out.weight, model.out.weight)


def test_a_failure_leaves_what_was_there(tmp_path):
    save_pretrained(make(), tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(OSError): save_pretrained(make(seed=2), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "other").mkdir()
    with pytest.raises(TransformerError): save_pretrained(make("encoder-decoder"), tmp_path / "other", "gpt2")
    assert not list((tmp_path / "other").iterdir())


def test_a_matrix_that_is_no_longer_tied_is_not_lost(tmp_path):
    model = make()
    model.out.weight = nn.Parameter(model.out.weight.detach() * 2)
    with pytest.raises(TransformerError, match="two matrices"): save_pretrained(model, tmp_path / "x")
    model.config = replace(model.config, tie=False)
    save_pretrained(model, tmp_path / "x", "llama")
    assert torch.equal(load_pretrained(tmp_path / "x")(ids(1, 5)), model(ids(1, 5)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_saved_as_itself(tmp_path):
    model = make()
    save_pretrained(torch.compile(model, backend="eager"), tmp_path)  # never called, so nothing is compiled
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 5)), model(ids(1, 5)))


def test_precision_of_files(tmp_path):
    model = make().bfloat16()
    save_pretrained(model, tmp_path, "llama")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    wide, low = load_pretrained(tmp_path), load_pretrained(tmp_path, torch.bfloat16)
    assert wide.out.weight.dtype == torch.float32 and low.out.weight.dtype == torch.bfloat16 and torch.equal(wide.out.weight, model.out.weight.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards(layout, tmp_path):
    model = make("encoder" if layout == "bert" else "decoder", "llama" if layout == "lmbook" else layout)
    save_pretrained(model, tmp_path, layout)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for part, some in shards.items(): save_file({name: tensors[name] for name in some}, tmp_path / part)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: part for part, some in shards.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_pretrained(tmp_path)(ids(1, 9)), model(ids(1, 9)))
    save_file({}, tmp_path / "model-2-of-2.safetensors")
    with pytest.raises(TransformerError, match="Do they belong together"): load_pretrained(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(TransformerError, match="Fetch it, too"): load_pretrained(tmp_path)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TransformerError, match="no weight_map"): load_pretrained(tmp_path)


def edit(folder, **changes) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v != "gone"}))


def broken(folder, tensors) -> dict[str, object]:
    weights = folder / "model.safetensors"
    name = "model.layers.1.self_attn.k_proj.weight"
    return {
        "has no config.json": lambda: (folder / "config.json").unlink(),
        "cannot be read as JSON": lambda: (folder / "config.json").write_text("{"),
        "cannot be read as JSON: 'utf-8'": lambda: (folder / "config.json").write_bytes(b"\xff\xfe"),
        "holds list, not an object": lambda: (folder / "config.json").write_text("[]"),
        "of type 'mamba'. Known are: lmbook, gpt2, bert, llama": lambda: edit(folder, model_type="mamba"),
        "of type None": lambda: edit(folder, model_type="gone"),
        "has no hidden_size, which a model of type 'llama' needs": lambda: edit(folder, hidden_size="gone"),
        "heads=5 does not divide": lambda: edit(folder, num_attention_heads=5, num_key_value_heads=5, head_dim=None),
        "must be a whole number": lambda: edit(folder, hidden_size="wide"),
        "a field of the wrong type": lambda: edit(folder, attention_dropout="much"),
        "a field of the wrong type: unsupported operand": lambda: edit(folder, rope_scaling="linear"),
        "a field of the wrong type: could not convert": lambda: edit(folder, rope_parameters={"rope_theta": "far"}),
        "is torn, or no safetensors file": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "torn, or no safetensors": lambda: weights.write_bytes(b"nothing"),
        "has no model.safetensors": weights.unlink,
        "in pytorch_model.bin, a pickle": lambda: (weights.unlink(), (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")),
        f"of another shape: {name} (16, 31), by config.json (16, 32)": lambda: save_file({**tensors, name: torch.zeros(16, 31)}, weights),
        f"missing: {name}": lambda: save_file({k: v for k, v in tensors.items() if k != name}, weights),
        "not of this model: model.layers.0.self_attn.q_proj.bias": lambda: save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, weights),
        "and 5 more": lambda: edit(folder, num_hidden_layers=3),
        "is not the matrix of the word vectors": lambda: save_file({**tensors, "lm_head.weight": torch.zeros(V, 32)}, weights),
        "scales rotary positions by 'linear'": lambda: edit(folder, rope_scaling={"type": "linear", "factor": 2.}),
        "scales rotary positions by 'llama3'": lambda: edit(folder, rope_parameters={"rope_type": "llama3", "factor": 8., "rope_theta": 1e4}),
        "part of each head only": lambda: edit(folder, partial_rotary_factor=.5),
        "pretraining_tp=2": lambda: edit(folder, pretraining_tp=2),
        "the gate 'relu'": lambda: edit(folder, hidden_act="relu"),
        "the activation 'quick_gelu'": lambda: edit(folder, hidden_act="quick_gelu"),
    }


@pytest.mark.parametrize("says", broken(Path("x"), {}))
def test_broken_folders(says, tmp_path):
    save_pretrained(make(), tmp_path, "llama")
    broken(tmp_path, load_file(tmp_path / "model.safetensors"))[says]()
    with pytest.raises(TransformerError) as error: load_pretrained(tmp_path)
    assert says in str(error.value)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(TransformerError, match="no folder"): load_pretrained(tmp_path / "x")
    with pytest.raises(TransformerError, match="no layout 'mistral'"): save_pretrained(make(), tmp_path, "mistral")


CANNOT = [
    ("gpt2", {"kind": "encoder-decoder"}, "kind="), ("gpt2", {"norm": "rms"}, "norm="), ("gpt2", {"activation": "swiglu", "d_ff": 40}, "activation="), ("gpt2", {"norm_first": False}, "norm_first="), ("gpt2", {"positions": "rotary"}, "positions="),
    ("gpt2", {"kv_heads": 2}, "kv_heads="), ("gpt2", {"d_head": 4}, "d_head="), ("gpt2", {"bias": False}, "bias="), ("gpt2", {"mlp_bias": False}, "mlp_bias="), ("gpt2", {"window": 3}, "window="),
    ("gpt2", {"types": 1}, "types="), ("gpt2", {"embed_norm": True}, "embed_norm="), ("gpt2", {"head": "bert"}, "head="), ("gpt2", {"residual": False}, "residual="),
    ("bert", {"kind": "decoder"}, "kind="), ("bert", {"norm_first": True}, "norm_first="), ("bert", {"types": 0}, "types="), ("bert", {"head": "linear"}, "head="),
    ("bert", {"embed_norm": False}, "embed_norm="), ("bert", {"positions": "alibi"}, "positions="), ("llama", {"positions": "learned"}, "positions="),
    ("llama", {"activation": "gelu"}, "activation="), ("llama", {"norm": "layer"}, "norm="), ("llama", {"kind": "encoder"}, "kind="), ("llama", {"window": 5}, "window="),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "field"), CANNOT)
def test_what_a_layout_cannot_hold(layout, change, field, tmp_path):
    model = make(**{"kind": "encoder" if layout == "bert" else "decoder", "variant": layout, **change})
    with pytest.raises(TransformerError, match=f"The layout '{layout}' cannot hold {field}"): save_pretrained(model, tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_every_field_is_kept_or_refused(tmp_path):
    "No field of the configuration is dropped on the way in silence: change each, and it comes back or is named."
    changes = {
        "vocab_size": 50, "d_model": 64, "layers": 3, "heads": 2, "kv_heads": 1, "d_head": 4, "d_ff": 40, "context_length": 30, "kind": "encoder-decoder", "norm": "none", "norm_first": False,
        "activation": "geglu_tanh", "positions": "none", "rotary_base": 500., "window": 4, "bias": True, "mlp_bias": True, "tie": False, "dropout": .25, "norm_eps": 1e-3, "source_vocab": 9,
        "types": 3, "embed_norm": True, "head": "bert", "residual": False, "init": "xavier",
    }  # fmt: skip
    assert set(changes) == {f.name for f in fields(TransformerConfig)}
    kept = set()
    for name, value in changes.items():
        more = {"kind": "encoder-decoder"} if name == "source_vocab" else {}
        model = Transformer(TransformerConfig(**{"vocab_size": V, **SIZES, **VARIANTS["llama"], **more, name: value}))
        try: save_pretrained(model, tmp_path / name, "llama")
        except TransformerError as error: assert name in str(error) or more; continue
        if getattr(load_pretrained(tmp_path / name).config, name) == value: kept.add(name)
        else: assert name == "init", name  # how weights were drawn is past
    assert kept == {"vocab_size", "d_model", "layers", "heads", "kv_heads", "d_head", "d_ff", "context_length", "activation", "rotary_base", "bias", "mlp_bias", "tie", "dropout", "norm_eps"}


# ---------------------------------------------------------------- files of others


def theirs(name: str, seed: int = 0, **changes):
    "A small random model of `transformers`."
    t = pytest.importorskip("transformers")
    kinds = {"gpt2": (t.GPT2Config, t.GPT2LMHeadModel), "bert": (t.BertConfig, t.BertForMaskedLM), "llama": (t.LlamaConfig, t.LlamaForCausalLM)}
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": None, "eos_token_id": None},
        "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24},
        "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 24,
                  "bos_token_id": None, "eos_token_id": None},
    }[name]  # fmt: skip
    config, model = kinds[name]
    torch.manual_seed(seed)
    made = model(config(vocab_size=V, **{**sizes, **changes}))
    with torch.no_grad():
        for p in made.parameters(): p.normal_(0, .2) if p.ndim > 1 else p.add_(torch.randn_like(p) * .2)
    made.tie_weights()
    return made.eval()


OTHERS = [
    ("gpt2", {}), ("gpt2", {"n_inner": 40, "activation_function": "relu", "n_head": 2, "layer_norm_epsilon": 1e-3}), ("gpt2", {"tie_word_embeddings": False, "n_layer": 3, "activation_function": "gelu"}),
    ("bert", {}), ("bert", {"type_vocab_size": 3, "hidden_act": "relu", "num_hidden_layers": 1, "layer_norm_eps": 1e-3}), ("bert", {"hidden_act": "gelu_new", "num_attention_heads": 2}),
    ("llama", {}), ("llama", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}), ("llama", {"num_key_value_heads": 1, "mlp_bias": True, "head_dim": 12}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.}, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
]  # fmt: skip
OTHER_NAMES = [f"{name} {' '.join(change)}".strip() for name, change in OTHERS]


@pytest.mark.parametrize(("name", "change"), OTHERS, ids=OTHER_NAMES)
@pytest.mark.parametrize("seed", (0, 1))
@torch.no_grad()
def test_parity_with_transformers(name, change, seed, tmp_path):
    other = theirs(name, seed, **change)
    other.save_pretrained(tmp_path / "a")
    model = load_pretrained(tmp_path / "a")
    x, there = ids(3, 9, seed), torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 8 + [0]])
    close(model(x), other(x).logits, 1e-4)
    close(model(x, segments=there)[there > 0], other(x, attention_mask=there).logits[there > 0], 1e-4)
    if name == "bert": close(model(x, types=x % 2), other(x, token_type_ids=x % 2).logits, 1e-4)
    save_pretrained(model, tmp_path / "b", name)  # and back
    back = type(other).from_pretrained(tmp_path / "b").eval()
    close(back(x).logits, other(x).logits, 1e-4)
    before, after = other.state_dict(), back.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(load_pretrained(tmp_path / "b")(x), model(x))
    save_pretrained(model, tmp_path / "c")  # and through our own
    assert torch.equal(load_pretrained(tmp_path / "c")(x), model(x))


@pytest.mark.parametrize(("name", "change"), [o for o in OTHERS if o[0] != "bert"], ids=[n for n in OTHER_NAMES if not n.startswith("bert")])
@torch.no_grad()
def test_the_same_text_is_written(name, change, tmp_path):
    other = theirs(name, **change)
    other.save_pretrained(tmp_path)
    model, start = load_pretrained(tmp_path), ids(2, 4)
    wanted = other.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=20, do_sample=False, pad_token_id=0)
    plain, x, cache = start, start, SlowCache(model.config.layers)
    while plain.shape[1] < 24:
        plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], 1)
        x = torch.cat([x, model(x if x.shape[1] == 4 else x[:, -1:], cache=cache)[:, -1:].argmax(-1)], 1)
    assert plain.tolist() == x.tolist() == wanted.tolist() and len(set(wanted[0].tolist())) > 3


@pytest.mark.parametrize("name", ("gpt2", "bert", "llama"))
@torch.no_grad()
def test_our_models_are_theirs(name, tmp_path):
    "The other way: made here, read there."
    t = pytest.importorskip("transformers")
    model = make("encoder" if name == "bert" else "decoder", name)
    save_pretrained(model, tmp_path, name)
    auto = t.AutoModelForMaskedLM if name == "bert" else t.AutoModelForCausalLM
    other, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(other.eval()(ids(2, 9)).logits, model(ids(2, 9)), 1e-4)
    if name == "llama":  # older readers look in one place for the base of the rotation, newer ones in another
        described = json.loads((tmp_path / "config.json").read_text())
        assert described["rope_theta"] == described["rope_parameters"]["rope_theta"] == model.config.rotary_base


@torch.no_grad()
def test_old_files(tmp_path):
    "What lies on people's disks: without prefixes, with buffers, with gamma and beta, with the base of the rotation in the old place."
    for name, rename, more, config in (
        ("gpt2", lambda k: k.removeprefix("transformer."), {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "h.1.attn.masked_bias": torch.tensor(-1e4)}, {}),
        ("bert", lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
         {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2), "bert.embeddings.position_ids": torch.arange(24)[None]}, {}),
        ("llama", lambda k: k, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {"rope_parameters": "gone", "rope_theta": 77., "head_dim": "gone"}),
    ):  # fmt: skip
        model = make("encoder" if name == "bert" else "decoder", name, **({"rotary_base": 77.} if name == "llama" else {}))
        save_pretrained(model, tmp_path / name, name)
        tensors = {rename(k): v for k, v in load_file(tmp_path / name / "model.safetensors").items()}
        save_file({**tensors, **more}, tmp_path / name / "model.safetensors")
        edit(tmp_path / name, **config)
        assert torch.equal(load_pretrained(tmp_path / name)(ids(2, 9)), model(ids(2, 9))), name
        tied = {"gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight", "llama": "lm_head.weight"}[name]  # written once more, as some do
        save_file({**tensors, tied: model.out.weight.detach().clone()}, tmp_path / name / "model.safetensors")
        assert torch.equal(load_pretrained(tmp_path / name)(ids(2, 9)), model(ids(2, 9))), name


@pytest.mark.parametrize(("name", "change"), [("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("gpt2", {"scale_attn_weights": False}), ("bert", {"is_decoder": True}),
                                              ("bert", {"position_embedding_type": "relative_key"})])  # fmt: skip
def test_what_cannot_be_read_is_named(name, change, tmp_path):
    save_pretrained(make("encoder" if name == "bert" else "decoder", name), tmp_path, name)
    edit(tmp_path, **change)
    with pytest.raises(TransformerError, match=f"config.json says {next(iter(change))}="): load_pretrained(tmp_path)


def test_reading_works_without_transformers(tmp_path):
    save_pretrained(make("decoder", "gpt2"), tmp_path, "gpt2")
    code = ("import sys; sys.modules['transformers'] = None; from lmbook.transformer import load_pretrained, save_pretrained; "
            f"m = load_pretrained({str(tmp_path)!r}); save_pretrained(m, {str(tmp_path)!r}, 'gpt2')")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0


def test_a_stack_is_what_a_kind_is_made_of():
    assert {kind: [name for name in ("encoder", "decoder") if isinstance(getattr(make(kind), name), Stack)] for kind in KINDS} == {
        "decoder": ["decoder"], "encoder": ["encoder"], "encoder-decoder": ["encoder", "decoder"]}  # fmt: skip
