"""Readers of files, dumps and data sets by name: encodings, faults, constant memory, and agreement with others on real data."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import http.server
import json
import lzma
import os
import pickle
import pydoc_data.topics
import re
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbook.core import LmbookError
from lmbook.corpora import (
    Corpus,
    CorpusError,
    Document,
    as_corpus,
    common_paragraphs,
    help_paragraphs,
    load_hub,
    load_reader,
    paragraph_digest,
    python_docs,
    read_corpus,
    read_csv,
    read_jsonl,
    read_parquet,
    read_text,
    read_wikipedia_dump,
    to_dataset,
    write_jsonl,
)
from lmbook.files import FileError, _wrong_bytes, guess_encoding
from lmbook.markup import _READ_AGAIN, _never_closed, strip_wikitext
from tools import python_docs as python_docs_list
from tools.python_docs import LIST, read_topics

ZH = "水已经开了，茶也泡好了，请大家趁热喝一口吧。今天早上下了雨，屋顶上的猫还没有醒。"
ZHT = "水已經開了，茶也泡好了，請大家趁熱喝一口吧。今天早上下了雨，屋頂上的貓還沒有醒。"
FR = "Où est la forêt? L'élève étudie à Besançon, le garçon à Nîmes."


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(corpus: Corpus) -> list[str]: return [record["text"] for record in corpus]


def until_error(corpus: Corpus) -> tuple[list[str], str]:
    "What a corpus yields before it fails, and the message."
    found = []
    with pytest.raises(CorpusError) as caught:
        for record in corpus: found.append(record["text"])
    return found, str(caught.value)


# Encodings


@pytest.mark.parametrize(("text", "encoding"), [(ZH, "gb18030"), (ZHT, "big5"), (FR, "latin-1"), (FR, "cp1252")])
def test_wrong_bytes_are_reported_with_their_place(here, text, encoding):
    Path("a.txt").write_bytes(b"Plain ASCII first.\n" + text.encode(encoding) + b"\n")
    with pytest.raises(UnicodeDecodeError) as python: Path("a.txt").read_bytes().decode("utf-8")
    _, message = until_error(read_text("a.txt", by="file"))
    assert f"a.txt: byte {python.value.start} (0x{python.value.object[python.value.start]:02x}) is not valid UTF-8" in message
    assert repr(guess_encoding("a.txt")) in message and "encoding=" in message
    assert texts(read_text("a.txt", encoding=encoding))[1] == text


@pytest.mark.parametrize(("text", "encoding"), [(ZH, "gb18030"), (ZHT, "big5"), (ZH, "utf-8"), (ZH, "utf-16-le"), (FR, "utf-16-be")])
def test_detection_finds_the_encoding(here, text, encoding):
    Path("a.txt").write_bytes(text.encode(encoding))
    assert texts(read_text("a.txt", encoding="detect")) == [text]


@pytest.mark.parametrize("shift", range(2))  # in one of the two cases the sample that is looked at ends in the middle of a character
def test_detection_looks_beyond_plain_ascii(here, shift):
    Path("a.txt").write_bytes(b"x" * shift + b"ten bytes\n" * 20_000 + (ZH + "\n").encode("gb18030") * 3000)
    assert guess_encoding("a.txt") == "gb18030"
    found = texts(read_text("a.txt", encoding="detect"))
    assert len(found) == 23_000 and found[-1] == ZH


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_obeyed_and_removed(here, encoding):
    Path("a.txt").write_bytes(f"{ZH}\n{FR}".encode(encoding))
    assert texts(read_text("a.txt")) == [ZH, FR] == texts(read_text("a.txt", encoding="utf-8"))


def test_utf16_without_a_mark_is_not_taken_for_text_with_zero_bytes(here):
    Path("a.txt").write_bytes("tea\n".encode("utf-16-le"))
    assert "zero byte" in until_error(read_text("a.txt"))[1]


@pytest.mark.parametrize("at", [0, 1, 65_534, 65_535, 65_536, 65_537, 65_538, 65_539, 131_074, 200_001])
@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_the_place_is_right_wherever_reading_is_cut_into_chunks(here, at, suffix):
    chars = ("茶\n" * 60_000).encode()
    data = b"x" * (at % 4) + chars[: at - at % 4] + b"\xff" + chars  # a wrong byte between two characters, at exactly `at`
    path = Path("a.txt" + suffix)
    path.write_bytes(bz2.compress(data) if suffix else data)
    assert f"byte {at:,} (0xff)" in until_error(read_text(path))[1]


def test_a_character_cut_off_at_the_end_is_reported(here):
    Path("a.txt").write_bytes("tea 茶".encode()[:-1])
    assert "byte 4 (0xe8)" in until_error(read_text("a.txt"))[1]


@pytest.mark.parametrize("by", ["line", "paragraph"])
def test_skipping_wrong_bytes_loses_only_the_records_that_hold_them(here, by):
    good = [f"line {n} 茶" for n in range(1000)]
    gap = b"\n" if by == "line" else b"\n\n"
    Path("a.txt").write_bytes(gap.join([line.encode() for line in good[:500]] + [b"tea \xff tea"] + [line.encode() for line in good[500:]]))
    corpus = read_text("a.txt", by=by, on_error="skip")
    assert texts(corpus) == good and corpus.skipped == {"wrong bytes": 1}
    assert "so this place is damaged" in until_error(read_text("a.txt", by=by))[1]


def test_an_unknown_encoding_is_named(here):
    Path("a.txt").write_text("tea", encoding="utf-8")
    assert "no encoding 'utf-9'" in until_error(read_text("a.txt", encoding="utf-9"))[1]


# Files that are missing, empty, cut or damaged


def test_a_missing_file_is_known_at_once_with_what_is_like_it(here):
    Path("poems.txt").write_text("tea", encoding="utf-8")
    for read in (read_text, read_jsonl, read_csv, read_parquet, read_wikipedia_dump):
        with pytest.raises(CorpusError, match=r"no file poms.txt\. Did you mean poems.txt\?"): read("poms.txt")
    with pytest.raises(CorpusError, match="no file poms.txt"): read_corpus("poms.txt")
    with pytest.raises(CorpusError, match="is a folder"): read_text(here)


@pytest.mark.parametrize("name", [f"a.{kind}" for kind in "txt jsonl json csv tsv parquet xml txt.gz xml.bz2 jsonl.xz".split()])
def test_an_empty_file_is_an_error_or_counted(here, name):
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    Path(name).write_bytes(packed(b""))
    assert until_error(read_corpus(name)) == ([], f"{name}: the file is empty.")
    corpus = read_corpus(name, on_error="skip")
    assert texts(corpus) == [] and corpus.skipped == {"empty file": 1}


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_a_cut_download_gives_what_is_there_and_then_an_error(here, suffix, pack):
    rng = np.random.default_rng(0)
    lines = [rng.bytes(40).hex() for _ in range(15_000)]
    path = Path("a.txt" + suffix)
    path.write_bytes(pack("\n".join(lines).encode())[:-1000])
    found, message = until_error(read_text(path))
    assert len(found) > 5_000 and found == lines[: len(found)]
    assert f"a.txt{suffix}: the compressed data break off" in message
    corpus = read_text(path, on_error="skip")
    assert texts(corpus) == found and corpus.skipped == {"unreadable file": 1}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_file_that_is_not_what_its_suffix_says(here, suffix):
    path = Path("a.txt" + suffix)
    path.write_bytes(b"<html>404 not found</html>" * 10)
    assert f"not {suffix} data, or they are damaged" in until_error(read_text(path))[1]


def test_lines_and_paragraphs(here):
    Path("a.txt").write_bytes("one\r\ntwo\n\n \nthree\u2028still three\x0bstill\n\n".encode())
    lines = read_text("a.txt")
    assert [(r["id"], r["text"]) for r in lines] == [("a.txt:1", "one"), ("a.txt:2", "two"), ("a.txt:5", "three\u2028still three\x0bstill")]
    assert lines.skipped == {"blank line": 3}
    paragraphs = [(r["id"], r["text"]) for r in read_text("a.txt", by="paragraph")]
    assert paragraphs == [("a.txt:1", "one\ntwo"), ("a.txt:5", "three\u2028still three\x0bstill")]
    assert texts(read_text("a.txt", by="file")) == ["one\ntwo\n\n \nthree\u2028still three\x0bstill\n\n"]
    with pytest.raises(CorpusError, match="no by='word'.*line, paragraph, file"): read_text("a.txt", by="word")
    with pytest.raises(CorpusError, match="no on_error='ignore'.*raise, skip"): read_text("a.txt", on_error="ignore")


# JSONL


def test_jsonl_faults_one_by_one(here):
    faults = {
        "{'text': 'x'}": "malformed row", "null": "malformed row", "[1, 2]": "malformed row", '{"text": "x"': "malformed row",
        "[" * 100_000: "malformed row", '{"body": "x"}': "no text", '{"text": null}': "no text", '{"text": ["x"]}': "no text",
        r'{"text": "\ud800"}': "wrong bytes",
    }
    for line, kind in faults.items():
        Path("a.jsonl").write_text(f'{{"text": "before"}}\n\n{line}\n{{"text": "after"}}\n', encoding="utf-8")
        found, message = until_error(read_jsonl("a.jsonl"))
        assert found == ["before"] and re.search(r"a.jsonl, (line|row) 3\b", message), line
        corpus = read_jsonl("a.jsonl", on_error="skip")
        assert texts(corpus) == ["before", "after"] and corpus.skipped == {kind: 1, "blank line": 1}, line


def test_a_missing_text_column_names_the_ones_there_are(here):
    Path("a.jsonl").write_text('{"title": "t", "body": "b"}\n', encoding="utf-8")
    Path("a.csv").write_text("title,body\nt,b\n", encoding="utf-8")
    pq.write_table(pa.table({"title": ["t"], "body": ["b"]}), "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert "no column 'text'. The columns are 'title', 'body'." in until_error(read_corpus(name))[1]
        assert read_corpus(name, text="body").take(1) == [{"text": "b", "id": f"{name}:1", "source": name, "title": "t"}]
        assert texts(read_corpus(name, text=lambda row: row["title"] + row["body"])) == ["tb"]
    rows = as_corpus([{"title": "t"}], name="mine")
    assert "mine, row 1: there is no column 'text'. The columns are 'title'." in until_error(rows)[1]


def test_nothing_is_lost_where_names_collide():
    [record] = as_corpus([{"text": "short", "body": "long", "id": 7, "source": "theirs"}], text="body")
    assert record == {"text": "long", "text_": "short", "id": 7, "source": "theirs"}


def test_json_array_and_json_lines_under_one_suffix(here):
    Path("array.json").write_text(' [{"text": "a"}, {"text": "b"}]'.strip(), encoding="utf-8")
    Path("lines.json").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    Path("broken.json").write_text('[{"text": "a"}, {"text"]', encoding="utf-8")
    assert texts(read_corpus("array.json")) == texts(read_corpus("lines.json")) == ["a", "b"]
    assert "broken.json: this is not JSON" in until_error(read_corpus("broken.json"))[1]


json_values = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.lists(st.text(), max_size=3)
record = st.fixed_dictionaries({"text": st.text()}, optional={"id": st.text(), "source": st.text(), "more": json_values})


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(record, max_size=8))
def test_jsonl_round_trip_of_any_text(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("round") / "a.jsonl"
    assert write_jsonl(rows, path) == len(rows)
    if not rows: return
    for row, back in zip(rows, read_jsonl(path), strict=True): assert back == {"id": back["id"], "source": back["source"], **row}
    again = list(read_jsonl(path))
    write_jsonl(again, path)
    assert list(read_jsonl(path)) == again


def test_writing_replaces_all_or_nothing(here):
    def breaks_off():
        yield {"text": "new"}
        raise RuntimeError("power cut")

    write_jsonl([{"text": "old"}], "a.jsonl")
    with pytest.raises(RuntimeError): write_jsonl(breaks_off(), "a.jsonl")
    with pytest.raises(CorpusError, match="record 2 holds half a character"): write_jsonl([{"text": "x"}, {"text": "\ud800"}], "a.jsonl")
    assert texts(read_jsonl("a.jsonl")) == ["old"] and os.listdir() == ["a.jsonl"]
    if os.name == "posix":  # who has the old file open goes on reading the old one: it was replaced, not written over
        with open("a.jsonl", encoding="utf-8") as old:
            write_jsonl([{"text": "new"}], "a.jsonl")
            assert json.loads(old.read()) == {"text": "old"}
        write_jsonl([{"text": "old"}], "a.jsonl")
    write_jsonl(({**r, "text": r["text"] + "er"} for r in read_jsonl("a.jsonl")), "a.jsonl")  # over the very file that is being read
    assert texts(read_jsonl("a.jsonl")) == ["older"]


# Tables


fields = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.lists(fields, min_size=2, max_size=2), min_size=1, max_size=6))
def test_csv_round_trip_with_quotes_commas_and_line_breaks(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("round") / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as f: csv.writer(f, quoting=csv.QUOTE_ALL).writerows([["text", "label"], *rows])
    assert [[r["text"], r["label"]] for r in read_csv(path)] == rows


def test_a_field_may_be_longer_than_the_csv_module_likes(here):
    Path("a.csv").write_text(f"text\n{'x' * 300_000}\n", encoding="utf-8")
    assert len(read_csv("a.csv").take(1)[0]["text"]) == 300_000


def test_csv_faults_with_their_lines(here):
    text = 'text,n\n"two\nlines",1\nno number\n\n"a ""quoted"" word",3\ntoo,many,fields\nlast,4\n'
    Path("a.csv").write_text(text, encoding="utf-8", newline="\n")
    found, message = until_error(read_csv("a.csv"))
    assert found == ["two\nlines"] and message.startswith("a.csv, line 4: 1 fields where 2 are expected (text, n).")
    corpus = read_csv("a.csv", on_error="skip")
    assert texts(corpus) == ["two\nlines", 'a "quoted" word', "last"] and corpus.skipped == {"malformed row": 2, "blank line": 1}
    Path("b.csv").write_text('text\nfine\n"never closed\nx\n', encoding="utf-8")
    found, message = until_error(read_csv("b.csv"))
    assert found == ["fine"] and "b.csv, line 3: unexpected end of data" in message and "quotes=False" in message
    assert texts(read_csv("b.csv", quotes=False)) == ["fine", '"never closed', "x"]
    Path("c.csv").write_text("text,text\n1,2\n", encoding="utf-8")
    assert "two columns have one name" in until_error(read_csv("c.csv"))[1]


def test_tsv_takes_quotation_marks_as_they_stand(here):
    Path("a.tsv").write_text('"Tea?" he said.\t“喝茶？”\n"Never mind.\t"算了\n', encoding="utf-8")
    assert texts(read_csv("a.tsv", names=["text", "zh"])) == ['"Tea?" he said.', '"Never mind.']
    Path("a.csv").write_text("text;n\na,b;1\n", encoding="utf-8")
    assert texts(read_csv("a.csv", sep=";")) == ["a,b"]
    Path("b.tsv.gz").write_bytes(gzip.compress(b'text\tn\n"a\t1\n'))
    assert texts(read_csv("b.tsv.gz")) == ['"a']


def test_parquet_in_batches_with_types(here):
    n = 5000
    table = pa.table({"text": [f"text {i}" for i in range(n)], "n": list(range(n)), "tags": [["a", "b"]] * n})
    pq.write_table(table, "a.parquet", row_group_size=700)
    found = list(read_parquet("a.parquet"))
    assert [r["n"] for r in found] == list(range(n)) and found[-1]["tags"] == ["a", "b"] and found[-1]["id"] == f"a.parquet:{n}"
    data = Path("a.parquet").read_bytes()
    Path("cut.parquet").write_bytes(data[:-100])
    assert "cut.parquet: this is not Parquet, or it is damaged" in until_error(read_parquet("cut.parquet"))[1]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), "null.parquet")
    corpus = read_parquet("null.parquet", on_error="skip")
    assert texts(corpus) == ["a", "b"] and corpus.skipped == {"no text": 1}


# Folders and the one door


def test_a_folder_is_read_in_the_order_of_names_and_everything_is_accounted_for(here):
    files = {"b.txt": "b", "a/z.md": "az", "a.txt": "a", "a/b/c.jsonl": '{"text": "abc"}', "C.TXT": "C", "10.txt": "10", "9.txt": "9"}
    for name, text in files.items():
        (here / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "f" / name).write_text(text, encoding="utf-8")
    for name in ("empty.txt", "image.png", "README", ".hidden.txt"): (here / "f" / name).touch()
    (here / "f" / ".git").mkdir()
    (here / "f" / ".git" / "x.txt").write_text("not this", encoding="utf-8")
    corpus = read_corpus("f")
    assert [(r["source"], r["text"]) for r in corpus] == [
        ("10.txt", "10"), ("9.txt", "9"), ("C.TXT", "C"), ("a.txt", "a"), ("a/b/c.jsonl", "abc"), ("a/z.md", "az"), ("b.txt", "b")
    ]
    assert corpus.skipped == {"empty file": 1, "unknown kind .png": 1, "unknown kind without suffix": 1}
    (here / "f" / "b2.txt").write_bytes(b"\xff")
    assert until_error(read_corpus("f"))[0][-1] == "b"
    corpus = read_corpus("f", on_error="skip")
    assert texts(corpus)[-1] == "b" and corpus.skipped["wrong bytes"] == 1


def test_the_door_knows_kinds_and_options(here):
    Path("a.TXT.gz").write_bytes(gzip.compress(b"a\n\nb"))
    assert texts(read_corpus("a.TXT.gz", by="paragraph")) == ["a", "b"] == texts(read_corpus(Path("a.TXT.gz")))
    Path("a.docx").touch()
    with pytest.raises(CorpusError, match="how to read this kind of file. Known are .txt"): read_corpus("a.docx")
    with pytest.raises(TypeError, match="colour"): read_corpus("a.TXT.gz", colour="green")
    assert texts(read_corpus([{"text": "x"}])) == ["x"]


def test_passes_are_independent_and_a_corpus_can_be_sent_to_another_process(here):
    Path("a.txt").write_text("1\n2\n\n3\n", encoding="utf-8")
    corpus = read_text("a.txt")
    assert [(a["text"], b["text"]) for a, b in zip(corpus, corpus)] == [("1", "1"), ("2", "2"), ("3", "3")]
    assert texts(pickle.loads(pickle.dumps(corpus))) == ["1", "2", "3"] and repr(corpus) == "Corpus('a.txt')"
    assert corpus.take(1) == [{"text": "1", "id": "a.txt:1", "source": "a.txt"}] and corpus.skipped == {}


# The datasets library


def test_to_and_from_datasets(here):
    write_jsonl(({"text": f"t{n}", "n": n} for n in range(2500)), "a.jsonl")
    corpus = read_jsonl("a.jsonl")
    table, stream = to_dataset(corpus), to_dataset(corpus, streaming=True)
    assert isinstance(table, datasets.Dataset) and isinstance(stream, datasets.IterableDataset)
    assert list(table) == list(corpus) == list(stream) == list(stream)
    assert list(as_corpus(table)) == list(as_corpus(stream)) == list(read_corpus(table)) == list(corpus)
    assert table[2499]["n"] == 2499


def test_a_data_set_is_never_yesterdays(here):
    Path("a.txt").write_text("old\n", encoding="utf-8")
    assert texts(to_dataset(read_text("a.txt"))) == ["old"]
    Path("a.txt").write_text("new\n", encoding="utf-8")
    assert texts(to_dataset(read_text("a.txt"))) == ["new"]


def test_columns_must_agree_or_be_named():
    rows = as_corpus([{"text": "a", "x": 1}, {"text": "b", "y": 2}])
    with pytest.raises(CorpusError, match="record 2 and the first one differ in the columns 'x', 'y'"): to_dataset(rows)
    assert to_dataset(rows, columns=["text", "y"])[:] == {"text": ["a", "b"], "y": [None, 2]}


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(CorpusError, match="only once"): as_corpus({"text": c} for c in "ab")


def test_a_fault_in_the_network_is_explained(monkeypatch):
    def fails(*args, **kwargs): raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(CorpusError, match=r"owner/name: the hub cannot be reached\..*HF_ENDPOINT.*path of its"): load_hub("owner/name")
    with pytest.raises(CorpusError, match=r"no file or folder owner/name here.*cannot be reached"): read_corpus("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match="switched off"): load_hub("owner/name")

    def breaks_off():
        yield {"text": "first"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(breaks_off))
    found, message = until_error(load_hub("owner/name"))
    assert found == ["first"] and "owner/name: the network is switched off" in message


class Mirror(http.server.BaseHTTPRequestHandler):
    "As much of the Hugging Face Hub as it takes to serve the data set me/tiny."

    files = {"train.jsonl": b'{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n', "README.md": b"---\nlicense: mit\n---\n"}
    commit = "1" * 40
    asked: list[str] = []

    def log_message(self, *args): pass

    def do_GET(self): self.answer(True)

    def do_HEAD(self): self.answer(False)

    def send(self, code: int, body: bytes, with_body: bool, **headers: str):
        self.send_response(code)
        for key, value in headers.items(): self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body: self.wfile.write(body)

    def answer(self, with_body: bool):
        path = self.path.split("?")[0]
        self.asked.append(path)
        listing = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in self.files.items()]
        about = {"id": "me/tiny", "sha": self.commit, "siblings": [{"rfilename": n} for n in self.files], "private": False, "gated": False,
                 "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        if path.startswith("/datasets/me/tiny/resolve/") and (body := self.files.get(path.rsplit("/", 1)[1])):
            self.send(200, body, with_body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=self.commit)
        elif path.startswith("/api/datasets/me/tiny"):
            answer = listing if path.startswith("/api/datasets/me/tiny/tree") else about
            self.send(200, json.dumps(answer).encode(), with_body, Content_Type="application/json")
        else: self.send(404, b"{}", with_body, X_Error_Code="EntryNotFound" if "me/tiny" in path else "RepoNotFound")


def test_data_sets_by_name_from_a_mirror(tmp_path):
    "By name, streaming and not, through HF_ENDPOINT; a wrong name; a wrong split. In a process of its own, for its own settings."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """
        import json
        from lmbook.corpora import CorpusError, load_hub, read_corpus
        def message(*args, **kwargs):
            try: return [r["text"] for r in read_corpus(*args, **kwargs)]
            except CorpusError as error: return str(error)
        stream = read_corpus("me/tiny")
        print(json.dumps([list(stream), list(stream), list(load_hub("me/tiny", streaming=False)),
                          message("me/none"), message("me/tiny", split="test"), message("me/tiny", text="body")]))
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=600, cwd=tmp_path)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    first, second, fetched, wrong_name, wrong_split, wrong_column = json.loads(done.stdout)
    expected = [{"text": text, "id": f"me/tiny:{n}", "source": "me/tiny", "n": n} for n, text in [(1, "one"), (2, "two")]]
    assert first == second == fetched == expected
    assert "me/none: the hub has no data set of this name" in wrong_name and "no file or folder me/none here" in wrong_name
    assert "test" in wrong_split and "train" in wrong_split
    assert "no column 'body'. The columns are 'text', 'n'." in wrong_column
    assert any(path.endswith("train.jsonl") for path in Mirror.asked)


# Wikipedia


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("'''Tea''' is a [[drink]] of [[Camellia sinensis|leaves]].", "Tea is a drink of leaves."),
    ("A [[File:x.jpg|thumb|A [[pot]].]]b [[Category:C]]c [[de:Tee]]d [[Image:y.png]]e [[zh-min-nan:Tê]]f.", "A b c d e f."),
    ("See [[:Category:Teas]] and [[Plan 9: a film]] and [[wikt:tea|the word]].", "See :Category:Teas and Plan 9: a film and the word."),
    ("Tea ({{lang|zh|茶}}) is hot.<ref name=a>Book.</ref><ref name=a /> It cools.", "Tea (茶) is hot. It cools."),
    ("Tea ({{IPA|x}}; {{audio|茶}}, ''cha'') is hot.", "Tea (cha) is hot."),
    ("Tea ({{audio|茶}}, from {{audio|x}}) is hot.", "Tea is hot."),
    ("Tea ({{audio|茶}} ({{IPA|x}})) is ({{x}} , {{y}} ) hot.", "Tea is hot."),
    ("Tea ({{x}}; pronounced so) (drink, {{x}}) is (; as it stands) hot.", "Tea (pronounced so) (drink) is (; as it stands) hot."),
    ("Call main() first, then f( ) and print(<ref>A.</ref>) or g(, x).{{x}}", "Call main() first, then f( ) and print or g(, x)."),
    ("From {{audio|tea}}, it is {{y}}{{x}} . A {{x}} b , c.\n{{x}}\nEnd.", "End."),
    ("茶（{{lang|x}}，{{y}}）很好（{{z}}；热）。", "茶很好（热）。"),
    ("__NOTOC__ Here __FILE__ and __init__ stay.__FORCETOC__", "Here __FILE__ and __init__ stay."),
    ("Tea<!-- why? --> &amp; milk&nbsp;&ndash; 5&times;.", "Tea & milk – 5×."),
    ("[http://x.org The site] says so. [http://x.org] Bare http://x.org here.", "The site says so."),
    ("One.\n{| class=x\n|-\n| cell one.\n{|\n| inner.\n|}\n|}\nTwo.", "One.\nTwo."),
    ("The sum <math>a+b.</math> is c.<br/>Next <b>bold</b> <small>small</small>.", "Next bold small."),
    ("* An item.\n* item\n# First.\n: Indented.\n; Term: said.\nMade of:\n", "An item.\nFirst.\nIndented.\nTerm: said."),
    ("__NOTOC__ Text.\n<gallery>\nx.jpg|A caption.\n</gallery>", "Text."),
    ("茶很好。\n茶\n（{{lang|x}}）他说：“好！”", "茶很好。\n他说：“好！”"),
    ("Before.\n== See also ==\n* A thing.\n=== Deeper ===\nHidden.\n== After ==\nBack.", "Before.\nBack."),
    ("Before.\n== 參考文獻 ==\n書。\n", "Before."),
])
def test_what_a_reader_sees(wikitext, expected): assert strip_wikitext(wikitext) == expected


def test_options_of_stripping():
    page = "Tea.\n== Kinds ==\nThese:\n* green\n== References ==\nNone."
    assert strip_wikitext(page, headings=True) == "Tea.\nKinds"
    assert strip_wikitext(page, prose=False) == "Tea.\nThese:\ngreen"
    assert strip_wikitext(page, headings=True, prose=False) == "Tea.\nKinds\nThese:\ngreen"


def test_a_bold_word_that_is_never_closed_breaks_nothing():
    "As in the article on Alaska, where such words in a table hid 3,631 words below it."
    page = "One.\n{| class=x\n|-\n| '''In the table.\n|}\nTwo is ''here.\n\nThree<ref>''Title’’, ''Part'' of a book.</ref>."
    assert strip_wikitext(page) == "One.\nTwo is here.\nThree."


def dump(pages: str, lang: str = "en", namespaces: str = "") -> bytes:
    head = f"<siteinfo><namespaces>{namespaces}</namespaces></siteinfo>"
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="{lang}">{head}{pages}</mediawiki>'.encode()


def page(n: int, text: str, ns: int = 0, extra: str = "") -> str:
    return f"<page><title>Page {n}</title><ns>{int(ns)}</ns><id>{n}</id>{extra}<revision><id>{n}</id><text>{text}</text></revision></page>"


def test_a_dump_accounts_for_every_page(here):
    redirect, talk, no_prose = page(2, "#REDIRECT", extra='<redirect title="x" />'), page(3, "Talk.", ns=1), page(4, "{{only}}")
    Path("w.xml").write_bytes(dump(page(1, "Tea.") + redirect + talk + no_prose + page(5, "茶。")))
    corpus = read_wikipedia_dump("w.xml")
    same = {"source": "w.xml", "lang": "en"}
    expected = [{"text": text, "id": f"w.xml:{n}", "title": f"Page {n}", **same} for n, text in [(1, "Tea."), (5, "茶。")]]
    assert list(corpus) == expected
    assert corpus.skipped == {"redirect": 1, "other namespace": 1, "no prose": 1}


def test_two_dumps_in_a_folder_have_ids_of_their_own(here):
    for name in ("en.xml", "simple.xml"): Path(name).write_bytes(dump(page(1, "Tea.")))
    assert [r["id"] for r in read_corpus(here)] == ["en.xml:1", "simple.xml:1"]


def test_a_dump_says_what_files_and_categories_are_called_in_its_language(here):
    Path("w.xml.bz2").write_bytes(bz2.compress(dump(
        page(1, "茶[[文件:x.jpg|thumb|壶。]][[分类:饮料]]很好。[[Category:x]]"), "zh",
        '<namespace key="0" /><namespace key="6">文件</namespace><namespace key="14">分类</namespace>',
    )))
    assert [(r["text"], r["lang"]) for r in read_corpus("w.xml.bz2")] == [("茶很好。", "zh")]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_dump_gives_its_whole_pages_and_then_an_error(here, compressed):
    rng = np.random.default_rng(0)
    data = dump("".join(page(n, f"Text {rng.bytes(2000).hex()} here.") for n in range(1, 1001)))
    path = Path("enwiki-20220301-pages-articles1.xml-p1p1000.bz2" if compressed else "w.xml")
    cut = bz2.compress(data)[:-5000] if compressed else data[:-5000]
    path.write_bytes(cut)
    found, message = until_error(read_corpus(path))
    whole = (bz2.BZ2Decompressor().decompress(cut) if compressed else cut).count(b"</page>")
    assert whole - 40 <= len(found) <= whole < 1000  # what the XML parser holds back at the end is at most a chunk
    assert ("break off" if compressed else "not well-formed XML") in message
    corpus = read_corpus(path, on_error="skip")
    assert len(texts(corpus)) == len(found) and corpus.skipped == {"unreadable file": 1}


def test_a_web_page_is_not_a_dump(here):
    Path("w.xml").write_text("<!doctype html><html><p>Not found<br></html>", encoding="utf-8")
    assert "not well-formed XML" in until_error(read_wikipedia_dump("w.xml"))[1]


# Constant memory


def peak_of(corpus: Corpus) -> tuple[int, int]:
    "Records, and the largest amount of memory in use while they pass by."
    tracemalloc.start()
    try: return sum(1 for _ in corpus), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".jsonl.gz"])
def test_fifty_megabytes_pass_in_constant_memory(tmp_path, suffix):
    n, path = 50_000, tmp_path / ("big" + suffix)
    line = {".txt": "x" * 1000, ".csv": '"' + "x" * 1000 + '"'}.get(suffix, json.dumps({"text": "x" * 1000}))
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt", encoding="utf-8") as f:
        if suffix == ".csv": f.write("text\n")
        f.writelines(f"{line}\n" for _ in range(n))
    count, peak = peak_of(read_corpus(path))
    assert count == n and peak < 4e6


def test_a_dump_passes_in_constant_memory(tmp_path):
    path = tmp_path / "big.xml"  # mostly talk, which is not parsed: tracing makes parsing wikitext very slow
    path.write_bytes(dump("".join(page(i, "Tea is hot. " * (800 if i % 100 else 1), ns=bool(i % 100)) for i in range(3000))))
    assert path.stat().st_size > 25e6
    count, peak = peak_of(read_wikipedia_dump(path))
    assert count == 30 and peak < 4e6


def test_parquet_passes_in_constant_memory(tmp_path):
    "The memory of pyarrow itself, which tracemalloc does not see."
    path, rng = tmp_path / "big.parquet", np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for _ in range(25): writer.write_table(pa.table({"text": [rng.bytes(1000).hex() for _ in range(1000)]}))
    before = pa.total_allocated_bytes()
    largest = max(pa.total_allocated_bytes() - before for _ in read_parquet(path))
    assert path.stat().st_size > 25e6 and largest < 15e6


# Documents and the reader


def tiny(**changes) -> Document:
    fields = {
        "id": "d", "genre": "story", "topic": "food", "sentiment": "neutral", "title": {"en": "T", "zh": "题"},
        "sentences": (("Hi there.", "你好。"), ("Bye.", "再见。"), ("Tea?", "茶？")), "entities": {"en": (), "zh": ()},
        "question": {"en": "?", "zh": "？"}, "answer": {"en": (0, 2), "zh": (0, 1)}, "summary": {"en": "", "zh": ""},
    }
    return Document(**fields | changes)


@pytest.mark.parametrize("lines", [False, True])
def test_sentence_spans_and_alignment(lines):
    d = tiny(lines=lines)
    assert d.text("en") == ("Hi there.\nBye.\nTea?" if lines else "Hi there. Bye. Tea?")
    assert d.text("zh") == ("你好。\n再见。\n茶？" if lines else "你好。再见。茶？")
    pairs = [(d.text("en")[a:b], d.text("zh")[c:e]) for (a, b), (c, e) in d.alignment()]
    assert pairs == list(d.sentences)
    assert d.record("zh") == {"text": d.text("zh"), "id": "d", "lang": "zh", "title": "题", "topic": "food", "sentiment": "neutral"}


def test_names_are_found_whole_and_longest_first():
    from lmbook.corpora import _entity_spans

    text = "Oda Marl lives in Marl. Marla saw Oda's cat."
    spans = _entity_spans(text, [("Oda", "PER"), ("Marl", "LOC"), ("Oda Marl", "PER")], "en")
    assert [(text[a:b], kind) for a, b, kind in spans] == [("Oda Marl", "PER"), ("Marl", "LOC"), ("Oda", "PER")]
    text = "小田在马尔街，马尔很小。"
    names = [("马尔", "LOC"), ("马尔街", "LOC"), ("小田", "PER")]
    assert [text[a:b] for a, b, _ in _entity_spans(text, names, "zh")] == ["小田", "马尔街", "马尔"]
    assert _entity_spans(text, [], "zh") == ()


def test_the_reader_is_what_it_says():
    reader = load_reader()
    assert len(reader) >= 120 and len({d.id for d in reader}) == len(reader)
    for d in reader:
        assert d.sentiment in ("positive", "neutral", "negative"), d.id
        for k, lang in enumerate(("en", "zh")):
            text = d.text(lang)
            assert [text[a:b] for a, b in d.sentence_spans(lang)] == [pair[k] for pair in d.sentences], d.id
            start, end = d.answer[lang]
            assert text.count(text[start:end]) == 1 and start < end, d.id
            edges = [edge for start, end, _ in d.entities[lang] for edge in (start, end)]
            assert edges == sorted(edges) and all(start < end for start, end, _ in d.entities[lang]), d.id
            assert d.question[lang].endswith("?？"[k]) and d.summary[lang] and d.title[lang] and d.summary[lang] not in text, d.id
        assert {kind for *_, kind in d.entities["en"]} == {kind for *_, kind in d.entities["zh"]} <= {"PER", "LOC", "ORG", "TIME"}, d.id
    assert list(to_dataset([d.record("en") for d in reader])) == [d.record("en") for d in reader]


def corpus_digest(texts: dict[str, str]) -> str: return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


PYTHON_DOCS = "439f14ea187bd41ec374787cf53037bf0eb7ba315c8b2b6722a442f0dd8cd966"  # on every Python


def test_python_docs_are_the_same_prose_on_every_machine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        docs = list(python_docs())
    assert corpus_digest({r["id"]: r["text"] for r in docs}) == PYTHON_DOCS
    assert all(r["text"].strip() and r["lang"] == "en" for r in docs) and {"continue", "lambda"} <= {r["id"] for r in docs}
    paragraphs = [p for r in docs for p in r["text"].split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs) > 1300 and paragraphs == [p for r in docs for p in help_paragraphs(r["text"])]


def other_topics() -> list[Path]:
    "The documentation of the other Pythons on this machine, as far as they can be found, of the versions that the list was made for."
    known = {release.rpartition(".")[0] for release in LIST.read_text(encoding="utf-8").splitlines()[0].partition(": ")[2].split()}
    folders = {Path(sys.base_prefix), Path("/usr"), Path("/usr/local"), Path("/opt/homebrew")}
    folders |= {found for home in ("~/.pyenv/versions", "~/.local/share/uv/python") for found in Path(home).expanduser().glob("*")}
    found = {path.resolve() for folder in folders for path in folder.glob("lib/python3.*/pydoc_data/topics.py")}
    return sorted(path for path in found if path.parent.parent.name.removeprefix("python").rstrip("t") in known)


@pytest.mark.parametrize("path", other_topics() or [pytest.param(None, marks=pytest.mark.skip(reason="no other Python here"))], ids=str)
def test_python_docs_of_other_pythons(path):
    texts, missing = common_paragraphs(read_topics(path))
    assert missing == 0 and corpus_digest(texts) == PYTHON_DOCS


def test_paragraphs_are_the_same_whoever_laid_them_out():
    old = """
The "in" statement
******************

   in_stmt ::= "in"
               "side"

"in" is the operator between an item and its container, and a non-
virtual word.  It isn\u2019t said of left- and right-hand sides, which \u201cneed\u201d
another line.

  Note:

    The text of a note is indented, and so is the paragraph that goes
    on here.

|  a  |  b |
|-----|----|
"""
    new = """The "in" statement
==================

   in_stmt ::= "in"
               "side"


"in" is the operator between an item and its container, and a
non-virtual word. It isn't said of left- and right-hand sides, which
"need" another line.
  \t
  Note:

    The text of a note is indented, and so is the paragraph that goes on
    here.

|  a  |  b |
|-----|----|"""
    assert list(help_paragraphs(old)) == list(help_paragraphs(new)) == [
        'The "in" statement', '   in_stmt ::= "in"\n               "side"',
        '"in" is the operator between an item and its container, and a non-virtual word. It isn\'t said of left- and right-hand sides, '
        'which "need" another line.',
        "  Note:", "    The text of a note is indented, and so is the paragraph that goes on here.", "|  a  |  b |\n|-----|----|",
    ]
    assert list(help_paragraphs("\n****\n\n")) == []
    short = "One\ntwo."  # ended on purpose
    assert list(help_paragraphs(short)) == [short]
    code = 'def f():\n    """\n    Doc.\n    """'
    assert list(help_paragraphs(code)) == [code]


def test_a_python_that_lacks_paragraphs_says_so_once(monkeypatch):
    whole, _ = common_paragraphs(topics := read_topics(pydoc_data.topics.__file__))
    changed = {topic: text.replace("enclosing loop", "surrounding loop") for topic, text in topics.items() if topic != "lambda"}
    monkeypatch.setattr(pydoc_data.topics, "topics", changed)
    with pytest.warns(UserWarning, match=r"^[1-9]\d* paragraphs of python_docs\(\) are not in the documentation of Python 3\.") as caught:
        docs = {r["id"]: r["text"] for r in python_docs()}
    [warning] = caught
    lost = [p for topic, text in whole.items() for p in text.split("\n\n") if p not in docs.get(topic, "").split("\n\n")]
    assert str(warning.message).split()[0] == str(len(lost)) and any("enclosing loop" in p for p in lost)
    assert warning.filename == __file__ and list(docs) == [topic for topic in whole if topic in docs]
    assert "lambda" in whole and "enclosing loop" not in " ".join(docs.values()) and "the next loop cycle" in docs["continue"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {r["id"]: r["text"] for r in python_docs(all=True)} == changed


def test_where_a_paragraph_is_found_does_not_matter():
    topics = read_topics(pydoc_data.topics.__file__)
    assert common_paragraphs({"everything": "\n\n".join(reversed(topics.values()))}) == common_paragraphs(topics)
    assert common_paragraphs({})[0] == {} and common_paragraphs({})[1] > 1300


def test_the_list_of_paragraphs_is_what_all_releases_have(tmp_path, monkeypatch, capsys):
    shared = "Said by both of them, in just the same words, though not with the same number of spaces everywhere. " * 2
    mine = "Only here. " * 30
    a = {"long": f"Long\n****\n\n{shared}\n\n{mine}\n\nNote:\n\nLast.", "short": f"{shared}\n\n{shared}", "none": mine}
    b = {"else": f"Last.\n\nNote:\n\n{shared.replace(' both', '  both')}", "long": "Long\n===="}
    assert python_docs_list.listed({"1": a, "2": b}, shortest=1) == {"long": ["Long", "Last."], "short": [shared.strip()]}
    for name, topics in (("a", a), ("b", b)): (tmp_path / name).write_text(f"# {name}\ntopics = {topics!r}\n", encoding="utf-8")
    monkeypatch.setattr(python_docs_list, "LIST", tmp_path / "list.txt")
    monkeypatch.setattr(sys, "argv", ["python_docs", f"3.1={tmp_path / 'a'}", f"3.2={tmp_path / 'b'}"])
    python_docs_list.main()
    first, _, *rows = (tmp_path / "list.txt").read_text(encoding="utf-8").splitlines()
    assert first == "# the same in: 3.1 3.2" and rows == [f"short {paragraph_digest(shared.strip())}"]
    assert capsys.readouterr().out.startswith("1 topics, 1 paragraphs")


# The real thing, where it is


def test_real_text_files_have_the_counts_of_their_readme(data_dir):
    assert sum(1 for _ in read_text(data_dir / "chinese_poetry" / "tang_shi_10k.txt", by="paragraph")) == 10_006
    assert sum(1 for _ in read_text(data_dir / "zhwiki" / "zhwiki_contexts.txt")) == 1_104
    pairs = list(read_csv(data_dir / "tatoeba_en_zh" / "cmn.txt", sep="\t", names=["en", "zh", "by"], text="en"))
    assert len(pairs) == 28_447 and pairs[0]["zh"] == "嗨。"
    for lang in ("eng_Latn", "zho_Hans"):
        topics = [r["category"] for split in ("train", "dev", "test") for r in read_csv(data_dir / "sib200" / lang / f"{split}.tsv")]
        assert len(topics) == 1_004 and len(set(topics)) == 7
    papers = read_jsonl(data_dir / "scitldr" / "dev.jsonl", text=lambda row: " ".join(row["source"]))
    assert len(texts(papers)) == 619
    squad = json.loads(next((data_dir / "squad").glob("*.json")).read_text(encoding="utf-8"))
    rows = as_corpus([p for article in squad["data"] for p in article["paragraphs"]], text="context")
    assert sum(1 for _ in rows) == 2_067 and sum(len(r["qas"]) for r in rows) == 10_570
    assert not any(rows.skipped for rows in (papers, rows))


def overlap(ours: str, theirs: str) -> float:
    "F1 of the multisets of lower-cased words: 1 if both have the same words equally often."
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (ours, theirs))
    return 2 * (a & b).total() / (a.total() + b.total())


def test_the_real_dump_agrees_with_another_extractor(data_dir):
    [path] = (data_dir / "enwiki_dump").glob("*.bz2")
    corpus = read_corpus(path)
    ours = {r["title"]: r["text"] for r in corpus}
    holes = corpus.skipped.pop("sentence with a hole")
    assert corpus.skipped["redirect"] == 100 and len(ours) + corpus.skipped.total() == 206 and 20 < holes < 300
    with pytest.raises(tarfile.ReadError): tarfile.open(path)
    reference = (data_dir / "enwiki_dump" / "enwiki96.txt").read_text(encoding="utf-8")
    parts = re.split(r"^= (.+) =$", reference, flags=re.MULTILINE)[1:]
    theirs = dict(zip(parts[::2], parts[1::2]))
    assert len(theirs) == 96 and theirs.keys() <= ours.keys()
    length = {title: len(text.split()) for title, text in ours.items()}
    assert max(length[title] for title in ours.keys() - theirs.keys()) < min(length[title] for title in theirs) / 2  # too short for it
    assert "were \"#$%_&'() – early typewriters" in ours["ASCII"]  # brackets that the article itself has
    f1 = np.array([overlap(ours[title], text) for title, text in theirs.items()])
    assert f1.mean() > .98 and f1.min() > .8 and np.median(f1) > .99  # theirs keeps sentences with holes: .998 with holes="close"
    leftovers = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||'''|<ref|</|&[a-z]+;|\[\[(?:File|Category)|__[A-Z]+__")
    dirty = {title: found[0] for title, text in ours.items() if (found := leftovers.findall(text))}
    assert len(dirty) <= 3, dirty


# Nothing wrong in silence


@pytest.mark.parametrize(("wikitext", "expected"), [
    ("''Eagle'''s nest.", "Eagle's nest."), ("L'auteur de l'''Odyssée'' dort.", "L'auteur de l'Odyssée dort."),
    ("'''Tea''' is ''hot''.", "Tea is hot."), ("'''''Both''''' of them.", "Both of them."), ("An ''''odd'''' one.", "An 'odd' one."),
    ("'''''Bold''' and'' more.", "Bold and more."), ("'''[[Tea]]'''s and ''[[milk]]''.", "Teas and milk."),
    ("It's o'clock.", "It's o'clock."),
    ("At {{convert|1300|mi|km}}, the state ends.", "At 1300 mi, the state ends."), ("It is {{formatnum:3}}&nbsp;°C.", "It is 3 °C."),
    ("Used in {{w|bulb|bulbs}} and {{lang|fr|Paris}}.", "Used in bulbs and Paris."),
    ("So {{nowrap|[[New York|N. Y.]] it}} is.", "So N. Y. it is."),
    ("A {{lang-de|Haus}} and {{convert}} here.", ""), ("Whole. A {{lang-de|Haus}} and {{convert}} here. Whole.", "Whole. Whole."),
    ("茶[[文件:a.jpg|thumb|猫。]]很好。", "茶很好。"), ("茶[[圖像:a.jpg|thumb|猫。]][[分類:茶]]很好。", "茶很好。"),
])
def test_no_noun_and_no_apostrophe_goes_missing(wikitext, expected): assert strip_wikitext(wikitext) == expected


@pytest.mark.parametrize("unit", ["<ref", " ", ",", "(", "()", "( ", "({{x}} ", " {{x}},", "'''", "[", "<ref>"])
def test_no_page_takes_forever(unit):
    "It is read, or given up at once since too much of it never closes."
    try: strip_wikitext("Tea." + unit * 10_000 + "x.")
    except LmbookError as error: assert "never close" in str(error)


def test_two_columns_of_one_name_are_refused_in_every_kind_of_file(here):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "two.parquet")
    Path("two.csv").write_text("text,text\na,b\n", encoding="utf-8")
    for name in ("two.parquet", "two.csv"):
        with pytest.raises(CorpusError, match="two columns have one name"): list(read_corpus(name))


@pytest.mark.parametrize(("names", "message"), [
    (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], "load_from_disk"),
    (["dataset_dict.json", "train/state.json"], "load_from_disk"),
    (["README.md", "data/part.jsonl"], "documentation"), (["train.txt", "test.txt"], "test part"),
    (["data/train-00000.jsonl", "data/valid-00000.jsonl"], "test part"),
])
def test_a_folder_that_is_not_all_text_to_learn_from_is_refused(here, names, message):
    for name in names:
        (here / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "d" / name).write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match=message): list(read_corpus("d"))
    with pytest.raises(CorpusError, match=message): list(read_corpus("d", on_error="skip"))


def test_a_link_out_of_a_folder_is_not_followed(here):
    for name in ("out.txt", "d/in.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name, encoding="utf-8")
    Path("d/link.txt").symlink_to(here / "out.txt")
    Path("d/same.txt").symlink_to(here / "d" / "in.txt")
    corpus = read_corpus("d")
    assert texts(corpus) == ["d/in.txt", "d/in.txt"] and corpus.skipped == {"link out of the folder": 1}


@pytest.mark.parametrize("encoding", ["hex", "zlib", "rot13", "base64"])
def test_codecs_that_are_no_encodings_of_text_are_refused(here, encoding):
    Path("a.txt").write_text("abcd", encoding="utf-8")
    with pytest.raises(CorpusError, match="Python knows no encoding"): list(read_text("a.txt", encoding=encoding))


def test_a_pipe_behind_a_name_is_refused(here):
    os.mkfifo("pipe.txt")
    with pytest.raises(CorpusError, match="pipe"): read_text("pipe.txt")
    with pytest.raises(CorpusError, match="device"): read_text("/dev/zero")


def test_no_encoding_is_guessed_of_what_can_be_read_only_once(here):
    os.mkfifo("pipe.txt")
    for name in ("pipe.txt", "/dev/zero"):
        with pytest.raises(FileError, match="a device or a pipe"): guess_encoding(name)


def test_a_file_that_is_mended_while_it_is_read_ends(here):
    "The search for the wrong byte comes to the end and finds none: it had been there when the file was read first."
    Path("a.txt").write_bytes("Tea, and é.\n".encode())
    assert "the file has changed while it was read" in str(_wrong_bytes(Path("a.txt"), "utf-8", CorpusError))
    Path("a.txt").write_bytes(b"Tea, \xff.\n")
    assert "a.txt: byte 5 (0xff) is not valid UTF-8" in str(_wrong_bytes(Path("a.txt"), "utf-8", CorpusError))


def test_what_makes_no_table_is_said_in_our_words():
    with pytest.raises(CorpusError, match="no record"): to_dataset(as_corpus([]))
    with pytest.raises(CorpusError, match="only once"): to_dataset({"text": c} for c in "ab")
    late = [{"text": "a", "n": 1} for _ in range(1500)] + [{"text": "b", "n": {"x": 1}}]
    with pytest.raises(CorpusError, match="do not make a table"): to_dataset(as_corpus(late))


def test_a_late_change_of_type_is_said_while_streaming_too():
    for late, kind in (({"x": 1}, "an object"), ("1", "a text"), ([1], "a list"), (True, "a truth value")):
        rows = as_corpus([{"text": "a", "n": 1} for _ in range(1500)] + [{"text": "b", "n": None}, {"text": "b", "n": late}])
        for streaming in (False, True):
            with pytest.raises(CorpusError, match=f"in record 1502 the column 'n' holds {kind}, before it held a number"):
                list(to_dataset(rows, streaming=streaming))
    assert list(to_dataset(as_corpus([{"text": "a", "n": 1}, {"text": "b", "n": 1.5}]), streaming=True))[1]["n"] == 1.5
    with pytest.raises(CorpusError, match=r"is one text. Give a list of names: columns=\['text'\]"): to_dataset([{"text": "a"}], "text")
    with pytest.raises(CorpusError, match="record 1 is a str"): list(to_dataset(["a"], streaming=True))


# Holes


@pytest.mark.parametrize(("wikitext", "expected", "holes"), [
    ("At {{frontier|1300|mi}}, it ends. It is old.", "It is old.", 1), ("It is old. It ends at {{x}}.", "It is old.", 1),
    ("It is old.{{x}} It ends.", "It is old. It ends.", 0), ("It is old.{{sfn|A}} It{{cn}} ends.", "It is old. It ends.", 0),
    ("{{Infobox}}'''Tea''' is hot.", "Tea is hot.", 0), ("{{Infobox\n| a = b\n}} Tea is hot.", "Tea is hot.", 0),
    ("{{x}} is hot. Tea is wet.", "Tea is wet.", 1), ("A {{x}} and {{y}} one. Tea.", "Tea.", 1), ("* {{x}}\nTea.", "Tea.", 0),
    ("Tea (from {{x}} in {{y}}) is hot.", "Tea is hot.", 0),
    ("Tea (hot; {{x}}) is (cold) wet.", "Tea (hot) is (cold) wet.", 0),
    ("He met Dr. {{x}} there. Tea.", "Tea.", 1), ("He met J. R. {{x}} there. Tea.", "Tea.", 1), ("It is {{{1}}} old. Tea.", "Tea.", 1),
    ("So <math>x</math> holds. Tea.", "Tea.", 1), ("茶有{{x}}种。茶很好。", "茶很好。", 1),
    ("茶很好。{{x}}茶有三种。", "茶很好。茶有三种。", 0),
    ("{{convert|5|to|7|km}} on. {{convert|5|ft|6|in|m}} up.", "5 to 7 km on. 5 ft 6 in up.", 0), ("{{as of|2014|lc=y}} it is.",
    "as of 2014 it is.", 0),
    ("It is 6{{nbsp}}km{{snd}}far. A {{val|6.2|e=18}} one.", "It is 6 km – far.", 1), ("{{ill|de|Haus}} or {{ill|Haus|de}}.",
    "Haus or Haus.", 0),
    ("Many {{x}}", "", 0), ("An [[a|{{x}} b]] one. Tea.", "Tea.", 1),
])
def test_a_sentence_with_a_hole_is_dropped_and_counted(wikitext, expected, holes):
    counts: Counter[str] = Counter()
    assert strip_wikitext(wikitext, counts=counts) == expected and counts["sentence with a hole"] == holes
    assert "\1" not in strip_wikitext(wikitext, holes="close") and "\2" not in strip_wikitext(wikitext, prose=False)


def test_holes_in_a_dump_are_counted_or_closed(here):
    Path("w.xml").write_bytes(dump(page(1, "It has {{x}} people. It is old.") + page(2, "{{x}} is all.")))
    corpus = read_wikipedia_dump("w.xml")
    assert texts(corpus) == ["It is old."] and corpus.skipped == {"sentence with a hole": 2, "no prose": 1}
    assert texts(read_corpus("w.xml", holes="close")) == ["It has people. It is old.", "is all."]
    with pytest.raises(CorpusError, match="no holes='mend'.*drop, close"): read_wikipedia_dump("w.xml", holes="mend")


# Limits: what fills the memory is an error, and is never in it

MB = 1_000_000
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
HUGE = {  # beginning, and what goes on for 50 MB: each kind of file, and each way to have no end
    "line.txt": (b"", b"a"), "zeros.txt": (b"", b"\0"), "row.csv": (b"text,n\nok,1\n", b"a"), "quoted.csv": (b'text\n"', b"a\n"),
    "line.jsonl": (b'{"text": "ok"}\n{"text": "', b"a"), "array.json": (b'[{"text": "ok"}, {"text": "', b"a"), "names.csv": (b"", b"a,"),
    "nested.json": (b'[{"text": "ok"}, ', b"["), "page.xml": (b"<w><page><title>T</title><revision><text>",
    b"a"), "tags.xml": (b"<w><a>", b"<b/>"),
}


@pytest.mark.parametrize(("name", "suffix"), [*((name, ".gz") for name in HUGE), ("line.txt", ".bz2"), ("line.txt", ".xz")])
def test_a_bomb_is_an_error_and_no_more_than_the_limit_is_unpacked(here, name, suffix):
    path, (start, more) = Path(name + suffix), HUGE[name]
    path.write_bytes(PACK[suffix](start + more * (50 * MB // len(more))))
    assert path.stat().st_size < MB / 5
    tracemalloc.start()
    try: found, message = until_error(read_corpus(path, limit=MB))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 25 * MB and message.startswith(str(path)), peak
    assert found == ["ok"] * (name in ("row.csv", "line.jsonl", "array.json", "nested.json"))
    if name != "nested.json": assert "limit=1,000,000" in message and "larger" in message


@pytest.mark.parametrize(("name", "data", "kept"), [
    ("a.txt", "ok\n{long}\nok\n", 2), ("a.jsonl", '{{"text": "ok"}}\n{{"text": "{long}"}}\n{{"text": "ok"}}\n', 2), ("a.csv",
    "text\nok\n{long}\nok\n", 2),
    ("a.txt", "{long}", 0), ("a.csv", "text\nok\n{long}", 1), ("a.json", '[{{"text": "ok"}}, {{"text": "{long}"}}]', 1),
])
def test_what_is_too_long_is_left_out_and_counted_where_errors_are_skipped(here, name, data, kept):
    Path(name).write_text(data.format(long="x" * 5000), encoding="utf-8")
    corpus = read_corpus(name, limit=1000, on_error="skip")
    assert texts(corpus) == ["ok"] * kept and corpus.skipped in ({"too long": 1}, {"malformed row": 1})
    assert len(texts(read_corpus(name, limit=6000))) == kept + 1


def test_paragraphs_and_whole_files_have_the_limit_too(here):
    Path("a.txt").write_text("ok\nok\n\n" + "line\n" * 300 + "\n\nok", encoding="utf-8")
    corpus = read_text("a.txt", by="paragraph", limit=1000, on_error="skip")
    assert [(r["id"], r["text"]) for r in corpus] == [("a.txt:1", "ok\nok"), ("a.txt:306", "ok")] and corpus.skipped == {"too long": 1}
    assert "the paragraph in line 4: longer than limit=1,000 characters" in until_error(read_text("a.txt", by="paragraph", limit=1000))[1]
    assert "as one record: longer than limit=1,000" in until_error(read_text("a.txt", by="file", limit=1000))[1]
    assert len(texts(read_text("a.txt", by="file", limit=2000))) == 1
    for wrong in (0, -1, 1.5, True, "64"):
        with pytest.raises(CorpusError, match="limit=.*whole number"): read_text("a.txt", limit=wrong)


def test_a_dump_of_elements_that_are_no_pages_ends(here):
    Path("w.xml").write_bytes(dump("<log><x/></log>" * 30_000 + page(1, "Tea.")))  # each is thrown away
    assert texts(read_corpus("w.xml", limit=100_000)) == ["Tea."]
    Path("w.xml").write_bytes(dump("<a>" * 30_000 + "</a>" * 30_000 + page(1, "Tea.")))
    assert "limit=100,000" in until_error(read_corpus("w.xml", limit=100_000))[1]
    Path("w.xml").write_bytes(dump(page(1, "Tea. " * 10) + page(2, "Tea. " * 40_000)))
    found, message = until_error(read_corpus("w.xml", limit=40_000))
    assert len(found) == 1 and "behind the page 'Page 1'" in message


def test_a_long_value_of_parquet_is_refused_before_it_is_unpacked(here):
    pq.write_table(pa.table({"text": ["ok", "a" * 50 * MB]}), "bomb.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    _, message = until_error(read_parquet("bomb.parquet", limit=MB))
    assert "column 'text'" in message and "limit=1,000,000" in message and pa.total_allocated_bytes() - before < MB
    pq.write_table(pa.table({"text": ["ok", "a" * 3000, "ok"], "n": [1, 2, 3]}), "long.parquet")
    assert "row 2: column 'text' is longer than limit=2,000" in until_error(read_parquet("long.parquet", limit=2000))[1]
    corpus = read_parquet("long.parquet", limit=2000, on_error="skip")
    assert texts(corpus) == ["ok", "ok"] and corpus.skipped == {"too long": 1}
    pq.write_table(pa.table({"text": ["x" * 90_000] * 3000}), "repeated.parquet")  # 270 MB, if each row had its own
    assert sum(1 for _ in read_parquet("repeated.parquet", limit=MB)) == 3000


def test_values_of_parquet_that_no_python_can_hold_are_said(here):
    bad = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe")])
    far = pa.array([0, 10**9], pa.date32())
    for name, table, kind in (("bytes", {"text": bad}, "wrong bytes"), ("date", {"text": ["ok", "no"], "day": far}, "unreadable value")):
        pq.write_table(pa.table(table), f"{name}.parquet")
        assert re.search(r"row 2: column '\w+' (is not valid UTF-8|cannot be read)", until_error(read_parquet(f"{name}.parquet"))[1])
        corpus = read_parquet(f"{name}.parquet", on_error="skip")
        assert texts(corpus) == ["ok"] and corpus.skipped == {kind: 1}


def test_a_folder_may_be_deeper_than_python_and_the_system_like(here):
    home = os.getcwd()
    try:
        os.mkdir("d")
        os.chdir("d")
        for _ in range(900):
            os.mkdir("e")
            os.chdir("e")
        Path("deep.txt").write_text("deep", encoding="utf-8")
        os.chdir(home)
        assert texts(read_corpus("d")) == ["deep"]
        os.chdir("d" + "/e" * 900)
        for _ in range(210):
            os.mkdir("f" * 20)
            os.chdir("f" * 20)
        os.chdir(home)
        assert "too long" in until_error(read_corpus("d"))[1]
    finally:
        os.chdir(home)
        subprocess.run(["rm", "-rf", "d"], check=False)


@pytest.mark.parametrize("name", ["pipe", "loop", "device", "nowhere"])
def test_what_is_no_file_in_a_folder_is_counted(here, name):
    Path("d").mkdir()
    Path("d/a.txt").write_text("a", encoding="utf-8")
    path = Path("d") / f"{name}.txt"
    if name == "pipe": os.mkfifo(path)
    elif name == "device": path.symlink_to("/dev/zero")
    elif name == "loop": path.symlink_to(here / "d")
    else: path.symlink_to(here / "d" / "nothing")
    corpus = read_corpus("d")
    assert texts(corpus) == ["a"]
    assert corpus.skipped == {"link out of the folder" if name == "device" else "no file, but a link, a pipe or a device": 1}
    with pytest.raises(CorpusError): list(read_corpus(path)) if name != "loop" else read_text(path)


# Whatever comes


def survives(function, *arguments, **options):
    "Its value, or None where it ends in an error that a user can mend. Anything else is raised."
    try: return function(*arguments, **options)
    except LmbookError as error: assert str(error)


SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xml", ".txt.gz", ".csv.bz2", ".json.xz"]
SNIPPETS = st.sampled_from([
    b'{"text": "a"}', b"[", b"]", b",", b"\n", b"\r", b'"', b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"text,n\n", b"PAR1", b"<page>",
    b"</page>", b"<text>",
    b"{", b"}", b"1", b"null", b"\xe8\x8c\xb6", b"<mediawiki>", b"&x;", b"\\ud800", b"1" * 5000, b"[" * 2000, b" ", b"\t",
])


@settings(max_examples=400)
@given(
    data=st.lists(SNIPPETS | st.binary(max_size=6), max_size=12).map(b"".join), suffix=st.sampled_from(SUFFIXES), packed=st.booleans(),
    by=st.sampled_from(["line", "paragraph", "file"]), on_error=st.sampled_from(["raise", "skip"]), limit=st.sampled_from([1, 7, 1000]),
    encoding=st.sampled_from([None, "utf-16", "utf-7", "gb18030", "ascii", "utf-8-sig", "idna", "punycode", "undefined",
    "unicode_escape", "a\0b", ""]),
    names=st.none() | st.lists(st.text(max_size=3), max_size=3), sep=st.sampled_from([None, ";", "\t", " ", "a"]),
)
def test_any_bytes_in_any_kind_of_file(tmp_path_factory, data, suffix, packed, by, on_error, limit, encoding, names, sep):
    path = tmp_path_factory.mktemp("any") / ("a" + suffix)
    pack = PACK.get(path.suffix, bytes) if packed else bytes
    path.write_bytes(pack(data))
    options = {"by": by, "on_error": on_error, "limit": limit, "encoding": encoding, "names": names, "sep": sep}
    found = survives(lambda: list(read_corpus(path, **options)))
    assert found is None or all(isinstance(r["text"], str) for r in found)
    survives(guess_encoding, path)


@settings(max_examples=100)
@given(st.sampled_from(["", ".", "a\0b", "x" * 5000, "/" * 300, "nul", "a/" * 3000, "\ud800", "~", "data/", "…",
"a b"]) | st.text(max_size=20))
def test_any_name_of_a_file(tmp_path_factory, name):
    os.environ["HF_HUB_OFFLINE"] = "1"
    for read in (read_text, read_jsonl, read_csv, read_parquet, read_wikipedia_dump, guess_encoding):
        survives(read, f"no such folder/{name}.txt")
    if name not in ("", ".", "..", "/" * 300) and not name.startswith(("/", ".", "~")): survives(read_corpus, f"no such folder/{name}.txt")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3), max_leaves=5,
    extend=lambda inner: st.lists(inner,
    max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.integers()), inner, max_size=3),
)


@settings(max_examples=300)
@given(rows=st.lists(anything, max_size=5), text=st.sampled_from(["text", "", 7, ["text"], None]), on_error=st.sampled_from(["raise",
"skip"]))
def test_any_rows(tmp_path_factory, rows, text, on_error):
    survives(lambda: list(as_corpus(rows, text=text, on_error=on_error)))
    survives(lambda: list(to_dataset(rows, streaming=True)))
    survives(write_jsonl, rows, tmp_path_factory.mktemp("any") / "a.jsonl")


@pytest.mark.parametrize("options", [
    {"sep": ""}, {"sep": "ab"}, {"sep": "\n"}, {"sep": '"'}, {"sep": 7}, {"names": "text"}, {"text": 7}, {"text": None}, {"by": None},
    {"limit": None},
])
def test_options_that_are_none_are_refused_at_once(here, options):
    Path("a.csv").write_text("text\na\n", encoding="utf-8")
    with pytest.raises(CorpusError): read_corpus("a.csv", **options)


WIKI = st.sampled_from([
    "{{", "}}", "[[", "]]", "|", "{|", "|}", "''", "'''", "<ref>", "</ref>", "<!--", "-->", "==", "\n", "\n* ", "\n: ", "<math>",
    "</math>", "{{{", "}}}",
    "http://x.org", "[http://x", "&amp;", "&#xD800;", "&#0;", "<br>", "(", ")", ". ", "Tea", "茶。", "{{convert|", "{{formatnum:",
    "{{lang|", "{{ill|", "{{sic|", "=",
    "<nowiki>", "__TOC__", "\0=", "\1", "\2", "\ud800", "File:", "{{as of|", "-{", "~~~~", "<", ">",
])


@settings(max_examples=600)
@given(st.lists(WIKI | st.text(max_size=3), max_size=25).map("".join), st.booleans(), st.booleans(), st.sampled_from(["drop", "close"]))
def test_any_wikitext(wikitext, headings, prose, holes):
    found = survives(strip_wikitext, wikitext, headings, prose, holes=holes)
    if found is not None: assert not set("\0\1\2") & set(found) and "\n\n" not in found


@pytest.mark.parametrize("unit", [
    "{{x}}", "({{x}}", "({{x}} a) ", "A {{x}}. ", "A. ", "Dr. ", ". ", "{{x|", "[[a|", "{{nowrap|", "<math>", "'''a'' ", "{{x}}\n",
    "a.{{x}}", "。{{x}}", "{{{",
    '."', ".)", "\n=", "{{x}}, ", "[http://x ", "== a ==\n", "(a) {{x}} ", "<!--", "{|\n|", "&", "-->",
    "[mailto:a ", "<nowiki>", "<b>", "<ref name=a>b", "[[a", "{{{a|", "<b>{{a</b>}}", "{{a<b>}}</b>", "[[a|b\n]]", "[[{{a]]}}",
    "</b>", "{|\n|-\n",
    "<td>a", "{{a|[b}}", "<b a='x>y</b>",
])
def test_no_wikitext_is_quadratic(unit):
    "What takes a minute if it were: 10,000 of them; and no more than some seconds for as many as the parser may still read."
    for n in (10_000, int((_READ_AGAIN / len(unit)) ** 0.5)):
        start = time.process_time()
        survives(strip_wikitext, "Tea." + unit * n + "x.")
        assert time.process_time() - start < 10


@pytest.mark.parametrize(("wikitext", "n"), [
    ("", 0), ("a {{b|[[c]]}} <b>d</b> <!-- {{ --> <nowiki>[[</nowiki> <br> <ref name=a /> <li>e", 0), ("{{{a}}}", 0), ("{{{{{a}}}}}", 0),
    ("{{a", 1), ("a}} ]] </b>", 0), ("{{a [[b }}", 1), ("<b>{{a</b>}}", 1), ("<!-- a <!-- b", 2), ("<MATH>a</math> <math>b", 1),
    ("{|\n|-\n|}\n {{a\n|}}", 0), (":{|\n{|\n|a", 1), ("<b a='x>y</b> <b a='x' b=\"y\">z</b>", 1), ("<b a=O'Neil>b</b>", 0),
    ("<math>a <nowiki>b</math> <math>{{", 2), ("[[a [[b]]", 1), ("<ref>{{a</ref><ref name=x>", 2), ("<a href=x>b", 1),
])
def test_what_never_closes_is_counted(wikitext, n): assert _never_closed(wikitext) == n


def test_a_page_of_which_much_never_closes_is_given_up_with_a_count(here):
    few, many = "{{x|" * 5 + " Tea.", "<b>" * 3000 + " Tea."
    assert strip_wikitext(few) and _never_closed(many) * len(many) > _READ_AGAIN
    with pytest.raises(LmbookError, match="3,000 braces, brackets or tags never close"): strip_wikitext(many)
    Path("w.xml").write_bytes(dump(page(1, many.replace("<", "&lt;")) + page(2, "Tea is hot.")))
    corpus = read_wikipedia_dump("w.xml", on_error="skip")
    assert texts(corpus) == ["Tea is hot."] and corpus.skipped == {"malformed page": 1}


@pytest.mark.parametrize("content", ["a\n", "\n", "a\n\n", '"a"\n', '{"text": "a"}\n', "[1],", ",", "a,b\n", " ", "[", '"\n', "\r"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_no_file_is_quadratic(here, content, suffix):
    for start in ("", "text\n" if suffix == ".csv" else "["):
        Path("a" + suffix).write_text(start + content * 20_000, encoding="utf-8", newline="")
        for by in ("line", "paragraph")[: 1 + (suffix == ".txt")]: survives(lambda by=by: sum(1 for _ in read_corpus("a" + suffix,
        by=by, on_error="skip")))
