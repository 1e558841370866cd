"""Preferences: losses held against enumeration and against trl, and one clear error for what nothing can be learned from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lmbook.preferences as preferences
from lmbook.core import evaluating
from lmbook.preferences import (
    DPO,
    Answers,
    Experience,
    PairBatches,
    Pairs,
    PolicyConfig,
    PolicyLoss,
    PreferencesError,
    RewardModel,
    Rollouts,
    best_of,
    check_reference,
    dpo_loss,
    grpo_advantages,
    kl,
    learn_from_rewards,
    mean_best_of,
    pair_loss,
    ppo_loss,
    reduce_losses,
    reinforce_loss,
    reward_loss,
    sample_answers,
    score,
    sequence_log_probs,
    token_kl,
    token_log_probs,
)  # fmt: skip
from lmbook.training import TrainConfig, Trainer
from lmbook.transformer import Transformer, TransformerConfig
from tests.faults import planted

V, L = 4, 3  # tokens and length of the enumerable world
ALL = list(itertools.product(range(V), repeat=L))  # 64 answers


def small(seed: int = 0, vocab_size: int = V, kind: str = "decoder") -> Transformer:
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(vocab_size, d_model=8, n_layer=1, n_head=2, context_length=16, kind=kind, tie=False)).double()  # type: ignore[arg-type]


def every(prompt: tuple[int, ...] = (0,)) -> Answers: return Answers.of([prompt] * len(ALL), ALL)


def worth(seed: int = 3) -> Tensor: return torch.randn(len(ALL), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(gradients: tuple[Tensor, ...]) -> Tensor: return torch.cat([g.flatten() for g in gradients])


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True))


# ---------------------------------------------------------------- log-probabilities


def test_probabilities_of_all_answers_add_up_to_one():
    with torch.no_grad(): total = sequence_log_probs(small(), every()).exp().sum()
    assert abs(total - 1) < 1e-12


def test_padding_and_company_change_nothing():
    model, prompts, answers = small(), [[0], [1, 2, 3], [2, 2]], [[1, 2, 3, 0], [3], [0, 1]]
    together = sequence_log_probs(model, Answers.of(prompts, answers))
    alone = torch.cat([sequence_log_probs(model, Answers.of([p], [a])) for p, a in zip(prompts, answers)])
    torch.testing.assert_close(together, alone)


def test_token_log_probs_stand_where_the_tokens_stand():
    model, batch = small(), Answers.of([[0, 1], [2]], [[3, 2], [1]])
    found = token_log_probs(model, batch)
    assert found.shape == batch.ids.shape and found[~batch.mask].abs().max() == 0
    by_hand = model(batch.ids[:1])[0, 1].log_softmax(-1)[3]
    torch.testing.assert_close(found[0, 2], by_hand)


def test_answers_give_back_what_they_were_made_of():
    prompts, answers = [[1], [2, 3]], [[0, 0], [1]]
    batch = Answers.of(prompts, answers)
    assert batch.prompts() == prompts and batch.answers() == answers and batch.lengths.tolist() == [2, 1] and len(batch) == 2
    assert batch[[1]].answers() == [[1]] and batch.to("cpu").prompts() == prompts


# ---------------------------------------------------------------- the policy gradient


@pytest.mark.parametrize("baseline", [0.0, 5.0])
def test_the_expected_policy_gradient_is_the_gradient_of_the_expected_reward(baseline):
    model, batch, r = small(), every(), worth()
    log_p = token_log_probs(model, batch)
    p = log_p.sum(-1).exp()
    exact = gradient((p * r).sum(), model)
    losses = reinforce_loss(log_p, r - baseline).masked_fill(~batch.mask, 0.0).sum(-1)
    torch.testing.assert_close(-gradient((p.detach() * losses).sum(), model), exact, atol=1e-10, rtol=1e-8)


def test_leave_one_out_and_centred_groups_are_the_exact_gradient_up_to_a_factor():
    "All groups of two answers, each with its probability. Centred: (G - 1) / G of the gradient; leave one out: all of it."
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    r = torch.randn(5, dtype=torch.float64)
    exact = torch.autograd.grad((z.softmax(0) * r).sum(), z)[0]
    groups = torch.tensor(list(itertools.product(range(5), repeat=2)))
    for kind, factor in (("leave_one_out", 1.0), ("centred", 0.5)):
        log_p = z.log_softmax(0)[groups]
        weight = log_p.detach().sum(1).exp()
        advantages = grpo_advantages(r[groups], kind)  # type: ignore[arg-type]
        loss = (weight * reinforce_loss(log_p, advantages).mean(1)).sum()
        torch.testing.assert_close(-torch.autograd.grad(loss, z)[0], factor * exact)


@pytest.mark.parametrize("over", ["token", "sequence", "constant"])
def test_the_first_step_of_ppo_is_reinforce(over):
    model, batch = small(), Answers.of([[0], [1, 2], [3]], [[1, 2, 3], [0], [2, 2]])
    advantages, log_p = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), token_log_probs(model, batch)
    found = [gradient(reduce_losses(losses, batch.mask, over, 7)[0], model) for losses in
             (reinforce_loss(log_p, advantages), ppo_loss(log_p, log_p.detach(), advantages))]  # fmt: skip
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 1e-6


def test_the_clip_stops_what_pays_and_nothing_else():
    old = torch.tensor([[0.5]]).log()
    for chance, advantage, moves in ((0.7, 1.0, False), (0.7, -1.0, True), (0.3, 1.0, True), (0.3, -1.0, False), (0.55, 1.0, True)):
        log_p = torch.tensor([[chance]]).log().requires_grad_()
        ppo_loss(log_p, old, torch.tensor([advantage])).sum().backward()
        assert (log_p.grad.abs().item() > 0) == moves, (chance, advantage)


def test_ways_to_reduce():
    losses, mask = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), torch.tensor([[True, True, False], [True, False, False]])
    assert reduce_losses(losses, mask) == (7.0, 3)
    assert reduce_losses(losses, mask, "sequence") == (5.5, 2)
    assert reduce_losses(losses, mask, "constant", 10) == (pytest.approx(0.7), 2)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_add_up_to_nothing_in_each_group(rewards):
    for kind in ("grpo", "centred", "leave_one_out"):
        found = grpo_advantages(torch.tensor(rewards, dtype=torch.float64), kind)
        assert found.sum(1).abs().max() < 1e-6 and found.isfinite().all()


def test_a_group_of_equal_rewards_says_exactly_nothing():
    rewards = torch.full((2, 7), 0.1)  # whose mean differs from 0.1 by a last bit
    for kind in ("grpo", "centred", "leave_one_out"): assert grpo_advantages(rewards, kind).abs().max() == 0  # type: ignore[arg-type]


# ---------------------------------------------------------------- KL


@pytest.mark.parametrize("kind, unbiased", [("k1", True), ("k3", True), ("k2", False)])
def test_estimates_of_kl_against_enumeration(kind, unbiased):
    ours, theirs = small(0), small(1)
    for p in theirs.parameters(): p.data *= 3  # far enough to tell
    with torch.no_grad(): a, b = (sequence_log_probs(m, every()) for m in (ours, theirs))
    exact = (a.exp() * (a - b)).sum()
    assert exact > 0.01 and (abs((a.exp() * kl(a, b, kind)).sum() - exact) < 1e-10) == unbiased
    if kind == "k3": assert kl(a, b, kind).min() >= 0


def test_kl_token_by_token_adds_up_to_that_of_answers():
    ours, theirs, batch = small(0), small(1), every()
    with torch.no_grad():
        a, b = (sequence_log_probs(m, batch) for m in (ours, theirs))
        found = (a.exp() * token_kl(ours, theirs, batch).sum(-1)).sum()
        per_token = (a.exp() * kl(token_log_probs(ours, batch), token_log_probs(theirs, batch), "k3").sum(-1)).sum()
    exact = (a.exp() * (a - b)).sum()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(per_token, exact)


# ---------------------------------------------------------------- pairs


def test_dpo_is_least_at_the_closed_form():
    "Over all pairs of 64 answers, weighted as Bradley and Terry's reader chooses: the gradient at ref * exp(r / beta) / Z is zero."
    beta, r = 0.3, worth()
    with torch.no_grad(): ref = sequence_log_probs(small(), every())
    solution = (ref + r / beta).log_softmax(0).requires_grad_()
    w, l = map(torch.tensor, zip(*itertools.permutations(range(len(ALL)), 2)))

    def risk(log_p: Tensor) -> Tensor:
        losses = dpo_loss(log_p[w], log_p[l], ref[w], ref[l], beta)
        return ((r[w] - r[l]).sigmoid() * losses).sum()

    assert torch.autograd.grad(risk(solution), solution)[0].abs().max() < 1e-8
    with torch.no_grad(): assert risk((solution + 0.1 * worth(5)).log_softmax(0)) > risk(solution)
    with torch.no_grad():  # and it is the best policy at that price
        def aim(log_p: Tensor) -> float: return float((log_p.exp() * (r - beta * (log_p - ref))).sum())
        best = aim(solution)
        assert abs(best - beta * (ref + r / beta).logsumexp(0)) < 1e-9
        assert all(aim((solution + 0.1 * worth(seed)).log_softmax(0)) < best for seed in range(20))


def test_dpo_with_the_reference_itself_is_log_two_and_smoothing_mixes():
    x = torch.randn(5)
    torch.testing.assert_close(dpo_loss(x, -x, x, -x), torch.full((5,), math.log(2)))
    one, other = dpo_loss(x, -x, 0 * x, 0 * x, 0.5), dpo_loss(-x, x, 0 * x, 0 * x, 0.5)
    torch.testing.assert_close(dpo_loss(x, -x, 0 * x, 0 * x, 0.5, 0.2), 0.8 * one + 0.2 * other)


def test_reward_loss_is_the_cross_entropy_of_the_first_one_wins():
    a, b = torch.randn(2, 6)
    torch.testing.assert_close(reward_loss(a, b), F.binary_cross_entropy_with_logits(a - b, torch.ones(6), reduction="none"))


def test_pairs_are_learned_by_a_reward_model_and_by_dpo():
    first = small(0, 6).float()
    pairs = Pairs.of([[0]] * 8, [[2, i % 6] for i in range(8)], [[3, i % 6] for i in range(8)])
    judge = RewardModel(first)
    with evaluating(judge): assert judge(pairs.chosen).abs().max() == 0
    before = {k: v.clone() for k, v in first.state_dict().items()}
    Trainer(judge, PairBatches(pairs, 4), TrainConfig(epochs=20, lr=1e-2), loss=pair_loss).fit()
    with evaluating(judge): assert (judge(pairs.chosen) > judge(pairs.rejected)).all()
    assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())  # it learned in a copy
    tuned = small(0, 6).float()
    compared = pairs.with_reference(first, batch_size=3)
    Trainer(tuned, PairBatches(compared, 4), TrainConfig(epochs=20, lr=1e-2), loss=DPO(0.5)).fit()
    with torch.no_grad(): margin = sequence_log_probs(tuned, pairs.chosen) - sequence_log_probs(tuned, pairs.rejected)
    assert (margin > compared.ref_chosen - compared.ref_rejected + 0.5).all()


def test_a_reward_is_read_from_the_last_token_of_its_answer():
    first = small(0, 6).float()
    judge = RewardModel(first)
    nn.init.normal_(judge.head.weight)
    with evaluating(judge):
        together = judge(Answers.of([[0], [1, 2]], [[3], [4, 5, 1]]))
        torch.testing.assert_close(together[:1], judge(Answers.of([[0]], [[3]])))


# ---------------------------------------------------------------- the loop


def likes_two(prompt: list[int], answer: list[int]) -> float: return answer.count(2) / len(answer)


@pytest.mark.parametrize("config", [
    PolicyConfig(4, 8, clip=None, max_new_tokens=3), PolicyConfig(4, 8, updates=3, max_new_tokens=3),
    PolicyConfig(4, 8, advantage="centred", over="constant", beta=0.01, max_new_tokens=3),
], ids=["reinforce", "ppo", "dr-grpo-with-kl"])  # fmt: skip
def test_a_model_learns_what_pays(config):
    model = small(0, 5).float()
    rows = learn_from_rewards(model, [[0], [1]], likes_two, config, 40, lr=2e-2, reference=small(0, 5).float())
    assert len(rows) == 40 and rows[-1]["reward"] > 0.8 > 0.5 > rows[0]["reward"] and rows[-1]["kl"] > rows[0]["kl"] == 0


def test_the_price_holds_it_back():
    away = []
    for beta in (0.0, 1.0):
        model = small(0, 5).float()
        config = PolicyConfig(4, 8, beta=beta, advantage="centred", max_new_tokens=3)
        away.append(learn_from_rewards(model, [[0]], likes_two, config, 30, lr=2e-2, reference=small(0, 5).float())[-1]["kl"])
    assert away[1] < away[0] / 3


def test_old_probabilities_are_left_out_where_they_are_those_of_now():
    model = small(0, 5).float()
    config = PolicyConfig(2, 4, max_new_tokens=3)
    experience = Rollouts(model, [[0], [1]], likes_two, config).draw()
    assert experience.old is None
    old = token_log_probs(model, experience.answers).detach()
    explicit = Experience(experience.answers, experience.rewards, experience.advantages, old)
    for a, b in zip(*(torch.autograd.grad(PolicyLoss(config)(model, e)[0], list(model.parameters())) for e in (experience, explicit))):
        torch.testing.assert_close(a, b)


def test_rollouts_go_on_where_they_stood():
    model = small(0, 5).float()
    one, two = (Rollouts(model, [[0], [1]], likes_two, PolicyConfig(2, 4, max_new_tokens=3)) for _ in range(2))
    one.draw()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.draw().answers.ids, two.draw().answers.ids) and one.rows == two.rows


def test_groups_stand_side_by_side_and_end_with_eos():
    answers = sample_answers(small(0, 5).float(), [[0], [1, 2]], 3, 6, eos_id=4, seed=0)
    assert answers.prompts() == [[0]] * 3 + [[1, 2]] * 3
    assert all(4 not in answer[:-1] and (answer[-1] == 4 or len(answer) == 6) for answer in answers.answers())


def test_best_of_keeps_the_best():
    model = small(0, 5).float()
    every = sample_answers(model, [[0], [1]], 6, 4, seed=1)
    kept, rewards = best_of(model, [[0], [1]], likes_two, 6, 4, seed=1)
    wanted = score(likes_two, every).view(2, 6).amax(1)
    torch.testing.assert_close(rewards, wanted)
    torch.testing.assert_close(score(likes_two, kept), wanted)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.data())
def test_mean_best_of_is_the_mean_over_all_choices(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    by_hand = [max(choice) for choice in itertools.combinations(rewards, n)]
    assert math.isclose(mean_best_of(torch.tensor([rewards]).float(), n), sum(by_hand) / len(by_hand), abs_tol=1e-9)


# ---------------------------------------------------------------- trl


def test_dpo_and_log_probs_are_trls():
    "trl computes the loss within its trainer; the trainer's method is called on what it needs, without a trainer."
    pytest.importorskip("trl", reason="trl is in the extra parity")
    from trl.trainer.utils import selective_log_softmax

    logits, index = torch.randn(3, 5, 7), torch.randint(7, (3, 5))

    def model(ids: Tensor) -> Tensor: return logits

    ids = torch.cat([torch.zeros(3, 1, dtype=torch.long), index], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    torch.testing.assert_close(token_log_probs(model, Answers(ids, mask))[:, 1:], selective_log_softmax(logits, index), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_step_of_trls_dpo_trainer_has_our_loss(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is in the extra parity")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "a", "b", "c", "d", "e"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    size = {"vocab_size": len(words), "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    rows = [("a b", " c d", " e"), ("b", " a", " c c d")]
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, per_device_train_batch_size=2, use_cpu=True, report_to=[], bf16=False,
                         gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip
    trainer = trl.DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad(): theirs = trainer.compute_loss(trainer.model.eval(), inputs)
    ids = [[tokenizer(part)["input_ids"] for part in row] for row in rows]
    pairs = Pairs.of([p for p, _, _ in ids], [[*c, 1] for _, c, _ in ids], [[*r, 1] for _, _, r in ids])
    with torch.no_grad():
        ours, count = DPO(0.3)(model.eval(), pairs.with_reference(reference))
    assert abs(float(ours) / count - float(theirs)) < 1e-6


# ---------------------------------------------------------------- what nothing can be learned from


ONE, TWO = torch.zeros(2), torch.ones(2)
WRONG = {
    "equal answers": (lambda: Pairs.of([[1]], [[2]], [[2]]), "Pair 0: both answers are the same"),
    "other numbers": (lambda: Pairs.of([[1]], [[2]], []), "1 chosen answers and 0 rejected ones"),
    "empty answer": (lambda: Answers.of([[1], [1]], [[2], []]), "Answer 1 is empty"),
    "empty prompt": (lambda: Answers.of([[]], [[2]]), "Prompt 0 is empty"),
    "no answers": (lambda: Answers.of([], []), "There are no answers"),
    "prompts missing": (lambda: Answers.of([[1]], [[2], [3]]), "1 prompts for 2 answers"),
    "text": (lambda: Answers.of(["ab"], [[1]]), "is a text, not ids"),
    "beta 0": (lambda: dpo_loss(ONE, TWO, ONE, TWO, 0.0), "beta=0.0 must be above 0"),
    "beta negative": (lambda: dpo_loss(ONE, TWO, ONE, TWO, -1.0), "beta=-1.0 must be above 0"),
    "beta NaN": (lambda: dpo_loss(ONE, TWO, ONE, TWO, math.nan), "beta=nan must be above 0"),
    "smoothing": (lambda: dpo_loss(ONE, TWO, ONE, TWO, 1.0, 0.5), "at half the pairs say nothing"),
    "clip 0": (lambda: ppo_loss(ONE, ONE, ONE, 0.0), "clip=0.0 must lie between 0 and 1"),
    "clip 1": (lambda: ppo_loss(ONE, ONE, ONE, 1.0), "clip=1.0 must lie between 0 and 1"),
    "clip of a configuration": (lambda: PolicyConfig(clip=2.0), "clip=2.0 must lie between 0 and 1"),
    "reinforce twice": (lambda: PolicyConfig(clip=None, updates=2), "Plain REINFORCE learns once"),
    "a group of one": (lambda: PolicyConfig(group=1), "group=1 must be a whole number, at least 2"),
    "rewards of one answer": (lambda: grpo_advantages(torch.zeros(3, 1)), "two answers or more, not (3, 1)"),
    "reward NaN": (lambda: grpo_advantages(torch.tensor([[0.0, math.nan]])), "The reward of sample (0, 1) is nan"),
    "judge says infinity": (lambda: score(lambda p, a: math.inf, Answers.of([[1]], [[2]])), "The reward of sample (0,) is inf"),
    "vocabulary": (lambda: check_reference(small(), small(vocab_size=9)), "The model has 4 tokens and the reference 9"),
    "vocabulary, KL": (lambda: token_kl(small(), small(vocab_size=9), every()), "The model has 4 tokens and the reference 9"),
    "a price without a reference": (lambda: Rollouts(small(), [[0]], likes_two, PolicyConfig(beta=1.0)), "give reference="),
    "no prompts": (lambda: Rollouts(small(), [], likes_two, PolicyConfig()), "There are no prompts"),
    "ids beyond the vocabulary": (lambda: sequence_log_probs(small(), Answers.of([[0]], [[1, 9]])), "The id 9 is no token"),
    "an encoder": (lambda: sequence_log_probs(small(kind="encoder"), every()), "A policy needs a model that predicts the next token"),
    "no reference": (lambda: DPO()(small(), Pairs.of([[0]], [[1]], [[2]])), "call pairs.with_reference(model)"),
    "n": (lambda: mean_best_of(torch.zeros(1, 3), 4), "n=4 must be from 1 to 3"),
    "kind": (lambda: kl(ONE, TWO, "k4"), "There is no kind='k4'"),  # type: ignore[arg-type]
    "over": (lambda: reduce_losses(torch.zeros(1, 2), torch.ones(1, 2).bool(), "tokens"), "Did you mean 'token'?"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_said_in_a_sentence(what):
    call, sentence = WRONG[what]
    with pytest.raises(PreferencesError) as raised: call()
    assert sentence in str(raised.value)


# ---------------------------------------------------------------- faults

FAULTS = {
    "the reference is forgotten": ("((chosen - ref_chosen) - (rejected - ref_rejected))", "(chosen - rejected)"),
    "pairs the wrong way round": ("margin = beta * (", "margin = -beta * ("),
    "targets are not shifted": ("answers.ids[:, 1:, None]", "answers.ids[:, :-1, None]"),
    "the clip takes the better of both": ("-torch.minimum(ratio * advantages", "-torch.maximum(ratio * advantages"),
    "no clip": ("ratio.clamp(1 - clip, 1 + clip)", "ratio"),
    "advantages of the batch, not of the group": ("rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()"),
    "k3 without its minus": ("ratio.exp() - 1 - ratio", "ratio.exp() - 1"),
    "padding counts": ("losses = losses.masked_fill(~mask, 0.)", "losses = losses * 1"),
    "the best is the worst": ("best = rewards.argmax(1)", "best = rewards.argmin(1)"),
}  # fmt: skip


def checks(module) -> None:
    "What the tests above say, in brief, of a module."
    model, batch, r = small(), every(), worth()
    beta, ref = 0.3, sequence_log_probs(small(), batch).detach()
    assert abs(module.sequence_log_probs(model, module.Answers.of([[0]] * len(ALL), ALL)).exp().sum() - 1) < 1e-9
    solution = (ref + r / beta).log_softmax(0).requires_grad_()
    w, l = map(torch.tensor, zip(*itertools.permutations(range(len(ALL)), 2)))
    risk = ((r[w] - r[l]).sigmoid() * module.dpo_loss(solution[w], solution[l], ref[w], ref[l], beta)).sum()
    assert torch.autograd.grad(risk, solution)[0].abs().max() < 1e-8
    now = torch.tensor([[0.7], [0.3]]).log().requires_grad_()
    module.ppo_loss(now, torch.tensor([[0.5], [0.5]]).log(), torch.tensor([1.0, -1.0])).sum().backward()
    assert now.grad is not None and now.grad.abs().max() == 0
    assert module.grpo_advantages(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "centred").sum(1).abs().max() < 1e-6
    a, b = ref, sequence_log_probs(small(1), batch).detach()
    assert abs((a.exp() * module.kl(a, b, "k3")).sum() - (a.exp() * (a - b)).sum()) < 1e-9
    assert module.reduce_losses(torch.tensor([[1.0, 9.0]]), torch.tensor([[True, False]])) == (1.0, 1)
    kept, rewards = module.best_of(small(0, 5).float(), [[0], [1]], likes_two, 6, 4, seed=1)
    tried = module.sample_answers(small(0, 5).float(), [[0], [1]], 6, 4, seed=1)
    assert torch.equal(rewards, module.score(likes_two, tried).view(2, 6).amax(1))


def test_the_module_passes_its_own_checks(): checks(preferences)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    faulty = planted(preferences, *FAULTS[fault], monkeypatch)
    with pytest.raises(AssertionError): checks(faulty)
