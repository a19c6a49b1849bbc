"""What the measurements say: a table, a sentence, a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bilevel.study.files import write_json
from bilevel.study.report.charts import Line, draw
from bilevel.study.tables import Table
from bilevel.study.task import GENERIC, Measure
from bilevel.tools.diagnose.measure import RATES, rate
from bilevel.training.run_dir import write_atomically

Row: TypeAlias = Mapping[str, float]

CHANCE = 0.5
PAPER = {
    "language modeling (c4, reuters)": (0.862, 0.694),
    "machine translation (paracrawl, newstest)": (0.781, 0.682),
    "image classification (yfcc15m, imagenet67)": (0.503, 0.498),
}
"""Table 8 of Grangier, Ablin and Hannun (2024): task (generic, specific) -> SAR, GAR."""
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


def table(rows: Sequence[Row], measure: Measure) -> str:
    """Return the Markdown table: one line a measurement, rates with their standard errors."""
    names = {f"valid_{measure.name}": f"valid {measure.title}"}
    names[f"valid_{measure.name}/{GENERIC}"] = f"{GENERIC} valid {measure.title}"
    shown = [name for name in names if name in rows[0]]
    lines = [
        [f"{row['step']:.0f}", *(f"{row[n]:.{measure.digits}f}" for n in shown), *(rate(row, r) for r in RATES)]
        for row in rows
    ]
    return str(Table(["step", *(names[name] for name in shown), *(r.upper() for r in RATES)], lines))


def verdict(row: Row) -> str:
    """Return one sentence on the last measurement, with the paper's numbers beside it."""
    above = tuple(row[name] - CHANCE > ERRORS * row[f"{name}_error"] for name in RATES)
    lm, mt, images = (f"{100 * sar:.1f} / {100 * gar:.1f} %" for sar, gar in PAPER.values())
    return (
        f"After {row['step']:.0f} steps SAR is {rate(row, 'sar')} and GAR {rate(row, 'gar')} (± one standard error; chance is "
        f"50 %), so that {FINDINGS[above[0], above[1]]}; Grangier et al., table 8, report {lm} for language modelling and {mt} "
        f"for translation, where bilevel data selection helped, and {images} for image classification, where it did poorly, "
        "which makes the rates an indication from three tasks, not a promise."
    )


def write(directory: Path, rows: Sequence[Row], measure: Measure, about: Mapping[str, Any]) -> str:
    """Write diagnose.md, diagnose.json and diagnose.svg; return the table with the sentence.

    Args:
      directory: where to.
      rows: measurements.
      measure: the task's first.
      about: what is kept beside them; `measured` says in sentences on what.
    """
    sentence = verdict(rows[-1])
    text = f"{about['measured']}\n\n{table(rows, measure)}\n\n{sentence}"
    found = {
        **about,
        "chance": CHANCE,
        "measurements": [dict(row) for row in rows],
        "verdict": sentence,
        "paper_table_8": {task: dict(zip(RATES, rates, strict=True)) for task, rates in PAPER.items()},
    }
    write_atomically(directory / "diagnose.md", f"# SAR and GAR\n\n{text}\n")
    write_json(directory / "diagnose.json", found)
    write_atomically(directory / "diagnose.svg", plot(rows))
    return text


def plot(rows: Sequence[Row]) -> str:
    """Draw the rates over steps, with lines at two standard errors, as the text of an SVG file."""
    steps, lines = np.asarray([row["step"] for row in rows], float), []
    for name in RATES:
        rates, errors = (100 * np.asarray([row[of] for row in rows]) for of in (name, f"{name}_error"))
        around = [(steps, rates + sign * ERRORS * errors) for sign in (-1, 1)]
        lines.append(Line(name.upper(), steps, rates, around))
    chance = Line("chance", steps, np.full(len(steps), 100 * CHANCE))
    return draw([*lines, chance], x_label="step", y_label="% (thin: two standard errors)")
