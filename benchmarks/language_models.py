"""How fast n-grams are counted, what more text buys them, how well they predict WikiText-2, and what padding does to a loss.

    python -m benchmarks.language_models --data ../shared/data

Prints tables and writes benchmarks/results/language_models.json. One thread. The data folder is described in its own README; without it
WikiText-2 is left out; the rest runs on text made here: ten million tokens of Small World, and ten million words thrown at random after
Zipf's law, which hardly ever repeat (the worst case). Each count runs in a process of its own, so that its peak memory can be told;
ratios are of CPU seconds (everything here has one thread), which a busy machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil

from benchmarks.common import best_of, machine, rounded
from lmbook.language_models import SMOOTHING, NGram, NGramConfig, Vocabulary, count_ngrams
from lmbook.perplexity import evaluate, floor
from lmbook.small_world import WORD, SmallWorld, SmallWorldConfig

RESULTS = Path(__file__).parent / "results" / "language_models.json"
PACKAGES = ("numpy", "torch", "nltk")  # whose versions are noted, and of kenlm and knlm where they are
TOKENS, PART, ORDERS = 10_000_000, 500_000, range(1, 6)
LSTM = {"perplexity": 332.6, "seconds": 401, "what": "pytorch/examples word_language_model, LSTM 2x200 tied, 4 epochs, same files"}


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
    before = psutil.Process().memory_info().rss
    start, cpu = time.perf_counter(), time.process_time()
    sizes = COUNTERS[name](rows, V, order)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"): peak = info.peak_wset  # Windows
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"counter": name, "order": order, "tokens": sum(map(len, rows)), "seconds": seconds, "cpu_seconds": cpu,
            "peak_megabytes_above_text": (peak - before) / 1e6,
            "ngrams": sizes}


def alone(*arguments) -> dict[str, object]:
    with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(measure, arguments)


def counting(folder: Path) -> dict[str, object]:
    out: dict[str, object] = {}
    for corpus, make in (("Small World", small_world), ("Zipf at random", zipf)):
        path = folder / f"{make.__name__}.npy"
        V = make(TOKENS, path)
        rows = [alone("ours", path, TOKENS, V, order) for order in ORDERS] + [alone("ours, with modified Kneser-Ney", path, TOKENS, V, 5)]
        names = [name for name in COUNTERS if not name.startswith("knlm") or find_spec("knlm")]
        part = [alone(name, path, PART, V, 5) for name in names]
        ngrams = [row["ngrams"] for row in part if row["ngrams"] and "with" not in row["counter"]]
        assert all(sizes[1:] == ngrams[0][1:] for sizes in ngrams), "the counters disagree"
        for row in part: row["times_ours"] = row["cpu_seconds"] / part["with" in row["counter"]]["cpu_seconds"]
        out[corpus] = {"vocabulary": V, "all": rows, "part": part}
        print(f"\n{corpus}, vocabulary {V:,}\n{'':34}{'order':>6}{'tokens':>12}{'seconds':>9}{'of CPU':>9}{'MB more':>9}{'times ours':>12}")
        for row in rows + part:
            ratio = f"{row['times_ours']:12.1f}" if "times_ours" in row else ""
            print(f"{row['counter']:34}{row['order']:6}{row['tokens']:12,}{row['seconds']:9.2f}{row['cpu_seconds']:9.2f}"
                  f"{row['peak_megabytes_above_text']:9.0f}{ratio}")
    return out


def more_text() -> dict[str, object]:
    "What n-grams pay above the floor of a small Small World, against how much of it they have read."
    world = SmallWorld(SmallWorldConfig(limit=6))
    number: dict[str, int] = {"<bos>": 0, "<eos>": 1}

    def ids(text: str) -> np.ndarray: return np.array([0, *(number.setdefault(word, len(number)) for word in WORD.findall(text)), 1])

    texts = list(world.texts("test", n=200))
    test, ground, out = [ids(text) for text in texts], floor(world, texts), {}
    print(f"\nexcess over the floor (nats per sentence)\n{'stories':>10}" + "".join(f"{n:>8}-gram" for n in (2, 3, 5, 8)))
    for n in (15_000, 60_000, 150_000):
        rows = [ids(text) for text in world.texts("train", n=n)]
        counts = count_ngrams(rows, len(number), 8)
        models = {order: NGram.from_counts(counts, NGramConfig(order)) for order in (2, 3, 5, 8)}
        out[str(n)] = {str(order): (evaluate(model, test).nats - ground.nats) / ground.tokens for order, model in models.items()}
        print(f"{n:10,}" + "".join(f"{x:13.2f}" for x in out[str(n)].values()))
    return {"floor_nats_per_sentence": ground.loss, "excess_nats_per_sentence": out}


def wikitext(folder: Path) -> dict[str, object]:
    "Perplexity by order and smoothing. All words of the three files are the vocabulary, lines end with <eos>, as in word_language_model."
    lines = {name: (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1] for name in ("train", "valid", "test")}
    words = Vocabulary.of((line for part in lines.values() for line in part), specials=("<eos>",))
    stream = {name: [[words.eos_id, *(i for line in part for i in words.encode(line, eos=True))]] for name, part in lines.items()}
    start = time.perf_counter()
    counts = count_ngrams(stream["train"], words.vocab_size, 6)
    seconds = time.perf_counter() - start
    rows: dict[str, list[float]] = {}
    settings = {"add_k": [{"k": k} for k in (.0001, .001, .01, .1, 1)], "interpolated": [{"weight": w / 10} for w in range(1, 10, 2)]}
    print(f"\nWikiText-2 (small split): {counts.tokens:,} training tokens, vocabulary {words.vocab_size:,}; counted in {seconds:.2f} s")
    print("test perplexity".ljust(24) + "".join(f"{n:>10}" for n in range(1, 7)))
    for smoothing in SMOOTHING:
        best: dict[int, float] = {}
        for order in range(1, 7):
            tried = []
            for setting in settings.get(smoothing, [{}]):
                model = NGram.from_counts(counts, NGramConfig(order, smoothing, **setting))
                tried.append((evaluate(model, stream["valid"]).loss, -len(tried), model))
            best[order] = evaluate(min(tried)[2], stream["test"]).perplexity  # the setting is chosen on the validation file
        rows[smoothing] = list(best.values())
        print(smoothing.ljust(24) + "".join(f"{p:10.1f}" for p in rows[smoothing]))
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
    print(f"order 5: fitted and tested in {seconds_5:.2f} s; the LSTM: {LSTM['perplexity']} in {LSTM['seconds']} s; "
          f"lines as documents {by_line.perplexity:.1f}; {unseen.mean():.1%} of the test tokens never occur in training")
    if find_spec("kenlm"): out["scoring"] = scoring(lines)
    out["padding"] = padding(words, lines)
    return out


def scoring(lines: dict[str, list[str]]) -> dict[str, float]:
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
    out = {"tokens_per_s": n / best_of(3, lambda: evaluate(model, rows["test"], batch_size=256)),
           "kenlm_tokens_per_s": n / best_of(3, lambda: [binary.score(line) for line in text["test"]]),
           "largest_difference_nats_per_line": float(np.abs(ours.document_nats - theirs).max())}
    print(f"scoring: {out['tokens_per_s']:,.0f} tokens/s (evaluate), {out['kenlm_tokens_per_s']:,.0f} (KenLM, C++, one line at a time); "
          f"lines differ by at most {out['largest_difference_nats_per_line']:.1e} nats")
    return out


def padding(words: Vocabulary, lines: dict[str, list[str]], batch: int = 64, order: int = 5) -> list[dict[str, float]]:
    """A loss that counts padding as words. Paragraphs go into batches of 64, as long as their longest, at random or sorted by length
    within pools of 100 batches (as torchtext's BucketIterator); the model has learned on such batches that <pad> follows <pad>."""
    pad, V = words.vocab_size, words.vocab_size + 1
    print(f"\nloss with padding counted\n{'batches':16}{'padding':>9}{'honest':>9}{'reported':>10}")
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
        print(f"{name:16}{out[-1]['padding']:9.1%}{out[-1]['honest_loss']:9.2f}{out[-1]['reported_loss']:10.2f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    data = parser.parse_args().data
    packages = [*PACKAGES, *(name for name in ("kenlm", "knlm") if find_spec(name))]
    command = "python -m benchmarks.language_models --data ../shared/data"
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "command": command, "machine": machine(*packages)}
    with tempfile.TemporaryDirectory() as folder: result["counting"] = counting(Path(folder))
    result["more_text"] = more_text()
    if data is None or not (data / "wikitext2").is_dir(): print("no folder wikitext2: give --data to measure real text")
    else: result["wikitext2"] = wikitext(data / "wikitext2")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
