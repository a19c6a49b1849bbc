"""How often classes and rows were drawn, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRAY, _BLUE = "#8A8A8A", "#0072B2"


def draw_frequencies(
    counts: NDArray[np.integer[Any]], by_chance: NDArray[np.integer[Any]], classes: NDArray[np.floating[Any]],
    names: Sequence[str], rewards: int = 0,
) -> str:  # fmt: skip
    """Draw as the text of an SVG file.

    Args:
        counts: draws of each row.
        by_chance: as many, of rows that are all alike.
        classes: draws per row of each class, as classes may differ in size.
        names: of the classes; shown if there are any.
        rewards: that the sampler learned from; above the rows if there are any.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(10, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(np.arange(len(classes)), classes, color=_BLUE)
        if names:
            left.set_xticks(np.arange(len(classes)), names, rotation=45)
        left.set(xlabel="true class", ylabel="draws for each row of the class")
        share = np.linspace(0, 100, len(counts))
        right.plot(share, np.sort(by_chance)[::-1], color=_GRAY, label="by chance")
        right.plot(share, np.sort(counts)[::-1], color=_BLUE, label="drawn")
        right.set(xlabel="rows, the most drawn first (%)", ylabel="draws", ylim=(0, None))
        if rewards:
            right.set_title(f"{rewards:,} rewards for {len(counts):,} rows: {rewards / len(counts):.2g} a row")
        right.legend(frameon=False)
        for panel in (left, right):
            panel.axhline(counts.mean(), color=_GRAY, linestyle=":")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
