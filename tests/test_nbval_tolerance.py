"""The plugin that re-runs the book can fail: a test per way in which an output can be wrong, and per way in which it may differ.

Each run of pytest below is a process of its own, with real kernels, over small notebooks; one notebook holds many broken cells,
because a kernel is slow to start.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from tests.nbval_tolerance import Row, Totals, waited
from tests.pages import ROOT
from tools import arithmetics
from tools.arithmetics import AS_STORED, ELSEWHERE, MEASURED, NEWEST, numpy_features, probed
from tools.compare import Moved, Number, Tolerance, compare_text, spreads_of, tokenise
from tools.elsewhere import Outcome, part, table
from tools.notebooks import notebooks
from tools.spread import Spread, carried, compared, digest

# ---------------------------------------------------------------- the comparison itself

IS_TEXT = "D1-13 utf-8 x86_64 float32 GPT2 GPT-2 1.2.3 v1.25 0x7f3a 3f2a9c 7dec92b5 12e4ab 500x300 127.0.0.1".split()
NUMBERS = {
    "loss 2.302 nats": ["2.302"],
    "tensor([0.6700, -1.])": ["0.6700", "-1."],
    "1,234,567 words, 12.5% in 12ms": ["1,234,567", "12.5", "12"],
    "{'a': 1e-3, 'b': -1.5E+05, 'c': .5}": ["1e-3", "-1.5E+05", ".5"],
    "3-5.2 of 2024-01-15": ["3", "5.2", "2024", "01", "15"],
    "1.5+0.3j, x=-3, \u22120.5": ["1.5", "0.3", "-3", "\u22120.5"],
    "[nan, -inf, 1.0] no nano-info": ["nan", "-inf", "1.0"],
    "损失0.5共12个": ["0.5", "12"],
}


@pytest.mark.parametrize("word", IS_TEXT)
def test_digits_in_a_word_are_text(word):
    assert tokenise(f"see {word} now") == ([f"see {word} now"], [])


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_found(text):
    assert [n.text for n in tokenise(text)[1]] == NUMBERS[text]


WIDE = Tolerance(rel=0.1, integers=True)
EQUAL = [
    ("loss 2.302", "loss 2.303", Tolerance()),
    ("[0.5, 1e-08]", "[0.5, 1.0005e-08]", Tolerance()),
    ("0.00", "-0.004", Tolerance()),  # rounds to what is stored
    ("-0.0", "0.0", Tolerance()),
    ("1,234,567.8 words", "1,234,999.1 words", Tolerance()),
    ("12.50%", "12.51%", Tolerance()),
    ("[ 9.999  0.25 ]", "[10.001  0.25 ]", Tolerance()),  # a column has moved
    ("[0.   1.  ]", "[0.    1.001]", Tolerance()),  # numpy's way to print a row
    ("100 steps", "104 steps", WIDE),
    ("epoch 5.", "epoch 5.", Tolerance()),
    ("0.01", "0.02", Tolerance(abs=0.01, integers=True)),
    ("[nan 1.0]", "[ nan 1.0001]", Tolerance()),
]
DIFFERENT = [
    ("loss 2.302", "loss 2.305", Tolerance(), "number 1 of 1: stored 2.302, new 2.305 (relative difference 0.0013"),
    ("a 1.0 b 2.0 c", "a 1.0 b 2.5 c", Tolerance(), "a 1.0 b [[2.5]] c"),
    ("0.00", "0.01", Tolerance(), "allowed 0.005)"),
    ("0.5", "-0.5", Tolerance(), "stored 0.5, new -0.5"),
    ("1000 words", "1001 words", Tolerance(), "whole numbers are compared exactly"),
    ("1,234,567 words", "1,234,568 words", Tolerance(), "stored 1,234,567"),
    ("1,234 words", "1234 words", Tolerance(), "whole numbers are compared exactly"),
    ("found 2000.", "found 2001.", Tolerance(), "whole numbers"),
    ("n = 5", "n = 5.0", Tolerance(), "a whole number and one with decimals"),
    ("[nan, 1.0]", "[0.5, 1.0]", Tolerance(), "stored nan"),
    ("[inf]", "[-inf]", Tolerance(), "stored inf"),
    ("100 steps", "120 steps", WIDE, "allowed 10)"),
    ("claim D1-13", "claim D1-14", WIDE, "claim D1-14"),
    ("version 2.0.1", "version 2.0.2", WIDE, "version 2.0.2"),
    ("loss 2.3", "cost 2.3", WIDE, "+cost 2.3"),
    ("1.0 and 2.0", "1.0 and 2.0 and 3.0", WIDE, "the text differs"),
    ("a  b", "a b", WIDE, "the text differs"),  # spaces count where no number is beside them
    ("a\nb", "a\r\nb", WIDE, "the text differs"),
    ("1.0\n2.0", "1.0 2.0", WIDE, "the text differs"),
]


@pytest.mark.parametrize("stored, new, tolerance", EQUAL)
def test_text_that_may_differ_so_far(stored, new, tolerance):
    assert compare_text(stored, new, tolerance) == []


@pytest.mark.parametrize("stored, new, tolerance, says", DIFFERENT)
def test_text_that_differs(stored, new, tolerance, says):
    assert says in "\n".join(compare_text(stored, new, tolerance))


def test_html_has_exact_tags_and_close_text():
    stored = '<table border="1"><tr><td style="width:1.50em">2.302</td><td>n=5 &#39;</td></tr></table>'
    assert compare_text(stored, stored.replace("2.302", "2.303"), html=True) == []
    for old, new in [("1.50em", "1.5001em"), ("<td>n", "<th>n"), ("2.302", "2.402"), ("&#39;", "&#38;"), ("n=5", "n=6")]:
        assert compare_text(stored, stored.replace(old, new), html=True), (old, new)


def test_a_long_list_of_differences_is_cut():
    lines = compare_text(" ".join(f"{i}.5" for i in range(50)), " ".join(f"{i + 9}.5" for i in range(50)))
    assert lines[-1] == "... and 42 more numbers" and len(lines) == 25


GOOD_COMMENTS = {
    "x = 1": Tolerance(),
    "# NBVAL_TOLERANCE: rel=2e-2, abs=1e-3 (sums in another order)\nx": Tolerance(0.02, 0.001, integers=True),
    "#| export\n  # NBVAL_TOLERANCE rel=0.05 (a trained model)": Tolerance(0.05, integers=True),
    "# NBVAL_TOLERANCE: abs=1 (a count (of threads))": Tolerance(abs=1.0, integers=True),
}
BAD_COMMENTS = {
    "# NBVAL_TOLERANCE: rel=0.05": "without a reason",
    "# NBVAL_TOLERANCE: rel=0.05 ()": "without a reason",
    "# NBVAL_TOLERANCE: rel=0.05 because": "without a reason",
    "# NBVAL_TOLERANCE: (why)": "cannot read",
    "# NBVAL_TOLERANCE: 0.05 (why)": "cannot read",
    "# NBVAL_TOLERANCE: relative=0.05 (why)": "cannot use",
    "# NBVAL_TOLERANCE: rel=-1 (why)": "cannot use",
    "# NBVAL_TOLERANCE: rel=inf (why)": "cannot use",
    "# NBVAL_TOLERANCE: rel=1, rel=2 (why)": "cannot use",
    "# NBVAL_TOLERANCE: rel=1 (why)\n# NBVAL_TOLERANCE: rel=2 (why)": "more than one",
}


@pytest.mark.parametrize("source", GOOD_COMMENTS)
def test_tolerance_comment(source):
    assert Tolerance.of(source) == GOOD_COMMENTS[source]


@pytest.mark.parametrize("source", BAD_COMMENTS)
def test_tolerance_comment_that_says_too_little(source):
    with pytest.raises(ValueError, match=BAD_COMMENTS[source]): Tolerance.of(source)


@given(st.text())
def test_equal_text_is_equal(text):
    between, numbers = tokenise(text)
    assert len(between) == len(numbers) + 1
    assert compare_text(text, text) == [] and compare_text(text, text, html=True) == []
    # And without the short cut for equal strings: the tokens agree with themselves.
    assert all(n.agrees(n, Tolerance()) for n in numbers)


WORDS = st.sampled_from(["loss", "of the", "D1-13", "损失", "(", "},", "utf-8:", "\n", "<b>", "%", "acc ="])
FLOATS = st.builds(lambda x, f: format(x, f), st.floats(-1e6, 1e6), st.sampled_from([".2f", ".4f", ".3e", ",.1f", "+.2f", ".1%"]))
TEXTS = st.lists(st.tuples(WORDS, FLOATS), min_size=1, max_size=6)


@given(TEXTS, st.data())
def test_one_number_beyond_the_tolerance_is_a_difference(pairs, data):
    tolerance = data.draw(st.sampled_from([Tolerance(), Tolerance(rel=0.05, integers=True), Tolerance(rel=0.01, abs=0.5, integers=True)]))
    i = data.draw(st.integers(0, len(pairs) - 1))
    number = tokenise(pairs[i][1])[1][0]
    least = max(tolerance.rel * abs(number.value) / (1 - tolerance.rel), number.half_unit if tolerance.abs is None else tolerance.abs)
    moved = number.value + data.draw(st.sampled_from([-1, 1])) * least * data.draw(st.floats(1.01, 100))
    assume(moved != number.value)
    changed = [(w, x) for w, x in pairs]
    changed[i] = (pairs[i][0], f"{moved:.12f}" + "%" * pairs[i][1].endswith("%"))
    texts = [" ".join(f"{w} {x}" for w, x in rows) for rows in (pairs, changed)]
    assert any(line.startswith("number") for line in compare_text(*texts, tolerance)), texts


@given(TEXTS, st.data())
def test_numbers_within_the_tolerance_and_moved_columns_are_none(pairs, data):
    def near(x: str) -> str:
        value, spaces = tokenise(x)[1][0].value, " " * data.draw(st.integers(1, 4))
        return f"{spaces}{value * (1 + data.draw(st.floats(-0.9e-3, 0.9e-3))):.15e}" + ("% " if x.endswith("%") else spaces)

    stored = "".join(f"{w} {x} " for w, x in pairs)
    new = "".join(f"{w}{near(x)}" for w, x in pairs)
    assert compare_text(stored, new) == []


@given(TEXTS, st.data())
def test_another_word_is_a_difference(pairs, data):
    i = data.draw(st.integers(0, len(pairs) - 1))
    word = data.draw(WORDS.filter(lambda w: w != pairs[i][0]))
    changed = [*pairs[:i], (word, pairs[i][1]), *pairs[i + 1 :]]
    assert compare_text(*(" ".join(f"{w} {x}" for w, x in rows) for rows in (pairs, changed)), Tolerance(rel=1e9, integers=True))


@given(st.integers(), st.integers())
def test_counts_are_exact(a, b):
    assert Number(str(a), 0).agrees(Number(str(b), 0), Tolerance()) == (a == b)


LOSSES = "loss 2.30 2.10 2.20 after 105 steps"
SEEN = {0: 0.03, 1: 0.03, 2: 0.03, 3: 1.0}  # how far each of its numbers was seen to move


@pytest.mark.parametrize(
    "new, says",
    [
        ("loss 2.36 2.04 2.30 after 107 steps", ""),
        ("loss 2.30 2.10 2.40 after 105 steps", "allowed 0.12, 4 times its spread"),
        ("loss 2.30 2.10 2.20 after 110 steps", "allowed 4, 4 times its spread"),
        ("loss 2.20 2.20 2.20 after 105 steps", "the new ones are all the same"),
        ("cost 2.30 2.10 2.20 after 105 steps", "the text differs"),
        ("loss 2.30 2.10 nan after 105 steps", "not a number"),
        ("loss 2.30 2.10 2 after 105 steps", "a whole number and one with decimals"),
    ],
)
def test_a_number_may_move_as_far_as_it_was_seen_to(new, says):
    found = "\n".join(compare_text(LOSSES, new, measured=SEEN))
    assert says in found if says else not found
    assert compare_text(LOSSES, new), "without a spread it is compared as strictly as any"


def test_a_constant_is_no_result_whatever_is_allowed():
    "Numbers that differ and become one number are a fault, within any tolerance; those that are alike anyway may be."
    assert compare_text("2.30 2.10 2.20", "2.20 2.20 2.20", WIDE)
    assert not compare_text("2.30 2.10 2.20", "2.20 2.20 2.21", WIDE) and not compare_text("2.200 2.201 2.200", "2.200 2.200 2.200")


def test_a_spread_is_shared_among_numbers_of_one_form_only():
    numbers = tokenise("a 1.00 b 2.00 c 3.0 d 4 e 1.00e-9 f nan g 5.00")[1]
    assert spreads_of(numbers, {0: 0.3, 1: 0.2, 4: 1e-10}) == pytest.approx([0.3, 0.2, 0, 0, 1e-10, 0, 0.2]), (
        "the last has two decimals like the first"
    )
    assert spreads_of(numbers, {0: 0.3}) == pytest.approx([0.3, 0, 0, 0, 0, 0, 0]), "few moved: they speak for themselves"


def test_a_rounding_may_fall_to_the_other_side_where_numbers_have_moved_before():
    near, far = "loss 2.30 after 105 steps, 1.0e-05", "loss 2.32 after 105 steps, 1.0e-05"
    assert not compare_text("loss 2.31 after 105 steps, 1.0e-05", near, unsettled=True) and compare_text(
        "loss 2.31 after 105 steps, 1.0e-05", near
    )
    assert compare_text(near, far, unsettled=True) and compare_text(near, near.replace("105", "106"), unsettled=True)
    spread = Spread("", [], {"a": {}, "b": {"0 stdout": {0: 1.0}}, "c": {}})
    assert [spread.unsettled(cell) for cell in "abcd"] == [False, True, True, False]


def test_what_moved_is_told_with_its_share_of_what_is_allowed():
    moved: list[Moved] = []
    assert not compare_text(LOSSES, "loss 2.36 2.10 2.20 after 105 steps", measured=SEEN, moved=moved)
    [only] = moved
    assert (only.stored, only.new, only.where) == ("2.30", "2.36", "loss [[2.36]] 2.10 2.20 after 105 steps")
    assert only.used == pytest.approx(0.06 / (4 * 0.03))


# ---------------------------------------------------------------- real kernels


def flags() -> str:
    "The instructions that this processor knows, where the system tells."
    try: return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError: return ""


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def out(text: str, name: str = "stdout"): return new_output("stream", name=name, text=text)
def result(text: str, **data): return new_output("execute_result", {"text/plain": text, **data}, execution_count=1)
def shown(data: dict): return new_output("display_data", data)


def html(text: str): return result("<IPython.core.display.HTML object>", **{"text/html": text})


HTML_TABLE = "<table><tr><td class='x1'>{}</td></tr></table>"
SHOW = "from IPython.display import display; display({}, raw=True)"
IMAGE = SHOW.format({"image/png": png(100, 50), "text/plain": "<Figure>"})
IGNORE = "# NBVAL_IGNORE_OUTPUT\n"
RAISES = "# NBVAL_RAISES_EXCEPTION\n"
DIVISION = new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])


@dataclass(frozen=True)
class Case:
    "A cell, the outputs stored with it, and what the plugin says about it (nothing: it passes)."

    name: str
    source: str
    stored: list
    says: str = ""
    count: int | None = 0  # 0: the right one


CASES = [
    Case("equal", "print('a 1')", [out("a 1\n")]),
    Case("silent", "x = 1", []),
    Case("within tolerance", "print('loss', 2.303)", [out("loss 2.302\n")]),
    Case("wider where the cell says so", "# NBVAL_TOLERANCE: rel=0.1 (trained)\nprint(105, 2.4)", [out("100 2.3\n")]),
    Case("thousands", "print(f'{1234567.9:,.1f}')", [out("1,234,567.1\n")]),
    Case("table", f"from IPython.display import HTML\nHTML({HTML_TABLE.format(2.303)!r})", [html(HTML_TABLE.format(2.302))]),
    Case("moved column", "print('x 10.001 |')", [out("x  9.999 |\n")]),
    Case("raises as it says", RAISES + "1 / 0", [DIVISION]),
    Case("image of about that size", IMAGE, [shown({"image/png": png(104, 48), "text/plain": "<Figure>"})]),
    Case("ignored with a check", IGNORE + "import time; print(time.time())", [out("17\n")]),
    Case("the check", "assert time.time() > 17", []),
    Case("json", SHOW.format({"application/json": {"b": [1.0001], "a": 1}}), [shown({"application/json": {"a": 1, "b": [1.0]}})]),
    Case("streams in pieces", "print('a', flush=True); print('b')", [out("a\n"), out("b\n")]),
    Case("environment as stored", "import os; [os.environ[k] for k in ('PYTHONHASHSEED', 'TQDM_DISABLE')]", [result("['0', '1']")]),
    # What is below must fail.
    Case("number beyond tolerance", "print('loss', 2.31)", [out("loss 2.302\n")], "stored 2.302, new 2.31 (relative difference 0.0035"),
    Case("beyond a wider tolerance", "# NBVAL_TOLERANCE: rel=0.1 (trained)\nprint(2.9)", [out("2.3\n")], "allowed 0.23)"),
    Case("integer off by one", "len('abc')", [result("4")], "stored 4, new 3 (whole numbers are compared exactly)"),
    Case("other text", "print('a cat')", [out("a dog\n")], "+a cat"),
    Case("number in a table", f"HTML({HTML_TABLE.format(2.4)!r})", [html(HTML_TABLE.format(2.302))], "text/html:"),
    Case("tag of a table", "HTML('<b>1</b>')", [html("<i>1</i>")], "+<b>1</b>"),
    Case("attribute of a table", "HTML('<p id=1.5001>1</p>')", [html("<p id=1.5>1</p>")], "-<p id=1.5>"),
    Case("missing output", "x = 2", [out("2\n")], "the stored output is missing"),
    Case("unexpected output", "print(2)", [], "unexpected output: none is stored"),
    Case("fewer outputs", "print(2)", [out("2\n"), result("3")], "2 outputs are stored, the cell produced 1"),
    Case("more outputs", "print(2)\n3", [out("2\n")], "1 outputs are stored, the cell produced 2"),
    Case("wrong kind", "print(2)", [result("2")], "outputs of another kind"),
    Case("wrong way of display", SHOW.format({"text/plain": "2"}), [result("2")], "outputs of another kind"),
    Case("no image", SHOW.format({"text/plain": ""}), [shown({"image/png": png(9, 9), "text/plain": ""})], "stored  display_data"),
    Case("image not stored", IMAGE, [shown({"text/plain": "<Figure>"})], "new     display_data image/png"),
    Case("image of another size", IMAGE, [shown({"image/png": png(80, 50), "text/plain": "<Figure>"})], "stored 80 x 50, new 100 x 50"),
    Case("never run", "x = 3", [], "never run", count=None),
    Case("never run, with output", "print(3)", [out("3\n")], "never run", count=None),
    Case("wrong count", "x = 4", [], "execution count 99, should be", count=99),
    Case("raises", "1 / 0", [], "Cell execution caused an exception"),
    Case("stored error", "x = 5", [DIVISION], "a stored error, ZeroDivisionError"),
    Case("another error", RAISES + "int('x')", [DIVISION], "error ZeroDivisionError"),
    Case("raises no more", RAISES + "1 / 1", [DIVISION], "error ZeroDivisionError"),
    Case("marked as raising", RAISES + "x = 6", [], "marked as raising an exception, but none is stored"),
    Case("stored warning", "x = 7", [out("UserWarning: old\n", "stderr")], "a stored warning or message on stderr"),
    Case("fresh warning", "import warnings; warnings.warn('fresh')", [], "a warning or message on stderr"),
    Case("same warning on both sides", "import sys; print('w', file=sys.stderr)", [out("w\n", "stderr")], "a stored warning"),
    Case("tolerance without reason", "# NBVAL_TOLERANCE: rel=0.1\nprint(1.0)", [out("1.0\n")], "without a reason in brackets"),
    Case("skip", "# NBVAL_SKIP\nprint(1)", [out("1\n")], "NBVAL_SKIP: every cell of the book is run"),
    Case("ignored without a check", IGNORE + "print(1)", [out("2\n")], "does not assert what the output showed"),
    Case("no check", "'assert', 'in a text'", [result("('assert', 'in a text')")]),
    Case("ignored, missing", IGNORE + "x = 8", [out("8\n")], "an output is stored, but none produced"),
    Case("its check", "assert x == 8", []),
    Case("ignored, with a warning", IGNORE + "print(1, file=sys.stderr)", [out("2\n")], "a warning or message on stderr"),
    Case("its check too", "assert x == 8", []),
]


def notebook(cases: list[Case]):
    cells = [new_code_cell(c.source, outputs=c.stored, execution_count=i if c.count == 0 else c.count) for i, c in enumerate(cases, 1)]
    return new_notebook(cells=cells)


REPORTER = """
import json, pathlib

def pytest_runtest_logreport(report):
    "Each report as a line, in the process that prints the result."
    row = {"id": report.nodeid, "when": report.when, "outcome": report.outcome, "text": report.longreprtext}
    with open("reports.jsonl", "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\\n")

def pytest_runtest_call(item):
    pathlib.Path("timeouts.txt").write_text(str(item.output_timeout))
"""


@dataclass
class Run:
    "What a run of pytest printed, and how each cell of each notebook fared."

    code: int
    text: str
    cells: dict[str, list[tuple[str, str]]]
    folder: Path


def unmoved(nb) -> Spread:
    "What is measured for a notebook whose numbers are the same everywhere."
    return Spread(digest(nb), [], {c.id: {} for c in nb.cells if compared(c)})


def run_pytest(folder: Path, notebooks: dict[str, list[Case]], *options: str, **env: str) -> Run:
    "Write the notebooks into `folder` and run pytest with the plugin over them, in a process of its own."
    for name, cases in notebooks.items():
        nbformat.write(nb := notebook(cases), folder / name)
        if not (folder / ".spread" / name.replace("ipynb", "json")).exists(): unmoved(nb).store(folder / name)
    (folder / "conftest.py").write_text(REPORTER, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # else the project's own settings would apply
    plugins = ["nbval.plugin", "xdist.plugin", "xdist.looponfail", "tests.nbval_tolerance", "no:cacheprovider"]  # the others start slowly
    command = [sys.executable, "-m", "pytest", *(x for p in plugins for x in ("-p", p)), "--nbval", "--nbval-current-env", *options]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LMBOOK_"))}
    extra = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=folder, env=clean | extra | env, capture_output=True, encoding="utf-8", timeout=300
    )
    cells: dict[str, list[tuple[str, str]]] = {}
    reports = folder / "reports.jsonl"
    for row in map(json.loads, reports.read_text(encoding="utf-8").splitlines() if reports.exists() else []):
        if row["when"] == "call": cells.setdefault(row["id"].split("::")[0], []).append((row["outcome"], row["text"]))
    return Run(done.returncode, done.stdout + done.stderr, cells, folder)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Run:
    "All cases above in one notebook."
    return run_pytest(tmp_path_factory.mktemp("broken"), {"cases.ipynb": CASES})


@pytest.mark.parametrize("i", range(len(CASES)), ids=[c.name.replace(" ", "-") for c in CASES])
def test_cell(broken, i):
    outcome, text = broken.cells["cases.ipynb"][i]
    assert outcome == ("failed" if CASES[i].says else "passed"), text
    assert CASES[i].says in text
    assert "\x1b[" not in text  # no colours in a log


def test_the_broken_notebook_is_summed_up(broken):
    assert broken.code == 1, broken.text
    ignored = [c for c in CASES if c.source.startswith(IGNORE)]
    produced = {"unexpected output", "raises", "fresh warning"}  # nothing stored, but something came out
    with_output = [c for c in CASES if c.stored or c.name in produced]
    compared = len(with_output) - len(ignored)
    total = f"notebooks 1, cells run {len(CASES)}, cells with output {len(with_output)}, compared {compared} "
    assert total in broken.text and f"ignored {len(ignored)}" in broken.text


def test_output_timeout_is_not_five_seconds(broken):
    assert float((broken.folder / "timeouts.txt").read_text()) == 120


# ---------------------------------------------------------------- a measured spread does not hide a fault

ROWS = [out("loss 2.30 2.10 2.20\n"), out("after 105 steps\n")]
WITHIN = [Case("losses", "print('loss 2.38 2.05 2.24')", ROWS[:1]), Case("steps", "print('after 108 steps')", ROWS[1:])]
CONSTANT = [Case("losses", "print('loss 2.20 2.20 2.20')", ROWS[:1]), Case("steps", "print('after 105 steps')", ROWS[1:])]
BEYOND = [Case("losses", "print('loss 2.30 2.10 2.36')", ROWS[:1]), Case("steps", "print('after 110 steps')", ROWS[1:])]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Run:
    "Notebooks with a measured spread, with another one's, with one that lacks a cell, with a broken one, and with none."
    folder = tmp_path_factory.mktemp("spread")
    (folder / ".spread").mkdir()
    pages = {
        "within": WITHIN,
        "constant": CONSTANT,
        "beyond": BEYOND,
        "foreign": WITHIN,
        "incomplete": WITHIN,
        "broken": WITHIN,
        "without": WITHIN,
    }
    nbs = {name: notebook(cases) for name, cases in pages.items()}
    for name, nb in nbs.items():
        nbformat.write(nb, folder / f"{name}.ipynb")
        first, second = (c.id for c in nb.cells)
        cells = {first: {"0 stdout": {0: 0.03, 1: 0.03, 2: 0.03}}, second: {"0 stdout": {0: 1.0}}}
        if name == "incomplete": del cells[second]
        Spread(digest(nbs["within"] if name == "foreign" else nb), ["oldest"], cells).store(folder / f"{name}.ipynb")
    (folder / ".spread" / "broken.json").write_text('{"notebook": "x"}', encoding="utf-8")
    (folder / ".spread" / "without.json").unlink()
    return run_pytest(folder, {}, "--nbval-min-compared", "0", "--nbval-report", "report.json")


def test_numbers_may_move_within_their_spread(spread):
    assert [o for o, _ in spread.cells["within.ipynb"]] == ["passed", "passed"], spread.text


def test_a_constant_output_fails_within_any_spread(spread):
    (outcome, text), (other, _) = spread.cells["constant.ipynb"]
    assert (outcome, other) == ("failed", "passed") and "the stored numbers differ from each other, the new ones are all the same" in text


def test_a_number_that_left_its_spread_fails(spread):
    (first, text), (second, more) = spread.cells["beyond.ipynb"]
    assert (first, second) == ("failed", "failed")
    assert "stored 2.20, new 2.36 (relative difference 0.068, absolute 0.16, allowed 0.12, 4 times its spread)" in text
    assert "stored 105, new 110" in more


@pytest.mark.parametrize(
    "name, says",
    [
        ("foreign", "measured for other cells or outputs"),
        ("incomplete", "no spread was measured for the cells"),
        ("broken", "the spread beside this notebook is none"),
        ("without", "no spread was measured for this notebook"),
    ],
)
def test_a_spread_that_does_not_vouch_for_the_notebook_fails_it(spread, name, says):
    cells = spread.cells[f"{name}.ipynb"]
    assert [o for o, _ in cells] == ["failed", "failed"], "and its cells are compared as strictly as any"
    assert says in cells[0][1] and "stored 2.30, new 2.38" in cells[0][1] and "whole numbers are compared exactly" in cells[1][1]


def test_the_report_tells_what_moved_and_how_near_it_came(spread):
    report = json.loads((spread.folder / "report.json").read_text(encoding="utf-8"))
    row = report["notebooks"]["within.ipynb"]
    assert (row["moved"], row["half"], row["failed"], row["compared"]) == (4, 2, 0, 2)
    assert report["nearest"][0]["used"] > 1 and report["nearest"][0]["notebook"] != "within.ipynb"
    text = table([Outcome("mixed", 1, report)])
    assert re.search(r"^mixed +7 +14 +14 +\d+ +\d+ +11$", text, re.MULTILINE), text
    assert text.splitlines()[-1].split()[0] != "0.00" and "stored 105, new 108" in text


def test_a_notebook_can_compute_as_another_processor_would(tmp_path):
    case = Case("threads", "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['ONEDNN_MAX_CPU_ISA'])", [out("3 SSE41\n")])
    run = run_pytest(tmp_path, {"a.ipynb": [case]}, "--nbval-arithmetic", "three threads")
    assert run.code == 0, run.text


GOOD = [Case(str(i), f"print({i}.5)", [out(f"{i}.5\n")]) for i in range(3)]
IGNORED = [Case("ignored", IGNORE + "print(1)", [out("2\n")]), Case("check", "assert True", [])]


@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "loadfile")], ids=["one process", "xdist"])
def test_totals_and_the_share_compared(tmp_path, options):
    run = run_pytest(tmp_path, {"a.ipynb": GOOD, "b.ipynb": [*GOOD, *IGNORED]}, *options)
    assert "notebooks 2, cells run 8, cells with output 7, compared 6 (85.7 %), ignored 1" in run.text
    [row] = [line.split()[1:] for line in run.text.splitlines() if re.match(r"b\.ipynb +\d", line)]
    assert [int(x) for x in row[:4]] == [5, 4, 3, 1]
    seconds, peak, moved = (float(x) for x in row[4:] if x != "*")
    assert seconds > 0 and 20 < peak < 500 and moved == 0  # a bare kernel
    assert run.code == 0, run.text


@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "loadfile")], ids=["one process", "xdist"])
def test_too_few_cells_compared_fails_the_run(tmp_path, options):
    run = run_pytest(tmp_path, {"a.ipynb": GOOD, "b.ipynb": IGNORED}, *options)
    assert all(outcome == "passed" for rows in run.cells.values() for outcome, _ in rows)
    assert "compared 3 (75.0 %), ignored 1" in run.text
    assert "FAILED: only 75.0 % of the cells with output are compared, 85 % have to be" in run.text
    assert run.code == 1


# Freed at once, where the system keeps a high-water mark; elsewhere a sample has to see it.
HOLD = "" if sys.platform == "linux" else "import time; time.sleep(2); "
HUNGRY = ["x = 1", f"big = bytearray(300 * 2**20); {HOLD}del big", "y = 2"]
CHILD = "import time; big = bytearray(300 * 2**20); time.sleep(1.5)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}]).returncode"


@pytest.fixture(scope="module")
def limits(tmp_path_factory) -> Run:
    "Notebooks that take too much memory and time, and one that kills its kernel."
    notebooks = {
        "big.ipynb": [Case("", source, []) for source in HUNGRY],
        "child.ipynb": [Case("", PARENT, [result("0")])],
        "dead.ipynb": [Case("", "import os; os._exit(1)", []), Case("", "x = 1", [])],
    }
    return run_pytest(tmp_path_factory.mktemp("limits"), notebooks, "--nbval-memory-limit", "250", "--nbval-time-budget", "0.001")


def test_memory_over_the_limit_fails_the_first_cell_over_it(limits):
    assert [o for o, _ in limits.cells["big.ipynb"]] == ["passed", "failed", "passed"], limits.text
    assert "over the limit of 250 MiB per notebook" in limits.cells["big.ipynb"][1][1]


def test_memory_of_children_counts(limits):
    assert "over the limit of 250 MiB" in limits.cells["child.ipynb"][0][1]


def test_a_dead_kernel_is_noticed(limits):
    assert [o for o, _ in limits.cells["dead.ipynb"]] == ["failed", "failed"]
    assert "the kernel died while this cell ran" in limits.cells["dead.ipynb"][0][1]


def test_time_over_the_budget_is_a_warning(limits):
    for name in ("big", "child", "dead"): assert f"WARNING: {name}.ipynb took" in limits.text


@pytest.mark.parametrize("strict, code, word", [("", 0, "WARNING"), ("strict", 1, "FAILED")])
def test_time_over_the_budget_fails_where_that_is_asked_for(tmp_path, strict, code, word):
    run = run_pytest(tmp_path, {"slow.ipynb": GOOD[:1]}, "--nbval-time-budget", "0.001", LMBOOK_BUDGET=strict)
    assert f"{word}: slow.ipynb took" in run.text and run.code == code, run.text


def test_time_without_a_processor_is_marked_and_counts_against_no_budget():
    "So a notebook that is measured beside other work is neither called slow nor taken for quick."
    options = SimpleNamespace(nbval_time_budget=90, nbval_min_compared=85)
    totals, lines = Totals(SimpleNamespace(option=options)), list[str]()
    totals.rows = {"beside.ipynb": Row(run=1, seconds=100, waited=20), "slow.ipynb": Row(run=1, seconds=100, waited=1)}
    assert list(totals.slow()) == ["slow.ipynb took 99 s, its budget is 90 s"] and not list(totals.failures())
    totals.pytest_terminal_summary(SimpleNamespace(write_line=lambda text, **_: lines.append(text), write_sep=lambda *_: None))
    [beside], [slow] = ([x for x in lines if x.startswith(name)] for name in ("beside", "slow"))
    assert "100.0 *" in beside and "*" not in slow and any(x.startswith("* beside other work") for x in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a process waited")
def test_how_long_a_process_waited_is_read_from_the_system():
    assert 0 <= waited(os.getpid()) < time.monotonic() and waited(0) == 0


def test_one_notebook_in_several_workers_is_refused(tmp_path):
    run = run_pytest(tmp_path, {"a.ipynb": GOOD}, "-n", "2")
    assert run.code == pytest.ExitCode.USAGE_ERROR and "--dist loadfile" in run.text


# ---------------------------------------------------------------- other arithmetics


def test_nothing_is_learned_from_where_it_is_tested():
    settings = [{**a.settings, "threads": a.threads} for a in (AS_STORED, *MEASURED, *ELSEWHERE)]
    assert len({json.dumps(s, sort_keys=True) for s in settings}) == len(settings) == 7


@pytest.mark.skipif("avx2" not in str(flags()), reason="on this processor the libraries know one way to compute")
def test_each_arithmetic_computes_in_a_way_of_its_own():
    """Else it would be a repetition: no two of them agree in every bit of every operation.

    But a processor without AVX-512 computes with AVX2 anyway, and one without AVX2 leaves out what wants it.
    """
    newest = any(f.startswith(NEWEST) for f in numpy_features())
    here = [a for a in (AS_STORED, *MEASURED, *ELSEWHERE) if a.runs_here and (newest or a.name != "AVX2")]
    digests = [tuple(probed(a).values()) for a in here]
    assert len(here) >= 5 and len(set(digests)) == len(digests)


def test_what_a_processor_cannot_do_is_left_out(monkeypatch):
    "Told to use instructions that are not there, a library ends with an illegal one. This was seen on a processor without AVX-512."
    monkeypatch.setattr(arithmetics, "numpy_features", lambda: ["X86_V2"])
    assert [a.name for a in (AS_STORED, *MEASURED, *ELSEWHERE) if not a.runs_here] == ["AVX2", "mixed"]
    assert {part(f"{i:040x}")[0].name for i in range(60)} == {"AVX", "three threads"}
    monkeypatch.setattr(arithmetics, "numpy_features", lambda: ["X86_V2", "X86_V3"])
    assert all(a.runs_here for a in (AS_STORED, *MEASURED, *ELSEWHERE))


def test_the_parts_go_round_the_whole_book():
    "Each commit looks at a part, the same one each time; in the long run at every notebook under every arithmetic."
    parts = [part(f"{i:040x}") for i in range(1000)]
    assert all(len(set(pages)) == 3 for _, pages in parts) and part("a") == part("a")
    assert {(a.name, page) for a, pages in parts for page in pages} == {(a.name, page) for a in ELSEWHERE for page in notebooks()}


# ---------------------------------------------------------------- what was measured stands after a move


def measured_page(*cells: tuple[str, str], spread: dict[int, dict[int, float]] | None = None):
    "A notebook with its spread, from sources and what they show; `spread` gives the cells whose numbers moved."
    nb = new_notebook(cells=[new_code_cell(source, outputs=[out(text)], id=f"id-{source}") for source, text in cells])
    for cell in nb.cells: cell.id = "id" + re.sub(r"\W", "", cell.source)
    rows = {c.id: {"0 stdout": (spread or {})[i]} if i in (spread or {}) else {} for i, c in enumerate(nb.cells)}
    return nb, Spread(digest(nb), ["oldest"], rows)


def fresh(nb, **changed: str):
    "The same cells, executed on another machine."
    copy = nbformat.from_dict(nb)
    copy = nbformat.reads(nbformat.writes(copy), as_version=4)
    for cell in copy.cells:
        if cell.id in changed: cell.outputs = [out(changed[cell.id])]
    return copy


def test_moved_cells_keep_their_outputs_and_spreads():
    one = measured_page(("a", "0.500\n"), ("b", "words\n"), spread={0: {0: 0.01}})
    two = measured_page(("c", "7\n"), ("d", "1.25\n"), spread={1: {0: 0.1}})
    nb = new_notebook(cells=[*fresh(two[0], idd="1.45\n").cells[1:], *fresh(one[0], ida="0.523\n").cells])
    spread = carried(nb, [one, two])
    assert spread is not None and not list(spread.problems(nb))
    assert [c.outputs[0].text for c in nb.cells] == ["1.25\n", "0.500\n", "words\n"]  # what was stored
    assert spread.cells == {"idd": {"0 stdout": {0: 0.1}}, "ida": {"0 stdout": {0: 0.01}}, "idb": {}} and spread.arithmetics == ["oldest"]


def test_a_renamed_cell_takes_the_place_of_one_that_is_gone():
    page = measured_page(("a", "0.500\n"), ("b", "0.900\n"), spread={0: {0: 0.01}})
    nb = fresh(page[0], ida="0.56\n")
    nb.cells[0].id, nb.cells[0].source = "new", "renamed"
    spread = carried(nb, [page])
    assert spread is None  # further than four times its spread
    nb.cells[0].outputs = [out("0.510\n")]
    spread = carried(nb, [page])
    assert spread is not None and spread.cells["new"] == {"0 stdout": {0: 0.01}} and nb.cells[0].outputs[0].text == "0.500\n"


@pytest.mark.parametrize("text", ["0.600\n", "half\n", "0.500\n0.500\n"])
def test_a_cell_that_shows_something_new_is_measured(text):
    page = measured_page(("a", "0.500\n"), ("b", "words\n"), spread={0: {0: 0.01}})
    assert carried(fresh(page[0], ida=text), [page]) is None


def test_nothing_known_is_nothing_kept():
    nb, _ = measured_page(("a", "0.500\n"))
    assert carried(nb, []) is None


def test_two_renamed_cells_do_not_take_the_same_place():
    page = measured_page(("a", "0.500\n"))
    nb = new_notebook(cells=[new_code_cell("x", outputs=[out("0.500\n")], id="x"), new_code_cell("y", outputs=[out("0.500\n")], id="y")])
    assert carried(nb, [page]) is None
