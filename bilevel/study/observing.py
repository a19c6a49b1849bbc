"""What is known about the rows that a step trains on, as metrics: shares of each domain, of wrong labels, of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel.selection.metrics import domain_shares
from bilevel.study.task import Known, Splits

SHOWN = 20
"""Labels with more values are not reported value by value."""


def observer(splits: Splits) -> Callable[[Any], Any] | None:
    """Return a wrapper for `TrainStep.map` that adds the shares among the rows of the θ-update; None if nothing is known.

    Rows count by their weights in the θ-update, where these differ. `share/FAULT` is the share of rows with a fault,
    `share/NAME` that of a domain or class. Rows without an id (mixed in, -1) are left out.

    Reference: RHO-LOSS, figures 1 and 4 (right); DDS, figure 3.
    """
    known = {name: k for name, k in splits.known.items() if k.fault or len(k.names) <= SHOWN}
    if not known:
        return None
    tables = {name: jnp.asarray(k.values, jnp.int32) for name, k in known.items()}

    def observe(metrics: dict[str, Any]) -> dict[str, Any]:
        ids = metrics["ids"]
        weights = metrics.get("weights", jnp.ones(ids.shape, jnp.float32)) * (ids >= 0)
        total = jnp.maximum(jnp.sum(weights), 1e-30)
        found: dict[str, Any] = {}
        for name, k in known.items():
            values = tables[name][jnp.maximum(ids, 0)]
            if k.fault:
                found[f"share/{name}"] = jnp.sum(weights * (values == 1)) / total
            else:
                shares = domain_shares(values, len(k.names), weights)
                found |= {f"share/{label}": shares[i] for i, label in enumerate(k.names)}
        return found

    def wrapper(function: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            state, metrics = function(*arguments)
            return state, {**metrics, **observe(metrics)}

        return watched

    return wrapper


def shares_of(splits: Splits) -> dict[str, float]:
    """Return the share of each domain and class among all training rows, for the report."""
    ids = (
        np.concatenate([splits.train.rows(part)["id"] for part in _parts(len(splits.train))]) if splits.known else None
    )
    found: dict[str, float] = {}
    for k in splits.known.values():
        if not k.fault and len(k.names) <= SHOWN:
            values = k.values[ids]
            found |= {label: float((values == i).mean()) for i, label in enumerate(k.names)}
    return found


def _parts(count: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + (1 << 16), count)) for start in range(0, count, 1 << 16)]


def faults(splits: Splits) -> dict[str, Known]:
    """Return the known faults by name."""
    return {name: known for name, known in splits.known.items() if known.fault}
