"""How fast lmbook.cleaning and lmbook.duplicates are beside datasketch, and how well they find duplicates that were planted in real text.

    python -m benchmarks.cleaning --data ../shared/data

Prints tables and writes benchmarks/results/cleaning.json. The data folder is described in its own README; without it only the speed is
measured, on text made here. Each time is the best of three, in seconds of the processor, on one core: another load on the machine counts
little that way. (All that is compared runs in one thread.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasketch
import numpy as np

from benchmarks.common import machine, rounded
from lmbook.cleaning import (
    Drop,
    ExactDuplicates,
    Language,
    Rewrite,
    c4_page,
    convert_chinese,
    drop_boilerplate,
    empty,
    find_personal_data,
    gopher_quality,
    gopher_repetition,
    mask_personal_data,
    normalise,
    strip_html,
)
from lmbook.corpora import read_corpus
from lmbook.duplicates import MinHash, NearDuplicates, near_duplicates, repeated_passages
from lmbook.shards import clean, funnel, read_shards
from lmbook.small_world import SmallWorld

RESULTS = Path(__file__).parent / "results" / "cleaning.json"
PACKAGES = ("datasketch", "numpy", "pyarrow", "opencc", "py3langid")
TOKEN = re.compile(r"[^\W_\u3400-\u9fff]+|[\u3400-\u9fff]")
THRESHOLD = 0.8


def best_of(repeats: int, run: Callable[[], object]) -> float:
    "Seconds of the processor that the cheapest of some runs took."
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def shingles(text: str, n: int) -> set[str]:
    words = TOKEN.findall(text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))}


def minhash_speed(n_texts: int = 4000, permutations: int = 128) -> dict[str, object]:
    """Texts per second into signatures. We start from texts; datasketch gets its shingles ready-made, as bytes, so that only its own work counts.

    `ratio` is to the fastest way that it offers with its own hash, `bulk`; text by text is slower, another hash than SHA-1 (CRC-32) faster.
    """
    texts = list(SmallWorld().texts(n=n_texts))
    ready = [[s.encode() for s in sorted(shingles(text, 5))] for text in texts]
    ours, blocks = MinHash(permutations), range(0, n_texts, 1000)
    fast_hash = partial(_crc, 0)

    def one_by_one(hashfunc: Callable | None) -> None:
        for row in ready:
            m = datasketch.MinHash(permutations, **({"hashfunc": hashfunc} if hashfunc else {}))
            m.update_batch(row)

    def bulk(hashfunc: Callable | None) -> None:
        datasketch.MinHash.bulk(ready, num_perm=permutations, **({"hashfunc": hashfunc} if hashfunc else {}))

    def us() -> None:
        for at in blocks: ours.signatures(texts[at : at + 1000])

    us()
    theirs = {"one by one": best_of(3, lambda: one_by_one(None)), "bulk": best_of(3, lambda: bulk(None)), "bulk, crc32": best_of(3, lambda: bulk(fast_hash))}
    mine, shingling = best_of(3, us), best_of(3, lambda: [ours.shingles(texts[at : at + 100]) for at in range(0, n_texts, 100)])
    a, b = ready[0], ready[0][: len(ready[0]) // 2] + ready[1]
    pair = datasketch.MinHash.bulk([a, b], num_perm=permutations)
    true = len(set(a) & set(b)) / len(set(a) | set(b))
    return {"texts": n_texts, "permutations": permutations, "shingles_per_text": float(np.mean([len(row) for row in ready])), "ours_per_s": n_texts / mine,
            "of_which_shingling": shingling / mine, "datasketch_per_s": n_texts / theirs["bulk"],
            "datasketch_all_per_s": {name: n_texts / seconds for name, seconds in theirs.items()}, "ratio": theirs["bulk"] / mine, "ratio_to_crc32": theirs["bulk, crc32"] / mine,
            "datasketch_estimate_error": abs(pair[0].jaccard(pair[1]) - true), "signature_bytes": permutations * 4}


def _crc(start: int, data: bytes) -> int:
    import zlib

    return zlib.crc32(data, start)


def search_memory(n: int = 100_000, permutations: int = 128) -> dict[str, float]:
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
    return {"texts": n, "seconds": seconds, "texts_per_s": n / seconds, "search_mb_per_million": peak / n, "signatures_mb_per_million": permutations * 4.0}


def edited(text: str, share: float, rng: random.Random) -> str:
    "A copy with a share of its words (Chinese: characters) replaced by others of the same text."
    parts = text.split(" ") if " " in text else list(text)
    for at in rng.sample(range(len(parts)), max(1, round(share * len(parts)))): parts[at] = rng.choice(parts)
    return (" " if " " in text else "").join(parts)


def planted(name: str, originals: list[str], n: int, n_exact: int = 200, n_near: int = 600, seed: int = 0) -> dict[str, object]:
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
    minhash = MinHash(n=n)
    start = time.process_time()
    twins = near_duplicates(minhash.signatures(texts), THRESHOLD)
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
    margin = 2 * (THRESHOLD * (1 - THRESHOLD) / minhash.permutations) ** .5
    return {"name": name, "records": len(texts), "shingle": n, "exact_planted": n_exact, "exact_recall": float(np.mean([exact_reasons[i] is not None for i in range(first, first + n_exact)])),
            "exact_wrong": wrong, "exact_in_the_originals": sum(i < first for i in gone), "near_planted": n_near, "near_above_threshold": int((j >= THRESHOLD).sum()),
            "near_recall": float(hit[j >= THRESHOLD].mean()), "near_recall_from_0.85": float(hit[j >= .85].mean()), "near_recall_below_0.7": float(hit[j < .7].mean()),
            "near_dropped": len(dropped), "near_precision": float((judged >= THRESHOLD - margin).mean()), "precision_margin": float(margin),
            "near_precision_at_0.8": float((judged >= THRESHOLD).mean()), "near_in_the_originals": int((dropped < first).sum()), "seconds": seconds}


def steps_speed(texts: list[str]) -> dict[str, float]:
    "Megabytes of text per second through single steps, on one core."
    size = sum(len(t.encode()) for t in texts) / 1e6
    batch = {"text": texts, "lang": ["en"] * len(texts)}
    steps = {"normalise": Rewrite(normalise), "strip_html": Rewrite(strip_html), "drop_boilerplate": Rewrite(drop_boilerplate), "Language": Language(),
             "convert_chinese": Rewrite(convert_chinese), "mask_personal_data": Rewrite(mask_personal_data), "gopher_quality": Drop(gopher_quality),
             "gopher_repetition": Drop(gopher_repetition), "ExactDuplicates": ExactDuplicates(), "NearDuplicates": NearDuplicates()}
    return {name: size / best_of(2, lambda: step(batch)) for name, step in steps.items()}  # noqa: B023


def whole_path(dump: Path, folder: Path) -> dict[str, object]:
    "A real dump with planted trouble, from XML to shards in three formats."
    rng, articles = random.Random(1), [{"text": r["text"], "id": r["id"], "title": r["title"]} for r in read_corpus(dump)]
    rows = list(articles)
    rows += [{"text": r["text"] + " \u200b", "id": r["id"] + " again", "title": r["title"]} for r in rng.sample(articles, 10)]
    rows += [{"text": edited(r["text"], .01, rng), "id": r["id"] + " old", "title": r["title"]} for r in rng.sample(articles, 10)]
    rows += [{"text": " ".join(rng.choices(r["text"].split(), k=60)).replace(" ", ", ").lower(), "id": r["id"] + " words", "title": r["title"]} for r in rng.sample(articles, 10)]
    rows += [{"text": "<nav><a href='/'>Home</a></nav><p>We use cookies.</p>", "id": f"cookies {k}", "title": None} for k in range(10)]
    steps = [Rewrite(strip_html), Rewrite(normalise), Rewrite(drop_boilerplate), Drop(empty), Language(), Rewrite(mask_personal_data), ExactDuplicates(),
             Drop(gopher_quality), Drop(gopher_repetition), Drop(c4_page), NearDuplicates()]
    seconds, manifests, texts = {}, {}, {}
    for form in ("jsonl", "csv", "parquet"):
        start = time.process_time()
        manifests[form] = clean(rows, steps, folder / form, format=form, shard_size=50)
        seconds[form] = time.process_time() - start
        texts[form] = [r["text"] for r in read_shards(folder / form)]
    manifest = manifests["jsonl"]
    masked = sum(len(find_personal_data(r["text"])) for r in articles)
    passages = repeated_passages([r["text"] for r in articles])
    return {"articles": len(articles), "records_in": len(rows), "records_out": manifest["output"]["records"], "dropped": manifest["dropped"], "funnel": funnel(manifest),
            "formats_agree": texts["jsonl"] == texts["csv"] == texts["parquet"], "seconds": seconds, "personal_data_found": masked,
            "articles_with_repeated_passages": sum(map(bool, passages)), "originals_left": sum(r["id"] in {a["id"] for a in articles} for r in read_shards(folder / "jsonl")),
            "bytes": {form: sum(s["bytes"] for s in m["shards"]) for form, m in manifests.items()}}


def poems(path: Path) -> list[str]:
    "Title, author and verses of each poem."
    return [p.strip() for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    data = parser.parse_args().data
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.cleaning --data ../shared/data", "machine": machine(*PACKAGES)}
    speed, memory = minhash_speed(), search_memory()
    speed |= {"mb_per_million": memory["signatures_mb_per_million"] + memory["search_mb_per_million"]}
    result |= {"minhash": speed, "search": memory, "steps_mb_per_s": steps_speed([*SmallWorld().texts(n=1500), *SmallWorld().texts(lang="zh", n=500)])}
    print(f"MinHash, {speed['permutations']} permutations, {speed['shingles_per_text']:.0f} shingles a text: ours {speed['ours_per_s']:,.0f} texts/s "
          f"({speed['of_which_shingling']:.0%} of it shingling), datasketch {speed['datasketch_per_s']:,.0f} without shingling, ratio {speed['ratio']:.1f} "
          f"({speed['ratio_to_crc32']:.1f} to datasketch with CRC-32)")
    for name, per_s in speed["datasketch_all_per_s"].items(): print(f"    datasketch, {name}: {per_s:,.0f} texts/s")
    print(f"memory per million texts: signatures {memory['signatures_mb_per_million']:.0f} MB, search {memory['search_mb_per_million']:.0f} MB more; "
          f"search {memory['texts_per_s']:,.0f} texts/s")
    for name, mb in result["steps_mb_per_s"].items(): print(f"  {name:20}{mb:8.1f} MB/s")
    if data is None or not (data / "enwiki_dump").is_dir(): print("no real data: give --data to measure on them; the file of results is left as it is")
    else:
        [dump] = (data / "enwiki_dump").glob("*.bz2")
        paragraphs = [p for r in read_corpus(dump) for p in r["text"].split("\n") if len(p.split()) >= 40]
        result["planted"] = [planted("paragraphs of the English Wikipedia", paragraphs, 5), planted("poems of the Tang", poems(data / "chinese_poetry" / "tang_shi_10k.txt"), 3)]
        with tempfile.TemporaryDirectory() as folder: result["path"] = whole_path(dump, Path(folder))
        for row in result["planted"]: print(json.dumps(rounded(row), ensure_ascii=False))
        print(json.dumps(rounded(result["path"]), ensure_ascii=False))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
        print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
