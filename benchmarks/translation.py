"""Translation and summaries: counted tables beside a Transformer on real sentence pairs, and what one sentence of an abstract is worth.

    python -m benchmarks.translation --data DATA

DATA holds the folders tatoeba_en_zh (28,447 pairs) and scitldr (abstracts with one-sentence summaries). tatoeba: English to Chinese, split
by the English side; words and phrases by IBM model 1, and one Transformer, trained for some five minutes of one core; BLEU (Chinese by
characters) and chrF with intervals; beams and length penalties on the first 150 test sentences. scitldr: the first sentence, TextRank's and
the best one that there is, ROUGE against the nearest reference. small_world: Chinese to English by each seed: from few pairs; from these
and more English that was translated back; from all pairs; and a decoder that reads its source as a prompt, with about as many parameters.
tasks: one model, trained once, for two directions of translation, summaries, questions, topic and mood; a word says which.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.comparisons import compare
from lmbook.evaluation import Score, accuracy
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.text_metrics import exact_match
from lmbook.transformer import count_parameters
from lmbook.translation import (
    PhraseTable,
    Translator,
    TranslatorConfig,
    WordAligner,
    best_sentence,
    lead,
    score_summaries,
    score_translations,
    split_units,
    textrank,
)

BENCHMARK = Benchmark(packages=("torch", "numpy", "safetensors"), seeds=3)


def told(scores: dict[str, Score]) -> dict[str, Any]: return {name: score.as_dict() for name, score in scores.items()}


# ---------------------------------------------------------------- real pairs


def kind(said: str, references: Sequence[str]) -> str:
    "What is wrong with a translation, as far as its characters tell."
    ours, wanted = Counter(split_units(said)), [Counter(split_units(reference)) for reference in references]
    best = max(wanted, key=lambda reference: (reference & ours).total())
    if said in references: return "as a reference"
    if not ours or max(ours.values()) > 3 + max(best.values()): return "repeats itself, or is empty"
    if ours.total() < 0.6 * best.total(): return "too short"
    share = (ours & best).total() / best.total()
    return "most characters right" if share >= 0.7 else "some characters right" if share >= 0.3 else "something else"


@BENCHMARK.part(data=["tatoeba_en_zh"])
def tatoeba(settings: Settings) -> dict[str, Any]:
    [file] = settings.folder("tatoeba_en_zh").glob("*.t*")
    by_english: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        english, chinese = line.split("\t")[:2]
        if len(chinese) <= 40 and len(english) <= 100: by_english.setdefault(english, []).append(chinese)
    sides = sorted(by_english)
    random.Random(0).shuffle(sides)
    test, learn = sides[: settings.pick(500, 8)], sides[settings.pick(500, 8) :]
    pairs = [(english, chinese) for english in learn for chinese in by_english[english]]
    references = [by_english[english] for english in test]
    config = TranslatorConfig(vocab_size=settings.pick(5000, 300), d_model=settings.pick(128, 16), dropout=settings.pick(0.1, 0.0),
                              context_length=settings.pick(96, 160), steps=settings.pick(1500, 2), batch_size=settings.pick(64, 8))
    aligner = WordAligner.fit(pairs)
    start = time.process_time()
    translator = Translator.fit(pairs, config)
    seconds = time.process_time() - start
    said = {"words": aligner.predict(test), "phrases": PhraseTable.fit(pairs, aligner).predict(test)}
    said["Transformer"] = translator.predict(test)
    scores = {name: score_translations(texts, references) for name, texts in said.items()}
    found: dict[str, Any] = {"pairs": len(pairs), "test": len(test), "parameters": count_parameters(translator.model.config),
                             "training_cpu_seconds": seconds, "systems": {name: told(score) for name, score in scores.items()}}
    for name, texts in said.items(): found["systems"][name]["kinds"] = dict(Counter(map(kind, texts, references)))
    better = compare(scores["Transformer"]["chrF"], scores["phrases"]["chrF"])
    found["Transformer over phrases, chrF"] = {"difference": better.difference, "error": better.error, "p": better.p}
    few = settings.pick(150, 3)
    found["beams"] = {"sentences": few}
    for name, (beams, penalty) in {"1": (1, 1.0), "4, penalty 0": (4, 0.0), "4, penalty 1": (4, 1.0)}.items():
        texts = translator.predict(test[:few], beams, penalty)
        score = score_translations(texts, references[:few])
        details = score["BLEU"].details
        found["beams"][name] = {**told(score), "length_ratio": details["length"] / details["reference_length"]}
    page = random.Random(1).sample(range(len(test)), min(8, len(test)))
    found["page"] = [{"source": test[i], "reference": references[i][0], **{name: texts[i] for name, texts in said.items()}} for i in page]
    for name, row in scores.items(): print(name, {key: round(score.value, 1) for key, score in row.items()}, flush=True)
    return found


# ---------------------------------------------------------------- real summaries


@BENCHMARK.part(data=["scitldr"])
def scitldr(settings: Settings) -> dict[str, Any]:
    rows = [json.loads(line) for line in (settings.folder("scitldr") / "test.jsonl").read_text(encoding="utf-8").splitlines() if line]
    texts = [[sentence.strip() for sentence in row["source"] if sentence.strip()] for row in rows]
    references = [[target for target in row["target"] if target.strip()] for row in rows]

    def first(sentences: list[str], scores: np.ndarray) -> str: return sentences[int(np.argmax(scores.round(9)))]

    said = {"first sentence": [first(text, lead(text)) for text in texts], "TextRank": [first(text, textrank(text)) for text in texts],
            "oracle": [best_sentence(text, wanted) for text, wanted in zip(texts, references)]}
    scores = {name: score_summaries(chosen, references) for name, chosen in said.items()}
    found: dict[str, Any] = {"abstracts": len(texts), "sentences": float(np.mean([len(text) for text in texts])),
                             "systems": {name: told(score) for name, score in scores.items()}}
    for key in ("ROUGE-1", "ROUGE-L"):
        better = compare(scores["TextRank"][key], scores["first sentence"][key])
        found[f"TextRank over the first sentence, {key}"] = {"difference": better.difference, "error": better.error, "p": better.p}
    print({name: {key: round(score.value, 3) for key, score in row.items()} for name, row in scores.items()}, flush=True)
    return found


# ---------------------------------------------------------------- Small World, by seed


def sentence_pairs(world: SmallWorld, split: Any, n: int) -> list[tuple[str, str]]: # Chinese, English
    found: dict[str, str] = {}
    for story in world.documents(split, n):
        for english, chinese in story.sentences: found.setdefault(chinese, english)
    return list(found.items())


@BENCHMARK.part()
def small_world(settings: Settings) -> dict[str, Any]:
    world = SmallWorld(SmallWorldConfig(limit=12))
    pairs = sentence_pairs(world, "train", settings.pick(500, 12))
    known = dict(pairs)
    test = [pair for pair in sentence_pairs(world, "test", settings.pick(60, 6)) if pair[0] not in known][: settings.pick(250, 8)]
    few, others = pairs[: settings.pick(400, 20)], pairs[settings.pick(400, 20) :]
    sources, wanted = [a for a, _ in test], [b for _, b in test]
    values: dict[str, list[dict[str, float]]] = {}
    sizes: dict[str, int] = {}

    def learn(name: str, pairs: list[tuple[str, str]], seed: int, **changes: Any) -> Translator:
        settled = {"d_model": settings.pick(64, 16), "steps": settings.pick(300, 2), "batch_size": settings.pick(32, 4), "seed": seed,
                   "context_length": 128}
        made = Translator.fit(pairs, TranslatorConfig(**{**settled, **changes}))
        if name:
            scores = score_translations(made.predict(sources), wanted)
            values.setdefault(name, []).append({key: score.value for key, score in scores.items()})
            sizes[name] = count_parameters(made.model.config)
            print(name, seed, {key: round(value, 1) for key, value in values[name][-1].items()}, flush=True)
        return made

    for seed in range(settings.seeds):
        learn("few pairs", few, seed)
        back = learn("", [(b, a) for a, b in few], seed)
        english = [b for _, b in others]
        made_up = [(a, b) for a, b in zip(back.predict(english), english) if a]
        learn("few pairs and English translated back", few * 3 + made_up, seed)
        learn("all pairs", pairs, seed)
        learn("all pairs, a decoder with a prompt", pairs, seed, kind="decoder", n_layer=2)
    systems = {name: {key: {**mean_sd([row[key] for row in rows]), "each": [row[key] for row in rows]} for key in ("BLEU", "chrF")}
               for name, rows in values.items()}
    return {"few": len(few), "all": len(pairs), "test": len(test), "parameters": sizes, "systems": systems}


# ---------------------------------------------------------------- one model for all


def asked(story: Any) -> dict[str, tuple[str, str]]:
    "What one model is asked about a story, and what is right. The sentences to translate are one of each story, by its number."
    text, (start, end) = story.text("en"), story.answer["en"]
    english, chinese = story.sentences[int(story.id.rsplit("-", 1)[1]) % len(story.sentences)]
    return {
        "to Chinese": (f"Chinese: {english}", chinese), "to English": (f"English: {chinese}", english),
        "summary": (f"Summary: {text}", story.summary["en"]), "answer": (f"Answer: {story.question['en']} {text}", text[start:end]),
        "topic": (f"Topic: {text}", story.topic), "mood": (f"Mood: {text}", story.sentiment),
    }  # fmt: skip


@BENCHMARK.part()
def tasks(settings: Settings) -> dict[str, Any]:
    world = SmallWorld(SmallWorldConfig(limit=6, talk=1, nested=0))
    learned = [asked(story) for story in world.documents("train", settings.pick(2000, 12))]
    seen = {source for row in learned for source, _ in row.values()}
    rows = [asked(story) for story in world.documents("test", settings.pick(200, 6))]
    config = TranslatorConfig(vocab_size=settings.pick(1200, 300), d_model=settings.pick(96, 16), n_layer=settings.pick(2, 1),
                              context_length=settings.pick(224, 640), steps=settings.pick(3000, 2), batch_size=settings.pick(32, 4),
                              lr=settings.pick(5e-3, 8e-3))
    start = time.process_time()
    model = Translator.fit([pair for row in learned for pair in row.values()], config)
    found: dict[str, Any] = {"stories": len(learned), "parameters": count_parameters(model.model.config),
                             "training_cpu_seconds": time.process_time() - start, "tasks": {}}
    for task in learned[0]:
        items = [row[task] for row in rows if row[task][0] not in seen]
        said, right = model.predict([source for source, _ in items]), [target for _, target in items]
        common = Counter(row[task][1] for row in learned).most_common(1)[0][0]
        for name, texts in (("model", said), ("always the most frequent", [common] * len(items))):
            if task in ("topic", "mood"): score = accuracy(texts, right)
            elif task == "answer": score = exact_match(texts, right)
            elif task == "summary": score = score_summaries(texts, right)["ROUGE-L"]
            else: score = score_translations(texts, right)["chrF"]
            found["tasks"].setdefault(task, {})[name] = score.as_dict()
        print(task, {name: round(row["value"], 3) for name, row in found["tasks"][task].items()}, flush=True)
    return found


if __name__ == "__main__": run(__file__)
