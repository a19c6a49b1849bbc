"""Tiny captioned images: half of the generic ones have stripes as the specific ones, some with a wrong caption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bilevel.nn.image_text import towers
from bilevel.nn.resnet import ResNet

SIDE = 8
CLASSES = ("rows", "columns", "squares")
DOMAINS = ("noise", "stripes")


def pattern(rng: np.random.Generator, kind: str) -> NDArray[np.uint8]:
    """Draw stripes of random colour and place, uint8 `[8, 8, 3]`."""
    y, x = np.mgrid[:SIDE, :SIDE] + rng.integers(0, 4)
    bright = {"rows": y // 2 % 2, "columns": x // 2 % 2, "squares": (x // 2 + y // 2) % 2}[kind]
    noise = rng.integers(0, 40, (SIDE, SIDE, 3))
    return np.asarray(bright[..., None] * rng.integers(120, 210, 3) + noise, np.uint8)


def write_pictures(folder: Path) -> Path:
    """Write generic.npz, labels.tsv (every fourth striped image has another's caption), specific/{train,valid,test}.npz."""
    rng, rows = np.random.default_rng(0), []
    for i in range(120):
        kind = CLASSES[i % 3]
        said = CLASSES[(i + 1) % 3] if i % 4 == 0 else kind
        rows.append((pattern(rng, kind), f"striped {said} {i % 7}", "stripes", "none" if said == kind else "wrong"))
        blank = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        rows.append((blank, f"thing number {i % 40}", "noise", "none"))
    images, captions, domains, faults = zip(*(rows[i] for i in rng.permutation(len(rows))), strict=True)
    np.savez(folder / "generic.npz", images=np.stack(images), captions=np.asarray(captions))
    (folder / "labels.tsv").write_text("".join(f"{d}\t{f}\n" for d, f in zip(domains, faults, strict=True)))
    (folder / "specific").mkdir()
    for part, count in (("train", 30), ("valid", 12), ("test", 15)):
        labels = np.arange(count) % len(CLASSES)
        images = np.stack([pattern(rng, CLASSES[c]) for c in labels])
        np.savez(folder / "specific" / f"{part}.npz", images=images, labels=np.asarray(CLASSES)[labels])
    return folder


def picture_flags(folder: Path, **given: Any) -> dict[str, Any]:
    """Return the flags that name these images, and small networks."""
    return {
        "data__generic": folder / "generic.npz", "data__specific": folder / "specific", "data__cache_dir": folder / "cache",
        "data__size": SIDE, "data__small_size": 4, "data__text_dimensions": 8, "data__past": 24,
        "data__template": "striped {}", "model__width": 8, "model__text_hidden": 8, "model__weighting_features": 4,
        "optimizer__warmup": 2, **given,
    }  # fmt: skip


def shrink_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower "resnet8" has one block."""

    def tiny(num_classes: int | None = None, **options: Any) -> ResNet:
        return ResNet((1,), (4,), num_classes, shortcut="pad", **options)

    monkeypatch.setitem(towers._TOWERS, "resnet8", tiny)
