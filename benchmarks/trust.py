"""Trust on real text: calibration, noise, an adversary, another language, and what an encoder holds about professions.

    python -m benchmarks.trust --data DATA

calibration: a linear reader of words trained on SST-2 (film reviews, good or bad) for too long; its temperature is fitted on the
development set and judged on the test set. robustness: such a reader, and a network that reads letters (on the first 2,000 training texts;
eight seeds, as trained, trained with one letter of each text changed at random, and trained against one flip of HotFlip; differences are
of the same seed), on the test set with noise and, the latter, under attack. languages: a
linear reader of characters and their pairs trained on SIB-200 (topics of news) in one language or both, tested in both. winogender: for the
sentences of Rudinger et al. (2018), whether the encoder all-MiniLM-L6-v2 sees the version with `they` nearer to that with `she` or to that
with `he`, and how this goes with the share of women in the occupation; intervals by occupation.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Benchmark, Option, Settings, mean_sd, run
from lmbook.evaluation import Score, accuracy, pearson
from lmbook.trust import Noise, add_noise, brier, expected_calibration_error, fit_temperature, hotflip, log_score

BENCHMARK = Benchmark(packages=("torch",), seeds=8, options=[Option("epochs", 5, 1, "of the reader of letters")])
Rows = list[tuple[str, int]]
KINDS: tuple[Noise, ...] = ("typos", "swaps", "drops", "repeats", "case")


def shown(score: Score) -> dict[str, float]: return {"value": score.value, "error": score.error}


def sst2(folder: Path) -> dict[str, Rows]:
    out = {}
    for split in ("train", "dev", "test"):
        lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").split("\n")
        out[split] = [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines if line)]
    return out


def words(text: str) -> list[str]: return re.findall(r"\w+", text.lower())


def characters(text: str) -> list[str]: return [text[i : i + n].lower() for n in (1, 2) for i in range(len(text) - n + 1)]


class Linear:
    "A linear model of counted features, trained on all texts at once."

    def __init__(self, rows: Rows, features: Callable[[str], Iterable[str]], classes: int, steps: int, decay: float = 0.0):
        counts = Counter(f for text, _ in rows for f in features(text))
        self.features, self.index = features, {f: i for i, f in enumerate(f for f, n in counts.items() if n > 1)}
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(len(self.index), classes, mode="sum")
        nn.init.zeros_(self.bag.weight)
        ids, starts = self.encode([text for text, _ in rows])
        y = torch.tensor([label for _, label in rows])
        optimizer = torch.optim.AdamW(self.bag.parameters(), lr=0.02, weight_decay=decay)
        for _ in range(steps):
            loss = F.cross_entropy(self.bag(ids, starts), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [[self.index[f] for f in self.features(text) if f in self.index] for text in texts]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return torch.tensor([i for row in rows for i in row], dtype=torch.long), torch.tensor(starts)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor: return self.bag(*self.encode(texts))


class Letters(nn.Module):
    "The network of the chapter, a little larger."

    def __init__(self, rows: Rows, length: int = 120):
        super().__init__()
        self.letters, self.length = sorted({letter for text, _ in rows for letter in text}), length
        self.index = {letter: i + 2 for i, letter in enumerate(self.letters)}
        self.embed = nn.Embedding(len(self.letters) + 2, 16, padding_idx=0)
        self.filters, self.out = nn.Conv1d(16, 48, 5, padding=2), nn.Linear(48, 2)

    def forward(self, ids: Tensor) -> Tensor: return self.out(F.relu(self.filters(self.embed(ids).mT)).amax(-1))

    def encode(self, texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(ids, texts):
            known = [self.index.get(letter, 1) for letter in text[: self.length]]
            row[: len(known)] = torch.tensor(known, dtype=torch.long)
        return ids

    @property
    def small(self) -> list[int]: return [self.index[letter] for letter in "abcdefghijklmnopqrstuvwxyz" if letter in self.index]


def random_flips(ids: Tensor, allowed: list[int], rng: np.random.Generator) -> Tensor:
    "One of the allowed letters of each text becomes another one."
    out = ids.clone()
    for row in out:
        places = np.flatnonzero(np.isin(row.numpy(), allowed))
        if not len(places): continue
        at = rng.choice(places)
        row[at] = int(rng.choice([v for v in allowed if v != row[at]]))
    return out


def letters(rows: Rows, seed: int, epochs: int, against: str = "") -> Letters:
    torch.manual_seed(seed)
    model = Letters(rows)
    ids, y = model.encode([text for text, _ in rows]), torch.tensor([label for _, label in rows])
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=4e-3), np.random.default_rng(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(ids)).split(50):
            loss = F.cross_entropy(model(ids[part]), y[part])
            if against:
                if against == "HotFlip": spoiled = hotflip(model, model.embed, ids[part], y[part], model.small)
                else: spoiled = random_flips(ids[part], model.small, rng)
                loss = (loss + F.cross_entropy(model(spoiled), y[part])) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def right(model: Letters, ids: Tensor, labels: list[int]) -> float: return accuracy(model(ids).argmax(1), labels).value


@BENCHMARK.part(data=["sst2"])
def calibration(settings: Settings) -> dict[str, Any]:
    data = sst2(settings.folder("sst2"))
    model = Linear(data["train"], words, 2, settings.pick(400, 20))
    dev, test = (([t for t, _ in data[s]], [y for _, y in data[s]]) for s in ("dev", "test"))
    T, z = fit_temperature(model(dev[0]), dev[1]), model(test[0]).double()
    out: dict[str, Any] = {"temperature": T, "test texts": len(test[1])}
    for name, logits in (("as trained", z), ("scaled", z / T)):
        p = logits.softmax(-1).numpy()
        debiased = expected_calibration_error(p, test[1], squared=True, debias=True)
        out[name] = {"accuracy": accuracy(p.argmax(1), test[1]).value, "log score": log_score(p.clip(1e-12), test[1]).value,
                     "Brier": brier(p, test[1]).value, "ECE": expected_calibration_error(p, test[1]).value,
                     "ECE, equal mass": expected_calibration_error(p, test[1], binning="mass").value, "debiased square": debiased.value,
                     "its error": debiased.error}
    return out


@BENCHMARK.part(data=["sst2"])
def robustness(settings: Settings) -> dict[str, Any]:
    data = sst2(settings.folder("sst2"))
    texts, labels = [t for t, _ in data["test"]], [y for _, y in data["test"]]
    some = settings.pick(400, 10)
    noisy = {kind: [add_noise(text, kind, 0.1) for text in texts] for kind in KINDS}
    by_words = Linear(data["train"], words, 2, settings.pick(60, 5))
    out: dict[str, Any] = {"test texts": len(texts), "attacked": some}
    out["words"] = {"clean": accuracy(by_words(texts).argmax(1), labels).value}
    for kind in KINDS: out["words"][kind] = accuracy(by_words(noisy[kind]).argmax(1), labels).value
    found: dict[str, dict[str, list[float]]] = {}
    for name, against in (("letters", ""), ("letters, one random flip", "random"), ("letters, against one flip", "HotFlip")):
        mine = found[name] = {}
        for seed in range(settings.seeds):
            model = letters(data["train"][:2000], seed, settings.epochs, against)
            mine.setdefault("clean", []).append(right(model, model.encode(texts), labels))
            for kind in KINDS: mine.setdefault(kind, []).append(right(model, model.encode(noisy[kind]), labels))
            ids, y = model.encode(texts[:some]), torch.tensor(labels[:some])
            for n in (1, 2, 4):
                flipped = hotflip(model, model.embed, ids, y, model.small, n)
                mine.setdefault("1 flip" if n == 1 else f"{n} flips", []).append(right(model, flipped, labels[:some]))
        out[name] = {k: mean_sd(v) for k, v in mine.items()}
        if against: out[f"{name}, gain"] = {k: mean_sd([b - a for a, b in zip(found["letters"][k], v)]) for k, v in mine.items()}
    return out


@BENCHMARK.part(data=["sib200"])
def languages(settings: Settings) -> dict[str, Any]:
    data: dict[str, dict[str, Rows]] = {}
    topics: dict[str, int] = {}
    for lang, name in (("English", "eng_Latn"), ("Chinese", "zho_Hans")):
        data[lang] = {}
        for split in ("train", "test"):
            with open(settings.folder("sib200") / name / f"{split}.tsv", encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            data[lang][split] = [(row["text"], topics.setdefault(row["category"], len(topics))) for row in rows]
    test = {lang: ([t for t, _ in d["test"]], [y for _, y in d["test"]]) for lang, d in data.items()}
    most = {lang: max(Counter(y).values()) / len(y) for lang, (_, y) in test.items()}
    out: dict[str, Any] = {"test texts": len(test["English"][0]), "largest class": most}
    for name, langs in (("English", ["English"]), ("Chinese", ["Chinese"]), ("both", ["English", "Chinese"])):
        model = Linear([row for lang in langs for row in data[lang]["train"]], characters, len(topics), settings.pick(100, 5), decay=0.1)
        out[f"trained on {name}"] = {lang: shown(accuracy(model(x).argmax(1), y)) for lang, (x, y) in test.items()}
    return out


@BENCHMARK.part(data=["winogender", "all_MiniLM_L6_v2"])
@torch.no_grad()
def winogender(settings: Settings) -> dict[str, Any]:
    from lmbook.pretrained import load_pretrained
    from lmbook.tokenizer_files import load_tokenizer

    folder = settings.folder("winogender")
    with open(folder / "occupations-stats.tsv", encoding="utf-8", newline="") as file:
        women = {row["occupation"]: float(row["bls_pct_female"]) / 100 for row in csv.DictReader(file, delimiter="\t")}
    versions: dict[str, dict[str, str]] = {}
    with open(folder / "all_sentences.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            name, gender, _ = row["sentid"].rsplit(".", 2)
            versions.setdefault(name, {})[gender] = row["sentence"]
    model, tokenizer = load_pretrained(settings.folder("all_MiniLM_L6_v2")), load_tokenizer(settings.folder("all_MiniLM_L6_v2"))
    cls, sep = (tokenizer.specials.get(name) for name in ("[CLS]", "[SEP]"))

    def vector(text: str) -> Tensor:
        ids = [*([cls] if cls is not None else []), *tokenizer.encode(text), *([sep] if sep is not None else [])]
        return F.normalize(model.hidden(torch.tensor([ids])).mean(1), dim=1)[0]

    gaps: dict[str, list[float]] = {}
    for name, texts in versions.items():
        occupation = name.split(".")[0]
        if occupation not in women or len(texts) < 3: continue
        they, she, he = (vector(texts[gender]) for gender in ("neutral", "female", "male"))
        gaps.setdefault(occupation, []).append(float(they @ she - they @ he))
    each = {occupation: float(np.mean(values)) for occupation, values in gaps.items()}
    items = [(v, occupation) for occupation, values in gaps.items() for v in values]
    overall = Score.mean("nearer to she", [v for v, _ in items], groups=[occupation for _, occupation in items])
    r = pearson(list(each.values()), [women[occupation] for occupation in each])
    return {"sentences": len(items), "occupations": len(each), "cosine with she less that with he": {**shown(overall),
            "interval": list(overall.interval())}, "correlation with the share of women": {**shown(r), "interval": list(r.interval())}}


if __name__ == "__main__": run(__file__)
