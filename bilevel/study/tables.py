"""Tables of runs: one line a method, mean ± standard deviation over seeds, or one line a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bilevel.training.tables import Table, mean_cell


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    digits: int = 0
    """After the decimal point."""


def by_method(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """Return the table of some results by method; columns that no result has are omitted.

    Args:
        rows: results with `method`, in the order in which methods are shown, and numbers by name (None or NaN: not known). A
            row without any of the numbers is a run that has no result: the mean is over the others, and the seeds are "2 of 3".
        columns: name of a number -> its column. Where a seed lacks the number, a dash stands for all.
    """
    shown = _known(rows, columns)
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        ended = [row for row in own if any(row.get(name) is not None for name in shown)]
        seeds = str(len(own)) if len(ended) == len(own) else f"{len(ended)} of {len(own)}"
        lines.append([method, seeds, *_cells(ended, shown)])
    return Table(["method", "seeds", *(column.title for column in shown.values())], lines)


def by_run(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> Table:
    """Return the table of the same results run by run."""
    shown = _known(rows, columns)
    lines = [[row["method"], str(row["seed"]), *_cells([row], shown)] for row in rows]
    return Table(["method", "seed", *(column.title for column in shown.values())], lines)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> list[str]:
    """The mean of each number over some results."""
    return [mean_cell([row.get(name) for row in rows], column.digits) for name, column in columns.items()]


def _known(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: column for name, column in columns.items() if any(name in row for row in rows)}
