"""What the model of a run writes about its test sets: kept, and measured, at the run's end alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from bilevel.data import digest
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
DIFFERENCES = "differences.json"
"""In the same directory: how probable the differences to uniform are by chance, with a digest of the texts compared."""
Texts: TypeAlias = Mapping[str, Sequence[str]]
"""Name of a test set -> the texts written for its rows."""


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
        files = own / name, baseline / name
        if own == baseline or not all(file.exists() for file in files):
            continue
        kept, texts = own / f"{prefix}{DIFFERENCES}", digest(file.read_bytes() for file in files)
        if not kept.exists() or read_json(kept)["texts"] != texts:  # a test takes a second, and there may be hundreds
            chances = _chances(task, config, splits, *(read_json(file)["texts"] for file in files))
            write_json(kept, {"texts": texts, "chances": chances})
        found |= {f"{prefix}p_{measure}": p for measure, p in read_json(kept)["chances"].items()}
    return found


def _chances(task: Any, config: Any, splits: Splits, own: Texts, baseline: Texts) -> dict[str, float]:
    """The largest p of each measure over the test sets."""
    each = [task.chance(config, splits, rows, baseline[name], own[name]) for name, rows in splits.test.items()]
    return {measure: max(found[measure] for found in each) for measure in each[0]}


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
