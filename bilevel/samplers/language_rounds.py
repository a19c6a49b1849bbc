"""Rounds of translation pairs: the next targets, and one language drawn for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.samplers.fixed import UniformState, uniform
from bilevel.samplers.language_queue import Queue, empty_queue, sorted_queue
from bilevel.types import NOT_COMPUTED, Array, Metrics, Params


class LanguagesState(NamedTuple):
    """All that a sampler of languages keeps, and goes on from when restored."""

    rounds: Array
    """int32 scalar: rounds begun."""
    targets: UniformState
    """Which targets of the current epoch are used."""
    queue: Queue
    """The pairs of the round at hand."""
    params: Any
    """ψ; changed at the end of a round. None for fixed chances, like the next three."""
    opt_state: Any
    gradients: Params
    """g_i, stacked: each array of (the chosen part of) θ with a leading axis of n languages."""
    rewards: Any
    """r_i of the last round, float32 `[n]`."""
    rng: Array
    """A typed key. It never changes: round t draws from `fold_in(rng, t)`."""


class RoundKeys(NamedTuple):
    """Random keys of one round."""

    languages: Array
    order: Array
    scorer: Array


def round_keys(rng: Array, number: Array) -> RoundKeys:
    """Derive the keys of a round, counted from 0."""
    return RoundKeys(*jax.random.split(jax.random.fold_in(rng, number), 3))


@dataclass(frozen=True, eq=False)
class Drawing:
    """Rounds of pairs by given chances."""

    table: np.ndarray
    """int32 `[T, n]`."""
    batch_size: int
    targets: int
    """K."""
    names: tuple[str, ...]
    log_chances: Callable[[Any, Array], Array]
    """(ψ, availability `[k, n]`) -> log p(i|y_j), `[k, n]`."""
    init_learned: Callable[[Array, Any], tuple[Any, Any, Any, Any]]
    """(key, ψ or None) -> what the state holds from `params` to `rewards`."""

    def init(self, rng: Array, params: Any = None) -> LanguagesState:
        """Begin before the first round; `params` are ψ."""
        for_learned, for_targets, for_rounds = jax.random.split(rng, 3)
        queue = empty_queue(self.targets, self.table.shape[1], self.batch_size)
        targets = uniform(len(self.table), self.targets).init(for_targets)
        return LanguagesState(
            jnp.zeros((), jnp.int32), targets, queue, *self.init_learned(for_learned, params), for_rounds
        )

    def draw(self, state: LanguagesState) -> tuple[Array, LanguagesState, Metrics]:
        """Draw the next minibatch, of a new round if the last one has ended."""
        used = state.rounds, state.targets, state.queue

        def begin() -> tuple[Any, Array]:
            return self._begin(state)

        def go_on() -> tuple[Any, Array]:
            return used, jnp.full((2, len(self.names)), NOT_COMPUTED, jnp.float32)

        # What is large, the running gradients, stays outside.
        (rounds, targets, queue), shares = jax.lax.cond(state.queue.place >= state.queue.length, begin, go_on)
        rows = queue.rows[queue.place]
        state = state._replace(rounds=rounds, targets=targets, queue=queue._replace(place=queue.place + 1))
        return rows, state, named(self.names, chance=shares[0], drawn=shares[1])

    def _begin(self, state: LanguagesState) -> tuple[tuple[Array, UniformState, Queue], Array]:
        """The next K targets, a language for each, and their mean chances and shares `[2, n]`."""
        keys = round_keys(state.rng, state.rounds)
        picked, targets, _ = uniform(len(self.table), self.targets).draw(state.targets)
        rows = jnp.asarray(self.table)[picked]
        logs = self.log_chances(state.params, rows >= 0)
        drawn = jax.random.categorical(keys.languages, logs, axis=-1)
        pairs = jnp.take_along_axis(rows, drawn[:, None], axis=1)[:, 0]
        queue = sorted_queue(keys.order, pairs, drawn, len(self.names), self.batch_size)
        shares = jnp.zeros(len(self.names), jnp.float32).at[drawn].add(1.0 / self.targets)
        return (state.rounds + 1, targets, queue), jnp.stack([jnp.mean(jnp.exp(logs), axis=0), shares]).astype(
            jnp.float32
        )


def ends(state: LanguagesState) -> Array:
    """Tell whether the minibatch drawn last was the last of its round."""
    return state.queue.place >= state.queue.length


def named(names: tuple[str, ...], **values: Array) -> Metrics:
    """Name the numbers `[n]` of the languages: kind/NAME."""
    return {f"{kind}/{name}": row[i] for kind, row in values.items() for i, name in enumerate(names)}
