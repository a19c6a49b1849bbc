"""How often a run drew which rows and classes: numbers and a plot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel import samplers
from bilevel.files import save_tree
from bilevel.study import files
from bilevel.study.observing import SHOWN, faults
from bilevel.study.task import Known, Splits
from bilevel.training.run_dir import write_atomically

PLOT = "frequencies.svg"
_GRAY, _BLUE = "#8A8A8A", "#0072B2"


def save_frequencies(directory: Path, sequence: NDArray[np.integer[Any]], splits: Splits) -> dict[str, float]:
    """Count the rows and classes of a sequence, and keep what figure 3 shows: counts, their spread, a plot.

    Args:
      directory: of the run.
      sequence: the rows drawn, `[steps, b]`.
      splits: all data.

    Returns:
      `NAME_often` and `NAME_rarely`, the shares of rows with each known fault among the tenth drawn most and least often, and
      `spread`, the variance of the counts over their mean: 1 by chance, 0 for whole epochs.

    Reference: RLSampler, section 6.2 and figure 2.
    """
    drawn = samplers.row_counts(sequence, len(splits.train))
    counts, known = np.asarray(drawn), _classes(splits)
    found: dict[str, Any] = {
        "draws": int(counts.sum()),
        "rows": {**_spread(counts), "never_drawn": float((counts == 0).mean())},
        "rows_by_chance": _spread(_by_chance(counts)),
    }
    trees = {"counts": counts}
    if known is not None:
        classes = np.asarray(samplers.class_counts(drawn, known.values, len(known.names)))
        found["classes"] = {**_spread(classes), "counts": dict(zip(known.names, classes.tolist(), strict=True))}
        trees["class_counts"] = classes
        write_atomically(directory / PLOT, _plot(counts, classes, known))
    results = {"spread": found["rows"]["spread"]}
    low, high = np.percentile(counts, [10, 90])
    for name, fault in faults(splits).items():
        wrong = fault.values == 1
        # Whole sets of equal counts, so that the order of the rows does not matter.
        shares = {"often": float(wrong[counts >= high].mean()), "rarely": float(wrong[counts <= low].mean())}
        found[name] = {"all": float(wrong.mean()), **shares, "drawn": float(counts[wrong].sum() / counts.sum())}
        results |= {f"{name}_{which}": share for which, share in shares.items()}
        results[f"share/{name}"] = found[name]["drawn"]
    files.write_json(directory / "frequencies.json", found)
    save_tree(directory / "counts.safetensors", trees)
    return results


def _classes(splits: Splits) -> Known | None:
    return next((known for known in splits.known.values() if not known.fault), None)


def _spread(counts: NDArray[np.integer[Any]]) -> dict[str, float]:
    values = samplers.frequencies(jnp.asarray(counts))._asdict()
    return {**{name: float(value) for name, value in values.items()}, "spread": float(counts.var() / counts.mean())}


def _by_chance(counts: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """As many draws, each from all rows alike, with replacement: what no preference looks like."""
    return np.random.default_rng(0).multinomial(counts.sum(), np.full(len(counts), 1 / len(counts)))


def _plot(counts: NDArray[np.integer[Any]], classes: NDArray[np.integer[Any]], known: Known) -> str:
    """Draws of classes, per row of the class as they may differ in size, and of rows, as the text of an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        sizes = np.bincount(known.values.astype(int), minlength=len(known.names))
        left.bar(np.arange(len(classes)), classes / np.maximum(sizes, 1), color=_BLUE)
        if len(classes) <= SHOWN:
            left.set_xticks(np.arange(len(classes)), known.names, rotation=45)
        left.set(xlabel="true class", ylabel="draws for each row of the class")
        share = np.linspace(0, 100, len(counts))
        right.plot(share, np.sort(_by_chance(counts))[::-1], color=_GRAY, label="by chance")
        right.plot(share, np.sort(counts)[::-1], color=_BLUE, label="drawn")
        right.set(xlabel="rows, the most drawn first (%)", ylabel="draws", ylim=(0, None))
        right.legend(frameon=False)
        for panel in (left, right):
            panel.axhline(counts.mean(), color=_GRAY, linestyle=":")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
