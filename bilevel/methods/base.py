"""What a method is, and what it may evaluate.

Every bilevel method has the same α-gradient, Σ_i a_i(p) ∇_α w_i(α), and differs only in its probe p. A method therefore
only chooses p, through the few evaluations that `Problem` offers, and keeps a state of its own between α-steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import optax

from bilevel.derivatives.linearization import FirstOrder, Quadratic, SecondOrder
from bilevel.trees import Subset
from bilevel.types import Array, Batch, LossAux, Params, UserError

Lookahead: TypeAlias = tuple[Params, Params, Callable[[Params], Params]]
"""(θ⁺ = θ + U(g), U(g), the pullback (∂U/∂g)ᵀ over the chosen part, which is 0 where U has no derivative)."""


class LookaheadFn(Protocol):
    """One update of θ, unrolled."""

    def __call__(self, gradient: Params, optimizer: optax.GradientTransformation | None = None, /) -> Lookahead:
        """Take the update of θ's optimizer at its state, or the first update of another optimizer."""
        ...


class Problem(NamedTuple):
    """The inner problem at the current θ, as a method sees it.

    Rows are those of the α-batch.
    """

    params: Params
    """θ, the full tree."""
    subset: Subset
    """The part of θ that probes live in (everything, unless the step was built with `param_filter`)."""
    first_order: Callable[[], FirstOrder]
    """One linearisation of the rows' losses at θ. Call it once."""
    row_norms: Callable[[], Array]
    """‖∇ℓ_i‖ at θ over the chosen part, float32 `[b]`; b backward passes."""
    second_order: Callable[[Params], SecondOrder]
    """Probe, known beforehand -> losses, gradient, alignments and Hessian product at θ."""
    quadratic: Callable[[], Quadratic]
    """One linearisation of the rows' gradient at θ, for Hessian products with directions found on the way. Call it once."""
    rows_at: Callable[[Params], tuple[Array, Params]]
    """Full θ' -> (ℓ_i(θ') float32 `[b]`, Σ w_i ∇ℓ_i(θ') over the chosen part and all devices), with the weights at θ."""
    specific_gradient: Callable[[Params], tuple[Array, Params]]
    """Full θ' -> (L_spec(θ'), ∇L_spec(θ') over the chosen part), mean over the specific batch of all devices. The loss is NaN
    where its gradient is not finite."""
    lookahead: LookaheadFn
    """Gradient g -> θ after an update U(g), and what it needs to be differentiated."""
    total: Callable[[Array], Array]
    """Values of rows `[b]` -> their sum over the rows of all devices."""
    batch: Batch
    """The rows of the α-batch (of this device)."""
    specific_batch: Batch
    specific_losses: Callable[[Batch], Array]
    """Rows like those of the specific batch -> their losses at θ, float32 `[m]`, without derivative."""
    value_and_gradient: Callable[[Callable[[Params], Array], Params], tuple[Array, Params]]
    """(a mean over this device's rows as a function of parameters of the method's own, these parameters) -> the mean over the
    rows of all devices, and its gradient."""
    rng: Array
    """A key for draws of the method's own; another one on every step and device."""


class MethodUpdate(NamedTuple):
    """What a method returns from one α-step."""

    losses: Array
    """float32 `[b]`, at θ."""
    aux: LossAux
    gradient: Params
    """Σ w_i ∇ℓ_i of the rows."""
    alignments: Array | None
    """a_i(p), float32 `[b]`: what a row costs the specific loss to first order, if its weight grows. None without a probe."""
    specific_loss: Array | None
    """float32 scalar, at the point where the method evaluated it; None if it did not."""
    state: Any
    weights: Array | None = None
    """float32 `[b]`, at least 0: the weights that `gradient` has, from a method that chooses them itself."""


MethodFn: TypeAlias = Callable[[Problem, Any], MethodUpdate]
"""One α-step: the problem and the method's state -> what changes."""


class Method(NamedTuple):
    """A method: a pair of pure functions.

    Hyper-parameters live in the closure, arrays in the state.
    """

    init: Callable[[Params], Any]
    """The chosen part of θ -> the method's state. Fixes every shape and dtype."""
    update: MethodFn | None
    """None for a method that never changes α."""
    uses_weights: bool = True
    """False if rows are drawn uniformly, without scoring them."""
    reuse: MethodFn | None = None
    """An α-step that takes the specific gradient from the state, and evaluates nothing on specific rows; its specific_loss is
    None and it leaves the state as it is. None for a method that cannot do without one."""
    chooses_weights: bool = False
    """True if `update` returns the weights of the θ-update itself, on every step and for every row of the big batch."""
    looks_ahead: bool = False
    """True if the probe comes through `Problem.lookahead`: the method learns nothing where θ's optimizer has the derivative 0."""


def check_decay(decay: float) -> None:
    """Reject a decay of the averaged specific gradient outside [0, 1)."""
    if not 0.0 <= decay < 1.0:
        raise UserError(f"average_specific={decay} must lie in [0, 1); 0 switches the averaging off.")
