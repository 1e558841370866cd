"""Federated averaging with even and uneven clients, and what is read back from gradients by width, batch and noise.

    python -m benchmarks.federated

drift: four clients with 150 to 600 messages of Small World, even (all about everything) or uneven (lost things, trade, journeys, Chinese).
Small decoders, 240 local steps for each client in rounds of 1 to 60, Muon and AdamW inside. FedProx and a server with momentum, each with
the best of three strengths by the loss on validation messages (with a seed of its own); then three seeds, on test messages, nats a token.
reading: `rebuild_texts` on batches of 1 to 64 messages, by the width of an untrained decoder, and of four messages by noise; the share of
messages that come back word for word, over twenty batches.
flower: three clients trained by Flower (its simulation, each client in a process) and by `Federation`, from the same weights: the largest
difference of a weight, beside how far the weights have moved. Needs the package flwr, in an environment of its own.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.batches import Examples
from lmbook.federated import FederatedConfig, Federation, flower_app, rebuild_texts
from lmbook.perplexity import evaluate
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld
from lmbook.tokenization import WordTokenizer
from lmbook.training import next_token_loss
from lmbook.transformer import Transformer, TransformerConfig

BENCHMARK = Benchmark(packages=("torch", "numpy", "flwr"), seeds=3)
WORLD = SmallWorld()
KINDS = {"lost": "en", "trade": "en", "trip": "en", "Chinese": "zh"}
TODAY: dict[str, Any] = {"norm": "rms", "bias": False, "activation": "swiglu", "positions": "rotary", "init": "xavier_uniform"}


def collect(split: Any, n: int) -> dict[str, list[str]]:
    "So many messages of each kind."
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for story in WORLD.documents(split):
        for kind, lang in KINDS.items():
            if (lang == "zh" or story.genre == kind) and len(found[kind]) < n:
                found[kind] += [pair[lang == "zh"] for pair in story.sentences]
        if all(len(messages) >= n for messages in found.values()): break
    return {kind: messages[:n] for kind, messages in found.items()}


@BENCHMARK.part()
def drift(settings: Settings) -> dict[str, Any]:
    amounts = settings.pick((150, 300, 450, 600), (8, 10, 12, 14))
    own, steps = collect("train", max(amounts)), settings.pick(240, 4)
    uneven = [messages[:n] for messages, n in zip(own.values(), amounts)]
    mixed = [text for texts in uneven for text in texts]
    np.random.default_rng(0).shuffle(mixed)
    even = [mixed[sum(amounts[:k]) : sum(amounts[: k + 1])] for k in range(4)]
    judged = {split: [text for texts in collect(split, settings.pick(200, 5)).values() for text in texts] for split in ("valid", "test")}
    words = WordTokenizer.train([*mixed, *judged["valid"], *judged["test"]])

    def ends(parts: list[list[str]], seed: int, split: str, each: int, **how: Any) -> float:
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(words.vocab_size, settings.pick(64, 8), 2, 2, context_length=64, **TODAY))
        clients = {
            kind: Examples([words.encode(t, bos=True, eos=True) for t in texts], batch_size=min(16, len(texts)), seed=seed)
            for kind, texts in zip(KINDS, parts)
        }
        Federation(model, clients, FederatedConfig(steps // each, each, optimizer=muon_and_adamw, **how)).fit()
        score = evaluate(model, [words.encode(text, bos=True, eos=True) for text in judged[split]])
        return score.nats / score.tokens

    rows: dict[str, Any] = {}
    ways = {f"{name}, rounds of {each}": (parts, each, {}) for each in settings.pick((1, 20, 60), (1, 2))
            for name, parts in (("even", even), ("uneven", uneven))}  # fmt: skip
    usual = settings.pick(20, 2)
    for name, key, strengths in (("FedProx", "proximal", (0.001, 0.01, 0.1)), ("momentum", "server_momentum", (0.2, 0.4, 0.6))):
        best = min(strengths[: settings.pick(3, 1)], key=lambda s: ends(uneven, 9, "valid", usual, **{key: s}))
        ways[f"uneven, rounds of {usual}, {name}"] = (uneven, usual, {key: best})
    for name, (parts, each, how) in ways.items():
        rows[name] = mean_sd([ends(parts, seed, "test", each, **how) for seed in range(settings.seeds)]) | how
        print(f"  {name}: {rows[name]}", flush=True)
    return {"steps": steps, "nats a token": rows}


@BENCHMARK.part()
def reading(settings: Settings) -> dict[str, Any]:
    stories = list(WORLD.texts("train", n=settings.pick(300, 20)))
    messages = [part for story in stories for part in re.split(r"(?<=[.!?]) ", story)]
    words, batches = WordTokenizer.train(messages), settings.pick(20, 1)

    def share(width: int, size: int, noise: float = 0.0) -> float:
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(words.vocab_size, width, 2, 4, context_length=32, tie=False))
        dice, back = torch.Generator().manual_seed(0), 0
        for k in range(batches):
            ids = [words.encode(text, bos=True, eos=True) for text in messages[k * size : (k + 1) * size]]
            [batch] = Examples(ids, batch_size=size).read()
            model.zero_grad()
            total, count = next_token_loss(model, batch)
            (total / count).backward()
            sent = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            if noise: sent = {n: g + noise * g.square().mean().sqrt() * torch.randn(g.shape, generator=dice) for n, g in sent.items()}
            tries = ((1e-6, 1e-4), (1e-5, 1e-2), (1e-4, 1e-2), (1e-3, 0.05), (1e-2, 0.2)) if noise else ((1e-6, 1e-4),)
            found = [rebuild_texts(model, sent, tolerance=tolerance, within=within) for tolerance, within in tries]
            back += max(sum(row[:-1] in some for row in ids) for some in found)
        return back / (batches * size)

    widths = settings.pick((32, 64, 128, 256), (32,))
    by_batch = {str(w): {str(n): share(w, n) for n in settings.pick((1, 2, 4, 8, 16, 32, 64), (1, 2))} for w in widths}
    by_noise = {str(s): share(64, 4, s) for s in settings.pick((1e-5, 1e-4, 1e-3, 1e-2), (1e-4,))}
    return {"by width and batch": by_batch, "four messages, width 64, by noise": by_noise}


@BENCHMARK.part(needs=["flwr"])
def flower(settings: Settings) -> dict[str, Any]:
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp, strategy
    from flwr.simulation import run_simulation

    own = {kind: messages for kind, messages in collect("train", settings.pick(120, 12)).items() if kind != "Chinese"}
    words, rounds, momentum = WordTokenizer.train([text for texts in own.values() for text in texts]), settings.pick(5, 2), 0.5
    rows = {kind: [words.encode(t, bos=True, eos=True) for t in texts[: len(texts) // k]] for k, (kind, texts) in enumerate(own.items(), 1)}

    def make(server_momentum: float = 0.0) -> Federation:
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(words.vocab_size, 32, 1, 2, context_length=64, **TODAY))
        clients = {kind: Examples(ids, batch_size=4, seed=0) for kind, ids in rows.items()}
        return Federation(model, clients, FederatedConfig(rounds, 4, server_momentum=server_momentum))

    def state(federation: Federation) -> dict[str, Any]: return federation.model.state_dict()
    def apart(a: dict[str, Any], b: dict[str, Any]) -> float: return max((a[name] - b[name]).abs().max().item() for name in a)

    every: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": 3, "min_available_nodes": 3}
    found: dict[str, dict[str, float]] = {}
    for name, mine, theirs in (("FedAvg", make(), strategy.FedAvg(**every)),
                               ("FedAvgM", make(momentum), strategy.FedAvgM(**every, server_momentum=momentum))):  # fmt: skip
        mine.fit()
        got: dict[str, Any] = {}
        server = ServerApp()

        @server.main()
        def main(grid: Any, context: Any, theirs: Any = theirs, got: dict[str, Any] = got) -> None:
            got |= theirs.start(grid, ArrayRecord(state(make())), num_rounds=rounds).arrays.to_torch_state_dict()

        run_simulation(server, flower_app(make), num_supernodes=3, backend_config={"client_resources": {"num_cpus": 1}})
        found[name] = {"moved by": apart(state(mine), state(make())), "differs by": apart(state(mine), got)}
        print(f"  {name}: {found[name]}", flush=True)
    return {"clients": {kind: len(ids) for kind, ids in rows.items()}, "rounds": rounds, "strategies": found}


if __name__ == "__main__": run(__file__)
