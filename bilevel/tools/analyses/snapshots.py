"""The weighting parameters of a run every few steps, and their replay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.devices import sharding
from bilevel.files import load_tree, save_tree
from bilevel.training import Data, Replay, Resident, Source
from bilevel.types import Params, UserError

ON_DEVICE = 64
"""Snapshots that a replay keeps on the devices; others are read again when they are due."""


class Snapshots:
    """Files of α, one every `every` steps; equal parameters give equal files.

    Args:
      folder: where they are.
      every: steps from one to the next; the first is that of step 0, the initial α.
    """

    def __init__(self, folder: Path, every: int):
        self.folder = folder
        self.every = every

    def path(self, step: int) -> Path:
        """Return the file of α after `step` steps."""
        return self.folder / f"{step:08d}.safetensors"

    def save(self, state: Any, step: int) -> None:
        """Write the α of the state after `step` steps, if it is due; an `on_state` of a training."""
        if step % self.every or jax.process_index() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tree(self.path(step), state.weight_params)

    def check(self, steps: Iterable[int]) -> None:
        """Check that the snapshots of these steps are there.

        Raises:
          UserError: if one is missing.
        """
        missing = next((step for step in steps if not self.path(step).exists()), None)
        if missing is not None:
            raise UserError(
                f"The run in {self.folder.parent} lacks the snapshot {self.path(missing).name} of its weights: give another "
                "--run-dir, or remove that run, which is then trained again."
            )

    def load(self, step: int) -> Params:
        """Read the α after `step` steps."""
        return load_tree(self.path(step))[0]

    def before(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the last kept step at or before each of `steps`, int64 `[n]`."""
        return steps // self.every * self.every


def replay(snapshots: Snapshots, order: NDArray[np.int64]) -> Callable[[Data | Resident, Mesh], Source]:
    """Make training use the snapshot `order[t]` in step t.

    Args:
      snapshots: of a finished run.
      order: int64 `[T]`, for each step one that is kept.

    Returns:
      The `source` of a `Variant`.
    """

    def source(data: Data | Resident, mesh: Mesh) -> Source:
        if not isinstance(data, Data):
            raise UserError("Weights are replayed with batches that travel: give the variant `streams`.")
        snapshots.check(np.unique(order).tolist())
        where = sharding.replicated(mesh) if mesh.size > 1 else None

        @functools.lru_cache(maxsize=ON_DEVICE)
        def placed(step: int) -> Params:
            return jax.device_put(snapshots.load(step), where)

        return Replay(data, lambda step: placed(int(order[step])))

    return source
