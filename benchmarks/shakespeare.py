"""Shakespeare by characters: how good a small model gets in the time of nanoGPT's documented CPU run, and what that is due to.

    python -m benchmarks.shakespeare --data ../shared/data/tinyshakespeare

The reference (data/README.md): 2,000 steps of 12 x 64 characters, 0.80 M parameters: validation loss 1.886 in 188 s, on a like machine.
speed: tokens a second in training and in greedy writing, against GPT2LMHeadModel of the same shape with the same weights; ratios are
medians of rounds in which the two take turns.
final: the recipe in that wall-clock time, everything from making the model to the last step counted, three seeds; loss over all of the
validation text in windows of the context, each read from its beginning, as nanoGPT does, and with at least half the context before each
character.
ablation: one thing changed at a time, all at the number of steps that the variant makes in the same time (`--seconds`, by its speed as
measured in turns with the others); one seed.
The validation text has chosen the recipe, as it has nanoGPT's: these are validation losses, not test losses.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import Benchmark, Option, Settings, in_turns, mean_sd, medians, ratio, run
from lmbook.attention import attention_weights
from lmbook.batches import TokenStream
from lmbook.core import seed_everything
from lmbook.generation import SamplingConfig, generate
from lmbook.pretrained import load_pretrained
from lmbook.runs import muon_and_adamw
from lmbook.schedules import clip_gradients
from lmbook.tokenization import CharTokenizer
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig

REFERENCE = {  # data/README.md
    "nanoGPT, documented CPU run": {"loss": 1.886, "seconds": 188, "parameters": 0.80e6, "tokens": 1_536_000, "tokens_per_s": 14_000},
    "GPT2LMHeadModel, same shape": {"tokens_per_s": 10_500, "written_per_s": 240},
}
MODEL: dict[str, Any] = {"d_model": 128, "n_layer": 4, "n_head": 4, "context_length": 128, "norm": "rms", "activation": "gelu",
                         "positions": "rotary", "bias": False, "tie": True}
RECIPE: dict[str, Any] = {"batch_size": 12, "lr": 0.02, "weight_decay": 0.1, "warmup": 50, "schedule": "linear", "dtype": "bfloat16",
                          "optimizer": "muon", "model": {}}
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
    "nanoGPT's parts, AdamW, float32, 12 x 64": {
        "optimizer": "adamw", "lr": 1e-3, "dtype": "float32", "schedule": "cosine",
        "model": {"positions": "learned", "norm": "layer", "activation": "gelu", "context_length": 64},
    },
}
BENCHMARK = Benchmark(
    packages=("torch", "numpy", "transformers"), seeds=3, threads=2, facts=lambda settings: {"reference": REFERENCE},
    options=[
        Option("steps", 0, 2, "of the final run; 0: as many as fit in the time"),
        Option("seconds", 25.0, 0.0, "of training for each variant of the ablation"),
        Option("ablation-seeds", 1, 1),
        Option("rounds", 9, 1, "in which those that are compared take turns"),
    ],
)


class Text:
    "The characters, and the split 90 : 10 in order."

    def __init__(self, settings: Settings):
        text = (settings.folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
        tokenizer = CharTokenizer(sorted(set(text)), specials=("<unk>",))
        ids = np.array(tokenizer.encode(text))
        self.tokenizer, self.vocab_size, cut = tokenizer, tokenizer.vocab_size, int(0.9 * len(ids))
        self.train, self.valid = ids[:cut], ids[cut:]


def recipe(changes: dict[str, Any], settings: Settings) -> dict[str, Any]:
    shape = settings.pick({}, {"d_model": 32, "n_layer": 1})
    return {**RECIPE, **changes, "model": {**MODEL, **changes.get("model", {}), **shape}}


def adamw(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


@contextlib.contextmanager
def parts(fused: bool):
    "Attention by its formula, T x T numbers a head, in place of PyTorch's fused kernel."
    def plain(q, k, v, mask=None, *, is_causal=False, dropout_p=0.0, scale=None, enable_gqa=False):
        return attention_weights(q, k, mask, causal=is_causal, scale=scale).to(v.dtype) @ v

    kept = F.scaled_dot_product_attention
    if not fused: F.scaled_dot_product_attention = plain
    try: yield
    finally: F.scaled_dot_product_attention = kept


def trainer(text: Text, how: dict[str, Any], steps: int, seed: int) -> Trainer:
    seed_everything(seed, deterministic=False)
    model = Transformer(TransformerConfig(text.vocab_size, **how["model"]))
    make = muon_and_adamw if how["optimizer"] == "muon" else adamw
    stream = TokenStream(text.train, how["batch_size"], how["model"]["context_length"], seed=seed)
    config = TrainConfig(steps=steps, schedule=how["schedule"], warmup=min(how["warmup"], steps - 1), dtype=how["dtype"],
                         compile=how.get("compile", False), log_every=50, seed=seed, deterministic=False,
                         optimizer=lambda m: make(m, lr=how["lr"], weight_decay=how["weight_decay"]))
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
    training = trainer(text, how, steps, seed)
    training.fit()
    seconds = time.perf_counter() - start
    model = training.model.eval()
    return {"loss": loss(model, text.valid), "loss_with_half_a_context": loss(model, text.valid, slide=True), "seconds": seconds,
            "steps": steps, "tokens": training.tokens, "parameters": sum(p.numel() for p in model.parameters())}


def step_seconds(text: Text, variants: dict[str, dict[str, Any]], rounds: int, settings: Settings) -> dict[str, float]:
    "Seconds of a training step of each variant, the median of rounds in which all take turns."
    def stepper(changes: dict[str, Any]) -> Callable[[], None]:
        training = trainer(text, recipe(changes, settings), 10**6, 0)
        training.model.train()
        training.batches_left = training._stream()

        def step() -> None:
            with parts(changes.get("fused", True)): training._update(training.batches_left)

        for _ in range(2): step()  # compiles, allocates
        return step

    return medians(in_turns({name: stepper(changes) for name, changes in variants.items()}, rounds, settings.pick(12, 1)))


def compared(ways: dict[str, Callable[[], object]], base: str, tokens: int, rounds: int, repeat: int) -> dict[str, dict[str, float]]:
    "Tokens a second, and the ratio to the speed of `base`."
    times = in_turns(ways, rounds, repeat)
    return {name: {"tokens_per_s": tokens / statistics.median(t), "ratio": ratio(times[base], t)} for name, t in times.items()}


# ------------------------------------------------------------ the parts


@BENCHMARK.part(data=["tinyshakespeare"], needs=["transformers"])
def speed(settings: Settings) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    text, new = Text(settings), settings.pick(48, 4)
    config = GPT2Config(vocab_size=text.vocab_size, n_positions=64, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_pretrained(folder)
    ids = torch.arange(min(60, text.vocab_size))[None]
    assert torch.allclose(ours(ids), theirs.eval()(ids).logits, atol=1e-4)
    prompt = text.valid[:8].tolist()
    torch.set_num_threads(1)  # both write faster so: a row of 128 numbers is not worth sharing
    sampling = SamplingConfig(max_new_tokens=new, temperature=0)

    def their_writing() -> torch.Tensor:
        return theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)

    assert generate(ours, prompt, sampling)[0] == their_writing()[0, 8:].tolist()  # the same tokens
    writers = {"GPT2LMHeadModel.generate": their_writing, "lmbook.generation.generate": lambda: generate(ours, prompt, sampling)}
    writing = compared(writers, "GPT2LMHeadModel.generate", new, settings.rounds, settings.pick(4, 1))

    torch.set_num_threads(settings.pick(2, 1))
    batch = next(iter(TokenStream(text.train, 12, 64)))

    def our_loss() -> torch.Tensor:
        value, tokens = next_token_loss(ours, batch)
        return value / tokens

    def their_loss() -> torch.Tensor: return theirs(input_ids=batch.ids, labels=batch.ids).loss

    def stepper(model: torch.nn.Module, score: Callable[[], torch.Tensor], half: bool, fused: bool) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True) if fused else torch.optim.AdamW(model.parameters(), 1e-3)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half): value = score()
            value.backward()
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"GPT2LMHeadModel, float32": stepper(theirs, their_loss, False, False),
             "GPT2LMHeadModel, bfloat16, fused AdamW": stepper(theirs, their_loss, True, True),
             "ours, float32, fused AdamW": stepper(ours, our_loss, False, True),
             "ours, bfloat16, fused AdamW": stepper(ours, our_loss, True, True)}
    training = compared(steps, "GPT2LMHeadModel, float32", batch.ids.numel(), settings.rounds, settings.pick(15, 1))
    return {"rounds": settings.rounds, "batch": [12, 64], "training": training, "greedy, batch of 1, one thread": writing}


@BENCHMARK.part(data=["tinyshakespeare"])
def final(settings: Settings) -> dict[str, Any]:
    text, how = Text(settings), recipe({}, settings)
    pace = step_seconds(text, {"the recipe": {}}, settings.pick(5, 1), settings)["the recipe"]
    steps = settings.steps or int(0.75 * BUDGET / pace)  # of all seeds alike; room for a machine that is not always as fast
    runs = []
    for seed in range(settings.seeds):
        runs.append(train(text, how, steps, seed))
        print(f"  seed {seed}: {runs[-1]['loss']:.4f} ({runs[-1]['loss_with_half_a_context']:.4f} with half a context)", flush=True)
    return {"recipe": how, "budget_s": BUDGET, **mean_sd([row["loss"] for row in runs]), "runs": runs}


@BENCHMARK.part(data=["tinyshakespeare"])
def ablation(settings: Settings) -> list[dict[str, Any]]:
    text, rows = Text(settings), []
    variants = {name: changes for name, changes in VARIANTS.items() if not (settings.dry and changes.get("compile"))}
    if len(variants) < len(VARIANTS): print("  compiled: left out of a dry run, since compiling takes a minute")
    pace = step_seconds(text, variants, settings.rounds, settings)
    for name, changes in variants.items():
        how = recipe(changes, settings)
        size, steps = how["batch_size"] * how["model"]["context_length"], max(2, int(settings.seconds / pace[name]))
        with parts(changes.get("fused", True)):  # the speed is the compiled one's, the losses are the same
            runs = [train(text, {**how, "compile": False}, steps, seed) for seed in range(settings.ablation_seeds)]
        losses = [row["loss"] for row in runs]
        rows.append({"change": name, "tokens_per_s": size / pace[name], "tokens": steps * size, "loss": statistics.fmean(losses),
                     "losses": losses, "parameters": runs[0]["parameters"]})
        print(f"  {name:45}{rows[-1]['tokens_per_s']:10,.0f} tokens/s   {rows[-1]['loss']:.3f}", flush=True)
    return rows


if __name__ == "__main__": run(__file__)
