"""The editor's list, `tools/prose.py`: every rule finds what was planted, and leaves alone what only looks like it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs import stage
from tools import prose
from tools.notebooks import notebooks
from tools.prose import Cell, Fault, faults, main, read

LONG = "Word" + " word" * 40 + " ends."
CODE = "```python\nwhoever shall\n```"
GLOSSARY = "# Glossary\n\n## S\n\n- **softmax** (软最大值): Scores into shares. [Networks](20_networks.ipynb)"
# One sentence for each pattern of `WORDS`, in its order.
PLANTED = [
    "A long text is dearer than a short one.",
    "Forty texts are kept aside.",
    "One option replaces the bend.",
    "The thing comes before the doing.",
    "The part that thinks is small.",
    "It says one thing for ever.",
    "A window of three sees two places back.",
    "A window ends at its own place before the last one.",
    "Say it at every place, please.",
    "What is left to mend?",
    "The number where it is above zero, and else zero.",
    "But what of a model that shall write?",
    "It hangs on the order of the sums.",
    "With which probability is it drawn?",
    "It is kept on the way forward.",
    "Texts of like length are sorted.",
    "We run one and the other, in turns.",
    "Beside it stands the floor.",
    "We know that here stands an address.",
    "Refuse a byte that is no character.",
    "It is simple. Whoever reads it knows.",
    "A row of tags has a score.",
    "It says whence the words came.",
    "We have no evidences for it.",
    "It has an own memory.",
    "It is done by the means of a sum.",
    "He comes as good as never.",
    "This allows to train longer.",
    "It runs till the end.",
]
FINE = [  # near the patterns, on the right side
    "Dear Mother, the number stands for a word. Nothing else matters, and everything else is left out.",
    "She set the book aside, in place of the other, in the right place, at a place that we can measure.",
    "We shall see. I shall not. Shall we? The boxes hang on a wall. It is no longer so, and no accident that is no more.",
    "It is a gift to whoever wrote it. Each token, whoever reads it, is one. It stands beside the stove, out of reach.",
    "*Mend the mojibake.* And \"You shall know a word by the company it keeps\" (Firth 1957).",
    "`whoever` and $shall$ and [a link](for_ever.ipynb).", CODE, "## Whoever mends the bend", "| shall | dear |\n| --- | --- |",
]


def markdown(*texts: str) -> list[Cell]: return [Cell("markdown", text) for text in ("# Title\n\n> A promise.", *texts)]
def found(rule, *texts: str) -> list[Fault]: return list(rule("10_a", markdown(*texts)))


@pytest.mark.parametrize("n", range(len(prose.WORDS)))
def test_each_word_is_found_and_its_better_is_said(n):
    pattern, instead = prose.WORDS[n]
    assert len(PLANTED) == len(prose.WORDS)
    assert any(fault.advice.endswith(instead) for fault in found(prose.words, PLANTED[n])), (pattern, PLANTED[n])


@pytest.mark.parametrize("text", FINE)
def test_what_only_looks_like_one_is_left_alone(text): assert found(prose.words, text) == []


def test_what_is_allowed_is_still_needed():
    "A phrase whose chapter was told again leaves the list."
    whole = " ".join(cell.source for cells in read(notebooks()).values() for cell in cells if cell.kind == "markdown")
    assert [phrase for phrase in prose.ALLOWED if phrase not in whole] == []
    assert all(reason for reason in prose.ALLOWED.values())
    assert all(any(re.search(pattern, phrase) for pattern, _ in prose.WORDS) for phrase in prose.ALLOWED)


def test_a_long_sentence_is_found_with_its_cell_and_its_length():
    [fault] = found(prose.long_sentences, "Short.", f"Before. {LONG} After.")
    assert (fault.chapter, fault.cell, fault.rule) == ("10_a", 2, "sentence") and fault.text == LONG and "42 words" in fault.advice


@pytest.mark.parametrize(
    "text",
    [
        "word " * 39 + "ends.",  # forty
        "word " * 30 + "ends. " + "Next " * 30 + "ends.",
        "- " + "word " * 30 + "\n- " + "word " * 30,
        "word " * 30 + "$" + "a " * 30 + "$ and `" + "b " * 30 + "`.",
        "word " * 30 + "[link](" + "a/" * 30 + ").",
        "| " + "word " * 50 + " |\n| --- |",
        f"```\n{LONG}\n```",
        f"## {LONG}",
        f"$$\n{LONG}\n$$",
        f"## References\n\n- {LONG}",
        "> " + "word " * 30 + "\n\n" + "word " * 30,
        "word " * 30 + "(That is so.) " + "And " * 30 + "ends.",
        "word " * 30 + "ends. `code` " + "begins " * 30 + ".",
        "word " * 30 + "by *Ctrl-C.* " + "And " * 30 + "ends.",
    ],
)
def test_what_is_no_long_sentence(text): assert found(prose.long_sentences, text) == []


@pytest.mark.parametrize("point", ["e.g.", "i.e.", "et al.", "eq.", "vs.", "J."])
def test_a_point_that_ends_nothing(point):
    assert len(found(prose.long_sentences, "word " * 25 + f"{point} Word " + "word " * 20 + "ends.")) == 1


def test_code_that_does_not_fit_is_found_unless_it_is_folded():
    wide, high = "x = 1  #" + 81 * "-", "x = 1\n" * 41
    assert [(f.rule, f.advice[:13]) for f in prose.code("10_a", [Cell("code", wide)])] == [("width", "89 characters")]
    assert [(f.rule, f.advice[:8]) for f in prose.code("10_a", [Cell("code", high)])] == [("height", "41 lines")]
    caption = Cell("code", f"#| fig-cap: {wide}\n" + "x\n" * 40)
    for fine in (Cell("code", wide, folded=True), Cell("code", high, folded=True), Cell("markdown", wide), caption):
        assert list(prose.code("10_a", [fine])) == []


@pytest.mark.parametrize("text", ["See `17_perplexity`.", "In chapter 17 it is said.", "The chapter on texts has it.", "(Chapter 17.)"])
def test_a_chapter_without_a_link_is_found(text): assert [f.rule for f in found(prose.unlinked, text)] == ["chapter"]


@pytest.mark.parametrize(
    "text",
    [
        "See [Perplexity](17_perplexity.ipynb).",
        "In [chapter 17](17_perplexity.ipynb).",
        "The chapter on [language models](16_x.ipynb) has it.",
        "The chapters on [batches](23_a.ipynb) and [training](24_b.ipynb).",
        "This chapter is about texts.",
        "```\n17_perplexity, chapter 17\n```",
    ],
)
def test_a_chapter_with_a_link_is_not(text): assert found(prose.unlinked, text) == []


def early(*texts: str) -> list[str]:
    book = {"10_a": markdown(*texts), "15_b": markdown("A softmax again."), "20_networks": markdown("A softmax.")}
    terms = {"softmax": stage.Term("softmax", "软最大值", "It.", "20_networks"), "score": stage.Term("score", "分数", "It.", "30_late")}
    return [f"{fault.chapter} {fault.cell}" for fault in prose.early_terms(book, terms)]


def test_a_term_before_its_chapter_is_found_once_in_the_book():
    assert early("Scores go through a softmax.", "Another softmax.") == ["10_a 1"]
    assert early("Two softmaxes.") == ["10_a 1"]
    assert early("Nothing of the kind.") == ["15_b 1"]


@pytest.mark.parametrize(
    "text",
    [
        "A *softmax* makes shares.",
        "A **softmax** makes shares.",
        "A *plain softmax* makes shares.",
        "A [softmax](20_networks.ipynb).",
        "[Networks](20_networks.ipynb) has the softmax.",
    ],
)
def test_a_term_that_is_marked_is_not(text): assert early(text) == []


def test_everyday_words_stand_in_the_glossary():
    "A word that is no term needs no exception."
    entries = "\n".join(cell.source for cell in read(notebooks())[stage.GLOSSARY])
    assert [word for word in prose.EVERYDAY if f"- **{word}**" not in entries.casefold()] == []


def write(folder: Path, name: str, *texts: str, kind: str = "markdown") -> None:
    cells = [{"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)} for text in ("# Title\n\n> A promise.", *texts)]
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")


def test_the_command_prints_a_line_for_each_and_fails(tmp_path, capsys):
    write(tmp_path, "10_a", "All is well.")
    write(tmp_path, "glossary", GLOSSARY)
    assert main(tmp_path) == 0 and capsys.readouterr().out == ""
    write(tmp_path, "11_b", LONG, "It is dear, by a softmax, as in chapter 17.")
    assert main(tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"11_b, cell (\d), (\w+): '", line).groups() for line in lines[:-1]] == [
        ("1", "sentence"),
        ("2", "word"),
        ("2", "chapter"),
        ("2", "term"),
    ]
    assert "instead of 'dear': expensive, or costs more" in lines[1] and lines[-1].startswith("4 places")


def test_the_book_is_clean(): assert [str(fault) for fault in faults(read(notebooks()))] == []
