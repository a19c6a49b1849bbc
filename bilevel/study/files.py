"""Names and files of run directories, and how a stopped run ends."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel.training import Checkpoints
from bilevel.training.run_dir import CONFIG_NAME, anything_saved, read_settings, write_atomically
from bilevel.types import UserError

RESULT = "result.json"
"""In the directory of a run that has ended: its summary."""
CHECKPOINTS = "checkpoints"
CONTENT_HASH = "content_hash"
"""Of the data, in a run's settings: a path may hold other data tomorrow."""
STOPPED = 3
"""Exit code of a run that a signal stopped after saving."""


class Stopped(Exception):
    """A signal stopped a run after saving."""


def run_name(method: str, seed: int) -> str:
    """Return the name of a run's directory."""
    return f"{method}-seed{seed}"


def run_of(folder: Path) -> tuple[str, int] | None:
    """Return the method and the seed that a directory is named after; None for another directory."""
    found = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
    return (found[1], int(found[2])) if found else None


def begun(folder: Path) -> list[tuple[str, int]]:
    """Return method and seed of the runs that were begun in a folder."""
    found = [run_of(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    return [run for run in found if run is not None]


def read_json(file: Path) -> Any:
    """Read a file of a run directory.

    Raises:
      UserError: if it is damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the same command again.") from error


def write_json(file: Path, value: Any) -> None:
    """Write a file of a run directory in one piece; only process 0 writes."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(value, indent=2) + "\n")


def recorded(directory: Path) -> dict[str, Any]:
    """Return the settings that a run was begun with; {} where nothing was saved."""
    return read_settings(directory) if (directory / CONFIG_NAME).exists() and anything_saved(directory) else {}


def steps_done(directory: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 if there is none."""
    if not (directory / CHECKPOINTS).is_dir():
        return 0
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.latest_step() or 0


def newest(directory: Path, template: Any, advice: str) -> Any:
    """Return the newest checkpoint of a run.

    Raises:
      UserError: if there is none, with some advice.
    """
    restored = None
    if (directory / CHECKPOINTS).is_dir():
        with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(template)
    if restored is None:
        raise UserError(f"{directory} holds no checkpoint: {advice}.")
    return restored[1]


def remove(folder: Path) -> None:
    """Remove a folder; all processes call this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: nobody reads {folder.name}")
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: {folder.name} is removed")


def of_first(found: Callable[[], Any]) -> Any:
    """Return what process 0 finds, in every process: a value that JSON has. All processes call this."""
    if jax.process_count() == 1:
        return found()
    text = json.dumps(found()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def say(text: str) -> None:
    """Print a line on stderr, in process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a number over the rows that have it; None if none has."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(known)) if known else None
