"""What the measurements say: a table, a sentence, a plot."""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import jax

from bilevel.study.files import write_json
from bilevel.study.tables import markdown
from bilevel.study.task import GENERIC, Measure
from bilevel.tools.diagnose.measure import RATES, rate
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError

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
    return markdown(["step", *(names[name] for name in shown), *(r.upper() for r in RATES)], lines)


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
      about: `data` and `measured`, sentences, and what else is kept.

    Raises:
      UserError: if a file cannot be written or drawn.
    """
    sentence, notes = verdict(rows[-1]), f"{about['data']} {about['measured']}"
    text = f"{notes}\n\n{table(rows, measure)}\n\n{sentence}"
    found = {
        **about,
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")}
        | {"python": platform.python_version()},
        "backend": jax.default_backend(),
        "chance": CHANCE,
        "measurements": [dict(row) for row in rows],
        "verdict": sentence,
        "paper_table_8": {task: dict(zip(RATES, rates, strict=True)) for task, rates in PAPER.items()},
    }
    write_atomically(directory / "diagnose.md", f"# SAR and GAR\n\n{text}\n")
    write_json(directory / "diagnose.json", found)
    write_atomically(directory / "diagnose.svg", plot(rows))
    return text


def plot(rows: Sequence[Row], x: str = "step", x_label: str = "step", names: Sequence[str] = ()) -> str:
    """Draw the rates with two standard errors, as the text of an SVG file.

    Args:
      rows: measurements.
      x: what of a row they are drawn over.
      x_label: its name.
      names: of the rows, if they are points apart instead of moments of one training.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing the rates needs matplotlib: run `pip install 'bilevel[experiments]'`.") from error
    with rc_context({"svg.hashsalt": "bilevel"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        places = [row[x] for row in rows]
        for name, color in zip(RATES, ("#0072B2", "#E69F00"), strict=True):
            errors = [ERRORS * 100 * row[f"{name}_error"] for row in rows]
            rates = [100 * row[name] for row in rows]
            axes.errorbar(places, rates, errors, color=color, fmt="o" if names else "o-", capsize=3, label=name.upper())
        for name, place, row in zip(names, places, rows, strict=False):
            above = min(100 * (max(row["sar"], row["gar"]) + ERRORS * row["sar_error"]), 90)
            axes.annotate(name, (place, above), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.margins(x=0.2 if names else None)
        axes.axhline(100 * CHANCE, color="#8A8A8A", linestyle=":", label="chance")
        axes.set_xlabel(x_label)
        axes.set_ylabel("% (± two standard errors)")
        axes.set_ylim(0, 100)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
