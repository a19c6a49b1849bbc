"""The domain classifier: a weighting network that tells specific from generic.

It is trained before the main model.

    found = train_domain_classifier(
        weighting, weight_params, Loader(generic, 256, seed=0), Loader(specific, 256, seed=1), (generic_valid, specific_valid),
        optimizer=optax.adam(1e-3), steps=1000,
    )
    train = make_step(loss, weighting, optimizer, None, frozen(), batch_size=b, filter=filters.top_fraction(0.1))
    state = train.init(rng, params, found.weight_params, model_state)   # or where another method begins

Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization", section 5.1.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from bilevel.types import Array, Batch, LogitFn, Params, UserError


class Batches(Protocol):
    """Gives the batch of a step, such as a `bilevel.data.Loader`."""

    def batch(self, step: int, /) -> Batch:
        """Return the batch of `step` (counted from 0)."""
        ...


class DomainClassifier(NamedTuple):
    """A trained classifier; its logit ranks the generic rows."""

    weight_params: Params
    """Those with the lowest held-out loss."""
    valid_loss: float
    """Binary cross-entropy on the held-out rows, both kinds with equal mass, in nats; log 2 for a coin."""
    steps: int
    """Updates after which it was reached; 0 if no update lowered it."""
    seconds: float
    """Of all updates, without compiling and evaluating."""


def binary_cross_entropy(weighting: LogitFn, weight_params: Params, generic: Batch, specific: Batch) -> Array:
    """Compute ½ mean_i softplus(s_i) + ½ mean_j softplus(−s_j), in nats.

    Over generic rows i and specific rows j; float32 `[]`.

    Args:
      weighting: its logits s are those of "specific".
      weight_params: its parameters.
      generic: rows of any number.
      specific: rows of any number, which have the same mass together.
    """
    return 0.5 * (
        jnp.mean(jax.nn.softplus(weighting(weight_params, generic)))
        + jnp.mean(jax.nn.softplus(-weighting(weight_params, specific)))
    )


def train_domain_classifier(
    weighting: LogitFn,
    weight_params: Params,
    generic: Batches,
    specific: Batches,
    held_out: tuple[Batch, Batch],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    evaluations: int = 100,
) -> DomainClassifier:
    """Minimise the cross-entropy, and keep what is best on held-out rows.

    Args:
      weighting: the network; its logits are those of "specific".
      weight_params: where to begin.
      generic: training batches of one shape.
      specific: likewise; both kinds have equal mass, whatever their number of rows.
      held_out: one generic and one specific batch of rows that are not trained on.
      optimizer: of the network.
      steps: updates.
      evaluations: on the held-out rows, at even distances, besides the one before the first update. There should be many, as the
        classifier of a small specific set is at its best after a few steps.

    Raises:
      UserError: for steps or evaluations below 1, or held-out rows whose loss is not finite from the beginning.

    Reference: Grangier, Ablin, Hannun, section 5.1 ("domain classifier"). Keeping the best is our addition.
    """
    if steps < 1 or evaluations < 1:
        raise UserError(
            f"The domain classifier was given {steps} steps and {evaluations} evaluations; both must be at least 1."
        )

    def loss(params: Params, generic: Batch, specific: Batch) -> Array:
        return binary_cross_entropy(weighting, params, generic, specific)

    @jax.jit
    def update(params: Params, opt_state: optax.OptState, generic: Batch, specific: Batch) -> tuple[Params, object]:
        updates, opt_state = optimizer.update(jax.grad(loss)(params, generic, specific), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    evaluate, opt_state = jax.jit(loss), optimizer.init(weight_params)
    best = DomainClassifier(weight_params, float(evaluate(weight_params, *held_out)), 0, 0.0)
    if not math.isfinite(best.valid_loss):
        raise UserError(
            f"The held-out loss of the domain classifier is {best.valid_loss} before the first update: check the network's "
            "parameters and the held-out rows."
        )
    every = -(-steps // evaluations)
    jax.block_until_ready(update(weight_params, opt_state, generic.batch(0), specific.batch(0)))  # compiles
    seconds, began = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        batches = generic.batch(step - 1), specific.batch(step - 1)
        weight_params, opt_state = update(weight_params, opt_state, *batches)
        if step % every == 0 or step == steps:
            jax.block_until_ready(weight_params)
            seconds += time.perf_counter() - began
            found = float(evaluate(weight_params, *held_out))
            if found < best.valid_loss:
                best = DomainClassifier(weight_params, found, step, 0.0)
            began = time.perf_counter()
    return best._replace(seconds=seconds)
