"""Methods without a weighting network that is learned in the step: they choose rows beforehand, or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
from pydantic import NonNegativeInt

from bilevel import methods
from bilevel.data import MixedData, rows_hash
from bilevel.study import contrastive
from bilevel.study.config import Study
from bilevel.study.context import Context
from bilevel.study.known_rows import uncertain_rows
from bilevel.study.methods.picking import FilterName, Picking
from bilevel.study.spec import RATE, Plan, Spec, Start, Tried, labels, plan_over
from bilevel.study.weights import At, classified, load_weights, parts_of, save_weights, weights_file
from bilevel.training.random_search import Among, Log
from bilevel.training.settings import Count, Share, free
from bilevel.types import UserError


@dataclass(frozen=True)
class Uniform:
    """Uniform sampling of the generic rows."""

    also: tuple[Literal["specific", "held_out"], ...] = ()
    """Train on these rows too, which other methods learn from or choose by, drawn like generic ones (those of RLSampler's
    valid set, or of RHO-LOSS's held-out set). Where valid is the specific set, its measures are then of rows trained on."""


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
    finetune_steps: Count = 500
    """Most updates on specific rows, to see what they help; the best step on valid is kept."""
    rows: NonNegativeInt = 131_072
    """Generic rows that are scored; 0: all."""
    fraction: Share = 0.03
    """Share of the scored rows that is kept."""
    scores: Path | None = free(None)
    """File of scores of another run on the same generic and specific data, instead of computing them."""


@dataclass(frozen=True)
class Svp:
    """Selection via proxy: the training rows that a proxy is least sure of (Coleman et al., 2020)."""

    network: str | None = None
    """Network of the proxy; none given: that of the target."""
    steps: Count = 10_000
    """Its most training steps; it ends when valid has not improved for 500, and its best parameters are kept."""
    seed: int = 0
    """Of its training: it is the same for all seeds of a comparison."""
    fraction: Share = 0.5
    """Share of the training rows that is kept, those of the highest entropy."""


@dataclass(frozen=True)
class Classifier(Picking):
    """Rows that a domain classifier, trained beforehand, ranks highest."""

    filter: FilterName = "top_k"
    """How rows are picked."""
    steps: Count = 1000
    """Updates of the classifier."""
    rows: Count = 256
    """Specific rows in its batches, beside as many generic ones."""
    weight_learning_rate: float = 1e-2
    """Its learning rate (Adam)."""


@dataclass(frozen=True)
class Frozen(Picking):
    """Rows picked by the weighting network of another run, which stays as it is."""

    weights: Path | None = free(None)
    """Directory METHOD-seedN of a run that learned weights."""
    at: At = "end"
    """Its weights at the end, or at the evaluation that was best on valid."""


def _baseline(s: Uniform, context: Context) -> Plan:
    if not s.also:
        return _uniform(s, context)
    train = context.splits.train
    found = {rows_hash(train): ("generic", train)}
    for name in s.also:
        rows = getattr(context.splits, name)
        if rows is None:
            raise UserError(
                f"--uniform.also {name}: {train.name} has no held-out rows, so give --data.held-out a share, or omit it."
            )
        found.setdefault(rows_hash(rows), (name.replace("_", "-"), rows))  # text: both names mean the same rows
    mixed = MixedData(*(rows for _, rows in found.values()))
    *counts, last = (f"{len(rows):,} {name}" for name, rows in found.values())
    return _uniform(s, context, rows=lambda: mixed, about={"trained_on": f"{', '.join(counts)} and {last} rows"})


def _uniform(s: Any, context: Context, **fields: Any) -> Plan:
    """The plan of a method that trains on rows drawn uniformly, from all or from some that it chooses."""
    return plan_over(context, context.trained_model(), methods.uniform(), weighs=False, **fields)


def _mixing(s: Mixing, context: Context) -> Plan:
    fraction, processes = 0.25 if s.fraction is None else s.fraction, jax.process_count()
    return _uniform(s, context, specific_rows=mixed_rows(fraction, context.study.batch_size, processes))


def mixed_rows(fraction: float, batch_size: int, processes: int = 1) -> int:
    """Return the specific rows in a batch of `mixing`: as many for each process, and at least one of either kind."""
    if not 0 < fraction < 1 or batch_size < 2 * processes:
        raise UserError(
            f"--mixing.fraction {fraction} of --batch-size {batch_size}: give a fraction between 0 and 1, and at "
            f"least two rows{' a process' if processes > 1 else ''}."
        )
    each = math.ceil(round(fraction * batch_size) / processes)
    return processes * min(max(each, 1), batch_size // processes - 1)


def _contrastive(s: Contrastive, context: Context) -> Plan:
    switch, identity = contrastive.switch(s, context)
    return _uniform(s, context, switch=switch, identity=identity)


def _svp(s: Svp, context: Context) -> Plan:
    context.model(network=s.network)

    def start(state: Any) -> Start:
        return Start({}, {"preparation_seconds": uncertain_rows(context, s)[1]})

    return _uniform(s, context, rows=lambda: uncertain_rows(context, s)[0], start=start)


def _picked(s: Picking, context: Context, start: Callable[[Any], Start], **fields: Any) -> Plan:
    """The plan of a method whose weighting network stays as it is."""
    model, finish = context.trained_model(), partial(save_weights, context, context.loaded_rows(True))
    return plan_over(
        context, model, methods.frozen(), context.weighting, {"filter": s.rule()}, picks=True,
        specific_rows=s.candidates(context), start=start, finish=finish, **fields,
    )  # fmt: skip


def _classifier(s: Classifier, context: Context) -> Plan:
    start = classified(context, steps=s.steps, rows=s.rows, rate=s.weight_learning_rate)
    return _picked(s, context, start)


def _frozen(s: Frozen, context: Context) -> Plan:
    def source() -> Path:
        if s.weights is None:
            raise UserError(
                "The method frozen needs --frozen.weights: the directory METHOD-seedN of a run that learned weights."
            )
        return weights_file(s.weights, s.at, "--frozen.at")

    file = None if s.weights is None else source()
    identity = context.identified("weights_digest", file, lambda: parts_of(source()))
    return _picked(s, context, lambda state: Start(load_weights(source(), state.weight_params)), identity=identity)


def _fractions(study: Study) -> list[float]:
    """What `mixing` tries: FRACTIONS in whole rows of a batch."""
    rows = {mixed_rows(fraction, study.batch_size, jax.process_count()) for fraction in FRACTIONS}
    return [count / study.batch_size for count in sorted(rows)]


FRACTIONS = (0.125, 0.25, 0.5, 0.75)
"""What `mixing` tries where neither a fraction nor --trials is given; Grangier et al. select it by validation, too."""

SPECS: dict[str, Spec] = {
    "uniform": Spec(Uniform, _baseline),
    "mixing": Spec(
        Mixing, _mixing, {**RATE, "fraction": Among((0.0625, 0.125, 0.25, 0.5, 0.75, 0.875))}, tried=Tried("fraction", _fractions)
    ),
    "contrastive": Spec(
        Contrastive, _contrastive, {**RATE, "start": Among((0.25, 0.5)), "fraction": Among((0.03, 0.1, 0.3))},
        {"fraction": 0.1},
    ),
    "classifier": Spec(
        Classifier, _classifier,
        {**RATE, "weight_learning_rate": Log(1e-3, 1e-1), "filter": Among(("top_k", "top_fraction", "threshold"))},
        {"weight_learning_rate": 1e-3},
    ),
    "svp": Spec(Svp, _svp, lacks=labels),
    "frozen": Spec(Frozen, _frozen, in_all=False),
}  # fmt: skip
