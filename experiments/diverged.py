"""Runs that diverged: a comparison notes them, goes on without them, and does not train them again."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from bilevel.training import TrainingDiverged
from bilevel.training.run_dir import flatten, write_atomically
from bilevel.types import UserError
from experiments.runs import read_json

NAME = "diverged.json"
WHERE = "diverged_in"
"""In the row of a run that diverged: the directory with the note."""


def settled(settings: Mapping[str, Any], may_change: Collection[str]) -> dict[str, Any]:
    """What decides whether a run diverges: its settings by dotted name, without those that may change when it continues."""
    found = flatten(json.loads(json.dumps(settings, default=str)))
    return {name: value for name, value in found.items() if name not in may_change}


def note(folder: Path, error: TrainingDiverged, settings: Mapping[str, Any]) -> None:
    """Says in a directory that training there diverged with these settings, JSON values; only process 0 writes."""
    if jax.process_index() != 0:
        return
    found = {"message": str(error), "step": error.step, "settings": settings}
    write_atomically(folder / NAME, json.dumps(found, indent=2) + "\n")


def noted(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a directory says so of these settings; a note of other settings is removed."""
    file = folder / NAME
    if not file.exists():
        return False
    if read_json(file)["settings"] != settings:
        file.unlink()
        return False
    return True


def tell(run: Path, row: Mapping[str, Any]) -> None:
    """Prints what is known of a run that diverged, and how to train it again."""
    if jax.process_index() == 0:
        file = Path(row[WHERE]) / NAME
        print(f"{run} diverged: {read_json(file)['message']} Delete {file} to train it again.", file=sys.stderr)


def refuse(rows: Iterable[Mapping[str, Any]]) -> None:
    """Ends a comparison, after its tables, by naming the runs that diverged.

    Raises:
      UserError: if there are some.
    """
    failed = list(dict.fromkeys(row[WHERE] for row in rows if WHERE in row))
    if failed:
        raise UserError(
            f"{len(failed)} of the runs diverged and are dashes in the tables ({', '.join(failed)}): lower the learning rate in "
            f"another --run-dir, or delete {NAME} there to train them again."
        )
