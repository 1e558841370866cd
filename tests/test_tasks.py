"""Tasks: prices against other code, the harness that public tables are made with, files, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmbook.evaluation import Score
from lmbook.language_models import NGram
from lmbook.pretrained import save_pretrained
from lmbook.tasks import (
    METRICS,
    Item,
    TaskError,
    by_kind,
    contamination,
    few_shot,
    log_likelihoods,
    multiple_choice,
    read_task,
    run_task,
    write_answers,
)  # fmt: skip
from lmbook.tokenization import BPE, WordTokenizer
from lmbook.transformer import Transformer, TransformerConfig

ROOT = Path(__file__).parents[1]
TEXTS = ["the cat sat on the mat. the dogs are here, and the cat is there.", "a dog is a dog. 猫在这里。"] * 4
SMALL = {"d_model": 16, "n_layer": 1, "n_head": 2, "norm": "rms", "activation": "swiglu", "positions": "rotary", "bias": False}
PAIRS = [
    ("the cat", " sat on the mat."), ("", "a dog is"), ("the dogs ", "are here"), ("the dogs", " are here"), ("猫", "在这里。"),
    ("the cat is\n\n", " there"), ("a dog", " is a dog. the cat sat on the mat and the dogs are here"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> BPE: return BPE.train(TEXTS, 290)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    torch.manual_seed(3)
    return Transformer(TransformerConfig(tokenizer.vocab_size, context_length=48, **SMALL)).eval()


# ---------------------------------------------------------------- prices


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_prices_are_those_of_one_text_at_a_time(model, tokenizer, bos, batch_size):
    found = log_likelihoods(model, tokenizer, PAIRS, bos=bos, batch_size=batch_size)
    for (prompt, text), value, n, greedy in zip(PAIRS, found.log_probs, found.tokens, found.greedy):
        whole, before = tokenizer.encode(prompt + text), tokenizer.encode(prompt.rstrip())
        assert n == len(whole) - len(before)
        ids = [tokenizer.bos_id, *whole] if bos or not prompt else whole
        with torch.no_grad(): log_p = model(torch.tensor([ids])).log_softmax(-1)[0].double()
        steps = range(len(ids) - n, len(ids))
        assert value == pytest.approx(sum(log_p[t - 1, ids[t]].item() for t in steps), abs=1e-4)
        assert greedy == all(log_p[t - 1].argmax() == ids[t] for t in steps)


def test_probabilities_of_all_continuations_sum_to_one(tokenizer):
    "Of one token, in a vocabulary of words, where each is a continuation."
    words = WordTokenizer.train(["b a", "a b"])
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(words.vocab_size, context_length=8, **SMALL)).eval()
    found = log_likelihoods(model, words, [("a", " a"), ("a", " b")])
    with torch.no_grad(): log_p = model(torch.tensor([[words.bos_id, *words.encode("a")]])).log_softmax(-1)[0, -1]
    assert np.exp(found.log_probs).sum() == pytest.approx(sum(math.exp(log_p[words.encode(f"a {w}")[-1]]) for w in ("a", "b")), abs=1e-6)


def test_a_long_prompt_loses_its_beginning(model, tokenizer):
    long = " the cat sat" * 40
    found = log_likelihoods(model, tokenizer, [(long, " on the mat.")])
    ids = tokenizer.encode(long + " on the mat.")[-49:]
    with torch.no_grad(): log_p = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
    n = found.tokens[0]
    assert found.log_probs[0] == pytest.approx(sum(log_p[t - 1, ids[t]].item() for t in range(49 - n, 49)), abs=1e-4)


def test_models_that_give_log_probabilities(tokenizer):
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    grams = NGram.fit(rows, tokenizer.vocab_size)
    found = log_likelihoods(grams, tokenizer, PAIRS[:3])
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat sat on the mat.")]
    wanted = float(grams.token_log_probs(torch.tensor([ids]))[0, -found.tokens[0] :].sum())
    assert found.log_probs[0] == pytest.approx(wanted, abs=1e-6) and not found.greedy.any()


def test_choices_by_hand(tokenizer):
    "A model of which everything is known: each token costs log V."
    def nothing(ids): return torch.zeros(*ids.shape, tokenizer.vocab_size)

    items = [Item("the", (" cat sat on", " cat"), 0), Item("the", (" cat", " dogs are here"), 0, kind="b")]
    score = multiple_choice(nothing, tokenizer, items)
    assert score.value == 0.5 and score.items.tolist() == [0, 1] and score.details["chance"] == 0.5
    assert [k for k in by_kind(score, items)] == ["", "b"] and by_kind(score, items)["b"].value == 1
    longer = multiple_choice(nothing, tokenizer, items, normalize="characters")
    counts = [[len(tokenizer.encode("the" + c)) - 1 for c in item.choices] for item in items]
    wanted = [int(np.argmax([-n / len(c) for n, c in zip(ns, item.choices)])) == 0 for ns, item in zip(counts, items)]
    assert longer.items.tolist() == wanted
    assert multiple_choice(nothing, tokenizer, items, normalize="neutral").details["predictions"].tolist() == [0, 0]  # nothing is added
    nats = [math.log(sum(tokenizer.vocab_size ** -(n - ns[0]) for n in ns)) for ns in counts]
    assert score.details["nats"] == pytest.approx(np.mean(nats), abs=1e-5)


def test_equal_choices_share_the_point(tokenizer):
    "A file of pairs has the good sentence first: a model that knows nothing must not have all of them right."
    def nothing(ids): return torch.zeros(*ids.shape, tokenizer.vocab_size)

    items = [Item("", ("the cat", "the cat")), Item("the", (" cat", " cat", " cat is there"), 1), Item("the", (" cat is there", " cat"), 0)]
    score = multiple_choice(nothing, tokenizer, items)
    assert score.items.tolist() == [0.5, 0.5, 0] and score.details["predictions"].tolist() == [0, 0, 1]


def test_kinds_keep_their_groups():
    items = [Item("", ("a", "b"), kind=kind, group=group) for kind, group in (("x", "1"), ("x", "1"), ("y", "2"), ("x", "2"), ("x", ""))]
    found = by_kind(Score.mean("accuracy", [1, 1, 0, 0, 1]), items)
    wanted = Score.mean("accuracy", [1, 1, 0, 1], groups=["1", "1", "2", ""])
    assert found["x"].error == pytest.approx(wanted.error) != pytest.approx(Score.mean("accuracy", [1, 1, 0, 1]).error)
    assert found["x"].value == 0.75 and found["y"].n == 1


def test_chinese_by_bytes(model, tokenizer):
    items = [Item("猫", ("在这里。", "cat"), 1)]
    prices = log_likelihoods(model, tokenizer, [("猫", c) for c in items[0].choices]).log_probs
    for how, sizes in (("bytes", [12, 3]), ("characters", [4, 3])):
        assert multiple_choice(model, tokenizer, items, normalize=how).details["predictions"][0] == np.argmax(prices / sizes)


# ---------------------------------------------------------------- the harness


HARNESS = """
import json, sys
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

folder, tasks = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", bos_token="<bos>", eos_token="<eos>")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=48)
found = simple_evaluate(model=lm, tasks=["exam", "pairs"], task_manager=TaskManager(include_path=tasks, include_defaults=False),
                        log_samples=True, bootstrap_iters=0)
samples = {name: [[r[0] if isinstance(r, (tuple, list)) else r for r in s["filtered_resps"]] for s in rows]
           for name, rows in found["samples"].items()}
results = {name: {k: v for k, v in row.items() if isinstance(v, (int, float))} for name, row in found["results"].items()}
print("FOUND" + json.dumps({"results": results, "samples": samples}, default=float))
"""


def test_the_harness_of_public_tables_gives_the_same_numbers(model, tokenizer, tmp_path):
    "EleutherAI's lm-eval loads the folder of weights through transformers, and is asked the same questions."
    pytest.importorskip("lm_eval")
    save_pretrained(model, tmp_path / "run", layout="llama")
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    exam = [
        {"prompt": "the cat", "choices": [" sat on the mat.", " is", " 在这里"], "answer": 0},
        {"prompt": "the dogs are here, and", "choices": [" the", " a dog is a dog", " cat"], "answer": 1},
        {"prompt": "a dog is a dog. " * 9, "choices": [" a", " the cat", " mat"], "answer": 2},
        *({"prompt": "the cat sat on" + " the" * n, "choices": [" mat", " dogs are here", " cat is"], "answer": n % 3} for n in range(9)),
    ]
    pairs = [{"sentence_good": a, "sentence_bad": b} for a, b in (
        ("the cat is there.", "the cat are there."), ("a dog is a dog.", "a dog is here"), ("the dogs are here", "猫在这里。"))]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, rows, shape in (
        ("exam", exam, "doc_to_text: '{{prompt}}'\ndoc_to_choice: choices\ndoc_to_target: answer"),
        ("pairs", pairs, "doc_to_text: ''\ndoc_to_choice: '{{[sentence_good, sentence_bad]}}'\ndoc_to_target: 0"),
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / name}.jsonl\n"
            f"output_type: multiple_choice\ntest_split: test\ntarget_delimiter: ''\n{shape}\n"
            "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
        )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", HARNESS, str(tmp_path / "run"), str(tasks)]
    done = subprocess.run(words, env=env, text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(line for line in done.stdout.split("\n") if line.startswith("FOUND"))[5:])
    for name in ("exam", "pairs"):
        items = read_task(tmp_path / f"{name}.jsonl")
        ours = multiple_choice(model, tokenizer, items, bos=False)
        by_length = multiple_choice(model, tokenizer, items, bos=False, normalize="characters")
        for mine, yours in zip(ours.details["log_probs"], theirs["samples"][name], strict=True):
            np.testing.assert_allclose(mine, yours, atol=2e-4)
        assert theirs["results"][name]["acc,none"] == pytest.approx(ours.value)
        assert theirs["results"][name]["acc_norm,none"] == pytest.approx(by_length.value)


# ---------------------------------------------------------------- examples before a question, answers in words, contamination


def test_examples_before_a_question():
    pool = [Item(f"q{i}", answers=(f"a{i}",)) for i in range(5)]
    for n, item in enumerate(few_shot(pool, pool, 4, seed=1)):
        *shown, asked = item.prompt.split("\n\n")
        assert asked == f"q{n}" and sorted(shown) == sorted(one.solved for one in pool if one != pool[n])
    assert few_shot(pool, pool, 2, seed=1) == few_shot(pool, pool, 2, seed=1) != few_shot(pool, pool, 2, seed=2)
    assert few_shot(pool, pool, 0) == pool
    with pytest.raises(TaskError, match="shots=5, and the pool has 4 other"): few_shot(pool, pool, 5)
    assert Item("Q", (" yes", " no"), 1).solved == "Q no" and Item("A: ", answers=("x",)).solved == "A: x"


def test_answers_are_what_greedy_writing_gives(model, tokenizer):
    from lmbook.generation import SamplingConfig, generate_text

    prompts = ["the cat", "a dog is ", "猫", "the dogs are here, and"]
    config = SamplingConfig(max_new_tokens=6, temperature=0, stop=("\n",))
    wanted = [generate_text(model, tokenizer, [p.rstrip()], config)[0].strip() for p in prompts]
    assert write_answers(model, tokenizer, [Item(p, answers=("x",)) for p in prompts], max_new_tokens=6, batch_size=3) == wanted


def test_what_a_long_prompt_loses_is_its_beginning(model, tokenizer):
    from lmbook.generation import SamplingConfig, generate_text

    long = "a dog is a dog. " * 30 + "the dogs are here, and the cat is there. the cat sat on the mat. a"
    ids, room = tokenizer.encode(long), model.config.context_length - 6 - 1
    config = SamplingConfig(max_new_tokens=6, temperature=0, stop=("\n",))
    wanted, other = (generate_text(model, tokenizer, [tokenizer.decode(part)], config)[0].strip() for part in (ids[-room:], ids[:room]))
    assert wanted != other
    assert write_answers(model, tokenizer, [Item(long, answers=("x",))], max_new_tokens=6) == [wanted]


def test_contamination_is_a_share_of_runs():
    items = [Item("one two three four", answers=("five",)), Item("six seven eight nine", answers=("ten",)), Item("a", answers=("b",))]
    found = contamination(items, [["zero one two three four five"], ["x six seven eight y"]], n=3)
    assert found[0] == 1 and found[1] == pytest.approx(1 / 3) and math.isnan(found[2])


# ---------------------------------------------------------------- files


def test_lines_of_a_task(tmp_path):
    rows = [
        ({"prompt": "p", "choices": ["a", "b"], "answer": 1}, Item("p", ("a", "b"), 1)),
        ({"query": "p", "choices": ["a", "b"], "gold": "b", "kind": "k", "group": 3}, Item("p", ("a", "b"), 1, kind="k", group="3")),
        ({"sentence_good": "g", "sentence_bad": "b", "UID": "u"}, Item("", ("g", "b"), kind="u")),
        ({"good": "g", "bad": "b"}, Item("", ("g", "b"))),
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row, _ in rows) + "\n", encoding="utf-8")
    assert read_task(path) == [item for _, item in rows]
    rows = [{"question": "q", "answers": ["a", "b"], "prediction": "a"}, {"context": "q", "target": "猫"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_task(path) == [Item("q", answers=("a", "b"), prediction="a"), Item("q", answers=("猫",))]


@pytest.mark.parametrize(("lines", "says"), [
    ('{"prompt": "a", "choices": ["x", "y"]}', "line 1: which choice is right"),
    ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "line 1: right=2 is none of 2 choices"),
    ('{"prompt": "a", "choices": ["x"], "answer": 0}', "One choice is none"),
    ('{"prompt": "a", "choices": ["x", ""], "answer": 0}', "A choice is empty"),
    ('{"prompt": "a", "choices": ["x", 3], "answer": 0}', "made of texts"),
    ('{"text": "a"}', "line 1 has the fields 'text'"),
    ('\n[1]', "line 2: a list, not an object"),
    ('{"prompt": "a"', "line 1: no JSON"),
    ("[" * 100_000, "line 1: no JSON"),
    ("", "holds no question"),
    ('{"prompt": "a", "answers": ["b"], "prediction": 1}', "prediction is a int"),
    ('{"good": "a", "bad": "b"}\n{"prompt": "a", "answers": ["b"]}', "Make two files"),
])  # fmt: skip
def test_what_is_no_task_is_one_error(lines, says, tmp_path):
    (tmp_path / "task.jsonl").write_text(lines)
    with pytest.raises(TaskError, match=says): read_task(tmp_path / "task.jsonl")


def test_files_that_are_none(tmp_path):
    with pytest.raises(TaskError, match="cannot be read"): read_task(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(TaskError, match="not UTF-8: byte 15"): read_task(tmp_path / "latin.jsonl")


# ---------------------------------------------------------------- all together


def test_any_metric(model, tokenizer):
    choose = [Item("the cat", (" sat", " is there"), group="a"), Item("a", (" dog", " cat"), group="a"), Item("the", (" cat", " dogs"))]
    written = [Item("the cat", answers=("sat on the mat",), prediction="on the mat"), Item("a", answers=("dog",), prediction="dog")]
    choices = [name for name in METRICS if name.startswith("accuracy")]
    found = run_task(choose, choices, model, tokenizer)
    assert list(found) == choices and found["accuracy"].groups is not None and len(set(found["accuracy"].groups)) == 2
    rest = [name for name in METRICS if name not in choices]
    assert list(run_task(written, rest)) == rest and run_task(written)["exact-match"].value == 0.5
    for name, score in run_task(written, rest, model, tokenizer, max_new_tokens=4).items(): assert math.isfinite(score.value), name
    for items, metrics, says in (
        (choose, ["bleu"], "bleu is not for items with choices"), (written, ["accuracy"], "not for items with answers"),
        (choose, ["acuracy"], "accuracy"), (choose, [], "give a model"), ([], [], "no item"),
        ([Item("a", answers=("b",))], [], "no prediction"),
    ):  # fmt: skip
        with pytest.raises(TaskError, match=says): run_task(items, metrics)


@pytest.mark.parametrize(("call", "says"), [
    (lambda m, t: log_likelihoods(m, t, [("a", "")]), "adds no token"),
    (lambda m, t: log_likelihoods(m, t, ["ab"]), "pair 0 must be"),
    (lambda m, t: log_likelihoods(m, t, "ab"), "Give a list"),
    (lambda m, t: log_likelihoods(m, t, [("a", b"b")]), "two texts"),
    (lambda m, t: log_likelihoods(m, t, [("a", " the cat sat on the mat" * 30)]), "and the model reads 48"),
    (lambda m, t: log_likelihoods(m, t, [("a", " \ud800")]), "pair 0"),
    (lambda m, t: log_likelihoods(lambda ids: torch.full((*ids.shape, 300), math.nan), t, [("a", " dog")]), "NaN for pair 0"),
    (lambda m, t: log_likelihoods(lambda ids: torch.zeros(*ids.shape, 5), t, [("a", " dog")]), "the model knows 5"),
    (lambda m, t: multiple_choice(m, t, [Item("a", answers=("b",))]), "item 0 has no choices"),
    (lambda m, t: multiple_choice(m, t, []), "no item"),
    (lambda m, t: multiple_choice(m, t, [Item("a", (" b", " c"))], normalize="words"), "words"),
    (lambda m, t: write_answers(m, t, [Item("a", answers=("b",))], max_new_tokens=0), "max_new_tokens"),
    (lambda m, t: log_likelihoods(m, None, [("a", " b")]), "give the model's tokenizer"),
    (lambda m, t: Item("a"), "either choices or answers"),
    (lambda m, t: Item("a", "bc"), "Give a list"),
    (lambda m, t: contamination(["a"], [["a"]]), "not an Item"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_error(call, says, model, tokenizer):
    with pytest.raises(TaskError, match=says): call(model, tokenizer)
