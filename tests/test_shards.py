"""Shards: a run that may be killed, what it leaves behind, and the same steps in several processes and on other machines."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest

from lmbook import shards
from lmbook.cleaning import (
    CleaningError,
    Drop,
    ExactDuplicates,
    Language,
    Rewrite,
    apply_steps,
    as_batches,
    as_records,
    drop,
    empty,
    mask_personal_data,
    normalise,
)
from lmbook.corpora import to_dataset, write_jsonl
from lmbook.markup import strip_html
from lmbook.quality import gopher_quality
from lmbook.shards import SHARD_FORMATS, Mark, clean, funnel, read_shards, verify_manifest
from lmbook.small_world import SmallWorld

ROOT = Path(__file__).resolve().parents[1]

STEPS = [Rewrite(strip_html), Rewrite(normalise), Drop(empty), ExactDuplicates(), Drop(gopher_quality), Rewrite(mask_personal_data)]


def rows(n: int = 300) -> list[dict]:
    texts = list(SmallWorld().texts(n=n))
    rng = random.Random(0)
    dirty = [rng.choice([text, texts[0], "", f"<p>{text}</p>", "short"]) if k % 3 else text for k, text in enumerate(texts)]
    return [{"text": text, "id": f"r{k}", "n": k} for k, text in enumerate(dirty)]


def files(folder: Path) -> int: return len(list(folder.rglob("*"))) if folder.exists() else 0


def contents(folder: Path) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", SHARD_FORMATS)
def test_a_run_in_each_format(tmp_path, form):
    manifest = clean(rows(), STEPS, tmp_path / "out", format=form, shard_size=70)
    back = list(read_shards(tmp_path / "out"))
    parts = manifest["shards"]
    assert manifest["input"]["records"] == 300
    assert len(back) == manifest["output"]["records"] == funnel(manifest)[-1][1] == sum(s["records"] for s in parts)
    assert {s["records"] for s in parts[:-1]} <= {70}
    assert set(contents(tmp_path / "out")) == {"manifest.json", *(s["name"] for s in parts)}
    assert [int(r["n"]) for r in back] == sorted(int(r["n"]) for r in back)
    assert not any("exact_key" in r or "dropped" in r for r in back)
    whole, _ = apply_steps(next(as_batches(rows(), 300)), STEPS[:4])
    whole = drop(whole, dict(enumerate(STEPS[3].decide(whole["exact_key"]))))
    whole, _ = apply_steps(whole, STEPS[4:])
    assert [r["text"] for r in back] == [t for t, why in zip(whole["text"], whole["dropped"]) if why is None]


def test_the_same_run_gives_the_same_bytes_whatever_the_workers(tmp_path):
    clean(rows(), STEPS, tmp_path / "a", shard_size=100, format="parquet")
    clean(rows(), STEPS, tmp_path / "b", shard_size=100, format="parquet", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before = contents(tmp_path / "a")
    clean(rows(), STEPS, tmp_path / "a", shard_size=100, format="parquet")  # a finished run is not done again
    assert contents(tmp_path / "a") == before


PROGRAM = """
import sys, time
import lmbook.cleaning as c
from lmbook.corpora import read_jsonl
from lmbook.markup import strip_html
from lmbook.quality import gopher_quality
from lmbook.shards import clean

def slow(batch):
    time.sleep(.02)
    return batch

if __name__ == "__main__":
    steps = [c.Rewrite(strip_html), slow, c.Rewrite(c.normalise), c.Drop(c.empty), c.ExactDuplicates(), slow, c.Drop(gopher_quality)]
    clean(read_jsonl(sys.argv[1]), steps, sys.argv[2], format=sys.argv[3], shard_size=20)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL; the notebook shows the same with SIGTERM")
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, form):
    write_jsonl(rows(), tmp_path / "in.jsonl")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "program.py", "in.jsonl", out, form]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole = start("whole")
    assert whole.wait() == 0, whole.stderr.read()
    rng, killed, states = random.Random(form), 0, set()
    for _ in range(60):
        process = start("broken")
        target = files(tmp_path / "broken") + rng.randrange(1, 8)  # die when so many more files are there, and a random moment later
        while process.poll() is None and files(tmp_path / "broken") < target: time.sleep(.001)
        time.sleep(rng.random() * .03)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            states.add(files(tmp_path / "broken"))
        else:
            assert process.returncode == 0, process.stderr.read()
            break
        if killed == 6:
            last = start("broken")
            assert last.wait() == 0, last.stderr.read()
            break
    assert killed >= 5 and len(states) > 2
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_a_crash_after_any_file_is_survived(tmp_path, monkeypatch, at):
    "In one process, so that every place between two files is reached."
    ordinary, written = shards.write_whole, []

    def failing(path, data, error):
        if len(written) == at: raise OSError("the disk is full")
        ordinary(path, data, error)
        written.append(path)

    clean(rows(120), STEPS, tmp_path / "whole", shard_size=20)
    monkeypatch.setattr(shards, "write_whole", failing)
    try: clean(rows(120), STEPS, tmp_path / "broken", shard_size=20)
    except OSError: crashed = True
    else: crashed = False
    assert crashed == (len(written) == at)
    monkeypatch.setattr(shards, "write_whole", ordinary)
    clean(rows(120), STEPS, tmp_path / "broken", shard_size=20)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch, at):
    "The disk fails after the bytes of a file were handed over and before they are safe: no file of its name may be there."
    clean(rows(120), STEPS, tmp_path / "whole", shard_size=20)
    ordinary, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) > at: raise OSError("the disk has gone")
        ordinary(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CleaningError, match="cannot be written: the disk has gone"):
        clean(rows(120), STEPS, tmp_path / "broken", shard_size=20)
    monkeypatch.undo()
    safe = [p for p in (tmp_path / "broken").rglob("*") if p.is_file()]
    assert len(safe) == at
    clean(rows(120), STEPS, tmp_path / "broken", shard_size=20)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


class Broken(Exception): pass


def breaks_at(word: str, text: str) -> str:
    if word in text: raise Broken
    return text


def unfinished(folder: Path, data: list[dict], stages: int = 2) -> list:
    "A run that failed in its last chunk, in the first stage or in the second; its steps."
    steps = [Rewrite(strip_html), *[ExactDuplicates()] * (stages - 1), Rewrite(partial(breaks_at, data[-1]["text"][:30]))]
    with pytest.raises(Broken): clean(data, steps, folder, shard_size=20)
    return steps


def changed(data: list[dict], at: int) -> list[dict]: return [{**r, "text": r["text"] + "!"} if k == at else r for k, r in enumerate(data)]


@pytest.mark.parametrize("other", [
    lambda d: d[:-1], lambda d: d[:40], lambda d: [*d, d[0]], lambda d: changed(d, 0), lambda d: changed(d, 55), lambda d: d[::-1],
])
@pytest.mark.parametrize("stages", [0, 1, 2])  # 0: the run is finished; else it failed in its last chunk, in the first or second stage
def test_another_corpus_is_refused(tmp_path, other, stages):
    data = [{"text": f"{k} " + t} for k, t in enumerate(SmallWorld().texts(n=60))]
    if stages == 0: steps = [Drop(empty)]; clean(data, steps, tmp_path / "out", shard_size=20)
    else: steps = unfinished(tmp_path / "out", data, stages)
    before, given = contents(tmp_path / "out"), other(data)
    if stages == 1 and given[:40] == data[:40]: return  # the chunk that differs was never finished: the run may go on with this corpus
    with pytest.raises(CleaningError, match="another corpus"): clean(given, steps, tmp_path / "out", shard_size=20)
    assert contents(tmp_path / "out") == before


def adds(n: int): return lambda text: text + str(n)


@pytest.mark.parametrize("first, second", [
    ([Drop(empty)], [Drop(gopher_quality)]), ([Language()], [Language(at_least=.5)]), ([Drop(empty)], [Drop(empty), Drop(empty)]),
    ([Rewrite(normalise), Drop(empty)], [Drop(empty), Rewrite(normalise)]), ([Rewrite(adds(1))], [Rewrite(adds(2))]),
    ([Rewrite(lambda t: t + "a")], [Rewrite(lambda t: t + "b")]),
    ([Rewrite(partial(strip_html, link_density=.5))], [Rewrite(partial(strip_html, link_density=.6))]),
])
def test_other_steps_are_refused(tmp_path, first, second):
    clean(rows(30), first, tmp_path / "out")
    with pytest.raises(CleaningError, match=r"other settings \(steps differ"): clean(rows(30), second, tmp_path / "out")
    clean(rows(30), first, tmp_path / "out")
    with pytest.raises(CleaningError, match="format differ"): clean(rows(30), first, tmp_path / "out", format="csv")


def test_two_processes_do_not_clean_into_one_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    hold = "import sys; from lmbook.core import claim; held = claim(sys.argv[1]); print('held', flush=True); input()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", hold, str(out)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CleaningError, match="Another process is cleaning into .* Wait for it, or give another folder"):
            clean(rows(30), [Drop(empty)], out)
        assert contents(out) == {}
    finally: other.kill(); other.wait()
    assert clean(rows(30), [Drop(empty)], out)["output"]["records"]  # a lock goes with its process
    (tmp_path / "file").touch()
    with pytest.raises(CleaningError, match="cannot be made"): clean(rows(30), [Drop(empty)], tmp_path / "file" / "inside")


def test_a_description_does_not_depend_on_the_process():
    code = (
        "import json; import lmbook.cleaning as c; from lmbook.markup import strip_html; "
        "from lmbook.quality import gopher_quality; from lmbook.shards import _describe; "
        "steps = c.Rewrite(strip_html), c.Language(), c.Drop(gopher_quality), c.ExactDuplicates(); "
        "print(json.dumps([*map(_describe, steps)]))"
    )
    seen = set()
    for seed in "123":
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout)
    assert len(seen) == 1 and json.loads(seen.pop())


@pytest.mark.parametrize("call, message", [
    (lambda out: clean([], [Drop(empty)], out), "empty: there is no record"),
    (lambda out: clean([{"text": ""}], [Drop(empty)], out), r"Nothing is left.*empty \(1\)"),
    (lambda out: clean(iter([{"text": "a"}]), [], out), "read only once"),
    (lambda out: clean([{"text": "a"}], [], out, format="xml"), "no format='xml'.*jsonl, csv, parquet"),
    (lambda out: clean([{"text": "a"}], [], out, shard_size=0), "shard_size=0 must be.*at least 1"),
    (lambda out: clean([{"text": "a"}], [], out, workers=0), "workers=0 must be.*at least 1"),
    (lambda out: clean([{"text": "a", "dropped": 1}], [], out), "'dropped'.*Rename"),
    (lambda out: clean([{"text": "a", "x": 1}, {"text": "b", "x": "y"}], [], out), "'x' holds values of different kinds"),
    (lambda out: clean([{"text": "a", "x": 1}, {"text": "b", "x": "y"}], [], out, shard_size=1), "different kinds"),
    (lambda out: clean([{"text": "a\ud800"}], [], out), "half a character"),
    (lambda out: clean([{"body": "a"}], [Drop(empty)], out), "no column 'text'"),
    (lambda out: verify_manifest(out), "There is no manifest.json"),
])
def test_bad_input_has_one_clear_error(tmp_path, call, message):
    with pytest.raises(CleaningError, match=message): call(tmp_path / "out")


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CleaningError, match="no manifest of ours"): clean(rows(5), [], tmp_path)
    with pytest.raises(CleaningError, match="is a file"): clean(rows(5), [], tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "part-00001.jsonl").unlink(), "part-00001.jsonl is missing"),
    (lambda f: (f / "part-00000.jsonl").write_text("x", encoding="utf-8"), "is not the one"),
    (lambda f: (f / "part-00009.jsonl").write_text("x", encoding="utf-8"), "part-00009.jsonl is not in the manifest"),
    (lambda f: (f / "manifest.json").write_text("{", encoding="utf-8"), "is damaged"),
    (lambda f: (f / "manifest.json").write_text("[]", encoding="utf-8"), "is damaged"),
])
def test_a_manifest_that_does_not_match_its_shards(tmp_path, harm, message):
    clean(rows(50), [Drop(empty)], tmp_path / "out", shard_size=20)
    harm(tmp_path / "out")
    for call in (read_shards, verify_manifest, lambda f: clean(rows(50), [Drop(empty)], f, shard_size=20)):
        with pytest.raises(CleaningError, match=message): call(tmp_path / "out")


def test_unfinished_work_says_so(tmp_path):
    unfinished(tmp_path / "out", [{"text": f"{k} tea"} for k in range(50)])
    with pytest.raises(CleaningError, match="run clean again"): read_shards(tmp_path / "out")


def test_records_of_many_shapes_come_back(tmp_path):
    data = [
        {"text": 'a,"b"\nc', "tags": ["x", "y"], "meta": {"k": 1}}, {"text": "茶 🍵", "score": 1.5}, {"text": "z", "score": 2, "tags": []},
    ]
    clean(data, [], tmp_path / "j", shard_size=1)
    back = list(read_shards(tmp_path / "j"))
    assert [r["text"] for r in back] == [r["text"] for r in data]
    assert back[0]["meta"] == {"k": 1} and back[1]["score"] == 1.5 and back[2]["tags"] == []
    clean(data, [], tmp_path / "c", format="csv")
    assert [r["text"] for r in read_shards(tmp_path / "c")] == [r["text"] for r in data]


def test_what_a_killed_run_was_writing_does_not_stay(tmp_path):
    "A file that was not complete has a name of its own; the next run takes it away, and nothing else."
    steps = unfinished(tmp_path / "out", data := [{"text": f"{k} tea"} for k in range(50)])
    for name in (".part-00000.jsonl.abc_1", ".manifest.json.xyz", ".unfinished/.0-000001.arrow.abc", ".mine"):
        (tmp_path / "out" / name).write_text("half", encoding="utf-8")
    with pytest.raises(Broken): clean(data, steps, tmp_path / "out", shard_size=20)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".mine", ".unfinished"}
    assert not list((tmp_path / "out" / ".unfinished").glob(".*"))


def test_marks_go_by_id(): assert Mark({"b": "gone"})({"id": ["a", "b"], "text": ["", ""]})["dropped"] == [None, "gone"]


# ------------------------------------------------------------------------------------------------------------------- other runners

PLAIN = [Rewrite(strip_html), Rewrite(normalise), Drop(empty), Drop(gopher_quality), Rewrite(mask_personal_data)]


def in_a_loop(data: list[dict]) -> list[tuple]:
    return [(r["id"], r["text"], r["dropped"]) for b in as_batches(data, 64) for r in as_records(apply_steps(b, PLAIN)[0])]


def test_the_same_under_datasets_in_two_processes():
    table = to_dataset([{**r, "dropped": None} for r in rows()])
    table = table.cast(datasets.Features({**table.features, "dropped": datasets.Value("string")}))
    for step in PLAIN: table = table.map(step, batched=True, num_proc=2)
    assert [(r["id"], r["text"], r["dropped"]) for r in table] == in_a_loop(rows())


RAY = """
import json, sys, warnings
import ray
from lmbook.cleaning import *
from lmbook.corpora import read_jsonl
from lmbook.markup import strip_html
from lmbook.quality import gopher_quality
from lmbook.shards import Mark

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
steps = [Rewrite(strip_html), Rewrite(normalise), Drop(empty), Drop(gopher_quality), Rewrite(mask_personal_data)]
data = ray.data.from_items([{k: r[k] for k in ("id", "text", "n")} for r in read_jsonl("in.jsonl")], override_num_blocks=4)
for step in steps: data = data.map_batches(step, batch_size=64)
twins = ExactDuplicates()
found = sorted(data.map_batches(twins).take_all(), key=lambda r: r["n"])
reasons = twins.decide([r["exact_key"] for r in found])
marked = data.map_batches(Mark({r["id"]: why for r, why in zip(found, reasons) if why})).take_all()
plain = [(r["id"], r["text"], r["dropped"]) for r in found]
print(json.dumps({"plain": plain, "marked": sum(r["dropped"] == "exact duplicate" for r in marked), "decided": sum(map(bool, reasons))}))
"""


@pytest.mark.slow
def test_the_same_under_ray(tmp_path):
    if not os.environ.get("CI"): pytest.importorskip("ray", reason="ray is not installed: pip install 'lmbook[ray]'")
    write_jsonl(rows(), tmp_path / "in.jsonl")
    (tmp_path / "program.py").write_text(RAY, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert [tuple(r) for r in result["plain"]] == in_a_loop(rows()) and result["marked"] == result["decided"] > 0
