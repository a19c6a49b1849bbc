"""The losses of fixed rows as a function of θ, at once or in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.splitting import split
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError

Weights: TypeAlias = Array | Callable[[Array], Array]
"""Weights of rows `[b]`, or a function from the rows' losses `[b]` to them; no derivative passes through it."""


def resolve(weights: Weights, losses: Array) -> Array:
    """Compute the weights, given the losses of their rows."""
    return weights(jax.lax.stop_gradient(losses)) if callable(weights) else weights


class Differentiated(NamedTuple):
    """Losses of rows and their weighted gradient at θ.

    With them, what can be had from the same forward pass.
    """

    losses: Array
    """float32 `[b]`."""
    aux: LossAux
    gradient: Params
    """Σ w_i ∇ℓ_i of this device's rows."""
    reweighted: Callable[[Array], Params]
    """Other weights `[b]` -> their Σ w_i ∇ℓ_i: one more backward pass (in parts, a forward pass too)."""
    losses_at: Callable[[Params], tuple[Array, LossAux]]
    """Other values of the chosen part of θ -> losses `[b]` and aux: a forward pass from there on (in parts, all of it)."""
    gradient_at: Callable[[Params, Array], tuple[Array, Params]]
    """Other values of the chosen part, weights `[b]` -> losses `[b]`, and Σ w_i ∇ℓ_i over that part."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """θ -> (losses `[b]`, aux) of fixed rows.

    The model state and the random key are fixed too.

    With `parts` > 1 the rows are evaluated in that many equal parts, one after the other: the activations of one part are
    alive at a time, and gradients add up (micro-batches). Row i is in part i modulo `parts`: rows that lie next to each other on
    one device of a mesh are in all parts, so that every device has its share of each part. Losses and gradients are the same to
    rounding, unless rows act on each other (BatchNorm): then each part has statistics of its own, and the new model state is
    the mean over the parts.
    """

    loss: LossFn
    model_state: ModelState
    batch: Batch
    rng: Array
    parts: int = 1

    def __call__(self, params: Params) -> tuple[Array, LossAux]:
        """Losses float32 `[b]`, and aux."""
        if self.parts == 1:
            return self._evaluate(params, self.batch, self.rng)

        chunks, join = self._chunks()

        def part(_: None, chunk: tuple[Batch, Array]) -> tuple[None, tuple[Array, LossAux]]:
            return None, self._evaluate(params, join(chunk[0]), chunk[1])

        _, (losses, aux) = jax.lax.scan(part, None, chunks)
        return _gathered(losses), _joined(aux)

    def differentiated(self, params: Params, weights: Weights, subset: trees.Subset | None = None) -> Differentiated:
        """Evaluate losses and weighted gradient, for other weights and values of θ too.

        Weights that are a function of the losses cost nothing with one part; with more, the losses are evaluated once more.
        """
        subset = subset or trees.make_subset(None, params)
        if self.parts > 1:
            return self._differentiated_in_parts(params, weights, subset)
        losses, aux, pullback, losses_at = self._pullback(params, subset)

        def reweighted(weights: Array) -> Params:
            return pullback(weights.astype(losses.dtype))

        def gradient_at(part: Params, weights: Array) -> tuple[Array, Params]:
            losses, pullback, _ = jax.vjp(losses_at, part, has_aux=True)
            return losses, pullback(weights.astype(losses.dtype))[0]

        gradient = reweighted(resolve(weights, losses))
        return Differentiated(losses, aux, gradient, reweighted, losses_at, gradient_at)

    def _differentiated_in_parts(self, params: Params, weights: Weights, subset: trees.Subset) -> Differentiated:
        known = resolve(weights, self(params)[0]) if callable(weights) else weights
        losses, aux, gradient = self._in_parts(params, known)

        def losses_at(part: Params) -> tuple[Array, LossAux]:
            return self(subset.merge(part, params))

        def gradient_at(part: Params, weights: Array) -> tuple[Array, Params]:
            losses, _, gradient = self._in_parts(subset.merge(part, params), weights)
            return losses, subset.restrict(gradient)

        def reweighted(weights: Array) -> Params:
            return self._in_parts(params, weights)[2]

        return Differentiated(losses, aux, gradient, reweighted, losses_at, gradient_at)

    def _pullback(
        self, params: Params, subset: trees.Subset
    ) -> tuple[Array, LossAux, Callable[[Array], Params], Callable[[Params], tuple[Array, LossAux]]]:
        """Losses, aux, the pullback to all of θ, and the losses as a function of the chosen part alone."""
        if subset.is_everything:
            losses, pullback, aux = jax.vjp(self, params, has_aux=True)
            return losses, aux, lambda weights: pullback(weights)[0], self.__call__
        halves = split(lambda part, params: self(subset.merge(part, params)), subset.restrict(params), params)

        def evaluate(params: Params) -> tuple[Array, tuple[LossAux, list[Array]]]:
            known = halves.below(params)
            losses, aux = halves.above(subset.restrict(params), known)
            return losses, (aux, known)

        losses, pullback, (aux, known) = jax.vjp(evaluate, params, has_aux=True)
        return losses, aux, lambda weights: pullback(weights)[0], lambda part: halves.above(part, known)

    def pulled_back(self, params: Params, weights: Weights) -> tuple[Array, LossAux, Params]:
        """Evaluate losses `[b]`, aux, and Σ w_i ∇ℓ_i of this device's rows."""
        return self.differentiated(params, weights)[:3]

    def _in_parts(self, params: Params, weights: Array) -> tuple[Array, LossAux, Params]:
        chunks, join = self._chunks()

        def part(total: Params, chunk: tuple[Batch, Array, Array]) -> tuple[Params, tuple[Array, LossAux]]:
            rows, key, mass = chunk
            losses, pullback, aux = jax.vjp(lambda p: self._evaluate(p, join(rows), key), params, has_aux=True)
            (gradient,) = pullback(mass.astype(losses.dtype))
            return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, gradient), (losses, aux)

        zeros = trees.wide(jax.tree.map(lambda x: jnp.where(True, 0, x).astype(x.dtype), params))
        gradient, (losses, aux) = jax.lax.scan(part, zeros, (*chunks, _dealt(weights, self.parts)))
        return _gathered(losses), _joined(aux), trees.like(gradient, params)

    def _evaluate(self, params: Params, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        found = self.loss(params, self.model_state, batch, rng)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LossAux)):
            raise UserError(
                f"The loss returned a {type(found).__name__} that is no pair (losses, LossAux): return the losses, one a "
                "row, and bilevel.LossAux(model_state, metrics), with {} for what there is none of."
            )
        losses, aux = found
        count = trees.num_rows(batch)
        if losses.shape != (count,):
            raise UserError(
                f"The loss returned an array of shape {losses.shape} for {count} rows; "
                f"it must return one loss a row, shape ({count},)."
            )
        for name, values in aux.metrics.items():
            if jnp.shape(values)[:1] != (count,):
                raise UserError(
                    f"The loss returned the metric {name!r} with shape {jnp.shape(values)} for {count} rows: give one value a "
                    "row."
                )
        return losses, aux

    def _chunks(self) -> tuple[tuple[Batch, Array], Callable[[Batch], Batch]]:
        """The rows and a key for each part, stacked along a new leading axis; and what gives a part's rows what all share."""
        count = trees.num_rows(self.batch)
        if count % self.parts:
            raise UserError(
                f"{count} rows (on one device) cannot be divided into micro_batches={self.parts} equal parts: "
                "choose a divisor of the number of rows."
            )
        rows, join = trees.without_shared(self.batch)
        stacked = jax.tree.map(lambda x: _dealt(x, self.parts), rows)
        return (stacked, jax.random.split(self.rng, self.parts)), join


def _dealt(x: Array, parts: int) -> Array:
    """`[b, …]` -> `[parts, b/parts, …]`."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _gathered(x: Array) -> Array:
    """`[parts, b/parts, …]` -> `[b, …]`, the inverse of `_dealt`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _joined(aux: LossAux) -> LossAux:
    """The parts' aux as one: per-example metrics in a row, the mean of the model states (the last of whole numbers)."""

    def state(x: Any) -> Any:
        return jnp.mean(x, axis=0).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x[-1]

    return LossAux(jax.tree.map(state, aux.model_state), jax.tree.map(_gathered, aux.metrics))
