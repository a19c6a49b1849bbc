"""Data that stay on the device: only row numbers travel while training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from bilevel.data import Dataset, PastLoader
from bilevel.devices import sharding
from bilevel.training.feed import Item
from bilevel.training.one_by_one import program_of_steps
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.types import Array, Batch, Shared, UserError

_SHARE = 1 / 8
_WITHOUT_LIMIT = 1 << 30


class NumberLoader(Protocol):
    """Gives the rows of a step by their numbers.

    `bilevel.data.Loader`, `MixedLoader`, `TaskLoader` and `PastLoader` are such.
    """

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        ...

    def indices(self, step: int, /) -> NDArray[np.integer[Any]]:
        """Return the row numbers of the batch of `step` (counted from 0), integer `[b]`."""
        ...


class Resident:
    """Two data sets on the device, instead of `Data`.

    `LoopConfig.steps_per_call` steps run in one call.

    The batches are those of `Data` with the same loaders. Which steps share a call does not change any result: all calls
    run one program, whose loops run as often as asked.

    Args:
        generic: gives the rows of the big batches.
        specific: gives the rows of the specific batches.
        mesh: every device gets all rows, and keeps the whole state; the rows of a batch are spread over the mesh. None: the
            default device.

    Raises:
        UserError: there are several processes, or the mesh does not divide the rows of a batch.
    """

    def __init__(self, generic: NumberLoader, specific: NumberLoader, mesh: Mesh | None = None):
        if jax.process_count() > 1:
            raise UserError(
                f"Resident data are for one process, and this run has {jax.process_count()}: "
                "omit --resident, or start one process."
            )
        self._everywhere = self._spread = None
        if mesh is not None and mesh.size > 1:
            self._everywhere = sharding.replicated(mesh)
            self._spread = NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXIS))
            sizes = len(generic.indices(0)), len(specific.indices(0))
            sharding.check_divides(mesh, generic_rows=sizes[0], specific_rows=sizes[1])
        self._loaders = (generic, specific)
        rows = [dataset.rows(np.arange(len(dataset))) for dataset in _datasets(*self._loaders)]
        tables = jax.device_put(rows, self._everywhere)
        self._tables = tables[0], tables[-1]
        self._none = jax.device_put(np.int32(0), self._everywhere)
        self._programs: dict[Any, Program] = {}

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Make one program for up to `steps_per_call` steps, or one for each kind of step where loops are slow.

        They are compiled once for all runs with this object.

        Raises:
            UserError: `step` chooses functions but does not say after how many steps they repeat (`period`).
        """
        key = (step, steps_per_call)
        if key not in self._programs:
            compiled = functools.partial(jax.jit, donate_argnums=0, out_shardings=self._everywhere)
            self._programs[key] = program_of_steps(step, steps_per_call, self._batches, compiled)
        return Programs(self._programs[key], lambda program: program)

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Return the row numbers of the steps; what is beyond `count` is not used."""
        numbers = tuple(self._placed(_numbers(loader, first, count, steps_per_call)) for loader in self._loaders)
        span = jax.device_put((np.int32(first), np.int32(count)), self._everywhere)
        arguments = ((self._tables, numbers), *span)
        return Item(arguments, count, idle=(*arguments[:-1], self._none))

    def _placed(self, numbers: _Numbers) -> _Numbers:
        past = None if numbers.past is None else jax.device_put(numbers.past, self._everywhere)
        return _Numbers(jax.device_put(numbers.rows, self._spread), past)

    def _batches(self, given: tuple[tuple[Batch, Batch], tuple[_Numbers, _Numbers]], made: Array) -> tuple[Batch, ...]:
        """Gather the batches of a step, of tables of all rows."""
        tables, numbers = given
        batches = [_gather(table, of.rows, made) for table, of in zip(tables, numbers, strict=True)]
        for loader, table, of, batch in zip(self._loaders, tables, numbers, batches, strict=True):
            if isinstance(loader, PastLoader):
                batch[loader.name] = _past(loader, table, of.past, made)
        return tuple(batches)


class _Numbers(NamedTuple):
    """The numbers of the rows of some steps."""

    rows: Any
    """int32 `[most, b]`."""
    past: Any
    """int32 `[most, count]`, −1 where there is no row; None for a loader without a past."""


def fits_on_device(*loaders: NumberLoader) -> bool:
    """Whether the data fit in 1/8 of device memory (1 GiB on CPU).

    At most an eighth of it, or 1 GiB where devices share that of the machine and do not say how much it is (CPU).

    Args:
        loaders: of the data sets; one that several share counts once.
    """
    devices = jax.local_devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    most = _WITHOUT_LIMIT // len(devices) if limit is None else int(limit * _SHARE)
    return sum(_bytes(dataset) for dataset in _datasets(*loaders)) <= most


def _datasets(*loaders: NumberLoader) -> list[Dataset]:
    """Each data set once, in the order of the loaders; one that a loader makes anew when asked equals no other."""
    found: list[Dataset] = []
    for dataset in [loader.dataset for loader in loaders]:
        if not any(dataset is known for known in found):
            found.append(dataset)
    return found


def _bytes(dataset: Dataset) -> int:
    return len(dataset) * sum(column.nbytes for column in dataset.rows(np.zeros(1, np.int64)).values())


def _numbers(loader: NumberLoader, first: int, count: int, most: int) -> _Numbers:
    def of(numbers: Callable[[int], NDArray[np.integer[Any]]]) -> NDArray[np.int32]:
        found = np.stack([numbers(step) for step in range(first, first + count)]).astype(np.int32)
        return np.pad(found, ((0, most - count), (0, 0)))

    return _Numbers(of(loader.indices), of(loader.past) if isinstance(loader, PastLoader) else None)


def _past(loader: PastLoader, table: Batch, numbers: Array, made: Array) -> Shared:
    """Gather what the batch of a step has besides its rows, as `PastLoader.shared` does."""
    rows = _gather({column: table[column] for column in loader.columns}, jnp.maximum(numbers, 0), made)
    return Shared({**rows, "real": jax.lax.dynamic_index_in_dim(numbers, made, keepdims=False) >= 0})


def _gather(table: Batch, numbers: Array, made: Array) -> Batch:
    """Gather rows of a table by the numbers of one step, of int32 `[most, n]`."""
    rows = jax.lax.dynamic_index_in_dim(numbers, made, keepdims=False)
    return jax.tree.map(lambda column: column.at[rows].get(mode="promise_in_bounds"), table)
