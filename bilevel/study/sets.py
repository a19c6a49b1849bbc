"""Several specific sets, each with its name and a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from bilevel.data import JoinedData
from bilevel.study import budget, comparison, search
from bilevel.study.config import Config
from bilevel.study.context import CONTENT_HASH, Context, Setting
from bilevel.study.results import WHERE, leave_out
from bilevel.study.task import Splits
from bilevel.training.metrics import Row
from bilevel.training.run_dir import read_json, recorded
from bilevel.types import UserError

ALL = "all sets"
"""Name of the rows of several sets together, which are evaluated as the mean over the sets."""


def set_name(given: str) -> str:
    """Return the name of a specific set: that of its folder or file, without what follows the first dot."""
    last = given.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in last) or "specific"


def named_sets(config: Config) -> list[tuple[str, Config]]:
    """Return the specific sets, each with its name and its own configuration; several have folders of their own.

    A UserError says that two have the same name, or that the task has no --data.specific.
    """
    data, several = config.task.data, config.study.specific_sets
    if not hasattr(data, "specific"):
        if several:
            raise UserError("--specific-sets is for tasks with --data.specific, which this one has not: omit it.")
        return [("specific", config)]
    if not several:
        return [(set_name(data.specific), config)]
    found: dict[str, Config] = {}
    for given in several:
        name = set_name(given)
        if name in found:
            raise UserError(f'--specific-sets has two sets named "{name}": rename a file or folder of them.')
        task = dataclasses.replace(config.task, data=dataclasses.replace(data, specific=given))
        folder = config.study.run_dir / name
        own = dataclasses.replace(config, task=task, prepared=folder / config.prepared.name)
        found[name] = own.with_study(specific_sets=(), run_dir=folder)
    return list(found.items())


def joined(sets: Mapping[str, Splits], weights: Sequence[float] | None) -> Splits:
    """Return the splits of the first set with the specific rows of all; the test sets have names of their own.

    The generic rows of all are the same. `weights` say how often a specific batch comes from each, in proportion; None: all
    alike.
    """
    first, *_ = sets.values()
    tests = {name: next(iter(splits.test.values())) for name, splits in sets.items()}
    deciding = JoinedData({name: splits.deciding for name, splits in sets.items()})
    held_out = {name: splits.held_out for name, splits in sets.items() if splits.held_out is not None}
    return dataclasses.replace(
        first, specific=JoinedData({name: splits.specific for name, splits in sets.items()}),
        valid={ALL: deciding, **{name: first.valid[name] for name in list(first.valid)[1:]}},
        test={ALL: JoinedData(tests), **tests}, specific_weights=weights,
        held_out=JoinedData(held_out) if len(held_out) == len(sets) else None,
    )  # fmt: skip


def labelled(name: str, budget: str, rows: Sequence[Row]) -> list[Row]:
    """Return results with the specific set and the budget that they belong to."""
    return [{"specific_set": name, "budget": budget, **row} for row in rows]


def earlier_sets(setting: Setting, names: Collection[str]) -> list[Row]:
    """Return what earlier commands found for other specific sets, in the folders beside that of this one.

    A folder with other settings or other generic data is named on stderr. The setting is of one set, `names` are the sets of this
    command.
    """
    found: list[Row] = []
    for file in sorted(setting.config.study.run_dir.parent.glob(f"*/{comparison.JSON}")):
        folder, rows = file.parent, read_json(file)
        ended = next((row for row in rows if WHERE not in row), None)
        if folder.name in names or ended is None:
            continue
        there = setting.at(folder).context(ended["method"], ended["seed"])
        if set_name(recorded(there.directory).get("data", {}).get("specific", "")) != folder.name:
            continue  # a folder of a budget
        if other := _other(there):
            leave_out(folder, f"its runs differ in {', '.join(other[:3])}")
            continue
        found += labelled(folder.name, "steps", rows)
        if (file := budget.folder_of(there.config) / comparison.JSON).exists():
            found += labelled(folder.name, "seconds", read_json(file))
    return found


def _other(context: Context) -> list[str]:
    """The settings, besides those of the method and its set, that a run has otherwise than this command."""
    there = context.of(search.searched_before(context.config, context.method))
    apart, train = (f"{context.method}.", "data.specific", CONTENT_HASH), f"{CONTENT_HASH}.train"
    return [name for name in there.differing() if not name.startswith(apart) or name == train]
