"""Markdown tables of comparisons: one line a method, mean ± standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = "–"


class Column(NamedTuple):
    """One column."""

    title: str
    digits: int = 0
    """After the decimal point."""


def by_method(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], first: str = "method") -> str:
    """The table of some results; columns that no result has are left out.

    Args:
      rows: results with `method`, in the order in which methods are shown, and numbers by name (None or NaN: not known). A row
        without any of the numbers is a run that has no result: the mean is over the others, and the seeds are "2 of 3".
      columns: name of a number -> its column. Where a seed lacks the number, a dash stands for all.
      first: head of the first column.
    """
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [f"| {first} | seeds | " + " | ".join(columns[name].title for name in shown) + " |"]
    lines.append("|" + " --- |" * (len(shown) + 2))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        ended = [row for row in own if any(row.get(name) is not None for name in shown)]
        cells = [mean_cell([row.get(name) for row in ended], columns[name].digits) for name in shown]
        seeds = str(len(own)) if len(ended) == len(own) else f"{len(ended)} of {len(own)}"
        lines.append(f"| {method} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_cell(values: Sequence[Any], digits: int) -> str:
    """Mean ± standard deviation of some numbers; a dash if one is not known."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    if len(known) < len(values) or not known:
        return NOTHING
    mean = f"{np.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.{digits}f}"
