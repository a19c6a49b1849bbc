"""The metrics of the steps since the last row: fetched at once, averaged."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel.types import NOT_COMPUTED

IDS = "ids"
BAD_ROW = "bad_logit_row"
"""A number of a row, which has no mean."""


class Interval:
    """Collects what the calls return without waiting for it.

    Args:
        with_ids: also keep which rows were trained on.
    """

    def __init__(self, with_ids: bool):
        self._with_ids = with_ids
        self._metrics: list[dict[str, Any]] = []
        self._counts: list[int] = []
        self._ids: list[tuple[int | None, Any]] = []
        self._begin = 0

    def add(self, step: int, metrics: Mapping[str, Any], count: int | None = None) -> None:
        """Add the metrics of one call.

        Args:
            step: number of its (first) step, counted from 1.
            metrics: device arrays: scalars, and `ids`, int32 `[b]`: the rows trained on. Others are left out.
            count: the number of steps if the metrics have a leading axis for them. It may be longer: what is beyond `count`
                does not count.
        """
        if not self._metrics:
            self._begin = step
        rank = 0 if count is None else 1
        self._metrics.append({name: value for name, value in metrics.items() if value.ndim == rank})
        self._counts.append(count or 1)
        if self._with_ids and IDS in metrics:
            self._ids.append((count, metrics[IDS]))

    def bound(self, ahead: int) -> None:
        """Wait until at most `ahead` of the calls have not been computed."""
        if len(self._metrics) > ahead:
            jax.block_until_ready(self._metrics[-1 - ahead])

    def take(self) -> Fetched:
        """Fetch all that was collected, and begin anew. Waits for the last step."""
        metrics = jax.device_get(self._metrics)
        names = dict.fromkeys(name for call in metrics for name in call)
        columns = {name: self._column([call.get(name, np.nan) for call in metrics]) for name in names}
        counts, rows = [count for count, _ in self._ids], _on_host([ids for _, ids in self._ids])
        ids = [found[:count].reshape(-1) for count, found in zip(counts, rows, strict=True)]
        self._metrics, self._counts, self._ids = [], [], []
        return Fetched(self._begin, columns, np.concatenate(ids) if ids else None)

    def _column(self, values: list[Any]) -> np.ndarray:
        """List the values of one metric, one for each step."""
        calls = zip(values, self._counts, strict=True)
        steps = chain.from_iterable(value[:n] if np.ndim(value) else repeat(value, n) for value, n in calls)
        return np.asarray(list(steps), dtype=np.float64)


class Fault(NamedTuple):
    """What was not finite, though training went on."""

    step: int
    """The first such step, counted from 1."""
    what: str
    """What it was, in words; a clause that ends in "at step N"."""
    advice: str
    """Where to look."""


class Fetched:
    """The metrics of some consecutive steps on the host.

    Args:
        begin: number of the first step, counted from 1.
        columns: `{name: float64 [steps]}`.
        ids: int32 `[steps * b]`, the rows trained on, or None.
    """

    def __init__(self, begin: int, columns: dict[str, np.ndarray], ids: np.ndarray | None):
        self.begin = begin
        self.columns = columns
        self.ids = ids

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the steps that computed it: where it is neither NaN nor NOT_COMPUTED."""
        return {name: _known_mean(column) for name, column in self.columns.items() if name != BAD_ROW}

    def first_bad(self, name: str) -> tuple[int, float] | None:
        """Return the first step at which the metric is not finite, and its value there.

        One without any row left has no loss, which is nothing bad.
        """
        column = self.columns.get(name, np.zeros(0))
        no_row = (column == NOT_COMPUTED) & (self.columns.get("rows_left_out", np.zeros_like(column)) > 0)
        bad = np.flatnonzero(~np.isfinite(column) & ~no_row)
        return (self.begin + int(bad[0]), float(self.columns[name][bad[0]])) if bad.size else None

    def first_fault(self) -> Fault | None:
        """Return the first step that went on without something, as it was not finite: an α-step, or the logit of a row."""
        faults = (self._bad_logit(), self._skipped_alpha())
        return min((fault for fault in faults if fault is not None), key=lambda fault: fault.step, default=None)

    def first_left_out(self) -> int | None:
        """Return the first step that left rows out of its θ-update, as they are used up."""
        found = np.flatnonzero(self.columns.get("rows_left_out", np.zeros(0)) > 0)
        return self.begin + int(found[0]) if found.size else None

    def silent(self) -> tuple[int, int]:
        """Return the number of α-steps, and that of those among them whose alignments were all 0."""
        rms = self.columns.get("alignment_rms", np.zeros(0))
        known = rms[~np.isnan(rms) & (rms != NOT_COMPUTED)]
        return known.size, int(np.sum(known == 0))

    def _bad_logit(self) -> Fault | None:
        found = np.flatnonzero(self.columns.get("bad_logits", np.zeros(0)) > 0)
        if not found.size:
            return None
        at = int(found[0])
        row, count = int(self.columns[BAD_ROW][at]), int(self.columns["bad_logits"][at])
        more = f" (and {count - 1} more)" if count > 1 else ""
        step = self.begin + at
        what = f"The logit of row {row} of the big batch{more} is not finite at step {step}"
        return Fault(step, what, "look at that row's inputs of the weighting network or scorer")

    def _skipped_alpha(self) -> Fault | None:
        found = np.flatnonzero(self.columns.get("alpha_skipped", np.zeros(0)) == 1)
        if not found.size:
            return None
        at = int(found[0])
        named = ((what, advice) for name, what, advice in _OF_ALPHA if _is_bad(self.columns.get(name), at))
        what, advice = next(named, _OTHER)
        return Fault(self.begin + at, f"{what} is not finite at step {self.begin + at}", advice)


_OF_ALPHA = (
    ("specific_loss", "The specific loss, or its gradient,", "look at the specific rows and the loss on them"),
    (
        "alignment_rms",
        "The probe, or the alignment of a row with it,",
        "look at θ's optimizer and the method's settings",
    ),
    ("weight_gradient_norm", "The gradient of α", "look at the weighting network and its inputs"),
)
"""Metric of an α-step, what is wrong where it is not finite, and where to look; in the order of their computation."""
_OTHER = ("What an α-step would make of α or of the method's state", "lower the learning rates of α and of the method")


def _is_bad(column: np.ndarray | None, at: int) -> bool:
    return column is not None and bool(np.isnan(column[at]) or column[at] == np.inf)


def _known_mean(column: np.ndarray) -> float:
    known = column[~np.isnan(column) & (column != NOT_COMPUTED)]
    return float(known.mean()) if known.size else float("nan")


def _on_host(tree: Any) -> Any:
    """Fetch arrays, also those that are spread over processes."""

    def whole(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(whole, tree))
