"""Metrics as JSON lines: one object a line, `step`, `seconds` and the values."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError

Row = dict[str, Any]
LOST, LEAST = 1 / 20, 1 / 50


class MetricsWriter:
    """Appends rows to a JSON-lines file, and to TensorBoard on request.

    A context manager.

    Each row reaches the operating system before `write` returns, so that it outlives the process.

    Args:
        path: the file; created if needed.
        resume_step: rows of later steps, and a torn last line, are dropped, so that no step occurs twice.
        tensorboard: directory of TensorBoard events, or None.

    Raises:
        UserError: the file cannot be read or written, or tensorboardX is not installed.
    """

    def __init__(self, path: str | Path, resume_step: int = 0, tensorboard: Path | None = None):
        self._path = Path(path)
        self._mirror = None if tensorboard is None else _tensorboard(tensorboard, resume_step)
        rows = read_metrics(self._path) if self._path.exists() else []
        self.rows: list[Row] = [row for row in rows if row["step"] <= resume_step]
        """All rows that the file holds."""
        before = self._path.read_bytes() if self._path.exists() else b""
        text = "".join(_line(row) for row in self.rows)
        if text.encode() != before:
            write_atomically(self._path, text)
        try:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise UserError(f"Cannot write {self._path} ({error.strerror}): check the permissions there.") from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> Row:
        """Append one row and return it. Values that are not finite are written as null.

        Raises:
            ValueError: `step` is not larger than that of the row before.
            UserError: the file cannot be written, as on a full disk.
        """
        if self.rows and step <= self.rows[-1]["step"]:
            raise ValueError(f"the row of step {step} follows that of step {self.rows[-1]['step']}")
        row = {"step": int(step), "seconds": float(seconds), **{name: float(v) for name, v in values.items()}}
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left in the buffer fails again
                self._file.close()
            raise UserError(
                f"Cannot write {self._path} ({error.strerror}): check the free space there; the same command then continues."
            ) from error
        if self._mirror is not None:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._mirror.add_scalar(name, value, step)
        self.rows.append(row)
        return row

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def read_metrics(path: str | Path) -> list[Row]:
    """Read the rows of a metrics file.

    Null becomes NaN, and a torn last line is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is not a row.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"Cannot read the metrics file {path} ({error.strerror}): check the path.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"Line {number} of {path} is not a row of metrics: delete that line.")
    return rows


def even_intervals(rows: Sequence[Row], names: Collection[str]) -> list[Row]:
    """Average metrics over intervals of about equal length.

    They are means since the row before.

    A run that was stopped between two rows has a row for each part. A part shorter than half of the usual interval says little;
    it is joined with what follows, by the mean over the steps of both, and left out where nothing follows.

    Args:
        rows: rows of metrics, by ascending step.
        names: the metrics to keep. Values that are not finite are left out.

    Returns:
        Rows with `step` and those of the metrics that are known.
    """
    known = [{name: row[name] for name in names if math.isfinite(row.get(name, math.nan))} for row in rows]
    found = [(row["step"], values) for row, values in zip(rows, known, strict=True) if values]
    lengths = np.diff([0, *(step for step, _ in found)])
    shortest = np.median(lengths) / 2 if found else 0
    joined: list[Row] = []
    part: list[tuple[int, Row]] = []
    for (step, values), length in zip(found, lengths, strict=True):
        part.append((int(length), values))
        if 0 < sum(size for size, _ in part) >= shortest:
            joined.append({"step": step} | _mean_row(part))
            part = []
    return joined


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a number over the rows that have it; None if none has."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(known)) if known else None


def first_reaching(rows: Sequence[Row], name: str, value: float, *, lower_is_better: bool) -> Row | None:
    """Return the first row whose metric is at least as good as a value; None if there is none."""
    known = (row for row in rows if row.get(name) is not None)
    return next((row for row in known if (row[name] <= value if lower_is_better else row[name] >= value)), None)


def best_row(rows: Sequence[Row], name: str, *, lower_is_better: bool) -> Row:
    """Return the first row with the best value of a metric that all rows have."""
    return (min if lower_is_better else max)(rows, key=lambda row: row[name])


def best_before_the_end(rows: Sequence[Row], name: str, *, lower_is_better: bool) -> Row | None:
    """Return the best row of a run that was clearly better before its end; None for other runs.

    Such a run loses, after its best row, more than LOST of what it had gained, and more than LEAST of the best value.

    Args:
        rows: by ascending step; all have the metric.
        name: of the metric.
        lower_is_better: which values are good.
    """
    if not rows:
        return None
    best = best_row(rows, name, lower_is_better=lower_is_better)
    gained, lost = abs(best[name] - rows[0][name]), abs(best[name] - rows[-1][name])
    return best if lost > max(LOST * gained, LEAST * abs(best[name])) else None


def _mean_row(part: Sequence[tuple[int, Row]]) -> Row:
    known = {name: [(size, row[name]) for size, row in part if name in row] for _, values in part for name in values}
    return {name: sum(s * v for s, v in pairs) / sum(s for s, _ in pairs) for name, pairs in known.items()}


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {name: math.nan if value is None else value for name, value in row.items()}


def _line(row: Row) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tensorboard(directory: Path, resume_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "Writing TensorBoard events needs tensorboardX: run `pip install 'bilevel[tensorboard]'`."
        ) from error
    return SummaryWriter(str(directory), purge_step=resume_step + 1)


def narrowed(history: Sequence[Mapping[str, Any]], batch_size: int, advice: str) -> str | None:
    """Return a sentence on a run that came to draw from fewer rows than a batch has; None for others.

    Args:
      history: rows of metrics, in order; those without an effective sample size are left out.
      batch_size: b.
      advice: what mends it.
    """
    name = "effective_sample_size"
    rows = [row for row in history if row.get(name) is not None]
    first = next((row for row in rows if row[name] < batch_size), None)
    if first is None:
        return None
    return (
        f"by step {first['step']} the effective sample size of what rows are drawn from was {first[name]:.1f}, below the "
        f"{batch_size} of a batch, and at the end it was {rows[-1][name]:.1f}: {advice}."
    )
