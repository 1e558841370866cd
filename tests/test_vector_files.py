"""Files of word vectors: every format against gensim and back, bad files with their messages, faults while writing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gensim.models import KeyedVectors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lmbook import vector_files as module
from lmbook.vector_files import open_vectors, read_vectors, stream_vectors, write_vectors
from lmbook.word_vectors import VectorsError, WordVectors

NAMES = ("a.bin", "a.vec", "a.txt", "a.bin.gz", "a.vec.gz", "a.txt.gz", "a.safetensors")
WORDS = ["the", "tea", "Tea", "茶", "don't", "naïve", "🫖", "a\xa0b", "\x85", "\u2028", "3.5", "-", "nan", "x" * 300]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def some(words=WORDS, dim=5, seed=0) -> WordVectors:
    "Vectors with numbers of all sizes, the smallest and the largest of float32 among them."
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(size=(len(words), dim)) * 10.0 ** rng.integers(-12, 12, size=(len(words), dim))).astype(np.float32)
    matrix[0, :5] = [np.float32(1e-45), np.finfo(np.float32).max, -0.0, np.finfo(np.float32).tiny, 1 / 3][:dim]
    return WordVectors(words, matrix)


def equal(a, b) -> bool:
    return a.words == b.words and np.array_equal(np.asarray(a.matrix).view(np.uint32), np.asarray(b.matrix).view(np.uint32))


def message(*args, **options) -> str:
    with pytest.raises(VectorsError) as caught: read_vectors(*args, **options)
    return str(caught.value)


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


# There and back


@pytest.mark.parametrize("name", NAMES)
def test_each_format_gives_the_same_bits_again(here, name):
    before = some()
    write_vectors(before, name)
    assert equal(read_vectors(name), before)
    streamed = list(stream_vectors(name))
    assert [word for word, _ in streamed] == before.words and np.array_equal(np.stack([row for _, row in streamed]), before.matrix)
    assert equal(open_vectors(name), before)
    assert [p.name for p in here.iterdir() if p.name not in (name, name + ".safetensors")] == []


@settings(max_examples=60)
@given(data=st.data())
def test_any_words_and_any_numbers_come_back(tmp_path_factory, data):
    "What can be written can be read, in every format; what cannot be read is refused when it is written."
    words = data.draw(st.lists(st.text(max_size=6), min_size=1, max_size=8, unique=True))
    dim = data.draw(st.integers(1, 4))
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    before = WordVectors(
        words,
        np.array(data.draw(st.lists(st.lists(floats, min_size=dim, max_size=dim), min_size=len(words), max_size=len(words))), np.float32),
    )
    path = tmp_path_factory.mktemp("v") / data.draw(st.sampled_from(NAMES))
    try: write_vectors(before, path)
    except VectorsError: assert not path.exists()
    else:
        format = {".bin": "word2vec", ".vec": "word2vec-text", ".txt": "glove"}.get("." + path.name.split(".")[1], "auto")
        if dim > 1 or format != "glove": assert equal(read_vectors(path, format), before)


@pytest.mark.parametrize("words", [["0 :"], ["New York", "San Jose", "a"], ["at name@domain.com"], [". . .", "1 a"], ["7"], ["7 b c", "d"]])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_width_is_that_of_the_numbers_even_where_most_words_have_spaces(here, words, dim):
    before = some(words, dim=dim)
    write_vectors(before, "a.txt")
    assert equal(read_vectors("a.txt"), before)


@pytest.mark.parametrize("word", ["catch 22", "the area 51", "a nan"])
def test_a_word_whose_end_would_be_taken_for_a_number_is_not_written(here, word):
    with pytest.raises(VectorsError, match="would be taken"): write_vectors(some([word]), "a.txt")
    assert not Path("a.txt").exists()


def test_random_float32_survive_text(here):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)][:190_000].reshape(-1, 10)
    before = WordVectors([f"w{i}" for i in range(len(bits))], bits)
    write_vectors(before, "a.txt")
    assert equal(read_vectors("a.txt"), before)


@pytest.mark.parametrize("block", [64, 1000, 1 << 22])
def test_where_blocks_are_cut_changes_nothing(here, monkeypatch, block):
    before = some([f"wörd{i}" for i in range(300)], dim=7)
    for name in ("a.bin", "a.txt", "b.vec"): write_vectors(before, name)
    with_feeds = b"300 7\n" + b"".join(w.encode() + b" " + row.tobytes() + b"\n" for w, row in zip(before.words, before.matrix))
    write("feeds.bin", with_feeds)
    monkeypatch.setattr(module, "BLOCK", block)
    if block > 64:  # the first block has to show the kind of file
        for name in ("a.bin", "a.txt", "b.vec", "feeds.bin"): assert equal(read_vectors(name), before), name
    for name, format in (("a.bin", "word2vec"), ("feeds.bin", "word2vec"), ("b.vec", "word2vec-text")):
        assert equal(read_vectors(name, format), before), name
    write_vectors(before, "c.txt")
    assert Path("c.txt").read_bytes() == Path("a.txt").read_bytes()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_files_are_known_by_their_bytes(here, pack):
    write_vectors(some(), "a.bin")
    write("renamed.bin", pack(Path("a.bin").read_bytes()))
    assert equal(read_vectors("renamed.bin"), some())
    write("not_packed.bin.gz", Path("a.bin").read_bytes())
    assert equal(read_vectors("not_packed.bin.gz"), some())


def test_packed_files_are_the_same_each_time(here):
    write_vectors(some(), "a.bin.gz")
    first = Path("a.bin.gz").read_bytes()
    write_vectors(some(), "a.bin.gz")
    assert Path("a.bin.gz").read_bytes() == first and b"a.bin" not in first


# gensim


@pytest.mark.parametrize("name", ["a.bin", "a.vec", "a.bin.gz", "a.vec.gz"])
def test_equal_to_gensim_both_ways(here, name):
    before = some([w for w in WORDS if w not in ("\x85", "\u2028")])
    theirs = KeyedVectors(before.dim)
    theirs.add_vectors(before.words, before.matrix)
    theirs.save_word2vec_format("gensim-" + name, binary=".bin" in name)
    assert equal(read_vectors("gensim-" + name), before)
    write_vectors(before, name)
    found = KeyedVectors.load_word2vec_format(name, binary=".bin" in name)
    assert found.index_to_key == before.words and np.array_equal(found.vectors.view(np.uint32), before.matrix.view(np.uint32))
    if name == "a.bin": assert Path(name).read_bytes() == Path("gensim-" + name).read_bytes()


def test_glove_equal_to_gensim(here):
    before = some(["the", "tea", "茶"])
    write_vectors(before, "a.txt")
    assert np.array_equal(KeyedVectors.load_word2vec_format("a.txt", no_header=True).vectors, before.matrix)
    theirs = KeyedVectors(before.dim)
    theirs.add_vectors(before.words, before.matrix)
    theirs.save_word2vec_format("b.txt", write_header=False)
    assert equal(read_vectors("b.txt"), before)


def test_parts_are_those_of_gensim(here):
    before = some()
    write_vectors(before, "a.bin")
    assert (
        read_vectors("a.bin", limit=4).words
        == KeyedVectors.load_word2vec_format("a.bin", binary=True, limit=4).index_to_key
        == before.words[:4]
    )


# What files look like


def test_the_space_before_a_line_feed_a_return_tabs_and_blank_lines(here):
    for text in ("2 2 \nthe 1 2 \ntea 3 4 \n", "2 2\r\nthe 1 2\r\ntea 3 4\r\n", "the\t1\t2\ntea\t3\t4\n", "the 1 2\n\ntea 3 4\n\n",
        "\ufeffthe 1 2\ntea 3 4\n", "\ufeff2 2\nthe 1 2\ntea 3 4\n"):
        found = read_vectors(write("a.txt", text))
        assert found.words == ["the", "tea"] and found.matrix.tolist() == [[1, 2], [3, 4]], text


def test_words_with_spaces_are_read_from_the_end(here):
    found = read_vectors(write("a.txt", ". . . 1 2 3\nat name@domain.com 1 2 3\nthe 1 2 3\n. . 4 5 6\ntea 1 2 3\nof 1 2 3\nin 7 8 9\n"))
    assert found.words == [". . .", "at name@domain.com", "the", ". .", "tea", "of", "in"] and found[". ."].tolist() == [4, 5, 6]


@pytest.mark.parametrize("word", ["400000", "12", "1e5", "inf"])
def test_a_word_may_look_like_a_number(here, word):
    before = some([word, "tea", "3 o'clock"], dim=3)
    for name in ("a.txt", "b.safetensors"): write_vectors(before, name); assert equal(read_vectors(name), before)


def test_a_binary_file_may_hold_any_byte_in_its_numbers(here):
    matrix = np.frombuffer(bytes([32, 10, 32, 32]) * 6, np.float32).reshape(2, 3)  # spaces and line feeds
    write_vectors(WordVectors(["a", "b"], matrix), "a.bin")
    assert np.array_equal(read_vectors("a.bin").matrix, matrix)


def test_only_some_words(here):
    before = some()
    for name in NAMES:
        write_vectors(before, name)
        assert read_vectors(name, words=["茶", "the", "coffee"]).words == ["the", "茶"]
        assert read_vectors(name, words=iter(["茶", "the"]), limit=2).words == ["the"]
        assert "none of the wanted words" in message(name, words=["coffee"])
    assert "one string" in message("a.bin", words="tea")


# Bad files. (name, content, arguments, what the message says)

GOOD = "tea 0.5 1 2\ncup 0.25 1 2\nthe 1 2 3\n"
BINARY = b"3 2\n" + b"".join(word + b" " + np.array([1, 2], "<f4").tobytes() for word in (b"tea", b"cup", b"the"))
BAD = [
    ("empty", b"", {}, ["empty", "Fetch it again"]),
    ("zip", b"PK\3\4" + bytes(50), {}, ["zip archive", "Unpack"]),
    ("html", b"\n <!DOCTYPE html><html>", {}, ["web page", "download failed"]),
    ("html2", b"<html><body>Moved", {"format": "word2vec"}, ["web page"]),
    ("cut", BINARY[:-3], {}, ["vector 3 (byte 28)", "2 of the 3 words", "cut"]),
    ("cut at a border", BINARY[:28], {}, ["vector 3 (byte 28)", "cut"]),
    ("no vectors", b"3 2\n", {"format": "word2vec"}, ["vector 1 (byte 4)", "0 of the 3"]),
    ("gz cut", gzip.compress(GOOD.encode() * 500)[:-30], {}, ["break off", "fetch the file again"]),
    ("gz damaged", gzip.compress(os.urandom(5000))[:2000] + b"x" * 3000, {}, ["ed"]),
    ("more", BINARY.replace(b"3 2", b"2 2"), {}, ["byte 28", "bytes are left"]),
    ("narrower", BINARY.replace(b"3 2", b"3 1"), {"format": "word2vec"}, ["byte"]),
    ("wider", BINARY.replace(b"3 2", b"3 9"), {"format": "word2vec"}, ["byte"]),
    ("lines short", "4 3\n" + GOOD, {}, ["line 1", "promises 4 words", "there are 3", "cut"]),
    ("lines long", "2 3\n" + GOOD, {}, ["line 1", "promises 2 words", "there are 3", "Correct"]),
    ("width", GOOD.replace("cup 0.25", "cup 0.25 7"), {}, ["line 2", "4 numbers after 'cup'", "3 are expected"]),
    ("width header", "3 4\n" + GOOD, {}, ["line 2", "3 numbers", "4 are expected"]),
    ("narrow", GOOD.replace("the 1", "the"), {}, ["line 3", "2 numbers after 'the'"]),
    ("not number", GOOD.replace("0.25", "O.25"), {}, ["line 2", "'O.25'", "'cup'", "not a number"]),
    ("not ascii", GOOD.replace("0.25", "０.25"), {}, ["line 2", "not a number"]),
    ("nan", GOOD.replace("0.25", "nan"), {}, ["line 2", "'cup'", "not finite"]),
    ("too large", GOOD.replace("0.25", "1e39"), {}, ["line 2", "not finite"]),
    (
        "nan binary",
        BINARY.replace(b"cup " + np.float32(1).tobytes(), b"cup " + np.float32(np.nan).tobytes()),
        {},
        ["vector 2 (byte 16)", "'cup'", "not finite"],
    ),
    ("twice", GOOD.replace("the", "tea"), {}, ["line 3", "'tea'", "before", "vector 1"]),
    ("twice binary", BINARY.replace(b"the", b"tea"), {}, ["vector 3 (byte 28)", "'tea'", "before"]),
    ("encoding", "tea 1 2\n茶 1 2\n".encode("gb18030"), {}, ["line 2", "not valid UTF-8", "byte 0", "gb18030"]),
    ("encoding binary", BINARY.replace(b"cup", b"c\xffp"), {}, ["vector 2", "not valid UTF-8", "byte 1", "unicode_errors"]),
    ("utf-16", "tea 1 2\n".encode("utf-16"), {}, ["UTF-16", "UTF-8"]),
    ("prose", "Tea is a drink.\n", {}, ["line 1"]),
    ("words", "tea\ncup\n", {}, ["word and numbers"]),
    ("zeros", bytes(1000), {}, ["zero bytes"]),
    ("header of none", "0 100\n", {}, ["promises 0 words"]),
    ("no header", GOOD, {"format": "word2vec-text"}, ["line 1", "format='glove'"]),
    ("a header too many", "3 3\n" + GOOD, {"format": "glove"}, ["line 1", "header"]),
    ("format", GOOD, {"format": "fasttext"}, ["no format='fasttext'", "glove"]),
    ("codec", GOOD, {"encoding": "utf-9"}, ["utf-9"]),
    ("handler", GOOD, {"unicode_errors": "never"}, ["never"]),
    ("on_error", GOOD, {"on_error": "ignore"}, ["no on_error='ignore'", "raise, skip"]),
    ("limit", GOOD, {"limit": 0}, ["limit=0"]),
    ("commas", "the 0,1 0,2\nof 0,3 -1,4e-1\n", {}, ["'0,1'", "comma", "point"]),
    ("commas header", "2 2\nthe 0,1 0,2\nof 0,3 -0,4\n", {}, ["'0,1'", "comma", "point"]),
    ("commas said text", "2 2\nthe 0,1 0,2\nof 0,3 -0,4\n", {"format": "word2vec-text"}, ["comma", "point"]),
    ("sparse", "的 0:0.1 7:0.3\n了 2:0.5\n", {}, ["sparse", "dense"]),
    ("sparse header", "2 300\n的 0:0.1 7:0.3\n了 2:0.5\n", {}, ["sparse", "dense"]),
    ("dates", "2 2\nthe 1:2:3 4;5\nof 1 2\n", {}, ["'1:2:3'", "no way to write numbers"]),
    ("prose under a header", "2 2\n" + "Tea is a drink. " * 40, {}, ["is text", "another kind of file"]),
    ("no line feed", GOOD[:-1], {}, ["'the 1 2 3'", "no line feed", "Fetch the file again"]),
    ("no line feed header", "3 3\n" + GOOD[:-1], {}, ["no line feed"]),
    ("half a number", GOOD[:-1] + ".5\nfor 1 2 0.12"[:-1], {}, ["no line feed"]),
    ("empty lines", gzip.compress(GOOD.encode() + b"\n" * (5 << 20)), {}, ["empty lines follow"]),
]


@pytest.mark.parametrize(("name", "content", "options", "says"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_file_has_one_clear_error(here, name, content, options, says):
    name = write(name.replace(" ", "_"), content)
    found = message(name, **options)
    assert all(part in found for part in says), found
    assert "Traceback" not in found and len(found) < 420
    if "limit" in options: return
    if "twice" not in name:  # a stream keeps no list of the words that it has passed
        with pytest.raises(VectorsError): list(stream_vectors(name, **options))
    with pytest.raises(VectorsError): open_vectors(name, **options)
    assert not list(here.glob("*.safetensors*"))  # nothing half-made stays


def test_a_missing_file_and_a_folder(here):
    write("glove.txt", GOOD)
    assert "Did you mean glove.txt?" in message("glov.txt")
    assert "There is no file" in message("nowhere/x.txt")
    Path("folder").mkdir()
    assert "directory" in message("folder").lower() or "denied" in message("folder").lower()
    with pytest.raises(VectorsError, match="no copy"): open_vectors("gone.txt")


SKIP = [
    ("twice", ["tea", "cup"], "duplicate word"), ("width", ["tea", "the"], "width"), ("narrow", ["tea", "cup"], "width"),
    ("not number", ["tea", "the"], "not a number"), ("nan", ["tea", "the"], "not finite"),
    ("nan binary", ["tea", "the"], "not finite"), ("cut", ["tea", "cup"], "cut"), ("more", ["tea", "cup"], "header"),
    ("lines short", ["tea", "cup", "the"], "header"), ("lines long", ["tea", "cup", "the"], "header"),
    ("twice binary", ["tea", "cup"], "duplicate word"), ("encoding binary", ["tea", "the"], "wrong bytes"),
    ("encoding", ["tea"], "wrong bytes"), ("no line feed", ["tea", "cup"], "cut"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kept", "kind"), SKIP, ids=[row[0] for row in SKIP])
def test_skipping_leaves_out_what_is_bad_and_says_so_once(here, name, kept, kind):
    content = {row[0]: row[1] for row in BAD}[name]
    path = write("a", content)
    with pytest.warns(UserWarning, match=f"left out 1 \\(1 x {kind}\\)") as said: found = read_vectors(path, on_error="skip")
    assert found.words == kept and len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_vectors(path, on_error="skip").words == kept
        if "twice" not in name: assert [word for word, _ in stream_vectors(path, on_error="skip")] == kept


def test_bad_words_can_be_replaced(here):
    path = write("a.bin", BINARY.replace(b"cup", b"c\xffp"))
    assert read_vectors(path, unicode_errors="replace").words == ["tea", "c\ufffdp", "the"]
    assert read_vectors(path, encoding="latin-1").words == ["tea", "cÿp", "the"]


def test_the_place_is_right_far_inside_a_file(here, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    lines = [f"w{i} 1 2 3" for i in range(2000)]
    lines[1234] = "w1234 1 x 3"
    assert "line 1,235:" in message(write("a.txt", "\n".join(lines)))
    matrix = np.ones((2000, 3), np.float32)
    matrix[1234, 1] = np.inf
    data = b"2000 3\n" + b"".join(f"w{i} ".encode() + row.tobytes() for i, row in enumerate(matrix))
    assert f"vector 1,235 (byte {data.index(b'w1234 '):,})" in message(write("a.bin", data))
    lines[1234], lines[1500] = "w1234 1 2 3", "w7 1 2 3"
    assert "line 1,501" in message(write("b.txt", "\n".join(lines))) and "vector 8" in message("b.txt")


# Writing


@pytest.mark.parametrize(("word", "refused"), [("a b", {"a.bin", "a.vec"}), ("a\tb", {"a.bin", "a.vec", "a.txt"}), ("a\nb", set(NAMES)),
    ("", {"a.bin", "a.vec", "a.txt"}), (" a", {"a.bin", "a.vec", "a.txt"}),
                                             ("a 5", {"a.bin", "a.vec", "a.txt"}), ("a  b", {"a.bin", "a.vec", "a.txt"}),
                                             ("\ud800", set(NAMES)), ("a\0", set(NAMES))])  # fmt: skip
def test_a_word_that_could_not_be_read_again_is_refused(here, word, refused):
    before = some(["the", word, "tea"], dim=3)
    for name in NAMES:
        if name in refused or name.removesuffix(".gz") in refused:
            with pytest.raises(VectorsError) as caught: write_vectors(before, name)
            assert repr(word) in str(caught.value) and not list(here.glob("a.*"))
        else:
            write_vectors(before, name)
            assert equal(read_vectors(name), before)
            for path in here.glob("a.*"): path.unlink()


def test_what_cannot_be_written(here):
    with pytest.raises(VectorsError, match="not clear"): write_vectors(some(), "a.dat")
    with pytest.raises(VectorsError, match="not clear"): write_vectors(some(), "a.txt", format="fasttext")
    with pytest.raises(VectorsError, match="Leave out .gz"): write_vectors(some(), "a.safetensors.gz", format="safetensors")
    with pytest.raises(VectorsError, match="no vectors"): write_vectors(WordVectors([], np.empty((0, 3), np.float32)), "a.txt")
    write_vectors(some(), "a.safetensors")
    mapped = np.memmap("nan.raw", np.float32, "w+", shape=(2, 2))
    mapped[1, 1] = np.nan
    for name in NAMES:
        with pytest.raises(VectorsError, match="'b' holds a number"): write_vectors(WordVectors(["a", "b"], mapped), "b" + name)
    assert not list(here.glob("b*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_what_was_there(here, monkeypatch, name):
    write_vectors(some(), name)
    before = Path(name).read_bytes()

    def full(*_): raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VectorsError, match="No space left on device.*What was there before is untouched"): write_vectors(some(seed=1), name)
    assert Path(name).read_bytes() == before and len(list(here.iterdir())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only: a device that is always full")
def test_a_real_limit_of_room_is_reported(here):
    code = (
        "import resource, numpy as np; from lmbook.vector_files import *; from lmbook.word_vectors import VectorsError, WordVectors; "
        "v = WordVectors([f'w{i}' for i in range(5000)], np.ones((5000, 100)));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));\n"
        "try: write_vectors(v, 'a.bin')\nexcept VectorsError as error: print(error)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert "a.bin cannot be written: File too large" in out and not list(here.iterdir())


def test_folders_are_made(here):
    write_vectors(some(), "x/y/a.txt")
    assert equal(read_vectors("x/y/a.txt"), some())


# Copies that are opened


def test_a_copy_is_mapped_and_other_libraries_read_it(here):
    before = some()
    write_vectors(before, "a.txt")
    opened = open_vectors("a.txt")
    assert isinstance(opened.matrix, np.memmap) and equal(opened, before) and opened.nearest("tea", 2) == before.nearest("tea", 2)
    with pytest.raises(ValueError, match="read-only"): opened.matrix[0, 0] = 1
    stored = load_file("a.txt.safetensors")
    assert np.array_equal(stored["vectors"], before.matrix) and stored["words"].tobytes().decode().split("\n") == before.words


def test_a_copy_is_used_again_and_made_again(here):
    write_vectors(some(), "a.txt")
    open_vectors("a.txt")
    made = Path("a.txt.safetensors").stat().st_mtime_ns
    open_vectors("a.txt")
    assert Path("a.txt.safetensors").stat().st_mtime_ns == made
    write_vectors(some(seed=1), "a.txt")  # the same size, perhaps; another time
    os.utime("a.txt", ns=(1, 1))
    assert equal(open_vectors("a.txt"), some(seed=1))
    assert equal(open_vectors("a.txt", cache="elsewhere/c.safetensors"), some(seed=1))
    again = Path("a.txt.safetensors").stat().st_mtime_ns
    open_vectors("a.txt", unicode_errors="replace")
    assert Path("a.txt.safetensors").stat().st_mtime_ns != again
    Path("a.txt").unlink()
    assert equal(open_vectors("a.txt"), some(seed=1))  # the copy stands for it


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:500], lambda b: b"", lambda b: b"{}" + b,
    lambda b: b.replace(b'"words"', b'"sdrow"')])
def test_a_torn_copy_is_refused_or_made_again(here, damage):
    write_vectors(some(), "a.txt")
    open_vectors("a.txt")
    copy = Path("a.txt.safetensors")
    copy.write_bytes(damage(copy.read_bytes()))
    with pytest.raises(VectorsError): open_vectors(copy)
    assert equal(open_vectors("a.txt"), some())
    save_file({"other": np.ones(3)}, "other.safetensors")
    with pytest.raises(VectorsError, match="Make it again"): open_vectors("other.safetensors")


CLAIMS = [
    {"vectors": {"shape": [10**12, 100]}},
    {"vectors": {"shape": [4]}},
    {"vectors": {"shape": [True, 20]}},
    {"vectors": {"shape": "45"}},
    {"vectors": {"dtype": "I32"}},
    {"vectors": {"dtype": "F64", "shape": [2, 5]}},
    {"vectors": {"data_offsets": [-500, -420]}},
    {"vectors": {"data_offsets": [4, 84]}},
    {"vectors": {"data_offsets": [0, 10**15]}},
    {"words": {"data_offsets": [-500, -480]}},
    {"words": {"data_offsets": [0, 20]}},
    {"words": {"data_offsets": [80, 10**12], "shape": [10**12 - 80]}},
    {"words": {"dtype": "F32"}},
    {"words": 7},
    {"more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=map(str, CLAIMS))
def test_a_copy_whose_header_is_not_true_is_refused(here, claim):
    "Sizes, places and kinds of numbers are held against the file before anything is read."
    write_vectors(some(words=["a", "bb", "cc", "dd"], dim=5), "a.safetensors")
    data = Path("a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, change in claim.items(): header[name] = {**header.get(name, {}), **change} if isinstance(change, dict) else change
    write("b.safetensors", data[:8] + json.dumps(header).encode().ljust(length) + data[8 + length :])
    with pytest.raises(VectorsError, match="no whole file of vectors"): open_vectors("b.safetensors")


def test_a_copy_with_a_header_without_end_is_refused(here):
    deep = b'{"vectors":' + b"[" * 200_000
    write("deep.safetensors", len(deep).to_bytes(8, "little") + deep)
    write("long.safetensors", (10**12).to_bytes(8, "little") + b"{}")
    for name in ("deep", "long"):
        with pytest.raises(VectorsError, match="no whole file"): open_vectors(f"{name}.safetensors")
        assert "no whole file" in message(f"{name}.safetensors", format="safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_a_pipe_is_refused_and_not_waited_for(here):
    os.mkfifo("pipe")
    assert "pipe" in message("pipe")


def test_a_copy_is_written_again_in_another_format_without_being_read(here):
    write_vectors(some(), "a.txt")
    write_vectors(open_vectors("a.txt"), "b.bin")
    assert equal(read_vectors("b.bin"), some())


# The whole road


def test_importing_is_light_and_needs_the_core_only():
    heavy = ("gensim", "datasets", "pandas", "pyarrow", "scipy", "jieba")
    code = f"import sys, json, lmbook.vector_files; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    env = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[1])}
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout) == []


def test_a_zip_is_unpacked_as_the_message_says(here):
    write_vectors(some(["the", "tea"]), "glove.txt")
    with zipfile.ZipFile("glove.zip", "w") as archive: archive.write("glove.txt")
    Path("glove.txt").unlink()
    command = message("glove.zip").split("(python ")[1].split(")")[0].split()
    subprocess.run([sys.executable, *command], check=True)
    assert read_vectors("glove.txt").words == ["the", "tea"]


def test_a_large_text_takes_memory_for_one_block(here, monkeypatch):
    import tracemalloc

    with open("a.txt", "w", encoding="utf-8", newline="\n") as file:
        row = " 0.123456789" * 100
        for i in range(20_000): file.write(f"w{i}{row}\n")
    monkeypatch.setattr(module, "BLOCK", 1 << 18)
    next(stream_vectors("a.txt"))  # what is loaded once
    tracemalloc.start()
    n = sum(1 for _ in stream_vectors("a.txt"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 8e6 < Path("a.txt").stat().st_size
