"""What `bilevel select` hands over: the format that it read, attributes, weights and ids."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from random_run import random_run

from bilevel import cli

COUNT = 40
BLANK = (3, COUNT - 1)
RECORDS = [
    {"id": f"d{i}", "text": "" if i in BLANK else f"text {i * 7919 % 101} {'ab' * (i % 5)}", "n": i, "more": {"a": [i, None]}}
    for i in range(COUNT)
]  # fmt: skip
Read = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with random weights."""
    path = random_run(tmp_path_factory.mktemp("run") / "soba-seed0", specific="my|domain/", generic="heap.txt")
    (path / "result.json").write_text(json.dumps({"method": "soba", "test_loss": 1.25, "steps": 3}))
    return path


def select(run: Path, corpus: object, output: Path, **given: object) -> list[Path]:
    """The files that are written."""
    chosen = {"weights": run, "corpus": corpus, "output": output, "batch-size": 64, "keep_count": 10, **given}
    flags = [
        x for name, value in chosen.items() if value is not None for x in (f"--{name.replace('_', '-')}", str(value))
    ]
    cli.main(["select", *flags, "--no-progress"])
    return sorted((output / "selected").iterdir())


def refused(capsys: pytest.CaptureFixture[str], *given: Any, **more: object) -> str:
    with pytest.raises(SystemExit):
        select(*given, **more)
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def lines(decompress: Callable[[bytes], bytes] = bytes) -> Read:
    return lambda path: [json.loads(line) for line in decompress(path.read_bytes()).splitlines()]


def stream(path: Path) -> list[dict[str, Any]]:
    with pa.ipc.open_stream(path) as reader:
        return reader.read_all().to_pylist()


def records(path: Path) -> list[dict[str, Any]]:
    reader = pytest.importorskip("array_record.python.array_record_module").ArrayRecordReader(str(path))
    return [json.loads(record) for record in reader.read_all()]


def zstd_lines(path: Path) -> list[dict[str, Any]]:
    zstandard = pytest.importorskip("zstandard")
    return lines(lambda data: zstandard.ZstdDecompressor().stream_reader(data).readall())(path)


READERS: dict[str, Read] = {
    "a.jsonl": lines(), "a.jsonl.gz": lines(gzip.decompress), "a.jsonl.bz2": lines(bz2.decompress),
    "a.jsonl.xz": lines(lzma.decompress), "a.jsonl.zst": zstd_lines,
    "a.parquet": lambda path: pq.read_table(path).to_pylist(),
    "a.arrow": stream, "a.feather": lambda path: pyarrow.feather.read_table(path).to_pylist(),
    "a.array_record": records,
}  # fmt: skip


def write(path: Path) -> Path:
    """The records as other libraries write them."""
    table = pa.Table.from_pylist(RECORDS).replace_schema_metadata({"who": "me"})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=17, compression="gzip")
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=17)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path))
    elif path.suffix == ".array_record":
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:4")
        for record in RECORDS:
            writer.write(json.dumps(record).encode())
        writer.close()
    else:
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in RECORDS).encode()
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        if path.suffix == ".zst":
            compress = pytest.importorskip("zstandard").compress
        path.write_bytes(compress(text))
    return path


@pytest.fixture(scope="module")
def judged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The table of the documents that are not blank."""
    folder = tmp_path_factory.mktemp("judged")
    (file,) = select(run, write(folder / "a.jsonl"), folder / "out", id_field="id")
    return pq.read_table(file).to_pylist()


def test_quantiles(judged: list[dict[str, Any]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.array([row["score"] for row in judged])
    assert [row["id"] for row in judged] == [f"d{i}" for i in range(COUNT) if i not in BLANK]
    assert [row["quantile"] for row in judged] == [(scores < score).mean() for score in scores]
    assert {row["id"] for row in judged if row["kept"]} == {judged[i]["id"] for i in np.argsort(-scores)[:10]}
    given: dict[str, Any] = {"keep_count": None, "keep_quantile": 0.75}
    (file,) = select(run, write(tmp_path / "a.jsonl"), tmp_path / "out", **given)
    rows = pq.read_table(file).to_pylist()
    assert [row["kept"] for row in rows] == [row["quantile"] >= 0.75 for row in rows]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["threshold_quantile"] == min(row["quantile"] for row in rows if row["kept"])
    (tmp_path / "same.txt").write_text("same\n" * 3)
    error = refused(capsys, run, tmp_path / "same.txt", tmp_path / "same", **given)
    assert "--keep-quantile 0.75 is more than the highest quantile" in error


@pytest.mark.parametrize("name", READERS)
def test_each_format(name: str, run: Path, judged: list[dict[str, Any]], tmp_path: Path) -> None:
    corpus, read = write(tmp_path / name), READERS[name]
    wanted = {row["id"]: row for row in judged}
    (file,) = select(run, corpus, tmp_path / "documents", format="documents")
    assert file.name == f"00000-{name}"
    assert read(file) == [record for record in RECORDS if wanted.get(record["id"], {}).get("kept")]

    scores = {"scores": tmp_path / "documents" / "scores"}
    (file,) = select(run, corpus, tmp_path / "attributes", format="attributes", id_field="id", **scores)
    assert file.name == f"00000-{name}"
    rows = read(file)
    assert [row["id"] for row in rows] == [record["id"] for record in RECORDS]
    for row in rows:
        known = wanted.get(row["id"], {"score": None, "quantile": None, "kept": False})
        assert list(row) == ["id", "score", "quantile", "kept"]
        assert (row["quantile"], row["kept"]) == (known["quantile"], known["kept"])
        assert row["score"] == (known["score"] and pytest.approx(known["score"], rel=1e-6))

    (file,) = select(run, corpus, tmp_path / "weights", format="weights", temperature=2, keep_count=None, **scores)
    rows = read(file)
    assert [{k: v for k, v in row.items() if k != "weight"} for row in rows] == [r for r in RECORDS if r["text"]]
    plain = np.exp(np.array([wanted[row["id"]]["score"] for row in rows]) / 2)
    np.testing.assert_allclose([row["weight"] for row in rows], plain / plain.mean(), rtol=1e-5)


def test_repeated_ids_are_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within a file and between two."""
    for name, keys in {"a": "abc", "b": "dbbe"}.items():
        lines = [json.dumps({"key": key, "text": f"some text {key}{i}"}) for i, key in enumerate(keys)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = {"format": "attributes", "id_field": "key", "keep_count": 1}
    select(run, tmp_path / "*.jsonl", tmp_path / "out", **given)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["repeated_ids"] == 3
    assert "3 documents share their id with another one, the first is document 1 of" in capsys.readouterr().err
    select(run, tmp_path / "a.jsonl", tmp_path / "alone", **given)
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["repeated_ids"] == 0
    assert "share their id" not in capsys.readouterr().err


def test_parquet_stays_as_it_was(run: Path, tmp_path: Path) -> None:
    (file,) = select(run, write(tmp_path / "a.parquet"), tmp_path / "out", format="documents")
    before, after = pq.ParquetFile(tmp_path / "a.parquet"), pq.ParquetFile(file)
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert after.metadata.row_group(0).column(0).compression == "GZIP"


def test_text_is_written_as_text(run: Path, tmp_path: Path) -> None:
    text = [record["text"] for record in RECORDS]
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("\n".join(text).encode()))
    (file,) = select(run, tmp_path / "a.txt.xz", tmp_path / "out", format="documents", keep_count=38)
    assert (file.name, lzma.decompress(file.read_bytes()).decode().split("\n")) == (
        "00000-a.txt.xz",
        [t for t in text if t] + [""],
    )
    scores = {"scores": tmp_path / "out" / "scores"}
    (file,) = select(run, tmp_path / "a.txt.xz", tmp_path / "attributes", format="attributes", **scores)
    rows = lines(lzma.decompress)(file)
    assert file.name == "00000-a.txt.jsonl.xz"
    assert [row["id"] for row in rows] == list(range(COUNT - 1))  # the last line has no end, and no text
    assert [i for i, row in enumerate(rows) if row["score"] is None] == [3]
    (file,) = select(run, tmp_path / "a.txt.xz", tmp_path / "weights", format="weights", **scores)
    assert sum(row["weight"] for row in lines(lzma.decompress)(file)) == pytest.approx(10, rel=1e-5)


def test_what_is_not_a_file_of_records(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([record["text"] for record in RECORDS]))
    (file,) = select(run, tmp_path / "a.npy", tmp_path / "out", format="attributes")
    assert file.name == "00000-a.npy.jsonl.gz"
    assert [row["id"] for row in lines(gzip.decompress)(file)] == list(range(COUNT))
    (file,) = select(run, tmp_path / "a.npy", tmp_path / "weights", format="weights", keep_count=None)
    rows = lines(gzip.decompress)(file)
    assert [RECORDS[row["document"]]["text"] for row in rows] == [row["text"] for row in rows]
    assert np.mean([row["weight"] for row in rows]) == pytest.approx(1, rel=1e-5)


def test_a_saved_data_set_can_be_opened_again(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(RECORDS, info=datasets.DatasetInfo(license="cc0-1.0"))
    made.save_to_disk(tmp_path / "set", num_shards=2)
    files = select(run, tmp_path / "set", tmp_path / "out", format="weights", keep_count=20)
    assert [file.name for file in files] == [f"0000{i}-data-0000{i}-of-00002.arrow" for i in range(2)]
    found = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    assert set(found.column_names) == {*RECORDS[0], "weight"}
    assert len(found) == 20
    assert "| licence of the corpus | cc0-1.0 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card(run: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl")
    (tmp_path / "LICENSE").write_text("\n  CC BY 4.0\nand more\n")
    select(run, corpus, tmp_path / "out", format="weights", weight_field="w", temperature=3)
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        r"| target data | my\|domain/ |",
        "| learned on | heap.txt |",
        f"| corpus | {corpus}: 1 files, 38 documents |",
        "| licence of the corpus | CC BY 4.0 (LICENSE) |",
        "| test loss of the run | 1.2500 |",
        "`w`: exp(score / 3)",
        f"--corpus {corpus} --format weights --keep-count 10 --temperature 3.0 --weight-field w --output {tmp_path / 'out'}",
    ):
        assert line in text
    (tmp_path / "LICENSE").unlink()
    select(run, corpus, tmp_path / "again", format="weights")
    assert "| licence of the corpus | not known" in (tmp_path / "again" / "README.md").read_text()


def test_fields_inside_and_joined(run: Path, tmp_path: Path) -> None:
    table = pa.table(
        {"meta": [{"key": 7 + i, "text": record["text"]} for i, record in enumerate(RECORDS)], "n": ["n"] * COUNT}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    given: dict[str, object] = {"field": "n,meta.text", "id_field": "meta.key"}
    (file,) = select(run, tmp_path / "a.parquet", tmp_path / "out", **given)
    rows = pq.read_table(file)
    assert rows["id"].to_pylist() == list(range(7, 7 + COUNT))
    assert rows["id"].type == pa.int64()
    assert rows["bytes"].to_pylist() == [
        len(f"n\n\n{record['text']}".rstrip("\n") if record["text"] else "n") for record in RECORDS
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_no_group_has_more_than_its_share(kind: str, run: Path, tmp_path: Path) -> None:
    """Over two files; the highest of each group are kept, and the scores serve for another limit."""
    rows: list[dict[str, Any]] = [
        {"text": record["text"], "meta": {"site": f"s{i % 3}"}} for i, record in enumerate(RECORDS)
    ]
    for name, part in (("a", rows[:25]), ("b", rows[25:])):
        path = tmp_path / f"{name}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        else:
            pq.write_table(pa.Table.from_pylist(part), path)
    given: dict[str, Any] = {"group_field": "meta.site", "scores": tmp_path / "scores"}
    for most in (1, 3):
        files = select(
            run, tmp_path / f"*.{kind}", tmp_path / f"out{most}", keep_count=3 * most, max_per_group=most, **given
        )
        found = [row for file in files for row in pq.read_table(file).to_pylist()]
        for site in range(3):
            own = [row for row in found if (row["document"] + 25 * row["file"].endswith(f"b.{kind}")) % 3 == site]
            highest = sorted((row["score"] for row in own), reverse=True)[:most]
            assert sorted((row["score"] for row in own if row["kept"]), reverse=True) == highest
        summary = json.loads((tmp_path / f"out{most}" / "summary.json").read_text())
        assert (summary["kept"], summary["left_out"]) == (3 * most, len(found) - 3 * most)


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, table = write(tmp_path / "a.jsonl"), write(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    np.save(tmp_path / "a.npy", np.array(["one"]))

    def told(corpus: Path, **given: object) -> str:
        return refused(capsys, run, corpus, tmp_path / "out", **{"keep_count": 2, **given})

    groups: dict[str, object] = {"max_per_group": 1, "group_field": "key"}
    assert "line 1: the field 'key' is missing; name a text or whole number in every record (--group-field)" in told(
        corpus, **groups
    )
    assert "has no column 'key'" in told(table, **groups)
    assert "is plain text; leave --group-field out" in told(tmp_path / "a.txt", **groups)
    assert "--max-per-group needs --group-field: give both, or neither" in told(corpus, max_per_group=1)
    assert "--group-field needs --max-per-group" in told(corpus, group_field="id")
    assert "--max-per-group 0 must be at least 1" in told(corpus, **{**groups, "max_per_group": 0})
    attributes: dict[str, object] = {"format": "attributes"}
    assert "line 1: the field 'key' is missing" in told(corpus, id_field="key", **attributes)
    assert "line 1: the field 'more' holds a dict" in told(corpus, id_field="more", **attributes)
    assert "has no column 'key'" in told(table, id_field="key", **attributes)
    assert "is plain text; leave --id-field out" in told(tmp_path / "a.txt", id_field="key", **attributes)
    assert "of files with records, which" in told(tmp_path / "a.npy", id_field="key", keep_count=1)
    for path in (corpus, table):
        assert "has a field 'n' already; give the weights another name (--weight-field)" in told(
            path, format="weights", weight_field="n"
        )
    assert "keeps all fields: leave --id-field out" in told(corpus, format="documents", id_field="id")
    assert "does not go with --format weights" in told(corpus, format="weights", rule="gumbel")
    assert "does not go with --keep-quantile" in told(corpus, rule="gumbel", keep_count=None, keep_quantile=0.5)
    assert "--keep-quantile 1.0 must lie in [0, 1)" in told(corpus, keep_count=None, keep_quantile=1.0)
    assert not (tmp_path / "out" / "scores").exists(), "something was scored before the flags were checked"
