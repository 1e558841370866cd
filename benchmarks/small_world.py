"""How fast Small World writes, scores and counts.

    python -m benchmarks.small_world

Everything runs on one core and in plain Python; each time is the best of five. A word is what stands between spaces; with punctuation marks
counted as words, as the chapter counts them, rates are a fifth higher. The aim for writing is 300,000 English words per second.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from benchmarks.common import Benchmark, Option, Settings, best_of, run
from lmbook.grammar import WORD, expectations
from lmbook.small_world import SmallWorld, SmallWorldConfig

AIM = 300_000  # English words per second
WORLDS = {
    "default": SmallWorldConfig(),
    "small (limit=20)": SmallWorldConfig(limit=20),
    "hard (talk=20, nested=10)": SmallWorldConfig(talk=20, nested=10),
}
BENCHMARK = Benchmark(
    packages=("numpy",),
    options=[Option("texts", 5000, 20, "texts in each measurement"), Option("scored", 300, 5, "texts that are scored"),
             Option("repeats", 5, 1, "runs of which the fastest counts")],
    facts=lambda settings: {"aim_words_per_s_en": AIM},
)


def measure(config: SmallWorldConfig, n_texts: int, n_scored: int, repeats: int) -> dict[str, float]:
    "One world: building it, its stream in both languages, its documents, its scores, its closed form."
    world = SmallWorld(config)
    en, zh = (list(world.texts("train", lang, n=n_texts)) for lang in ("en", "zh"))  # also fills the tables of choices
    words, marks = sum(len(text.split()) for text in en), sum(len(WORD.findall(text)) for text in en)
    write = {lang: best_of(repeats, lambda lang=lang: deque(world.texts("train", lang, n=n_texts), maxlen=0)) for lang in ("en", "zh")}
    documents = best_of(repeats, lambda: deque(world.documents("train", n=n_texts // 10), maxlen=0))
    score = {}
    for lang, texts in (("en", en), ("zh", zh)):
        assert all(world.log_prob(text, lang) > -math.inf for text in texts[:n_scored])
        score[lang] = best_of(repeats, lambda lang=lang, texts=texts: [world.log_prob(text, lang) for text in texts[:n_scored]])
    scored_words = sum(len(text.split()) for text in en[:n_scored])
    return {
        "texts": n_texts,
        "words_per_text": words / n_texts,
        "build_s": best_of(repeats, lambda: SmallWorld(config)),
        "texts_per_s_en": n_texts / write["en"],
        "words_per_s_en": words / write["en"],
        "words_and_marks_per_s_en": marks / write["en"],
        "megabytes_per_s_en": sum(len(text.encode()) for text in en) / write["en"] / 1e6,
        "texts_per_s_zh": n_texts / write["zh"],
        "characters_per_s_zh": sum(map(len, zh)) / write["zh"],
        "megabytes_per_s_zh": sum(len(text.encode()) for text in zh) / write["zh"] / 1e6,
        "documents_per_s": n_texts // 10 / documents,
        "log_prob_ms_en": score["en"] / n_scored * 1e3,
        "log_prob_ms_zh": score["zh"] / n_scored * 1e3,
        "log_prob_words_per_s_en": scored_words / score["en"],
        "expectations_s": best_of(min(2, repeats), lambda: expectations(world.grammar)),
    }


@BENCHMARK.part()
def worlds(settings: Settings) -> dict[str, dict[str, float]]:
    configs = {name: replace(config, limit=settings.pick(config.limit, 3)) for name, config in WORLDS.items()}
    rows = {name: measure(config, settings.texts, settings.scored, settings.repeats) for name, config in configs.items()}
    reached = rows["default"]["words_per_s_en"]
    print(f"  English words per second: {reached:,.0f}, aim {AIM:,}: {'reached' if reached >= AIM else 'NOT reached'}")
    return rows


if __name__ == "__main__": run(__file__)
