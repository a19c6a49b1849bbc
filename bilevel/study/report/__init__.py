"""One self-contained HTML file about some runs: its sections, and the page that `templates/report.html` lays out."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from bilevel.training.charts import Line, draw, mean_line
from bilevel.training.metrics import Row, even_intervals
from bilevel.training.run_dir import write_atomically
from bilevel.training.tables import NOTHING, Table
from bilevel.types import UserError

Metrics = Mapping[str, Sequence[Sequence[Row]]]
"""Method -> the rows of metrics of each seed, of which means are shown."""
_MOST_DOMAINS = 8
_LONGEST_LABEL = 28
_END = 0.1  # "at the end" is the mean over the last tenth of the rows: one interval alone is noisy
_ABOUT_DOMAINS = (
    f"At most {_MOST_DOMAINS} domains: those whose share among the selected rows ends furthest above their share in the generic "
    "data, which is the dotted line."
)
_MOST_CHARACTERS = 1000


class Text(NamedTuple):
    """A row that is text, and the score that the weighting network gives it."""

    score: float
    label: str
    text: str


class Picture(NamedTuple):
    """An image."""

    title: str
    svg: str
    """The text of an SVG file."""


class Section(NamedTuple):
    """Charts under a heading, with a paragraph above them and a table below."""

    title: str
    charts: Sequence[Picture]
    about: str = ""
    table: Table | None = None


class Report(NamedTuple):
    """What a report shows; parts without data are omitted."""

    title: str
    introduction: str = ""
    settings: Table | None = None
    summary: Table | None = None
    """A line a method."""
    runs: Table | None = None
    """A line a run, where methods have several."""
    sections: Sequence[Section] = ()
    ranked: Mapping[str, Sequence[Text | Picture]] = MappingProxyType({})
    """By "highest" and "lowest": the generic rows with such weights."""


def over_training(
    metrics: Metrics, name: str, title: str, label: str, *, seconds: bool = False, log_y: bool = False, about: str = ""
) -> list[Section]:
    """Return the section of a metric, with a line for each method, in the same colour in all sections; none without data.

    The label is that of the y axis, with its unit; with `seconds` the metric is shown over the training time too.
    """
    charts = []
    for x, x_label in (("step", "step"), ("seconds", "training time (s)"))[: 1 + seconds]:
        lines = [mean_line(method, seeds, name, x) for method, seeds in metrics.items()]
        if any(len(line.x) for line in lines):
            chart = draw(lines, x_label=x_label, y_label=label, log_y=log_y)
            charts.append(Picture(f"{title} by {x}" if seconds else title, chart))
    return [Section(title, charts, about)] if charts else []


def chances(metrics: Metrics, name: str = "chance/") -> list[Section]:
    """Return a section for each method that draws languages: the mean chance of each, `chance/LANGUAGE`, over training.

    Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, figure 4.
    """
    found = []
    for method, seeds in metrics.items():
        names = dict.fromkeys(key for rows in seeds for row in rows for key in row if key.startswith(name))
        lines = [
            mean_line(key.removeprefix(name), [even_intervals(rows, [key]) for rows in seeds], key) for key in names
        ]
        if shown := [line for line in lines if len(line.x)]:
            chart = Picture("mean chances", draw(shown, x_label="step", y_label="mean p(language | target)"))
            found.append(Section(f"Mean chances of the languages: {method}", [chart]))
    return found


def domains(metrics: Metrics, generic: Mapping[str, float]) -> list[Section]:
    """Return a section for each method with shares of the domains among the rows that it selects, `share/DOMAIN`.

    `generic` has the share of each domain in the generic data, 0 to 1.
    """
    found = []
    head = ["domain", "share in generic (%)", "share selected at the end (%)", "ratio"]
    for method, seeds in metrics.items():
        even = [even_intervals(rows, [f"share/{name}" for name in generic]) for rows in seeds]
        lines = {name: line for name in generic if len((line := mean_line(name, even, f"share/{name}")).x)}
        ends = {name: float(np.mean(line.y[-max(1, round(_END * len(line.y))) :])) for name, line in lines.items()}
        # By the gain: ratios would put domains of a few rows in front.
        top = sorted(lines, key=lambda name: generic[name] - ends[name])[:_MOST_DOMAINS]
        if top:
            shown = [Line(_label(name), lines[name].x, 100 * lines[name].y, level=100 * generic[name]) for name in top]
            chart = Picture(
                "shares of the domains", draw(shown, x_label="step", y_label="share of the selected rows (%)")
            )
            ratios = {name: f"{ends[name] / generic[name]:.4g}" if generic[name] else NOTHING for name in top}
            table = [[n, f"{100 * generic[n]:.4g}", f"{100 * ends[n]:.4g}", ratios[n]] for n in top]
            found.append(Section(f"Domains selected by {method}", [chart], _ABOUT_DOMAINS, Table(head, table)))
    return found


def _label(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def write_report(path: Path, report: Report) -> None:
    """Write a report; all text is escaped.

    Raises:
        UserError: Jinja2 is not installed, or the file cannot be written.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UserError("Writing the report needs Jinja2: run `pip install 'bilevel[experiments]'`.") from error
    environment = Environment(
        loader=PackageLoader("bilevel.study.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"svg_uri": _svg_uri, "shortened": _shortened}
    write_atomically(path, environment.get_template("report.html").render(report._asdict()))


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _shortened(text: str) -> str:
    """The first 1,000 characters, without what UTF-8 cannot hold: half characters of texts that were cut between bytes."""
    shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
    return shown.encode("utf-8", "replace").decode("utf-8")
