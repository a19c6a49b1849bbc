"""Text files and JSON lines: what is read, and what is said about files that cannot be."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from bilevel.data import open_source, open_specific, options_of
from bilevel.types import UserError


def write(path: Path, data: bytes | str) -> Path:
    raw = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(spec: object, **options: Any) -> list[bytes]:
    return list(open_source(str(spec), **options).documents())


def fails(spec: object, *words: object, **options: Any) -> None:
    """Opening or reading `spec` raises one sentence that holds all `words`."""
    with pytest.raises(UserError) as caught:
        read(spec, **options)
    for word in words:
        assert str(word) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a"])
def test_one_document_a_line(tmp_path: Path, name: str):
    path = write(tmp_path / name, "one\nzwei é\r\n\u2028three\x0b\n")
    assert read(path) == [b"one", "zwei é".encode(), "\u2028three\x0b".encode()]


def test_last_line_without_an_end_and_blank_lines(tmp_path: Path):
    path = write(tmp_path / "a.txt", "one\n\n  \t\ntwo")
    assert read(path) == [b"one", b"", b"", b"two"]


def test_byte_order_mark_is_not_text(tmp_path: Path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n")) == [b"one"]


def test_compressed_file_is_recognised_without_its_suffix(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(b"one\n"))
    assert read(path) == [b"one"]


def test_a_file_as_a_document(tmp_path: Path):
    first, second = write(tmp_path / "a.txt", "one\n\ntwo\n"), write(tmp_path / "b.txt.gz", "three")
    assert read(f"{first},{second}", documents="file") == [b"one\n\ntwo\n", b"three"]


def test_a_file_larger_than_a_block(tmp_path: Path):
    lines = [f"{number} " + "x" * (number % 300) for number in range(20_000)]
    assert sum(map(len, lines)) > 2 << 20
    assert read(write(tmp_path / "a.txt.gz", "\n".join(lines))) == [line.encode() for line in lines]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines(tmp_path: Path, name: str):
    lines = [json.dumps({"text": text, "body": "b"}) for text in ("one\ntwo", "é", "")]
    path = write(tmp_path / name, "\n".join([*lines, "", lines[0]]))
    assert read(path) == [b"one\ntwo", "é".encode(), b"", b"", b"one\ntwo"]
    assert read(path, field="body") == [b"b", b"b", b"b", b"", b"b"]


def test_folder_glob_and_commas_give_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "b.txt.gz", "2")
    write(tmp_path / "a.txt", "1")
    write(tmp_path / "c.jsonl", '{"text": "3"}')
    write(tmp_path / "a.labels.tsv", "no text")
    write(tmp_path / ".hidden.txt", "hidden")
    assert read(tmp_path) == [b"1", b"2", b"3"]
    assert read(tmp_path / "*.txt*") == [b"1", b"2"]
    assert read(f"{tmp_path}/c.jsonl, {tmp_path}/a.txt") == [b"3", b"1"]
    monkeypatch.chdir(tmp_path)
    assert read("a.txt") == [b"1"]


def test_an_existing_name_with_a_comma_is_one_file(tmp_path: Path):
    assert read(write(tmp_path / "a,b[1].txt", "one")) == [b"one"]


def test_a_source_can_be_read_again(tmp_path: Path):
    source = open_source(str(write(tmp_path / "a.txt", "one\ntwo")))
    assert list(source.documents()) == list(source.documents()) == [b"one", b"two"]
    assert source.name == str(tmp_path / "a.txt")


def test_missing_things(tmp_path: Path):
    fails(tmp_path / "no.txt", tmp_path / "no.txt", "does not exist", "check the path")
    fails(tmp_path / "no*.txt", tmp_path / "no*.txt", "No file matches", "check the pattern")
    fails(tmp_path, tmp_path, "holds no .txt", "name the files")
    fails(f"{write(tmp_path / 'a.txt', 'a')},", "empty name", "separated by commas")
    fails("  ", "specification (--data.generic, --data.specific) is empty", "give a file")
    fails("python:nothing", "python:nothing", "python:stdlib and python:topics")


def test_a_file_named_twice(tmp_path: Path):
    write(tmp_path / "b.txt", "b")
    fails(
        f"{write(tmp_path / 'a.txt', 'a')},{tmp_path}/*.txt", f"The file {tmp_path}/a.txt is named twice; name it once"
    )


def test_blank_files_among_others(tmp_path: Path):
    """Where files are documents they are blank documents; where lines are, a file without text is a mistake."""
    for name, text in (("a", ""), ("b", "text\n"), ("c", " \n")):
        write(tmp_path / f"{name}.txt", text)
    found = [document.text for document in open_source(str(tmp_path), documents="file").read()]
    assert found == [b"", b"text\n", b""]
    (tmp_path / "a.txt").unlink()
    fails(tmp_path, tmp_path / "c.txt", "holds no text")
    (tmp_path / "b.txt").write_text("\n")
    fails(tmp_path, "None of the 2 files", documents="file")
    blank = open_source(str(tmp_path), documents="file", blank_files=True)
    assert [document.text for document in blank.read()] == [b"", b""]


@pytest.mark.parametrize("documents", ["line", "file"])
def test_files_without_text(tmp_path: Path, documents: str):
    fails(
        write(tmp_path / "a.txt", ""),
        tmp_path / "a.txt",
        "is empty",
        "leave this one out",
        documents=documents,
    )
    fails(write(tmp_path / "b.txt", "\n \n"), tmp_path / "b.txt", "no text", documents=documents)
    fails(write(tmp_path / "c.txt.gz", ""), tmp_path / "c.txt.gz", "no text", documents=documents)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str):
    good = '{"text": "é"}\n'.encode() * 100_000
    path = write(tmp_path / name, good + b"ab\xe9\n" + good)
    fails(path, f"{path}, line 100001: byte 3", "0xe9", "not UTF-8", "convert")


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    for name, data in {"cut": whole[:-2000], "tail": whole[:-3], "plain": b"plain text\n"}.items():
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(data)
        fails(path, path, "not a complete gzip file", "compress it again")
    damaged = bytearray(whole)
    damaged[40:60] = bytes(20)
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    fails(tmp_path / "damaged.txt.gz", "damaged.txt.gz", "compress it again")


def test_json_errors(tmp_path: Path):
    def second_line(line: str) -> Path:
        return write(tmp_path / "a.jsonl", '{"text": "a"}\n' + line)

    where = f"{tmp_path / 'a.jsonl'}, line 2"
    fails(
        second_line('{"body": "a", "title": 1}'),
        where,
        "no field 'text'",
        "'body', 'title'",
        "field=... (--data.field, or",
    )
    fails(second_line("{}"), where, "found are: none")
    fails(second_line('{"text": 3}'), where, "holds a int", "field=... (--data.field, or")
    fails(second_line('{"text": "a"'), where, "not valid JSON", "one JSON object")
    fails(second_line("[" * 100_000), where, "not valid JSON")
    fails(second_line('["a"]'), where, "a JSON list", "one JSON object a line")
    fails(second_line('{"text": "a\\ud800"}'), where, "surrogate", "character 2")


def test_options_that_do_not_fit(tmp_path: Path):
    text, lines = write(tmp_path / "a.txt", "a"), write(tmp_path / "a.jsonl", '{"text": "a"}')
    fails(text, text, "field='body' (--data.field", "plain text", "leave the field out", field="body")
    fails(
        lines,
        lines,
        "documents='file' (--data.documents, or --documents of bilevel select) is for plain text",
        documents="file",
    )
    fails(text, "documents='page'", "'line' or 'file'", documents="page")
    fails("python:topics", "leave out field and documents (--data.field, --data.documents)", field="text")
    fails(
        "tfds:x",
        "documents='file' (--data.documents, or --documents of bilevel select) is for plain text",
        documents="file",
    )
    for name in ("a.npy", "a.npz"):
        fails(write(tmp_path / name, "x"), name, "one document a line or row", documents="file")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.txt", "a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    fails(path, path, "cannot be read", "permissions")


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_fingerprint_notices_changes_but_not_moves(tmp_path: Path, size: int):
    path = write(tmp_path / "a.txt", b"x" * size)
    os.utime(path, ns=(0, 1))
    before = open_source(str(path)).fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", before)
    (tmp_path / "folder").mkdir()
    moved = path.rename(tmp_path / "folder" / "a.txt")
    assert open_source(str(moved)).fingerprint() == before
    assert open_source(str(moved), documents="file").fingerprint() != before
    data = bytearray(b"x" * size)
    data[size // 3] = ord("y")  # outside the samples of the large file
    moved.write_bytes(data)
    assert open_source(str(moved)).fingerprint() != before
    moved.write_bytes(b"x" * (size + 1))
    os.utime(moved, ns=(0, 1))
    assert open_source(str(moved)).fingerprint() != before


def test_fingerprint_of_a_large_file_samples_its_content(tmp_path: Path):
    # The same name, size and time (as in an unpacked archive), but another text.
    prints = set()
    for byte in (b"x", b"y"):
        path = write(tmp_path / "a.txt", byte * (3 << 20))
        os.utime(path, ns=(0, 1))
        prints.add(open_source(str(path)).fingerprint())
    assert len(prints) == 2


def test_many_names_are_longer_than_a_name_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = [write(Path(f"part-{i:05d}.txt"), f"{i}\n").name for i in range(200)]
    assert read(",".join(names)) == [str(i).encode() for i in range(200)]
    open_specific(",".join(names))
    fails("x" * 300, "does not exist")
    fails("~nobody-of-this-name/x", "does not exist")


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    fails(tmp_path, f"The folder {tmp_path} cannot be read", "permissions")


def test_which_options_concern_a_source(tmp_path: Path):
    text, lines = write(tmp_path / "a.txt", "a"), write(tmp_path / "a.jsonl.gz", '{"text": "a"}')
    assert options_of(str(text)) == (False, True)
    assert options_of(str(lines)) == (True, False)
    assert options_of(str(tmp_path)) == (True, True)
    assert options_of("python:stdlib") == (False, False)
    assert options_of("tfds:x") == (True, False)
    assert options_of("tfds:x:train:body") == (False, False)
