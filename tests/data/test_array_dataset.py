"""Data sets that are arrays already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bilevel.data import ArrayDataset
from bilevel.types import UserError

IMAGES = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
LABELS = np.arange(6, dtype=np.int32)


def test_rows():
    data = ArrayDataset({"image": IMAGES, "label": LABELS})
    batch = data.rows(np.array([4, 1, 4]))
    assert len(data) == 6
    assert set(batch) == {"image", "label", "id"}
    np.testing.assert_array_equal(batch["image"], IMAGES[[4, 1, 4]])
    assert batch["label"].tolist() == batch["id"].tolist() == [4, 1, 4]
    assert batch["id"].dtype == np.int32


def test_files(tmp_path: Path):
    np.savez(tmp_path / "data.npz", image=IMAGES, label=LABELS)
    np.save(tmp_path / "image.npy", IMAGES)
    np.save(tmp_path / "label.npy", LABELS)
    from_npz, from_folder = ArrayDataset.open(tmp_path / "data.npz"), ArrayDataset.open(tmp_path)
    from_npy = ArrayDataset.open(str(tmp_path / "label.npy"))
    for data in (from_npz, from_folder):
        np.testing.assert_array_equal(data.rows(np.array([3]))["image"], IMAGES[[3]])
    assert from_npy.rows(np.array([3]))["label"].tolist() == [3]
    assert (
        from_npz.content_hash
        == from_folder.content_hash
        == ArrayDataset({"label": LABELS, "image": IMAGES}).content_hash
    )
    assert from_npy.content_hash != from_npz.content_hash
    assert from_npz.name == str(tmp_path / "data.npz")


def test_npy_files_stay_on_disk(tmp_path: Path):
    array = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint8, shape=(1 << 20, 1 << 10))
    array[12345] = 7
    del array
    batch = ArrayDataset.open(tmp_path / "big.npy").rows(np.array([12345, 0]))
    assert batch["big"][:, 0].tolist() == [7, 0]


def test_content_hash():
    def hash_of(**arrays: np.ndarray) -> str:
        return ArrayDataset(arrays).content_hash

    changed = IMAGES.copy()
    changed[5, 1, 1] += 1
    hashes = [
        hash_of(x=IMAGES),
        hash_of(y=IMAGES),
        hash_of(x=changed),
        hash_of(x=IMAGES.reshape(6, 4)),
        hash_of(x=IMAGES.view(np.int32)),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(x=np.asfortranarray(IMAGES)) == hashes[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "there are no arrays; give at least one"),
        (
            {"a": np.zeros(3), "b": np.zeros((4, 2))},
            r"differ in their number of rows \('a' has 3, 'b' has 4\); make",
        ),
        ({"a": np.zeros(3), "id": np.zeros(3)}, "the name 'id' is taken by the row numbers; rename"),
        ({"a": np.float32(1)}, "'a' is a single number"),
        ({"a": np.array(["x", None])}, "'a' holds Python objects; convert"),
        ({"a": np.zeros((0, 3))}, "holds no rows; give data"),
    ],
)
def test_bad_arrays(arrays: dict[str, np.ndarray], message: str):
    with pytest.raises(UserError, match=f"my data.*{message}"):
        ArrayDataset(arrays, name="my data")


def test_bad_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.npz").write_text("text")
    (tmp_path / "c.npy").write_text("text")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "d.npz", a=np.array([{}], object))
    np.savez(tmp_path / "e.npz", a=np.zeros(2), b=np.zeros(3))
    expected = {
        "missing.npz": "does not exist; check the path",
        "a.txt": "neither a .npz or .npy file nor a folder",
        "b.npz": "cannot be read as numpy arrays",
        "c.npy": "cannot be read as numpy arrays",
        "d.npz": "cannot be read as numpy arrays",
        "e.npz": "differ in their number of rows",
        "empty": "neither a .npz",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            ArrayDataset.open(tmp_path / name)


def test_strided_arrays_are_gathered_alike():
    array = np.arange(60, dtype=np.float32).reshape(12, 5)
    indices = np.asarray([7, 0, 7, 11])
    for stored in (array, np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]):
        np.testing.assert_array_equal(ArrayDataset({"x": stored}).rows(indices)["x"], array[indices])
