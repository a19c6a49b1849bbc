"""Training on a share of the tokens of each row: those whose loss exceeds most what a reference model finds unpredictable.

    loss = token_selection(tokens, share=0.6)     # batches bring `reference` along, `[b, T]`

Reference: Lin et al., "Rho-1: Not all tokens are what you need", NeurIPS 2024, section 2. There the share is of all tokens of a
batch; here it is of each row, so that micro-batches and devices select what one of them would.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, TokenLosses, UserError

REFERENCE = "reference"
"""Name, in a batch, of the reference model's nats of each token, floating-point `[b, T]`."""


def most_excess(losses: Array, reference: Array, real: Array, share: float) -> Array:
    """Choose tokens whose loss exceeds the reference most.

    Args:
      losses: nats of the model, `[b, T]`.
      reference: nats of the reference model, `[b, T]`.
      real: bool `[b, T]`, which tokens there are to choose from.
      share: of a row's tokens, rounded up, that are chosen.

    Returns:
      bool `[b, T]`.
    """
    excess = jnp.where(real, losses - reference.astype(losses.dtype), -jnp.inf)
    count = jnp.ceil(share * real.sum(axis=1, keepdims=True) - 1e-5)  # 0.6 of 5 tokens are 3
    rank = jnp.argsort(jnp.argsort(-excess, axis=1), axis=1)
    return (rank < count) & real


def token_selection(tokens: TokenLosses, share: float) -> LossFn:
    """Make the loss of rows that trains on some of their tokens.

    Args:
      tokens: the losses of tokens.
      share: of a row's tokens that count, in (0, 1]; 1 is the mean over all.

    Returns:
      The mean nats of the chosen tokens of each row, float32 `[b]`; no derivative passes through the choice.

    Raises:
      UserError: for a share outside (0, 1]; when traced, for batches without the reference.
    """
    if not 0 < share <= 1:
        raise UserError(f"The share of the tokens is {share}; give one above 0 and at most 1.")

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        if REFERENCE not in batch:
            raise UserError(
                f"The batch has no array {REFERENCE!r} with the reference model's losses of its tokens; add it "
                "(bilevel.data.WithColumn)."
            )
        losses, real = tokens(params, model_state, batch, rng)
        chosen = most_excess(jax.lax.stop_gradient(losses), batch[REFERENCE], real, share)
        mean = jnp.sum(jnp.where(chosen, losses, 0.0), axis=1) / jnp.maximum(chosen.sum(axis=1), 1)
        return mean, LossAux(model_state, {})

    return loss
