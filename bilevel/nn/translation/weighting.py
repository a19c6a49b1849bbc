"""A weighting network over pairs of sentences: bags of pieces, and one hidden layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel.nn import lookup
from bilevel.types import Array, Batch, LogitFn, Params


class PairWeighting(nn.Module):
    """One embedding for both sides, their means over the unpadded pieces, a hidden layer, a logit that is 0 at first.

    Reference: Grangier et al., table 14 (embedding 32, 64 -> 128 -> 1). The zero at first, so that training starts uniform, is
    ours.
    """

    vocabulary: int
    width: int = 32
    hidden: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, source: Array, source_length: Array, target: Array, target_length: Array) -> Array:
        """Pieces `[b, S]`, `[b, T]`, lengths `[b]` -> logits, float32 `[b]`."""
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocabulary, self.width)).astype(self.dtype)
        sides = []
        for pieces, length in ((source, source_length), (target, target_length)):
            real = jnp.arange(pieces.shape[1]) < length[:, None]
            weights = (real / jnp.maximum(length, 1)[:, None]).astype(table.dtype)
            # A mean of n unit vectors has a length of n^-1/2: rows of any length come at the same scale.
            scale = jnp.sqrt(jnp.maximum(length, 1).astype(table.dtype))[:, None]
            sides.append(lookup.bag(table, pieces.astype(jnp.int32), weights) * scale)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(jnp.concatenate(sides, axis=-1)))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(x)[:, 0].astype(jnp.float32)


def pair_logits(module: PairWeighting) -> LogitFn:
    """Return the `LogitFn` of the network over batches of pairs."""

    def logits(params: Params, batch: Batch) -> Array:
        sides = [batch[name] for name in ("source", "source_length", "target", "target_length")]
        out = module.apply({"params": params}, *sides)
        assert isinstance(out, jax.Array)
        return out

    return logits
