"""Explanations of single predictions: equal to captum and to enumeration, held against a grammar, in a browser; and what goes wrong."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmbook.grammar import Grammar
from lmbook.interpretability import (
    METHODS,
    Attribution,
    AttributionView,
    InterpretabilityError,
    Question,
    attention_maps,
    attention_scores,
    faithfulness,
    found_at,
    gradient_x_input,
    input_marginalization,
    integrated_gradients,
    log_odds,
    occlusion,
    other_weights,
    patch,
    questions,
    record,
    shapley,
    token_embedding,
    view,
)  # fmt: skip
from lmbook.recurrent_lm import RecurrentLM, RecurrentLMConfig
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import WordTokenizer
from lmbook.transformer import Transformer, TransformerConfig

V = 23
GRAMMAR = """
story
  1 > opening talk end
opening
  1 | {hero} was {job.a}. | {hero}是{job}。 | hero ~ given; job ~ job
talk
  1 | the {_job[_num.form]} who {_deal.past} the {_other[_many.form]} {_num.was} {_state}. | {_deal}{_many.who}{_other}的{_num.who}{_job}很{_state}。 | _num ~ num; _job ~ job; _deal ~ deal; _many ~ num; _other ~ job; _state ~ state
end
  1 | {hero.gender.she} was {_state}. | {hero.gender.zh}很{_state}。 | _state ~ state
"""  # noqa: E501


def make(seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(V, **{"d_model": 16, "n_layer": 2, "n_head": 2, "context_length": 16, **changes}))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.2)
    return model.double()


@pytest.fixture(scope="module")
def world() -> tuple[SmallWorld, WordTokenizer]:
    world = SmallWorld(SmallWorldConfig(limit=4))
    world.grammar = Grammar(GRAMMAR, world.grammar.lexicon, 4)
    return world, WordTokenizer.train(list(world.texts("train", n=400)))


asked = st.builds(
    lambda ids, right, wrong: Question(tuple(ids), right, tuple(w for w in wrong if w != right)),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=7), st.integers(0, V - 1), st.sets(st.integers(0, V - 1), max_size=4),
)


# ---------------------------------------------------------------- equal to captum


def embedded(model: nn.Module, question: Question):
    "The model as a function of vectors, as captum wants it; and the vectors."
    table = token_embedding(model, question.ids)

    def f(x):
        with patch(model, {name: lambda out: x for name, m in model.named_modules() if m is table}):
            return log_odds(model(torch.tensor([question.ids]).expand(len(x), -1))[:, -1], question)

    return f, table(torch.tensor([question.ids])).detach(), table.weight.detach().mean(0)


@settings(max_examples=25, deadline=None)
@given(asked, st.integers(0, 3), st.sampled_from([{}, {"positions": "rotary", "norm": "rms", "tie": False}]))
def test_gradients_are_captums(question, seed, changes):
    captum = pytest.importorskip("captum.attr")
    model = make(seed, **changes)
    f, x, base = embedded(model, question)
    theirs = captum.IntegratedGradients(f).attribute(x, base.expand_as(x).clone(), n_steps=24, method="gausslegendre")
    ours = integrated_gradients(model, question, steps=24)
    np.testing.assert_allclose(ours.scores, theirs.sum(-1)[0].detach(), atol=1e-8)
    theirs = captum.InputXGradient(f).attribute(x.clone().requires_grad_())
    np.testing.assert_allclose(gradient_x_input(model, question).scores, theirs.sum(-1)[0].detach(), atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(asked, st.integers(0, 3))
def test_occlusion_is_captums_ablation(question, seed):
    captum = pytest.importorskip("captum.attr")
    model = make(seed)
    f, x, base = embedded(model, question)
    mask = torch.arange(len(question.ids))[None, :, None].expand_as(x)
    with torch.no_grad(): theirs = captum.FeatureAblation(f).attribute(x, base.expand_as(x).clone(), feature_mask=mask)
    np.testing.assert_allclose(occlusion(model, question).scores, theirs[0, :, 0], atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(asked, st.integers(0, 3))
def test_integrated_gradients_are_complete(question, seed):
    assert abs(integrated_gradients(make(seed), question, steps=200).gap) < 1e-4


# ---------------------------------------------------------------- equal to enumeration


@settings(max_examples=15, deadline=None)
@given(asked.filter(lambda q: len(q.ids) <= 5), st.integers(0, 3))
def test_shapley_values_by_all_orders(question, seed):
    model, T = make(seed), len(question.ids)
    f, x, base = embedded(model, question)
    gains = np.zeros(T)
    orders = list(itertools.permutations(range(T)))
    for order in orders:
        rows = torch.stack([torch.stack([x[0, t] if t in order[:i] else base for t in range(T)]) for i in range(T + 1)])
        gains[list(order)] += np.diff(f(rows).detach()) / len(orders)
    exact = shapley(model, question, rounds=0)
    np.testing.assert_allclose(exact.scores, gains, atol=1e-8)
    assert abs(exact.gap) < 1e-8
    sampled = shapley(model, question, rounds=3, seed=seed)
    assert abs(sampled.gap) < 1e-8  # efficiency in every order


def test_sampled_shapley_values_come_nearer():
    model, question = make(), Question((1, 5, 3, 2, 8, 4), 7)
    exact = shapley(model, question, rounds=0).scores
    far, near = (np.abs(shapley(model, question, rounds=n).scores - exact).max() for n in (2, 100))
    assert near < far and near < 0.1
    drawn = shapley(model, question, rounds=100)
    assert (np.abs(drawn.scores - exact) < 5 * drawn.errors + 1e-9).all()


def test_an_order_is_taken_backwards_too():
    "Two words have two orders, each the reverse of the other: a single round is exact."
    for seed in range(4):
        question = Question((1, 5), 7)
        exact = shapley(make(), question, rounds=0).scores
        np.testing.assert_allclose(shapley(make(), question, rounds=1, seed=seed).scores, exact, atol=1e-9)


def test_what_nobody_reads_gets_nothing():
    "A model that sees the last word only."
    model = make(window=1, n_layer=1)
    for name in ("gradient x input", "integrated gradients", "occlusion", "shapley", "marginalization"):
        scores = METHODS[name](model, Question((1, 5, 3, 2), 7, (3,))).scores
        np.testing.assert_allclose(scores[:3], 0, atol=1e-9)
        assert abs(scores[3]) > 1e-6


def test_marginalization_by_hand():
    model, q = make(), Question((1, 5, 3), 7, (2, 9))
    with torch.no_grad():
        logits = model(torch.tensor([q.ids]))[0]
        full = log_odds(logits[-1], q)
        wanted = [0.0]
        for t in (1, 2):
            p = logits[t - 1].softmax(-1)
            rows = torch.tensor([[*q.ids[:t], w, *q.ids[t + 1 :]] for w in range(V)])
            wanted.append(float((p * (full - log_odds(model(rows)[:, -1], q))).sum()))
    np.testing.assert_allclose(input_marginalization(model, q, options=V).scores, wanted, atol=1e-9)


# ---------------------------------------------------------------- any model, left as it was


def test_a_recurrent_model_can_be_asked_too():
    torch.manual_seed(0)
    model = RecurrentLM(RecurrentLMConfig(V, 8, 8, 1)).double()
    question = Question((1, 5, 3, 2), 7, (3,))
    assert abs(integrated_gradients(model, question, steps=100).gap) < 1e-4
    assert abs(shapley(model, question, rounds=1).gap) < 1e-9
    with pytest.raises(InterpretabilityError, match="Attention"): attention_scores(model, question)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_left_as_it_was(name):
    model = make(dropout=0.5).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    METHODS[name](model, Question((1, 5, 3), 7, (3,)))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_even_where_something_fails():
    model = make()
    with pytest.raises(ZeroDivisionError), record(model, "embed") as kept, patch(model, {"embed": lambda x: x + 1}):
        model(torch.tensor([[1, 2]]))
        assert kept["embed"].shape == (1, 2, 16)
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())


def test_record_and_patch_see_what_a_module_gives():
    model, ids = make().eval(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(ids)
        with record(model, "decoder.blocks.0") as kept: model(ids)
        with patch(model, {"decoder.blocks.0": lambda x: kept["decoder.blocks.0"]}): same = model(torch.tensor([[4, 5, 6]]))
        with patch(model, {"decoder.blocks.1.mlp": torch.zeros_like}): less = model(ids)
    torch.testing.assert_close(same, plain)
    assert not torch.allclose(less, plain)


# ---------------------------------------------------------------- attention


def test_attention_maps_are_those_of_pytorch():
    "Of the first layer, by hand."
    model, ids = make(n_layer=1).eval(), [3, 1, 4, 1]
    block = model.decoder.blocks[0]
    x = block.attention_norm(model.embed(torch.tensor([ids]), torch.arange(4)))
    q, k = (layer(x).view(4, 2, 8).transpose(0, 1) for layer in (block.attention.query, block.attention.key))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(attention_maps(model, ids)[0], scores.softmax(-1))


def test_the_rollout_of_one_layer():
    model, q = make(n_layer=1), Question((3, 1, 4), 1)
    row = attention_maps(model, q.ids)[0].mean(0)[-1].numpy()
    np.testing.assert_allclose(attention_scores(model, q, "rollout").scores, (row + np.eye(3)[-1]) / 2)
    np.testing.assert_allclose(attention_scores(model, q, "mean").scores, row)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 5), st.integers(0, 10**6))
def test_other_weights_keep_the_mean(S, d, seed):
    rng = np.random.default_rng(seed)
    a, values = rng.dirichlet(np.ones(S)), rng.normal(size=(S, d))
    least = int(rng.integers(S))
    b = other_weights(a, values, least)
    np.testing.assert_allclose(b @ values, a @ values, atol=1e-8)
    assert b.min() >= 0 and abs(b.sum() - 1) < 1e-8 and b[least] <= a[least] + 1e-9
    if S > d + 1: assert b[least] < a[least]  # with more vectors than numbers there is room


# ---------------------------------------------------------------- the truth


def test_questions_know_what_decides(world):
    small, tokenizer = world
    text = "Anna was a chef. The waiters who helped the baker were careful. She was cautious."
    number, gender = questions(small.grammar, [text], tokenizer)

    def word(i: int) -> str: return tokenizer.decode([i]).strip()

    assert [word(number.ids[p]) for p in number.deciding] == ["waiters"] and word(number.right) == "were"
    assert [word(i) for i in number.wrong] == ["was"]
    assert tokenizer.decode(number.other) == "Anna was a chef. The waiter who helped the baker"
    assert [word(gender.ids[p]) for p in gender.deciding] == ["Anna"] and word(gender.right) == "She"
    with pytest.raises(InterpretabilityError, match="no English text"): questions(small.grammar, ["Anna slept."], tokenizer)


def test_the_grammar_allows_nothing_else(world):
    "With a wrong answer the text is impossible; with the other decision the other answer is possible and the old one is not."
    small, tokenizer = world
    for text in small.texts("test", n=30):
        for q in questions(small.grammar, [text], tokenizer):
            rest = tokenizer.encode(text, bos=True)[len(q.ids) + 1 :]

            def possible(ids, word, rest=rest): return small.log_prob(tokenizer.decode([*ids[1:], word, *rest]).strip()) > -np.inf

            assert possible(q.ids, q.right)
            assert not any(possible(q.ids, w) for w in q.wrong)
            if q.kind == "_num.was": assert possible(q.other, q.wrong[0]) and not possible(q.other, q.right)


def test_all_of_small_world_can_be_asked():
    world = SmallWorld()
    texts = list(world.texts("test", n=8))
    found = questions(world.grammar, texts, WordTokenizer.train(texts))
    assert {"thing.en", "hero.gender.she", "_num.is"} <= {q.kind for q in found}
    assert all(q.deciding and q.right not in q.wrong and q.wrong for q in found)


def orders(scores: list[int], deciding: set[int]) -> tuple[float, float]:
    "Hits and reciprocal ranks over all orders that scores allow."
    found = [o for o in itertools.permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(o, o[1:]))]
    ranks = [min(o.index(d) for d in deciding) for o in found]
    return float(np.mean([r == 0 for r in ranks])), float(np.mean([1 / (r + 1) for r in ranks]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.data())
def test_found_at_is_the_mean_over_ties(scores, data):
    deciding = data.draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    assert found_at(np.array(scores), sorted(deciding)) == pytest.approx(orders(scores, deciding))


def test_faithfulness_of_a_method_that_knows(world):
    small, tokenizer = world
    found = questions(small.grammar, list(small.texts("test", n=6)), tokenizer)
    model = Transformer(TransformerConfig(tokenizer.vocab_size, d_model=8, n_layer=1, n_head=1, context_length=64))
    right = faithfulness(model, found, lambda m, q: Attribution("knows", np.eye(len(q.ids))[q.deciding[0]]))
    assert right.hits.value == right.reciprocal_rank.value == 1
    blind = faithfulness(model, found, lambda m, q: Attribution("blind", np.zeros(len(q.ids))))
    assert blind.hits.value == pytest.approx(np.mean([len(q.deciding) / (len(q.ids) - 1) for q in found]))
    assert blind.hits.n == len(found) and blind.hits.error < 0.1
    texts = [q.text for q in found]
    for score in right:  # a text is a group
        groups = score.groups.tolist()
        assert [texts.index(t) for t in texts] == [groups.index(g) for g in groups]


def test_the_questions_of_a_text_are_not_independent():
    "Two texts of ten questions each, all found in one and none in the other: the error is that of two cases, not of twenty."
    asked = [Question((1, 2, 3), 4, deciding=(1 + text,), text=text) for text in (0, 1) for _ in range(10)]
    hits = faithfulness(make(), asked, lambda m, q: Attribution("first", np.array([0.0, 1.0, 0.0]))).hits
    assert hits.value == 0.5 and hits.error == pytest.approx(0.5)


# ---------------------------------------------------------------- bad input


BAD = [
    (lambda: Question((), 1), "at least one token"),
    (lambda: Question((1, 2), 3, (3,)), "both right and wrong"),
    (lambda: Question((1, -2), 3), "below 0"),
    (lambda: Question((1, 2), 3, deciding=(2,)), "positions"),
    (lambda: Question((1, 2), 3, other=(1,)), "word by word"),
    (lambda: occlusion(make(), Question((1, V), 3)), "no token"),
    (lambda: occlusion(make(), Question((1, 2), V)), "no token"),
    (lambda: occlusion(nn.Linear(2, 3), Question((1, 2), 3)), "nn.Embedding"),
    (lambda: occlusion(make(), Question((1, 2), 3), torch.zeros(3)), "vector of 16"),
    (lambda: integrated_gradients(make(), Question((1, 2), 3), steps=0), "at least 1"),
    (lambda: integrated_gradients(make(), Question((1, 2), 3), steps=1000), "512"),
    (lambda: shapley(make(), Question((1,) * 13, 3), rounds=0), "subsets"),
    (lambda: other_weights(np.array([0.5, 0.6]), np.zeros((2, 1)), 0), "sum to 1"),
    (lambda: other_weights(np.array([0.5, np.nan]), np.zeros((2, 1)), 0), "finite"),
    (lambda: found_at(np.array([1, np.nan]), [0]), "NaN"),
    (lambda: found_at(np.array([1.0, 2]), []), "None of the candidates"),
    (lambda: faithfulness(make(), [], "occlusion"), "no question"),
    (lambda: faithfulness(make(), [Question((1, 2), 3)], "occlusion"), "deciding"),
    (lambda: faithfulness(make(), [Question((1, 2), 3, deciding=(1,))], "ocklusion"), "Did you mean 'occlusion'"),  # type: ignore[arg-type]
    (lambda: record(make(), "embd").__enter__(), "Did you mean embed"),
    (lambda: AttributionView(("a", "b"), np.zeros((2, 3))), "shape"),
    (lambda: AttributionView(("a",), np.full((1, 1), np.nan)), "finite"),
]


@pytest.mark.parametrize("call, says", BAD)
def test_bad_input(call, says):
    with pytest.raises(InterpretabilityError, match=says): call()


def test_a_patch_of_another_shape():
    model = make()
    with pytest.raises(InterpretabilityError, match="shape"), patch(model, {"embed": lambda x: x[:, :1]}): model(torch.tensor([[1, 2]]))


# ---------------------------------------------------------------- the page to click on

pages = st.lists(st.text(min_size=0, max_size=6), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(pages, st.integers(0, 10**6))
def test_any_words_make_a_page(words, seed):
    scores = np.random.default_rng(seed).normal(size=(len(words), len(words)))
    page = AttributionView(tuple(words), scores, tuple(words))
    text = page._repr_html_()
    assert text == page._repr_html_() and "<script" not in text and "://" not in text.split("</style>")[0]
    assert text.count("<input") == len(words) == text.count("<label")


@pytest.mark.browser
def test_a_click_shows_the_reasons(tmp_path: Path):
    pytest.importorskip("playwright")
    from tests import browser as br

    scores = np.zeros((4, 4))
    scores[2, 0], scores[2, 1], scores[3, 1] = 1.0, -0.5, 0.2
    page = AttributionView(("Anna", "<was>", "a", "chef"), scores, ("none", "one", "two & a", "three"))
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><main>{page._repr_html_()}</main>", encoding="utf-8")
    with br.launched() as browser, br.served(tmp_path) as base, br.window(browser, base) as window:
        shown = window.open("page.html")

        def colours() -> list[str]:
            return [shown.locator("label").nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in range(4)]

        nothing = "rgba(0, 0, 0, 0)"
        assert colours()[0] == nothing and colours()[1].startswith("rgba(33, 115, 191")
        assert shown.locator("p:visible").inner_text() == "three"
        shown.locator("label").nth(2).click()
        assert colours() == ["rgba(33, 115, 191, 0.6)", "rgba(204, 64, 51, 0.3)", nothing, nothing]
        assert shown.locator("p:visible").inner_text() == "two & a"
        shown.keyboard.press("ArrowLeft")
        assert shown.locator("p:visible").inner_text() == "one" and shown.locator("label").nth(1).inner_text() == "<was>"
        assert br.contrast_problems(shown) == [] and br.width_problems(shown) == []
        assert [p for p in window.problems if "favicon" not in p and "404" not in p] == []


def test_a_view_of_a_text(world):
    _, tokenizer = world
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(tokenizer.vocab_size, d_model=8, n_layer=1, n_head=1, context_length=64))
    shown = view(model, "Anna was a chef.", tokenizer)
    assert shown.words == ("<bos>", "Anna", "was", "a", "chef", ".") and len(shown.notes) == 6
    np.testing.assert_array_equal(shown.scores, np.tril(shown.scores, -1))
    assert abs(shown.scores).max() > 0
    with pytest.raises(InterpretabilityError, match="2 to 400"): view(model, "", tokenizer)
