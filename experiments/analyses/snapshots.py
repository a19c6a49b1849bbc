"""The weighting parameters of a run every few steps, and their replay."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.devices import sharding
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
        """The file of α after `step` steps."""
        return self.folder / f"{step:08d}.npz"

    def save(self, state: Any, step: int) -> None:
        """Writes the α of the state after `step` steps, if it is one of those that are kept; an `on_state` of a training."""
        if step % self.every or jax.process_index() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        leaves = flatten_dict(state.weight_params, sep="/")
        temporary = self.folder / ".writing.npz"
        np.savez(temporary, allow_pickle=False, **{name: np.asarray(leaf) for name, leaf in leaves.items()})
        os.replace(temporary, self.path(step))

    def check(self, steps: Iterable[int]) -> None:
        """Checks that the snapshots of these steps are there.

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
        """Reads the α after `step` steps."""
        with np.load(self.path(step), allow_pickle=False) as stored:
            return unflatten_dict({name: stored[name] for name in stored.files}, sep="/")

    def before(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last kept step at or before each of `steps`, int64 `[n]`."""
        return steps // self.every * self.every


def replay(snapshots: Snapshots, order: NDArray[np.int64]) -> Callable[[Data | Resident, Mesh], Source]:
    """Makes training use the snapshot `order[t]` in step t.

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
