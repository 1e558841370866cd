"""How fast the readers of lmbook.corpora are, beside the barest loop that does the same, and how well a Wikipedia dump is stripped.

    python -m benchmarks.corpora --data ../shared/data

Prints a table and writes benchmarks/results/corpora.json. The data folder is described in its own README; without it only the readers
are measured, on text made here. Each time is the best of three, on one core, with the file in the system's cache.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import datetime
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

from benchmarks.common import best_of, machine, rounded
from lmbook.corpora import python_docs, read_corpus, read_csv, read_jsonl, read_parquet, read_text, to_dataset, write_jsonl

RESULTS = Path(__file__).parent / "results" / "corpora.json"
PACKAGES = ("datasets", "pyarrow", "mwparserfromhell", "charset-normalizer", "numpy")  # whose versions are noted
MEGABYTES = 20  # size of the files that the readers are measured on


def exhaust(rows: Iterable[object]) -> int: return sum(1 for _ in rows)


def plain_text(path: Path) -> int:
    with open(path, encoding="utf-8") as f: return exhaust({"text": line.rstrip("\n")} for line in f)


def plain_jsonl(path: Path) -> int:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f: return exhaust(map(json.loads, f))


def plain_csv(path: Path) -> int:
    with open(path, encoding="utf-8", newline="") as f: return exhaust(csv.DictReader(f))


def plain_parquet(path: Path) -> int: return exhaust(pq.read_table(path).to_pylist())


def readers(folder: Path) -> list[dict[str, object]]:
    "Megabytes of text per second through each reader, and through the barest Python that reads the same."
    lines = [line for topic in python_docs() for line in topic["text"].split("\n") if line.strip()]
    size = sum(len(line) + 1 for line in lines)
    lines *= MEGABYTES * 10**6 // size + 1
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
    rows = []
    for name, read, plain in (
        ("a.txt", read_text, plain_text), ("a.jsonl", read_jsonl, plain_jsonl), ("a.jsonl.gz", read_jsonl, plain_jsonl),
        ("a.csv", read_csv, plain_csv), ("a.parquet", read_parquet, plain_parquet),
    ):
        assert exhaust(read(folder / name)) == plain(folder / name) == len(lines)
        ours, bare = best_of(3, lambda: exhaust(read(folder / name))), best_of(3, lambda: plain(folder / name))  # noqa: B023
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


def wikipedia(folder: Path) -> dict[str, object]:
    "A real dump (test data of gensim): speed, and agreement with the plain text that another extractor, unnamed, made of its articles."
    [path] = folder.glob("*.bz2")
    corpus = read_corpus(path)
    ours = {record["title"]: record["text"] for record in corpus}
    seconds = best_of(3, lambda: exhaust(corpus))
    parts = re.split(r"^= (.+) =$", (folder / "enwiki96.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    theirs = dict(zip(parts[::2], parts[1::2]))
    per_article = {title: overlap(ours[title], text) for title, text in theirs.items()}
    f1 = np.array(list(per_article.values()))
    n_pages = len(ours) + corpus.skipped.total()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as folder: rows = readers(Path(folder))
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "command": "python -m benchmarks.corpora --data ../shared/data", "machine": machine(*PACKAGES)}
    result |= {"megabytes_of_text": MEGABYTES, "readers": rows}
    print(f"{'reader':28}{'MB/s':>8}{'bare loop':>12}")
    for row in rows:
        bare = f"{row['bare_megabytes_per_s']:12.1f}" if "bare_megabytes_per_s" in row else ""
        print(f"{row['reader']:28}{row['megabytes_per_s']:8.1f}{bare}")
    if data is None or not (data / "enwiki_dump").is_dir(): print("no folder enwiki_dump: give --data to measure a real dump; the file of results is left as it is")
    else:
        wiki = wikipedia(data / "enwiki_dump")
        shares = wiki["overlap"]
        result["wikipedia"] = wiki
        print(f"\nWikipedia dump: {wiki['pages']} pages, {wiki['articles']} articles, skipped {wiki['skipped']}")
        print(f"  {wiki['pages_per_s']:.0f} pages/s, {wiki['articles_per_s']:.0f} articles/s, {wiki['words_per_s']:,.0f} words/s "
              f"({wiki['seconds']:.2f} s, of which {wiki['seconds_unpacking_and_xml']:.2f} s for unpacking and XML)")
        print(f"  word overlap (F1) with the other extractor over {shares['articles']} articles: "
              f"mean {shares['mean']:.4f}, median {shares['median']:.4f}, min {shares['min']:.4f}; "
              f"all words together {shares['words']:.4f}")
        print(f"  only ours: {wiki['only_ours']} (words); the shortest that both have: {wiki['shortest_in_both']} words")
        for title, share in sorted(shares["per_article"].items(), key=lambda item: item[1])[:8]: print(f"    {share:.3f} {title}")
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
        print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
