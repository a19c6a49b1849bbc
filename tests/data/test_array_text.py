"""Text from numpy arrays, through the same door as files."""

from pathlib import Path

import numpy as np
import pytest

from bilevel.data import open_source, open_specific, pack
from bilevel.types import UserError


def save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("dtype", ["U", "S"])
def test_strings(tmp_path: Path, dtype: str) -> None:
    spec = save(tmp_path / "text.npy", np.asarray(["one", "", "three"], dtype))
    assert list(open_source(spec).documents()) == [b"one", b"", b"three"]


def test_rows_of_bytes_keep_what_stands_before_the_padding(tmp_path: Path) -> None:
    rows = np.zeros((2, 8), np.uint8)
    rows[0, :6] = list("ä b c".encode())
    rows[1, :1] = ord("x")
    spec = save(tmp_path / "rows.npy", rows)
    assert list(open_source(spec).documents()) == ["ä b c".encode(), b"x"]
    packed = pack(open_source(spec), length=16, cache_dir=tmp_path / "cache")
    assert packed.text(0) == "ä b c"


def test_named_array_and_split(tmp_path: Path) -> None:
    path = tmp_path / "many.npz"
    np.savez(path, body=np.asarray([f"document {i}" for i in range(200)]), other=np.arange(3))
    parts = open_specific(str(path), field="body")
    found = [set(part.documents()) for part in parts.values()]
    assert sum(map(len, found)) == 200
    assert len(set.union(*found)) == 200


def test_errors_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    numbers = save(tmp_path / "numbers.npy", np.arange(3.0))
    with pytest.raises(UserError, match=r"numbers\.npy holds float64.*give an array of strings"):
        list(open_source(numbers).documents())
    np.savez(tmp_path / "a.npz", body=np.asarray(["x"]))
    with pytest.raises(UserError, match=r"a\.npz holds no array 'text' but body"):
        list(open_source(str(tmp_path / "a.npz")).documents())
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"broken\.npy cannot be read"):
        list(open_source(str(tmp_path / "broken.npy")).documents())
    latin = save(tmp_path / "latin.npy", np.asarray([b"good", b"\xe9t\xe9"]))
    with pytest.raises(UserError, match=r"Row 1 of .*latin\.npy is not UTF-8"):
        list(open_source(latin).documents())
