"""Loaders of a run."""

from __future__ import annotations

from functools import partial

import jax

from bilevel.data import Dataset, JoinedData, Loader, MixedLoader, PastLoader, TaskLoader, each_part
from bilevel.study.context import Context
from bilevel.study.spec import Plan
from bilevel.study.task import Splits
from bilevel.types import UserError


def loaders(
    context: Context, plan: Plan, rows: Dataset | None = None
) -> tuple[Loader | MixedLoader | PastLoader, Loader | TaskLoader]:
    """Build the loaders of the (big) batches, of all training rows or of some, and of the specific batches."""
    study, splits, seed, devices = context.study, context.splits, context.seed, context.mesh.size
    loader = partial(Loader, process_index=jax.process_index(), process_count=jax.process_count())
    size = context.loaded_rows(plan.picks)
    generic = loader(splits.train if rows is None else rows, size - plan.specific_rows, seed=seed)
    if plan.specific_rows:
        generic = MixedLoader(generic, loader(splits.specific, plan.specific_rows, seed=seed + 4_000_003))
    if plan.specific_batch_size > len(splits.specific):
        raise UserError(
            f"A specific batch of {plan.specific_batch_size} rows is more than the {len(splits.specific)} of "
            f"{splits.specific.name}: lower the method's specific-batch-size."
        )
    count, own = min(plan.specific_batch_size or study.batch_size, len(splits.specific)), seed + 1_000_003
    if isinstance(splits.specific, JoinedData):
        specific = TaskLoader(splits.specific, count, seed=own, weights=splits.specific_weights, **loader.keywords)
    else:
        specific = loader(splits.specific, count, seed=own)
    check_parts("--batch-size", study.batch_size, devices * study.micro_batches)
    check_parts("--big-batch-size", size, devices)
    check_parts("The specific batch of", count, devices)
    if splits.past is not None:
        generic = PastLoader(generic, each_part(generic.dataset, splits.past.rows), splits.past.size)
    return generic, specific


def check_parts(what: str, size: int, divisor: int) -> None:
    """Refuse a batch that cannot be divided into equal parts."""
    if size % divisor:
        raise UserError(
            f"{what} {size} cannot be divided into {divisor} equal parts (devices, and --micro-batches on each): choose a "
            f"multiple of {divisor}."
        )


def small_of(splits: Splits, rows: Dataset) -> Dataset:
    """Return generic rows as the weighting network reads them.

    Raises:
      UserError: it reads them in full.
    """
    if splits.small is None:
        raise UserError("--two-stage: the weighting network of this task reads its rows in full, so omit it.")
    return each_part(rows, splits.small)
