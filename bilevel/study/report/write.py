"""What a report shows, computed from the metrics of the runs; `templates/report.html` lays it out."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.study.report.charts import Line, draw, mean_line
from bilevel.study.tables import cell, summary_cell
from bilevel.training.metrics import Row, even_intervals
from bilevel.training.run_dir import flatten, write_atomically
from bilevel.types import UserError

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
    """The results in the summary table, by name. When empty: the last value on valid."""


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


class Curve(NamedTuple):
    """A metric of the rows that is shown over the steps, with a line for each method."""

    metric: str
    title: str
    label: str
    """Of the y axis, with its unit."""


class _Table(NamedTuple):
    head: Sequence[str]
    lines: Sequence[Sequence[Any]]


class _Figure(NamedTuple):
    title: str
    light: str
    """The SVG text for light pages."""
    dark: str
    """The SVG text for dark pages."""


class _Domains(NamedTuple):
    method: str
    figure: _Figure
    table: _Table


def write_report(
    path: str | Path,
    runs: Sequence[RunRecord],
    *,
    title: str,
    settings: Mapping[str, Any],
    introduction: str = "",
    valid_metric: str = "valid_loss",
    valid_title: str = "valid loss",
    valid_unit: str = "nats",
    generic_shares: Mapping[str, float] | None = None,
    highest: Sequence[Text | Picture] = (),
    lowest: Sequence[Text | Picture] = (),
    curves: Sequence[Curve] = (),
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write one self-contained HTML file about some runs.

    Sections without data are omitted. All text is escaped.

    Args:
        path: the file.
        runs: the runs, in the order in which the methods are shown.
        title: title of the page.
        settings: what was run; nested mappings are shown with dotted names.
        introduction: a paragraph below the title.
        valid_metric: name of the deciding measure on the specific valid rows, in the rows of metrics.
        valid_title: of that measure.
        valid_unit: of that measure; "": none.
        generic_shares: share of each domain in the generic data (0 to 1). Its share among the selected rows
            is the metric `share/<domain>`.
        highest: the generic rows with the highest scores.
        lowest: the generic rows with the lowest scores.
        curves: further metrics to show.
        pictures: images to show.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: matplotlib or Jinja2 is not installed, or the file cannot be written.
    """
    path, methods = Path(path), _by_method(runs)
    summary, each_run = _summaries(runs, valid_metric)
    size_title, size_label = "Effective sample size of the weights", "effective sample size (rows)"
    text = _rendered(
        title=title,
        introduction=introduction,
        settings=_Table(["setting", "value"], [[name, cell(value)] for name, value in flatten(settings).items()]),
        summary=summary,
        each_run=each_run,
        several_seeds=len(runs) > len(methods),
        valid_title=valid_title,
        valid_curves=_valid_curves(methods, valid_metric, valid_title, valid_unit),
        curves=list(filter(None, (_over_steps(methods, *curve) for curve in curves))),
        sample_size=_over_steps(methods, "effective_sample_size", size_title, size_label, log_y=True),
        domains=_domains(methods, generic_shares or {}),
        most_domains=_MOST_DOMAINS,
        highest=highest,
        lowest=lowest,
        pictures=pictures,
    )
    write_atomically(path, text)
    return path


def _rendered(**values: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UserError("Writing the report needs Jinja2: run `pip install 'bilevel[experiments]'`.") from error
    environment = Environment(
        loader=PackageLoader("bilevel.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg_uri": _svg_uri, "shortened": _shortened}
    return environment.get_template("report.html").render(values)


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _shortened(text: str) -> str:
    """The first 1,000 characters, without what UTF-8 cannot hold: half characters of texts that were cut between bytes."""
    shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
    return shown.encode("utf-8", "replace").decode("utf-8")


def _by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def _summaries(runs: Sequence[RunRecord], valid_metric: str) -> tuple[_Table, _Table]:
    """The results of the methods, and those of each run."""
    results = [(run, dict(run.summary) or _default_summary(run.rows, valid_metric)) for run in runs]
    names = list(dict.fromkeys(name for _, result in results for name in result))
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run, result in results:
        grouped.setdefault(run.method, []).append(result)
    means = [
        [method, len(found), *(summary_cell([result.get(name) for result in found]) for name in names)]
        for method, found in grouped.items()
    ]
    each = [[run.method, run.seed, *(cell(result.get(name)) for name in names)] for run, result in results]
    return _Table(["method", "seeds", *names], means), _Table(["method", "seed", *names], each)


def _default_summary(rows: Sequence[Row], valid_metric: str) -> dict[str, Any]:
    values = [row[valid_metric] for row in rows if math.isfinite(row.get(valid_metric, math.nan))]
    last = rows[-1] if rows else {}
    return {
        "steps": last.get("step"),
        "seconds": last.get("seconds"),
        "last valid value": values[-1] if values else None,
    }


def _valid_curves(methods: Mapping[str, Sequence[RunRecord]], name: str, title: str, unit: str) -> list[_Figure]:
    label = f"{title} ({unit})" if unit else title
    figures = [
        _figure(_lines(methods, name, x), f"{title[:1].upper()}{title[1:]} by {x}", x_label, label)
        for x, x_label in (("step", "step"), ("seconds", "training time (s)"))
    ]
    return list(filter(None, figures))


def _over_steps(
    methods: Mapping[str, Sequence[RunRecord]], metric: str, title: str, label: str, *, log_y: bool = False
) -> _Figure | None:
    return _figure(_lines(methods, metric, "step"), title, "step", label, log_y=log_y)


def _lines(methods: Mapping[str, Sequence[RunRecord]], name: str, x: str) -> list[Line]:
    """One a method that has the metric, each in the colour that the method has in all charts."""
    lines = [mean_line(method, [run.rows for run in runs], name, x) for method, runs in methods.items()]
    return [replace(line, place=place) for place, line in enumerate(lines) if len(line.x)]


def _domains(methods: Mapping[str, Sequence[RunRecord]], generic: Mapping[str, float]) -> list[_Domains]:
    head = ["domain", "share in generic (%)", "share selected at the end (%)", "ratio"]
    found = []
    for method, runs in methods.items():
        names = sorted({name for run in runs for row in run.rows for name in row if name.startswith(SHARE_PREFIX)})
        names = [name for name in names if not generic or name.removeprefix(SHARE_PREFIX) in generic]
        shares = [even_intervals(run.rows, names) for run in runs]
        means = [mean_line(name.removeprefix(SHARE_PREFIX), shares, name) for name in names]
        top = sorted((line for line in means if len(line.x)), key=_rank(generic))[:_MOST_DOMAINS]
        lines = [Line(_label(t.label), t.x, 100 * t.y, (), _percent(generic.get(t.label))) for t in top]
        figure = _figure(lines, f"{method}: shares of the domains", "step", "share of the selected rows (%)")
        if figure is not None:
            found.append(_Domains(method, figure, _Table(head, [_share_row(t, generic) for t in top])))
    return found


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


def _figure(lines: Sequence[Line], title: str, x_label: str, y_label: str, *, log_y: bool = False) -> _Figure | None:
    if not lines:
        return None
    light, dark = (draw(lines, x_label=x_label, y_label=y_label, log_y=log_y, dark=dark) for dark in (False, True))
    return _Figure(title, light, dark)
