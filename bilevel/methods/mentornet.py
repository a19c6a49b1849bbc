"""MentorNet: a network learns, on clean data or on rows of which that is known, to tell right rows from wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.derivatives.optimizers import check_optimizer
from bilevel.methods.base import Method, MethodUpdate, Problem
from bilevel.nn.mentor_net import MentorFeatures, MentorFn
from bilevel.trees import num_rows, widen
from bilevel.types import NOT_COMPUTED, Array, Batch, Params, UserError


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
    known: Array | None = None,
) -> Method:
    """Weigh rows by the chance that their label is right, as a network judges it.

    The network knows how the model sees them:

        v_i = sigmoid(mentor(ℓ_i, ℓ_i − ℓ̄, y_i, t/T)),      θ moves by its optimizer's update of (1/B) Σ v_i ∇ℓ_i,

    with ℓ̄ a moving average of a percentile of the losses of the batches. The mentor is trained along with the model, one step of
    binary cross-entropy on every step, on a clean set: the specific batch, of whose labels a share is replaced by others. It
    sees the losses of these rows under the current θ, and whether the label given is the right one.

    Dense mode, no weighting network:

        train = make_step(loss, None, optimizer, None, mentornet(…), mode="dense", batch_size=B)

    With `known`, which says of some generic rows whether they are right, the mentor learns from those rows of the batch instead,
    by the losses that the step has anyway. No specific batch is used, and rows need no labels.

    Costs a forward pass on the specific batch (none with `known`), and the mentor, over a plain step. `metrics["weights"]` holds
    v_i/B; specific_loss is the mentor's cross-entropy, NOT_COMPUTED where no row of the batch is known, which leaves the mentor
    as it is.

    Args:
      mentor: see `MentorFn`.
      mentor_params: its parameters at the start.
      optimizer: optax transformation of the mentor's parameters.
      num_classes: labels are 0..num_classes−1; 1, with `known` alone: rows have no labels, and the mentor sees 0.
      total_steps: T, the steps of the run.
      burn_in: share of the run in the beginning in which all v_i = 1.
      percentile: which one of the losses is averaged, as a share (over the rows of a device).
      decay: of that moving average.
      wrong_share: share of the specific batch's labels that are replaced by one of the others, drawn anew on every step.
      label: name of the labels in both batches, integer.
      known: int8 `[N]`, by the `id` of a generic row: 0 right, 1 wrong, −1 not known. Rows without an id (−1) are not known.

    Raises:
      UserError: for a value out of range.

    Reference: Jiang, Zhou, Leung, Li, Fei-Fei, "MentorNet: learning data-driven curriculum for very deep neural networks on
      corrupted labels", ICML 2018 (MentorNet DD, algorithm 1); a baseline in Wang et al. (DDS), section 4. Departures: the
      mentor is trained on every step instead of at two moments; its clean data carry wrong labels that we draw, where the paper
      has a set that was labelled twice (`known` is for the rows of such a set); no examples are dropped at random during
      burn-in.
    """
    _check(num_classes, total_steps, burn_in, percentile, decay, wrong_share, least_classes=2 if known is None else 1)
    faults = None if known is None else _checked(known)

    def init(part: Params) -> MentorNetState:
        own = jax.tree.map(jnp.copy, mentor_params)
        check_optimizer(optimizer, own, "mentornet's optimizer")
        return MentorNetState(own, optimizer.init(own), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def features(losses: Array, labels: Array, level: Array, step: Array) -> MentorFeatures:
        losses = widen(losses)
        progress = jnp.full(losses.shape, jnp.minimum(step / total_steps, 1.0), jnp.float32)
        return MentorFeatures(losses, losses - level, labels.astype(jnp.int32), progress)

    def labels_of(batch: Batch) -> Array:
        if num_classes == 1:
            return jnp.zeros(num_rows(batch), jnp.int32)
        return _named(batch, label, "labels", "give mentornet(label=…)")

    def taught(problem: Problem, state: MentorNetState, seen: MentorFeatures) -> tuple[Array, Params, optax.OptState]:
        """Train the mentor for a step, on the rows of the batch that are known; none of them leaves it as it is."""
        assert faults is not None
        ids = _named(problem.batch, "id", "the numbers of rows", "known=… needs them")
        values = jnp.where(ids >= 0, faults[jnp.maximum(ids, 0)], -1)
        counts = (values >= 0).astype(jnp.float32)
        some, devices = problem.total(counts), problem.total(jnp.ones(()))
        share = counts * devices / jnp.maximum(some, 1.0)  # the mean over devices is then that over their known rows

        def cross_entropy(params: Params) -> Array:
            each = optax.sigmoid_binary_cross_entropy(mentor(params, seen), (values == 0).astype(jnp.float32))
            return jnp.sum(share * each)

        value, gradient = problem.value_and_gradient(cross_entropy, state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        moved = optax.apply_updates(state.params, updates), opt_state
        kept = jax.tree.map(lambda new, old: jnp.where(some > 0, new, old), moved, (state.params, state.opt_state))
        return jnp.where(some > 0, value, NOT_COMPUTED), *kept

    def learned(problem: Problem, state: MentorNetState, level: Array) -> tuple[Array, Params, optax.OptState]:
        """Train the mentor for a step, on the specific batch with some wrong labels."""
        rows = problem.specific_batch
        labels, right = with_wrong_labels(problem.rng, labels_of(rows), num_classes, wrong_share)
        losses = problem.specific_losses({**rows, label: labels})
        seen = features(losses, labels, level, state.step)

        def cross_entropy(params: Params) -> Array:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(mentor(params, seen), right))

        value, gradient = problem.value_and_gradient(cross_entropy, state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return value, optax.apply_updates(state.params, updates), opt_state

    def update(problem: Problem, state: MentorNetState) -> MethodUpdate:
        labels = labels_of(problem.batch)
        rows = problem.first_order()
        devices, count = problem.total(jnp.ones(())), problem.total(jnp.ones_like(rows.losses))
        now = problem.total(jnp.quantile(widen(rows.losses), percentile)) / devices
        level = jnp.where(state.step == 0, now, decay * state.percentile + (1.0 - decay) * now).astype(jnp.float32)
        seen = features(jax.lax.stop_gradient(rows.losses), labels, level, state.step)
        judged = jax.nn.sigmoid(mentor(state.params, seen))
        weights = jnp.where(state.step < burn_in * total_steps, 1.0, judged) / count
        found = learned(problem, state, level) if faults is None else taught(problem, state, seen)
        value, params, opt_state = found
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


def _named(batch: Batch, name: str, what: str, advice: str) -> Array:
    """An array of a batch that is a mapping; a UserError says what the batch holds instead."""
    if not isinstance(batch, Mapping) or name not in batch:
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise UserError(f"mentornet reads {what} as batch[{name!r}], but a batch holds {held}: {advice}.")
    return batch[name]


def _checked(known: Array) -> Array:
    """What is known of rows, int8 `[N]`, with some known and no other values than −1, 0 and 1."""
    found = np.asarray(known)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not np.isin(found, (-1, 0, 1)).all():
        raise UserError(
            f"mentornet(known=…) has the shape {found.shape} and the type {found.dtype}; it must be integers [N]: 0 for a right "
            "row, 1 for a wrong one, and -1 for one of which that is not known."
        )
    if not (found >= 0).any():
        raise UserError("mentornet(known=…) knows of no row whether it is right: give some 0 or 1, or omit it.")
    return jnp.asarray(found, jnp.int8)


def _check(
    num_classes: int, total_steps: int, burn_in: float, percentile: float, decay: float, wrong_share: float, *,
    least_classes: int,
) -> None:  # fmt: skip
    if num_classes < least_classes:
        raise UserError(
            f"mentornet(num_classes={num_classes}) must be at least {least_classes}: one class cannot be wrong, but to a mentor "
            "that learns from known=…."
        )
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
