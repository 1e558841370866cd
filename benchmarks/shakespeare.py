"""Shakespeare by characters on two cores: how good a small model gets in the time that nanoGPT's documented CPU run takes, and what that is due to.

    python -m benchmarks.shakespeare --data ../shared/data/tinyshakespeare

Prints a table for each part and writes benchmarks/results/shakespeare.json after each; `--only final,speed` runs some parts and keeps the others of the file.
The reference (data/README.md): 2,000 steps of 12 x 64 characters, 0.80 M parameters: validation loss 1.886 in 188 s on a machine of this size.
speed: tokens a second in training and in greedy writing, against GPT2LMHeadModel of the same shape with the same weights; the two take turns, ratios are medians of
rounds. final: the recipe in that wall-clock time, everything from making the model to the last step counted, three seeds; loss over all of the validation text in
windows of the context, each read from its beginning, as nanoGPT does, and with at least half the context before each character. ablation: one thing changed at a time,
all at the number of steps that the variant makes in the same time (`--seconds`, by its speed as measured in turns with the others); one seed.
The validation text has chosen the recipe, as it has nanoGPT's: these are validation losses, not test losses.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import machine, rounded
from lmbook.attention import attention_weights
from lmbook.generation import SamplingConfig, generate
from lmbook.optimizers import clip_gradients
from lmbook.pretrained import load_pretrained
from lmbook.runs import muon_and_adamw
from lmbook.tokenization import CharTokenizer
from lmbook.training import TokenStream, TrainConfig, Trainer, next_token_loss, seed_everything
from lmbook.transformer import Transformer, TransformerConfig

RESULTS = Path(__file__).parent / "results" / "shakespeare.json"
REFERENCE = {"nanoGPT, documented CPU run": {"loss": 1.886, "seconds": 188, "parameters": 0.80e6, "tokens": 1_536_000, "tokens_per_s": 14_000},
             "GPT2LMHeadModel, same shape": {"tokens_per_s": 10_500, "written_per_s": 240}}  # data/README.md
MODEL: dict[str, Any] = {"d_model": 128, "layers": 4, "heads": 4, "context_length": 128, "norm": "rms", "activation": "gelu", "positions": "rotary", "bias": False, "tie": True}
RECIPE: dict[str, Any] = {"batch_size": 12, "lr": 0.02, "weight_decay": 0.1, "warmup": 50, "schedule": "linear", "dtype": "bfloat16", "optimizer": "muon", "model": {}}
BUDGET = 188.0
ADAMW_LR = 4e-3  # the best of 2e-3, 4e-3 and 8e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "optimizer: AdamW": {"optimizer": "adamw", "lr": ADAMW_LR},
    "full precision (float32)": {"dtype": "float32"},
    "attention without the fused kernel": {"fused": False},
    "compiled (torch.compile)": {"compile": True},
    "batches of 12 x 64": {"model": {"context_length": 64}},
    "batches of 6 x 256": {"batch_size": 6, "model": {"context_length": 256}},
    "batches of 48 x 128": {"batch_size": 48},
    "schedule: cosine": {"schedule": "cosine"},
    "schedule: constant": {"schedule": "constant"},
    "learned positions": {"model": {"positions": "learned"}},
    "LayerNorm": {"model": {"norm": "layer"}},
    "SwiGLU": {"model": {"activation": "swiglu"}},
    "nanoGPT's parts, AdamW, float32, 12 x 64": {"optimizer": "adamw", "lr": 1e-3, "dtype": "float32", "schedule": "cosine",
                                                "model": {"positions": "learned", "norm": "layer", "activation": "gelu", "context_length": 64}},
}


class Text:
    "The characters, and the split 90 : 10 in order."

    def __init__(self, folder: Path):
        text = (folder / "input.txt").read_text(encoding="utf-8")
        tokenizer = CharTokenizer(sorted(set(text)), specials=("<unk>",))
        ids = np.array(tokenizer.encode(text))
        self.tokenizer, self.vocab_size, cut = tokenizer, tokenizer.vocab_size, int(0.9 * len(ids))
        self.train, self.valid = ids[:cut], ids[cut:]


def recipe(changes: dict[str, Any]) -> dict[str, Any]: return {**RECIPE, **changes, "model": {**MODEL, **changes.get("model", {})}}


def adamw(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.99), fused=True)


@contextlib.contextmanager
def parts(fused: bool):
    "Attention by its formula, T x T numbers a head, in place of PyTorch's fused kernel."
    import lmbook.attention as module

    kept = module.F.scaled_dot_product_attention
    if not fused:
        def plain(q, k, v, mask=None, *, is_causal=False, dropout_p=0.0, scale=None, enable_gqa=False): return attention_weights(q, k, mask, causal=is_causal, scale=scale).to(v.dtype) @ v
        module.F.scaled_dot_product_attention = plain
    try: yield
    finally: module.F.scaled_dot_product_attention = kept


def trainer(text: Text, how: dict[str, Any], steps: int, seed: int) -> Trainer:
    seed_everything(seed, deterministic=False)
    model = Transformer(TransformerConfig(text.vocab_size, **how["model"]))
    make = muon_and_adamw if how["optimizer"] == "muon" else adamw
    stream = TokenStream(text.train, how["batch_size"], how["model"]["context_length"], seed=seed)
    config = TrainConfig(steps=steps, schedule=how["schedule"], warmup=min(how["warmup"], steps - 1), dtype=how["dtype"], compile=how.get("compile", False), log_every=50, seed=seed,
                         deterministic=False, optimizer=lambda m: make(m, lr=how["lr"], weight_decay=how["weight_decay"]))
    return Trainer(model, stream, config)


def loss(model: Transformer, ids: np.ndarray, slide: bool = False) -> float:
    "Over all of the text: windows read from their beginnings, or windows that overlap by half, of which the second halves count."
    T, total, count = model.config.context_length, 0.0, 0
    step = T // 2 if slide else T
    starts = np.arange(0, len(ids) - T - 1, step)
    with torch.inference_mode():
        for some in np.array_split(starts, max(1, len(starts) // 64)):
            block = torch.from_numpy(ids[some[:, None] + np.arange(T + 1)])
            nats = F.cross_entropy(model(block[:, :-1]).float().mT, block[:, 1:], reduction="none")[:, T - step :]
            total, count = total + nats.sum().item(), count + nats.numel()
    return total / count


def train(text: Text, how: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    run = trainer(text, how, steps, seed)
    run.fit()
    seconds = time.perf_counter() - start
    model = run.model.eval()
    return {"loss": loss(model, text.valid), "loss_with_half_a_context": loss(model, text.valid, slide=True), "seconds": seconds, "steps": steps, "tokens": run.tokens,
            "parameters": sum(p.numel() for p in model.parameters())}


def step_seconds(text: Text, variants: dict[str, dict[str, Any]], rounds: int, steps: int = 12) -> dict[str, float]:
    "Seconds of a training step of each variant, the median of rounds in which all take turns."
    runs, times = {}, {name: [] for name in variants}
    for name, changes in variants.items():
        runs[name] = trainer(text, recipe(changes), 10**6, 0)
        runs[name].model.train()
        runs[name].batches_left = runs[name]._stream()
        with parts(changes.get("fused", True)):
            for _ in range(3): runs[name]._update(runs[name].batches_left)  # warm: compiles, allocates
    for _ in range(rounds):
        for name, run in runs.items():
            with parts(variants[name].get("fused", True)):
                start = time.perf_counter()
                for _ in range(steps): run._update(run.batches_left)
                times[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, times: int) -> dict[str, list[float]]:
    "Seconds of a call in each round, in which all take turns; a first round is for warming up."
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(times): call()
            seconds[name].append((time.perf_counter() - start) / times)
    return {name: values[1:] for name, values in seconds.items()}


# ------------------------------------------------------------ the parts


def speed(text: Text, args: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=text.vocab_size, n_positions=64, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
    assert torch.allclose(ours(torch.arange(60)[None]), theirs.eval()(torch.arange(60)[None]).logits, atol=1e-4)
    prompt, new = text.valid[:8].tolist(), 48
    torch.set_num_threads(1)  # both write faster so: a row of 128 numbers is not worth sharing
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0, 8:].tolist()
    settings = SamplingConfig(max_new_tokens=new, temperature=0)
    assert generate(ours, prompt, settings)[0] == expected  # the same tokens
    writers = {"GPT2LMHeadModel.generate": lambda: theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0), "lmbook.generation.generate": lambda: generate(ours, prompt, settings)}
    times = in_turns(writers, args.rounds, 4)
    base = "GPT2LMHeadModel.generate"
    writing = {name: {"tokens_per_s": new / statistics.median(t), "ratio": statistics.median(b / a for a, b in zip(t, times[base]))} for name, t in times.items()}
    for name, row in writing.items(): print(f"{name:42}{row['tokens_per_s']:10,.0f} tokens/s   {row['ratio']:.2f}")

    torch.set_num_threads(2)
    batch = next(iter(TokenStream(text.train, 12, 64)))
    makers = {"torch's default": lambda m: torch.optim.AdamW(m.parameters(), 1e-3), "fused": lambda m: torch.optim.AdamW(m.parameters(), 1e-3, fused=True)}

    def stepper(model: torch.nn.Module, score: Callable, dtype: str, optimizer: str) -> Callable[[], None]:
        model.train()
        optimize = makers[optimizer](model)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"): value = score(model)
            value.backward()
            clip_gradients(model.parameters(), 1.0)
            optimize.step()
            optimize.zero_grad()

        return step

    def our_loss(model: torch.nn.Module) -> torch.Tensor:
        value, tokens = next_token_loss(model, batch)
        return value / tokens

    def their_loss(model: torch.nn.Module) -> torch.Tensor: return model(input_ids=batch.ids, labels=batch.ids).loss

    steps = {"GPT2LMHeadModel, float32": stepper(theirs, their_loss, "float32", "torch's default"), "GPT2LMHeadModel, bfloat16, fused AdamW": stepper(theirs, their_loss, "bfloat16", "fused"),
             "ours, float32, fused AdamW": stepper(ours, our_loss, "float32", "fused"), "ours, bfloat16, fused AdamW": stepper(ours, our_loss, "bfloat16", "fused")}
    times = in_turns(steps, args.rounds, 15)
    base = "GPT2LMHeadModel, float32"
    training = {name: {"tokens_per_s": batch.ids.numel() / statistics.median(t), "ratio": statistics.median(b / a for a, b in zip(t, times[base]))} for name, t in times.items()}
    for name, row in training.items(): print(f"{name:42}{row['tokens_per_s']:10,.0f} tokens/s   {row['ratio']:.2f}")

    return {"rounds": args.rounds, "batch": [12, 64], "training": training, "greedy, batch of 1, one thread": writing}


def final(text: Text, args: argparse.Namespace) -> dict[str, Any]:
    how = recipe({})
    pace = step_seconds(text, {"the recipe": {}}, 5)["the recipe"]
    steps = args.steps or int(0.75 * BUDGET / pace)  # of all seeds alike; room for a machine that is not always as fast
    runs = []
    for seed in range(args.seeds):
        runs.append(train(text, how, steps, seed))
        print(f"seed {seed}: {runs[-1]['loss']:.4f} ({runs[-1]['loss_with_half_a_context']:.4f} with half a context), {runs[-1]['seconds']:.0f} s, {runs[-1]['tokens']:,} tokens", flush=True)
    losses = [run["loss"] for run in runs]
    return {"recipe": {k: v for k, v in how.items()}, "budget_s": BUDGET, "mean": statistics.fmean(losses), "sd": statistics.stdev(losses) if len(losses) > 1 else 0.0, "runs": runs}


def ablation(text: Text, args: argparse.Namespace) -> list[dict[str, Any]]:
    pace = step_seconds(text, VARIANTS, args.rounds)
    rows = []
    for name, changes in VARIANTS.items():
        how = recipe(changes)
        size = how["batch_size"] * how["model"]["context_length"]
        steps = int(args.seconds / pace[name])
        with parts(changes.get("fused", True)): runs = [train(text, {**how, "compile": False}, steps, seed) for seed in range(args.ablation_seeds)]  # the speed is the compiled one's, the losses are the same
        rows.append({"change": name, "tokens_per_s": size / pace[name], "tokens": steps * size, "loss": statistics.fmean(r["loss"] for r in runs), "losses": [r["loss"] for r in runs],
                     "parameters": runs[0]["parameters"]})
        print(f"{name:45}{rows[-1]['tokens_per_s']:10,.0f} tokens/s {rows[-1]['tokens']:12,} tokens   {rows[-1]['loss']:.3f} ({', '.join(f'{x:.3f}' for x in rows[-1]['losses'])})", flush=True)
    return rows


PARTS = {"speed": speed, "final": final, "ablation": ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds input.txt")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="of the final run")
    parser.add_argument("--steps", type=int, help="of the final run; default: as many as fit in the time")
    parser.add_argument("--seconds", type=float, default=25.0, help="of training for each variant of the ablation")
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="in which those that are compared take turns")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    text = Text(args.data)
    out = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in args.only.split(","):
        print(f"== {part}", flush=True)
        found = PARTS[part](text, args)
        out |= {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.shakespeare --data ../shared/data/tinyshakespeare", "reference": REFERENCE, part: found}
        out["machine"] = machine("torch", "numpy", "transformers")
        if not args.dry: RESULTS.write_text(json.dumps(rounded(out), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
