"""What is known about rows, domains, classes and faults, and their shares among rows that are trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset
from bilevel.data.streams import NO_FAULT, RowLabels
from bilevel.selection.metrics import domain_shares
from bilevel.types import Array, UserError

SHOWN = 20
"""Labels with more values are not reported value by value."""
_AT_ONCE = 1 << 16


class Known(NamedTuple):
    """What is known about each generic row, for analysis alone unless it is `taught`."""

    values: NDArray[np.integer[Any]]
    """Integer `[N]`, by the `id` of a row."""
    names: tuple[str, ...]
    """Of the values 0, 1, …; ("right", "wrong") for a fault, whose value is −1 where it is not known."""
    fault: bool = False
    """Whether value 1 marks a fault that good weights avoid."""
    taught: bool = False
    """Whether methods may learn from it, as people found it out of the data at hand; a fault then."""


def observer(known: Mapping[str, Known]) -> Callable[[Any], Any] | None:
    """Return a wrapper for `TrainStep.map` that adds the shares among the rows of the θ-update; None if nothing is known.

    Rows count by their weights in the θ-update, where these differ. `share/FAULT` is the share of rows with a fault,
    `share/NAME` that of a domain or class. Rows without an id (mixed in, -1) are left out.

    Reference: RHO-LOSS, figures 1 (right) and 4 (right) of its first version; DDS, figure 3 (in its first version 2).
    """
    shown = {name: k for name, k in known.items() if k.fault or len(k.names) <= SHOWN}
    if not shown:
        return None
    tables = {name: jnp.asarray(k.values, jnp.int32) for name, k in shown.items()}

    def shares(ids: Array, weights: Array) -> dict[str, Array]:
        found = {}
        for name, k in shown.items():
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


def shares_of(known: Mapping[str, Known], data: Dataset) -> dict[str, float]:
    """Return the share of each domain and class among all rows of a data set."""
    shown = [k for k in known.values() if not k.fault and len(k.names) <= SHOWN]
    parts = np.array_split(np.arange(len(data)), -(-len(data) // _AT_ONCE)) if shown else []
    ids = [data.rows(part)["id"] for part in parts]
    values = [(k, k.values[np.concatenate(ids)]) for k in shown]
    return {label: float((v == i).mean()) for k, v in values for i, label in enumerate(k.names)}


def known_labels(labels: Mapping[str, RowLabels], *, taught: bool = False) -> dict[str, Known]:
    """Return what the labels of rows say: the domain, whether there is a fault, and each fault for itself.

    Args:
      labels: by what they say, "domain" and "fault".
      taught: whether methods may learn from the faults.

    Raises:
      UserError: they may, and faults are not known.
    """
    known, fault = {}, labels.get("fault")
    if taught and fault is None:
        raise UserError(
            "--data.known-faults needs the fault of each generic row: give a table with two columns as --data.generic-labels."
        )
    if "domain" in labels:
        values, names = labels["domain"]
        known["domain"] = Known(np.asarray(values), names)
    if fault is not None:
        kinds = [name for name in fault.names if name != NO_FAULT]
        right = fault.names.index(NO_FAULT) if NO_FAULT in fault.names else -1
        wrong = np.asarray(fault.values != right, np.int8)
        known["fault"] = Known(wrong, ("right", "wrong"), fault=True, taught=taught)
        for kind in kinds if len(kinds) > 1 else ():
            of_kind = np.asarray(fault.values == fault.names.index(kind), np.int8)
            known[kind] = Known(of_kind, ("other", kind), fault=True)
    return known


def faults(known: Mapping[str, Known]) -> dict[str, Known]:
    """Return the faults alone, by name."""
    return {name: k for name, k in known.items() if k.fault}
