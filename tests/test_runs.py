"""A model of one's own text: runs that stop and go on, sources of all kinds, folders from elsewhere, and faults."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmbook.batches import TokenStream
from lmbook.generation import SamplingConfig
from lmbook.pretrained import save_pretrained
from lmbook.runs import (
    _MANY,
    Run,
    RunConfig,
    RunError,
    load_run,
    make_tokenizer,
    plan_steps,
    read_texts,
    seconds_per_step,
    sort_settings,
    split_texts,
    train_run,
)
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE, ByteTokenizer, CharTokenizer
from lmbook.tokenizer_files import SentencePieceTokenizer
from lmbook.training import TrainConfig, TrainingError, read_log
from lmbook.transformer import Transformer, preset
from tests.stories import CPU, SMALL, STORIES, config, write_stories


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path: return write_stories(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train_run(config(text), folder)
    return folder


# -------------------------------------------------------------------------------------------------------------- a run


def test_a_folder_holds_all_that_belongs_to_a_run(folder: Path, text: Path):
    names = {"config.json", "model.safetensors", "tokenizer.json", "run.json", "log.jsonl", "curve.png", "README.md"}
    assert names <= {p.name for p in folder.iterdir()} and not list(folder.glob(".*"))
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["data"]["documents"] == 60 and info["data"]["bytes"] == sum(len(s.encode()) for s in STORIES)
    assert info["plan"]["steps"] == 12
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`mine.txt`" in card and f"{info['result']['bits_per_byte']:.3f} bits per byte" in card
    assert str(text.parent) not in card  # no path of this machine
    assert [row["step"] for row in read_log(folder / "log.jsonl") if "valid" in row] == list(range(1, 13))


def test_the_scores_are_those_of_the_model_in_the_folder(folder: Path):
    run = load_run(folder, "cpu")
    _, valid = split_texts(STORIES, 0.05, 0)
    assert run.evaluate(valid).bits_per_byte == pytest.approx(run.info["result"]["bits_per_byte"], rel=1e-6)
    looks = [row["valid"] for row in read_log(folder / "log.jsonl") if "valid" in row]
    assert run.evaluate(valid).loss == pytest.approx(min(looks), rel=1e-4)  # the best look


def test_a_finished_run_is_not_done_again(folder: Path, text: Path):
    before, said = (folder / "model.safetensors").stat().st_mtime_ns, []
    train_run(config(text), folder, said.append)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before and "is finished" in said[0]


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(text: Path, folder: Path, tmp_path: Path):
    first, again = load_run(folder, "cpu"), train_run(config(text), tmp_path / "again")
    other = train_run(config(text, seed=1), tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(first.model.embed.tokens.weight, other.model.embed.tokens.weight)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_settings_reach_model_and_training(text: Path, tmp_path: Path, optimizer: str):
    train = CPU | {"lr": 1e-9, "warmup": 0, "weight_decay": 0.0, "optimizer": optimizer, "eval_every": 6}
    run = train_run(config(text, model=SMALL | {"norm": "layer"}, train=train), tmp_path / "run")
    assert run.model.config.norm == "layer"
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "valid" in row] == [6, 12]
    assert max(row["lr"] for row in read_log(tmp_path / "run" / "log.jsonl") if "lr" in row) == pytest.approx(1e-9)


# -------------------------------------------------------------------------------------------------------------- texts


def test_sources_of_all_kinds_are_the_same_text(text: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, story in enumerate(STORIES): (folder / f"{i:03}.txt").write_text(story, encoding="utf-8")
    with gzip.open(packed := tmp_path / "mine.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"body": story}) + "\n" for story in STORIES)
    lines, files = RunConfig(text=(str(text),), by="line"), RunConfig(text=(str(folder),))
    for source in (lines, files, RunConfig(text=(str(packed),), column="body")): assert read_texts(source) == STORIES
    whole = read_texts(RunConfig(text=(str(text),)))
    assert len(whole) == 1 and whole[0].split() == " ".join(STORIES).split()
    assert len(read_texts(RunConfig(text=(str(text), str(text)), by="line"))) == 120


def test_more_text_than_wanted_is_not_read(text: Path):
    said: list[str] = []
    texts = read_texts(RunConfig(text=(str(text),), by="line", megabytes=0.01), said.append)
    assert sum(map(len, texts)) == 10_000 and texts[:-1] == STORIES[: len(texts) - 1] and "0.01 MB" in said[0]
    assert [len(t) for t in read_texts(RunConfig(text=(str(text),), megabytes=0.002))] == [2000]  # of one long document the beginning


some_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)


@given(st.lists(some_text, min_size=1, max_size=120), st.floats(0.02, 0.6), st.integers(0, 5))
def test_what_is_held_out_and_what_is_kept_are_the_text(texts: list[str], share: float, seed: int):
    kept, out = split_texts(texts, share, seed)
    if len(texts) >= _MANY: assert sorted(kept + out) == sorted(texts) and out
    else:
        size = sum(map(len, texts))
        assert sum(map(len, kept)) <= size
        for text in texts: assert any(text.startswith(k) for k in kept) or len(text) < 2
    assert all(kept) and all(t.strip() for t in out) or len(texts) >= _MANY


def test_the_share_is_about_what_was_asked_for():
    kept, out = split_texts(STORIES, 0.2)
    assert 0.15 < sum(map(len, out)) / sum(map(len, STORIES)) < 0.3
    [kept], [out] = split_texts([" ".join(STORIES)], 0.2)
    assert kept + out == " ".join(STORIES) and kept.endswith(" ") and 0.19 < len(out) / len(kept + out) < 0.21


def test_tokenizers(tmp_path: Path):
    assert isinstance(make_tokenizer(STORIES, "chars"), CharTokenizer) and isinstance(make_tokenizer(STORIES, "bytes"), ByteTokenizer)
    assert make_tokenizer(STORIES).vocab_size == 512 and make_tokenizer(STORIES, vocab_size=300).vocab_size == 300
    assert make_tokenizer(["ab"]).vocab_size == ByteTokenizer().vocab_size  # nothing to merge
    make_tokenizer(STORIES).to_json(tmp_path / "tokenizer.json")
    assert make_tokenizer([], str(tmp_path)).vocab_size == 512
    with pytest.raises(RunError, match="choose bpe, chars or bytes"): make_tokenizer(STORIES, "bpee")


@pytest.mark.parametrize("kind", ["chars", "bytes", "sentencepiece"])
def test_any_tokenizer_comes_back_with_the_run(kind: str, text: Path, tmp_path: Path):
    if kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.train(STORIES, 400)
        tokenizer.save(tmp_path / "sp.model")
        kind = str(tmp_path / "sp.model")
    run = train_run(config(text, tokenizer=kind, steps=3), tmp_path / "run")
    again = load_run(tmp_path / "run", "cpu")
    assert again.tokenizer.encode(STORIES[0]) == run.tokenizer.encode(STORIES[0])
    greedy = SamplingConfig(max_new_tokens=5, temperature=0)
    assert again.write("The", greedy) == run.write("The", greedy)


def test_chinese(tmp_path: Path):
    stories = list(SmallWorld(SmallWorldConfig(limit=20)).texts("train", "zh", n=60))
    (tmp_path / "zh.txt").write_text("\n".join(stories), encoding="utf-8")
    run = train_run(config(tmp_path / "zh.txt", steps=5), tmp_path / "run")
    assert run.tokenizer.decode(run.tokenizer.encode(stories[0])) == stories[0]
    settings = SamplingConfig(max_new_tokens=30, temperature=0)
    assert "".join(run.stream(stories[0][:3], settings)) == run.write(stories[0][:3], settings)
    assert run.evaluate(stories[:3]).bytes == sum(len(s.encode()) for s in stories[:3])


# -------------------------------------------------------------------------------------------------------------- the plan


def test_the_plan_follows_the_machine_and_the_text(text: Path):
    tokenizer = make_tokenizer(STORIES)
    stream = TokenStream.of(STORIES, tokenizer, batch_size=4, length=32, bos=False, eos=False)
    model = Transformer(preset("tiny", tokenizer.vocab_size, **SMALL))
    before = [p.clone() for p in model.parameters()]
    assert seconds_per_step(model, stream) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # tried on a copy
    assert plan_steps(config(text, steps=None, minutes=1e-9), model, stream)["steps"] == 10  # the least
    assert plan_steps(config(text, steps=None, minutes=1e9), model, stream)["steps"] == 40 * len(stream)  # the most
    assert plan_steps(config(text, train={"dtype": "bfloat16"}), model, stream) == {"steps": 12, "dtype": "bfloat16"}


# -------------------------------------------------------------------------------------------------------------- folders from elsewhere


def test_a_run_as_a_llama_for_everybody(folder: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    run = load_run(folder, "cpu")
    save_pretrained(run.model, tmp_path, layout="llama")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert ids == run.tokenizer.encode("The cat")
    prompt, eos = torch.tensor([[run.tokenizer.bos_id, *ids]]), run.tokenizer.eos_id
    new = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=eos)[0, 1 + len(ids) :].tolist()
    assert run.write("The cat", SamplingConfig(max_new_tokens=12, temperature=0)) == run.tokenizer.decode([i for i in new if i != eos])


def test_a_gpt2_without_a_beginning(tmp_path: Path):
    "GPT-2's texts begin with <|endoftext|>, which its tokenizer calls an end."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(STORIES, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = {"vocab_size": 400, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    run = load_run(tmp_path, "cpu")
    assert isinstance(run.write("", SamplingConfig(max_new_tokens=4, seed=0)), str)
    assert run.evaluate(STORIES[:2]).tokens > 0 and np.isfinite(run.evaluate(STORIES[:2]).loss)


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_text_that_has_changed(text: Path, tmp_path: Path):
    mine = Path(shutil.copy(text, tmp_path / "mine.txt"))
    train_run(config(mine), tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    del info["result"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info), encoding="utf-8")
    mine.write_text(mine.read_text(encoding="utf-8") + "The end.\n", encoding="utf-8")
    with pytest.raises(RunError, match="not what it was"): train_run(config(mine), tmp_path / "run")


def test_a_config_says_what_is_wrong():
    wrong = (
        ({"by": "page"}, "by='page'. Choose one of: file, paragraph, line"), ({"preset": "huge"}, "tiny, small, base"),
        ({"minutes": 0}, "minutes=0"), ({"batch_size": 0}, "batch_size=0"), ({"steps": 2.5}, "steps=2.5"),
        ({"model": {"d_modle": 3}}, "Did you mean d_model?"), ({"train": {"epochs": 3}}, "epochs is not a setting"),
    )  # fmt: skip
    for changes, said in wrong:
        with pytest.raises(RunError, match=re.escape(said)): RunConfig(**changes)
    with pytest.raises(RunError, match=r"Did you mean lr\?"): sort_settings({"d_model": 3, "lrr": 1})
    assert sort_settings({"d_model": 3, "lr": 1}) == {"model": {"d_model": 3}, "train": {"lr": 1}}
    with pytest.raises(RunError, match="name a file"): read_texts(RunConfig())
    with pytest.raises(TrainingError): TrainConfig(steps=0)


def test_an_empty_prompt_needs_a_beginning(folder: Path):
    run = load_run(folder, "cpu")
    bare = BPE.train(STORIES, 400, specials=("<unk>",))
    with pytest.raises(ValueError, match="prompt is empty"): Run(folder, run.model, bare, {}).write("")


def test_a_full_disk_loses_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lmbook.runs as runs

    def full(*args, **kwargs): raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "_write_card", full)
    with pytest.raises(OSError): train_run(config(text), tmp_path / "run")
    monkeypatch.undo()
    run = train_run(config(text), tmp_path / "run")  # only what was missing is done
    assert (tmp_path / "run" / "README.md").exists() and "result" in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert len([row for row in read_log(tmp_path / "run" / "log.jsonl") if "valid" in row]) == 12 and run.info["result"]
