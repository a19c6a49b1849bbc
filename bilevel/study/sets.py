"""Several specific sets, each with its name and a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from bilevel.data import JoinedData
from bilevel.study import files
from bilevel.study.config import Config
from bilevel.study.task import Splits
from bilevel.training.run_dir import CONFIG_NAME
from bilevel.types import UserError

ALL = "all sets"
"""Name of the rows of several sets together, which are evaluated as the mean over the sets."""


def set_name(given: str) -> str:
    """Return the name of a specific set: that of its folder or file, without what follows the first dot."""
    last = given.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in last) or "specific"


def named_sets(config: Config) -> list[tuple[str, Config]]:
    """Return the specific sets, each with its name and its own configuration.

    Raises:
      UserError: if two have the same name, or the task has no --data.specific.
    """
    data, several = config.task.data, config.study.specific_sets
    if not hasattr(data, "specific"):
        if several:
            raise UserError("--specific-sets is for tasks with --data.specific, which this one has not: omit it.")
        return [("specific", config)]
    if not several:
        return [(set_name(data.specific), config)]
    names = [set_name(given) for given in several]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f'--specific-sets has two sets named "{double}": rename a file or folder of them.')
    return [(name, for_set(config, name, given)) for name, given in zip(names, several, strict=True)]


def for_set(config: Config, name: str, given: str) -> Config:
    """Return the configuration for one specific set, in a folder named after it."""
    task = dataclasses.replace(config.task, data=dataclasses.replace(config.task.data, specific=given))
    folder = config.study.run_dir / name
    own = dataclasses.replace(config, task=task, prepared=folder / config.prepared.name)
    return own.with_study(specific_sets=(), run_dir=folder)


def earlier_sets(config: Config, names: Collection[str]) -> list[tuple[str, Config]]:
    """Return the sets, besides those with these names, that earlier commands compared beside this one's."""
    base = config.study.run_dir.parent
    if not names or config.study.run_dir.name not in names:
        return []
    found: dict[str, Config] = {}
    parent = config.with_study(run_dir=base)
    for file in sorted(base.glob(f"*/*-seed*/{CONFIG_NAME}")):
        name, given = file.parent.parent.name, files.recorded(file.parent).get("data", {}).get("specific", "")
        if name not in names and name not in found and given and set_name(given) == name:
            found[name] = for_set(parent, name, given)
    return list(found.items())


def joined(sets: Mapping[str, Splits], weights: Sequence[float] | None) -> Splits:
    """Return the splits of the first set with the specific rows of all; the test sets have names of their own.

    Args:
      sets: name -> splits with the same generic rows.
      weights: how often a specific batch comes from each, in proportion; None: all alike.
    """
    first, *_ = sets.values()
    tests = {name: next(iter(splits.test.values())) for name, splits in sets.items()}
    deciding = JoinedData({name: splits.deciding for name, splits in sets.items()})
    held_out = {name: splits.held_out for name, splits in sets.items() if splits.held_out is not None}
    return dataclasses.replace(
        first,
        specific=JoinedData({name: splits.specific for name, splits in sets.items()}),
        valid={ALL: deciding, **{name: first.valid[name] for name in list(first.valid)[1:]}},
        test={ALL: JoinedData(tests), **tests},
        held_out=JoinedData(held_out) if len(held_out) == len(sets) else None,
        specific_weights=weights,
    )
