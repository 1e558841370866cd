"""The Transformer beside `transformers`, beside an LSTM and n-grams, without its parts, and as a translator.

    python -m benchmarks.transformer --data DATA

Without --data the part on Tatoeba is left out.
speed: tokens a second of one training step (forward, loss, backward; no optimizer) and of a forward pass, against GPT2LMHeadModel and
LlamaForCausalLM with the very same weights, two threads; the two take turns, the ratio is the median of the rounds. world: Small World
English, 3,000 stories three times, a Transformer and an LSTM of equally many parameters, three seeds, and the best n-gram of the same
stories: nats a word above the floor on 200 other stories. ablate: 500 stories, six times, one thing changed at a time, two blocks, three
seeds; every variant has about the parameters of the base; a table of positions comes on top. tatoeba: real sentence pairs, English words to
Chinese characters, split by their English side as in benchmarks/seq2seq.py; chrF of NLTK on characters.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import Benchmark, Settings, in_turns, ratio, run
from benchmarks.seq2seq import Pairs, nats
from lmbook.batches import Examples
from lmbook.experiments import ablate
from lmbook.language_models import NGram, NGramConfig
from lmbook.perplexity import choice_nats, dependencies, evaluate, floor
from lmbook.pretrained import save_pretrained
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig, count_parameters

TODAY = {"norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False, "tie": False}
BENCHMARK = Benchmark(packages=("torch", "numpy", "transformers"), seeds=3)


@BENCHMARK.part(needs=["transformers"])
def speed(settings: Settings) -> dict:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings.pick(2, 1))
    out = {}
    shapes = {"small, 8 x 128": ((256, 4, 4, 256), 8, 128), "wide, 2 x 512": ((512, 4, 8, 512), 2, 512)}
    if settings.dry: shapes = {name: ((16, 1, 2, 16), 2, 8) for name in shapes}
    for shape, ((d, n_layer, n_head, context), B, T) in shapes.items():
        for layout, parts in {"gpt2": {"activation": "gelu_tanh"}, "llama": TODAY}.items():
            torch.manual_seed(0)
            ours = Transformer(TransformerConfig(settings.pick(8000, 100), d, n_layer, n_head, context_length=context, **parts))
            with tempfile.TemporaryDirectory() as folder:
                save_pretrained(ours, folder, layout)
                theirs = AutoModelForCausalLM.from_pretrained(folder)
            ids = torch.randint(0, settings.pick(8000, 100), (B, T + 1))

            def logits(model, ids=ids):
                return model(ids[:, :-1]) if isinstance(model, Transformer) else model(ids[:, :-1], use_cache=False).logits

            def read(model, logits=logits):
                with torch.no_grad(): logits(model)

            def train(model, logits=logits, ids=ids):
                F.cross_entropy(logits(model).flatten(0, 1), ids[:, 1:].flatten()).backward()

            with torch.no_grad(): assert (logits(ours) - logits(theirs.eval())).abs().max() < 1e-3
            theirs.train()
            row = {}
            for what, work in (("forward", read), ("training", train)):
                times = in_turns({"ours": partial(work, ours), "theirs": partial(work, theirs)}, settings.pick(21, 1))
                row[what] = {"tokens_per_second": B * T / min(times["ours"]), "theirs": B * T / min(times["theirs"]),
                             "ratio": ratio(times["theirs"], times["ours"])}
            out[f"{layout}, {shape}"] = row
            print(f"  {layout}, {shape}: {row['training']['ratio']:.2f} times transformers' speed in training", flush=True)
    return out


class Stories:
    "Stories of Small World to learn from and to be judged by."

    def __init__(self, n: int, settings: Settings):
        world = SmallWorld(SmallWorldConfig(limit=3))
        fresh = list(world.texts("test", n=settings.pick(200, 10)))
        self.words = WordTokenizer.train(list(world.texts("train", n=settings.pick(3000, 60))))
        self.rows, self.fresh = ([self.words.encode(t, bos=True, eos=True) for t in texts] for texts in (world.texts("train", n=n), fresh))
        self.warmup = settings.pick(20, 1)
        self.V, self.ground = self.words.vocab_size, floor(world, fresh).nats
        self.pronouns = [p for p in dependencies(world, fresh) if p.kind == "pronoun" and p.distance >= 8]

    def excess(self, model) -> float:
        found = evaluate(model, self.fresh)
        return (found.nats - self.ground) / found.tokens

    def far(self, model) -> float: return float(choice_nats(model, self.pronouns, self.words).mean())

    def trained(self, make, seed: int, epochs: int, lr: float):
        torch.manual_seed(seed)
        model, start = make(), time.process_time()
        config = TrainConfig(epochs=epochs, lr=lr, schedule="wsd", warmup=self.warmup, seed=seed, device="cpu")
        Trainer(model, Examples(self.rows, batch_size=8, sort=10, seed=seed), config).fit()
        self.seconds = time.process_time() - start
        return model


@BENCHMARK.part()
def world(settings: Settings) -> dict:
    data, epochs = Stories(settings.pick(3000, 16), settings), settings.pick(3, 1)
    free = TransformerConfig(data.V, 64, 2, 4, d_ff=83, context_length=256, **TODAY)
    tied = replace(free, tie=True, d_ff=134)
    out: dict = {"stories": len(data.rows), "tokens": sum(map(len, data.rows)), "epochs": epochs}
    counted = {order: NGram.fit(data.rows, data.V, NGramConfig(order)) for order in range(4, settings.pick(9, 7))}
    best = min(counted, key=lambda order: data.excess(counted[order]))
    out[f"{best}-gram"] = {"excess": data.excess(counted[best]), "far": data.far(counted[best])}
    for name, make, lr in (("LSTM", lambda: RecurrentLM(RecurrentLMConfig(data.V, 96, 96)), .01),
                           ("Transformer", lambda: Transformer(free), .008), ("Transformer, tied", lambda: Transformer(tied), .008)):
        runs = []
        for seed in range(settings.seeds):
            model = data.trained(make, seed, epochs, lr)
            runs.append({"excess": data.excess(model), "far": data.far(model), "seconds": data.seconds})
            print(f"  {name}, seed {seed}: {runs[-1]['excess']:.3f} nats above the floor", flush=True)
        out[name] = {"parameters": sum(p.numel() for p in model.parameters()), "lr": lr, **{k: [run[k] for run in runs] for k in runs[0]}}
    return out


def variants(V: int) -> tuple[TransformerConfig, dict[str, dict]]:
    "What is changed, one thing at a time. Where that changes the number of parameters the width of the MLP makes up for it."
    base = TransformerConfig(V, 44, 2, 2, d_ff=40, context_length=256, **TODAY)
    changes = {
        "tied": {"tie": True, "d_model": 48, "n_head": 3, "d_ff": 68}, "LayerNorm": {"norm": "layer"}, "norm last": {"norm_first": False},
        "no norm": {"norm": "none"}, "no residual": {"residual": False}, "learned positions": {"positions": "learned"},
        "sinusoidal positions": {"positions": "sinusoidal"}, "ALiBi": {"positions": "alibi"}, "no positions": {"positions": "none"},
        "GELU": {"activation": "gelu", "d_ff": 60}, "one block, wide": {"n_layer": 1, "d_ff": 139},
        "four blocks, narrow": {"n_layer": 4, "d_model": 32, "d_ff": 44}, "one key head": {"n_kv_head": 1, "d_ff": 55},
        "hardly an MLP": {"d_ff": 1, "d_head": 36},
    }  # fmt: skip
    return base, changes


@BENCHMARK.part("ablate")
def ablations(settings: Settings) -> dict:
    data, epochs = Stories(settings.pick(500, 16), settings), settings.pick(6, 1)
    base, changes = variants(data.V)

    def trained(config: TransformerConfig, seed: int) -> float:
        return data.excess(data.trained(lambda: Transformer(config), seed, epochs, .008))

    table = ablate(base, changes, trained, range(settings.seeds))
    sizes = {"base": count_parameters(base), **{name: count_parameters(replace(base, **change)) for name, change in changes.items()}}
    return {"stories": len(data.rows), "epochs": epochs, "lr": .008, "columns": list(table.columns),
            "rows": {k: list(v) for k, v in table.rows.items()}, "parameters": sizes}


@torch.no_grad()
def greedy(model: Transformer, sources: list, longest: int) -> list[list[int]]:
    "What scores highest, again and again, each row until its <eos> (2)."
    source = torch.zeros(len(sources), max(map(len, sources)), dtype=torch.long)
    for row, ids in zip(source, sources): row[: len(ids)] = torch.as_tensor(ids)
    there = torch.arange(source.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]
    memory, ids = model.encode(source, there.long()), torch.ones(len(sources), 1, dtype=torch.long)
    while ids.shape[1] <= longest and not (ids == 2).any(1).all():
        ids = torch.cat([ids, model.score(model.hidden(ids, memory=memory)[:, -1:]).argmax(-1)], 1)
    return [row[1 : row.index(2)] if 2 in row else row[1:] for row in ids.tolist()]


@BENCHMARK.part(data=["tatoeba_en_zh"], needs=["nltk"])
def tatoeba(settings: Settings) -> dict:
    pairs, steps, runs = Pairs.read(settings.folder("tatoeba_en_zh"), settings.pick(1500, 30)), settings.pick(800, 2), []
    config = TransformerConfig(len(pairs.target), 96, 2, 4, kind="encoder-decoder", source_vocab=len(pairs.source), context_length=64,
                               dropout=.1, **TODAY)
    for seed in range(min(2, settings.seeds)):
        torch.manual_seed(seed)
        model = Transformer(config)
        training = TrainConfig(steps=steps, lr=3e-3, warmup=min(50, steps - 1), schedule="wsd", seed=seed, device="cpu")
        Trainer(model, Examples(pairs.rows, batch_size=48, join=False, sort=10, seed=seed), training).fit()
        model.eval()
        runs.append(pairs.judged(lambda ids: greedy(model, [a for a, _ in ids], 45), partial(nats, model)))  # noqa: B023
        print(f"  seed {seed}", runs[-1], flush=True)
    return pairs.summary(runs, steps, count_parameters(config))


if __name__ == "__main__": run(__file__)
