"""Irreducible losses: a model trained on held-out data scores every example.

    table = score_rows(loss, params, model_state, dataset, batch_size=512, settings={"model": "lenet", "seed": 0})
    table.save("il.safetensors")
    table = LossTable.load("il.safetensors", content_hash=dataset.content_hash, settings={"model": "lenet", "seed": 0})
    state = train.init(rng, params, table.params(), model_state)     # scoring.rho_loss; for as many targets as wanted

Without held-out data, two models trained on one half of the data each score the other half: see `half` and `cross_scored`.

Reference: Mindermann et al., RHO-LOSS, ICML 2022; here algorithm 1 and section 5.3 of its first version (RHOLS).
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset
from bilevel.data.loading.views import RowView
from bilevel.offline.loss_table import LossTable as LossTable
from bilevel.offline.loss_table import Settings, combine
from bilevel.types import Array, Batch, LossFn, Metrics, ModelState, Params, UserError

ReadFn: TypeAlias = Callable[[Array, Metrics, Batch], Array]
"""Losses `[b]`, the loss's metrics and the batch -> one number a row, `[b]`."""
OnBatch: TypeAlias = Callable[[int, int], None]
"""Rows scored so far, and in all."""


class ScoringClock:
    """Estimates the seconds of scoring from all batches but the first, which compiles; an `on_batch` of `score_rows`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, count: int) -> None:
        """Count the rows that are scored."""
        now = perf_counter()
        if self._first is None:
            self._first = done, now
        else:
            rows, began = self._first
            self.seconds = (now - began) * done / max(done - rows, 1)


def _losses(losses: Array, metrics: Metrics, batch: Batch) -> Array:
    return losses


def score_rows(
    loss: LossFn,
    params: Params,
    model_state: ModelState,
    dataset: Dataset,
    *,
    batch_size: int,
    settings: Settings,
    num_examples: int | None = None,
    read: ReadFn = _losses,
    on_batch: OnBatch | None = None,
) -> LossTable:
    """Compute the losses of all rows of a data set under one model.

    In equal batches, the last one padded.

    Args:
      loss: per-example losses. In evaluation mode: a row's number must not depend on the rows beside it, or on chance.
      params: of the trained model.
      model_state: of the trained model.
      dataset: rows with `id`, int32 `[b]`; a `RowView` scores a part of the whole.
      batch_size: rows evaluated at once.
      settings: kept with the numbers; see `Settings`.
      num_examples: N; None takes the rows of the data set, or those of the whole for a `RowView`.
      read: what is kept of an evaluation: losses `[b]`, the loss's metrics and the batch -> `[b]`; by default the losses. For
        maximum-entropy selection: `lambda losses, metrics, batch: scoring.entropies(metrics["logits"])`.
      on_batch: called after each batch with the rows scored so far, and their number in all: for a progress bar, or a clock
        (the first batch compiles).

    Returns:
      float32 `[N]`, NaN for examples that are not in the data set, with the data set's hash.

    Raises:
      UserError: a batch size below 1, an id outside 0..N−1, or a number that is not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    size = len(unwrapped(dataset)[0]) if num_examples is None else num_examples
    table = np.full(size, np.nan, np.float32)

    @jax.jit
    def evaluate(params: Params, model_state: ModelState, batch: Batch) -> Array:
        losses, aux = loss(params, model_state, batch, jax.random.key(0))
        return read(losses, aux.metrics, batch)

    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch repeats the last row, so that one program serves all.
        batch = dataset.rows(np.minimum(rows, len(dataset) - 1))
        ids = batch["id"]
        if ids.min() < 0 or ids.max() >= len(table):
            raise UserError(
                f"{dataset.name}: the example ids reach from {ids.min()} to {ids.max()}, outside 0 to {len(table) - 1}: "
                "give num_examples."
            )
        found = np.asarray(evaluate(params, model_state, batch), np.float32)
        if not np.isfinite(found).all():
            bad = int(np.flatnonzero(~np.isfinite(found))[0])
            raise UserError(
                f"{dataset.name}: the loss of example {ids[bad]} is {found[bad]}: check the model that scores it."
            )
        table[ids] = found
        if on_batch is not None:
            on_batch(min(start + batch_size, len(dataset)), len(dataset))
    return LossTable(table, dataset.content_hash, dict(settings))


def half_of(ids: NDArray[np.integer[Any]], seed: int = 0) -> NDArray[np.int8]:
    """Assign each example to half 0 or 1, `[n]` -> int8 `[n]`.

    A pure function of its id and the seed.

    One bit of the splitmix64 hash of (id, seed): halves of N examples differ in size by about √N.
    """
    x = np.asarray(ids).astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(2**32)
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(63)).astype(np.int8)


def half(dataset: Dataset, which: int, seed: int = 0) -> RowView:
    """Take one half of a data set, to train a model on.

    These are the rows with `half_of(id) == which`.

    Raises:
      UserError: for another number, or a half without rows.
    """
    if which not in (0, 1):
        raise UserError(f"half(which={which}) must be 0 or 1.")
    whole, positions = unwrapped(dataset)
    found = positions[half_of(positions, seed) == which]
    if not len(found):
        raise UserError(
            f"{dataset.name}: half {which} of {len(dataset)} rows is empty with seed={seed}: give more rows."
        )
    return RowView(whole, found)


def cross_scored(
    loss: LossFn,
    models: tuple[tuple[Params, ModelState], tuple[Params, ModelState]],
    dataset: Dataset,
    *,
    batch_size: int,
    settings: Settings,
    seed: int = 0,
    read: ReadFn = _losses,
    on_batch: OnBatch | None = None,
) -> LossTable:
    """Score each half of the rows by the model trained on the other half.

    These are irreducible losses without held-out data.

    Args:
      loss: see `score_rows`, like `batch_size`, `settings` and `read`.
      models: (params, model_state) of the model trained on `half(dataset, 0, seed)`, and of that on `half(dataset, 1, seed)`.
      dataset: the whole.
      batch_size: see there.
      settings: see there; the seed is added as `half_seed`.
      seed: that of the halves.
      read: see there.
      on_batch: see there; the rows of both halves count.

    Reference: RHO-LOSS, section 5.3 ("do not require any holdout data").
    """
    size = len(unwrapped(dataset)[0])
    parts = [half(dataset, which, seed) for which in (0, 1)]
    tables = []
    for which, before in ((0, 0), (1, len(parts[0]))):
        told = None if on_batch is None else lambda done, _, before=before: on_batch(before + done, len(dataset))
        tables.append(
            score_rows(
                loss, *models[1 - which], parts[which], batch_size=batch_size, num_examples=size,
                settings={**settings, "half_seed": seed}, read=read, on_batch=told,
            )
        )  # fmt: skip
    return combine(*tables)


def unwrapped(dataset: Dataset) -> tuple[Dataset, NDArray[np.integer[Any]]]:
    """Return the whole that a data set is a view of, and the rows of it: their numbers are the examples' ids."""
    positions = np.arange(len(dataset))
    while isinstance(dataset, RowView):
        dataset, positions = dataset.dataset, dataset.positions[positions]
    return dataset, positions
