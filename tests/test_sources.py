"""Texts from names: sources of all kinds, what is said where there is no text, and what is held out."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbook.sources import _MANY, SourceConfig, SourceError, read_texts, split_texts
from tests.stories import STORIES, write_stories


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path: return write_stories(tmp_path_factory.mktemp("text"))


def test_nothing_to_read():
    with pytest.raises(SourceError, match="name a file"): read_texts(SourceConfig())
    with pytest.raises(SourceError, match="megabytes=0 must be above 0"): SourceConfig(megabytes=0)
    with pytest.raises(SourceError, match="encoding=3 must be a text or None"): SourceConfig(encoding=3)


def test_sources_of_all_kinds_are_the_same_text(text: Path, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, story in enumerate(STORIES): (folder / f"{i:03}.txt").write_text(story, encoding="utf-8")
    with gzip.open(packed := tmp_path / "mine.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"body": story}) + "\n" for story in STORIES)
    lines, files = SourceConfig(text=(str(text),), by="line"), SourceConfig(text=(str(folder),))
    for source in (lines, files, SourceConfig(text=(str(packed),), column="body")): assert read_texts(source) == STORIES
    whole = read_texts(SourceConfig(text=(str(text),)))
    assert len(whole) == 1 and whole[0].split() == " ".join(STORIES).split()
    assert len(read_texts(SourceConfig(text=(str(text), str(text)), by="line"))) == 120


def test_more_text_than_wanted_is_not_read(text: Path):
    said: list[str] = []
    texts = read_texts(SourceConfig(text=(str(text),), by="line", megabytes=0.01), said.append)
    assert sum(map(len, texts)) == 10_000 and texts[:-1] == STORIES[: len(texts) - 1] and "0.01 MB" in said[0]
    assert [len(t) for t in read_texts(SourceConfig(text=(str(text),), megabytes=0.002))] == [2000]  # of one long document the beginning


some_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=80)


@pytest.mark.filterwarnings("ignore:.*are held out, where")
@given(st.lists(some_text, min_size=1, max_size=120), st.floats(0.02, 0.6), st.integers(0, 5))
def test_what_is_held_out_and_what_is_kept_are_the_text(texts: list[str], share: float, seed: int):
    kept, out = split_texts(texts, share, seed)
    if len(texts) >= _MANY:
        whole = Counter(kept + out)
        cut = whole - Counter(texts)  # of one document the beginning is kept and the end is held out
        assert not cut or list((Counter(texts) - whole).values()) == [1] and sum(cut.values()) <= 2
        assert sum(map(len, kept + out)) <= sum(map(len, texts))
    else:
        size = sum(map(len, texts))
        assert sum(map(len, kept)) <= size
        for text in texts: assert any(text.startswith(k) for k in kept) or len(text) < 2
    assert all(kept) and all(t.strip() for t in out)


@pytest.mark.parametrize("spread", ["equal", "wide", "one large", "one large in Chinese", "two"])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_is_met_whatever_the_sizes(spread: str, share: float):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        if spread == "equal": texts = ["A story of few words.\n\n" * 10] * 40
        elif spread == "wide": texts = ["A story of few words.\n\n" * int(5 + 40 * n) for n in rng.pareto(0.8, 60).clip(0, 1000)]
        elif spread == "two": texts = ["It goes on and on. " * n for n in (30, 8000)]
        else:
            novel = "小说很长。" * 40_000 if "Chinese" in spread else "The novel goes on.\n\n" * 20_000
            texts = [novel] + [f"Note {i}." for i in range(19)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kept, out = split_texts(texts, share, seed)
        total = sum(map(len, texts))
        assert share / 2 < sum(map(len, out)) / total < 2 * share and sum(map(len, kept + out)) == total
        if spread == "wide": assert all(piece.endswith("\n\n") for piece in kept + out)  # cut at a paragraph


def test_a_share_that_cannot_be_met_is_said():
    with pytest.warns(UserWarning, match="0 of 4 characters are held out, where 5% was asked for"): split_texts(["word"])


def test_the_share_is_about_what_was_asked_for():
    kept, out = split_texts(STORIES, 0.2)
    assert 0.15 < sum(map(len, out)) / sum(map(len, STORIES)) < 0.3
    [kept], [out] = split_texts([" ".join(STORIES)], 0.2)
    assert kept + out == " ".join(STORIES) and kept.endswith(" ") and 0.19 < len(out) / len(kept + out) < 0.21


def test_text_of_any_suffix_and_from_a_pipe(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    odd = Path(shutil.copy(text, tmp_path / "story.rst"))
    assert read_texts(SourceConfig(text=str(odd), by="line"), said.append) == STORIES and "read as plain text" in said[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + text.read_bytes())))
    assert read_texts(SourceConfig(text="-", by="line")) == STORIES
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("长夜漫漫".encode("gb18030"))))
    with pytest.raises(ValueError, match="standard input: byte 0"): read_texts(SourceConfig(text="-"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("长夜漫漫".encode("gb18030"))))
    assert read_texts(SourceConfig(text="-", encoding="gb18030")) == ["长夜漫漫"]
    (tmp_path / "rows.csv").write_text("text;n\nA goat, asleep;1\n")
    assert read_texts(SourceConfig(text=str(tmp_path / "rows.csv"), separator=";")) == ["A goat, asleep"]
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\nbad\n')
    assert read_texts(SourceConfig(text=str(tmp_path / "rows.jsonl"), on_error="skip"), said.append) == ["good"]
    assert "passed over: 1 x malformed row" in said[-1]


def test_what_was_passed_over_is_said(tmp_path: Path):
    (tmp_path / "code").mkdir()
    for name in ("a.py", "b.py", "c.html"): (tmp_path / "code" / name).write_text("text")
    code = SourceConfig(text=str(tmp_path / "code"))
    with pytest.raises(SourceError, match="2 x unknown kind .py, 1 x unknown kind .html"): read_texts(code)
    (tmp_path / "code" / "d.txt").write_text("text")
    said: list[str] = []
    assert read_texts(code, said.append) == ["text"] and "unknown kind .py" in said[0]
    (tmp_path / "feed.xml").write_text("<rss><item>News</item></rss>")
    both = (str(tmp_path / "code"), str(tmp_path / "feed.xml"))
    with pytest.raises(SourceError, match="this one has no pages"): read_texts(SourceConfig(text=both))


def test_names_nearby_come_before_a_hub(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import lmbook.sources as sources

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "read_corpus", lambda *_, **__: pytest.fail("a hub was asked"))
    (tmp_path / "novels").mkdir()
    shutil.copy(text, tmp_path / "en.txt")
    shutil.copy(text, tmp_path / "novels" / "other.txt")
    names = {"en.tx": "Did you mean en.txt?", "novel": "Did you mean novels?", "novels/othr": "Did you mean novels/other.txt?"}
    for wrong, said in {**names, "novels/dune": "no file or folder dune in novels"}.items():
        with pytest.raises(SourceError, match=re.escape(said)): read_texts(SourceConfig(text=wrong))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(SourceError, match="the hub cannot be reached"): read_texts(SourceConfig(text="somebody/something"))
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"): monkeypatch.setenv(name, "1")  # too late: the library has read them
    with pytest.raises(SourceError, match="the hub cannot be reached"): read_texts(SourceConfig(text="somebody/something"))


@pytest.mark.parametrize("by", ["line", "paragraph", "file"])
def test_no_more_than_the_megabytes_are_read_however_long_a_line_is(tmp_path, by, monkeypatch):
    endless, said, read = tmp_path / "endless.txt", list[str](), 0
    endless.write_text("a word " * 700_000)
    assert [len(t) for t in read_texts(SourceConfig(text=str(endless), by=by, megabytes=0.1), said.append)] == [100_000]
    assert said == ["more than 0.1 MB: the rest is not read (--megabytes)"]
    with pytest.raises(ValueError, match="no file that can be read twice"): read_texts(SourceConfig(text="/dev/zero", megabytes=0.1))

    class Endless(io.RawIOBase):
        "Standard input that never ends."
        def readable(self): return True

        def readinto(self, buffer):
            nonlocal read
            read += len(buffer)
            buffer[:] = (b"word " * (len(buffer) // 5 + 1))[: len(buffer)]
            return len(buffer)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    assert [len(t) for t in read_texts(SourceConfig(text="-", by=by, megabytes=0.1), said.append)] == [100_000]
    assert read < 2_000_000
