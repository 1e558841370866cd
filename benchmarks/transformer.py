"""The Transformer beside `transformers`, beside an LSTM and n-grams, without its parts, and as a translator.

    python -m benchmarks.transformer --data DATA

Prints a table for each part and writes benchmarks/results/transformer.json after each. Without --data the part on Tatoeba is left out; `--only world,ablate` runs
some parts and keeps the others of the file; `--dry` runs everything at a tiny size and writes nothing.
speed: tokens a second of one training step (forward, loss, backward; no optimizer) and of a forward pass, against GPT2LMHeadModel and LlamaForCausalLM with the very
same weights, two threads; the two take turns, the ratio is the median of the rounds. world: Small World English, 3,000 stories three times, a Transformer and an LSTM of
equally many parameters, three seeds, and the best n-gram of the same stories: nats a word above the floor on 200 other stories. ablate: 500 stories, six times, one thing
changed at a time, two blocks, three seeds; every variant has about the parameters of the base; a table of
positions comes on top. tatoeba: real sentence pairs, English words to
Chinese characters, split by their English side as in benchmarks/seq2seq.py; chrF of NLTK on characters.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import best_of, machine, rounded
from lmbook.language_models import NGram, NGramConfig, choice_nats, dependencies, evaluate, floor
from lmbook.pretrained import save_pretrained
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.training import Examples, TrainConfig, Trainer, ablate
from lmbook.transformer import Transformer, TransformerConfig, count_parameters

RESULTS = Path(__file__).parent / "results" / "transformer.json"
SEEDS = (0, 1, 2)
TODAY = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "tie": False}
DRY = False


def spread(values: list[float]) -> list[float]:
    "Mean, least, most."
    return [statistics.fmean(values), min(values), max(values)]


def speed(_: Path | None) -> dict:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    out, rounds = {}, 2 if DRY else 7
    shapes = {"small, 8 x 128": ((256, 4, 4, 256), 8, 128), "wide, 2 x 512": ((512, 4, 8, 512), 2, 512)}
    kinds = {"gpt2": {"activation": "gelu_tanh"}, "llama": TODAY}
    for shape, ((d, layers, heads, context), B, T) in shapes.items():
        for layout, parts in kinds.items():
            torch.manual_seed(0)
            ours = Transformer(TransformerConfig(8000, d, layers, heads, context_length=context, **parts))
            with tempfile.TemporaryDirectory() as folder:
                save_pretrained(ours, folder, layout)
                theirs = AutoModelForCausalLM.from_pretrained(folder)
            ids = torch.randint(0, 8000, (B, T + 1))

            def logits(model, ids=ids): return model(ids[:, :-1]) if isinstance(model, Transformer) else model(ids[:, :-1], use_cache=False).logits

            def read(model, logits=logits):
                with torch.no_grad(): logits(model)

            def train(model, logits=logits, ids=ids):
                F.cross_entropy(logits(model).flatten(0, 1), ids[:, 1:].flatten()).backward()

            with torch.no_grad(): assert (logits(ours) - logits(theirs.eval())).abs().max() < 1e-3
            theirs.train()
            row = {}
            for what, work in (("forward", read), ("training", train)):
                times = {"ours": [], "theirs": []}
                for _ in range(rounds):
                    for name, model in (("ours", ours), ("theirs", theirs)): times[name].append(best_of(1 if DRY else 3, lambda w=work, m=model: w(m)))
                row[what] = {"tokens_per_second": B * T / min(times["ours"]), "theirs": B * T / min(times["theirs"]),
                             "ratio": statistics.median(b / a for a, b in zip(times["ours"], times["theirs"]))}
            out[f"{layout}, {shape}"] = row
            print(f"speed, {layout}, {shape}:", rounded(row, 3), flush=True)
    torch.set_num_threads(1)
    return out


class Stories:
    "Stories of Small World to learn from and to be judged by."

    def __init__(self, n: int):
        world = SmallWorld(SmallWorldConfig(limit=3))
        fresh, self.words = list(world.texts("test", n=200)), WordTokenizer.train(list(world.texts("train", n=3000)))
        self.rows, self.fresh = ([self.words.encode(t, bos=True, eos=True) for t in texts] for texts in (world.texts("train", n=n), fresh))
        self.V, self.ground = self.words.vocab_size, floor(world, fresh).nats
        self.pronouns = [p for p in dependencies(world, fresh) if p.kind == "pronoun" and p.distance >= 8]

    def excess(self, model) -> float:
        found = evaluate(model, self.fresh)
        return (found.nats - self.ground) / found.tokens

    def far(self, model) -> float: return float(choice_nats(model, self.pronouns, self.words).mean())

    def trained(self, make, seed: int, epochs: int, lr: float):
        torch.manual_seed(seed)
        model, start = make(), time.process_time()
        config = TrainConfig(epochs=epochs, lr=lr, schedule="wsd", warmup=20, seed=seed, device="cpu")
        Trainer(model, Examples(self.rows, batch_size=8, sort=10, seed=seed), config).fit()
        self.seconds = time.process_time() - start
        return model


def world(_: Path | None) -> dict:
    data = Stories(300 if DRY else 3000)
    free = TransformerConfig(data.V, 64, 2, 4, d_ff=83, context_length=256, **TODAY)
    tied = replace(free, tie=True, d_ff=134)
    lstm = lambda: RecurrentLM(RecurrentLMConfig(data.V, 96, 96))  # noqa: E731
    out: dict = {"stories": len(data.rows), "tokens": sum(map(len, data.rows)), "epochs": 3}
    counted = {order: NGram.fit(data.rows, data.V, NGramConfig(order)) for order in range(4, 9)}
    best = min(counted, key=lambda order: data.excess(counted[order]))
    out[f"{best}-gram"] = {"excess": data.excess(counted[best]), "far": data.far(counted[best])}
    for name, make, lr in (("LSTM", lstm, .01), ("Transformer", lambda: Transformer(free), .008), ("Transformer, tied", lambda: Transformer(tied), .008)):
        runs = []
        for seed in SEEDS[: 1 if DRY else 3]:
            model = data.trained(make, seed, 3, lr)
            runs.append({"excess": data.excess(model), "far": data.far(model), "seconds": data.seconds})
            print("world:", name, seed, rounded(runs[-1], 3), flush=True)
        out[name] = {"parameters": sum(p.numel() for p in model.parameters()), "lr": lr, **{k: [run[k] for run in runs] for k in runs[0]}}
    print("world:", rounded(out, 3), flush=True)
    return out


def variants(V: int) -> tuple[TransformerConfig, dict[str, dict]]:
    "What is changed, one thing at a time. Where that changes the number of parameters the width of the MLP makes up for it."
    base = TransformerConfig(V, 44, 2, 2, d_ff=40, context_length=256, **TODAY)
    changes = {
        "tied": {"tie": True, "d_model": 48, "heads": 3, "d_ff": 68}, "LayerNorm": {"norm": "layer"}, "norm last": {"norm_first": False}, "no norm": {"norm": "none"},
        "no residual": {"residual": False}, "learned positions": {"positions": "learned"}, "sinusoidal positions": {"positions": "sinusoidal"}, "ALiBi": {"positions": "alibi"},
        "no positions": {"positions": "none"}, "GELU": {"activation": "gelu", "d_ff": 60}, "one block, wide": {"layers": 1, "d_ff": 139},
        "four blocks, narrow": {"layers": 4, "d_model": 32, "d_ff": 44}, "one key head": {"kv_heads": 1, "d_ff": 55}, "hardly an MLP": {"d_ff": 1, "d_head": 36},
    }  # fmt: skip
    return base, changes


def parts(_: Path | None) -> dict:
    data = Stories(250 if DRY else 500)
    base, changes = variants(data.V)
    if DRY: changes = dict(list(changes.items())[:2])

    def run(config: TransformerConfig, seed: int) -> float:
        found = data.excess(data.trained(lambda: Transformer(config), seed, 1 if DRY else 6, .008))
        print("ablate:", config.layers, config.norm, config.norm_first, config.positions, config.residual, seed, round(found, 3), flush=True)
        return found

    table = ablate(base, changes, run, SEEDS[: 1 if DRY else 3])
    print(table)
    sizes = {"base": count_parameters(base), **{name: count_parameters(replace(base, **change)) for name, change in changes.items()}}
    return {"stories": len(data.rows), "epochs": 6, "lr": .008, "columns": list(table.columns), "rows": {k: list(v) for k, v in table.rows.items()}, "parameters": sizes}


def tatoeba(data: Path | None) -> dict:
    from nltk.translate.chrf_score import corpus_chrf

    from benchmarks.seq2seq import UNITS, WORD, encoded, nats, number

    [path] = (data / "tatoeba_en_zh").glob("*.t*")
    by_english: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        english, chinese = line.split("\t")[:2]
        by_english.setdefault(english, []).append(chinese)
    names = sorted(by_english)
    np.random.default_rng(0).shuffle(names)
    fresh, known = names[:1500], names[1500:]
    cut = lambda text: WORD.findall(text.lower())  # noqa: E731
    pairs = [(cut(e), list(z)) for e in known for z in by_english[e] if len(cut(e)) and len(z) <= 40]
    count: dict = {}
    for a, b in pairs:
        for side, units in (("s", a), ("t", b)):
            for unit in units: count[side, unit] = count.get((side, unit), 0) + 1
    source, target = (number(sorted(u for (s, u), n in count.items() if s == side and n >= 3)) for side in "st")
    rows, runs = encoded(pairs, source, target), []
    tests = [(cut(e), by_english[e]) for e in fresh if cut(e) and len(by_english[e][0]) <= 40]
    units, steps = [*UNITS, *list(target)[4:]], 20 if DRY else 800
    config = TransformerConfig(len(target), 96, 2, 4, kind="encoder-decoder", source_vocab=len(source), context_length=64, dropout=.1, **TODAY)
    edges = ((1, 4), (5, 6), (7, 8), (9, 11), (12, 40))
    for seed in SEEDS[: 1 if DRY else 2]:
        torch.manual_seed(seed)
        model = Transformer(config)
        Trainer(model, Examples(rows, batch_size=48, join=False, sort=10, seed=seed), TrainConfig(steps=steps, lr=3e-3, warmup=50, schedule="wsd", seed=seed, device="cpu")).fit()
        model.eval()
        run = {}
        for low, high in edges:
            some = [t for t in tests if low <= len(t[0]) <= high]
            ids = encoded([(a, list(b[0])) for a, b in some], source, target)
            said = ["".join(units[i] for i in row if i >= 4) or "?" for row in greedy(model, [a for a, _ in ids], 45)]
            best = [max(refs, key=lambda r, s=s: corpus_chrf([list(r)], [list(s)], min_len=1, max_len=2)) for s, (_, refs) in zip(said, some)]
            chrf = corpus_chrf([list(b) for b in best], [list(s) for s in said], min_len=1, max_len=2)
            run[f"{low}-{high}"] = [nats(model, ids), chrf, float(np.mean([s in refs for s, (_, refs) in zip(said, some)])), len(some)]
        runs.append(run)
        print("tatoeba:", rounded(run, 3), flush=True)
    out = {k: {name: spread([run[k][i] for run in runs]) for i, name in enumerate(("nats", "chrf", "exact"))} | {"pairs": runs[0][k][3]} for k in runs[0]}
    return {"steps": steps, "training_pairs": len(pairs), "vocabularies": [len(source), len(target)], "parameters": count_parameters(config), "by_words": out}


@torch.no_grad()
def greedy(model: Transformer, sources: list, longest: int) -> list[list[int]]:
    "What scores highest, again and again, each row until its <eos> (2)."
    source = torch.zeros(len(sources), max(map(len, sources)), dtype=torch.long)
    for row, ids in zip(source, sources): row[: len(ids)] = torch.as_tensor(ids)
    there = torch.arange(source.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]
    memory, ids = model.encode(source, there.long()), torch.ones(len(sources), 1, dtype=torch.long)
    while ids.shape[1] <= longest and not (ids == 2).any(1).all(): ids = torch.cat([ids, model.score(model.hidden(ids, memory=memory)[:, -1:]).argmax(-1)], 1)
    return [row[1 : row.index(2)] if 2 in row else row[1:] for row in ids.tolist()]


PARTS = {"speed": speed, "world": world, "ablate": parts, "tatoeba": tatoeba}


def main() -> None:
    global DRY
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of real data sets; without it Tatoeba is left out")
    parser.add_argument("--only", help="parts to run, separated by commas; the others stay as they are in the file")
    parser.add_argument("--dry", action="store_true", help="tiny sizes; nothing is written")
    options = parser.parse_args()
    DRY = options.dry
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if options.only and RESULTS.exists() else {}
    for name in options.only.split(",") if options.only else PARTS:
        if name == "tatoeba" and options.data is None:
            print("tatoeba: left out, give --data")
            continue
        start, made = time.perf_counter(), machine("torch", "numpy", "transformers")
        results[name] = rounded(PARTS[name](options.data)) | {"seconds": round(time.perf_counter() - start), "load_before": made["load_before"]}
        results |= {"command": "python -m benchmarks.transformer --data DATA", "date": datetime.date.today().isoformat(), "machine": made}
        if not DRY: RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not DRY: print(f"{RESULTS.name} written", file=sys.stderr)


if __name__ == "__main__": main()
