"""Write what two miniatures of ATD's image–text experiment need beside the images in DATA/image_text.

    python -m benchmarks.caption_data --data-dir DATA --output mini

`icons.labels.tsv.gz` has the kind of each generic drawing: DATA/image_text/generic_colour.npz, generic_onecolour.npz and
generic_stamps.npz, 83,951 in all. Specific is DATA/image_text/specific with classes.tsv, 40 classes.

`cifar.npz` is 20,000 training images of CIFAR-10 with captions by `worse_label` of CIFAR-10N, 8,033 of them wrong, to be hidden
among the drawings; `with_cifar.labels.tsv.gz` has kind and fault of the four files in this order. `photos_{train,valid,test}.npz`
is a specific set: 30 images of each class in train and 50 in valid, others than those, and 2,000 test images.
"""

from __future__ import annotations

import argparse
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWINGS = ("colour", "onecolour", "stamps")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HIDDEN, TRAIN, VALID, TEST = 20_000, 30, 50, 2_000


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Write labels of drawings, and photographs to hide among them.")
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("BILEVEL_DATA"), required="BILEVEL_DATA" not in os.environ
    )
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    data, output = Path(given.data_dir), given.output
    output.mkdir(parents=True, exist_ok=True)
    kinds = [kind for name in DRAWINGS for kind in _kinds(data / "image_text" / f"generic_{name}.labels.tsv.gz")]
    _write(output / "icons.labels.tsv.gz", kinds)
    wrong = _hide(data / "image", output)
    faults = [f"{kind}\tnone" for kind in kinds] + [f"photo\t{'wrong caption' if w else 'none'}" for w in wrong]
    _write(output / "with_cifar.labels.tsv.gz", faults)


def _hide(data: Path, output: Path) -> NDArray[np.bool_]:
    """Write the photographs; returns which of the hidden ones have a wrong caption."""
    with np.load(data / "cifar10_train_jpeg.npz") as file:
        train = {name: file[name] for name in file.files}
    with np.load(data / "cifar10n_train_labels.npz") as file:
        said = file["worse_label"]
    order = np.random.default_rng(0).permutation(len(said))
    hidden, others = order[:HIDDEN], order[HIDDEN:]
    captions = np.asarray([f"a photo of a {CLASSES[label]}" for label in said[hidden]])
    np.savez(output / "cifar.npz", captions=captions, **_files(train, hidden))
    labels = train["labels"]
    of_class = [others[labels[others] == number] for number in range(len(CLASSES))]
    parts = {"train": [rows[:TRAIN] for rows in of_class], "valid": [rows[TRAIN : TRAIN + VALID] for rows in of_class]}
    for part, rows in parts.items():
        _save(output / f"photos_{part}.npz", train, np.concatenate(rows))
    with np.load(data / "cifar10_test_jpeg.npz") as file:
        _save(output / "photos_test.npz", {name: file[name] for name in file.files}, np.arange(TEST))
    return said[hidden] != labels[hidden]


def _save(path: Path, images: dict[str, Any], rows: NDArray[np.int64]) -> None:
    np.savez(path, labels=np.asarray(CLASSES)[images["labels"][rows]], **_files(images, rows))


def _files(images: dict[str, Any], rows: NDArray[np.int64]) -> dict[str, Any]:
    """The JPEG files of some rows, end to end."""
    starts, blob = images["offsets"], images["jpeg"]
    found = [blob[starts[row] : starts[row + 1]] for row in rows]
    return {"jpeg": np.concatenate(found), "offsets": np.cumsum([0, *map(len, found)])}


def _kinds(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.split("\t")[1] for line in file]


def _write(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
