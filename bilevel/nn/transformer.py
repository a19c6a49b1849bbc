"""A transformer decoder over bytes or tokens: the language model of Grangier et al., table 1 and table 9."""

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
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, TokenLosses, UserError

VOCABULARY = 256
"""Bytes. Byte 0, or token 0, stands before the first position, as in flax's own language model."""
_MOST_PRODUCTS = 1024
"""Largest vocabulary that is embedded by a product with one-hot rows, and not by looking its rows up."""


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
    vocabulary: int = VOCABULARY
    """V: bytes, or the tokens of a tokenizer."""

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
    """Decoder over bytes or tokens with sinusoidal positions and tied embeddings."""

    config: TransformerConfig
    mesh: Mesh | None = None
    """With `scan_layers`: the devices that the stacked parameters are split over. Each block's are gathered when it is computed,
    so that no device ever holds all of them; give `make_step` the same mesh and `gather=gathered_before`."""

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        """Tokens `[b, T]` (any integer type) -> logits of each one given those before it, float32 `[b, T, V]`."""
        c = self.config
        embedding = self.param("embedding", nn.initializers.normal(c.width**-0.5), (c.vocabulary, c.width))
        x = embedded(embedding, shifted(tokens), c.dtype) * np.sqrt(c.width).astype(np.float32)
        x = x + jnp.asarray(positions(tokens.shape[1], c.width), c.dtype)
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        x = blocks(Block, c, x, deterministic, None if self.is_initializing() else self.mesh)
        x = nn.LayerNorm(dtype=c.dtype, name="final_norm")(x)
        logits = jnp.einsum("btd,vd->btv", x, embedding.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits


def shifted(tokens: Array, start: int = 0) -> Array:
    """Put the token `start` before all and leave out the last one: int32 `[b, T]`."""
    return jnp.pad(tokens.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=start)[:, :-1]


def embedded(embedding: Array, tokens: Array, dtype: Any) -> Array:
    """Return the rows of an embedding `[V, d]` for tokens int32 `[b, T]`, `[b, T, d]`."""
    vocabulary = embedding.shape[0]
    if vocabulary > _MOST_PRODUCTS:
        return jnp.take(embedding, tokens, axis=0).astype(dtype)
    # A product with one-hot rows: its derivative is a product too, where a gather's would be a slow scatter.
    return jax.nn.one_hot(tokens, vocabulary, dtype=dtype) @ embedding.astype(dtype)


def blocks(kind: type[nn.Module], config: Any, x: Array, deterministic: bool, mesh: Mesh | None) -> Array:
    """Apply all blocks of a decoder, inside its compact `__call__`: block_0, block_1, … or, scanned, "blocks".

    Args:
      kind: the module of a block, called with (x, deterministic).
      config: its configuration: layers, remat and scan_layers.
      x: `[b, T, width]`.
      deterministic: whether dropout is off.
      mesh: the devices that stacked parameters are split over; None: they are whole.
    """
    if not config.scan_layers:
        plain = nn.remat(kind, static_argnums=(2,)) if config.remat else kind
        for i in range(config.layers):
            x = plain(config, name=f"block_{i}")(x, deterministic)  # pyright: ignore[reportCallIssue]
        return x

    def apply(block: Any, x: Array, _: None) -> tuple[Array, None]:
        return block(x, deterministic), None

    apply = nn.remat(apply, prevent_cse=False) if config.remat else apply
    loop = nn.scan(
        apply, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=config.layers
    )
    stacked: Any = kind
    if mesh is not None:
        stacked = nn.map_variables(kind, "params", trans_in_fn=partial(gather, mesh=mesh))
    x, _ = loop(stacked(config, name="blocks"), x, None)
    return x


def gathered_before(path: str) -> bool:
    """For `make_step(gather=…)`: a scanned `Transformer` with a mesh gathers the parameters of its blocks itself."""
    return not path.startswith("blocks/")


def last_blocks(count: int, model: Any) -> Callable[[str], bool]:
    """Return what accepts the parameters of the last `count` blocks of a decoder, and of what lies behind them.

    `model` is its configuration.

    Raises:
        UserError: the model has no such blocks.
    """
    if not 0 < count <= model.layers:
        raise UserError(f"the last {count} blocks of a model that has {model.layers}: give 1 to {model.layers}.")
    chosen = ("final_norm/", "head", *(f"block_{i}/" for i in range(model.layers - count, model.layers)))
    return lambda path: path.startswith(chosen)


def attention_kernel(config: Any) -> Literal["xla", "cudnn"]:
    """The attention implementation for a configuration with `attention` and `dtype`, on this machine."""
    if config.attention != "auto":
        return config.attention
    half = jnp.dtype(config.dtype).itemsize == 2
    return "cudnn" if half and jax.default_backend() == "gpu" else "xla"


def positions(length: int, width: int) -> np.ndarray:
    """Sinusoidal positions, float32 `[length, width]` (Vaswani et al. 2017, section 3.5)."""
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def token_losses(logits: Array, tokens: Array, length: Array, given: Array | None = None) -> tuple[Array, Array]:
    """Negative log-likelihoods in nats.

    Args:
      logits: float32 `[b, T, V]`.
      tokens: `[b, T]` bytes or tokens.
      length: int32 `[b]`, number of real tokens of each row.
      given: int32 `[b]`, of these the first ones, which are not predicted; None: 0.

    Returns:
      (mean over the row's predicted tokens, sum over them), both float32 `[b]`.
    """
    return _over_rows(*nats_of_tokens(logits, tokens, length, given))


def _over_rows(nats: Array, real: Array) -> tuple[Array, Array]:
    sums = jnp.sum(jnp.where(real, nats, 0.0), axis=1)
    return sums / jnp.maximum(jnp.sum(real, axis=1), 1).astype(sums.dtype), sums


def nats_of_tokens(logits: Array, tokens: Array, length: Array, given: Array | None = None) -> tuple[Array, Array]:
    """Negative log-likelihoods of tokens in nats; the arguments are those of `token_losses`.

    Returns:
      float32 `[b, T]`; and which tokens are predicted, bool `[b, T]`.
    """
    targets = tokens.astype(jnp.int32)[..., None]
    if logits.shape[-1] > _MOST_PRODUCTS:
        chosen = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    else:
        chosen = jnp.sum(jnp.where(targets == jnp.arange(logits.shape[-1]), logits, 0.0), axis=-1)
    place = jnp.arange(tokens.shape[1])
    real = place < length[:, None]
    if given is not None:
        real = real & (place >= given[:, None])
    return jax.nn.logsumexp(logits, axis=-1) - chosen, real


def language_model_loss(model: Any, *, train: bool = True) -> LossFn:
    """The loss of a batch {"tokens": `[b, T]`, "length": `[b]`}: each row's mean nats per byte or token, float32 `[b]`.

    Where the batch has "given", `[b]`, so many tokens at the beginning of each row are not predicted.

    The key of a call is that of dropout, so all evaluations that share it have the same masks, as augmentation in
    `bilevel.nn.classification`. In `make_step` masks are a function of (seed, step), on rows spread over devices too; other
    `micro_batches`, or a mapped axis, give other masks. Without dropout the key is not used.

    Args:
      model: a `Transformer` or a `bilevel.nn.decoder.Decoder`.
      train: whether its dropout is on.
    """
    tokens = losses_of_tokens(model, train=train)

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        mean, _ = _over_rows(*tokens(params, model_state, batch, rng))
        return mean, LossAux(model_state, {})

    return loss


def losses_of_tokens(model: Any, *, train: bool = True) -> TokenLosses:
    """The losses of the tokens of a batch; see `language_model_loss`.

    Args:
      model: a `Transformer` or a `bilevel.nn.decoder.Decoder`.
      train: whether its dropout is on.
    """
    dropout = train and model.config.dropout > 0

    def tokens(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, Array]:
        logits = model.apply(
            {"params": params},
            batch["tokens"],
            deterministic=not dropout,
            rngs={"dropout": rng} if dropout else None,
        )
        return nats_of_tokens(logits, batch["tokens"], batch["length"], batch.get("given"))

    return tokens
