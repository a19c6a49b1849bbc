"""REINFORCE over a window of iterations.

Little is stored: what the networks computed is computed again.

Kept of an iteration are its k draws, the d mean logits that were observed and its share of an advantage. All the rest (k·N
logits, k states) follows from these and the parameters, which do not change inside a window. Each iteration is
rematerialised on the way back, so that memory is O(k·N + T1·(k + d + h)), not O(T1·k·N).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.samplers import networks
from bilevel.samplers.networks import SamplerParams
from bilevel.types import Array


class Window(NamedTuple):
    """What is stored of the T1 iterations since the last update of the policy."""

    summary: Array
    """`[S]`, the summary that the first iteration drew with; a constant, as its past is cut off."""
    draws: Array
    """int32 `[T1, k]`."""
    observed: Array
    """`[T1, d]`, the mean logits of each iteration's batch."""
    advantages: Array
    """`[T1/T2]`, one for each period of T2 iterations."""


def log_probabilities(params: SamplerParams, window: Window, *, remat: bool = True) -> tuple[Array, Array]:
    """Compute log p(b_{t,i}) of all draws of a window, and the entropies of what they were drawn from, both `[T1, k]`.

    They can be differentiated in the parameters; entropies are in nats.

    Args:
      params: φ, those that the window was drawn with.
      window: what was stored. Both networks begin from zero states.
      remat: compute the inside of an iteration again on the way back. False stores it: T1·k·N numbers and more.
    """

    def iteration(
        carry: tuple[Array, networks.Carry, networks.Carry], stored: tuple[Array, Array]
    ) -> tuple[tuple[Array, networks.Carry, networks.Carry], tuple[Array, Array]]:
        summary, logger, policy = carry
        draws, observed = stored
        logits, policy = networks.propose(params.policy, summary, policy, draws.shape[0])
        logs = jax.nn.log_softmax(logits, axis=-1)
        drawn = jnp.take_along_axis(logs, draws[:, None], axis=-1)[:, 0]
        summary, logger = networks.log_history(params.logger, observed, logger)
        return (summary, logger, policy), (drawn, -jnp.sum(jnp.exp(logs) * logs, axis=-1))

    # Inside a scan nothing can undo the recomputation, so that the barriers against that are not needed.
    body = jax.checkpoint(iteration, prevent_cse=False) if remat else iteration
    start = (window.summary, networks.zero_carry(params.logger), networks.zero_carry(params.policy))
    return jax.lax.scan(body, start, (window.draws, window.observed))[1]


def policy_loss(params: SamplerParams, window: Window, entropy_bonus: float = 0.0, *, remat: bool = True) -> Array:
    """Compute the loss whose gradient is minus the policy gradient.

    L_policy = Σ_m A_m Σ_l (1/k) Σ_i −log p(b_{t,i}), t = (m−1)·T2 + l, and −λ Σ_t (1/k) Σ_i H(p_{t,i}), where λ is the entropy
    bonus, in units of the reward.

    Returns:
      A scalar.

    Reference: RLSampler, equation (6), which has no entropy bonus.
    """
    logged, entropies = log_probabilities(params, window, remat=remat)
    periods = window.advantages.shape[0]
    by_period = jnp.sum(jnp.mean(logged, axis=1).reshape(periods, -1), axis=1)
    loss = -jnp.sum(window.advantages * by_period)
    return loss - entropy_bonus * jnp.sum(jnp.mean(entropies, axis=1)) if entropy_bonus else loss
