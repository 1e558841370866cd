"""How fast lmbook.cleaning and lmbook.duplicates are beside datasketch, and how well they find duplicates that were planted in real text.

    python -m benchmarks.cleaning --data ../shared/data

The data folder is described in its own README; without it only the speed is
measured, on text made here. Each time is the best of three, in seconds of the processor, on one core: another load on the machine counts
little that way. (All that is compared runs in one thread.)
"""

from __future__ import annotations

import random
import re
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import datasketch
import numpy as np

from benchmarks.common import Benchmark, Settings, best_of, mean, run
from lmbook.cleaning import (
    Drop,
    ExactDuplicates,
    Language,
    Rewrite,
    convert_chinese,
    drop_boilerplate,
    empty,
    find_personal_data,
    mask_personal_data,
    normalise,
)
from lmbook.corpora import read_corpus
from lmbook.duplicates import MinHash, NearDuplicates, near_duplicates, repeated_passages
from lmbook.markup import strip_html
from lmbook.quality import c4_page, gopher_quality, gopher_repetition
from lmbook.shards import clean, funnel, read_shards
from lmbook.small_world import SmallWorld

TOKEN = re.compile(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]")
THRESHOLD = 0.8


BENCHMARK = Benchmark(packages=("datasketch", "numpy", "pyarrow", "opencc", "py3langid"))


def cheapest(repeats: int, work: Callable[[], object]) -> float:
    "Seconds of the processor that the cheapest of some runs took."
    return best_of(repeats, work, clock=time.process_time)


def shingles(text: str, n: int) -> set[str]:
    words = TOKEN.findall(text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))}


def search_memory(n: int, permutations: int = 128) -> dict[str, float]:
    "Peak memory and time of the search for candidates among n signatures, a tenth of which are copies."
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (n, permutations), dtype=np.uint32)
    signatures[-n // 10 :] = signatures[: n // 10]
    start = time.process_time()
    twins = near_duplicates(signatures, THRESHOLD)
    seconds = time.process_time() - start
    assert (twins >= 0).sum() == n // 10
    tracemalloc.start()
    near_duplicates(signatures, THRESHOLD)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"texts": n, "seconds": seconds, "texts_per_s": n / seconds,
            "search_mb_per_million": peak / n, "signatures_mb_per_million": permutations * 4.0}


def _crc(data: bytes) -> int: return zlib.crc32(data)


@BENCHMARK.part()
def minhash(settings: Settings) -> dict[str, object]:
    """Texts per second into signatures. We start from texts; datasketch gets its shingles ready-made, so that only its own work counts.

    `ratio` is to the fastest way that it offers with its own hash, `bulk`; text by text is slower, another hash than SHA-1 (CRC-32) faster.
    """
    n_texts, permutations, repeats = settings.pick(4000, 40), 128, settings.pick(3, 1)
    texts = list(SmallWorld().texts(n=n_texts))
    ready = [[s.encode() for s in sorted(shingles(text, 5))] for text in texts]
    ours = MinHash(permutations)

    def one_by_one() -> None:
        for row in ready: datasketch.MinHash(permutations).update_batch(row)

    def bulk(**options: object) -> None: datasketch.MinHash.bulk(ready, num_perm=permutations, **options)

    def us() -> None:
        for at in range(0, n_texts, 1000): ours.signatures(texts[at : at + 1000])

    us()
    theirs = {"one by one": cheapest(repeats, one_by_one), "bulk": cheapest(repeats, bulk),
              "bulk, crc32": cheapest(repeats, lambda: bulk(hashfunc=_crc))}
    mine = cheapest(repeats, us)
    shingling = cheapest(repeats, lambda: [ours.shingles(texts[at : at + 100]) for at in range(0, n_texts, 100)])
    a, b = ready[0], ready[0][: len(ready[0]) // 2] + ready[1]
    pair = datasketch.MinHash.bulk([a, b], num_perm=permutations)
    true = len(set(a) & set(b)) / len(set(a) | set(b))
    memory = search_memory(settings.pick(100_000, 1000))
    return {"texts": n_texts, "permutations": permutations, "shingles_per_text": float(np.mean([len(row) for row in ready])),
            "ours_per_s": n_texts / mine, "of_which_shingling": shingling / mine, "datasketch_per_s": n_texts / theirs["bulk"],
            "datasketch_all_per_s": {name: n_texts / seconds for name, seconds in theirs.items()},
            "ratio": theirs["bulk"] / mine, "ratio_to_crc32": theirs["bulk, crc32"] / mine,
            "datasketch_estimate_error": abs(pair[0].jaccard(pair[1]) - true), "signature_bytes": permutations * 4,
            "mb_per_million": memory["signatures_mb_per_million"] + memory["search_mb_per_million"]}


@BENCHMARK.part()
def search(settings: Settings) -> dict[str, float]: return search_memory(settings.pick(100_000, 1000))


def edited(text: str, share: float, rng: random.Random) -> str:
    "A copy with a share of its words (Chinese: characters) replaced by others of the same text."
    parts = text.split(" ") if " " in text else list(text)
    for at in rng.sample(range(len(parts)), max(1, round(share * len(parts)))): parts[at] = rng.choice(parts)
    return (" " if " " in text else "").join(parts)


def one_planted(name: str, originals: list[str], n: int, n_exact: int, n_near: int, seed: int = 0) -> dict[str, object]:
    "Recall and precision on real texts with planted copies, judged by the true Jaccard similarity of their shingles."
    rng, texts, truth = random.Random(seed), list(originals), [-1] * len(originals)
    for at in rng.choices(range(len(originals)), k=n_exact):
        texts.append("  " + originals[at].replace(" ", "\u00a0").replace(".", " .") + " ")  # other spaces, another way to set a full stop
        truth.append(at)
    for k in range(n_near):
        at = rng.randrange(len(originals))
        texts.append(edited(originals[at], (.002, .005, .01, .02, .04, .08)[k % 6], rng))
        truth.append(at)
    exact = ExactDuplicates()
    exact_reasons = exact.decide(exact({"text": texts})["exact_key"])
    first = len(originals)
    gone = [i for i, why in enumerate(exact_reasons) if why]
    keys = [re.sub(r"[\W_]+", "", t.casefold()) for t in texts]
    wrong = sum(keys[i] not in set(keys[:i]) for i in gone[:200])
    hashes = MinHash(n=n)
    start = time.process_time()
    twins = near_duplicates(hashes.signatures(texts), THRESHOLD)
    seconds = time.process_time() - start
    sets: dict[int, set[str]] = {}

    def similar(i: int, j: int) -> float:
        for k in (i, j): sets[k] = sets.get(k) or shingles(texts[k], n)
        return len(sets[i] & sets[j]) / len(sets[i] | sets[j])

    copies = range(first + n_exact, len(texts))
    j = np.array([similar(i, truth[i]) for i in copies])
    hit = np.array([twins[i] >= 0 for i in copies])
    dropped = np.flatnonzero(twins >= 0)
    judged = np.array([similar(int(i), int(twins[i])) for i in dropped])
    margin = 2 * (THRESHOLD * (1 - THRESHOLD) / hashes.permutations) ** .5
    return {
        "name": name, "records": len(texts), "shingle": n, "exact_planted": n_exact,
        "exact_recall": float(np.mean([exact_reasons[i] is not None for i in range(first, first + n_exact)])),
        "exact_wrong": wrong, "exact_in_the_originals": sum(i < first for i in gone), "near_planted": n_near,
        "near_above_threshold": int((j >= THRESHOLD).sum()), "near_recall": mean(hit[j >= THRESHOLD]),
        "near_recall_from_0.85": mean(hit[j >= .85]), "near_recall_below_0.7": mean(hit[j < .7]), "near_dropped": len(dropped),
        "near_precision": mean(judged >= THRESHOLD - margin), "precision_margin": float(margin),
        "near_precision_at_0.8": mean(judged >= THRESHOLD), "near_in_the_originals": int((dropped < first).sum()), "seconds": seconds,
    }  # fmt: skip


@BENCHMARK.part()
def steps_mb_per_s(settings: Settings) -> dict[str, float]:
    "Megabytes of text per second through single steps, on one core."
    texts = [*SmallWorld().texts(n=settings.pick(1500, 20)), *SmallWorld().texts(lang="zh", n=settings.pick(500, 10))]
    size = sum(len(t.encode()) for t in texts) / 1e6
    batch = {"text": texts, "lang": ["en"] * len(texts)}
    rewrites, drops = (normalise, strip_html, drop_boilerplate, convert_chinese, mask_personal_data), (gopher_quality, gopher_repetition)
    steps = {f.__name__: Rewrite(f) for f in rewrites} | {f.__name__: Drop(f) for f in drops}
    steps |= {"Language": Language(), "ExactDuplicates": ExactDuplicates(), "NearDuplicates": NearDuplicates()}
    return {name: size / cheapest(settings.pick(2, 1), lambda: step(batch)) for name, step in steps.items()}  # noqa: B023


def poems(path: Path) -> list[str]:
    "Title, author and verses of each poem."
    return [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]


@BENCHMARK.part(data=["enwiki_dump", "chinese_poetry"])
def planted(settings: Settings) -> list[dict[str, object]]:
    [dump] = settings.folder("enwiki_dump").glob("*.bz2")
    paragraphs = [p for r in read_corpus(dump) for p in r["text"].split("\n") if len(p.split()) >= 40]
    numbers = settings.pick((200, 600), (10, 30))
    return [one_planted("paragraphs of the English Wikipedia", paragraphs, 5, *numbers),
            one_planted("poems of the Tang", poems(settings.folder("chinese_poetry") / "tang_shi_10k.txt"), 3, *numbers)]


@BENCHMARK.part(data=["enwiki_dump"])
def path(settings: Settings) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder: return whole_path(settings.folder("enwiki_dump"), Path(folder))


def whole_path(data: Path, folder: Path) -> dict[str, object]:
    "A real dump with planted trouble, from XML to shards in three formats."
    [dump] = data.glob("*.bz2")
    rng, articles = random.Random(1), [{"text": r["text"], "id": r["id"], "title": r["title"]} for r in read_corpus(dump)]

    def changed(change: Callable[[str], str], mark: str) -> list[dict]:
        return [{"text": change(r["text"]), "id": f"{r['id']} {mark}", "title": r["title"]} for r in rng.sample(articles, 10)]

    def scrambled(text: str) -> str: return " ".join(rng.choices(text.split(), k=60)).replace(" ", ", ").lower()

    rows = [*articles, *changed(lambda text: text + " \u200b", "again"), *changed(lambda text: edited(text, .01, rng), "old"),
            *changed(scrambled, "words")]
    cookies = "<nav><a href='/'>Home</a></nav><p>We use cookies.</p>"
    rows += [{"text": cookies, "id": f"cookies {k}", "title": None} for k in range(10)]
    steps = [Rewrite(strip_html), Rewrite(normalise), Rewrite(drop_boilerplate), Drop(empty), Language(), Rewrite(mask_personal_data),
             ExactDuplicates(), Drop(gopher_quality), Drop(gopher_repetition), Drop(c4_page), NearDuplicates()]
    seconds, manifests, texts = {}, {}, {}
    for form in ("jsonl", "csv", "parquet"):
        start = time.process_time()
        manifests[form] = clean(rows, steps, folder / form, format=form, shard_size=50)
        seconds[form] = time.process_time() - start
        texts[form] = [r["text"] for r in read_shards(folder / form)]
    manifest = manifests["jsonl"]
    masked = sum(len(find_personal_data(r["text"])) for r in articles)
    passages = repeated_passages([r["text"] for r in articles])
    ids = {r["id"] for r in articles}
    return {"articles": len(articles), "records_in": len(rows), "records_out": manifest["output"]["records"],
            "dropped": manifest["dropped"], "funnel": funnel(manifest), "formats_agree": texts["jsonl"] == texts["csv"] == texts["parquet"],
            "seconds": seconds, "personal_data_found": masked, "articles_with_repeated_passages": sum(map(bool, passages)),
            "originals_left": sum(r["id"] in ids for r in read_shards(folder / "jsonl")),
            "bytes": {form: sum(s["bytes"] for s in m["shards"]) for form, m in manifests.items()}}


if __name__ == "__main__": run(__file__)
