"""What the processes of a run on several hosts do once, or in the same way."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def of_first(found: Callable[[], Any]) -> Any:
    """Return what process 0 finds, in every process: a value that JSON has. All processes call this."""
    if jax.process_count() == 1:
        return found()
    text = json.dumps(found()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def remove_folder(folder: Path) -> None:
    """Remove a folder; all processes call this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: nobody reads {folder.name}")
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bilevel: {folder.name} is removed")


def say(text: str) -> None:
    """Print a line on stderr, in process 0."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
