"""Methods that choose the weights of all rows of a batch themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import NonNegativeFloat

import bilevel
from bilevel import methods
from bilevel.data import digest
from bilevel.nn.mentor_net import MentorNetwork, mentor
from bilevel.study.context import Context
from bilevel.study.known_rows import check_irreducible, given_losses
from bilevel.study.spec import RATE, Plan, Spec, plan_over, probed
from bilevel.study.task import Splits
from bilevel.training.random_search import Among
from bilevel.training.settings import Portion, Share, free
from bilevel.types import UserError

_SYMBOLS = 256
"""Outcomes that a guess chooses from where rows have no classes."""


@dataclass(frozen=True)
class LearningToReweight:
    """Learning to reweight: weights from one step back, forgotten after each update."""

    specific_batch_size: int = 0
    """Specific rows in a step; 0: --batch-size."""
    derivatives: Literal["forward", "finite"] = "finite"
    """Exact forward mode, or finite differences (cheaper)."""
    probe_blocks: int = 0
    """Probe the parameters of the last blocks only, this many; 0: all."""
    unroll_rate: NonNegativeFloat = 0.0
    """Unroll an update of plain SGD with this learning rate; 0: one of θ's own optimizer."""


@dataclass(frozen=True)
class Spcl:
    """Self-paced learning: rows whose loss lies below a pace that grows."""

    pace_start: float = 2.0
    """λ at the start, as a multiple of the loss of guessing, log(classes)."""
    pace_end: float = 3.0
    """λ at the end, likewise."""
    table: Path | None = free(None)
    """How hard each row is known to be, for a curriculum region: irreducible losses of another run on the same data
    (RUN_DIR/prepared/…/table.safetensors). None given: no such region."""
    bound: Share | None = None
    """With a table: rows weigh so that at most this share of a batch's irreducible loss is trained on (1: any)."""


@dataclass(frozen=True)
class Mentornet:
    """MentorNet: a network learns whether a row is right, from clean rows with a label, or from generic rows known to be right
    or wrong."""

    specific_batch_size: int = 0
    """Clean rows in a step; 0: --batch-size. Of no use where generic rows are known."""
    burn_in: Portion = 0.05
    """Share of the steps in the beginning in which all rows count alike."""
    mentor_learning_rate: float = 1e-2
    """Learning rate of the mentor (Adam)."""


def _learning_to_reweight(s: LearningToReweight, context: Context) -> Plan:
    forward = s.derivatives == "forward"
    model = context.trained_model(forward=forward)
    options = {
        "mode": "dense",
        "derivatives": bilevel.Forward() if forward else bilevel.Finite(),
        "param_filter": probed(context, model, s.probe_blocks),
    }
    method = methods.learning_to_reweight(unroll=optax.sgd(s.unroll_rate) if s.unroll_rate else None)
    return plan_over(context, model, method, options=options, specific_batch_size=s.specific_batch_size)


def _spcl(s: Spcl, context: Context) -> Plan:
    guesses = context.splits.classes or _SYMBOLS
    if guesses < 2:
        raise UserError(
            "spcl takes its pace as a multiple of the loss of guessing, log(classes), which is 0 with one class: give data of "
            "two classes or more, or omit spcl from --compare."
        )
    if s.pace_start < 0 or s.pace_end <= 0:
        raise UserError(
            f"--spcl.pace-start {s.pace_start} must not be negative, and --spcl.pace-end {s.pace_end} must be positive: rows "
            "have a weight if their loss lies below the pace."
        )
    guessing = math.log(guesses)
    pace = optax.linear_schedule(s.pace_start * guessing, s.pace_end * guessing, context.study.steps)
    if (s.table is None) != (s.bound is None):
        raise UserError("--spcl.table and --spcl.bound make a curriculum region together: give both, or neither.")
    region: dict[str, Any] = {}
    identity: dict[str, str] = {}
    if s.table is not None:
        identity = check_irreducible(context, s)
        hardness = jnp.nan_to_num(given_losses(context, s).losses)
        region = {"curriculum": lambda batch: hardness[batch["id"]], "bound": s.bound}
    method = methods.spcl(pace, **region)
    return plan_over(context, context.trained_model(), method, options={"mode": "dense"}, identity=identity)


def _mentornet(s: Mentornet, context: Context) -> Plan:
    classes, taught = max(context.splits.classes, 1), context.splits.taught
    if taught is not None and s.specific_batch_size:
        raise UserError(
            f"--mentornet.specific-batch-size {s.specific_batch_size} is of no use, as the mentor learns from generic rows that "
            "are known to be right or wrong: omit it."
        )
    method = methods.mentornet(
        *mentor(MentorNetwork(classes), jax.random.key(context.seed)), optax.adam(s.mentor_learning_rate),
        num_classes=classes, total_steps=context.study.steps, burn_in=s.burn_in,
        known=None if taught is None else jnp.asarray(taught.values, jnp.int8),
    )  # fmt: skip
    model, size = context.trained_model(), s.specific_batch_size
    identity = {} if taught is None else {"faults_digest": digest([np.asarray(taught.values, np.int8).tobytes()])}
    return plan_over(
        context, model, method, options={"mode": "dense"}, specific_batch_size=size, identity=identity
    )  # fmt: skip


def _lessons(splits: Splits) -> str:
    if splits.classes or splits.taught is not None:
        return ""
    return (
        "rows with a label, or some that are known to be right or wrong (documents: --data.generic-faults), and these have "
        "neither: give them, or omit it"
    )


SPECS: dict[str, Spec] = {
    "learning_to_reweight": Spec(
        LearningToReweight, _learning_to_reweight, {**RATE, "specific_batch_size": Among((16, 64, 256))},
        {"derivatives": "forward", "unroll_rate": 1e-2},
    ),
    "spcl": Spec(Spcl, _spcl, {**RATE, "pace_end": Among((2.0, 3.0, 4.0))}),
    "mentornet": Spec(Mentornet, _mentornet, lacks=_lessons),
}  # fmt: skip
