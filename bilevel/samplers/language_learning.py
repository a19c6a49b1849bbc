"""How the scorer of multilingual DDS learns: a running gradient for each language, rewards, and updates of ψ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bilevel import trees
from bilevel.samplers import networks
from bilevel.samplers.language_rounds import LanguagesState, named, round_keys
from bilevel.samplers.language_scorer import Estimator, ScorerParams, init_scorer, log_chances, scorer_gain
from bilevel.types import Array, Metrics, Params

Similarity = Literal["cosine", "dot"]
SpecificRows = Literal["dev", "train"]


@dataclass(frozen=True, eq=False)
class Learning:
    """What the scorer learns from."""

    available: Array
    """bool `[T, n]`."""
    specific: int
    subset: trees.Subset
    shapes: Params
    """Of the chosen part of θ."""
    steps: int
    targets: int
    """B."""
    decay: float
    scale: float
    similarity: Similarity
    reward_scale: float
    estimator: Estimator
    specific_rows: SpecificRows
    units: int
    temperature: float
    optimizer: optax.GradientTransformation
    gradient_dtype: Any
    names: tuple[str, ...]

    def init(self, key: Array, params: Any) -> tuple[Any, Any, Any, Any]:
        """Return ψ (fresh where none is given), the state of its optimizer, g and r, both 0."""
        count = len(self.names)
        fresh = init_scorer(key, count, self.units)
        if params is None:
            params = fresh
        else:
            networks.check_params(params, jax.eval_shape(lambda: fresh))
            params = jax.tree.map(jnp.copy, params)
        gradients = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), self.gradient_dtype), self.shapes)
        return params, self.optimizer.init(params), gradients, jnp.zeros(count, jnp.float32)

    def log_chances(self, params: ScorerParams, available: Array) -> Array:
        """Compute log p(i|y_j), `[k, n]`."""
        return log_chances(params, available, self.temperature)

    def observe_gradient(self, state: LanguagesState, gradient: Params) -> LanguagesState:
        """Update g_i ← α₁ g_i + α₂ ∇ℓ, i the language of the minibatch drawn last."""
        i = state.queue.language[state.queue.place - 1]

        def moved(kept: Array, new: Array) -> Array:
            now = self.decay * trees.widen(kept[i]) + self.scale * trees.widen(new)
            return kept.at[i].set(now.astype(kept.dtype))

        return state._replace(gradients=jax.tree.map(moved, state.gradients, self.subset.restrict(gradient)))

    def reward_gradient(self, state: LanguagesState, gradient: Params) -> tuple[LanguagesState, Metrics]:
        """Compare each g_i with g_S, a gradient over all of θ."""
        return self._rewarded(state, self.subset.restrict(gradient))

    def _rewarded(self, state: LanguagesState, specific: Params) -> tuple[LanguagesState, Metrics]:
        rewards = self._rewards(state.gradients, specific)
        return state._replace(rewards=rewards), named(self.names, reward=rewards)

    def learn(self, state: LanguagesState) -> tuple[LanguagesState, Metrics]:
        """Make E updates of ψ."""
        found: Metrics = {}
        if self.specific_rows == "train":
            own = jax.tree.map(lambda x: x[self.specific], state.gradients)
            state, found = self._rewarded(state, own)

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], tuple[Array, Array]]:
            params, opt_state = carry
            picked = jax.random.randint(key, (self.targets,), 0, len(self.available))
            given = self.available[picked], state.rewards, self.temperature, self.estimator
            gain, gradient = jax.value_and_grad(scorer_gain)(params, *given)
            descent = jax.tree.map(jnp.negative, gradient)
            updates, opt_state = self.optimizer.update(descent, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), (gain, trees.norm(gradient))

        keys = jax.random.split(round_keys(state.rng, state.rounds - 1).scorer, self.steps)
        (params, opt_state), (gains, norms) = jax.lax.scan(step, (state.params, state.opt_state), keys)
        found |= {"scorer_gain": jnp.mean(gains), "sampler_gradient_norm": jnp.mean(norms)}
        return state._replace(params=params, opt_state=opt_state), found

    def _rewards(self, gradients: Params, specific: Params) -> Array:
        """r_i, float32 `[n]`."""
        products, squares, norm = jnp.zeros(()), jnp.zeros(()), trees.norm(specific)
        for kept, new in zip(jax.tree.leaves(gradients), jax.tree.leaves(specific), strict=True):
            axes = tuple(range(1, kept.ndim))
            products += jnp.sum(trees.widen(kept) * trees.widen(new), axis=axes)
            squares += jnp.sum(trees.widen(kept) ** 2, axis=axes)
        if self.similarity == "cosine":
            norms = jnp.sqrt(squares) * norm
            products = jnp.where(norms == 0, 0.0, products / jnp.where(norms == 0, 1.0, norms))
        return (self.reward_scale * products).astype(jnp.float32)
