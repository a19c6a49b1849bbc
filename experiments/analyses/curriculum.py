"""Does the trajectory of the weights matter, or only where it ends?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bilevel.data import permute
from bilevel.types import UserError
from experiments.analyses.analysis import Analysis, Run
from experiments.analyses.snapshots import Snapshots, replay
from experiments.language_modeling.variant import Variant

ORDERS = ("shuffled", "replayed")


@dataclass(frozen=True)
class Curriculum(Analysis):
    """Learned distribution against curriculum (table 6).

    Trains with SOBA (or --method), and keeps the weighting network α every few steps. Then trains new main models with
    the last α frozen ("final"), with the kept α in a random order of the steps ("shuffled"), and in their own order
    ("replayed"). If final is no worse than the learner, what was learned is a distribution, not a curriculum.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.1.
    """

    run_dir: Path = Path("runs/curriculum")
    """Where everything is written; the same command continues there."""
    snapshots: int = 50
    """Most α that are kept, at even distances from step 0 on; each serves for the steps up to the next."""
    seed_offset: int = 0
    """Added to the seed of the new main models. 0: they start from the learner's initial parameters and see the same big
    batches, so that only the weights differ."""

    heading: ClassVar[str] = "trajectory"

    def check(self) -> None:
        """As `Analysis.check`, and the flags of this analysis."""
        super().check()
        if self.snapshots < 1:
            raise UserError(f"--snapshots {self.snapshots} must be at least 1.")
        if self.resident == "always":
            raise UserError(
                "--resident always does not go with replaying weights, which travel step by step: leave it away."
            )

    @property
    def every(self) -> int:
        """Steps from one snapshot to the next."""
        return -(-self.steps // self.snapshots)

    def runs(self, seed: int) -> Iterator[Run]:
        """The learner, then the new models."""
        kept = {"snapshot_every": self.every}
        learner = Run(self.learner, self.settings(), self.learner, seed)
        snapshots = Snapshots(learner.directory / "snapshots", self.every)
        yield learner._replace(variant=Variant(kept, on_state=snapshots.save, state_every=self.every))
        new = seed + self.seed_offset
        yield Run("final", self.frozen(learner.directory, "final"), "frozen", new)
        for order in ORDERS:
            steps = snapshots.before(order_of(order, self.steps, new))
            variant = Variant({**kept, "trajectory": order}, replay(snapshots, steps), streams=True)
            yield Run(order, self.frozen(learner.directory, order), "frozen", new, variant)


def order_of(order: str, steps: int, seed: int) -> NDArray[np.int64]:
    """The step of the trajectory whose α serves in each step, int64 `[steps]`: a permutation, the identity if "replayed"."""
    numbers = np.arange(steps, dtype=np.int64)
    return numbers if order == "replayed" else permute(numbers, steps, seed, 6_000_003)
