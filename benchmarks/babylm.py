"""The best small model that one text and a few minutes on two cores give: characters of Shakespeare, words of WikiText-2, grammar.

    python -m benchmarks.babylm --data ../shared/data

Each model has at most ten million parameters, has read nothing but its one training file, and is trained by the clock: the learning rate
follows the share of the time that is spent, so a busy machine makes fewer steps and not a longer run. Everything from making the model to
the last step counts.

shakespeare: `benchmarks.shakespeare` with three changes. The last two to six characters are looked up, hashed, in tables of their own
(cheap: no products), whose vectors are added to the character's; in training four positions in ten go without, or a fast processor, which
reads the text several times, would learn it by heart. The last third of the time is read in windows of 256. The rate follows
the clock. Loss as there: over all of the validation text, in windows of the context, each read from its beginning.
words: `benchmarks.wikitext2` with two changes. In a step only a part of the words is scored (see `Scored`). And a word's vector is its own
one plus those of pieces of its spelling (its beginning, its end, its shape, itself without capitals), for reading it and for scoring it.
A word that training never shows has the pieces only, and so does, in each epoch, half of the words that occur once. No cache. The one
number that is chosen on the validation file is a constant that is added to the scores of all unseen words.
`blimp` in it: the share of minimal pairs of which that model finds the good sentence likelier, beside an n-gram of words and the LSTM of
`benchmarks.wikitext2` (its twelve epochs, or as many as the time allows), each trained on the same file. Words that none has seen share
the probability of `<unk>` in those two, so where the pair differs in such words a coin decides. Nothing is chosen on BLiMP.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import shakespeare as plain_shakespeare
from benchmarks import wikitext2 as plain_wikitext2
from benchmarks.common import Benchmark, Option, Settings, mean_sd, run
from lmbook.batches import Batch, TokenStream
from lmbook.core import seed_everything
from lmbook.evaluation import Score
from lmbook.language_models import NGram, NGramConfig
from lmbook.optimizers import multiplies_bfloat16
from lmbook.recurrent import detach_state
from lmbook.recurrent_lm import CarriedState, RecurrentLM, RecurrentLMConfig
from lmbook.runs import muon_and_adamw
from lmbook.schedules import clip_gradients
from lmbook.tasks import Item, read_task
from lmbook.training import TrainConfig, Trainer, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig

REFERENCE = {
    "shakespeare": {"nanoGPT, documented CPU run": 1.886, "benchmarks.shakespeare": 1.494, "aim": 1.47, "seconds": 188},
    "wikitext2": {"PyTorch's word_language_model": 332.6, "benchmarks.wikitext2": 260.1, "aim": 230.0, "seconds": 401},
}
CHARACTERS: dict[str, Any] = {
    "orders": [2, 3, 4, 5, 6], "rows": 2**14, "d_gram": 32, "drop": 0.4, "lr": 0.02, "weight_decay": 0.1, "warmup": 50,
    "stages": [{"until": 0.67, "rows": 12, "length": 128}, {"until": 1.0, "rows": 6, "length": 256}],
}
# reading: share of the time, and at most so many epochs; of the words, so many frequent ones and so many others are scored in a step
WORDS: dict[str, Any] = {
    "pieces": 8, "reading": 0.91, "epochs": 15, "lr": 6e-3, "warmup": 100, "weight_decay": 1e-5, "frequent": 4000, "sample": 1500,
}
BENCHMARK = Benchmark(
    packages=("torch", "numpy"), seeds=3, threads=2,
    options=[Option("seconds", 0.0, 2.0, "for a training; 0: those of the reference"),
             Option("word-seeds", 2, 1, "seeds of the model of words, which takes longer")],
    facts=lambda settings: {"reference": REFERENCE, "recipes": {"characters": CHARACTERS, "words": WORDS}},
)
LIMIT = 10_000_000  # parameters


def in_bfloat16(settings: Settings) -> bool:
    "Where the processor has it (AVX-512), it is faster; elsewhere it is slower than float32, or refused."
    return not settings.dry and multiplies_bfloat16(torch.device("cpu"))


def parameters(model: nn.Module) -> int:
    n = sum(p.numel() for p in model.parameters())
    assert n <= LIMIT, f"{n:,} parameters"
    return n


class Clock:
    "Which share of the time is spent, and the learning rate that belongs to it: up for some steps, then down to nothing at the end."

    def __init__(self, seconds: float): self.start, self.seconds = time.perf_counter(), seconds

    @property
    def spent(self) -> float: return (time.perf_counter() - self.start) / self.seconds

    def rate(self, step: int, warmup: int) -> float: return max(0.0, min((step + 1) / (warmup + 1), 1 - self.spent))


# ---------------------------------------------------------------- characters


class Grams(Transformer):
    "A decoder that is told which characters it has just read, as one: a run of the last few has a row of a table, which others may share."

    def __init__(self, config: TransformerConfig, orders: Sequence[int], rows: int, d_gram: int, drop: float):
        super().__init__(config)
        self.orders, self.rows, self.drop = orders, rows, drop
        self.grams = nn.ModuleList(nn.Embedding(rows, d_gram) for _ in orders)
        self.spread = nn.Linear(len(orders) * d_gram, config.d_model, bias=False)
        for table in self.grams: nn.init.normal_(table.weight, 0, .02)

    def _vectors(self, embed: Any, ids: Tensor, *rest: Any) -> Tensor:
        x, number, found = super()._vectors(embed, ids, *rest), ids + 1, []
        before = ids + 1
        for n in range(2, max(self.orders) + 1):
            before = F.pad(before, (1, 0))[:, :-1]
            number = (number * 1_000_003 + before * 8191 + n) % (2**31 - 1)
            if n in self.orders: found.append(self.grams[self.orders.index(n)](number % self.rows))
        seen = self.spread(torch.cat(found, -1))
        if self.training: seen = seen * (torch.rand(*seen.shape[:-1], 1) >= self.drop) / (1 - self.drop)  # of a position, all or nothing
        return x + seen


def train_characters(text: plain_shakespeare.Text, seed: int, seconds: float, settings: Settings) -> dict[str, Any]:
    clock, how = Clock(seconds), CHARACTERS
    seed_everything(seed, deterministic=False)
    size = {**plain_shakespeare.MODEL, "context_length": 256} | settings.pick({}, {"d_model": 32, "n_layer": 1})
    model = Grams(TransformerConfig(text.vocab_size, **size), how["orders"], settings.pick(how["rows"], 64), how["d_gram"], how["drop"])
    count, optimizer, half = parameters(model), muon_and_adamw(model, how["lr"], how["weight_decay"]), in_bfloat16(settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    step = tokens = 0
    for i, stage in enumerate(how["stages"]):
        stream, left = TokenStream(text.train, stage["rows"], stage["length"], seed=seed + 1000 * i), True
        while left:
            for batch in stream:
                left = clock.spent < stage["until"] or step <= i  # at least a step
                if not left: break
                for group, lr in zip(optimizer.param_groups, rates): group["lr"] = lr * clock.rate(step, how["warmup"])
                with torch.autocast("cpu", torch.bfloat16, enabled=half): value, n = next_token_loss(model, batch)
                (value / n).backward()
                clip_gradients(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step, tokens = step + 1, tokens + n
    spent = time.perf_counter() - clock.start
    model.eval()
    found = {"loss": plain_shakespeare.loss(model, text.valid), "loss_with_half_a_context": plain_shakespeare.loss(model, text.valid, True)}
    return {**found, "seconds": spent, "steps": step, "tokens": tokens, "parameters": count, "dtype": "bfloat16" if half else "float32"}


@BENCHMARK.part("shakespeare", data=["tinyshakespeare"])
def characters(settings: Settings) -> dict[str, Any]:
    text, runs = plain_shakespeare.Text(settings), []
    for seed in range(settings.seeds):
        runs.append(train_characters(text, seed, settings.seconds or REFERENCE["shakespeare"]["seconds"], settings))
        print(f"  seed {seed}: {runs[-1]['loss']:.4f} after {runs[-1]['seconds']:.0f} s", flush=True)
    return {**mean_sd([row["loss"] for row in runs]), "runs": runs}


# ---------------------------------------------------------------- words


def pieces_of(word: str) -> list[str]:
    "What a word's spelling tells: its shape, itself without capitals, two beginnings, four ends."
    low = word.lower()
    shape = "".join("9" if c.isdigit() else "x" if c.islower() else "X" if c.isupper() else c for c in word)
    shape = re.sub(r"(.)\1+", r"\1\1", shape)
    return [f"shape {shape}", f"word {low}", *(f"{n}- {low[:n]}" for n in (3, 5)), *(f"-{n} {low[-n:]}" for n in (1, 2, 3, 4))]


def spellings(words: Sequence[str], known: int) -> np.ndarray: # (N, 8): 0 for a piece that fewer than two known words have
    counts = Counter(piece for word in words[:known] for piece in pieces_of(word))
    numbers = {piece: i for i, piece in enumerate((piece for piece, n in counts.items() if n > 1), 1)}
    return np.array([[numbers.get(piece, 0) for piece in pieces_of(word)] for word in words])


class Words(plain_wikitext2.Text):
    "As there, and all words by name."

    def __init__(self, folder: Path, more: Sequence[str] = ()):
        super().__init__(folder)
        names: dict[int, str] = {}
        for name in ("train", "valid", "test"):
            words = [w for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines() for w in [*line.split(), "<eos>"]]
            names |= dict(zip(self.words[name].tolist(), words))
        self.names = [names[i] for i in range(len(names))]
        self.in_files = len(self.names)
        self.number = {name: i for i, name in enumerate(self.names)}
        for word in more:
            if word not in self.number: self.number[word] = len(self.number)
        self.names = list(self.number)
        self.spelled = torch.from_numpy(spellings(self.names, self.unseen))


class Spelled(nn.Module):
    "In the place of a table of word vectors: a word's own vector, and those of its pieces; one that is hidden has only these."

    def __init__(self, own: nn.Parameter, pieces: Tensor, known: int):
        super().__init__()
        self.weight, self.known = own, known
        self.pieces = nn.Parameter(torch.zeros(int(pieces.max()) + 1, own.shape[1] + 1))  # the last number is for the bias
        self.new, self.bias = nn.Parameter(torch.zeros(own.shape[1])), nn.Parameter(torch.zeros(known + 1))  # the last: of hidden words
        self.register_buffer("spelled", pieces)

    def compose(self, hidden: Tensor, words: Tensor) -> None:
        "Make the vectors and biases of some words (K,). `hidden` (K,) says which of them are to be spelled only."
        found = F.embedding_bag(self.spelled[words], self.pieces, mode="sum", padding_idx=0) / math.sqrt(self.spelled.shape[1])
        own = F.embedding(words.clamp(max=self.known - 1), self.weight)
        self.vectors = torch.where(hidden[:, None], self.new, own) + found[:, :-1]
        self.biases = self.bias[torch.where(hidden, self.known, words.clamp(max=self.known))] + found[:, -1]
        self.row = torch.full((len(self.spelled),), -1)
        self.row[words] = torch.arange(len(words))

    def forward(self, ids: Tensor) -> Tensor: return F.embedding(self.row[ids], self.vectors)


def build(text: Words, settings: Settings) -> RecurrentLM:
    "The LSTM of `benchmarks.wikitext2`, and the pieces."
    sizes = plain_wikitext2.MODEL if not settings.dry else plain_wikitext2.MODEL | {"d_embed": 32, "d_hidden": 32}
    model = RecurrentLM(RecurrentLMConfig(len(text.names), **sizes))
    own = nn.Parameter(model.embed.weight.detach()[: text.unseen].clone())
    spelled = Spelled(own, text.spelled, text.unseen)
    share = torch.from_numpy(text.counts + .5) / text.counts.sum()
    with torch.no_grad():
        spelled.bias.copy_(share.log())
        spelled.bias[text.unseen] = math.log(.03 / max(1, int((text.counts == 1).sum()) // 2))
    model.embed, model.out = spelled, nn.Identity()  # type: ignore[assignment]
    return model


class Scored(CarriedState):
    """The loss over words of the training file; which of those that occur once are hidden is drawn anew after so many batches.

    Scoring all words is most of the work, so in a step only the frequent ones, those of the batch, and a sample of the others are scored.
    Those of the sample stand for the rest: the logarithm of how many each stands for is added to its score.
    """

    def __init__(self, text: Words, every: int, seed: int):
        super().__init__()
        self.once, self.every, self.step = torch.from_numpy(text.counts[: text.unseen] == 1), every, 0
        self.rng = torch.Generator().manual_seed(seed)
        self.frequent = min(WORDS["frequent"], text.unseen)

    def some(self, batch: Batch) -> tuple[Tensor, Tensor]: # (K,) words, and what is added to the score of each
        known, asked = len(self.once), torch.unique(torch.cat([batch.ids.flatten(), batch.targets.flatten()]))
        asked = asked[asked >= self.frequent]
        rest = torch.ones(known, dtype=torch.bool)
        rest[: self.frequent] = rest[asked] = False
        others = rest.nonzero()[:, 0]
        sample = others[torch.randperm(len(others), generator=self.rng)[: WORDS["sample"]]]
        words = torch.cat([torch.arange(self.frequent), asked, sample])
        more = torch.zeros(len(words))
        if len(sample): more[-len(sample) :] = math.log(len(others) / len(sample))
        return words, more

    def __call__(self, model: RecurrentLM, batch: Batch) -> tuple[Tensor, int]:
        if self.step % self.every == 0: self.hidden = self.once & (torch.rand(len(self.once), generator=self.rng) < plain_wikitext2.HIDDEN)
        self.step += 1
        words, more = self.some(batch)
        model.embed.compose(self.hidden[words], words)
        x, after = model.features(batch.ids, self.states["train"] if batch.carry else None)
        self.states["train"] = tuple(map(detach_state, after))
        scores = F.linear(x, model.embed.vectors, model.embed.biases + more).flatten(0, 1)
        with torch.autocast(scores.device.type, enabled=False):
            losses = F.cross_entropy(scores, model.embed.row[batch.targets.flatten()], reduction="none")
        return losses.float().sum(), batch.tokens


class Rolled(TokenStream):
    "Contiguous rows; each epoch begins somewhere else."

    def plan(self, epoch: int) -> list:
        shift = np.random.default_rng([self.seed, epoch]).integers(len(self.tokens))
        rolled = np.roll(self.tokens, shift)
        return [(rolled, item) for item in super().plan(epoch)]

    def make(self, item: Any) -> Batch:
        kept, (self.tokens, where) = self.tokens, item
        try: return super().make(where)
        finally: self.tokens = kept


@torch.no_grad()
def score_words(model: RecurrentLM, x: Tensor, targets: Tensor, known: int, *more: float) -> Tensor: # (K, N)
    "The log-probability of each word, for each number that is added to the scores of unseen words; by default for 0."
    vectors, biases, found, added = model.embed.vectors, model.embed.biases, [], torch.tensor(more or (0.0,))[:, None]
    for part, t in zip(x.split(512), targets.split(512)):
        scores = F.linear(part, vectors, biases)
        own, seen, new = scores.gather(1, t[:, None])[:, 0], scores[:, :known].logsumexp(1), scores[:, known:].logsumexp(1)
        found.append(own + added * (t >= known) - torch.logaddexp(seen, new + added))
    return torch.cat(found, 1)


@torch.no_grad()
def ready(model: RecurrentLM, text: Words, n: int) -> None:
    "Make the vectors with which texts of the first `n` words are judged."
    model.eval()
    model.embed.compose(torch.arange(n) >= text.unseen, torch.arange(n))


def by_clock(clock: Clock, last: int, warmup: int) -> tuple[Any, Any]: # a callback for the Trainer, and its learning rate
    "The run ends when the time is over, or on a fast processor after `last` steps; the rate falls along a cosine towards the end."
    def stop(trainer: Trainer, event: str, row: Any) -> None:
        if event == "step" and (clock.spent >= 1 or trainer.step >= last): trainer.stop("time")

    def rate(step: int, total: int) -> float:
        return min((step + 1) / (warmup + 1), .5 + .5 * math.cos(math.pi * min(1., max(clock.spent, step / last))))

    return stop, rate


def train_words(text: Words, seed: int, seconds: float, settings: Settings) -> tuple[RecurrentLM, float, dict[str, Any]]:
    "One training by the clock, a constant chosen on the validation file, and the test."
    clock, how = Clock(seconds * WORDS["reading"]), WORDS
    seed_everything(seed)
    model = build(text, settings)
    count, half = parameters(model), in_bfloat16(settings)
    stream = Rolled(text.words["train"], plain_wikitext2.ROWS, plain_wikitext2.LENGTH, contiguous=True, seed=seed)

    stop, rate = by_clock(clock, how["epochs"] * len(stream), how["warmup"])
    config = TrainConfig(steps=10**6, lr=how["lr"], schedule=rate, weight_decay=how["weight_decay"], log_every=50, seed=seed,
                         deterministic=False, dtype="bfloat16" if half else "float32")
    trainer = Trainer(model, stream, config, loss=Scored(text, len(stream), seed), callbacks=[stop])
    trainer.fit()
    n = text.in_files
    ready(model, text, n)
    x, targets = plain_wikitext2.read(model, text.words["valid"][: settings.pick(30_000, 400)], rows=settings.pick(20, 2))
    biases = (-.4, 0., .4, .8, 1.2)
    tried = dict(zip(biases, (-score_words(model, x, targets, text.unseen, *biases).double().mean(1)).tolist()))
    bias = min(tried, key=tried.__getitem__)
    x, targets = plain_wikitext2.read(model, text.words["test"])
    [log_p] = score_words(model, x, targets, text.unseen, bias)
    spent, unseen = time.perf_counter() - clock.start, targets >= text.unseen
    result = {"seed": seed, "seconds": spent, "epochs": trainer.step / len(stream), "parameters": count, "bias": bias,
              "valid_perplexity": math.exp(tried[bias]), "perplexity": math.exp(-log_p.double().mean()),
              "nats_of_seen_words": -log_p[~unseen].double().mean().item(),
              "nats_of_unseen_words": -log_p[unseen].double().mean().item() if unseen.any() else None,
              "dtype": config.dtype}
    print(f"  seed {seed}: {spent:.0f} s, {result['epochs']:.1f} epochs, test perplexity {result['perplexity']:.1f}", flush=True)
    return model, bias, result


# ---------------------------------------------------------------- grammar


def cut(sentence: str) -> list[str]:
    "A sentence as WikiText writes it: punctuation by itself, n't and 's with a space before."
    text = re.sub(r"([.,?!;:])", r" \1 ", sentence)
    return re.sub(r"(n't|'s)\b", r" \1", text).replace(" n't", "n 't").split()


def judged(log_p: dict[str, float], items: list[Item]) -> dict[str, Any]:
    "The share of pairs whose good sentence is likelier, of all and by kind; equal ones count half."
    parts: dict[str, list[float]] = {}
    for item in items:
        good, bad = (log_p[choice] for choice in item.choices)
        parts.setdefault(item.kind, []).append(float(good > bad) + .5 * (good == bad))
    whole = Score.mean("accuracy", [x for part in parts.values() for x in part])
    return {"accuracy": whole.value, "error": whole.error, "kinds": {kind: float(np.mean(part)) for kind, part in sorted(parts.items())}}


@torch.no_grad()
def paid(features: Any, score: Any, rows: dict[str, list[int]]) -> dict[str, float]:
    "The log-probability of each sentence; all of one length go together."
    found, lengths = {}, sorted({len(row) for row in rows.values()})
    for length in lengths:
        some = [name for name, row in rows.items() if len(row) == length]
        for at in range(0, len(some), 64):
            names = some[at : at + 64]
            ids = torch.tensor([rows[name] for name in names])
            x, _ = features(ids[:, :-1])
            total = score(x.flatten(0, 1), ids[:, 1:].flatten()).view(len(names), -1).double().sum(1)
            found |= dict(zip(names, total.tolist()))
    return found


@BENCHMARK.part("words", data=["wikitext2", "blimp"])
def words(settings: Settings) -> dict[str, Any]:
    items = [item for file in sorted(settings.folder("blimp").glob("*.jsonl")) for item in read_task(file)]
    sentences = {choice: cut(choice) for item in items for choice in item.choices}
    text = Words(settings.folder("wikitext2"), sorted({word for words in sentences.values() for word in words}))
    seconds, end = settings.seconds or REFERENCE["wikitext2"]["seconds"], text.number["<eos>"]
    rows = {name: [end, *(text.number[word] for word in words), end] for name, words in sentences.items()}
    clipped = {name: np.minimum(row, text.unseen).tolist() for name, row in rows.items()}
    models: dict[str, list[dict[str, Any]]] = {"ours": [], "the LSTM of benchmarks.wikitext2": [], "three words": []}
    runs = []
    for seed in range(settings.word_seeds):
        model, bias, result = train_words(text, seed, seconds, settings)
        runs.append(result)
        ready(model, text, len(text.names))
        def score(x: Tensor, t: Tensor, model: RecurrentLM = model, bias: float = bias) -> Tensor:
            return score_words(model, x, t, text.unseen, bias)[0]

        models["ours"].append(judged(paid(model.features, score, rows), items))
    other, result = _lstm(text, seconds, settings)
    def scored(x: Tensor, t: Tensor) -> Tensor: return -F.cross_entropy(other.out(x), t, reduction="none")

    models["the LSTM of benchmarks.wikitext2"].append(judged(paid(other.features, scored, clipped), items))
    counts = NGram.fit([text.ids["train"]], text.unseen + 1, NGramConfig(order=3))
    log_p = {name: float(counts.token_log_probs(torch.tensor([row])).sum()) for name, row in clipped.items()}
    models["three words"].append(judged(log_p, items))
    return {**mean_sd([row["perplexity"] for row in runs]), "runs": runs, "lstm": result, "blimp": {"pairs": len(items), "models": models}}


def _lstm(text: Words, seconds: float, settings: Settings) -> tuple[RecurrentLM, dict[str, Any]]:
    "The recipe of `benchmarks.wikitext2` in the same time, by the same clock."
    clock = Clock(seconds * WORDS["reading"])
    seed_everything(0)
    model, stream = plain_wikitext2.build(text), plain_wikitext2.Reading(text, 0)
    stop, rate = by_clock(clock, plain_wikitext2.EPOCHS * len(stream), warmup=100)
    how = {name: value for name, value in plain_wikitext2.TRAIN.items() if name != "warmup"}
    config = TrainConfig(steps=10**6, schedule=rate, log_every=50, deterministic=False, **how,
                         dtype="bfloat16" if in_bfloat16(settings) else "float32")
    trainer = Trainer(model, stream, config, loss=plain_wikitext2.Halved(), callbacks=[stop])
    trainer.fit()
    x, targets = plain_wikitext2.read(model, text.ids["test"])
    log_p = plain_wikitext2.scores(model, x, targets, text)
    model.eval()
    return model, {"seconds": time.perf_counter() - clock.start, "epochs": trainer.step / len(stream),
                   "perplexity": math.exp(-log_p.double().mean())}


if __name__ == "__main__": run(__file__)
