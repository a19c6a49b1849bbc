"""Acceleration rates: can gradient alignments tell specific from generic rows?

Of a model θ that was trained on generic data, Grangier et al. compare single rows x with unit gradients of batches:

    a_norm(x, B) = ∇ℓ(x, θ)ᵀ ∇ℓ(B, θ) / ‖∇ℓ(B, θ)‖,     ℓ(B, θ) the mean loss of B,

    SAR = E 1{a_norm(x, B_specific) > a_norm(x, B_generic)}   over x ~ D_specific and batches of both data sets,
    GAR = E 1{a_norm(x, B_generic) > a_norm(x, B_specific)}   over x ~ D_generic and batches of both data sets.

Both are ½ by chance: exactly so, ties apart, where the two data sets are one. Since a_norm is linear in the unit gradient, a
pair of batches needs one alignment a row, with the difference of the two unit gradients, and no gradient of any single row.

Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization" (2024),
section 6.3 (its equations have no numbers; table 8 has its figures).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.derivatives.linearization import Derivatives, Forward
from bilevel.derivatives.rows import RowLosses
from bilevel.types import Array, Batch, LossFn, ModelState, Params, UserError

RATES = ("sar", "gar")
"""Fields of `AccelerationRates`; the standard error of each ends with "_error"."""


class AccelerationRates(NamedTuple):
    """The two rates and their standard errors, floating-point scalars in 0..1."""

    sar: Array
    """Share of specific rows and pairs of batches for which the specific batch aligns better."""
    sar_error: Array
    gar: Array
    """Share of generic rows and pairs of batches for which the generic batch aligns better."""
    gar_error: Array


def acceleration_rates(
    loss: LossFn,
    params: Params,
    model_state: ModelState,
    specific_rows: Batch,
    generic_rows: Batch,
    specific_batches: Batch,
    generic_batches: Batch,
    rng: Array,
    *,
    specific_loss: LossFn | None = None,
    derivatives: Derivatives | None = None,
    micro_batches: int = 1,
) -> AccelerationRates:
    """Compute SAR and GAR with standard errors, over m rows and P pairs of batches.

    The arguments are those of `alignment_differences`, m at least 2 for either kind of rows and P at least 2.

    Returns:
      The rates and the standard errors of `crossed_standard_error`. A row whose two alignments are equal (a gradient of 0) counts
      for neither side, as the paper's strict inequalities have it.

    Raises:
      UserError: for shapes that do not fit, or fewer than 2 rows of a kind or pairs of batches.
    """
    _check_enough(specific_rows, generic_rows, specific_batches)
    specific, generic = alignment_differences(
        loss, params, model_state, specific_rows, generic_rows, specific_batches, generic_batches, rng,
        specific_loss=specific_loss, derivatives=derivatives, micro_batches=micro_batches,
    )  # fmt: skip
    faster = (specific > 0).astype(specific.dtype), (generic < 0).astype(generic.dtype)
    (sar, sar_error), (gar, gar_error) = ((jnp.mean(x), crossed_standard_error(x)) for x in faster)
    return AccelerationRates(sar, sar_error, gar, gar_error)


def alignment_differences(
    loss: LossFn,
    params: Params,
    model_state: ModelState,
    specific_rows: Batch,
    generic_rows: Batch,
    specific_batches: Batch,
    generic_batches: Batch,
    rng: Array,
    *,
    specific_loss: LossFn | None = None,
    derivatives: Derivatives | None = None,
    micro_batches: int = 1,
) -> tuple[Array, Array]:
    """Compute a_norm(x, B_specific) − a_norm(x, B_generic) of all rows x.

    For each pair of batches.

    Compiled once for each loss and each set of shapes. With `Forward()` the 2m rows are linearised once for a tangent of 2F a
    pair, or, in parts, cost 3F a pair with no linearisation kept; the gradients of the 2b rows of batches cost 3F a pair.

    Args:
      loss: per-example losses; see `bilevel.types.LossFn`. The same function at every call, or each call compiles anew.
      params: θ.
      model_state: BatchNorm statistics and the like; `{}` when there are none. What an evaluation makes of it is dropped.
      specific_rows: a batch of specific rows x, best unseen in training, every array `[m, …]`.
      generic_rows: a batch of generic rows x, likewise; their number may be another.
      specific_batches: P batches B_specific, stacked: every array `[P, b, …]`; what is `Shared` is so by all of them.
      generic_batches: the P batches B_generic that they are paired with; their b may be another.
      rng: a typed key (`jax.random.key`) for losses with dropout.
      specific_loss: the loss on specific rows, if it differs from `loss`.
      derivatives: `bilevel.Forward()` (the default: exact) or `bilevel.Finite()`, for kernels without forward mode.
      micro_batches: evaluate rows and batches in this many equal parts, one after the other: less memory, and faster on CPU
        where parts of some 32 rows fit its caches.

    Returns:
      The differences on the specific rows `[P, m]` and on the generic rows `[P, m]`, in the type of the losses. A batch whose
      gradient is 0 counts with alignments of 0.

    Raises:
      UserError: for shapes that do not fit.
    """
    pairs = _check_stacked("specific", specific_rows, specific_batches)
    if pairs != _check_stacked("generic", generic_rows, generic_batches):
        raise UserError(
            f"There are {pairs} specific batches, but {trees.num_rows(generic_batches)} generic ones: "
            "they are compared in pairs, so give as many of both."
        )
    if micro_batches < 1:
        raise UserError(f"micro_batches={micro_batches} must be at least 1.")
    data = (specific_rows, generic_rows), (specific_batches, generic_batches)
    return _differences(
        loss, specific_loss or loss, derivatives or Forward(), micro_batches, params, model_state, *data, rng
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _differences(
    loss: LossFn,
    specific_loss: LossFn,
    derivatives: Derivatives,
    parts: int,
    params: Params,
    model_state: ModelState,
    rows: tuple[Batch, Batch],
    batches: tuple[Batch, Batch],
    rng: Array,
) -> tuple[Array, Array]:
    losses = specific_loss, loss
    everything = trees.make_subset(None, params)
    keys = jax.random.split(rng, 3)

    def alignments(loss: LossFn, rows: Batch, key: Array) -> Any:
        evaluated = RowLosses(loss, model_state, rows, key, parts)
        none = jnp.zeros(trees.num_rows(rows))  # the rows' own gradient is not needed, and the compiler drops it
        return derivatives.first_order(evaluated, params, none, everything, lambda tree: tree).alignments

    specific, generic = (alignments(*given) for given in zip(losses, rows, keys[:2], strict=True))

    def unit_gradient(loss: LossFn, batch: Batch, key: Array) -> Params:
        size = trees.num_rows(batch)
        mean = jnp.full(size, 1.0 / size)
        gradient = RowLosses(loss, model_state, batch, key, parts).pulled_back(params, mean)[2]
        length = jnp.maximum(trees.norm(gradient), jnp.finfo(jnp.float32).tiny)
        return jax.tree.map(lambda x: x / length.astype(x.dtype), gradient)

    stacked, joins = zip(*map(trees.without_shared, batches), strict=True)

    def compare(pair: tuple[tuple[Batch, Batch], Array]) -> tuple[Array, Array]:
        rows, key = pair
        whole = (join(side) for join, side in zip(joins, rows, strict=True))
        sides = (unit_gradient(*given) for given in zip(losses, whole, jax.random.split(key), strict=True))
        difference = jax.tree.map(jnp.subtract, *sides)
        return specific(difference), generic(difference)

    return jax.lax.map(compare, (stacked, jax.random.split(keys[2], trees.num_rows(batches[0]))))


def crossed_standard_error(outcomes: Array) -> Array:
    """Compute the standard error of a mean over P pairs of batches and m rows.

    Rows and pairs are drawn independently.

    Analytic: every outcome shares its row with P − 1 others and its pair with m − 1 others, so that their mean varies by

        σ²_row / m + σ²_pair / P + σ²_rest / (m P),

    and the three variances are estimated by the analysis of variance of the two-way table without replication, those of rows and
    pairs at least 0. It treats the data sets as given, and knows nothing of other seeds of the training. Outcomes that are all
    equal give 0, which says only that the true share of the others is small against 1/m.

    Args:
      outcomes: floating-point `[P, m]`, P and m at least 2.

    Returns:
      A scalar.

    Reference: Searle, Casella, McCulloch, "Variance Components" (1992), the two-way crossed classification.
    """
    pairs, rows = outcomes.shape
    of_rows, of_pairs = jnp.mean(outcomes, axis=0), jnp.mean(outcomes, axis=1)
    rest = outcomes - of_rows[None] - of_pairs[:, None] + jnp.mean(outcomes)
    noise = jnp.sum(rest**2) / ((pairs - 1) * (rows - 1)) / (pairs * rows)
    parts = jnp.var(of_rows, ddof=1) / rows, jnp.var(of_pairs, ddof=1) / pairs
    return jnp.sqrt(sum((jnp.maximum(part - noise, 0.0) for part in parts), start=noise))


def _check_enough(specific_rows: Batch, generic_rows: Batch, specific_batches: Batch) -> None:
    found = {
        "specific rows": trees.num_rows(specific_rows),
        "generic rows": trees.num_rows(generic_rows),
        "pairs of batches": trees.num_rows(specific_batches),
    }
    for name, count in found.items():
        if count < 2:
            raise UserError(f"Acceleration rates of {count} {name} have no standard error: give at least 2.")


def _check_stacked(name: str, rows: Batch, batches: Batch) -> int:
    """The number of batches P, if every array is `[P, b, …]` where the rows' array is `[m, …]`."""
    trees.num_rows(rows)
    pairs = trees.num_rows(batches)
    apart = (trees.without_shared(tree)[0] for tree in (rows, batches))
    wanted, found = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in apart)
    if set(wanted) != set(found):
        different = ", ".join(sorted(jax.tree_util.keystr(path) for path in set(wanted) ^ set(found)))
        raise UserError(f"{name}_rows and {name}_batches do not hold the same arrays ({different}): give equal trees.")
    sizes = set()
    for path, row in wanted.items():
        shape = found[path].shape
        if len(shape) != row.ndim + 1 or shape[2:] != row.shape[1:]:
            raise UserError(
                f"The array {jax.tree_util.keystr(path) or name} of {name}_batches has shape {shape} where that of "
                f"{name}_rows has {row.shape}: it must be [P, b, …] where the other is [m, …]; stack P batches of b rows."
            )
        sizes.add(shape[1])
    if len(sizes) != 1 or 0 in sizes or pairs == 0:
        raise UserError(f"{name}_batches must be at least one batch of at least one row, all arrays [P, b, …].")
    return pairs
