"""SAR, GAR and measures of one model, on rows that stay the same from one measurement to the next; as a table and a plot."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from bilevel import trees
from bilevel.offline.acceleration import RATES, acceleration_rates
from bilevel.offline.compared_rows import draw_compared
from bilevel.offline.verdict import CHANCE, ERRORS, in_percent
from bilevel.study.context import Setting
from bilevel.study.task import GENERIC, Measure, ModelOptions
from bilevel.training.charts import Line, draw
from bilevel.training.evaluation import measured
from bilevel.training.settings import Count
from bilevel.training.tables import Table
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError

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
    part: str | None = None
    """Compare the gradients of the parameters alone whose path fits this pattern, such as "image/*" for one of two towers or
    "*/kernel"; none given: of all."""


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
        if sizes.part is not None:
            _of_part(sizes.part, exact.evaluation, jax.eval_shape(exact.init, jax.random.key(0))[0])
            self.about = f"{self.about} Gradients of the parameters {sizes.part}."
        self._part, self._loss = sizes.part, exact.evaluation
        self._rates = functools.partial(acceleration_rates, micro_batches=parts)
        evaluate = task.evaluate(config, splits, task.model(config, splits, ModelOptions()))
        self._measured = functools.partial(measured, evaluate, sets=splits.measured(test=False), limit=_EVALUATED)

    def __call__(self, model: tuple[Params, ModelState]) -> dict[str, float]:
        """Return the measures on the valid sets, the rates and their standard errors."""
        params, model_state = jax.tree.map(jnp.asarray, jax.device_get(model))
        loss, part = (self._loss, params) if self._part is None else _of_part(self._part, self._loss, params)
        rates = self._rates(loss, part, model_state, *self.data, rng=jax.random.key(0))
        return self._measured((params, model_state)) | {name: float(value) for name, value in rates._asdict().items()}


def _of_part(pattern: str, loss: LossFn, params: Params) -> tuple[LossFn, Params]:
    """The loss as a function of some of the parameters, and these; a UserError says that there are none."""
    try:
        subset = trees.make_subset(lambda path: fnmatchcase(path, pattern), params)
    except UserError as error:
        raise UserError(
            f"--part {pattern} fits no parameter; their paths begin with {', '.join(sorted(params))}."
        ) from error

    def of_part(own: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        return loss(subset.merge(own, params), model_state, batch, rng)

    return of_part, subset.restrict(params)


def table(rows: Sequence[Mapping[str, float]], measure: Measure) -> str:
    """Return the Markdown table: one line a measurement, rates with their standard errors."""
    name, title = f"valid_{measure.name}", f"valid {measure.title}"
    heads = {n: head for n, head in ((name, title), (f"{name}/{GENERIC}", f"{GENERIC} {title}")) if n in rows[0]}
    lines = [
        [f"{row['step']:.0f}", *(f"{row[n]:.{measure.digits}f}" for n in heads), *(in_percent(row, r) for r in RATES)]
        for row in rows
    ]
    return str(Table(["step", *heads.values(), *(r.upper() for r in RATES)], lines))


def plot(rows: Sequence[Mapping[str, float]]) -> str:
    """Draw the rates over steps, with lines at two standard errors, as SVG."""
    steps, lines = np.asarray([row["step"] for row in rows], float), []
    for name in RATES:
        rates, errors = (100 * np.asarray([row[of] for row in rows]) for of in (name, f"{name}_error"))
        around = [(steps, rates + sign * ERRORS * errors) for sign in (-1, 1)]
        lines.append(Line(name.upper(), steps, rates, around))
    chance = Line("chance", steps, np.full(len(steps), 100 * CHANCE))
    return draw([*lines, chance], x_label="step", y_label="% (thin: two standard errors)")
