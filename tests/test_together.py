"""Chapters in one another's company: from a text to a trained and evaluated model, through what the chapters export and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lmbook.batches import IGNORE, Examples, TokenStream, open_tokens, write_tokens
from lmbook.checkpoints import Checkpoints, load_weights
from lmbook.cleaning import Drop, ExactDuplicates, Rewrite, empty, normalise
from lmbook.deep_networks import NeuralNGram, NeuralNGramConfig
from lmbook.language_models import NGram, NGramConfig
from lmbook.perplexity import evaluate, floor
from lmbook.shards import clean, read_shards
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE
from lmbook.tokenizer_files import SentencePieceTokenizer, load_tokenizer
from lmbook.training import TrainConfig, Trainer


@pytest.fixture(scope="module")
def world() -> SmallWorld: return SmallWorld(SmallWorldConfig(limit=4))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_from_a_dirty_text_to_a_model_that_is_judged_against_the_floor(tmp_path: Path, world: SmallWorld, kind: str):
    stories = list(world.texts("train", n=250))
    dirty = [{"text": text.replace(" ", "\u00a0", 1) + "\u200b", "id": str(i)} for i, text in enumerate([*stories, *stories[:20], ""])]
    clean(dirty, [Rewrite(normalise), Drop(empty), ExactDuplicates()], tmp_path / "shards", format="parquet")
    texts = [record["text"] for record in read_shards(tmp_path / "shards")]
    assert sorted(texts) == sorted(set(stories))

    made = BPE.train(texts, 400) if kind == "bpe" else SentencePieceTokenizer.train(texts, 400, model_type="bpe")
    made.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    V = tokenizer.vocab_size
    fresh = list(world.texts("valid", n=12))

    tokens = write_tokens(tmp_path / "tokens.npy", (tokenizer.encode(text, bos=True, eos=True) for text in texts), V)
    stream = TokenStream(open_tokens(tmp_path / "tokens.npy"), batch_size=8, length=32)
    torch.manual_seed(0)
    model = NeuralNGram(NeuralNGramConfig(vocab_size=V, context_length=4))
    judged: list[float] = []

    def judge(network: torch.nn.Module) -> float:
        judged.append(evaluate(network, fresh, tokenizer).loss)
        return judged[-1]

    def loss(network: torch.nn.Module, batch) -> tuple[torch.Tensor, int]:
        rows = torch.cat([batch.ids, batch.targets[:, -1:].clamp(min=0)], 1)
        log_p = network.token_log_probs(rows)
        counts = batch.targets != IGNORE
        return -(log_p * counts).sum(), int(counts.sum())

    config = TrainConfig(steps=60, lr=5e-3, eval_every=20)
    history = Trainer(model, stream, config, loss=loss, evaluate=judge, checkpoints=Checkpoints(tmp_path / "run")).fit()
    assert history.stopped == "steps" and len(judged) == 3 and history.best == min(judged) and len(tokens) == len(stream.tokens)
    assert judged[-1] < judged[0] < math.log(V) + .5

    again = NeuralNGram(NeuralNGramConfig(vocab_size=V, context_length=4))
    load_weights(again, tmp_path / "run" / f"step-{history.best_step:06}")
    network, ground = evaluate(again, fresh, tokenizer), floor(world, fresh)
    counted = evaluate(NGram.fit((tokenizer.encode(text, bos=True, eos=True) for text in texts), V, NGramConfig(3)), fresh, tokenizer)
    assert network.loss == pytest.approx(history.best, rel=1e-5)
    assert network.bytes == counted.bytes == ground.bytes == sum(len(text.encode()) for text in fresh)
    for judged_model in (network, counted):
        excess = judged_model.excess(ground, per="bytes")
        assert excess.value > 0 and judged_model.bits_per_byte > ground.bits_per_byte > .1


def test_examples_of_a_tokenizer_train_to_the_loss_that_evaluate_gives(world: SmallWorld):
    "The Trainer's own validation loss and `evaluate` are the same number, for they score the same tokens."
    texts = list(world.texts("train", n=40))
    tokenizer = BPE.train(texts, 320)
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    torch.manual_seed(0)
    model = NeuralNGram(NeuralNGramConfig(vocab_size=tokenizer.vocab_size, context_length=3))
    source = Examples(rows, batch_size=8, pad_id=tokenizer.pad_id)
    trainer = Trainer(
        model, source, TrainConfig(steps=5), evaluate=Examples(rows[:10], batch_size=4, shuffle=False, pad_id=tokenizer.pad_id)
    )
    history = trainer.fit()
    assert evaluate(model, texts[:10], tokenizer).loss == pytest.approx(history.best, rel=1e-4)
