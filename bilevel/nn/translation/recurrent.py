"""A recurrent encoder–decoder with attention: the translation model of Wang et al. (DDS), appendix A.2.

The paper gives one layer, hidden 512, embedding 128 and dropout 0.3. The bidirectional encoder, additive attention, input feeding
and initial weights U(±0.1) follow the public code of its authors, as read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel.nn.translation.base import Decoding, Translator, shifted
from bilevel.types import Array, Batch

_EXCLUDED = -1e9
"""Energy of positions behind a source: finite, so that rows without a source and derivatives are finite too."""


@dataclass(frozen=True)
class RecurrentConfig:
    """Shape of a recurrent encoder–decoder."""

    source_vocabulary: int
    target_vocabulary: int
    hidden: int = 512
    """Units of the decoder, and of each direction of the encoder."""
    embedding: int = 128
    dropout: float = 0.0
    """On embedded pieces, and on what logits are read from."""
    scale: float = 0.1
    """Initial weights are drawn from U(±scale)."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, softmax and losses stay float32."""


class Source(NamedTuple):
    """What the decoder knows of the sources."""

    keys: Array
    """`[r, S, hidden]`."""
    values: Array
    """`[r, S, hidden]`: what the output takes from each position, so that a step need not project what it attended to."""
    length: Array
    """int32 `[r]`."""


class Moving(NamedTuple):
    """What changes with each piece."""

    carry: tuple[Array, Array]
    """Of the cell, each `[r, k, hidden]`."""
    fed: Array
    """`[r, k, hidden]`: what was attended to, read by the next step (input feeding)."""


class Energy(nn.Module):
    """How well each position of a source fits a query: one hidden layer of their sum (Bahdanau et al. 2015, appendix A.1.2)."""

    config: RecurrentConfig

    @nn.compact
    def __call__(self, keys: Array, query: Array) -> Array:
        """Keys `[r, S, hidden]`, queries `[r, k, hidden]` -> `[r, k, S]`."""
        c = self.config
        layer = nn.Dense(1, use_bias=False, kernel_init=_uniform(c.scale), dtype=c.dtype, name="energy")
        return layer(jnp.tanh(keys[:, None] + query[:, :, None]))[..., 0]


class DecoderStep(nn.Module):
    """One piece: the cell reads it beside what was attended to before, then attends to the source."""

    config: RecurrentConfig

    @nn.compact
    def __call__(self, moving: Moving, embedded: Array, source: Source, deterministic: bool) -> tuple[Moving, Array]:
        """Embedded pieces `[r, k, embedding]` -> the new state, and what logits are read from, `[r, k, hidden]`."""
        c, draw = self.config, _uniform(self.config.scale)
        layer: dict[str, Any] = {"use_bias": False, "kernel_init": draw, "dtype": c.dtype}
        cell = nn.OptimizedLSTMCell(c.hidden, kernel_init=draw, recurrent_kernel_init=draw, dtype=c.dtype, name="cell")
        carry, h = cell(moving.carry, jnp.concatenate([embedded, moving.fed], axis=-1))
        query = nn.Dense(c.hidden, name="query", **layer)(h)
        # The hidden layer is computed again for a gradient: kept for all pieces it would be [T, r, S, hidden], twice.
        energy = nn.remat(Energy, prevent_cse=False)(c, name="attention")(source.keys, query)
        known = jnp.arange(energy.shape[-1]) < source.length[:, None, None]
        weights = jax.nn.softmax(jnp.where(known, energy.astype(jnp.float32), _EXCLUDED), axis=-1)
        context = jnp.einsum("rks,rsd->rkd", weights.astype(c.dtype), source.values)
        fed = jnp.tanh(nn.Dense(c.hidden, name="out", **layer)(h) + context)
        fed = nn.Dropout(c.dropout)(fed, deterministic=deterministic)
        return Moving(carry, fed), fed


class RecurrentNetwork(nn.Module):
    """Bidirectional encoder and decoder; embeddings of either side and logits have parameters of their own."""

    config: RecurrentConfig

    def setup(self) -> None:
        """Make the parts."""
        c, draw = self.config, _uniform(self.config.scale)
        self.source_embedding = nn.Embed(c.source_vocabulary, c.embedding, embedding_init=draw, dtype=c.dtype)
        self.target_embedding = nn.Embed(c.target_vocabulary, c.embedding, embedding_init=draw, dtype=c.dtype)
        cell: dict[str, Any] = {"kernel_init": draw, "recurrent_kernel_init": draw, "dtype": c.dtype}
        forward, backward = (nn.RNN(nn.OptimizedLSTMCell(c.hidden, **cell)) for _ in range(2))
        self.encoder = nn.Bidirectional(forward, backward, return_carry=True)
        self.keys, self.values = (nn.Dense(c.hidden, use_bias=False, kernel_init=draw, dtype=c.dtype) for _ in range(2))
        self.bridge = nn.Dense(c.hidden, kernel_init=draw, dtype=c.dtype)
        axes: Any = (1, nn.broadcast, nn.broadcast)  # flax types it as one number
        rngs: Any = {"params": False, "dropout": True}
        self.steps = nn.scan(DecoderStep, variable_broadcast="params", split_rngs=rngs, in_axes=axes, out_axes=1)(c)
        self.readout = nn.Dense(c.target_vocabulary, use_bias=False, kernel_init=draw, dtype=c.dtype)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Array:
        """Logits of each target piece given the source and those before it, float32 `[b, T, V]`."""
        source, moving = self._encoded(batch, deterministic)
        embedded = self.drop(self.target_embedding(shifted(batch["target"])), deterministic=deterministic)
        _, read = self.steps(moving, embedded[:, :, None], source, deterministic)
        return self.readout(read[:, :, 0]).astype(jnp.float32)

    def begin(self, batch: Batch, length: int) -> Decoding:
        """Return the state before the first piece; it does not depend on how many may come."""
        return Decoding(*self._encoded(batch, True))

    def extend(self, decoding: Decoding, pieces: Array, position: Array) -> tuple[Array, Moving]:
        """Read one more piece a hypothesis; see `EncoderDecoder.extend`."""
        moving, read = self.steps(decoding.moving, self.target_embedding(pieces)[:, None], decoding.fixed, True)
        return self.readout(read)[:, 0].astype(jnp.float32), moving

    def _encoded(self, batch: Batch, deterministic: bool) -> tuple[Source, Moving]:
        length = batch["source_length"].astype(jnp.int32)
        embedded = self.drop(self.source_embedding(batch["source"].astype(jnp.int32)), deterministic=deterministic)
        ends, states = self.encoder(embedded, seq_lengths=length)
        cell = self.bridge(jnp.concatenate([carry[0] for carry in ends], axis=-1))[:, None]
        start = Moving((cell, jnp.tanh(cell)), jnp.zeros_like(cell))
        return Source(self.keys(states), self.values(states), length), start


def recurrent(config: RecurrentConfig) -> Translator:
    """Build an encoder–decoder of LSTM cells and attention."""
    return Translator(RecurrentNetwork(config), config.dropout)


def decoder_part(path: str) -> bool:
    """Accept the parameters that come after the encoder: the decoder's cell, its attention and the logits."""
    return path.startswith(("steps/", "readout/", "bridge/", "keys/", "values/", "target_embedding/"))


def _uniform(scale: float) -> Callable[..., Array]:
    """Initial weights from U(±scale)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)
