"""How fast files of word vectors are read and written beside gensim, and what vectors from unlabelled text are worth on real sentences.

    python -m benchmarks.vectors --data ../shared/data

Files: 200,000 vectors of 100 numbers, made here; best of three, in turns, on one core, files in the system's cache (written ones synced by
us, not by gensim). Both must give equal bits. Sentences: SIB-200 topics in English and Chinese, the mean of the words' vectors and a linear
layer, from random vectors and from skip-gram vectors (gensim, one worker) of Wikipedia paragraphs, frozen and fine-tuned; the rate of each
is chosen on the development set with seeds that are not shown. The data folder is described in its own README; without it the second part
is left out.
"""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gensim.models import KeyedVectors, Word2Vec
from torch import nn

from benchmarks.common import HERE, Benchmark, Option, Settings, best_of, fastest, in_turns, mean_sd, run
from lmbook.batches import Batch
from lmbook.tokenization import jieba_words
from lmbook.training import TrainConfig, Trainer
from lmbook.vector_files import open_vectors, read_vectors, stream_vectors, write_vectors
from lmbook.vectors import embedding_layer
from lmbook.word_counts import words as words_of
from lmbook.word_vectors import WordVectors

D = 100
SIZES, RATES, STEPS = (50, 200, 701), (.01, .03, .1, .3), 60
BENCHMARK = Benchmark(
    packages=("gensim", "numpy", "pyarrow", "safetensors", "torch", "jieba"), seeds=5,
    options=[Option("vectors", 200_000, 300, "how many vectors the files hold")],
    facts=lambda settings: {"vectors": [settings.vectors, D]},
)


def peak(code: str) -> int:
    "Megabytes that a fresh process takes at most to do something."
    script = f"{code}\nfrom benchmarks.common import memory\nprint(round(memory(peak=True) / 1e6))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=HERE.parent)
    return int(done.stdout.split()[-1])


def both(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    "The fastest of some rounds of each."
    best = fastest(in_turns({"ours": ours, "gensim": theirs}, rounds, warm_up=False))
    return {"seconds": best["ours"], "gensim_seconds": best["gensim"], "ratio": best["gensim"] / best["ours"]}


def some_vectors(V: int) -> WordVectors:
    rng = np.random.default_rng(0)
    return WordVectors([f"word{i}" for i in range(V)], (rng.normal(size=(V, D)) * .3).astype(np.float32))


@BENCHMARK.part()
def files(settings: Settings) -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder: return reading_and_writing(Path(folder), settings.vectors, settings.pick(3, 1))


def reading_and_writing(folder: Path, V: int, rounds: int) -> list[dict[str, object]]:
    ours = some_vectors(V)
    names, theirs = list(ours.words), KeyedVectors(D)
    theirs.add_vectors(names, ours.matrix)
    rows = []
    for format, name, binary in (("binary", "a.bin", True), ("binary, gz", "a.bin.gz", True), ("text", "a.vec", False)):
        path, other = folder / name, folder / f"gensim-{name}"

        def write(path=path) -> None: write_vectors(ours, path)
        def read(path=path) -> WordVectors: return read_vectors(path)
        def their_write(path=other, binary=binary) -> None: theirs.save_word2vec_format(str(path), binary=binary)
        def their_read(path=path, binary=binary) -> KeyedVectors: return KeyedVectors.load_word2vec_format(str(path), binary=binary)

        times = both(write, their_write, rounds)
        rows.append({"what": "write", "format": format, **times, "megabytes": path.stat().st_size / 1e6})
        for file in (path, other):
            assert np.array_equal(read(file).matrix, ours.matrix)
            assert np.array_equal(their_read(file).vectors, ours.matrix)
        rows.append({"what": "read", "format": format, **both(read, their_read, rounds)})
    glove = folder / "a.txt"
    write_vectors(ours, glove)
    times = both(lambda: read_vectors(glove), lambda: KeyedVectors.load_word2vec_format(str(glove), no_header=True), rounds)
    rows.append({"what": "read", "format": "GloVe text", **times})
    some = names[:: max(1, V // 2000)]
    for what, format, repeats, work in (
        ("read 2,000 of the words", "GloVe text", rounds, lambda: read_vectors(glove, words=some)),
        ("stream", "binary", 1, lambda: sum(1 for _ in stream_vectors(folder / "a.bin"))),
        ("copy for open_vectors", "GloVe text", 1, lambda: open_vectors(glove)),
        ("open_vectors", "copy", rounds, lambda: open_vectors(glove)),
    ): rows.append({"what": what, "format": format, "seconds": best_of(repeats, work)})
    assert np.array_equal(open_vectors(glove).matrix, ours.matrix)
    return rows


@BENCHMARK.part()
def memory_megabytes(settings: Settings) -> dict[str, int]:
    "At most, of processes that do nothing else; at the default size the vectors themselves are 80."
    ours = "from lmbook.vector_files import open_vectors, read_vectors, stream_vectors; "
    theirs = "from gensim.models import KeyedVectors; "
    with tempfile.TemporaryDirectory() as folder:
        binary, text, glove = (str(Path(folder, name)) for name in ("a.bin", "a.vec", "a.txt"))
        for path in (binary, text, glove): write_vectors(some_vectors(settings.vectors), path)
        open_vectors(glove)  # writes the copy
        work = {
            "import lmbook.vectors": ours + "import pyarrow.compute", "import gensim": theirs,  # the names that are stored
            "read_vectors, binary": ours + f"read_vectors({binary!r})",
            "gensim, binary": theirs + f"KeyedVectors.load_word2vec_format({binary!r}, binary=True)",
            "read_vectors, text": ours + f"read_vectors({text!r})", "gensim, text": theirs + f"KeyedVectors.load_word2vec_format({text!r})",
            "stream_vectors, text": ours + f"any(False for _ in stream_vectors({text!r}))",
            "open_vectors, copy": ours + f"open_vectors({glove!r})",
        }  # fmt: skip
        if settings.dry: return dict.fromkeys(work, peak("\n".join(work.values())))  # all in one process: starting one takes seconds
        return {name: peak(code) for name, code in work.items()}


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


@BENCHMARK.part(data=["sib200", "zhwiki", "enwiki_dump", "squad"])
def sib200(settings: Settings) -> dict[str, object]: return {lang: topics(settings, lang) for lang in ("en", "zh")}


def topics(settings: Settings, lang: str) -> dict[str, object]:
    "The topics of sentences in one language."
    logging.getLogger("gensim").setLevel(logging.ERROR)
    text = unlabelled(settings.data, lang)
    model = Word2Vec(text, vector_size=100, window=5, negative=5, sg=1, min_count=3, epochs=settings.pick(5, 1), workers=1, seed=0)
    vectors = WordVectors(model.wv.index_to_key, model.wv.vectors)
    index = {word: i for i, word in enumerate(vectors.words, 1)}
    folder = settings.folder("sib200") / {"en": "eng_Latn", "zh": "zho_Hans"}[lang]
    cut = words_of if lang == "en" else jieba_words
    sizes, rates, steps = settings.pick((SIZES, RATES, STEPS), ((10, 20), RATES[:2], 2))
    sets, labels, unseen = {}, None, 0
    for split in ("train", "dev", "test"):
        with open(folder / f"{split}.tsv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        labels = labels or sorted({row["category"] for row in rows})
        ids = [[index[word] for word in cut(row["text"]) if word in index] for row in rows]
        tokens = sum(len([w for w in cut(row["text"]) if w.strip()]) for row in rows)
        unseen = 1 - sum(map(len, ids)) / tokens
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row or [0]) for row in ids], batch_first=True)
        sets[split] = padded, torch.tensor([labels.index(row["category"]) for row in rows])

    def accuracy(name: str, n: int, seed: int, lr: float, split: str) -> float:
        use, freeze = STARTS[name]
        random = torch.randn(vectors.matrix.shape, generator=torch.Generator().manual_seed(seed))
        layer, _ = embedding_layer(vectors if use else WordVectors(vectors.words, random), index, freeze=freeze, pad_id=0, scale=1.)
        ids, y = sets["train"]
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:n]
        torch.manual_seed(seed)
        net = MeanOfVectors(layer, len(labels))
        config = TrainConfig(steps=steps, lr=lr, seed=seed, device="cpu")
        Trainer(net, [Batch(ids[chosen], y[chosen, None])], config, loss=class_loss).fit()
        ids, y = sets[split]
        with torch.no_grad(): return (net(ids).argmax(1) == y).float().mean().item()

    def on_dev(name: str, lr: float) -> float: return np.mean([accuracy(name, 200, seed, lr, "dev") for seed in (101, 102)])

    found, chosen_rates = {}, {}
    for name in STARTS:
        rate = chosen_rates[name] = max(rates, key=lambda lr: on_dev(name, lr))  # noqa: B023
        found[name] = {}
        for n in sizes:
            values = [accuracy(name, n, seed, rate, "test") for seed in range(settings.seeds)]
            found[name][str(n)] = {**mean_sd(values), "values": values}
        print(f"  {lang} {name:20}" + "".join(f"{n:>6}: {a['mean']:.3f} ± {a['sd']:.3f}" for n, a in found[name].items()), flush=True)
    counts = sets["test"][1].bincount()
    return {"text_words": sum(map(len, text)), "words": len(vectors), "classes": len(labels), "test": int(counts.sum()),
            "seeds": settings.seeds, "most_frequent": counts.max().item() / int(counts.sum()), "test_words_without_vector": unseen,
            "rates": chosen_rates, "accuracy": found}


if __name__ == "__main__": run(__file__)
