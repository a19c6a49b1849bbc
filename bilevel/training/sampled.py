"""Data on the device for a sampled run: nothing travels while training."""

from __future__ import annotations

import functools

import jax
import numpy as np

from bilevel.data import Dataset
from bilevel.training.feed import Item
from bilevel.training.one_by_one import program_of_steps
from bilevel.training.programs import Programs, Step, StepChoice
from bilevel.types import UserError


class Sampled:
    """Rows to draw from and validation rows on the device, instead of `Data`.

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
        self._tables, self._none = jax.device_put((tuple(host), np.int32(0)))

    def programs(self, step: Step | StepChoice, steps_per_call: int) -> Programs:
        """Make one program for up to `steps_per_call` steps."""
        compiled = functools.partial(jax.jit, donate_argnums=0)
        program = program_of_steps(step, steps_per_call, lambda tables, made: tables, compiled)
        return Programs(program, lambda program: program)

    def item(self, first: int, count: int, steps_per_call: int) -> Item:
        """Return what the call for `count` steps needs."""
        span = jax.device_put((np.int32(first), np.int32(count)))
        return Item((self._tables, *span), count, idle=(self._tables, span[0], self._none))
