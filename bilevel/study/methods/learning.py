"""Methods that learn a weighting network while the model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import optax
from pydantic import NonNegativeFloat, NonNegativeInt

import bilevel
from bilevel import methods
from bilevel.selection.meta_weight_net import meta_weight_net
from bilevel.step.estimators import Estimator
from bilevel.study.context import RESULT, Context
from bilevel.study.methods.picking import PROPORTIONAL, Picking
from bilevel.study.spec import RATE, Plan, Spec, Start, plan_over, probed
from bilevel.study.task import Model, Weighting
from bilevel.study.weights import At, best_weights, classified, load_weights, save_weights, weights_file
from bilevel.training.random_search import Among, Log
from bilevel.training.run_dir import read_json
from bilevel.training.settings import Count
from bilevel.types import UserError

_OF_STEP = ("mode", "alpha_batch", "update_every", "normalize_alignments", "entropy_bonus", "shift_pull")
"""Settings that `make_step` has under the same names."""


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
    update_every: Count = 1
    """θ-updates for each α-update."""
    probe_every: NonNegativeInt | None = None
    """θ-updates for each evaluation of specific rows, a multiple of update-every; 0: as often as α is updated; none given: 2
    where the method keeps a specific gradient and update-every divides it, else 0."""
    probe_blocks: int | None = None
    """Probe the parameters of the last blocks only, this many (cheaper); 0: all; none given: 1 where the network has blocks."""
    derivatives: Literal["forward", "finite"] = "finite"
    """Exact forward mode, or finite differences (cheaper)."""
    normalize_alignments: bool = True
    """Scale the alignments of each α-step to root mean square 1."""
    entropy_bonus: NonNegativeFloat = 0.05
    """λ: keeps the logits from growing for ever, and sets how sharp the weights become; 0: none, as in the papers."""
    shift_pull: NonNegativeFloat = 0.05
    """Draws the mean of the logits to 0, which changes no weight and keeps them from their bound; 0: none, as in the papers."""
    weight_learning_rate: float | None = None
    """Of the weighting network (Adam); none given: 1e-2 with the estimator score, else 1e-3."""
    weight_warmup: NonNegativeInt = 0
    """θ-updates over which that rate grows from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the weighting network."""
    warm_start: bool = False
    """Begin with the weighting network of a domain classifier."""
    classifier_steps: Count = 1000
    """warm-start: updates of that classifier."""
    classifier_rows: Count = 256
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
        if self.tracker == "adam":
            return optax.adam(self.tracker_learning_rate, b2=0.98)
        return optax.sgd(self.tracker_learning_rate, momentum=0.9 if self.tracker == "momentum" else None)


@dataclass(frozen=True)
class Soba(Tracking):
    """SOBA: v tracks the solution of the linear system (ATD, section 4.3.2)."""

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
class Averaging(Learning):
    """How weights are learned with an average of specific gradients."""

    average_specific: float = 0.95
    """Decay of the moving average of the specific gradient; 0: none."""


@dataclass(frozen=True)
class Unrolling(Averaging):
    """How weights are learned by an update that is unrolled."""

    unroll_rate: NonNegativeFloat = 0.0
    """Unroll an update of plain SGD with this learning rate (ρ of ATD, equation 3); 0: one of θ's own optimizer."""


@dataclass(frozen=True)
class Dds(Unrolling):
    """DDS: one update of θ by its optimizer is unrolled (DDS, algorithm 1 and appendix A.1; in ATD, equation 3, one of SGD)."""

    reward: Literal["dot", "cosine"] = "dot"
    """Product of each row's gradient with the specific one after the update, or their cosine, at the price of a backward pass
    of the whole batch for each row: at b = 32 an α-step costs 21 plain steps more, at b = 128 85."""


@dataclass(frozen=True)
class RetrainedDds(Dds):
    """DDS that begins with the weighting network that the run of dds with the same seed ended with (DDS, section 4.1)."""

    at: At = "end"
    """The network that dds ended with, or that of its evaluation that was best on valid."""


@dataclass(frozen=True)
class Anograd(Averaging):
    """Anograd: the cosine of the generic and the specific gradient grows (ATD, section 4.3.3)."""

    through_optimizer: bool = True
    """Compare the specific gradient with the optimizer's move instead of the gradient."""


@dataclass(frozen=True)
class Implicit(Averaging):
    """The implicit gradient, by conjugate gradients or a Neumann series."""

    update_every: Count = 4
    """θ-updates for each α-update."""
    probe_every: NonNegativeInt | None = 0
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
class MetaWeightNet(Unrolling):
    """Meta-Weight-Net: weights are a learned function of a row's loss, and learned by DDS."""

    mode: Literal["sparse", "dense"] = "dense"
    """dense: all rows of a batch are weighed; sparse: rows are picked by it, for B forward passes a step."""
    probe_every: NonNegativeInt | None = 0
    """θ-updates for each evaluation of specific rows; 0: as often as α is updated."""
    probe_blocks: int | None = 0
    """Probe the parameters of the last blocks only; 0: all."""
    weight_learning_rate: float | None = 1e-2
    """Of its network (Adam)."""
    hidden: int = 100
    """Units of its hidden layer."""


def learned(make: Callable[..., methods.Method], *names: str) -> Callable[[Any, Context], Plan]:
    """Return the plans of a method that learns the task's weighting network.

    `make` builds the method from the settings `names`, after the optimizer of its tracker if it has one.
    """

    def plan(s: Learning, context: Context) -> Plan:
        tracker = (s.tracker_optimizer(),) if isinstance(s, Tracking) else ()
        method = make(*tracker, **{name: getattr(s, name) for name in names})
        model = context.trained_model(forward=s.derivatives == "forward")
        plan = _plan(s, context, method, model, context.weighting)
        finish = partial(save_weights, context, context.loaded_rows(plan.picks))
        plan = dataclasses.replace(plan, finish=finish, keeper=partial(best_weights, context))
        if not s.warm_start:
            return plan
        start = classified(context, steps=s.classifier_steps, rows=s.classifier_rows, rate=s.chosen_rate)
        return dataclasses.replace(plan, start=start)

    return plan


def _dds(average_specific: float, unroll_rate: float, reward: str = "dot") -> methods.Method:
    unroll = optax.sgd(unroll_rate) if unroll_rate else None
    return methods.dds(average_specific=average_specific, cosine=reward == "cosine", unroll=unroll)


def _retrained(s: RetrainedDds, context: Context) -> Plan:
    def start(state: Any) -> Start:
        directory = context.own_context("dds", context.seed).directory
        summary = read_json(directory / RESULT)
        report = {"preparation_seconds": summary["seconds"], "preparation_steps": float(summary["steps"])}
        file = weights_file(directory, s.at, "--retrained-dds.at")
        return Start(load_weights(file, state.weight_params), report)

    return dataclasses.replace(_LEARNED_BY_DDS(s, context), start=start)


def _meta_weight_net(s: MetaWeightNet, context: Context) -> Plan:
    if s.warm_start:
        raise UserError("--meta-weight-net.warm-start: its network sees losses, not rows, so omit it.")
    model = context.trained_model(forward=s.derivatives == "forward")
    net = meta_weight_net(model.loss, hidden=s.hidden, micro_batches=context.scored_parts(model))
    plan = _plan(s, context, _dds(s.average_specific, s.unroll_rate), model, Weighting(net.init, net.scorer))
    return dataclasses.replace(plan, reads_rows=True)


def _plan(s: Learning, context: Context, method: methods.Method, model: Model, weighting: Weighting) -> Plan:
    """The plan of a method over a weighting network."""
    sparse, flag = s.mode == "sparse", context.flag
    blocks = int(model.part is not None) if s.probe_blocks is None else s.probe_blocks
    if s.specific_candidates and not sparse:
        raise UserError(f"--{flag}.specific-candidates {s.specific_candidates} needs --{flag}.mode sparse: omit it.")
    options = {
        **{name: getattr(s, name) for name in _OF_STEP},
        "filter": s.rule(),
        "derivatives": bilevel.Forward() if s.derivatives == "forward" else bilevel.Finite(),
        "weight_optimizer": _weight_optimizer(s),
        "estimator": s.chosen_estimator,
        "alpha_batch_size": s.alpha_batch_size or None,
        "probe_every": _probe_every(flag, s, method.reuse is not None),
        "param_filter": probed(context, model, blocks),
    }
    return plan_over(
        context, model, method, weighting, options, picks=sparse, specific_rows=s.candidates(context) if sparse else 0,
        specific_batch_size=s.specific_batch_size,
    )  # fmt: skip


def _weight_optimizer(s: Learning) -> optax.GradientTransformation:
    """Adam for α, with a warm-up that is counted in θ-updates."""
    updates = s.weight_warmup // s.update_every
    schedule = optax.linear_schedule(0.0, s.chosen_rate, updates) if updates else s.chosen_rate
    return optax.adamw(schedule, weight_decay=s.weight_decay)


def _probe_every(name: str, s: Learning, reuses: bool) -> int | None:
    if s.probe_every is None:
        return 2 if reuses and 2 % s.update_every == 0 else None
    if s.probe_every % s.update_every:
        raise UserError(
            f"--{name}.probe-every {s.probe_every} must be a multiple of --{name}.update-every {s.update_every}, or 0."
        )
    if s.probe_every > s.update_every and not reuses:
        raise UserError(
            f"--{name}.probe-every {s.probe_every} needs a specific gradient that is kept between: give "
            f"--{name}.average-specific above 0, or --{name}.probe-every 0."
        )
    return s.probe_every or None


_WEIGHTS = {**RATE, "weight_learning_rate": Log(1e-3, 1e-1), "weight_decay": Among((0.0, 0.0, 0.1, 1.0))}
_AVERAGED = _WEIGHTS | {"average_specific": Among((0.8, 0.9, 0.95, 0.98))}
_TRACKED = _WEIGHTS | {"tracker_learning_rate": Log(5e-4, 1e-2)}
_IMPLICIT = _AVERAGED | {"damping": Log(1e-2, 10.0), "iterations": Among((3, 5, 10))}
_PAPER: dict[str, Any] = {
    "estimator": "softmax", "update_every": 1, "probe_every": 0, "probe_blocks": 0, "derivatives": "forward",
    "normalize_alignments": False, "entropy_bonus": 0.0, "shift_pull": 0.0, "weight_learning_rate": 1e-3,
}  # fmt: skip
"""Grangier et al., sections 4.2, 4.3 and 6.2, and table 13 (the rate). Our own where they are silent: the tracker and its rate,
and the rate of the SGD that dds unrolls."""
_UNAVERAGED = _PAPER | {"average_specific": 0.0}
_UNIFORM = _UNAVERAGED | {"alpha_batch": "uniform"}
_UNROLLED = {"unroll_rate": 1e-2}
_LEARNED_BY_DDS = learned(_dds, "average_specific", "unroll_rate", "reward")

SPECS: dict[str, Spec] = {
    "meta_weight_net": Spec(MetaWeightNet, _meta_weight_net, _AVERAGED, _UNAVERAGED | _UNROLLED),
    "dds": Spec(Dds, _LEARNED_BY_DDS, _AVERAGED, _UNIFORM | _UNROLLED),
    "retrained_dds": Spec(RetrainedDds, _retrained, _AVERAGED, _UNIFORM | _UNROLLED, first=("dds",)),
    "anograd": Spec(
        Anograd, learned(methods.anograd, "average_specific", "through_optimizer"), _AVERAGED,
        _UNIFORM | {"through_optimizer": False},
    ),
    "soba": Spec(Soba, learned(methods.soba, "damping"), _TRACKED | {"damping": Among((0.0, 0.05))}, _PAPER),
    "warm_soba": Spec(
        WarmSoba, learned(methods.soba, "damping"), _TRACKED | {"classifier_steps": Among((100, 300, 1000))}, _PAPER
    ),
    "penalty": Spec(Penalty, learned(methods.penalty, "strength"), _TRACKED | {"strength": Log(0.1, 10.0)}, _PAPER),
    "implicit_cg": Spec(
        Implicit, learned(methods.implicit_cg, "iterations", "damping", "average_specific"), _IMPLICIT, _UNAVERAGED
    ),
    "implicit_neumann": Spec(
        ImplicitNeumann, learned(methods.implicit_neumann, "iterations", "damping", "average_specific", "step_size"),
        _IMPLICIT | {"step_size": Log(1e-2, 1.0)}, _UNAVERAGED,
    ),
}  # fmt: skip

LEARNING = tuple(name for name, spec in SPECS.items() if spec.settings is not MetaWeightNet)
"""Methods that learn a weighting network of rows, not of losses, while the model trains."""
