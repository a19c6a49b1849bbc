"""Metrics of the weights: collapse, and which domains are preferred."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.types import NOT_COMPUTED, Array, Metrics


def weight_metrics(logits: Array) -> Metrics:
    """Measure the spread of w = softmax(logits) over a big batch of `[B]` logits.

    Returns:
      `effective_sample_size` = 1/Σw², between 1 and B; `weight_entropy` = −Σ w log w in nats, between 0 and log B;
      `largest_weight` = max w, between 1/B and 1; `logit_rms`, the standard deviation of the logits, and `largest_logit`, the
      largest distance of one from their mean, both without logits of −∞. All float32 scalars, and NOT_COMPUTED where no row has
      any weight.
    """
    takes_part = logits > -jnp.inf
    some = jnp.any(takes_part)
    log_weights = jax.nn.log_softmax(jnp.where(some, logits, 0.0))
    weights = jnp.exp(log_weights)
    count = jnp.maximum(jnp.sum(takes_part), 1)
    mean = jnp.sum(jnp.where(takes_part, logits, 0.0)) / count
    distances = jnp.where(takes_part, logits - mean, 0.0)
    found = {
        "effective_sample_size": 1.0 / jnp.sum(weights**2),
        "weight_entropy": -jnp.sum(weights * jnp.where(weights > 0, log_weights, 0.0)),
        "largest_weight": jnp.max(weights),
        "logit_rms": jnp.sqrt(jnp.sum(distances**2) / count),
        "largest_logit": jnp.max(jnp.abs(distances)),
    }
    return {name: jnp.where(some, value, NOT_COMPUTED) for name, value in found.items()}


def domain_shares(labels: Array, num_domains: int, weights: Array | None = None) -> Array:
    """Compute the share of each known domain among rows.

    Args:
      labels: int32 `[b]` domain numbers in 0..num_domains−1; others are left out.
      num_domains: how many domains there are.
      weights: `[b]` weights of the rows; None counts rows.

    Returns:
      float32 `[num_domains]`, summing to 1 (all 0 without any row).
    """
    mass = jnp.ones(labels.shape, jnp.float32) if weights is None else weights
    known = (labels >= 0) & (labels < num_domains)
    sums = jnp.zeros(num_domains, jnp.float32).at[jnp.where(known, labels, 0)].add(jnp.where(known, mass, 0.0))
    return sums / jnp.maximum(jnp.sum(sums), jnp.finfo(jnp.float32).tiny)
