"""The report of an experiment: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.training.charts import Line, draw, mean_line
from bilevel.training.metrics import Row, even_intervals
from bilevel.training.page import cell, figure, mean_cell, page, section, table
from bilevel.training.run_dir import flatten, write_atomically

SHARE_PREFIX = "share/"
_MOST_DOMAINS = 8
_MOST_CHARACTERS = 1000
_END = 0.1  # "at the end" is the mean over the last tenth of the rows: one interval alone is noisy


@dataclass(frozen=True)
class RunRecord:
    """One run of a report."""

    method: str
    """Name of the method; runs of one method with several seeds are averaged."""
    seed: int
    rows: Sequence[Row]
    """Rows of metrics (`read_metrics`, or the history of a `TrainResult`)."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """The results in the summary table, by name. When empty: the last and the best specific valid loss."""


class Document(NamedTuple):
    """A generic document and the logit that the weighting network gives it."""

    logit: float
    label: str
    text: str


class Curve(NamedTuple):
    """A metric of the rows that is shown over the steps, with a line for each method."""

    metric: str
    title: str
    label: str
    """Of the y axis, with its unit."""


class Picture(NamedTuple):
    """An image of the report."""

    title: str
    svg: str
    """The text of an SVG file."""


def write_report(
    path: str | Path,
    runs: Sequence[RunRecord],
    *,
    title: str,
    settings: Mapping[str, Any],
    introduction: str = "",
    valid_metric: str = "specific_valid_loss",
    loss_unit: str = "nats",
    generic_shares: Mapping[str, float] | None = None,
    highest: Sequence[Document] = (),
    lowest: Sequence[Document] = (),
    curves: Sequence[Curve] = (),
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write one self-contained HTML file about some runs.

    Sections without data are left out. All text is escaped.

    Args:
        path: the file.
        runs: the runs, in the order in which the methods are shown.
        title: title of the page.
        settings: what was run; nested mappings are shown with dotted names.
        introduction: a paragraph below the title.
        valid_metric: name of the specific valid loss in the rows.
        loss_unit: unit of that loss.
        generic_shares: share of each domain in the generic data (0 to 1). Its share among the selected rows
            is the metric `share/<domain>`.
        highest: the generic documents with the highest logits.
        lowest: the generic documents with the lowest logits.
        curves: further metrics to show.
        pictures: images to show.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    path = Path(path)
    methods = _by_method(runs)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(introduction)}</p>" if introduction else "",
        _settings(settings),
        _summary(runs, valid_metric),
        _valid_charts(methods, valid_metric, loss_unit),
        *(_curve(methods, curve) for curve in curves),
        _sample_size(methods),
        _domains(methods, generic_shares or {}),
        _documents("Highest-weighted generic documents", highest),
        _documents("Lowest-weighted generic documents", lowest),
        *(section(title, figure(title, light=svg, dark=svg)) for title, svg in pictures),
    ]
    write_atomically(path, page(title, "\n".join(filter(None, body))))
    return path


def _by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [[name, cell(value)] for name, value in flatten(settings).items()]
    content = table(["setting", "value"], rows, wrap=True)
    return f"<details><summary>Settings</summary>{content}</details>" if settings else ""


def _summary(runs: Sequence[RunRecord], valid_metric: str) -> str:
    if not runs:
        return ""
    results = [(run, dict(run.summary) or _default_summary(run.rows, valid_metric)) for run in runs]
    names = list(dict.fromkeys(name for _, result in results for name in result))
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run, result in results:
        grouped.setdefault(run.method, []).append(result)
    means = [
        [method, len(found), *(mean_cell([result.get(name) for result in found]) for name in names)]
        for method, found in grouped.items()
    ]
    each = [[run.method, run.seed, *(cell(result.get(name)) for name in names)] for run, result in results]
    content = table(["method", "seeds", *names], means)
    if len(runs) > len(grouped):
        content += (
            "<p>Mean ± standard deviation over the seeds.</p>"
            f"<details><summary>Each run</summary>{table(['method', 'seed', *names], each)}</details>"
        )
    return section("Summary", content)


def _default_summary(rows: Sequence[Row], valid_metric: str) -> dict[str, Any]:
    values = [row[valid_metric] for row in rows if math.isfinite(row.get(valid_metric, math.nan))]
    last = rows[-1] if rows else {}
    return {
        "steps": last.get("step"),
        "seconds": last.get("seconds"),
        "last specific valid loss": values[-1] if values else None,
        "best specific valid loss": min(values) if values else None,
    }


def _valid_charts(methods: Mapping[str, Sequence[RunRecord]], name: str, unit: str) -> str:
    charts = ""
    for x, x_label in [("step", "step"), ("seconds", "training time (s)")]:
        lines = _lines(methods, name, x)
        charts += _chart(lines, f"Specific valid loss by {x}", x_label, f"specific valid loss ({unit})")
    note = "<p>Thick lines are means over seeds, thin lines the seeds.</p>" if _several(methods) else ""
    return section("Specific valid loss", charts + note) if charts else ""


def _sample_size(methods: Mapping[str, Sequence[RunRecord]]) -> str:
    lines = _lines(methods, "effective_sample_size", "step")
    title = "Effective sample size of the weights"
    chart = _chart(lines, title, "step", "effective sample size (rows)", log_y=True)
    note = (
        "<p>Of the weights over a big batch, 1/Σw²: 1 row means that the softmax puts all weight on one. A filter that draws "
        "b rows without replacement then takes those with the b largest logits.</p>"
    )
    return section("Effective sample size", note + chart) if chart else ""


def _curve(methods: Mapping[str, Sequence[RunRecord]], curve: Curve) -> str:
    chart = _chart(_lines(methods, curve.metric, "step"), curve.title, "step", curve.label)
    return section(curve.title, chart) if chart else ""


def _lines(methods: Mapping[str, Sequence[RunRecord]], name: str, x: str) -> list[Line]:
    """One a method that has the metric, each in the colour that the method has in all charts."""
    lines = [mean_line(method, [run.rows for run in runs], name, x) for method, runs in methods.items()]
    return [replace(line, place=place) for place, line in enumerate(lines) if len(line.x)]


def _several(methods: Mapping[str, Sequence[RunRecord]]) -> bool:
    return any(len(runs) > 1 for runs in methods.values())


def _domains(methods: Mapping[str, Sequence[RunRecord]], generic: Mapping[str, float]) -> str:
    content = ""
    for method, runs in methods.items():
        names = sorted({name for run in runs for row in run.rows for name in row if name.startswith(SHARE_PREFIX)})
        shares = [even_intervals(run.rows, names) for run in runs]
        means = [mean_line(name.removeprefix(SHARE_PREFIX), shares, name) for name in names]
        top = sorted((line for line in means if len(line.x)), key=_rank(generic))[:_MOST_DOMAINS]
        if not top:
            continue
        lines = [Line(_label(t.label), t.x, 100 * t.y, (), _percent(generic.get(t.label))) for t in top]
        chart = _chart(lines, f"{method}: shares of the domains", "step", "share of the selected rows (%)")
        header = ["domain", "share in generic (%)", "share selected at the end (%)", "ratio"]
        content += f"<h3>{escape(method)}</h3>{chart}{table(header, [_share_row(t, generic) for t in top])}"
    if not content:
        return ""
    note = (
        f"<p>At most {_MOST_DOMAINS} domains: those whose share among the selected rows ends furthest above "
        "their share in the generic data, which is the dotted line.</p>"
    )
    return section("Domains", note + content)


def _rank(generic: Mapping[str, float]) -> Callable[[Line], float]:
    """Gain in share, largest first: ratios alone would put domains of a few rows in front."""
    return lambda line: generic.get(line.label, 0.0) - _end_share(line)


def _end_share(line: Line) -> float:
    return float(np.mean(line.y[-max(1, round(_END * len(line.y))) :]))


def _share_row(line: Line, generic: Mapping[str, float]) -> list[Any]:
    share, end = generic.get(line.label), _end_share(line)
    return [line.label, cell(_percent(share)), cell(100 * end), cell(end / share if share else None)]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _label(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _documents(title: str, documents: Sequence[Document]) -> str:
    if not documents:
        return ""
    items = ""
    for logit, label, text in documents:
        shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
        items += (
            f"<article><header><span>logit {logit:.3g}</span> <span>{escape(str(label))}</span></header>"
            f"<pre>{escape(_encodable(shown))}</pre></article>"
        )
    return section(title, items)


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot hold: half characters of documents that were cut between bytes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _chart(lines: Sequence[Line], title: str, x_label: str, y_label: str, log_y: bool = False) -> str:
    if not lines:
        return ""
    images = [draw(lines, x_label=x_label, y_label=y_label, log_y=log_y, dark=dark) for dark in (True, False)]
    return figure(title, light=images[1], dark=images[0])
