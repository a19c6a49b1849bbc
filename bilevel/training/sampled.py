"""Data on the device for a run whose sampler picks the rows: nothing travels while training."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Dataset
from bilevel.training.feed import Item
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.types import Array, Batch, Metrics, UserError

_Carry: TypeAlias = tuple[Array, Any, Metrics]
"""Steps made in this call, the state, the metrics of all steps."""


class Sampled:
    """Rows to draw from and validation rows on the device, in place of `Data`.

        run = bilevel.make_sampled_step(sampler, loss, optimizer)
        train(run.step, run.init(rng, params), data=Sampled(rows, validation), config=config)

    `LoopConfig.steps_per_call` steps run in one call; which steps share a call does not change any result.

    Args:
        data: the N rows that the sampler draws from.
        validation: the rows of its reward.

    Raises:
        UserError: there are several processes.
    """

    def __init__(self, data: Dataset, validation: Dataset):
        if jax.process_count() > 1:
            raise UserError(f"Sampled data are for one process, and this run has {jax.process_count()}: start one.")
        host = [dataset.rows(np.arange(len(dataset))) for dataset in (data, validation)]
        self._ids = np.arange(len(data), dtype=np.int32)
        self._tables, self._none = jax.device_put((tuple(host), np.int32(0)))

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """One program that makes up to `steps_per_call` steps.

        Raises:
            UserError: `step` is not a function.
        """
        if not callable(step):
            raise UserError(f"Sampled data need a step function, not a {type(step).__name__}: give its `.step`.")
        return Programs(jax.jit(_many_steps(step, steps_per_call), donate_argnums=0))

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """What a call of `count` steps needs."""
        ids = np.broadcast_to(self._ids, (count, len(self._ids)))
        return Item((self._tables, jax.device_put(np.int32(count))), ids, count, idle=(self._tables, self._none))


def _many_steps(step: Step, most: int) -> Program:
    """`(state, tables, count) -> (state, metrics)`; metrics have a leading axis `most`, and are 0 from `count` on."""

    def run(state: Any, tables: tuple[Batch, Batch], count: Array) -> tuple[Any, Metrics]:
        def body(carry: _Carry) -> _Carry:
            made, state, metrics = carry
            state, new = step(state, *tables)
            return made + 1, state, {name: metrics[name].at[made].set(new[name]) for name in metrics}

        _, shapes = jax.eval_shape(step, state, *tables)
        metrics = {name: jnp.zeros((most, *shape.shape), shape.dtype) for name, shape in shapes.items()}
        carry = (jnp.int32(0), state, metrics)
        # Of no known length even for one step, so that the steps of all calls are compiled alike.
        return jax.lax.while_loop(lambda carry: carry[0] < count, body, carry)[1:]

    return run
