"""Data that stay on the device, and many steps in one call: only row numbers travel while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from bilevel.data import Dataset
from bilevel.devices import sharding
from bilevel.training.feed import Item
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.types import Array, Batch, UserError

_SHARE = 1 / 8
_WITHOUT_LIMIT = 1 << 30

_Carry: TypeAlias = tuple[Array, Any, dict[str, Array]]
"""Steps made in this call, the state, the metrics of all steps."""


class NumberLoader(Protocol):
    """Gives the rows of a step by their numbers; `bilevel.data.Loader`, `MixedLoader` and `TaskLoader` are such."""

    @property
    def dataset(self) -> Dataset:
        """Where the rows come from."""
        ...

    def indices(self, step: int, /) -> NDArray[np.integer[Any]]:
        """Return the row numbers of the batch of `step` (counted from 0), integer `[b]`."""
        ...


class Resident:
    """Two data sets on the device, in place of `Data`; `LoopConfig.steps_per_call` steps run in one call.

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
                "leave --resident away, or start one process."
            )
        self._everywhere = self._spread = None
        if mesh is not None and mesh.size > 1:
            self._everywhere = sharding.replicated(mesh)
            self._spread = NamedSharding(mesh, PartitionSpec(None, sharding.DATA_AXIS))
            sizes = len(generic.indices(0)), len(specific.indices(0))
            sharding.check_divides(mesh, generic_rows=sizes[0], specific_rows=sizes[1])
        self._loaders = (generic, specific)
        rows = [dataset.rows(np.arange(len(dataset))) for dataset in _datasets(*self._loaders)]
        self._ids = rows[0].get("id")
        tables = jax.device_put(rows, self._everywhere)
        self._tables = tables[0], tables[-1]
        self._none = jax.device_put(np.int32(0), self._everywhere)
        self._programs: dict[Any, Program] = {}

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """One program that makes up to `steps_per_call` steps, compiled once for all runs with this object.

        Raises:
            UserError: `step` chooses functions but does not say after how many steps they repeat (`period`).
        """
        key = (step, steps_per_call)
        if key not in self._programs:
            self._programs[key] = jax.jit(
                many_steps(step, steps_per_call), donate_argnums=0, out_shardings=self._everywhere
            )
        return Programs(self._programs[key])

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """The row numbers of the steps; what is beyond `count` is not used."""
        generic, specific = (_numbers(loader, first, count, steps_per_call) for loader in self._loaders)
        ids = None if self._ids is None else self._ids[generic[:count]]
        numbers = jax.device_put((generic, specific), self._spread)
        span = jax.device_put((np.int32(first), np.int32(count)), self._everywhere)
        arguments = (self._tables, numbers, *span)
        return Item(arguments, ids, count, idle=(*arguments[:-1], self._none))


def fits_on_device(*loaders: NumberLoader) -> bool:
    """Whether `Resident` data would leave a device nearly all of its memory.

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


def _numbers(loader: NumberLoader, first: int, count: int, most: int) -> NDArray[np.int32]:
    found = np.stack([loader.indices(step) for step in range(first, first + count)]).astype(np.int32)
    return np.pad(found, ((0, most - count), (0, 0)))


class _Phase(NamedTuple):
    """Consecutive steps of a period that one function makes."""

    function: Step
    begin: int
    end: int


def many_steps(step: Step | StepChoice, most: int) -> Program:
    """Make a function of up to `most` steps: `(state, tables, numbers, first, count) -> (state, metrics)`.

    Each kind of step has a loop of its own, which runs as often as the step is due, inside one loop over all: a choice by
    `lax.cond` would copy the state in each step on CPU. As no number of repetitions is known to the compiler, the steps of
    a call of one are compiled as those of a call of many, and round alike.

    Args:
        step: the step, or what chooses it (with `period`, after which the choice repeats).
        most: the leading axis of the numbers and the metrics.

    Returns:
        The function. tables: two batches of all rows; numbers: int32 `[most, B]` and `[most, b]`; first, count: int32
        scalars. Metrics from `count` on are 0.
    """
    phases = _phases(step)

    def run(
        state: Any, tables: tuple[Batch, Batch], numbers: tuple[Array, Array], first: Array, count: Array
    ) -> tuple[Any, Mapping[str, Array]]:
        def one(function: Step, made: Array, state: Any) -> tuple[Any, Mapping[str, Array]]:
            return function(state, *(_gather(*pair, made) for pair in zip(tables, numbers, strict=True)))

        def unfinished(carry: _Carry) -> Array:
            return carry[0] < count

        def repeat(phase: _Phase, carry: _Carry) -> _Carry:
            def due(carry: _Carry) -> Array:
                place = (first + carry[0]) % phases[-1].end
                return unfinished(carry) & (phase.begin <= place) & (place < phase.end)

            def body(carry: _Carry) -> _Carry:
                made, state, metrics = carry
                state, new = one(phase.function, made, state)
                return made + 1, state, {name: metrics[name].at[made].set(new[name]) for name in metrics}

            return jax.lax.while_loop(due if len(phases) > 1 else unfinished, body, carry)

        def period(carry: _Carry) -> _Carry:
            for phase in phases:
                carry = repeat(phase, carry)
            return carry

        _, shapes = jax.eval_shape(lambda: one(phases[-1].function, jnp.int32(0), state))
        metrics = {name: jnp.zeros((most, *shape.shape), shape.dtype) for name, shape in shapes.items()}
        carry = (jnp.int32(0), state, metrics)
        carry = jax.lax.while_loop(unfinished, period, carry) if len(phases) > 1 else period(carry)
        return carry[1], carry[2]

    return run


def _phases(step: Any) -> list[_Phase]:
    if not hasattr(step, "at"):
        return [_Phase(step, 0, 1)]
    if not hasattr(step, "period"):
        raise UserError(
            f"{type(step).__name__} chooses a function for each step, but has no `period`: add it, "
            "the number of steps after which the choice repeats."
        )
    functions = [step.at(place) for place in range(step.period)]
    begins = [0, *(place for place in range(1, len(functions)) if functions[place] != functions[place - 1])]
    ends = [*begins[1:], len(functions)]
    return [_Phase(functions[begin], begin, end) for begin, end in zip(begins, ends, strict=True)]


def _gather(table: Batch, numbers: Array, made: Array) -> Batch:
    rows = jax.lax.dynamic_index_in_dim(numbers, made, keepdims=False)
    return jax.tree.map(lambda column: column.at[rows].get(mode="promise_in_bounds"), table)
