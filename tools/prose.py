"""What a machine can say of the book's English and of how its cells look: `python -m tools.prose`, a part of `make lint`.

Five rules, each a function from a notebook to its faults: private and translated words, sentences of more than 40 words, code that does
not fit on the page, chapters that are spoken of without a link, and terms of the glossary that the book uses before the chapter that
explains them, without a word or a link.
A line for each fault says where it is and what to do; the exit status is 1 if there is one. Style itself needs a reader.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

from docs import stage
from tools.notebooks import notebooks

LONGEST = 40  # words of a sentence
WIDTH = 88  # characters of a line that a page of the site shows
HEIGHT = 40  # lines of a visible cell

# ---------------------------------------------------------------- words

# What the book used to say in words of its own, or in another language's; and what the field or a native writer says.
# Only what a pattern can judge with few false alarms: that an "it" is unclear, no pattern sees.
WORDS: list[tuple[str, str]] = [
    (r"\bdear(?:er|est)?\b", "expensive, or costs more"),
    (r"\b(?:keep|keeps|kept|put) aside\b", "held out (and: validation set)"),
    (r"\bthe bend\b|\b[Bb]ent\b", "activation function, or non-linear"),
    (r"\b(?:the|a|each|its) doing\b|\bdoings\b", "verb"),
    (r"\b(?:part|layer|network|matrix|MLP) that thinks\b", "MLP, or feed-forward layer"),
    (r"\bfor ever\b", "forever"),
    (r"\bplaces? (?:back|wide|apart|before it|earlier|later|first)\b|\b[BCDHKSTV] places\b|\btexts times places\b", "position"),
    (r"\b(?:own|last|next|each|every|all) places?(?= (?:\w+ ){0,2}(?:has|have|sees?|looks?|before the last))", "position"),
    (r"\bat (?:all|each|every|its|every other) places?\b(?! (?:of|where|in)\b)", "position"),
    (r"\bmend(?:s|ed|ing)?\b|\bMend(?:s|ed|ing)?\b", "fix, repair or correct"),
    (r"(?:\band|[,;]) else\b(?! if\b)", "otherwise"),
    (r"(?<![Ww]e )(?<!\bI )\bshall\b", "should, will, or is to"),
    (r"\bhangs? on\b(?! a\b)", "depends on"),
    (r"\b(?:[Ww]hich|from which|with which) (?:share|probability)\b", "what share, with what probability"),
    (r"\bthe way forward\b|\bpass(?:es)? (?:forward|backward)\b", "the forward pass, the backward pass"),
    (r"\bof like [a-z]+\b", "of similar ..."),
    (r"\bin turns\b", "in turn, or alternately"),
    (r"\b(?:[Aa]bove|[Aa]gainst|[Bb]e(?:fore|hind|low|side|tween))(?: (?:each|it|that|them|these|this))? (?:stands?|stood)\b",
     "the subject first: not 'beside it stands X' but 'X is next to it'"),
    (r"\b(?:here|there) stands?\b", "is, or comes"),
    (r"\b(?:that|which|what) (?:is|are|was|were) (?:none\b|no (?!longer|more|less|better|faster|easier|accident|invention|good|use)[a-z])",
     "'that is not a ...'"),
    (r"(?:^|[.;:] |\b(?:and|but|so|that|because|since) )[Ww]hoever\b", "anyone who, or those who"),
    (r"\brows? of (?:tags|tokens)\b|\blong rows?\b", "sequence"),
    (r"\b(?:whence|thence|thereof|therein|wherein|whereof|hereby|hitherto|lest|ere|nay)\b", "a word that people say"),
    (r"\b(?:informations|softwares|feedbacks|evidences|knowledges|researches|advices|equipments|vocabularys)\b", "no plural"),
    (r"\b(?:an|the) own\b(?! (?:goal|brand))", "its own, or a ... of its own"),
    (r"\bby the means of\b|\bin the frame of\b|\bin dependence of\b|\bunder the condition that\b", "by means of, depending on, if"),
    (r"\bas good as (?:never|nothing|always|all|none)\b", "almost"),
    (r"\b(?:discuss|discusses|discussed) about\b|\bexplain (?:us|me|you) \b|\ballows? to\b", "an object before the verb: 'allows us to'"),
    (r"\btill\b|\bupon\b", "until, on"),
]  # fmt: skip
# Phrases of which a word above is rightly a part, with the reason.
ALLOWED = {
    "You shall know a word by the company it keeps": "a quotation (Firth 1957)",
    "*Mend the mojibake.*": "the name of an exercise, whose function is `mend`",
}

# ---------------------------------------------------------------- terms

# Terms of the glossary that are words of everyday English as well, or have another, plain meaning in earlier chapters ("the value of a
# field", "a power of two", "a head start"): no pattern can tell which is meant.
EVERYDAY = set("""
    advantage bias blank block clipped confidence contradiction exchange expert floor
    forgetting frame greedy group head hook key layer level lot mask
    neighbouring network notes pack passage pitch policy power precision prompt rank reader recall reduce replay resolution sampling scale
    score shortcut slope span strength stride timeout trace triple typical uncertainty value vocabulary weight weighted weights window
""".split())


@dataclass(frozen=True)
class Cell:
    "A cell as the rules see it."

    kind: str  # "markdown" or "code"
    source: str
    folded: bool = False  # a reader sees its code only on request


@dataclass(frozen=True)
class Fault:
    "A place that breaks a rule."

    chapter: str
    cell: int  # counted from 0, as in the file
    rule: str
    text: str
    advice: str

    def __str__(self) -> str: return f"{self.chapter}, cell {self.cell}, {self.rule}: {self.text!r}: {self.advice}"


Book = dict[str, list[Cell]]  # by name, in reading order


def read(paths: Iterable[Path]) -> Book:
    "The cells of notebooks. What carries the tag `hide-input` is folded."
    book: Book = {}
    for path in paths:
        cells = book[path.stem] = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            folded = "hide-input" in cell["metadata"].get("tags", [])
            cells.append(Cell(cell["cell_type"], source, folded))
    return book


FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.M | re.S)
NOT_WORDS = [  # what is read as one mark, and what is read as its text
    (re.compile(r"``.*?``|`[^`]*`"), "◇"), (re.compile(r"(?<!\\)\$[^$]+\$"), "◇"), (re.compile(r"!?\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"https?://\S+"), "◇"), (re.compile(r"<[^>]*>"), ""), (re.compile(r"\s+"), " "),
]  # fmt: skip
ITEM = re.compile(r"^(?:[-*+]|\d+[.)])\s+")
END = re.compile(r"[.?!]+[\"'”’)*_\]]*\s+(?=[\"'“‘(*_\[]*[A-Z◇\d\u4e00-\u9fff])")  # after it a new sentence may begin
NO_END = re.compile(r"(?<![\w-])(?:e\.g|i\.e|al|eqs?|sect?|fig|vs|cf|no|pp|ch|Dr|Mrs?|St|[A-HJ-Z])\.$")  # such a point ends no sentence
LINK = re.compile(r"(?:\b[Cc]hapters? (?:on|about) )?\[[^\]]*\]\([^)]*\)(?:(?:,| and| to|-)+ ?\[[^\]]*\]\([^)]*\))*")
CHAPTER = re.compile(r"`\d\d[b-z]?_[a-z_]+(?:\.ipynb)?`|\b[Cc]hapters? \d\d[b-z]?\b|\b[Cc]hapters? (?:on|about) (?:[a-z-]+ ?){1,3}")
WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")


def paragraphs(markdown: str) -> Iterator[str]:
    "The running text of a Markdown cell, a paragraph or an item at a time: no fences, tables, headings, displayed formulas."
    text = re.sub(r"\$\$.*?\$\$", "◇", FENCE.sub("", markdown), flags=re.S)
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        line = re.sub(r"^(?:> ?)+", "", line.strip())
        apart = not line or line.startswith(("|", "#"))
        if (apart or ITEM.match(line)) and lines:
            yield plain(" ".join(lines))
            lines = []
        if not apart: lines.append(ITEM.sub("", line, count=1))


def plain(text: str) -> str:
    "A paragraph as it is read: a mark for each formula and piece of code, links without their addresses."
    for pattern, instead in NOT_WORDS: text = pattern.sub(instead, text)
    return text.strip()


def sentences(paragraph: str) -> Iterator[str]:
    "Split at full stops, question and exclamation marks, where what follows can begin a sentence; not at colons and semicolons."
    start = 0
    for match in END.finditer(paragraph):
        sentence = paragraph[start : match.end()].rstrip()
        if NO_END.search(sentence.rstrip("*_)\"'”’")): continue
        yield sentence
        start = match.end()
    if start < len(paragraph): yield paragraph[start:]


def prose(cells: list[Cell]) -> Iterator[tuple[int, str]]:
    "The paragraphs of a chapter with the numbers of their cells, references left out."
    for i, cell in enumerate(cells):
        if cell.kind == "markdown": yield from ((i, p) for p in paragraphs(re.split(r"(?m)^## References", cell.source)[0]))


# ---------------------------------------------------------------- the rules


def words(chapter: str, cells: list[Cell]) -> Iterator[Fault]:
    "No word of the old private vocabulary, and none that is another language's in English letters."
    for i, paragraph in prose(cells):
        for phrase in ALLOWED: paragraph = paragraph.replace(phrase, "◇")
        for pattern, instead in WORDS:
            for match in re.finditer(pattern, paragraph):
                around = paragraph[max(0, match.start() - 30) : match.end() + 30]
                yield Fault(chapter, i, "word", around, f"instead of {match[0]!r}: {instead}")


def long_sentences(chapter: str, cells: list[Cell]) -> Iterator[Fault]:
    "A sentence has at most 40 words; formulas, code and addresses are none."
    for i, paragraph in prose(cells):
        for sentence in sentences(paragraph):
            if (n := len(WORD.findall(sentence))) > LONGEST: yield Fault(chapter, i, "sentence", sentence, f"{n} words: make it two")


def code(chapter: str, cells: list[Cell]) -> Iterator[Fault]:
    "Code that a reader sees has at most 40 lines of at most 88 characters. What is folded may have more."
    for i, cell in enumerate(cells):
        if cell.kind != "code" or cell.folded: continue
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        for line in lines:
            if len(line) > WIDTH: yield Fault(chapter, i, "width", line.strip()[:40], f"{len(line)} characters: break the line")
        if len(lines) > HEIGHT: yield Fault(chapter, i, "height", cell.source[:40], f"{len(lines)} lines: two cells, or fold it")


def unlinked(chapter: str, cells: list[Cell]) -> Iterator[Fault]:
    "A chapter that is spoken of is linked; `17_perplexity`, chapter 17 or the chapter on perplexity is not enough."
    if not chapter[0].isdigit(): return  # the preface speaks of files
    for i, cell in enumerate(cells):
        if cell.kind != "markdown": continue
        for paragraph in FENCE.sub("", cell.source).split("\n\n"):
            for match in CHAPTER.finditer(LINK.sub("◇", paragraph)):
                yield Fault(chapter, i, "chapter", match[0], "link it: [Perplexity](17_perplexity.ipynb)")


def uses(term: stage.Term) -> re.Pattern[str]:
    "Where a text speaks of a term: its name, or the plural; capitals count in names such as `Adam` and `BLEU`."
    flags = re.I if term.name[1:].islower() and not term.name[0].isupper() else 0
    return re.compile(rf"(?<![\w-]){re.escape(term.name)}(?:s|es)?(?![\w-])", flags)


def early_terms(book: Book, terms: dict[str, stage.Term]) -> Iterator[Fault]:
    """Where the book first speaks of a term, that chapter explains it, or so far has linked the one that does, or set it in bold (which the
    site links) or in italics (which says that it is explained in passing). A title and its promise may announce."""
    chapters = {}
    for name, cells in book.items():
        if not name[0].isdigit(): continue  # the preface says what is to come, the glossary is what we compare with
        texts = [re.split(r"(?m)^## References", c.source)[0] if c.kind == "markdown" else "" for c in cells[1:]]
        chapters[name] = [(i, stage.CODE.sub(" ", text)) for i, text in enumerate(texts, 1) if text]
    small = {name: " ".join(text for _, text in texts).casefold() for name, texts in chapters.items()}
    for term in terms.values():
        if term.name.casefold() in EVERYDAY: continue
        pattern = uses(term)
        for name, texts in chapters.items():
            if name >= term.chapter: break
            if term.name.casefold() not in small[name]: continue
            found = next(((i, match, text) for i, text in texts if (match := pattern.search(text))), None)
            if not found: continue
            i, match, text = found
            marked = re.compile(rf"\*[^*\n]*{pattern.pattern}[^*\n]*\*|\]\({term.chapter}\.ipynb", pattern.flags)
            if not any(marked.search(source) for at, source in texts if at <= i):
                advice = f"the first use of {term.name!r}: link {term.chapter}.ipynb, which explains it, or say there what it is"
                yield Fault(name, i, "term", text[max(0, match.start() - 30) : match.end() + 20].replace("\n", " "), advice)
            break


def faults(book: Book) -> list[Fault]:
    "All that the rules find, in reading order."
    found = [fault for rule in (words, long_sentences, code, unlinked) for name, cells in book.items() for fault in rule(name, cells)]
    entries = nbformat.from_dict({"cells": [{"cell_type": c.kind, "source": c.source} for c in book.get(stage.GLOSSARY, [])]})
    found += early_terms(book, stage.glossary(entries))
    order = list(book)
    return sorted(found, key=lambda fault: (order.index(fault.chapter), fault.cell))


def main(folder: Path | None = None) -> int:
    found = faults(read(notebooks(folder=folder)))
    for fault in found: print(fault)
    if found: print(f"{len(found)} places to rewrite (tools/prose.py says what each rule wants)")
    return int(bool(found))


if __name__ == "__main__": sys.exit(main())
