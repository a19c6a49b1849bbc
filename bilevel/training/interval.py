"""The metrics of the steps since the last row: kept on the devices, fetched at once, averaged."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SELECTED = "selected"


class Interval:
    """Collects what the calls return without waiting for it.

    Args:
        with_selected: also keep which rows were trained on.
    """

    def __init__(self, with_selected: bool):
        self._with_selected = with_selected
        self._metrics: list[dict[str, Any]] = []
        self._counts: list[int] = []
        self._selected: list[tuple[Any, Any]] = []
        self._begin = 0

    def add(self, step: int, metrics: Mapping[str, Any], ids: Any, count: int | None = None) -> None:
        """Add the metrics of one call.

        Args:
            step: number of its (first) step, counted from 1.
            metrics: device arrays: scalars, and `selected`, int32 `[b]` (positions in the big batch).
            ids: int32 `[B]`, the row ids of the big batch, or None.
            count: the number of steps if metrics and `ids` have a leading axis for them. That of the metrics may be
                longer: what is beyond `count` does not count.
        """
        if not self._metrics:
            self._begin = step
        rank = 0 if count is None else 1
        self._metrics.append(
            {name: value for name, value in metrics.items() if value.ndim == rank and name != SELECTED}
        )
        self._counts.append(count or 1)
        if self._with_selected and SELECTED in metrics and ids is not None:
            self._selected.append((ids, metrics[SELECTED]))

    def bound(self, ahead: int) -> None:
        """Wait until at most `ahead` of the calls have not been computed."""
        if len(self._metrics) > ahead:
            jax.block_until_ready(self._metrics[-1 - ahead])

    def take(self) -> Fetched:
        """Fetch all that was collected, and begin anew. Waits for the last step."""
        metrics = jax.device_get(self._metrics)
        names = dict.fromkeys(name for call in metrics for name in call)
        columns = {name: self._column([call.get(name, np.nan) for call in metrics]) for name in names}
        ids = [_chosen(*pair) for pair in _on_host(self._selected)]
        self._metrics, self._counts, self._selected = [], [], []
        return Fetched(self._begin, columns, np.concatenate(ids) if ids else None)

    def _column(self, values: list[Any]) -> np.ndarray:
        """The values of one metric, one for each step."""
        calls = zip(values, self._counts, strict=True)
        steps = chain.from_iterable(value[:n] if np.ndim(value) else repeat(value, n) for value, n in calls)
        return np.asarray(list(steps), dtype=np.float64)


class Fetched:
    """The metrics of some consecutive steps on the host.

    Args:
        begin: number of the first step, counted from 1.
        columns: `{name: float64 [steps]}`.
        selected_ids: int32 `[steps * b]`, the rows trained on, or None.
    """

    def __init__(self, begin: int, columns: dict[str, np.ndarray], selected_ids: np.ndarray | None):
        self.begin = begin
        self.columns = columns
        self.selected_ids = selected_ids

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the steps where it is not NaN."""
        return {name: _nan_mean(column) for name, column in self.columns.items()}

    def first_bad(self, name: str) -> tuple[int, float] | None:
        """Return the first step at which the metric is not finite, and its value there."""
        bad = np.flatnonzero(~np.isfinite(self.columns.get(name, np.zeros(0))))
        return (self.begin + int(bad[0]), float(self.columns[name][bad[0]])) if bad.size else None


def _nan_mean(column: np.ndarray) -> float:
    known = column[~np.isnan(column)]
    return float(known.mean()) if known.size else float("nan")


def _chosen(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The ids at the positions: of one step, or of the steps of one call."""
    return np.take_along_axis(ids, positions[: len(ids)] if ids.ndim == 2 else positions, axis=-1).reshape(-1)


def _on_host(tree: Any) -> Any:
    """Fetch arrays, also those that are spread over processes."""

    def whole(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(whole, tree))
