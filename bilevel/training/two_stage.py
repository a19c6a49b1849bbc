"""Batches of which only the rows that the filter picks travel in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.data import Dataset, PastLoader
from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.step.kinds import TrainStep, TwoStage
from bilevel.training.feed import Item, Loader
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.training.resident import NumberLoader
from bilevel.types import Batch, UserError


@dataclass(frozen=True)
class TwoStageData:
    """Where the batches come from, instead of `Data`: of the big batches, first what the weighting network reads.

    The device scores and filters that part; then the rows that it picked are loaded in full, and the step goes on with them. The
    results are those of `Data`. Rows can only be loaded once they are picked: the device waits for them. With 2,048 images of
    224 × 224 pixels in a big batch, views of 32 × 32, and 256 rows picked, 59 MB travel in a step instead of 330 (13 MB of both
    are a past of 8,192 captions).
    """

    generic: NumberLoader
    """Gives the rows of the big batches by their numbers, and their past if it is a `PastLoader`."""
    small: Dataset
    """The same rows, of the arrays that the weighting network reads (`CaptionRows.small`)."""
    specific: Loader
    """The specific batches."""
    mesh: Mesh | None = None
    """The devices that rows are spread over; None: the default device."""

    def __post_init__(self) -> None:
        if len(self.small) != len(self.generic.dataset):
            raise UserError(
                f"The small rows of {self.small.name} are {len(self.small)}, but {self.generic.dataset.name} has "
                f"{len(self.generic.dataset)}: give the same rows, of fewer arrays."
            )

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Return what makes a step in two stages.

        Raises:
            UserError: more than one step is asked for, or `step` is no `TrainStep`.
        """
        if steps_per_call != 1:
            raise UserError(f"steps_per_call={steps_per_call} does not fit steps in two stages: give one step a call.")
        if not isinstance(step, TrainStep):
            raise UserError(
                f"TwoStageData takes a TrainStep, not a {type(step).__name__}: give what bilevel.make_step returns."
            )
        return Programs(_ByStages(step), self._compiled)

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Load and place what one step begins with, and what loads the rest."""
        numbers = self.generic.indices(first)
        shared = self.generic.shared(first) if isinstance(self.generic, PastLoader) else {}
        small, shared, specific = map(self._place, (self.small.rows(_own(numbers)), shared, self.specific.batch(first)))

        def rows_at(positions: NDArray[np.integer[Any]]) -> Batch:
            return {**self._place(self.generic.dataset.rows(_own(numbers[positions]))), **shared}

        return Item((small, specific, rows_at))

    def _place(self, batch: Batch) -> Batch:
        return jax.device_put(batch) if self.mesh is None else sharding.batch_placer(self.mesh)(batch)

    def _compiled(self, stages: TwoStage) -> Program:
        everywhere = None if self.mesh is None else sharding.everywhere(self.mesh)
        choose = jax.jit(stages.choose, out_shardings=everywhere)
        step_on = jax.jit(stages.step_on, donate_argnums=0)

        def program(state: TrainState, small: Batch, specific: Batch, rows_at: Callable[[Any], Batch]) -> Any:
            choice = choose(state, small)
            rows = rows_at(jax.device_get(sharding.local(choice.positions)))
            return step_on(state, rows, specific, choice)

        return program


class _ByStages(NamedTuple):
    """Chooses the two stages of a step by its number."""

    train: TrainStep

    def at(self, step: int) -> TwoStage:
        """Return what is due at this step."""
        return self.train.stages_at(step)


def _own(numbers: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """This process's slice of the rows of all processes."""
    if len(numbers) % jax.process_count():
        raise UserError(
            f"{len(numbers)} rows cannot be divided among {jax.process_count()} processes: choose a multiple of their number."
        )
    share = len(numbers) // jax.process_count()
    return numbers[jax.process_index() * share : (jax.process_index() + 1) * share]
