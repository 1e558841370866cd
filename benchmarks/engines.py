"""One model in every format of three engines: bytes, what rounding costs, whether the text is the same, tokens a second.

    python -m benchmarks.engines

engines: a model of Small World, three seeds. Each is written for llama.cpp, ONNX Runtime and CTranslate2, in each way of storing its
matrices. For each file: its size; the loss in nats a story above that of the unrounded model, by our own program with the numbers in the
file; the share of twenty greedy texts (one for each given name) in which the engine writes what our program writes with these numbers; and
the tokens a second of the engine on one thread, writing 100 tokens after a prompt, by turns with our own `generate`.
larger: one model of random weights, wide enough that its matrices decide: tokens a second of writing 32 of them, ours with float32 and
rounded, and the engines' own, on one thread and by turns. Ours that are rounded run module by module, as `generate` runs them.

llama.cpp is asked through the package xllamacpp, if it is installed. It belongs to no extra of this book.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Option, Settings, fastest, in_turns, mean_sd, run
from lmbook.batches import Examples
from lmbook.engines import STORED, export_model, load_gguf
from lmbook.generation import SamplingConfig, generate
from lmbook.perplexity import evaluate, floor
from lmbook.quantization import QuantizeConfig, quantize, size_of
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(
    packages=("torch", "numpy", "gguf", "onnx", "onnxruntime", "ctranslate2", "xllamacpp"), seeds=3,
    options=[Option("rounds", 5, dry=1, help="rounds in which all engines take turns")],
)  # fmt: skip
WORLD = SmallWorld(SmallWorldConfig(limit=20, names=8))
ENGINES = {"gguf": "llama.cpp", "onnx": "ONNX Runtime", "ctranslate2": "CTranslate2"}  # by the format that they read
Write = Callable[[list[int], int], list[int]]  # from a prompt, and how many tokens to write at most, to what was written before <eos>
EOS = 2


def trained(seed: int, tokenizer: BPE, settings: Settings) -> Transformer:
    steps = settings.pick(600, 2)
    stories = list(WORLD.texts("train", n=8 * steps, start=100_000 * seed))
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(
        tokenizer.vocab_size, settings.pick(256, 32), 2, 4, n_kv_head=2, d_ff=settings.pick(768, 64), context_length=320, norm="rms",
        activation="swiglu", positions="rotary", bias=False, init="xavier_uniform"))  # fmt: skip
    lessons = Examples([tokenizer.encode(story, bos=True, eos=True)[:320] for story in stories], batch_size=8, seed=seed)
    plan = TrainConfig(steps=steps, lr=0.02, warmup=min(20, steps - 1), schedule="wsd", seed=seed, device="cpu", log_every=10**6,
                       optimizer=muon_and_adamw)
    Trainer(model, lessons, plan).fit()
    return model.eval()


def ours(model: Transformer, eos: int | None = EOS) -> Write:
    def write(ids: list[int], n: int) -> list[int]:
        return [id for id in generate(model, ids, SamplingConfig(temperature=0, max_new_tokens=n, eos_id=eos))[0] if id != eos]

    return write


def onnx_engine(path: Path, model: Transformer) -> Write:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()][1:]
    empty = np.zeros((1, model.config.attention.n_kv, 0, model.config.attention.size), np.float32)

    def write(ids: list[int], n: int) -> list[int]:
        written: list[int] = []
        past: dict[str, Any] = dict.fromkeys(names, empty)
        while len(written) < n:
            logits, *kept = session.run(None, {"ids": np.array([written[-1:] or ids]), **past})
            past = dict(zip(names, kept))
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == EOS: break
        return [id for id in written if id != EOS]

    return write


def ctranslate2_engine(path: Path, words: list[str], compute: str, least: int = 0) -> Write:
    import ctranslate2

    engine = ctranslate2.Generator(str(path), compute_type=compute, intra_threads=1)

    def write(ids: list[int], n: int) -> list[int]:
        told: dict[str, Any] = {"max_length": n, "min_length": least, "sampling_topk": 1, "include_prompt_in_result": False}
        return [id for id in engine.generate_batch([[words[id] for id in ids]], **told)[0].sequences_ids[0] if id != EOS]

    return write


def llama_engine(path: Path, endless: bool = False) -> Write:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 320, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def write(ids: list[int], n: int) -> list[int]:
        told = {"prompt": ids, "n_predict": n, "temperature": 0, "return_tokens": True, "cache_prompt": False, "ignore_eos": endless}
        body, kind = json.dumps(told).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/completion", body, kind)) as answer:
            return [id for id in json.loads(answer.read())["tokens"] if id != EOS]

    return write


def rounded_rows(model: Transformer) -> Transformer:
    "The model with the numbers of an int8 file."
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in copy.parameters():
            scale = p.abs().amax(-1, keepdim=True) / 127
            if p.ndim > 1: p.copy_((p / scale).round() * scale)
    return copy.eval()


def halved(model: Transformer) -> Transformer:
    copy = Transformer(model.config)
    copy.load_state_dict({name: x.half().float() for name, x in model.state_dict().items()})
    return copy.eval()


@BENCHMARK.part()
def engines(settings: Settings) -> list[dict[str, Any]]:
    tokenizer = BPE.train(list(WORLD.texts("train", n=settings.pick(2000, 60))), settings.pick(1024, 300))
    words, test = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)], list(WORLD.texts("test", n=settings.pick(300, 30)))
    names = [row["en"] for row in WORLD.grammar.lexicon["given"]][: settings.pick(20, 2)]
    prompts, n = [tokenizer.encode(name, bos=True) for name in names], settings.pick(100, 5)
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    least = floor(WORLD, test, sample=not settings.dry).nats / len(test)
    for seed in range(settings.seeds):
        model = trained(seed, tokenizer, settings)
        above = evaluate(model, test, tokenizer, context_length=320).nats / len(test)
        print(f"  seed {seed}: {above - least:.2f} nats a story above the floor", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            ways: dict[tuple[str, str], Write] = {("lmbook", "f32"): ours(model)}
            sizes, holds = {("lmbook", "f32"): 4 * sum(p.numel() for p in model.parameters())}, {("lmbook", "f32"): model}
            for to, engine in ENGINES.items():
                for kind in STORED[to]:
                    path = Path(folder) / f"{to}-{kind}"
                    done = export_model(model, path, to, kind, tokenizer=tokenizer)
                    key = (engine, kind)
                    sizes[key] = done.bytes
                    holds[key] = load_gguf(path) if to == "gguf" else {"f32": lambda m: m, "f16": halved, "int8": rounded_rows}[kind](model)
                    if to == "onnx": ways[key] = onnx_engine(path, model)
                    elif to == "ctranslate2": ways[key] = ctranslate2_engine(path, words, "int8" if kind == "int8" else "float32")
                    elif find_spec("xllamacpp"): ways[key] = llama_engine(path)
            times = fastest(in_turns({str(key): lambda write=write: write(prompts[0], n) for key, write in ways.items()}, settings.rounds))
            for key, held in holds.items():
                row = found.setdefault(key, {})
                row.setdefault("MB", []).append(sizes[key] / 1e6)
                row.setdefault("lost", []).append(evaluate(held, test, tokenizer, context_length=320).nats / len(test) - above)
                row.setdefault("above the floor", []).append(row["lost"][-1] + above - least)
                if key not in ways: continue
                same = [ways[key](prompt, n) == ours(held)(prompt, n) for prompt in prompts]
                row.setdefault("same text", []).append(sum(same) / len(same))
                row.setdefault("tokens a second", []).append(len(ways[key](prompts[0], n)) / times[str(key)])
    return [{"engine": engine, "stored": kind, **{name: mean_sd(values) for name, values in row.items()}}
            for (engine, kind), row in found.items()]


@BENCHMARK.part()
def larger(settings: Settings) -> list[dict[str, Any]]:
    tokenizer = BPE.train(list(WORLD.texts("train", n=settings.pick(2000, 60))), settings.pick(1024, 300))
    words, n = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)], settings.pick(32, 3)
    width, depth = settings.pick((768, 6), (64, 1))
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(
        tokenizer.vocab_size, width, depth, width // 64, d_ff=3 * width, context_length=320, norm="rms", activation="swiglu",
        positions="rotary", bias=False, init="xavier_uniform")).eval()  # fmt: skip
    ways: dict[tuple[str, str], Write] = {}
    sizes: dict[tuple[str, str], int] = {}
    rounded = {"int8 weights": QuantizeConfig(8, None, "symmetric"),
               "int8 products": QuantizeConfig(8, None, "symmetric", activations="int8"),
               "int4 weights": QuantizeConfig(4, 32, "symmetric")}  # fmt: skip
    for kind, made in {"f32": model, **{kind: quantize(model, how) for kind, how in rounded.items()}}.items():
        ways["lmbook", kind], sizes["lmbook", kind] = ours(made, None), size_of(made).bytes
    with tempfile.TemporaryDirectory() as folder:
        for to, kind in (("gguf", "f32"), ("gguf", "q8_0"), ("gguf", "q4_0"), ("onnx", "f32"), ("onnx", "int8"), ("ctranslate2", "f32"),
                         ("ctranslate2", "int8")):  # fmt: skip
            path, key = Path(folder) / f"{to}-{kind}", (ENGINES[to], kind)
            if to == "gguf" and not find_spec("xllamacpp"): continue
            sizes[key] = export_model(model, path, to, kind, tokenizer=tokenizer).bytes
            if to == "onnx": ways[key] = onnx_engine(path, model)
            elif to == "ctranslate2": ways[key] = ctranslate2_engine(path, words, "int8" if kind == "int8" else "float32", n)
            else: ways[key] = llama_engine(path, endless=True)
        prompt = tokenizer.encode("Anna", bos=True)
        spent = in_turns({str(key): lambda write=write: write(prompt, n) for key, write in ways.items()}, settings.rounds)
        times, written = fastest(spent), {key: len(write(prompt, n)) for key, write in ways.items()}
    exact = written["lmbook", "f32"] / times[str(("lmbook", "f32"))]
    return [{"engine": engine, "stored": kind, "MB": sizes[engine, kind] / 1e6, "written": written[engine, kind],
             "tokens a second": (speed := written[engine, kind] / times[str((engine, kind))]), "times ours in float32": speed / exact}
            for engine, kind in ways]


if __name__ == "__main__": run(__file__)
