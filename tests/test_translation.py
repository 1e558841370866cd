"""Word tables against nltk and brute force, phrases by their definition, PageRank against networkx; a Transformer that learns its pairs by
heart, saved and loaded; names, beams and bad input with the sentences it gets; planted faults."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lmbook.translation as translation
from lmbook.core import LmbookError
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.text_metrics import rouge
from lmbook.tokenization import ByteTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from lmbook.translation import (
    Aligned,
    PhraseTable,
    Summarizer,
    TranslationError,
    Translator,
    TranslatorConfig,
    WordAligner,
    best_sentence,
    join_units,
    lead,
    pagerank,
    phrase_pairs,
    score_summaries,
    score_translations,
    sentence_overlap,
    split_sentences,
    split_units,
    textrank,
)
from tests.browser import launched
from tests.faults import planted

PAIRS = [("红羊", "red goat"), ("红门", "red door"), ("大羊", "big goat"), ("大门在那里。", "the big door is there."),
         ("羊在", "the goat is")]  # fmt: skip
SMALL = TranslatorConfig(vocab_size=290, d_model=32, n_layer=1, n_head=2, context_length=48, steps=120, batch_size=5, lr=1e-2, both=True)


@pytest.fixture(scope="module")
def both() -> Translator: return Translator.fit(PAIRS, SMALL, names={"羊": "goat"})


@pytest.fixture(scope="module")
def decoder() -> Translator: return Translator.fit(PAIRS, replace(SMALL, kind="decoder", both=False, context_length=96))


# ---------------------------------------------------------------- units


def test_units_make_the_text_again():
    world = SmallWorld(SmallWorldConfig(limit=20))
    for story in world.documents("train", 60):
        for sentence in itertools.chain.from_iterable(story.sentences): assert join_units(split_units(sentence)) == sentence
    assert split_units("Don't, well-known 茶壶a！ 3.5") == ["Don't", ",", "well-known", "茶", "壶", "a", "！", "3", ".", "5"]
    assert join_units(["He", "said", ":", '"', "no", "(", "yes", ")", ".", '"', "So", "."]) == 'He said: "no (yes)." So.'
    assert split_units("") == [] and join_units([]) == ""


# ---------------------------------------------------------------- word tables


def by_hand(pairs: list[tuple[list, list]], rounds: int) -> dict[tuple, float]:
    t = {(a, b): 1.0 for left, right in pairs for a in [None, *left] for b in right}
    for _ in range(rounds):
        shares: Counter[tuple] = Counter()
        for left, right in pairs:
            for b in right:
                total = sum(t[a, b] for a in [None, *left])
                for a in [None, *left]: shares[a, b] += t[a, b] / total  # type: ignore[assignment]
        sums: Counter[str | None] = Counter()
        for (a, _), n in shares.items(): sums[a] += n
        t = {(a, b): n / sums[a] for (a, b), n in shares.items()}
    return t


def random_pairs(seed: int, n: int = 12) -> list[tuple[str, str]]:
    dice = random.Random(seed)
    def some(units: str) -> list[str]: return dice.choices(units, k=dice.randint(1, 5))
    return [("".join(some("红羊门大在")), " ".join(some("abcdef"))) for _ in range(n)]


def check_ibm(module: ModuleType) -> None:
    for seed in range(4):
        pairs = random_pairs(seed)
        rows = [(split_units(a), split_units(b)) for a, b in pairs]
        made = module.WordAligner.fit(pairs, rounds=3)
        for table, right in ((made.there, rows), (made.back, [(b, a) for a, b in rows])):
            wanted = by_hand(right, 3)
            for a in {a for a, _ in wanted if a}:
                found = dict(table.best(a, 99))
                assert found.keys() == {b for x, b in wanted if x == a}
                for b, p in found.items(): assert math.isclose(p, wanted[a, b], rel_tol=1e-9)


def test_ibm_model_1_by_hand(): check_ibm(translation)


def test_ibm_model_1_is_nltks():
    translate = pytest.importorskip("nltk.translate")
    for seed in range(3):
        pairs = [(a, " ".join(dict.fromkeys(b.split()))) for a, b in random_pairs(seed)]  # nltk counts a repeated target word twice
        theirs = translate.IBMModel1([translate.AlignedSent(split_units(b), split_units(a)) for a, b in pairs], 4)
        ours = WordAligner.fit(pairs, rounds=4)
        for word in {c for a, _ in pairs for c in a}:
            for b, p in ours.translations(word, 9): assert math.isclose(p, theirs.translation_table[b][word], rel_tol=1e-6, abs_tol=1e-9)


def test_each_round_makes_the_pairs_likelier():
    nats = WordAligner.fit(random_pairs(0, 40), rounds=12).there.nats
    assert len(nats) == 12 and all(a >= b - 1e-12 for a, b in itertools.pairwise(nats)) and nats[0] > nats[-1]


def test_alignment_and_words_of_a_pair():
    made = WordAligner.fit(PAIRS, rounds=20)
    assert made.align(("红羊", "red goat")) == [(0, 0), (1, 1)] and made.predict(["红羊", "猫", ""]) == ["red goat", "猫", ""]
    shares = made.matrix(("红羊", "red goat"))
    assert shares.shape == (2, 2) and (shares.sum(0) <= 1 + 1e-9).all() and shares[0, 0] > 0.8
    assert made.matrix(("猫", "cat")).sum() == 0 and made.align(("猫", "cat")) == [] and made.translations("猫") == []
    assert set(made.align(("大门在那里。", "the big door is there."))) >= {(0, 1), (1, 2)}


# ---------------------------------------------------------------- phrases


def blocks(n: int, m: int, links: list[tuple[int, int]], longest: int) -> set[tuple[int, int, int, int]]:
    "By the definition, smallest targets."
    out = set()
    for a, b, c, d in itertools.product(range(n), range(1, n + 1), range(m), range(1, m + 1)):
        if not (a < b <= a + longest and c < d): continue
        inside = [(i, j) for i, j in links if a <= i < b and c <= j < d]
        leads_out = any((a <= i < b) != (c <= j < d) for i, j in links)
        tight = any(j == c for _, j in inside) and any(j == d - 1 for _, j in inside)
        if inside and not leads_out and tight: out.add((a, b, c, d))
    return out


def check_phrases(module: ModuleType) -> None:
    dice = random.Random(0)
    for _ in range(150):
        n, m = dice.randint(1, 6), dice.randint(1, 6)
        links = [(i, j) for i in range(n) for j in range(m) if dice.random() < 0.3]
        left, right = [f"s{i}" for i in range(n)], [f"t{j}" for j in range(m)]
        wanted = {(tuple(left[a:b]), tuple(right[c:d])) for a, b, c, d in blocks(n, m, links, 3)}
        assert set(module.phrase_pairs(left, right, links, 3)) == wanted


def test_phrases_by_their_definition(): check_phrases(translation)


def test_phrases_are_few_and_likely_and_copy_what_is_unknown():
    table = PhraseTable({("a", "b"): (("x",), 0.1), ("a",): (("y",), 1.0), ("b",): (("z",), 1.0), ("c",): (("w",), 0.5)}, "abcd")
    assert table.predict(["a b", "b a", "a d c", "e a b", ""]) == ["x", "z y", "y w", "e x", ""]
    assert PhraseTable.fit(PAIRS).predict(["红羊"]) == ["red goat"]
    with pytest.raises(TranslationError, match="p lies in"): PhraseTable({("a",): (("x",), 0.0)})
    with pytest.raises(TranslationError, match="to no unit"): list(phrase_pairs(["a"], ["b"], [(0, 1)]))


@pytest.mark.browser
def test_the_pointer_shows_what_belongs_together():
    shown = Aligned(["她", "<把>"], ["She", "hid"], [[0.9, 0.05], [0.0, 0.7]])
    assert repr(shown) == "She: 她 0.9\nhid: <把> 0.7"
    other = Aligned(["她"], ["hid"], [[0.0]])
    assert repr(other) == "hid: -" and 'title="nothing"' in other._repr_html_()
    with launched() as chrome:
        page = chrome.new_page()
        page.set_content(shown._repr_html_() + other._repr_html_())

        def colour(unit: str) -> str:
            return page.get_by_text(unit, exact=True).first.evaluate("e => getComputedStyle(e).backgroundColor")

        def coloured() -> list[str]: return [unit for unit in ("她", "<把>", "She", "hid") if colour(unit) != "rgba(0, 0, 0, 0)"]

        assert coloured() == []
        page.get_by_text("She", exact=True).hover()
        assert coloured() == ["她"] and colour("她") == "rgba(255, 160, 0, 0.9)"
        page.mouse.move(0, 300)
        page.get_by_text("<把>", exact=True).focus()
        assert coloured() == ["hid"]


# ---------------------------------------------------------------- a Transformer


def test_it_learns_its_pairs_in_both_directions(both):
    left, right = [a for a, _ in PAIRS], [b for _, b in PAIRS]
    assert both.predict(left) == right and both.predict(right, back=True) == left
    assert both.predict(left[:2], beams=3) == right[:2] and both.history.rows[-1]["loss"] < 0.5
    scores = both.evaluate([{"source": a, "target": [b, "something else"]} for a, b in PAIRS])
    assert scores["chrF"].value == pytest.approx(100) and scores["BLEU"].n == len(PAIRS)
    assert both.evaluate([(b, a) for a, b in PAIRS], back=True)["chrF"].value == pytest.approx(100)


def test_a_decoder_reads_the_source_as_a_prompt(decoder):
    assert decoder.predict([a for a, _ in PAIRS]) == [b for _, b in PAIRS]
    assert decoder.predict([PAIRS[0][0]], beams=2) == [PAIRS[0][1]]
    with pytest.raises(TranslationError, match="no cross-attention"): decoder.attention("红羊", "red goat")
    with pytest.raises(TranslationError, match="one direction only"): decoder.predict(["red goat"], back=True)


def test_alone_as_in_a_batch_and_nothing_for_nothing(both):
    texts = ["红羊", "", "大门在那里。", "  ", "门"]
    assert both.predict(texts) == [both.predict([text])[0] for text in texts] == both.predict(texts, batch_size=1)
    assert both.predict([]) == [] and both.predict(["", " \n"]) == ["", ""]


def check_names(module: ModuleType) -> None:
    found = module._found("Ann and Anna saw Mary-Ann.", {"Ann": "安", "Anna": "安娜"})
    assert found == ["Ann", "Anna"]
    assert module._pattern({"安": "", "安娜": ""}).findall("安娜和安") == ["安娜", "安"]
    assert module._pattern({"Ann"}).findall("Ann去了Annex，见到Ann。") == ["Ann", "Ann"]


def test_names_are_words_of_their_own_and_the_longest_first(): check_names(translation)


def test_names_are_carried_over_by_marks(both):
    assert both.predict(["红猫"], names={"猫": "Zyx"}) == ["red Zyx"] and both.predict(["大猫"], names={"猫": "Zyx"}) == ["big Zyx"]
    assert both.predict(["red Zyx"], back=True, names={"Zyx": "猫"}) == ["红猫"]
    assert both.predict(["红羊"], names={"猫": "Zyx"}) == ["red goat"]
    many = {chr(0x4E00 + i): "x" for i in range(9)}
    with pytest.raises(TranslationError, match="Text 0 has 9 names"): both.predict(["".join(many)], names=many)


def test_it_comes_back_from_its_folder(both, decoder, tmp_path):
    for name, made in (("both", both), ("decoder", decoder)):
        made.save(tmp_path / name)
        again = Translator.load(tmp_path / name)
        assert again.both == made.both and again.predict(["红羊", "大门"]) == made.predict(["红羊", "大门"])
    (tmp_path / "both" / "translator.json").write_text("[")
    with pytest.raises(TranslationError, match="cannot be read"): Translator.load(tmp_path / "both")
    with pytest.raises(TranslationError, match="There is no translator in"): Translator.load(tmp_path)


def test_attention_is_the_models(both):
    source, target = "大门在那里。", "the big door is there."
    found = both.attention(source, target)
    assert found.shape == (len(split_units(source)), len(split_units(target))) and (found >= 0).all() and (found.sum(0) <= 1 + 1e-5).all()
    assert found.sum() > 0.3 * found.shape[1] and both.attention(target, source, back=True).shape == found.shape[::-1]
    assert not both.model.decoder.blocks[-1].cross._forward_pre_hooks


def test_the_same_seed_the_same_model():
    config = replace(SMALL, steps=3)
    one, two = (Translator.fit(PAIRS, config) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


@pytest.mark.parametrize("call, message", [
    (lambda t: Translator.fit([]), "nothing to learn from"),
    (lambda t: Translator.fit("红羊"), "A list of pairs is wanted"),
    (lambda t: Translator.fit([("红", "red"), ("门", " ")]), "The target of pair 1 is empty"),
    (lambda t: Translator.fit([("红", 3)]), "The target of pair 0 is int"),
    (lambda t: Translator.fit([("红",)]), "Number 0 is no pair"),
    (lambda t: Translator.fit([{"source": "红"}]), "The target of pair 0 is NoneType"),
    (lambda t: Translator.fit([("红" * 99, "red")], SMALL), "Text 0 has"),
    (lambda t: Translator.fit([("红", "red " * 99)], SMALL), "The target of pair 0 is too long"),
    (lambda t: Translator.fit(PAIRS, SMALL, names={"羊": ""}), "not empty"),
    (lambda t: WordAligner.fit([]), "nothing to learn from"),
    (lambda t: t.predict("红羊"), "Give a list of them"),
    (lambda t: t.predict(["红羊"], beams=0), "beams"),
    (lambda t: t.predict(["红羊"], length_penalty=math.nan), "length_penalty"),
    (lambda t: t.predict(["红羊", "羊" * 99]), "Text 1 has .* the model reads 48"),
    (lambda t: t.evaluate([]), "nothing to learn from"),
    (lambda t: Translator(Transformer(TransformerConfig(300, 8, 1, 2, kind="encoder")), t.tokenizer), "reads and does not write"),
    (lambda t: Translator(t.model, ByteTokenizer()), "has no <there>"),
    (lambda t: TranslatorConfig(steps=0), "steps"), (lambda t: TranslatorConfig(vocab_size=100), "vocab_size"),
    (lambda t: Aligned(["a"], ["b"], [[0.5, 0.5]]), "shape"), (lambda t: Aligned(["a"], ["b"], [[1.5]]), "from 0 to 1"),
    (lambda t: Aligned(["a"], ["b"], [[math.nan]]), "from 0 to 1"), (lambda t: Aligned("a", ["b"], [[1]]), "Give a list"),
    (lambda t: Aligned(["a"], ["b"], [["x"]]), "no table"), (lambda t: Aligned(["a"], ["b"], [[1]], least=0), "least"),
    (lambda t: Summarizer("best"), "how"), (lambda t: Summarizer(sentences=0), "sentences"),
    (lambda t: best_sentence([], ["a"]), "no sentence"), (lambda t: pagerank(-np.ones((2, 2))), "at least 0"),
    (lambda t: pagerank(np.ones((2, 3))), "shape"), (lambda t: pagerank(np.ones((2, 2)), damping=1.0), "damping"),
])  # fmt: skip
def test_bad_input_is_one_sentence(both, call, message):
    with pytest.raises(TranslationError, match=message) as caught: call(both)
    assert isinstance(caught.value, LmbookError)


def test_another_language_and_unknown_words_are_no_error(both):
    assert all(isinstance(text, str) for text in both.predict(["Le chat dort.", "zyzzyva", "🎉"]))


# ---------------------------------------------------------------- summaries


def check_pagerank(module: ModuleType) -> None:
    networkx = pytest.importorskip("networkx")
    dice = np.random.default_rng(0)
    for n in (1, 2, 7):
        for _ in range(5):
            weights = dice.random((n, n)) * (dice.random((n, n)) < 0.5)  # some have nobody to vote for
            graph = networkx.from_numpy_array(weights, create_using=networkx.DiGraph)
            theirs = networkx.pagerank(graph, alpha=0.85, tol=1e-12, max_iter=1000)
            np.testing.assert_allclose(module.pagerank(weights), [theirs[i] for i in range(n)], atol=1e-8)


def test_pagerank_is_networkxs(): check_pagerank(translation)


def test_textrank():
    sentences = ["The cat sat.", "A dog ran home.", "The cat ran home.", "猫坐着。", "..."]
    near, ranks = sentence_overlap(sentences), textrank(sentences)
    assert near[0, 2] == pytest.approx(2 / (math.log(3) + math.log(4))) and (near == near.T).all() and not near.diagonal().any()
    assert ranks.argmax() == 2 and ranks.sum() == pytest.approx(1) and ranks[3] == pytest.approx(ranks[4])
    order = [3, 0, 4, 2, 1]
    np.testing.assert_allclose(textrank([sentences[i] for i in order]), ranks[order], atol=1e-9)
    assert textrank([]).shape == lead([]).shape == (0,) and lead(sentences).argmax() == 0 and textrank(["a"]).tolist() == [1.0]
    np.testing.assert_allclose(pagerank(np.zeros((3, 3))), 1 / 3)


def test_sentences_and_their_choice():
    text = 'He ran. "Stop!" she said. 他跑了。她说：“停！” End'
    assert split_sentences(text) == ["He ran.", '"Stop!"', "she said.", "他跑了。", "她说：“停！”", "End"]
    assert split_sentences("") == [] and split_sentences("a\nb") == ["a", "b"]
    story = "The cat sat. A dog ran home. The cat ran home."
    assert Summarizer("lead").predict([story, ""]) == ["The cat sat.", ""]
    assert Summarizer("textrank").predict([story]) == ["The cat ran home."]
    assert Summarizer("textrank", 2).predict([story])[0].endswith("The cat ran home.")
    assert Summarizer("lead", 2).predict(["猫跑了。狗跑了。羊。"]) == ["猫跑了。狗跑了。"]
    assert Summarizer("lead", 9).predict([story]) == [story]


def test_the_oracle_is_the_best(): # of one sentence, against the nearest reference
    sentences, references = ["a b c", "c d", "d e f g", "猫"], ["d e f", "a b"]
    best = max(sentences, key=lambda s: rouge([s], [references], "rouge1", chinese=True).value)
    assert best_sentence(sentences, references) == best and best_sentence(sentences, ["猫"]) == "猫"


def test_a_summary_that_is_written(tmp_path):
    records = [{"text": a, "summary": b} for a, b in PAIRS]
    made = Summarizer.fit(records, replace(SMALL, both=False))
    assert made.predict([a for a, _ in PAIRS]) == [b for _, b in PAIRS]
    assert made.evaluate(records)["ROUGE-L"].value == 1 and set(made.evaluate(records)) == {"ROUGE-1", "ROUGE-2", "ROUGE-L"}
    for name, one in (("written", made), ("lead", Summarizer("lead", 2))):
        one.save(tmp_path / name)
        again = Summarizer.load(tmp_path / name)
        assert (again.how, again.sentences) == (one.how, one.sentences) and again.predict(["红羊", ""]) == one.predict(["红羊", ""])
    (tmp_path / "lead" / "summarizer.json").write_text('{"how": "best"}')
    with pytest.raises(TranslationError): Summarizer.load(tmp_path / "lead")
    with pytest.raises(TranslationError, match="text of pair 0 is empty"): Summarizer.fit([{"text": "", "summary": "a"}])


def test_scores_know_chinese():
    scores = score_translations(["红羊在门边。"], ["红羊在门里。"])
    assert 0 < scores["BLEU"].value < 100 and "tok:zh" in scores["BLEU"].details["signature"]
    assert "tok:13a" in score_translations(["a b"], [["a b", "c"]])["BLEU"].details["signature"]
    assert score_summaries(["红羊"], ["红羊"])["ROUGE-1"].value == 1


# ---------------------------------------------------------------- planted faults

FAULTS = {
    "the shares of a word do not sum to one": ("np.bincount(which, share / total[owner])", "np.bincount(which, share)", check_ibm),
    "no empty word": ("i = np.array([0, *(self.a.setdefault", "i = np.array([1, *(self.a.setdefault", check_ibm),
    "a link leads out of a phrase": ("and max(last[low : high + 1]) < stop", "and max(last[low : high + 1]) <= stop", check_phrases),
    "a link leads out before a phrase": ("if high >= 0 and min(first[low : high + 1]) >= start and", "if high >= 0 and", check_phrases),
    "a reader never begins anew": ("(1 - damping) / n + damping * rank @ steps", "rank @ steps", check_pagerank),
    "votes are not divided": ("w / np.where(sums > 0, sums, 1), 1 / n)", "w, 1 / n)", check_pagerank),
    "who has nobody votes for himself": ("(sums > 0, sums, 1), 1 / n)", "(sums > 0, sums, 1), np.eye(n))", check_pagerank),
    "names within words": ('else "" for sign', 'and False else "" for sign', check_names),
    "the shortest name first": ("key=len, reverse=True)) or", "key=len)) or", check_names),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, monkeypatch):
    old, new, check = FAULTS[name]
    with pytest.raises((AssertionError, TypeError, ValueError, IndexError)): check(planted(translation, old, new, monkeypatch))


def test_the_chapters_module_is_found_by_path(): assert Path(str(translation.__file__)).name == "translation.py"
