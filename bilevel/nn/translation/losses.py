"""Losses of pairs of sentences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.nn.translation.base import EncoderDecoder
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params


def translation_loss(
    network: EncoderDecoder, *, train: bool, smoothing: float = 0.0, pieces_a_row: float | None = None
) -> LossFn:
    """Return the loss of pairs: of each row (1/T_i) Σ_t CE(q_t, p_t), float32 `[b]`.

    q_t has 1 − smoothing on the true piece, and smoothing/(V − 1) on each other. Metrics, each `[b]`: `nll`, the same without
    smoothing, and `pieces`, T_i.

    Args:
      network: gives the logits.
      train: with the network's dropout.
      smoothing: of the labels, in [0, 1).
      pieces_a_row: divide the sum over a row's pieces by this number instead of T_i: rows then weigh by their length. None: T_i.
    """

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        logits = network.logits(params, batch, rng if train and network.dropout else None)
        nll, smooth = piece_losses(logits, batch["target"], smoothing)
        length = batch["target_length"]
        real = jnp.arange(nll.shape[1]) < length[:, None]
        count = jnp.maximum(length, 1).astype(jnp.float32)
        by = count if pieces_a_row is None else jnp.float32(pieces_a_row)
        losses, plain = (jnp.where(real, x, 0.0).sum(axis=1) for x in (smooth, nll))
        return losses / by, LossAux(model_state, {"nll": plain / count, "pieces": length.astype(jnp.float32)})

    return loss


def piece_losses(logits: Array, target: Array, smoothing: float) -> tuple[Array, Array]:
    """Return the negative log-likelihood of each true piece, and its cross-entropy with smoothed labels, float32 `[b, T]`.

    Reference: Szegedy et al., "Rethinking the Inception architecture", CVPR 2016, section 7; here the rest of the mass goes to
    the other V − 1 pieces alone.
    """
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    nll = normalizer - jnp.take_along_axis(logits, target.astype(jnp.int32)[..., None], axis=-1)[..., 0]
    if not smoothing:
        return nll, nll
    vocabulary = logits.shape[-1]
    every = vocabulary * normalizer - logits.sum(axis=-1)  # −Σ_v log p_v
    return nll, (1.0 - smoothing) * nll + smoothing / (vocabulary - 1) * (every - nll)
