"""The inner problem at the current θ, made from the parts of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bilevel import trees
from bilevel.derivatives.linearization import Derivatives, FirstOrder, Quadratic, SecondOrder, row_norms
from bilevel.derivatives.rows import RowLosses, Weights, resolve
from bilevel.derivatives.singularities import without_singularities
from bilevel.devices.axis import Axis
from bilevel.devices.sharding import gather
from bilevel.methods.base import Lookahead, Problem
from bilevel.selection.scorers import FeatureFn, Features, as_features, check_features
from bilevel.state import TrainState
from bilevel.step import estimators
from bilevel.step.checks import check_statistics
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params


@dataclass(frozen=True, eq=False)
class Evaluations:
    """How losses are evaluated and differentiated.

    The fields mean what they mean in `bilevel.make_step`.
    """

    loss: LossFn
    specific_loss: LossFn
    optimizer: optax.GradientTransformation
    derivatives: Derivatives
    param_filter: Callable[[str], bool] | None
    micro_batches: int
    mesh: Mesh | None
    gather: Callable[[str], bool] | None
    axis: Axis
    averaged_by: str = ""
    """The option by which model states are averaged, which holds for statistics alone; "" if there is none."""

    def whole(self, params: Params) -> Params:
        """Gather θ as the losses take it: all but what they gather themselves."""
        return gather(params, self.mesh, self.gather)

    def rows(self, state: TrainState, batch: Batch, rng: Array) -> RowLosses:
        """Return the generic losses of a batch, as a function of θ."""

        def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
            found = self.loss(self.whole(params), model_state, batch, rng)
            if self.averaged_by:
                check_statistics(found, model_state, self.averaged_by)
            return found

        return RowLosses(loss, state.model_state, batch, rng, self.micro_batches)

    def features(self, function: FeatureFn, state: TrainState, batch: Batch, rng: Array) -> Features:
        """Evaluate the scorer's features of a batch.

        No derivative passes through them, and the model state stays as it is.
        """
        params = self.whole(state.params)
        found = jax.lax.stop_gradient(function(params, state.model_state, batch, rng))
        check_features(found, batch)
        return found

    def subset(self, params: Params) -> trees.Subset:
        """Return the part of θ that probes live in."""
        return trees.make_subset(self.param_filter, params)

    def problem(
        self, state: TrainState, losses: RowLosses, weights: Weights, specific: Batch, rng: Array, own_rng: Array
    ) -> Problem:
        """Pose the problem of an α-step on rows with these losses and weights.

        `rng` is for the specific loss, `own_rng` for what the method draws itself.
        """
        axis, subset = self.axis, self.subset(state.params)
        params = axis.spread(state.params)

        def first_order() -> FirstOrder:
            found = self.derivatives.first_order(losses, params, weights, subset, axis.sum)
            return found._replace(alignments=lambda probe: found.alignments(axis.spread(probe)))

        def second_order(probe: Params) -> SecondOrder:
            return self.derivatives.second_order(losses, params, weights, axis.spread(probe), subset, axis.sum)

        def quadratic() -> Quadratic:
            found = self.derivatives.quadratic(losses, params, weights, subset, axis.sum)
            return found._replace(
                alignments=lambda probe: found.alignments(axis.spread(probe)),
                hessian_product=lambda direction: found.hessian_product(axis.spread(direction)),
            )

        def rows_at(at: Params) -> tuple[Array, Params]:
            known = resolve(weights, losses(params)[0]) if callable(weights) else weights
            values, _, gradient = losses.pulled_back(axis.spread(at), known)
            return values, axis.sum(subset.restrict(gradient))

        def specific_gradient(at: Params) -> tuple[Array, Params]:
            return self.specific_gradient(state, subset, at, specific, rng)

        def lookahead(gradient: Params, optimizer: optax.GradientTransformation | None = None) -> Lookahead:
            return self.lookahead(state, subset, gradient, optimizer)

        def total(values: Array) -> Array:
            return estimators.total(values, axis)

        def specific_losses(batch: Batch) -> Array:
            params = self.whole(state.params)
            rows = RowLosses(self.specific_loss, state.model_state, batch, rng, self.micro_batches)
            return as_features(rows(params)[0])

        def value_and_gradient(mean: Callable[[Params], Array], own: Params) -> tuple[Array, Params]:
            return axis.mean(jax.value_and_grad(mean)(axis.spread(own)))

        return Problem(
            state.params, subset, first_order, lambda: row_norms(losses, params, subset), second_order, quadratic, rows_at,
            specific_gradient, lookahead, total,
            losses.batch, specific, specific_losses, value_and_gradient, own_rng,
        )  # fmt: skip

    def specific_gradient(
        self, state: TrainState, subset: trees.Subset, at: Params, batch: Batch, rng: Array
    ) -> tuple[Array, Params]:
        """Evaluate the mean specific loss at `at` (NaN if its gradient is not finite), and its gradient over the subset."""
        at = self.axis.spread(at)

        def loss(part: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
            params = self.whole(subset.merge(part, at))
            return self.specific_loss(params, model_state, batch, rng)

        rows = RowLosses(loss, state.model_state, batch, rng, self.micro_batches)
        count = trees.num_rows(batch)
        weights = self.axis.spread(jnp.full((count,), 1.0 / count))
        values, _, gradient = rows.pulled_back(subset.restrict(at), weights)
        found = jax.tree.map(lambda x: x / self.axis.size, self.axis.sum((jnp.mean(values), gradient)))
        return jnp.where(trees.is_finite(found[1]), found[0], jnp.nan), found[1]

    def lookahead(
        self,
        state: TrainState,
        subset: trees.Subset,
        gradient: Params,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Lookahead:
        """Look ahead by the optimizer's update of a gradient from the state (None: of θ's own optimizer)."""
        opt_state = state.opt_state if optimizer is None else optimizer.init(state.params)

        def update(gradient: Params) -> Params:
            return (optimizer or self.optimizer).update(gradient, opt_state, state.params)[0]

        updates, pullback = jax.vjp(update, gradient)
        _, guarded = jax.vjp(without_singularities(update), gradient)

        def pull(part: Params) -> Params:
            cotangent = jax.tree.map(lambda x, u: x.astype(u.dtype), subset.embed(part, gradient), updates)
            (here,), (instead,) = pullback(cotangent), guarded(cotangent)
            return subset.restrict(jax.tree.map(_where_defined, gradient, here, instead))

        return optax.apply_updates(state.params, updates), updates, pull


def _where_defined(gradient: Array, here: Array, instead: Array) -> Array:
    """A probe, from the pullback and that without singularities, that is finite where the optimizer has no derivative.

    Adam has none where the gradient and its second moment are 0 (the √ at 0), as they are for parameters that no row has
    touched so far, or so small that their squares are 0 (gradients below 4e-12 in float32). No alignment depends on the probe
    there, so it is 0. Clipping by the norm of all gradients carries the NaN of such a parameter to all others, and RAdam has
    NaN everywhere on its first steps: there the other pullback has what is right.
    """
    flat = jnp.abs(gradient) < float(jnp.finfo(gradient.dtype).tiny) ** 0.3
    return jnp.where(jnp.isfinite(here), here, jnp.where(flat, 0, instead)).astype(here.dtype)
