"""Objectives: published examples, other libraries, invariants of every task on random rows, bad input, and faults that are noticed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmbook.objectives as objectives
from lmbook.batches import IGNORE, Batch, Examples, TokenStream
from lmbook.cache import KVCache
from lmbook.objectives import (
    BlankInfilling,
    Causal,
    Guesses,
    Marks,
    Masked,
    ObjectiveError,
    PrefixLM,
    PrefixTransformer,
    SpanCorruption,
    SpanMasked,
    Words,
    model_for,
    prefix_mask,
    pseudo_log_probs,
    random_spans,
    rectangle,
    rows_of,
)
from lmbook.tokenization import BPE, SPECIALS, CharTokenizer, WordTokenizer, jieba_words
from lmbook.training import TrainConfig, Trainer, mean_loss, next_token_loss
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted

V = 60
MARKS = Marks(V, mask_id=40, start_id=41, end_id=42, sentinels=tuple(range(43, 59)), specials=(0, 1, 2, 3))
CONFIG = TransformerConfig(V, d_model=16, n_layer=2, n_head=2, context_length=64)
TASKS = (
    Causal(), Masked(MARKS), Masked(MARKS, rate=.5, cover=1., swap=0.), SpanMasked(MARKS), PrefixLM(), PrefixLM(share=.5),
    BlankInfilling(MARKS), SpanCorruption(MARKS), BlankInfilling(MARKS, rate=.6, mean=1., longest=4),
)  # fmt: skip
ROWS = st.lists(st.lists(st.integers(4, 39), min_size=2, max_size=20), min_size=1, max_size=4)
MANY = settings(max_examples=60, deadline=None)


def named(task: object) -> str: return type(task).__name__


def dice(seed: int = 0) -> np.random.Generator: return np.random.default_rng(seed)


def rows_at_random(B: int = 8, T: int = 40, seed: int = 0) -> list[list[int]]: return dice(seed).integers(4, 40, (B, T)).tolist()


# ---------------------------------------------------------------- published examples


def test_the_example_of_t5():
    text = "Thank you for inviting me to your party last week"
    words = WordTokenizer.train([text])
    marks = Marks.of(words, sentinels=3)
    gone = [word in ("for", "inviting", "last") for word in text.split()]
    batch = SpanCorruption(marks).laid_out([words.encode(text)], [gone])
    x, y, z = marks.sentinels
    code = dict(zip(text.split(), words.encode(text)))
    assert batch.source is not None
    assert batch.source[0].tolist() == [code[w] if w in code else w for w in ("Thank", "you", x, "me", "to", "your", "party", y, "week")]
    assert batch.targets[0].tolist() == [x, code["for"], code["inviting"], y, code["last"], z]
    assert batch.ids[0].tolist() == [marks.start_id, *batch.targets[0, :-1].tolist()] and batch.tokens == 6


def figure_of_glm(module=objectives):
    task = module.BlankInfilling(module.Marks(20, mask_id=10, start_id=11, end_id=12))
    for seed in range(20):
        batch = task.laid_out([[1, 2, 3, 4, 5, 6]], [[0, 0, 1, 0, 1, 1]], dice(seed))
        if batch.ids[0, 6] == 5: return batch


def test_the_figure_of_glm():
    batch = figure_of_glm()
    assert batch.ids.tolist() == [[1, 2, 10, 4, 10, 11, 5, 6, 11, 3]]
    assert batch.targets.tolist() == [[IGNORE] * 5 + [5, 6, 12, 3, 12]]
    assert (batch.positions + 1).tolist() == [[1, 2, 3, 4, 5, 5, 5, 5, 3, 3]]
    assert batch.types.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 1, 2]]
    assert batch.prefix.tolist() == [[True] * 5 + [False] * 5] and batch.segments is None
    in_order = BlankInfilling(Marks(20, mask_id=10, start_id=11, end_id=12)).laid_out([[1, 2, 3, 4, 5, 6]], [[0, 0, 1, 0, 1, 1]])
    assert in_order.ids[0, 5:].tolist() == [11, 3, 11, 5, 6]


def test_both_orders_of_two_spans_come():
    task = BlankInfilling(Marks(20, mask_id=10, start_id=11, end_id=12))
    first = [int(task.laid_out([[1, 2, 3, 4, 5, 6]], [[0, 0, 1, 0, 1, 1]], dice(s)).ids[0, 6]) for s in range(400)]
    assert set(first) == {3, 5} and abs(first.count(3) / 400 - .5) < 4 * .5 / 20


def test_masks_as_transformers_makes_them():
    collators = pytest.importorskip("transformers.data.data_collator")
    hf = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(V)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w3"))
    theirs = hf.PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="w40", pad_token="w0", unk_token="w3")
    collate = collators.DataCollatorForLanguageModeling(theirs, mlm=True, mlm_probability=.15)
    rows = torch.tensor(rows_at_random(400, 50))
    torch.manual_seed(0)
    other = collate([{"input_ids": row} for row in rows.tolist()])
    ours = Masked(MARKS)(rows, dice())
    n = rows.numel()

    def shares(read: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[float, int]]:
        asked = targets != -100
        k = int(asked.sum())
        masks, kept = int((asked & (read == 40)).sum()), int((asked & (read == rows)).sum())
        return {"asked": (k / n, n), "masks": (masks / k, k), "kept": (kept / k, k), "random": ((k - masks - kept) / k, k)}

    mine, his = shares(ours.ids, ours.targets), shares(other["input_ids"], other["labels"])
    for name, p in (("asked", .15), ("masks", .8), ("kept", .1), ("random", .1)):
        for share, k in (mine[name], his[name]): assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / k) + .1 / 36, (name, share)
    for read, targets in ((ours.ids, ours.targets), (other["input_ids"], other["labels"])):
        assert torch.equal(torch.where(targets == -100, read, targets), rows)


def test_a_whole_word_is_hidden_as_one():
    "A word is hidden as one. (The pinned transformers has no DataCollatorForWholeWordMask to compare with.)"
    bpe = BPE.train(["the documentation of the documented generators and the generation of documents " * 3], 290)
    row = bpe.encode("the documentation of generators and documented documents " * 40)
    marks, words = Marks.of(bpe), Words(bpe)
    batch = Masked(marks, words=words)([row], dice(1))
    starts = words(np.array([row]), np.ones((1, len(row)), dtype=bool))[0]
    hidden = (batch.targets[0] != IGNORE).numpy()
    word = starts.cumsum()
    assert all(len(set(hidden[word == w])) == 1 for w in set(word)) and 0 < hidden.mean() < .4
    assert abs(hidden[starts].mean() - .15) < 4 * math.sqrt(.15 * .85 / starts.sum())
    assert len(row) > 1.3 * starts.sum()  # there are words of several pieces


# ---------------------------------------------------------------- what holds of every task


@pytest.mark.parametrize("task", TASKS, ids=named)
@MANY
@given(rows=ROWS, seed=st.integers(0, 99))
def test_a_task_asks_what_was_there(task, rows, seed):
    batch, again = task(rows, dice(seed)), task(rows, dice(seed))
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.targets, again.targets)
    assert batch.tokens == int((batch.targets != IGNORE).sum()) > 0
    there = torch.ones_like(batch.ids) if batch.segments is None else batch.segments
    assert (batch.targets[there == 0] == IGNORE).all() and int(batch.ids.min()) >= 0
    for b, row in enumerate(rows):
        asked = batch.targets[b][batch.targets[b] != IGNORE].tolist()
        if isinstance(task, Masked):
            read, said = batch.ids[b, : len(row)].tolist(), batch.targets[b, : len(row)].tolist()
            assert [r if t == IGNORE else t for r, t in zip(read, said)] == row
        elif isinstance(task, Causal | PrefixLM): assert asked == row[len(row) - len(asked) :]
        elif isinstance(task, SpanCorruption):
            assert batch.source is not None and batch.source_segments is not None
            source, names = batch.source[b][batch.source_segments[b] > 0].tolist(), set(MARKS.sentinels)
            spans: dict[int, list[int]] = {}
            for id in asked:
                if id in names: spans[last := id] = []
                else: spans[last].append(id)
            assert spans[asked[-1]] == [] and [x for id in source for x in spans.get(id, [id])] == row
        else:
            text = batch.ids[b][batch.prefix[b]].tolist()
            written: dict[int, list[int]] = {}
            for t in range(len(text), batch.ids.shape[1]):
                said = int(batch.targets[b, t])
                if there[b, t] and said != MARKS.end_id: written.setdefault(int(batch.positions[b, t]), []).append(said)
            assert [x for at, id in enumerate(text) for x in (written[at] if id == MARKS.mask_id else [id])] == row
            assert int(batch.types.max()) < task.types


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_padding_changes_no_loss(task):
    "A row costs in company what it costs alone."
    torch.manual_seed(0)
    model = model_for(task, CONFIG).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .2)
    rows = [rows_at_random(1, 30)[0], rows_at_random(1, 9, 1)[0]]
    both = task(rows, dice())
    with torch.no_grad():
        together = task.loss(model, both)
        alone = [task.loss(model, _row(both, b)) for b in range(2)]
    assert together[1] == sum(n for _, n in alone)
    torch.testing.assert_close(together[0], sum(loss for loss, _ in alone), rtol=1e-9, atol=1e-9)


def _row(batch: Batch, b: int) -> Batch:
    "One row of a batch, its padding cut off."
    def cut(x, mask): return None if x is None else x[b : b + 1, : int(mask[b].sum())]

    there = torch.ones_like(batch.ids) if batch.segments is None else batch.segments
    more = {name: cut(getattr(batch, name), there) for name in ("positions", "prefix", "types") if getattr(batch, name, None) is not None}
    if batch.source is not None: more |= {"source": cut(batch.source, batch.source_segments), "source_segments": None}
    return type(batch)(cut(batch.ids, there), cut(batch.targets, there), **more)


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_the_trainer_takes_it_and_goes_on_where_it_stood(task):
    stream = TokenStream(np.array(rows_at_random(1, 700)[0]), batch_size=4, length=24)
    guesses = task.on(stream, seed=3)
    assert len(guesses) == len(stream) and guesses.count(2) == stream.count(2)
    first, second = list(guesses), list(guesses)
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(first, second))  # anew in each epoch
    for a, b in zip(first, guesses.read(0)): assert torch.equal(a.ids, b.ids) and torch.equal(a.targets, b.targets)
    again = task.on(stream, seed=3)
    it = iter(again)
    next(it)
    later = task.on(stream, seed=3)
    later.load_state_dict(again.state_dict())
    assert torch.equal(next(iter(later)).ids, first[1].ids)
    model = model_for(task, CONFIG)
    config = TrainConfig(steps=2)
    history = Trainer(model, task.on(stream), config, loss=task.loss, evaluate=lambda m: mean_loss(m, guesses, task.loss)).fit()
    assert math.isfinite(history.best)


@pytest.mark.parametrize("task", [t for t in TASKS if not t.both_ways], ids=named)
def test_the_usual_loss_is_the_same(task):
    model, batch = model_for(task, CONFIG).eval(), task(rows_at_random(3, 12), dice())
    assert task.loss(model, batch)[0] == next_token_loss(model, batch)[0]


@settings(max_examples=100, deadline=None)
@given(
    n=st.lists(st.integers(0, 60), min_size=1, max_size=6), rate=st.floats(.01, .99), p=st.floats(.05, .95), longest=st.integers(1, 12),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_spans(n, rate, p, longest, seed):
    law = p * (1 - p) ** np.arange(longest)
    hidden = random_spans(n, rate, law / law.sum(), dice(seed))
    assert hidden.shape == (len(n), max(n))
    for size, row in zip(n, hidden):
        assert not row[size:].any() and (size == 0 or row.any()) and (size < 2 or not row[:size].all())
        runs = [len(run) for run in "".join("x" if h else " " for h in row).split()]
        assert max(runs, default=0) <= longest and sum(runs) <= max(1, round(size * rate))
        if rate < .3 and size: assert sum(runs) == max(1, round(size * rate)) or longest == 1 or sum(runs) > 0


def test_spans_stand_anywhere():
    hidden = random_spans([12] * 20_000, .25, [0, 0, 1.], dice())
    starts = hidden.argmax(1)
    assert (hidden.sum(1) == 3).all()
    for at in range(10): assert abs((starts == at).mean() - .1) < 4 * math.sqrt(.09 / 20_000)


def test_the_first_part_of_a_row_is_any():
    batch = PrefixLM()(np.full((6000, 5), 7), dice())
    given_ = batch.prefix.sum(1)
    for n in range(1, 5): assert abs((given_ == n).float().mean() - .25) < 4 * math.sqrt(.1875 / 6000)


def test_a_span_shares_its_fate():
    batch = SpanMasked(MARKS, rate=.3, cover=.5, swap=0.)(rows_at_random(50, 40), dice())
    seen = 0
    for read, targets in zip(batch.ids, batch.targets):
        asked = (targets != IGNORE).tolist()
        masks = (read == MARKS.mask_id).tolist()
        for t in range(39):
            if asked[t] and asked[t + 1]: seen += 1; assert masks[t] == masks[t + 1]
    assert seen > 100


def test_marks_are_never_hidden_and_never_drawn():
    rows = np.array(rows_at_random(50, 30))
    rows[:, ::7] = 2
    for task in (Masked(MARKS, rate=.9, cover=.1, swap=.8), SpanMasked(MARKS, rate=.5, cover=0., swap=1.)):
        batch = task(rows, dice())
        assert (batch.targets[:, ::7] == IGNORE).all()
        wrong = batch.ids[(batch.targets != IGNORE) & (batch.ids != torch.from_numpy(rows))]
        drawn = set(wrong.tolist()) - {MARKS.mask_id}
        assert drawn and drawn <= {*range(4, 40), 59}  # the ids that are no marks
    for task in (BlankInfilling(MARKS), SpanCorruption(MARKS)):
        assert not task.hide(rows, np.ones(rows.shape, dtype=bool), dice())[:, ::7].any()


def test_one_token_at_least_is_hidden():
    assert all(Masked(MARKS, rate=.01)([[5, 6]], dice(s)).tokens == 1 for s in range(20))


# ---------------------------------------------------------------- the model with a prefix


LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu"}


@pytest.mark.parametrize("changes", [{}, LLAMA, {"positions": "alibi"}, {"types": 3}], ids=str)
def test_without_a_prefix_it_is_a_transformer(changes):
    torch.manual_seed(0)
    config = TransformerConfig(V, d_model=16, n_layer=2, n_head=2, context_length=64, **changes)
    plain, both = Transformer(config).double().eval(), PrefixTransformer(config).double().eval()
    for p in plain.parameters(): torch.nn.init.normal_(p, 0, .3)
    both.load_state_dict(plain.state_dict())
    x = torch.tensor(rows_at_random(3, 20))
    there = (torch.arange(20) < torch.tensor([20, 13, 7])[:, None]).long()
    none = torch.zeros_like(x, dtype=torch.bool)
    with torch.no_grad():
        for told in ({}, {"segments": there}):
            wanted = plain(x, **told)
            mask = there.bool() if told else torch.ones_like(x, dtype=torch.bool)
            assert torch.equal(both(x, **told), wanted)
            torch.testing.assert_close(both(x, prefix=none, **told)[mask], wanted[mask])
        whole = both(x, prefix=~none)
        encoder = Transformer(TransformerConfig(**{**config.to_dict(), "kind": "encoder"})).double().eval()
        encoder.load_state_dict({name.replace("decoder.", "encoder."): p for name, p in plain.state_dict().items()})
        torch.testing.assert_close(whole, encoder(x))  # and with nothing but a prefix, an encoder


def test_who_sees_whom():
    torch.manual_seed(0)
    model = PrefixTransformer(CONFIG).double().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .3)
    x, prefix = torch.tensor(rows_at_random(1, 10)), (torch.arange(10) < 4)[None]
    allowed = prefix_mask(prefix)[0, 0]
    with torch.no_grad():
        before = model(x, prefix=prefix)
        for s in range(10):
            other = x.clone()
            other[0, s] = 39 if x[0, s] != 39 else 38
            moved = (model(other, prefix=prefix) - before).abs().amax(-1)[0] > 1e-9
            assert torch.equal(moved, allowed[:, s])


def test_two_texts_in_a_row_do_not_see_each_other():
    segments, prefix = torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.tensor([[True, True, False, True, False, False]])
    mask = prefix_mask(prefix, segments)[0, 0]
    assert not mask[:3, 3:].any() and not mask[3:, :3].any() and mask[0, 1] and not mask[0, 2] and mask[4, 3] and not mask[:, 5].any()


def test_pseudo_log_probs_are_those_of_one_gap_each():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(V, d_model=16, n_layer=1, n_head=2, context_length=32, kind="encoder"))
    for p in model.parameters(): torch.nn.init.normal_(p, 0, .3)
    rows = [rows_at_random(1, 7)[0], rows_at_random(1, 4, 1)[0]]
    model.train()
    found = pseudo_log_probs(model, rows, 40, batch_size=3)
    assert model.training and [len(f) for f in found] == [7, 4]
    model.eval()
    for row, nats in zip(rows, found):
        for t in range(len(row)):
            asked = torch.tensor([row])
            asked[0, t] = 40
            with torch.no_grad(): wanted = model(asked)[0, t].log_softmax(-1)[row[t]]
            assert abs(wanted - nats[t]) < 1e-5


# ---------------------------------------------------------------- words


def test_words_of_english_pieces():
    text = "The documentation, it's generated; x1 and\nThe  end 42nd."
    bpe = BPE.train([text * 3], 262)
    ids, there = rectangle([bpe.encode(text)])
    starts = Words(bpe)(ids, there)[0]
    parts: list[str] = []
    for id, start in zip(ids[0].tolist(), starts):
        piece = bpe.decode([id])
        if start: parts.append(piece)
        else: parts[-1] += piece
    assert "".join(parts) == text and " documentation" in parts and "The" in parts and " generated" in parts and "," in parts


def test_words_of_chinese():
    text = "我喜欢阅读书籍"
    for tokenizer in (CharTokenizer.train([text]), BPE.train([text * 2], 262)):  # whole characters, and bytes
        ids, there = rectangle([tokenizer.encode(text)])
        with pytest.raises(ObjectiveError, match="Chinese, where no space marks a word: give Words.*cut=jieba_words"):
            Words(tokenizer)(ids, there)
        pytest.importorskip("jieba")
        starts = Words(tokenizer, cut=jieba_words)(ids, there)[0]
        ends = np.cumsum([len(tokenizer.id_to_bytes(i)) for i in ids[0].tolist()])
        firsts = {0, 3, 9, 15}  # bytes: 我 | 喜欢 | 阅读 | 书籍
        begin = ends - [len(tokenizer.id_to_bytes(i)) for i in ids[0].tolist()]
        assert [bool(s) for s in starts] == [int(b) in firsts for b in begin]


def test_a_mark_is_a_word_of_its_own_and_ends_one():
    words = WordTokenizer.train(["a b c"])
    marks = Marks.of(words)
    ids, there = rectangle([[4, marks.mask_id, 5, 2, 6]])
    assert Words(words)(ids, there).all()
    assert Words(words, cut=lambda text: [text])(ids, there)[0].tolist() == [True, True, False, True, False]


# ---------------------------------------------------------------- marks


def test_marks_of_a_tokenizer():
    plain = WordTokenizer.train(["a b c"])
    marks = Marks.of(plain, sentinels=2)
    n = plain.vocab_size
    assert (marks.mask_id, marks.start_id, marks.end_id, marks.sentinels, marks.vocab_size) == (n, n + 1, n + 2, (n + 3, n + 4), n + 5)
    own = WordTokenizer.train(["a b c"], specials=(*SPECIALS, "[MASK]", "<extra_id_0>"))
    found = Marks.of(own, sentinels=2)
    assert found.mask_id == 4 and found.sentinels[0] == 5 and found.sentinels[1] == found.vocab_size - 1
    assert set(found.ordinary) == set(range(6, own.vocab_size))


BAD = {
    "rate=0": lambda: Masked(MARKS, rate=0),
    "rate=1.0 must be": lambda: Masked(MARKS, rate=1.),
    "rate=1.5 must be": lambda: SpanCorruption(MARKS, rate=1.5),
    "rate=nan must be": lambda: BlankInfilling(MARKS, rate=math.nan),
    "together|at most 1": lambda: Masked(MARKS, cover=.8, swap=.3),
    "share=1 must be": lambda: PrefixLM(share=1),
    "longest=0": lambda: SpanMasked(MARKS, longest=0),
    "mean=9.* longest=3": lambda: BlankInfilling(MARKS, mean=9., longest=3),
    "needs mask_id": lambda: Masked(Marks(20)),
    "needs start_id": lambda: BlankInfilling(Marks(20, mask_id=5)),
    "each need a sentinel": lambda: SpanCorruption(Marks(20, mask_id=5, sentinels=(7,))),
    "no token: marks run from 0 to 19": lambda: Marks(20, mask_id=20),
    "Each sentinel is the name of one gap": lambda: Marks(20, sentinels=(5, 5)),
    "nothing could be hidden": lambda: Marks(2, mask_id=1),
    "fewer than two tokens": lambda: PrefixLM()([[4], [5, 6]], dice()),
    "nothing to guess it from": lambda: Causal()([[4]]),
    "all their tokens are marks": lambda: Masked(MARKS)([[1, 2, 0]], dice()),
    "The id 60 is no token": lambda: Masked(MARKS)([[5, 60]], dice()),
    "There is no token in these rows": lambda: Causal()([[], []]),
    "give \\[ids\\] for one text": lambda: rectangle("abc"),
    "Encode it first": lambda: rectangle(["abc"]),
    "need 4 sentinels; there are 2": lambda: SpanCorruption(Marks(20, sentinels=(15, 16))).laid_out([[1, 2, 3, 4, 5]], [[1, 0, 1, 0, 1]]),
    "A span has 3 tokens, and longest=2": lambda: BlankInfilling(MARKS, mean=1., longest=2).laid_out([[5, 6, 7, 8]], [[1, 1, 1, 0]]),
    "shape of the rows": lambda: SpanCorruption(MARKS).laid_out([[5, 6, 7]], [[1, 0]]),
    "add up to 1": lambda: random_spans([5], .5, [.5, .4], dice()),
    "An objective is needed": lambda: Guesses("masked", None),
    "Batches are needed": lambda: Causal().on([1, 2]),
    "with pack=False": lambda: rows_of(Batch(*torch.ones(2, 1, 4).long(), segments=torch.tensor([[1, 1, 2, 2]]))),
    "not of pairs": lambda: rows_of(Batch(*torch.ones(2, 1, 4).long(), source=torch.ones(1, 3).long())),
    "what a decoder reads": lambda: PrefixTransformer(TransformerConfig(V, kind="encoder")),
    "True where all may look": lambda: prefix_mask(torch.ones(1, 3)),
    "leave out cache=": lambda: PrefixTransformer(CONFIG)(torch.ones(1, 3).long(), prefix=torch.ones(1, 3).bool(), cache=KVCache(2)),
    "shape of the ids": lambda: PrefixTransformer(CONFIG)(torch.ones(1, 3).long(), prefix=torch.ones(1, 2).bool()),
    "`pseudo_log_probs` needs a model": lambda: pseudo_log_probs(Transformer(CONFIG), [[5]], 40),
}  # fmt: skip


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_explained(says):
    with pytest.raises(ObjectiveError, match=says): BAD[says]()


@pytest.mark.parametrize("task", [Causal(), Masked(MARKS), PrefixLM(), BlankInfilling(MARKS), SpanCorruption(MARKS)], ids=named)
def test_a_model_of_another_kind_is_refused(task):
    batch = task(rows_at_random(2, 9), dice())
    for kind in ("decoder", "encoder", "encoder-decoder"):
        model = Transformer(TransformerConfig(**{**CONFIG.to_dict(), "kind": kind}))
        if kind != task.kind:
            says = f"{named(task)} needs a model of kind '{task.kind}'.*of kind '{kind}'"
            with pytest.raises(ObjectiveError, match=says): task.loss(model, batch)
        elif task.both_ways:
            with pytest.raises(ObjectiveError, match="needs a PrefixTransformer"): task.loss(model, batch)
    if task.marks is not None:
        small = model_for(task, CONFIG)
        small.vocab_size = 30
        with pytest.raises(ObjectiveError, match="has 60 ids; the model knows 30"): task.loss(small, batch)


def test_rows_shorter_than_a_span_lose_what_they_can():
    for task in (SpanMasked(MARKS, p=.01), BlankInfilling(MARKS, mean=8.), SpanCorruption(MARKS, mean=8.)):
        ids, there = rectangle([[5, 6, 7], [8, 9]])
        assert task.hide(ids, there, dice()).sum(1).tolist() == [1, 1]


def test_rows_come_back_from_batches():
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    batch = next(Examples(rows, batch_size=3, shuffle=False).read())
    assert [row.tolist() for row in rows_of(batch)] == rows
    assert [row.tolist() for row in rows_of(batch, last=False)] == [row[:-1] for row in rows]
    stream = TokenStream(list(range(9)), batch_size=2, length=4, shuffle=False)
    assert rows_of(next(stream.read())).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


# ---------------------------------------------------------------- faults


def test_a_written_token_at_the_wrong_place_is_noticed(monkeypatch):
    right = "positions[b, at + 1], types[b, at + 1] = where, i + 2"
    faulty = planted(objectives, right, right.replace("= where,", "= where + i,"), monkeypatch)
    assert (figure_of_glm(faulty).positions + 1).tolist() != [[1, 2, 3, 4, 5, 5, 5, 5, 3, 3]]


def test_a_prefix_that_sees_its_answer_is_noticed(monkeypatch):
    faulty = planted(objectives, "prefix=_tensor(t < given[:, None])", "prefix=_tensor(t <= given[:, None])", monkeypatch)
    for module, good in ((objectives, True), (faulty, False)):
        batch = module.PrefixLM()([[11, 12, 13, 14, 15, 16, 17]], dice(1))
        first = int((batch.targets[0] != IGNORE).nonzero()[0])
        mask = prefix_mask(batch.prefix)[0, 0]
        assert bool(mask[first, first + 1]) != good  # the answer to position t is read at t + 1


def test_random_tokens_among_the_marks_are_noticed(monkeypatch):
    faulty = planted(objectives, "rng.choice(self.marks.ordinary,", "rng.choice(self.marks.vocab_size,", monkeypatch)
    marks = faulty.Marks(V, mask_id=40, specials=tuple(range(41, 60)))
    batch = faulty.Masked(marks, rate=.5, cover=0., swap=1.)(rows_at_random(20, 40), dice())
    assert int(batch.ids.max()) >= 40
