"""Rows and batches for `acceleration_rates`, of which no row is in a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from bilevel.data import Dataset, Loader, RowView, permute, rows_hash
from bilevel.types import Batch, UserError

BATCH_ROWS = 128
"""Rows of a batch in the paper."""
_PARTS = 8  # rows and batches are evaluated in this many parts where it divides them: less memory, and on CPU less time


class ComparedRows(NamedTuple):
    """What `acceleration_rates` takes after the model."""

    specific_rows: Batch
    """`[m, …]`."""
    generic_rows: Batch
    specific_batches: Batch
    """`[P, b, …]`."""
    generic_batches: Batch


def draw_compared(
    specific: tuple[Dataset, Dataset],
    generic: tuple[Dataset, Dataset],
    *,
    rows: int,
    pairs: int,
    batch_rows: int | None = None,
    seed: int = 0,
) -> tuple[ComparedRows, int, str]:
    """Draw rows of two kinds, and pairs of batches of other rows of the same kinds.

    Args:
        specific: what rows are drawn from, and what batches are drawn from; they may be the same.
        generic: the same.
        rows: m, most rows of each kind.
        pairs: P.
        batch_rows: b; None: 128, as in the paper, or half of the rows that there are.
        seed: decides which rows are drawn.

    Returns:
        The rows and batches, `micro_batches` for `acceleration_rates`, and their numbers in words.

    Raises:
        UserError: for data too small for the batches.
    """
    sides = [_apart(*kind, rows, seed) for kind in (specific, generic)]
    smaller = min((others for _, others in sides), key=len)
    size = batch_rows or min(BATCH_ROWS, max(1, len(smaller) // 2))
    if size > len(smaller):
        raise UserError(
            f"--batch-rows {size}: only {len(smaller)} rows of {smaller.name} are left to draw batches from; give at most "
            f"{len(smaller)}."
        )
    parts = math.gcd(_PARTS, size)
    parts = parts if min(len(compared) for compared, _ in sides) >= parts else 1
    counts = [len(compared) // parts * parts for compared, _ in sides]
    found = [compared.rows(np.arange(n)) for (compared, _), n in zip(sides, counts, strict=True)]
    batches = [[Loader(others, size, seed=seed).batch(i) for i in range(pairs)] for _, others in sides]
    about = f"{counts[0]} specific and {counts[1]} generic rows, {pairs} pairs of batches of {size} other rows"
    return ComparedRows(*found, *(jax.tree.map(lambda *x: np.stack(x), *own) for own in batches)), parts, about


def _apart(compared: Dataset, trained: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """The rows that are compared, and the rows that batches are drawn from: never the same ones."""
    size, same = len(compared), rows_hash(compared) == rows_hash(trained)
    count = min(count, size // 2 if same else size)
    order = permute(np.arange(size if same else count), size, seed, 0)
    return RowView(compared, order[:count]), RowView(compared, order[count:]) if same else trained
