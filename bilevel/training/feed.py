"""Batches of the coming steps, loaded and placed on the devices by a thread while the current step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import jax

from bilevel.data import prefetch
from bilevel.types import Batch


class Loader(Protocol):
    """Gives the batch of a step; a pure function of the step."""

    def batch(self, step: int, /) -> Batch:
        """Return the host batch of `step` (counted from 0)."""
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


class Item(NamedTuple):
    """What one step needs."""

    ids: Any
    """int32 `[B]`: the row ids of the whole big batch (of all processes), or None when it has no `id`."""
    generic: Batch
    specific: Batch


@contextmanager
def feed(data: Data, start: int, stop: int) -> Iterator[Iterator[tuple[int, Item]]]:
    """Open an iterator over `(step, item)` for the steps `start` to `stop - 1`; the thread ends with the context.

    What the loaders and placements raise is raised by the iterator.
    """
    with prefetch(cast(Any, _Items(data)), start, stop) as items:
        yield cast(Iterator[tuple[int, Item]], items)


class _Items:
    """The items as one loader."""

    def __init__(self, data: Data):
        self._data = data

    def batch(self, step: int, /) -> Item:
        host = self._data.generic.batch(step)
        generic = self._data.place_generic(host)
        specific = self._data.place_specific(self._data.specific.batch(step))
        # A process has only its own rows on the host; the placed array has those of all processes.
        rows = host if jax.process_count() == 1 else generic
        return Item(rows.get("id") if isinstance(rows, dict) else None, generic, specific)
