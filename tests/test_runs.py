"""A model of one's own text: runs that stop and go on, sources of all kinds, folders from elsewhere, and faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from lmbook.batches import TokenStream
from lmbook.generation import SamplingConfig
from lmbook.pretrained import save_pretrained
from lmbook.runs import (
    Run,
    RunConfig,
    RunError,
    load_run,
    make_tokenizer,
    muon_and_adamw,
    plan_steps,
    seconds_per_step,
    sort_settings,
    train_run,
)
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.sources import split_texts
from lmbook.tokenization import BPE, ByteTokenizer, CharTokenizer
from lmbook.tokenizer_files import SentencePieceTokenizer
from lmbook.training import TrainConfig, TrainingError, read_log
from lmbook.transformer import Transformer, TransformerConfig, preset
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
    train, valid = split_texts(STORIES, 0.05, 0)
    read, judged = (sum(len(s.encode()) for s in part) for part in (train, valid))
    assert f"on {read:,} bytes of text in {len(train)} documents" in card and f"held-out text ({judged:,} bytes)" in card
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


def rates(folder: Path) -> dict[int, float]:
    "The learning rate at each logged step."
    return {int(row["step"]): row["lr"] for row in read_log(folder / "log.jsonl") if "lr" in row}


def test_a_finished_run_goes_on_with_more_steps(text: Path, tmp_path: Path):
    said: list[str] = []
    first = train_run(config(text), tmp_path / "run")
    for steps in (30, 50): longer = train_run(config(text, steps=steps), tmp_path / "run", said.append)
    assert "Finished after 12 steps, it goes on: the learning rate rises again, and falls until step 30." in said
    assert longer.info["plan"]["ends"] == [12, 30] and longer.info["plan"]["steps"] == 50 == longer.info["asked"]["steps"]
    rate = rates(tmp_path / "run")
    assert rate[12] < rate[1] > rate[30] < rate[33] > rate[50]  # each time it falls, rises and falls
    assert rate[31] == pytest.approx(rate[32] / 2) and rate[32] == max(rate[s] for s in range(31, 51))  # slowly, from near nothing
    assert longer.info["result"]["loss"] <= first.info["result"]["loss"]  # the best weights of all
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "50 steps" in card and "after 12 and 30 the learning rate rose anew" in card
    for fewer in (49, None):
        with pytest.raises(RunError, match="other settings .steps was 50 and is"): train_run(config(text, steps=fewer), tmp_path / "run")


def test_a_longer_run_that_is_killed_goes_on_to_the_same_bits(text: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed): train_run(config(text), folder)
    whole = train_run(config(text, steps=30), straight)
    changes = killed_at(10**9, lambda: train_run(config(text, steps=30), Path(shutil.copytree(killed, tmp_path / "counted"))))
    killed_at(changes // 2, lambda: train_run(config(text, steps=30), killed))
    again = train_run(config(text, steps=30), killed)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_a_finished_run_goes_on_with_more_minutes(text: Path, tmp_path: Path):
    train_run(config(text, steps=None, minutes=1e-6), tmp_path / "run")
    longer = train_run(config(text, steps=None, minutes=2e-6), tmp_path / "run")
    assert longer.info["plan"]["ends"] == [10] and longer.info["plan"]["steps"] == 20
    with pytest.raises(RunError, match="minutes was 2e-06 and is 1e-06"):
        train_run(config(text, steps=None, minutes=1e-6), tmp_path / "run")


def test_more_steps_are_no_use_where_patience_has_ended_it(text: Path, tmp_path: Path):
    patient = {"train": CPU | {"patience": 1, "min_delta": 10.0, "eval_every": 2}}
    assert train_run(config(text, **patient), tmp_path / "run").info["stopped"] == "patience"
    with pytest.raises(RunError, match="got no better .patience."): train_run(config(text, steps=40, **patient), tmp_path / "run")


def test_the_same_text_by_another_name(text: Path, tmp_path: Path):
    mine, said = Path(shutil.copy(text, tmp_path / "mine.txt")), []
    train_run(config(mine), tmp_path / "run")
    (tmp_path / "folder").mkdir()
    train_run(config(Path(f"{tmp_path}/folder/../mine.txt")), tmp_path / "run", said.append)
    train_run(config(Path(shutil.copy(text, tmp_path / "yours.txt"))), tmp_path / "run", said.append)
    assert all("is finished" in line for line in said) and len(said) == 2
    mine.write_text(mine.read_text(encoding="utf-8") + "The end.\n", encoding="utf-8")
    with pytest.raises(RunError, match="not what it was"): train_run(config(mine), tmp_path / "run")


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


# -------------------------------------------------------------------------------------------------------------- before it is paid for


class Paid(Exception):
    "Training has begun."


@pytest.fixture
def unpaid(monkeypatch: pytest.MonkeyPatch) -> None:
    "Nothing may be trained."
    def fit(self): raise Paid

    monkeypatch.setattr("lmbook.training.Trainer.fit", fit)


def word_piece(path: Path) -> Path:
    "A tokenizer as BERT's: its pieces do not say where spaces were, and texts have no beginning."
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(STORIES, 400, show_progress=False)
    tokenizer.save(str(path))
    return path


def without_bos(path: Path) -> Path:
    BPE.train(STORIES, 400, specials=("<unk>",)).save(path)
    return path


@pytest.mark.parametrize("make", [word_piece, without_bos])
def test_a_tokenizer_that_cannot_serve_is_refused_before_training(make, text: Path, tmp_path: Path, unpaid: None):
    file = make(tmp_path / "tokenizer.json")
    with pytest.raises(RunError, match="tokenizer.json' cannot serve a run: .*Choose bpe"):
        train_run(config(text, tokenizer=file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_comes_after_training_is_rehearsed(text: Path, tmp_path: Path, unpaid: None, monkeypatch: pytest.MonkeyPatch):
    "Whatever cannot be done at the end, for whichever reason, fails at the beginning."
    def cannot(*args, **kwargs): raise RunError("it is Tuesday.")

    for name in ("evaluate", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(Run, name, cannot)
            with pytest.raises(RunError, match="it is Tuesday"): train_run(config(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(Paid): train_run(config(text), tmp_path / "run")


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_only_what_writes_is_trained(kind: str, text: Path, tmp_path: Path, unpaid: None):
    with pytest.raises(RunError, match="that is a decoder"): train_run(config(text, model=SMALL | {"kind": kind}), tmp_path / "run")


def test_settings_that_cannot_be_are_refused_before_the_text_is_read(tmp_path: Path):
    training = ({"lr": 0.0, "optimizer": "adamw"}, {"keep": 0}, {"device": "cuda:99"})
    for wrong in ({"model": {"d_model": 32, "n_head": 5}}, *({"train": settings} for settings in training)):
        with pytest.raises(ValueError) as error: train_run(RunConfig(text="nowhere.txt", **wrong), tmp_path / "run")
        assert "nowhere" not in str(error.value)


WRONG: dict[Any, tuple[Any, ...]] = {  # for a type, what must not stand there
    bool: ("no", "maybe", 1, 0.0, None),
    int: ("many", 2.5, True, [1], float("nan")),
    float: ("abc", True, [0.1], float("nan"), float("inf")),
    str: (3, True, 0.5, ["a"], print),
}


@pytest.mark.parametrize("kind", [TransformerConfig, TrainConfig, RunConfig])
def test_every_field_is_checked_for_its_type(kind: type):
    "Also those that somebody will add."
    part = {TransformerConfig: "model", TrainConfig: "train"}.get(kind)
    hints, seen = get_type_hints(kind), 0
    for field in fields(kind):
        if field.name in ("vocab_size", "steps", "epochs", "seed") and part or field.name == "text": continue
        wrong = {type(hints[field.name]): (), **WRONG}.get(hints[field.name], (print, {"a": {1}}, object()))
        if field.name == "tokenizer": wrong = WRONG[str]
        if field.name in ("model", "train"): wrong = (3, "lr=1", [("lr", 1)])
        for value in wrong:
            seen += 1
            with pytest.raises(RunError, match=f"{field.name}=.* must be |There is no {field.name}="):
                RunConfig(**({part: {field.name: value}} if part else {field.name: value}))
        default = field.default
        if part and type(default) in (bool, int, float, str, type(None)): RunConfig(**{part: {field.name: default}})
    assert seen > 40


def test_an_error_of_a_setting_names_what_may_stand_there():
    said = {
        "compile='no' must be true or false.": {"train": {"compile": "no"}},
        "tie='maybe' must be true or false.": {"model": {"tie": "maybe"}},
        "mlp_bias='maybe' must be true or false or None.": {"model": {"mlp_bias": "maybe"}},
        "lr=True must be a number.": {"train": {"lr": True}},
        "save_every=2.5 must be a whole number or None.": {"train": {"save_every": 2.5}},
        "Choose one of: float32, bfloat16": {"train": {"dtype": "float16"}},
        "Did you mean 'adamw'?": {"train": {"optimizer": "adamww"}},
        "vocab_size is not a setting of model=": {"model": {"vocab_size": 3}},
        "bytes that are not UTF-8": {"text": "caf\udce9.txt"},
    }
    for message, settings in said.items():
        with pytest.raises(RunError, match=re.escape(message)): RunConfig(**settings)
    with pytest.raises(RunError, match="optimizer=.*must be one of"): RunConfig(train={"optimizer": muon_and_adamw})
    assert json.dumps(asdict(RunConfig(text=Path("a.txt"), tokenizer=Path("b.json"))))
    assert RunConfig(text=[Path("a"), "b"]).text == ("a", "b")


@pytest.mark.parametrize("name", ["caf\udce9", "x" * 300, "file/inside", "link", "zero\0"])
def test_a_folder_that_cannot_be_is_refused_before_the_text_is_read(name: str, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="Give another folder|name of a folder"): train_run(RunConfig(text="nowhere.txt"), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_one_of_several_processes_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one of 2 processes"): train_run(config(text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    train_run(config(text, steps=1), tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- the folder


NAMES = ("run.json", "tokenizer.json", "config.json", "model.safetensors", "curve.png", "README.md", "log.jsonl", "step-000012")


@pytest.mark.parametrize("name", NAMES)
def test_no_link_in_a_folder_is_followed(name: str, folder: Path, text: Path, tmp_path: Path):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    victim = tmp_path / "victim"
    shutil.move(run / name, victim)
    (run / name).symlink_to(victim)
    before = victim.read_bytes() if victim.is_file() else sorted(p.name for p in victim.iterdir())
    with pytest.raises(ValueError, match=f"links in place of files: {name}"): train_run(config(text, steps=20), run)
    assert before == (victim.read_bytes() if victim.is_file() else sorted(p.name for p in victim.iterdir()))


def test_a_link_with_the_name_of_a_trial_is_not_written_to(text: Path, tmp_path: Path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writable").symlink_to(tmp_path / "victim")
    train_run(config(text, steps=1), tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "precious" and not list((tmp_path / "run").glob(".*"))


LEFT = (
    ".run.json.a8_xq2k1", ".model.safetensors.abcdefgh", ".README.md.00000000", ".log.jsonl.zzzzzzzz", ".writing-step-000004",
    ".old-step-000002",
)  # fmt: skip


def test_what_killed_processes_left_is_known_and_swept(text: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    for name in LEFT: (tmp_path / "run" / name).mkdir() if "step" in name else (tmp_path / "run" / name).write_text("half")
    train_run(config(text, steps=2), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.md").write_text("mine")
    with pytest.raises(RunError, match=r"other things \(\.notes\.md\)"): train_run(config(text, steps=2), tmp_path / "mine")


@pytest.mark.parametrize("name", ["run.json.abc", "model.safetensors.tmp123", "README.md.x", ".config.json.1", "tokenizer.json.a8_xq2k1"])
def test_what_only_looks_like_a_temporary_file_is_swept_where_nothing_is_lost(name: str, text: Path, tmp_path: Path):
    left = tmp_path / name
    left.touch()
    train_run(config(text, steps=1), tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("name", ["run.json.abc", "README.md.old", "run.json.d", "notes.txt.abc", "step-000004.zip"])
def test_what_is_somebody_elses_is_named(name: str, text: Path, tmp_path: Path):
    if name.endswith(".d"): (tmp_path / name).mkdir()
    else: (tmp_path / name).write_text("precious")
    with pytest.raises(RunError, match=rf"other things \({re.escape(name)}\).*move them away"): train_run(config(text, steps=1), tmp_path)
    (tmp_path / "zz").touch()
    with pytest.raises(RunError, match=rf"\({re.escape(name)} and 1 more\)"): train_run(config(text, steps=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "zz"])


class Killed(BaseException):
    "By a signal that nobody can catch: nothing that comes after it reaches the disk."


def killed_at(n: int, act) -> int:
    "Do something, and be killed before the n-th change to the disk. Returns how many there were."
    count = 0

    def counted(change):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= n: raise Killed
            return change(*args, **kwargs)
        return call

    with pytest.MonkeyPatch.context() as patch:
        on_disk = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
        for owner, names in ((os, on_disk), (shutil, ("rmtree",)), (tempfile, ("mkstemp",))):
            for name in names: patch.setattr(owner, name, counted(getattr(owner, name)))
        try: act()
        except Killed: pass
    return count


def test_killed_at_any_moment_a_run_can_be_loaded_or_goes_on(text: Path, tmp_path: Path):
    tiny = config(text, tokenizer="bytes", steps=3, train=CPU | {"save_every": 1, "eval_every": 1})
    total = killed_at(10**9, lambda: train_run(tiny, tmp_path / "whole"))
    want = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert total > 50
    for n in range(1, total + 1, 1 if os.environ.get("LMBOOK_ALL") else 4):
        folder = tmp_path / str(n)
        killed_at(n, lambda folder=folder: train_run(tiny, folder))
        if folder.exists():
            if (folder / "model.safetensors").exists(): assert (folder / "config.json").exists(), n
            if (folder / "model.safetensors").exists() or list(folder.glob("step-*")):
                load_run(folder, "cpu").write("The", SamplingConfig(max_new_tokens=1))
        train_run(tiny, folder)
        assert sorted(p.name for p in folder.iterdir()) == want, n
        shutil.rmtree(folder)


def test_two_processes_do_not_train_in_one_folder(folder: Path, text: Path, tmp_path: Path):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    hold = "import sys; from lmbook.core import claim; held = claim(sys.argv[1]); print('held', flush=True); input()"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    other = subprocess.Popen([sys.executable, "-c", hold, str(run)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another process is training in"): train_run(config(text, steps=20), run)
        train_run(config(text), run)  # to look at a finished one needs nobody's leave
    finally: other.kill(); other.wait()
    assert train_run(config(text, steps=20), run).info["plan"]["steps"] == 20  # a lock goes with its process


def test_a_run_is_loaded_while_it_removes_checkpoints(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lmbook.runs as runs

    run, seen = Path(shutil.copytree(folder, tmp_path / "run")), []
    (run / "model.safetensors").unlink()
    [newest, *_] = sorted(run.glob("step-*"), reverse=True)

    def gone(folder: Path):
        found = latest(folder)
        seen.append(found.path)
        if len(seen) == 1: newest.rename(run / "step-000099")  # as if a newer one had taken its place
        return found

    latest = runs.latest
    monkeypatch.setattr(runs, "latest", gone)
    assert load_run(run, "cpu").model and len(seen) == 2


def test_a_file_system_that_is_full_at_the_end_is_said(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    safetensors = pytest.importorskip("safetensors")

    def full(*args, **kwargs): raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lmbook.runs.save_pretrained", full)
    with pytest.raises(RunError, match="model.safetensors cannot be written: .*No space left.*the same command goes on"):
        train_run(config(text, steps=2), tmp_path / "run")


def test_a_smaller_context_is_advised_only_where_it_helps(tmp_path: Path):
    (tmp_path / "short.txt").write_text("A few words, and then some more of them. " * 3)
    def said(context: int) -> str:
        with pytest.raises(RunError, match="too short") as error:
            train_run(config(tmp_path / "short.txt", model=SMALL | {"context_length": context}, tokenizer="bytes"), tmp_path / "run")
        return str(error.value)

    assert "--set context_length=32" in said(256) and "64" not in said(128)
    (tmp_path / "short.txt").write_text("A few words.")
    assert "context_length" not in said(16)


def test_commands_that_are_suggested_can_be_pasted(text: Path, tmp_path: Path):
    train_run(config(text, steps=1), tmp_path / "my run")
    card = (tmp_path / "my run" / "README.md").read_text(encoding="utf-8")
    assert "lmbook generate 'my run' --prompt" in card and "load_run('my run')" in card


def test_unknown_characters_are_said(text: Path, tmp_path: Path):
    said: list[str] = []
    CharTokenizer.train(["The end."]).save(tmp_path / "tokenizer.json")
    train_run(config(text, steps=1, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "run", said.append)
    assert any("are unknown to the tokenizer" in line for line in said)
