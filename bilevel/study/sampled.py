"""The plan of a run whose rows a sampler draws by their numbers, from data on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from bilevel.data import rows_hash
from bilevel.nn.head import with_head
from bilevel.samplers import Sampler
from bilevel.step import SampledState, make_sampled_step
from bilevel.study.context import Context
from bilevel.study.feeding import check_parts
from bilevel.study.spec import NOTHING, Plan
from bilevel.training import SequenceRecorder, save_sampler, save_sequence
from bilevel.training.frequencies import save_frequencies
from bilevel.types import Array, Params, UserError

SEQUENCE = "sequence.safetensors"
SAMPLER = "sampler.safetensors"
DRAWN = "sequence.part"
"""The sequence while training."""


def sampled_plan(
    context: Context, sampler: Sampler, *, parts: int = 1, begin: Callable[[], Any] | None = None,
    learned: bool = False, through_optimizer: bool = False, **fields: Any,
) -> Plan:  # fmt: skip
    """Return the plan of a run that a sampler draws the rows of.

    Args:
      context: the run.
      sampler: what draws.
      parts: see `make_sampled_step`, `validation_micro_batches`.
      begin: makes the parameters that a learned sampler begins with, once the run begins; None: its own.
      learned: whether the sampler's parameters are kept at the end.
      through_optimizer: see `make_sampled_step`.
      fields: of `Plan`.

    Raises:
      UserError: for flags that do not go with data on the device.
    """
    study, splits, folder = context.study, context.splits, context.directory
    if study.resident == "never":
        raise UserError(
            f"--resident never does not fit {context.method}, whose data always lie on the device: omit it."
        )
    if jax.process_count() > 1:
        raise UserError(f"{context.method} runs in one process: omit --hosts.coordinator, or this method.")
    check_parts("--batch-size", study.batch_size, study.micro_batches)
    model = context.model()
    if sampler.observe is not None:
        model = model._replace(loss=with_head(model.loss))
    step = make_sampled_step(
        sampler, model.loss, context.optimizer, validation_micro_batches=parts, micro_batches=study.micro_batches,
        ema_decay=study.optimizer.average or None, through_optimizer=through_optimizer,
    )  # fmt: skip

    def init(model_key: Array, weight_key: Array, step_key: Array, start: Params = NOTHING) -> SampledState:
        with jax.ensure_compile_time_eval():  # what it makes is known; `init` is traced
            given = None if begin is None else begin()
        params, model_state = model.first(model_key, start)
        return step.init(step_key, params, model_state, given)

    def recorder() -> SequenceRecorder:
        ids = splits.train.rows(np.arange(len(splits.train)))["id"]
        return SequenceRecorder(folder / DRAWN, study.batch_size, ids)

    def finish(state: Any) -> Mapping[str, float]:
        about = {"content_hash": rows_hash(splits.train), "num_rows": len(splits.train)}
        sequence = recorder().sequence()
        save_sequence(folder / SEQUENCE, sequence, **about)
        if learned:
            save_sampler(folder / SAMPLER, state.sampler.params, **about)
        rewards = 0 if sampler.reward is None else len(sequence) // sampler.reward_every
        found = save_frequencies(folder, sequence, len(splits.train), splits.known, rewards)
        (folder / DRAWN).unlink(missing_ok=True)
        return found

    return Plan(model=model, step=step, init=init, recorder=recorder, finish=finish, **fields)
