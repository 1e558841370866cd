"""Layers of word vectors: the rows of a model's words, what stands for unknown ones, and what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lmbook import vectors as module
from lmbook.tokenization import BPE, WordTokenizer
from lmbook.vectors import Coverage, copy_vectors, embedding_layer, embedding_matrix
from lmbook.word_vectors import VectorsError, WordVectors

TOY = WordVectors(["the", "tea", "cup", "paris"], [[1, 1, 1], [1, 2, 3], [4, 5, 6], [7, 8, 10]])


def test_rows_are_the_vectors_in_the_order_of_the_model():
    layer, coverage = embedding_layer(TOY, ["cup", "Tea", "<pad>", "zebra", "the"], pad_id=2)
    assert layer.weight[[0, 1, 4]].tolist() == [[4, 5, 6], [1, 2, 3], [1, 1, 1]] and not layer.weight[2].any()
    assert (coverage.found, coverage.lowered, coverage.missing, coverage.special) == (2, 1, ("zebra",), 1) and coverage.share == .75
    assert (
        layer.padding_idx == 2
        and layer.weight.requires_grad
        and "3 of 4 words, 1 in lower case; missing: 'zebra'; 1 special" in repr(coverage)
    )
    assert not embedding_layer(TOY, ["cup"], freeze=True)[0].weight.requires_grad
    assert embedding_layer(TOY, {"cup": 3, "tea": 1})[0].weight[[3, 1]].tolist() == [[4, 5, 6], [1, 2, 3]]


def test_the_vectors_are_copied_and_not_shared():
    layer, _ = embedding_layer(TOY, TOY.words)
    with torch.no_grad(): layer.weight += 1
    assert TOY["the"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_a_tokenizer_finds_its_words_behind_its_spaces(kind):
    texts = ["the tea the cup the tea in Paris the tea"] * 20
    tokenizer = WordTokenizer.train(texts) if kind == "words" else BPE.train(texts, 276)
    layer, coverage = embedding_layer(TOY, tokenizer)
    token = tokenizer.encode("the tea")[1]
    assert layer.weight[token].tolist() == [1, 2, 3] and layer.num_embeddings == tokenizer.vocab_size
    assert coverage.special == len(tokenizer.specials) and coverage.words == tokenizer.vocab_size - len(tokenizer.specials)
    if tokenizer.pad_id is not None: assert layer.padding_idx == tokenizer.pad_id and not layer.weight[tokenizer.pad_id].any()


def test_unknown_words():
    rng = np.random.default_rng(0)
    many = WordVectors([f"w{i}" for i in range(2000)], rng.normal(size=(2000, 8)) * np.arange(1, 9) + 5)
    words = [f"w{i}" for i in range(2000)] + [f"x{i}" for i in range(2000)]
    matrix, coverage = embedding_matrix(many, words, seed=1)
    known, drawn = matrix[:2000], matrix[2000:]
    assert len(coverage.missing) == 2000
    torch.testing.assert_close(drawn.std(0), known.std(0), rtol=.08, atol=0)
    torch.testing.assert_close(drawn.mean(0), known.mean(0), rtol=0, atol=.6)
    assert torch.equal(embedding_matrix(many, words, seed=1)[0], matrix) and not torch.equal(
        embedding_matrix(many, words, seed=2)[0][2000:], drawn
    )
    assert (
        torch.allclose(embedding_matrix(many, words, unknown="mean")[0][2000], known.mean(0))
        and not embedding_matrix(many, words, unknown="zero")[0][2000:].any()
    )
    assert embedding_matrix(TOY, ["tea", "x", "yy"], unknown=lambda lost: [[len(w)] * 3 for w in lost])[0].tolist() == [
        [1, 2, 3],
        [1, 1, 1],
        [2, 2, 2],
    ]


def test_scale():
    matrix, _ = embedding_matrix(TOY, [*TOY.words, "zebra"], scale=2.)
    assert abs(matrix[:4].square().mean().sqrt() - 2) < 1e-5 and torch.allclose(matrix[1] / matrix[1, 0], torch.tensor([1., 2, 3]))


def test_copy_into_a_layer_that_exists():
    layer = nn.Embedding(6, 3)
    before = layer.weight.detach().clone()
    assert copy_vectors(layer, TOY, ["cup", "tea", "zebra"], unknown="zero") == Coverage(2, 0, ("zebra",))
    assert (
        layer.weight[:3].tolist() == [[4, 5, 6], [1, 2, 3], [0, 0, 0]]
        and torch.equal(layer.weight[3:], before[3:])
        and layer.weight.requires_grad
    )
    half = nn.Embedding(3, 3, dtype=torch.bfloat16)
    copy_vectors(half, TOY, ["cup", "tea", "the"])
    assert half.weight.dtype == torch.bfloat16 and half.weight[0].tolist() == [4, 5, 6]


def test_a_copy_changes_no_row_that_stands_for_no_word():
    "Rows without a word, special tokens and padding, wherever they are: with each way to make unknown ones."
    tokenizer = WordTokenizer.train(["the tea", "zebra"])
    some_rows: list = [{"tea": 3}, {"tea": 3, "zebra": 1}, [None, "tea", None, "zebra"], tokenizer]
    for words in some_rows:
        for unknown in ("normal", "mean", "zero", lambda lost: np.zeros((len(lost), 3))):
            for padding in (None, 2, 8):
                layer = nn.Embedding(9, 3, padding_idx=padding)
                with torch.no_grad(): layer.weight.copy_(torch.randn(9, 3))
                before = layer.weight.detach().clone()
                coverage = copy_vectors(layer, TOY, words, unknown=unknown)
                names = module._names(words)
                mine = {i for i, name in enumerate(names) if name is not None and i != padding}
                changed = {i for i in range(9) if not torch.equal(layer.weight[i], before[i])}
                assert changed == mine and coverage.words == len(mine)
                assert any(layer.weight[i].tolist() == [1, 2, 3] for i in mine)


@pytest.mark.parametrize(("run", "says"), [
    (lambda: embedding_layer(TOY, {"tea": 1, "cup": 1}), "'tea' and 'cup' have the same row, 1"),
    (lambda: embedding_layer(TOY, {"tea": 1.5}), "has the row 1.5"),
    (lambda: copy_vectors(nn.Embedding(4, 7), TOY, TOY.words), "3 numbers and the model expects 7"),
    (lambda: embedding_layer(TOY, TOY.words, dim=7), "3 numbers and the model expects 7"),
    (lambda: copy_vectors(nn.Embedding(3, 3), TOY, TOY.words), "3 rows for 4 words"),
    (lambda: embedding_layer(TOY, ["zebra", "lion"]), "None of 2 words"),
    (lambda: embedding_layer(TOY, []), "None of 0 words"),
    (lambda: embedding_layer(TOY, ["tea"], unknown="random"), "'normal', 'mean', 'zero'"),
    (lambda: embedding_layer(TOY, ["tea"], pad_id=1), "pad_id=1"),
    (lambda: embedding_layer(TOY, {"tea": -1}), "counted from 0"),
    (lambda: embedding_layer(TOY, ["tea", "x"], unknown=lambda lost: np.ones((1, 2))), "gave (1, 2) for 1 words of 3"),
])  # fmt: skip
def test_what_does_not_fit_is_said(run, says):
    with pytest.raises(VectorsError) as caught: run()
    assert says in str(caught.value)


def test_a_frozen_layer_does_not_learn_and_the_other_moves_only_what_it_sees():
    for freeze in (True, False):
        layer, _ = embedding_layer(TOY, TOY.words, freeze=freeze)
        net = nn.Sequential(layer, nn.Flatten(), nn.Linear(6, 1))
        before, optimizer = layer.weight.detach().clone(), torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=.1)
        net(torch.tensor([[0, 1]])).sum().backward()
        optimizer.step()
        moved = (layer.weight.detach() != before).any(1).tolist()
        assert moved == ([False] * 4 if freeze else [True, True, False, False])


def test_importing_is_light_and_needs_the_core_only():
    heavy = ("gensim", "datasets", "pandas", "pyarrow", "scipy", "jieba")
    code = f"import sys, json, lmbook.vectors; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    env = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout) == []
