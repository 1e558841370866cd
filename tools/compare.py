"""Compare two outputs of a cell: numbers with a tolerance, everything else exactly.

How far a number may be from the stored one is the largest of three: the book's default (one part in a thousand, or half a unit of the last
digit), `FACTOR` times the spread that was measured for it (tools/spread.py), and what the cell asks for with a reason (`Tolerance`).

A text is cut into numbers and the text between them. The text between must be equal (but for runs of spaces beside a number: a number of
another width moves its column), the numbers must be close. Digits inside a word are text: `D1-13`, `utf-8`, `x86_64`, `float32`, `0x7f3a`
and `1.2.3` are compared exactly, and so are the tags and attributes of HTML.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

REL = 1e-3  # the book's default
FACTOR = 4  # of the measured spread of a number
IMAGE_SIZE_REL = 0.1  # another font or matplotlib moves the edge of a tightly cut figure
SHOWN = 8  # a message lists at most so many numbers

# Chinese, Japanese and Korean put no space between a word and a number, so their letters do not make a number part of a word.
CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
LETTER = rf"[^\W\d{CJK}]"
NUMBER = rf"""(?P<number>
    (?<![^\W{CJK}]) (?<![0-9]\.)                                  # not in the middle of a word, a number or a version
    (?: (?<![\w)\]]) [+\-\u2212] )?                               # a sign, unless it stands between two things: 3-5
    (?: (?: [0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9]) | [0-9]+ ) (?: \.[0-9]+ | \.(?=[\s,\])]|$) )? | (?<!\.)\.[0-9]+ )
    (?: [eE][+-]?[0-9]+ (?!{LETTER}) )?
    (?! {LETTER}*[0-9] ) (?! \.[0-9] )                            # a unit may follow (12ms), more digits may not (3f2a, 1.2.3)
  | (?<![\w.-]) [+-]? (?:nan|NaN|inf) (?![\w-])
)"""
WORD = rf"{LETTER}[^\W{CJK}]*(?:[-.][^\W{CJK}]+)*"  # with the digits in it: D1-13, GPT-2, v1.2.3
MARKUP = r"""<!--.*?--> | <(?P<raw>style|script)\b.*?</(?P=raw)\s*> | </?[A-Za-z!?](?:[^<>"']|"[^"]*"|'[^']*')*> | &\#?\w+;"""
PLAIN = re.compile(rf"{NUMBER} | {WORD}", re.VERBOSE)
HTML = re.compile(rf"{MARKUP} | {NUMBER} | {WORD}", re.VERBOSE | re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Tolerance:
    "How far a number may be from the stored one."

    rel: float = REL
    abs: float | None = None  # None: half a unit of the last printed digit, as far as a rounded number knows itself ("0.00" is not "0.01")
    integers: bool = False  # whether integers fall under it too; by default a count is a count

    COMMENT = re.compile(r"^\s*#\s*NBVAL_TOLERANCE\b:?(.*)$", re.MULTILINE)

    @classmethod
    def of(cls, source: str) -> Tolerance:
        "What a cell asks for in a comment `# NBVAL_TOLERANCE: rel=2e-2, abs=1e-3 (why it needs it)`; ValueError if it is not so."
        comments = cls.COMMENT.findall(source)
        if not comments: return cls()
        want = "write `# NBVAL_TOLERANCE: rel=2e-2, abs=1e-3 (why this cell needs it)`, with rel, abs or both"
        if len(comments) > 1: raise ValueError(f"more than one NBVAL_TOLERANCE in a cell; {want}")
        match = re.fullmatch(r"\s*([^()]*?)\s*(?:\((.*)\))?\s*", comments[0])
        if not match or not (match[2] or "").strip(): raise ValueError(f"NBVAL_TOLERANCE without a reason in brackets; {want}")
        given: dict[str, float] = {}
        for part in match[1].split(","):
            name, _, value = (s.strip() for s in part.partition("="))
            try: number = float(value)
            except ValueError: raise ValueError(f"NBVAL_TOLERANCE: cannot read {part.strip()!r}; {want}") from None
            if name not in ("rel", "abs") or name in given or not 0 <= number < math.inf:
                raise ValueError(f"NBVAL_TOLERANCE: cannot use {part.strip()!r}; {want}")
            given[name] = number
        return cls(given.get("rel", REL), given.get("abs"), integers=True)


@dataclass(frozen=True)
class Number:
    "A number as it is printed, and where."

    text: str
    start: int

    @property
    def value(self) -> float: return float(self.text.replace(",", "").replace("\u2212", "-"))

    @property
    def point(self) -> bool: return "." in self.text

    @property
    def whole(self) -> bool:
        "Printed without decimals or exponent (`5`, `1,234`, and `5.`, as torch prints floats that are all whole), so compared exactly."
        return re.fullmatch(r"[+\-\u2212]?[\d,]+\.?", self.text) is not None

    @property
    def half_unit(self) -> float:
        "Half a unit of the last printed decimal; 0 where none is printed."
        decimals, _, exponent = self.text.lower().partition("e")
        digits = len(decimals.partition(".")[2])
        return 0.5 * 10.0 ** (int(exponent or 0) - digits) if digits else 0.0

    def allowed(self, tolerance: Tolerance, spread: float = 0.0) -> float:
        "How far another number may be from this one; for a whole number 0, unless it was seen to move or the cell asks for more."
        if self.whole and not self.point and not tolerance.integers: return FACTOR * spread
        absolute = self.half_unit if tolerance.abs is None else tolerance.abs
        return max(tolerance.rel * abs(self.value), absolute, FACTOR * spread)

    def agrees(self, new: Number, tolerance: Tolerance, spread: float = 0.0) -> bool:
        "Whether `new` may stand where this one is stored."
        if not (math.isfinite(self.value) and math.isfinite(new.value)): return self.text == new.text
        if not tolerance.integers and self.whole != new.whole and not (self.point and new.point):
            return False  # a count became a measurement
        if self.whole and new.whole and not tolerance.integers and not spread: return self.text == new.text
        return math.isclose(
            self.value,
            new.value,
            rel_tol=tolerance.rel * (self.point or tolerance.integers),
            abs_tol=self.allowed(tolerance, spread) * (1 + 1e-9),
        )


def tokenise(text: str, html: bool = False) -> tuple[list[str], list[Number]]:
    "The n + 1 texts between the n numbers, without the spaces that touch a number, and the numbers."
    between, numbers, end = [], [], 0
    for match in (HTML if html else PLAIN).finditer(text):
        if not match["number"]: continue
        piece = text[end : match.start()].rstrip(" ")
        between.append(piece.lstrip(" ") if numbers else piece)
        numbers.append(Number(match["number"], match.start()))
        end = match.end()
    return [*between, text[end:].lstrip(" ") if numbers else text], numbers


def _around(text: str, number: Number, width: int = 40) -> str:
    "The number in [[ ]] with what stands on its line to the left and right."
    left, right = text[: number.start], text[number.start + len(number.text) :]
    return f"{left.rpartition(chr(10))[2][-width:]}[[{number.text}]]{right.partition(chr(10))[0][:width]}"


@dataclass(frozen=True)
class Moved:
    "A number that is another one than the stored: what a comparison found beside what is wrong."

    stored: str
    new: str
    used: float  # the difference as a share of what is allowed; more than 1 is a failure
    where: str  # the line around it


def spreads_of(numbers: list[Number], measured: Mapping[int, float], unsettled: bool = False) -> list[float]:
    """The spread of each number of a text: what was measured for it, but not less than what its neighbours of the same form show.

    Few arithmetics were tried, so one number may have stayed by chance where those beside it moved. Numbers with as many decimals in one
    text are mostly of one kind (a column of losses): each gets at least the median of their spreads. Where a number of the notebook moved
    before, or beside it (`unsettled`), each gets enough for a rounding that falls to the other side, a unit of the last digit. Whole
    numbers, and those with an exponent, speak for themselves.
    """
    spreads = [measured.get(i, 0.0) for i in range(len(numbers))]
    groups: dict[float, list[int]] = {}
    for i, n in enumerate(numbers):
        if not n.whole and "e" not in n.text.lower() and math.isfinite(n.value): groups.setdefault(n.half_unit, []).append(i)
    for half_unit, group in groups.items():
        together = max(statistics.median(spreads[i] for i in group), 2 * half_unit / FACTOR if unsettled else 0.0)
        for i in group: spreads[i] = max(spreads[i], together)
    return spreads


def _constant(stored: list[Number], new: list[Number]) -> bool:
    "Whether numbers that differ from each other have all become the same, which no tolerance excuses."
    pairs = [(a, b) for a, b in zip(stored, new) if not a.whole and math.isfinite(a.value)]
    differ = any(not pairs[0][0].agrees(a, Tolerance()) for a, _ in pairs[1:])
    return len(pairs) >= 3 and differ and len({b.value for _, b in pairs}) == 1


def compare_text(
    stored: str,
    new: str,
    tolerance: Tolerance = Tolerance(),  # noqa: B008 (frozen)
    html: bool = False,
    measured: Mapping[int, float] | None = None,  # the spread of the i-th number, for those that were seen to move
    unsettled: bool = False,  # whether numbers moved so far in its notebook
    moved: list[Moved] | None = None,  # gets the numbers that differ
) -> list[str]:
    "What makes `new` differ from `stored`, in words; nothing if they agree."
    if stored == new: return []
    (stored_between, stored_numbers), (new_between, new_numbers) = tokenise(stored, html), tokenise(new, html)
    if stored_between != new_between:
        diff = list(difflib.unified_diff(stored.splitlines(), new.splitlines(), "stored", "new", n=1, lineterm=""))
        if not diff: diff = [f"- {stored!r:.200}", f"+ {new!r:.200}"]  # they differ in the kind of line ends only
        return ["the text differs:", *(f"  {line:.300}" for line in diff[:40]), *(["  ..."] if len(diff) > 40 else [])]
    problems = []
    spreads = spreads_of(stored_numbers, measured or {}, unsettled)
    for i, (a, b, spread) in enumerate(zip(stored_numbers, new_numbers, spreads), 1):
        allowed = a.allowed(tolerance, spread)
        if moved is not None and a.value != b.value and math.isfinite(a.value) and math.isfinite(b.value):
            moved.append(Moved(a.text, b.text, abs(a.value - b.value) / allowed if allowed else math.inf, _around(new, b)))
        if a.agrees(b, tolerance, spread): continue
        if a.whole != b.whole and not tolerance.integers: why = "a whole number and one with decimals"
        elif a.whole and not tolerance.integers and not spread: why = "whole numbers are compared exactly"
        elif not (math.isfinite(a.value) and math.isfinite(b.value)): why = "not a number, or infinite, in one only"
        else:
            rel = abs(a.value - b.value) / max(abs(a.value), abs(b.value))
            learned = f", {FACTOR} times its spread" if spread and allowed == FACTOR * spread else ""
            why = f"relative difference {rel:.2g}, absolute {abs(a.value - b.value):.2g}, allowed {allowed:.2g}{learned}"
        problems += [f"number {i} of {len(stored_numbers)}: stored {a.text}, new {b.text} ({why})"]
        problems += [f"    stored  {_around(stored, a)}", f"    new     {_around(new, b)}"]
    if not problems and _constant(stored_numbers, new_numbers):
        problems = ["the stored numbers differ from each other, the new ones are all the same"]
    if len(problems) > 3 * SHOWN: problems = [*problems[: 3 * SHOWN], f"... and {len(problems) // 3 - SHOWN} more numbers"]
    return problems


def image_size(mime: str, data: str) -> tuple[float, float]:
    "Width and height of an image as it is stored in an output."
    if mime == "image/svg+xml":
        root = ET.fromstring(data)
        box = root.get("viewBox", "").replace(",", " ").split()
        sizes = [re.match(r"[\d.]+", root.get(name, "")) for name in ("width", "height")]
        if len(box) == 4: return float(box[2]), float(box[3])
        return (float(sizes[0][0]), float(sizes[1][0])) if sizes[0] and sizes[1] else (0.0, 0.0)
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(data))) as image: return image.size


def compare_image(mime: str, stored: str, new: str) -> list[str]:
    "Not by pixels: another font or version changes those. What a figure shows is asserted in a cell; here it must be there, in its size."
    try: old, now = image_size(mime, stored), image_size(mime, new)
    except (ValueError, OSError, ET.ParseError) as error: return [f"the image cannot be read: {error}"]
    if all(math.isclose(a, b, rel_tol=IMAGE_SIZE_REL) for a, b in zip(old, now)): return []
    return [f"the image has another size: stored {old[0]:g} x {old[1]:g}, new {now[0]:g} x {now[1]:g}"]


def kind(output) -> str:
    "What kind of output this is, for people: `stream stdout`, `display_data text/html + text/plain`."
    if output.output_type == "stream": return f"stream {output.name}"
    if output.output_type == "error": return f"error {output.ename}"
    return " ".join([output.output_type, " + ".join(sorted(output.data))])


def texts(output) -> Iterator[tuple[str, str, bool]]:
    "What of an output is compared as text: under which name, the text, and whether it is HTML."
    if output.output_type == "stream": yield output.name, output.text, False
    elif output.output_type == "error": yield "error", output.evalue, False
    else:
        for mime in sorted(output.data):
            content = output.data[mime]
            if mime == "application/vnd.jupyter.widget-view+json" or mime.startswith("image/"):
                continue  # a random id; its size is compared
            if not isinstance(content, str): content = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
            yield mime, content, mime == "text/html"


def compare_output(
    stored, new, tolerance: Tolerance, measured: Mapping[str, Mapping[int, float]], unsettled: bool, moved: list[Moved] | None
) -> list[str]:
    "Compare two outputs of the same kind."
    problems = []
    for (name, a, html), (_, b, _) in zip(texts(stored), texts(new)):
        found = compare_text(a, b, tolerance, html, measured.get(name), unsettled, moved)
        if found and stored.output_type in ("stream", "error"): return found
        problems += [f"{name}:", *(f"  {line}" for line in found)] if found else []
    if stored.output_type in ("stream", "error"): return problems
    for mime in sorted(m for m in stored.data if m.startswith("image/")):
        found = compare_image(mime, stored.data[mime], new.data[mime])
        problems += [f"{mime}:", *(f"  {line}" for line in found)] if found else []
    return problems


def compare_outputs(
    stored: list,
    new: list,
    tolerance: Tolerance,
    measured: Mapping[str, Mapping[int, float]] | None = None,  # "0 text/plain": the spreads in that text of the first output
    unsettled: bool = False,  # whether numbers moved so far in its notebook
    moved: list[Moved] | None = None,  # gets the numbers that differ
) -> list[str]:
    "Compare the outputs of a cell: how many, of which kind, and what they say."
    was, now = [kind(o) for o in stored], [kind(o) for o in new]
    if was != now:
        if not now: head = "the stored output is missing: the cell produced none"
        elif not was: head = "unexpected output: none is stored"
        elif len(was) != len(now): head = f"{len(was)} outputs are stored, the cell produced {len(now)}"
        else: head = "outputs of another kind"
        heads = [str(o.get("text") or o.get("evalue") or o.get("data", {}).get("text/plain", ""))[:300] for o in new]
        return [f"{head}:", *(f"  stored  {k}" for k in was), *(f"  new     {k}  {t!r}" for k, t in zip(now, heads))]
    problems = []
    for i, (a, b) in enumerate(zip(stored, new)):
        mine = {key.partition(" ")[2]: v for key, v in (measured or {}).items() if key.partition(" ")[0] == str(i)}
        found = compare_output(a, b, tolerance, mine, unsettled, moved)
        problems += [f"output {i + 1} of {len(was)} ({was[i]}):", *(f"  {line}" for line in found)] if found else []
    return problems
