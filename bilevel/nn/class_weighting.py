"""A weighting network of the architecture of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.nn.classification import Prepare, init_variables
from bilevel.types import Array, Batch, LogitFn, Params


def class_weighting(
    network: Any, shape: tuple[int, ...], prepare: Prepare, *, inputs: str, labels: bool
) -> tuple[Callable[[Array], Params], LogitFn]:
    """Return what makes the parameters of a weighting network, and its logits.

    Its last layer is 0 at first, so that all rows weigh alike. BatchNorm normalises by the rows that are scored together.

    Reference: Wang et al. (DDS), algorithm 1 and appendix A.4: a network over images, with one output.

    Args:
        network: the classifier, without dropout, with an output for each class or with one.
        shape: of one input.
        prepare: makes inputs of what a batch holds.
        inputs: their name in a batch.
        labels: whether the output of a row's label counts; else the only one.
    """
    fresh = partial(init_variables, network, shape=shape)
    # Only their shapes count: they are never used to normalise.
    _, shapes = jax.eval_shape(fresh, jax.random.key(0))
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def init(key: Array) -> Params:
        params, _ = fresh(key)
        return {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}

    def logits(weights: Params, batch: Batch) -> Array:
        x = prepare(batch[inputs], jax.random.key(0))
        found, _ = network.apply({"params": weights, **statistics}, x, train=True, mutable=list(statistics))
        column = batch["label"].astype(jnp.int32) if labels else jnp.zeros(len(found), jnp.int32)
        return jnp.take_along_axis(found, column[:, None], axis=1)[:, 0]

    return init, logits
