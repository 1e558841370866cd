"""Guess and check: the model's own text and its own distribution, whatever the draft. And filling in."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from lmbook.cache import GenerationError
from lmbook.generation import SamplingConfig, generate
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.speculation import speculative, unmask
from lmbook.tokenization import ByteTokenizer
from tests.writers import Table, V, scripted, transformer


@pytest.mark.parametrize("ahead", [1, 3, 6])
def test_greedy_speculation_is_greedy(ahead):
    model, draft = transformer(9), transformer(10, n_layer=1)
    short = transformer(9, context_length=16), transformer(10, context_length=16)
    recurrent = tuple(RecurrentLM(RecurrentLMConfig(V, d, d)).eval() for d in (16, 8))
    for target, guesser in ((model, draft), (model, model), short, (model, Table(V, 1)), recurrent, (transformer(9, window=4), draft)):
        config = SamplingConfig(max_new_tokens=30, temperature=0)
        out = speculative(target, guesser, [1, 2, 3], config, ahead)
        assert out.ids == generate(target, [1, 2, 3], config)[0]
        if target is guesser: assert out.accepted == out.guessed
        assert out.rounds + out.accepted == 30


@pytest.mark.parametrize("limits", [(32, 4), (32, 1), (16, 5), (8, 8), (5, 16)])
@pytest.mark.parametrize("on_full", ["slide", "stop"])
def test_a_draft_may_read_less_than_the_model(limits, on_full):
    "It alone begins anew where its context is full; the text is that of the model."
    model, draft = (transformer(seed, context_length=limit) for seed, limit in zip((9, 10), limits))
    for length in (1, 4, 6, limits[0]):
        prompt = [(7 * i + 3) % V for i in range(min(length, limits[0]))]
        for ahead in (1, 3, 6):
            config = SamplingConfig(max_new_tokens=45, temperature=0, on_full=on_full)
            assert speculative(model, draft, prompt, config, ahead).ids == generate(model, prompt, config)[0]


@pytest.mark.parametrize("change", [
    {}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.8, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
])  # fmt: skip
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
    apart = ((counts["alone"] - drafted) ** 2 / np.maximum(counts["alone"] + drafted, 1)).sum()
    assert apart > 10 * chi2  # the draft's own texts would be noticed


@pytest.fixture(scope="module")
def bytes_(): return ByteTokenizer()


def test_speculation_ends_like_generate(bytes_):
    model = scripted(bytes_, "one. two")
    out = speculative(model, model, [bytes_.bos_id], SamplingConfig(max_new_tokens=50, stop=". ", temperature=0), tokenizer=bytes_)
    assert bytes_.decode(out.ids) == "one. "
    out = speculative(model, model, [bytes_.bos_id], SamplingConfig(max_new_tokens=50, temperature=0), tokenizer=bytes_)
    assert out.ids[-1] == bytes_.eos_id


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


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "prompt is empty"), ([V], f"The id {V} is no token: the prompt's ids run from 0 to {V - 1}"),
    ([1] * 65, "65 tokens, the model reads 64"),
    ("text", "is a text"), ([1.5], "holds 1.5"), (["a"], "holds 'a'"), ([True], "holds True"),
])  # fmt: skip
def test_bad_prompts(prompt, message):
    model = transformer()
    with pytest.raises(GenerationError, match=message): speculative(model, model, prompt)


def test_bad_calls():
    model = transformer()
    with pytest.raises(GenerationError, match="17 tokens, the draft 18"): speculative(model, transformer(vocab_size=18), [1])
    with pytest.raises(GenerationError, match="ahead=0"): speculative(model, model, [1], ahead=0)
    with pytest.raises(GenerationError, match="one prompt at a time"): speculative(model, model, [[1], [2]])
    with pytest.raises(GenerationError, match="steps=0"): unmask(transformer(kind="encoder"), [1], 0, steps=0)
    with pytest.raises(GenerationError, match="left to right"): unmask(transformer(kind="encoder"), [1], 0, config=SamplingConfig(stop="a"))


def test_a_draft_whose_context_is_full_begins_anew_at_once():
    "A round without a guess costs a step of the large model. Planted: a draft that waits until three tokens are too many."
    config = SamplingConfig(max_new_tokens=50, seed=0)
    for limit in (6, 8):
        got = speculative(transformer(9), transformer(10, context_length=limit), [1, 2, 3], config, ahead=1)
        assert got.guessed >= got.rounds - 1  # before the very last token there is nothing to guess
