"""Sound: spoken digits by a speaker who was never heard, and telephone numbers with and without a language model.

    python -m benchmarks.senses --data DATA

DATA holds the folder spoken_digits (1,000 recordings of digits by four speakers, `{digit}_{speaker}_{n}.wav`). Each speaker in turn is held
out. Training: strings of one to four random digits, made of the recordings of the three others. digits: the held-out speaker's recordings
one by one, beside the nearest recording of the others (mel bands, stretched to 20 columns), and telephone numbers of seven digits put
together from them: an area code (one of six), an exchange (one of eight), two random digits. The language model has read 500 other numbers
of that kind; its weight for a speaker is the one that is best for the *other* held-out speakers. speed: single digits again, without
playing the training recordings faster or slower. Errors are by speaker: there are four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import Benchmark, Settings, mean_sd, run
from lmbook.senses import Recognizer, RecognizerConfig, Recording, mel_filters, read_wav, spectrogram
from lmbook.text_metrics import cer

BENCHMARK = Benchmark(packages=("torch", "numpy"), seeds=3)
DIGITS = "0123456789"
CODES = ["201", "415", "530", "607", "718", "892"]
EXCHANGES = ["13", "26", "38", "40", "57", "69", "84", "95"]
WEIGHTS = [0.0, 0.25, 0.5, 1.0, 2.0]
Takes = dict[str, dict[str, list[Recording]]]  # of each speaker, of each digit


def read(settings: Settings) -> Takes:
    takes: Takes = {}
    for path in sorted(settings.folder("spoken_digits").glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        takes.setdefault(speaker, {}).setdefault(digit, []).append(read_wav(path))
    return takes


def joined(text: str, takes: dict[str, list[Recording]], rng: np.random.Generator) -> Recording:
    "One of the takes of each digit, with a pause of 50 to 150 ms between them."
    parts, rate = [], takes[text[0]][0].rate
    for digit in text:
        found = takes[digit][rng.integers(len(takes[digit]))].samples
        parts += [np.zeros(int(rate * rng.uniform(0.05, 0.15))), found / np.abs(found).max()]
    return Recording(np.concatenate([*parts[1:], np.zeros(rate // 20)]), rate)


def numbers(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    parts = rng.choice(CODES, n), rng.choice(EXCHANGES, n), rng.integers(10, 100, n)
    return [f"{code}{exchange}{own}" for code, exchange, own in zip(*parts)]


def trained(takes: Takes, held_out: str, speed: float, seed: int, settings: Settings) -> Recognizer:
    "Of the three speakers who are left."
    rng, others = np.random.default_rng([seed, 1]), sorted(takes.keys() - {held_out})
    texts = [*DIGITS, *("".join(rng.choice(list(DIGITS), rng.integers(1, 5))) for _ in range(settings.pick(800, 10)))]
    sounds = [joined(text, takes[others[rng.integers(len(others))]], rng) for text in texts]
    return Recognizer.fit(sounds, texts, RecognizerConfig(steps=settings.pick(300, 2), speed=speed, seed=seed))


def singles(takes: dict[str, list[Recording]]) -> tuple[list[Recording], list[str]]:
    pairs = [(recording, digit) for digit in DIGITS for recording in takes[digit]]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def framed(sounds: list[Recording]) -> list[Recording]:
    "With a moment of silence behind each, as all that was trained on has."
    return [Recording(np.concatenate([sound.samples, np.zeros(sound.rate // 20)]), sound.rate) for sound in sounds]


def stretched(recording: Recording, columns: int = 20) -> np.ndarray:
    bands = np.log(spectrogram(recording.samples) @ mel_filters(recording.rate, 200, 32) + 1e-6)
    x = bands[np.linspace(0, len(bands) - 1, columns).round().astype(int)]
    return ((x - x.mean()) / x.std()).ravel()


def nearest(takes: Takes, held_out: str) -> float: # share of wrong digits
    known, names = zip(*((stretched(r), digit) for speaker in takes if speaker != held_out for r, digit in zip(*singles(takes[speaker]))))
    table, wrong = np.stack(known), 0
    sounds, texts = singles(takes[held_out])
    for sound, text in zip(sounds, texts): wrong += names[int(((table - stretched(sound)) ** 2).sum(1).argmin())] != text
    return wrong / len(texts)


def over(values: dict[str, float]) -> dict[str, Any]: # of each speaker
    "Mean over the speakers, and its standard error."
    facts = mean_sd(list(values.values()))
    return {"mean": facts["mean"], "error": facts["sd"] / math.sqrt(len(values)) if len(values) > 1 else None, "each": values}


def averaged(rows: dict[str, Sequence[float]]) -> dict[str, float]: return {name: float(np.mean(row)) for name, row in rows.items()}


@BENCHMARK.part(data=["spoken_digits"])
def digits(settings: Settings) -> dict[str, Any]:
    takes = read(settings)
    texts = numbers(settings.pick(40, 2), seed=1)
    one: dict[str, list[float]] = {speaker: [] for speaker in takes}
    by_weight: dict[float, dict[str, list[float]]] = {weight: {speaker: [] for speaker in takes} for weight in WEIGHTS}
    whole: dict[float, dict[str, list[float]]] = {weight: {speaker: [] for speaker in takes} for weight in WEIGHTS}
    for speaker in takes:
        rng = np.random.default_rng(2)
        said = [joined(text, takes[speaker], rng) for text in texts]
        for seed in range(settings.seeds):
            made = trained(takes, speaker, 0.15, seed, settings)
            sounds, wanted = singles(takes[speaker])
            one[speaker].append(cer(made.predict(framed(sounds)), wanted).value)
            lm = made.language_model(numbers(500, seed=3), order=4)
            for weight in WEIGHTS:
                found = made.predict(said, beams=8, language_model=lm, weight=weight)
                by_weight[weight][speaker].append(cer(found, texts).value)
                whole[weight][speaker].append(float(np.mean([a == b for a, b in zip(found, texts)])))
            print(speaker, seed, round(one[speaker][-1], 3), {w: round(rows[speaker][-1], 3) for w, rows in by_weight.items()}, flush=True)
    chosen = {s: min(WEIGHTS, key=lambda w: sum(np.mean(by_weight[w][other]) for other in takes if other != s)) for s in takes}  # noqa: B023
    alone = averaged(by_weight[0.0])
    helped = {speaker: float(np.mean(by_weight[chosen[speaker]][speaker])) for speaker in takes}
    return {
        "recordings": sum(len(rows) for speaker in takes.values() for rows in speaker.values()), "numbers": len(texts),
        "nearest": over({speaker: nearest(takes, speaker) for speaker in takes}),
        "one by one": over(averaged(one)), "one by one, each seed": one,
        "alone": over(alone), "with a language model": over(helped),
        "gain": over({speaker: alone[speaker] - helped[speaker] for speaker in takes}), "weights": chosen,
        "whole numbers alone": over(averaged(whole[0.0])),
        "whole numbers with it": over({speaker: float(np.mean(whole[chosen[speaker]][speaker])) for speaker in takes}),
        "by weight": {str(weight): averaged(rows) for weight, rows in by_weight.items()},
    }  # fmt: skip


@BENCHMARK.part(data=["spoken_digits"])
def speed(settings: Settings) -> dict[str, Any]:
    takes, found = read(settings), dict[str, list[float]]()
    for speaker in takes:
        sounds, wanted = singles(takes[speaker])
        runs = (trained(takes, speaker, 0.0, seed, settings) for seed in range(settings.seeds))
        found[speaker] = [cer(made.predict(framed(sounds)), wanted).value for made in runs]
        print(speaker, [round(value, 3) for value in found[speaker]], flush=True)
    return {"one by one": over(averaged(found)), "one by one, each seed": found}


if __name__ == "__main__": run(__file__)
