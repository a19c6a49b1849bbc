"""A decoder of the kind that is trained today: RMS norms, rotary positions, grouped queries, gated feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.nn.transformer import attention_kernel, blocks, embedded, shifted
from bilevel.types import Array, UserError


class StretchedPositions(NamedTuple):
    """Rotary positions for rows that are longer than those first trained on, as in Llama 3.1: slow angles are slowed down."""

    factor: float
    """By which the slowest angles are divided."""
    low: float = 1.0
    """Turns over `trained` positions below which an angle is divided by the whole factor."""
    high: float = 4.0
    """Turns above which it stays."""
    trained: int = 0
    """Positions first trained on; 0: all angles are divided (linear scaling)."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the decoder."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    groups: int
    """Heads of keys and values, each for heads / groups queries."""
    head_width: int
    feed_forward: int
    rotary_base: float = 10_000.0
    stretched: StretchedPositions | None = None
    epsilon: float = 1e-6
    """In the RMS norms."""
    tied: bool = False
    """Whether the logits are products with the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each head's queries and keys are normalised (Qwen3)."""
    start: int = 0
    """The token that stands before the first position."""
    longest: int | None = None
    """Most tokens of a row that the model was made for; None: any."""
    dropout: float = 0.0
    """Of what attention and the feed-forward network add to the stream, in training."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, norms, softmax and losses stay float32."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """"auto" takes the fused kernel on NVIDIA GPUs for 16-bit computation; fused kernels have no forward-mode derivative."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    scan_layers: bool = False
    """One compiled block for all layers; the parameters of all blocks are stacked under "blocks"."""

    def __post_init__(self) -> None:
        if self.heads % self.groups or self.head_width % 2:
            raise UserError(
                f"The decoder's {self.heads} heads must be a multiple of its {self.groups} heads of keys, and their width "
                f"{self.head_width} even."
            )


class DecoderBlock(nn.Module):
    """Pre-normalised causal self-attention and gated feed-forward network, `[b, T, width]` -> the same."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Apply the block."""
        c = self.config
        h = self._attention(_norm(c, "attention_norm")(x))
        x = x + nn.Dropout(c.dropout)(h, deterministic=deterministic)
        h = _norm(c, "mlp_norm")(x)
        gate, up = (self._linear(name, c.feed_forward, c.mlp_bias)(h) for name in ("gate", "up"))
        h = self._linear("down", c.width, c.mlp_bias)(nn.silu(gate) * up)
        return x + nn.Dropout(c.dropout)(h, deterministic=deterministic)

    def _attention(self, h: Array) -> Array:
        c = self.config
        q, k, v = (
            self._linear(name, heads * c.head_width, c.qkv_bias)(h).reshape(*h.shape[:-1], heads, c.head_width)
            for name, heads in (("query", c.heads), ("key", c.groups), ("value", c.groups))
        )
        if c.qk_norm:
            q, k = _norm(c, "query_norm")(q), _norm(c, "key_norm")(k)
        cos, sin = rotary_tables(c, h.shape[1])
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention_kernel(c))
        return self._linear("out", c.width, c.out_bias)(h.reshape(*h.shape[:-2], c.heads * c.head_width))

    def _linear(self, name: str, features: int, bias: bool) -> nn.Dense:
        return nn.Dense(features, use_bias=bias, dtype=self.config.dtype, kernel_init=_INIT, name=name)


class Decoder(nn.Module):
    """Decoder over tokens, whose parameters `bilevel.nn.hugging_face` reads and writes.

    Reference: Touvron et al., "LLaMA", 2023, section 2.2; Su et al., "RoFormer", 2021; Ainslie et al., "GQA", 2023.
    """

    config: DecoderConfig
    mesh: Mesh | None = None
    """As that of `bilevel.nn.transformer.Transformer`."""

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        """Tokens `[b, T]` (any integer type) -> logits of each one given those before it, float32 `[b, T, V]`."""
        c = self.config
        embedding = self.param("embedding", _INIT, (c.vocabulary, c.width))
        x = embedded(embedding, shifted(tokens, c.start), c.dtype)
        x = blocks(DecoderBlock, c, x, deterministic, None if self.is_initializing() else self.mesh)
        x = _norm(c, "final_norm")(x)
        head = embedding if c.tied else self.param("head", _INIT, (c.vocabulary, c.width))
        return jnp.einsum("btd,vd->btv", x, head.astype(c.dtype), preferred_element_type=jnp.float32)


_INIT = nn.initializers.normal(0.02)


def _norm(config: DecoderConfig, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.epsilon, dtype=config.dtype, name=name)


def rotary_tables(config: DecoderConfig, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosines and sines of all angles at positions 0 to T - 1, float32 `[T, 1, head_width / 2]`."""
    c = config
    speed = c.rotary_base ** -(np.arange(0, c.head_width, 2) / c.head_width)
    if (s := c.stretched) is not None:
        turns = s.trained * speed / (2 * np.pi)
        kept = np.clip((turns - s.low) / (s.high - s.low), 0, 1) if s.trained else 0.0
        speed = speed * (kept + (1 - kept) / s.factor)
    angles = np.arange(length)[:, None, None] * speed
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotated(x: Array, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> Array:
    """Turn the pairs (i, i + d/2) of `[b, T, heads, d]` by their angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
