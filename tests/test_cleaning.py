"""Steps of cleaning: edge cases, faults and other libraries."""

from __future__ import annotations

import sys
import unicodedata
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmbook.cleaning as c
from lmbook.cleaning import (
    _INVISIBLE,
    CleaningError,
    CorpusStep,
    Drop,
    ExactDuplicates,
    Language,
    Rewrite,
    apply_steps,
    as_batches,
    as_records,
    chinese_script,
    convert_chinese,
    drop,
    drop_boilerplate,
    empty,
    find_personal_data,
    mask_personal_data,
    mend_mojibake,
    normalise,
    script,
    valid_card,
    valid_cn_id,
)
from lmbook.core import LmbookError
from lmbook.markup import strip_html
from lmbook.quality import (
    GopherLimits,
    c4_lines,
    c4_page,
    gopher_quality,
    gopher_repetition,
    hashed_features,
    ngram_hashes,
    token_hashes,
)

# ------------------------------------------------------------------------------------------------------------------------ characters


def test_invisible_characters_are_those_of_unicode_but_for_the_ones_we_keep():
    kept = {"\t", "\n", "\u200c", "\u200d", *map(chr, range(0xE0020, 0xE0080))}
    breaks = set("\r\x0b\x0c\x85")
    for number in range(0x110000):
        char = chr(number)
        wanted = unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs") and char not in kept
        windows = bytes([number]).decode("cp1252", "ignore") if 0x80 <= number < 0xA0 else ""
        if wanted and char not in breaks: assert normalise(f"a{char}b") == f"a{windows}b", hex(number)
        elif char in breaks: assert normalise(f"a{char}b") == "a\nb"
        elif unicodedata.category(char)[0] in "LN": assert not _INVISIBLE.match(char), hex(number)


@given(st.text())
def test_normalise_is_idempotent_and_normal(text):
    once = normalise(text)
    assert normalise(once) == once and unicodedata.is_normalized("NFC", once) and "\n\n\n" not in once
    once.encode()  # no lone surrogate is left


def test_full_width_letters_are_narrowed_and_chinese_punctuation_stays():
    assert normalise("ＡｚＺ０９，。！？：；（）　ｘ") == "AzZ09，。！？：；（） x"


@pytest.mark.parametrize("page, seen", [
    ("<p>a<p>b", "a\nb"), ("<div>a<br>b</div>", "a\nb"), ("<p>x<script>if (a<b) {}</script>y</p>", "xy"),
    ("<p>&lt;b&gt; &amp; &#8220;q&#8221;</p>", "<b> & “q”"), ("<head><title>t</title><body><p>seen", "seen"),
    ("<nav><div><p>menu</p></div></nav><p>text</p>", "text"), ("</nav></p><p>text", "text"), ("<p><a href=x>one link only</a></p>", ""),
    ("<p>Say <a href=x>one</a> word or two.</p>", "Say one word or two."), ("a < b > c", "a < b > c"), ("<pre>a\n  b</pre>", "a\n  b"),
    ("<p>a\n  b</p>", "a b"), ("<p>a<span>b</span>c</p>", "abc"), ("<!-- <p>no</p> --><p>yes</p>", "yes"),
])
def test_what_is_seen_of_a_page(page, seen): assert strip_html(page) == seen


@given(st.text(alphabet="<>/apdivscriptn &;=\"'!-\n", max_size=200))
def test_any_markup_is_survived(text): strip_html("<p>" + text)


def test_links_may_be_kept(): assert strip_html("<p><a href=x>one link only</a></p>", link_density=1) == "one link only"


def test_boilerplate_is_a_matter_of_short_lines():
    essay = "A privacy policy is a text that nobody reads, " * 10
    assert drop_boilerplate(essay + "\nPrivacy policy\n隐私政策") == essay


@pytest.mark.parametrize("text, lang", [
    ("The tea is ready.", "en"), ("茶好了，趁热喝。", "zh"), ("Python 是一种语言", "zh"),
    ("He said 好 and left the room", "en"), ("", "en"),
])
def test_a_glance_at_the_script(text, lang): assert script(text) == lang


# ------------------------------------------------------------------------------------------------------------------ language and script


def test_languages_are_kept_dropped_or_too_short_to_tell():
    english, chinese = "The kettle whistles, and the tea is ready.", "水已经开了，茶也泡好了，请大家趁热喝。"
    texts = [english, chinese, "Der Kessel pfeift, und der Tee ist fertig.", "??", "", None]
    batch = Language()({"text": texts})
    assert batch["lang"] == ["en", "zh", "de", None, None, None]
    assert batch["dropped"] == [None, None, "language: de", None, None, None]
    assert Language(keep=("de",))({"text": texts})["dropped"][2] is None


def test_traditional_and_simplified():
    assert convert_chinese("頭髮、發展、皇后、後面、乾淨、乾隆、幹部") == "头发、发展、皇后、后面、干净、乾隆、干部"
    assert convert_chinese("头发 and 皇后", "s2t") == "頭髮 and 皇后" and convert_chinese("no Chinese") == "no Chinese"
    found = {text: chinese_script(text) for text in ("头发", "頭髮", "水火", "tea")}
    assert found == {"头发": "simplified", "頭髮": "traditional", "水火": None, "tea": None}


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    c._converter.cache_clear()
    with pytest.raises(CleaningError, match=r"opencc.*pip install 'lmbook\[cleaning\]'"): convert_chinese("頭髮")
    c._converter.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------- personal data


def kinds(text: str) -> list[str]: return [kind for *_, kind in find_personal_data(text)]


@pytest.mark.parametrize("text", [
    "13800138000 13900001111", "13800138000，13900001111", "(212) 555-0123, (212) 555-0124", "+1 202 555 0143 / +44 20 7946 0018",
    "010-62000000或021-50000000",
])
def test_two_numbers_side_by_side(text): assert kinds(text) == ["PHONE", "PHONE"]


@pytest.mark.parametrize("text", [
    "1380013800", "138001380001", "2024-01-15 10:30:00", "3.1415926535", "10.1234/abc.5678", "v1.2.3.4", "256.1.1.1", "1.2.3", "12:34:56",
    "std::map", "a::b", "4111111111111112", "11010519491231002Y", "11010519491331002X", "000-12-3456", "666-12-3456", "123-00-4567",
    "123-45-0000", "a@b", "@app.route", "user@host", "name..dots@example.com", "ISBN 978-7-02-000220-7",
    "1,380,013,800", "20240115123045", "0.0.0.0", "127.0.0.1", "::1", "::",
])
def test_what_only_looks_like_personal_data(text): assert kinds(text) == []


def test_kinds_that_overlap_are_counted_once():
    assert kinds("身份证11010519491231002X") == ["CN_ID"]
    assert kinds("4111 1111 1111 1111") == ["CARD"]
    assert kinds("13800138000@example.com") == ["EMAIL"]


def test_places_are_those_of_the_text_as_it_was():
    text = "电话：１３８００１３８０００。"
    [(start, end, kind)] = find_personal_data(text)
    assert (text[start:end], kind) == ("１３８００１３８０００", "PHONE") and mask_personal_data(text) == "电话：<PHONE>。"


@given(st.text(alphabet="0123456789 -+().@:aXx一，", max_size=60))
@settings(max_examples=500)
def test_spans_are_in_order_and_masking_is_idempotent(text):
    spans = find_personal_data(text)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])) and all(0 <= s < e <= len(text) for s, e, _ in spans)
    once = mask_personal_data(text)
    assert mask_personal_data(once) == once


@pytest.mark.parametrize("unit", ["1", "1 ", "a@", "a.", "1.", "+1 ", "0:", "1-", "(", "a at ", "1" * 18 + " "])
def test_long_runs_of_almost_data_do_not_take_forever(unit): find_personal_data(unit * 20_000)


@given(st.integers(0, 10**17 - 1))
def test_one_check_digit_in_eleven_fits(number):
    stem = f"{number:017}"
    dated = stem[:6] + "19800229" + stem[14:]
    assert sum(valid_cn_id(dated + d) for d in "0123456789X") == (dated[0] != "0")
    assert valid_cn_id(dated + "x") == valid_cn_id(dated + "X")


@given(st.integers(0, 10**14 - 1))
def test_one_luhn_digit_in_ten_fits(number): assert sum(valid_card(f"4{number:014}{d}") for d in range(10)) == 1


@pytest.mark.parametrize("number", [
    "378282246310005", "5555555555554444", "6011111111111117", "3530111333300000", "6200000000000005", "4012888888881881",
])
def test_the_test_numbers_of_the_card_companies(number): assert valid_card(number)


@pytest.mark.parametrize("number", ["", "4111", "0000000000000000", "1111111111111117", "４１１１１１１１１１１１１１１１"])
def test_what_is_no_card(number): assert not valid_card(number)


# ------------------------------------------------------------------------------------------------------------------------------- steps


def test_batches_and_records():
    records = [{"text": "a", "n": 1}, {"text": "b"}, {"text": "c", "n": None, "more": [1]}]
    batches = list(as_batches(records, 2))
    assert [len(b["text"]) for b in batches] == [2, 1] and batches[0] == {"text": ["a", "b"], "n": [1, None]}
    assert as_records(batches[1]) == [{"text": "c", "n": None, "more": [1]}] and list(as_batches([])) == []


def test_columns_may_be_arrays():
    batch = {"text": np.array(["<p>a</p>", "b"], dtype=object), "dropped": np.array([None, "x"], dtype=object)}
    out = Drop(empty)(Rewrite(strip_html)(batch))
    assert out["text"] == ["a", "b"] and out["dropped"] == [None, "x"]


def test_rows_that_are_dropped_stay_as_they_are():
    batch = {"text": ["<p>a</p>", "<p>b</p>"], "dropped": ["why not", None]}
    assert Rewrite(strip_html)(batch)["text"] == ["<p>a</p>", "b"]
    assert Drop(lambda text, lang: "late")(batch)["dropped"] == ["why not", "late"]
    assert drop(batch, {0: "again", 1: None})["dropped"] == ["why not", None]


def test_a_rule_gets_the_language_of_the_column_or_a_glance():
    seen = []
    Drop(lambda text, lang: seen.append(lang))({"text": ["tea", "茶好了", "tea"], "lang": ["fr", None, None]})
    assert seen == ["fr", "zh", "en"]


@pytest.mark.parametrize("step, message", [
    (lambda b: {k: v[:1] for k, v in b.items()}, "got 2 rows and returned other numbers"), (lambda b: {**b, "x": [1]}, "'x' 1"),
    (lambda b: {**b, "dropped": [None, None]}, "changed the reason"), (lambda b: {**b, "dropped": ["y", "x"]}, "changed the reason"),
    (lambda b: {**b, "dropped": ["x", 7]}, "A reason is a short text"),
])
def test_steps_that_break_the_rules(step, message):
    with pytest.raises(CleaningError, match=message): apply_steps({"text": ["a", "b"], "dropped": ["x", None]}, [step])


def test_an_error_inside_a_step_says_where():
    with pytest.raises(ZeroDivisionError) as caught: apply_steps({"text": ["a"], "id": ["r7"]}, [Rewrite(lambda text: 1 / 0)])
    assert "'r7'" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("batch, message", [
    ({"body": ["a"]}, "no column 'text'.*'body'"), ({"text": [7]}, "holds a value of type int in row 0"),
])  # fmt: skip
def test_batches_without_text(batch, message):
    with pytest.raises(CleaningError, match=message): Drop(empty)(batch)


def test_exact_duplicates_ignore_case_space_and_punctuation_and_keep_the_first():
    step = ExactDuplicates()
    texts = ["Tea!", "tea", "T e a.", "茶", "茶。", "Tea", "straße", "STRASSE"]
    keys = step({"text": texts, "dropped": ["x"] + [None] * 7})["exact_key"]
    copy = "exact duplicate"
    assert keys[0] is None and step.decide(keys) == [None, None, copy, None, copy, copy, None, copy]


def test_which_steps_need_the_whole_corpus():
    assert isinstance(ExactDuplicates(), CorpusStep)
    assert not any(isinstance(step, CorpusStep) for step in (Rewrite(normalise), Drop(empty), Language(), normalise))


def test_the_check_digit_of_an_identity_number_is_the_standards():
    "GB 11643 prints one example, and gives the digit as a table of remainders: another way to the same rule."
    assert valid_cn_id("11010519491231002X") and not valid_cn_id("110105194912310021")
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    for body in ("11010519001231002", "44052418800101001", "51010818991120456"):
        digit = "10X98765432"[sum(w * int(c) for w, c in zip(weights, body)) % 11]
        assert [d for d in "0123456789X" if valid_cn_id(body + d)] == [digit]


# ------------------------------------------------------------------------------------------------------------ nothing wrong in silence


@pytest.mark.parametrize("text, wanted", [
    ("it\x92s K\x94nig", "it’s K”nig"), ("50\x80 \x96 60\x80", "50€ – 60€"), ("\x93so\x94\x85", "“so”"), ("a\x81b", "ab"),
])
def test_bytes_of_windows_are_read_as_what_they_were(text, wanted): assert normalise(text) == wanted == normalise(wanted)


@pytest.mark.parametrize("page, seen", [
    ("<form><p>All of it.</p></form>", "All of it."), ('<p><a name="c1">It was a dark night.</a></p>', "It was a dark night."),
    ("<p><a name=top>All of the page.<p>And more.", "All of the page.\nAnd more."), ("<p><a href=x name=y>one link only</a></p>", ""),
    ("<p>a <nobr>b c</nobr> <big>d</big> <acronym>e</acronym> <strike>f</strike></p>", "a b c d e f"),
    ("<p>one <my-word>made up</my-word> tag</p>", "one made up tag"), ("<p>so <img src=x.png> it goes</p>", "so it goes"),
    ("Put <div> around it. Then use <p> and <a> for links.", "Put <div> around it. Then use <p> and <a> for links."),
    ("A <br> breaks a line, `<p>` begins one.", "A <br> breaks a line, `<p>` begins one."),
    ("One.<br>Two.", "One.\nTwo."), ("One.\n<p>Two.", "One.\nTwo."),
    ("See <a href='x.html'>this page</a> of the book.", "See this page of the book."),
    ("<p>a <![b>c</p>", "a c"), ("<p>a <![if !IE]>b<![endif]></p>", "a b"),
    ("<p>1 < 2 and <3</p>", "1 < 2 and <3"), ("<p>a<!-- b", "a<!-- b"),
    ("<p title='a > b'>c</p>", "c"), ("<p title='it's'>c</p>", "c"), (f'<p>a<img src="data:{"x" * 5000}">b</p>', "ab"),
])
def test_no_word_of_a_page_is_lost(page, seen): assert strip_html(page) == seen


@given(st.text(alphabet="<>/apdiv[]!-&;=\"' \n", max_size=60))
@settings(max_examples=400)
def test_declarations_and_broken_ends_are_survived(text): strip_html("<p>" + text)


@pytest.mark.parametrize("unit", [
    "<a x=", "<a x='", '<a x="', "<", "<!--", "<![", "</", "<p", "<nav>", "<nav></aside>", "<a x='>", "&", "<!-- -->", "<b>",
])
def test_no_page_takes_forever(unit):
    "Twice as much of it takes about twice as long: quadratic time would make these minutes."
    for end in ("", ">", "-->"): strip_html("<p>" + unit * 40_000 + end)


@pytest.mark.parametrize("unit", [" ", "\t", " \t", "\n", "a ", " \n"])
def test_no_spaces_take_forever(unit): normalise(unit * 200_000 + "x")


@pytest.mark.parametrize("text, masked", [
    ("jürgen.klein@firma.de", "<EMAIL>"), ("jane.doe@müller.de", "<EMAIL>"), ("иван@почта.рф", "<EMAIL>"),
    ("邮箱hou@example.com。", "邮箱<EMAIL>。"),
    ("jose\u0301@example.com", "<EMAIL>"), ("（0755）8234 5678", "<PHONE>"), ("(0755) 8234-5678", "<PHONE>"), ("07911 123456", "<PHONE>"),
    ("0121 234 5678", "<PHONE>"), ("(283)-282-3829", "<PHONE>"), ("+1-(283)-282-3829", "<PHONE>"), ("+47 22 12 34 56", "<PHONE>"),
    ("DE89 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130 00"),
    ("+1 234 567 points", "+1 234 567 points"), ("OID 1.3.6.1", "OID 1.3.6.1"),
])
def test_a_piece_of_data_is_masked_whole_or_not_at_all(text, masked): assert mask_personal_data(text) == masked


@pytest.mark.parametrize("one, other", [
    ("C++", "C#"), ("C", "C++"), ("1.5", "15"), ("1 5", "15"), ("-5", "5"), ("it is -5", "it is 5"), (".5", "5"), ("3-5", "35"),
    ("!!!", "???"),
    ("🎉🎉", "!!!"), ("कि", "का"), ("10%", "10"),
])
def test_what_differs_in_more_than_punctuation_is_no_copy(one, other):
    first, second = ExactDuplicates()({"text": [one, other]})["exact_key"]
    assert first != second


def test_marks_between_words_do_not_count():
    same = ["In 1990, it rained.", "in 1990 — it rained!", "In 1990 it-rained", "“In 1990 (it rained)”"]
    assert len(set(ExactDuplicates()({"text": same})["exact_key"])) == 1


def test_mojibake_is_mended_where_it_is_asked_for_and_nowhere_else():
    pytest.importorskip("ftfy")
    broken = {"cafÃ©": "café", "â€œquoteâ€\x9d": "“quote”", "ÐŸÑ€Ð¸Ð²ÐµÑ‚": "Привет", "èŒ¶å¥½äº†": "茶好了"}
    for wrong, right in broken.items(): assert mend_mojibake(wrong) == right == mend_mojibake(right)
    assert normalise("cafÃ©") == "cafÃ©" and mend_mojibake("café\ncafÃ©\n\nplain") == "café\ncafé\n\nplain"


@given(st.text(alphabet="aÃ©â€œ™茶 \n\x80\x9d", max_size=40) | st.text(max_size=40))
def test_mending_is_idempotent_and_keeps_lines(text):
    pytest.importorskip("ftfy")
    once = mend_mojibake(text)
    assert mend_mojibake(once) == once and once.count("\n") >= text.count("\n")


def test_without_ftfy_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(CleaningError, match=r"ftfy.*pip install 'lmbook\[cleaning\]'"): mend_mojibake("plain, even")


# ------------------------------------------------------------------------------------------------------------- rewriting after dropping

REWRITES = [normalise, drop_boilerplate, mask_personal_data, c4_lines, str.lower, str.strip]
RULES = [empty, c4_page, gopher_repetition, partial(gopher_quality, limits={"en": GopherLimits(words=(3, 9), least_common=0)})]
LINES = st.sampled_from(["Log in", "The tea is ready, drink it now.", "Call 13800138000.", "\u200b", "  ", "It is \ufeff late.",
    "a a a a a a", "…", "x"])


@settings(max_examples=400)
@given(
    texts=st.lists(st.lists(LINES, max_size=6).map("\n".join), min_size=1, max_size=4),
    steps=st.lists(st.sampled_from([*map(Rewrite, REWRITES), *map(Drop, RULES)]), min_size=1, max_size=6),
)
def test_what_a_pipeline_hands_on_has_passed_every_rule_as_it_is(texts, steps):
    "In any order of rewriting and dropping; so a second pass drops nothing, unless rewriting again would change the text."
    batch, counts = apply_steps({"text": texts}, steps)
    assert sum(n.total() for n in counts) == sum(why is not None for why in c.column(batch, "dropped", None))
    left = [text for text, why in zip(batch["text"], c.column(batch, "dropped", None)) if why is None]
    for step in steps:
        if isinstance(step, Drop): assert all(step.rule(text, script(text)) is None for text in left)
    settled = [text for text in left if all(step.change(text) == text for step in steps if isinstance(step, Rewrite))]
    again = apply_steps({"text": settled}, steps)[0] if settled else {"text": []}
    assert again["text"] == settled and not any(c.column(again, "dropped", None))


def test_a_text_that_is_emptied_late_is_dropped_by_the_rule_before():
    batch, counts = apply_steps({"text": ["Log in", "The water boils."]}, [Drop(empty), Rewrite(drop_boilerplate)])
    assert batch["dropped"] == ["empty", None] and counts == [{}, {"empty": 1}]
    batch, _ = apply_steps({"text": ["a", ""], "dropped": [None, "before"]}, [Drop(empty), Rewrite(lambda text: "")])
    assert batch["dropped"] == ["empty", "before"]
    late = [Drop(empty), Rewrite(str.upper, name="title")]
    assert apply_steps({"text": ["a"], "title": ["b"]}, late)[0]["title"] == ["B"]


# ------------------------------------------------------------------------------------------------------------------------ whatever comes

ODD = st.sampled_from(["\ud800", "\0", "\u202e", "🎉", "茶", "e\u0301", "1", "13800138000", "a@b.cd", "::", "#", "…", "\r\n", "\u2028",
    "İ", "ß", "{", " "])
ANY_TEXT = st.lists(ODD | st.text(max_size=4), max_size=30).map("".join)


@settings(max_examples=300)
@given(ANY_TEXT, st.sampled_from(["en", "zh", "", "xx"]))
def test_any_text_goes_through_every_function(text, lang):
    for change in (normalise, strip_html, drop_boilerplate, convert_chinese, mask_personal_data, c4_lines):
        assert isinstance(change(text), str)
    for rule in (empty, gopher_quality, gopher_repetition, c4_page): assert rule(text, lang) is None or isinstance(rule(text, lang), str)
    assert chinese_script(text) in (None, "simplified", "traditional") and script(text) in ("en", "zh")
    assert np.isfinite(hashed_features([text, ""], 16)).all()
    hashes, bounds = ngram_hashes(*token_hashes([text, "", text]), 2)
    assert bounds[-1] == len(hashes) and (hashes[: bounds[1]] == hashes[bounds[2] :]).all()
    key = ExactDuplicates()({"text": [text, text]})["exact_key"]
    assert key[0] == key[1]
    assert apply_steps({"text": [text]}, [Language(), *map(Rewrite, (normalise, mask_personal_data)), Drop(empty)])[0]["dropped"]


@settings(max_examples=200)
@given(st.dictionaries(
    st.sampled_from(["text", "lang", "dropped", "id"]),
    st.lists(st.none() | st.text(max_size=3) | st.integers() | st.just(float("nan")), max_size=3), max_size=4,
))
def test_any_batch_is_a_batch_or_an_error(batch):
    for steps in ([Drop(empty)], [Rewrite(normalise)], [Language()], [ExactDuplicates()], [lambda b: b], [lambda b: {}],
                  [Drop(empty), Rewrite(str.upper)]):
        try: apply_steps(dict(batch), steps)
        except LmbookError as error: assert str(error)


@pytest.mark.parametrize("unit", ["a", "a ", "。", ". ", "a.", "\n", "- ", "…", "#", "Log in\n", "\u200b", "\u0301", "一", "1 ", "(",
    "{", "a\n\n", "@", "e\u0301"])
def test_no_function_is_quadratic(unit):
    "Half a million of them: quadratic time would make these hours."
    text = unit * 500_000
    for change in (normalise, strip_html, drop_boilerplate, c4_lines): change(text)
    for rule in (empty, gopher_quality, c4_page): rule(text)
    gopher_repetition(unit * 30_000)
    ExactDuplicates()({"text": [text]})
    ngram_hashes(*token_hashes([text]), 5)
