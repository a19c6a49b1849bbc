"""What is known about the rows that a step trains on, as metrics: shares of wrong labels, of irrelevant rows, of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bilevel.selection.metrics import domain_shares
from bilevel.types import Array, Batch
from experiments.image_classification.data import SHOWN_CLASSES, ImageData


def observer(data: ImageData) -> Callable[[Batch, dict[str, Any]], dict[str, Array]]:
    """A function for `build.observed`. Rows count by their weights in the θ-update, where these differ.

    Its metrics are `corrupted_share` and `irrelevant_share`, if there are such rows, and `share/CLASS` for each true class.

    Reference: RHO-LOSS, figures 1 and 4 (right); DDS, figure 3.
    """
    marks = {}
    if data.marked("corrupted"):
        marks["corrupted_share"] = jnp.asarray(data.known("corrupted"))
    if data.marked("relevant"):
        marks["irrelevant_share"] = ~jnp.asarray(data.known("relevant"))
    labels = jnp.asarray(data.known("clean_label", "label"))

    def observe(big_batch: Batch, metrics: dict[str, Any]) -> dict[str, Array]:
        ids = big_batch["id"][metrics["selected"]]
        weights = metrics.get("weights", jnp.ones(ids.shape, jnp.float32))
        total = jnp.sum(weights)
        found = {name: jnp.sum(weights * mark[ids]) / total for name, mark in marks.items()}
        if data.classes <= SHOWN_CLASSES:
            shares = domain_shares(labels[ids], data.classes, weights)
            found |= {f"share/{name}": shares[i] for i, name in enumerate(data.class_names)}
        return found

    return observe


def shares_of(data: ImageData) -> dict[str, float]:
    """Share of each true class in the training set, for the report; {} with too many classes."""
    if data.classes > SHOWN_CLASSES:
        return {}
    labels = data.known("clean_label", "label")
    return {name: float((labels == i).mean()) for i, name in enumerate(data.class_names)}
