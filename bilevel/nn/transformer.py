"""A byte-level transformer decoder: the language model of Grangier et al., table 1 and table 9."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bilevel.devices.sharding import gather
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError

VOCABULARY = 256
"""Bytes. Byte 0 stands before the first position, as in flax's own language model."""


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the decoder."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    feed_forward: int = 512
    dropout: float = 0.0
    """Share of units set to 0 in training: after embedding and positions, and of what attention and the feed-forward network add
    to the stream (Vaswani et al. 2017, section 5.4). flax's own language model has two places more, the attention weights,
    which fused kernels never hold, and the hidden units of the feed-forward network."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, softmax and losses stay float32."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """"auto" takes the fused kernel on NVIDIA GPUs for 16-bit computation; fused kernels have no forward-mode derivative."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations. XLA for CPU undoes this unless the layers
    are scanned."""
    scan_layers: bool = False
    """One compiled block for all layers: compiles in a time that does not grow with them. The parameters of all blocks are
    stacked under "blocks"."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 2:
            raise UserError(
                f"The transformer's width {self.width} must be even and a multiple of its {self.heads} heads."
            )


SIZES: dict[str, TransformerConfig] = {
    "xs": TransformerConfig(layers=2, width=64, heads=4, feed_forward=256),
    "small": TransformerConfig(layers=4, width=128, heads=4, feed_forward=512),
    "medium": TransformerConfig(layers=6, width=256, heads=8, feed_forward=1024),
    "large": TransformerConfig(layers=12, width=256, heads=8, feed_forward=1024),
}
"""Named sizes; small and large are the paper's, with exactly its 824,064 and 9,530,880 parameters."""


class Block(nn.Module):
    """Pre-normalised causal self-attention and feed-forward network, `[b, T, width]` -> the same."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        """Apply the block."""
        c = self.config
        head_width = c.width // c.heads
        h = nn.LayerNorm(dtype=c.dtype, name="attention_norm")(x)
        project = nn.DenseGeneral((3, c.heads, head_width), use_bias=False, dtype=c.dtype, name="qkv")
        q, k, v = jnp.moveaxis(project(h), -3, 0)
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention_kernel(c))
        h = nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=c.dtype, name="out")(h)
        x = x + nn.Dropout(c.dropout)(h, deterministic=deterministic)
        h = nn.LayerNorm(dtype=c.dtype, name="mlp_norm")(x)
        h = nn.Dense(c.feed_forward, dtype=c.dtype, name="up")(h)
        h = nn.Dense(c.width, dtype=c.dtype, name="down")(nn.gelu(h))
        return x + nn.Dropout(c.dropout)(h, deterministic=deterministic)


class Transformer(nn.Module):
    """Decoder over bytes with sinusoidal positions and tied embeddings."""

    config: TransformerConfig
    mesh: Mesh | None = None
    """With `scan_layers`: the devices that the stacked parameters are split over. Each block's are gathered when it is computed,
    so that no device ever holds all of them; give `make_step` the same mesh and `gather=gathered_before`."""

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        """Bytes `[b, T]` (any integer type) -> logits of each byte given those before it, float32 `[b, T, 256]`."""
        c = self.config
        embedding = self.param("embedding", nn.initializers.normal(c.width**-0.5), (VOCABULARY, c.width))
        shifted = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (1, 0)))[:, :-1]
        # A product with one-hot rows: its derivative is a product too, where a gather's would be a slow scatter.
        x = (
            jax.nn.one_hot(shifted, VOCABULARY, dtype=c.dtype)
            @ embedding.astype(c.dtype)
            * np.sqrt(c.width).astype(np.float32)
        )
        x = x + jnp.asarray(positions(tokens.shape[1], c.width), c.dtype)
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        block = nn.remat(Block, static_argnums=(2,)) if c.remat else Block
        if c.scan_layers:
            x = self._scanned(x, deterministic)
        else:
            for i in range(c.layers):
                x = block(c, name=f"block_{i}")(x, deterministic)
        x = nn.LayerNorm(dtype=c.dtype, name="final_norm")(x)
        logits = jnp.einsum("btd,vd->btv", x, embedding.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits

    def _scanned(self, x: Array, deterministic: bool) -> Array:
        """All blocks, in one loop over their stacked parameters."""

        def apply(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return block(x, deterministic), None

        apply = nn.remat(apply, prevent_cse=False) if self.config.remat else apply
        loop = nn.scan(
            apply, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.config.layers
        )
        block = Block
        if self.mesh is not None and not self.is_initializing():
            block = nn.map_variables(Block, "params", trans_in_fn=partial(gather, mesh=self.mesh))
        x, _ = loop(block(self.config, name="blocks"), x, None)
        return x


def gathered_before(path: str) -> bool:
    """For `make_step(gather=…)`: a scanned `Transformer` with a mesh gathers the parameters of its blocks itself."""
    return not path.startswith("blocks/")


def last_blocks(count: int, model: TransformerConfig) -> Callable[[str], bool]:
    """Return what accepts the parameters of the last `count` of the transformer's blocks, and of the norm behind them.

    Raises:
        UserError: the model has no such blocks.
    """
    if not 0 < count <= model.layers:
        raise UserError(f"the last {count} blocks of a model that has {model.layers}: give 1 to {model.layers}.")
    first = model.layers - count
    chosen = ("final_norm/", *(f"block_{i}/" for i in range(first, model.layers)))
    return lambda path: path.startswith(chosen)


def attention_kernel(config: TransformerConfig) -> Literal["xla", "cudnn"]:
    """The attention implementation for this configuration on this machine."""
    if config.attention != "auto":
        return config.attention
    half = jnp.dtype(config.dtype).itemsize == 2
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def positions(length: int, width: int) -> np.ndarray:
    """Sinusoidal positions, float32 `[length, width]` (Vaswani et al. 2017, section 3.5)."""
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def byte_losses(logits: Array, tokens: Array, length: Array) -> tuple[Array, Array]:
    """Negative log-likelihoods in nats.

    Args:
      logits: float32 `[b, T, 256]`.
      tokens: `[b, T]` bytes.
      length: int32 `[b]`, number of real bytes of each row.

    Returns:
      (mean over the row's real bytes, sum over them), both float32 `[b]`.
    """
    is_target = tokens.astype(jnp.int32)[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    real = jnp.arange(tokens.shape[1]) < length[:, None]
    sums = jnp.sum(jnp.where(real, nats, 0.0), axis=1)
    return sums / jnp.maximum(length, 1).astype(sums.dtype), sums


def language_model_loss(model: Transformer, *, train: bool = True) -> LossFn:
    """The loss of a batch {"tokens": `[b, T]`, "length": `[b]`}: each row's mean nats per byte, float32 `[b]`.

    The key of a call is that of dropout, so all evaluations that share it have the same masks, as augmentation in
    `bilevel.nn.classification`. In `make_step` masks are a function of (seed, step), on rows spread over devices too; other
    `micro_batches`, or a mapped axis, give other masks. Without dropout the key is not used.

    Args:
      model: the transformer.
      train: whether its dropout is on.
    """
    dropout = train and model.config.dropout > 0

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        logits = model.apply(
            {"params": params},
            batch["tokens"],
            deterministic=not dropout,
            rngs={"dropout": rng} if dropout else None,
        )
        mean, _ = byte_losses(logits, batch["tokens"], batch["length"])  # pyright: ignore[reportArgumentType]
        return mean, LossAux(model_state, {})

    return loss
