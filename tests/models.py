"""Small random Transformers of every kind, and the simplest cache: for the tests of several chapters."""

from __future__ import annotations

import torch

from lmbook.transformer import Transformer, TransformerConfig

V = 41
SIZES = {"d_model": 32, "n_layer": 2, "n_head": 4, "context_length": 24}
VARIANTS = {
    "gpt2": {"activation": "gelu_tanh"},
    "llama": {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "n_kv_head": 2},
    "bert": {"norm_first": False, "types": 2, "embed_norm": True, "head": "bert"},
    "2017": {"norm_first": False, "positions": "sinusoidal", "activation": "relu"},
    "alibi": {"positions": "alibi", "tie": False, "mlp_bias": True, "bias": False, "n_kv_head": 1},
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


def given_source(model: Transformer, B: int, S: int = 7) -> dict:
    return {"source": ids(B, S, 5)} if model.config.kind == "encoder-decoder" else {}


def close(a, b, tol: float = 1e-5) -> None: torch.testing.assert_close(a, b, atol=tol, rtol=tol)


class SlowCache:
    "What `Transformer.forward` asks of a cache, in a few lines: keys and values are glued on."

    def __init__(self, n_layer):
        self.layers, self.cross, self.length, self.there = [Layer() for _ in range(n_layer)], [None] * n_layer, 0, None

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
