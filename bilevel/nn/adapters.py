"""Flax modules as losses: a thin adapter for linen, and one for NNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from bilevel import trees
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params

Inputs: TypeAlias = str | Sequence[str]
"""Names of arrays in a batch."""


def linen_loss(module: nn.Module, losses: Callable[[Any, Batch], Array], *, inputs: Inputs, **apply: Any) -> LossFn:
    """The loss of a linen module; its mutable collections (`batch_stats`, …) are the model state.

    Args:
      module: called on the inputs.
      losses: (outputs, batch) -> per-example losses, float32 `[b]`.
      inputs: name of the input in the batch, or names of several in the order of the call's arguments.
      **apply: keyword arguments of the module's call, such as `train=True`.

    Returns:
      A loss over params = variables["params"] and model_state = the other collections.
    """

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        outputs, changed = module.apply(
            {"params": params, **model_state},
            *_given(batch, inputs),
            mutable=list(model_state),
            rngs={"dropout": rng},
            **apply,
        )
        return losses(outputs, batch), LossAux(trees.in_structure({**model_state, **changed}, model_state), {})

    return loss


def nnx_loss(graphdef: Any, losses: Callable[[Any, Batch], Array], *, inputs: Inputs) -> LossFn:
    """The loss of an NNX module, split by `graphdef, params, model_state = nnx.split(module, nnx.Param, ...)`.

    Args:
      graphdef: the static part of the split.
      losses: (outputs, batch) -> per-example losses, float32 `[b]`.
      inputs: name of the input in the batch, or names of several in the order of the call's arguments.

    Returns:
      A loss over params and model_state, the two states of the split. Dropout and other random layers draw from the key that
      the step gives, so that micro-batches and devices draw apart; the streams that the module keeps stay as they are.
    """

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        # A copy: merged variables would otherwise be mutated across levels of differentiation.
        module = nnx.merge(graphdef, params, _reseeded(model_state, rng), copy=True)
        outputs = module(*_given(batch, inputs))
        _, _, changed = nnx.split(module, nnx.Param, ...)
        kept = nnx.filter_state(model_state, nnx.RngState)
        return losses(outputs, batch), LossAux(nnx.merge_state(changed, kept), {})

    return loss


def _given(batch: Batch, inputs: Inputs) -> list[Any]:
    return [batch[name] for name in ([inputs] if isinstance(inputs, str) else inputs)]


def _reseeded(model_state: ModelState, rng: Array) -> ModelState:
    """The model state with a new key, made from `rng`, for each of its random streams."""

    def leaf(index: int, x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.random.split(jax.random.fold_in(rng, index), x.shape)

    leaves, tree = jax.tree.flatten(model_state)
    return jax.tree.unflatten(tree, [leaf(i, x) for i, x in enumerate(leaves)])
