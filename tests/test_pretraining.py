"""Pre-training: a budget that is kept, bodies that turn round, vocabularies that grow, mixtures; and each refusal with its sentence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import lmbook.pretraining as pretraining
from lmbook.batches import BatchError, Batches, TokenStream
from lmbook.objectives import BlankInfilling, Causal, Marks, Masked, PrefixLM, PrefixTransformer, SpanCorruption
from lmbook.pretraining import Mixture, PretrainingError, as_kind, continue_on, grow_vocabulary, pretrain
from lmbook.training import TrainConfig, Trainer, mean_loss, next_token_loss
from lmbook.transformer import Classifier, ClassifierConfig, Transformer, TransformerConfig, flops
from tests.faults import planted

TEXT = np.random.default_rng(0).integers(1, 20, 600)
MARKS = Marks(26, mask_id=20, start_id=21, end_id=22, sentinels=(23, 24, 25))
BODY = TransformerConfig(26, 16, n_layer=1, n_head=2, context_length=64)


def texts(seed: int = 0, shift: int = 0) -> TokenStream: return TokenStream((TEXT + shift) % 20, 4, 12, seed=seed)


def model(seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(replace(BODY, **changes)).eval()


# ---------------------------------------------------------------- the harness

OBJECTIVES = [Causal(), PrefixLM(), Masked(MARKS), BlankInfilling(MARKS), SpanCorruption(MARKS)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_every_objective_spends_the_budget_to_half_a_step(objective):
    first = next(objective.on(texts(), 0).read())
    source = 0 if first.source is None else first.source.shape[1]
    done = pretrain(objective, texts(), BODY, 3.5e7)
    each = 3 * len(first.ids) * flops(done.model.config, first.ids.shape[1], source=source)
    assert done.flops == done.steps * each and abs(done.flops - 3.5e7) <= each / 2
    assert done.model.config.kind == objective.kind and done.history.stopped == "steps"
    objective.check(done.model)


def test_it_is_the_plain_training_and_repeats_itself():
    done = [pretrain(Causal(), texts(), BODY, 2e7, seed=3) for _ in range(2)]
    torch.manual_seed(3)
    plain = Transformer(BODY)
    Trainer(plain, texts(), TrainConfig(steps=done[0].steps, lr=.006, warmup=min(20, done[0].steps - 1), seed=3, device="cpu")).fit()
    for a, b, c in zip(done[0].model.parameters(), done[1].model.parameters(), plain.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(("arguments", "says"), [
    ({"flops": 0}, "flops=0 must be above 0"),
    ({"flops": 1.0}, "A step takes"),
    ({"flops": 1e7, "steps": 3}, "steps= is not for pretrain"),
])  # fmt: skip
def test_budgets_that_cannot_be(arguments, says):
    with pytest.raises(PretrainingError, match=says): pretrain(Causal(), texts(), BODY, **arguments)


# ---------------------------------------------------------------- turned round


@pytest.mark.parametrize("changes", [{}, {"tie": False, "positions": "rotary"}, {"head": "bert", "types": 2}, {"norm_first": False}])
def test_a_body_turned_round_twice_is_itself_and_once_sees_the_other_way(changes):
    one, ids = model(**changes), torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 9
    encoder = as_kind(one, "encoder")
    assert encoder.config.kind == "encoder" and encoder.task == "masked" and not encoder.training
    assert not torch.allclose(encoder(ids)[0, 0], encoder(other)[0, 0]) and torch.equal(one(ids)[0, 0], one(other)[0, 0])
    assert torch.equal(as_kind(encoder, "decoder")(ids), one(ids))
    with torch.no_grad(): next(encoder.parameters()).zero_()  # a copy
    assert next(one.parameters()).abs().sum() > 0


def test_bodies_without_scores_and_prefix_models_turn_too():
    torch.manual_seed(0)
    prefix = PrefixTransformer(BODY).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(as_kind(prefix, "decoder")(ids), prefix(ids))
    body = Classifier(model(), ClassifierConfig(("a", "b"))).body
    assert not as_kind(body, "encoder").has_scores
    assert torch.equal(as_kind(body, "decoder").hidden(ids), body.hidden(ids))


def test_turning_and_growing_leave_the_dice_alone():
    one = model()
    before = torch.get_rng_state()
    as_kind(grow_vocabulary(one, 30, "random"), "encoder")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_decoder_does_not_turn():
    with pytest.raises(PretrainingError, match="has parts that other kinds lack"): as_kind(model(kind="encoder-decoder"), "decoder")
    with pytest.raises(PretrainingError, match="Choose one of: decoder, encoder"): as_kind(model(), "encoder-decoder")


# ---------------------------------------------------------------- grown


@pytest.mark.parametrize("init", ["mean", "random", "pieces"])
@pytest.mark.parametrize("changes", [{}, {"tie": False}, {"head": "bert"}, {"kind": "encoder", "head": "bert", "tie": False}])
def test_what_is_said_of_old_tokens_stays(changes, init):
    one, ids = model(**changes), torch.arange(8)[None]
    pieces = [[1, 2], [3]] if init == "pieces" else None
    grown = grow_vocabulary(one, 28, init, pieces)
    assert grown.vocab_size == grown.config.vocab_size == 28 and type(grown) is type(one) and grown.training == one.training
    torch.testing.assert_close(grown(ids)[..., :26], one(ids), rtol=0, atol=1e-6)
    assert (grown.out.weight is grown.embed.tokens.weight) == one.config.tie
    table, old = grown.embed.tokens.weight[26:], one.embed.tokens.weight
    if init == "mean": torch.testing.assert_close(table, old.mean(0).expand(2, -1))
    if init == "pieces": torch.testing.assert_close(table, torch.stack([(old[1] + old[2]) / 2, old[3]]))
    if init == "random":
        assert not torch.equal(table, grow_vocabulary(one, 28, init, seed=1).embed.tokens.weight[26:])
        assert torch.equal(table, grow_vocabulary(one, 28, init).embed.tokens.weight[26:])
    assert grown(torch.tensor([[26, 27]])).shape == (1, 2, 28)


def test_a_grown_model_learns_its_new_tokens():
    grown = grow_vocabulary(model(), 46)
    new = TokenStream(TEXT + 26, 4, 12)
    before = mean_loss(grown, new)
    continue_on(grown, new, 30, lr=.02)
    assert mean_loss(grown, new) < before - .2


@pytest.mark.parametrize(("arguments", "says"), [
    ((26,), "The model knows 26 tokens; vocab_size=26 adds none"),
    ((20,), "vocab_size=20 adds none"),
    ((28, "middle"), "Choose one of: mean, random, pieces"),
    ((28, "pieces"), "pieces= goes with"),
    ((28, "mean", [[1], [2]]), "pieces= goes with"),
    ((28, "pieces", [[1]]), "2 new tokens and pieces for 1"),
    ((28, "pieces", [[1], []]), "spelled by at least one old one"),
    ((28, "pieces", [[1], [26]]), "26"),
])  # fmt: skip
def test_vocabularies_that_cannot_grow(arguments, says):
    with pytest.raises(PretrainingError, match=says): grow_vocabulary(model(), *arguments)


def test_a_body_without_scores_does_not_grow():
    body = model()
    body.drop_scores()
    with pytest.raises(PretrainingError, match="grow it before drop_scores"): grow_vocabulary(body, 30)


def test_a_vocabulary_that_loses_its_old_rows_would_be_found(monkeypatch):
    faulty = planted(pretraining, "state[name] = torch.cat([rows, added])", "state[name] = torch.cat([added, rows])", monkeypatch)
    one, ids = model(), torch.arange(8)[None]
    with pytest.raises(AssertionError): torch.testing.assert_close(faulty.grow_vocabulary(one, 28)(ids)[..., :26], one(ids))


# ---------------------------------------------------------------- mixed


@pytest.mark.parametrize("shares", [(.5, .5), (.9, .1), (0., 1.), (.2, .3, .5)])
def test_shares_are_kept_within_four_standard_errors(shares):
    n = 4000
    mixture = Mixture([texts(i) for i in range(len(shares))], shares, length=n)
    for epoch in (0, 1):
        counts = np.bincount([source for source, _, _ in mixture.plan(epoch)], minlength=len(shares))
        for count, share in zip(counts, shares): assert abs(count - n * share) <= 4 * math.sqrt(n * share * (1 - share))


def test_each_source_is_read_in_its_own_order_over_epochs_of_both():
    mixture, orders = Mixture([texts(1), texts(2, 5)], [.7, .3], length=40), {0: [], 1: []}
    for epoch in range(3):
        for source, its_epoch, place in mixture.plan(epoch): orders[source].append((its_epoch, place))
    for source, order in orders.items():
        each = len(mixture.sources[source].plan(0))
        assert order == [divmod(i, each) for i in range(len(order))]
    fresh, found = texts(1), []
    wanted = [b.ids for _ in range(4) for b in fresh]
    for _ in range(3): found += [batch.ids for (source, _, _), batch in zip(mixture._plan(mixture.epoch), mixture) if source == 0]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_a_mixture_goes_on_where_it_was_stopped():
    def made() -> Mixture: return Mixture([texts(1), texts(2, 5).map(lambda b: b)], [.6, .4], length=25, seed=7)

    whole = made()
    batches = [b.ids for _ in range(2) for b in whole]
    part = made()
    part.load_state_dict({"epoch": 1, "position": 6, "batches": 25, "seed": 7})
    rest = [batch.ids for batch in part]
    assert len(rest) == 19 and all(torch.equal(a, b) for a, b in zip(batches[31:], rest))
    with pytest.raises(BatchError, match="not the data of the checkpoint"):
        Mixture([texts(1)], [1.], length=24, seed=7).load_state_dict({"epoch": 1, "position": 6, "batches": 25, "seed": 7})


def test_a_training_that_is_stopped_ends_as_one_that_was_not():
    def trainer(m: Transformer, stop: int | None) -> Trainer:
        def callback(t: Trainer, event: str, row: object) -> None:
            if event == "step" and t.step == stop: t.stop("interrupted")

        batches = Mixture([texts(1), texts(2, 5)], [.5, .5], length=7)
        return Trainer(m, batches, TrainConfig(steps=20, device="cpu"), callbacks=[callback])

    through, halves = model(), model()
    trainer(through, None).fit()
    broken = trainer(halves, 9)
    broken.fit()
    assert broken.step == 9
    broken.fit()
    for a, b in zip(through.parameters(), halves.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize(("shares", "options", "says"), [
    ([.5, .6], {}, "The shares add up to 1.1, not to 1"),
    ([1.5, -.5], {}, "A share cannot be negative: -0.5"),
    ([1.], {}, "There are 2 sources and 1 shares"),
    ([.5, .5], {"length": 0}, "length"),
    ([.5, .5], {"seed": -1}, "seed"),
])  # fmt: skip
def test_mixtures_that_cannot_be(shares, options, says):
    with pytest.raises(PretrainingError, match=says): Mixture([texts(), texts()], shares, **options)


def test_sources_are_batches():
    with pytest.raises(PretrainingError, match="There is no source"): Mixture([], [])
    with pytest.raises(PretrainingError, match="A source is Batches, not a list"): Mixture([[1, 2]], [1.])  # type: ignore[list-item]
    class Empty(Batches):
        def plan(self, epoch): return []

    with pytest.raises(PretrainingError, match="Source 0 has no batches"): Mixture([Empty()], [1.], length=2).plan(0)


def test_a_mixture_that_starts_its_sources_anew_each_epoch_would_be_found(monkeypatch):
    faulty = planted(pretraining, "used, found = self._used[epoch].tolist(), []", "used, found = self._used[0].tolist(), []", monkeypatch)
    mixture = faulty.Mixture([texts(1), texts(2)], [.5, .5], length=5)
    assert mixture.plan(1)[0][1:] == (0, 0)  # the source's first batch again
    assert Mixture([texts(1), texts(2)], [.5, .5], length=50).plan(1)[0][1:] != (0, 0)


# ---------------------------------------------------------------- further training


def test_replay_keeps_what_a_further_training_forgets():
    one = model()
    counting = TokenStream(np.arange(600) % 10, 4, 12)
    backwards = TokenStream(10 + (-np.arange(600)) % 10, 4, 12)
    continue_on(one, counting, 60, lr=.02)
    known = mean_loss(one, counting)
    lost, kept = as_kind(one, "decoder"), as_kind(one, "decoder")
    continue_on(lost, backwards, 60, lr=.02)
    continue_on(kept, backwards, 60, lr=.02, old=counting, replay=.2)
    assert mean_loss(lost, counting) > known + 1 > mean_loss(kept, counting) and mean_loss(kept, backwards) < 1


def test_without_replay_it_is_the_plain_training():
    a, b = model(), model()
    continue_on(a, texts(), 12, seed=2)
    Trainer(b, texts(), TrainConfig(steps=12, lr=.003, warmup=10, seed=2, device="cpu"), loss=next_token_loss).fit()
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize(("arguments", "says"), [((0,), "steps"), ((5, 1.0), "replay"), ((5, -.1), "replay")])
def test_further_trainings_that_cannot_be(arguments, says):
    steps, *replay = arguments
    with pytest.raises(PretrainingError, match=says): continue_on(model(), texts(), steps, old=texts(1), replay=replay[0] if replay else .1)
