"""Folders of images: every image that was given is read once, or named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bilevel.data import LabelledData, open_labelled
from bilevel.types import UserError

pytest.importorskip("PIL")
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write four images of each of two classes in train, two in test, each of another grey."""
    for part, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(("a", "b")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                grey = np.full((2, 2), 10 * i + c + (100 if part == "test" else 0), np.uint8)
                Image.fromarray(grey).save(tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def opened(folder: Path) -> LabelledData:
    return open_labelled(str(folder), specific=1, split="last", cache_dir=folder.parent / "cache")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_what_is_not_read_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = opened(folder)
    (folder / "train" / "a" / "._0.png").write_bytes(b"of a Mac")
    assert opened(folder).train.content_hash == before.train.content_hash
    assert capsys.readouterr().err == ""
    for name in ("labels.csv", "train/loose.png", "train/a/notes.txt"):
        (folder / name).write_text("x")
    (folder / "train" / "a" / "deeper").mkdir()
    (folder / "extra").mkdir()
    assert opened(folder).train.content_hash == before.train.content_hash
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"note: of {folder} are not read: extra/, labels.csv; ")
    assert second.startswith(f"note: of {folder}/train are not read: loose.png, a/deeper/, a/notes.txt; ")


def test_suffixes_and_parts_in_any_case(folder: Path) -> None:
    before = opened(folder)
    for i, suffix in enumerate(("PNG", "Bmp", "tif", "WebP")):
        old = folder / "train" / "a" / f"{i}.png"
        Image.open(old).save(folder / "train" / "a" / f"{i}.{suffix}", lossless=True)
        if suffix != "PNG":
            old.unlink()
    (folder / "train" / "a" / "0.png").unlink()
    (folder / "train").rename(folder / "Train")
    assert opened(folder).train.content_hash == before.train.content_hash


def test_empty_classes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "test" / "b")
    opened(folder)
    assert f"note: {folder}/test has no images of: b.\n" in capsys.readouterr().err
    (folder / "train" / "c").mkdir()
    refused(folder, "train has no images of the class 'c'; add some, or remove its folder")
    (folder / "train" / "c" / "0.svg").write_text("<svg/>")
    refused(folder, "train has no images of the class 'c'")


def test_links(folder: Path) -> None:
    (folder / "train" / "a" / "9.png").symlink_to(folder / "gone.png")
    refused(folder, r"9\.png is a link to nothing")
    (folder / "train" / "a" / "9.png").unlink()
    (folder / "train" / "c").symlink_to(folder / "train" / "b")
    refused(folder, "train/b and .*train/c are one folder, by a link")
    (folder / "train" / "c").unlink()
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to(folder / "train")
    refused(folder, "train and .*test are one folder, by a link")


def test_two_names_of_a_part(folder: Path) -> None:
    for name in ("val", "valid"):
        shutil.copytree(folder / "test", folder / name)
    refused(folder, "val and .*valid are both the valid part; keep one")


def test_a_class_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("train/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(folder, f"The folder {folder}/train/a cannot be read; change its permissions")


def test_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"x": np.arange(60).reshape(30, 2), "y": np.arange(30) % 3}
    np.savez(tmp_path / "A.NPZ", **arrays, group=np.zeros(30))
    (tmp_path / "A.NPZ.npz").rename(tmp_path / "A.NPZ")
    assert len(open_labelled(str(tmp_path / "A.NPZ")).train) == 21
    assert capsys.readouterr().err == f"note: of the arrays of {tmp_path}/A.NPZ are not used: group.\n"
    for name in ("set_train", "set_val", "set_dev", "set_test"):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(UserError, match=r"set_dev\.npz and .*set_val\.npz are both the valid part; keep one"):
        open_labelled(str(tmp_path / "set"))
    (tmp_path / "set_dev.npz").rename(tmp_path / "set_new.npz")
    assert open_labelled(str(tmp_path / "set")).has_valid_part
    assert capsys.readouterr().err.endswith("set_test.npz are not used: set_new.npz.\n")
    both = {"x_train": arrays["x"], "y_train": arrays["y"], "x_val": arrays["x"], "x_dev": arrays["x"]}
    np.savez(tmp_path / "all.npz", **both)
    with pytest.raises(UserError, match="holds x_val and x_dev, which are one part"):
        open_labelled(str(tmp_path / "all.npz"))
    np.savez(tmp_path / "time.npz", x=1.7e18 + 1e9 * np.arange(60).reshape(30, 2), y=arrays["y"])
    with pytest.raises(
        UserError, match=r"feature 0 varies by .* around 1.7e\+18, too little for float32; subtract its mean"
    ):
        open_labelled(str(tmp_path / "time.npz"))
