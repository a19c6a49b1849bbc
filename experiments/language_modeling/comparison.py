"""The table over methods and seeds, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.study.report import RunRecord, Text, write_report
from bilevel.study.tables import Column, by_method
from bilevel.training import read_metrics
from bilevel.training.run_dir import CONFIG_NAME, flatten, write_atomically
from experiments.language_modeling.config import PLAIN, Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.weights import DOCUMENTS
from experiments.runs import read_json, run_name

UNITS = "Losses in nats per byte; seconds of training."
"""Below a table."""
COLUMNS = {
    "specific_test_loss": Column("specific test loss", 3),
    "specific_valid_loss": Column("specific valid loss", 3),
    "generic_loss": Column("generic loss", 3),
    "steps": Column("steps"),
    "seconds": Column("seconds"),
    "steps_to_uniform": Column("steps to uniform's end"),
    "seconds_to_uniform": Column("seconds to uniform's end"),
    "effective_sample_size": Column("effective sample size"),
    "finetuned_specific_test_loss": Column("test loss, fine-tuned", 3),
}


def compare(
    config: Config,
    results: Sequence[dict[str, Any]],
    corpora: Corpora,
    elsewhere: Mapping[tuple[str, int], Path] | None = None,
) -> str:
    """Writes comparison.json, comparison.md and report.html; returns the table.

    Args:
      config: of the comparison.
      results: summaries of runs; of those that diverged, only method and seed, and they are left out of the report.
      corpora: the data.
      elsewhere: (method, seed) -> directory of the runs that do not lie in the run directory.
    """
    ended = [row for row in results if _ended(row)]
    keys = [(row["method"], row["seed"]) for row in ended]
    folders = {key: config.run_dir / run_name(*key) for key in keys} | dict(elsewhere or {})
    metrics = {key: read_metrics(folders[key] / "metrics.jsonl") for key in keys}
    rows = [_with_crossing(row, metrics) if _ended(row) else row for row in results]
    text = table(rows)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_dir / "comparison.json", json.dumps(rows, indent=2) + "\n")
    write_atomically(config.run_dir / "comparison.md", text + "\n")
    firsts: dict[str, Path] = {}
    for method, seed in keys:
        firsts.setdefault(method, folders[method, seed])
    if ended:
        _report(config, [row for row in rows if _ended(row)], metrics, corpora, _settings(firsts))
    return text


def _ended(row: Mapping[str, Any]) -> bool:
    return "specific_valid_loss" in row


def _with_crossing(result: dict[str, Any], metrics: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """Adds the step and the second at which the run passes the loss that uniform of the same seed ends with; takes the effective
    sample size away where no big batch has one."""
    baseline = _evaluations(metrics.get(("uniform", result["seed"]), []))
    own = _evaluations(metrics[result["method"], result["seed"]])
    found = next((row for row in own if baseline and row["specific_valid_loss"] <= _end(baseline)), None)
    size = {"effective_sample_size": None} if result["method"] in PLAIN else {}
    return {
        **result,
        **size,
        "steps_to_uniform": found and found["step"],
        "seconds_to_uniform": found and found["seconds"] + _preparation(result, found["step"]),
    }


def _preparation(result: dict[str, Any], step: int) -> float:
    """The seconds before a step that were spent on other things than training."""
    return result.get("preparation_seconds", 0.0) if step > result.get("preparation_step", 0) else 0.0


def _evaluations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("specific_valid_loss") is not None]


def _end(rows: Sequence[dict[str, Any]]) -> float:
    return rows[-1]["specific_valid_loss"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one line a method, mean ± standard deviation over seeds."""
    return f"{by_method(rows, COLUMNS)}\n\n{UNITS}"


def _report(
    config: Config,
    rows: Sequence[dict[str, Any]],
    metrics: dict[tuple[str, int], list[dict[str, Any]]],
    corpora: Corpora,
    settings: dict[str, Any],
) -> None:
    records = []
    for row in rows:
        summary = {COLUMNS[name].title: row[name] for name in COLUMNS if row.get(name) is not None}
        records.append(
            RunRecord(row["method"], row["seed"], _shown(row["method"], metrics[row["method"], row["seed"]]), summary)
        )
    documents = _documents(config, rows)
    write_report(
        config.run_dir / "report.html",
        records,
        title="Language modelling with learned data weights",
        introduction=f"Generic: {config.data.generic}. Specific: {config.data.specific}. Losses in nats per byte.",
        settings=settings,
        loss_unit="nats per byte",
        generic_shares=corpora.shares,
        highest=documents.get("highest", ()),
        lowest=documents.get("lowest", ()),
    )


def _settings(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What runs were made with: first what all methods share, then "METHOD: NAME". The folders are those of one run a method."""
    of_runs = {"method", "seed"}
    found = {method: flatten(read_json(folder / CONFIG_NAME)) for method, folder in folders.items()}
    first, *others = found.values()
    shared = {k: v for k, v in first.items() if k not in of_runs and all(k in o and o[k] == v for o in others)}
    own = {f"{m}: {k}": v for m, given in found.items() for k, v in given.items() if k not in of_runs | shared.keys()}
    return shared | own


def _shown(method: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    hidden = {"effective_sample_size"} if method in PLAIN else set()
    return [{name: value for name, value in row.items() if name not in hidden} for row in rows]


def _documents(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, list[Text]]:
    """The highest- and lowest-weighted documents of the best run that has a network of text."""
    files = {config.run_dir / run_name(row["method"], row["seed"]) / DOCUMENTS: row for row in rows}
    known = [file for file in files if file.exists()]
    if not known:
        return {}
    file = min(known, key=lambda file: files[file]["specific_valid_loss"])
    return {name: [Text(*d) for d in found] for name, found in read_json(file).items()}
