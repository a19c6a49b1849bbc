"""Weighting networks over bytes, tokens or losses: cheap, one logit a row, 0 at first so that training starts uniform."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bilevel.nn import lookup
from bilevel.types import Array, Batch, LogitFn, Params

_BYTES = 256
_FACTORS = {True: 257, False: 2_246_822_507}
"""What a hash is multiplied by from one byte, or token, of an n-gram to the next."""


def masked_mean(x: Array, length: Array) -> Array:
    """Mean over the first `length` positions, `[b, T, d]` -> `[b, d]`."""
    real = jnp.arange(x.shape[1]) < length[:, None]
    sums = jnp.sum(jnp.where(real[..., None], x, 0), axis=1)
    return sums / jnp.maximum(length, 1)[:, None].astype(x.dtype)


class ConvWeighting(nn.Module):
    """Convolutions over embedded bytes or tokens, mean pooling, a linear logit: the paper's (2 layers, latent dimension 128).

    Reference: Grangier et al., table 1. The kernel width is not given there.
    """

    layers: int = 2
    width: int = 128
    kernel: int = 7
    vocabulary: int = _BYTES
    """V: bytes, or the tokens of a tokenizer."""
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, length: Array) -> Array:
        """Tokens `[b, T]`, lengths `[b]` -> logits, float32 `[b]`."""
        scale = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        embedding = self.param("embedding", scale, (self.vocabulary, self.width)).astype(self.dtype)
        kernel, bias = _Kernel(self.kernel, self.width, name="conv_0")(self.dtype)
        if self.vocabulary > max(tokens.size, _BYTES):  # a table of the batch's own tokens is smaller
            embedding = embedding[tokens.astype(jnp.int32).ravel()]
            tokens = jnp.arange(tokens.size).reshape(tokens.shape)
        tables = lookup.conv_tables(embedding, kernel)
        if self.layers == 1:
            sums = lookup.pooled_token_conv(tables, bias, tokens, length)
            pooled = sums / jnp.maximum(length, 1)[:, None].astype(sums.dtype)
        else:
            pooled = self._deeper(nn.relu(lookup.token_conv(tables, bias, tokens, length)), length)
        logits = nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(pooled)
        return logits[:, 0].astype(jnp.float32)

    def _deeper(self, x: Array, length: Array) -> Array:
        """The layers after the first, and the mean over positions."""
        real = (jnp.arange(x.shape[1]) < length[:, None])[..., None]
        for i in range(1, self.layers):
            # Padding contributes zeros, so that a row's logit does not depend on how far it is padded.
            x = nn.Conv(self.width, (self.kernel,), dtype=self.dtype, name=f"conv_{i}")(jnp.where(real, x, 0))
            x = nn.relu(x)
        return masked_mean(x, length)


class _Kernel(nn.Module):
    """The parameters of one convolution."""

    taps: int
    width: int

    @nn.compact
    def __call__(self, dtype: Any) -> tuple[Array, Array]:
        """Kernel `[taps, width, width]` and bias `[width]`."""
        shape = (self.taps, self.width, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return kernel.astype(dtype), self.param("bias", nn.initializers.zeros, (self.width,)).astype(dtype)


class LossMLP(nn.Module):
    """A perceptron with one hidden layer over the loss of a row: that of `bilevel.meta_weight_net`.

    Reference: Shu et al., "Meta-Weight-Net", NeurIPS 2019 (one hidden layer of 100 rectified units); Grangier et al.,
    section 5.1. The output is a logit, for the softmax; Shu et al. put a sigmoid there.
    """

    hidden: int = 100

    @nn.compact
    def __call__(self, losses: Array) -> Array:
        """Losses float32 `[b]` -> logits, float32 `[b]`."""
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(losses[:, None]))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(x)[:, 0]


SCALE = 8.0
"""√64, which undoes what averaging takes from unit vectors in rows of 64 bytes."""


class NGramWeighting(nn.Module):
    """Mean of the embeddings of hashed n-grams of bytes or tokens, then one hidden layer: no convolution over the text."""

    width: int = 32
    orders: tuple[int, ...] = (1, 2, 3, 4)
    buckets: int = 1 << 12
    hidden: int = 32
    vocabulary: int = _BYTES
    """V: bytes, or the tokens of a tokenizer."""
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, length: Array) -> Array:
        """Tokens `[b, T]`, lengths `[b]` -> logits, float32 `[b]`."""
        tables = self.param("tables", nn.initializers.normal(1.0), (len(self.orders) * self.buckets, self.width))
        tables = tables.astype(self.dtype)
        pooled = []
        for i, order in enumerate(self.orders):
            inside = max(tokens.shape[1] - order + 1, 1)
            rows = ngram_hashes(tokens, order, self.buckets, self.vocabulary)[:, :inside] + i * self.buckets
            count = jnp.clip(length - order + 1, 0, inside)[:, None]
            real = jnp.arange(inside) < count
            pooled.append(lookup.bag(tables, rows, (real / jnp.maximum(count, 1)).astype(tables.dtype)))
        # Means of many unit vectors are small: restore the scale for the hidden layer, the same for all lengths.
        x = jnp.concatenate(pooled, axis=-1) * np.float32(SCALE)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(x)[:, 0].astype(jnp.float32)


def ngram_hashes(tokens: Array, order: int, buckets: int, vocabulary: int = _BYTES) -> Array:
    """Bucket of the n-gram that starts at each position, int32 `[b, T]`; those that run over the end are meaningless.

    Unigrams map to themselves, if there are as many buckets; all others are mixed by multiplication with odd constants modulo
    2³² (Knuth's method).
    """
    x, factor = tokens.astype(jnp.uint32), np.uint32(_FACTORS[vocabulary <= _BYTES])
    mixed = order > 1 or vocabulary > max(buckets, _BYTES)
    code = jnp.zeros_like(x)
    for offset in range(order):
        code = code * factor + jnp.roll(x, -offset, axis=1) + np.uint32(mixed)
    if mixed:
        code = code * np.uint32(2_654_435_761)
        code = code ^ (code >> np.uint32(15))
    return (code % np.uint32(buckets)).astype(jnp.int32)


def logit_fn(module: nn.Module) -> LogitFn:
    """The `LogitFn` of a module over (tokens, length)."""

    def logits(params: Params, batch: Batch) -> Array:
        out = module.apply({"params": params}, batch["tokens"], batch["length"])
        assert isinstance(out, jax.Array)
        return out

    return logits
