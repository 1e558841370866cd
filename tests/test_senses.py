"""Sound and pictures against PyTorch, transformers, enumeration and formulas; what comes back from a folder; bad input; planted faults."""

from __future__ import annotations

import itertools
import json
import math
import wave
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lmbook.senses as senses
from lmbook.core import LmbookError
from lmbook.language_models import NGram
from lmbook.senses import (
    Captioner,
    CaptionerConfig,
    Recognizer,
    RecognizerConfig,
    Recording,
    SensesError,
    collapse,
    ctc_beams,
    ctc_loss,
    cut_patches,
    frames_needed,
    mel_filters,
    read_wav,
    spectrogram,
    write_wav,
)
from lmbook.tokenization import WordTokenizer
from tests.faults import planted

SMALL = RecognizerConfig(d_model=16, n_layer=1, n_head=2, n_mels=12, steps=3, batch_size=4)
SEES = CaptionerConfig(size=8, patch=4, d_model=16, n_layer=1, n_head=2, longest=8, steps=3, batch_size=4)
TONES = {"a": 400.0, "b": 1100.0, "c": 2500.0}


def tones(text: str, seed: int = 0) -> Recording:
    "A tone for each letter, with silence around."
    rng, parts = np.random.default_rng(seed), []
    for letter in text: parts += [np.zeros(300), np.sin(2 * np.pi * TONES[letter] * np.arange(900) / 8000)]
    sound = np.concatenate([*parts, np.zeros(300)])
    return Recording(0.5 * sound + 0.01 * rng.normal(size=len(sound)), 8000)


def pictures(n: int, seed: int = 0) -> list[np.ndarray]: return list(np.random.default_rng(seed).random((n, 8, 8, 3)))


@pytest.fixture(scope="module")
def ear() -> Recognizer: return Recognizer.fit([tones(t) for t in ("ab", "c", "bca")], ["ab", "c", "bca"], SMALL)


@pytest.fixture(scope="module")
def eye() -> Captioner: return Captioner.fit(pictures(3), ["A red cup.", "A cup.", "Nothing is here."], SEES)


# ---------------------------------------------------------------- sound


def check_spectrogram(module: ModuleType) -> None:
    sound = np.random.default_rng(0).normal(size=1003)
    for frame, hop in ((200, 80), (64, 64), (33, 7), (1003, 1)):
        window = torch.hann_window(frame, dtype=torch.float64)
        waves = torch.stft(torch.tensor(sound), frame, hop, window=window, center=False, return_complex=True)
        np.testing.assert_allclose(module.spectrogram(sound, frame, hop), (waves.abs() ** 2).T.numpy(), atol=1e-8)


def test_a_spectrogram_is_pytorchs(): check_spectrogram(senses)


def test_a_tone_stands_in_its_row_and_a_short_sound_has_no_frame():
    for f in (1, 10, 77): assert spectrogram(np.sin(2 * np.pi * f * np.arange(800) / 200)).argmax(1).tolist() == [f] * 8
    assert spectrogram(np.zeros(199)).shape == (0, 101) and spectrogram([]).shape == (0, 101)


def check_mel(module: ModuleType) -> None:
    theirs = pytest.importorskip("transformers.audio_utils").mel_filter_bank
    for rate, frame, n, low, high in ((8000, 200, 32, 0.0, None), (16000, 400, 80, 0.0, 8000.0), (8000, 256, 5, 100.0, 3000.0)):
        wanted = theirs(frame // 2 + 1, n, low, high or rate / 2, rate, norm=None, mel_scale="htk")
        np.testing.assert_allclose(module.mel_filters(rate, frame, n, low, high), wanted, atol=1e-9)


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_mel_filters_are_transformers(): check_mel(senses)


def test_spectrograms_and_filters_refuse():
    for bad, says in (([[1.0, 2.0]] * 3, "stereo"), ([math.nan], "NaN"), ("ab", "no row of numbers"), (np.zeros((3, 3, 3)), r"\(N,\)")):
        with pytest.raises(SensesError, match=says): spectrogram(bad)
    for frame, hop in ((1, 1), (5000, 1), (200, 0)):
        with pytest.raises(SensesError): spectrogram(np.zeros(300), frame, hop)
    for low, high in ((0, 5000.0), (300.0, 200.0), (-1, None), (0.0, math.nan), (0.0, 1e-300)):
        with pytest.raises(SensesError): mel_filters(8000, 200, 10, low, high)


def save_as(path: Path, data: bytes, width: int, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, 8000, 0, "NONE", ""))
        file.writeframes(data)
    return path


def check_wav(module: ModuleType, folder: Path) -> None:
    values = np.array([0.0, 0.5, -0.5, 0.99, -1.0])
    for width, kind, one, zero in ((1, "u1", 128, 128), (2, "<i2", 2**15, 0), (4, "<i4", 2**31, 0)):
        path = save_as(folder / f"{width}.wav", (values * one + zero).round().astype(kind).tobytes(), width)
        found = module.read_wav(path)
        assert found.rate == 8000
        np.testing.assert_allclose(found.samples, values, atol=1 / one)
    sound = tones("ab")
    module.write_wav(folder / "own.wav", module.Recording(*sound))
    again = module.read_wav(folder / "own.wav")
    assert again.rate == 8000 and np.abs(again.samples - sound.samples).max() < 1e-4


def test_wav_files_of_8_16_and_32_bits(tmp_path): check_wav(senses, tmp_path)


def test_wav_files_that_are_refused(tmp_path):
    with pytest.raises(SensesError, match="stereo"): read_wav(save_as(tmp_path / "two.wav", bytes(8), 2, 2))
    with pytest.raises(SensesError, match="24 bits"): read_wav(save_as(tmp_path / "24.wav", bytes(9), 3))
    with pytest.raises(SensesError, match="no file"): read_wav(tmp_path / "absent.wav")
    good = save_as(tmp_path / "good.wav", bytes(40), 2).read_bytes()
    for data in (b"", b"RIFF", good[:30], b"x" * 50, good.replace(b"WAVE", b"AVI ")):
        (tmp_path / "bad.wav").write_bytes(data)
        with pytest.raises(SensesError, match="no WAV file"): read_wav(tmp_path / "bad.wav")
    assert len(read_wav(save_as(tmp_path / "empty.wav", b"", 2)).samples) == 0
    with pytest.raises(SensesError, match="nothing"): write_wav(tmp_path / "n.wav", Recording(np.zeros(0), 8000))
    with pytest.raises(SensesError, match="Recording"): write_wav(tmp_path / "n.wav", [0.1])  # type: ignore[arg-type]
    assert not (tmp_path / "n.wav").exists()


# ---------------------------------------------------------------- CTC


def check_ctc(module: ModuleType) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        B, T, V = rng.integers(1, 5), rng.integers(1, 12), rng.integers(2, 5)
        lengths = rng.integers(1, T + 1, B).tolist()
        rows = []
        for n in lengths:
            row = rng.integers(1, V, rng.integers(0, n + 1)).tolist()
            while frames_needed(row) > n: row.pop()
            rows.append(row)
        z = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
        ours = module.ctc_loss(z.log_softmax(-1), rows, lengths)
        flat, many = torch.tensor([x for row in rows for x in row], dtype=torch.long), torch.tensor([len(row) for row in rows])
        theirs = F.ctc_loss(z.log_softmax(-1).transpose(0, 1), flat, torch.tensor(lengths), many, reduction="none")
        torch.testing.assert_close(ours, theirs)
        weight = torch.rand(B, dtype=torch.float64)
        slopes = [torch.autograd.grad((loss * weight).sum(), z)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*slopes)


def test_ctc_and_its_gradient_are_pytorchs(): check_ctc(senses)


def by_paths(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    "The probability of each text, by all paths."
    T, V = log_probs.shape
    out: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(V), repeat=T):
        text = tuple(x for x, _ in itertools.groupby(path) if x)
        out[text] = out.get(text, 0.0) + math.exp(sum(float(log_probs[t, x]) for t, x in enumerate(path)))
    return out


def test_ctc_is_the_sum_over_paths():
    torch.manual_seed(1)
    log_probs = torch.randn(5, 3, dtype=torch.float64).log_softmax(-1)
    for text, p in by_paths(log_probs).items():
        assert math.exp(-float(ctc_loss(log_probs[None], [list(text)]))) == pytest.approx(p, rel=1e-9)
        shortest = [x for a, b in zip(text, (*text[1:], 0)) for x in ([a, 0] if a == b else [a])]
        assert len(shortest) == frames_needed(text) <= 5 and collapse(shortest) == list(text)


def test_what_ctc_refuses():
    even = torch.zeros(1, 4, 3).log_softmax(-1)
    for rows, lengths, says in (
        ([[1, 1, 2]], [3], "needs 4 frames and has 3"), ([[1, 0]], None, "blank"), ([[3]], None, "no token"),
        ([[1], [2]], None, "each has one"), ([[1]], [5], "from 1 to 4"), ([[1]], [0], "from 1 to 4"), (["ab"], None, "a text"),
    ):  # fmt: skip
        with pytest.raises(SensesError, match=says): ctc_loss(even, rows, lengths)  # type: ignore[arg-type]
    with pytest.raises(SensesError, match=r"\(B, T, V\)"): ctc_loss(even[0], [[1]])
    assert float(ctc_loss(even, [[1, 1, 2]], [4])) == pytest.approx(4 * math.log(3))


def check_beams(module: ModuleType) -> None:
    torch.manual_seed(2)
    def grammar(text: list[int]) -> list[float]: # prefers to go on with what is one more than the last, and to stop behind a 3
        want = 0 if text and text[-1] == 3 else (text[-1] if text else 0) + 1
        return [math.log(0.7 if k == want else 0.1) for k in range(4)]

    for _ in range(5):
        log_probs = torch.randn(5, 4, dtype=torch.float64).log_softmax(-1)
        exact = by_paths(log_probs)
        found = module.ctc_beams(log_probs, 10**4)
        assert {tuple(t.labels) for t in found} == set(exact)
        for text in found: assert math.exp(text.log_prob) == pytest.approx(exact[tuple(text.labels)], rel=1e-9)
        assert found == sorted(found, key=lambda t: -t.score)

        def total(text: tuple[int, ...], exact: dict[tuple[int, ...], float] = exact) -> float:
            told = sum(grammar(list(text[:i]))[x] for i, x in enumerate((*text, 0)))
            return math.log(exact[text]) + 0.8 * told + 0.3 * len(text)

        for text in module.ctc_beams(log_probs, 10**4, grammar, 0.8, 0.3): assert text.score == pytest.approx(total(tuple(text.labels)))
        assert tuple(module.ctc_beams(log_probs, 60, grammar, 0.8, 0.3)[0].labels) == max(exact, key=total)
    assert len(module.ctc_beams(log_probs, 3)) == 3


def test_beams_are_enumeration_with_and_without_a_language_model(): check_beams(senses)


def test_beams_of_impossible_labels_and_what_they_refuse():
    sure = torch.full((3, 2), -math.inf)
    sure[:, 1] = 0
    assert ctc_beams(sure)[0][:2] == ([1], 0.0)
    silent = ctc_beams(sure, 4, lambda text: [0.0, -math.inf], 0.0)
    assert silent[0].labels == [1] and math.isfinite(silent[0].score)
    with pytest.raises(SensesError, match="beams=0"): ctc_beams(sure, 0)
    with pytest.raises(SensesError, match="weight"): ctc_beams(sure, weight=-1.0)
    with pytest.raises(SensesError, match="bonus"): ctc_beams(sure, bonus=math.nan)
    with pytest.raises(SensesError, match="one recording"): ctc_beams(sure[None])


# ---------------------------------------------------------------- the recogniser


def check_company(module: ModuleType) -> None:
    made = module.Recognizer(SMALL, "abc")
    sounds = [module.Recording(*tones(text)) for text in ("a", "abcab", "cb", "b")]
    together, one = made.log_probs(sounds), [made.log_probs([sound])[0] for sound in sounds]
    for a, b in zip(together, one): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert made.log_probs([]) == [] and together[0].shape[1] == 4


def test_a_recording_is_heard_alone_as_in_company(): check_company(senses)


def test_it_learns_tones_of_any_number_and_forgets_loudness(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), rng.integers(1, 4))) for _ in range(48)]
    config = replace(SMALL, steps=150, lr=1e-2, batch_size=8, speed=0.05)
    made = Recognizer.fit([tones(t, i) for i, t in enumerate(texts)], texts, config)
    said = ["abc", "bb", "cabac", "a"]
    sounds = [tones(t, 100) for t in said]
    assert made.predict(sounds) == said == made.predict(sounds, beams=4)
    assert made.predict([s._replace(samples=0.1 * s.samples) for s in sounds]) == said
    scores = made.evaluate([{"recording": s, "text": t} for s, t in zip(sounds, said)], beams=2)
    assert scores["CER"].value == 0 and scores["exact"].value == 1
    again = Recognizer.fit([tones(t, i) for i, t in enumerate(texts)], texts, config)
    torch.testing.assert_close(made.log_probs(sounds)[0], again.log_probs(sounds)[0], atol=0, rtol=0)
    made.save(tmp_path / "ear")
    loaded = Recognizer.load(tmp_path / "ear")
    assert loaded.config == config and loaded.alphabet == "abc"
    torch.testing.assert_close(made.log_probs(sounds)[0], loaded.log_probs(sounds)[0], atol=0, rtol=0)


def check_fusion(module: ModuleType) -> None:
    "A mumbled second letter is what the language model has read, and not what it has not."
    made = module.Recognizer(SMALL, "abc")
    lm = made.language_model(["ab"] * 20 + ["ca"], order=3)
    assert lm.vocab_size == 4 and float(lm.next_log_probs([0, 1]).argmax()) == 2
    row = torch.full((4, 4), 0.01)
    row[0, 1], row[1, 0], row[2, 2], row[2, 3], row[3, 0] = 1, 1, 0.4, 0.5, 1
    made.log_probs = lambda recordings: [row.log()] * len(recordings)
    assert made.predict([None], 8) == ["ac"] and made.predict([None], 8, lm, 1.0) == ["ab"]
    assert made.predict([None], 8, lm, 0.0) == ["ac"] and made.predict([None]) == ["ac"]

    class Asked:
        vocab_size, contexts = 4, list[list[int]]()

        def next_log_probs(self, context: list[int]) -> torch.Tensor:
            self.contexts.append(context)
            return torch.zeros(4)

    made.predict([None], 2, Asked(), 1.0)
    assert [0] in Asked.contexts and all(context[0] == 0 not in context[1:] for context in Asked.contexts)


def test_a_language_model_decides_where_the_sound_does_not(): check_fusion(senses)


def test_letters_and_labels(ear):
    assert ear.alphabet == "abc" and ear.encode("cab") == [3, 1, 2] and ear.decode([3, 0, 1]) == "ca" and ear.encode("") == []
    with pytest.raises(SensesError, match="'x' in 'xa' is no letter"): ear.encode("xa")
    with pytest.raises(SensesError, match="no token"): ear.decode([4])
    with pytest.raises(SensesError, match="no letter"): ear.language_model(["abx"])
    with pytest.raises(SensesError, match="no texts"): ear.language_model([])


def test_what_the_recogniser_refuses(ear):
    sound = tones("ab")
    other = Recording(sound.samples, 16000)
    clipped = Recording((20 * sound.samples).clip(-1, 1), 8000)
    for bad, says in (
        (other, "16000 samples a second"), (clipped, "clipped: "), (Recording(np.zeros(900), 8000), "silent"),
        (Recording(np.zeros(0), 8000), "has 0 samples"), (Recording(np.zeros((900, 2)), 8000), "stereo"),
        (Recording(np.full(900, np.nan), 8000), "NaN"), (sound.samples, "no Recording"), (Recording(sound.samples, 0), "rate=0"),
    ):  # fmt: skip
        with pytest.raises(SensesError, match=says): ear.predict([sound, bad])
    with pytest.raises(SensesError, match="give a list"): ear.predict(sound)
    with pytest.raises(SensesError, match="beams"): ear.predict([sound], language_model=ear.language_model(["ab"]))
    with pytest.raises(SensesError, match="other labels"): ear.predict([sound], 4, NGram.fit([[0, 1, 0]], 9))
    short = Recording(sound.samples[:1200], 8000)
    with pytest.raises(SensesError, match="needs 8 positions .* has 7"): Recognizer.fit([short], ["abcabcab"], SMALL)
    for texts, says in ((["a", "b"], "1 recordings and 2 texts"), ([], "1 recordings and 0"), ("a", "a list"), ([""], "no letter")):
        with pytest.raises(SensesError, match=says): Recognizer.fit([sound], texts, SMALL)
    for record in ({"text": "a"}, "ab"):
        with pytest.raises(SensesError, match="Record 0"): ear.evaluate([record])
    with pytest.raises(SensesError, match="nothing can be scored"): ear.evaluate([])
    for alphabet in ("", "aa"):
        with pytest.raises(SensesError, match="each letter"): Recognizer(SMALL, alphabet)
    with pytest.raises(SensesError, match="no such model"): Recognizer(replace(SMALL, d_model=15), "ab")
    with pytest.raises(SensesError, match="steps=0"): RecognizerConfig(steps=0)
    with pytest.raises(SensesError, match="share"): RecognizerConfig(speed=1.0)


# ---------------------------------------------------------------- pictures


def check_patches(module: ModuleType) -> None:
    x = torch.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    found = module.cut_patches(x, 2)
    assert found.shape == (2, 6, 12)
    for i, (row, column) in enumerate(itertools.product((0, 2), (0, 2, 4))):
        assert torch.equal(found[1, i], x[1, row : row + 2, column : column + 2].flatten())


def test_patches_go_row_by_row(): check_patches(senses)


def check_captions(module: ModuleType, folder: Path) -> None:
    rng, dark, light = np.random.default_rng(0), np.zeros((8, 8, 3)), np.ones((8, 8, 3))
    left, right = dark.copy(), dark.copy()
    left[:, :4] = right[:, 4:] = 1
    told = {"All is dark.": dark, "All is light.": light, "Light is left.": left, "Light is right.": right}
    album = [((picture + rng.normal(0, 0.1, picture.shape)).clip(0, 1), text) for text, picture in told.items() for _ in range(8)]
    made = module.Captioner.fit(*zip(*album), replace(SEES, steps=250, lr=5e-3, batch_size=16))
    assert made.predict(list(told.values())) == list(told)
    assert made.predict([left]) == ["Light is left."] and made.predict([]) == []
    records = [{"picture": picture, "text": text} for text, picture in told.items()]
    scores = made.evaluate(records, lambda text: {"side": text.split()[-1]} if text.startswith("Light") else {})
    assert scores["exact"].value == scores["side"].value == 1 and scores["side"].n == 2 and scores["BLEU"].value == pytest.approx(100)
    words, weights = made.attention(left, "Light is left.")
    assert words == ["Light", "is", "left", "."] and weights.shape == (4, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    made.save(folder / "eye")
    assert module.Captioner.load(folder / "eye").predict(list(told.values())) == list(told)


def test_captions_are_learned_scored_and_saved(tmp_path): check_captions(senses, tmp_path)


def test_the_attention_is_that_of_the_decoder_which_stays_as_it_was(eye):
    [picture] = pictures(1, 5)
    before = eye.predict([picture])
    words, weights = eye.attention(picture, "A red cup.")
    eye.model.train()
    torch.testing.assert_close(eye.attention(picture, "A red cup.")[1], weights)
    eye.model.eval()
    assert eye.predict([picture]) == before and not eye.model.text.decoder.blocks[-1].cross_norm._forward_hooks
    assert words == ["A", "red", "cup", "."] and bool((weights > 0).all())


def test_what_the_captioner_refuses(eye):
    good = pictures(1)[0]
    for bad, says in ((np.zeros((9, 8, 3)), r"shape \(9, 8, 3\)"), (255 * good, "Divide bytes by 255"), (good * np.nan, "from 0 to 1"),
                      (np.zeros((8, 8)), r"shape \(8, 8\)"), ("cup", "no table of numbers")):  # fmt: skip
        with pytest.raises(SensesError, match=says): eye.predict([good, bad])
    with pytest.raises(SensesError, match="one picture"): eye.predict(good)
    with pytest.raises(SensesError, match="more than longest"): eye.attention(good, "A cup. " * 9)
    with pytest.raises(SensesError, match="longest=8 is less"): Captioner.fit([good], ["a b c d e f g h"], SEES)
    with pytest.raises(SensesError, match="1 pictures and 2 texts"): Captioner.fit([good], ["a", "b"], SEES)
    with pytest.raises(SensesError, match="must divide"): CaptionerConfig(size=32, patch=5)
    with pytest.raises(SensesError, match="sides"): cut_patches(torch.zeros(1, 5, 4, 3), 2)
    with pytest.raises(SensesError, match="no such model"): Captioner(replace(SEES, n_head=3), eye.tokenizer)
    with pytest.raises(SensesError, match="<bos> and <eos>"): Captioner(SEES, WordTokenizer(["cup"], specials=["<unk>"]))
    unknown = eye.evaluate([{"picture": good, "text": "Zyzzyva!"}])  # a word that it cannot write is an error of its own
    assert unknown["exact"].value == 0


def test_damaged_folders(ear, eye, tmp_path):
    for made, kind, name in ((ear, Recognizer, "recognizer.json"), (eye, Captioner, "captioner.json")):
        folder = tmp_path / kind.__name__
        with pytest.raises(SensesError, match="cannot be read"): kind.load(folder)
        made.save(folder)
        good = json.loads((folder / name).read_text())
        for content in (b"[", b"[]", b'{"config": 3}', json.dumps({**good, "config": {"depth": 1}}).encode(),
                        json.dumps({**good, "config": {**good["config"], "steps": "many"}}).encode()):  # fmt: skip
            (folder / name).write_bytes(content)
            with pytest.raises(SensesError): kind.load(folder)
        (folder / name).write_text(json.dumps({**good, "config": {**good["config"], "d_model": 32}}))
        with pytest.raises(LmbookError, match="another architecture"): kind.load(folder)


# ---------------------------------------------------------------- faults

FAULTS = {
    "no window": ("window[:, None] * np.cos(angle)", "np.cos(angle)", check_spectrogram),
    "a hop too many": ("sliding_window_view(samples, frame)[::hop]", "sliding_window_view(samples, frame)[1::hop]", check_spectrogram),
    "mel without the logarithm's 1": ("math.log10(1 + f / 700)", "math.log10(1.1 + f / 700)", check_mel),
    "a label jumps to itself": ("states[:, 3::2] != states[:, 1:-2:2]", "states[:, 3::2] != -1", check_ctc),
    "nothing begins in a label": ("emit[:, 0, :2], never[:, :1].expand(B, S)", "emit[:, 0, :1], never[:, :1].expand(B, S)", check_ctc),
    "every row ends at the last frame": ("torch.tensor(steps, device=at.device) - 1", "T - 1", check_ctc),
    "a text ends in a blank only": ("-torch.logaddexp(final[at, ends], before)", "-final[at, ends]", check_ctc),
    "no blank between equal letters": ("start = blank if text and text[-1] == next else both", "start = both", check_beams),
    "the end is not asked for": ("p + more + told(text, 0)", "p + more", check_beams),
    "no bonus": ("told(text, next) + bonus", "told(text, next)", check_beams),
    "padding is heard": ("there = at < (lengths[:, None] + 1) // 2", "there = at >= 0 * lengths[:, None]", check_company),
    "a language model without a beginning": ("next_log_probs([0, *row])", "next_log_probs([*row])", check_fusion),
    "patches of columns": ("x.transpose(2, 3).reshape(B, -1,", "x.transpose(1, 3).reshape(B, -1,", check_patches),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(senses, old, new, monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError)): check(faulty)


FILES = {
    "8 bits around 0": ('"u1", 128.0, 128.0', '"u1", 0.0, 128.0', check_wav),
    "a picture is not looked at": ("+ self.places\n", "* 0 + self.places\n", check_captions),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_planted_fault_of_files_is_found(fault, monkeypatch, tmp_path):
    old, new, check = FILES[fault]
    faulty = planted(senses, old, new, monkeypatch)
    with pytest.raises(AssertionError): check(faulty, tmp_path)
