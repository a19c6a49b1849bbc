"""What is known about the rows that a run trains on: shares of domains, classes and faults, and how often each was drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel import samplers
from bilevel.files import save_tree
from bilevel.samplers.chart import draw_frequencies
from bilevel.selection.metrics import domain_shares
from bilevel.study.task import Known, Splits
from bilevel.training.run_dir import write_atomically, write_json
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
        found, total = {}, jnp.maximum(jnp.sum(weights), 1e-30)
        for name, k in known.items():
            values = tables[name][jnp.maximum(ids, 0)]
            if k.fault:
                found[f"share/{name}"] = jnp.sum(weights * (values == 1)) / total
            else:
                each = domain_shares(values, len(k.names), weights)
                found |= {f"share/{label}": each[i] for i, label in enumerate(k.names)}
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
    """Count the rows and classes of a sequence `[steps, b]`, and keep what figure 3 (a, b) shows: counts, their spread, a plot.

    Beside these stands how many rewards there were for each row, as all that a sampler can know of rows lies in them.

    Args:
      directory: where the files go.
      sequence: the rows of each step.
      splits: the data.
      rewards: that the sampler was given; 0 for one that did not learn.

    Returns:
      `NAME_often` and `NAME_rarely`, the shares of rows with each known fault among the tenth drawn most and least often, and
      `spread`, the variance of the counts over their mean: 1 by chance, 0 for whole epochs.

    Reference: RLSampler, section 6.2 and figure 3; the line by chance is ours.
    """
    drawn = samplers.row_counts(sequence, len(splits.train))
    counts = np.asarray(drawn)
    # As many draws, each from all rows alike, with replacement: what no preference looks like.
    by_chance = np.random.default_rng(0).multinomial(counts.sum(), np.full(len(counts), 1 / len(counts)))
    found: dict[str, Any] = {
        "draws": int(counts.sum()),
        "rows": {**_spread(counts), "never_drawn": float((counts == 0).mean())},
        "rows_by_chance": _spread(by_chance),
        "rewards": {"all": rewards, "a_row": rewards / len(counts)},
    }
    trees = {"counts": counts}
    known = next((known for known in splits.known.values() if not known.fault), None)
    if known is not None:
        classes = np.asarray(samplers.class_counts(drawn, known.values, len(known.names)))
        found["classes"] = {**_spread(classes), "counts": dict(zip(known.names, classes.tolist(), strict=True))}
        trees["class_counts"] = classes
        each = classes / np.maximum(np.bincount(known.values.astype(int), minlength=len(known.names)), 1)
        names = known.names if len(classes) <= SHOWN else ()
        write_atomically(directory / "frequencies.svg", draw_frequencies(counts, by_chance, each, names, rewards))
    results = {"spread": found["rows"]["spread"]}
    low, high = np.percentile(counts, [10, 90])
    for name, fault in faults(splits).items():
        wrong = fault.values == 1
        # Whole sets of equal counts, so that the order of the rows does not matter.
        shares = {"often": float(wrong[counts >= high].mean()), "rarely": float(wrong[counts <= low].mean())}
        found[name] = {"all": float(wrong.mean()), **shares, "drawn": float(counts[wrong].sum() / counts.sum())}
        results |= {f"{name}_{which}": share for which, share in shares.items()}
        results[f"share/{name}"] = found[name]["drawn"]
    write_json(directory / "frequencies.json", found)
    save_tree(directory / "counts.safetensors", trees)
    return results


def _spread(counts: NDArray[np.integer[Any]]) -> dict[str, float]:
    values = samplers.frequencies(jnp.asarray(counts))._asdict()
    return {**{name: float(value) for name, value in values.items()}, "spread": float(counts.var() / counts.mean())}
