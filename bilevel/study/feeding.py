"""Loaders of a run."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax

from bilevel.data import (
    Dataset,
    GroupedData,
    GroupLoader,
    JoinedData,
    Loader,
    MixedLoader,
    PastLoader,
    TaskLoader,
    each_part,
)
from bilevel.study.context import Context
from bilevel.study.spec import Plan
from bilevel.study.task import Splits
from bilevel.types import UserError

_GenericLoader: TypeAlias = Loader | MixedLoader | PastLoader | GroupLoader


def loaders(context: Context, plan: Plan, rows: Dataset | None = None) -> tuple[_GenericLoader, Loader | TaskLoader]:
    """Build the loaders of the (big) batches, of all training rows or of some, and of the specific batches."""
    generic, specific = _generic(context, plan, rows), _specific(context, plan)
    devices, size = context.mesh.size, len(generic.indices(0))
    check_parts("--batch-size", context.study.batch_size, devices * context.study.micro_batches)
    check_parts("--big-batch-size" if size == context.loaded_rows(plan.picks) else "The big batch of", size, devices)
    check_parts("The specific batch of", specific.batch_size, devices)
    return generic, specific


def _generic(context: Context, plan: Plan, rows: Dataset | None) -> _GenericLoader:
    splits, size, loader = context.splits, context.loaded_rows(plan.picks), _loader()
    if isinstance(rows, GroupedData):
        return GroupLoader(rows, size // rows.table.shape[1], seed=context.seed, **loader.keywords)
    generic = loader(splits.train if rows is None else rows, size - plan.specific_rows, seed=context.seed)
    if plan.specific_rows:
        generic = MixedLoader(generic, loader(splits.specific, plan.specific_rows, seed=context.seed + 4_000_003))
    if splits.past is None:
        return generic
    return PastLoader(generic, each_part(generic.dataset, splits.past.rows), splits.past.size)


def _specific(context: Context, plan: Plan) -> Loader | TaskLoader:
    splits, loader = context.splits, _loader()
    if plan.specific_batch_size > len(splits.specific):
        raise UserError(
            f"A specific batch of {plan.specific_batch_size} rows is more than the {len(splits.specific)} of "
            f"{splits.specific.name}: lower the method's specific-batch-size."
        )
    count = min(plan.specific_batch_size or context.study.batch_size, len(splits.specific))
    seed = context.seed + 1_000_003
    if isinstance(splits.specific, JoinedData):
        return TaskLoader(splits.specific, count, seed=seed, weights=splits.specific_weights, **loader.keywords)
    return loader(splits.specific, count, seed=seed)


def _loader() -> partial[Loader]:
    return partial(Loader, process_index=jax.process_index(), process_count=jax.process_count())


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
