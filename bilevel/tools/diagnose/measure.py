"""SAR, GAR and measures of one model, on rows that stay the same from one measurement to the next."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Dataset, Loader, RowView, permute, rows_hash
from bilevel.offline.acceleration import acceleration_rates
from bilevel.study.evaluation import measured
from bilevel.study.run import Setting
from bilevel.study.task import GENERIC, ModelOptions
from bilevel.types import Batch, ModelState, Params, UserError

RATES = ("sar", "gar")
LEAST = {"rows": 2, "pairs": 2, "batch_rows": 1}
"""Flag -> the least number that measures anything."""
_EVALUATED = 2048  # most rows of each set in an evaluation
_BATCH_ROWS = 128  # as in the paper
_PARTS = 8  # rows and batches are evaluated in this many parts where it divides them: less memory, and on CPU less time


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
        config, task, splits = setting.config.task, setting.task, setting.splits
        seed += 5_000_011  # other rows than those of the first steps
        specific, specific_others = _apart(splits.deciding, splits.specific, sizes.rows, seed)
        generic, generic_others = _apart(splits.valid.get(GENERIC, splits.train), splits.train, sizes.rows, seed)
        smaller = min(specific_others, generic_others, key=len)
        size = sizes.batch_rows or min(_BATCH_ROWS, max(1, len(smaller) // 2))
        if size > len(smaller):
            raise UserError(
                f"--batch-rows {size}: only {len(smaller)} rows of {smaller.name} are left to draw batches from; give at most "
                f"{len(smaller)}."
            )
        parts = math.gcd(_PARTS, size)
        parts = parts if min(len(specific), len(generic)) >= parts else 1
        counts = [len(data) // parts * parts for data in (specific, generic)]
        rows = [data.rows(np.arange(n)) for data, n in zip((specific, generic), counts, strict=True)]
        batches = [_batches(data, size, sizes.pairs, seed) for data in (specific_others, generic_others)]
        self.data: list[Batch] = [*rows, *batches]
        """The rows that are compared, and the batches: specific, then generic."""
        seen = "" if GENERIC in splits.valid else " (of the training set, as the task has no generic valid set)"
        rows_of = f"{counts[0]} specific and {counts[1]} generic rows{seen}"
        self.about = f"{rows_of}, {sizes.pairs} pairs of batches of {size} other rows."
        exact = task.model(config, splits, ModelOptions(forward=True, dtype="float32"))
        self._rates = functools.partial(acceleration_rates, exact.evaluation, micro_batches=parts)
        evaluate = task.evaluate(config, splits, task.model(config, splits, ModelOptions()))
        self._measured = functools.partial(measured, evaluate, splits=splits, limit=_EVALUATED, test=False)

    def __call__(self, model: tuple[Params, ModelState]) -> dict[str, float]:
        """Return the measures on the valid sets, the rates and their standard errors."""
        params, model_state = jax.tree.map(jnp.asarray, jax.device_get(model))
        rates = self._rates(params, model_state, *self.data, rng=jax.random.key(0))
        found = self._measured((params, model_state))
        return found | {name: float(value) for name, value in rates._asdict().items()}


def _apart(compared: Dataset, trained: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """The rows that are compared, and the rows that batches are drawn from: never the same ones."""
    size, same = len(compared), rows_hash(compared) == rows_hash(trained)
    count = min(count, size // 2 if same else size)
    order = permute(np.arange(size if same else count), size, seed, 0)
    return RowView(compared, order[:count]), RowView(compared, order[count:]) if same else trained


def _batches(data: Dataset, rows: int, pairs: int, seed: int) -> Batch:
    """Every array `[P, b, …]`."""
    loader = Loader(data, rows, seed=seed)
    return jax.tree.map(lambda *x: np.stack(x), *(loader.batch(i) for i in range(pairs)))
