"""Corpora as other libraries write them: Parquet, Arrow, ArrayRecord, zstd, xz, and saved Hugging Face data sets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from bilevel.data import open_source, open_specific, options_of, pack
from bilevel.data.columnar import ColumnKind, column_batches
from bilevel.types import UserError

RECORDS = [
    {"id": f"d{i}", "title": None if i % 3 else f"Title {i}", "text": f"document é {i}",
     "meta": {"lang": "en", "text": f"inner {i}"}}
    for i in range(50)
]  # fmt: skip
RECORDS[7]["text"] = None
RECORDS[8]["text"] = " \n"
WANTED = [b"" if i in (7, 8) else f"document é {i}".encode() for i in range(50)]
JOINED = [b"\n\n".join(x for x in ((b"" if i % 3 else b"Title %d" % i), text) if x) for i, text in enumerate(WANTED)]


def read(spec: object, **options: Any) -> list[bytes]:
    return list(open_source(str(spec), **options).documents())


def refused(spec: object, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(spec, **options)
    assert "\n" not in str(caught.value)


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=20)


def write_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


def write_feather(path: Path, table: pa.Table) -> None:
    pyarrow.feather.write_feather(table, str(path), chunksize=20)


TABLES: dict[str, Callable[[Path, pa.Table], None]] = {
    "a.parquet": write_parquet, "a.arrow": write_file, "b.arrow": write_stream, "a.feather": write_feather,
    "part-00000": write_parquet, "a.parquet-00000-of-00002": write_parquet, "noname": write_stream,
}  # fmt: skip


def table(records: Sequence[dict[str, Any]] = RECORDS) -> pa.Table:
    return pa.Table.from_pylist(list(records))


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    TABLES[name](path, table())
    assert read(path) == WANTED
    assert read(path, field="meta.text") == [f"inner {i}".encode() for i in range(50)]
    assert read(path, field="title, text") == JOINED
    assert options_of(str(path)) == (True, False)
    refused(path, rf"{name} has no column 'body'; the columns found are: 'id', 'title'.*--data\.field", field="body")
    refused(path, r"no column 'meta\.body'", field="meta.body")
    refused(path, r"the column 'meta' holds struct<.*> instead of a text; name .*--data\.field", field="meta")
    refused(path, "holds one document a line or row", documents="file")
    if name != "a.parquet":
        pack(open_source(str(path)), length=16, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow", "a.feather"])
def test_damaged_tables_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    TABLES[name](path, table())
    data = path.read_bytes()
    for cut in (len(data) * 2 // 3, len(data) - 60, 20):
        path.write_bytes(data[:cut])
        refused(path, rf"{name} cannot be read as a (Parquet|Arrow) file \(.+\); it is damaged or cut off")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"no table at all, but words")
    refused(path, "cannot be read as a")


def test_a_stream_that_ends_between_batches_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stream(tmp_path / "a.arrow", table())
    data = (tmp_path / "a.arrow").read_bytes()
    read(tmp_path / "a.arrow")
    assert capsys.readouterr().err == ""
    (tmp_path / "a.arrow").write_bytes(data[:-8])
    assert read(tmp_path / "a.arrow") == WANTED
    assert "a.arrow has no end mark: it may be cut off" in capsys.readouterr().err


def test_kinds_of_text_columns(tmp_path: Path) -> None:
    texts = pa.array(["one", None, "zwei é"])
    kinds = (pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string()))
    for i, kind in enumerate(kinds):
        write_stream(tmp_path / f"{i}.arrow", pa.table({"text": texts.cast(kind)}))
        assert read(tmp_path / f"{i}.arrow") == [b"one", b"", "zwei é".encode()]
    bad = pa.array([b"ok", b"caf\xe9"]).view(pa.binary())
    write_parquet(tmp_path / "bad.parquet", pa.table({"text": bad}))
    refused(tmp_path / "bad.parquet", r"bad\.parquet, row 1: byte 4 of the text is not UTF-8")
    write_file(tmp_path / "old.feather", pa.table({"text": texts}))
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(40))
    refused(tmp_path / "old.feather", "Feather file of version 1")


def test_batches_are_small(tmp_path: Path) -> None:
    """However large a row group or a batch is, a few MiB of it are in memory."""
    large = pa.table({"text": ["x" * 100_000] * 300, "other": ["y" * 100_000] * 300})
    pq.write_table(large, tmp_path / "a.parquet", use_dictionary=False)
    write_stream(tmp_path / "a.arrow", large)
    kinds: dict[str, ColumnKind] = {"a.parquet": "parquet", "a.arrow": "arrow_stream"}
    for name, kind in kinds.items():
        sizes = [batch.nbytes for batch in column_batches(tmp_path / name, kind, lambda _: ["text"])]
        assert sum(sizes) >= 30_000_000
        assert max(sizes) < 5 << 20
    assert len(read(tmp_path / "a.parquet")) == 300


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", None)]
)
def test_compressed_lines(suffix: str, compress: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    """Several members are read one after another; a file that is cut off is named, wherever it is cut."""
    zstandard = pytest.importorskip("zstandard")
    halves = [b"".join(json.dumps(one).encode() + b"\n" for one in part) for part in (RECORDS[:30], RECORDS[30:] * 400)]
    members = [(compress or zstandard.compress)(half) for half in halves]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(members))
    assert read(path)[:50] == WANTED
    for cut in (len(members[0]) - 5, len(members[0]) + 40, sum(map(len, members)) - 3):
        path.write_bytes(b"".join(members)[:cut])
        refused(
            path, rf"a\.jsonl\.{suffix} is not a complete (gzip|bzip2|xz|zstd) file \(.+\); copy or compress it again"
        )


def test_zstd_frames_of_other_writers(tmp_path: Path) -> None:
    """Frames to be skipped (pzstd writes them), no size in the header, and a large window."""
    zstandard = pytest.importorskip("zstandard")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = stream.compress(b"one\ntwo\n") + stream.flush()
    (tmp_path / "a.zst").write_bytes(skipped + data + skipped + zstandard.compress(b"three\n"))
    assert read(tmp_path / "a.zst") == [b"one", b"two", b"three"]


def test_fields_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert read(path) == WANTED
    assert read(path, field="meta.text") == [f"inner {i}".encode() for i in range(50)]
    assert read(path, field="title,text") == JOINED
    refused(path, "line 1: no field 'titel'", field="titel,text")
    refused(path, "holds an empty name", field="title,")
    path.write_text('{"title": "a", "text": "b"}\n{"text": "c"}\n{"body": "d"}\n')
    refused(path, "line 3: no field 'title'", field="title,text")
    path.write_text('{"title": "a", "text": "b"}\n{"text": "c"}\n')
    assert read(path, field="title,text") == [b"a\n\nb", b"c"]


def write_records(path: Path, records: Sequence[bytes], options: str = "group_size:1") -> Path:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def example(record: dict[str, Any]) -> bytes:
    messages = pytest.importorskip("tensorflow_datasets.proto").tf_example_pb2
    found = messages.Example()
    for name, value in {"text": record["text"], "meta/text": record["meta"]["text"]}.items():
        found.features.feature[name].bytes_list.value.extend([] if value is None else [value.encode()])
    return found.SerializeToString()


@pytest.mark.parametrize("name", ["a.array_record", "x-train.array_record-00000-of-00001", "noname"])
def test_array_records(name: str, tmp_path: Path) -> None:
    path = write_records(tmp_path / name, [json.dumps(record).encode() for record in RECORDS])
    assert read(path) == WANTED
    assert read(path, field="title,text") == JOINED
    refused(path, "record 0: no field 'body'", field="body")
    data = path.read_bytes()
    for cut in (len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path, rf"{name} is not a complete ArrayRecord file \(.+\); copy or write it again")


def test_what_array_records_hold(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.array_record", list(map(example, RECORDS)), "group_size:16")
    assert read(path) == WANTED
    assert read(path, field="meta.text") == [f"inner {i}".encode() for i in range(50)]
    path = write_records(tmp_path / "b.array_record", [b"plain", b"\nwords\n", b" "])
    assert read(path) == [b"plain", b"\nwords\n", b""]
    refused(path, "holds plain text; leave the field out", field="text")
    refused(write_records(tmp_path / "c.array_record", [b"plain", b"\xff\xfe\x01"]), "record 1 is neither UTF-8 text")


def write_saved(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the layout of `Dataset.save_to_disk`, in two shards: by `datasets` if it is installed, else by pyarrow."""
    try:
        import datasets
    except ImportError:
        folder.mkdir(parents=True)
        names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
        for name, part in zip(names, (records[: len(records) // 2], records[len(records) // 2 :]), strict=True):
            write_stream(folder / name, table(part))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}, "license": "mit"}, indent=2))
        (folder / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": name} for name in names]}, indent=2)
        )
        return
    info = datasets.DatasetInfo(license="mit")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(records), info=info).save_to_disk(folder, num_shards=2)


def test_saved_data_sets(tmp_path: Path) -> None:
    write_saved(tmp_path / "set", RECORDS)
    assert read(tmp_path / "set") == WANTED
    assert read(tmp_path / "set", field="title,text") == JOINED
    assert len(open_source(str(tmp_path / "set")).paths) == 2
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    refused(tmp_path / "set", r"data-00001-of-00002\.arrow, which .*state\.json names, does not exist")


def test_saved_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write_saved(tmp_path / "set" / name, [{"text": f"{name} {i}"} for i in range(4)])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    refused(
        tmp_path / "set",
        r"saved data set with the splits train, validation, test: name one of them, as in .*/set/train",
    )
    assert read(tmp_path / "set" / "test") == [b"test 0", b"test 1", b"test 2", b"test 3"]
    assert options_of(str(tmp_path / "set")) == (True, False)
    parts = {name: list(part.documents()) for name, part in open_specific(str(tmp_path / "set")).items()}
    assert [part[0] for part in parts.values()] == [b"train 0", b"validation 0", b"test 0"]


def test_a_folder_of_shards(tmp_path: Path) -> None:
    for i in range(2):
        write_parquet(tmp_path / f"train-{i:05d}-of-00002.parquet", table(RECORDS[i * 25 : i * 25 + 25]))
    assert read(tmp_path) == WANTED
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table())
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", table())
    assert list(open_specific(str(tmp_path))["train"].documents()) == WANTED


def test_behind_urls(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    zstandard = pytest.importorskip("zstandard")
    memory = fsspec.filesystem("memory")
    for name, write in TABLES.items():
        write(tmp_path / name, table())
        memory.pipe(f"/corpora/{name}", (tmp_path / name).read_bytes())
        assert read(f"memory://corpora/{name}") == WANTED, name
    write_saved(tmp_path / "set", RECORDS)
    for path in (tmp_path / "set").iterdir():
        memory.pipe(f"/set/{path.name}", path.read_bytes())
    assert read("memory://set") == WANTED
    memory.pipe("/lines.jsonl.zst", zstandard.compress(json.dumps(RECORDS[0]).encode()))
    assert read("memory://lines.jsonl.zst") == WANTED[:1]
    memory.pipe("/a.array_record", b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f")
    refused("memory://a.array_record", "is read locally and not compressed: download")
    memory.store.clear()


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", table())
    write_records(tmp_path / "a.array_record", [b"text"])
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name, module in (("a.parquet", "pyarrow"), ("a.zst", "zstandard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(tmp_path / name, r"pip install 'bilevel\[experiments\]'")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "array_record.python.array_record_module", None)
        refused(tmp_path / "a.array_record", r"needs array-record: run `pip install 'bilevel\[experiments\]'`")
