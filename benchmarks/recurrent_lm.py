"""Recurrent language models above the entropy floor of Small World: cells, carrying the state, where dropout may go, and what it costs.

    python -m benchmarks.recurrent_lm

Floor: 5,000 stories in English (the LSTM also in Chinese), two passes; LSTM, GRU and RNN with as nearly as possible the same number of
parameters, three seeds each, the rate (which stays up and falls at the end, "wsd") of each cell chosen on 1,000 stories with a seed that is
not used again; the n-grams read the same text.
Windows: the same stories as one row, read in windows of T words and 160 / T rows, so that all runs see the same words in as many steps;
each is judged on stories from a state of zeros, and on all of them as one text with the state carried.
Dropout: 150 stories, eight passes, and sentences whose last word depends on the first; step by step, since masks change from word to word.
Cost: a step of training, each in turns with the step it is compared with, in one process; and the bare loop in the form of PyTorch's own
example (words of ours), whose weights must end equal to those of the Trainer. No data set is needed, so there is no --data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, in_turns, mean, medians, run
from lmbook.batches import Batch, Examples, TokenStream
from lmbook.language_models import NGram, NGramConfig
from lmbook.perplexity import Evaluation, choice_nats, dependencies, evaluate, floor
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig, States, same_mask
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer

EDGES, EPOCHS = (2, 4, 6, 8, 12, 20, 100), 2
BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3, options=[Option("stories", 5000, 12, "that the models read")])


class World:
    "Stories to learn from and to be judged on, as ids, with the floor under them."

    def __init__(self, stories: int, settings: Settings, lang: str = "en", split: str = "test"):
        self.world, self.lang = SmallWorld(SmallWorldConfig(limit=3)), lang
        self.fresh = list(self.world.texts(split, lang, n=settings.pick(200, 10)))
        cut = "words" if lang == "en" else "characters"
        self.tokenizer = WordTokenizer.train(list(self.world.texts("train", lang, n=settings.pick(3000, 60))), split=cut)
        def encoded(texts): return [self.tokenizer.encode(text, bos=True, eos=True) for text in texts]

        self.rows, self.fresh_rows = encoded(self.world.texts("train", lang, n=stories)), encoded(self.fresh)
        self.orders = settings.pick(range(3, 10 if lang == "en" else 13), range(3, 5))
        self.warmup = settings.pick(20, 1)
        self.ids, self.ground = np.concatenate(self.rows), floor(self.world, self.fresh, lang)

    def excess(self, found: Evaluation) -> dict[str, float]:
        more = found.nats - self.ground.nats
        return {"per_token": more / found.tokens, "per_story": more / found.documents}

    def excess_both(self, model: RecurrentLM) -> tuple[float, float]:
        "Above the floor, per word: each story from zeros, and all of them as one text with the state carried (where <bos> is not counted)."
        joined, apart = np.concatenate(self.fresh_rows), evaluate(model, self.fresh_rows)
        counts = joined[1:] != self.tokenizer.bos_id
        carried = evaluate(model, [joined]).token_nats[0][counts]
        return self.excess(apart)["per_token"], (carried.sum() - self.ground.nats) / counts.sum()

    def best_ngram(self) -> dict[str, Any]:
        tried = {order: evaluate(self.ngram(order), self.fresh_rows) for order in self.orders}
        order = min(tried, key=lambda o: tried[o].nats)
        return {"order": order, **self.excess(tried[order])}

    def ngram(self, order: int) -> NGram: return NGram.fit(self.rows, self.tokenizer.vocab_size, NGramConfig(order))


def width_for(parameters: int, vocab_size: int, cell: str) -> int:
    "The width at which a tied model of one layer has about so many parameters."
    def size(d: int) -> int: return sum(p.numel() for p in RecurrentLM(RecurrentLMConfig(vocab_size, d, d, cell=cell)).parameters())

    return min(range(32, 300), key=lambda d: abs(size(d) - parameters))


def train(data: World, config: RecurrentLMConfig, seed: int, lr: float, epochs: int) -> tuple[RecurrentLM, float]:
    torch.manual_seed(seed)
    model = RecurrentLM(config)
    start = time.perf_counter()
    training = TrainConfig(epochs=epochs, lr=lr, schedule="wsd", warmup=data.warmup, seed=seed, device="cpu")
    Trainer(model, Examples(data.rows, batch_size=8, sort=10, seed=seed), training, loss=CarriedState()).fit()
    return model, time.perf_counter() - start


def by_distance(data: World, model: Any) -> dict[str, Any]:
    "What choosing between she and he costs, by how far back it was decided; and the other choices."
    places = dependencies(data.world, data.fresh)
    nats, kind, far = choice_nats(model, places, data.tokenizer), np.array([p.kind for p in places]), np.array([p.distance for p in places])
    near = [(kind == "pronoun") & (far >= low) & (far < high) for low, high in zip(EDGES, EDGES[1:])]
    return {"pronoun": [mean(nats[here]) for here in near], "places": [int(here.sum()) for here in near],
            "middle": [int(np.median(far[here])) if here.any() else None for here in near],
            "agreement": mean(nats[kind == "agreement"]), "hidden thing": mean(nats[kind == "place"])}


@BENCHMARK.part()
def ngram(settings: Settings) -> dict[str, Any]:
    data = World(settings.stories, settings)
    found = data.best_ngram()
    return {"stories": settings.stories, "tokens": len(data.ids), "epochs": EPOCHS, "vocabulary": data.tokenizer.vocab_size,
            "fresh_stories": len(data.fresh), "floor_per_token": data.ground.nats / sum(len(r) - 1 for r in data.fresh_rows),
            "floor_per_story": data.ground.nats / len(data.fresh),
            "ngram": found | {"by_distance": by_distance(data, data.ngram(found["order"]))}}


def one_cell(cell: str, settings: Settings) -> dict[str, Any]:
    data, small = World(settings.stories, settings), World(settings.pick(1000, 10), settings, split="valid")
    V = data.tokenizer.vocab_size
    d = width_for(sum(p.numel() for p in RecurrentLM(RecurrentLMConfig(V, 96, 96)).parameters()), V, cell)
    config = RecurrentLMConfig(V, d, d, cell=cell)

    def excess(lr: float) -> float: return small.excess(evaluate(train(small, config, 99, lr, EPOCHS)[0], small.fresh_rows))["per_token"]

    grid = {lr: excess(lr) for lr in settings.pick((5e-3, 1e-2, 2e-2), (5e-3, 1e-2))}
    lr = min(grid, key=grid.get)
    runs = [train(data, config, seed, lr, EPOCHS) for seed in range(settings.seeds)]
    found = [data.excess(evaluate(model, data.fresh_rows)) for model, _ in runs]
    return {"width": d, "parameters": sum(p.numel() for p in runs[0][0].parameters()), "lr": lr,
            "rates_tried": {str(k): v for k, v in grid.items()},
            "per_token": [f["per_token"] for f in found], "per_story": [f["per_story"] for f in found],
            "seconds": [s for _, s in runs], "by_distance": [by_distance(data, model) for model, _ in runs]}


for cell in ("rnn", "gru", "lstm"): BENCHMARK.part(cell)(partial(one_cell, cell))


@BENCHMARK.part()
def chinese(settings: Settings) -> dict[str, Any]:
    data, lr = World(settings.stories, settings, "zh"), 1e-2
    config = RecurrentLMConfig(data.tokenizer.vocab_size, 96, 96)
    models = [train(data, config, seed, lr, EPOCHS)[0] for seed in range(settings.seeds)]
    found = [data.excess(evaluate(model, data.fresh_rows)) for model in models]
    return {"tokens": len(data.ids), "vocabulary": data.tokenizer.vocab_size, "lr": lr, "ngram": data.best_ngram(),
            "lstm": {"per_token": [r["per_token"] for r in found], "per_story": [r["per_story"] for r in found]}}


def always_carry(batch: Batch) -> Batch:
    batch.carry = True
    return batch


@BENCHMARK.part()
def windows(settings: Settings) -> dict[str, Any]:
    data, out = World(settings.pick(500, 8), settings), {}
    for T in (4, 8, 16, 32):
        B = 160 // T
        whole = (len(data.ids) - 1) // 160 * 160
        ids = data.ids[: whole + 1]  # whole batches, or the last shuffled one would have fewer rows than the state
        for way in ("contiguous, carried", "shuffled, from zero", "shuffled, carried"):
            found = []
            for seed in range(settings.seeds):
                torch.manual_seed(seed)
                model = RecurrentLM(RecurrentLMConfig(data.tokenizer.vocab_size, 64, 64))
                batches = TokenStream(ids, B, T, contiguous=way.startswith("contiguous"), seed=seed)
                if way == "shuffled, carried": batches = batches.map(always_carry)
                config = TrainConfig(epochs=1, lr=2e-2, warmup=data.warmup, seed=seed, device="cpu")
                Trainer(model, batches, config, loss=CarriedState()).fit()
                found.append(data.excess_both(model))
            for judged, values in zip(("from zero", "carried"), zip(*found)):
                out.setdefault(f"{way}; judged {judged}", {})[str(T)] = [float(x) for x in values]
    return {"excess_per_token": out}


class StepByStep(RecurrentLM):
    "One layer, read word by word, so that something may be silenced on the way from state to state."

    def __init__(self, config: RecurrentLMConfig, where: str, share: float):
        super().__init__(config)
        self.where, self.share = where, share

    def features(self, ids: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        if not self.training: return super().features(ids, states)
        rnn, x = self.layers[0].rnn, self.embed(ids)
        h, c = x.new_zeros(2, len(ids), rnn.hidden_size) if states is None else (part[0] for part in states[0])
        from_x, W, out = F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0 + rnn.bias_hh_l0), rnn.weight_hh_l0, []
        if self.where == "weights": W = F.dropout(W, self.share)
        mask = F.dropout(torch.ones_like(h), self.share)
        for part in from_x.unbind(1):
            if self.where == "h, new at each word": h = F.dropout(h, self.share)
            if self.where == "c, new at each word": c = F.dropout(c, self.share)
            if self.where == "h, one for the row": h = h * mask
            i, f, g, o = (part + h @ W.T).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return same_mask(torch.stack(out, 1), self.config.dropout_out), ((h[None], c[None]),)


WHERE = ("nothing", "c, new at each word", "h, new at each word", "h, one for the row", "weights")


@BENCHMARK.part("dropout")
def recurrent_dropout(settings: Settings) -> dict[str, Any]:
    "On stories, and on a language that is nothing but memory: a name, eight words drawn at random, and the pronoun of the name."
    n_stories, n_sentences = settings.pick((150, 2000), (6, 40))
    data, out = World(n_stories, settings), {"share": .25, "stories": n_stories, "per_token": {}, "between": 8, "pronoun": {}}
    dice = np.random.default_rng(0)
    n = n_sentences * 5 // 4
    who, fill = dice.integers(2, size=(n, 1)), dice.integers(4, 12, size=(n, 8))
    sentences = np.hstack([who, fill, who + 2])
    for where in WHERE:
        for kind in ("per_token", "pronoun"): out[kind][where] = []
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            model = StepByStep(RecurrentLMConfig(data.tokenizer.vocab_size, 64, 64), where, .25)
            config = TrainConfig(epochs=settings.pick(8, 1), lr=2e-2, warmup=data.warmup, seed=seed, device="cpu")
            Trainer(model, TokenStream(data.ids, 10, 32, contiguous=True), config, loss=CarriedState()).fit()
            out["per_token"][where].append(data.excess(evaluate(model, data.fresh_rows))["per_token"])
            torch.manual_seed(seed)
            model = StepByStep(RecurrentLMConfig(12, 32, 32), where, .25)
            config = TrainConfig(epochs=settings.pick(6, 1), lr=1e-2, warmup=data.warmup, seed=seed, device="cpu")
            Trainer(model, Examples(sentences[:n_sentences], batch_size=16, seed=seed), config, loss=CarriedState()).fit()
            last = [nats[-1] for nats in evaluate(model, list(sentences[n_sentences:])).token_nats]
            out["pronoun"][where].append(float(np.mean(last)))
    return out


def milliseconds(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    return {name: 1000 * t for name, t in medians(in_turns(ways, rounds)).items()}


@BENCHMARK.part()
def cost(settings: Settings) -> dict[str, list]:
    small, large = (303, 96), settings.pick((10_000, 200), (303, 96))
    return {"step": [step_cost(*small, 1, settings.pick(20, 1)), step_cost(*large, 2, settings.pick(20, 1))],
            "loop": [loops(*small, settings.pick(15, 2)), loops(*large, settings.pick(15, 2))]}


def step_cost(V: int, d: int, n_layer: int, rounds: int, B: int = 20, T: int = 35) -> dict[str, Any]:
    "Forward and backward: two stacked nn.LSTM calls, against ours with each dropout."
    torch.manual_seed(0)
    ids, targets = torch.randint(V, (2, B, T))
    embed, rnn, out = nn.Embedding(V, d), nn.LSTM(d, d, n_layer, batch_first=True), nn.Linear(d, V)
    out.weight = embed.weight

    def bare() -> None: F.cross_entropy(out(rnn(embed(ids))[0]).flatten(0, 1), targets.flatten(), reduction="sum").backward()

    def ours(**dropouts: float) -> Callable[[], None]:
        model, loss = RecurrentLM(RecurrentLMConfig(V, d, d, n_layer, **dropouts)), CarriedState()
        return lambda: loss(model, Batch(ids, targets))[0].backward()

    between = {"dropout_hidden": .2} if n_layer > 1 else {}
    variational = {"dropout_in": .2, "dropout_out": .2, **between}
    ms = milliseconds({"plain nn.LSTM": bare, "ours": ours(), "variational": ours(**variational), "words": ours(dropout_words=.1),
                       "weight drop": ours(weight_drop=.5), "all": ours(dropout_words=.1, weight_drop=.5, **variational)}, rounds)
    return {"vocabulary": V, "width": d, "layers": n_layer, "B": B, "T": T,
            "ms": ms, "ratio": {name: t / ms["plain nn.LSTM"] for name, t in ms.items()}}


def loops(V: int, d: int, turns: int, B: int = 20, T: int = 35, steps: int = 4) -> dict[str, Any]:
    "Training, a few steps of the one and a few of the other: nn.LSTM in a bare loop, and RecurrentLM with CarriedState in the Trainer."
    torch.manual_seed(0)
    ids = torch.randint(V, (B * T * turns * steps + 1,)).numpy()
    stream, lr, clip = TokenStream(ids, B, T, contiguous=True), 1., .25
    model = RecurrentLM(RecurrentLMConfig(V, d, d, 2))
    embed, rnn, out = nn.Embedding(V, d), nn.LSTM(d, d, 2, batch_first=True), nn.Linear(d, V)
    out.weight = embed.weight
    with torch.no_grad():
        embed.weight.copy_(model.embed.weight)
        out.bias.zero_()
        for i, layer in enumerate(model.layers):
            for name, p in layer.rnn.named_parameters(): getattr(rnn, name.replace("l0", f"l{i}")).copy_(p)
    params, criterion = [*embed.parameters(), *rnn.parameters(), out.bias], nn.NLLLoss()
    rows = ids[:-1].reshape(B, -1), ids[1:].reshape(B, -1)
    at, hidden = 0, None

    def bare() -> None:  # a step of the example: batch, detached state, log-softmax over all words, mean loss, clip, plain descent
        nonlocal at, hidden
        for _ in range(steps):
            x, y = (torch.from_numpy(r[:, at : at + T].copy()) for r in rows)
            hidden = tuple(h.detach() for h in hidden) if hidden else None
            for p in params: p.grad = None
            states, hidden = rnn(embed(x), hidden)
            criterion(F.log_softmax(out(states).view(-1, V), dim=1), y.reshape(-1)).backward()
            nn.utils.clip_grad_norm_(params, clip)
            with torch.no_grad():
                for p in params: p.add_(p.grad, alpha=-lr)
            at += T

    config = TrainConfig(steps=turns * steps, lr=lr, optimizer="sgd", schedule="constant", clip=clip, log_every=10, device="cpu")
    trainer = Trainer(model, stream, config, loss=CarriedState())
    batches = trainer._stream()
    trainer.model.train()

    def ours() -> None:
        for _ in range(steps): trainer._update(batches)

    ms = milliseconds({"bare": bare, "ours": ours}, turns - 1)  # and a first turn to warm up
    pairs = ((embed.weight, model.embed.weight), (rnn.weight_hh_l1, model.layers[1].rnn.weight_hh_l0))
    apart = max((a - b).abs().max().item() for a, b in pairs)
    assert apart < 1e-4, apart
    speed = {name: B * T * steps / t * 1000 for name, t in ms.items()}
    return {"vocabulary": V, "width": d, "layers": 2, "B": B, "T": T, "tokens_per_s": speed, "ratio": speed["ours"] / speed["bare"],
            "weights_apart": apart}


if __name__ == "__main__": run(__file__)
