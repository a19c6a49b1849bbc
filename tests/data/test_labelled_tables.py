"""Tables with a column of labels: CSV and Parquet."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from bilevel.data import open_labelled
from bilevel.types import UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

KINDS = ("oak", "ash", "elm")


def text(rows: int, first: int = 0, kinds: tuple[str, ...] = KINDS) -> str:
    lines = [f"{i},{kinds[i % len(kinds)]},{i / 2},{str(i % 2 == 0).lower()}" for i in range(first, first + rows)]
    return "\n".join(["height,kind,width,straight", *lines]) + "\n"


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_columns_become_features_and_text_names_the_classes(tmp_path: Path) -> None:
    data = open_labelled(write(tmp_path / "trees.csv", text(60)), label="kind")
    assert data.class_names == ("ash", "elm", "oak")
    assert (data.num_classes, len(data.train), len(data.specific), len(data.test)) == (3, 42, 6, 12)
    for part in (data.train, data.specific, data.test):
        arrays, row = part.arrays, part.arrays["source_row"]
        assert arrays["features"].dtype == np.float32
        np.testing.assert_array_equal(arrays["features"], np.stack([row, row / 2, row % 2 == 0], 1))
        assert [data.class_names[c] for c in arrays["label"]] == [KINDS[i % 3] for i in row]


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_other_files_and_a_column_called_label(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "csv.gz":
        path.write_bytes(gzip.compress(text(30).replace("kind", "label").encode()))
    else:
        columns = {"label": [2, 0, 1] * 10, "x": list(range(30))}
        pyarrow.parquet.write_table(pa.table(columns), path)
    data = open_labelled(str(path))
    assert data.class_names == (() if kind == "parquet" else ("ash", "elm", "oak"))
    labels = data.train.arrays["label"]
    np.testing.assert_array_equal(labels, np.asarray([2, 0, 1])[data.train.arrays["source_row"] % 3])


def test_train_and_test_share_their_classes(tmp_path: Path) -> None:
    write(tmp_path / "trees_train.csv", text(30))
    write(tmp_path / "trees_test.csv", text(2, first=1, kinds=("oak", "elm")))
    data = open_labelled(str(tmp_path / "trees"), label="kind")
    assert data.test.arrays["label"].tolist() == [1, 2]
    assert open_labelled(str(tmp_path), label="kind").test.arrays["label"].tolist() == [1, 2]
    write(tmp_path / "trees_test.csv", text(4, kinds=("fir",)))
    with pytest.raises(UserError, match=r"trees_test\.csv has a class 'fir' that train has not; .* ash, elm, oak"):
        open_labelled(str(tmp_path), label="kind")


def test_text_labels_of_an_archive(tmp_path: Path) -> None:
    y = np.asarray(KINDS)[np.arange(30) % 3]
    np.savez(tmp_path / "a.npz", x=np.arange(60).reshape(30, 2), kind=y)
    data = open_labelled(str(tmp_path / "a.npz"), label="kind")
    assert data.class_names == ("ash", "elm", "oak")
    assert data.train.arrays["label"][0] == (2, 0, 1)[data.train.arrays["source_row"][0] % 3]


def test_bad_tables(tmp_path: Path) -> None:
    cases = [
        (
            "a,b\n1,2\n",
            None,
            "has no column label, labels, y or target, but a, b; name the column of the labels with --data.label",
        ),
        ("a,y\n1,2\n", "z", "has no column 'z', but a, y"),
        ("a,a,y\n1,2,3\n", None, "several columns called 'a'"),
        ("y\n1\n", None, "no column beside that of the labels, 'y'"),
        ("a,y\nred,0\nblue,1\n", None, "the column 'a' holds string, such as 'red', not numbers"),
        ("a,y\n,0\n,1\n", None, "the column 'a' is empty"),
        ("a,b,y\n1,2,0\n,3,1\n", None, "features of row 1 are not finite"),
        ("a,y\n1,0\n2,\n", None, "row 1 has no label in the column 'y'"),
        ("a,y\n1,oak\n2,\n", None, "row 1 has no label"),
        ("a,y\n1,0.5\n", None, "the labels are float64"),
        ("a,y\n1\n", None, "cannot be read as a table"),
        ("", None, "cannot be read as a table"),
    ]
    for i, (content, label, message) in enumerate(cases):
        with pytest.raises(UserError, match=message) as caught:
            open_labelled(write(tmp_path / f"{i}.csv", content), label=label)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"leave size=8 \(--data\.size\) out"):
        open_labelled(write(tmp_path / "a.csv", text(9)), label="kind", size=8)
    with pytest.raises(UserError, match="knows its labels"):
        open_labelled("sklearn:iris", label="kind")


ROWS = range(40)
FEATURES = [(float(7 * i % 11), i / 2) for i in ROWS]


def numbered(first: str, numbers: list[int] | None = None) -> str:
    lines = [
        f"{number},{x},{y},{i % 2}" for i, (number, (x, y)) in enumerate(zip(numbers or ROWS, FEATURES, strict=True))
    ]
    return "\n".join([f"{first},x,z,label", *lines]) + "\n"


@pytest.mark.parametrize(
    "name", ["", '""', "Unnamed: 0", "id", "Id", "PassengerId", "row_id", "index", "sample", "#", "No."]
)
def test_row_numbers_are_no_features(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_labelled(write(tmp_path / "a.csv", numbered(name)))
    rows = data.train.arrays["source_row"]
    np.testing.assert_array_equal(data.train.arrays["features"], np.asarray(FEATURES, np.float32)[rows])
    shown = name.replace('"', "")
    assert f"the column {shown!r} of {tmp_path}/a.csv is left out: it " in capsys.readouterr().err


def test_an_index_need_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = np.random.default_rng(0).permutation(40).tolist()
    assert open_labelled(write(tmp_path / "a.csv", numbered("", drawn))).train.arrays["features"].shape[1] == 2
    assert open_labelled(write(tmp_path / "b.csv", numbered("id", drawn))).train.arrays["features"].shape[1] == 3
    pandas_table = pa.table({"key": drawn, "x": [x for x, _ in FEATURES], "label": [i % 2 for i in ROWS]})
    pandas_table = pandas_table.replace_schema_metadata({"pandas": '{"index_columns": ["key"], "columns": []}'})
    pyarrow.parquet.write_table(pandas_table, tmp_path / "c.parquet")
    assert open_labelled(str(tmp_path / "c.parquet")).train.arrays["features"].shape[1] == 1
    assert "'key' of" in capsys.readouterr().err


def test_a_first_column_that_counts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert open_labelled(write(tmp_path / "a.csv", numbered("height"))).train.arrays["features"].shape[1] == 3
    assert "the column 'height' of" in (error := capsys.readouterr().err)
    assert "counts the rows, and is a feature; remove it if" in error


def test_parts_have_the_columns_of_train(tmp_path: Path) -> None:
    """In any order; row numbers that only train has, or that go on in test, do not matter."""
    write(tmp_path / "t_train.CSV", numbered("id"))
    write(tmp_path / "t_test.csv", "label,z,x,id\n1,0.5,7,41\n0,1,3,40\n")
    data = open_labelled(str(tmp_path / "t"))
    assert data.test.arrays["features"].tolist() == [[7, 0.5], [3, 1]]
    write(tmp_path / "t_test.csv", "label,z,x\n1,0.5,7\n")
    assert open_labelled(str(tmp_path)).test.arrays["features"].tolist() == [[7, 0.5]]
    for header, message in (
        ("label,z,w", r"t_test\.csv has no column 'x', which the training part has"),
        ("label,z,x,w", r"t_test\.csv has a column 'w', which the training part has not"),
        ("y,z,x", r"t_test\.csv has no column 'label', but y, z, x"),
    ):
        row = ",".join("1" for _ in header.split(","))
        write(tmp_path / "t_test.csv", f"{header}\n{row}\n")
        with pytest.raises(UserError, match=message):
            open_labelled(str(tmp_path / "t"))


def test_two_columns_that_may_be_the_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a,y,target\n" + "1.5,0,1\n2.5,1,0\n" * 20)
    with pytest.raises(UserError, match=r"has the columns y and target: name that of the labels with --data\.label"):
        open_labelled(file)
    assert open_labelled(file, label="target").train.arrays["features"].shape[1] == 2


def test_other_encodings_of_a_table(tmp_path: Path) -> None:
    plain = open_labelled(write(tmp_path / "a.csv", numbered("id")))
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + numbered("id").encode())
    (tmp_path / "c.csv").write_bytes(gzip.compress(numbered("id").encode()))
    for name in ("b", "c"):
        assert open_labelled(str(tmp_path / f"{name}.csv")).train.content_hash == plain.train.content_hash
    (tmp_path / "d.csv").write_bytes(numbered("id").encode("utf-16"))
    with pytest.raises(UserError, match=r"d\.csv"):
        open_labelled(str(tmp_path / "d.csv"))
