"""The tables over methods and seeds, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.study.report import Curve, Picture, RunRecord, write_report
from bilevel.study.tables import Column, by_method, mean_cell
from bilevel.training import read_metrics
from bilevel.training.run_dir import write_atomically
from experiments.diverged import WHERE
from experiments.image_classification import drawn, pictures
from experiments.image_classification.config import LEARNED, SAMPLED, TABLED, Config
from experiments.image_classification.data import ImageData
from experiments.image_classification.observation import shares_of
from experiments.image_classification.run import settings_dict
from experiments.runs import run_name

COLUMNS = {
    "test_accuracy": Column("test accuracy", 3),
    "best_test_accuracy": Column("best", 3),
    "test_accuracy_at_best_dev": Column("at best dev", 3),
    "dev_accuracy": Column("dev accuracy", 3),
    "test_loss": Column("test loss", 3),
    "steps": Column("steps"),
    "seconds": Column("seconds"),
    "steps_to_uniform_best": Column("steps to uniform's best"),
    "corrupted_share": Column("wrong labels among selected", 2),
    "irrelevant_share": Column("irrelevant among selected", 2),
    "learned_share": Column("already learned among selected", 2),
    "weight_on_corrupted": Column("weight on wrong labels", 2),
    "corrupted_often": Column("wrong labels among the tenth drawn most", 2),
    "corrupted_rarely": Column("wrong labels among the tenth drawn least", 2),
    "spread": Column("variance / mean of draws a row", 2),
}
CURVES = (
    Curve("test_accuracy", "Test accuracy", "accuracy"),
    Curve("dev_accuracy", "Dev accuracy", "accuracy"),
    Curve("test_loss", "Test loss", "loss (nats)"),
    Curve("corrupted_share", "Wrong labels among the selected rows", "share"),
    Curve("irrelevant_share", "Irrelevant rows among the selected", "share"),
    Curve("reward", "Reward of the sampler", "exp(−scale · dev loss)"),
    Curve("generic_correct", "Selected rows that are already classified as labelled", "share"),
)
Rows = list[dict[str, Any]]


def compare(config: Config, results: Sequence[dict[str, Any]], data: ImageData) -> str:
    """Writes comparison.json, comparison.md and report.html; returns the tables."""
    keys = [(row["method"], row["seed"]) for row in results if WHERE not in row]
    metrics = {key: read_metrics(config.run_dir / run_name(*key) / "metrics.jsonl") for key in keys}
    rows = [_with_targets(config, result, metrics) for result in results]
    text = f"{table(rows)}\n\nSteps (epochs) to a test accuracy:\n\n{targets_table(rows, config.targets)}"
    text = "\n\n".join([text, *_notes(config, rows)])
    write_atomically(config.run_dir / "comparison.json", json.dumps(rows, indent=2) + "\n")
    write_atomically(config.run_dir / "comparison.md", text + "\n")
    _report(config, rows, metrics, data)
    return text


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a method: accuracies on a scale of 0 to 1, shares of the rows that were trained on, by their weight."""
    return by_method(rows, COLUMNS)


def _with_targets(config: Config, result: dict[str, Any], metrics: Mapping[tuple[str, int], Rows]) -> dict[str, Any]:
    """Adds when the run reaches the accuracies asked for, and the best one of uniform with the same seed.

    Reference: RHO-LOSS, section 5.2 and figure 3. An epoch is one pass over the training rows by what is loaded: online selection
      loads more rows a step than it trains on.
    """
    if WHERE in result:
        return result | {name: dict.fromkeys(map(str, config.targets)) for name in ("steps_to", "epochs_to")}
    own = metrics[result["method"], result["seed"]]
    baseline = [row["test_accuracy"] for row in metrics.get(("uniform", result["seed"]), []) if "test_accuracy" in row]
    steps = {str(target): reached(own, target) for target in config.targets}
    each = result["epochs"] / result["steps"]
    return result | {
        "steps_to_uniform_best": reached(own, max(baseline)) if baseline else None,
        "steps_to": steps,
        "epochs_to": {target: step and round(step * each, 3) for target, step in steps.items()},
    }


def reached(rows: Sequence[Mapping[str, Any]], accuracy: float) -> int | None:
    """The first step at which the test accuracy is that high; None if never."""
    return next((row["step"] for row in rows if row.get("test_accuracy", -1.0) >= accuracy), None)


def targets_table(rows: Sequence[dict[str, Any]], targets: Sequence[float]) -> str:
    """One line a method, one column an accuracy; a dash where a seed does not reach it."""
    names = [str(target) for target in targets]
    lines = ["| method | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = []
        for name in names:
            steps = mean_cell([row["steps_to"][name] for row in own], 0)
            epochs = mean_cell([row["epochs_to"][name] for row in own], 1)
            cells.append(steps if steps == epochs else f"{steps} ({epochs})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _report(config: Config, rows: Rows, metrics: Mapping[tuple[str, int], Rows], data: ImageData) -> None:
    records = []
    for row in (row for row in rows if WHERE not in row):
        summary = {column.title: row[name] for name, column in COLUMNS.items() if row.get(name) is not None}
        summary |= {f"steps to {target}": step for target, step in row["steps_to"].items()}
        records.append(RunRecord(row["method"], row["seed"], metrics[row["method"], row["seed"]], summary))
    first = rows[0]
    noise = "" if config.data.noise == "none" else f" Noise: {config.data.noise}."
    write_report(
        config.run_dir / "report.html",
        records,
        title=f"{'Image classification' if data.inputs == 'image' else 'Classification'} with learned data weights",
        introduction=" ".join([f"Data: {config.data.source}; {data.sets.rule}.{noise}", *_notes(config, rows)]),
        settings=settings_dict(config, first["method"], first["seed"]),
        generic_shares=shares_of(data),
        curves=CURVES,
        pictures=_pictures(config, rows),
    )


def _notes(config: Config, rows: Rows) -> list[str]:
    """What scores the rows of each method that selects by a model, and what its seconds leave out, in sentences."""
    ended = [row for row in rows if WHERE not in row]
    notes = [
        f"{name}: {note}." for name, note in {row["method"]: row.get("scored_by") for row in ended}.items() if note
    ]
    beforehand = ("svp",) if config.weights.table else (*TABLED, "svp")
    helped = [method for method in dict.fromkeys(row["method"] for row in ended) if method in beforehand]
    if helped:
        notes.append(f"Seconds of {', '.join(helped)} are without those of the model that is trained before.")
    return notes


def _pictures(config: Config, rows: Rows) -> list[Picture]:
    """What the first run of each learned scorer weighs most and least, and what that of each sampler drew how often."""
    weighed = {pictures.PICTURE: "images with the highest and the lowest weights"}
    counted = {drawn.PLOT: "how often classes and rows were drawn", drawn.PICTURE: "images drawn most and least often"}
    shown = {**dict.fromkeys(LEARNED, weighed), **dict.fromkeys(SAMPLED, counted)}
    first = {row["method"]: row["seed"] for row in reversed(rows) if WHERE not in row}
    found = []
    for method, files in shown.items():
        for name, title in files.items() if method in first else ():
            file = config.run_dir / run_name(method, first[method]) / name
            if file.exists():
                found.append(Picture(f"{method}: {title}", file.read_text()))
    return found
