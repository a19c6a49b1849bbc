"""Online selection: rows of a big batch that a model says are worth a step (Mindermann et al., RHO-LOSS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import methods
from bilevel.offline.irreducible import unwrapped
from bilevel.selection import filters, scoring
from bilevel.selection.scorers import Scorer
from bilevel.study.context import Context
from bilevel.study.known_rows import check_irreducible, irreducible_losses
from bilevel.study.reducible import save_models
from bilevel.study.spec import Plan, Spec, Start, labels, plan_over
from bilevel.study.task import Model, Weighting
from bilevel.training.settings import Count, free
from bilevel.types import Array, ModelState, Params


@dataclass(frozen=True)
class Scoring:
    """How a model scores rows."""

    network: str | None = None
    """A small proxy that scores the rows instead of the target, trained along on the rows picked; none given: the target."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the scoring forward pass; none given: that of the model."""
    statistics: Literal["batch", "running"] = "batch"
    """What BatchNorm normalises the scored rows by."""


@dataclass(frozen=True)
class IrreducibleLosses:
    """Where irreducible losses come from: a model trained on held-out rows."""

    held_out_network: str | None = None
    """Network of that model; none given: that of the target."""
    held_out_steps: Count = 10_000
    """Its most training steps; it ends when valid has not improved for 500, and its best parameters are kept."""
    held_out_seed: int = 0
    """Of its training: it is the same for all seeds of a comparison."""
    halves: bool = False
    """Without held-out rows: each half of the training rows is scored by a model trained on the other."""
    table: Path | None = free(None)
    """Irreducible losses of another run on the same data (RUN_DIR/prepared/…/table.safetensors)."""


@dataclass(frozen=True)
class RhoLoss(Scoring, IrreducibleLosses):
    """RHO-LOSS: the loss of a row minus its irreducible loss."""


@dataclass(frozen=True)
class IrreducibleLoss(IrreducibleLosses):
    """Rows of the smallest irreducible loss."""


@dataclass(frozen=True)
class TrainLoss(Scoring):
    """Rows of the largest loss."""


@dataclass(frozen=True)
class GradientNorm(Scoring):
    """Rows whose gradient in the last layer is largest."""


@dataclass(frozen=True)
class GradientNormIs(Scoring):
    """Rows drawn in proportion to that gradient norm, and weighed by its inverse."""


def _selecting(make: Callable[..., Scorer], rule: filters.Filter | None = None) -> Callable[[Any, Context], Plan]:
    """The plans of a method that scores rows by a model."""

    def plan(s: Scoring, context: Context) -> Plan:
        model, scoring_model, who = _paired(s, context)
        score = scoring_model.evaluation if scoring_model.scoring is None else scoring_model.scoring(s.statistics)
        scorer = make(score, micro_batches=context.scored_parts(scoring_model))
        scorer = scorer if s.network is None else scoring.trained_proxy(scorer)
        return _picked(s, context, model, scorer, rule, about={"scored_by": who})

    return plan


def _paired(s: Scoring, context: Context) -> tuple[Model, Model, str]:
    """What is trained, what scores rows, and the latter in words."""
    target, who = context.trained_model(), "the target itself"
    scorer = context.trained_model(network=s.network, dtype=s.dtype)
    if s.network is not None:
        who = f"{s.network}, which is trained along on the rows picked"
        target = _both(target, context.trained_model(network=s.network))
    _, state = jax.eval_shape(scorer.init, jax.random.key(0))
    of = {"batch": "of the rows scored together", "running": "that the model keeps"}[s.statistics]
    norm = f"BatchNorm by the statistics {of}" if "batch_stats" in state else "no BatchNorm"
    return target, scorer, f"scored by {who}, by a forward pass in {s.dtype or 'the type of the model'}, {norm}"


def _both(target: Model, proxy: Model) -> Model:
    """A target and a proxy, trained on the same rows; what is evaluated is the target."""

    def init(key: Array) -> tuple[Params, ModelState]:
        params, state = target.init(key)
        proxy_params, proxy_state = proxy.init(jax.random.fold_in(key, 1))
        return {"target": params, "proxy": proxy_params}, {"target": state, "proxy": proxy_state}

    def start() -> Params:
        read = {"target": target.start, "proxy": proxy.start}
        return {name: begin() for name, begin in read.items() if begin is not None}

    loss, of_target = scoring.with_proxy(target.loss, proxy.loss), scoring.of_target
    specific, evaluation = of_target(target.specific_loss), of_target(target.evaluation)
    return target._replace(
        init=init, loss=loss, specific_loss=specific, evaluation=evaluation, scoring=None, part=None, start=start
    )


def _irreducible(s: IrreducibleLoss, context: Context) -> Plan:
    return _picked(s, context, context.trained_model(), scoring.irreducible_loss())


def _picked(
    s: Any, context: Context, model: Model, scorer: Scorer, rule: filters.Filter | None = None, **fields: Any
) -> Plan:
    """The plan of a method that picks rows by a scorer, which may know the irreducible loss of each."""
    alpha = {}
    if isinstance(s, IrreducibleLosses):
        alpha = {"table": np.zeros(len(unwrapped(context.splits.train)[0]), np.float32)}
        known, finish = partial(_known, s, context), partial(save_models, context, s, isinstance(s, RhoLoss))
        fields |= {"identity": check_irreducible(context, s), "start": known, "finish": finish}
    return plan_over(
        context, model, methods.frozen(), Weighting(lambda key: alpha, scorer), {"filter": rule or filters.top_k()},
        picks=True, reads_rows=True, **fields,
    )  # fmt: skip


def _known(s: IrreducibleLosses, context: Context, state: Any) -> Start:
    table, seconds = irreducible_losses(context, s)
    # Rows that are held out from training have no number; a NaN in the state would count as divergence.
    return Start({"table": jnp.nan_to_num(table.losses)}, {"preparation_seconds": seconds})


SPECS: dict[str, Spec] = {
    "rho_loss": Spec(RhoLoss, _selecting(scoring.rho_loss)),
    "train_loss": Spec(TrainLoss, _selecting(scoring.train_loss)),
    "gradient_norm": Spec(GradientNorm, _selecting(scoring.gradient_norm), lacks=labels),
    "gradient_norm_is": Spec(
        GradientNormIs, _selecting(scoring.log_gradient_norm, filters.importance(unbiased=True)), lacks=labels
    ),
    "irreducible_loss": Spec(IrreducibleLoss, _irreducible),
}
