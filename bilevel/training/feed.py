"""Loads what the coming calls need, in a thread, while the current one runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from bilevel.data import read_ahead
from bilevel.training.programs import Programs, Step, StepChoice
from bilevel.types import Batch, UserError


class Loader(Protocol):
    """Gives the batch of a step; a pure function of the step."""

    def batch(self, step: int, /) -> Batch:
        """Return the host batch of `step` (counted from 0)."""
        ...


class Item(NamedTuple):
    """What one call of a program needs."""

    arguments: tuple[Any, ...]
    """What the program takes after the state."""
    steps: int | None = None
    """The steps of the call, whose metrics then have a leading axis; None: one step, without that axis."""
    idle: tuple[Any, ...] | None = None
    """Arguments with which the program makes no step and returns the state as it is; None: there are none."""


class Source(Protocol):
    """Data, and the programs that take them: `Data` or `Resident`."""

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Return the programs that make the steps, up to `steps_per_call` in one call."""
        ...

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Return what the call for the steps `first` to `first + count - 1` needs."""
        ...


@dataclass(frozen=True)
class Data:
    """Where the batches come from, and how they get to the devices."""

    generic: Loader
    """The big batches."""
    specific: Loader
    """The specific batches."""
    place_generic: Callable[[Batch], Batch] = jax.device_put
    """Host batch -> device arrays, with the sharding that the step expects. Called in a thread."""
    place_specific: Callable[[Batch], Batch] = jax.device_put
    """The same for specific batches."""

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Return the step functions themselves.

        Raises:
            UserError: more than one step is asked for.
        """
        if steps_per_call != 1:
            raise UserError(
                f"steps_per_call={steps_per_call} needs data that are on the device: "
                "give `Resident` data (--resident always), or one step a call."
            )
        return Programs(step)

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Load and place the batches of one step."""
        generic = self.place_generic(self.generic.batch(first))
        shared = self.specific is self.generic and self.place_specific is self.place_generic
        specific = generic if shared else self.place_specific(self.specific.batch(first))
        return Item((generic, specific))


def feed(
    data: Source, calls: Iterable[tuple[int, int]], steps_per_call: int = 1
) -> AbstractContextManager[Iterator[tuple[int, Item]]]:
    """Open an iterator over `(first step, item)` for calls `(first step, count)`.

    The thread ends with the context.

    What the loaders and placements raise is raised by the iterator.
    """
    return read_ahead((first, data.item(first, count, steps_per_call)) for first, count in calls)
