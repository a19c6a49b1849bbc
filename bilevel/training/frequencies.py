"""How often the rows and classes of a recorded sequence were drawn, as files in a run's directory (RLSampler, section 6.2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel import samplers
from bilevel.files import save_tree
from bilevel.samplers.chart import draw_frequencies
from bilevel.selection.known import Known, faults
from bilevel.training.run_dir import write_atomically, write_json

_MOST_NAMES = 20
"""The chart names no more classes than this."""


def save_frequencies(
    directory: Path,
    sequence: NDArray[np.integer[Any]],
    num_rows: int,
    known: Mapping[str, Known] = MappingProxyType({}),
    rewards: int = 0,
) -> dict[str, float]:
    """Count the rows and classes of a sequence, and keep the counts, their spread and a chart (figure 3 (a, b)).

    Beside these stands how many rewards there were for each row, as all that a sampler can know of rows lies in them.

    Args:
      directory: gets frequencies.json and counts.safetensors, and frequencies.svg where classes are known.
      sequence: integers `[steps, b]`, numbers of rows.
      num_rows: N.
      known: about the rows, by name; the first that is no fault are their classes.
      rewards: that the sampler was given; 0 for one that did not learn.

    Returns:
      `NAME_often` and `NAME_rarely`, the shares of rows with each fault among the tenth drawn most and least often;
      `share/NAME`, their share of all draws; and `spread`, the variance of the counts over their mean: 1 by chance, 0 for whole
      epochs.

    Reference: RLSampler, section 6.2 and figure 3; the line by chance is ours.
    """
    drawn = samplers.row_counts(sequence, num_rows)
    counts = np.asarray(drawn)
    # As many draws, each from all rows alike, with replacement: what no preference looks like.
    by_chance = np.random.default_rng(0).multinomial(counts.sum(), np.full(len(counts), 1 / len(counts)))
    found: dict[str, Any] = {
        "draws": int(counts.sum()),
        "rows": {**_spread(counts), "never_drawn": float((counts == 0).mean())},
        "rows_by_chance": _spread(by_chance),
        "rewards": {"all": rewards, "a_row": rewards / num_rows},
    }
    trees = {"counts": counts}
    for values, names, *_ in [k for k in known.values() if not k.fault][:1]:
        of_class = np.asarray(samplers.class_counts(drawn, values, len(names)))
        found["classes"] = {**_spread(of_class), "counts": dict(zip(names, of_class.tolist(), strict=True))}
        trees["class_counts"] = of_class
        each = of_class / np.maximum(np.bincount(values.astype(int), minlength=len(names)), 1)
        chart = draw_frequencies(counts, by_chance, each, names if len(names) <= _MOST_NAMES else (), rewards)
        write_atomically(directory / "frequencies.svg", chart)
    results = {"spread": found["rows"]["spread"]}
    for name, fault in faults(known).items():
        found[name] = _fault(counts, fault.values == 1)
        results |= {f"{name}_{which}": found[name][which] for which in ("often", "rarely")}
        results[f"share/{name}"] = found[name]["drawn"]
    write_json(directory / "frequencies.json", found)
    save_tree(directory / "counts.safetensors", trees)
    return results


def _fault(counts: NDArray[np.integer[Any]], wrong: NDArray[np.bool_]) -> dict[str, float]:
    """The share of rows with a fault among all, among the tenth drawn most and least often, and among the draws."""
    low, high = np.percentile(counts, [10, 90])
    return {
        "all": float(wrong.mean()),
        # Whole sets of equal counts, so that the order of the rows does not matter.
        "often": float(wrong[counts >= high].mean()),
        "rarely": float(wrong[counts <= low].mean()),
        "drawn": float(counts[wrong].sum() / counts.sum()),
    }


def _spread(counts: NDArray[np.integer[Any]]) -> dict[str, float]:
    values = samplers.frequencies(jnp.asarray(counts))._asdict()
    return {**{name: float(value) for name, value in values.items()}, "spread": float(counts.var() / counts.mean())}
