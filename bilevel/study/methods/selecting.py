"""Online selection: rows of a big batch that a model says are worth a step (Mindermann et al., RHO-LOSS)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from bilevel import methods
from bilevel.selection import filters, scoring
from bilevel.selection.scorers import Scorer
from bilevel.study.config import free
from bilevel.study.context import Context
from bilevel.study.known_rows import check_irreducible, given_digest, irreducible_losses
from bilevel.study.methods.picking import check_sizes
from bilevel.study.proxy import paired
from bilevel.study.spec import Log, Plan, Spec
from bilevel.study.task import ModelOptions, Weighting
from bilevel.types import LossFn, Params


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
    held_out_steps: int = 1000
    """Its training steps; the parameters with the lowest valid loss are kept."""
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


Make = Callable[[LossFn, int], Scorer]


def _selecting(name: str, make: Make, *, unbiased: bool = False, table: bool = False) -> Callable[[Any, Context], Plan]:
    def plan(s: Scoring, context: Context) -> Plan:
        check_sizes(context.study)
        options = ModelOptions(mesh=context.gathering_mesh)
        model, score, who = paired(context, options, s.network, s.dtype, s.statistics)
        scorer = make(score, context.study.micro_batches)
        if s.network is not None:
            scorer = scoring.trained_proxy(scorer)
        if table:
            check_irreducible(context, s, name)
        rule = filters.importance(unbiased=True) if unbiased else filters.top_k()
        return Plan(
            model=model, method=methods.frozen(), weighting=Weighting(lambda key: {}, scorer), picks=True, filter=rule,
            scored_by=who, table=_table(context, s) if table else None,
            identity=given_digest(s, context.splits.train) if table else {},
        )  # fmt: skip

    return plan


def _irreducible(s: IrreducibleLoss, context: Context) -> Plan:
    check_sizes(context.study)
    check_irreducible(context, s, "irreducible_loss")
    return Plan(
        model=context.model(ModelOptions(mesh=context.gathering_mesh)),
        method=methods.frozen(),
        weighting=Weighting(lambda key: {}, scoring.irreducible_loss()),
        table=_table(context, s),
        identity=given_digest(s, context.splits.train),
        picks=True,
        filter=filters.top_k(),
    )


def _table(context: Context, s: Any) -> Callable[[], Params]:
    def table() -> Params:
        # Rows that are held out from training have no number; a NaN in the state would count as divergence.
        return {"table": jnp.nan_to_num(irreducible_losses(context, s).params()["table"])}

    return table


_RATE = {"learning_rate": Log(1e-3, 8e-3)}

SPECS: dict[str, Spec] = {
    "rho_loss": Spec(
        RhoLoss,
        _selecting("rho_loss", lambda loss, parts: scoring.rho_loss(loss, micro_batches=parts), table=True),
        _RATE,
    ),
    "train_loss": Spec(
        TrainLoss,
        _selecting("train_loss", lambda loss, parts: scoring.train_loss(loss, micro_batches=parts)),
        _RATE,
    ),
    "gradient_norm": Spec(
        GradientNorm,
        _selecting("gradient_norm", lambda loss, parts: scoring.gradient_norm(loss, micro_batches=parts)),
        _RATE,
        needs_labels=True,
    ),
    "gradient_norm_is": Spec(
        GradientNormIs,
        _selecting(
            "gradient_norm_is", lambda loss, parts: scoring.log_gradient_norm(loss, micro_batches=parts), unbiased=True
        ),
        _RATE,
        needs_labels=True,
    ),
    "irreducible_loss": Spec(IrreducibleLoss, _irreducible, _RATE),
}
