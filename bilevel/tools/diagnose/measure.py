"""SAR, GAR and measures of one model, on rows that stay the same from one measurement to the next."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
from pydantic import Field

from bilevel.offline.acceleration import acceleration_rates
from bilevel.offline.compared_rows import draw_compared
from bilevel.study.context import Setting
from bilevel.study.task import GENERIC, ModelOptions
from bilevel.training.evaluation import measured
from bilevel.training.settings import Count
from bilevel.types import ModelState, Params

Several: TypeAlias = Annotated[int, Field(ge=2)]
_EVALUATED = 2048  # most rows of each set in an evaluation


@dataclass(frozen=True)
class Compared:
    """How much is compared, as flags."""

    rows: Several = 256
    """m: specific rows, and as many generic ones, whose gradients are compared; from the valid sets."""
    pairs: Several = 8
    """P: pairs of a specific and a generic batch that they are compared with; from the training sets."""
    batch_rows: Count | None = None
    """Rows in each of these batches; none given: 128, as in the paper, or half of the rows that there are. Fewer mean noisier
    gradients, and rates nearer to chance."""


class Measurement:
    """Compares rows with pairs of batches of other rows.

    The rows come from the valid sets, and those of a task without generic valid rows from the training set. Derivatives are
    exact and in float32, whatever the model trains in, and losses those of evaluation: a row's depends on nothing but the row.
    A UserError says that the data are too small for the batches.
    """

    def __init__(self, setting: Setting, sizes: Compared, seed: int):
        config, task, splits = setting.config.task, setting.task, setting.splits
        self.data, parts, about = draw_compared(
            (splits.deciding, splits.specific), (splits.valid.get(GENERIC, splits.train), splits.train),
            rows=sizes.rows, pairs=sizes.pairs, batch_rows=sizes.batch_rows,
            seed=seed + 5_000_011,  # other rows than those of the first steps
        )  # fmt: skip
        seen = "" if GENERIC in splits.valid else "; the generic rows are of the training set, as there are no others"
        self.about = f"{about}{seen}."
        exact = task.model(config, splits, ModelOptions(forward=True, dtype="float32"))
        self._rates = functools.partial(acceleration_rates, exact.evaluation, micro_batches=parts)
        evaluate = task.evaluate(config, splits, task.model(config, splits, ModelOptions()))
        self._measured = functools.partial(measured, evaluate, sets=splits.measured(test=False), limit=_EVALUATED)

    def __call__(self, model: tuple[Params, ModelState]) -> dict[str, float]:
        """Return the measures on the valid sets, the rates and their standard errors."""
        params, model_state = jax.tree.map(jnp.asarray, jax.device_get(model))
        rates = self._rates(params, model_state, *self.data, rng=jax.random.key(0))
        return self._measured((params, model_state)) | {name: float(value) for name, value in rates._asdict().items()}
