"""Every benchmark runs dry (tiny, on made-up data) and leaves the repository alone; and the entry that they share does what it says.

The benchmarks are found in their folder, so a new one is tested by itself. They run in this process: to start one for each takes minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import RESULTS, Benchmark, Option, in_turns, main, names, read_results, rounded, run, show, write_whole

ROOT = Path(__file__).parents[1]
FACTS = {"command", "date", "machine", "threads", "options", "measured"}  # beside what a benchmark measures
BY_PART = {"machine", "date", "threads", "seconds", "load_before"}  # older results have them within a part, new ones under `measured`
FEWER = {("compression", "stories"), ("compression", "shakespeare"), ("privacy", "memorisation")}  # parts of which a dry run has fewer rows
MOVED = {"optimizers": {"rounds", "copies"}}  # keys of stored results that now stand under `options`


def stored(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def files(folder: Path = ROOT) -> dict[str, tuple[int, int]]:
    "Size and time of each file of the repository. Not of nbs/ and docs/, where other tests are at work at the same time."
    found = {}
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name.endswith(".egg-info"): continue
        if path.name in ("__pycache__", "nbs", "docs", "build", "dist"): continue
        if path.is_dir(): found |= files(path)
        else: found[str(path.relative_to(ROOT))] = path.stat().st_size, path.stat().st_mtime_ns
    return found


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch, tmp_path):
    "Benchmarks set the number of threads and write where they are started; neither may reach other tests."
    torch, here = sys.modules.get("torch"), tmp_path / "here"
    threads = torch.get_num_threads() if torch else 1
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    if torch := sys.modules.get("torch"): torch.set_num_threads(threads)
    assert not list(here.iterdir()), "a benchmark has written into the current folder"


# ---------------------------------------------------------------- all benchmarks


@pytest.mark.parametrize("name", names())
def test_a_dry_run_measures_everything_and_changes_nothing(name, tmp_path, capsys):
    out, before = tmp_path / "out.json", files()
    run(name, ["--dry", "--out", str(out)])
    printed = capsys.readouterr().out
    results = json.loads(out.read_text(encoding="utf-8"))
    parts = sys.modules[f"benchmarks.{name}"].BENCHMARK.parts
    there = {part for part, how in parts.items() if all(map(find_spec, how.needs))}  # some compare with packages that few have
    assert results["measured"].keys() == there <= results.keys()
    assert all(f"{part}: left out" in printed for part in parts.keys() - there)
    assert "left out, since it needs the data set" not in printed and "left out, since there is no folder" not in printed
    assert FACTS <= results.keys() and results["dry"] is True and f"python -m benchmarks.{name} --dry" == results["command"]
    assert {"cpu", "cores", "python", "packages"} <= results["machine"].keys() and results["machine"]["packages"]
    for part, facts in results["measured"].items():
        assert results[part] not in (None, [], {}), f"{part} has measured nothing"
        assert f"\n{part}\n" in printed and facts["seconds"] > 0
    for part, old, new in ((part, stored(name)[part], results[part]) for part in there if part in stored(name)):
        row, fresh = (old[0], new[0]) if isinstance(old, list) else (old, new)
        if not isinstance(row, dict): continue
        known = {key for key in row if key not in BY_PART and "-gram" not in key}
        assert fresh.keys() <= known and fresh if (name, part) in FEWER else known <= fresh.keys(), part
    assert str(ROOT) not in json.dumps(results) and str(tmp_path) not in json.dumps(results)
    assert files() == before, "a dry run has changed the repository"


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_stored_results_have_the_parts_that_their_benchmark_measures(name):
    run_of = __import__(f"benchmarks.{name}", fromlist=["BENCHMARK"]).BENCHMARK
    settings = common.parse(name, run_of, "", [])
    unknown = stored(name).keys() - FACTS - run_of.parts.keys() - run_of.facts(settings).keys() - MOVED.get(name, set())
    assert not unknown, f"who measures {unknown}?"


def test_each_benchmark_says_in_a_line_what_it_measures_and_is_no_stranger_to_the_list(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    for name, about in names().items():
        assert 20 < len(about) < 160, name
        assert any(line.split() and line.split()[0] == name and line.endswith(about) for line in lines)
    assert not {"common", "made_up", "__main__"} & names().keys()


@pytest.mark.parametrize("form", [["benchmarks"], ["benchmarks", "small_world", "--help"], ["benchmarks.small_world", "--help"]])
def test_the_ways_to_start_one(form):
    done = subprocess.run([sys.executable, "-m", *form], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "How fast Small World writes, scores and counts." in done.stdout
    assert ("--texts" in done.stdout) == (len(form) > 1)


def test_importing_a_benchmark_leaves_the_environment_alone():
    code = "import os; before = dict(os.environ); import benchmarks.small_world; assert os.environ == before"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- the entry


@pytest.fixture
def toy(monkeypatch):
    "A benchmark of three parts, one of which needs data and one a package that does not exist; and what its parts were told."
    options, told = [Option("copy-steps", 600, 2), Option("sizes", [1, 2], [1])], []
    benchmark = Benchmark(packages=("numpy", "no-such-package"), seeds=3, options=options)

    @benchmark.part()
    def first(settings):
        told.append(settings)
        return [{"size": settings.pick(1000, 10), "third": 1 / 3, "before": settings.before}]

    @benchmark.part("10 M")
    def second(settings): return {"seeds": settings.seeds}

    @benchmark.part(data=["tinyshakespeare"])
    def third(settings): return {"bytes": (settings.folder("tinyshakespeare") / "input.txt").stat().st_size}

    @benchmark.part(needs=["no_such_package"])
    def fourth(settings): raise AssertionError("must be left out")

    module = types.ModuleType("benchmarks.toy", "How long a toy takes.\n\nMore.")
    module.BENCHMARK = benchmark
    monkeypatch.setitem(sys.modules, "benchmarks.toy", module)
    return told


def test_options_a_real_run_and_a_dry_one(toy, tmp_path):
    real, dry = tmp_path / "real.json", tmp_path / "dry.json"
    run("toy", ["--out", str(real)])
    run("toy", ["--dry", "--out", str(dry)])
    run("toy", ["--dry", "--seeds", "2", "--copy-steps", "7", "--sizes", "4", "5"])
    assert [(s.dry, s.seeds, s.copy_steps, s.sizes) for s in toy] == [(False, 3, 600, [1, 2]), (True, 1, 2, [1]), (True, 2, 7, [4, 5])]
    assert toy[2].command == "python -m benchmarks.toy --dry --seeds 2 --copy-steps 7 --sizes 4 5"
    found = json.loads(real.read_text(encoding="utf-8"))
    assert found["first"] == [{"size": 1000, "third": 0.3333, "before": None}] and found["10 M"] == {"seeds": 3}
    assert found["options"] == {"seeds": 3, "copy_steps": 600, "sizes": [1, 2]} and list(found["machine"]["packages"]) == ["numpy"]
    assert "third" not in found and "dry" not in found
    found = json.loads(dry.read_text(encoding="utf-8"))
    assert found["first"][0]["size"] == 10 and found["third"]["bytes"] > 1000 and found["dry"] is True
    assert list(found)[-3:] == ["first", "10 M", "third"]


def test_a_dry_run_without_out_writes_nothing_and_a_real_one_into_results(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    run("toy", ["--dry"])
    assert not (tmp_path / "results").exists() and "nothing is written" in capsys.readouterr().out
    run("toy", ["--only", "first"])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["toy.json"]


@pytest.mark.parametrize("form", [["first,10 M"], ["first", "10 M"]])
def test_some_parts_and_the_others_stay(toy, tmp_path, form):
    out = tmp_path / "out.json"
    old = {"first": "old", "10 M": "old", "third": "old", "gone": 1, "measured": {"third": {"date": "then"}}}
    out.write_text(json.dumps(old), encoding="utf-8")
    run("toy", ["--only", *form, "--seeds", "1", "--out", str(out)])
    found = read_results(out, dry=False)
    assert found["first"][0]["before"] == "old" and found["10 M"] == {"seeds": 1} and found["third"] == "old"
    assert found["measured"].keys() == {"first", "10 M", "third"} and found["measured"]["third"] == {"date": "then"}
    assert "gone" not in found and found["command"] == "python -m benchmarks.toy --seeds 1"


def test_dry_and_real_results_are_never_mixed(toy, tmp_path):
    out = tmp_path / "out.json"
    run("toy", ["--dry", "--out", str(out)])
    run("toy", ["--only", "first", "--out", str(out)])
    assert "10 M" not in read_results(out, dry=False) and read_results(out, dry=True) == {}


def test_what_is_missing_is_said_and_left_out(toy, tmp_path, capsys):
    out = str(tmp_path / "out.json")
    run("toy", ["--out", out])
    printed = capsys.readouterr().out
    assert "third: left out, since it needs the data set tinyshakespeare: pass --data" in printed
    assert "fourth: left out, since the package no_such_package is not installed" in printed
    with pytest.raises(SystemExit, match="nothing was measured"): run("toy", ["--only", "third", "--out", out])
    with pytest.raises(SystemExit, match="nothing was measured"): run("toy", ["--only", "third", "--out", out, "--data", str(tmp_path)])
    assert "no folder tinyshakespeare" in capsys.readouterr().out
    data = tmp_path / "tinyshakespeare"
    data.mkdir()
    (data / "input.txt").write_text("abc", encoding="utf-8")
    for given in (tmp_path, data):  # the folder of the data sets, or that of this one
        run("toy", ["--only", "third", "--out", out, "--data", str(given)])
        found = read_results(Path(out), dry=False)
        assert found["third"] == {"bytes": 3} and found["command"] == "python -m benchmarks.toy --data DATA"


@pytest.mark.parametrize("wrong, message", [
    (["--nonsense"], "unrecognized arguments: --nonsense"), (["--see", "3"], "unrecognized arguments: --see 3"),
    (["--seeds", "x"], "argument --seeds: invalid int value: 'x'"), (["--seeds", "0"], "--seeds: at least 1"),
    (["--only", "fifth"], "there is no part 'fifth'; there are first, 10 M, third, fourth"),
    (["--data", "nowhere"], "--data: there is no folder nowhere"), (["--out", "nowhere/x.json"], "--out: there is no folder nowhere"),
    (["--dry", "--data", "."], "--dry makes up its own data"),
])  # fmt: skip
def test_a_wrong_option_is_one_line_and_measures_nothing(toy, capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped: run("toy", wrong)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"python -m benchmarks.toy: {message}") and error.count("\n") == 1
    assert not toy


def test_other_errors(toy, tmp_path):
    with pytest.raises(SystemExit, match="there is no benchmark 'atention'; there are attention, "): main(["atention"])
    (tmp_path / "out.json").write_text('{"first": ', encoding="utf-8")
    with pytest.raises(SystemExit, match="is not a file of results"): run("toy", ["--out", str(tmp_path / "out.json")])
    assert not toy and (tmp_path / "out.json").read_text(encoding="utf-8") == '{"first": '


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "x.json"

    def interrupted(*_): raise KeyboardInterrupt

    write_whole(path, "old\n")
    with monkeypatch.context() as broken:
        broken.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt): write_whole(path, "new\n" * 10_000)
    assert path.read_bytes() == b"old\n" and {p.name for p in tmp_path.iterdir()} == {"here", "x.json"}  # and no half a file
    write_whole(path, "new\n")
    assert path.read_bytes() == b"new\n"


def test_what_was_measured_before_an_interruption_is_kept(toy, tmp_path):
    out, parts = tmp_path / "out.json", sys.modules["benchmarks.toy"].BENCHMARK.parts

    def interrupted(settings): raise KeyboardInterrupt

    parts["10 M"] = common.Part(interrupted, (), ())
    with pytest.raises(KeyboardInterrupt): run("toy", ["--out", str(out)])
    assert read_results(out, dry=False)["measured"].keys() == {"first"}


def test_all_take_turns_in_alternating_order():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, repeat=2)
    assert "".join(order) == "ab" + "aabb" + "bbaa" and {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}
    clock = iter(range(100)).__next__
    assert in_turns({"a": lambda: None}, 3, repeat=2, clock=clock, warm_up=False) == {"a": [.5, .5, .5]}


def test_tables(capsys):
    show([{"name": "a", "n": 12345, "x": 0.00123456}, {"name": "bcd", "x": 1234.5, "more": [1, 2]}], "")
    assert capsys.readouterr().out == ("name       n         x  more\n"
                                       "a     12,345  0.001235\n"
                                       "bcd              1,234   1 2\n")
    show({"one": {"x": 1}, "two": {"x": 2, "y": True}}, "")
    assert capsys.readouterr().out == "     x     y\none  1\ntwo  2  True\n"
    show({"n": 3, "rows": [{"x": 1}]}, "")
    assert capsys.readouterr().out == "n: 3\nrows\n  x\n  1\n"
    assert rounded({"a": [1.23456, (2, 0.5)]}) == {"a": [1.235, [2, 0.5]]}
