"""What is known about the rows that a run trains on: shares of domains, classes and faults, and how often each was drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.selection.metrics import domain_shares
from bilevel.study.task import Known, Splits
from bilevel.training import frequencies
from bilevel.training.frequencies import Classes
from bilevel.types import Array

SHOWN = 20
"""Labels with more values are not reported value by value."""
_AT_ONCE = 1 << 16


def observer(splits: Splits) -> Callable[[Any], Any] | None:
    """Return a wrapper for `TrainStep.map` that adds the shares among the rows of the θ-update; None if nothing is known.

    Rows count by their weights in the θ-update, where these differ. `share/FAULT` is the share of rows with a fault,
    `share/NAME` that of a domain or class. Rows without an id (mixed in, -1) are left out.

    Reference: RHO-LOSS, figures 1 (right) and 4 (right) of its first version; DDS, figure 3 (in its first version 2).
    """
    known = {name: k for name, k in splits.known.items() if k.fault or len(k.names) <= SHOWN}
    if not known:
        return None
    tables = {name: jnp.asarray(k.values, jnp.int32) for name, k in known.items()}

    def shares(ids: Array, weights: Array) -> dict[str, Array]:
        found = {}
        for name, k in known.items():
            each = domain_shares(tables[name][jnp.maximum(ids, 0)], 2 if k.fault else len(k.names), weights)
            of_value = {name: each[1]} if k.fault else dict(zip(k.names, each, strict=True))
            found |= {f"share/{label}": share for label, share in of_value.items()}
        return found

    def wrapper(function: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            state, metrics = function(*arguments)
            ids = metrics["ids"]
            weights = metrics.get("weights", jnp.ones(ids.shape, jnp.float32)) * (ids >= 0)
            return state, {**metrics, **shares(ids, weights)}

        return watched

    return wrapper


def shares_of(splits: Splits) -> dict[str, float]:
    """Return the share of each domain and class among all training rows, for the report."""
    known = [k for k in splits.known.values() if not k.fault and len(k.names) <= SHOWN]
    parts = np.array_split(np.arange(len(splits.train)), -(-len(splits.train) // _AT_ONCE)) if known else []
    ids = [splits.train.rows(part)["id"] for part in parts]
    values = [(k, k.values[np.concatenate(ids)]) for k in known]
    return {label: float((v == i).mean()) for k, v in values for i, label in enumerate(k.names)}


def faults(splits: Splits) -> dict[str, Known]:
    """Return the known faults by name."""
    return {name: known for name, known in splits.known.items() if known.fault}


def save_frequencies(
    directory: Path, sequence: NDArray[np.integer[Any]], splits: Splits, rewards: int = 0
) -> dict[str, float]:
    """Keep how often the rows of a sequence were drawn, with their classes and faults; see `bilevel.training.frequencies`."""
    known = next((known for known in splits.known.values() if not known.fault), None)
    classes = None if known is None else Classes(known.values, known.names)
    wrong = {name: fault.values == 1 for name, fault in faults(splits).items()}
    return frequencies.save_frequencies(directory, sequence, len(splits.train), classes, wrong, rewards)
