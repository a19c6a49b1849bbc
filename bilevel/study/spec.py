"""What a method is to a study: its settings, what it searches over, and the plan of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import optax

from bilevel.data import Dataset
from bilevel.derivatives.linearization import Derivatives
from bilevel.methods import Method
from bilevel.samplers import Sampler
from bilevel.selection.filters import Filter
from bilevel.step.estimators import Estimator
from bilevel.study.context import Context
from bilevel.study.context import Start as Start
from bilevel.study.task import Model, Weighting
from bilevel.training import OnSelected
from bilevel.types import Array, Params


class Log(NamedTuple):
    """A range that a search draws from, with a uniform logarithm."""

    low: float
    high: float


class Among(NamedTuple):
    """Values that a search takes in a drawn order, each once before any comes again."""

    values: tuple[Any, ...]


Space: TypeAlias = Mapping[str, Log | Among]
"""What a search varies: names of the method's settings, and "learning_rate", that of θ."""


class Switch(NamedTuple):
    """Training goes on with other rows after some steps."""

    step: int
    rows: Callable[[Any], tuple[Dataset, Mapping[str, float]]]
    """The state after that step -> the rows, and what is reported. Called once; what it finds is kept on disk."""
    done: Callable[[], bool]
    """Whether the rows were chosen before."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run trains. Building it checks the settings, and is cheap: what costs something happens when it is called."""

    model: Model
    """What is trained: the task's model, or that with a proxy."""
    method: Method
    weighting: Weighting
    mode: Literal["sparse", "dense"] = "sparse"
    picks: bool = False
    """Whether rows are picked from a big batch."""
    filter: Filter | None = None
    derivatives: Derivatives | None = None
    weight_optimizer: optax.GradientTransformation | None = None
    estimator: Estimator = "softmax"
    alpha_batch: Literal["filtered", "uniform"] = "filtered"
    alpha_batch_size: int | None = None
    update_every: int | None = None
    probe_every: int | None = None
    probe_blocks: int = 0
    normalize_alignments: bool = False
    specific_rows: int = 0
    """Specific rows in each loaded batch."""
    specific_batch_size: int = 0
    """Specific rows in an α-step; 0: as many as a θ-update has."""
    rows: Callable[[], Dataset] | None = None
    """The generic rows that are trained on; None: all."""
    start: Callable[[Any], Start] | None = None
    """Initial state -> α learned beforehand."""
    switch: Switch | None = None
    table: Callable[[], Params] | None = None
    """Parameters of a scorer that are known beforehand; made when they are first asked for."""
    sampler: Sampler | None = None
    """Picks the rows by their numbers."""
    reward_parts: int = 1
    sampler_params: Callable[[], Any] | None = None
    """What a sampler begins with."""
    recorder: Callable[[Path], OnSelected] | None = None
    """Run directory -> what keeps the rows that were drawn."""
    finish: Callable[[Path, Any], Mapping[str, float]] | None = None
    """Run directory and last state -> what is kept and reported of what was learned."""
    keeps_weights: bool = False
    """Whether the weighting network judges rows alone, so that it is kept for other runs."""
    scored_by: str = ""
    """What scores rows, in words."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Digests of what the run takes from elsewhere."""


@dataclass(frozen=True)
class Spec:
    """A method of the registry."""

    settings: type[Any]
    """A frozen dataclass of its settings, with real defaults: they become the flags --METHOD.NAME."""
    plan: Callable[[Any, Context], Plan]
    search: Space = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the preset "paper"."""
    in_all: bool = True
    """Whether `--compare all` means it: it needs no file of another run."""
    tried: str | None = None
    """A setting that is chosen on valid, where neither it nor --trials is given; its default is then None."""
    first: tuple[str, ...] = ()
    """Methods whose run of the same seed it continues from."""
    needs_labels: bool = False
    """Whether it needs rows with a `label`."""


def no_weighting(init: Callable[[Array], Params] = lambda key: {}) -> Weighting:
    """Return a weighting for a method that has no network."""
    return Weighting(init, None)
