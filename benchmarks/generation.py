"""How fast text is written: with and without a cache, alone and in batches, with guesses that are checked, and beside transformers.

    python -m benchmarks.generation

Prints tables and writes benchmarks/results/generation.json. One thread, nothing but CPU; `--only length store ...` runs some of the parts and keeps
the other results of the file. Times are seconds of the processor, which a busy machine changes less than the clock; the contenders take
turns, and the fastest of some rounds counts. Models have four layers of width 128 and random weights, except for speculation: what a draft is worth
depends on what both have learned, so there a large and a small model are trained on Small World first.

length: tokens a second at a length, with a KVCache, with one that is glued together by torch.cat at each step, and without any. store: the
cache alone, for a layer of this size. batch: tokens a second by rows. speculative: against the large model alone. transformers: the same weights in
GPT2LMHeadModel, greedy, one text, and equal token for token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from benchmarks.common import machine, rounded
from lmbook.cache import KVCache
from lmbook.generation import SamplingConfig, generate
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.speculation import speculative
from lmbook.tokenization import WordTokenizer
from lmbook.training import Examples, TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig, save_pretrained

RESULTS = Path(__file__).parent / "results" / "generation.json"
LENGTHS = (16, 64, 256, 1024)
SHAPE = {"d_model": 128, "layers": 4, "heads": 4, "context_length": 2048}


def turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]: # processor seconds of the fastest round
    best = dict.fromkeys(ways, float("inf"))
    for run in ways.values(): run()
    for i in range(rounds):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            ways[name]()
            best[name] = min(best[name], time.process_time() - start)
    return best


class Glued:
    "A layer's cache that is glued together at each step."

    k = v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


class GluedCache:
    "What a model asks of a cache, in the simplest way."

    def __init__(self, layers: int): self.layers, self.length = [Glued() for _ in range(layers)], 0

    def __getitem__(self, i: int) -> Glued: return self.layers[i]

    def extend(self, B: int, T: int, segments: object, device: object) -> tuple[None, Tensor]: return None, torch.arange(self.length, self.length + T)


def model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{"vocab_size": 1000, **SHAPE, **changes})).eval()


def length(rounds: int) -> list[dict]:
    "Tokens a second around a length."
    m, out, steps = model(), [], 8
    ids = torch.randint(1000, (1, max(LENGTHS) + steps), generator=torch.Generator().manual_seed(0))
    for n in LENGTHS:
        with torch.inference_mode():
            kept, glued = KVCache(4, capacity=n + 64), GluedCache(4)
            for cache in (kept, glued): m(ids[:, :n], cache=cache)
            glued.length = n
            keys = [(layer.k, layer.v) for layer in glued.layers]

            def with_cache(n=n, kept=kept):
                kept.crop(n)
                for t in range(n, n + steps): m(ids[:, t : t + 1], cache=kept)

            def with_glue(n=n, glued=glued, keys=keys):
                for layer, (k, v) in zip(glued.layers, keys): layer.k, layer.v = k, v
                for t in range(n, n + steps): glued.length = t; m(ids[:, t : t + 1], cache=glued)

            def without(n=n):
                for t in range(n, n + 2): m(ids[:, : t + 1])

            best = turns({"cache": with_cache, "glued": with_glue, "none": without}, rounds)
        row = {"length": n, "cache": steps / best["cache"], "glued": steps / best["glued"], "none": 2 / best["none"]}
        out.append(row)
        print(f"{n:6} tokens: cache {row['cache']:7.0f} tokens/s, glued {row['glued']:7.0f}, none {row['none']:7.1f}", flush=True)
    return out


def store(rounds: int) -> list[dict]:
    "Appending one place after the other to the keys and values of one layer, seconds in all."
    out = []
    new = torch.randn(1, 4, 1, 32)
    for n in (256, 1024, 4096):
        def kept(n=n):
            cache = KVCache(1, capacity=128)
            for _ in range(n): cache.extend(1, 1); cache[0].append(new, new)

        def glued(n=n):
            cache = Glued()
            for _ in range(n): cache.append(new, new)

        best = turns({"kept": kept, "glued": glued}, rounds)
        out.append({"places": n, **best})
        print(f"{n:6} places: KVCache {best['kept'] * 1e3:7.1f} ms, torch.cat {best['glued'] * 1e3:7.1f} ms, {best['glued'] / best['kept']:.1f} times", flush=True)
    return out


def batch(rounds: int) -> list[dict]:
    "Tokens a second by rows of a batch."
    m, out = model(), []
    config = SamplingConfig(max_new_tokens=60, temperature=0)
    for rows in (1, 4, 16, 64):
        best = turns({"generate": lambda rows=rows: generate(m, [[1, 2, 3]] * rows, config)}, rounds)
        out.append({"rows": rows, "tokens_per_s": 60 * rows / best["generate"]})
        print(f"{rows:6} rows: {out[-1]['tokens_per_s']:8.0f} tokens/s", flush=True)
    return out


def guesses(rounds: int, texts: int) -> dict:
    "Speculation against the large model alone, on Small World."
    world = SmallWorld(SmallWorldConfig(limit=3))
    stories = list(world.texts("train", n=texts))
    words = WordTokenizer.train(stories)
    rows = [words.encode(text, bos=True, eos=True) for text in stories]

    def learn(lr: float, **shape: int) -> Transformer:
        torch.manual_seed(0)
        made = Transformer(TransformerConfig(words.vocab_size, context_length=256, positions="rotary", norm="rms", bias=False, activation="swiglu", **shape))
        Trainer(made, Examples(rows, tokens=2000, sort=20), TrainConfig(epochs=1, lr=lr, warmup=20, device="cpu")).fit()
        return made.eval()

    large, draft = learn(3e-3, d_model=128, layers=8, heads=4), learn(1e-2, d_model=48, layers=1, heads=2)
    found = []

    def alone() -> None:
        for seed in range(4): generate(large, [words.bos_id], SamplingConfig(max_new_tokens=100, seed=seed))

    def checked(ahead: int) -> Callable[[], None]:
        def run() -> None: found.append((ahead, [speculative(large, draft, [words.bos_id], SamplingConfig(max_new_tokens=100, seed=seed), ahead) for seed in range(4)]))
        return run

    ways = {"alone": alone, **{str(k): checked(k) for k in (2, 4, 8)}}
    best = turns(ways, rounds)
    out = {"layers": [8, 1], "parameters": [sum(p.numel() for p in m.parameters()) for m in (large, draft)], "seconds": best, "ahead": {}}
    for k in (2, 4, 8):
        runs = [run for ahead, runs in found for run in runs if ahead == k]
        out["ahead"][str(k)] = {"ratio": best["alone"] / best[str(k)], "accepted": sum(r.accepted for r in runs) / sum(r.guessed for r in runs),
                                "per_round": sum(len(r.ids) for r in runs) / sum(r.rounds for r in runs)}
        print(f"ahead {k}: {out['ahead'][str(k)]}", flush=True)
    top = max(out["ahead"], key=lambda k: out["ahead"][k]["ratio"])
    return out | {"best_ahead": int(top), **out["ahead"][top]}


def beside(rounds: int) -> dict:
    "Greedy generation of the same model by transformers."
    from transformers import GPT2LMHeadModel

    ours = model(context_length=256, activation="gelu_tanh")
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim == 2: p.normal_(0, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder, layout="gpt2")
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt, n = torch.tensor([[1, 2, 3]]), 120
    theirs.generation_config.pad_token_id = 0
    theirs.generation_config.eos_token_id = None
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": n, "do_sample": False}
    want = theirs.generate(prompt, **given)[0, 3:].tolist()
    config = SamplingConfig(max_new_tokens=n, temperature=0)
    assert generate(ours, prompt, config)[0] == want, "not the same text"
    best = turns({"lmbook": lambda: generate(ours, prompt, config), "transformers": lambda: theirs.generate(prompt, **given)}, rounds)
    out = {name: n / seconds for name, seconds in best.items()} | {"ratio": best["transformers"] / best["lmbook"]}
    print(out, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["length", "store", "batch", "speculative", "transformers"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=3000, help="stories that the models of the speculation read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    result |= {"command": "python -m benchmarks.generation", "date": datetime.date.today().isoformat(), "machine": machine("torch", "transformers"), "threads": 1, "shape": SHAPE}
    parts = {"length": length, "store": store, "batch": batch, "speculative": lambda rounds: guesses(rounds, arguments.texts), "transformers": beside}
    for name in parts:
        if name not in arguments.only: continue
        print(f"\n{name}")
        result[name] = parts[name](arguments.rounds)
        RESULTS.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__": main()
