"""Logits of the rows of a data set by a weighting network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data import Dataset

Logits = tuple[NDArray[np.integer[Any]], NDArray[np.float64]]


def logits_of_rows(logits: Callable[..., Any], weights: Any, data: Dataset, *, batch_size: int, most: int) -> Logits:
    """Return ids and logits of rows, all or a part at even distances, in batches like those of training.

    A network with BatchNorm normalises by its batch, and learned on batches drawn at random: stored order may go class by class.

    Args:
        logits: the network: its parameters and a batch -> float32 `[b]`.
        weights: its parameters.
        data: the rows.
        batch_size: b.
        most: rows that are scored.
    """
    score, count = jax.jit(logits), min(len(data), most)
    places = np.arange(count) * len(data) // count
    order, values, ids = np.random.default_rng(0).permutation(count), np.empty(count), np.empty(count, np.int64)
    for start in range(0, count, batch_size):
        rows = order[np.arange(start, start + batch_size) % count]  # the first rows fill the last batch
        batch, keep = data.rows(places[rows]), min(batch_size, count - start)
        values[rows[:keep]] = np.asarray(score(weights, batch), np.float64)[:keep]
        ids[rows[:keep]] = batch["id"][:keep]
    return ids, values


def extremes(
    ids: NDArray[np.integer[Any]], logits: NDArray[np.floating[Any]], most: int
) -> dict[str, list[list[int | float]]]:
    """Return [id, logit] of the rows with the highest and with the lowest logits, at most half of all rows each.

    Args:
        ids: `[n]`.
        logits: `[n]`.
        most: rows of either kind.
    """
    order = np.argsort(-logits, kind="stable")
    count = min(most, len(order) // 2)
    chosen = {"highest": order[:count], "lowest": order[::-1][:count]}
    return {name: [[int(ids[i]), float(logits[i])] for i in rows] for name, rows in chosen.items()}
