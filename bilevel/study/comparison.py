"""The table over methods and seeds, and the report."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bilevel.selection.known import faults, shares_of
from bilevel.study.context import Setting
from bilevel.study.judging import differences, significance
from bilevel.study.registry import BASELINE
from bilevel.study.report import Picture, Report, Section, chances, domains, over_training, write_report
from bilevel.study.results import WHERE, Result
from bilevel.study.tables import Column, by_method, by_run
from bilevel.study.task import Measure, Splits, Task, measures_of
from bilevel.study.weights import shown
from bilevel.training import read_metrics
from bilevel.training.metrics import Row, best_before_the_end, first_reaching
from bilevel.training.run_dir import flatten, recorded, write_atomically, write_json
from bilevel.training.tables import Table

JSON = "comparison.json"
REPORT = "report.html"
Metrics = Mapping[tuple[str, int], list[Row]]
"""(method, seed) -> its rows of metrics."""
_COSTS = {
    "steps": "steps", "seconds": "seconds", "steps_to_uniform": "steps to uniform's end",
    "steps_to_uniform_best": "steps to uniform's best", "seconds_to_uniform": "seconds to uniform's end",
    "effective_sample_size": "effective sample size",
}  # fmt: skip
AGAINST = "How probable as large a difference to uniform of the same seed is by chance (p, the largest of the seeds):"
_EVEN, _EVEN_AFTER = 0.01, 300
"""Logits of a smaller standard deviation hardly differ; they begin at 0, so that the first steps say nothing."""
_SAMPLE_SIZE = (
    "Of the weights over a big batch, 1/Σw²: 1 row means that the softmax puts all weight on one. A filter that draws b rows "
    "without replacement then takes those with the b largest logits."
)


def columns_of(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of the table: measures on test and valid, costs, what was chosen, fine-tuning."""
    first, measures = task.measures[0], measures_of(task)
    digits, titles = {m.name: m.digits for m in measures}, {m.name: m.title for m in measures}
    names = dict.fromkeys(name for row in rows for name in row)
    found = {f"test_{m.name}": Column(f"test {m.title}", m.digits) for m in measures}
    found[f"best_test_{first.name}"] = Column("best", first.digits)
    found[f"test_{first.name}_at_best_valid"] = Column("at best valid", first.digits)
    found |= {f"valid_{m.name}": Column(f"valid {m.title}", m.digits) for m in task.measures}
    for name in names:
        if other_set := re.fullmatch(r"(valid|test)_(.+?)/(.+)", name):
            phase, measure, which = other_set.groups()
            found[name] = Column(f"{which} {phase} {titles.get(measure, measure)}", digits.get(measure, 3))
    found |= {name: Column(title) for name, title in _COSTS.items()}
    for name in names:
        if fault := re.fullmatch(r"(share|weight_on)/(.+)", name):
            kind, what = fault[1], fault[2].replace("_", " ")
            found[name] = Column(f"{what} among selected" if kind == "share" else f"weight on {what}", 2)
    found |= {
        "learned_share": Column("already learned among selected", 2),
        "spread": Column("variance / mean of draws a row", 2),
        "preparation_steps": Column("steps before"),
    }
    for measure in measures:
        tuned, title = f"finetuned_test_{measure.name}", f"test {measure.title}, fine-tuned"
        found[tuned] = Column(title, measure.digits)
        others = [name for name in names if name.startswith(f"{tuned}/")]
        found |= {name: Column(f"{name.partition('/')[2]} {title}", measure.digits) for name in others}
    return found


def table(rows: Sequence[Row], task: Task, more: Mapping[str, Column] = MappingProxyType({})) -> str:
    """Return a Markdown table: one line a method, mean ± standard deviation over seeds; `more` are columns besides."""
    flat = [flatten(row) for row in rows]
    shown = [m for m in task.measures if m.unit and any(f"test_{m.name}" in row for row in flat)]
    units = "; ".join(f"{m.title} in {m.unit}" for m in shown)
    note = f"{units[:1].upper()}{units[1:]}; seconds of training." if units else "Seconds of training."
    return f"{by_method(flat, {**columns_of(task, flat), **more})}\n\n{note}"


def targets(rows: Sequence[Row], task: Task) -> Table | None:
    """Return the table of the steps, and epochs, until each target on test is reached; None without targets."""
    flat = [flatten(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row if name.startswith(("steps_to.", "epochs_to.")))
    columns = {n: Column(f"{n.split('_')[0]} to {n.partition('.')[2]}", int(n.startswith("epochs"))) for n in names}
    return by_method(flat, columns) if columns else None


def _more_tables(rows: Sequence[Row], task: Task) -> list[Section]:
    """The tables below the first one, of what some comparisons alone have."""
    found = [
        Section(f"Until a test {task.measures[0].title}", [], table=targets(rows, task)),
        Section("Against uniform", [], AGAINST, significance(rows, task)),
    ]
    return [section for section in found if section.table]


def write(setting: Setting, results: Sequence[Result]) -> str:
    """Write comparison.json, comparison.md and, of runs that did not diverge, the report; return the table."""
    run_dir, task = setting.config.study.run_dir, setting.task
    metrics = {r.key: read_metrics(r.context.directory / "metrics.jsonl") for r in results if WHERE not in r.row}
    folders = {r.key: r.context.directory for r in results}
    results = [
        r._replace(row=r.row | _crossing(r, metrics, setting) | _chances(r, folders, setting))
        if r.key in metrics
        else r
        for r in results
    ]
    rows = [result.row for result in results]
    more = _more_tables(rows, task)
    below = [text for one in more for text in (one.about or f"{one.title}:", str(one.table))]
    text = "\n\n".join([table(rows, task), *below, *_notes(rows)])
    write_json(run_dir / JSON, rows)
    write_atomically(run_dir / "comparison.md", text + "\n")
    if metrics:
        _report(setting, [result for result in results if result.key in metrics], metrics, more)
    return text


def _crossing(result: Result, metrics: Metrics, setting: Setting) -> Row:
    """When the run reaches the valid measure that uniform of the same seed ends with, and its best; and the targets on test.

    Reference: RHO-LOSS, section 5.2 and figure 3. An epoch is one pass over the training rows by what is loaded.
    """
    row, own, measure = result.row, metrics[result.key], setting.task.measures[0]
    reached = functools.partial(first_reaching, own, lower_is_better=measure.lower_is_better)
    valid, test = f"valid_{measure.name}", f"test_{measure.name}"
    baseline = [r[valid] for r in metrics.get((BASELINE, row["seed"]), []) if valid in r]
    found: Row = {}
    if baseline:
        best = (min if measure.lower_is_better else max)(baseline)
        at_end, at_best = (reached(valid, value) for value in (baseline[-1], best))
        found = {
            "steps_to_uniform": at_end and at_end["step"],
            "steps_to_uniform_best": at_best and at_best["step"],
            "seconds_to_uniform": at_end and at_end["seconds"] + preparation(row, at_end["step"]),
        }
    targets = {str(target): reached(test, target) for target in setting.config.study.targets}
    each = row["epochs"] / row["steps"]
    valids = [r for r in own if valid in r]
    warnings = [*row.get("warnings", []), worse_at_the_end(valids, measure), even_at_the_end(own, row["method"])]
    if given := [warning for warning in warnings if warning]:
        found["warnings"] = given
    return found | {
        "steps_to": {target: at and at["step"] for target, at in targets.items()},
        "epochs_to": {target: at and round(at["step"] * each, 3) for target, at in targets.items()},
    }


def _chances(result: Result, folders: Mapping[tuple[str, int], Path], setting: Setting) -> Row:
    """How probable by chance the differences to uniform of the same seed are, where models write."""
    baseline = folders.get((BASELINE, result.row["seed"]))
    if baseline is None:
        return {}
    return differences(setting.task, setting.config.task, setting.splits, result.context.directory, baseline)


def worse_at_the_end(rows: Sequence[Row], measure: Measure) -> str | None:
    """Return a sentence on a run whose valid measure, which the rows have, was clearly better before its end."""
    name, digits = f"valid_{measure.name}", measure.digits
    best = best_before_the_end(rows, name, lower_is_better=measure.lower_is_better)
    if best is None:
        return None
    return (
        f"valid {measure.title} was best at step {best['step']} ({best[name]:.{digits}f}) and ended at "
        f"{rows[-1][name]:.{digits}f}: train for fewer --steps."
    )


def even_at_the_end(rows: Sequence[Row], method: str) -> str | None:
    """Return a sentence on a run whose learned logits hardly differ after its first steps."""
    learned = [row for row in rows if math.isfinite(row.get("weight_gradient_norm", math.nan)) and "logit_rms" in row]
    if not learned or learned[-1]["step"] < _EVEN_AFTER or learned[-1]["logit_rms"] >= _EVEN:
        return None
    return (
        f"its logits hardly differ at the end (standard deviation {learned[-1]['logit_rms']:.1g}), so that all rows weigh alike: "
        f"if they drifted to their bound, give --{method.replace('_', '-')}.shift-pull 0.05, else look for a weighting network "
        "that does not learn."
    )


def preparation(row: Mapping[str, Any], step: int) -> float:
    """Return the seconds before a step that were spent on other things than training."""
    return row.get("preparation_seconds", 0.0) if step > row.get("preparation_step", 0) else 0.0


def _notes(rows: Sequence[Row]) -> list[str]:
    """In sentences, what scores rows of methods that select by a model, what else is trained on, and warnings of each run."""
    scored = {row["method"]: row.get("scored_by") for row in rows}
    more = {row["method"]: row.get("trained_on") for row in rows}
    return [
        *(f"{name}: {by}." for name, by in scored.items() if by),
        *(f"{name}: trained on {what}." for name, what in more.items() if what),
        *(f"Warning: {row['method']}, seed {row['seed']}: {text}" for row in rows for text in row.get("warnings", [])),
    ]


def _report(setting: Setting, ended: Sequence[Result], metrics: Metrics, more: Sequence[Section]) -> None:
    task, splits = setting.task, setting.splits
    rows = [flatten(result.row) for result in ended]
    columns, methods = columns_of(task, rows), list(dict.fromkeys(row["method"] for row in rows))
    first = {method: next(r.context.directory for r in ended if r.row["method"] == method) for method in methods}
    seeds = {method: [found for (name, _), found in metrics.items() if name == method] for method in methods}
    size = "effective_sample_size"  # that of rows which all count alike is their number
    weighing = {row["method"] for row in rows if row.get(size) is not None}
    weighed = {method: found if method in weighing else [] for method, found in seeds.items()}
    found = Report(
        title=task.title,
        introduction=" ".join([splits.about, *_notes(rows)]),
        settings=_settings(first),
        summary=by_method(rows, columns),
        runs=by_run(rows, columns) if len(rows) > len(methods) else None,
        sections=[
            *more,
            *_curves(seeds, task, splits),
            *over_training(weighed, size, "Effective sample size", "rows", log_y=True, about=_SAMPLE_SIZE),
            *chances(seeds),
            *domains(seeds, shares_of(splits.known, splits.train)),
            *_drawn(first),
        ],
        ranked=_ranked(setting.task.measures[0], ended),
    )
    write_report(setting.config.study.run_dir / REPORT, found)


def _curves(metrics: Mapping[str, list[list[Row]]], task: Task, splits: Splits) -> list[Section]:
    """A section for each measure on valid and test, each known fault, and what only some methods report."""
    section = functools.partial(over_training, metrics)
    found = []
    for phase, measure in itertools.product(("valid", "test"), task.measures):
        title, label = f"{phase} {measure.title}", f"{phase} {measure.label}"
        decides = (phase, measure) == ("valid", task.measures[0])
        found += section(f"{phase}_{measure.name}", title[:1].upper() + title[1:], label, seconds=decides)
    for name in faults(splits.known):
        found += section(f"share/{name}", f"{name.replace('_', ' ').capitalize()} among the selected rows", "share")
    found += section("reward", "Reward of the sampler", "exp(−scale · loss)")
    return found + section("generic_correct", "Selected rows that are classified as labelled", "share")


def _ranked(measure: Measure, ended: Sequence[Result]) -> dict[str, list[Any]]:
    """The rows that the best run with a weighting network likes most and least."""
    best_first = sorted(ended, key=lambda result: measure.sign * result.row[f"valid_{measure.name}"])
    return next((found for result in best_first if (found := shown(result.context))), {})


def _drawn(first: Mapping[str, Path]) -> list[Section]:
    """How often the first run of each sampler drew classes and rows."""
    files_of = {
        f"{method}: how often classes and rows were drawn": path / "frequencies.svg" for method, path in first.items()
    }
    return [Section(title, [Picture(title, file.read_text())]) for title, file in files_of.items() if file.exists()]


def _settings(first: Mapping[str, Path]) -> Table:
    """What runs were made with: first what all methods share, then "METHOD: NAME"; of one run a method."""
    found = {method: flatten(recorded(folder)) for method, folder in first.items()}
    for own in found.values():
        del own["method"], own["seed"]
    one, *others = found.values()
    shared = {name: value for name, value in one.items() if all(name in o and o[name] == value for o in others)}
    own = {f"{m}: {name}": value for m, given in found.items() for name, value in given.items() if name not in shared}
    return Table(["setting", "value"], [[name, str(value)] for name, value in (shared | own).items()])
