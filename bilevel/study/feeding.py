"""Loaders of a run, and data that lie on the device or travel to it."""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import Mesh

from bilevel.data import Dataset, JoinedData, Loader, MixedLoader, TaskLoader
from bilevel.devices import sharding
from bilevel.study.config import Residence, Study
from bilevel.study.spec import Plan
from bilevel.study.task import Splits
from bilevel.training import Data, Replay, Resident, Source
from bilevel.training.resident import fits_on_device
from bilevel.types import UserError


def loaded_rows(study: Study, plan: Plan, rows: int, devices: int) -> int:
    """Return the rows that a step loads; of a training set smaller than the big batch, all that its parts can share."""
    if not plan.picks:
        return study.batch_size
    parts = devices * study.micro_batches
    return study.big_batch_size if study.big_batch_size <= rows else rows // parts * parts


def specific_rows(study: Study, plan: Plan, rows: int) -> int:
    """Return the specific rows that a step loads, of so many."""
    return min(plan.specific_batch_size or study.batch_size, rows)


def loaders(
    study: Study, plan: Plan, splits: Splits, seed: int, mesh: Mesh, rows: Dataset | None = None
) -> tuple[Loader | MixedLoader, Loader | TaskLoader]:
    """Build the loaders of the (big) batches and of the specific batches.

    Args:
      study: sizes.
      plan: of the run.
      splits: the data.
      seed: of the run.
      mesh: the devices.
      rows: the generic rows; None: all training rows.

    Raises:
      UserError: for batches that the data or the devices do not fit.
    """
    loader = partial(Loader, process_index=jax.process_index(), process_count=jax.process_count())
    size = loaded_rows(study, plan, len(splits.train), mesh.size)
    train = splits.train if rows is None else rows
    generic = loader(train, size - plan.specific_rows, seed=seed)
    if plan.specific_rows:
        generic = MixedLoader(generic, loader(splits.specific, plan.specific_rows, seed=seed + 4_000_003))
    if plan.specific_batch_size > len(splits.specific):
        raise UserError(
            f"A specific batch of {plan.specific_batch_size} rows is more than the {len(splits.specific)} of "
            f"{splits.specific.name}: lower the method's specific-batch-size."
        )
    count, own = specific_rows(study, plan, len(splits.specific)), seed + 1_000_003
    if isinstance(splits.specific, JoinedData):
        specific = TaskLoader(splits.specific, count, seed=own, weights=splits.specific_weights, **loader.keywords)
    else:
        specific = loader(splits.specific, count, seed=own)
    _check_parts("--batch-size", study.batch_size, mesh.size * study.micro_batches)
    _check_parts("--big-batch-size", size, mesh.size)
    _check_parts("The specific batch of", count, mesh.size)
    return generic, specific


def check_sampled(study: Study) -> None:
    """Check the batches of a sampler, which need no loader.

    Raises:
      UserError: --micro-batches does not divide them.
    """
    _check_parts("--batch-size", study.batch_size, study.micro_batches)


def _check_parts(what: str, size: int, divisor: int) -> None:
    if size % divisor:
        raise UserError(
            f"{what} {size} cannot be divided into {divisor} equal parts (devices, and --micro-batches on each): choose a "
            f"multiple of {divisor}."
        )


def open_source(
    residence: Residence, generic: Loader | MixedLoader, specific: Loader | TaskLoader, mesh: Mesh
) -> Data | Resident:
    """Open the data of a run. The batches are the same either way, and results agree to rounding.

    Args:
      residence: auto: on the device if this is the only process and they fit there (`fits_on_device`).
      generic: gives the big batches.
      specific: gives the specific batches.
      mesh: the devices.

    Raises:
      UserError: always, and there are several processes.
    """
    if residence == "auto":
        residence = "always" if jax.process_count() == 1 and fits_on_device(generic, specific) else "never"
    if residence == "always":
        return Resident(generic, specific, mesh)
    place = sharding.batch_placer(mesh)
    return Data(generic, specific, place, place)


def steps_in_call(source: Source, most: int) -> int:
    """Return the most steps that one call of the program makes: batches that travel take one call each."""
    return 1 if isinstance(source, Data | Replay) else most
