"""The measurements as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bilevel.offline.acceleration import RATES
from bilevel.offline.verdict import CHANCE, ERRORS, in_percent
from bilevel.study.task import GENERIC, Measure
from bilevel.training.charts import Line, draw
from bilevel.training.tables import Table


def table(rows: Sequence[Mapping[str, float]], measure: Measure) -> str:
    """Return the Markdown table: one line a measurement, rates with their standard errors."""
    name, title = f"valid_{measure.name}", f"valid {measure.title}"
    heads = {n: head for n, head in ((name, title), (f"{name}/{GENERIC}", f"{GENERIC} {title}")) if n in rows[0]}
    lines = [
        [f"{row['step']:.0f}", *(f"{row[n]:.{measure.digits}f}" for n in heads), *(in_percent(row, r) for r in RATES)]
        for row in rows
    ]
    return str(Table(["step", *heads.values(), *(r.upper() for r in RATES)], lines))


def plot(rows: Sequence[Mapping[str, float]]) -> str:
    """Draw the rates over steps, with lines at two standard errors, as SVG."""
    steps, lines = np.asarray([row["step"] for row in rows], float), []
    for name in RATES:
        rates, errors = (100 * np.asarray([row[of] for row in rows]) for of in (name, f"{name}_error"))
        around = [(steps, rates + sign * ERRORS * errors) for sign in (-1, 1)]
        lines.append(Line(name.upper(), steps, rates, around))
    chance = Line("chance", steps, np.full(len(steps), 100 * CHANCE))
    return draw([*lines, chance], x_label="step", y_label="% (thin: two standard errors)")
