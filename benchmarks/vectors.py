"""How fast files of word vectors are read and written beside gensim, and what vectors from unlabelled text are worth on real sentences.

    python -m benchmarks.vectors --data ../shared/data

Files: 200,000 vectors of 100 numbers, made here; best of three, in turns, on one core, files in the system's cache (written ones synced by us, not by
gensim). Both must give equal bits. Sentences: SIB-200 topics in English and Chinese, the mean of the words' vectors and a linear layer, from random vectors and from
skip-gram vectors (gensim, one worker) of Wikipedia paragraphs, frozen and fine-tuned; the rate of each is chosen on the development set with seeds that are not shown.
Prints tables and writes benchmarks/results/vectors.json. The data folder is described in its own README; without it the second part is left out, and the file as it is.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import inspect
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gensim.models import KeyedVectors, Word2Vec
from torch import nn

from benchmarks.common import best_of, machine, rounded
from lmbook.batches import Batch
from lmbook.corpora import words as words_of
from lmbook.embeddings import WordVectors
from lmbook.tokenization import jieba_words
from lmbook.training import TrainConfig, Trainer
from lmbook.vectors import embedding_layer, open_vectors, read_vectors, stream_vectors, write_vectors

RESULTS = Path(__file__).parent / "results" / "vectors.json"
COMMAND = "python -m benchmarks.vectors --data ../shared/data"
PACKAGES = ("gensim", "numpy", "pyarrow", "safetensors", "torch", "jieba")
D = 100
SIZES, SEEDS, RATES, STEPS = (50, 200, 701), range(5), (.01, .03, .1, .3), 60


def peak(code: str) -> int:
    "Megabytes that a fresh process takes at most to do something."
    script = f"{code}\nfrom pathlib import Path\n{inspect.getsource(own_peak)}\nprint(own_peak())"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1])


def own_peak() -> int:
    "Megabytes. Not by getrusage under Linux, where a process begins with the peak of the one that started it."
    status = Path("/proc/self/status")
    if status.exists(): return round(int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
    import resource  # not under Windows

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def in_turns(*runs) -> list[float]:
    "The best of three of each, taken in turns, so that what slows the machine down slows all of them down."
    times = [[best_of(1, run) for run in runs] for _ in range(3)]
    return [min(column) for column in zip(*times)]


def files(folder: Path, V: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    names = [f"word{i}" for i in range(V)]
    ours = WordVectors(names, (rng.normal(size=(V, D)) * .3).astype(np.float32))
    theirs = KeyedVectors(D)
    theirs.add_vectors(names, ours.matrix)
    rows = []
    for format, name, binary in (("binary", "a.bin", True), ("binary, gz", "a.bin.gz", True), ("text", "a.vec", False)):
        path, other = folder / name, folder / f"gensim-{name}"
        a, b = in_turns(lambda: write_vectors(ours, path), lambda: theirs.save_word2vec_format(str(other), binary=binary))  # noqa: B023
        rows.append({"what": "write", "format": format, "seconds": a, "gensim_seconds": b, "ratio": b / a, "megabytes": path.stat().st_size / 1e6})
        for file in (path, other):
            assert np.array_equal(read_vectors(file).matrix, ours.matrix)
            assert np.array_equal(KeyedVectors.load_word2vec_format(str(file), binary=binary).vectors, ours.matrix)
        a, b = in_turns(lambda: read_vectors(path), lambda: KeyedVectors.load_word2vec_format(str(path), binary=binary))  # noqa: B023
        rows.append({"what": "read", "format": format, "seconds": a, "gensim_seconds": b, "ratio": b / a})
    glove = folder / "a.txt"
    write_vectors(ours, glove)
    a, b = in_turns(lambda: read_vectors(glove), lambda: KeyedVectors.load_word2vec_format(str(glove), no_header=True))
    rows.append({"what": "read", "format": "GloVe text", "seconds": a, "gensim_seconds": b, "ratio": b / a})
    some = names[:: max(1, V // 2000)]
    rows.append({"what": "read 2,000 of the words", "format": "GloVe text", "seconds": best_of(3, lambda: read_vectors(glove, words=some))})
    rows.append({"what": "stream", "format": "binary", "seconds": best_of(1, lambda: sum(1 for _ in stream_vectors(folder / "a.bin")))})
    rows.append({"what": "copy for open_vectors", "format": "GloVe text", "seconds": best_of(1, lambda: open_vectors(glove))})
    rows.append({"what": "open_vectors", "format": "copy", "seconds": best_of(3, lambda: open_vectors(glove))})
    assert np.array_equal(open_vectors(glove).matrix, ours.matrix)
    return rows


def memory(folder: Path) -> dict[str, int]:
    "Megabytes at most, of processes that do nothing else; at the default size the vectors themselves are 80."
    ours = "from lmbook.vectors import *; "
    theirs = "from gensim.models import KeyedVectors; "
    bin_, text = str(folder / "a.bin"), str(folder / "a.vec")
    return {
        "import lmbook.vectors": peak(ours + "import pyarrow.compute"), "import gensim": peak(theirs),
        "read_vectors, binary": peak(ours + f"read_vectors({bin_!r})"), "gensim, binary": peak(theirs + f"KeyedVectors.load_word2vec_format({bin_!r}, binary=True)"),
        "read_vectors, text": peak(ours + f"read_vectors({text!r})"), "gensim, text": peak(theirs + f"KeyedVectors.load_word2vec_format({text!r})"),
        "stream_vectors, text": peak(ours + f"any(False for _ in stream_vectors({text!r}))"), "open_vectors, copy": peak(ours + f"open_vectors({str(folder / 'a.txt')!r})"),
    }


class MeanOfVectors(nn.Module):
    def __init__(self, layer: nn.Embedding, n_classes: int):
        super().__init__()
        self.embed, self.out = layer, nn.Linear(layer.embedding_dim, n_classes)

    def forward(self, ids): return self.out(F.embedding_bag(ids, self.embed.weight, mode="mean", padding_idx=0))


def class_loss(model, batch):
    labels = batch.targets[:, 0]
    return F.cross_entropy(model(batch.ids), labels, reduction="sum"), len(labels)


STARTS = {"random": (False, False), "random, frozen": (False, True), "given, frozen": (True, True), "given, fine-tuned": (True, False)}


def unlabelled(data: Path, lang: str) -> list[list[str]]:
    if lang == "zh":
        lines = (data / "zhwiki/zhwiki_contexts.txt").read_text(encoding="utf-8").split("\n")
        return [[word for word in jieba_words(line) if word.strip()] for line in lines if line.strip()]
    paragraphs = (data / "enwiki_dump/enwiki96.txt").read_text(encoding="utf-8").split("\n")
    squad = json.loads(next((data / "squad").glob("*.json")).read_text(encoding="utf-8"))["data"]
    paragraphs += [p["context"] for article in squad for p in article["paragraphs"]]
    return [words_of(p) for p in paragraphs if p.strip()]


def sib200(data: Path, lang: str) -> dict[str, object]:
    text = unlabelled(data, lang)
    model = Word2Vec(text, vector_size=100, window=5, negative=5, sg=1, min_count=3, epochs=5, workers=1, seed=0)
    vectors = WordVectors(model.wv.index_to_key, model.wv.vectors)
    index = {word: i for i, word in enumerate(vectors.words, 1)}
    folder = data / "sib200" / {"en": "eng_Latn", "zh": "zho_Hans"}[lang]
    cut = words_of if lang == "en" else jieba_words
    sets, labels, unseen = {}, None, 0
    for split in ("train", "dev", "test"):
        with open(folder / f"{split}.tsv", encoding="utf-8", newline="") as file: rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        labels = labels or sorted({row["category"] for row in rows})
        ids = [[index[word] for word in cut(row["text"]) if word in index] for row in rows]
        tokens = sum(len([w for w in cut(row["text"]) if w.strip()]) for row in rows)
        unseen = 1 - sum(map(len, ids)) / tokens
        sets[split] = torch.nn.utils.rnn.pad_sequence([torch.tensor(row or [0]) for row in ids], batch_first=True), torch.tensor([labels.index(row["category"]) for row in rows])

    def accuracy(name: str, n: int, seed: int, lr: float, split: str) -> float:
        use, freeze = STARTS[name]
        begin = vectors if use else WordVectors(vectors.words, torch.randn(vectors.matrix.shape, generator=torch.Generator().manual_seed(seed)))
        layer, _ = embedding_layer(begin, index, freeze=freeze, padding_id=0, scale=1.)
        ids, y = sets["train"]
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:n]
        torch.manual_seed(seed)
        net = MeanOfVectors(layer, len(labels))
        Trainer(net, [Batch(ids[chosen], y[chosen, None])], TrainConfig(steps=STEPS, lr=lr, seed=seed, device="cpu"), loss=class_loss).fit()
        ids, y = sets[split]
        with torch.no_grad(): return (net(ids).argmax(1) == y).float().mean().item()

    found, chosen_rates = {}, {}
    for name in STARTS:
        rate = chosen_rates[name] = max(RATES, key=lambda lr: np.mean([accuracy(name, 200, seed, lr, "dev") for seed in (101, 102)]))  # noqa: B023
        found[name] = {}
        for n in SIZES:
            values = [accuracy(name, n, seed, rate, "test") for seed in SEEDS]
            found[name][str(n)] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)), "values": values}
        print(f"  {lang} {name:20}" + "".join(f"{n:>6}: {a['mean']:.3f} ± {a['sd']:.3f}" for n, a in found[name].items()), flush=True)
    return {"text_words": sum(map(len, text)), "words": len(vectors), "classes": len(labels), "test": len(sets["test"][0]), "seeds": len(SEEDS),
            "most_frequent": sets["test"][1].bincount().max().item() / len(sets["test"][1]), "test_words_without_vector": unseen, "rates": chosen_rates, "accuracy": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--vectors", type=int, default=200_000, help="how many vectors the files hold")
    arguments = parser.parse_args()
    data, V = arguments.data, arguments.vectors
    logging.getLogger("gensim").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    result: dict[str, object] = {"date": datetime.date.today().isoformat(), "command": COMMAND + (f" --vectors {V}" if V != 200_000 else ""), "machine": machine(*PACKAGES), "vectors": [V, D]}
    with tempfile.TemporaryDirectory() as folder:
        result["files"] = rows = files(Path(folder), V)
        result["memory_megabytes"] = memory(Path(folder))
    print(f"{V:,} vectors of {D} numbers\n{'':26}{'format':14}{'seconds':>9}{'gensim':>9}{'ratio':>7}")
    for row in rows:
        beside = f"{row['gensim_seconds']:9.3f}{row['ratio']:7.1f}" if "ratio" in row else ""
        print(f"{row['what']:26}{row['format']:14}{row['seconds']:9.3f}{beside}")
    print("peak memory (MB):", result["memory_megabytes"])
    if data is None or not (data / "sib200").is_dir():
        print("no folder sib200: give --data to compare on real sentences; the file of results is left as it is")
        return
    result["sib200"] = {lang: sib200(data, lang) for lang in ("en", "zh")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    print(f"\nwritten: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
