"""Four tasks of understanding, real and in Small World: a trivial answer, a simple strong one, a model trained here, a real encoder.

    python -m benchmarks.understanding --data DATA

DATA holds the folders sst2, sib200, wnut17, squad, and for `real_encoder` all_MiniLM_L6_v2 (see benchmarks.pretrained). Each row is the
mean over seeds and its standard deviation, and the standard error that comes from the choice of the test items (the mean of all seeds).

sst2: film reviews, good or bad; accuracy on the 1,821 test sentences. The penalty of a logistic regression is chosen on the dev set.
sib200: seven topics, English and Chinese, 701 training and 204 test sentences each; and trained on English, tested on Chinese.
wnut17: entities of tweets and comments; F1 of spans of whole words (both ends and the type), on the test set. squad: questions on
paragraphs; articles of the development set 36 for training, 12 for testing. Exact match and F1.
real_encoder: the same with MiniLM. Of classes it stays as it is: mean vectors and a logistic regression. Names and answers: trained on.
small_world: a reader of answers is trained as in the chapter; names and statements are then learned from its body, and from random
weights: the same records, steps and parameters. The seeds are of the weights and of which stories are learned from.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.cleaning import fit_logistic, hashed_features
from lmbook.corpora import Document
from lmbook.evaluation import Score, accuracy, span_f1
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.text_metrics import answer_f1, exact_match, sentence_vectors
from lmbook.understanding import Encoder, Entailment, EntityTagger, SpanReader, TaskConfig, TextClassifier

BENCHMARK = Benchmark(packages=("torch", "tokenizers"), seeds=3)
MINILM = "all_MiniLM_L6_v2"
Records = list[dict[str, Any]]


def row(scores: list[Score]) -> dict[str, float]:
    error = statistics.fmean(s.error for s in scores)
    return {**mean_sd([s.value for s in scores]), "seeds": len(scores), "error": error, "n": scores[0].n}


def most_frequent(train: Records, test: Records) -> Score:
    common = Counter(r["label"] for r in train).most_common(1)[0][0]
    return accuracy([common] * len(test), [r["label"] for r in test])


def logistic(features: dict[str, np.ndarray], records: dict[str, Records]) -> tuple[Score, float]:
    "The penalty is chosen on the dev set."
    truth = {split: [r["label"] for r in some] for split, some in records.items()}
    fitted = {l2: fit_logistic(features["train"], truth["train"], l2=l2) for l2 in (0.01, 0.03, 0.1, 0.3, 1.0)}
    best = max(fitted, key=lambda l2: accuracy(fitted[l2].predict(features["dev"]), truth["dev"]).value)
    return accuracy(fitted[best].predict(features["test"]), truth["test"]), best


def bag(texts: Records, chars: tuple[int, ...] = ()) -> np.ndarray:
    return hashed_features([r["text"] for r in texts], 4096, chars=chars, tokens=(1, 2))


def vectors(encoder: Encoder, texts: Records) -> np.ndarray:
    long = encoder.model.config.context_length
    short = [r["text"] if len(encoder.tokenizer.encode(r["text"])) < long - 4 else r["text"][: 2 * long] for r in texts]
    return sentence_vectors(encoder.model, encoder.tokenizer, short)


def reviews(settings: Settings) -> dict[str, Records]:
    def read(split: str) -> Records:
        lines = (settings.folder("sst2") / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        return [dict(zip(("text", "label"), line.rsplit("\t", 1))) for line in lines]

    return {split: read(split) for split in ("train", "dev", "test")}


@BENCHMARK.part(data=["sst2"])
def sst2(settings: Settings) -> dict[str, Any]:
    records = reviews(settings)
    best, l2 = logistic({split: bag(some) for split, some in records.items()}, records)
    found = {"most frequent": row([most_frequent(records["train"], records["test"])])}
    found["words, logistic regression"] = row([best]) | {"l2": l2}
    ours = []
    for seed in range(settings.seeds):
        encoder = Encoder.new([r["text"] for r in records["train"]], 4000, seed)
        config = TaskConfig(epochs=settings.pick(2, 1), batch_size=32, dropout=0.3, max_tokens=64, seed=seed)
        ours.append(TextClassifier.fit(records["train"], encoder, config).evaluate(records["test"])["accuracy"])
    found["trained here"] = row(ours)
    return found


def topics(settings: Settings, lang: str) -> dict[str, Records]:
    records = {}
    for split in ("train", "dev", "test"):
        path = settings.folder("sib200") / {"en": "eng_Latn", "zh": "zho_Hans"}[lang] / f"{split}.tsv"
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            records[split] = [{"text": r["text"], "label": r["category"]} for r in rows]
    return records


PAIRS = (("en", "en"), ("zh", "zh"), ("en", "zh"))


@BENCHMARK.part(data=["sib200"])
def sib200(settings: Settings) -> dict[str, Any]:
    data = {lang: topics(settings, lang) for lang in ("en", "zh")}
    seen = {lang: {split: bag(some, (1, 2)) for split, some in records.items()} for lang, records in data.items()}
    ours: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for seed in range(settings.seeds):
        encoder = Encoder.new([r["text"] for lang in data for r in data[lang]["train"]], 3000, seed)
        config = TaskConfig(epochs=settings.pick(6, 1), dropout=0.3, max_tokens=96, seed=seed)
        tasks = {lang: TextClassifier.fit(data[lang]["train"], encoder, config) for lang in data}
        for learn, test in PAIRS: ours[learn, test].append(tasks[learn].evaluate(data[test]["test"])["accuracy"])
    found: dict[str, Any] = {}
    for learn, test in PAIRS:
        mixed = {**data[learn], "test": data[test]["test"]}
        found[f"{learn} to {test}"] = {
            "most frequent": row([most_frequent(mixed["train"], mixed["test"])]),
            "words, logistic regression": row([logistic({**seen[learn], "test": seen[test]["test"]}, mixed)[0]]),
            "trained here": row(ours[learn, test]),
        }
    return found


def tweets(path: Path) -> Records:
    "Words joined by spaces, with entities in characters, and in words."
    found, words, tags = [], [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            word, _, tag = line.strip().rpartition("\t")
            words.append(word)
            tags.append(tag)
        elif words:
            ends = np.cumsum([len(word) + 1 for word in words]).tolist()
            where = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends)]
            spans: list[tuple[int, int, str]] = []
            for i, tag in enumerate(tags):
                if tag == "O": continue
                if tag[0] == "I" and spans and spans[-1][1:] == (i, tag[2:]): spans[-1] = (spans[-1][0], i + 1, tag[2:])
                else: spans.append((i, i + 1, tag[2:]))
            marked = [(where[a][0], where[b - 1][1], kind) for a, b, kind in spans]
            found.append({"text": " ".join(words), "words": where, "spans": spans, "entities": marked})
            words, tags = [], []
    return found


def in_words(record: dict[str, Any], said: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    "Spans of characters, widened to whole words."
    out = []
    for start, end, kind in said:
        inside = [i for i, (a, b) in enumerate(record["words"]) if a < end and b > start]
        if inside: out.append((inside[0], inside[-1] + 1, kind))
    return out


TWEETS = {"train": "wnut17train.conll", "test": "emerging.test.annotated"}


def judged_in_words(test: Records, said: list) -> Score:
    return span_f1([in_words(r, spans) for r, spans in zip(test, said)], [r["spans"] for r in test])


@BENCHMARK.part(data=["wnut17"])
def wnut17(settings: Settings) -> dict[str, Any]:
    data = {split: tweets(settings.folder("wnut17") / name) for split, name in TWEETS.items()}
    test = data["test"]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for r in data["train"]:
        for start, end, kind in r["entities"]: counts[r["text"][start:end]][kind] += 1
    some = "|".join(re.escape(name) for name in sorted(counts, key=len, reverse=True))
    known = re.compile(rf"(?<!\S)(?:{some})(?!\S)")
    listed = [[(m.start(), m.end(), counts[m[0]].most_common(1)[0][0]) for m in known.finditer(r["text"])] for r in test]
    found = {"names of the training set": row([judged_in_words(test, listed)])}
    ours = []
    for seed in range(settings.seeds):
        encoder = Encoder.new([r["text"] for r in data["train"]], 4000, seed)
        config = TaskConfig(epochs=settings.pick(3, 1), dropout=0.3, seed=seed, max_tokens=96)
        ours.append(judged_in_words(test, EntityTagger.fit(data["train"], encoder, config).predict(test)))
    found["trained here"] = row(ours)
    return found


def questions(settings: Settings) -> dict[str, Records]:
    "Of the first articles those to learn from, of the others those to be tested on, in random order."
    [file] = settings.folder("squad").glob("*.json")
    articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    if len(articles) == 1: articles = [{"paragraphs": [p]} for p in articles[0]["paragraphs"]]  # the made-up one
    cut, data = 3 * len(articles) // 4, {}
    for split, some in (("train", articles[:cut]), ("test", articles[cut:])):
        rows = []
        for p in (p for article in some for p in article["paragraphs"]):
            for qa in p["qas"]:
                text, first = p["context"], qa["answers"][0]
                start = first.get("answer_start", text.find(first["text"]))
                rows.append({"text": text, "question": qa["question"], "answer": (start, start + len(first["text"])),
                             "answers": [answer["text"] for answer in qa["answers"]]})
        data[split] = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return data


def nearest_sentence(record: dict[str, Any]) -> str:
    "The sentence that shares most words with the question."
    asked = set(re.findall(r"\w+", record["question"].lower()))
    parts = re.split(r"(?<=[.!?])\s+", record["text"])
    return max(parts, key=lambda part: len(asked & set(re.findall(r"\w+", part.lower()))) / (5 + len(part.split())) ** 0.5)


def nearest_phrase(record: dict[str, Any]) -> str:
    "Of that sentence a number or a name, as the question wants, that is not in the question: the one nearest to words of the question."
    part, question = nearest_sentence(record), record["question"]
    asked = {word for word in re.findall(r"\w+", question.lower()) if len(word) > 3}
    number = r"\$?\d[\d,.]*(?:\s(?:million|billion|percent))?|\d+"
    name = r"(?:[A-Z][\w'-]*)(?:\s(?:(?:of|the|de)\s)?[A-Z][\w'-]*)*"
    wanted = number if re.search(r"\b(when|how many|how much|what year|what percent\w*)\b", question.lower()) else name
    near = [m.start() for m in re.finditer(r"\w+", part) if m[0].lower() in asked] or [0]
    options = [m for m in re.finditer(wanted, part) if m[0].lower() not in question.lower()]
    if not options: return part
    return min(options, key=lambda m: min(abs(m.start() - at) for at in near))[0].rstrip(".,")


def answered(test: Records, said: list[str]) -> dict[str, Any]:
    right = [r["answers"] for r in test]
    return {"exact match": row([exact_match(said, right)]), "F1": row([answer_f1(said, right)])}


@BENCHMARK.part(data=["squad"])
def squad(settings: Settings) -> dict[str, Any]:
    data, most = questions(settings), settings.pick(1500, 12)
    test = data["test"][: settings.pick(1000, 8)]

    simple = {"nearest sentence": nearest_sentence, "nearest phrase": nearest_phrase}
    found = {name: answered(test, [rule(r) for r in test]) for name, rule in simple.items()}
    train = data["train"][:most]
    encoder = Encoder.new([r["text"] for r in train], 4000)
    reader = SpanReader.fit(train, encoder, TaskConfig(epochs=settings.pick(2, 1), max_tokens=256))
    found["trained here"] = answered(test, [answer.text for answer in reader.predict(test)])
    return {"systems": found, "questions": len(train), "test": len(test)}


@BENCHMARK.part(data=["sst2", "sib200", "wnut17", "squad", MINILM])
def real_encoder(settings: Settings) -> dict[str, Any]:
    real = Encoder.load(settings.folder(MINILM))
    records = reviews(settings)
    records = {**records, "train": records["train"][:: settings.pick(5, 1)], "dev": records["dev"][::2]}
    best, l2 = logistic({split: vectors(real, some) for split, some in records.items()}, records)
    found: dict[str, Any] = {"sst2": row([best]) | {"labels": len(records["train"])}, "sib200": {}}
    data = {lang: topics(settings, lang) for lang in ("en", "zh")}
    read = {lang: {split: vectors(real, some) for split, some in parts.items()} for lang, parts in data.items()}
    for learn, test in PAIRS:
        mixed, features = {**data[learn], "test": data[test]["test"]}, {**read[learn], "test": read[test]["test"]}
        found["sib200"][f"{learn} to {test}"] = row([logistic(features, mixed)[0]])
    names = {split: tweets(settings.folder("wnut17") / name) for split, name in TWEETS.items()}
    tagger = EntityTagger.fit(names["train"], real, TaskConfig(epochs=1, lr=3e-4, max_tokens=settings.pick(96, 16)))
    found["wnut17"] = row([judged_in_words(names["test"], tagger.predict(names["test"]))])
    asked = questions(settings)
    learn_from, exam = asked["train"][: settings.pick(1000, 8)], asked["test"][: settings.pick(400, 6)]
    reader = SpanReader.fit(learn_from, real, TaskConfig(epochs=1, lr=3e-4, max_tokens=settings.pick(256, 16)))
    found["squad"] = answered(exam, [answer.text for answer in reader.predict(exam)]) | {"questions": len(learn_from)}
    return found


# ---------------------------------------------------------------- Small World, as the chapter has it


def record(story: Document) -> dict[str, Any]:
    return {"text": story.text("en"), "label": story.sentiment, "entities": list(story.entities["en"]), "question": story.question["en"],
            "answer": story.answer["en"]}


def statements(stories: list[Document], seed: int) -> Records:
    "Of each story a statement that follows, one that contradicts it, and one that is open."
    rng, out = np.random.default_rng(seed), []
    facts = [story.title["en"][4:].split(" of ") for story in stories]
    for story, fact in zip(stories, facts):
        text = story.text("en")
        who = [text[a:b].split()[0] for a, b, kind in story.entities["en"] if kind == "PER"]
        friend = next((name for name in who if name != who[0]), None)
        place = int(story.genre != "trip" and rng.random() < 0.5)
        other, drawn = rng.choice([f[place] for f in facts if f[place] != fact[place]]), facts[rng.integers(len(facts))][place]
        form = ("{} was a {}.", "{} lived in {}.")[place]
        made = [(who[0], fact[place], "follows"), (who[0], other, "contradicts")] + ([(friend, drawn, "open")] if friend else [])
        out += [{"text": text, "statement": form.format(name, thing), "label": label} for name, thing, label in made]
    return out


@BENCHMARK.part()
def small_world(settings: Settings) -> dict[str, Any]:
    world = SmallWorld(SmallWorldConfig(limit=6))
    exam = list(world.documents("test", settings.pick(200, 8)))
    test, judged = [record(story) for story in exam], statements(exam, 1)
    scores: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(settings.seeds):
        fresh = Encoder.new(list(world.texts("train", n=settings.pick(1500, 60), start=10_000)), 800, seed)
        stories = list(world.documents("train", settings.pick(1200, 24), start=2000 * seed))
        learn, claimed = [record(story) for story in stories], statements(stories[settings.pick(600, 12) :][: settings.pick(300, 12)], seed)
        passes = settings.pick(1, 0)
        config = TaskConfig(epochs=1 + 3 * passes, batch_size=8, lr=3e-3, seed=seed)
        reader = SpanReader.fit(learn[: settings.pick(600, 12)], fresh, config)
        scores["answers, 600 stories"]["random weights"].append(reader.evaluate(test)["exact match"])
        few = learn[settings.pick(1000, 12) :][: settings.pick(10, 4)]
        for name, start in (("random weights", fresh), ("the reader's", Encoder(reader.net.body, reader.tokenizer))):
            config = TaskConfig(epochs=1 + 9 * passes, batch_size=2, lr=3e-3, seed=seed)
            scores["names, 10 stories"][name].append(EntityTagger.fit(few, start, config).evaluate(test)["F1"])
            config = TaskConfig(epochs=1 + 2 * passes, batch_size=8, lr=2e-3, seed=seed)
            scores["statements, 300 stories"][name].append(Entailment.fit(claimed, start, config).evaluate(judged)["accuracy"])
    return {task: {name: row(some) for name, some in rows.items()} for task, rows in scores.items()}


if __name__ == "__main__": run(__file__)
