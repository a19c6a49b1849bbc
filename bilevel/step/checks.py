"""What is checked beyond the options: the parts that a state is made of, and what an α-step found."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.derivatives.optimizers import check_optimizer, check_parameters, warn_of_derivative_zero
from bilevel.devices.axis import Axis
from bilevel.methods.base import Method, MethodUpdate
from bilevel.step import estimators
from bilevel.step.options import StepOptions
from bilevel.types import Array, LossAux, Metrics, ModelState, Params, UserError


def check_start(
    optimizer: optax.GradientTransformation,
    weight_optimizer: optax.GradientTransformation,
    method: Method,
    options: StepOptions,
    params: Params,
    weight_params: Params | None,
) -> None:
    """Reject parameters and optimizers that fit no step.

    Warns of an optimizer of θ that the method can learn nothing through.

    Raises:
      UserError: for the first that does not fit.
    """
    learns = method.update is not None and not method.chooses_weights
    if learns and not jax.tree.leaves(weight_params):
        raise UserError(
            "init got no weight_params, but this method learns the weighting network: give the network's parameters, as in "
            "train.init(rng, params, weight_params)."
        )
    check_parameters(params, "params")
    check_optimizer(optimizer, params, "The optimizer of θ")
    if learns:
        check_parameters(weight_params, "weight_params")
        check_optimizer(weight_optimizer, weight_params, "weight_optimizer")
    if method.looks_ahead:
        warn_of_derivative_zero(optimizer, params, options.update_every, method.chooses_weights)


def is_sound(update: MethodUpdate, found: Any, before: Any, axis: Axis) -> Array:
    """Tell whether all that an α-step found is finite, from the specific loss to α; a bool scalar.

    An α that is not would be lost for good, and θ with it.

    Args:
      update: what the method returned.
      found: α, the state of its optimizer and that of the method, after the step.
      before: the same before it.
      axis: the devices that the rows are spread over.
    """
    sound = trees.stays_finite(found, before)
    if update.specific_loss is not None:
        sound &= jnp.isfinite(update.specific_loss)
    if update.alignments is not None:
        sound &= estimators.total(~jnp.isfinite(update.alignments), axis) == 0
    return sound


def check_statistics(found: Any, before: ModelState, option: str) -> None:
    """Reject a model state that cannot be averaged: counters and random keys that the loss changed.

    Args:
      found: what the loss returned; if it is no pair of losses and `LossAux`, others say so.
      before: the model state that the loss was given.
      option: what averages model states, as the user asked for it.

    Raises:
      UserError: naming the first leaf that changed and is not floating-point.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LossAux)):
        return
    old = dict(jax.tree_util.tree_leaves_with_path(trees.in_structure(before, found[1].model_state)))
    for path, x in jax.tree_util.tree_leaves_with_path(found[1].model_state):
        if x is not old.get(path) and not jnp.issubdtype(x.dtype, jnp.inexact):
            raise UserError(
                f"The loss changes the model state {jax.tree_util.keystr(path)}, {x.dtype}, which is no statistic that {option} "
                "could average: keep it elsewhere (what a batch brings along for all rows is bilevel.Shared), return it as it "
                f"was, or omit {option.partition('=')[0]}."
            )


def asked_for(names: tuple[str, ...], aux: LossAux) -> Metrics:
    """Return the per-example metrics that were asked for, `[b, …]`.

    Raises:
      UserError: the loss returns none of that name.
    """
    for name in names:
        if name not in aux.metrics:
            raise UserError(
                f"The loss returns no per-example metric {name!r} (it returns: {', '.join(aux.metrics) or 'none'}): "
                "add it to the metrics of its LossAux."
            )
    return {name: aux.metrics[name] for name in names}
