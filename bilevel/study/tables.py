"""Tables of runs: one line a method, mean ± standard deviation over seeds, or one line a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"
"""The cell of a number that is not known."""


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    digits: int = 0
    """After the decimal point."""


class Table(NamedTuple):
    """A table of texts; `str` gives it as Markdown, without a line end after it."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def __str__(self) -> str:
        rows = [self.head, ["---"] * len(self.head), *self.lines]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def by_method(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], first: str = "method") -> Table:
    """Return the table of some results by method; columns that no result has are omitted.

    Args:
        rows: results with `method`, in the order in which methods are shown, and numbers by name (None or NaN: not known). A
            row without any of the numbers is a run that has no result: the mean is over the others, and the seeds are "2 of 3".
        columns: name of a number -> its column. Where a seed lacks the number, a dash stands for all.
        first: head of the first column.
    """
    shown = _known(rows, columns)
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        ended = [row for row in own if any(row.get(name) is not None for name in shown)]
        seeds = str(len(own)) if len(ended) == len(own) else f"{len(ended)} of {len(own)}"
        cells = [mean_cell([row.get(name) for row in ended], column.digits) for name, column in shown.items()]
        lines.append([method, seeds, *cells])
    return Table([first, "seeds", *(column.title for column in shown.values())], lines)


def by_run(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """Return the table of the same results run by run."""
    shown = _known(rows, columns)
    cells = [[mean_cell([row.get(name)], column.digits) for name, column in shown.items()] for row in rows]
    lines = [[row["method"], str(row["seed"]), *own] for row, own in zip(rows, cells, strict=True)]
    return Table(["method", "seed", *(column.title for column in shown.values())], lines)


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


def _known(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: column for name, column in columns.items() if any(name in row for row in rows)}
