"""A model of one's own text: the command in processes of its own, runs that stop and go on, sources of all kinds, folders from elsewhere, and faults."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmbook.batches import TokenStream, open_tokens
from lmbook.checkpoints import latest
from lmbook.generation import SamplingConfig
from lmbook.pretrained import save_pretrained
from lmbook.runs import (
    MANY,
    Run,
    RunConfig,
    RunError,
    load_run,
    main,
    make_tokenizer,
    plan_steps,
    read_texts,
    seconds_per_step,
    split_texts,
    train_run,
)
from lmbook.small_world import SmallWorld, SmallWorldConfig
from lmbook.tokenization import BPE, ByteTokenizer, CharTokenizer
from lmbook.tokenizer_files import SentencePieceTokenizer, load_tokenizer
from lmbook.training import TrainConfig, TrainingError, read_log
from lmbook.transformer import Transformer, preset

STORIES = list(SmallWorld(SmallWorldConfig(limit=20)).texts("train", n=60))
SMALL = {"d_model": 32, "layers": 1, "heads": 2, "context_length": 32}
CPU = {"device": "cpu"}
ROOT = Path(__file__).resolve().parent.parent


def config(text: Path | str, **changes) -> RunConfig:
    return RunConfig(**({"text": (str(text),), "by": "line", "steps": 12, "batch_size": 4, "model": SMALL, "train": CPU} | changes))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("".join(story + "\n" for story in STORIES), encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train_run(config(text), folder)
    return folder


def call(*words: str | Path, **options) -> subprocess.CompletedProcess:
    "The command, in a process of its own."
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", "import sys; from lmbook.runs import main; sys.exit(main())", *map(str, words)], env=env, text=True, encoding="utf-8",
                          capture_output=True, **options)


def fails(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    "The one line that a command ends with."
    assert main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("lmbook: ")]
    assert len(lines) == 1 and lines[0] == err.splitlines()[-1], err
    return lines[0]


# ------------------------------------------------------------------------------------------------------------------------------ a run


def test_a_folder_holds_all_that_belongs_to_a_run(folder: Path, text: Path):
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json", "log.jsonl", "curve.png", "README.md"} <= {p.name for p in folder.iterdir()}
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert info["data"]["documents"] == 60 and info["data"]["bytes"] == sum(len(s.encode()) for s in STORIES) and info["plan"]["steps"] == 12
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`mine.txt`" in card and f"{info['result']['bits_per_byte']:.3f} bits per byte" in card and str(text.parent) not in card  # no path of this machine
    assert [row["step"] for row in read_log(folder / "log.jsonl") if "valid" in row] == list(range(1, 13))


def test_the_scores_are_those_of_the_model_in_the_folder(folder: Path):
    run = load_run(folder, "cpu")
    _, valid = split_texts(STORIES, 0.05, 0)
    assert run.evaluate(valid).bits_per_byte == pytest.approx(run.info["result"]["bits_per_byte"], rel=1e-6)
    assert run.evaluate(valid).loss == pytest.approx(min(row["valid"] for row in read_log(folder / "log.jsonl") if "valid" in row), rel=1e-4)  # the best look


def test_a_finished_run_is_not_done_again(folder: Path, text: Path):
    before, said = (folder / "model.safetensors").stat().st_mtime_ns, []
    train_run(config(text), folder, said.append)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before and "is finished" in said[0]


# A person who presses Ctrl-C when the first loss is in the log. It sits in the process itself, so that on a busy machine it is not too late.
INTERRUPTED = """
import os, signal, sys, threading, time
from lmbook.runs import main

def interrupt():
    while not (os.path.exists(os.environ["LOG"]) and "loss" in open(os.environ["LOG"]).read()): time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_ctrl_c_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path):
    words = ["train", "--text", str(text), "--by", "line", "--steps", "400", "--batch-size", "4", "--out", str(tmp_path / "run"), "--set", *(f"{k}={v}" for k, v in (SMALL | CPU).items())]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOG": str(tmp_path / "run" / "log.jsonl")}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], env=env, text=True, capture_output=True)
    assert done.returncode == 130 and "the same command goes on" in done.stderr.splitlines()[-1]
    step = latest(tmp_path / "run").step
    assert 0 < step < 400
    started = load_run(tmp_path / "run", "cpu")  # writes already
    assert isinstance(started.write("The", SamplingConfig(max_new_tokens=3, temperature=0)), str)
    assert main(words) == 0
    straight = train_run(config(text, steps=400), tmp_path / "straight")
    for a, b in zip(load_run(tmp_path / "run", "cpu").model.parameters(), straight.model.parameters(), strict=True): assert torch.equal(a, b)


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(text: Path, folder: Path, tmp_path: Path):
    first, again, other = load_run(folder, "cpu"), train_run(config(text), tmp_path / "again"), train_run(config(text, seed=1), tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(first.model.embed.tokens.weight, other.model.embed.tokens.weight)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_settings_reach_model_and_training(text: Path, tmp_path: Path, optimizer: str):
    run = train_run(config(text, model=SMALL | {"norm": "layer"}, train=CPU | {"lr": 1e-9, "warmup": 0, "weight_decay": 0.0, "optimizer": optimizer, "eval_every": 6}), tmp_path / "run")
    assert run.model.config.norm == "layer"
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "valid" in row] == [6, 12]
    assert max(row["lr"] for row in read_log(tmp_path / "run" / "log.jsonl") if "lr" in row) == pytest.approx(1e-9)


# ------------------------------------------------------------------------------------------------------------------------------ texts


def test_sources_of_all_kinds_are_the_same_text(text: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, story in enumerate(STORIES): (folder / f"{i:03}.txt").write_text(story, encoding="utf-8")
    with gzip.open(tmp_path / "mine.jsonl.gz", "wt", encoding="utf-8") as stream: stream.writelines(json.dumps({"body": story}) + "\n" for story in STORIES)
    same = [read_texts(RunConfig(text=(str(text),), by="line")), read_texts(RunConfig(text=(str(folder),))), read_texts(RunConfig(text=(str(tmp_path / "mine.jsonl.gz"),), column="body"))]
    assert same[0] == same[1] == same[2] == STORIES
    whole = read_texts(RunConfig(text=(str(text),)))
    assert len(whole) == 1 and whole[0].split() == " ".join(STORIES).split()
    assert len(read_texts(RunConfig(text=(str(text), str(text)), by="line"))) == 120


def test_more_text_than_wanted_is_not_read(text: Path):
    said: list[str] = []
    texts = read_texts(RunConfig(text=(str(text),), by="line", megabytes=0.01), said.append)
    assert sum(map(len, texts)) == 10_000 and texts[:-1] == STORIES[: len(texts) - 1] and "0.01 MB" in said[0]
    assert [len(t) for t in read_texts(RunConfig(text=(str(text),), megabytes=0.002))] == [2000]  # of one long document the beginning


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=80), min_size=1, max_size=120), st.floats(0.02, 0.6), st.integers(0, 5))
def test_what_is_held_out_and_what_is_kept_are_the_text(texts: list[str], share: float, seed: int):
    kept, out = split_texts(texts, share, seed)
    if len(texts) >= MANY: assert sorted(kept + out) == sorted(texts) and out
    else:
        size = sum(map(len, texts))
        assert sum(map(len, kept)) <= size
        for text in texts: assert any(text.startswith(k) for k in kept) or len(text) < 2
    assert all(kept) and all(t.strip() for t in out) or len(texts) >= MANY


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
    assert again.write("The", SamplingConfig(max_new_tokens=5, temperature=0)) == run.write("The", SamplingConfig(max_new_tokens=5, temperature=0))


def test_chinese(tmp_path: Path):
    stories = list(SmallWorld(SmallWorldConfig(limit=20)).texts("train", "zh", n=60))
    (tmp_path / "zh.txt").write_text("\n".join(stories), encoding="utf-8")
    run = train_run(config(tmp_path / "zh.txt", steps=5), tmp_path / "run")
    assert run.tokenizer.decode(run.tokenizer.encode(stories[0])) == stories[0]
    settings = SamplingConfig(max_new_tokens=30, temperature=0)
    assert "".join(run.stream(stories[0][:3], settings)) == run.write(stories[0][:3], settings)
    assert run.evaluate(stories[:3]).bytes == sum(len(s.encode()) for s in stories[:3])


# ------------------------------------------------------------------------------------------------------------------------------ the plan


def test_the_plan_follows_the_machine_and_the_text(text: Path):
    tokenizer = make_tokenizer(STORIES)
    stream = TokenStream(sum((tokenizer.encode(s) for s in STORIES), []), 4, 32)
    model = Transformer(preset("tiny", tokenizer.vocab_size, **SMALL))
    before = [p.clone() for p in model.parameters()]
    assert seconds_per_step(model, stream) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # tried on a copy
    assert plan_steps(config(text, steps=None, minutes=1e-9), model, stream)["steps"] == 10  # the least
    assert plan_steps(config(text, steps=None, minutes=1e9), model, stream)["steps"] == 40 * len(stream)  # the most
    assert plan_steps(config(text, train={"dtype": "bfloat16"}), model, stream) == {"steps": 12, "dtype": "bfloat16"}


# ------------------------------------------------------------------------------------------------------------------------------ the command


def test_the_command_from_nothing_to_text(text: Path, tmp_path: Path):
    done = call("train", "--text", text.name, "--by", "line", "--out", "runs/mine", "--steps", "8", "--batch-size", "4", "--set", *(f"{k}={v}" for k, v in (SMALL | CPU).items()), cwd=shutil.copy(text, tmp_path) and tmp_path)
    assert done.returncode == 0 and "bits per byte" in done.stdout and "60 documents" in done.stderr, done.stderr
    first, again = (call("generate", "runs/mine", "--prompt", "The cat", "--tokens", "12", "--seed", "3", "--device", "cpu", cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0 and first.stdout == again.stdout and first.stdout.startswith("The cat") and first.stderr == ""
    piped = call("generate", "runs/mine", "--prompt", "-", "--tokens", "12", "--seed", "3", "--device", "cpu", cwd=tmp_path, input="The cat")
    assert piped.stdout == first.stdout
    score = call("evaluate", "runs/mine", "--text", text.name, "--by", "line", "--json", "--device", "cpu", cwd=tmp_path)
    assert "nan" not in call("evaluate", "runs/mine", "--text", text.name, "--device", "cpu", cwd=tmp_path).stdout
    assert json.loads(score.stdout)["bits_per_byte"] == pytest.approx(load_run(tmp_path / "runs/mine", "cpu").evaluate(STORIES).bits_per_byte, rel=1e-5)


def test_help_names_every_command_and_a_wrong_one_is_code_2():
    done = call("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("train", "generate", "evaluate", "tokenize"))
    for command in ("train", "generate", "evaluate", "tokenize"): assert "for example:  lmbook" in call(command, "--help").stdout
    assert call("trian").returncode == 2 and call("train").returncode == 2 and call().returncode == 2
    assert call("--version").stdout.startswith("lmbook 0.")


@pytest.mark.skipif(os.name == "nt", reason="no such pipe")
def test_a_reader_that_has_enough(folder: Path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -c 'import sys; from lmbook.runs import main; sys.exit(main())' generate {folder} --tokens 400 --samples 3 --device cpu | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=env, capture_output=True)
    assert len(done.stdout) == 5 and done.stderr == b""


def test_generate_says_what_it_is_asked(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["generate", str(folder), "--regex", "(cat|dog)s?", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() in ("cat", "cats", "dog", "dogs")
    assert main(["generate", str(folder), "--prompt", "A", "--tokens", "5", "--samples", "2", "--temperature", "0", "--device", "cpu"]) == 0
    one, two = capsys.readouterr().out.split("-" * 40)
    assert one.strip() == two.strip()
    assert main(["generate", str(folder), "--prompt", "A", "--tokens", "50", "--seed", "0", "--stop", "e", "--device", "cpu"]) == 0
    assert "e" not in capsys.readouterr().out


def test_tokenize(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    tokenizer = load_tokenizer(folder)
    assert main(["tokenize", str(folder), "The cat.", "--ids"]) == 0
    assert [*map(int, capsys.readouterr().out.split())] == tokenizer.encode("The cat.")
    assert main(["tokenize", str(folder), "The cat."]) == 0
    out, err = capsys.readouterr()
    assert [int(line.split("\t")[0]) for line in out.splitlines()] == tokenizer.encode("The cat.") and "8 bytes" in err
    assert main(["tokenize", str(folder / "tokenizer.json"), "--file", str(text), "--out", str(tmp_path / "ids.npy")]) == 0
    assert open_tokens(tmp_path / "ids.npy").tolist() == tokenizer.encode(text.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------------------ folders from elsewhere


def test_a_run_as_a_llama_for_everybody(folder: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    run = load_run(folder, "cpu")
    save_pretrained(run.model, tmp_path, layout="llama")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    theirs, tokenizer = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval(), transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert ids == run.tokenizer.encode("The cat")
    new = theirs.generate(torch.tensor([[run.tokenizer.bos_id, *ids]]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=run.tokenizer.eos_id)[0, 1 + len(ids) :].tolist()
    assert run.write("The cat", SamplingConfig(max_new_tokens=12, temperature=0)) == run.tokenizer.decode([i for i in new if i != run.tokenizer.eos_id])


def test_a_gpt2_without_a_beginning(tmp_path: Path):
    "GPT-2's texts begin with <|endoftext|>, which its tokenizer calls an end."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(STORIES, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=400, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    run = load_run(tmp_path, "cpu")
    assert isinstance(run.write("", SamplingConfig(max_new_tokens=4, seed=0)), str)
    assert run.evaluate(STORIES[:2]).tokens > 0 and np.isfinite(run.evaluate(STORIES[:2]).loss)


# ------------------------------------------------------------------------------------------------------------------------------ faults


def train_words(text: Path | str, out: Path, *more: str) -> list[str]:
    return ["train", "--text", str(text), "--by", "line", "--out", str(out), "--steps", "3", "--batch-size", "4", "--set", *(f"{k}={v}" for k, v in (SMALL | CPU).items()), *more]


def test_faults_of_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("A few words.\nAnd more.\n")
    (tmp_path / "latin.txt").write_bytes("Stra\xdfe und Caf\xe9\n".encode("latin-1") * 500)
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    assert "There is no file" in fails(capsys, *train_words(tmp_path / "none.txt", tmp_path / "a"))
    assert "is empty" in fails(capsys, *train_words(tmp_path / "empty.txt", tmp_path / "b"))
    assert "too short" in fails(capsys, *train_words(tmp_path / "short.txt", tmp_path / "c"))
    assert "encoding" in fails(capsys, *train_words(tmp_path / "latin.txt", tmp_path / "d"))
    assert "text" in fails(capsys, *train_words(tmp_path / "rows.jsonl", tmp_path / "e"))
    assert not any((tmp_path / name).exists() for name in "abcde")  # nothing was begun


def test_a_data_set_by_name_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "taken for the name of a data set" in fails(capsys, *train_words("nobody/nothing", tmp_path / "a"))


def test_faults_of_settings(text: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "Did you mean layers?" in fails(capsys, *train_words(text, tmp_path / "a", "layer=2"))
    assert "without spaces" in fails(capsys, *train_words(text, tmp_path / "a", "layers"))
    assert "does not divide" in fails(capsys, *train_words(text, tmp_path / "a", "heads=5"))
    assert "lr must be above 0" in fails(capsys, *train_words(text, tmp_path / "a", "lr=0", "optimizer=adamw"))
    assert "held_out=1.0" in fails(capsys, *train_words(text, tmp_path / "a"), "--held-out", "1")
    assert "cuda" in fails(capsys, *train_words(text, tmp_path / "a", "device=cuda:9"))
    assert "seed was 0 and is 5" in fails(capsys, *train_words(text, folder), "--seed", "5")


def test_a_folder_that_is_something_else(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear mother,")
    assert "holds other things and no run" in fails(capsys, *train_words(text, tmp_path / "letters"))
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["to_mother.txt"]
    assert "is a file" in fails(capsys, *train_words(text, tmp_path / "letters" / "to_mother.txt"))


def test_a_text_that_has_changed(text: Path, tmp_path: Path):
    mine = Path(shutil.copy(text, tmp_path / "mine.txt"))
    train_run(config(mine), tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    del info["result"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info), encoding="utf-8")
    mine.write_text(mine.read_text(encoding="utf-8") + "The end.\n", encoding="utf-8")
    with pytest.raises(RunError, match="not what it was"): train_run(config(mine), tmp_path / "run")


def test_faults_of_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def broken(name: str, change) -> Path:
        copied = Path(shutil.copytree(folder, tmp_path / name))
        change(copied)
        return copied

    assert "There is no folder" in fails(capsys, "generate", tmp_path / "none")
    (tmp_path / "void").mkdir()
    assert "no config.json" in fails(capsys, "generate", tmp_path / "void")
    torn = broken("torn", lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:1000]))
    assert "torn" in fails(capsys, "generate", torn)
    assert "no tokenizer.json" in fails(capsys, "generate", broken("dumb", lambda p: (p / "tokenizer.json").unlink()))
    assert "of type 'mamba'" in fails(capsys, "generate", broken("other", lambda p: (p / "config.json").write_text('{"model_type": "mamba"}')))
    wider = broken("wider", lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace('"d_model": 32', '"d_model": 64')))
    assert "of another shape: embed.tokens.weight (512, 32), by config.json (512, 64)" in fails(capsys, "generate", wider)
    large = broken("large", lambda p: make_tokenizer(STORIES, vocab_size=600).to_json(p / "tokenizer.json"))
    assert "has 600 tokens, the model knows 512" in fails(capsys, "generate", large)
    fresh = broken("fresh", lambda p: [(p / "model.safetensors").unlink(), shutil.rmtree(next(p.glob("step-*")))])
    assert "no checkpoint yet" in fails(capsys, "generate", fresh)
    assert "run.json is torn" in fails(capsys, "generate", broken("info", lambda p: (p / "run.json").write_text('{"format": ')))
    encoder = broken("encoder", lambda p: save_pretrained(Transformer(preset("tiny", 512, **SMALL, kind="encoder")), p))
    assert "what writes is a decoder" in fails(capsys, "generate", encoder)


def test_faults_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "temperature=-1.0" in fails(capsys, "generate", folder, "--temperature", "-1", "--device", "cpu")
    assert "reads 32 at a time" in fails(capsys, "generate", folder, "--prompt", "word " * 200, "--device", "cpu")
    assert main(["generate", str(folder), "--tokens", "3", "--device", "cpu"]) == 0  # an empty one: from the beginning of a text
    run = load_run(folder, "cpu")
    bare = BPE.train(STORIES, 400, specials=("<unk>",))
    with pytest.raises(ValueError, match="prompt is empty"): Run(folder, run.model, bare, {}).write("")


def test_a_config_says_what_is_wrong():
    for changes, said in (({"by": "page"}, "by='page'"), ({"preset": "huge"}, "tiny, small, base"), ({"minutes": 0}, "minutes=0"), ({"batch_size": 0}, "batch_size=0"),
                          ({"model": {"d_modle": 3}}, "Did you mean d_model?"), ({"train": {"epochs": 3}}, "epochs is not a setting")):
        with pytest.raises(RunError, match=said.replace("?", r"\?")): RunConfig(**changes)
    with pytest.raises(RunError, match="name a file"): read_texts(RunConfig())
    with pytest.raises(TrainingError): TrainConfig(steps=0)


def test_a_full_disk_loses_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lmbook.runs as runs

    def full(*args, **kwargs): raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_card", full)
    with pytest.raises(OSError): train_run(config(text), tmp_path / "run")
    monkeypatch.undo()
    run = train_run(config(text), tmp_path / "run")  # only what was missing is done
    assert (tmp_path / "run" / "README.md").exists() and "result" in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert len([row for row in read_log(tmp_path / "run" / "log.jsonl") if "valid" in row]) == 12 and run.info["result"]
