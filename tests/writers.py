"""Models that write what a test needs, and writing as slowly as can be: without a cache, the whole text again for each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmbook.generation import SamplingConfig
from lmbook.transformer import Transformer, TransformerConfig

V = 17
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


def transformer(seed: int = 0, **changes) -> Transformer:
    "A small random model whose opinions are strong enough to tell tokens apart."
    torch.manual_seed(seed)
    fields = {"vocab_size": V, "d_model": 32, "n_layer": 2, "n_head": 4, "context_length": 64, "tie": False, **changes}
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
