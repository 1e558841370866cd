"""Four tasks of understanding, real and in Small World: a trivial answer, a simple strong one, a model trained here, a real encoder.

    python -m benchmarks.understanding --data DATA

DATA holds the folders sst2, sib200, wnut17, squad, and for `real_encoder` all_MiniLM_L6_v2 (see benchmarks.pretrained). Each row is the
mean over seeds and its standard deviation, and the standard error that comes from the choice of the test items (the mean of all seeds).

small_world: the chapter's tasks, each seed with other weights and other stories to learn from. Two tasks are learned a second time, from
another one's body: statements from that of the classifier of moods, names from the reader's (equal records, steps and parameters).
sst2: film reviews, good or bad; accuracy on the 1,821 test sentences. The penalty of a logistic regression is chosen on the dev set.
sib200: seven topics, English and Chinese, 701 training and 204 test sentences each; and trained on English, tested on Chinese.
wnut17: entities of tweets and comments; F1 of spans of whole words (both ends and the type), on the test set. squad: questions on
paragraphs; articles of the development set 36 for training, 12 for testing. Exact match and F1.
real_classes, real_names, real_answers: the same with MiniLM. For classes it stays as it is, under mean vectors and a logistic regression;
for names and answers it is trained on, with one seed (answers: 2,400 questions, twice; the one from random weights has 800).
"""

from __future__ import annotations

import csv
import functools
import json
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.bilstm import TaggedSentences, Tagger, TaggerConfig, bio_spans, bio_tags, tag_loss
from lmbook.corpora import Document
from lmbook.evaluation import Score, accuracy, span_f1
from lmbook.quality import fit_logistic, hashed_features
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.text_metrics import answer_f1, exact_match, sentence_vectors
from lmbook.tokenization import WordTokenizer
from lmbook.training import TrainConfig, Trainer
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


def answered(test: Records, *said: list[str]) -> dict[str, Any]: # of each seed
    right = [r["answers"] for r in test]
    return {"exact match": row([exact_match(some, right) for some in said]), "F1": row([answer_f1(some, right) for some in said])}


@BENCHMARK.part(data=["squad"])
def squad(settings: Settings) -> dict[str, Any]:
    data, most = questions(settings), settings.pick(800, 12)
    test = data["test"][: settings.pick(800, 8)]
    simple = {"nearest sentence": nearest_sentence, "nearest phrase": nearest_phrase}
    found = {name: answered(test, [rule(r) for r in test]) for name, rule in simple.items()}
    said = []
    for seed in range(settings.seeds):
        train = data["train"][most * seed :][:most]
        encoder = Encoder.new([r["text"] for r in train], 4000, seed)
        reader = SpanReader.fit(train, encoder, TaskConfig(epochs=settings.pick(2, 1), max_tokens=256, seed=seed))
        said.append([answer.text for answer in reader.predict(test)])
    found["trained here"] = answered(test, *said)
    return {"systems": found, "questions": most, "test": len(test)}


@BENCHMARK.part(data=["sst2", "sib200", MINILM])
def real_classes(settings: Settings) -> dict[str, Any]:
    real, records = Encoder.load(settings.folder(MINILM)), reviews(settings)
    records = {**records, "train": records["train"][:: settings.pick(2, 1)]}
    best, l2 = logistic({split: vectors(real, some) for split, some in records.items()}, records)
    found: dict[str, Any] = {"sst2": row([best]) | {"labels": len(records["train"]), "l2": l2}, "sib200": {}}
    data = {lang: topics(settings, lang) for lang in ("en", "zh")}
    read = {lang: {split: vectors(real, some) for split, some in parts.items()} for lang, parts in data.items()}
    for learn, test in PAIRS:
        mixed, features = {**data[learn], "test": data[test]["test"]}, {**read[learn], "test": read[test]["test"]}
        found["sib200"][f"{learn} to {test}"] = row([logistic(features, mixed)[0]])
    return found


@BENCHMARK.part(data=["wnut17", MINILM])
def real_names(settings: Settings) -> dict[str, Any]:
    real = Encoder.load(settings.folder(MINILM))
    names = {split: tweets(settings.folder("wnut17") / name) for split, name in TWEETS.items()}
    train = names["train"][:: settings.pick(2, 1)]
    tagger = EntityTagger.fit(train, real, TaskConfig(epochs=1, lr=3e-4, max_tokens=settings.pick(96, 16)))
    return row([judged_in_words(names["test"], tagger.predict(names["test"]))]) | {"texts": len(train)}


@BENCHMARK.part(data=["squad", MINILM])
def real_answers(settings: Settings) -> dict[str, Any]:
    real, asked = Encoder.load(settings.folder(MINILM)), questions(settings)
    train, test = asked["train"][: settings.pick(2400, 8)], asked["test"][: settings.pick(800, 6)]
    reader = SpanReader.fit(train, real, TaskConfig(epochs=settings.pick(2, 1), lr=2e-4, max_tokens=settings.pick(192, 16)))
    return answered(test, [answer.text for answer in reader.predict(test)]) | {"questions": len(train)}


# ---------------------------------------------------------------- Small World, as the chapter has it


def record(story: Document) -> dict[str, Any]:
    return {"text": story.text("en"), "label": story.sentiment, "entities": list(story.entities["en"]), "question": story.question["en"],
            "answer": story.answer["en"]}


MOODS = [("happy", "glad", "joyful"), ("calm", "peaceful", "serene"), ("sad", "unhappy", "sorrowful"), ("angry", "mad", "furious")]


def shortened(story: Document) -> tuple[str, str, str, tuple[str, ...]]: # text, hero, relative, words for the mood
    "Three sentences of a story: who it is about, who comes in, and how the first one feels."
    text, said = story.text("en"), [english for english, _ in story.sentences]
    names = [text[a:b].split()[0] for a, b, kind in story.entities["en"] if kind == "PER"]
    friend = next(name for name in names if name != names[0])
    enters = next(sentence for sentence in said if friend in sentence)
    mood = next(words for words in MOODS if set(words) & set(re.findall(r"\w+", said[-2])))
    return f"{said[0]} {enters} {said[-2]}", names[0], friend, mood


def statements(stories: list[Document], seed: int) -> Records:
    "Of each story a statement that follows, one that contradicts it, and one that is open; good and bad stories in pairs."
    rng, out = np.random.default_rng(seed), []
    kinds = [[shortened(story) for story in stories if story.sentiment == mood] for mood in ("positive", "negative")]
    for pair in zip(*kinds):
        for (text, hero, friend, mood), (*_, other) in (pair, pair[::-1]):
            either = (mood, other)[rng.integers(2)]
            for who, words, label in ((hero, mood, "follows"), (hero, other, "contradicts"), (friend, either, "open")):
                out.append({"text": text, "statement": f"{who} was {rng.choice(words)}.", "label": label})
    return out


def crossed(r: dict[str, Any]) -> dict[str, Any]:
    "Each word of the statement with each word, and each pair of words, of the text."
    a, b = (re.findall(r"\w+", r[name]) for name in ("statement", "text"))
    return {"text": " ".join(f"{x}of{y}" for x in a for y in [*b, *map("".join, zip(b, b[1:]))])}


def listed(train: Records, more: dict[str, str] | None = None) -> Any: # a function from a text to spans
    "Names of the training records, found again; of several the longest."
    kinds = {r["text"][a:b]: kind for r in train for a, b, kind in r["entities"]} | (more or {})
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(kinds, key=len, reverse=True))) + r")\b")
    return lambda text: [(*m.span(), kinds[m[0]]) for m in pattern.finditer(text)]


NUMBERS = dict.fromkeys("one two three four five six seven eight nine ten".split(), "NUM")


def usual_answers(train: Records) -> Any: # a function from a record to a text
    "For each beginning of a question: which name or number of the text was most often right."
    find, usual = listed(train, NUMBERS), defaultdict(Counter)

    def form(r: dict[str, Any]) -> str: return " ".join(r["question"].split()[:3])

    for r in train:
        seen: Counter[str] = Counter()
        for a, b, kind in find(r["text"]):
            if (a, b) == tuple(r["answer"]): usual[form(r)][kind, seen[kind]] += 1
            seen[kind] += 1

    def answer(r: dict[str, Any]) -> str:
        if form(r) not in usual: return ""
        (kind, n), _ = usual[form(r)].most_common(1)[0]
        found = [r["text"][a:b] for a, b, k in find(r["text"]) if k == kind]
        return found[min(n, len(found) - 1)] if found else ""

    return answer


def by_bilstm(train: Records, test: Records, epochs: int, seed: int) -> list[list[tuple[int, int, str]]]:
    "The entities that chapter 32's tagger finds, word by word."
    words = WordTokenizer.train([r["text"] for r in train])
    kinds = ["O", *sorted({f"{mark}-{kind}" for r in train for *_, kind in r["entities"] for mark in "BI"})]
    rows = [[kinds.index(tag) for tag in bio_tags(r["text"], words.offsets(r["text"]), r["entities"])] for r in train]
    batches = TaggedSentences(zip([words.encode(r["text"]) for r in train], rows), 4, sort=5, seed=seed)
    torch.manual_seed(seed)
    model = Tagger(TaggerConfig(words.vocab_size, len(kinds), d_embed=32, d_hidden=48))
    Trainer(model, batches, TrainConfig(epochs=epochs, lr=1e-2, seed=seed, device="cpu"), loss=tag_loss).fit()
    out = []
    for r, tags in zip(test, model.predict(words.encode(r["text"]) for r in test)):
        at, text = words.offsets(r["text"]), r["text"]
        found = [(at[a][0], at[b - 1][1], kind) for a, b, kind in bio_spans([kinds[i] for i in tags])]
        out.append([(b - len(text[a:b].lstrip()), b, kind) for a, b, kind in found])
    return out


@BENCHMARK.part()
def small_world(settings: Settings) -> dict[str, Any]:
    world, pick = SmallWorld(SmallWorldConfig(limit=6)), settings.pick
    exam = list(world.documents("test", pick(200, 12)))
    test, judged = [record(story) for story in exam], statements(exam, 1)
    true, right = [r["entities"] for r in test], [r["text"][slice(*r["answer"])] for r in test]
    scores: dict[str, dict[str, list[Score]]] = defaultdict(lambda: defaultdict(list))

    def config(epochs: int, size: int, lr: float, **more: Any) -> TaskConfig:
        return TaskConfig(epochs=pick(epochs, 1), batch_size=size, lr=lr, seed=seed, **more)

    for seed in range(settings.seeds):
        fresh = Encoder.new(list(world.texts("train", n=pick(1500, 60), start=10_000)), 800, seed)
        stories = list(world.documents("train", pick(1400, 44), start=2000 * seed))
        learn = [record(story) for story in stories]
        named, asked = learn[: pick(40, 6)], learn[: pick(600, 12)]
        claimed = statements(stories[pick(600, 12) :][: pick(600, 20)], seed)
        few, ten = learn[pick(1300, 32) :][: pick(60, 12)], learn[pick(1390, 36) :][: pick(10, 4)]

        task = scores["moods, 60 stories"]
        task["most frequent"].append(most_frequent(few, test))
        valid = learn[pick(1200, 20) :][: pick(100, 12)]
        task["bag of words"].append(logistic({"train": bag(few), "dev": bag(valid), "test": bag(test)},
                                             {"train": few, "dev": valid, "test": test})[0])
        mood = TextClassifier.fit(few, fresh, config(8, 4, 2e-3))
        task["encoder"].append(mood.evaluate(test)["accuracy"])

        task = scores["names, 40 stories"]
        task["list"].append(span_f1(list(map(listed(named), [r["text"] for r in test])), true))
        task["BiLSTM"].append(span_f1(by_bilstm(named, test, pick(8, 1), seed), true))
        task["encoder"].append(EntityTagger.fit(named, fresh, config(8, 4, 3e-3, crf=False)).evaluate(test)["F1"])
        task["encoder, CRF"].append(EntityTagger.fit(named, fresh, config(8, 4, 3e-3)).evaluate(test)["F1"])

        task = scores["answers, 600 stories"]
        found = map(listed(asked), [r["text"] for r in test])
        task["the first name"].append(exact_match([r["text"][slice(*(*spans, (0, 0))[0][:2])] for r, spans in zip(test, found)], right))
        task["rule"].append(exact_match(list(map(usual_answers(asked), test)), right))
        reader = SpanReader.fit(asked, fresh, config(4, 8, 3e-3))
        task["encoder"].append(reader.evaluate(test)["exact match"])
        reads, feels = (Encoder(learned.net.body, learned.tokenizer) for learned in (reader, mood))

        task, truth = scores["statements"], [r["label"] for r in judged]
        for name, columns in (("words of the statement", ("statement",)), ("words of both", ("statement", "text"))):
            learn_from, exam_on = (bag([{"text": " ".join(r[c] for c in columns)} for r in some]) for some in (claimed, judged))
            fitted = fit_logistic(learn_from, [r["label"] for r in claimed], l2=0.1)
            task[name].append(accuracy(fitted.predict(exam_on), truth))
        crosses = functools.partial(hashed_features, size=2**14, chars=(), tokens=(1,))
        fitted = fit_logistic(crosses([crossed(r)["text"] for r in claimed]), [r["label"] for r in claimed], l2=0.1)
        task["pairs of words"].append(accuracy(fitted.predict(crosses([crossed(r)["text"] for r in judged])), truth))
        for name, start in (("encoder", fresh), ("encoder, the classifier's body", feels)):
            how = config(8, 16, 3e-3, pooling="first", dropout=0.0)
            task[name].append(Entailment.fit(claimed, start, how).evaluate(judged)["accuracy"])
        for name, start in (("encoder", fresh), ("encoder, the reader's body", reads)):
            scores["names, 10 stories"][name].append(EntityTagger.fit(ten, start, config(10, 2, 3e-3)).evaluate(test)["F1"])
    return {task: {name: row(some) for name, some in rows.items()} for task, rows in scores.items()}


if __name__ == "__main__": run(__file__)
