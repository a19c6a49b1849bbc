"""What a file of text holds is seen by its content, and nothing that was given is dropped or doubled without a word."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.data import open_source, open_specific, options_of
from bilevel.types import UserError

LINES = "".join(json.dumps({"id": i, "text": f"document {i}"}) + "\n" for i in range(3)).encode()
WANTED = [b"document 0", b"document 1", b"document 2"]


def read(spec: object, **options: object) -> list[bytes]:
    return list(open_source(str(spec), **options).documents())  # pyright: ignore[reportArgumentType]


def refused(spec: object, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(spec, **options)
    assert "\n" not in str(caught.value)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.ndjson", "a.jsonlines", "part-00000", "a.jsonl.1", "a", "a.txt", "a.JSONL", "a.md"]
)
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_json_lines_under_any_name(tmp_path: Path, name: str, before: bytes):
    path = write(tmp_path / name, before + LINES)
    assert [text for text in read(path) if text] == WANTED
    assert options_of(str(path)).field
    with pytest.raises(UserError, match="no field 'body'"):
        read(path, field="body")


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl.gzip", gzip.compress), ("a.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress), ("a", lzma.compress)],
)
def test_json_lines_in_any_compression(tmp_path: Path, name: str, compress: Callable[[bytes], bytes]):
    path = write(tmp_path / name, compress(LINES))
    assert read(path) == WANTED
    refused(write(path, compress(LINES * 999)[:-9]), f"{name} (is not a complete|cannot be read)")


def test_zstd(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    assert read(write(tmp_path / "a.jsonl.zst", zstandard.compress(LINES))) == WANTED


def test_one_long_line_is_a_line(tmp_path: Path):
    path = write(tmp_path / "a", json.dumps({"text": "x" * 200_000}).encode())
    assert read(path) == [b"x" * 200_000]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"text": "a"}, {"text": "b"}]),
        json.dumps([{"text": "a"}, {"text": "b"}], indent=1),
        json.dumps(["a", "b"], indent=1),
        json.dumps([{"text": "x" * 200_000}]),
        json.dumps({"text": "a", "id": 1}, indent=1),
        '["a", 1]\n["b", 2]\n',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.txt", "part-0"])
def test_other_json_is_refused(tmp_path: Path, name: str, text: str):
    refused(
        write(tmp_path / name, text.encode()), f"{name} holds JSON, but not an object a line: write one object a line"
    )


@pytest.mark.parametrize(
    "text", ["[1] A note.\nMore.\n", "{curly} text\nand more\n", '"One," he said.\n"Two."\n', "[a]\n"]
)
def test_brackets_alone_are_text(tmp_path: Path, text: str):
    assert read(write(tmp_path / "a.txt", text.encode())) == text.encode().splitlines()


def test_whole_files_may_be_json(tmp_path: Path):
    """Asked for as documents, such as the settings among source files; but never lines of JSON."""
    for i, text in enumerate(('{"name": "x"}\n', '{\n "name": "x"\n}\n')):
        assert read(write(tmp_path / f"{i}.cfg", text.encode()), documents="file") == [text.encode()]
    refused(write(tmp_path / "lines", LINES), "lines holds one document a line or row", documents="file")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.avro", "a.tfrecord-00000-of-00002"])
def test_what_is_not_read_is_refused_by_its_suffix(tmp_path: Path, name: str):
    suffix = name.split(".")[1].partition("-")[0]
    refused(
        write(tmp_path / name, b"id,text\n1,a\n"),
        rf"is a \.{suffix} file, which is not read: read are .* \.parquet, \.arrow .* call it \.txt",
    )
    refused(write(tmp_path / "a.xyz", bytes(100)), r"and \.xyz files are not read: read are .* \.parquet, \.arrow")


@pytest.mark.parametrize("header", ["id,text", '"text"\t"label"', ",text,my label"])
def test_the_header_of_a_table_is_not_text(tmp_path: Path, header: str):
    refused(
        write(tmp_path / "a.txt", header.encode() + b"\n1,a\n"), r"a\.txt is a table, and not text \(it begins with"
    )
    assert read(write(tmp_path / "a.txt", b"Words, as text, and more!\n")) == [b"Words, as text, and more!"]


def test_lines_of_an_old_mac(tmp_path: Path):
    path = write(tmp_path / "a.txt", b"one\rtwo\r")
    refused(path, "The lines of .*a.txt end with CR alone: convert it")
    assert read(path, documents="file") == [b"one\rtwo\r"]


def test_what_is_not_utf8_text(tmp_path: Path):
    text = "some text\n" * 9
    refused(write(tmp_path / "a.txt", text.encode("utf-16")), "a.txt is UTF-16, and not UTF-8: convert it")
    refused(write(tmp_path / "b.txt", text.encode("utf-16-le")), r"b.txt is not UTF-8 text \(byte 2 is zero, and 90 of")
    rare = write(tmp_path / "c.txt", b"x\0y\n" + text.encode() * 9)
    assert read(rare)[0] == b"x\0y"


def test_entries_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "a.txt", b"a\n")
    write(tmp_path / "b.NDJSON", LINES)
    write(tmp_path / ".hidden", b"no\n")
    assert read(tmp_path) == [b"a", *WANTED]
    assert capsys.readouterr().err == ""
    write(tmp_path / "c.md", b"c\n")
    (tmp_path / "more").mkdir()
    for _ in range(2):
        read(tmp_path)
    assert capsys.readouterr().err == (
        f"note: of the folder {tmp_path} are not read: c.md, more/; name files, or a glob that matches them.\n"
    )
    read(tmp_path / "*")
    assert "/* also matches folders, which are not read: " in capsys.readouterr().err


def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = write(tmp_path / "a.txt", b"a\n")
    for make in (os.symlink, os.link):
        make(one, tmp_path / "b.txt")
        for spec in (tmp_path, tmp_path / "*.txt", f"{one},{tmp_path / 'b.txt'}"):
            refused(spec, r"a\.txt and .*b\.txt are one file, by a link; name it once")
        (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    for spec in (tmp_path, tmp_path / "*.txt"):
        refused(spec, r"b\.txt is a link to nothing; remove it")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b.txt").symlink_to(write(tmp_path / "elsewhere" / "x", b"b\n"))
    assert read(tmp_path / "*.txt") == [b"a", b"b"]


def test_copies_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, text in {"a": "one\n", "b": "two\n", "c": "one\n", "d": "longer\n"}.items():
        write(tmp_path / f"{name}.txt", text.encode())
    assert read(tmp_path) == [b"one", b"two", b"one", b"longer"]
    assert capsys.readouterr().err == (
        f"note: {tmp_path}/c.txt is a copy of {tmp_path}/a.txt; the documents count twice.\n"
    )


def test_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.txt", b"a\n")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        refused(path, f"The file {path} cannot be read; change its permissions")
    monkeypatch.setattr(os, "stat", refuse)
    refused(path, f"The file {path} cannot be read; change its permissions")


NAMES = ("training", "value", "testing", "apples", "devil", "validator", "testament", "training-manual")


def test_words_that_begin_like_parts_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = {name: [f"about {name}, number {i}" for i in range(30)] for name in NAMES}
    for name, lines in texts.items():
        write(tmp_path / f"{name}.txt", "\n".join(lines).encode())
    found = [text.decode() for part in open_specific(str(tmp_path)).values() for text in part.documents()]
    assert sorted(found) == sorted(line for lines in texts.values() for line in lines)
    assert capsys.readouterr().err == ""


def test_files_beside_the_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("Train_1", "valid", "TEST-0", "train 2", "value"):
        write(tmp_path / f"{name}.txt", name.encode())
    (tmp_path / "more").mkdir()
    parts = {name: list(source.documents()) for name, source in open_specific(str(tmp_path)).items()}
    assert parts == {"train": [b"Train_1", b"train 2"], "valid": [b"valid"], "test": [b"TEST-0"]}
    assert capsys.readouterr().err == (
        f"note: of the folder {tmp_path} only the files called train, valid and test are used; not used: value.txt, more/.\n"
    )
