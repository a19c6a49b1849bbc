"""Does the trajectory of the weights matter, or only where it ends?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.data import permute
from bilevel.devices import sharding
from bilevel.files import load_tree, save_tree
from bilevel.study.config import Config, check_least
from bilevel.study.run import Setting
from bilevel.study.variant import Variant
from bilevel.tools.analyses.base import OfLearner, Planned, in_folder
from bilevel.training import Data, Replay, Resident, Source
from bilevel.types import Params, UserError

_ON_DEVICE = 64
"""Snapshots that a replay keeps on the devices; others are read again when they are due."""


@dataclass(frozen=True)
class Curriculum(OfLearner):
    """Learned distribution against curriculum (table 6).

    Trains with SOBA (or --learner), and keeps the weighting network α every few steps. Then trains new main models with
    the last α frozen ("final"), with the kept α in a random order of the steps ("shuffled"), and in their own order
    ("replayed"). If final is no worse than the learner, what was learned is a distribution, not a curriculum.
    After Grangier et al. (2024), section 6.1.
    """

    snapshots: int = 50
    """Most α that are kept, at even distances from step 0 on; each serves for the steps up to the next."""
    seed_offset: int = 0
    """Added to the seed of the new main models. 0: they start from the learner's initial parameters and see the same big
    batches, so that only the weights differ."""

    name: ClassVar[str] = "curriculum"

    def check(self, config: Config) -> None:
        """Refuse a trajectory without snapshots, and batches that lie on the device."""
        super().check(config)
        check_least(self, {"snapshots": 1})
        if config.study.resident == "always":
            raise UserError("--resident always does not go with replaying weights, which travel step by step: omit it.")

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan the learner, then the new models."""
        steps = setting.config.study.steps
        every = -(-steps // self.snapshots)
        kept = {"snapshot_every": every}
        learner = Planned(self.learner, setting, self.learner, seed)
        snapshots = Snapshots(learner.directory / "snapshots", every)
        yield learner._replace(variant=Variant(kept, on_state=snapshots.save, state_every=every))
        new, frozen = seed + self.seed_offset, self.frozen(setting, learner.directory)
        yield Planned("final", in_folder(frozen, "final"), "frozen", new)
        for name, order in orders(steps, new).items():
            variant = Variant({**kept, "trajectory": name}, snapshots.replay(order // every * every), streams=True)
            yield Planned(name, in_folder(frozen, name), "frozen", new, variant)


class Snapshots(NamedTuple):
    """Files of α, one every `every` steps from the initial α on; equal parameters give equal files."""

    folder: Path
    every: int

    def path(self, step: int) -> Path:
        """Return the file of α after `step` steps."""
        return self.folder / f"{step:08d}.safetensors"

    def save(self, state: Any, step: int) -> None:
        """Write the α of the state after `step` steps, if it is due; an `on_state` of a training."""
        if step % self.every == 0 and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tree(self.path(step), state.weight_params)

    def replay(self, order: NDArray[np.int64]) -> Callable[[Data | Resident, Mesh], Source]:
        """Return the `source` of a `Variant` that uses the snapshot `order[t]` in step t."""

        def source(data: Data | Resident, mesh: Mesh) -> Source:
            assert isinstance(data, Data)
            missing = next((self.path(step) for step in np.unique(order) if not self.path(step).exists()), None)
            if missing is not None:
                raise UserError(
                    f"The run in {self.folder.parent} lacks the snapshot {missing.name} of its weights: give another "
                    "--run-dir, or remove that run, which is then trained again."
                )
            where = sharding.replicated(mesh) if mesh.size > 1 else None

            @functools.lru_cache(maxsize=_ON_DEVICE)
            def placed(step: int) -> Params:
                return jax.device_put(load_tree(self.path(step))[0], where)

            return Replay(data, lambda step: placed(int(order[step])))

        return source


def orders(steps: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the step of the trajectory whose α serves in each step, int64 `[steps]`, by the name of the order."""
    numbers = np.arange(steps, dtype=np.int64)
    return {"shuffled": permute(numbers, steps, seed, 6_000_003), "replayed": numbers}
