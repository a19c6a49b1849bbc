"""SAR, GAR and measures of one model, on rows that stay the same from one measurement to the next."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Dataset, Loader, RowView, permute, rows_hash
from bilevel.offline.acceleration import acceleration_rates
from bilevel.study.config import flag_of
from bilevel.study.evaluation import measured
from bilevel.study.run import Setting
from bilevel.study.task import GENERIC, ModelOptions
from bilevel.types import Batch, ModelState, Params, UserError

EVALUATED = 2048
"""Most rows of each set in an evaluation."""
BATCH_ROWS = 128
"""Rows of a batch in the paper."""
_PARTS = 8
"""Rows and batches are evaluated in this many parts where it divides them: less memory, and on CPU less time."""
RATES = ("sar", "gar")


@dataclass(frozen=True)
class Compared:
    """How much is compared, as flags."""

    rows: int = 256
    """m: specific rows, and as many generic ones, whose gradients are compared; from the valid sets."""
    pairs: int = 8
    """P: pairs of a specific and a generic batch that they are compared with; from the training sets."""
    batch_rows: int | None = None
    """Rows in each of these batches; none given: 128, as in the paper, or half of the rows that there are. Fewer mean noisier
    gradients, and rates nearer to chance."""

    def check_sizes(self) -> None:
        """Refuse numbers that measure nothing.

        Raises:
          UserError: naming the first such flag.
        """
        for name, least in (("rows", 2), ("pairs", 2), ("batch_rows", 1)):
            if (found := getattr(self, name)) is not None and found < least:
                raise UserError(f"{flag_of(name)} {found} must be at least {least}.")


class Measurement:
    """Compares rows with pairs of batches of other rows.

    The rows come from the valid sets, and those of a task without generic valid rows from the training set. Derivatives are
    exact and in float32, whatever the model trains in, and losses those of evaluation: a row's depends on nothing but the row.

    Args:
      setting: the task and its data.
      sizes: how much is compared.
      seed: decides which rows are.

    Raises:
      UserError: for data too small for the batches.
    """

    def __init__(self, setting: Setting, sizes: Compared, seed: int):
        self._setting, splits, task = setting, setting.splits, setting.task
        config, seed = setting.config.task, seed + 5_000_011  # other rows than those of the first steps
        kinds = (splits.deciding, splits.specific), (splits.valid.get(GENERIC, splits.train), splits.train)
        sides = [_apart(*kind, sizes.rows, seed) for kind in kinds]
        most = min(len(others) for _, others in sides)
        size = sizes.batch_rows or min(BATCH_ROWS, max(1, most // 2))
        if size > most:
            raise UserError(
                f"--batch-rows {size}: only {most} rows of {min(sides, key=lambda s: len(s[1]))[1].name} are "
                f"left to draw batches from; give at most {most}."
            )
        parts = math.gcd(_PARTS, size)
        counts = [len(rows) for rows, _ in sides]
        parts = parts if min(counts) >= parts else 1
        counts = [count - count % parts for count in counts]
        rows = [data.rows(np.arange(n)) for (data, _), n in zip(sides, counts, strict=True)]
        self.data: list[Batch] = [*rows, *(_batches(data, size, sizes.pairs, seed) for _, data in sides)]
        """The rows that are compared, and the batches: specific, then generic."""
        seen = "" if GENERIC in splits.valid else " (of the training set, as the task has no generic valid set)"
        rows_of = f"{counts[0]} specific and {counts[1]} generic rows{seen}"
        self.about = f"{rows_of}, {sizes.pairs} pairs of batches of {size} other rows."
        exact = task.model(config, splits, ModelOptions(forward=True, dtype="float32"))
        self._rates = functools.partial(acceleration_rates, exact.evaluation, micro_batches=parts)
        self._evaluate = task.evaluate(config, splits, task.model(config, splits, ModelOptions()))

    def __call__(self, model: tuple[Params, ModelState]) -> dict[str, float]:
        """Return the measures on the valid sets, the rates and their standard errors."""
        params, model_state = jax.tree.map(jnp.asarray, jax.device_get(model))
        found = measured(self._evaluate, (params, model_state), self._setting.splits, EVALUATED, test=False)
        rates = self._rates(params, model_state, *self.data, rng=jax.random.key(0))
        return found | {name: float(value) for name, value in rates._asdict().items()}


def _apart(compared: Dataset, trained: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """The rows that are compared, and the rows that batches are drawn from: never the same ones."""
    size = len(compared)
    if rows_hash(compared) != rows_hash(trained):
        return RowView(compared, permute(np.arange(min(count, size)), size, seed, 0)), trained
    order, count = permute(np.arange(size), size, seed, 0), min(count, size // 2)
    return RowView(compared, order[:count]), RowView(compared, order[count:])


def _batches(data: Dataset, rows: int, pairs: int, seed: int) -> Batch:
    """Every array `[P, b, …]`."""
    loader = Loader(data, rows, seed=seed)
    return jax.tree.map(lambda *x: np.stack(x), *(loader.batch(i) for i in range(pairs)))


def rate(row: Any, name: str) -> str:
    """Return a rate in percent with its standard error."""
    return f"{100 * row[name]:.1f} ± {100 * row[f'{name}_error']:.1f} %"
