"""Tiny text: generic lines with labels, half of them like the specific text (upper case); and the smallest transformer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.nn import transformer
from bilevel.nn.translation import transformer as translators
from bilevel.tasks import language_modeling, translation

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "old", "town", "people", "ran"]
DOMAINS = ("lower", "<script>UPPER")


TINY = transformer.TransformerConfig(layers=1, width=16, heads=2, feed_forward=32)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make each network "xs" one of one block, and evaluate all sets by one program: less to compile."""
    patch.setitem(transformer.SIZES, "xs", TINY)
    patch.setitem(translators.SIZES, "xs", {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32})
    patch.setattr(language_modeling, "rows_at_once", lambda *_: 16)
    patch.setattr(translation, "rows_at_once", lambda *_: 12)


def write_texts(folder: Path) -> Path:
    """Write generic.txt, labels.tsv and specific/{train,valid,test}.txt."""
    rng = np.random.default_rng(0)

    def lines(count: int, upper: bool) -> list[str]:
        made = [" ".join(rng.choice(WORDS, 8)) for _ in range(count)]
        return [line.upper() if upper else line for line in made]

    generic = [line for pair in zip(lines(150, False), lines(150, True), strict=True) for line in pair]
    (folder / "generic.txt").write_text("\n".join(generic) + "\n")
    (folder / "labels.tsv").write_text("".join(f"{name}\tx\n" for name in DOMAINS) * 150)
    (folder / "specific").mkdir()
    for part, count in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / "specific" / f"{part}.txt").write_text("\n".join(lines(count, True)) + "\n")
    return folder


def text_flags(folder: Path, **given: Any) -> dict[str, Any]:
    """Return the flags that name the text, and small networks."""
    return {
        "data__generic": folder / "generic.txt", "data__specific": folder / "specific", "data__cache_dir": folder / "cache",
        "data__length": 16, "optimizer__warmup": 2, "model__network": "xs", "model__weighting_width": 8, **given,
    }  # fmt: skip
