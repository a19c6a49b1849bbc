"""Data that lie on the device, or batches that travel to it: what `--resident` decides in all experiments."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from bilevel.data import Loader, MixedLoader, TaskLoader
from bilevel.devices import sharding
from bilevel.training import Data, Replay, Resident, Source
from bilevel.training.resident import fits_on_device
from experiments.cli import Residence


def open_source(
    residence: Residence, generic: Loader | MixedLoader, specific: Loader | TaskLoader, mesh: Mesh | None = None
) -> Data | Resident:
    """The data of a run. The batches are the same either way, and results agree to rounding.

    Args:
      residence: auto: on the device if this is the only process and they fit there (`fits_on_device`).
      generic: gives the big batches.
      specific: gives the specific batches.
      mesh: the devices; None: the default one.

    Raises:
      UserError: always, and there are several processes.
    """
    if residence == "auto":
        residence = "always" if jax.process_count() == 1 and fits_on_device(generic, specific) else "never"
    if residence == "always":
        return Resident(generic, specific, mesh)
    place = jax.device_put if mesh is None else sharding.batch_placer(mesh)
    return Data(generic, specific, place, place)


def steps_in_call(source: Source, most: int) -> int:
    """Most steps that one call of the program makes: batches that travel take one call each."""
    return 1 if isinstance(source, Data | Replay) else most
