"""A small fuzzer: files of vectors, models and shards that are damaged, foreign or nearly right give the documented error, or are read.

Each test writes a good file, changes a few places of it, and reads it with every function that opens such files. Whatever comes out, it is
no error of another kind than the module documents, and what was read is whole: words with a finite vector each, a model that computes.
`pytest --hypothesis-profile=search` tries new changes each time.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as stored
from safetensors.torch import load_file, save_file

from lmbook.cleaning import CleaningError, Drop, ExactDuplicates, Rewrite, empty
from lmbook.core import LmbookError, whole_file, whole_folder
from lmbook.embeddings import (
    EmbeddingError,
    SparseMatrix,
    Word2VecConfig,
    cooccurrences,
    huffman,
    index_text,
    pmi,
    ppmi,
    svd_vectors,
)
from lmbook.glove import GloVeConfig
from lmbook.pretrained import load_classifier, load_pretrained, save_pretrained
from lmbook.shards import Mark, clean, funnel, read_shards, verify_manifest
from lmbook.transformer import Classifier, ClassifierConfig, TransformerError
from lmbook.vector_files import open_vectors, read_vectors, stream_vectors, write_vectors
from lmbook.vectors import embedding_matrix
from lmbook.word_vectors import VectorsError, WordVectors, project, read_analogies, read_similarities, score_analogies, score_similarity
from tests.models import ids, make

often = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("cut"), place, st.just(0), st.just(b"")),  # all behind a place
    st.tuples(st.just("flip"), place, st.integers(0, 7), st.just(b"")),  # one bit
    st.tuples(st.just("drop"), place, st.integers(1, 60), st.just(b"")),
    st.tuples(st.just("twice"), place, st.integers(1, 60), st.just(b"")),
    st.tuples(st.just("insert"), place, st.just(0), st.binary(min_size=1, max_size=12)),
    st.tuples(
        st.just("write"),
        place,
        st.just(0),
        st.sampled_from(
            [
                b"\n",
                b" ",
                b"\0",
                b"\xff\xff\xff\xff",
                b"nan",
                b"1e99",
                b"-1",
                b"99999999999",
                b"[",
                b"{",
                b'"',
                b"null",
                b"true",
                "茶".encode(),
                b"\xed\xa0\x80",
            ]
        ),
    ),
)


def changed(data: bytes, changes: list) -> bytes:
    for what, at, n, more in changes:
        i = int(at * len(data))
        if what == "cut":
            data = data[:i]
        elif what == "flip" and data:
            data = data[:i] + bytes([data[i] ^ 1 << n]) + data[i + 1 :]
        elif what == "drop":
            data = data[:i] + data[i + n :]
        elif what == "twice":
            data = data[: i + n] + data[i:]
        elif what == "insert":
            data = data[:i] + more + data[i:]
        elif what == "write":
            data = data[:i] + more + data[i + len(more) :]
    return data


def zipped() -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", "a 1 2\n")
    return out.getvalue()


FOREIGN = {
    "nothing": b"",
    "a byte": b"\0",
    "a line": b"\n",
    "words": b"to be or not to be\n" * 9,
    "html": b"<html><body>404</body></html>",
    "json": b'{"a": [1, 2, {"b": null}]}',
    "deep json": b'{"vectors":' + b"[" * 100_000,
    "csv": b"a,b,c\n1,2,3\n",
    "zip": zipped(),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "gzip without end": b"\x1f\x8b\x08\0\0\0\0\0",
    "pickle": b"\x80\x04\x95\x05\0\0\0\0\0\0\0",
    "utf-16": "a 1 2\n".encode("utf-16"),
    "other tensors": stored({"a": np.ones(3, np.float32)}),
    "npy": b"\x93NUMPY\x01\0v\0{'descr': '<f4'}",
    "huge header": b"999999999999 300\n",
    "wide header": b"3 999999\na 1\n",
    "huge length": struct.pack("<Q", 1 << 60) + b"{}",
    "elf": b"\x7fELF" + bytes(60),
    "numbers": b"1 2\n3 4\n",
    "negative": b"-3 2\na 1 2\n",
    "xz": b"\xfd7zXZ\0junk",
    "bzip2": b"BZh9junk",
}


def only(error: type[LmbookError], run: Callable[[], object]) -> object:
    "What comes out, or None where it is refused as documented. Every other exception goes through."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run()
        except error as refused:
            assert str(refused).strip()
            return None


# ---------------------------------------------------------------- vectors


def whole(found: object) -> None:
    if not isinstance(found, WordVectors):
        return
    assert len(set(found.words)) == len(found) == len(found.matrix) > 0 and found.dim > 0
    try:
        assert np.isfinite(found.normalized).all() or np.abs(found.matrix).max() > 1e18  # whose square is no float32
    except VectorsError:
        assert isinstance(found.matrix, np.memmap)


def read_all_ways(path: Path, format: str) -> None:
    for options in ({}, {"on_error": "skip"}, {"format": format}, {"limit": 2, "unicode_errors": "replace"}, {"words": ["tea"]}):
        whole(only(VectorsError, lambda options=options: read_vectors(path, **options)))
    only(VectorsError, lambda: list(stream_vectors(path, on_error="skip")))
    whole(only(VectorsError, lambda: open_vectors(path, path.parent / "copy.safetensors")))
    whole(only(VectorsError, lambda: WordVectors.open(path)))


NAMES = {"a.bin": "word2vec", "a.vec": "word2vec-text", "a.txt": "glove", "a.safetensors": "safetensors"}
NAMES |= {"a.bin.gz": "word2vec", "a.txt.gz": "glove"}
GOOD = WordVectors(["the", "tea", "茶", "cup of", "3.5"], np.random.default_rng(0).normal(size=(5, 4)))


@pytest.mark.parametrize("name", NAMES)
@often
@given(changes=st.lists(change, min_size=1, max_size=3))
def test_damaged_vectors(tmp_path_factory, name, changes):
    folder = tmp_path_factory.mktemp("v")
    good = GOOD if NAMES[name] in ("glove", "safetensors") else WordVectors([w.replace(" ", "_") for w in GOOD], GOOD.matrix)
    write_vectors(good, folder / name)
    (folder / name).write_bytes(changed((folder / name).read_bytes(), changes))
    read_all_ways(folder / name, NAMES[name])
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_as_vectors(tmp_path, kind):
    for name, format in NAMES.items():
        (tmp_path / name).write_bytes(FOREIGN[kind])
        read_all_ways(tmp_path / name, format)
        only(VectorsError, lambda name=name: read_similarities(tmp_path / name))
        only(VectorsError, lambda name=name: read_analogies(tmp_path / name))


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "file").write_text("a 1 2\n")
    for path in (tmp_path, tmp_path / "not there", tmp_path / "file" / "x", "a\0b", "x" * 5000):
        for call in (read_vectors, open_vectors, WordVectors.open, read_similarities, read_analogies, lambda p: list(stream_vectors(p))):
            with pytest.raises(VectorsError):
                call(path)
        for call in (load_pretrained, load_classifier):
            with pytest.raises(TransformerError):
                call(path)
        for call in (verify_manifest, read_shards):
            with pytest.raises(CleaningError):
                call(path)
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "a\0b", tmp_path / ("x" * 300), tmp_path / ("x" * 5000)):
        with pytest.raises(VectorsError):
            write_vectors(GOOD, f"{path}/x.bin")
        with pytest.raises(VectorsError):
            GOOD.save(f"{path}/x")
        with pytest.raises(TransformerError):
            save_pretrained(make(), path)
        with pytest.raises(CleaningError):
            clean(records(), STEPS, path)


@pytest.mark.parametrize("name", ["x" * 240, "x" * 250, "x" * 255, "é" * 127, "x" * 256, "a\0b", "\ud800", "y/" * 3000 + "z"], ids=len)
def test_names_that_leave_no_room_for_the_one_of_the_work(tmp_path, name):
    "A file may have 255 bytes in its name; what is written under a longer name beside it is refused as the name itself would be."
    for write in (whole_file, whole_folder):
        with contextlib.suppress(VectorsError), write(tmp_path / name, VectorsError) as scratch:
            (scratch / "a" if write is whole_folder else scratch).write_text("a")
            assert len(name) == 240
        found = {path.name for path in tmp_path.iterdir()}
        assert found == ({name} if len(name) == 240 else set()) or name.startswith("y/") and found == {"y"}
        if write is whole_file: (tmp_path / name).unlink() if len(name) == 240 else None


@often
@given(changes=st.lists(change, min_size=1, max_size=3))
def test_damaged_tests_of_vectors(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("t")
    (folder / "pairs").write_bytes(changed("word1\tword2\tmean\nthe\ttea\t3.5\n茶\ttea\t9\n# no\nthe\t茶\t1\n".encode(), changes))
    (folder / "questions").write_bytes(changed(": one\nthe tea 茶 3.5\n: two\ntea the 3.5 茶\n".encode(), changes))
    pairs, questions = (
        only(VectorsError, lambda r=r, n=n: r(folder / n)) for r, n in ((read_similarities, "pairs"), (read_analogies, "questions"))
    )
    if pairs is not None:
        only(VectorsError, lambda: score_similarity(GOOD, pairs))
    if questions is not None:
        only(VectorsError, lambda: score_analogies(GOOD, questions))
    shutil.rmtree(folder)


number = st.one_of(
    st.integers(-3, 6), st.sampled_from([10**9, 10**30, -(10**30), 1e30, 1e-30, float("nan"), float("inf"), True]), st.floats()
)
word = st.one_of(st.sampled_from(["tea", "the", "茶", "3.5", "Tea", "", "no", "\ud800"]), st.text(max_size=3))
sentence = st.lists(word, max_size=4)
matrix = st.one_of(
    st.lists(st.lists(number, max_size=4), max_size=3),
    st.lists(number, max_size=4),
    number,
    st.sampled_from(
        [np.zeros((2, 0)), np.ones((1, 4), complex), np.ones((2, 2, 2)), np.array([["a"]]), torch.ones(2, 4), np.ones((2, 4), bool)]
    ),
)
anything = st.one_of(st.none(), number, word, sentence, st.just({"a": 1}), st.just([[1.0]]))


@often
@given(words=sentence, a=word, b=word, rows=matrix, x=number, y=number)
def test_questions_and_tables_of_any_kind(words, a, b, rows, x, y):
    for run in (
        lambda: WordVectors(words, rows),
        lambda: WordVectors(["x", "y"], rows),
        lambda: WordVectors(["x"], [[1.0]], rows),
        lambda: WordVectors([a, b], [[x, y], [y, x]], counts=rows),
        lambda: GOOD.nearest(rows),
        lambda: GOOD.nearest(a, x, words),
        lambda: GOOD.nearest(a, 2, words),
        lambda: GOOD.analogy("tea", a, b),
        lambda: GOOD.similarity(a, "tea"),
        lambda: GOOD[a],
        lambda: score_similarity(GOOD, [(a, b, x), ("tea", "the", 1), ("the", "茶", y)]),
        lambda: score_similarity(GOOD, [words]),
        lambda: score_analogies(GOOD, {"s": [(a, b, "tea", "the")], "t": [("the", "tea", "茶", "3.5")]}, restrict=x),
        lambda: score_analogies(GOOD, {a: [words]}),
        lambda: project(rows),
        lambda: project(GOOD, x),
        lambda: embedding_matrix(GOOD, words),
        lambda: embedding_matrix(GOOD, ["tea", a]),
        lambda: embedding_matrix(GOOD, {a: x, b: y, "tea": 0}),
        lambda: embedding_matrix(GOOD, ["tea", "no"], unknown=a),
        lambda: embedding_matrix(GOOD, ["tea", "no"], unknown=lambda missing: rows),
        lambda: embedding_matrix(GOOD, ["tea", "no"], pad_id=x),
        lambda: embedding_matrix(GOOD, ["tea", "no"], scale=x),
    ):
        only(VectorsError, run)


# ---------------------------------------------------------------- learning them


@often
@given(words=sentence, x=number, y=number, field=anything)
def test_texts_and_settings_of_any_kind(words, x, y, field):
    small = SparseMatrix(np.array([0, 1]), np.array([1, 0]), np.array([2.0, 2.0]), 2)
    for run in (
        lambda: index_text(words),
        lambda: index_text([words, ["x", "y"]]),
        lambda: index_text([["x", "y"]], x),
        lambda: index_text([[x, y]]),
        lambda: cooccurrences([[x, y]], 5),
        lambda: cooccurrences([[0, 1]], x),
        lambda: cooccurrences([[0, 1]], 2, window=x),
        lambda: cooccurrences([[0, 1]], 2, weight="".join(words)),
        lambda: pmi(small, power=x),
        lambda: ppmi(small, shift=x),
        lambda: svd_vectors(["x", "y"], small, x),
        lambda: svd_vectors(words, small, 1),
        lambda: huffman([x, y]),
        lambda: huffman([]),
    ):
        only(VectorsError, run)
    for config in (Word2VecConfig, GloVeConfig):
        for name in config.__dataclass_fields__:
            only(EmbeddingError, lambda config=config, name=name: config(**{name: field}))


# ---------------------------------------------------------------- models


def computes(model: object) -> None:
    if model is None:
        return
    with torch.no_grad():
        try:
            out = model(ids(1, 4))
        except TransformerError:
            out = model.hidden(ids(1, 4)) if hasattr(model, "hidden") else torch.zeros(1)
    assert out.shape[0] == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    "A good folder of each kind."
    made = {}
    for name, layout, model in (
        ("bert", "bert", make("encoder", "bert")),
        ("llama", "llama", make("decoder", "llama")),
        ("own", "lmbook", make()),
        ("judge", "bert", Classifier(make("encoder", "bert"), ClassifierConfig(("a", "b"), pooler=True))),
    ):
        made[name] = tmp_path_factory.mktemp("good") / name
        save_pretrained(model, made[name], layout)
    parts = made["parts"] = tmp_path_factory.mktemp("good") / "parts"
    shutil.copytree(made["llama"], parts)
    tensors = list(load_file(parts / "model.safetensors").items())
    (parts / "model.safetensors").unlink()
    where = {}
    for i, rows in enumerate((tensors[::2], tensors[1::2])):
        save_file(dict(rows), parts / f"{i}.safetensors", metadata={"format": "pt"})
        where |= {name: f"{i}.safetensors" for name, _ in rows}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return made


PLACES = [(kind, file) for kind in ("bert", "llama", "own", "judge") for file in ("config.json", "model.safetensors")]
PLACES += [("parts", "model.safetensors.index.json"), ("parts", "1.safetensors")]


@pytest.mark.parametrize(("kind", "file"), PLACES)
@often
@given(changes=st.lists(change, min_size=1, max_size=3), near=st.booleans())
def test_damaged_models(folders, tmp_path_factory, kind, file, changes, near):
    folder = tmp_path_factory.mktemp("m") / "m"
    shutil.copytree(folders[kind], folder)
    data = (folder / file).read_bytes()
    head = 8 + int.from_bytes(data[:8], "little") if file.endswith(".safetensors") else len(data)
    part = data[:head] if near else data  # the header of a file of tensors is a small part of it
    (folder / file).write_bytes(changed(part, changes) + data[len(part) :])
    for load in (load_pretrained, load_classifier):
        computes(only(TransformerError, lambda load=load: load(folder)))
    shutil.rmtree(folder)


ROLES = {file: [good for good, other in PLACES if other == file] for _, file in PLACES}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_as_models(folders, tmp_path, kind):
    "Each foreign file in each place of a folder; the layouts of models take turns."
    turn = list(FOREIGN).index(kind)
    for file, good in ((file, goods[turn % len(goods)]) for file, goods in ROLES.items()):
        folder = tmp_path / good
        shutil.copytree(folders[good], folder, dirs_exist_ok=True)
        (folder / file).write_bytes(FOREIGN[kind])
        for load in (load_pretrained, load_classifier):
            with pytest.raises(TransformerError):
                load(folder)


# ---------------------------------------------------------------- shards


def records() -> list[dict]:
    return [{"text": f"It was day {i % 6}.", "n": i} for i in range(8)]


POWER = {"there": True}


def mends(text: str) -> str:
    if not POWER["there"]:
        raise OSError("the plug was pulled")
    return text.replace("day", "a day")


STEPS = [Drop(empty), ExactDuplicates(), Rewrite(mends)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    "A finished run, one that stopped in its second stage, and one that stopped in its first."
    made = {name: tmp_path_factory.mktemp("good") / name for name in ("done", "second", "first")}
    clean(records(), STEPS, made["done"], shard_size=3)
    try:
        POWER["there"] = False
        with pytest.raises(OSError, match="plug"):
            clean(records(), STEPS, made["second"], shard_size=3)
        with pytest.raises(OSError, match="plug"):
            clean(records(), [*STEPS[2:], *STEPS], made["first"], shard_size=3)
    finally:
        POWER["there"] = True
    return made


def after(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@often
@given(data=st.data(), changes=st.lists(change, min_size=1, max_size=3), foreign=st.sampled_from([None, *FOREIGN]))
def test_damaged_runs_of_cleaning(runs, tmp_path_factory, data, changes, foreign):
    "Whatever is damaged, the same call gives the same bytes as ever, or an error; and no shard is read that was changed."
    which = data.draw(st.sampled_from(sorted(runs)))
    good, folder = runs[which], tmp_path_factory.mktemp("s") / "s"
    shutil.copytree(good, folder)
    path = folder / data.draw(st.sampled_from(sorted(str(p.relative_to(good)) for p in good.rglob("*") if p.is_file())))
    before = path.read_bytes()
    path.write_bytes(FOREIGN[foreign] if foreign else changed(before, changes))
    same = path.read_bytes() == before
    manifest = only(CleaningError, lambda: verify_manifest(folder))
    if manifest is not None:
        only(CleaningError, lambda: funnel(manifest))
        only(CleaningError, lambda: list(read_shards(folder)))
        assert same or path.name == "manifest.json"
    steps = [*STEPS[2:], *STEPS] if which == "first" else STEPS
    if only(CleaningError, lambda: clean(records(), steps, folder, shard_size=3)) is not None and which == "second":
        assert {n: b for n, b in after(folder).items()} == after(runs["done"])
    shutil.rmtree(folder)


MANIFESTS = [
    [],
    7,
    {},
    {"shards": 7},
    {"shards": [7]},
    {"shards": [{"name": 7, "sha256": ""}]},
    {"shards": [{"name": "../x", "sha256": ""}]},
    {"shards": [{"name": "a\0b", "sha256": ""}]},
    {"shards": [{"name": "", "sha256": ""}]},
    {"shards": [{"name": "x" * 5000, "sha256": 1}]},
    {"shards": []},
    {"shards": [], "input": 3, "dropped": 4},
    {"shards": [], "input": {"records": "x"}, "dropped": [{"step": 1, "reasons": 2}]},
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=str)
def test_manifests_that_are_nearly_right(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path.parent / "x").write_text("a secret")
    for call in (verify_manifest, lambda p: list(read_shards(p)), lambda p: clean(records(), STEPS, p)):
        only(CleaningError, lambda call=call: call(tmp_path))
    only(CleaningError, lambda: funnel(manifest))


@often
@given(a=anything, b=anything, x=number)
def test_arguments_of_cleaning_of_any_kind(tmp_path_factory, a, b, x):
    out = tmp_path_factory.mktemp("a")
    for i, run in enumerate(
        (
            lambda o: clean([{"text": a}], STEPS, o),
            lambda o: clean([{"text": "x", "n": a}, {"text": "y", "n": b}], STEPS, o),
            lambda o: clean([{"text": "x"}, {"n": a}], STEPS, o),
            lambda o: clean(records(), STEPS, o, shard_size=x),
            lambda o: clean(records(), STEPS, o, workers=min(x, 1)),
            lambda o: clean(records(), STEPS, o, format=a),
            lambda o: funnel({"input": a}),
            lambda o: clean(records(), [Mark({"a": "why"}, a if isinstance(a, str) else "n"), *STEPS], o),
        )
    ):
        only(CleaningError, lambda i=i, run=run: run(out / str(i)))
    shutil.rmtree(out)
