"""Line charts of metrics, as SVG text."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bilevel.training.metrics import Row
from bilevel.types import UserError

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (too pale on white).
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A")
_DASHES = ("-", "--", "-.", ":")
_MOST_POINTS = 400
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#333333"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "bilevel",  # the same run gives the same file
}


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    x: np.ndarray
    """float64 `[n]`."""
    y: np.ndarray
    """float64 `[n]`."""
    thin: Sequence[tuple[np.ndarray, np.ndarray]] = field(default=())
    """(x, y) of the seeds that the line is the mean of."""
    level: float | None = None
    """A dotted horizontal line of the same colour."""


def mean_line(label: str, seeds: Sequence[Sequence[Row]], name: str, x: str = "step") -> Line:
    """Return the mean of a metric over seeds, at the steps that all seeds with this metric have.

    With `x="seconds"` the seconds are averaged too.
    """
    known = [
        {row["step"]: (row[x], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))} for rows in seeds
    ]
    known = [points for points in known if points]
    steps = sorted(set.intersection(*map(set, known))) if known else []
    mean = np.asarray([np.mean([points[step] for points in known], axis=0) for step in steps]).reshape(-1, 2)
    thin = [tuple(np.asarray(list(points.values()), np.float64).T) for points in known]
    return Line(label, mean[:, 0], mean[:, 1], thin if len(thin) > 1 else ())


def draw(lines: Sequence[Line], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """Draw a line chart on a transparent background.

    Args:
        lines: what to draw; more than 7 get other dashes. One without points is left out, and its colour too.
        x_label: name of the x axis with its unit.
        y_label: name of the y axis with its unit.
        log_y: logarithmic y axis.

    Returns:
        The text of an SVG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    with _figure((7.2, 3.8)) as (figure, text):
        axes = figure.subplots()
        for index, line in enumerate(lines):
            dashes, color = divmod(index, len(_COLORS))
            if len(line.x):
                _draw_line(axes, line, _COLORS[color], _DASHES[dashes % len(_DASHES)])
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear", axisbelow=True)
        axes.grid(True)
        axes.margins(x=0.02)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return text.getvalue()


def draw_dots(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], names: Sequence[str], *, x_label: str
) -> str:
    """Draw numbers as dots with bars, a line a name, in panels side by side; returns the text of an SVG file.

    Args:
        panels: title -> series, with a colour and a marker of its own -> name -> (number, half the length of its bar).
        names: the lines, from above.
        x_label: what the numbers are, with their unit.

    Raises:
        UserError: matplotlib is not installed.
    """
    with _figure((3.2 * len(panels) + 1.5, 0.28 * len(names) + 1.5)) as (figure, text):
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (title, series) in zip(axes, panels.items(), strict=True):
            for index, (label, values) in enumerate(series.items()):
                places, (means, bars) = [names.index(name) for name in values], zip(*values.values(), strict=True)
                look = {"fmt": "oDs^"[index % 4], "color": _COLORS[index % len(_COLORS)], "label": label}
                panel.errorbar(means, places, xerr=bars, capsize=2, **look)
            panel.set_title(title, fontsize=9)
            panel.set(xlabel=x_label, axisbelow=True)
            panel.grid(True)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8)
    return text.getvalue()


@contextlib.contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Any, io.StringIO]]:
    """A figure in the style of all charts, and what its SVG is written to at the end."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing a chart needs matplotlib: run `pip install 'bilevel[experiments]'`.") from error
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # names in scripts that the font lacks
        figure, text = Figure(figsize=size, layout="constrained"), io.StringIO()
        yield figure, text
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})


def _draw_line(axes: Any, line: Line, color: str, dashes: str) -> None:
    for x, y in line.thin:
        axes.plot(*_thinned(x, y), color=color, linewidth=0.8, alpha=0.4)
    marker = "o" if len(line.x) < 2 else None  # a single point has no line
    axes.plot(
        *_thinned(line.x, line.y),
        color=color, linestyle=dashes, linewidth=2, marker=marker, label=_shown_label(line.label),
    )  # fmt: skip
    if line.level is not None:
        axes.axhline(line.level, color=color, linestyle=":", linewidth=1)


def _shown_label(label: str) -> str:
    """The label as text: `$` begins a formula, and a legend leaves out names that begin with an underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most 400 points, first and last included, so that long runs give small files."""
    if len(x) <= _MOST_POINTS:
        return x, y
    keep = np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int)
    return x[keep], y[keep]
