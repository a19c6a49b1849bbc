"""Does the trajectory of the weights matter, or only where it ends?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bilevel.data import permute
from bilevel.study.config import Config
from bilevel.study.run import Setting
from bilevel.study.variant import Variant
from bilevel.tools.analyses.base import OfLearner, Planned, in_folder
from bilevel.tools.analyses.snapshots import Snapshots, replay
from bilevel.types import UserError

ORDERS = ("shuffled", "replayed")


@dataclass(frozen=True)
class Curriculum(OfLearner):
    """Learned distribution against curriculum (table 6).

    Trains with SOBA (or --learner), and keeps the weighting network α every few steps. Then trains new main models with
    the last α frozen ("final"), with the kept α in a random order of the steps ("shuffled"), and in their own order
    ("replayed"). If final is no worse than the learner, what was learned is a distribution, not a curriculum.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.1.
    """

    snapshots: int = 50
    """Most α that are kept, at even distances from step 0 on; each serves for the steps up to the next."""
    seed_offset: int = 0
    """Added to the seed of the new main models. 0: they start from the learner's initial parameters and see the same big
    batches, so that only the weights differ."""

    name: ClassVar[str] = "curriculum"
    heading: ClassVar[str] = "trajectory"

    def check(self, config: Config) -> None:
        """As `OfLearner.check`, and the flags of this analysis."""
        super().check(config)
        if self.snapshots < 1:
            raise UserError(f"--snapshots {self.snapshots} must be at least 1.")
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
        for order in ORDERS:
            when = snapshots.before(order_of(order, steps, new))
            variant = Variant({**kept, "trajectory": order}, replay(snapshots, when), streams=True)
            yield Planned(order, in_folder(frozen, order), "frozen", new, variant)


def order_of(order: str, steps: int, seed: int) -> NDArray[np.int64]:
    """Return the step of the trajectory whose α serves in each step, int64 `[steps]`.

    It is a permutation, the identity if "replayed".
    """
    numbers = np.arange(steps, dtype=np.int64)
    return numbers if order == "replayed" else permute(numbers, steps, seed, 6_000_003)
