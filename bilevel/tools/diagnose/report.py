"""What the measurements say, as a table, a sentence and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bilevel.study.tables import Table
from bilevel.study.task import GENERIC, Measure
from bilevel.tools.diagnose.measure import RATES
from bilevel.training.charts import Line, draw

CHANCE = 0.5
ERRORS = 2
"""A rate is above chance if it is so by more than this many standard errors."""
FINDINGS = {
    (True, True): "both are above chance: gradient alignments tell the two kinds of data apart",
    (True, False): "only SAR is above chance: specific batches do more than generic ones for specific rows, but no less for "
    "generic rows",
    (False, True): "only GAR is above chance: specific batches do no more than generic ones for specific rows",
    (False, False): "neither is above chance: either generic batches serve specific rows as well as specific batches do, or "
    "gradient alignments do not show the difference",
}  # fmt: skip
"""(SAR above chance, GAR above chance) -> what that says, after section 6.3."""
PAPER = (
    "Grangier et al., table 8, report 86.2 / 69.4 % for language modelling and 78.1 / 68.2 % for translation, where bilevel "
    "data selection helped, and 50.3 / 49.8 % for image classification, where it did poorly, which makes the rates an indication "
    "from three tasks, not a promise"
)


def table(rows: Sequence[Mapping[str, float]], measure: Measure) -> str:
    """Return the Markdown table: one line a measurement, rates with their standard errors."""
    name, title = f"valid_{measure.name}", f"valid {measure.title}"
    heads = {n: head for n, head in ((name, title), (f"{name}/{GENERIC}", f"{GENERIC} {title}")) if n in rows[0]}
    lines = [
        [f"{row['step']:.0f}", *(f"{row[n]:.{measure.digits}f}" for n in heads), *(_rate(row, r) for r in RATES)]
        for row in rows
    ]
    return str(Table(["step", *heads.values(), *(r.upper() for r in RATES)], lines))


def verdict(row: Mapping[str, float]) -> str:
    """Return one sentence on the last measurement, with the paper's numbers beside it."""
    sar, gar = (row[name] - CHANCE > ERRORS * row[f"{name}_error"] for name in RATES)
    return (
        f"After {row['step']:.0f} steps SAR is {_rate(row, 'sar')} and GAR {_rate(row, 'gar')} (± one standard error; chance "
        f"is 50 %), so that {FINDINGS[sar, gar]}; {PAPER}."
    )


def _rate(row: Mapping[str, float], name: str) -> str:
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_error']:.1f} %"


def plot(rows: Sequence[Mapping[str, float]]) -> str:
    """Draw the rates over steps, with lines at two standard errors, as SVG."""
    steps, lines = np.asarray([row["step"] for row in rows], float), []
    for name in RATES:
        rates, errors = (100 * np.asarray([row[of] for row in rows]) for of in (name, f"{name}_error"))
        around = [(steps, rates + sign * ERRORS * errors) for sign in (-1, 1)]
        lines.append(Line(name.upper(), steps, rates, around))
    chance = Line("chance", steps, np.full(len(steps), 100 * CHANCE))
    return draw([*lines, chance], x_label="step", y_label="% (thin: two standard errors)")
