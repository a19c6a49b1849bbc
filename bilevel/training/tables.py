"""Tables of texts, as Markdown, and numbers in their cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"
"""The cell of a number that is not known."""


class Table(NamedTuple):
    """A table of texts; `str` gives it as Markdown, without a line end after it."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        rows = [self.head, ["---"] * len(self.head), *self.lines]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def mean_cell(values: Sequence[Any], digits: int) -> str:
    """Return mean ± standard deviation of some numbers; a dash if one is not known."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    if len(known) < len(values) or not known:
        return NOTHING
    return plus_minus(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, digits)


def plus_minus(mean: float, std: float | None, digits: int) -> str:
    """Return mean ± standard deviation; the mean alone if the deviation is None or NaN, as of one seed."""
    spread = "" if std is None or math.isnan(std) else f" ± {std:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"
