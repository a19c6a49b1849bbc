"""What the model of a run writes about its test sets: kept, and measured, at the run's end alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel.devices import sharding
from bilevel.devices.processes import of_first
from bilevel.study.context import Context
from bilevel.study.task import Model, Splits
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.tables import Table
from bilevel.types import ModelState, Params

OUTPUTS = "outputs.json"
"""In the directory of a run: the texts it wrote for each test set, and their measures."""
FINETUNED_OUTPUTS = "finetuned_outputs.json"


def judges(context: Context) -> bool:
    """Say whether the runs of a comparison write."""
    return context.study.judge and hasattr(context.task, "write")


def judged(
    context: Context, model: Model, begin: Callable[[], tuple[Params, ModelState]], name: str = OUTPUTS
) -> dict[str, float]:
    """Return `test_bleu`, `test_bleu/SET`, … of what a model writes for the rows of each test set.

    The texts are kept in the run's directory. {} where nothing is to be written; texts of an earlier model are then removed.
    """
    file, task = context.directory / name, context.task
    if not hasattr(task, "write"):
        return {}
    if not context.study.judge:
        of_first(lambda: file.unlink(missing_ok=True))
        return {}
    writing: Any = task
    config, splits = context.config.task, context.splits
    write, (params, model_state) = writing.write(config, splits, model), sharding.local(begin())
    found: dict[str, float] = {}
    texts: dict[str, Sequence[str]] = {}
    for number, (which, rows) in enumerate(splits.test.items()):
        texts[which], end = write(params, model_state, rows), f"/{which}" if number else ""
        values = writing.judge(config, splits, rows, texts[which])
        found |= {f"test_{measure}{end}": value for measure, value in values.items()}
    write_json(file, {"results": found, "texts": texts})
    return found


def differences(task: Any, config: Any, splits: Splits, own: Path, baseline: Path) -> dict[str, float]:
    """Return `p_bleu`, `finetuned_p_bleu`, …: how probable as large a difference to another run is by chance.

    Of several test sets the largest is taken; {} where one of the two runs wrote nothing.

    Args:
      task: the task; its `chance` compares two lists of texts.
      config: the settings of the task.
      splits: the data.
      own: the directory of a run.
      baseline: that of the other.
    """
    found: dict[str, float] = {}
    for name, prefix in ((OUTPUTS, ""), (FINETUNED_OUTPUTS, "finetuned_")):
        if own == baseline or not ((own / name).exists() and (baseline / name).exists()):
            continue
        texts, others = (read_json(folder / name)["texts"] for folder in (own, baseline))
        for which, rows in splits.test.items():
            for measure, p in task.chance(config, splits, rows, others[which], texts[which]).items():
                key = f"{prefix}p_{measure}"
                found[key] = max(found.get(key, 0.0), p)
    return found


def significance(rows: Sequence[Mapping[str, Any]], task: Any) -> Table | None:
    """Return the table of what `differences` found, of each method the largest over seeds; None if there is nothing."""
    titles = {
        f"{prefix}p_{m.name}": f"p, {m.title}{end}"
        for prefix, end in (("", ""), ("finetuned_", ", fine-tuned"))
        for m in getattr(task, "judged", ())
    }
    shown = {name: title for name, title in titles.items() if any(name in row for row in rows)}
    methods = dict.fromkeys(row["method"] for row in rows if any(name in row for name in shown))
    largest = {m: [max(r.get(name, 0.0) for r in rows if r["method"] == m) for name in shown] for m in methods}
    lines = [[method, *(f"{p:.3f}" for p in found)] for method, found in largest.items()]
    return Table(["method", *shown.values()], lines) if lines else None
