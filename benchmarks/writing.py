"""A writing aid: gaps filled by a model that learned it, by one that rereads, by the best possible one; and keys saved in Shakespeare.

    python -m benchmarks.writing --data ../shared/data

filling: decoders of Small World (limit=2, names=2, no small talk), `--seeds` of each. Of the texts that they read, a share (0, 0.5, 0.9) is
rearranged so that one sentence from the middle stands at the end (Bavarian et al. 2022); all else is equal: steps, texts, order, sizes. For
each: the loss of new stories from left to right, in nats a story above the floor, after a third of the steps (a training of its own) and
after all; and, after all, of 200 gaps of one sentence in new stories, the share filled with the very sentence (exact) and the share filled
so that the story is possible at all. Ways to fill: greedy, and by beam search (4), with both sides before the model; or drawing 1, 4, 16
sentences from the left side alone, and taking the one with which the whole text is likeliest. `tokens` are those that the model computed
for a gap, each counted as often as it was computed. `best` is what the grammar itself would choose: of all sentences that occur in 20,000
stories, the one with which the story is likeliest; no way to fill is exact more often on average.
keys: a decoder of Shakespeare (BPE with 1,024 tokens, from the first nine tenths), n-grams of its words (modified Kneser-Ney), and their
frequencies. Passages from the last tenth are typed by a perfect user with 1 or 3 suggestions; `saved` is the share of the characters that
need no key of their own. `thresholds`: one suggestion, shown only where its probability is at least so high.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Option, Settings, mean_sd, run
from lmbook.batches import Examples, TokenStream
from lmbook.language_models import NGram, NGramConfig
from lmbook.perplexity import evaluate, floor
from lmbook.runs import muon_and_adamw
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE, SPECIALS, WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from lmbook.writing import (
    FIM_MARKS,
    FillIn,
    Suggestion,
    complete,
    cut_units,
    fill,
    fill_by_rereading,
    fill_in_the_middle,
    fim_rows,
    keystrokes,
)  # fmt: skip

BENCHMARK = Benchmark(
    packages=("torch", "numpy"), seeds=3,
    options=[
        Option("steps", 1200, dry=2, help="of training, of a decoder of Small World (16 stories each)"),
        Option("gaps", 200, dry=3, help="that are filled"),
        Option("reading-steps", 1000, dry=2, help="of training, of the decoder of Shakespeare (12 x 128 tokens each)"),
        Option("passages", 12, dry=1, help="of Shakespeare that are typed"),
    ],
)  # fmt: skip
WORLD = SmallWorld(SmallWorldConfig(limit=2, names=2, talk=0))
SHARES = (0.0, 0.5, 0.9)
DRAWN = (1, 4, 16)
THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
LONGEST = 40  # tokens of a sentence


def decoder(vocab_size: int, settings: Settings, d_model: int, n_layer: int, context_length: int) -> Transformer:
    d = settings.pick(d_model, 32)
    return Transformer(TransformerConfig(
        vocab_size, d, n_layer, 4, d_ff=2 * d, context_length=context_length, norm="rms", activation="swiglu", positions="rotary",
        bias=False, init="xavier_uniform"))  # fmt: skip


def fitted(model: Transformer, batches: Any, steps: int, lr: float, seed: int) -> Transformer:
    plan = TrainConfig(steps=steps, lr=lr, warmup=min(20, steps - 1), schedule="wsd", seed=seed, device="cpu", log_every=10**6,
                       optimizer=functools.partial(muon_and_adamw, lr=lr))
    Trainer(model, batches, plan).fit()
    return model.eval()


def trained(seed: int, share: float, steps: int, tokenizer: BPE, settings: Settings) -> Transformer:
    stories = list(WORLD.texts("train", n=16 * steps, start=100_000 * seed))
    rows = fim_rows(stories, tokenizer, share, seed=seed)
    torch.manual_seed(seed)
    model = decoder(tokenizer.vocab_size, settings, 128, 2, settings.pick(320, 640))
    return fitted(model, Examples(rows, batch_size=16, seed=seed, sort=8), steps, 0.008, seed)


def best_possible(gap: FillIn, sentences: list[str]) -> tuple[str, float]:
    "The sentence with which the story is likeliest, and its probability among all."
    log_p = np.array([WORLD.log_prob(gap.before + sentence + gap.after) for sentence in sentences])
    return sentences[int(log_p.argmax())], float(1 / np.exp(log_p - log_p.max()).sum())


def judged(gaps: list[FillIn], said: list[str]) -> dict[str, float]:
    exact = [text == gap.middle for gap, text in zip(gaps, said)]
    possible = [WORLD.log_prob(gap.before + text + gap.after) > -math.inf for gap, text in zip(gaps, said)]
    return {"exact": float(np.mean(exact)), "possible": float(np.mean(possible))}


def spent(gap: FillIn, tokenizer: BPE, middle: str, drawn: int, different: int) -> int:
    "Tokens that went through the model; drawn=0: it reads both sides, and writes once."
    before, new, after = (len(tokenizer.encode(text)) for text in (gap.before, middle, gap.after))
    if not drawn: return before + after + new
    return before + drawn * new + (different * (before + new + after) if different > 1 else 0)


def fillers(model: Transformer, tokenizer: BPE, share: float, seed: int) -> dict[str, Callable[[FillIn], list[Suggestion]]]:
    def by_beams(beams: int, gap: FillIn) -> list[Suggestion]:
        return fill(model, tokenizer, gap.before, gap.after, beams=beams, max_new_tokens=LONGEST)

    def by_rereading(n: int, gap: FillIn) -> list[Suggestion]:
        return fill_by_rereading(model, tokenizer, gap.before, gap.after, n, max_new_tokens=LONGEST, seed=seed)

    found: dict[str, Callable[[FillIn], list[Suggestion]]] = {}
    if share: found |= {"greedy": functools.partial(by_beams, 1), "beams 4": functools.partial(by_beams, 4)}
    if share < 0.9: found |= {f"reread {n}": functools.partial(by_rereading, n) for n in DRAWN}
    return found


@BENCHMARK.part()
def filling(settings: Settings) -> dict[str, Any]:
    tokenizer = BPE.train(list(WORLD.texts("train", n=2000)), settings.pick(512, 300), specials=(*SPECIALS, *FIM_MARKS))
    test, rng = list(WORLD.texts("test", n=max(settings.pick(300, 30), settings.gaps))), np.random.default_rng(0)
    gaps = [fill_in_the_middle(story, rng) for story in test[: settings.gaps]]
    sentences = sorted({part for text in WORLD.texts("train", n=settings.pick(20_000, 20)) for part in cut_units(text)})
    ideal = [best_possible(gap, sorted({*sentences, gap.middle})) for gap in gaps]
    best = judged(gaps, [text for text, _ in ideal]) | {"expected exact": float(np.mean([p for _, p in ideal]))}
    least = floor(WORLD, test, sample=not settings.dry).nats / len(test)
    losses: dict[tuple[int, float], list[float]] = {}
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for seed in range(settings.seeds):
        for steps, share in itertools.product(sorted({max(2, settings.steps // 3), settings.steps}), SHARES):
            model = trained(seed, share, steps, tokenizer, settings)
            above = evaluate(model, test, tokenizer, context_length=model.config.context_length).nats / len(test) - least
            losses.setdefault((steps, share), []).append(above)
            print(f"  seed {seed}, {steps} steps, share {share}: {above:.2f} nats a story above the floor", flush=True)
            if steps < settings.steps: continue
            for name, way in fillers(model, tokenizer, share, seed).items():
                said = [way(gap) for gap in gaps]
                drawn = int(name.split()[1]) if "reread" in name else 0
                row = found.setdefault((str(share), name), {})
                for key, value in judged(gaps, [texts[0].text for texts in said]).items(): row.setdefault(key, []).append(value)
                times = int(name.split()[1]) if "beams" in name else 1
                tokens = [spent(gap, tokenizer, texts[0].text, drawn, len(texts)) + (times - 1) * len(tokenizer.encode(texts[0].text))
                          for gap, texts in zip(gaps, said)]
                row.setdefault("tokens", []).append(float(np.mean(tokens)))
    cost = [{"steps": steps, "share": share, "above the floor": mean_sd(values), "each": values}
            for (steps, share), values in losses.items()]
    rows = [{"share": share, "way": name, **{key: mean_sd(values) for key, values in row.items()}} for (share, name), row in found.items()]
    return {"floor": least, "cost": cost, "ways": rows, "best": best}


@BENCHMARK.part(data=["tinyshakespeare"])
def keys(settings: Settings) -> dict[str, Any]:
    text = (settings.folder("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    between = settings.pick("\n\n", "\n")  # two speeches
    cut = text.index(between, int(0.9 * len(text)))
    train, rest = text[:cut], text[cut:].strip()
    begins = [match.end() for match in re.finditer(between, rest)]
    size, N = settings.pick(600, 60), settings.passages
    passages = [rest[at : at + size] for at in begins[:: max(1, len(begins) // (N + 1))][:N]]
    bpe = BPE.train([train], settings.pick(1024, 300))
    torch.manual_seed(0)
    model = decoder(bpe.vocab_size, settings, 192, 3, 256)
    fitted(model, TokenStream(np.array(bpe.encode(train)), 12, 128), settings.reading_steps, 0.02, 0)
    words = WordTokenizer.train([train], min_count=2)
    rows = [words.encode(speech + between, bos=True) for speech in train.split(between)]
    models: dict[str, tuple[Any, Any]] = {"Transformer": (model, bpe)}
    for order in (5, 3, 1): models[f"{order}-gram"] = NGram.fit(rows, words.vocab_size, NGramConfig(order=order)), words
    saved, thresholds = [], []
    for name, (one, tokenizer) in models.items():
        suggest = functools.cache(lambda so_far: complete(one, tokenizer, so_far))  # noqa: B023
        for k in (1, 3):
            each = [keystrokes(passage, suggest, k).saved for passage in passages]
            saved.append({"model": name, "suggestions": k, "saved": mean_sd(each)})
        for least in THRESHOLDS:
            typed = [keystrokes(passage, suggest, 1, least) for passage in passages]
            shown, taken = sum(t.shown for t in typed), sum(t.accepted for t in typed)
            characters = sum(len(t.text) for t in typed)
            thresholds.append({
                "model": name, "threshold": least, "shown": shown / characters, "accepted": taken / shown if shown else 0.0,
                "saved": 1 - sum(t.keys for t in typed) / characters})  # fmt: skip
        print(f"  {name}: {saved[-1]['saved']['mean']:.2f} of the characters saved", flush=True)
    sample = keystrokes(passages[0], lambda so_far: complete(model, bpe, so_far), 3)
    return {"saved": saved, "thresholds": thresholds, "characters": sum(map(len, passages)),
            "sample": [list(piece) for piece in sample.pieces]}


if __name__ == "__main__": run(__file__)
