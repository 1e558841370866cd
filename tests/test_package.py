"""The package as others get it: what is in the wheel, what it needs, what an import costs; and that README, Makefile and pins are true."""

from __future__ import annotations

import configparser
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import textwrap
import time
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email.parser import Parser
from functools import cache
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lmbook
import tools.notebooks
from docs import build, stage

ROOT = tools.notebooks.ROOT
CORE = {"torch", "numpy", "sentencepiece", "datasets", "matplotlib", "tqdm", "safetensors", "pyarrow", "tyro"}
EXTRAS = {
    "corpora", "cleaning", "tokenization", "tensorboard", "distributed", "privacy", "ray", "engines", "serving", "flower",
    "book", "docs", "parity", "harness",
    "compiled",
    "test", "dev",
}  # fmt: skip
NBDEV = {"nbdev": "==2.4.14", "fastcore": "<2", "execnb": "<0.2", "ghapi": "<2"}  # the last that reads settings.ini, and what it needs
MODULES = sorted(p.stem for p in (ROOT / "lmbook").glob("*.py") if p.stem[0] != "_")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@cache
def settings_version() -> str:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["version"]


def requirements(extra: str | None = None) -> list[Requirement]:
    project = PYPROJECT["project"]
    return [*map(Requirement, project["dependencies"] if extra is None else project["optional-dependencies"][extra])]


def closure(wanted: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    "The installed distributions that these requirements bring, with all that they require themselves."
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(r, extra) for r in wanted for extra in ("", *r.extras)]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen: continue
        seen.add((name, extra))
        try: found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue  # for another platform, or (nvidia-...) for another build of torch
        for row in map(Requirement, found[name].requires or ()):
            if row.marker is None or row.marker.evaluate({"extra": extra}): queue += [(row, e) for e in ("", *row.extras)]
    return found


def python(*args: str | Path, cwd: Path | None = None, executable: str | Path = sys.executable, **env: str) -> str:
    "Run Python in a process of its own; its output. Raises with all that it printed if it fails."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    done = subprocess.run([str(executable), *map(str, args)], cwd=cwd, env=kept | env, text=True, encoding="utf-8", capture_output=True)
    if done.returncode: raise AssertionError(f"{done.stdout}\n{done.stderr}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------------------------------ the wheel

@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The wheel, built by way of the source distribution from a copy that holds nothing else."
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lmbook", source / "lmbook", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    try: isolated = Version(metadata.version("setuptools")) < Version("77")  # an older one here: let build fetch the one it needs
    except metadata.PackageNotFoundError: isolated = True
    python("-m", "build", "--outdir", source / "dist", *([] if isolated else ["--no-isolation"]), source, PIP_DISABLE_PIP_VERSION_CHECK="1")
    [sdist], [path] = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    assert sdist.stat().st_size < 3e6
    return path


def wheel_metadata(path: Path):
    with zipfile.ZipFile(path) as f:
        [name] = [n for n in f.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(f.read(name).decode("utf-8"))


def test_the_wheel_holds_the_package_its_data_and_its_licence_and_no_more(wheel: Path):
    with zipfile.ZipFile(wheel) as f: names = set(f.namelist())
    code = {n for n in names if n.startswith("lmbook/")}
    here = {p for p in (ROOT / "lmbook").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert code == {p.relative_to(ROOT).as_posix() for p in here}
    assert {"lmbook/py.typed", "lmbook/__init__.py"} <= code
    assert {
        f"lmbook/data/{name}" for name in ("small_world.toml", "reader.jsonl", "claims.toml", "book.mplstyle", "python_docs.txt")
    } <= code
    assert all(".dist-info/" in n for n in names - code), "a stray top-level package"
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert wheel.name == f"lmbook-{settings_version()}-py3-none-any.whl" and wheel.stat().st_size < 3e6


def test_the_wheel_requires_the_light_core_and_offers_the_extras(wheel: Path):
    info = wheel_metadata(wheel)
    rows = [*map(Requirement, info.get_all("Requires-Dist"))]
    assert {r.name for r in rows if r.marker is None} == CORE
    assert set(info.get_all("Provides-Extra")) == EXTRAS
    assert all(re.fullmatch(r'(python_version < "3\.13" and )?extra == "(\w+)"', str(r.marker)) for r in rows if r.marker)
    assert {r.name for r in rows if "python_version" in str(r.marker)} == {r.name for r in requirements("compiled")}
    assert all(r.specifier for r in rows if r.name != "lmbook"), "a requirement without a range"
    assert (info["Version"], info["Requires-Python"], info["License-Expression"]) == (settings_version(), ">=3.11", "Apache-2.0")
    assert "## Two commands" in info.get_payload()


def test_the_wheel_brings_the_command(wheel: Path):
    with zipfile.ZipFile(wheel) as f:
        [name] = [n for n in f.namelist() if n.endswith(".dist-info/entry_points.txt")]
        text = f.read(name).decode()
    assert re.search(r"\[console_scripts\]\nlmbook = lmbook\.__main__:run\n", text)


def test_there_is_one_version(wheel: Path):
    assert lmbook.__version__ == settings_version() == wheel_metadata(wheel)["Version"] == metadata.version("lmbook")
    assert "version" in PYPROJECT["project"]["dynamic"] and "version" not in PYPROJECT["project"]


class Fence:
    "A finder that lets nothing be imported but the standard library, lmbook, and the modules named: as if nothing else were installed."

    def __init__(self, allowed: Iterable[str]): self.allowed = set(allowed) | {"lmbook"}

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        top = name.partition(".")[0]
        if top in self.allowed or top in sys.stdlib_module_names: return
        raise ModuleNotFoundError(f"No module named {name!r} (not in the core)", name=name)


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The interpreter of a new environment that holds the wheel and nothing else, not even pip."
    folder = tmp_path_factory.mktemp("empty")
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = ["-m", "pip", "--disable-pip-version-check", "--python", executable]
    python(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert python(*pip, "list", "--format", "freeze").split() == [f"lmbook=={settings_version()}"]
    return executable


def test_it_installs_and_imports_in_an_empty_environment(empty: Path, tmp_path: Path):
    code = """
        import importlib.metadata, importlib.resources, lmbook, lmbook.claims
        files = sorted(p.name for p in importlib.resources.files("lmbook.data").iterdir())
        assert importlib.metadata.version("lmbook") == lmbook.__version__
        print(lmbook.__version__, len(lmbook.claims.load_claims()) if hasattr(lmbook.claims, "load_claims") else "", *files)
    """
    out = python("-I", "-c", textwrap.dedent(code), cwd=tmp_path, executable=empty).split()
    assert out[0] == settings_version() and {"small_world.toml", "reader.jsonl", "book.mplstyle", "python_docs.txt"} <= set(out)


def test_every_module_imports_with_nothing_but_the_core(empty: Path, tmp_path: Path):
    "The core's distributions, with what they require, are lent to the empty environment; a fence hides all others that lie beside them."
    core = closure(requirements())
    assert core.keys() >= CORE
    allowed = {f.parts[0].partition(".")[0] for d in core.values() for f in d.files or () if f.parts[0] not in ("..", "__pycache__")}
    lent = sorted({str(Path(str(d.locate_file("")))) for d in core.values()})
    code = f"""
        import importlib, sys
        {textwrap.indent(inspect.getsource(Fence).replace("Iterable[str]", "object"), " " * 8).strip()}
        sys.path += {lent!r}
        sys.meta_path.insert(0, Fence({sorted(allowed)!r}))
        for module in {MODULES + ["_modidx"]!r}: importlib.import_module("lmbook." + module)
        for outside in ("mwparserfromhell", "jupyterlab", "nbdev", "pytest", "IPython"):  # they lie there, but are not part of the core
            try: importlib.import_module(outside)
            except ModuleNotFoundError: continue
            sys.exit(outside + " could be imported: the fence has a hole")
        import lmbook.corpora, numpy
        print(lmbook.corpora.__file__, numpy.__version__)
    """
    where, numpy_version = python("-I", "-c", textwrap.dedent(code), cwd=tmp_path, executable=empty).rsplit(maxsplit=1)
    assert Path(where).is_relative_to(empty.parent.parent), "it imported the checkout, not the wheel"
    assert numpy_version == metadata.version("numpy") and importlib.util.find_spec("mwparserfromhell")


# ---------------------------------------------------------------------------------------------------------------------------- the imports

def newly_imported(statement: str) -> set[str]:
    "The top-level modules, besides the standard library, that a statement loads."
    code = f"import json, sys; before = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - before)))"
    return {name.partition(".")[0] for name in json.loads(python("-c", code, cwd=ROOT))} - sys.stdlib_module_names


def test_importing_the_package_loads_nothing_else():
    assert newly_imported("import lmbook") == {"lmbook"}
    assert "numpy" in newly_imported("import lmbook.corpora"), "this test would not see a module that is loaded"


@pytest.mark.parametrize("module", [m for m in MODULES if m in ("claims", "corpora", "grammar", "small_world")])
def test_chapters_about_text_do_not_load_torch(module: str):
    assert not newly_imported(f"import lmbook.{module}") & {"torch", "matplotlib", "datasets", "pandas", "pyarrow", "IPython"}


# -------------------------------------------------------------------------------------------------------------------- what it exports

def exported() -> list[tuple[str, object]]:
    out = []
    for name in MODULES:
        module = importlib.import_module(f"lmbook.{name}")
        assert module.__doc__, f"lmbook.{name} does not say what it is"
        out += [(f"lmbook.{name}.{public}", getattr(module, public)) for public in module.__all__]
    return out


def own_doc(thing: object) -> str:
    "The docstring that somebody wrote: not inherited, and not the signature that dataclass and NamedTuple put there."
    doc = vars(thing).get("__doc__") or "" if inspect.isclass(thing) else getattr(thing, "__doc__", None) or ""
    return "" if inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(") else doc


def unannotated(function: Callable, needs_return: bool = True) -> list[str]:
    signature = inspect.signature(function)
    rows = [n for i, (n, p) in enumerate(signature.parameters.items()) if p.annotation is p.empty and not (i == 0 and n in ("self", "cls"))]
    return rows + ["return"] * (needs_return and signature.return_annotation is signature.empty)


CALLABLES = [(name, thing) for name, thing in exported() if inspect.isclass(thing) or inspect.isfunction(thing)]


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*row, id=row[0]) for row in CALLABLES])
def test_what_is_exported_says_what_it_is_and_what_it_takes(name: str, thing: object):
    assert len(own_doc(thing).split()) >= 3, f"{name} has no docstring"
    if inspect.isfunction(thing): assert not unannotated(thing), name
    elif thing.__init__ is not object.__init__ and not issubclass(thing, tuple | Exception):
        if not getattr(thing, "_is_protocol", False): assert not unannotated(thing.__init__, needs_return=False), name
        for method, function in vars(thing).items():
            if method[0] == "_": continue
            if isinstance(function, staticmethod | classmethod): function = function.__func__
            if inspect.isfunction(function): assert not unannotated(function), f"{name}.{method}"


def test_the_check_above_sees_what_is_missing():
    def bare(a, b: int): pass

    def whole(a: int) -> None: "It says so."

    assert unannotated(bare) == ["a", "return"] and not own_doc(bare) and not unannotated(whole) and own_doc(whole)
    assert len(CALLABLES) > 30


def test_every_module_belongs_to_a_notebook():
    names = set()
    for path in tools.notebooks.notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code": names |= set(re.findall(r"(?m)^#\| *default_exp +(\S+)", cell.source))
    assert set(MODULES) == names


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A copy of what an export is made from and into, on which the tools work."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "lmbook"): shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    picture = tools.notebooks.PICTURE.relative_to(ROOT)
    (tmp_path / picture).parent.mkdir(parents=True)
    shutil.copy(ROOT / picture, tmp_path / picture)
    monkeypatch.setattr(tools.notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(tools.notebooks, "NBS", tmp_path / "nbs")
    monkeypatch.setattr(tools.notebooks, "PICTURE", tmp_path / picture)
    return tmp_path


def test_the_package_is_what_the_notebooks_export(): assert tools.notebooks.export_differences() == []


def test_an_export_that_was_forgotten_is_noticed(copied: Path):
    package = copied / "lmbook"
    (package / "claims.py").write_bytes((package / "claims.py").read_bytes() + b"\n")
    (package / "corpora.py").unlink()
    (package / "stray.py").write_text('"A module that no notebook exports."\n', encoding="utf-8")
    assert tools.notebooks.export_differences() == [
        "lmbook/stray.py: no notebook exports it", "lmbook/corpora.py: missing", "lmbook/claims.py: differs",
    ]  # fmt: skip
    (package / "stray.py").unlink()
    tools.notebooks.export(copied)
    assert tools.notebooks.export_differences() == [], "`make export` mends it"


def test_a_notebook_that_changed_is_noticed(copied: Path):
    path = copied / "nbs" / "04_grammar.ipynb"
    page = nbformat.read(path, as_version=4)
    cell = next(c for c in page.cells if c.source.startswith("#| export") and "def phrase" in c.source)
    cell.source += "\n\ndef added() -> int: return 1"
    nbformat.write(page, path)
    assert "lmbook/grammar.py: differs" in tools.notebooks.export_differences()


# ------------------------------------------------------------------------------------------------------------------------------- the pins

LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
PINS = {canonicalize_name(pin.name): pin for pin in map(Requirement, LINES)}


def test_constraints_are_exact_versions_each_once():
    assert len(PINS) == len(LINES) > 100
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in LINES), "no local versions, no ranges, no addresses"


@pytest.mark.parametrize("extra", [None, *sorted(EXTRAS)])
def test_every_requirement_is_pinned_within_its_range(extra: str | None):
    for requirement in requirements(extra):
        if requirement.name == "lmbook":
            assert requirement.extras <= EXTRAS
            continue
        [pin] = PINS[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement} is not met by {pin}"


@pytest.mark.skipif(sys.platform != "linux", reason="the pins were made on Linux; other systems need a few packages more")
def test_what_the_requirements_require_is_pinned_too():
    "Otherwise `make lab` is another environment tomorrow. (Not the installers, and not what the CUDA build of torch brings.)"
    wanted = [r for extra in (None, *EXTRAS) for r in requirements(extra) if r.name != "lmbook"]
    free = {"lmbook", "pip", "setuptools", "wheel", "triton"}
    missing = {name for name in closure(wanted) if name not in PINS and name not in free and not name.startswith(("nvidia-", "cuda-"))}
    assert not missing


def test_the_extras_build_on_each_other():
    assert set(PYPROJECT["project"]["optional-dependencies"]) == EXTRAS
    below = {extra: {e for r in requirements(extra) if r.name == "lmbook" for e in r.extras} for extra in EXTRAS}
    assert below["cleaning"] == {"corpora"} and below["ray"] == {"cleaning"}
    assert (
        below["book"] == {"cleaning", "tokenization", "tensorboard", "distributed", "privacy", "engines", "serving"}
        and below["test"] == {"book", "parity", "ray", "harness"}
        and below["dev"] == {"book", "docs", "test"}
    )
    assert {r.name for r in requirements()} == CORE


def test_nbdev_is_for_writing_the_book_only():
    "In the dev extra, in these versions; the site uses only fastcore, readers and tests nothing of the family."
    assert {r.name: str(r.specifier) for r in requirements("dev") if r.name in NBDEV} == NBDEV
    for extras, allowed in ((("corpora", "book", "test"), set()), (("docs",), {"fastcore"})):
        rows = [r for extra in (None, *extras) for r in requirements(extra) if r.name != "lmbook"]
        assert all(str(r.specifier) == NBDEV[r.name] for r in rows if r.name in NBDEV)
        assert closure(rows).keys() & NBDEV.keys() <= allowed, "another requirement brings it"


# ----------------------------------------------------------------------------------------------------------------------------- the README

def library_example() -> str:
    return re.search(r"## The library in ten lines.*?```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_ten_lines_of_the_readme_run(tmp_path: Path):
    code = library_example()
    assert sum(bool(line.strip()) for line in code.split("\n")) <= 10 and "minutes=1" in code
    out = python("-c", code.replace("minutes=1", "steps=5"), cwd=tmp_path, PYTHONIOENCODING="utf-8", TQDM_DISABLE="1").splitlines()
    assert re.fullmatch(r"\d\.\d\d bits per byte; the grammar itself pays 0\.\d\d for these stories", out[-1])
    assert (
        len((tmp_path / "stories.txt").read_text(encoding="utf-8").splitlines()) == 1000
        and (tmp_path / "runs" / "stories" / "README.md").exists()
    )


def test_the_second_example_of_the_readme_trains_and_goes_on(tmp_path: Path):
    "With fewer steps; it reads the file that the first one writes, and the second call finds the run finished."
    first, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    python("-c", first.replace("minutes=1", "steps=1"), cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert "steps=500" in code and "eval_every=250" in code
    short = code.replace("steps=500", "steps=30").replace("eval_every=250", "eval_every=10")
    outputs = [python("-c", short, cwd=tmp_path, TQDM_DISABLE="1") for _ in range(2)]
    assert outputs[0] == outputs[1] and re.fullmatch(r"\{'Transformer': \d\.\d+, '5-gram': 0\.\d+\}\n", outputs[0])
    assert (tmp_path / "run" / "step-000030" / "model.safetensors").exists() and (tmp_path / "llama" / "config.json").exists()


def test_every_line_of_the_command_in_the_readme_is_one(tmp_path: Path):
    from lmbook.cli import _parse

    [block] = re.findall(r"## A model of your own text\n\n```bash\n(.*?)```", README, re.DOTALL)
    words = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    shown = ("train", "generate", "evaluate", "evaluate", "tokenize", "finetune", "chat", "quantize", "serve")
    assert [w[:2] for w in words] == [["lmbook", c] for c in shown]
    for line in words: _parse(line[1], line[2:])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files_that_exist(page: str):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|#|mailto:", link)]
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
    assert links or page != "README.md"


def test_the_readme_lists_every_chapter_with_its_module():
    rows = dict(re.findall(r"^\|[^|]*\|[^|]*\]\(nbs/([\w.]+)\)[^|]*\|([^|]*)\|", README, re.MULTILINE))
    assert set(rows) == {p.name for p in tools.notebooks.notebooks()}
    for name, module in rows.items():
        found = re.search(r"#\| default_exp (\w+)", (ROOT / "nbs" / name).read_text(encoding="utf-8"))
        assert module.strip() == (f"`lmbook.{found[1]}`" if found else ""), name


def expanded(numbers: str) -> list[int]:
    "`12, 14-16` as 12, 14, 15, 16; `12b` as 12."
    ends = [[int(n.strip()[:2]) for n in piece.split("-")] for piece in numbers.split(",") if piece.strip()]
    return [n for first, *last in ends for n in range(first, (last or [first])[0] + 1)]


def table_problems(text: str, names: list[str], layout: dict) -> Iterator[str]:
    "What in a table of chapters does not follow from the names of the notebooks: order, numbers, parts, and what is still planned."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*\|.*\|.*\|$", text, re.MULTILINE)][2:]
    linked = [(number, link[1], row) for number, row, *_ in rows if (link := re.search(r"\]\(nbs/(\w+)\.ipynb\)", row))]
    if [name for _, name, _ in linked] != names: yield "the chapters are not listed once each, in the order of their names"
    taken, part = {int(name[:2]) for name in names if name[:2].isdecimal()}, layout["parts"][0]["caption"]
    for number, row, _, status in rows:
        if caption := re.fullmatch(r"\*\*(.*)\*\*", row):
            part = caption[1]
            continue
        link = re.search(r"\]\(nbs/(\w+)\.ipynb\)", row)
        if (status == "planned") == bool(link): yield f"{row}: {status}, and {'a' if link else 'no'} notebook"
        if link and number != (link[1].partition("_")[0] if link[1][:2].isdecimal() else ""): yield f"{link[1]} stands as {number!r}"
        if not link: yield from (f"{row}: the number {n} is taken" for n in expanded(number) if n in taken)
        if wrong := [n for n in expanded(number) if stage.part_of(n, layout) != part]:
            yield f"{row}: {wrong} does not belong to the part {part!r}"


def test_the_table_in_the_readme_follows_the_names():
    assert list(table_problems(README, [p.stem for p in tools.notebooks.notebooks()], build.layout())) == []


TABLE = """
| | notebook | module | status |
| --- | --- | --- | --- |
| | [How](nbs/index.ipynb) | `lmbook.claims` | done |
| 00 | [The road](nbs/00_tour.ipynb) | | done |
| | **Text** | | |
| 10 | [Corpora](nbs/10_corpora.ipynb): files | `lmbook.corpora` | done |
| 12 | [Cleaning](nbs/12_cleaning.ipynb): shards | `lmbook.cleaning` | done |
| 11, 13-14 | Others | | planned |
"""


@pytest.mark.parametrize("old, new, says", [
    ("", "", ""),
    ("| 10 | [Corpora](nbs/10_corpora.ipynb): files | `lmbook.corpora` | done |\n", "", "not listed once each"),
    ("| 10 | [Corpora](nbs/10_corpora.ipynb): files", "| 10 | [Corpora](nbs/12_cleaning.ipynb): files", "in the order of their names"),
    ("| 12 | [Cleaning]", "| 02 | [Cleaning]", "12_cleaning stands as '02'"),
    ("| 12 | [Cleaning]", "| 12b | [Cleaning]", "12_cleaning stands as '12b'"),
    ("| 11, 13-14 |", "| 11-13 |", "Others: the number 12 is taken"),
    ("| 11, 13-14 |", "| 11, 20 |", "Others: [20] does not belong to the part 'Text'"),
    ("| | **Text** | | |\n", "", "[10] does not belong to the part 'Start'"),
    ("`lmbook.cleaning` | done", "`lmbook.cleaning` | planned", "shards: planned, and a notebook"),
    ("Others | | planned", "Others | | done", "Others: done, and no notebook"),
])  # fmt: skip
def test_the_check_of_the_table_sees_what_is_wrong(old: str, new: str, says: str):
    layout = {"parts": [{"from": 0, "caption": "Start"}, {"from": 10, "caption": "Text"}, {"from": 20, "caption": "Learning"}]}
    assert old in TABLE
    problems = "\n".join(table_problems(TABLE.replace(old, new), ["index", "00_tour", "10_corpora", "12_cleaning"], layout))
    assert says in problems and bool(says) == bool(problems)


def test_the_tree_in_the_readme_is_there():
    [tree] = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    names = [line.split()[0] for line in tree.strip().split("\n")]
    assert len(names) > 8 and [n for n in names if not (ROOT / n).exists()] == []


def test_the_picture_of_the_readme_has_words():
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(pictures) == 2
    for alt, path in pictures: assert len(alt) > 40 and 5000 < (ROOT / path).stat().st_size < 100_000


# --------------------------------------------------------------------------------------------------------------------------- the Makefile

needs_make = pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="no make here: the README gives the plain lines")
FAKE = """#!/bin/sh
# stands for Python and pip: notes what it is asked for, and makes an "environment" that holds itself
echo "$@" >> "$LOG"
case "$*" in *"$FAILS"*) exit 1;; esac
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


class Project:
    "A copy of the Makefile and of the files that define the environment, with an interpreter that installs nothing."

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"): shutil.copy(ROOT / name, folder)
        for name in ("fakepython", "otherpython"):
            (folder / name).write_text(FAKE, encoding="utf-8")
            (folder / name).chmod(0o755 | stat.S_IXUSR)

    def make(self, *args: str, python: str = "./fakepython", fails: str = "nothing fails", check: bool = True) -> list[str]:
        "Run make; the calls of Python that it made."
        self.log.write_text("", encoding="utf-8")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
        env |= {"PYTHON": python, "LOG": str(self.log), "FAILS": fails}
        self.done = subprocess.run(["make", *args], cwd=self.folder, env=env, text=True, capture_output=True)
        if check: assert self.done.returncode == 0, self.done.stderr
        return self.log.read_text(encoding="utf-8").splitlines()

    def touch(self, name: str) -> None:
        "Make a file newer than all others."
        later = time.time() + 5
        os.utime(self.folder / name, (later, later))


@pytest.fixture
def project(tmp_path: Path) -> Project: return Project(tmp_path)


@needs_make
def test_make_alone_lists_what_can_be_made(project: Project):
    assert project.make() == []
    alone = project.done.stdout
    project.make("help")
    assert project.done.stdout == alone
    listed = re.findall(r"^  make (\w+) +\w", alone, re.MULTILINE)
    assert {"lab", "test", "docs", "run", "export", "clean", "help"} <= set(listed)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert set(listed) <= set(phony), "a file of that name would hide the target"
    for page in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= set(listed), page


@needs_make
def test_the_environment_is_installed_once(project: Project):
    first = project.make("install")
    assert "-m venv .venv" in first and any("--constraint constraints.txt" in call and ".[dev]" in call for call in first)
    assert project.make("install") == []
    assert not [call for call in project.make("lab") if "pip" in call or "venv" in call.split()]
    project.touch("README.md")
    assert project.make("install") == []


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_what_defines_the_environment_installs_again(project: Project, name: str):
    project.make("install")
    project.touch(name)
    assert any(".[dev]" in call for call in project.make("install"))


@needs_make
def test_another_interpreter_makes_another_environment(project: Project):
    project.make("install")
    (project.folder / ".venv" / "of-the-first").touch()
    assert any("-m venv" in call for call in project.make("install", python="./otherpython"))
    assert not (project.folder / ".venv" / "of-the-first").exists(), "two interpreters share an environment"
    assert project.make("install", python="./otherpython") == []


@needs_make
def test_an_installation_that_failed_is_not_taken_for_one(project: Project):
    project.make("install", fails=".[dev]", check=False)
    assert project.done.returncode
    assert any(".[dev]" in call for call in project.make("install"))


@needs_make
def test_each_command_calls_what_it_says(project: Project):
    project.make("install")
    assert project.make("lab") == ["-m tools.lab"] and ".venv/bin/python -m tools.lab\n" in README
    assert project.make("run", "NB=nbs/10_corpora.ipynb")[-1] == "-m tools.notebooks run --jobs 2 nbs/10_corpora.ipynb"
    assert project.make("draft", "NB=nbs/10_corpora.ipynb")[-1] == "-m tools.notebooks run --draft --jobs 2 nbs/10_corpora.ipynb"
    assert project.make("rerun", "SINCE=main")[-1].split() == "-m tools.notebooks run --kept main --jobs 2".split()
    assert project.make("elsewhere", "JOBS=1") == ["-m tools.elsewhere --jobs 1"]
    assert project.make("export") == ["-m tools.notebooks export"]
    quick = project.make("quick")
    assert quick[0].startswith("-m ruff check")
    assert quick[1:] == ["-m mypy", "-m tools.prose", "-m tools.notebooks check", "-m tools.quick --jobs 2"]
    assert project.make("quick", "ALL=1", "NB=nbs/10_corpora.ipynb")[-1] == "-m tools.quick --jobs 2 --all nbs/10_corpora.ipynb"
    calls = project.make("test")
    assert "-m tools.notebooks check" in calls and any(c.startswith("-m ruff check") for c in calls)
    assert project.make("docs")[0] in calls, "the site is part of the test"
    assert re.fullmatch(r"-m pytest .*--dist loadfile .*--nbval .*nbs tests", calls[-2])
    assert calls[-1] == "-m tools.elsewhere --part --jobs 2", "a part of the book is computed as another processor would"
    project.make("test", fails="ruff", check=False)
    assert project.done.returncode
    (project.folder / "build").mkdir()
    project.make("clean")
    left = {path.name for path in project.folder.iterdir()}
    assert {"Makefile", "pyproject.toml"} <= left and not {".venv", "build"} & left
