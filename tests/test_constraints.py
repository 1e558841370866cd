"""Only what is allowed: machines equal to re, vocabularies that cannot spell, random models that write only what matches, JSON."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.cache import GenerationError
from lmbook.constraints import ByteConstraint, JsonMachine, RegexMachine, regex_constraint
from lmbook.generation import SamplingConfig, generate, generate_text
from lmbook.tokenization import BPE, ByteTokenizer, WordTokenizer
from tests.writers import transformer


@pytest.fixture(scope="module")
def bytes_(): return ByteTokenizer()


@pytest.fixture(scope="module")
def bpe():
    text = "the cat sat on the mat 我喜欢阅读书籍, 12 34 {\"a\": [1, 2]} true false null yes no maybe "
    return BPE.train([text * 4], vocab_size=320)

PATTERNS = [
    "abc", "a|bc|", "[a-c]+d?", "(ab){2,3}", "a*?b", "(?:yes|no)( maybe)?", r"\d{1,3}(\.\d\d)?", r"[^a]b", ".", "(?s).x", r"\w+ \s",
    "[à-ü]+", "我?[喜欢]{2}", "[\U0001f600-\U0001f64f]", r"[^\x00-\x7f]", r"\S\D\W", "(a|b)*abb", "x?", r"[\d_-]", "((a{2}){2}){2}",
    "(?a:\\w)", r"[\s]",
]  # fmt: skip
TEXTS = [
    "", "a", "b", "x", "ab", "abc", "bc", "abab", "ababab", "abababab", "aab", "b", "yes", "no maybe", "12.34", "1234", "12.3", "xb",
    "\nx", "ax", "w \t", "é", "àü", "我喜欢", "喜喜", "我", "🙂", "aabb", "abb", "babb", "aaaaaaaa", "aaaa", "_", "-", "5", "٣", " ",
    "\x1c", "-a.", "ccd", "我a-",
]  # fmt: skip


def run(machine, text: str) -> bool:
    state = machine.start
    for byte in text.encode():
        if (state := machine.step(state, byte)) is None: return False
    return machine.accepts(state)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_machine_is_fullmatch(pattern):
    machine = RegexMachine(pattern)
    for text in TEXTS: assert run(machine, text) == bool(re.fullmatch(pattern, text)), text
leaves = st.one_of(st.sampled_from(["a", "b", "é", "我", ".", "[ab]", "[^a]", "[a-é]", r"\w", r"\d", ""]))


def _larger(inner):
    either = st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})")
    often = st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}"])).map(lambda p: f"(?:{p[0]}){p[1]}")
    return st.one_of(st.tuples(inner, inner).map("".join), either, often)


patterns = st.recursive(leaves, _larger, max_leaves=6)


@given(patterns, st.lists(st.text(alphabet="abé我1\n", max_size=5), min_size=5, max_size=5))
@settings(max_examples=200, deadline=None)
def test_machine_is_fullmatch_for_any_pattern(pattern, texts):
    machine = RegexMachine(pattern)
    for text in texts: assert run(machine, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", "(yes|no|maybe)", "我喜欢[阅读书籍]{1,3}", "the (cat|mat){2}", "é+!"])
def test_random_models_write_only_what_matches(pattern, bpe):
    torch.manual_seed(0)
    table = torch.randn(bpe.vocab_size, bpe.vocab_size)
    constraint = regex_constraint(pattern, bpe)
    texts = generate_text(lambda ids: table[ids], bpe, [""] * 40, SamplingConfig(max_new_tokens=60, seed=0), constraint=constraint)
    done = [text for text in texts if re.fullmatch(pattern, text)]
    assert len(done) >= 38 and len(set(done)) > 1  # "é+" may not have ended


def test_a_token_may_span_characters_and_a_character_tokens(bpe):
    constraint = regex_constraint(" the cat|我喜", bpe)
    allowed = {bpe.id_to_bytes(i) for i in constraint.allowed(constraint.start).nonzero()[:, 0].tolist()}
    assert b" the" in allowed and "我".encode()[:1] in allowed
    assert all(b" the cat".startswith(b) or "我喜".encode().startswith(b) for b in allowed)
    state = constraint.start
    for byte in "我".encode()[:2]:
        id = next(i for i in range(bpe.vocab_size) if bpe.id_to_bytes(i) == bytes([byte]))
        state = constraint.advance(state, id)
    assert not constraint.complete(state)
    with pytest.raises(GenerationError, match="not allowed"): constraint.advance(state, bpe.encode("x")[0])


def test_dead_ends_of_a_small_vocabulary_are_never_entered():
    words = WordTokenizer.train(["red green blue red"])  # "red", " green", " blue", " red"
    ids = {words.id_to_bytes(i).decode(): i for i in range(words.vocab_size)}
    constraint = regex_constraint("red( green red| blue)", words)
    after = constraint.advance(constraint.start, ids["red"])
    assert set(constraint.allowed(after).nonzero()[:, 0].tolist()) == {ids[" green"], ids[" blue"]}
    assert not constraint.allowed(constraint.advance(after, ids[" blue"]))[: words.eos_id].any()
    with pytest.raises(GenerationError, match="cannot spell"): regex_constraint("red, green", words)
    with pytest.raises(GenerationError, match="could begin"): regex_constraint("violet", words)
    trap = regex_constraint("red( green violet| blue)", words)  # " green" would lead to a word that is not there
    assert trap.allowed(trap.advance(trap.start, ids["red"])).nonzero()[:, 0].tolist() == [ids[" blue"]]


@pytest.mark.parametrize(("pattern", "message"), [
    (r"(a)\1", "reference to a group"), ("(?=a)b", "look-around"), (r"\bword", r"\^, \$ or"), ("(?>a)b", "atomic"), ("a*+b", "possessive"),
    ("(?i)yes", "both letters"), ("(?i:y)es", "both letters"), ("(", "not a regular expression"), (r"[^\s\S]", "No text matches"),
    ("(a{500}){500}", "more than 100,000 states"), ("a{4294967295}", "counts too high"), ("(" * 5000 + ")" * 5000, "nested too deeply"),
    (None, "is a text, not None"), (7, "is a text, not 7"), (b"a", "is a text, not b'a'"),
])  # fmt: skip
def test_patterns_that_cannot_be(pattern, message, bytes_):
    with pytest.raises(GenerationError, match=message): regex_constraint(pattern, bytes_)


def test_a_constraint_of_another_vocabulary(bpe):
    constraint = regex_constraint("a+", bpe)
    with pytest.raises(GenerationError, match="over 320 tokens, the model has 17"): generate(transformer(), [1], constraint=constraint)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-10**6, 10**6), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=6)
)  # fmt: skip


@given(st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=8))
@settings(max_examples=150, deadline=None)
def test_json_machine_takes_json(value):
    machine = JsonMachine(12)
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        if text.isascii() or "\x7f" not in text: assert run(machine, text)
        for cut in range(len(text)): # a part is a value of its own only if json says so
            assert run(machine, text[:cut]) == is_json(text[:cut]) or text[:cut].rstrip(" ") != text[:cut]


def is_json(text: str) -> bool:
    try: json.loads(text)
    except ValueError: return False
    return True


def test_json_from_a_random_model(bpe):
    torch.manual_seed(1)
    table = torch.randn(bpe.vocab_size, bpe.vocab_size)
    table[:, bpe.eos_id] += 3
    constraint = ByteConstraint(JsonMachine(3), bpe)
    config = SamplingConfig(max_new_tokens=80, seed=3)
    rows = generate(lambda ids: table[ids], [[bpe.bos_id]] * 60, config, constraint=constraint, tokenizer=bpe)
    ended = [bpe.decode(row) for row in rows if row[-1] == bpe.eos_id or len(row) < 80]
    assert len(ended) > 20
    for text in ended: json.loads(text)
    assert not run(JsonMachine(1), "[[1]]") and run(JsonMachine(2), "[[1]]")
    with pytest.raises(GenerationError, match="depth"): JsonMachine(-1)
