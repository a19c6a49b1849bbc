"""Data that lie on the device or travel to it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
from jax.sharding import Mesh

from bilevel.data import GroupLoader, Loader, MixedLoader, PastLoader, TaskLoader
from bilevel.devices import sharding
from bilevel.training.feed import Data, Source
from bilevel.training.replay import Replay
from bilevel.training.resident import Resident, fits_on_device
from bilevel.training.two_stage import TwoStageData

Residence: TypeAlias = Literal["auto", "always", "never"]


def open_source(
    residence: Residence,
    generic: Loader | MixedLoader | PastLoader | GroupLoader,
    specific: Loader | TaskLoader,
    mesh: Mesh,
) -> Data | Resident:
    """Open the data of a run. The batches are the same either way, and results agree to rounding.

    Args:
        residence: whether they lie on the device; auto: if this is the only process and they fit there (`fits_on_device`).
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
    return 1 if isinstance(source, Data | Replay | TwoStageData) else most
