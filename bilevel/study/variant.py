"""What an analysis does in another way than a run of its flags would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from bilevel.training import Data, OnSelected, OnState, Resident, Source


class Variant(NamedTuple):
    """Changes to one run; by default none."""

    settings: Mapping[str, Any] = MappingProxyType({})
    """What of these changes decides the outcome; kept and compared with the run's other settings."""
    source: Callable[[Data | Resident, Mesh], Source] = lambda data, mesh: data
    """What the batches come from, given what they would come from and the devices."""
    streams: bool = False
    """Whether the batches must travel, whatever --resident says."""
    on_selected: OnSelected | None = None
    """Called with the rows that were trained on; see `bilevel.training.train`."""
    on_state: OnState | None = None
    """Called every `state_every` steps; see `bilevel.training.train`."""
    state_every: int = 0
