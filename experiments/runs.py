"""Names that all comparisons share: the directories of their runs, and how a stopped one ends."""

from __future__ import annotations

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
