"""Names of run directories and of what is in them."""

from __future__ import annotations

import re
from pathlib import Path

from bilevel.training.run_dir import CONFIG_NAME

RESULT = "result.json"
"""In the directory of a run that has ended: its summary."""
CONTENT_HASH = "content_hash"
"""Of the data, in a run's settings: a path may hold other data tomorrow."""


def run_of(folder: Path) -> tuple[str, int] | None:
    """Return the method and the seed that a directory is named after; None for another directory."""
    found = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
    return (found[1], int(found[2])) if found else None


def begun(folder: Path) -> list[tuple[str, int]]:
    """Return method and seed of the runs that were begun in a folder."""
    found = [run_of(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    return [run for run in found if run is not None]
