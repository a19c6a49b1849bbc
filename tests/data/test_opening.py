"""Data behind URLs: what is read, and what is said about what cannot be."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.data import open_labelled, open_source, open_specific, pack
from bilevel.data.opening import is_url, name_of, open_bytes
from bilevel.types import UserError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def read(spec: str, **options: Any) -> list[bytes]:
    return list(open_source(spec, **options).documents())


def test_urls_and_names() -> None:
    assert is_url("s3://bucket/a.txt")
    assert not any(map(is_url, ("a.txt", "/a//b.txt", "C://a.txt", "tfds:mnist", Path("s3://a"))))
    assert name_of("https://host/a.txt.gz?download=1") == "a.txt.gz"
    assert name_of("s3://bucket/why?.txt") == "why?.txt"


@pytest.mark.parametrize("content", [b"one\ntwo\n", gzip.compress(b"one\ntwo\n")], ids=["plain", "gzip"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_bytes_are_decompressed(content: bytes, where: str, memory: Any, tmp_path: Path) -> None:
    if where == "memory":
        memory.pipe("/a", content)
    else:
        (tmp_path / "a").write_bytes(content)
    place = "memory://a" if where == "memory" else tmp_path / "a"
    with open_bytes(place) as file:
        assert file.readlines() == [b"one\n", b"two\n"]
    with open_bytes(place, decompress=False) as file:
        assert file.read() == content


def test_text_files(memory: Any) -> None:
    memory.pipe(
        {"/d/b.txt.gz": gzip.compress(b"2\n\n3"), "/d/a.jsonl": b'{"text": "1"}', "/d/.no.txt": b"-", "/d/x": b"-"}
    )
    memory.pipe("/d/deeper/c.txt", b"4")
    wanted = [b"1", b"2", b"", b"3"]
    assert read("memory://d") == read("memory://d/") == wanted
    assert read("memory://d/a.jsonl, memory://d/b.txt.gz") == wanted
    assert read("memory://d/*.txt*") == wanted[1:]
    assert read("memory://d/**/*.txt") == [b"4"]
    assert read("memory://d/b.txt.gz", documents="file") == [b"2\n\n3"]
    assert open_source("memory://d/*").paths == ("memory:///d/a.jsonl", "memory:///d/b.txt.gz", "memory:///d/x")
    assert read("memory://d/.no*") == [b"-"]
    memory.pipe("/d/t.npy", npy(np.asarray(["five", "six"])))
    assert read("memory://d/t.npy") == [b"five", b"six"]


def npy(array: Any) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_the_fingerprint_notices_a_change(memory: Any, size: int) -> None:
    text = b"some text\n" * (size // 10)
    memory.pipe("/a.txt", text)
    before = open_source("memory://a.txt").fingerprint()
    assert open_source("memory://a.txt").fingerprint() == before
    memory.pipe("/a.txt", b"other" + text[5:])
    assert open_source("memory://a.txt").fingerprint() != before


def test_packing_with_labels(memory: Any, tmp_path: Path) -> None:
    memory.pipe({"/a.txt": b"one\ntwo\n", "/a.tsv": b"x\t1\ny\t2\n"})
    packed = pack(open_source("memory://a.txt"), length=8, cache_dir=tmp_path, labels="memory://a.tsv")
    assert [packed.text(0), packed.text(1)] == ["one", "two"]
    assert packed.manifest["label_names"] == ["x", "y"]
    with pytest.raises(UserError, match=r"label file memory://no\.tsv does not exist"):
        pack(open_source("memory://a.txt"), length=8, cache_dir=tmp_path, labels="memory://no.tsv")


def test_named_parts(memory: Any) -> None:
    memory.pipe({f"/s/{part}.txt": part.encode() for part in ("train", "dev", "test")})
    parts = open_specific("memory://s")
    assert {name: list(part.documents()) for name, part in parts.items()} == {
        "train": [b"train"],
        "valid": [b"dev"],
        "test": [b"test"],
    }


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
def test_tables(kind: str, memory: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table({"a": np.arange(40.0), "label": np.arange(40) % 2})
    file = tmp_path / "local"
    (pyarrow.parquet.write_table if kind == "parquet" else pyarrow.csv.write_csv)(table, file)
    content = gzip.compress(file.read_bytes()) if kind == "csv.gz" else file.read_bytes()
    memory.pipe(f"/d/t.{kind}", content)
    data = open_labelled(f"memory://d/t.{kind}")
    rows = np.concatenate([part.arrays["features"][:, 0] for part in (data.train, data.specific, data.test)])
    assert sorted(rows.tolist()) == list(range(40))
    memory.pipe(f"/d/t.{kind}", content[:-9] if kind != "csv" else b"a,label\n1\n")
    with pytest.raises(UserError, match=rf"memory://d/t\.{kind} cannot be read as a table"):
        open_labelled(f"memory://d/t.{kind}")


def test_mistakes(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe(
        {"/empty.txt": b"", "/cut.txt.gz": gzip.compress(b"a" * 1000)[:-4], "/d/x": b"-", "/bad.txt": b"a\n\xff\n"}
    )
    for spec, words in {
        "memory://no.txt": "The file memory://no.txt does not exist; check the address",
        "memory://no*.txt": "No file matches memory://no",
        "memory://d": "The folder memory://d holds no .txt",
        "memory://empty.txt": "is empty",
        "memory://cut.txt.gz": "is not a complete gzip file",
        "memory://bad.txt": "memory://bad.txt, line 2: byte 1",
        "memory://bad.txt,memory://bad.txt": "named twice",
        "nowhere://a.txt": "nowhere://a.txt cannot be read (Protocol not known: nowhere): check the address",
    }.items():
        with pytest.raises(UserError) as caught:
            read(spec)
        assert words in str(caught.value)
    with pytest.raises(UserError, match=r"memory://d/a\.npz is not a \.csv or \.parquet file; download the data"):
        open_labelled("memory://d/a.npz")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("403\nForbidden")

    monkeypatch.setattr(type(memory), "_open", refuse)
    with pytest.raises(
        UserError, match=r"memory://bad.txt cannot be read \(403 Forbidden\): check the address, the network"
    ):
        read("memory://bad.txt")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"needs fsspec: run `pip install 'bilevel\[remote\]'`"):
        read("s3://bucket/a.txt")


def test_local_files_do_not_import_fsspec(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    code = (
        "import sys; from bilevel.data import open_source; "
        f"assert list(open_source({str(tmp_path / '*.txt')!r}).documents()) == [b'one']; assert 'fsspec' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
