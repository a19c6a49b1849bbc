"""Names that all comparisons share: the directories of their runs, and how a stopped one ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.types import UserError

RESULT_NAME = "result.json"
"""In the directory of a run that has ended: its summary."""
CHECKPOINTS = "checkpoints"
CONTENT_HASH = "content_hash"
"""Of the data, in a run's settings: a path may hold other data tomorrow."""
STOPPED = 3
"""Exit code of a run that a signal stopped after saving."""


class Stopped(Exception):
    """A signal stopped a run after saving."""


def run_name(method: str, seed: int) -> str:
    """Directory of one run below the run directory."""
    return f"{method}-seed{seed}"


def without_newer(settings: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without those that came later and say what was done before: runs begun then go on.

    Args:
      settings: by name.
      before: what was done before there was a setting, by its name.
    """
    return {name: value for name, value in settings.items() if name not in before or value != before[name]}


def read_json(file: Path) -> Any:
    """What a file of a run directory holds.

    Raises:
      UserError: if it is damaged.
    """
    if file.name == CONFIG_NAME:
        return read_settings(file.parent)
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the same command again.") from error


def of_first(found: Callable[[], Any]) -> Any:
    """What process 0 finds, in every process: a value that JSON has. All processes call this."""
    if jax.process_count() == 1:
        return found()
    text = json.dumps(found()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))
