"""How fast Small World writes, scores and counts.

    python -m benchmarks.small_world

Prints a table and writes benchmarks/results/small_world.json. Everything runs on one core and in plain Python; each time is the best of
five. A word is what stands between spaces; with punctuation marks counted as words, as the chapter counts them, rates are a fifth higher.
The aim for writing is 300,000 English words per second.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections import deque
from pathlib import Path

from benchmarks.common import best_of, machine
from lmbook.small_world import WORD, SmallWorld, SmallWorldConfig, expectations

RESULTS = Path(__file__).parent / "results" / "small_world.json"
WORLDS = {
    "default": SmallWorldConfig(),
    "small (limit=20)": SmallWorldConfig(limit=20),
    "hard (talk=20, nested=10)": SmallWorldConfig(talk=20, nested=10),
}
AIM = 300_000  # English words per second


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
        "expectations_s": best_of(2, lambda: expectations(world.grammar)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=5000, help="texts in each measurement")
    parser.add_argument("--scored", type=int, default=300, help="texts that are scored")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, object] = {
        "command": f"python -m benchmarks.small_world --texts {args.texts} --scored {args.scored} --repeats {args.repeats}",
        "date": datetime.date.today().isoformat(), "machine": machine("numpy"), "aim_words_per_s_en": AIM,
    }  # fmt: skip
    rows = {name: measure(config, args.texts, args.scored, args.repeats) for name, config in WORLDS.items()}
    print(f"{'':28}" + "".join(f"{name:>28}" for name in rows))
    for key in rows["default"]:
        print(f"{key:28}" + "".join(f"{row[key]:>28,.4g}" if row[key] < 100 else f"{row[key]:>28,.0f}" for row in rows.values()))
    reached = rows["default"]["words_per_s_en"]
    print(f"\nEnglish words per second: {reached:,.0f}, aim {AIM:,}: {'reached' if reached >= AIM else 'NOT reached'}")
    result["worlds"] = {name: {key: float(f"{value:.4g}") for key, value in row.items()} for name, row in rows.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    print(f"written: {RESULTS.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__": main()
