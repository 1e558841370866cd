"""How fast n-grams are counted, what more text buys them, how well they predict WikiText-2, and what padding does to a loss.

    python -m benchmarks.language_models --data ../shared/data

One thread. The data folder is described in its own README; without it
WikiText-2 is left out; the rest runs on text made here: ten million tokens of Small World, and ten million words thrown at random after
Zipf's law, which hardly ever repeat (the worst case). Each count runs in a process of its own, so that its peak memory can be told;
ratios are of CPU seconds (everything here has one thread), which a busy machine changes less than the clock.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.common import Benchmark, Settings, best_of, memory, run
from lmbook.grammar import WORD
from lmbook.language_models import SMOOTHING, NGram, NGramConfig, Vocabulary, count_ngrams
from lmbook.perplexity import evaluate, floor
from lmbook.small_world import SmallWorld, SmallWorldConfig

ORDERS = range(1, 6)
LSTM = {"perplexity": 332.6, "seconds": 401, "what": "pytorch/examples word_language_model, LSTM 2x200 tied, 4 epochs, same files"}
BENCHMARK = Benchmark(packages=("numpy", "torch", "nltk", "kenlm", "knlm"))


def small_world(tokens: int, path: Path) -> int: # size of the vocabulary
    "Write so many word ids of Small World, with the ends of the stories, to a file."
    number: dict[str, int] = {"<bos>": 0, "<eos>": 1}
    out = np.zeros(tokens, dtype=np.int64)
    done = 0
    for text in SmallWorld().texts():
        row = [0, *(number.setdefault(word, len(number)) for word in WORD.findall(text)), 1][: tokens - done]
        out[done : done + len(row)] = row
        done += len(row)
        if done == tokens: break
    np.save(path, out)
    return len(number)


def zipf(tokens: int, path: Path, V: int = 50_000) -> int:
    "The same with independent words, in documents of 1,000."
    p = 1 / np.arange(2, V)
    ids = np.random.default_rng(0).choice(np.arange(2, V), size=tokens, p=p / p.sum())
    ids[::1000] = 0
    np.save(path, ids)
    return V


def documents(path: Path, tokens: int) -> list[np.ndarray]:
    ids = np.load(path)[:tokens]
    return np.split(ids, np.flatnonzero(ids == 0)[1:])


def ours(rows: list[np.ndarray], V: int, order: int) -> list[int]:
    return [len(level.keys) for level in count_ngrams(rows, V, order).levels]


def ours_and_fit(rows: list[np.ndarray], V: int, order: int) -> list[int]: return NGram.fit(rows, V, NGramConfig(order)).sizes


def nltk_counter(rows: list[np.ndarray], V: int, order: int) -> list[int]:
    from nltk.lm import NgramCounter
    from nltk.util import everygrams

    counter = NgramCounter(everygrams(row.tolist(), max_len=order) for row in rows)
    return [V, *(sum(map(len, counter[n].values())) for n in range(2, order + 1))]


def dictionaries(rows: list[np.ndarray], V: int, order: int) -> list[int]:
    "The barest Python: a Counter of tuples for each length."
    counts: list[Counter] = [Counter() for _ in range(order)]
    for row in rows:
        words = row.tolist()
        for n, counter in enumerate(counts): counter.update(zip(*(words[i:] for i in range(n + 1))))
    return [V, *map(len, counts[1:])]


def knlm_fit(rows: list[np.ndarray], V: int, order: int) -> list[int]:
    "Counting and estimating in C++; it counts raw n-grams at all orders but the first, so its models differ from ours above bigrams."
    import knlm

    model = knlm.KneserNey(order, 4)
    for row in rows: model.train(map(str, row[1:-1].tolist()))
    model.optimize()
    return []


COUNTERS = {
    "ours": ours, "ours, with modified Kneser-Ney": ours_and_fit, "nltk.lm.NgramCounter": nltk_counter,
    "Counter of tuples": dictionaries, "knlm (C++), with Kneser-Ney": knlm_fit,
}  # fmt: skip


def measure(name: str, path: Path, tokens: int, V: int, order: int) -> dict[str, object]:
    "Seconds and peak memory of one count, in this process; run it in a new one."
    rows = documents(path, tokens)
    before = memory()
    start, cpu = time.perf_counter(), time.process_time()
    sizes = COUNTERS[name](rows, V, order)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"counter": name, "order": order, "tokens": sum(map(len, rows)), "seconds": seconds, "cpu_seconds": cpu,
            "peak_megabytes_above_text": (memory(peak=True) - before) / 1e6, "ngrams": sizes}


@BENCHMARK.part()
def counting(settings: Settings) -> dict[str, object]:
    out: dict[str, object] = {}
    tokens, part_of_it = settings.pick((10_000_000, 500_000), (5000, 3000))
    alone = partial(settings.alone, measure)
    names = [name for name in COUNTERS if not name.startswith("knlm") or find_spec("knlm")]
    if len(names) < len(COUNTERS): print("  knlm: left out, since the package is not installed")
    for corpus, make in (("Small World", small_world), ("Zipf at random", zipf)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ids.npy"
            V = make(tokens, path)
            rows = [alone("ours", path, tokens, V, order) for order in ORDERS]
            rows.append(alone("ours, with modified Kneser-Ney", path, tokens, V, 5))
            part = [alone(name, path, part_of_it, V, 5) for name in names]
        ngrams = [row["ngrams"] for row in part if row["ngrams"] and "with" not in row["counter"]]
        assert all(sizes[1:] == ngrams[0][1:] for sizes in ngrams), "the counters disagree"
        for row in part: row["times_ours"] = row["cpu_seconds"] / part["with" in row["counter"]]["cpu_seconds"]
        out[corpus] = {"vocabulary": V, "all": rows, "part": part}
    return out


@BENCHMARK.part()
def more_text(settings: Settings) -> dict[str, object]:
    "What n-grams pay above the floor of a small Small World, against how much of it they have read."
    world = SmallWorld(SmallWorldConfig(limit=6))
    number: dict[str, int] = {"<bos>": 0, "<eos>": 1}

    def ids(text: str) -> np.ndarray: return np.array([0, *(number.setdefault(word, len(number)) for word in WORD.findall(text)), 1])

    texts = list(world.texts("test", n=settings.pick(200, 10)))
    test, ground, out = [ids(text) for text in texts], floor(world, texts), {}
    for n in settings.pick((15_000, 60_000, 150_000), (50,)):
        rows = [ids(text) for text in world.texts("train", n=n)]
        counts = count_ngrams(rows, len(number), 8)
        models = {order: NGram.from_counts(counts, NGramConfig(order)) for order in (2, 3, 5, 8)}
        out[str(n)] = {str(order): (evaluate(model, test).nats - ground.nats) / ground.tokens for order, model in models.items()}
    return {"floor_nats_per_sentence": ground.loss, "excess_nats_per_sentence": out}


@BENCHMARK.part(data=["wikitext2"])
def wikitext2(settings: Settings) -> dict[str, object]:
    "Perplexity by order and smoothing. All words of the three files are the vocabulary, lines end with <eos>, as in word_language_model."
    folder = settings.folder("wikitext2")
    lines = {name: (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1] for name in ("train", "valid", "test")}
    words = Vocabulary.of((line for part in lines.values() for line in part), specials=("<eos>",))
    stream = {name: [[words.eos_id, *(i for line in part for i in words.encode(line, eos=True))]] for name, part in lines.items()}
    start = time.perf_counter()
    counts = count_ngrams(stream["train"], words.vocab_size, 6)
    seconds = time.perf_counter() - start
    rows: dict[str, list[float]] = {}
    grids = {"add_k": [{"k": k} for k in (.0001, .001, .01, .1, 1)], "interpolated": [{"weight": w / 10} for w in range(1, 10, 2)]}
    for smoothing in SMOOTHING:
        best: dict[int, float] = {}
        for order in range(1, 7):
            tried = []
            for setting in grids.get(smoothing, [{}]):
                model = NGram.from_counts(counts, NGramConfig(order, smoothing, **setting))
                tried.append((evaluate(model, stream["valid"]).loss, -len(tried), model))
            best[order] = evaluate(min(tried)[2], stream["test"]).perplexity  # the setting is chosen on the validation file
        rows[smoothing] = list(best.values())
        print("  " + smoothing.ljust(24) + "".join(f"{p:10.1f}" for p in rows[smoothing]))
    start = time.perf_counter()
    model = NGram.fit(stream["train"], words.vocab_size, NGramConfig(5))
    test = evaluate(model, stream["test"])
    seconds_5 = time.perf_counter() - start
    apart = {name: [[words.eos_id, *words.encode(line, eos=True)] for line in part] for name, part in lines.items()}
    by_line = evaluate(NGram.fit(apart["train"], words.vocab_size, NGramConfig(5)), apart["test"])
    unseen = counts.levels[0].counts[np.array(stream["test"][0])] == 0
    out = {"training_tokens": counts.tokens, "test_tokens": test.tokens, "vocabulary": words.vocab_size, "seconds_counting": seconds,
           "test_perplexity": rows, "seconds_fit_and_test_order_5": seconds_5,
           "validation_perplexity_order_5": evaluate(model, stream["valid"]).perplexity,
           "lines_as_documents_order_5": {"perplexity": by_line.perplexity, "loss": by_line.loss, "standard_error": by_line.standard_error},
           "share_of_test_tokens_never_seen_in_training": float(unseen.mean()), "lstm": LSTM}
    if find_spec("kenlm"): out["scoring"] = scoring(lines, settings.pick(3, 1))
    else: print("  scoring: left out, since the package kenlm is not installed")
    out["padding"] = padding(words, lines)
    return out


def scoring(lines: dict[str, list[str]], repeats: int) -> dict[str, float]:
    "Tokens per second through the same 5-gram table, in numpy and in KenLM's C++; the scores must be the same."
    import kenlm

    text = {part: [line for line in lines[part] if line.strip()] for part in ("train", "test")}
    words = Vocabulary.of(text["train"])
    rows = {part: [words.encode(line, bos=True, eos=True) for line in text[part]] for part in text}
    model = NGram.fit(rows["train"], words.vocab_size, NGramConfig(5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.arpa"
        model.write_arpa(path, [{"<bos>": "<s>", "<eos>": "</s>"}.get(word, word) for word in words.words])
        binary = kenlm.Model(str(path))
    ours, n = evaluate(model, rows["test"], batch_size=256), sum(len(row) - 1 for row in rows["test"])
    theirs = np.array([binary.score(line) for line in text["test"]]) * -np.log(10)
    return {"tokens_per_s": n / best_of(repeats, lambda: evaluate(model, rows["test"], batch_size=256)),
            "kenlm_tokens_per_s": n / best_of(repeats, lambda: [binary.score(line) for line in text["test"]]),
            "largest_difference_nats_per_line": float(np.abs(ours.document_nats - theirs).max())}


def padding(words: Vocabulary, lines: dict[str, list[str]], batch: int = 64, order: int = 5) -> list[dict[str, float]]:
    """A loss that counts padding as words. Paragraphs go into batches of 64, as long as their longest, at random or sorted by length
    within pools of 100 batches (as torchtext's BucketIterator); the model has learned on such batches that <pad> follows <pad>."""
    pad, V = words.vocab_size, words.vocab_size + 1
    out = []
    for name, pool in (("at random", 1), ("bucketed", 100)):
        dice = np.random.default_rng(0)

        def rows(part: str, pool: int = pool, dice: np.random.Generator = dice) -> list[np.ndarray]:
            texts = [np.array([words.eos_id, *words.encode(line, eos=True)]) for line in lines[part] if line.strip()]
            texts = [texts[i] for i in dice.permutation(len(texts))]
            out = []
            for i in range(0, len(texts), batch * pool):
                group = texts[i : i + batch * pool]
                if pool > 1: group = sorted(group, key=len)
                for j in range(0, len(group), batch):
                    longest = max(map(len, group[j : j + batch]))
                    out += [np.concatenate([row, np.full(longest - len(row), pad)]) for row in group[j : j + batch]]
            return out

        test = rows("valid")
        found = evaluate(NGram.fit(rows("train"), V, NGramConfig(order)), test)
        real = np.concatenate([row[1:] != pad for row in test])
        nats = np.concatenate(found.token_nats)
        honest = float(nats[real].mean())
        out.append({"batches": name, "padding": float(1 - real.mean()), "honest_loss": honest, "reported_loss": found.loss})
    return out


if __name__ == "__main__": run(__file__)
