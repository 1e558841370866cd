"""Keys counted as by a slow typist; gaps moved and filled; suggestions that are the model's own probabilities; bad input; faults."""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import lmbook.writing as writing
from lmbook.batches import IGNORE, Examples
from lmbook.language_models import NGram
from lmbook.tokenization import SPECIALS, ByteTokenizer, WordTokenizer
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from lmbook.writing import FIM_SPECIALS, FillInTheMiddle, Writer, WritingError, fim_marks, fim_order, keystrokes
from tests.faults import planted

COLOURS = {"red": "rose", "blue": "sea", "green": "wood", "white": "snow"}


def texts(n: int, seed: int = 0) -> list[str]:
    "What has this colour is named behind it, and not before."
    dice = random.Random(seed)
    out = []
    for _ in range(n):
        colour = dice.choice(list(COLOURS))
        out.append(f"It was {colour} and {dice.choice(['old', 'new'])}. A {COLOURS[colour]}!")
    return out


WORDS = WordTokenizer.train(texts(200), specials=(*SPECIALS, *FIM_SPECIALS))
MARKS = fim_marks(WORDS)
UNITS = ["" if i in WORDS.specials.values() else WORDS.decode([i]) for i in range(WORDS.vocab_size)]


def decoder(context: int = 48, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    made = Transformer(TransformerConfig(WORDS.vocab_size, 32, 2, 2, context_length=context, positions="rotary"))
    with torch.no_grad():
        for p in made.parameters(): p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


# ---------------------------------------------------------------- keys


def typed(row: Any, unit: int, units: list[str], k: int) -> int:
    "As somebody types: look at the list; if the word is not in it, one letter more."
    word = units[unit].lstrip()
    for letters in range(len(word)):
        fits = [v for v in range(len(units)) if units[v].lstrip().startswith(word[:letters]) and units[v].strip()]
        better = sum(row[v] > row[unit] for v in fits)
        if unit in fits and better < k: return min(letters + 1, len(units[unit]))
    return len(units[unit])


def test_keys_are_those_of_a_slow_typist(module=writing):
    rng = np.random.default_rng(0)
    units = ["", " a", " an", " ant", ".", "Ant", " antler", "!", " bee", " beer", "be"]
    for k in (1, 2, 3):
        scores, truth = rng.normal(size=(300, len(units))), rng.integers(1, len(units), 300)
        wanted = [typed(row, unit, units, k) for row, unit in zip(scores, truth)]
        assert module.keystrokes(scores, truth, units, k).tolist() == wanted


def test_keys_at_both_ends():
    truth = [UNITS.index(" red"), UNITS.index(" and"), UNITS.index(".")]
    sure = np.eye(len(UNITS))[truth]
    assert keystrokes(sure, truth, UNITS, 1).tolist() == [1, 1, 1]
    assert keystrokes(np.zeros((0, len(UNITS))), [], UNITS).tolist() == []
    lost = [" abc", " abd", " abe", " abf"]
    assert keystrokes([[3, 2, 1, 0]], [3], lost, 3).tolist() == [4]  # three are better to the end: all is typed
    assert keystrokes([[3, 2, 1, 0]], [3], lost, 4).tolist() == [1]


# ---------------------------------------------------------------- gaps


def test_a_gap_is_moved_to_the_end(module=writing):
    marks = module.fim_marks(WORDS)
    prefix, suffix, middle = marks.sentinels
    for seed in range(200):
        dice = random.Random(seed)
        row = [WORDS.bos_id] * (seed % 2) + dice.choices(range(8, WORDS.vocab_size), k=dice.randint(0, 12))
        first = seed % 2
        start = dice.randint(first, len(row)) if len(row) > first else first
        end = dice.randint(start, len(row))
        moved = module.fim_order(row, start, end, marks)
        a, b, c = (moved.index(mark) for mark in (prefix, suffix, middle))
        assert moved[:a] == row[:first] and moved[a + 1 : b] == row[first:start]
        assert moved[b + 1 : c] == row[end:] and moved[c + 1 :] == row[start:end]


def test_what_is_reordered_and_how_much(module=writing):
    rows = [WORDS.encode(text, bos=True, eos=True) for text in texts(400)]
    marks = module.fim_marks(WORDS)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        batch = module.FillInTheMiddle(marks, share=share, longest=4)(rows, rng)
        moved, lengths = 0, set()
        for b, row in enumerate(rows):
            n = int((batch.targets[b] != IGNORE).sum()) + 1
            ids = [*batch.ids[b, : n - 1].tolist(), batch.targets[b, n - 2].item()]
            assert batch.targets[b, : n - 1].tolist() == ids[1:]
            if ids == row: continue
            moved += 1
            places = [ids.index(mark) for mark in marks.sentinels]
            middle = ids[places[2] + 1 : -1]
            lengths.add(len(middle))
            assert [*ids[: places[0]], *ids[places[0] + 1 : places[1]], *middle, *ids[places[1] + 1 : places[2]], ids[-1]] == row
        assert abs(moved / 400 - share) < 0.1 and lengths <= {1, 2, 3, 4} and (not moved or len(lengths) == 4)


def test_every_place_can_be_a_gap():
    row = WORDS.encode("It was red and old. A rose!", bos=True, eos=True)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(500):
        batch = FillInTheMiddle(MARKS, share=1.0, longest=3)([row], rng)
        seen |= {id for id in batch.ids[0].tolist()[batch.ids[0].tolist().index(MARKS.sentinels[2]) + 1 :]}
    assert seen == set(row[1:-1])


def test_it_is_the_same_in_each_epoch_that_is_the_same():
    rows = [WORDS.encode(text, bos=True, eos=True) for text in texts(20)]
    batches = FillInTheMiddle(MARKS).on(Examples(rows, batch_size=5), seed=1)
    a, b, c = (torch.cat([batch.ids.flatten() for batch in batches.read(epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))


def trained(module: ModuleType = writing) -> Any:
    rows = [WORDS.encode(text, bos=True, eos=True) for text in texts(400)]
    objective = module.FillInTheMiddle(module.fim_marks(WORDS), share=0.5, longest=3)
    model = decoder()
    how = TrainConfig(steps=150, lr=5e-3, warmup=10, device="cpu")
    Trainer(model.train(), objective.on(Examples(rows, batch_size=16)), how, loss=objective.loss).fit()
    return module.Writer(model.eval(), WORDS)


def test_it_sees_what_is_behind_the_gap():
    writer = trained()
    for colour, thing in COLOURS.items():
        text = f"It was {colour} and old. A {thing}!"
        for gap in ((7, 7 + len(colour)), (6, 7 + len(colour))):  # with the space or without
            best, other = writer.fill(text, gap, n=2)
            assert best.text == f" {colour}" and best.whole == text and best.probability > 0.8 > 0.2 > other.probability
    ahead = writer.complete("It was", n=4, words=1)  # from the left all colours are as good
    assert {found.text.strip() for found in ahead} == set(COLOURS) and ahead[0].probability < 0.6
    assert sum(found.probability for found in ahead) == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------- suggestions


def test_suggestions_are_the_models_probabilities():
    model = decoder()
    with torch.no_grad(): p = model(torch.tensor([WORDS.encode("It was", bos=True)]))[0, -1].softmax(-1)
    wanted = sorted((i for i, unit in enumerate(UNITS) if unit.startswith(" ")), key=lambda i: -p[i].item())[:5]
    found = Writer(model, WORDS).suggest("It was ", k=5)
    assert [f.text for f in found] == [UNITS[i] for i in wanted] and found[0].whole == f"It was{UNITS[wanted[0]]}"
    assert [f.probability for f in found] == pytest.approx([p[i].item() for i in wanted], rel=1e-4)


def test_letters_that_were_typed():
    writer = Writer(decoder(), WORDS)
    for text, fits in (("It w", {" was", " white", " wood"}), ("It was b", {" blue"}), ("I", {"It"}), ("It was red.", None), ("zz", set())):
        found = writer.suggest(text, k=9)
        if fits is not None: assert {f.text for f in found} <= fits and bool(found) == bool(fits)
        else: assert len(found) == 9
        assert all(f.whole.startswith(text) for f in found)


def test_completions_are_beams_with_their_probabilities():
    model = decoder()
    writer = Writer(model, WORDS)
    for found in writer.complete("It was", n=3, words=3):
        ids, new = WORDS.encode("It was", bos=True), WORDS.encode(found.text)
        with torch.no_grad(): logp = model(torch.tensor([ids + new]))[0].log_softmax(-1)
        total = sum(logp[len(ids) - 1 + i, id].item() for i, id in enumerate(new))
        if len(new) == 3: assert found.probability == pytest.approx(math.exp(total), rel=1e-3)
        assert found.whole == "It was" + found.text


def test_an_ngram_can_complete_but_not_fill():
    rows = [WORDS.encode(text, bos=True, eos=True) for text in texts(50)]
    writer = Writer(NGram.fit(rows, WORDS.vocab_size), WORDS)
    assert writer.complete("It was", n=2, words=1)[0].text.strip() in COLOURS
    assert len(writer.suggest("It was red", k=2)) == 1


ENCODER = TransformerConfig(WORDS.vocab_size, 16, 1, 2, kind="encoder")
PLAIN = WordTokenizer.train(["It was"])
BAD = {
    "behind": (lambda: Writer(decoder(), WORDS).fill("It was", (3, 7)), r"The gap \(3, 7\) is outside of the text, which has 6 characters"),
    "before": (lambda: Writer(decoder(), WORDS).fill("It was", (-1, 2)), "is outside of the text"),
    "backwards": (lambda: Writer(decoder(), WORDS).fill("It was", (4, 2)), "is outside of the text"),
    "one number": (lambda: Writer(decoder(), WORDS).fill("It was", 3), "gap=3 is a pair of numbers"),
    "halves": (lambda: Writer(decoder(), WORDS).fill("It was", (0.5, 2)), "is a pair of numbers"),
    "long": (lambda: Writer(decoder(), WORDS).fill("It was red. " * 20, (0, 2)), "and the model reads 48: cut the text"),
    "bytes": (lambda: Writer(decoder(), WORDS).fill(b"It", (0, 1)), "A text is a str, not bytes"),
    "no marks": (lambda: Writer(decoder(), PLAIN).fill("It was", (0, 1)), "There is no special token '<.prefix.>'"),
    "encoder": (lambda: Writer(Transformer(ENCODER), WORDS), "A writer needs a model that predicts the next token"),
    "no pair": (lambda: Writer(Transformer(TransformerConfig(8, 16, 1, 2)), WORDS), "they are no pair"),
    "tokenizer": (lambda: Writer(decoder(), "words"), "A str is no tokenizer"),
    "pieces": (lambda: Writer(lambda ids: torch.zeros(*ids.shape, 300), ByteTokenizer()).suggest("It"), "it needs a WordTokenizer"),
    "none": (lambda: Writer(decoder(), WORDS).complete("It", n=0), "n=0 must be"),
    "no words": (lambda: Writer(decoder(), WORDS).complete("It", words=0), "words=0 must be"),
    "outside": (lambda: fim_order([1, 8, 9], 2, 4, MARKS), r"The gap \(2, 4\) is none: this text has its tokens from 1 to 3"),
    "the first mark": (lambda: fim_order([1, 8, 9], 0, 1, MARKS), "is none"),
    "no ids": (lambda: fim_order([1, 999], 1, 2, MARKS), "The id 999 is no token"),
    "share": (lambda: FillInTheMiddle(MARKS, share=1.5), "share=1.5 must be at most 1"),
    "longest": (lambda: FillInTheMiddle(MARKS, longest=0), "longest=0 must be"),
    "marks": (lambda: FillInTheMiddle("marks"), "marks= is needed"),
    "no end": (lambda: FillInTheMiddle(MARKS, share=1)([[8, 9]], np.random.default_rng(0)), "Row 0 does not end with <eos>"),
    "only marks": (lambda: FillInTheMiddle(MARKS, share=1)([[1, WORDS.eos_id]], np.random.default_rng(0)), "has no token beside its marks"),
    "scores": (lambda: keystrokes(np.zeros((2, 3)), [0], ["a", "b", "c"]), r"not \(2, 3\), \(1,\) and 3"),
    "no unit": (lambda: keystrokes(np.zeros((1, 3)), [3], ["a", "b", "c"]), "truth holds a number that is no unit's"),
    "k": (lambda: keystrokes(np.zeros((1, 3)), [0], ["a", "b", "c"], 0), "k=0 must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case):
    from lmbook.core import LmbookError

    function, message = BAD[case]
    with pytest.raises(LmbookError, match=message) as caught: function()
    assert isinstance(caught.value, WritingError) or case == "no marks"


# ---------------------------------------------------------------- planted faults

FAULTS = {
    "a letter too few": ("out[i] = letters + 1", "out[i] = letters", test_keys_are_those_of_a_slow_typist),
    "one suggestion more": ("> row[unit]).sum() < k", "> row[unit]).sum() <= k", test_keys_are_those_of_a_slow_typist),
    "suffix before prefix": ("*row[first:start], suffix, *row[end:]", "*row[end:], suffix, *row[first:start]", test_a_gap_is_moved_to_the_end),
    "the gap stays": ("suffix, *row[end:], middle", "suffix, *row[start:], middle", test_a_gap_is_moved_to_the_end),
    "all are moved": ("if rng.random() >= self.share:", "if rng.random() >= 1:", test_what_is_reordered_and_how_much),
    "too long": ("min(self.longest, n) + 1", "n + 1", test_what_is_reordered_and_how_much),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    old, new, check = FAULTS[fault]
    faulty = planted(writing, old, new, monkeypatch)
    with pytest.raises((AssertionError, ValueError)): check(module=faulty)
