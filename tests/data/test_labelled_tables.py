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
        ("a,b\n1,2\n", None, "has no column label, labels, y or target, but a, b; name the column of the labels"),
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
    with pytest.raises(UserError, match="leave size=8 out"):
        open_labelled(write(tmp_path / "a.csv", text(9)), label="kind", size=8)
    with pytest.raises(UserError, match="knows its labels"):
        open_labelled("sklearn:iris", label="kind")
