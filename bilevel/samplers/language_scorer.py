"""The scorer of multilingual DDS: which language a target sentence is translated from, by the languages that it has.

For a target sentence y_j with availability a_j ∈ {0, 1}ⁿ of the n source languages,

    p(i|y_j) = softmax over the available i of (W₂ relu(W₁ a_j + b₁) + b₂)_i / temperature.

Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, section 3.2 and appendix A.2 (a perceptron
of two layers on the availability). The units, relu, and W₂ = 0 at first, so that p begins uniform, are ours.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.samplers.networks import Linear, apply_linear
from bilevel.types import Array, UserError

Estimator = Literal["sum", "positive_sum", "policy_gradient"]
ESTIMATORS: tuple[Estimator, ...] = ("sum", "positive_sum", "policy_gradient")


class ScorerParams(NamedTuple):
    """ψ."""

    hidden: Linear
    output: Linear


class Fitted(NamedTuple):
    """What `fit_scorer` found."""

    params: ScorerParams
    divergence: float
    """The mean of KL(q‖p) over the targets, in nats."""


def init_scorer(key: Array, languages: int, units: int, dtype: Any = jnp.float32) -> ScorerParams:
    """Draw fresh ψ, with which p is uniform over the available languages."""
    kernel = jax.nn.initializers.he_normal()(key, (languages, units), dtype)
    output = Linear(jnp.zeros((units, languages), dtype), jnp.zeros(languages, dtype))
    return ScorerParams(Linear(kernel, jnp.zeros(units, dtype)), output)


def log_chances(params: ScorerParams, available: Array, temperature: float = 1.0) -> Array:
    """Compute log p(i|y_j), `[k, n]`; −∞ for a language that is not available.

    Args:
      params: ψ.
      available: bool `[k, n]`, with at least one language in each line.
      temperature: divides the perceptron's outputs.
    """
    hidden = jax.nn.relu(apply_linear(params.hidden, available.astype(params.hidden.kernel.dtype)))
    return among(apply_linear(params.output, hidden) / temperature, available)


def among(logits: Array, available: Array) -> Array:
    """Compute the log-softmax over the available languages alone, `[k, n]`; −∞ for the others."""
    return jax.nn.log_softmax(jnp.where(available, logits, -jnp.inf), axis=-1)


def scorer_gain(
    params: ScorerParams, available: Array, rewards: Array, temperature: float = 1.0, estimator: Estimator = "sum"
) -> Array:
    """Compute what ψ ascends, for B targets:

        (1/B) Σ_j Σ_{i available} c_ji r_i log p(i|y_j).

    "sum" is the paper's line 5, c = 1: among positive rewards it is stationary where p(i|y_j) = r_i / Σ_{i' available} r_i'. A
    negative reward drives p(i|y_j) to 0, for as long as it lasts.
    "positive_sum" (ours) takes 0 for negative rewards, so that there always is such a point.
    "policy_gradient" has c_ji = p(i|y_j), a constant to the derivative, so that the gradient is that of the expected reward
    (1/B) Σ_j Σ_i p(i|y_j) r_i, and p goes to the best available language.

    Args:
      params: ψ.
      available: bool `[B, n]`.
      rewards: r, `[n]`.
      temperature: see `log_chances`.
      estimator: see above.

    Returns:
      A scalar.
    """
    logs = jnp.where(available, log_chances(params, available, temperature), 0.0)
    counted = available.astype(logs.dtype)
    if estimator == "positive_sum":
        rewards = jnp.maximum(rewards, 0.0)
    if estimator == "policy_gradient":
        counted = jax.lax.stop_gradient(counted * jnp.exp(logs))
    return jnp.sum(counted * rewards.astype(logs.dtype) * logs) / available.shape[0]


def fit_scorer(
    key: Array,
    rows: Any,
    logits: Any,
    *,
    units: int = 64,
    temperature: float = 1.0,
    steps: int = 2000,
    rate: float = 0.01,
) -> Fitted:
    """Fit a scorer to fixed chances q(i|y_j) = softmax over the available i of logits_i: TCS + DDS begins so.

    Adam, its rate falling to 0 along a cosine, on the mean cross-entropy −Σ_i q log p over all targets.

    Args:
      key: a typed key.
      rows: int `[T, n]`, −1 where a language is not available: the table of the sampler.
      logits: float `[n]`, such as sim/τ.
      units: of the hidden layer.
      temperature: that of the sampler.
      steps: of Adam.
      rate: its first learning rate.

    Raises:
      UserError: a target has no language that is available and has a logit above −∞.
    """
    logits = checked_logits(rows, logits)
    # Targets with the same languages are one case.
    cases, counts = np.unique(np.asarray(rows) >= 0, axis=0, return_counts=True)
    available, shares = jnp.asarray(cases), jnp.asarray(counts / counts.sum(), jnp.float32)
    wanted = jnp.exp(among(jnp.asarray(logits, jnp.float32), available))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def divergence(params: ScorerParams) -> Array:
        logs = log_chances(params, available, temperature)
        known = jnp.where(wanted > 0, jnp.log(wanted), 0.0) - jnp.where(available, logs, 0.0)
        return jnp.sum(shares * jnp.sum(wanted * known, axis=-1))

    @jax.jit
    def fit(params: ScorerParams) -> tuple[ScorerParams, Array]:
        def step(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(divergence)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
        return params, divergence(params)

    params, left = fit(init_scorer(key, cases.shape[1], units))
    return Fitted(params, float(left))


def checked_logits(rows: Any, logits: Any) -> np.ndarray:
    """Return logits `[n]` of fixed chances.

    Raises:
      UserError: as `fit_scorer`, or they do not fit the table.
    """
    found, table = np.asarray(logits, np.float64), np.asarray(rows)
    if found.shape != table.shape[1:]:
        raise UserError(f"The logits have the shape {found.shape} for {table.shape[1]} languages: give one each.")
    if np.isnan(found).any() or (found == np.inf).any():
        raise UserError(f"The logits {found.tolist()} must be finite, or −∞ for a language that is never drawn.")
    without = np.flatnonzero(~((table >= 0) & (found > -np.inf)).any(axis=1))
    if without.size:
        raise UserError(
            f"{without.size} of {len(table)} targets (the first is number {without[0]}) have no language with a logit above "
            "−∞: leave these targets out of the table (PairsByTarget.only), or give one of their languages a finite logit."
        )
    return found
