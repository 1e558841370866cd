"""The command, in processes of its own: from nothing to text, Ctrl-C and the same again, and one line for each fault."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import lmbook.cli as cli
from lmbook.batches import open_tokens
from lmbook.checkpoints import latest
from lmbook.cli import main
from lmbook.core import LmbookError
from lmbook.engines import load_gguf
from lmbook.generation import SamplingConfig
from lmbook.pretrained import save_pretrained
from lmbook.runs import load_run, make_tokenizer, train_run
from lmbook.scaling import plan
from lmbook.tokenizer_files import load_tokenizer
from lmbook.training import read_log
from lmbook.transformer import Transformer, preset
from tests.stories import CPU, SMALL, STORIES, config, write_stories

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("--set", *(f"{k}={v}" for k, v in (SMALL | CPU).items()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path: return write_stories(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    train_run(config(text), folder)
    return folder


def call(*words: str | Path, **options) -> subprocess.CompletedProcess:
    "The command, in a process of its own."
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmbook", *map(str, words)]
    return subprocess.run(command, env=env, text=True, encoding="utf-8", capture_output=True, **options)


def fails(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    "The one line that a command ends with."
    assert main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("lmbook: ")]
    assert len(lines) == 1 and lines[0] == err.splitlines()[-1], err
    return lines[0]


def train_words(text: Path | str, out: Path, *more: str) -> list[str]:
    return ["train", "--text", str(text), "--by", "line", "--out", str(out), "--steps", "3", "--batch-size", "4", *SETTINGS, *more]


# -------------------------------------------------------------------------------------------------------------- from nothing to text


def test_the_command_from_nothing_to_text(text: Path, tmp_path: Path):
    shutil.copy(text, tmp_path)
    words = ["train", "--text", text.name, "--by", "line", "--out", "runs/mine", "--steps", "8", "--batch-size", "4", *SETTINGS]
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 0 and "bits per byte" in done.stdout and "60 documents" in done.stderr, done.stderr
    same = ("--tokens", "12", "--seed", "3", "--device", "cpu")
    first, again = (call("generate", "runs/mine", "--prompt", "The cat", *same, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0 and first.stdout == again.stdout and first.stdout.startswith("The cat") and first.stderr == ""
    piped = call("generate", "runs/mine", "--prompt", "-", *same, cwd=tmp_path, input="The cat")
    assert piped.stdout == first.stdout
    score = call("evaluate", "runs/mine", "--text", text.name, "--by", "line", "--json", "--device", "cpu", cwd=tmp_path)
    assert "nan" not in call("evaluate", "runs/mine", "--text", text.name, "--device", "cpu", cwd=tmp_path).stdout
    want = load_run(tmp_path / "runs/mine", "cpu").evaluate(STORIES).bits_per_byte
    assert json.loads(score.stdout)["bits_per_byte"] == pytest.approx(want, rel=1e-5)


def test_help_names_every_command_and_a_wrong_one_is_code_2():
    done = call("--help")
    assert done.returncode == 0 and all(re.search(rf"^  {word} ", done.stdout, re.MULTILINE) for word in cli.COMMANDS)
    for name, kind in cli.COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as help: assert main([name, "--help"]) == 0
        said = " ".join(re.findall(r"[^\s│]+", help.getvalue()))
        for option in (f for f in fields(kind) if f.name not in ("folder", "folders", "keys", "tokenizer", "words", "model", "train")):
            assert f"--{option.name.replace('_', '-')}" in said or name == "tokenize", (name, option.name)
        for line in kind.example.split("\n"): assert line in said and shlex.split(line)[:2] == ["lmbook", name], said[:400]
    assert main(["trian"]) == 2 and main(["train"]) == 2 and main([]) == 2
    assert call("--version").stdout.startswith("lmbook 0.")


def test_nothing_is_coloured_but_on_a_terminal():
    for words in (["train", "--help"], ["train", "--nothing"]):
        done = call(*words)
        assert "\x1b[" not in done.stdout + done.stderr and len(done.stdout + done.stderr) > 300


EXAMPLES = [line for kind in cli.COMMANDS.values() for line in kind.example.split("\n")]


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_is_one(line: str): assert cli._parse(shlex.split(line)[1], shlex.split(line)[2:])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_may_stand_in_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    "What --show-config prints, --config reads; what is said on the command line comes before it; a wrong line is named."
    file, line = tmp_path / "options.toml", cli.COMMANDS[name].example.split("\n")[-1]
    words = shlex.split(line)[1:]
    out, _ = generated(capsys, *words, "--show-config")
    file.write_text(out, encoding="utf-8")
    assert generated(capsys, name, "--config", file, "--show-config")[0] == out
    assert '"json": true' not in out and generated(capsys, name, f"--config={file}", "--json", "--show-config")[0] == out.replace(
        "json = false", "json = true")  # fmt: skip
    empty, _ = generated(capsys, name, "--show-config")
    assert tomllib.loads(empty).keys() <= {f.name for f in fields(cli.COMMANDS[name])}
    for text, says in (("jsn = true", "Did you mean json?"), ("json = 3", "json=3 must be"), ("json =", "cannot be read as TOML")):
        file.write_text(text, encoding="utf-8")
        assert says in fails(capsys, name, "--config", file)
    assert "There is no file" in fails(capsys, name, "--config", tmp_path / "none.toml")


def test_a_run_by_a_file(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SMALL.items())
    (tmp_path / "run.toml").write_text(
        f'text = [{json.dumps(str(text))}]\nby = "line"\nsteps = 3\nbatch_size = 4\nout = {json.dumps(str(tmp_path / "run"))}\n'
        f'[model]\n{settings}[train]\ndevice = "cpu"\n', encoding="utf-8")  # fmt: skip
    out, _ = generated(capsys, "train", "--config", tmp_path / "run.toml", "--json")
    assert json.loads(out)["step"] == 3 and load_run(tmp_path / "run", "cpu").model.config.d_model == SMALL["d_model"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    script, _ = generated(capsys, "completion", shell)
    assert all(name in script for name in cli.COMMANDS) and "--batch-size" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script, encoding="utf-8")
        assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0
    if shell == "bash":
        ask = f'source {tmp_path / "script"}; COMP_WORDS=(lmbook tr); COMP_CWORD=1; COMP_LINE="lmbook tr"; COMP_POINT=9; '
        ask += "$(complete -p lmbook | sed 's/.*-F \\([^ ]*\\).*/\\1/') lmbook tr lmbook; echo ${COMPREPLY[@]}"
        assert subprocess.run(["bash", "-c", ask], capture_output=True, text=True).stdout.split()[:1] == ["train"]


def test_no_completion_for_others(capsys: pytest.CaptureFixture):
    assert "only for bash, zsh" in fails(capsys, "completion", "cmd") and "Which shell?" in fails(capsys, "completion")


def test_doctor(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    facts = json.loads(generated(capsys, "doctor", "--json")[0])
    assert facts["torch"] == torch.__version__ and facts["extras"]["cleaning"] == [] and facts["cores"] >= 1
    found = importlib.metadata.version
    def without(name: str) -> str:
        if name == "opencc": raise importlib.metadata.PackageNotFoundError(name)
        return found(name)
    monkeypatch.setattr(importlib.metadata, "version", without)
    assert re.search(r"^cleaning +missing: opencc +pip install 'lmbook\[cleaning\]'", generated(capsys, "doctor")[0], re.MULTILINE)


def test_clean(tmp_path: Path, capsys: pytest.CaptureFixture):
    texts = (*STORIES[:9], STORIES[0], "  ")
    (tmp_path / "crawl.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = ("clean", "--text", tmp_path / "crawl.jsonl", "--out", tmp_path / "clean", "--steps", "exact", "empty")
    out, _ = generated(capsys, *words)
    assert out.splitlines()[0].split() == ["11", "crawled"] and out.splitlines()[-1].endswith("9 records")
    assert generated(capsys, *words)[0] == out  # it was done already
    assert json.loads(generated(capsys, *words, "--json")[0])["input"]["records"] == 11
    assert "made with other settings (steps differ)" in fails(capsys, *words[:-1])
    assert main([*map(str, words), "polish"]) == 2
    assert "Which text?" in fails(capsys, "clean", "--out", tmp_path / "b") and "There are: mojibake" in fails(capsys, *words[:-2])


def test_quantize(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out, _ = generated(capsys, "quantize", folder, "--out", tmp_path / "small", "--group-size", "8")
    assert re.search(r"small: [\d,]+ bytes", out)
    small, whole = load_run(tmp_path / "small", "cpu"), load_run(folder, "cpu")
    assert small.info["quantized"]["bits"] < 9 and small.info["result"] == whole.info["result"]
    ids = torch.tensor([whole.tokenizer.encode("The cat")])
    assert 0 < (small.model(ids) - whole.model(ids)).abs().max() < 1
    for words in (("generate", tmp_path / "small", "--tokens", "3"), ("evaluate", tmp_path / "small", "--text", folder / "README.md")):
        generated(capsys, *words, "--device", "cpu")
    assert "exists, and is not replaced" in fails(capsys, "quantize", folder, "--out", tmp_path / "small")
    assert "rounded already" in fails(capsys, "quantize", tmp_path / "small", "--out", tmp_path / "b")
    assert "rounded already" in fails(capsys, "export", tmp_path / "small", "--out", tmp_path / "b")
    assert "give some of the model's kind with --text" in fails(capsys, "quantize", folder, "--out", tmp_path / "b", "--method", "gptq")
    assert "group_size=7" in fails(capsys, "quantize", folder, "--out", tmp_path / "b", "--group-size", "7")
    assert not (tmp_path / "b").exists()
    more = ("--method", "gptq", "--group-size", "8", "--text", folder / "README.md", "--out", tmp_path / "c")
    assert "bytes" in generated(capsys, "quantize", folder, *more)[0]


def test_an_assistant_is_taught_and_talks(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": "Who?", "answer": "A cat."}) + "\n" for _ in range(9)), encoding="utf-8")
    words = ("finetune", folder, "--conversations", asked, "--out", tmp_path / "made", "--device", "cpu", "--epochs", "30", "--lr", "0.01")
    out, err = generated(capsys, *words, "--text", text)
    assert "lmbook chat" in out and "conversations to learn from" in err and "100% word for word" in out
    assert "is finished" in generated(capsys, *words, "--text", text)[1]

    def said(*lines: str, more: tuple = ()) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return generated(capsys, "chat", tmp_path / "made", "--device", "cpu", *more)

    assert said("Who?", "", "/again")[0].splitlines() == ["A cat.", "A cat."]
    assert "taken back: Who?" in said("Who?", "/undo")[1] and "Nothing was said yet" in said("/undo")[1]
    assert "There is no /help" in said("/help", "/quit", "never")[1]
    rows = said("Who?", more=("--json", "--transcript", str(tmp_path / "said.jsonl")))[0]
    assert json.loads(rows) == {"user": "Who?", "assistant": "A cat."}
    said("Who?", more=("--transcript", str(tmp_path / "said.jsonl")))
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 4
    assert "Teach it with: lmbook finetune" in fails(capsys, "chat", folder)
    asked.write_text('{"prompt": "x"}\n')
    assert "Line 1" in fails(capsys, "finetune", folder, "--conversations", asked, "--out", tmp_path / "b")


def test_plan(capsys: pytest.CaptureFixture):
    assert main("plan --gpus 8 --hours 24 --gpu A100 --utilisation 0.5 --unique 1e9".split()) == 0
    assert capsys.readouterr().out == f"{plan(8, 24, 'a100', utilisation=0.5, unique=1e9)}\n"
    assert "Known are t4, v100" in fails(capsys, "plan", "--hours", "24", "--gpu", "abacus")
    assert "hours=0.0 must be above 0" in fails(capsys, "plan", "--hours", "0")
    assert "gpus=0 must be a whole number" in fails(capsys, "plan", "--hours", "1", "--gpus", "0")
    assert main(["plan"]) == 2 and main(["plan", "--hours", "soon"]) == 2


def test_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder), "--quantize", "q4_k"]) == 0
    out, err = capsys.readouterr()
    size = (tmp_path / "mine-q4_k.gguf").stat().st_size
    assert out == f"mine-q4_k.gguf: {size:,} bytes\n" and "note: 1 matrix is stored as f16: rows of 88" in err
    assert "note: 7 matrices are stored as q5_0: rows of 32 numbers are no multiple of 256" in err
    ids = torch.tensor([load_tokenizer(folder).encode("The cat", bos=True)])
    whole, rounded = load_run(folder, "cpu").model(ids), load_gguf(tmp_path / "mine-q4_k.gguf")(ids)
    assert 0 < (whole - rounded).abs().max() < 1
    assert main(["export", str(folder), "--to", "onnx", "--out", "a/model.onnx"]) == 0 and (tmp_path / "a" / "model.onnx").is_file()
    assert main(["export", str(folder), "--to", "ctranslate2", "--quantize", "int8"]) == 0 and (tmp_path / "mine-int8").is_dir()
    before = sorted(tmp_path.rglob("*"))
    assert "exists, and is not replaced" in fails(capsys, "export", folder, "--quantize", "q4_k")
    assert "onnx has no quantize='q4_k'. It has: f32, int8." in fails(capsys, "export", folder, "--to", "onnx", "--quantize", "q4_k")
    assert "There is no folder" in fails(capsys, "export", tmp_path / "none")
    assert main(["export", str(folder), "--to", "tflite"]) == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="no such pipe")
def test_a_reader_that_has_enough(folder: Path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -m lmbook generate {folder} --tokens 400 --samples 3 --device cpu | head -c 5"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=env, capture_output=True)
    assert len(done.stdout) == 5 and done.stderr == b""


def test_generate_says_what_it_is_asked(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["generate", str(folder), "--regex", "(cat|dog)s?", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() in ("cat", "cats", "dog", "dogs")
    assert main(["generate", str(folder), "--prompt", "A", "--tokens", "5", "--samples", "2", "--temperature", "0", "--device", "cpu"]) == 0
    one, two = capsys.readouterr().out.split("-" * 40)
    assert one.strip() == two.strip()
    looping, said = ["generate", str(folder), "--prompt", "A", "--tokens", "60", "--temperature", "0", "--device", "cpu"], []
    for more in ([], ["--no-repeat-ngram", "2"]):
        assert main([*looping, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]  # the likeliest text of so small a model runs in circles
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


# -------------------------------------------------------------------------------------------------------------- stopped


# A person who presses Ctrl-C when the first loss is in the log.
# It sits in the process itself, so that on a busy machine it is not too late.
INTERRUPTED = """
import os, signal, sys, threading, time
from lmbook.cli import main

def interrupt():
    while not (os.path.exists(os.environ["LOG"]) and "loss" in open(os.environ["LOG"]).read()): time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.exit(main())
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_sigterm_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path):
    words = train_words(text, tmp_path / "run", "lr=0.01") + ["--steps", "4000"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOG": str(tmp_path / "run" / "log.jsonl")}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.replace("SIGINT", "SIGTERM"), *words], env=env, text=True, capture_output=True)
    assert done.returncode == 143 and "the same command goes on" in done.stderr.splitlines()[-1]
    assert 0 < latest(tmp_path / "run").step < 400  # the first regular checkpoint would be that of step 400


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_ctrl_c_saves_and_the_same_command_goes_on(text: Path, tmp_path: Path):
    words = ["train", "--text", str(text), "--by", "line", "--steps", "400", "--batch-size", "4", "--out", str(tmp_path / "run"), *SETTINGS]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOG": str(tmp_path / "run" / "log.jsonl")}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], env=env, text=True, capture_output=True)
    assert done.returncode == 130 and "the same command goes on" in done.stderr.splitlines()[-1]
    step = latest(tmp_path / "run").step
    assert 0 < step < 400
    started = load_run(tmp_path / "run", "cpu")  # writes already
    assert isinstance(started.write("The", SamplingConfig(max_new_tokens=3, temperature=0)), str)
    assert main(words) == 0
    straight = train_run(config(text, steps=400), tmp_path / "straight")
    resumed = load_run(tmp_path / "run", "cpu")
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True): assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- faults


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
    for name in ("huggingface_hub.constants", "datasets.config"):  # as if from the start
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", True)
    assert "taken for the name of a data set" in fails(capsys, *train_words("nobody/nothing", tmp_path / "a"))


def test_faults_of_settings(text: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert "Did you mean n_layer?" in fails(capsys, *train_words(text, tmp_path / "a", "layer=2"))
    assert "without spaces" in fails(capsys, *train_words(text, tmp_path / "a", "n_layer"))
    assert "does not divide" in fails(capsys, *train_words(text, tmp_path / "a", "n_head=5"))
    assert "lr=0 must be above 0" in fails(capsys, *train_words(text, tmp_path / "a", "lr=0", "optimizer=adamw"))
    assert "held_out=1.0" in fails(capsys, *train_words(text, tmp_path / "a"), "--held-out", "1")
    assert "cuda" in fails(capsys, *train_words(text, tmp_path / "a", "device=cuda:9"))
    assert "seed was 0 and is 5" in fails(capsys, *train_words(text, folder), "--seed", "5")


def test_a_folder_that_is_something_else(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear mother,")
    assert "holds other things (to_mother.txt) and no run" in fails(capsys, *train_words(text, tmp_path / "letters"))
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["to_mother.txt"]
    assert "is a file" in fails(capsys, *train_words(text, tmp_path / "letters" / "to_mother.txt"))


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
    other = broken("other", lambda p: (p / "config.json").write_text('{"model_type": "mamba"}'))
    assert "of type 'mamba'" in fails(capsys, "generate", other)
    told = (folder / "config.json").read_text()
    wider = broken("wider", lambda p: (p / "config.json").write_text(told.replace('"d_model": 32', '"d_model": 64')))
    assert "of another shape: embed.tokens.weight (512, 32), by config.json (512, 64)" in fails(capsys, "generate", wider)
    large = broken("large", lambda p: make_tokenizer(STORIES, vocab_size=600).to_json(p / "tokenizer.json"))
    assert "has 600 tokens, the model knows 512" in fails(capsys, "generate", large)
    fresh = broken("fresh", lambda p: [(p / "model.safetensors").unlink(), shutil.rmtree(next(p.glob("step-*")))])
    assert "no checkpoint yet" in fails(capsys, "generate", fresh)
    assert "run.json is torn" in fails(capsys, "generate", broken("info", lambda p: (p / "run.json").write_text('{"format": ')))
    encoder = broken("encoder", lambda p: save_pretrained(Transformer(preset("tiny", 512, **SMALL, kind="encoder")), p))
    assert "what writes is a decoder" in fails(capsys, "generate", encoder)


def test_faults_of_prompts(folder: Path, capsys: pytest.CaptureFixture):
    assert "temperature=-1.0" in fails(capsys, "generate", folder, "--temperature", "-1", "--device", "cpu")
    assert "no_repeat_ngram=0" in fails(capsys, "generate", folder, "--no-repeat-ngram", "0", "--device", "cpu")
    assert main(["generate", str(folder), "--tokens", "3", "--device", "cpu"]) == 0  # an empty one: from the beginning of a text


def generated(capsys: pytest.CaptureFixture, *words: str | Path) -> tuple[str, str]:
    "What a command prints, and what it says about errors."
    assert main([*map(str, words)]) == 0
    return tuple(capsys.readouterr())


def test_a_long_prompt_is_cropped_and_said(folder: Path, capsys: pytest.CaptureFixture):
    same = ("--tokens", "5", "--temperature", "0", "--device", "cpu")
    prompt = " ".join(STORIES[:3])
    out, err = generated(capsys, "generate", folder, "--prompt", prompt, *same)
    assert out.startswith(prompt) and "the model reads 32 at a time: it goes on from the last ones" in err
    assert out.count("\n") == prompt.count("\n") + 1 or len(out) > len(prompt)


def test_nothing_is_written_before_an_error(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def cannot(*args, **kwargs):
        raise LmbookError("It is Tuesday.")
        yield

    monkeypatch.setattr("lmbook.runs.Run.stream", cannot)
    assert main(["generate", str(folder), "--prompt", "The cat", "--device", "cpu"]) == 1
    assert capsys.readouterr() == ("", "lmbook: It is Tuesday.\n")


def test_no_message_is_empty(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for error, said in ((LmbookError(""), "lmbook: LmbookError"), (KeyboardInterrupt(), "lmbook: interrupted")):
        monkeypatch.setattr(cli, "load_run", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert main(["generate", "anywhere"]) in (1, 130) and capsys.readouterr().err.strip() == said


def test_a_mark_of_byte_order_is_no_part_of_what_is_piped_in(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    said = []
    commands = ["generate --prompt - --tokens 5 --temperature 0 --device cpu".split(), ["tokenize", "-", "--ids"]]
    for command in commands: command.insert(1, str(folder))
    for mark in (b"", b"\xef\xbb\xbf"):
        for words in commands:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(mark + b"The cat")))
            said.append(generated(capsys, *words)[0])
    assert said[:2] == said[2:]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "Standard input is not UTF-8: byte 3" in fails(capsys, "tokenize", folder, "-")


@pytest.mark.parametrize("n", ["0", "-2"])
def test_numbers_that_would_do_nothing(n: str, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert f"--samples={n} must be a whole number, at least 1" in fails(capsys, "generate", folder, "--samples", n)
    for option in ("--steps", "--minutes", "--batch-size", "--vocab-size", "--megabytes"):
        fails(capsys, *train_words(text, tmp_path / "a"), option, n)
    assert not (tmp_path / "a").exists()


def test_words_may_follow_options(folder: Path, capsys: pytest.CaptureFixture):
    ids = load_tokenizer(folder).encode("Hello")
    for words in (["--ids", folder, "Hello"], [folder, "--ids", "Hello"], [folder, "Hello", "--ids"]):
        assert [*map(int, generated(capsys, "tokenize", *words)[0].split())] == ids
    for extra in (["--idss"], ["one", "two"], ["Hello", "--nothing"]): assert main(["tokenize", str(folder), "--ids", *extra]) == 2
    capsys.readouterr()
    assert "which of them is meant" in fails(capsys, "tokenize", folder, "Hello", "--file", folder / "README.md")


def test_a_word_that_is_not_utf_8(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    bad = os.fsdecode(b"caf\xe9")
    generate = ("generate", folder, "--prompt")
    for words in ((*generate, bad), (*generate, "A", "--stop", bad), ("tokenize", folder, bad), train_words(text, tmp_path / bad)):
        assert "not UTF-8" in fails(capsys, *words)
    assert not list(tmp_path.iterdir())


WRONG = (
    "lr=abc clip=abc warmup=x keep=x patience=x accumulate=x min_delta=x deterministic=x dropout=x norm_eps=x rotary_base=x compile=no "
    "bias=maybe tie=maybe lr=true save_every=2.5 device=0"
)


@pytest.mark.parametrize("pair", WRONG.split())
def test_settings_of_another_type_are_one_line(pair: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    said = fails(capsys, *train_words(text, tmp_path / "a", pair))
    assert said.startswith(f"lmbook: {pair.split('=')[0]}=") and " must be " in said and not (tmp_path / "a").exists()


def test_advice_is_in_the_words_of_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "No error tells who types a command to pass a parameter of Python."
    (tmp_path / "gbk.txt").write_bytes("长夜漫漫，无人入睡。\n".encode("gb18030") * 300)
    (tmp_path / "torn.txt").write_bytes("Straße und Café\n".encode() * 300 + b"\xff\n" + "Straße\n".encode())
    (tmp_path / "utf16.txt").write_bytes("A few words.\n".encode("utf-16-le") * 300)
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nno\n')
    (tmp_path / "rows.csv").write_text("body,n\nA,1\n")
    (tmp_path / "twice.csv").write_text("text,text\nA,1\n")
    said = [fails(capsys, *train_words(path, tmp_path / "a")) for path in sorted(tmp_path.iterdir())]
    assert len(said) == 7 and not any(re.search(r"\b\w+=['\[]|a function of|\bpass\b", line) for line in said), said
    assert "--encoding" in said[1]
    for option in ("--column", "--on-error skip"): assert sum(option in line for line in said) == 2
    for options in (["--encoding", "gb18030"], ["--encoding", "detect"]):
        assert main(train_words(tmp_path / "gbk.txt", tmp_path / options[1]) + options) == 0


def test_a_vocabulary_that_is_padded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    "A model may have more ids than its tokenizer: these are never drawn."
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    model = Transformer(preset("tiny", 640, **SMALL))
    with torch.no_grad(): model.out.weight[tokenizer.vocab_size :] *= 50  # they would be drawn all the time
    save_pretrained(model, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    same = "--tokens 100 --samples 3 --seed 1 --temperature 1.5 --device cpu".split()
    for more in ((), ("--regex", "(a|b|c){5}")):
        out, _ = generated(capsys, "generate", tmp_path, *same, *more)
        assert len(out) > 10
    assert "bits per byte" in generated(capsys, "evaluate", tmp_path, "--text", folder / "README.md", "--device", "cpu")[0]


def test_a_finished_run_goes_on(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    words = train_words(text, tmp_path / "my run")
    assert "lmbook generate '" in generated(capsys, *words)[0]
    out, err = generated(capsys, *words, "--steps", "9")
    assert "Finished after 3 steps, it goes on" in err and "bits per byte" in out
    assert max(row["step"] for row in read_log(tmp_path / "my run" / "log.jsonl")) == 9


def test_a_task(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    exam, answers = tmp_path / "exam.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": "The waiters", "choices": [" are", " is"], "answer": i, "kind": "ab"[i]} for i in (0, 1)] * 2
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.write_text('{"prompt": "Who?", "answers": ["the goat"], "prediction": "The goat."}\n')
    out, _ = generated(capsys, "evaluate", folder, "--task", exam, "--metric", "accuracy", "accuracy-bytes", "--device", "cpu")
    assert out.count("by guessing 0.5000") == 2 and re.search(r"accuracy +0\.5000 ± .*n=4", out) and out.count("\n  a ") == 2
    out, _ = generated(capsys, "evaluate", folder, "--task", exam, "--shots", "2", "--json", "--device", "cpu")
    [score] = json.loads(out)["scores"]
    assert score["n"] == 4 and set(score["kinds"]) == {"a", "b"} and score["kinds"]["a"]["value"] + score["kinds"]["b"]["value"] == 1
    out, _ = generated(capsys, "evaluate", "--task", answers, "--json")
    assert [(s["metric"], s["value"], s["error"]) for s in json.loads(out)["scores"]] == [("exact-match", 1.0, None), ("f1", 1.0, None)]
    assert "exact-match" in generated(capsys, "evaluate", folder, "--task", answers, "--device", "cpu")[0]
    for words, says in (
        ((folder,), "--text, to score a model"), ((folder, "--task", exam, "--text", exam), "--text, to score a model"),
        (("--text", exam), "Which model?"), (("--task", exam), "give a model"),
        ((folder, "--text", exam, "--metric", "f1"), "go with --task"), ((folder, "--task", exam, "--shots", "9"), "larger one"),
        ((folder, "--task", exam, "--metric", "bleu"), "not for items with choices"),
        ((folder, "--task", tmp_path / "none.jsonl"), "cannot be read"), ((folder, "--task", folder / "README.md"), "line 1: no JSON"),
        ((folder, "--task", exam, "--shots", "-1"), "--shots"),
    ):  # fmt: skip
        assert says in fails(capsys, "evaluate", *words), words


def test_under_half_a_launcher(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")): monkeypatch.setenv(name, value)
    assert "lacks MASTER_ADDR, MASTER_PORT" in fails(capsys, *train_words(text, tmp_path / "a")) and not (tmp_path / "a").exists()


EARLY = """
import os, signal, sys, threading, time

def interrupt():
    while "torch" not in sys.modules: time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
sys.argv = ["lmbook", "--version"]
import runpy
runpy.run_module("lmbook", run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_ctrl_c_before_anything_is_loaded():
    done = subprocess.run([sys.executable, "-c", EARLY], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 130 and done.stderr.strip() == "lmbook: interrupted" and not done.stdout


def test_a_fault_of_the_program_shows_where_it_is(monkeypatch: pytest.MonkeyPatch):
    "Only what the user can mend is one line: anything else keeps its traceback."
    def broken(*args, **kwargs): raise ValueError("a fault of ours")

    monkeypatch.setattr(cli, "load_run", broken)
    with pytest.raises(ValueError, match="a fault of ours"): main(["generate", "anywhere"])


def test_debug_shows_the_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LMBOOK_DEBUG", "1")
    with pytest.raises(LmbookError, match="There is no folder"): main(["generate", str(tmp_path / "none")])


def test_keys_are_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture):
    key = "a-key-that-nobody-may-see"
    (tmp_path / "keys.txt").write_text(key + "\n", encoding="utf-8")
    out, err = generated(capsys, "serve", "anywhere", "--api-key-file", tmp_path / "keys.txt", "--show-config")
    assert "api_key_file" in out and key not in out + err and "\nkeys" not in out
    (tmp_path / "serve.toml").write_text(f'keys = ["{key}"]\n', encoding="utf-8")
    said = fails(capsys, "serve", "--config", tmp_path / "serve.toml")
    assert "There is no option 'keys'" in said and key not in said
    assert "There is no folder" in fails(capsys, "serve", tmp_path / "none", "--api-key-file", tmp_path / "keys.txt", "--port", "0")
    assert "give keys" in fails(capsys, "serve", tmp_path / "none", "--host", "0.0.0.0")
