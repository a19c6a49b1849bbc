"""The two ways of differentiating the losses of rows.

Let ℓ_i(θ) be the losses of b rows, w_i their weights, L = Σ w_i ℓ_i. For a direction p the methods need

    a_i(p) = ⟨∇ℓ_i(θ), p⟩          the alignment of row i with p,
    H p    = ∇²L(θ) p              for SOBA,

next to the losses and ∇L(θ) that the θ-update needs anyway. A way of differentiating is a value that the user passes:

* `Forward()`: forward-mode derivatives, exact. F being one forward pass, `first_order` costs 3F and 2F for every call of
  `alignments`; `second_order` costs 9F; `quadratic` costs 3F, 2F for every call of `alignments` and 6F for every Hessian
  product, and keeps the linearised gradient in memory (about twice what the backward pass keeps).
* `Finite(scale)`: differences of the losses and of the gradients at θ and θ + εp (DDS, equation 7), ε = scale·(1 + ‖θ‖)/‖p‖.
  `first_order` costs 3F and 1F for every call of `alignments`; `second_order` costs 6F, with no forward-mode rule needed;
  `quadratic` costs 3F, 1F for every call of `alignments` and 3F for every Hessian product.

If directions lie in a chosen part of θ, what is added to 3F counts from that part upwards only, unless the rows are evaluated
in parts: `Finite` and `Forward.first_order` evaluate what lies below once (`splitting`), the others leave it to the compiler
to drop what nobody asked for.

Weights may be a function of the losses (`rows.Weights`). They count as constants in every derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.rows import Differentiated, RowLosses, Weights, resolve
from bilevel.types import Array, LossAux, Params, UserError

Reduce: TypeAlias = Callable[[Params], Params]
"""Sums a tree over the devices that share the batch; the identity without a mapped axis."""


class FirstOrder(NamedTuple):
    """One linearisation of the losses of b rows."""

    losses: Array
    """float32 `[b]`."""
    aux: LossAux
    gradient: Params
    """Σ w_i ∇ℓ_i, over all devices."""
    alignments: Callable[[Params], Array]
    """Probe (a tree over the chosen part of θ) -> a_i(p), float32 `[b]`."""
    reweighted: Callable[[Array], Params]
    """Other weights `[b]` -> Σ w_i ∇ℓ_i over all devices, by one more backward pass (2F; 3F in parts)."""


class SecondOrder(NamedTuple):
    """Everything about b rows in a direction that is known beforehand."""

    losses: Array
    aux: LossAux
    gradient: Params
    alignments: Array
    """a_i(p), float32 `[b]`."""
    hessian_product: Params
    """∇²L p, over all devices and over the chosen part of θ."""


class Quadratic(NamedTuple):
    """The losses of b rows to second order in any direction.

    For directions that depend on one another.
    """

    losses: Array
    aux: LossAux
    gradient: Params
    """Σ w_i ∇ℓ_i, over all devices."""
    alignments: Callable[[Params], Array]
    """As in `FirstOrder`."""
    hessian_product: Callable[[Params], Params]
    """Direction (a tree over the chosen part of θ) -> ∇²L d over the same part, over all devices. May be called in a loop."""


class Derivatives(Protocol):
    """A way of differentiating the losses of rows."""

    def first_order(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> FirstOrder:
        """Evaluate losses and gradient at θ, and the alignments with any probe."""
        ...

    def second_order(
        self,
        losses: RowLosses,
        params: Params,
        weights: Weights,
        probe: Params,
        subset: trees.Subset,
        reduce: Reduce,
    ) -> SecondOrder:
        """Evaluate losses, gradient, alignments and Hessian product for one probe."""
        ...

    def quadratic(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> Quadratic:
        """Evaluate losses and gradient, and what any direction gives to second order."""
        ...


@dataclass(frozen=True)
class Forward:
    """Exact derivatives by forward mode; the reference."""

    def first_order(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> FirstOrder:
        """See the module's text."""
        if losses.parts > 1:
            return self._first_order_in_parts(losses, params, weights, subset, reduce)
        if subset.is_everything:
            values, tangents, aux = jax.linearize(losses, params, has_aux=True)
            transpose = jax.linear_transpose(tangents, params)

            def pull(weights: Array, /) -> Params:
                return transpose(weights.astype(values.dtype))[0]

            gradient = pull(resolve(weights, values))
        else:
            found = losses.differentiated(params, weights, subset)
            values, aux, gradient, pull = found[:4]
            # Above the cut once more, as only the chosen part shall carry tangents.
            _, tangents, _ = jax.linearize(found.losses_at, subset.restrict(params), has_aux=True)
        return FirstOrder(values, aux, reduce(gradient), tangents, lambda w: reduce(pull(w)))

    def _first_order_in_parts(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> FirstOrder:
        """A linearisation of all parts would keep all their activations: alignments evaluate them again, 3F each."""
        found = losses.differentiated(params, weights, subset)
        part = subset.restrict(params)

        def alignments(probe: Params) -> Array:
            return jax.jvp(found.losses_at, (part,), (probe,), has_aux=True)[1]

        return FirstOrder(
            found.losses, found.aux, reduce(found.gradient), alignments, lambda w: reduce(found.reweighted(w))
        )

    def second_order(
        self,
        losses: RowLosses,
        params: Params,
        weights: Weights,
        probe: Params,
        subset: trees.Subset,
        reduce: Reduce,
    ) -> SecondOrder:
        """See the module's text."""

        def evaluate(part: Params) -> tuple[tuple[Array, Params], LossAux]:
            values, aux, gradient = losses.pulled_back(subset.merge(part, params), weights)
            return (values, gradient), aux

        (values, gradient), (alignments, product), aux = jax.jvp(
            evaluate, (subset.restrict(params),), (probe,), has_aux=True
        )
        return SecondOrder(values, aux, reduce(gradient), alignments, reduce(subset.restrict(product)))

    def quadratic(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> Quadratic:
        """See the module's text.

        In parts nothing is kept: a Hessian product costs 9F, alignments 3F.
        """
        if losses.parts > 1:
            first = self._first_order_in_parts(losses, params, weights, subset, reduce)
            known = resolve(weights, first.losses)

            def product_in_parts(direction: Params) -> Params:
                return self.second_order(losses, params, known, direction, subset, reduce).hessian_product

            return Quadratic(first.losses, first.aux, first.gradient, first.alignments, product_in_parts)

        def evaluate(part: Params) -> tuple[tuple[Array, Params], tuple[LossAux, Params]]:
            values, aux, gradient = losses.pulled_back(subset.merge(part, params), weights)
            return (values, subset.restrict(gradient)), (aux, gradient)

        (values, _), tangents, (aux, gradient) = jax.linearize(evaluate, subset.restrict(params), has_aux=True)
        # What one of the two does not use, the compiler drops.
        return Quadratic(
            values, aux, reduce(gradient), lambda probe: tangents(probe)[0], lambda d: reduce(tangents(d)[1])
        )


@dataclass(frozen=True)
class Finite:
    """Forward differences: one more evaluation at θ + εp.

    Here ε = scale·(1 + ‖θ‖)/‖p‖ (DDS, equation 7; this ε is ours).

    Attributes:
      scale: ε₀. The error grows in proportion to it with the curvature along p, and with its inverse from rounding. With
        p = ∇L_spec, a steep direction, on a small trained transformer in float32, 1e-3 errs by 12% in a_i and 6% in H p (by
        2.5% and 1% with p in the last block), 1e-4 by a tenth of that. With bfloat16 computation 1e-3 errs by 10 to 20%, and
        1e-4 is useless.
    """

    scale: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.scale < 1:
            raise UserError(f"Finite(scale={self.scale}) must lie between 0 and 1: 1e-3 suits float32.")

    def step_size(self, part: Params, probe: Params) -> Array:
        """Compute ε.

        It is finite for p = 0 too, where every difference is 0 or, by rounding, next to nothing.
        """
        return self.scale * (1.0 + trees.norm(part)) / jnp.maximum(trees.norm(probe), 1e-20)

    def first_order(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> FirstOrder:
        """See the module's text."""
        found = _fine(losses.differentiated(params, weights, subset))
        return FirstOrder(
            found.losses,
            found.aux,
            reduce(found.gradient),
            self._alignments(found, subset.restrict(params)),
            lambda w: reduce(found.reweighted(w)),
        )

    def _alignments(self, found: Differentiated, part: Params) -> Callable[[Params], Array]:
        def alignments(probe: Params) -> Array:
            epsilon = self.step_size(part, probe)
            return (found.losses_at(trees.axpy(epsilon, probe, part))[0] - found.losses) / epsilon

        return alignments

    def second_order(
        self,
        losses: RowLosses,
        params: Params,
        weights: Weights,
        probe: Params,
        subset: trees.Subset,
        reduce: Reduce,
    ) -> SecondOrder:
        """See the module's text."""
        found = _fine(losses.differentiated(params, weights, subset))
        part, values, gradient = subset.restrict(params), found.losses, found.gradient
        epsilon = self.step_size(part, probe)
        moved = trees.after(trees.axpy(epsilon, probe, part), gradient)
        moved_values, moved_gradient = found.gradient_at(moved, resolve(weights, values))
        product = _quotient(moved_gradient, subset.restrict(gradient), epsilon)
        return SecondOrder(values, found.aux, reduce(gradient), (moved_values - values) / epsilon, reduce(product))

    def quadratic(
        self, losses: RowLosses, params: Params, weights: Weights, subset: trees.Subset, reduce: Reduce
    ) -> Quadratic:
        """See the module's text. The gradient at θ is evaluated once for all products."""
        found = _fine(losses.differentiated(params, weights, subset))
        part, known = subset.restrict(params), resolve(weights, found.losses)

        def hessian_product(direction: Params) -> Params:
            epsilon = self.step_size(part, direction)
            _, gradient = found.gradient_at(trees.axpy(epsilon, direction, part), known)
            return reduce(_quotient(gradient, subset.restrict(found.gradient), epsilon))

        alignments = self._alignments(found, part)
        return Quadratic(found.losses, found.aux, reduce(found.gradient), alignments, hessian_product)


def row_norms(losses: RowLosses, params: Params, subset: trees.Subset) -> Array:
    """Compute ‖∇ℓ_i‖ over the chosen part of θ, float32 `[b]`.

    One backward pass a row, one after the other.
    """

    def evaluate(part: Params) -> Array:
        return losses(subset.merge(part, params))[0]

    values, pullback = jax.vjp(evaluate, subset.restrict(params))
    numbers = jnp.arange(values.shape[0])
    return jax.lax.map(lambda i: trees.norm(pullback(jnp.where(numbers == i, 1, 0 * values))[0]), numbers)


def _fine(found: Differentiated) -> Differentiated:
    """Refuses losses of which small differences are rounding, such as those of bfloat16 logits."""
    kind = found.losses.dtype
    if jnp.issubdtype(kind, jnp.floating) and jnp.finfo(kind).bits < 32:
        raise UserError(
            f"The loss returned {kind}, too coarse for Finite(), which takes differences of losses: compute the losses in "
            "float32, for example from logits.astype(jnp.float32), or use Forward()."
        )
    return found


def _quotient(after: Params, before: Params, epsilon: Array) -> Params:
    return jax.tree.map(lambda x, y: (x - y) / epsilon, after, before)
