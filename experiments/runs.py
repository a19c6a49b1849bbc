"""Names that all comparisons share: the directories of their runs, and how a stopped one ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bilevel.types import UserError

RESULT_NAME = "result.json"
"""In the directory of a run that has ended: its summary."""
CHECKPOINTS = "checkpoints"
STOPPED = 3
"""Exit code of a run that a signal stopped after saving."""


class Stopped(Exception):
    """A signal stopped a run after saving."""


def run_name(method: str, seed: int) -> str:
    """Directory of one run below the run directory."""
    return f"{method}-seed{seed}"


def read_json(file: Path) -> Any:
    """What a file of a run directory holds.

    Raises:
      UserError: if it is damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the same command again.") from error
