"""Labels of documents, from a table or from the source."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from bilevel.data import PackedText, open_source, pack
from bilevel.types import UserError


def packed(folder: Path, text: str, table: str | bytes) -> PackedText:
    (folder / "a.txt").write_text(text)
    name = "a.tsv" if isinstance(table, str) else "a.tsv.gz"
    (folder / name).write_bytes(table.encode() if isinstance(table, str) else gzip.compress(table))
    return pack(open_source(str(folder / "a.txt")), length=4, cache_dir=folder / "cache", labels=folder / name)


@pytest.mark.parametrize("compressed", [False, True])
def test_labels_follow_their_documents(tmp_path: Path, compressed: bool):
    table = "news\tx\ty\nskipped\nfiction\t1\nnews\n"
    data = packed(tmp_path, "abcdefgh\n\nxy\nnews!news!\n", table.encode() if compressed else table)
    assert data.label_names == ("news", "fiction")
    assert data.labels is not None
    assert data.labels.dtype == np.int32
    names = [data.label_names[label] for label in data.labels]
    assert names == ["news", "news", "fiction", "news", "news"]  # the tail of 2 bytes is dropped
    assert data.document.tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize(("table", "count"), [("a\n" * 2, 2), ("a\n" * 4, 4), ("a\n" * 90_000, 90_000)])
def test_wrong_number_of_lines(tmp_path: Path, table: str, count: int):
    message = rf"label file .*a.tsv has {count} lines, but .*a.txt has 3 documents \(blank .*; line i must"
    with pytest.raises(UserError, match=message):
        packed(tmp_path, "one\n\nthree\n", table)


def test_fewer_labels_than_documents_counts_all_documents(tmp_path: Path):
    with pytest.raises(UserError, match=r"has 1 lines, but .* has 50 documents"):
        packed(tmp_path, "x\n" * 50, "a")


def test_empty_label(tmp_path: Path):
    with pytest.raises(UserError, match=r"a.tsv, line 3: the first column is empty; every document needs a label"):
        packed(tmp_path, "one\n\ntwo\n", "a\n\n\tb\n")


def test_table_that_is_no_label_file(tmp_path: Path):
    text = "\n".join(f"line {number}" for number in range(10_001))
    with pytest.raises(UserError, match=r"more than 10000 different labels .*'line 10000'.*first column"):
        packed(tmp_path, text, text)


def test_missing_table(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one")
    source = open_source(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"label file .*none.tsv does not exist; check the path"):
        pack(source, length=4, cache_dir=tmp_path / "cache", labels=tmp_path / "none.tsv")


def test_failure_leaves_nothing(tmp_path: Path):
    with pytest.raises(UserError):
        packed(tmp_path, "one\ntwo\n", "a\n")
    assert list((tmp_path / "cache").iterdir()) == []


def test_changed_labels_are_packed_again(tmp_path: Path):
    assert packed(tmp_path, "one\ntwo\n", "a\nb\n").label_names == ("a", "b")
    assert packed(tmp_path, "one\ntwo\n", "a\nc\n").label_names == ("a", "c")


def test_labels_do_not_change_the_content(tmp_path: Path):
    labelled = packed(tmp_path, "one\ntwo\n", "a\nb\n")
    plain = pack(open_source(str(tmp_path / "a.txt")), length=4, cache_dir=tmp_path / "cache")
    assert plain.labels is None
    assert plain.label_names == ()
    assert plain.folder != labelled.folder
    assert plain.content_hash == labelled.content_hash


def test_labels_of_the_source(tmp_path: Path):
    data = pack(open_source("python:topics"), length=64, cache_dir=tmp_path)
    assert data.labels is not None
    row = int(np.flatnonzero(data.labels == data.label_names.index("while"))[0])
    assert data.text(row).startswith('The "while" statement')


@pytest.mark.parametrize("compressed", [False, True])
def test_faults_of_the_documents_of_rows(tmp_path: Path, compressed: bool):
    (tmp_path / "a.txt").write_text("abcdefgh\n\nxy\nnews!news!\n")
    table = b"wrong\tx\n1\n\tx\n0\n"
    (tmp_path / "faults").write_bytes(gzip.compress(table) if compressed else table)
    data = pack(open_source(str(tmp_path / "a.txt")), length=4, cache_dir=tmp_path / "cache")
    assert data.document.tolist() == [0, 0, 2, 3, 3]
    found = data.faults(tmp_path / "faults")
    assert (found.tolist(), found.dtype) == ([1, 1, -1, 0, 0], np.int8)
    for text, message in (
        (
            "right\nfalse\n\n\n",
            r'faults, line 2: the first column is "false"; write right or 0, wrong or 1, or nothing',
        ),
        (
            "right\n\n\n",
            r"The fault file .*faults has 3 lines, but .*a.txt has 4 documents \(blank .*; line i must hold the fault",
        ),
        ("\n\n\n\n", "says of no document whether it is right or wrong: mark some, or omit the file"),
    ):
        (tmp_path / "faults").write_text(text)
        with pytest.raises(UserError, match=message):
            data.faults(tmp_path / "faults")
    with pytest.raises(UserError, match=r"The fault file .*none does not exist; check the path, or leave it out"):
        data.faults(tmp_path / "none")
