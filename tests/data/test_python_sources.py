"""The text that comes with Python."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from bilevel.data import open_source
from bilevel.data.digests import pieces_of
from bilevel.types import UserError


def test_stdlib_is_labelled_source_code():
    source = open_source("python:stdlib")
    documents = list(source.read())
    labels = Counter(document.label for document in documents)
    assert source.labelled
    assert labels["json"] > 50
    assert labels["argparse"] > 50
    assert not {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", None} & set(labels)
    text = b"".join(document.text for document in documents if document.label == "bisect")
    assert text == (Path(sysconfig.get_paths()["stdlib"]) / "bisect.py").read_bytes()
    assert documents == list(open_source("python:stdlib").read())


def test_stdlib_pieces_have_the_promised_size():
    sizes = sorted(map(len, open_source("python:stdlib").documents()))
    assert 320 <= sizes[len(sizes) // 2] <= 400
    assert sizes[len(sizes) // 10] >= 300
    assert sum(sizes) > 2_000_000


def test_stdlib_fingerprint_needs_no_reading(monkeypatch: pytest.MonkeyPatch):
    source = open_source("python:stdlib")
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read"))
    assert source.fingerprint() == open_source("python:stdlib").fingerprint()


def test_stdlib_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"no source files in .*; use a Python that is installed with its sources"):
        open_source("python:stdlib")


def test_stdlib_skips_what_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "package" / "tests").mkdir(parents=True)
    (tmp_path / "package" / "module.py").write_text("good = 1\n")
    (tmp_path / "package" / "tests" / "test_module.py").write_text("bad = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "huge.py").write_bytes(b"x = 1\n" * 100_000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = [(document.text, document.label) for document in open_source("python:stdlib").read()]
    assert found == [(b"good = 1\n", "package")]


def test_topics_hold_every_paragraph_once():
    from pydoc_data.topics import topics

    documents = list(open_source("python:topics").read())
    assert {document.label for document in documents} <= set(topics)
    text = b"".join(document.text for document in documents).decode()
    for paragraph in topics["compound"].split("\n\n") + topics["if"].split("\n\n"):
        assert paragraph.strip() in text
    assert text.count("is used for conditional execution") == 1
    assert 300_000 < len(text) < sum(map(len, topics.values()))


def test_pieces_rejoin_to_the_lines():
    lines = [b"x" * (size % 97) + b"\n" for size in range(0, 5000, 7)]
    pieces = list(pieces_of(lines, at_least=100, shortest_tail=50))
    assert b"".join(pieces) == b"".join(lines)
    assert all(100 <= len(piece) < 200 for piece in pieces[:-1])
    assert 50 <= len(pieces[-1]) < 250
    assert list(pieces_of([])) == list(pieces_of([b"\n", b" \n"])) == []
    assert list(pieces_of([b"a\n"])) == [b"a\n"]
    assert list(pieces_of([b"a" * 100, b"b"], at_least=100)) == [b"a" * 100 + b"b"]
