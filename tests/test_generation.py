"""Choosing what comes next: filters equal to transformers', samplers by counting, beams equal to enumeration, text as it grows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.cache import GenerationError
from lmbook.generation import (
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
    stream,
    warp,
)
from lmbook.speculation import speculative
from lmbook.tokenization import ByteTokenizer, WordTokenizer
from tests.writers import GREEDY, Table, V, scripted, transformer

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


@pytest.mark.parametrize(("p", "kept"), [(.125, 1), (.25, 1), (.26, 2), (.5, 2), (.75, 3), (.76, 4)])
def test_a_set_that_holds_just_enough_is_enough(p, kept):
    "Sums of powers of two are exact, so that the border itself is met."
    assert int(keep_typical(torch.zeros(4), p).isfinite().sum()) == kept
    assert int(keep_top_p(torch.zeros(4), p).isfinite().sum()) == kept
    uneven = torch.tensor([.5, .25, .125, .125]).log()
    assert [int(keep_top_p(uneven, q).isfinite().sum()) for q in (.4, .5, .6, .75, .8, .875)] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("at", [0.0, 100.0, 1e4])
def test_filters_and_those_of_transformers_at_ties_and_large_scores(at):
    "What is the same, and what is not: of equals at the border `keep_typical` keeps as many as are needed, transformers all."
    from transformers.generation import logits_process as theirs

    generator, fewer = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        logits = torch.randint(-3, 4, (1, 9), generator=generator) + at  # whole numbers: many are equal, and all are exact
        p = float(torch.rand((), generator=generator).clamp(0.01, 0.99))
        assert torch.equal(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(None, logits))
        ours, other = keep_typical(logits, p)[0], theirs.TypicalLogitsWarper(p)(None, logits)[0]
        kept, equals = ours.isfinite(), other.isfinite() & ~ours.isfinite()
        assert not (kept & ~other.isfinite()).any() and set(logits[0, equals].tolist()) <= set(logits[0, kept].tolist())
        for score in set(logits[0, equals].tolist()):
            place = (logits[0] == score).nonzero()[:, 0]
            assert kept[place].tolist() == sorted(kept[place].tolist(), reverse=True)  # the lowest ids
        fewer += bool(equals.any())
    assert fewer > 10


def test_min_p_is_exact_however_large_the_scores_are():
    for at in (0.0, 1e4, -1e6, 1e7):
        logits = torch.tensor([[0.0, -2.0, -3.0]]) + at
        for p, kept in ((0.13, 2), (0.14, 1), (0.05, 2), (0.049, 3)):  # exp(-2) = .1353, exp(-3) = .0498
            assert int(keep_min_p(logits, p).isfinite().sum()) == kept, (at, p)


def test_frequency_counts_and_presence_does_not():
    logits, counts = torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
    config = SamplingConfig(frequency_penalty=0.5, presence_penalty=2.0)
    assert penalise(logits, counts > 0, counts, config).tolist() == [[0, -2.5, -3.5, 0]]


@pytest.mark.parametrize("change", [
    {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"typical_p": 0.5},
    {"top_k": 6, "top_p": 0.9, "temperature": 1.5},
])  # fmt: skip
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

# ---------------------------------------------------------------- ending, streaming


class ByteTokenizer_of:
    "V tokens: letters, and one that is half a character."

    vocab_size, bos_id, eos_id, unk_id = V, 0, None, None
    data = [b"", *[bytes([97 + i]) for i in range(V - 3)], "é".encode()[:1], "é".encode()[1:]]

    def id_to_bytes(self, id): return self.data[id]

    def encode(self, text, bos=False): return [0] * bos + [self.data.index(bytes([b])) for b in text.encode()]


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


@pytest.fixture(scope="module")
def bytes_(): return ByteTokenizer()


@given(st.text(alphabet="abécd我🙂 ", max_size=30), st.lists(st.text(alphabet="abécd我", min_size=1, max_size=3), max_size=3))
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_text_up_to_the_first_stop_string(text, stops):
    tokenizer = ByteTokenizer()
    config = SamplingConfig(max_new_tokens=200, stop=tuple(stops))
    pieces = list(stream(scripted(tokenizer, text), tokenizer, "", config))
    found = [at for s in stops if (at := text.find(s)) >= 0]
    wanted = text[: min(found)] if found else text
    # of two stop strings the one that is complete first ends the text, so a longer one that begins earlier may be cut by a shorter one
    assert "".join(pieces) == wanted or ("".join(pieces).startswith(wanted) and len(found) > 1)
    assert all(pieces) and all("\ufffd" not in piece for piece in pieces)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert not any(s in so_far for s in stops)
    assert generate_text(scripted(tokenizer, text), tokenizer, [""], config) == ["".join(pieces)]


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
    assert tuple(found[0].ids) == best[0][0]  # (a bigram has ties further down)
    assert all(every[tuple(h.ids)] == pytest.approx(h.score) for h in found)
    assert [h.score for h in found[:20]] == pytest.approx([score for _, score in best[:20]])


def test_one_beam_is_greedy_and_more_beams_find_more():
    model = transformer(8)
    assert beam_search(model, [1, 2], 1, 12)[0].ids == generate(model, [1, 2], GREEDY)[0]
    totals = [beam_search(transformer(s), [1, 2], n, 10, 0.0)[0].log_prob for s in range(6) for n in (1, 8)]
    assert sum(totals[1::2]) > sum(totals[::2])


def test_one_beam_that_is_scored_by_length_may_go_on_where_greedy_ends():
    "An end with .6 against something with .4 that then ends: the mean of the longer text is higher."
    def model(ids):
        scores = torch.full((*ids.shape, 3), -math.inf)
        scores[..., 0], scores[..., 1] = math.log(.6), math.log(.4)
        scores[ids == 1] = torch.tensor([0., -math.inf, -math.inf])
        return scores

    assert generate(model, [2], SamplingConfig(temperature=0, eos_id=0)) == [[0]]
    assert beam_search(model, [2], 1, 5, length_penalty=0, eos_id=0)[0].ids == [0]
    assert beam_search(model, [2], 1, 5, eos_id=0)[0].ids == [1, 0]


def gpt2() -> Any:
    "A model of `transformers` that has its own opinion at each place."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    theirs = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 2: p.normal_(0, 0.5)
    return theirs


@pytest.mark.parametrize("settings", [
    {"no_repeat_ngram": n, "min_new_tokens": least, "eos_id": eos} for n in (None, 1, 2, 3) for least in (0, 9) for eos in (2, (2, 5, 9))
])  # fmt: skip
def test_what_may_not_come_again_or_not_yet_is_that_of_transformers(settings):
    theirs, n = gpt2(), settings["no_repeat_ngram"]
    length = 11 if n == 1 else 20
    prompts = [[1, start, start % 7 + 3, start] for start in range(3, V, 4)]
    got = generate(lambda ids: theirs(ids), prompts, SamplingConfig(max_new_tokens=length, temperature=0, **settings))
    for prompt, new in zip(prompts, got):
        eos = settings["eos_id"] if isinstance(settings["eos_id"], int) else list(settings["eos_id"])
        want = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=length, do_sample=False,
            eos_token_id=eos, min_new_tokens=settings["min_new_tokens"], no_repeat_ngram_size=n or 0,
        )  # fmt: skip
        assert new == want[0, 4:].tolist()


def test_rows_that_end_take_their_ngrams_along():
    "The batch shrinks, and each row still knows what it has said."
    model = transformer(3)
    config = SamplingConfig(max_new_tokens=12, temperature=0, no_repeat_ngram=2, eos_id=tuple(range(0, V, 3)))
    prompts = [[1, i] for i in range(2, V)]
    together = generate(model, prompts, config)
    assert len({len(row) for row in together}) > 2 and together == [generate(model, prompt, config)[0] for prompt in prompts]


def test_beams_equal_transformers():
    theirs, same = gpt2(), 0
    for start in range(3, V):
        for penalty in (0.0, 1.0):
            want = theirs.generate(
                torch.tensor([[1, start]]), attention_mask=torch.ones(1, 2, dtype=torch.long), num_beams=3, max_new_tokens=8,
                do_sample=False, length_penalty=penalty, early_stopping="never", return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            got = beam_search(lambda ids: theirs(ids), [1, start], 3, 8, penalty, 2)[0]
            new = want.sequences[0, 2:].tolist()
            assert got.score >= float(want.sequences_scores[0]) - 1e-4
            same += got.ids == [id for id in new if id != 0][: len(got.ids)]
    assert same >= 26

# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": math.inf}, "temperature=inf"), ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"), ({"top_p": 1.1}, "top_p=1.1"),
    ({"typical_p": 0}, "typical_p=0"),
    ({"min_p": -0.1}, r"min_p=-0.1 must lie in \[0, 1\]"), ({"top_k": 0}, "top_k=0"), ({"top_k": 2.5}, "top_k=2.5"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"frequency_penalty": math.nan}, "frequency_penalty=nan"), ({"stop": ("",)}, "none of them empty"),
    ({"on_full": "wrap"}, "on_full='wrap'. Choose one of: slide, stop"),
])  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(GenerationError, match=message): SamplingConfig(**change)


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "prompt is empty"), ([[1], []], "Prompt 1 is empty"), (torch.zeros(0, dtype=torch.long), "prompt is empty"),
    ([V], f"The id {V} is no token: the prompt's ids run from 0 to {V - 1}"), ([-1], "id -1"), ([1] * 65, "65 tokens, the model reads 64"),
    ([[1], [2] * 70], "Prompt 1 has 70"), ("text", "is a text"), ([1.5], "holds 1.5"), (["a"], "holds 'a'"), ([True], "holds True"),
])  # fmt: skip
def test_bad_prompts(prompt, message):
    model = transformer()
    with pytest.raises(GenerationError, match=message): generate(model, prompt, GREEDY)
    if "Prompt 1" not in message:
        with pytest.raises(GenerationError, match=message): beam_search(model, prompt)


@pytest.mark.parametrize("change", [{}, {"top_k": 3}, {"repetition_penalty": 1.3, "presence_penalty": .1}, {"temperature": 0}])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(bytes_, change):
    "Many models have more ids than their tokenizer, to make a round number; those may be in the prompt, and nobody could read them."
    n, config = bytes_.vocab_size, SamplingConfig(**({"max_new_tokens": 20, "seed": 0} | change))

    def model(ids): return torch.zeros(*ids.shape, n + 40).index_fill(-1, torch.arange(n, n + 40), 5.)

    assert any(id >= n for row in generate(model, [[1, n + 3]] * 5, config) for id in row)
    assert all(id < n for row in generate(model, [[1, n + 3]] * 5, config, tokenizer=bytes_) for id in row)
    assert all(id < n for id in speculative(model, model, [1, n + 3], config, tokenizer=bytes_).ids)
    for _ in stream(model, bytes_, "a", config): pass


def test_bad_calls(bytes_):
    model = transformer()
    with pytest.raises(GenerationError, match="one prompt at a time"): beam_search(model, [[1], [2]])
    with pytest.raises(GenerationError, match="beams=0"): beam_search(model, [1], 0)
    with pytest.raises(GenerationError, match="pass the tokenizer"): generate(model, [1], SamplingConfig(stop="."))
    with pytest.raises(GenerationError, match="use|unmask"): generate(transformer(kind="encoder"), [1])
    with pytest.raises(GenerationError, match="give source="): generate(transformer(kind="encoder-decoder"), [1])
    with pytest.raises(GenerationError, match="leave it out"): generate(model, [1], source=[2])
    translator = transformer(kind="encoder-decoder")
    with pytest.raises(GenerationError, match="2 sources for 1 prompts"): generate(translator, [1], source=[[2], [3]])
    with pytest.raises(GenerationError, match="is no model"): generate(3, [1])
    with pytest.raises(GenerationError, match="logits"): generate(lambda ids: ids, [1])
    with pytest.raises(GenerationError, match="single text"): generate_text(model, bytes_, "once")
    with pytest.raises(GenerationError, match="Ids go to generate"): next(stream(model, bytes_, [1, 2]))
    with pytest.raises(GenerationError, match="no <bos>"): next(stream(model, WordTokenizer.train(["a"], specials=("<unk>",)), ""))
    broken = transformer()
    with torch.no_grad(): broken.out.weight.fill_(math.nan)
    with pytest.raises(GenerationError, match="scores are NaN"): generate(broken, [1], GREEDY)


def test_ids_that_the_tokenizer_lacks_are_cut_off():
    from lmbook.generation import known_to

    size = ByteTokenizer().vocab_size
    assert known_to(ByteTokenizer(), torch.zeros(2, size + 40)).shape == (2, size) and known_to(None, torch.zeros(2, 9)).shape == (2, 9)
