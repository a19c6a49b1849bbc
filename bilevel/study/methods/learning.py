"""Methods that learn a weighting network while the model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

import bilevel
from bilevel import methods
from bilevel.selection.meta_weight_net import meta_weight_net
from bilevel.step.estimators import Estimator
from bilevel.study.context import Context
from bilevel.study.methods.picking import PROPORTIONAL, Picking, candidates, check_sizes, filter_of
from bilevel.study.spec import Among, Log, Plan, Spec, Start
from bilevel.study.task import ModelOptions, Weighting
from bilevel.types import UserError


@dataclass(frozen=True)
class Learning(Picking):
    """How weights are learned."""

    mode: Literal["sparse", "dense"] = "sparse"
    """sparse: rows are picked from a big batch and count alike (ATD, algorithm 1); dense: all rows of a batch are weighed (DDS,
    algorithm 1)."""
    estimator: Estimator | None = None
    """Of the α-gradient; none given: score where rows are drawn in proportion to their weights, else softmax."""
    alpha_batch: Literal["filtered", "uniform"] = "filtered"
    """Where the rows of the α-gradient come from: the filter, or a uniform draw from the big batch."""
    alpha_batch_size: int = 0
    """Rows in the α-gradient; 0: those of the θ-update."""
    specific_batch_size: int = 0
    """Specific rows in an α-step; 0: --batch-size."""
    update_every: int = 1
    """θ-updates for each α-update."""
    probe_every: int | None = None
    """θ-updates for each evaluation of specific rows, a multiple of update-every; 0: as often as α is updated; none given: 2
    where the method keeps a specific gradient and update-every divides it, else 0."""
    probe_blocks: int | None = None
    """Probe the parameters of the last blocks only, this many (cheaper); 0: all; none given: 1 where the network has blocks."""
    derivatives: Literal["forward", "finite"] = "finite"
    """Exact forward mode, or finite differences (cheaper)."""
    normalize_alignments: bool = True
    """Scale the alignments of each α-step to root mean square 1."""
    weight_learning_rate: float | None = None
    """Of the weighting network (Adam); none given: 1e-2 with the estimator score, else 1e-3."""
    weight_warmup: int = 0
    """θ-updates over which that rate grows from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weighting network."""
    warm_start: bool = False
    """Begin with the weighting network of a domain classifier."""
    classifier_steps: int = 1000
    """warm-start: updates of that classifier."""
    classifier_rows: int = 256
    """warm-start: specific rows in its batches, beside as many generic ones."""

    @property
    def chosen_estimator(self) -> Estimator:
        """The estimator, where none is given the one that fits."""
        drawn = self.mode == "sparse" and self.alpha_batch == "filtered" and self.filter in PROPORTIONAL
        return self.estimator or ("score" if drawn else "softmax")

    @property
    def chosen_rate(self) -> float:
        """The learning rate of α, where none is given the one that goes with the estimator.

        With softmax at the rate of score the effective sample size collapses within 100 steps on text.
        """
        return self.weight_learning_rate or (1e-2 if self.chosen_estimator == "score" else 1e-3)


@dataclass(frozen=True)
class Tracking(Learning):
    """How weights are learned with a quantity that is carried from step to step."""

    tracker: Literal["sgd", "momentum", "adam"] = "adam"
    """Its optimizer."""
    tracker_learning_rate: float = 2e-3
    """Its learning rate."""

    def tracker_optimizer(self) -> optax.GradientTransformation:
        """Build the optimizer."""
        rate = self.tracker_learning_rate
        made = {"sgd": lambda: optax.sgd(rate), "momentum": lambda: optax.sgd(rate, momentum=0.9)}
        return made.get(self.tracker, lambda: optax.adam(rate, b2=0.98))()


@dataclass(frozen=True)
class Soba(Tracking):
    """SOBA: v tracks the solution of the linear system (ATD, section 4.2)."""

    damping: float = 0.0
    """λ, added to the Hessian."""


@dataclass(frozen=True)
class WarmSoba(Soba):
    """SOBA that begins with the weighting network of a domain classifier."""

    warm_start: bool = True
    """Begin with the weighting network of a domain classifier."""
    weight_learning_rate: float | None = 3e-3
    """Of the weighting network (Adam)."""


@dataclass(frozen=True)
class Penalty(Tracking):
    """A reference model that also lowers the specific loss pulls the weights."""

    strength: float = 1.0
    """Weight of the specific loss for the reference model."""


@dataclass(frozen=True)
class Dds(Learning):
    """DDS: one update of θ is unrolled (DDS, algorithm 1; ATD, equation 3)."""

    average_specific: float = 0.95
    """Decay of the moving average of the specific gradient; 0: none."""
    reward: Literal["dot", "cosine"] = "dot"
    """Product of each row's gradient with the specific one after the update, or their cosine (a backward pass a row)."""


@dataclass(frozen=True)
class RetrainedDds(Dds):
    """DDS that begins with the weighting network that the run of dds with the same seed ended with (DDS, section 4.1)."""


@dataclass(frozen=True)
class Anograd(Learning):
    """Anograd: the cosine of the generic and the specific gradient grows (ATD, section 4.3)."""

    average_specific: float = 0.95
    """Decay of the moving average of the specific gradient; 0: none."""
    through_optimizer: bool = True
    """Compare the specific gradient with the optimizer's move instead of the gradient."""


@dataclass(frozen=True)
class Implicit(Learning):
    """The implicit gradient, by conjugate gradients or a Neumann series."""

    update_every: int = 4
    """θ-updates for each α-update."""
    probe_every: int | None = 0
    """θ-updates for each evaluation of specific rows; 0: as often as α is updated."""
    average_specific: float = 0.9
    """Decay of the moving average of the specific gradient; 0: none."""
    damping: float = 1.0
    """λ, added to the Hessian."""
    iterations: int = 5
    """Hessian products in an α-step."""


@dataclass(frozen=True)
class ImplicitNeumann(Implicit):
    """The implicit gradient by a Neumann series."""

    step_size: float = 0.1
    """η, below 2/(largest eigenvalue of the Hessian + λ)."""


@dataclass(frozen=True)
class MetaWeightNet(Learning):
    """Meta-Weight-Net: weights are a learned function of a row's loss, and learned by DDS."""

    mode: Literal["sparse", "dense"] = "dense"
    """dense: all rows of a batch are weighed; sparse: rows are picked by it, for B forward passes a step."""
    probe_every: int | None = 0
    """θ-updates for each evaluation of specific rows; 0: as often as α is updated."""
    probe_blocks: int | None = 0
    """Probe the parameters of the last blocks only; 0: all."""
    average_specific: float = 0.95
    """Decay of the moving average of the specific gradient; 0: none."""
    weight_learning_rate: float | None = 1e-2
    """Of its network (Adam)."""
    hidden: int = 100
    """Units of its hidden layer."""


def _implicit(s: Implicit, make: Callable[..., methods.Method], **more: Any) -> methods.Method:
    return make(iterations=s.iterations, damping=s.damping, average_specific=s.average_specific, **more)


def _learned(name: str, method: Callable[[Any], methods.Method]) -> Callable[[Any, Context], Plan]:
    """The plan of a method over the task's weighting network."""

    def plan(settings: Learning, context: Context) -> Plan:
        return learning_plan(name, settings, context, method(settings))

    return plan


def learning_plan(name: str, s: Learning, context: Context, method: methods.Method) -> Plan:
    """Return the plan of a method that learns the task's weighting network.

    Raises:
      UserError: for settings that do not go together.
    """
    study, sparse, name = context.study, s.mode == "sparse", name.replace("_", "-")
    if sparse:
        check_sizes(study)
    elif s.specific_candidates:
        raise UserError(f"--{name}.specific-candidates {s.specific_candidates} needs --{name}.mode sparse: omit it.")
    model = context.model(ModelOptions(forward=s.derivatives == "forward", mesh=context.gathering_mesh))
    return Plan(
        model=model,
        method=method,
        weighting=context.weighting,
        mode=s.mode,
        picks=sparse,
        filter=filter_of(s),
        derivatives=bilevel.Forward() if s.derivatives == "forward" else bilevel.Finite(),
        weight_optimizer=_weight_optimizer(name, s),
        estimator=s.chosen_estimator,
        alpha_batch=s.alpha_batch,
        alpha_batch_size=s.alpha_batch_size or None,
        update_every=s.update_every,
        probe_every=_probe_every(name, s, method.reuse is not None),
        probe_blocks=_blocks(name, s, model.part is not None),
        normalize_alignments=s.normalize_alignments,
        specific_rows=candidates(s, study, name, jax.process_count()) if sparse else 0,
        specific_batch_size=s.specific_batch_size,
        start=context.classified(s.classifier_steps, s.classifier_rows, s.chosen_rate, f"{name}.classifier-")
        if s.warm_start
        else None,
        keeps_weights=True,
    )


def _weight_optimizer(name: str, s: Learning) -> optax.GradientTransformation:
    """Adam for α, with a warm-up that is counted in θ-updates."""
    if s.weight_warmup < 0 or s.update_every < 1:
        raise UserError(
            f"--{name}.weight-warmup {s.weight_warmup} must be at least 0, and --{name}.update-every {s.update_every} at least 1."
        )
    updates = s.weight_warmup // s.update_every
    schedule = optax.linear_schedule(0.0, s.chosen_rate, updates) if updates else s.chosen_rate
    return optax.adamw(schedule, weight_decay=s.weight_decay)


def _probe_every(name: str, s: Learning, reuses: bool) -> int | None:
    if s.probe_every is None:
        return 2 if reuses and 2 % s.update_every == 0 else None
    if s.probe_every < 0 or s.probe_every % s.update_every:
        raise UserError(
            f"--{name}.probe-every {s.probe_every} must be a multiple of --{name}.update-every {s.update_every}, or 0."
        )
    if s.probe_every > s.update_every and not reuses:
        raise UserError(
            f"--{name}.probe-every {s.probe_every} needs a specific gradient that is kept between: give "
            f"--{name}.average-specific above 0, or --{name}.probe-every 0."
        )
    return s.probe_every or None


def _blocks(name: str, s: Learning, has_blocks: bool) -> int:
    if s.probe_blocks is None:
        return int(has_blocks)
    if s.probe_blocks and not has_blocks:
        raise UserError(
            f"--{name}.probe-blocks {s.probe_blocks}: this network has no blocks that can be chosen apart; give 0."
        )
    return s.probe_blocks


def _retrained(s: RetrainedDds, context: Context) -> Plan:
    method = methods.dds(average_specific=s.average_specific, cosine=s.reward == "cosine")
    plan = learning_plan("retrained_dds", s, context, method)

    def start(state: Any) -> Start:
        found, seconds = context.weights_of("dds", state)
        return Start(found, {"preparation_seconds": seconds, "preparation_steps": float(context.study.steps)})

    return dataclasses.replace(plan, start=start)


def _meta_weight_net(s: MetaWeightNet, context: Context) -> Plan:
    if s.warm_start:
        raise UserError("--meta-weight-net.warm-start: its network sees losses, not rows, so omit it.")
    plan = learning_plan("meta_weight_net", s, context, methods.dds(average_specific=s.average_specific))
    net = meta_weight_net(plan.model.loss, hidden=s.hidden, micro_batches=context.study.micro_batches)
    return dataclasses.replace(plan, weighting=Weighting(net.init, net.scorer), keeps_weights=False)


_RATE = {"learning_rate": Log(1e-3, 8e-3)}
_WEIGHTS = _RATE | {"weight_learning_rate": Log(1e-3, 1e-1), "weight_decay": Among((0.0, 0.0, 0.1, 1.0))}
_AVERAGED = _WEIGHTS | {"average_specific": Among((0.8, 0.9, 0.95, 0.98))}
_TRACKED = _WEIGHTS | {"tracker_learning_rate": Log(5e-4, 1e-2)}
_PAPER: dict[str, Any] = {
    "estimator": "softmax", "update_every": 1, "probe_every": 0, "probe_blocks": 0, "derivatives": "forward",
    "normalize_alignments": False, "weight_learning_rate": 1e-3,
}  # fmt: skip
"""Grangier et al., sections 4.2, 4.3 and 6.2, with learning rates of our own where they are silent."""
_UNAVERAGED = _PAPER | {"average_specific": 0.0}

SPECS: dict[str, Spec] = {
    "meta_weight_net": Spec(MetaWeightNet, _meta_weight_net, _AVERAGED, _UNAVERAGED),
    "dds": Spec(
        Dds,
        _learned("dds", lambda s: methods.dds(average_specific=s.average_specific, cosine=s.reward == "cosine")),
        _AVERAGED,
        _UNAVERAGED | {"alpha_batch": "uniform"},
    ),
    "retrained_dds": Spec(
        RetrainedDds, _retrained, _AVERAGED, _UNAVERAGED | {"alpha_batch": "uniform"}, first=("dds",)
    ),
    "anograd": Spec(
        Anograd,
        _learned(
            "anograd",
            lambda s: methods.anograd(average_specific=s.average_specific, through_optimizer=s.through_optimizer),
        ),
        _AVERAGED,
        _UNAVERAGED | {"alpha_batch": "uniform", "through_optimizer": False},
    ),
    "soba": Spec(
        Soba,
        _learned("soba", lambda s: methods.soba(s.tracker_optimizer(), damping=s.damping)),
        _TRACKED | {"damping": Among((0.0, 0.05))},
        _PAPER,
    ),
    "warm_soba": Spec(
        WarmSoba,
        _learned("warm_soba", lambda s: methods.soba(s.tracker_optimizer(), damping=s.damping)),
        _TRACKED | {"classifier_steps": Among((100, 300, 1000))},
        _PAPER,
    ),
    "penalty": Spec(
        Penalty,
        _learned("penalty", lambda s: methods.penalty(s.tracker_optimizer(), strength=s.strength)),
        _TRACKED | {"strength": Log(0.1, 10.0)},
        _PAPER,
    ),
    "implicit_cg": Spec(
        Implicit,
        _learned("implicit_cg", lambda s: _implicit(s, methods.implicit_cg)),
        _AVERAGED | {"damping": Log(1e-2, 10.0), "iterations": Among((3, 5, 10))},
        _UNAVERAGED,
    ),
    "implicit_neumann": Spec(
        ImplicitNeumann,
        _learned("implicit_neumann", lambda s: _implicit(s, methods.implicit_neumann, step_size=s.step_size)),
        _AVERAGED | {"damping": Log(1e-2, 10.0), "step_size": Log(1e-2, 1.0), "iterations": Among((3, 5, 10))},
        _UNAVERAGED,
    ),
}

LEARNING = tuple(name for name, spec in SPECS.items() if spec.settings is not MetaWeightNet)
"""Methods that learn a weighting network of rows, not of losses, while the model trains."""
