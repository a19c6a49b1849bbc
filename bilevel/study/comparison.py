"""The table over methods and seeds, and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bilevel.study import files
from bilevel.study.diverged import WHERE
from bilevel.study.observing import faults, shares_of
from bilevel.study.report import Curve, Picture, RunRecord, write_report
from bilevel.study.run import Setting, context_of, directory_of
from bilevel.study.tables import Column, by_method, markdown, mean_cell
from bilevel.study.task import Measure, Task
from bilevel.study.weights import shown
from bilevel.training import read_metrics
from bilevel.training.run_dir import flatten, write_atomically

REPORT = "report.html"
Row = dict[str, Any]
Metrics = Mapping[tuple[str, int], list[Row]]


def columns_of(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of the table: measures on test and valid, costs, what was chosen, fine-tuning."""
    first, *_ = task.measures
    found: dict[str, Column] = {}
    for phase in ("test", "valid"):
        found |= {f"{phase}_{m.name}": Column(f"{phase} {m.title}", m.digits) for m in task.measures}
        if phase == "test":
            found[f"best_test_{first.name}"] = Column("best", first.digits)
            found[f"test_{first.name}_at_best_valid"] = Column("at best valid", first.digits)
    others = dict.fromkeys(
        name for row in rows for name in row if "/" in name and name.split("_")[0] in ("valid", "test")
    )
    digits = {m.name: m.digits for m in task.measures}
    for name in others:
        phase, _, rest = name.partition("_")
        measure, _, which = rest.partition("/")
        found[name] = Column(f"{which} {phase} {measure}", digits.get(measure, 3))
    found |= {
        "steps": Column("steps"), "seconds": Column("seconds"), "steps_to_uniform": Column("steps to uniform's end"),
        "steps_to_uniform_best": Column("steps to uniform's best"),
        "seconds_to_uniform": Column("seconds to uniform's end"), "effective_sample_size": Column("effective sample size"),
    }  # fmt: skip
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith(("share/", "weight_on/"))):
        kind, fault = name.split("/", 1)
        title = (
            f"{fault.replace('_', ' ')} among selected" if kind == "share" else f"weight on {fault.replace('_', ' ')}"
        )
        found[name] = Column(title, 2)
    found |= {
        "learned_share": Column("already learned among selected", 2),
        "spread": Column("variance / mean of draws a row", 2),
        "preparation_steps": Column("steps before"),
        f"finetuned_test_{first.name}": Column(f"test {first.title}, fine-tuned", first.digits),
    }
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith(f"finetuned_test_{first.name}/")):
        found[name] = Column(f"{name.partition('/')[2]} test {first.title}, fine-tuned", first.digits)
    return found


def table(rows: Sequence[Row], task: Task, more: Mapping[str, Column] = MappingProxyType({})) -> str:
    """Return a Markdown table: one line a method, mean ± standard deviation over seeds; `more` are columns besides."""
    units = "; ".join(f"{m.title} in {m.unit}" for m in task.measures if m.unit)
    note = f"{units[:1].upper()}{units[1:]}; seconds of training." if units else "Seconds of training."
    return f"{by_method(rows, {**columns_of(task, rows), **more})}\n\n{note}"


def write(setting: Setting, results: Sequence[Row], elsewhere: Mapping[tuple[str, int], Path]) -> str:
    """Write comparison.json, comparison.md and the report; return the tables.

    Args:
      setting: of the comparison.
      results: summaries of runs; of those that diverged, only method and seed, and they are left out of the report.
      elsewhere: (method, seed) -> directory of the runs that do not lie in the run directory.
    """
    config, task = setting.config, setting.task
    ended = [row for row in results if WHERE not in row]
    keys = [(row["method"], row["seed"]) for row in ended]
    folders = {key: directory_of(config, *key) for key in keys} | dict(elsewhere)
    metrics = {key: read_metrics(folders[key] / "metrics.jsonl") for key in keys}
    rows = [_with_crossing(row, metrics, setting) if WHERE not in row else row for row in results]
    text = "\n\n".join([table(rows, task), *_targets(rows, setting), *_notes(rows)])
    run_dir = config.study.run_dir
    files.write_json(run_dir / "comparison.json", rows)
    write_atomically(run_dir / "comparison.md", text + "\n")
    if ended:
        _report(setting, [row for row in rows if WHERE not in row], metrics, folders)
    return text


def _with_crossing(row: Row, metrics: Metrics, setting: Setting) -> Row:
    """Add when the run reaches the valid measure that uniform of the same seed ends with, and the targets on test.

    Reference: RHO-LOSS, section 5.2 and figure 3. An epoch is one pass over the training rows by what is loaded.
    """
    measure = setting.task.measures[0]
    valid, test, own = f"valid_{measure.name}", f"test_{measure.name}", metrics[row["method"], row["seed"]]
    baseline = [r[valid] for r in metrics.get(("uniform", row["seed"]), []) if r.get(valid) is not None]
    at = reached(own, valid, baseline[-1], measure) if baseline else None
    sign = 1 if measure.lower_is_better else -1
    best = reached(own, valid, sign * min(sign * x for x in baseline), measure) if baseline else None
    each = row["epochs"] / row["steps"]
    targets = {str(t): reached(own, test, t, measure) for t in setting.config.study.targets}
    return row | {
        "steps_to_uniform": at and at["step"],
        "steps_to_uniform_best": best and best["step"],
        "seconds_to_uniform": at and at["seconds"] + preparation(row, at["step"]),
        "steps_to": {t: found and found["step"] for t, found in targets.items()},
        "epochs_to": {t: found and round(found["step"] * each, 3) for t, found in targets.items()},
    }


def preparation(row: Mapping[str, Any], step: int) -> float:
    """Return the seconds before a step that were spent on other things than training."""
    return row.get("preparation_seconds", 0.0) if step > row.get("preparation_step", 0) else 0.0


def reached(rows: Sequence[Row], name: str, value: float, measure: Measure) -> Row | None:
    """Return the first row whose metric is at least that good; None if there is none."""
    sign = 1 if measure.lower_is_better else -1
    return next((row for row in rows if row.get(name) is not None and sign * row[name] <= sign * value), None)


def _targets(rows: Sequence[Row], setting: Setting) -> list[str]:
    """One line a method, one column a target: steps, and epochs where more is loaded than trained on."""
    names = [str(target) for target in setting.config.study.targets]
    if not names:
        return []
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own, cells = [row for row in rows if row["method"] == method], []
        for name in names:
            steps, epochs = (
                mean_cell([row.get(to, {}).get(name) for row in own], d)
                for to, d in (("steps_to", 0), ("epochs_to", 1))
            )
            cells.append(steps if steps == epochs else f"{steps} ({epochs})")
        lines.append([method, *cells])
    title = setting.task.measures[0].title
    return [f"Steps (epochs) to a test {title}:\n\n{markdown(['method', *names], lines)}"]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What scores the rows of each method that selects by a model, in sentences."""
    return [f"{name}: {by}." for name, by in {row["method"]: row.get("scored_by") for row in rows}.items() if by]


def _report(setting: Setting, rows: Sequence[Row], metrics: Metrics, folders: Mapping[tuple[str, int], Path]) -> None:
    config, task, splits = setting.config, setting.task, setting.splits
    columns, measure = columns_of(task, rows), setting.task.measures[0]
    records = []
    for row in rows:
        summary = {c.title: row[name] for name, c in columns.items() if row.get(name) is not None}
        summary |= {f"steps to {target}": step for target, step in row["steps_to"].items()}
        records.append(RunRecord(row["method"], row["seed"], metrics[row["method"], row["seed"]], summary))
    found = _ranked(setting, rows, measure)
    write_report(
        config.study.run_dir / REPORT,
        records,
        title=task.title,
        introduction=" ".join([splits.about, *_notes(rows)]),
        settings=_settings({key[0]: folders[key] for key in reversed(list(folders))}),
        valid_metric=f"valid_{measure.name}",
        valid_title=f"valid {measure.title}",
        valid_unit=measure.unit,
        generic_shares=shares_of(splits),
        highest=found.get("highest", ()),
        lowest=found.get("lowest", ()),
        curves=_curves(setting),
        pictures=_drawn(rows, folders),
    )


def _curves(setting: Setting) -> list[Curve]:
    found = [
        Curve(f"{phase}_{m.name}", f"{phase.capitalize()} {m.title}", m.unit or m.title)
        for phase in ("valid", "test")
        for m in setting.task.measures
        if (phase, m) != ("valid", setting.task.measures[0])  # which has a section of its own
    ]
    names = faults(setting.splits)
    found += [
        Curve(f"share/{n}", f"{n.replace('_', ' ').capitalize()} among the selected rows", "share") for n in names
    ]
    found.append(Curve("reward", "Reward of the sampler", "exp(−scale · loss)"))
    return [*found, Curve("generic_correct", "Selected rows that are classified as labelled", "share")]


def _ranked(setting: Setting, rows: Sequence[Row], measure: Measure) -> dict[str, list[Any]]:
    """The rows that the best run with a weighting network likes most and least."""
    sign = 1 if measure.lower_is_better else -1
    for row in sorted(rows, key=lambda row: sign * row[f"valid_{measure.name}"]):
        context = context_of(setting, row["method"], row["seed"])
        if found := shown(context):
            return found
    return {}


def _drawn(rows: Sequence[Row], folders: Mapping[tuple[str, int], Path]) -> list[Picture]:
    """How often the first run of each sampler drew classes and rows."""
    found = []
    for method, seed in {row["method"]: row["seed"] for row in reversed(rows)}.items():
        file = folders[method, seed] / "frequencies.svg"
        if file.exists():
            found.append(Picture(f"{method}: how often classes and rows were drawn", file.read_text()))
    return found


def _settings(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What runs were made with: first what all methods share, then "METHOD: NAME". The folders are those of one run a method."""
    of_runs = {"method", "seed"}
    found = {method: flatten(files.recorded(folder)) for method, folder in folders.items()}
    first, *others = found.values()
    shared = {k: v for k, v in first.items() if k not in of_runs and all(k in o and o[k] == v for o in others)}
    own = {f"{m}: {k}": v for m, given in found.items() for k, v in given.items() if k not in of_runs | shared.keys()}
    return shared | own
