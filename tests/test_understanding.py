"""Understanding: the CRF equal to enumeration and, where it is installed, to a library; tasks from records to files and back; bad input."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lmbook import understanding
from lmbook.checkpoints import CheckpointError
from lmbook.core import LmbookError
from lmbook.evaluation import span_f1
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import ByteTokenizer, CharTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from lmbook.understanding import (
    CRF,
    Encoder,
    Entailment,
    EntityTagger,
    Marked,
    SpanReader,
    TaskConfig,
    TextClassifier,
    UnderstandingError,
    bio_moves,
)
from tests.faults import planted

TASKS = (TextClassifier, EntityTagger, SpanReader, Entailment)
QUICK = TaskConfig(epochs=1, batch_size=8)


def records(split: Any = "train", n: int = 12, lang: str = "en") -> list[dict[str, Any]]:
    return [
        {"text": s.text(lang), "label": s.sentiment, "entities": list(s.entities[lang]), "question": s.question[lang],
         "answer": s.answer[lang], "statement": s.summary[lang]}
        for s in SmallWorld(SmallWorldConfig(limit=3)).documents(split, n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder: return Encoder.new([r["text"] for r in records()], 400, d_model=16, n_layer=1, n_head=2)


@pytest.fixture(scope="module")
def fitted(encoder: Encoder) -> dict[type, Any]: return {task: task.fit(records(), encoder, QUICK) for task in TASKS}


def inputs(task: Any, some: list[dict[str, Any]]) -> list:
    return [(r["text"], r[task._prompt]) if task._prompt else r["text"] for r in some]


# ---------------------------------------------------------------- the CRF


def crf_of(K: int, seed: int, **masks: Any) -> CRF:
    torch.manual_seed(seed)
    crf = CRF(K, **masks).double()
    for p in crf.parameters(): nn.init.normal_(p)
    return crf


def listing(crf: CRF, scores: torch.Tensor) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    "All rows of tags of one text (T, K), and their scores, added up one by one."
    every = list(itertools.product(range(scores.shape[1]), repeat=len(scores)))
    first, step = crf.first + crf.no_first, crf.step + crf.no_step
    return every, torch.stack([
        first[row[0]] + crf.last[row[-1]] + sum(scores[t, k] for t, k in enumerate(row)) + sum(step[a, b] for a, b in zip(row, row[1:]))
        for row in every
    ])  # fmt: skip


@pytest.mark.parametrize("K, T", [(1, 1), (1, 4), (2, 1), (3, 4), (4, 5)])
def test_the_crf_is_its_listing(K, T):
    crf, lengths = crf_of(K, K + T), [T, max(1, T - 2)]
    scores = torch.randn(2, T, K, dtype=torch.double)
    there = torch.arange(T) < torch.tensor(lengths)[:, None]
    for b, n in enumerate(lengths):
        every, total = listing(crf, scores[b, :n])
        torch.testing.assert_close(crf.log_partition(scores, there)[b], total.logsumexp(0))
        assert crf.decode(scores, there)[b] == list(every[int(total.argmax())])
        for row in (every[0], every[-1]):
            padded = torch.zeros(2, T, dtype=torch.long)
            padded[b] = torch.tensor([*row, *[-100] * (T - n)])  # what stands at padding is not looked at
            torch.testing.assert_close(crf.loss(scores, padded, there)[b], total.logsumexp(0) - total[every.index(row)])


def test_the_gradient_is_the_probability_of_each_tag():
    crf, scores = crf_of(3, 0), torch.randn(1, 4, 3, dtype=torch.double, requires_grad=True)
    [gradient] = torch.autograd.grad(crf.log_partition(scores).sum(), scores)
    every, total = listing(crf, scores[0].detach())
    share = total.detach().softmax(0)
    for t, k in itertools.product(range(4), range(3)):
        torch.testing.assert_close(gradient[0, t, k], sum(p for p, row in zip(share, every) if row[t] == k))


def test_what_is_forbidden_is_never_said():
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    first, step = bio_moves(tags)
    assert first.tolist() == [True, True, False, True, False]
    assert [(a, b) for a, b in itertools.product(tags, tags) if not step[tags.index(a), tags.index(b)]] == [
        ("O", "I-A"), ("O", "I-B"), ("B-A", "I-B"), ("I-A", "I-B"), ("B-B", "I-A"), ("I-B", "I-A"),
    ]  # fmt: skip
    crf = crf_of(5, 1, first=first, step=step)
    for row in crf.decode(10 * torch.randn(50, 7, 5, dtype=torch.double)):
        assert first[row[0]] and all(step[a, b] for a, b in zip(row, row[1:]))
    assert float(crf.loss(torch.zeros(1, 2, 5, dtype=torch.double), torch.tensor([[0, 2]]))[0].detach()) > 5000


def test_the_crf_learns_what_single_tags_cannot():
    "Tags alternate, and the scores say nothing of them: only steps can know."
    torch.manual_seed(0)
    crf, tags = CRF(2), torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        crf.loss(torch.zeros(2, 5, 2), tags).sum().backward()
        optimizer.step()
    hint = torch.zeros(2, 5, 2)
    hint[0, 2, 0] = hint[1, 2, 1] = 1.0
    assert crf.decode(hint) == tags.tolist()


def test_the_crf_is_that_of_pytorch_crf():
    torchcrf = pytest.importorskip("torchcrf")
    ours, theirs = crf_of(4, 3), torchcrf.CRF(4, batch_first=True).double()
    theirs.start_transitions.data, theirs.end_transitions.data, theirs.transitions.data = ours.first.data, ours.last.data, ours.step.data
    scores, tags, there = torch.randn(2, 5, 4).double(), torch.randint(4, (2, 5)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]).bool()
    torch.testing.assert_close(-theirs(scores, tags, there, reduction="none"), ours.loss(scores, tags, there))
    assert theirs.decode(scores, there) == ours.decode(scores, there)


@pytest.mark.parametrize("old, new", [
    ("longer = (total[:, :, None] + step).logsumexp(1)", "longer = (total[:, None, :] + step).logsumexp(1)"),
    ("total = torch.where(there[:, t, None], longer, total)", "total = longer"),
    ("return (total + self.last).logsumexp(1)", "return total.logsumexp(1)"),
])  # fmt: skip
def test_a_fault_in_the_forward_algorithm_is_found(old, new, monkeypatch):
    module = planted(understanding, old, new, monkeypatch)
    torch.manual_seed(0)
    crf = module.CRF(3).double()
    for p in crf.parameters(): nn.init.normal_(p)
    scores, there = torch.randn(2, 4, 3, dtype=torch.double), torch.tensor([[1] * 4, [1, 1, 0, 0]]).bool()
    right = [listing(crf, scores[b, :n])[1].logsumexp(0) for b, n in enumerate((4, 2))]
    assert not torch.allclose(crf.log_partition(scores, there), torch.stack(right))


@pytest.mark.parametrize("call, says", [
    (lambda: CRF(0), "n_tags=0 must be a whole number"),
    (lambda: CRF(2, first=torch.ones(3)), "first must be a tensor of the shape (2,)"),
    (lambda: CRF(2).log_partition(torch.zeros(1, 3, 4)), "scores are floats of the shape (B, T, 2)"),
    (lambda: CRF(2).log_partition(torch.zeros(1, 0, 2)), "scores are floats of the shape"),
    (lambda: CRF(2).log_partition(torch.zeros(1, 3, 2).long()), "scores are floats"),
    (lambda: CRF(2).decode(torch.zeros(1, 3, 2), torch.tensor([[False, True, True]])), "Each row begins with a token"),
    (lambda: CRF(2).decode(torch.zeros(1, 3, 2), torch.tensor([[True, False, True]])), "padding is at its end"),
    (lambda: CRF(2).decode(torch.zeros(1, 3, 2), torch.ones(1, 2)), "there has the shape (1, 3)"),
    (lambda: CRF(2).loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 2]])), "Tags run from 0 to 1"),
    (lambda: CRF(2).loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1]])), "tags are whole numbers of the shape (1, 3)"),
    (lambda: bio_moves(["O", "X"]), "'X' is no tag"),
    (lambda: bio_moves("O"), "tags is one str"),
])  # fmt: skip
def test_bad_input_to_the_crf(call, says):
    with pytest.raises(UnderstandingError, match=re.escape(says)): call()


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("task", TASKS)
def test_a_task_from_records_to_a_folder_and_back(task, fitted, tmp_path):
    ours, some = fitted[task], records("test", 5)
    said = ours.predict(inputs(task, some))
    assert len(said) == 5 and ours.predict(some) == said, "records and texts are read alike"
    assert said == [ours.predict([one])[0] for one in inputs(task, some)] or task is SpanReader, "alone as in a batch"
    ours.save(tmp_path / "task")
    again = task.load(tmp_path / "task")
    assert again.predict(some) == said and again.labels == ours.labels and again.config == ours.config
    for name, score in ours.evaluate(some).items():
        assert 0 <= score.value <= 1 and score.n == 5 and again.evaluate(some)[name].value == score.value
    other = TASKS[(TASKS.index(task) + 1) % 4]
    with pytest.raises(UnderstandingError, match=f"holds a {task.__name__}, and not a {other.__name__}"): other.load(tmp_path / "task")


def test_the_encoder_that_is_given_stays(encoder):
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    for task in TASKS: task.fit(records(n=6), encoder, QUICK)
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items()) and encoder.model.has_scores


def test_equal_seeds_give_equal_tasks_and_leave_the_dice_alone(encoder):
    torch.manual_seed(7)
    first = Encoder.new(["abc"], seed=3), torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), first[1])
    assert all(map(torch.equal, first[0].model.state_dict().values(), Encoder.new(["abc"], seed=3).model.state_dict().values()))
    a, b = (EntityTagger.fit(records(), encoder, QUICK) for _ in range(2))
    assert all(map(torch.equal, a.net.state_dict().values(), b.net.state_dict().values()))


def test_a_frozen_encoder_does_not_move(encoder):
    task = TextClassifier.fit(records(), encoder, TaskConfig(epochs=2, frozen=True))
    there = encoder.model.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in task.net.body.state_dict().items())
    assert all(p.requires_grad for p in task.net.parameters()), "it can be trained on"


def test_a_task_without_an_encoder_makes_one():
    some = [{"text": text, "label": label} for text, label in (("buy now", "spam"), ("see you at noon", "mail")) * 4]
    task = TextClassifier.fit(some, config=TaskConfig(epochs=30, lr=5e-3))
    assert task.predict(["buy now", "see you at noon"]) == ["spam", "mail"] and isinstance(task.tokenizer, ByteTokenizer)
    assert task.probabilities(["buy now"]).shape == (1, 2) and np.isclose(task.probabilities(["buy now"]).sum(), 1)
    assert task.predict([]) == [] and task.probabilities([]).shape == (0, 2)


@pytest.mark.parametrize("crf", [True, False])
def test_a_tagger_learns_names(crf):
    some = [{"text": f"{a} met {b} today", "entities": [(0, len(a), "PER"), (len(a) + 5, len(a) + 5 + len(b), "PER")]}
            for a, b in itertools.permutations(("Ann Lee", "Bob", "Carl", "Di Fox"), 2)]
    tagger = EntityTagger.fit(some, config=TaskConfig(epochs=25, lr=5e-3, batch_size=4, crf=crf))
    assert tagger.evaluate(some)["F1"].value > 0.9
    assert tagger.predict(["", "   "]) == [[], []]


def test_a_long_text_is_read_to_its_end(encoder, fitted):
    "Windows: the tags of a text of three contexts are those of its parts, far from the seams."
    windows = understanding._windows
    for n, most in ((1, 5), (5, 5), (6, 5), (100, 8), (17, 16)):
        parts = windows(n, most)
        assert parts[0][0] == 0 and parts[-1][1] == n and all(stop - start <= most for start, stop in parts)
        assert all(b <= c for (_, c), (b, _) in zip(parts, parts[1:])), "no gap"
    long = " ".join(r["text"] for r in records("test", 8))
    assert len(encoder.tokenizer.encode(long)) > 2 * encoder.model.config.context_length
    for task in TASKS: assert len(fitted[task].predict([(long, "Who?") if task._prompt else long])) == 1
    scored = fitted[EntityTagger]._scored([long])[0][2]
    assert len(scored) > 2 and scored[-1][0].stop == len(encoder.tokenizer.encode(long))


def test_an_answer_behind_the_first_window_is_learned_and_found():
    text = "x " * 60 + "the key is red"
    some = [{"text": text, "question": "which", "answer": (text.index("red"), len(text))},
            {"text": "the key is blue " + "x " * 60, "question": "which", "answer": (11, 15)}]
    reader = SpanReader.fit(some * 4, config=TaskConfig(epochs=40, lr=5e-3, max_tokens=48, batch_size=4))
    assert [a.text for a in reader.predict(some)] == ["red", "blue"]
    for a, r in zip(reader.predict(some), some): assert r["text"][a.start : a.end] == a.text and 0 < a.probability <= 1


def test_any_right_answer_counts(fitted):
    r = records("test", 1)[0]
    said = fitted[SpanReader].predict([r])[0].text
    assert fitted[SpanReader].evaluate([{**r, "answers": ["nothing of the kind", said]}])["exact match"].value == float(bool(said))
    assert fitted[SpanReader].predict([("", "Who?")])[0] == (0, 0, "", 0.0)


def test_spans_that_tokens_cut_are_widened():
    task = EntityTagger(Encoder(Transformer(TransformerConfig(12, 8, 1, 2, kind="encoder")), CharTokenizer("ab ")), ["X"])
    known = understanding._Known("ab a", "", [(0, 2, "X"), (3, 4, "X")])
    ids, offsets = task._tokens("ab a")
    [row] = task._rows(ids, "", "it")
    assert [task.tags[i] for i in task._target(known, offsets, row)] == ["B-X", "I-X", "O", "B-X"]


def test_chinese_names():
    some = records(n=8, lang="zh")
    tagger = EntityTagger.fit(some, Encoder.new([r["text"] for r in some], 300, d_model=16, n_layer=1, n_head=2), QUICK)
    for r, spans in zip(some, tagger.predict(some)): assert all(0 <= a < b <= len(r["text"]) for a, b, _ in spans)


@pytest.mark.parametrize("call, says", [
    (lambda e: TextClassifier.fit([], e), "There are no records"),
    (lambda e: TextClassifier.fit([{"text": "a", "label": "x"}] * 3, e), "All 3 records have the label 'x'"),
    (lambda e: TextClassifier.fit([{"text": "a"}], e), "Record 0 has no 'label'; it has text"),
    (lambda e: TextClassifier.fit([{"text": 1, "label": "x"}], e), "The 'text' of record 0 is a int, not a str"),
    (lambda e: TextClassifier.fit(["a"], e), "Record 0 is a str: give dictionaries"),
    (lambda e: TextClassifier.fit("a", e), "records is one str"),
    (lambda e: EntityTagger.fit([{"text": "", "entities": []}, {"text": "ab", "entities": []}], e), "None of the 2 records"),
    (lambda e: TextClassifier.fit(records(), "model"), "encoder is a str: give a Encoder"),
    (lambda e: TextClassifier.fit(records(), e, 3), "config is a int"),
    (lambda e: TextClassifier(e, ["a", "a"]), "labels are different texts"),
    (lambda e: TextClassifier(e, ["a"]), "a classifier needs at least two"),
    (lambda e: EntityTagger.fit([{"text": "ab", "entities": []}], e), "None of the 1 records has an entity"),
    (lambda e: EntityTagger.fit([{"text": "ab", "entities": [(0, 3, "X")]}], e), "(0, 3, 'X') is no span"),
    (lambda e: EntityTagger.fit([{"text": "ab", "entities": [(0, 2, "X"), (1, 2, "Y")]}], e), "overlap: one tag for each token"),
    (lambda e: EntityTagger.fit([{"text": "ab", "entities": "X"}], e), "The 'entities' of record 0 is a str"),
    (lambda e: SpanReader.fit([{"text": "ab", "question": "?", "answer": (1, 1)}], e), "(1, 1, 'answer') is no span"),
    (lambda e: SpanReader.fit([{"text": "ab", "answer": (0, 1)}], e), "Record 0 has no 'question'"),
    (lambda e: SpanReader(e, ["start", "end"]).predict(["a"]), "Input 0 must be a pair (text, question)"),
    (lambda e: SpanReader(e, ["start", "end"]).predict([("a", "b " * 400)]), "The question of input 0 takes"),
    (lambda e: TextClassifier(e, ["a", "b"]).predict("a text"), "texts is one str: give a list"),
    (lambda e: TextClassifier(e, ["a", "b"]).predict([3]), "Input 0 must be a text"),
    (lambda e: TextClassifier(e, ["a", "b"]).predict(3), "texts is a int: give a list"),
    (lambda e: TextClassifier(e, ["a", "b"]).evaluate([{"text": "a", "label": "c"}]), "'c', which no record had in training"),
    (lambda e: Encoder(Transformer(TransformerConfig(300, 8, 1, 2)), e.tokenizer), "of kind 'decoder'"),
    (lambda e: Encoder(Transformer(TransformerConfig(30, 8, 1, 2, kind="encoder")), e.tokenizer), "do not belong together"),
    (lambda e: Encoder(e.tokenizer, e.tokenizer), "model is a BPE, not a Transformer"),
    (lambda e: TaskConfig(epochs=0), "epochs=0"),
    (lambda e: TaskConfig(lr=-1.0), "lr=-1.0"),
    (lambda e: TaskConfig(max_tokens=3), "max_tokens=3 must be at least 8"),
    (lambda e: TaskConfig(pooling="last"), "There is no pooling='last'"),
    (lambda e: Marked("ab", [(0, 3, "X")]), "(0, 3, 'X') is no span"),
    (lambda e: Marked("ab", 3), "spans is a int"),
])  # fmt: skip
def test_bad_input_is_told_in_a_sentence(call, says, encoder):
    with pytest.raises(LmbookError, match=re.escape(says)): call(encoder)


def test_a_folder_that_is_none(tmp_path, fitted):
    with pytest.raises(UnderstandingError, match="cannot be read .* give a folder that `save` wrote"): TextClassifier.load(tmp_path)
    fitted[TextClassifier].save(tmp_path / "task")
    path = tmp_path / "task" / "task.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    for change, says in (
        ("[]", "is not what `save` writes"), ("{", "cannot be read"),
        (json.dumps({**about, "config": {"epoch": 1}}), "Did you mean epochs"),
        (json.dumps({**about, "labels": ["a"]}), "at least two"),
        (json.dumps({**about, "labels": [*about["labels"], "new"]}), "made by another architecture"),
    ):
        path.write_text(change, encoding="utf-8")
        with pytest.raises((UnderstandingError, CheckpointError), match=says): TextClassifier.load(tmp_path / "task")
    path.write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / "task" / "head" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError): TextClassifier.load(tmp_path / "task")


# ---------------------------------------------------------------- marks


def test_marks_in_brackets_and_in_colour():
    marked = Marked("John Lindley\nleft <b>", [(0, 12, "PER"), (0, 4, "GIVEN"), (18, 21, "&")], [(2, 7, "X")], title="<t>")
    assert repr(marked) == "<t>: [[Jo{hn]GIVEN Li}X missedndley]PER\nleft [<b>]&"
    page = marked._repr_html_()
    assert "<b>&lt;t&gt;</b>" in page and "&lt;b&gt;" in page and "<br>left" in page and "title=\"&amp;\"" in page
    assert page.count("<span") == page.count("</span>") and page.count("<sup") == 4 and "script" not in page
    plain = re.sub(r"<sup.*?</sup>|<b>.*?</b> |<(?!br)[^>]*>", "", page).replace("<br>", "\n")
    assert plain == "John Lindley\nleft &lt;b&gt;"
    assert repr(Marked("", [])) == "" and repr(Marked("a", [])) == "a"


def test_the_score_of_entities_is_that_of_seqeval(fitted):
    seqeval = pytest.importorskip("seqeval.metrics")
    some, tagger = records("test", 10), fitted[EntityTagger]

    def rows(all_: list) -> list[list[str]]: # one tag for each character
        found = []
        for r, spans in zip(some, all_):
            row = ["O"] * len(r["text"])
            for a, b, kind in spans: row[a:b] = [f"B-{kind}", *[f"I-{kind}"] * (b - a - 1)]
            found.append(row)
        return found

    said = [[(a, b, k) for a, b, k in r["entities"] if (a + b) % 3] for r in some]  # some of the truth, and one that is wrong
    said[0].append((1, 2, "LOC")) if not any(a <= 1 < b for a, b, _ in said[0]) else None
    assert span_f1(said, [r["entities"] for r in some]).value == pytest.approx(
        seqeval.f1_score(rows([r["entities"] for r in some]), rows(said)))
    assert tagger.evaluate(some)["F1"].value == span_f1(tagger.predict(some), [r["entities"] for r in some]).value


def test_the_benchmark_widens_spans_to_words():
    from benchmarks.understanding import in_words, nearest_phrase, nearest_sentence

    r = {"words": [(0, 4), (5, 12), (13, 17)]}
    assert in_words(r, [(2, 6, "X"), (12, 13, "Y"), (14, 15, "Z")]) == [(0, 2, "X"), (2, 3, "Z")]
    q = {"text": "It rained. Ann Lee won 12 games in 1998.", "question": "How many games did Ann Lee win?"}
    assert nearest_sentence(q) == "Ann Lee won 12 games in 1998." and nearest_phrase(q) == "12"


def test_the_benchmarks_statements_give_nothing_away_but_with_their_text():
    from collections import Counter

    from benchmarks.understanding import MOODS, statements

    made = statements(list(SmallWorld(SmallWorldConfig(limit=6)).documents("train", 60)), 0)
    assert set(Counter(r["label"] for r in made).values()) == {len(made) // 3} and len(made) > 60
    kind = {word: words for words in MOODS for word in words}
    seen: dict[str, Counter] = {"follows": Counter(), "contradicts": Counter()}
    for r in made:
        who, said = r["statement"].split()[0], kind[r["statement"].split()[-1].rstrip(".")]
        told = next(words for words in MOODS if set(words) & set(re.findall(r"\w+", r["text"])))
        sunny, told_sunny = MOODS.index(said) < 2, MOODS.index(told) < 2
        if r["label"] == "follows": assert said == told
        if r["label"] == "contradicts": assert sunny != told_sunny
        is_hero = re.match(rf"(Everyone in \w+ knew |In \w+ there lived an? \w+ called )?{who}\b", r["text"])
        assert (is_hero is None) == (r["label"] == "open")
        if r["label"] in seen: seen[r["label"]][said] += 1
    assert seen["follows"] == seen["contradicts"], "a mood says nothing of the label"


def test_the_benchmarks_pairs_of_words():
    from benchmarks.understanding import crossed

    assert crossed({"statement": "A b.", "text": "c d."})["text"] == "Aofc Aofd Aofcd bofc bofd bofcd"


def test_the_files_of_a_task_are_those_of_the_chapter(fitted, tmp_path):
    fitted[EntityTagger].save(tmp_path / "names")
    found = sorted(str(Path(p).relative_to(tmp_path / "names")) for p in (tmp_path / "names").rglob("*") if p.is_file())
    assert found == ["config.json", "head/model.safetensors", "model.safetensors", "task.json", "tokenizer.json"]
