"""Choosing what comes next: filters equal to transformers', samplers by counting, caches equal to none, beams equal to enumeration, exact speculation, constraints equal to re."""

from __future__ import annotations

import itertools
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmbook.generation import (
    ByteConstraint,
    GenerationError,
    JsonMachine,
    KVCache,
    RegexMachine,
    SamplingConfig,
    TextStream,
    beam_search,
    draw,
    generate,
    generate_text,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise,
    regex_constraint,
    speculative,
    stream,
    unmask,
    warp,
)
from lmbook.language_models import NGram, NGramConfig
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.tokenization import BPE, ByteTokenizer, WordTokenizer
from lmbook.transformer import Transformer, TransformerConfig

V = 17
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


def transformer(seed: int = 0, **changes) -> Transformer:
    "A small random model whose opinions are strong enough to tell tokens apart."
    torch.manual_seed(seed)
    fields = {"vocab_size": V, "d_model": 32, "layers": 2, "heads": 4, "context_length": 64, "tie": False, **changes}
    model = Transformer(TransformerConfig(**fields))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.normal_(0, 0.4)
    return model.eval()


def slowly(model: nn.Module, prompt: list[int], n: int, limit: int | None = None, **given) -> list[int]:
    "Greedy without any cache: the whole text again for each token; a full context goes on from its last half."
    ids, begin = list(prompt), 0
    with torch.no_grad():
        for _ in range(n):
            if limit is not None and len(ids) - begin > limit: begin = len(ids) - limit // 2
            ids.append(int(model(torch.tensor([ids[begin:]]), **given)[0, -1].argmax()))
    return ids[len(prompt) :]


class Table(nn.Module):
    "Random scores for each last token: a bigram, as a function from ids to logits."

    def __init__(self, size: int, seed: int, spread: float = 2.0):
        super().__init__()
        self.vocab_size = size
        self.scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * spread

    def forward(self, ids: Tensor) -> Tensor: return self.scores[ids]


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize("seed", range(3))
def test_filters_are_those_of_transformers(seed):
    from transformers.generation import logits_process as theirs

    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)) * 3
    for k in (1, 5, 50, 80): torch.testing.assert_close(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(None, logits))
    for p in (0.01, 0.3, 0.9, 0.999):
        torch.testing.assert_close(keep_top_p(logits, p), theirs.TopPLogitsWarper(p)(None, logits))
        torch.testing.assert_close(keep_typical(logits, p), theirs.TypicalLogitsWarper(p)(None, logits))
        torch.testing.assert_close(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(None, logits))
    ids = torch.randint(50, (20, 8), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(20, 50, dtype=torch.bool).scatter_(1, ids, True)
    ours = penalise(logits, seen, torch.zeros(20, 50), SamplingConfig(repetition_penalty=1.3))
    torch.testing.assert_close(ours, theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits))


def test_order_of_the_filters_is_that_of_transformers():
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    settings_ = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7}
    config = GenerationConfig(do_sample=True, repetition_penalty=1.2, **settings_)
    ids = torch.randint(50, (6, 5), generator=torch.Generator().manual_seed(1))
    processors = model._get_logits_processor(config, input_ids_seq_length=5)
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2)) * 2
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, ids, True)
    own = SamplingConfig(repetition_penalty=1.2, **settings_)
    torch.testing.assert_close(warp(penalise(logits, seen, torch.zeros(6, 50), own), own).softmax(-1), processors(ids, logits).softmax(-1))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=12), st.floats(0.001, 1), st.integers(1, 15))
@settings(max_examples=200, deadline=None)
def test_filters_keep_what_they_promise(scores, p, k):
    logits = torch.tensor([scores])
    probability = logits.softmax(-1)[0]
    nucleus = keep_top_p(logits, p)[0] > -math.inf
    assert probability[nucleus].sum() >= p - 1e-5
    assert not nucleus.all() or p > 0.999 or len(scores) == 1 or probability[nucleus].sum() - probability.min() <= p + 1e-5
    assert (keep_top_k(logits, k) > -math.inf).sum() >= min(k, len(scores))
    for kept in (keep_top_p(logits, p), keep_min_p(logits, p), keep_top_k(logits, k)): assert kept.max() == logits.max()
    assert (keep_typical(logits, p) > -math.inf).any()
    assert probability[keep_typical(logits, p)[0] > -math.inf].sum() >= p - 1e-4


def test_frequency_counts_and_presence_does_not():
    logits, counts = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    config = SamplingConfig(frequency_penalty=0.5, presence_penalty=2.0)
    assert penalise(logits, counts > 0, counts, config).tolist() == [[0, -2.5, -3.5, 0]]


@pytest.mark.parametrize("change", [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"typical_p": 0.5}, {"top_k": 6, "top_p": 0.9, "temperature": 1.5}])
def test_draws_have_the_distribution(change):
    n, model = 40_000, Table(9, 5)
    config = SamplingConfig(max_new_tokens=1, seed=1, **change)
    drawn = np.bincount([new[0] for new in generate(model, [[3]] * n, config)], minlength=9)
    wanted = warp(model.scores[3][None], config).softmax(-1)[0].double().numpy()
    assert (drawn[wanted == 0] == 0).all()
    sure = wanted > 0
    chi2 = ((drawn - n * wanted)[sure] ** 2 / (n * wanted)[sure]).sum()
    assert chi2 < sure.sum() - 1 + 5 * math.sqrt(2 * sure.sum()) + 5
    if change: assert abs(wanted - model.scores[3].softmax(0).numpy()).max() > 0.02  # the plain distribution would be noticed


def test_extreme_scores_and_temperatures():
    assert warp(torch.tensor([[1e4, -1e4, 9e3]]), SamplingConfig(temperature=1e-6)).softmax(-1).tolist() == [[1, 0, 0]]
    assert warp(torch.tensor([[1.0, 2.0]]), SamplingConfig(temperature=0)).softmax(-1).tolist() == [[0, 1]]
    assert warp(torch.tensor([[1.0, 2.0]]).bfloat16(), SamplingConfig()).dtype == torch.float32
    for scores in ([math.nan, 1.0], [-math.inf, -math.inf]):
        with pytest.raises(GenerationError, match="nothing to draw"): draw(torch.tensor([scores]))


# ---------------------------------------------------------------- caches


VARIANTS = {
    "multi-head, learned": {},
    "grouped-query, rotary": {"kv_heads": 2, "positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},
    "multi-query, alibi": {"kv_heads": 1, "positions": "alibi"},
    "sinusoidal, post-norm": {"positions": "sinusoidal", "norm_first": False},
    "no positions": {"positions": "none"},
    "window, rotary": {"positions": "rotary", "window": 5},
    "window, alibi, grouped": {"positions": "alibi", "window": 3, "kv_heads": 2},
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


@pytest.mark.parametrize("changes", [{}, {"positions": "rotary", "norm": "rms", "activation": "swiglu", "kv_heads": 2, "bias": False, "tie": True}, {"positions": "none", "kv_heads": 1, "mlp_bias": False},
                                     {"d_head": 12, "activation": "geglu"}])  # fmt: skip
def test_the_short_cut_is_the_model(changes):
    from lmbook.generation import _Cached

    model = transformer(12, **changes)
    ids = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reader = _Cached(model, None, 4)
        assert reader.short is not None
        got = [reader.start(ids[:, :5].tolist())[:, None], *(reader.read(ids[:, t : t + 1]) for t in range(5, 12)), reader.read(ids[:, 12:16]), reader.read(ids[:, 16:])]
        torch.testing.assert_close(torch.cat(got, 1), model(ids)[:, 4:], atol=2e-5, rtol=1e-4)


def test_the_short_cut_is_not_taken_where_it_would_be_wrong():
    from lmbook.generation import _ShortCut

    for changes in ({"norm_first": False}, {"positions": "alibi"}, {"window": 4}, {"head": "bert"}, {"kind": "encoder"}, {"residual": False}, {"norm": "none"}, {"embed_norm": True}, {"types": 2}):
        assert not _ShortCut.fits(transformer(0, **changes)), changes
    model = transformer()
    assert _ShortCut.fits(model) and not _ShortCut.fits(transformer().double())
    called = []
    model.decoder.blocks[0].mlp.register_forward_hook(lambda *_: called.append(1))
    generate(model, [1], SamplingConfig(max_new_tokens=5))
    assert len(called) == 5

    class Scaled(nn.Linear):  # as adapters do
        def forward(self, x): return 2 * super().forward(x)

    model = transformer()
    model.decoder.blocks[1].mlp.up.__class__ = Scaled
    assert not _ShortCut.fits(model)
    assert generate(model, [1, 2], GREEDY)[0] == slowly(model, [1, 2], 12)


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
        torch.testing.assert_close(model(torch.tensor([[4]]), cache=cache), model(torch.tensor([[1, 2, 3, 4]]))[:, -1:], atol=1e-5, rtol=1e-4)
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
    lstm = RecurrentLM(RecurrentLMConfig(V, 16, 16, layers=2)).eval()
    gru = RecurrentLM(RecurrentLMConfig(V, 16, 16, cell="gru")).eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    for model in (lstm, gru, Table(V, 0)): assert generate(model, prompts, GREEDY) == [slowly(model, p, 12) for p in prompts]
    rows = [[1, 2, 3, 4, 2, 3, 5], [1, 2, 3, 4, 2, 3, 4]]
    ngram = NGram.fit(rows, V, NGramConfig(order=3))
    greedy = [1]
    for _ in range(5): greedy.append(int(ngram.next_log_probs(greedy).argmax()))
    assert generate(ngram, [1], SamplingConfig(max_new_tokens=5, temperature=0)) == [greedy[1:]]


def test_modes_and_gradients_are_left_as_they_were():
    model = transformer(7, dropout=0.2).train()
    model.decoder.eval()
    seen = []
    for _ in range(2):
        for _, text in zip(range(3), stream(model, ByteTokenizer_of(), "a", SamplingConfig(max_new_tokens=9, seed=0))):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            seen.append(text)
    assert model.training and not model.decoder.training and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    loss = model(torch.tensor([[1, 2]])).sum()
    loss.backward()


class ByteTokenizer_of:
    "V tokens: letters, and one that is half a character."

    vocab_size, bos_id, eos_id, unk_id = V, 0, None, None
    data = [b"", *[bytes([97 + i]) for i in range(V - 3)], "é".encode()[:1], "é".encode()[1:]]

    def id_to_bytes(self, id): return self.data[id]

    def encode(self, text, bos=False): return [0] * bos + [self.data.index(bytes([b])) for b in text.encode()]


# ---------------------------------------------------------------- ending, streaming


def scripted(tokenizer, text: str):
    "A model that writes a certain text, whatever came before."
    ids = tokenizer.encode(text)

    class Script:
        vocab_size = tokenizer.vocab_size

        def next_log_probs(self, context):
            out = torch.full((tokenizer.vocab_size,), -math.inf)
            out[ids[len(context) - 1] if len(context) - 1 < len(ids) else tokenizer.eos_id] = 0.0
            return out

    return Script()


@pytest.fixture(scope="module")
def bytes_(): return ByteTokenizer()


@pytest.fixture(scope="module")
def bpe(): return BPE.train(["the cat sat on the mat 我喜欢阅读书籍, 12 34 {\"a\": [1, 2]} true false null yes no maybe " * 4], vocab_size=320)


@given(st.text(alphabet="abécd我🙂 ", max_size=30), st.lists(st.text(alphabet="abécd我", min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_text_up_to_the_first_stop_string(text, stops):
    tokenizer = ByteTokenizer()
    pieces = list(stream(scripted(tokenizer, text), tokenizer, "", SamplingConfig(max_new_tokens=200, stop=tuple(stops))))
    found = [at for s in stops if (at := text.find(s)) >= 0]
    wanted = text[: min(found)] if found else text
    # of two stop strings the one that is complete first ends the text, so a longer one that begins earlier may be cut by a shorter one
    assert "".join(pieces) == wanted or ("".join(pieces).startswith(wanted) and len(found) > 1)
    assert all(pieces) and all("\ufffd" not in piece for piece in pieces)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert not any(s in so_far for s in stops)
    assert generate_text(scripted(tokenizer, text), tokenizer, [""], SamplingConfig(max_new_tokens=200, stop=tuple(stops))) == ["".join(pieces)]


def test_half_a_character_at_the_end_is_replaced(bytes_):
    model = scripted(bytes_, "我喜")
    assert list(stream(model, bytes_, "", SamplingConfig(max_new_tokens=4))) == ["我", "\ufffd"]
    words = WordTokenizer.train(["a b a"])
    out = TextStream(words)
    assert out.push(words.unk_id) == "\ufffd" and out.push(words.eos_id) == "" and out.close() == ""


def test_stop_strings_end_rows_one_by_one(bytes_):
    model, calls = scripted(bytes_, "one. two. three"), []
    config = SamplingConfig(max_new_tokens=50, stop=(". t", "hree"))
    [ids] = generate(model, [bytes_.bos_id], config, tokenizer=bytes_, on_token=lambda row, id: calls.append((row, id)))
    assert bytes_.decode(ids) == "one. t" and calls == [(0, id) for id in ids]
    assert generate_text(model, bytes_, ["", ""], config) == ["one", "one"]
    assert generate_text(model, bytes_, []) == []


def test_eos_ends_a_row_and_the_others_go_on():
    scores = torch.full((V, V), -9.0)
    scores[torch.arange(V - 1), torch.arange(1, V)] = 9.0  # each token is followed by the next one
    config = SamplingConfig(max_new_tokens=20, temperature=0, eos_id=8)
    assert generate(lambda ids: scores[ids], [[5], [1], [7]], config) == [[6, 7, 8], [2, 3, 4, 5, 6, 7, 8], [8]]


# ---------------------------------------------------------------- constraints


PATTERNS = [
    "abc", "a|bc|", "[a-c]+d?", "(ab){2,3}", "a*?b", "(?:yes|no)( maybe)?", r"\d{1,3}(\.\d\d)?", r"[^a]b", ".", "(?s).x", r"\w+ \s", "[à-ü]+", "我?[喜欢]{2}",
    "[\U0001f600-\U0001f64f]", r"[^\x00-\x7f]", r"\S\D\W", "(a|b)*abb", "x?", r"[\d_-]", "((a{2}){2}){2}", "(?a:\\w)", r"[\s]",
]  # fmt: skip
TEXTS = ["", "a", "b", "x", "ab", "abc", "bc", "abab", "ababab", "abababab", "aab", "b", "yes", "no maybe", "12.34", "1234", "12.3", "xb", "\nx", "ax", "w \t", "é", "àü", "我喜欢",
         "喜喜", "我", "🙂", "aabb", "abb", "babb", "aaaaaaaa", "aaaa", "_", "-", "5", "٣", " ", "\x1c", "-a.", "ccd", "我a-"]  # fmt: skip


def run(machine, text: str) -> bool:
    state = machine.start
    for byte in text.encode():
        if (state := machine.step(state, byte)) is None: return False
    return machine.accepts(state)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_machine_is_fullmatch(pattern):
    machine = RegexMachine(pattern)
    for text in TEXTS: assert run(machine, text) == bool(re.fullmatch(pattern, text)), text


leaves = st.one_of(st.sampled_from(["a", "b", "é", "我", ".", "[ab]", "[^a]", "[a-é]", r"\w", r"\d", ""]))
patterns = st.recursive(leaves, lambda inner: st.one_of(
    st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"), st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}"])).map(lambda p: f"(?:{p[0]}){p[1]}")), max_leaves=6)  # fmt: skip


@given(patterns, st.lists(st.text(alphabet="abé我1\n", max_size=5), min_size=5, max_size=5))
@settings(max_examples=200, deadline=None)
def test_machine_is_fullmatch_for_any_pattern(pattern, texts):
    machine = RegexMachine(pattern)
    for text in texts: assert run(machine, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", "(yes|no|maybe)", "我喜欢[阅读书籍]{1,3}", "the (cat|mat){2}", "é+!"])
def test_random_models_write_only_what_matches(pattern, bpe):
    torch.manual_seed(0)
    table = torch.randn(bpe.vocab_size, bpe.vocab_size)
    constraint = regex_constraint(pattern, bpe)
    texts = generate_text(lambda ids: table[ids], bpe, [""] * 40, SamplingConfig(max_new_tokens=60, seed=0), constraint=constraint)
    done = [text for text in texts if re.fullmatch(pattern, text)]
    assert len(done) >= 38 and len(set(done)) > 1  # "é+" may not have ended


def test_a_token_may_span_characters_and_a_character_tokens(bpe):
    constraint = regex_constraint(" the cat|我喜", bpe)
    allowed = {bpe.id_to_bytes(i) for i in constraint.allowed(constraint.start).nonzero()[:, 0].tolist()}
    assert b" the" in allowed and "我".encode()[:1] in allowed
    assert all(b" the cat".startswith(b) or "我喜".encode().startswith(b) for b in allowed)
    state = constraint.start
    for byte in "我".encode()[:2]: state = constraint.advance(state, next(i for i in range(bpe.vocab_size) if bpe.id_to_bytes(i) == bytes([byte])))
    assert not constraint.complete(state)
    with pytest.raises(GenerationError, match="not allowed"): constraint.advance(state, bpe.encode("x")[0])


def test_dead_ends_of_a_small_vocabulary_are_never_entered():
    words = WordTokenizer.train(["red green blue red"])  # "red", " green", " blue", " red"
    ids = {words.id_to_bytes(i).decode(): i for i in range(words.vocab_size)}
    constraint = regex_constraint("red( green red| blue)", words)
    after = constraint.advance(constraint.start, ids["red"])
    assert set(constraint.allowed(after).nonzero()[:, 0].tolist()) == {ids[" green"], ids[" blue"]}
    assert not constraint.allowed(constraint.advance(after, ids[" blue"]))[: words.eos_id].any()
    with pytest.raises(GenerationError, match="cannot spell"): regex_constraint("red, green", words)
    with pytest.raises(GenerationError, match="could begin"): regex_constraint("violet", words)
    trap = regex_constraint("red( green violet| blue)", words)  # " green" would lead to a word that is not there
    assert trap.allowed(trap.advance(trap.start, ids["red"])).nonzero()[:, 0].tolist() == [ids[" blue"]]


@pytest.mark.parametrize(("pattern", "message"), [
    (r"(a)\1", "reference to a group"), ("(?=a)b", "look-around"), (r"\bword", r"\^, \$ or"), ("(?>a)b", "atomic"), ("a*+b", "possessive"), ("(?i)yes", "both letters"),
    ("(?i:y)es", "both letters"), ("(", "not a regular expression"), (r"[^\s\S]", "No text matches"), ("(a{500}){500}", "more than 100,000 states"),
])  # fmt: skip
def test_patterns_that_cannot_be(pattern, message, bytes_):
    with pytest.raises(GenerationError, match=message): regex_constraint(pattern, bytes_)


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-10**6, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=6)),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=8))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_json_machine_takes_json(value):
    machine = JsonMachine(12)
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        if text.isascii() or "\x7f" not in text: assert run(machine, text)
        for cut in range(len(text)): # a part is a value of its own only if json says so
            assert run(machine, text[:cut]) == is_json(text[:cut]) or text[:cut].rstrip(" ") != text[:cut]


def is_json(text: str) -> bool:
    try: json.loads(text)
    except ValueError: return False
    return True


def test_json_from_a_random_model(bpe):
    torch.manual_seed(1)
    table = torch.randn(bpe.vocab_size, bpe.vocab_size)
    table[:, bpe.eos_id] += 3
    constraint = ByteConstraint(JsonMachine(3), bpe)
    rows = generate(lambda ids: table[ids], [[bpe.bos_id]] * 60, SamplingConfig(max_new_tokens=80, seed=3), constraint=constraint, tokenizer=bpe)
    ended = [bpe.decode(row) for row in rows if row[-1] == bpe.eos_id or len(row) < 80]
    assert len(ended) > 20
    for text in ended: json.loads(text)
    assert not run(JsonMachine(1), "[[1]]") and run(JsonMachine(2), "[[1]]")
    with pytest.raises(GenerationError, match="depth"): JsonMachine(-1)


# ---------------------------------------------------------------- beams


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
def test_many_beams_are_an_exhaustive_search(penalty):
    size, longest, eos = 4, 4, 0
    model = Table(size, 11)
    log_p = model.scores.log_softmax(-1).double()
    every = {}
    for n in range(1, longest + 1):
        for text in itertools.product(range(size), repeat=n):
            if eos in text[:-1] or (n < longest and text[-1] != eos): continue
            total = sum(float(log_p[a, b]) for a, b in zip((2, *text), text))
            every[text] = total / n**penalty
    best = sorted(every.items(), key=lambda item: -item[1])
    found = beam_search(model, [2], size**longest, longest, penalty, eos)
    assert tuple(found[0].ids) == best[0][0] and all(every[tuple(h.ids)] == pytest.approx(h.score) for h in found)  # (a bigram has ties further down)
    assert [h.score for h in found[:20]] == pytest.approx([score for _, score in best[:20]])


def test_one_beam_is_greedy_and_more_beams_find_more():
    model = transformer(8)
    assert beam_search(model, [1, 2], 1, 12)[0].ids == generate(model, [1, 2], GREEDY)[0]
    totals = [beam_search(transformer(s), [1, 2], n, 10, 0.0)[0].log_prob for s in range(6) for n in (1, 8)]
    assert sum(totals[1::2]) > sum(totals[::2])


def test_beams_equal_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 2: p.normal_(0, 0.5)
    same = 0
    for start in range(3, V):
        for penalty in (0.0, 1.0):
            want = theirs.generate(torch.tensor([[1, start]]), attention_mask=torch.ones(1, 2, dtype=torch.long), num_beams=3, max_new_tokens=8, do_sample=False, length_penalty=penalty,
                                   early_stopping="never", return_dict_in_generate=True, output_scores=True)  # fmt: skip
            got = beam_search(lambda ids: theirs(ids), [1, start], 3, 8, penalty, 2)[0]
            new = want.sequences[0, 2:].tolist()
            assert got.score >= float(want.sequences_scores[0]) - 1e-4
            same += got.ids == [id for id in new if id != 0][: len(got.ids)]
    assert same >= 26


# ---------------------------------------------------------------- speculation


@pytest.mark.parametrize("ahead", [1, 3, 6])
def test_greedy_speculation_is_greedy(ahead):
    model, draft = transformer(9), transformer(10, layers=1)
    for target, guesser in ((model, draft), (model, model), (transformer(9, context_length=16), transformer(10, context_length=16)), (model, Table(V, 1)),
                            (RecurrentLM(RecurrentLMConfig(V, 16, 16)).eval(), RecurrentLM(RecurrentLMConfig(V, 8, 8)).eval()), (transformer(9, window=4), draft)):  # fmt: skip
        config = SamplingConfig(max_new_tokens=30, temperature=0)
        out = speculative(target, guesser, [1, 2, 3], config, ahead)
        assert out.ids == generate(target, [1, 2, 3], config)[0]
        if target is guesser: assert out.accepted == out.guessed
        assert out.rounds + out.accepted == 30


@pytest.mark.parametrize("change", [{}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.2}])
def test_speculation_has_the_models_distribution(change):
    size, n = 4, 5_000
    model, draft = Table(size, 1), Table(size, 2)
    counts = {}
    for kind, write in (("alone", None), ("speculative", partial(speculative, model, draft))):
        seen = np.zeros(size**3)
        if write is None: texts = generate(model, [[0]] * n, SamplingConfig(max_new_tokens=3, seed=1, **change))
        else: texts = [write([0], SamplingConfig(max_new_tokens=3, seed=s, **change), 3).ids for s in range(n)]
        for a, b, c in texts: seen[(a * size + b) * size + c] += 1
        counts[kind] = seen
    both = counts["alone"] + counts["speculative"]
    used = both > 10
    chi2 = ((counts["alone"] - counts["speculative"])[used] ** 2 / both[used]).sum()
    assert chi2 < used.sum() + 4.5 * math.sqrt(2 * used.sum())
    drafted = np.zeros(size**3)
    for a, b, c in generate(draft, [[0]] * n, SamplingConfig(max_new_tokens=3, seed=1, **change)): drafted[(a * size + b) * size + c] += 1
    assert ((counts["alone"] - drafted) ** 2 / np.maximum(counts["alone"] + drafted, 1)).sum() > 10 * chi2  # the draft's own texts would be noticed


def test_speculation_ends_like_generate(bytes_):
    model = scripted(bytes_, "one. two")
    out = speculative(model, model, [bytes_.bos_id], SamplingConfig(max_new_tokens=50, stop=". ", temperature=0), tokenizer=bytes_)
    assert bytes_.decode(out.ids) == "one. "
    out = speculative(model, model, [bytes_.bos_id], SamplingConfig(max_new_tokens=50, temperature=0), tokenizer=bytes_)
    assert out.ids[-1] == bytes_.eos_id


# ---------------------------------------------------------------- unmasking


def test_unmask():
    M = 16
    model = transformer(11, kind="encoder")
    x = [[1, M, 3, M, M, 6], [M, 2]]
    out = unmask(model, x, M)
    assert [[a for a, b in zip(row, old) if b != M] for row, old in zip(out, x)] == [[1, 3, 6], [2]] and not any(M in row for row in out)
    assert out == [unmask(model, row, M)[0] for row in x]
    with torch.no_grad(): logits = model(torch.tensor([x[0]]))[0]
    logits[:, M] = -math.inf
    assert unmask(model, x[0], M, steps=1) == [[1, int(logits[1].argmax()), 3, int(logits[3].argmax()), int(logits[4].argmax()), 6]]
    seen = []
    unmask(model, x, M, steps=2, on_step=lambda ids: seen.append((ids == M).sum().item()))
    assert seen == [1, 0]
    first = max((float(logits[t].log_softmax(-1).max()), t) for t in (1, 3, 4))[1]
    seen = []
    unmask(model, x[0], M, on_step=lambda ids: seen.append([t for t in (1, 3, 4) if ids[0, t] != M]))
    assert seen[0] == [first] and len(seen) == 3
    assert 5 not in unmask(model, [M] * 20, M, forbid=range(3, 9), config=SamplingConfig(seed=0))[0]
    assert unmask(model, [1, 2], M) == [[1, 2]]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": math.nan}, "temperature=nan"), ({"temperature": math.inf}, "temperature=inf"), ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    ({"top_p": 1.1}, "top_p=1.1"), ({"typical_p": 0}, "typical_p=0"), ({"min_p": -0.1}, r"min_p=-0.1 must lie in \[0, 1\]"), ({"top_k": 0}, "top_k=0"), ({"top_k": 2.5}, "top_k=2.5"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"repetition_penalty": 0}, "repetition_penalty=0"), ({"frequency_penalty": math.nan}, "frequency_penalty=nan"), ({"stop": ("",)}, "none of them empty"),
    ({"on_full": "wrap"}, "on_full='wrap'"),
])  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(GenerationError, match=message): SamplingConfig(**change)


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "prompt is empty"), ([[1], []], "Prompt 1 is empty"), (torch.zeros(0, dtype=torch.long), "prompt is empty"), ([V], f"id {V}, but the model's run from 0 to {V - 1}"), ([-1], "id -1"),
    ([1] * 65, "65 tokens, the model reads 64"), ([[1], [2] * 70], "Prompt 1 has 70"), ("text", "is a text"), ([1.5], "holds 1.5"), (["a"], "holds 'a'"), ([True], "holds True"),
])  # fmt: skip
def test_bad_prompts(prompt, message):
    model = transformer()
    with pytest.raises(GenerationError, match=message): generate(model, prompt, GREEDY)
    if "Prompt 1" not in message:
        with pytest.raises(GenerationError, match=message): beam_search(model, prompt)
        with pytest.raises(GenerationError, match=message): speculative(model, model, prompt)


def test_bad_calls(bytes_, bpe):
    model = transformer()
    with pytest.raises(GenerationError, match="17 tokens, the draft 18"): speculative(model, transformer(vocab_size=18), [1])
    with pytest.raises(GenerationError, match="ahead=0"): speculative(model, model, [1], ahead=0)
    with pytest.raises(GenerationError, match="one prompt at a time"): speculative(model, model, [[1], [2]])
    with pytest.raises(GenerationError, match="one prompt at a time"): beam_search(model, [[1], [2]])
    with pytest.raises(GenerationError, match="beams=0"): beam_search(model, [1], 0)
    with pytest.raises(GenerationError, match="pass the tokenizer"): generate(model, [1], SamplingConfig(stop="."))
    with pytest.raises(GenerationError, match="use|unmask"): generate(transformer(kind="encoder"), [1])
    with pytest.raises(GenerationError, match="give source="): generate(transformer(kind="encoder-decoder"), [1])
    with pytest.raises(GenerationError, match="leave it out"): generate(model, [1], source=[2])
    with pytest.raises(GenerationError, match="2 sources for 1 prompts"): generate(transformer(kind="encoder-decoder"), [1], source=[[2], [3]])
    with pytest.raises(GenerationError, match="is no model"): generate(3, [1])
    with pytest.raises(GenerationError, match="logits"): generate(lambda ids: ids, [1])
    with pytest.raises(GenerationError, match="single text"): generate_text(model, bytes_, "once")
    with pytest.raises(GenerationError, match="Ids go to generate"): next(stream(model, bytes_, [1, 2]))
    with pytest.raises(GenerationError, match="no <bos>"): next(stream(model, WordTokenizer.train(["a"], specials=("<unk>",)), ""))
    with pytest.raises(GenerationError, match="over 320 tokens, the model has 17"): generate(model, [1], constraint=regex_constraint("a+", bpe))
    with pytest.raises(GenerationError, match="steps=0"): unmask(transformer(kind="encoder"), [1], 0, steps=0)
    with pytest.raises(GenerationError, match="left to right"): unmask(transformer(kind="encoder"), [1], 0, config=SamplingConfig(stop="a"))
    broken = transformer()
    with torch.no_grad(): broken.out.weight.fill_(math.nan)
    with pytest.raises(GenerationError, match="scores are NaN"): generate(broken, [1], GREEDY)
