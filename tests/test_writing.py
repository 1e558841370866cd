"""The writing aid's edges: borders of tokens, texts of every kind, gaps that are none, and what the sums of probabilities must be."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from lmbook.core import LmbookError
from lmbook.language_models import NGram, NGramConfig
from lmbook.tokenization import BPE, SPECIALS, ByteTokenizer, CharTokenizer, WordTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from lmbook.writing import (
    FIM_MARKS,
    FillIn,
    Suggestion,
    Typed,
    WritingError,
    back_up,
    complete,
    cut_units,
    fill,
    fill_by_rereading,
    fill_in_the_middle,
    fim_rows,
    keystrokes,
)

TEXTS = ["The cat sat on the mat. The cats sat on the mats. A dog sat here!", "The dog saw a cat on the mat. It ran. The mat was red."] * 3
ALL = (*SPECIALS, *FIM_MARKS)


@pytest.fixture(scope="module")
def bpe() -> BPE: return BPE.train(TEXTS, 296, specials=ALL)


@pytest.fixture(scope="module")
def model(bpe: BPE) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(bpe.vocab_size, 16, 1, 2, context_length=96)).eval()


@pytest.fixture(scope="module")
def words() -> WordTokenizer: return WordTokenizer.train(TEXTS, specials=ALL)


@pytest.fixture(scope="module")
def bigram(words: WordTokenizer) -> NGram:
    return NGram.fit([words.encode(text, bos=True, eos=True) for text in TEXTS], words.vocab_size, NGramConfig(order=2))


# ---------------------------------------------------------------- the border

@pytest.mark.parametrize(("text", "typed"), [
    ("The cat sa", " sa"), ("The cat ", " "), ("The", "The"), ("", ""), ("The cat.", " cat."), ("The  c", "  c"), ("The\n", "\n"),
    ("猫坐在", "猫坐在"), ("a é", " é"), (" ", " "), ("The cat\n\nsa", "\n\nsa"),
])  # fmt: skip
def test_what_is_taken_back_is_the_last_word_with_its_space(bpe, text, typed):
    ids, wanted = back_up(bpe, text, most=100)
    assert wanted.decode() == typed
    assert bpe.decode(ids) + typed == text and ids[0] == bpe.bos_id


@pytest.mark.parametrize("text", ["The cat sa", "x" * 50, "猫" * 30, "a" * 40 + " b", "!?" * 9 + "\n"])
@pytest.mark.parametrize("most", [0, 1, 5, 12])
def test_never_more_tokens_are_taken_back_than_said(bpe, text, most):
    ids, wanted = back_up(bpe, text, most)
    whole = bpe.encode(text, bos=True)
    assert ids == whole[: len(ids)] and len(whole) - len(ids) <= most
    assert wanted == b"".join(map(bpe.id_to_bytes, whole[len(ids) :]))


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: CharTokenizer.train(TEXTS), lambda: WordTokenizer.train(TEXTS)])
def test_every_kind_of_tokenizer_can_be_backed_up(make):
    tokenizer = make()
    ids, wanted = back_up(tokenizer, "The cat sa", most=20)
    assert wanted == b" sa" and tokenizer.decode(ids) == "The cat"


def test_an_unknown_word_is_wanted_letter_by_letter(words):
    ids, wanted = back_up(words, "The zebr")
    assert wanted == b" zebr" and words.decode(ids) == "The"


def test_without_bos_a_token_stays(bpe):
    bare = BPE.train(TEXTS, 290, specials=())
    ids, _ = back_up(bare, "The")
    assert len(ids) == 1
    with pytest.raises(WritingError, match="empty"): back_up(bare, "")


# ---------------------------------------------------------------- completion

def brute_force(model, tokenizer, text: str, longest: int) -> dict[str, float]:
    "Every way to spell a word of up to so many tokens, by reading each: p(word | typed)."
    ids, typed = back_up(tokenizer, text)
    silent = [i for i in range(tokenizer.vocab_size) if not tokenizer.id_to_bytes(i) and i != tokenizer.eos_id]

    def scores(row):
        with torch.no_grad(): out = model(torch.tensor([row]))[0, -1].double()
        out[silent] = -math.inf
        return out.log_softmax(-1)

    found: dict[str, float] = {}
    norm = 0.0
    letters = [tokenizer.id_to_bytes(i).decode(errors="replace")[:1] for i in range(tokenizer.vocab_size)]
    todo = [([], b"", 0.0)]
    while todo:
        new, out, log_p = todo.pop()
        row = scores([*ids, *new])
        text_now = out[len(typed) :].decode(errors="replace")
        over = len(out) >= len(typed) and text_now[-1:].isalnum()
        if over:
            ends = [i for i, c in enumerate(letters) if i == tokenizer.eos_id or (c and not (c.isalnum() or c == "\ufffd"))]
            end = sum(math.exp(row[i]) for i in ends)
            found[text_now] = found.get(text_now, 0.0) + math.exp(log_p) * end
        if len(new) == longest: continue
        for i in range(tokenizer.vocab_size):
            data = tokenizer.id_to_bytes(i)
            if not data: continue
            rest = typed[len(out) :]
            if rest:
                if not (data.startswith(rest) or rest.startswith(data)): continue
                if data.startswith(rest): norm += math.exp(log_p + row[i].item())
            elif over and not (letters[i].isalnum() or letters[i] == "\ufffd"): continue
            todo.append(([*new, i], out + data, log_p + row[i].item()))
    return {text: p / (norm or 1.0) for text, p in found.items()}


def test_probabilities_are_those_of_all_ways_to_spell_a_word():
    tokenizer = CharTokenizer.train(["ab a b"])  # <pad> <bos> <eos> <unk>, a, b and the space
    torch.manual_seed(1)
    tiny = Transformer(TransformerConfig(tokenizer.vocab_size, 8, 1, 2, context_length=32)).eval()
    exact = brute_force(tiny, tokenizer, "ab a", 4)
    found = complete(tiny, tokenizer, "ab a", 40, beams=4000, max_new_tokens=5)
    checked = [s for s in found if len(s.text) <= 2 and s.text.isalnum()]
    assert len(checked) > 3
    for s in checked: assert s.probability == pytest.approx(exact[s.text], rel=1e-4)


def test_two_ways_to_cut_a_word_are_added_up(bpe, model):
    by_beams = {s.text: s.probability for s in complete(model, bpe, "The c", 50, beams=3000, max_new_tokens=3)}
    exact = brute_force(model, bpe, "The c", 2)
    assert by_beams["at"] >= exact["at"] - 1e-9


def test_suggestions_begin_where_the_typing_ends_and_are_sorted(bpe, model):
    for text in ("The c", "The cat ", "The cat", "", "The cat sat on the mat.", "猫", "x " * 200):
        found = complete(model, bpe, text, n=5)
        p = [s.probability for s in found]
        assert found and p == sorted(p, reverse=True) and all(0 <= x <= 1 for x in p) and sum(p) <= 1 + 1e-6
        assert all(s.text for s in found) and len({s.text for s in found}) == len(found)


def test_suggestions_have_as_many_words_as_asked_for(words, bigram):
    [best, *_] = complete(bigram, words, "The cat", words=3)
    assert len(best.text.split()) == 3
    assert complete(bigram, words, "The ca")[0].text == "t"
    for n in (1, 2):  # fewer where the text ends, never more
        assert max(len(re.findall(r"\w+", s.text)) for s in complete(bigram, words, "The cat", 30, n, beams=200)) == n


def test_a_beginning_that_no_token_can_go_on_from_gives_nothing(words, bigram):
    assert complete(bigram, words, "The zzz") == []


def test_the_end_of_a_long_text_is_read(bpe, model):
    longer, shorter = (complete(model, bpe, "The mat. " * n + "The c", max_new_tokens=8) for n in (300, 200))
    assert longer == shorter


def test_the_model_is_left_as_it_was(bpe, model):
    model.train()
    complete(model, bpe, "The c")
    fill(model, bpe, "The cat", " the mat.", max_new_tokens=4)
    assert model.training
    model.eval()


def test_n_is_not_changed_by_asking_for_more(bpe, model):
    few, many = complete(model, bpe, "The c", 2, beams=64), complete(model, bpe, "The c", 6, beams=64)
    assert [s.text for s in many[:2]] == [s.text for s in few]


# ---------------------------------------------------------------- keys

def test_keys_of_a_perfect_user():
    def suggest(so_far): return [Suggestion("he cat", 0.5), Suggestion("he", 0.4)] if so_far == "T" else []

    typed = keystrokes("The cat!", suggest)
    assert typed.pieces == (("T", False), ("he cat", True), ("!", False))
    assert (typed.keys, typed.accepted, typed.shown, typed.text) == (3, 1, 1, "The cat!")
    assert typed.saved == pytest.approx(1 - 3 / 8)
    assert keystrokes("The cat!", suggest, k=1).keys == 3
    assert keystrokes("The cat!", suggest, least=0.6).keys == 8
    assert keystrokes("The cat!", suggest, least=0.6).shown == 0


def test_what_costs_as_much_as_it_saves_is_not_accepted():
    typed = keystrokes("ab", lambda so_far: [Suggestion("a", 1.0), Suggestion("", 1.0)])
    assert typed.accepted == 0 and typed.keys == 2


def test_a_wrong_suggestion_costs_nothing():
    typed = keystrokes("ab", lambda so_far: [Suggestion("zebra", 1.0)])
    assert typed.keys == 2 and typed.saved == 0 and typed.shown == 2


def test_an_empty_text_needs_no_key():
    assert keystrokes("", lambda so_far: []).saved == 0 and keystrokes("", lambda so_far: []).pieces == ()


def test_a_text_with_markup_is_shown_as_it_is():
    shown = Typed((("<b>", False), ("&amp;", True)), 1)._repr_html_()
    assert "<b>" not in shown and "&lt;b&gt;" in shown and "&amp;amp;" in shown


# ---------------------------------------------------------------- gaps

def test_a_row_holds_everything_once(bpe):
    gap = FillIn("The cat", " sat", " on the mat.")
    row = gap.row(bpe)
    a, b, c = (row.index(bpe.special(mark)) for mark in FIM_MARKS)
    assert (a, row[0], row[-1]) == (1, bpe.bos_id, bpe.eos_id) and a < b < c
    assert bpe.decode(row[a + 1 : b]) + bpe.decode(row[c + 1 : -1]) + bpe.decode(row[b + 1 : c]) == gap.text
    assert row[: c + 1] == gap.prompt(bpe)


@pytest.mark.parametrize("unit", ["sentences", "words", "characters"])
def test_units_are_the_text_again(unit):
    for text in (*TEXTS, "", " a  b ", 'He said: "Go!" She went.', "猫坐着。狗走了！", "No end", "A.B. C?", "\n\nA.\n\nB.\n"):
        assert "".join(cut_units(text, unit)) == text
    assert cut_units('He said: "Go!" She went. ') == ['He said: "Go!"', " She went.", " "]
    assert cut_units("猫坐着。狗走了！") == ["猫坐着。", "狗走了！"]


@pytest.mark.parametrize("unit", ["sentences", "words", "characters"])
@pytest.mark.parametrize("most", [1, 2, None])
def test_a_gap_has_something_on_both_sides(unit, most):
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(60):
        gap = fill_in_the_middle(TEXTS[0] + " Yes. No.", rng, unit, most)
        assert gap.text == TEXTS[0] + " Yes. No." and gap.before and gap.middle and gap.after
        sizes.add(len(cut_units(gap.middle, unit)))
    assert min(sizes) == 1 and max(sizes) == most if most else max(sizes) > 2


def test_a_share_of_the_rows_is_rearranged(bpe):
    many = TEXTS * 50
    rows = fim_rows(many, bpe, share=0.3, seed=1)
    middle = bpe.special(FIM_MARKS[2])
    assert len(rows) == len(many) and 0.2 < np.mean([middle in row for row in rows]) < 0.4
    assert all(middle not in row for row in fim_rows(many, bpe, share=0.0))
    assert all(middle in row for row in fim_rows(many, bpe, share=1.0))
    assert fim_rows(["Short."], bpe, share=1.0) == [bpe.encode("Short.", bos=True, eos=True)]
    assert fim_rows(many, bpe, seed=3) == fim_rows(many, bpe, seed=3) != fim_rows(many, bpe, seed=4)


class Copies:
    "A decoder that fills the gap with what stands first behind it, by the book; and may only be read from left to right."

    task, takes_segments = "next", False

    def __init__(self, tokenizer): self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    def __call__(self, ids):
        out = torch.full((*ids.shape, self.vocab_size), -20.0)
        suffix, middle = (self.tokenizer.special(mark) for mark in FIM_MARKS[1:])
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                seen = row[: t + 1]
                if middle not in seen: continue
                source = seen[seen.index(suffix) + 1 : seen.index(middle)]
                written = len(seen) - seen.index(middle) - 1
                out[b, t, source[written] if written < len(source) else self.tokenizer.eos_id] = 20.0
        return out


def test_filling_asks_in_the_order_of_training_and_ends_at_the_end(words):
    [found] = fill(Copies(words), words, "The cat", " sat on the mat.")
    assert found.text == " sat on the mat." and found.probability > 0.99


def test_rereading_chooses_what_makes_the_whole_likeliest(words, bigram):
    found = fill_by_rereading(bigram, words, "The dog saw a cat on the mat.", " The mat was red.", 12, seed=0)
    rows = [words.encode(f"The dog saw a cat on the mat.{s.text} The mat was red.", bos=True, eos=True) for s in found]
    log_p = [float(bigram.token_log_probs([row]).sum()) for row in rows]
    p = np.exp(log_p) / np.exp(log_p).sum()
    assert log_p == sorted(log_p, reverse=True)
    np.testing.assert_allclose([s.probability for s in found], p, rtol=1e-4)


def test_rereading_with_a_transformer_is_the_sum_of_its_log_probabilities(bpe, model):
    found = fill_by_rereading(model, bpe, "The cat sat.", " It ran.", 6, max_new_tokens=10)
    each = []
    for s in found:
        row = torch.tensor([bpe.encode(f"The cat sat.{s.text} It ran.", bos=True, eos=True)])
        with torch.no_grad(): each.append(model(row[:, :-1]).log_softmax(-1).gather(2, row[:, 1:, None]).sum().item())
    np.testing.assert_allclose(np.log([s.probability for s in found]), np.array(each) - np.logaddexp.reduce(each), atol=1e-3)


# ---------------------------------------------------------------- what is refused

BAD = {
    "a text is no str": lambda m, t: complete(m, t, 3),
    "no tokenizer": lambda m, t: complete(m, "bpe", "a"),
    "no model": lambda m, t: complete(object(), t, "a"),
    "n": lambda m, t: complete(m, t, "a", 0),
    "words": lambda m, t: complete(m, t, "a", words=0),
    "beams": lambda m, t: complete(m, t, "a", beams=True),
    "most": lambda m, t: back_up(t, "a", -1),
    "not its tokenizer": lambda m, t: complete(m, BPE.train(TEXTS, 299, specials=ALL), "a"),
    "an encoder": lambda m, t: complete(Transformer(TransformerConfig(t.vocab_size, 8, 1, 2, kind="encoder")), t, "a"),
    "k": lambda m, t: keystrokes("a", lambda text: [], 0),
    "no function": lambda m, t: keystrokes("a", []),
    "nan": lambda m, t: keystrokes("a", lambda text: [], least=math.nan),
    "two sentences": lambda m, t: fill_in_the_middle("One. Two.", np.random.default_rng(0)),
    "no dice": lambda m, t: fill_in_the_middle("One. Two. Three.", 0),
    "no unit": lambda m, t: fill_in_the_middle("One. Two. Three.", np.random.default_rng(0), "lines"),
    "no marks": lambda m, t: fill(m, BPE.train(TEXTS, 290), "a", "b"),
    "too long": lambda m, t: fill(m, t, "The mat. " * 50, " Yes."),
    "too long to reread": lambda m, t: fill_by_rereading(m, t, "The mat. " * 50, " Yes."),
    "no room": lambda m, t: fill(m, t, "a", "b", max_new_tokens=1000),
    "share": lambda m, t: fim_rows(TEXTS, t, share=1.5),
    "one text": lambda m, t: fim_rows("A. B. C.", t),
    "before is none": lambda m, t: FillIn(None, "", ""),
    "half a character": lambda m, t: complete(m, t, "\ud800"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_is_said_in_one_sentence(bpe, model, what):
    with pytest.raises(LmbookError) as caught: BAD[what](model, bpe)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip().endswith((".", "]", "?", ")"))


def test_a_gap_may_be_at_an_end(bpe, model):
    assert fill(model, bpe, "", " the mat.", max_new_tokens=4) and fill(model, bpe, "The cat", "", max_new_tokens=4)
    assert fill_by_rereading(model, bpe, "", " the mat.", 2, max_new_tokens=4)


def test_planted_a_keyboard_that_does_not_heal_is_found_out():
    tokenizer = BPE.train(["the gardener", "the garden"] * 9, 268, specials=ALL)
    pieces = [tokenizer.tokens(text) for text in (" gardener", " ga")]
    assert pieces[0][0] != pieces[1][0] or len(pieces[1]) > 1
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in ("the gardener", "the garden")] * 3
    counted = NGram.fit(rows, tokenizer.vocab_size, NGramConfig(order=4))
    found = {s.text for s in complete(counted, tokenizer, "the ga", 2)}
    assert found == {"rden", "rdener"}
    trusting = tokenizer.encode("the ga", bos=True)
    assert counted.next_log_probs(trusting).max() < counted.next_log_probs(back_up(tokenizer, "the ga")[0]).max()
