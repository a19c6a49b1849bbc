"""Tables of comparisons in Markdown and CSV: one line a method, mean ± standard deviation over seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"
"""The cell of a number that is not known."""


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    digits: int = 0
    """After the decimal point."""


def by_method(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], first: str = "method") -> str:
    """Return the Markdown table of some results; columns that no result has are omitted.

    Args:
        rows: results with `method`, in the order in which methods are shown, and numbers by name (None or NaN: not known). A
            row without any of the numbers is a run that has no result: the mean is over the others, and the seeds are "2 of 3".
        columns: name of a number -> its column. Where a seed lacks the number, a dash stands for all.
        first: head of the first column.
    """
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        ended = [row for row in own if any(row.get(name) is not None for name in shown)]
        cells = [mean_cell([row.get(name) for row in ended], columns[name].digits) for name in shown]
        seeds = str(len(own)) if len(ended) == len(own) else f"{len(ended)} of {len(own)}"
        lines.append([method, seeds, *cells])
    return markdown([first, "seeds", *(columns[name].title for name in shown)], lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, without a line end after it."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in rows)


def csv_text(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return the text of a CSV file; None gives an empty cell."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *lines])
    return file.getvalue()


def mean_cell(values: Sequence[Any], digits: int) -> str:
    """Return mean ± standard deviation of some numbers; a dash if one is not known."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    if len(known) < len(values) or not known:
        return NOTHING
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"


def cell(value: Any) -> str:
    """Return the text of a value; real numbers get four digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def summary_cell(values: Sequence[Any]) -> str:
    """Return mean ± standard deviation of the known values, and of how many; other things than numbers are listed."""
    known = [value for value in values if value is not None and not (_number(value) and math.isnan(value))]
    if not known or not all(map(_number, known)):
        return ", ".join(dict.fromkeys(map(cell, known))) or NOTHING
    some = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    if len(set(known)) == 1:
        return cell(known[0]) + some
    return f"{float(np.mean(known)):.4g} ± {float(np.std(known, ddof=1)):.2g}{some}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
