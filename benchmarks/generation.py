"""How fast text is written: with and without a cache, alone and in batches, with guesses that are checked, and beside transformers.

    python -m benchmarks.generation

One thread, nothing but CPU. Times are seconds of the processor, which a busy machine changes less than the clock; the contenders take
turns, and the fastest of some rounds counts. Models have four layers of width 128 and random weights, except for speculation: what a draft
is worth depends on what both have learned, so there a large and a small model are trained on Small World first.

length: tokens a second at a length, with a KVCache, with one that is glued together by torch.cat at each step, and without any. store: the
cache alone, for a layer of this size. batch: tokens a second by rows. speculative: against the large model alone. transformers: the same
weights in GPT2LMHeadModel, greedy, one text, and equal token for token. engines: a Llama of two sizes in this book, in transformers and in
CTranslate2, which runs compiled kernels of its own; one text and sixteen, in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from time import process_time

import torch
from torch import Tensor

from benchmarks.common import Benchmark, Option, Settings, fastest, in_turns, run
from lmbook.batches import Examples
from lmbook.cache import KVCache
from lmbook.generation import SamplingConfig, generate
from lmbook.pretrained import save_pretrained
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.speculation import speculative
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

LENGTHS = (16, 64, 256, 1024)
SHAPE = {"d_model": 128, "n_layer": 4, "n_head": 4, "context_length": 2048}


BENCHMARK = Benchmark(
    packages=("torch", "transformers"), facts=lambda settings: {"shape": SHAPE},
    options=[Option("rounds", 5, 1, "rounds in which all take turns"),
             Option("texts", 3000, 30, "stories that the models of the speculation read")],
)


def turns(ways: dict[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    "Processor seconds of the fastest round."
    return fastest(in_turns(ways, settings.rounds, clock=process_time))


class Glued:
    "A layer's cache that is glued together at each step."

    k = v = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


class GluedCache:
    "What a model asks of a cache, in the simplest way."

    def __init__(self, n_layer: int): self.layers, self.length = [Glued() for _ in range(n_layer)], 0

    def __getitem__(self, i: int) -> Glued: return self.layers[i]

    def extend(self, B: int, T: int, segments: object, device: object) -> tuple[None, Tensor]:
        return None, torch.arange(self.length, self.length + T)


def model(**changes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{"vocab_size": 1000, **SHAPE, **changes})).eval()


@BENCHMARK.part()
def length(settings: Settings) -> list[dict]:
    "Tokens a second around a length."
    m, out, steps, lengths = model(), [], settings.pick(8, 2), settings.pick(LENGTHS, (16, 64))
    ids = torch.randint(1000, (1, max(lengths) + steps), generator=torch.Generator().manual_seed(0))
    for n in lengths:
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

            best = turns({"cache": with_cache, "glued": with_glue, "none": without}, settings)
        out.append({"length": n, "cache": steps / best["cache"], "glued": steps / best["glued"], "none": 2 / best["none"]})
    return out


@BENCHMARK.part()
def store(settings: Settings) -> list[dict]:
    "Appending one place after the other to the keys and values of one layer, seconds in all."
    out = []
    new = torch.randn(1, 4, 1, 32)
    for n in settings.pick((256, 1024, 4096), (16,)):
        def kept(n=n):
            cache = KVCache(1, capacity=128)
            for _ in range(n): cache.extend(1, 1); cache[0].append(new, new)

        def glued(n=n):
            cache = Glued()
            for _ in range(n): cache.append(new, new)

        best = turns({"kept": kept, "glued": glued}, settings)
        out.append({"places": n, **best})
    return out


@BENCHMARK.part()
def batch(settings: Settings) -> list[dict]:
    "Tokens a second by rows of a batch."
    m, out, new = model(), [], settings.pick(60, 3)
    config = SamplingConfig(max_new_tokens=new, temperature=0)
    for rows in settings.pick((1, 4, 16, 64), (1, 4)):
        best = turns({"generate": lambda rows=rows: generate(m, [[1, 2, 3]] * rows, config)}, settings)
        out.append({"rows": rows, "tokens_per_s": new * rows / best["generate"]})
    return out


@BENCHMARK.part("speculative")
def guesses(settings: Settings) -> dict:
    "Speculation against the large model alone, on Small World."
    world = SmallWorld(SmallWorldConfig(limit=3))
    stories = list(world.texts("train", n=settings.texts))
    words = WordTokenizer.train(stories)
    rows = [words.encode(text, bos=True, eos=True) for text in stories]

    def learn(lr: float, **shape: int) -> Transformer:
        torch.manual_seed(0)
        made = Transformer(TransformerConfig(words.vocab_size, context_length=256, positions="rotary", norm="rms", bias=False,
                                             activation="swiglu", **shape))
        Trainer(made, Examples(rows, tokens=2000, sort=20), TrainConfig(epochs=1, lr=lr, warmup=settings.pick(20, 1), device="cpu")).fit()
        return made.eval()

    large, draft = learn(3e-3, d_model=128, n_layer=8, n_head=4), learn(1e-2, d_model=48, n_layer=1, n_head=2)
    found = []
    samplings = [SamplingConfig(max_new_tokens=settings.pick(100, 10), seed=seed) for seed in range(settings.pick(4, 1))]

    def alone() -> None:
        for sampling in samplings: generate(large, [words.bos_id], sampling)

    def checked(ahead: int) -> None:
        found.extend((ahead, speculative(large, draft, [words.bos_id], sampling, ahead)) for sampling in samplings)

    ways = {"alone": alone, **{str(k): partial(checked, k) for k in (2, 4, 8)}}
    best = turns(ways, settings)
    out = {"layers": [8, 1], "parameters": [sum(p.numel() for p in m.parameters()) for m in (large, draft)], "seconds": best, "ahead": {}}
    for k in (2, 4, 8):
        runs = [run for ahead, run in found if ahead == k]
        out["ahead"][str(k)] = {"ratio": best["alone"] / best[str(k)],
                                "accepted": sum(r.accepted for r in runs) / sum(r.guessed for r in runs),
                                "per_round": sum(len(r.ids) for r in runs) / sum(r.rounds for r in runs)}
    top = max(out["ahead"], key=lambda k: out["ahead"][k]["ratio"])
    return out | {"best_ahead": int(top), **out["ahead"][top]}


@BENCHMARK.part("transformers")
def beside(settings: Settings) -> dict:
    "Greedy generation of the same model by transformers."
    from transformers import GPT2LMHeadModel

    ours = model(context_length=256, activation="gelu_tanh")
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim == 2: p.normal_(0, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder, layout="gpt2")
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt, n = torch.tensor([[1, 2, 3]]), settings.pick(120, 5)
    theirs.generation_config.pad_token_id = 0
    theirs.generation_config.eos_token_id = None
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": n, "do_sample": False}
    want = theirs.generate(prompt, **given)[0, 3:].tolist()
    config = SamplingConfig(max_new_tokens=n, temperature=0)
    assert generate(ours, prompt, config)[0] == want, "not the same text"
    best = turns({"lmbook": lambda: generate(ours, prompt, config), "transformers": lambda: theirs.generate(prompt, **given)}, settings)
    out = {name: n / seconds for name, seconds in best.items()} | {"ratio": best["transformers"] / best["lmbook"]}
    return out


@BENCHMARK.part(needs=("transformers", "ctranslate2"))
def engines(settings: Settings) -> list[dict]:
    "Greedy generation of the same Llama by three programs, tokens a second."
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    out, vocabulary, n = [], {f"t{i}": i for i in range(256)}, settings.pick(64, 5)
    today = {"vocab_size": 256, "positions": "rotary", "norm": "rms", "bias": False, "activation": "swiglu", "context_length": 256}
    config, prompt = SamplingConfig(max_new_tokens=n, temperature=0), [5, 6, 7]
    for shape in settings.pick(({}, {"d_model": 512, "n_layer": 8, "n_head": 8}), ({"n_layer": 1},)):
        ours = model(**today, **shape)
        with torch.no_grad():
            for p in ours.parameters():
                if p.ndim == 2: p.normal_(0, 1.2 * p.shape[1] ** -.5)
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(ours, folder, layout="llama")
            words = Tokenizer(WordLevel(vocabulary, unk_token="t0"))  # CTranslate2 takes and gives words
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2").save_pretrained(folder)
            theirs = LlamaForCausalLM.from_pretrained(folder).eval()
            TransformersConverter(folder).convert(f"{folder}/compiled")
            compiled = Generator(f"{folder}/compiled", device="cpu", compute_type="float32", inter_threads=1, intra_threads=1)
        theirs.generation_config.pad_token_id, theirs.generation_config.eos_token_id = 0, None
        for rows in (1, 16):
            ids = torch.tensor([prompt] * rows)

            def by_us(rows=rows, ours=ours): return generate(ours, [prompt] * rows, config)

            def by_transformers(ids=ids, theirs=theirs):
                found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
                return found[:, len(prompt) :].tolist()

            def by_ctranslate2(rows=rows, compiled=compiled):
                found = compiled.generate_batch([[f"t{id}" for id in prompt]] * rows, max_length=n, min_length=n, sampling_topk=1,
                                                include_prompt_in_result=False, end_token=[])
                return [result.sequences_ids[0] for result in found]

            ways = {"lmbook": by_us, "transformers": by_transformers, "ctranslate2": by_ctranslate2}
            texts = {name: way() for name, way in ways.items()}
            for name, text in texts.items():
                assert [row[:5] for row in text] == [row[:5] for row in texts["lmbook"]], f"{name} writes something else"
                assert all(len(row) == n for row in text), f"{name} has stopped early"
            best = turns(ways, settings)
            out.append({"parameters": sum(p.numel() for p in ours.parameters()), "rows": rows,
                        **{name: n * rows / seconds for name, seconds in best.items()},
                        "to_transformers": best["transformers"] / best["lmbook"], "to_ctranslate2": best["ctranslate2"] / best["lmbook"]})
    return out


if __name__ == "__main__": run(__file__)
