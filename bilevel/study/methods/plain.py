"""Methods without a weighting network that is learned in the step: they choose rows beforehand, or none."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bilevel import methods
from bilevel.study import contrastive
from bilevel.study.config import free
from bilevel.study.context import Context
from bilevel.study.known_rows import uncertain_rows
from bilevel.study.methods.picking import FilterName, Picking, candidates, check_sizes, filter_of
from bilevel.study.spec import Among, Log, Plan, Spec, Start, no_weighting
from bilevel.study.task import ModelOptions
from bilevel.study.weights import load_weights, weights_digest
from bilevel.types import UserError


@dataclass(frozen=True)
class Uniform:
    """Uniform sampling of the generic rows."""


@dataclass(frozen=True)
class Mixing:
    """A fixed share of specific rows in each batch."""

    fraction: float | None = None
    """That share, rounded to whole rows. None given: 1/8, 1/4, 1/2 and 3/4 are tried for a quarter of --steps each."""


@dataclass(frozen=True)
class Contrastive:
    """Contrastive data selection: train, fine-tune, keep the rows that this helps most, train on (ATD, section 2)."""

    start: float = 0.5
    """Share of the steps before selection."""
    finetune_steps: int = 500
    """Most updates on specific rows, to see what they help; the best step on valid is kept."""
    rows: int = 131_072
    """Generic rows that are scored; 0: all."""
    fraction: float = 0.03
    """Share of the scored rows that is kept."""
    scores: Path | None = free(None)
    """File of scores of another run on the same generic and specific data, instead of computing them."""


@dataclass(frozen=True)
class Svp:
    """Selection via proxy: the training rows that a proxy is least sure of (Coleman et al., 2020)."""

    network: str | None = None
    """Network of the proxy; none given: that of the target."""
    steps: int = 1000
    """Its training steps; the parameters with the lowest valid loss are kept."""
    seed: int = 0
    """Of its training: it is the same for all seeds of a comparison."""
    fraction: float = 0.5
    """Share of the training rows that is kept, those of the highest entropy."""


@dataclass(frozen=True)
class Classifier(Picking):
    """Rows that a domain classifier, trained beforehand, ranks highest."""

    filter: FilterName = "top_k"
    """How rows are picked."""
    steps: int = 1000
    """Updates of the classifier."""
    rows: int = 256
    """Specific rows in its batches, beside as many generic ones."""
    weight_learning_rate: float = 1e-2
    """Its learning rate (Adam)."""


@dataclass(frozen=True)
class Frozen(Picking):
    """Rows picked by the weighting network of another run, which stays as it is."""

    weights: Path | None = free(None)
    """Directory METHOD-seedN of a run that learned weights."""


def uniform_plan(context: Context) -> Plan:
    """Return the plan of uniform sampling."""
    model = context.model(ModelOptions(mesh=context.gathering_mesh))
    return Plan(model=model, method=methods.uniform(), weighting=no_weighting())


def _mixing(s: Mixing, context: Context) -> Plan:
    fraction = 0.25 if s.fraction is None else s.fraction
    return dataclasses.replace(
        uniform_plan(context), specific_rows=mixed_rows(fraction, context.study.batch_size, jax.process_count())
    )


def mixed_rows(fraction: float, batch_size: int, processes: int = 1) -> int:
    """Return the specific rows in a batch of `mixing`: as many for each process, and at least one of either kind.

    Raises:
      UserError: for a fraction out of range, or a batch too small.
    """
    if not 0 < fraction < 1 or batch_size < 2 * processes:
        raise UserError(
            f"--mixing.fraction {fraction} of --batch-size {batch_size}: give a fraction between 0 and 1, and at "
            f"least two rows{' a process' if processes > 1 else ''}."
        )
    each = math.ceil(round(fraction * batch_size) / processes)
    return processes * min(max(each, 1), batch_size // processes - 1)


def _contrastive(s: Contrastive, context: Context) -> Plan:
    switch, identity = contrastive.switch(s, context)
    return dataclasses.replace(uniform_plan(context), switch=switch, identity=identity)


def _svp(s: Svp, context: Context) -> Plan:
    if not 0 < s.fraction <= 1 or s.steps < 1:
        raise UserError(f"--svp.fraction {s.fraction} must lie in (0, 1], and --svp.steps {s.steps} be at least 1.")
    context.model(ModelOptions(network=s.network))
    return dataclasses.replace(uniform_plan(context), rows=lambda: uncertain_rows(context, s))


def _picked(s: Picking, name: str, context: Context) -> Plan:
    """The plan of a method whose weighting network stays as it is."""
    check_sizes(context.study)
    return Plan(
        model=context.model(ModelOptions(mesh=context.gathering_mesh)),
        method=methods.frozen(),
        weighting=context.weighting,
        picks=True,
        filter=filter_of(s),
        specific_rows=candidates(s, context.study, name, jax.process_count()),
        keeps_weights=True,
    )


def _classifier(s: Classifier, context: Context) -> Plan:
    start = context.classified(s.steps, s.rows, s.weight_learning_rate, "classifier.")
    return dataclasses.replace(_picked(s, "classifier", context), start=start)


def _frozen(s: Frozen, context: Context) -> Plan:
    digest = weights_digest(s.weights, context.recorded("frozen"))

    def start(state: Any) -> Start:
        return Start(load_weights(s.weights, state.weight_params), {})

    return dataclasses.replace(_picked(s, "frozen", context), start=start, identity={"weights_digest": digest})


_RATE = {"learning_rate": Log(1e-3, 8e-3)}
FRACTIONS = (0.125, 0.25, 0.5, 0.75)
"""What `mixing` tries where neither a fraction nor --trials is given; Grangier et al. select it by validation, too."""

SPECS: dict[str, Spec] = {
    "uniform": Spec(Uniform, lambda s, context: uniform_plan(context), _RATE),
    "mixing": Spec(
        Mixing, _mixing, _RATE | {"fraction": Among((0.0625, 0.125, 0.25, 0.5, 0.75, 0.875))}, tried="fraction"
    ),
    "contrastive": Spec(
        Contrastive, _contrastive, _RATE | {"start": Among((0.25, 0.5)), "fraction": Among((0.03, 0.1, 0.3))},
        {"fraction": 0.1},
    ),
    "classifier": Spec(
        Classifier,
        _classifier,
        _RATE | {"weight_learning_rate": Log(1e-3, 1e-1), "filter": Among(("top_k", "top_fraction", "threshold"))},
        {"weight_learning_rate": 1e-3},
    ),
    "svp": Spec(Svp, _svp, _RATE, needs_labels=True),
    "frozen": Spec(Frozen, _frozen, _RATE, in_all=False),
}  # fmt: skip
