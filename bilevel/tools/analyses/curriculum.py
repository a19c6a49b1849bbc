"""Does the trajectory of the weights matter, or only where it ends?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bilevel.data import permute
from bilevel.study.config import Config
from bilevel.study.context import Setting, Variant
from bilevel.tools.analyses.base import OfLearner, Planned, in_folder
from bilevel.training import Snapshots
from bilevel.training.settings import Count
from bilevel.types import UserError


@dataclass(frozen=True)
class Curriculum(OfLearner):
    """Learned distribution against curriculum (table 6).

    Trains with SOBA (or --learner), and keeps the weighting network α every few steps. Then trains new main models with
    the last α frozen ("final"), with the kept α in a random order of the steps ("shuffled"), and in their own order
    ("replayed"). If final is no worse than the learner, what was learned is a distribution, not a curriculum.
    After Grangier et al. (2024), section 6.1.
    """

    snapshots: Count = 50
    """Most α that are kept, at even distances from step 0 on; each serves for the steps up to the next."""
    seed_offset: int = 0
    """Added to the seed of the new main models. 0: they start from the learner's initial parameters and see the same big
    batches, so that only the weights differ."""

    name: ClassVar[str] = "curriculum"

    def check(self, config: Config) -> None:
        """Refuse batches that lie on the device."""
        super().check(config)
        if config.study.resident == "always":
            raise UserError("--resident always does not go with replaying weights, which travel step by step: omit it.")

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan the learner, then the new models."""
        steps = setting.config.study.steps
        every = -(-steps // self.snapshots)
        kept = {"snapshot_every": every}
        learner = setting.context(self.learner, seed)
        snapshots = Snapshots(learner.directory / "snapshots", every)
        variant = Variant(kept, on_state=snapshots.save, state_every=every)
        yield Planned(self.learner, dataclasses.replace(learner, variant=variant))
        new, frozen = seed + self.seed_offset, self.frozen(setting, learner.directory)
        yield Planned("final", in_folder(frozen, "final").context("frozen", new))
        numbers = np.arange(steps)
        for name, order in (("shuffled", permute(numbers, steps, new, 6_000_003)), ("replayed", numbers)):
            variant = Variant({**kept, "trajectory": name}, snapshots.replay(order // every * every), streams=True)
            yield Planned(name, in_folder(frozen, name).context("frozen", new, variant))
