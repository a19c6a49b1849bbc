"""A transformer encoder–decoder: the translation model of Grangier et al., tables 1 and 14."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bilevel.nn.transformer import positions
from bilevel.nn.translation.base import Decoding, Translator, shifted
from bilevel.types import Array, Batch, UserError


@dataclass(frozen=True)
class TranslatorConfig:
    """Shape of an encoder–decoder."""

    vocabulary: int
    """V: pieces, shared by source and target."""
    layers: int = 2
    """Of the encoder, and as many of the decoder."""
    width: int = 64
    heads: int = 4
    feed_forward: int = 256
    dropout: float = 0.0
    dtype: Any = jnp.float32
    """Type of the computation; parameters, softmax and losses stay float32."""
    fused: bool = True
    """Take the fused attention of NVIDIA GPUs for 16-bit computation, which has no forward-mode derivative."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise UserError(f"The width {self.width} must be even and a multiple of its {self.heads} heads.")


SIZES: dict[str, dict[str, int]] = {
    "xs": {"layers": 2, "width": 64, "heads": 4, "feed_forward": 256},
    "small": {"layers": 3, "width": 256, "heads": 4, "feed_forward": 1024},
    "base": {"layers": 6, "width": 512, "heads": 8, "feed_forward": 2048},
    "big": {"layers": 6, "width": 1024, "heads": 16, "feed_forward": 4096},
}
"""Named sizes; base is that of Vaswani et al. (2017), big that of Grangier et al., table 14."""


class KeysValues(NamedTuple):
    """What is attended to, each `[n, S, heads, width / heads]`."""

    keys: Array
    values: Array


class Attention(nn.Module):
    """Attention in parts, so that keys and values can be kept."""

    config: TranslatorConfig

    def setup(self) -> None:
        """Make the projections."""
        c = self.config
        shape = (c.heads, c.width // c.heads)
        self.query = nn.DenseGeneral(shape, use_bias=False, dtype=c.dtype)
        self.key_value = nn.DenseGeneral((2, *shape), use_bias=False, dtype=c.dtype)
        self.out = nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=c.dtype)

    def project(self, x: Array) -> KeysValues:
        """Return keys and values of `[n, S, width]`."""
        return KeysValues(*jnp.moveaxis(self.key_value(x), -3, 0))

    def __call__(self, x: Array, of: KeysValues, length: Array | None = None, causal: bool = False) -> Array:
        """Attend from `[n, T, width]` to the first `length` `[n]` positions, or to those up to the own one."""
        half = jnp.dtype(self.config.dtype).itemsize == 2
        kernel = "cudnn" if self.config.fused and half and jax.default_backend() == "gpu" else "xla"
        lengths = None if length is None else length.astype(jnp.int32)
        found = jax.nn.dot_product_attention(
            self.query(x), *of, is_causal=causal, key_value_seq_lengths=lengths, implementation=kernel
        )
        return self.out(found)

    def extend(self, x: Array, kept: KeysValues, position: Array) -> tuple[Array, KeysValues]:
        """Attend from one position, `[r, k, width]`, to those up to it; kept are keys and values `[r, k, heads, T, …]`."""
        new = (one[..., None, :] for one in self.project(x))
        kept = KeysValues(
            *(jax.lax.dynamic_update_slice_in_dim(old, one, position, 3) for old, one in zip(kept, new, strict=True))
        )
        return self.look(x, kept, jnp.arange(kept.keys.shape[3]) <= position, "rkhsd"), kept

    def look(self, x: Array, of: KeysValues, known: Array, axes: str) -> Array:
        """Attend from `[r, k, width]` to the `known` positions; the axes of keys and values have k, or are the same for all."""
        query = self.query(x)
        energy = jnp.einsum(f"rkhd,{axes}->rkhs", query, of.keys, preferred_element_type=jnp.float32)
        energy = jnp.where(known, energy * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(energy).astype(query.dtype)
        return self.out(jnp.einsum(f"rkhs,{axes}->rkhd", weights, of.values))


class FeedForward(nn.Module):
    """Two layers, `[…, width]` -> the same."""

    config: TranslatorConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply the layers."""
        c = self.config
        return nn.Dense(c.width, dtype=c.dtype, name="down")(
            nn.relu(nn.Dense(c.feed_forward, dtype=c.dtype, name="up")(x))
        )


class EncoderBlock(nn.Module):
    """Pre-normalised self-attention and feed-forward network."""

    config: TranslatorConfig

    @nn.compact
    def __call__(self, x: Array, length: Array, deterministic: bool) -> Array:
        """`[b, S, width]` -> the same; positions from `length` `[b]` on are not attended to."""
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        attention = Attention(c, name="attention")
        h = nn.LayerNorm(dtype=c.dtype, name="attention_norm")(x)
        x = x + drop(attention(h, attention.project(h), length))
        h = nn.LayerNorm(dtype=c.dtype, name="mlp_norm")(x)
        return x + drop(FeedForward(c, name="mlp")(h))


class DecoderBlock(nn.Module):
    """Pre-normalised self-attention, attention to the source, and feed-forward network."""

    config: TranslatorConfig

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        self.attention, self.cross, self.mlp = Attention(c), Attention(c), FeedForward(c)
        norms = [nn.LayerNorm(dtype=c.dtype) for _ in range(3)]
        self.attention_norm, self.cross_norm, self.mlp_norm = norms
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, x: Array, source: KeysValues, length: Array, deterministic: bool) -> Array:
        """`[b, T, width]` -> the same, each position knowing those before it."""
        h = self.attention_norm(x)
        x = x + self.drop(self.attention(h, self.attention.project(h), causal=True), deterministic=deterministic)
        x = x + self.drop(self.cross(self.cross_norm(x), source, length), deterministic=deterministic)
        return x + self.drop(self.mlp(self.mlp_norm(x)), deterministic=deterministic)

    def extend(
        self, x: Array, kept: KeysValues, source: KeysValues, length: Array, position: Array
    ) -> tuple[Array, KeysValues]:
        """`[r, k, width]` at one position -> the same, and the keys and values up to it.

        Those of the source are `[r, heads, S, …]`: with heads before positions nothing is transposed for each piece.
        """
        found, kept = self.attention.extend(self.attention_norm(x), kept, position)
        x = x + found
        known = jnp.arange(source.keys.shape[2]) < length[:, None, None, None]
        x = x + self.cross.look(self.cross_norm(x), source, known, "rhsd")
        return x + self.mlp(self.mlp_norm(x)), kept


class TransformerNetwork(nn.Module):
    """Encoder and decoder with one embedding for source, target and logits, and sinusoidal positions."""

    config: TranslatorConfig

    def setup(self) -> None:
        """Make the parts."""
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(c.width**-0.5), (c.vocabulary, c.width))
        self.encoder = [EncoderBlock(c) for _ in range(c.layers)]
        self.decoder = [DecoderBlock(c) for _ in range(c.layers)]
        self.encoder_norm, self.final_norm = nn.LayerNorm(dtype=c.dtype), nn.LayerNorm(dtype=c.dtype)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, batch: Batch, deterministic: bool = True) -> Array:
        """Logits of each target piece given the source and those before it, float32 `[b, T, V]`."""
        sources = self._sources(batch, deterministic)
        pieces = shifted(batch["target"])
        x = self.drop(self._embed(pieces, self._positions(pieces.shape[1])), deterministic=deterministic)
        for block, source in zip(self.decoder, sources, strict=True):
            x = block(x, source, batch["source_length"], deterministic)
        return self._logits(x)

    def begin(self, batch: Batch, length: int) -> Decoding:
        """Return the state before the first of at most `length` pieces."""
        c, rows = self.config, batch["source"].shape[0]
        empty = jnp.zeros((rows, 1, c.heads, length, c.width // c.heads), c.dtype)
        kept = [KeysValues(empty, empty)] * c.layers
        sources = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), self._sources(batch, True))
        return Decoding((sources, batch["source_length"]), kept)

    def extend(self, decoding: Decoding, pieces: Array, position: Array) -> tuple[Array, list[KeysValues]]:
        """Read one more piece a hypothesis; see `EncoderDecoder.extend`."""
        sources, length = decoding.fixed
        most = decoding.moving[0].keys.shape[3]
        x = self._embed(pieces, jax.lax.dynamic_slice_in_dim(self._positions(most), position, 1))
        moving = []
        for block, kept, source in zip(self.decoder, decoding.moving, sources, strict=True):
            x, kept = block.extend(x, kept, source, length, position)
            moving.append(kept)
        return self._logits(x), moving

    def _sources(self, batch: Batch, deterministic: bool) -> list[KeysValues]:
        """What each block of the decoder attends to."""
        pieces, length = batch["source"], batch["source_length"]
        x = self.drop(self._embed(pieces, self._positions(pieces.shape[1])), deterministic=deterministic)
        for block in self.encoder:
            x = block(x, length, deterministic)
        x = self.encoder_norm(x)
        return [block.cross.project(x) for block in self.decoder]

    def _embed(self, pieces: Array, places: Array) -> Array:
        c = self.config
        looked_up = jnp.take(self.embedding, pieces.astype(jnp.int32), axis=0).astype(c.dtype)
        return looked_up * np.sqrt(c.width).astype(np.float32).astype(c.dtype) + places

    def _positions(self, length: int) -> Array:
        return jnp.asarray(positions(length, self.config.width), self.config.dtype)

    def _logits(self, x: Array) -> Array:
        x = self.final_norm(x)
        return jnp.einsum("btd,vd->btv", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32)


def transformer(config: TranslatorConfig) -> Translator:
    """Build an encoder–decoder of attention alone."""
    return Translator(TransformerNetwork(config), config.dropout)


def last_blocks(count: int, config: TranslatorConfig) -> Callable[[str], bool]:
    """Return what accepts the parameters of the last `count` blocks of the decoder, and of the norm behind them.

    Raises:
      UserError: the model has no such blocks.
    """
    if not 0 < count <= config.layers:
        raise UserError(f"the last {count} blocks of a decoder that has {config.layers}: give 1 to {config.layers}.")
    chosen = ("final_norm/", *(f"decoder_{i}/" for i in range(config.layers - count, config.layers)))
    return lambda path: path.startswith(chosen)
