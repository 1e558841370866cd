"""Assistants: files of conversations, tokens that are added, folders that are begun, finished or something else, and what is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmbook.assistant import (
    AssistantConfig,
    AssistantError,
    chat_with,
    finetune_run,
    read_conversations,
    talk,
    template_of,
    with_chat_tokens,
)  # fmt: skip
from lmbook.core import LmbookError
from lmbook.finetuning import CHAT_SPECIALS, ChatTemplate
from lmbook.pretrained import save_pretrained
from lmbook.runs import load_run, train_run
from lmbook.tokenization import SPECIALS, ByteTokenizer, CharTokenizer, WordTokenizer
from lmbook.transformer import Transformer, TransformerConfig
from tests.stories import STORIES, config, write_stories

ASKED = [[{"role": "user", "content": f"Who {what}?"}, {"role": "assistant", "content": "A cat."}] for what in ("sat", "ran", "slept") * 4]
QUICK = AssistantConfig(epochs=12, lr=0.01, device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    train_run(config(write_stories(folder)), folder / "run")
    return folder / "run"


def rows(path: Path, *lines: object) -> Path:
    said = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(line + "\n" for line in said), encoding="utf-8")
    return path


# ---------------------------------------------------------------- files of conversations


def test_two_shapes_and_their_names(tmp_path: Path):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "谁?"}, {"role": "assistant", "content": "猫"}]
    path = rows(
        tmp_path / "a.jsonl", {"messages": said}, "", {"system": "Be brief.", "prompt": "谁?", "answer": "猫", "source": 3},
        {"system": "Be brief.", "prompt": "谁?", "completion": "猫"}, {"prompt": "谁?", "response": "猫", "system": ""},
    )  # fmt: skip
    assert read_conversations(path) == [said, said, said, said[1:]]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_conversations(path)) == 4


@pytest.mark.parametrize("line, says", [
    ("{", "is no JSON"), ("[1]", "holds no object"), ({}, "it has: nothing"), ({"prompt": "x"}, "it has: prompt"),
    ({"answer": "x"}, "it has: answer"),
    ({"prompt": 3, "answer": "x"}, 'its "content", a text'), ({"messages": []}, "must be a list"), ({"messages": "x"}, "must be a list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "system, user or assistant"), ({"messages": ["x"]}, "system, user or assistant"),
    ({"messages": [{"role": "user", "content": "x"}]}, "says nothing"), ({"prompt": "x", "answer": "  "}, "is empty"),
])  # fmt: skip
def test_a_wrong_line_is_named(line: object, says: str, tmp_path: Path):
    path = rows(tmp_path / "a.jsonl", {"prompt": "x", "answer": "y"}, line)
    with pytest.raises(AssistantError, match="Line 2 of") as error: read_conversations(path)
    assert says in str(error.value)


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    for path, says in ((tmp_path / "none", "cannot be read"), (tmp_path, "is no file"), (tmp_path / "latin", "cannot be read"),
                       (rows(tmp_path / "void"), "holds no conversation")):  # fmt: skip
        with pytest.raises(AssistantError, match=says): read_conversations(path)


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("tokenizer", [
    CharTokenizer.train(STORIES), WordTokenizer.train(STORIES), WordTokenizer.train(STORIES, specials=(*SPECIALS, "<|user|>")),
    ByteTokenizer(),
], ids=["chars", "words", "one is there", "bytes"])  # fmt: skip
def test_chat_tokens_are_added_behind_all_others(tokenizer, tmp_path: Path):
    torch.manual_seed(0)
    save_pretrained(Transformer(TransformerConfig(tokenizer.vocab_size, 16, 1, 2, context_length=32)), tmp_path)
    tokenizer.to_json(tmp_path / "tokenizer.json")
    run = load_run(tmp_path, "cpu")
    model, grown = with_chat_tokens(run)
    assert set(CHAT_SPECIALS) <= set(grown.specials) and grown.vocab_size == model.config.vocab_size
    for text in (STORIES[0], STORIES[1][:20], ""): assert grown.encode(text) == run.tokenizer.encode(text)
    ids = torch.tensor([run.tokenizer.encode(STORIES[0])[:20]])
    with torch.no_grad(): torch.testing.assert_close(model.eval()(ids)[..., : tokenizer.vocab_size], run.model(ids))
    vectors = model.embed.tokens.weight[[grown.special(name) for name in CHAT_SPECIALS]]
    assert torch.pdist(vectors).min() > 1e-4  # no two are alike
    again = with_chat_tokens(type(run)(tmp_path, model, grown, {}))
    assert again[0] is model and again[1] is grown


# ---------------------------------------------------------------- folders


def test_a_run_learns_goes_on_and_is_finished(base: Path, tmp_path: Path):
    said: list[str] = []
    made = finetune_run(base, ASKED, tmp_path / "a", QUICK, said.append)
    assert made.info["result"]["exact"] == 1 and made.info["result"]["loss"] < 0.5 * made.info["result"]["loss_before"]
    assert chat_with(made).say("Who sat?") == "A cat."
    again = finetune_run(base, ASKED, tmp_path / "a", QUICK, said.append)
    assert "is finished" in said[-1]
    for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True): assert torch.equal(a, b)
    with pytest.raises(AssistantError, match="was begun with epochs=12, not 3"):
        finetune_run(base, ASKED, tmp_path / "a", AssistantConfig(device="cpu"))
    with pytest.raises(AssistantError, match="holds another run"): finetune_run(base, ASKED, base, QUICK)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("Dear mother,")
    with pytest.raises(AssistantError, match="is not empty"): finetune_run(base, ASKED, tmp_path / "b", QUICK)


def test_what_was_killed_goes_on_with_the_same_bits(base: Path, tmp_path: Path):
    class Killed(Exception): pass

    import lmbook.assistant as module

    whole = finetune_run(base, ASKED, tmp_path / "whole", QUICK)
    before = module.save_pretrained
    try:
        module.save_pretrained = lambda *_: (_ for _ in ()).throw(Killed())
        with pytest.raises(Killed): finetune_run(base, ASKED, tmp_path / "cut", QUICK)
    finally: module.save_pretrained = before
    resumed = finetune_run(base, ASKED, tmp_path / "cut", QUICK)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True): assert torch.equal(a, b)


def test_lora_leaves_old_rows_alone(base: Path, tmp_path: Path):
    made = finetune_run(base, ASKED, tmp_path / "a", AssistantConfig(epochs=2, lora_rank=2, device="cpu"))
    before, after = load_run(base, "cpu").model, made.model
    old = before.config.vocab_size
    assert torch.equal(after.embed.tokens.weight[:old], before.embed.tokens.weight)
    changed = [name for name, weight in before.named_parameters() if not torch.equal(weight, after.get_parameter(name)[: len(weight)])]
    assert changed and all(any(part in name for part in ("query", "value")) for name in changed)


def test_texts_are_read_again(base: Path, tmp_path: Path):
    plain, mixed = (finetune_run(base, ASKED, tmp_path / str(len(texts)), QUICK, texts=texts) for texts in ((), STORIES))
    held = STORIES[:20]
    assert mixed.evaluate(held).loss < plain.evaluate(held).loss


def test_long_ones_are_left_out_and_said(base: Path, tmp_path: Path):
    said: list[str] = []
    long = [[ASKED[0][0] | {"content": "Who? " * 90}, ASKED[0][1]]]
    finetune_run(base, ASKED + long, tmp_path / "a", AssistantConfig(epochs=1, device="cpu"), said.append)
    assert said[0] == "1 of 13 conversations are longer than 32 tokens: left out."
    with pytest.raises(AssistantError, match="two are needed"): finetune_run(base, long * 3, tmp_path / "b", QUICK)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("settings", [
    {"epochs": 0}, {"lr": -1}, {"lr": float("nan")}, {"held_out": 1}, {"replay": 1.0}, {"lora_rank": 0}, {"seed": -1},
])  # fmt: skip
def test_settings_that_cannot_be(settings: dict):
    with pytest.raises(AssistantError, match=next(iter(settings))): AssistantConfig(**settings)


# ---------------------------------------------------------------- talk


def test_templates_of_others(base: Path, tmp_path: Path):
    assert template_of(base) == ChatTemplate()
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(LmbookError): template_of(tmp_path)
    with pytest.raises(AssistantError, match="was not taught to answer"): chat_with(load_run(base, "cpu"))


def test_lines_that_are_typed(base: Path, tmp_path: Path):
    chat, said = chat_with(finetune_run(base, ASKED, tmp_path / "a", QUICK)), list[str]()
    lines = ["Who sat?\n", "", "/undo", "/undo", "/nothing", "<|user|>", "Who ran?", "/again", "/quit", "Who slept?"]
    answers = [(text, "".join(pieces)) for text, pieces in talk(chat, lines, said.append)]
    assert answers == [("Who sat?", "A cat."), ("Who ran?", "A cat."), ("Who ran?", "A cat.")]
    assert said[0] == "taken back: Who sat?" and "Nothing was said yet" in said[1]
    assert "There is no /nothing" in said[2] and "spells" in said[3]
    assert [turn["content"] for turn in chat.turns] == ["Who ran?", "A cat."]
