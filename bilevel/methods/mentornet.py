"""MentorNet: a network learns on clean data to tell right labels from wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.derivatives.optimizers import check_optimizer
from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.nn.mentor_net import MentorFeatures, MentorFn
from bilevel.trees import widen
from bilevel.types import Array, Params, UserError


class MentorNetState(NamedTuple):
    """State of `mentornet`; all of it changes on every step."""

    params: Params
    opt_state: optax.OptState
    percentile: Array
    """float32 scalar: moving average of a percentile of the losses."""
    step: Array
    """int32 scalar: θ-updates done."""


def mentornet(
    mentor: MentorFn,
    mentor_params: Params,
    optimizer: optax.GradientTransformation,
    *,
    num_classes: int,
    total_steps: int,
    burn_in: float = 0.2,
    percentile: float = 0.75,
    decay: float = 0.9,
    wrong_share: float = 0.5,
    label: str = "label",
) -> Method:
    """Weigh rows by the chance that their label is right, as a network judges it.

    The network knows how the model sees them:

        v_i = sigmoid(mentor(ℓ_i, ℓ_i − ℓ̄, y_i, t/T)),      θ moves by its optimizer's update of (1/B) Σ v_i ∇ℓ_i,

    with ℓ̄ a moving average of a percentile of the losses of the batches. The mentor is trained along with the model, one step of
    binary cross-entropy on every step, on a clean set: the specific batch, of whose labels a share is replaced by others. It
    sees the losses of these rows under the current θ, and whether the label given is the right one.

    Dense mode, no weighting network:

        train = make_step(loss, None, optimizer, None, mentornet(…), mode="dense", batch_size=B)

    Costs a forward pass on the specific batch, and the mentor, over a plain step. `metrics["weights"]` holds v_i/B;
    specific_loss is the mentor's cross-entropy.

    Args:
      mentor: see `MentorFn`.
      mentor_params: its parameters at the start.
      optimizer: optax transformation of the mentor's parameters.
      num_classes: labels are 0..num_classes−1.
      total_steps: T, the steps of the run.
      burn_in: share of the run in the beginning in which all v_i = 1.
      percentile: which one of the losses is averaged, as a share (over the rows of a device).
      decay: of that moving average.
      wrong_share: share of the specific batch's labels that are replaced by one of the others, drawn anew on every step.
      label: name of the labels in both batches, integer.

    Raises:
      UserError: for a value out of range.

    Reference: Jiang, Zhou, Leung, Li, Fei-Fei, "MentorNet: learning data-driven curriculum for very deep neural networks on
      corrupted labels", ICML 2018 (MentorNet DD, algorithm 1); a baseline in Wang et al. (DDS), section 4. Departures: the
      mentor is trained on every step instead of at two moments; its clean data carry wrong labels that we draw, where the
      paper has a set that was labelled twice; no examples are dropped at random during burn-in.
    """
    _check(num_classes, total_steps, burn_in, percentile, decay, wrong_share)

    def init(part: Params) -> MentorNetState:
        own = jax.tree.map(jnp.copy, mentor_params)
        check_optimizer(optimizer, own, "mentornet's optimizer")
        return MentorNetState(own, optimizer.init(own), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def features(losses: Array, labels: Array, level: Array, step: Array) -> MentorFeatures:
        losses = widen(losses)
        progress = jnp.full(losses.shape, jnp.minimum(step / total_steps, 1.0), jnp.float32)
        return MentorFeatures(losses, losses - level, labels.astype(jnp.int32), progress)

    def learned(problem: Problem, state: MentorNetState, level: Array) -> tuple[Array, Params, optax.OptState]:
        """Train the mentor for a step, on the specific batch with some wrong labels."""
        rows = problem.specific_batch
        labels, right = with_wrong_labels(problem.rng, rows[label], num_classes, wrong_share)
        losses = problem.specific_losses({**rows, label: labels})
        seen = features(losses, labels, level, state.step)

        def cross_entropy(params: Params) -> Array:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(mentor(params, seen), right))

        value, gradient = problem.value_and_gradient(cross_entropy, state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return value, optax.apply_updates(state.params, updates), opt_state

    def update(problem: Problem, state: MentorNetState) -> MethodUpdate:
        for batch in (problem.batch, problem.specific_batch):
            if not isinstance(batch, Mapping) or label not in batch:
                held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
                raise UserError(
                    f"mentornet reads labels as batch[{label!r}], but a batch holds {held}: give mentornet(label=…)."
                )
        rows = problem.first_order()
        devices, count = problem.total(jnp.ones(())), problem.total(jnp.ones_like(rows.losses))
        now = problem.total(jnp.quantile(widen(rows.losses), percentile)) / devices
        level = jnp.where(state.step == 0, now, decay * state.percentile + (1.0 - decay) * now).astype(jnp.float32)
        seen = features(jax.lax.stop_gradient(rows.losses), problem.batch[label], level, state.step)
        judged = jax.nn.sigmoid(mentor(state.params, seen))
        weights = jnp.where(state.step < burn_in * total_steps, 1.0, judged) / count
        value, params, opt_state = learned(problem, state, level)
        return MethodUpdate(
            rows.losses,
            rows.aux,
            rows.reweighted(weights),
            None,
            value,
            MentorNetState(params, opt_state, level, state.step + 1),
            weights,
        )

    return Method(init, update, uses_weights=False, chooses_weights=True)


def with_wrong_labels(key: Array, labels: Array, num_classes: int, share: float) -> tuple[Array, Array]:
    """Replace labels, each with probability `share`, by one of the other classes.

    Returns:
      The labels, in their type, `[b]`, and whether they are those given, float32 `[b]`.
    """
    which, other = jax.random.split(key)
    wrong = jax.random.bernoulli(which, share, labels.shape)
    shift = jax.random.randint(other, labels.shape, 1, num_classes)
    moved = ((labels.astype(jnp.int32) + shift) % num_classes).astype(labels.dtype)
    return jnp.where(wrong, moved, labels), 1.0 - wrong.astype(jnp.float32)


def _check(
    num_classes: int, total_steps: int, burn_in: float, percentile: float, decay: float, wrong_share: float
) -> None:
    if num_classes < 2:
        raise UserError(f"mentornet(num_classes={num_classes}) must be at least 2: one class cannot be wrong.")
    if total_steps < 1:
        raise UserError(f"mentornet(total_steps={total_steps}) must be at least 1.")
    for name, value in (("burn_in", burn_in), ("percentile", percentile)):
        if not 0 <= value <= 1:
            raise UserError(f"mentornet({name}={value}) must lie in [0, 1].")
    if not 0 <= decay < 1:
        raise UserError(f"mentornet(decay={decay}) must lie in [0, 1); 0 takes the percentile of the batch at hand.")
    if not 0 < wrong_share < 1:
        raise UserError(
            f"mentornet(wrong_share={wrong_share}) must lie in (0, 1): there must be right and wrong labels."
        )
