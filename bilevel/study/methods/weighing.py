"""Methods that choose the weights of all rows of a batch themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

import bilevel
from bilevel import methods
from bilevel.nn.mentor_net import MentorNetwork, mentor
from bilevel.study.context import Context
from bilevel.study.spec import Among, Log, Plan, Spec, no_weighting
from bilevel.study.task import ModelOptions
from bilevel.types import UserError


@dataclass(frozen=True)
class LearningToReweight:
    """Learning to reweight: weights from one step back, forgotten after each update."""

    specific_batch_size: int = 0
    """Specific rows in a step; 0: --batch-size."""
    derivatives: Literal["forward", "finite"] = "finite"
    """Exact forward mode, or finite differences (cheaper)."""
    probe_blocks: int = 0
    """Probe the parameters of the last blocks only, this many; 0: all."""


@dataclass(frozen=True)
class Spcl:
    """Self-paced learning: rows whose loss lies below a pace that grows."""

    pace_start: float = 2.0
    """λ at the start, as a multiple of the loss of guessing, log(classes)."""
    pace_end: float = 3.0
    """λ at the end, likewise."""


@dataclass(frozen=True)
class Mentornet:
    """MentorNet: a network learns from clean rows whether a label is right."""

    specific_batch_size: int = 0
    """Clean rows in a step; 0: --batch-size."""
    burn_in: float = 0.05
    """Share of the steps in the beginning in which all rows count alike."""
    mentor_learning_rate: float = 1e-2
    """Learning rate of the mentor (Adam)."""


def _dense(method: methods.Method, context: Context, forward: bool = False, **more: Any) -> Plan:
    model = context.model(ModelOptions(mesh=context.gathering_mesh, forward=forward))
    return Plan(model=model, method=method, weighting=no_weighting(), mode="dense", **more)


def _learning_to_reweight(s: LearningToReweight, context: Context) -> Plan:
    forward = s.derivatives == "forward"
    plan = _dense(
        methods.learning_to_reweight(), context, forward,
        derivatives=bilevel.Forward() if forward else bilevel.Finite(),
        specific_batch_size=s.specific_batch_size, probe_blocks=s.probe_blocks,
    )  # fmt: skip
    if s.probe_blocks and plan.model.part is None:
        raise UserError(f"--learning-to-reweight.probe-blocks {s.probe_blocks}: this network has no blocks; give 0.")
    return plan


def _spcl(s: Spcl, context: Context) -> Plan:
    guessing = math.log(context.guesses)
    pace = optax.linear_schedule(s.pace_start * guessing, s.pace_end * guessing, context.study.steps)
    return _dense(methods.spcl(pace), context)


def _mentornet(s: Mentornet, context: Context) -> Plan:
    if not 0 <= s.burn_in <= 1:
        raise UserError(f"--mentornet.burn-in {s.burn_in} must lie in [0, 1]: it is a share of the steps.")
    classes = context.splits.classes
    method = methods.mentornet(
        *mentor(MentorNetwork(classes), jax.random.key(context.seed)),
        optax.adam(s.mentor_learning_rate),
        num_classes=classes,
        total_steps=context.study.steps,
        burn_in=s.burn_in,
    )
    return _dense(method, context, specific_batch_size=s.specific_batch_size)


_RATE = {"learning_rate": Log(1e-3, 8e-3)}

SPECS: dict[str, Spec] = {
    "learning_to_reweight": Spec(
        LearningToReweight, _learning_to_reweight, _RATE | {"specific_batch_size": Among((16, 64, 256))},
        {"derivatives": "forward"},
    ),
    "spcl": Spec(Spcl, _spcl, _RATE | {"pace_end": Among((2.0, 3.0, 4.0))}),
    "mentornet": Spec(Mentornet, _mentornet, _RATE, needs_labels=True),
}  # fmt: skip
