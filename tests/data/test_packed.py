"""Packing: the rows, the cache, and what a failure leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bilevel.data import Document, PackedText, Source, open_source, pack
from bilevel.data.text import packed as packed_module
from bilevel.types import UserError


def source_of(texts: list[bytes], name: str = "texts") -> Source:
    return Source(name, lambda: map(Document, texts), lambda: str(hash(tuple(texts))))


def expected_rows(texts: list[bytes], length: int) -> list[tuple[int, bytes]]:
    """The plain definition of the rows: (document, bytes)."""
    rows = []
    for number, text in enumerate(texts):
        parts = [text[start : start + length] for start in range(0, len(text), length)]
        if len(parts) > 1 and len(parts[-1]) < min(16, length):
            parts.pop()
        rows += [(number, part) for part in parts]
    return rows


def check_rows(data: PackedText, texts: list[bytes]) -> None:
    length = data.tokens.shape[1]
    batch = data.rows(np.arange(len(data)))
    rows = [bytes(row[:n].tobytes()) for row, n in zip(batch["tokens"], batch["length"], strict=True)]
    assert list(zip(data.document.tolist(), rows, strict=True)) == expected_rows(texts, length)
    padding = np.arange(length) >= batch["length"][:, None]
    assert not batch["tokens"][padding].any()


@pytest.mark.parametrize("length", [1, 4, 16, 17, 64, 300])
def test_rows_are_the_windows_of_the_documents(tmp_path: Path, length: int):
    generator = np.random.default_rng(0)
    sizes = [0, 1, 15, 16, 17, 63, 64, 65, 79, 80, 128, 0, 143, 144, 300, 301, 1000, 0, 0, 5]
    texts = [generator.integers(1, 128, size, dtype=np.uint8).tobytes() for size in sizes]
    check_rows(pack(source_of(texts), length=length, cache_dir=tmp_path), texts)


def test_rows_over_many_blocks(tmp_path: Path):
    generator = np.random.default_rng(0)
    flat = generator.integers(1, 128, 4 << 20, dtype=np.uint8).tobytes()
    cuts = np.sort(generator.integers(0, len(flat), 10_000)).tolist()
    texts = [flat[a:b] for a, b in zip([0, *cuts], [*cuts, len(flat)], strict=True)] + [flat]  # the last one is huge
    data = pack(source_of(texts), length=64, cache_dir=tmp_path)
    check_rows(data, texts)
    assert data.manifest["empty_documents"] == sum(not text for text in texts)


def test_batch_format(tmp_path: Path):
    data = pack(source_of([b"abcdef", b"", b"xy"]), length=4, cache_dir=tmp_path)
    batch = data.rows(np.array([1, 0]))
    assert {key: (array.dtype, array.shape) for key, array in batch.items()} == {
        "tokens": (np.uint8, (2, 4)),
        "length": (np.int32, (2,)),
        "id": (np.int32, (2,)),
    }
    assert batch["tokens"].tolist() == [[120, 121, 0, 0], [97, 98, 99, 100]]
    assert batch["length"].tolist() == [2, 4]
    assert batch["id"].tolist() == [1, 0]
    assert all(type(array) is np.ndarray and array.flags.writeable for array in batch.values())


def test_manifest(tmp_path: Path):
    data = pack(source_of([b"abcdef", b"", b"xy"], name="the name"), length=4, cache_dir=tmp_path)
    assert len(data) == 2
    assert data.name == "the name"
    hashed = data.manifest["content_hash"]
    assert data.content_hash == hashed
    assert dict(data.manifest) == {
        "format_version": 3,
        "source": "the name",
        "tokenizer": "bytes",
        "length": 4,
        "row_count": 2,
        "document_count": 2,
        "empty_documents": 1,
        "byte_count": 8,
        "prompts": False,
        "crossing": False,
        "unanswered_rows": 0,
        "unknown_tokens": 0,
        "content_hash": hashed,
        "label_names": None,
    }


def test_unicode(tmp_path: Path):
    (tmp_path / "a.txt").write_text("naïve café 日本語 😀 text\n", encoding="utf-8")
    data = pack(open_source(str(tmp_path / "a.txt")), length=20, cache_dir=tmp_path / "cache")
    assert data.text(0) == "naïve café 日本\ufffd"
    whole = pack(open_source(str(tmp_path / "a.txt")), length=64, cache_dir=tmp_path / "cache")
    assert whole.text(0) == "naïve café 日本語 😀 text"


def test_long_rows(tmp_path: Path):
    text = b"x" * 100_000
    data = pack(source_of([text]), length=70_000, cache_dir=tmp_path)
    assert data.rows(np.array([0, 1]))["length"].tolist() == [70_000, 30_000]


def test_content_hash_is_of_the_rows(tmp_path: Path):
    def hash_of(texts: list[bytes], length: int = 4) -> str:
        return pack(source_of(texts), length=length, cache_dir=tmp_path).content_hash

    many = [b"%04d" % (number % 7777) for number in range(300_000)]
    first = hash_of(many)
    assert hash_of([b"", *many]) == first  # the blocks are cut elsewhere
    assert hash_of(many[::-1]) != first
    assert len({hash_of([b"ab\0"]), hash_of([b"ab"]), hash_of([b"abcd"]), hash_of([b"ab"], 8)}) == 4


def test_second_packing_reads_nothing(tmp_path: Path):
    source = source_of([b"abcd"])
    first = pack(source, length=4, cache_dir=tmp_path)
    again = dataclasses.replace(source, read=lambda: pytest.fail("read again"))
    assert pack(again, length=4, cache_dir=tmp_path).content_hash == first.content_hash
    assert [path.name for path in tmp_path.iterdir()] == [first.folder.name]


def test_other_lengths_and_sources_get_their_own_folders(tmp_path: Path):
    folders = {
        pack(source_of(texts), length=length, cache_dir=tmp_path).folder
        for texts in ([b"abcd"], [b"abce"])
        for length in (2, 4)
    }
    assert len(folders) == 4


def test_changed_file_is_packed_again(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert pack(open_source(str(path)), length=4, cache_dir=tmp_path / "cache").text(0) == "one"
    path.write_text("two")
    assert pack(open_source(str(path)), length=4, cache_dir=tmp_path / "cache").text(0) == "two"


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interrupted_packing_leaves_nothing(tmp_path: Path, error: BaseException):
    def read() -> Iterator[Document]:
        for _ in range(200_000):
            yield Document(b"some text")
        assert list(tmp_path.iterdir()), "rows should have been written by now"
        raise error

    source = Source("broken", read, lambda: "fingerprint")
    with pytest.raises(type(error)):
        pack(source, length=4, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    whole = dataclasses.replace(source, read=lambda: iter([Document(b"abcd")]))
    assert len(pack(whole, length=4, cache_dir=tmp_path)) == 1


def test_a_killed_packing_is_ignored_and_later_removed(tmp_path: Path):
    for name, age in (("old", 25 * 3600), ("new", 60)):
        folder = tmp_path / f".packing-{name}"
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"half")
        os.utime(folder, (time.time() - age, time.time() - age))
    data = pack(source_of([b"abcd"]), length=4, cache_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".packing-new", data.folder.name}


def test_another_process_was_faster(tmp_path: Path):
    inner: list[PackedText] = []

    def read() -> Iterator[Document]:
        inner.append(
            pack(
                dataclasses.replace(source, read=lambda: iter([Document(b"abcd")])),
                length=4,
                cache_dir=tmp_path,
            )
        )
        yield Document(b"abcd")

    source = Source("both", read, lambda: "fingerprint")
    outer = pack(source, length=4, cache_dir=tmp_path)
    assert outer.folder == inner[0].folder
    assert outer.text(0) == inner[0].text(0) == "abcd"
    assert list(tmp_path.iterdir()) == [outer.folder]


def test_two_processes_at_once(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(f"document number {n}" for n in range(100_000)))
    code = (
        "import sys; from bilevel.data import open_source, pack;"
        "print(pack(open_source(sys.argv[1]), length=64, cache_dir=sys.argv[2]).content_hash)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _truncate(folder: Path) -> None:
    path = folder / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated tokens": _truncate,
    "wrong rows": lambda folder: np.save(folder / "length.npy", np.zeros(1, np.uint16)),
    "wrong type": lambda folder: np.save(folder / "document.npy", np.zeros(2, np.int32)),
    "wrong count": lambda folder: _edit_manifest(folder, row_count=3),
    "other version": lambda folder: _edit_manifest(folder, format_version=0),
    "empty array": lambda folder: (folder / "length.npy").write_bytes(b""),
    "missing array": lambda folder: (folder / "document.npy").unlink(),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "broken manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_packed_again(tmp_path: Path, damage: Callable[[Path], object]):
    source = source_of([b"abcd", b"efgh"])
    first = pack(source, length=4, cache_dir=tmp_path)
    damage(first.folder)
    with pytest.raises(UserError, match=r"is damaged \(.*\); remove the folder and pack again") as caught:
        PackedText.open(first.folder)
    assert str(first.folder) in str(caught.value)
    again = pack(source, length=4, cache_dir=tmp_path)
    assert [again.text(row) for row in range(2)] == ["abcd", "efgh"]
    assert list(tmp_path.iterdir()) == [first.folder]


def test_a_file_in_the_place_of_the_folder_is_replaced(tmp_path: Path):
    source = source_of([b"abcd"])
    folder = pack(source, length=4, cache_dir=tmp_path / "one").folder
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / folder.name).write_text("a file")
    assert pack(source, length=4, cache_dir=tmp_path / "two").text(0) == "abcd"


def test_nothing_to_pack(tmp_path: Path):
    with pytest.raises(UserError, match="texts holds no rows; give data that are not empty"):
        pack(source_of([b"", b""]), length=4, cache_dir=tmp_path)
    with pytest.raises(UserError, match="row length is 0; it must be at least 1"):
        pack(source_of([b"a"]), length=0, cache_dir=tmp_path)


def test_cache_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file.* cannot be written .*; choose another"):
        pack(source_of([b"a"]), length=4, cache_dir=tmp_path / "file" / "cache")


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_module, "_write", full)
    with pytest.raises(UserError, match=r"Packing texts into .* failed \(.*No space left.*\); correct this"):
        pack(source_of([b"a"]), length=4, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_source(tmp_path: Path):
    def peak(count: int) -> int:
        source = Source("long", lambda: (Document(b"x" * 1000) for _ in range(count)), lambda: str(count))
        tracemalloc.start()
        pack(source, length=64, cache_dir=tmp_path)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(40_000) < 1.2 * peak(4_000)


def test_speed(tmp_path: Path):
    # 8 MB; the bound is twenty times what it takes, and a hundredth of what a loop over bytes would take.
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{number} " + "word " * 75 for number in range(21_000)))
    start = time.perf_counter()
    pack(open_source(str(path)), length=64, cache_dir=tmp_path / "cache")
    assert time.perf_counter() - start < 4
