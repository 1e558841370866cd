"""How fast the readers of lmbook.corpora are, beside the barest loop that does the same, and how well a Wikipedia dump is stripped.

    python -m benchmarks.corpora --data ../shared/data

The data folder is described in its own README; without it only the readers are measured, on text made here. Each time is the best of three,
on one core, with the file in the system's cache.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Benchmark, Settings, best_of, run
from lmbook.corpora import python_docs, read_corpus, read_csv, read_jsonl, read_parquet, read_text, to_dataset, write_jsonl

MEGABYTES = 20  # size of the files that the readers are measured on
BENCHMARK = Benchmark(
    packages=("datasets", "pyarrow", "mwparserfromhell", "charset-normalizer", "numpy"),
    facts=lambda settings: {"megabytes_of_text": settings.pick(MEGABYTES, 0.1)},
)


def exhaust(rows: Iterable[object]) -> int: return sum(1 for _ in rows)


def plain_text(path: Path) -> int:
    with open(path, encoding="utf-8") as f: return exhaust({"text": line.rstrip("\n")} for line in f)


def plain_jsonl(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f: return exhaust(map(json.loads, f))


def plain_csv(path: Path) -> int:
    with open(path, encoding="utf-8", newline="") as f: return exhaust(csv.DictReader(f))


def plain_parquet(path: Path) -> int: return exhaust(pq.read_table(path).to_pylist())


@BENCHMARK.part()
def readers(settings: Settings) -> list[dict[str, object]]:
    "Megabytes of text per second through each reader, and through the barest Python that reads the same."
    with tempfile.TemporaryDirectory() as folder: return speeds(Path(folder), settings)


def speeds(folder: Path, settings: Settings) -> list[dict[str, object]]:
    lines = [line for topic in python_docs() for line in topic["text"].split("\n") if line.strip()]
    size = sum(len(line) + 1 for line in lines)
    lines = settings.pick(lines * (MEGABYTES * 10**6 // size + 1), lines[:2000])
    text = [{"text": line, "n": n} for n, line in enumerate(lines)]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    write_jsonl(text, folder / "a.jsonl")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(text), folder / "a.parquet")
    with open(folder / "a.csv", "w", encoding="utf-8", newline="") as f:
        out = csv.DictWriter(f, ["text", "n"])
        out.writeheader()
        out.writerows(text)
    megabytes = sum(len(line.encode()) + 1 for line in lines) / 1e6
    rows, repeats = [], settings.pick(3, 1)
    for name, read, plain in (
        ("a.txt", read_text, plain_text), ("a.jsonl", read_jsonl, plain_jsonl), ("a.jsonl.gz", read_jsonl, plain_jsonl),
        ("a.csv", read_csv, plain_csv), ("a.parquet", read_parquet, plain_parquet),
    ):
        assert exhaust(read(folder / name)) == plain(folder / name) == len(lines)
        ours = best_of(repeats, lambda: exhaust(read(folder / name)))  # noqa: B023
        bare = best_of(repeats, lambda: plain(folder / name))  # noqa: B023
        rows.append({"reader": f"{read.__name__} {name[1:]}", "megabytes_per_s": megabytes / ours, "bare_megabytes_per_s": megabytes / bare,
                     "records_per_s": len(lines) / ours})
    corpus = read_jsonl(folder / "a.jsonl")
    assert len(to_dataset(corpus)) == len(lines)
    rows.append({"reader": "to_dataset(read_jsonl)", "megabytes_per_s": megabytes / best_of(1, lambda: to_dataset(corpus))})
    return rows


def overlap(ours: str, theirs: str) -> float:
    "F1 of the multisets of lower-cased words: 1 if both have the same words equally often."
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (ours, theirs))
    return 2 * (a & b).total() / (a.total() + b.total())


def bare_dump(path: Path) -> int:
    "Unpack and parse the XML, and do nothing with it."
    with bz2.open(path) as f: return sum(element.tag.endswith("}page") for _, element in ET.iterparse(f))


@BENCHMARK.part(data=["enwiki_dump"])
def wikipedia(settings: Settings) -> dict[str, object]:
    "A real dump (test data of gensim): speed, and agreement with the plain text that another extractor, unnamed, made of its articles."
    folder = settings.folder("enwiki_dump")
    [path] = folder.glob("*.bz2")
    corpus = read_corpus(path)
    ours = {record["title"]: record["text"] for record in corpus}
    seconds = best_of(3, lambda: exhaust(corpus))
    parts = re.split(r"^= (.+) =$", (folder / "enwiki96.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    theirs = dict(zip(parts[::2], parts[1::2]))
    per_article = {title: overlap(ours[title], text) for title, text in theirs.items()}
    f1 = np.array(list(per_article.values()))
    n_pages = len(ours) + sum(n for what, n in corpus.skipped.items() if what != "sentence with a hole")
    lengths = {title: len(text.split()) for title, text in ours.items()}
    n_words = sum(lengths.values())
    return {
        "pages": n_pages, "articles": len(ours), "skipped": dict(corpus.skipped), "words": n_words, "seconds": seconds,
        "only_ours": {title: n for title, n in sorted(lengths.items(), key=lambda item: item[1]) if title not in theirs},  # words
        "shortest_in_both": min(lengths[title] for title in theirs),
        "seconds_unpacking_and_xml": best_of(3, lambda: bare_dump(path)),
        "pages_per_s": n_pages / seconds, "articles_per_s": len(ours) / seconds, "words_per_s": n_words / seconds,
        "overlap": {"articles": len(f1), "mean": f1.mean(), "median": float(np.median(f1)), "min": f1.min(),
                    "words": overlap("\n".join(ours[title] for title in theirs), "\n".join(theirs.values())), "per_article": per_article},
    }


if __name__ == "__main__": run(__file__)
