"""Filters: from the logits of a big batch to the rows that survive, B → b.

Choosing has two parts, each a pure function. A *temperature* sets the scale of the logits, which is free under a softmax
(the effective sample size of an untempered weighting network swings between one row and all of them). *select* then
draws positions. The same temperature divides the logits wherever the weights enter the α-gradient.

A logit of NaN or +∞ is no score, and counts as −∞: such a row has the weight 0 and is selected after all others, by
every filter that looks at logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.types import Array, Batch, UserError

Scope = Literal["global", "local"]


class Filter(NamedTuple):
    """A rule that picks k of B rows."""

    select: Callable[..., Array]
    """(key, logits `[B]` already tempered, k) -> positions int32 `[k]`; with `groups`, the groups `[B]` come behind k."""
    temperature: Callable[[Array], Array]
    """Raw logits `[B]` -> positive float32 scalar τ that divides them; carries no derivative."""
    scope: Scope = "global"
    """Under a mapped axis: "global" chooses over the rows of all devices, "local" lets each device choose of its own."""
    name: str = "filter"
    weigh: Callable[[Array, Array], Array] | None = None
    """(logits `[B]` as `select` saw them, positions `[k]`) -> what the rows picked count in the θ-update, `[k]`, as multiples of
    1/k; None: all count the same."""
    shards: int = 1
    """With scope "local" and no mapped axis: the number of groups that are filtered apart."""
    proportional: bool = False
    """Whether rows are drawn in proportion to the softmax of the logits, as the estimator "score" needs."""
    caps: bool = False
    """Whether rows with a logit of −∞ are picked after all others, and none twice at once, as `make_step`'s max_uses needs."""
    groups: Callable[[Batch], Array] | None = None
    """Big batch -> the group of each row, int32 `[B]`, for a rule that looks at them."""


def gumbel_top_k(
    *,
    temperature: float = 1.0,
    min_effective_fraction: float = 0.0,
    max_spread: float | None = None,
    scope: Scope = "global",
    shards: int = 1,
) -> Filter:
    """Draw without replacement, in proportion to the softmax of the logits.

    These are the top k of logits plus Gumbel noise.

    The first k' of k positions are themselves such a draw of k' rows.

    Args:
      temperature: τ ≥ this. 1 leaves the logits as they are.
      min_effective_fraction: floor under the effective sample size, as a fraction of B: τ is raised until
        (Σw)²/Σw² ≥ fraction·B. 0 switches it off. Rows with a logit of −∞, which are never drawn, do not count in B.
      max_spread: bound on (largest − smallest logit)/τ, kept by raising τ; None switches it off.
      scope: see `Filter`.
      shards: with scope "local" under `jit` (no mapped axis), the number of equal consecutive groups of the batch that
        choose for themselves: the number of devices, so that no rows move between them.

    Raises:
      UserError: for a value out of range.

    Reference: Kool, van Hoof, Welling, "Stochastic beams and where to find them", ICML 2019, section 2; Grangier et al.,
      section 6.2. The floor and the bound are ours.
    """

    def select(key: Array, logits: Array, k: int) -> Array:
        noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
        return jax.lax.top_k(noisy, k)[1]

    rule = _temperature_rule(temperature, min_effective_fraction, max_spread)
    return _scoped(Filter(select, rule, scope, "gumbel_top_k", proportional=True, caps=True), shards)


def importance(
    *,
    temperature: float = 1.0,
    min_effective_fraction: float = 0.0,
    max_spread: float | None = None,
    unbiased: bool = False,
    scope: Scope = "global",
    shards: int = 1,
) -> Filter:
    """Draw with replacement from w = softmax(logits), with repeats.

    Args:
      temperature: as for `gumbel_top_k`, like `min_effective_fraction`, `max_spread`, `scope` and `shards`.
      min_effective_fraction: see there.
      max_spread: see there.
      unbiased: row i of the θ-update counts 1/(B w_i) times, so that the expected gradient is that of the mean loss of the big
        batch, whatever the logits: they change its variance alone. For scores that measure where the gradient is, such
        as `scoring.log_gradient_norm`; a weighting network cannot be learned through it.
      scope: see there.
      shards: see there.

    Reference: Grangier et al., section 4.3, filter (a); for `unbiased`, Katharopoulos and Fleuret, "Not all samples are created
      equal: deep learning with importance sampling", ICML 2018, section 3.1.
    """

    def select(key: Array, logits: Array, k: int) -> Array:
        cumulative = jnp.cumsum(jax.nn.softmax(_flat_without_scores(logits)))
        draws = jax.random.uniform(key, (k,), logits.dtype) * cumulative[-1]
        found = jnp.searchsorted(cumulative, draws, side="right")
        return jnp.minimum(found, logits.shape[0] - 1).astype(jnp.int32)

    rule = _temperature_rule(temperature, min_effective_fraction, max_spread)
    weigh = _inverse_chances if unbiased else None
    return _scoped(Filter(select, rule, scope, "importance", weigh, proportional=True), shards)


def top_k(
    *,
    temperature: float = 1.0,
    min_effective_fraction: float = 0.0,
    max_spread: float | None = None,
    scope: Scope = "global",
    shards: int = 1,
) -> Filter:
    """Keep the rows with the largest logits, without randomness.

    Arguments as `gumbel_top_k`.

    The temperature does not change what is kept, only the weights in the α-gradient. Grangier et al., section 4.3, filter (b).
    """
    rule = _temperature_rule(temperature, min_effective_fraction, max_spread)
    return _scoped(Filter(lambda key, logits, k: jax.lax.top_k(logits, k)[1], rule, scope, "top_k", caps=True), shards)


def top_fraction(fraction: float, *, scope: Scope = "global", shards: int = 1) -> Filter:
    """Draw with equal chances among a fixed share of rows with the largest logits.

    Without replacement.

    Args:
      fraction: the share of the B rows that are drawn from, in (0, 1]; at least k of them are.
      scope: see `Filter`.
      shards: as for `gumbel_top_k`.

    Raises:
      UserError: for a fraction out of range.

    Reference: Grangier et al., section 5.1 (the generic set restricted to the rows that a classifier ranks highest).
    """
    if not 0 < fraction <= 1:
        raise UserError(f"top_fraction({fraction}) must lie in (0, 1]: the share of rows to draw from.")

    def select(key: Array, logits: Array, k: int) -> Array:
        values, highest = jax.lax.top_k(logits, max(k, round(fraction * logits.shape[0])))
        drawn = jnp.where(values > -jnp.inf, jax.random.uniform(key, highest.shape), -1.0)
        return highest[jax.lax.top_k(drawn, k)[1]]

    return _scoped(Filter(select, lambda logits: jnp.ones(()), scope, "top_fraction", caps=True), shards)


def threshold(value: float, *, scope: Scope = "global", shards: int = 1) -> Filter:
    """Draw with equal chances among the rows with a logit above a value.

    Without replacement.

    For logits whose scale means something, such as those of a domain classifier: above 0 a row is more likely specific than
    generic. If fewer than k rows are above it, these are all kept, and the highest of the others follow.

    Args:
      value: finite.
      scope: see `Filter`.
      shards: as for `gumbel_top_k`.

    Raises:
      UserError: if the value is not finite.

    Reference: Grangier et al., section 5.1.
    """
    if not math.isfinite(value):
        raise UserError(f"threshold({value}) must be a finite number: rows with a logit above it are drawn.")

    def select(key: Array, logits: Array, k: int) -> Array:
        drawn = jax.random.uniform(
            key, logits.shape, logits.dtype
        )  # at least 0, and those below the value less than that
        return jax.lax.top_k(jnp.where(logits > value, drawn, logits - value - 1.0), k)[1]

    return _scoped(Filter(select, lambda logits: jnp.ones(()), scope, "threshold", caps=True), shards)


def uniform(*, scope: Scope = "global", shards: int = 1) -> Filter:
    """Draw without replacement and without regard to the logits: the control."""

    def select(key: Array, logits: Array, k: int) -> Array:
        return jax.lax.top_k(jax.random.uniform(key, logits.shape), k)[1]

    return _scoped(Filter(select, lambda logits: jnp.ones(()), scope, "uniform"), shards)


def one_of_group(
    group: str = "group",
    *,
    temperature: float = 1.0,
    min_effective_fraction: float = 0.0,
    max_spread: float | None = None,
    scope: Scope = "global",
    shards: int = 1,
) -> Filter:
    """Draw one row of each group, then k of the groups.

    In a group, row i is drawn in proportion to exp(s_i), s the logits: p(i|y_j) of multilingual DDS, where a group is the rows
    with one target sentence y_j. Groups are then drawn uniformly, without replacement; if there are k, all are kept. If there are
    fewer, rows that lost follow, by s plus the noise they lost with: give big batches of at least k groups. The weights of the
    α-gradient are a softmax over the k rows, of all groups together.

    Args:
      group: the array of the big batch, a dict, that holds the number of each row's group, integer `[B]`.
      temperature: as for `gumbel_top_k`, like `min_effective_fraction`, `max_spread`, `scope` and `shards`.
      min_effective_fraction: see there.
      max_spread: see there.
      scope: see there. Groups that lie on several devices count once for each with scope "local".
      shards: see there.

    Raises:
      UserError: for a value out of range, now; for a big batch without that array, when traced.

    Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, section 3.2: one language a target.
    """

    def groups(batch: Batch) -> Array:
        if not isinstance(batch, dict) or group not in batch:
            found = ", ".join(batch) if isinstance(batch, dict) else f"no dict, but a {type(batch).__name__}"
            raise UserError(
                f"The filter one_of_group needs the array {group!r} in the big batch, which has: {found}. Add it, or name one."
            )
        return batch[group]

    def select(key: Array, logits: Array, k: int, members: Array) -> Array:
        for_rows, for_groups = jax.random.split(key)
        noisy = logits + jax.random.gumbel(for_rows, logits.shape, logits.dtype)
        order = jnp.lexsort((-noisy, members))
        sorted_members = members[order]
        first = jnp.concatenate([jnp.ones(1, bool), sorted_members[1:] != sorted_members[:-1]])
        won = jnp.zeros(logits.shape, bool).at[order].set(first) & (logits > -jnp.inf)
        # Winners by chance, in [1, 2); the others behind them by their noisy logits, rows without a score last.
        ranks = jnp.argsort(jnp.argsort(noisy)) / logits.shape[0]
        return jax.lax.top_k(jnp.where(won, 1.0 + jax.random.uniform(for_groups, logits.shape), ranks), k)[1]

    rule = _temperature_rule(temperature, min_effective_fraction, max_spread)
    return _scoped(Filter(select, rule, scope, "one_of_group", groups=groups), shards)


def usable(logits: Array) -> Array:
    """Give rows whose logit is no number, or +∞, the logit −∞."""
    return jnp.where(jnp.isfinite(logits), logits, -jnp.inf)


def effective_sample_size(logits: Array) -> Array:
    """Compute (Σw)²/Σw² of the softmax of `[B]` logits.

    It lies between 1 (one row has all the weight) and B (uniform).
    """
    logits = logits - jnp.max(logits)  # a large common offset would cost digits
    return jnp.exp(2.0 * jax.nn.logsumexp(logits) - jax.nn.logsumexp(2.0 * logits))


def temperature_for(logits: Array, smallest: float, min_effective_size: float | Array) -> Array:
    """Find the smallest τ at which logits/τ have an effective sample size.

    That size is `min_effective_size`, and τ ≥ `smallest`.

    The effective sample size grows with τ, so bisection on log τ finds it: 24 halvings of a range of e²⁰ (more, if the logits
    spread over more than `smallest`) leave 1e-6.
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = effective_sample_size(logits / (smallest * jnp.exp(middle))) >= min_effective_size
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    zero = jnp.where(True, 0.0, logits[0]).astype(logits.dtype)  # varies over a mapped axis as the logits do
    spread = jnp.max(logits) - jnp.min(logits, where=logits > -jnp.inf, initial=jnp.inf)
    top = zero + 20.0 + jnp.log(jnp.maximum(spread / smallest, 1.0))
    _, high = jax.lax.fori_loop(0, 24, halve, (zero, top))
    enough = effective_sample_size(logits / smallest) >= min_effective_size
    return smallest * jnp.exp(jnp.where(enough, 0.0, high))


def _temperature_rule(
    temperature: float, min_effective_fraction: float, max_spread: float | None
) -> Callable[[Array], Array]:
    if temperature <= 0:
        raise UserError(f"The filter's temperature={temperature} must be positive: 1 leaves the logits as they are.")
    if not 0 <= min_effective_fraction < 1:
        raise UserError(
            f"The filter's min_effective_fraction={min_effective_fraction} must lie in [0, 1); 0 switches it off."
        )
    if max_spread is not None and max_spread <= 0:
        raise UserError(f"The filter's max_spread={max_spread} must be positive, or None for no bound.")

    def rule(logits: Array) -> Array:
        logits = jax.lax.stop_gradient(logits)
        value = jnp.full((), temperature, logits.dtype)
        takes_part = logits > -jnp.inf
        if max_spread is not None:
            value = jnp.maximum(
                value, (jnp.max(logits) - jnp.min(logits, where=takes_part, initial=jnp.inf)) / max_spread
            )
        if min_effective_fraction > 0:
            needed = temperature_for(logits, temperature, min_effective_fraction * jnp.sum(takes_part))
            value = jnp.maximum(value, needed)
        return value

    return rule


def _inverse_chances(logits: Array, positions: Array) -> Array:
    """1/(B w_i) of the rows at the positions, w the softmax of `[B]` logits."""
    return jnp.exp(-jax.nn.log_softmax(_flat_without_scores(logits))[positions]) / logits.shape[0]


def _flat_without_scores(logits: Array) -> Array:
    """The logits; all alike where no row has a score, as rows must be drawn all the same."""
    return jnp.where(jnp.max(logits) > -jnp.inf, logits, 0.0)


def _of_usable(rule: Filter) -> Filter:
    """The rule with `usable` logits."""
    weigh = rule.weigh
    return rule._replace(
        select=lambda key, logits, k, *groups: rule.select(key, usable(logits), k, *groups),
        temperature=lambda logits: rule.temperature(usable(logits)),
        weigh=weigh and (lambda logits, positions: weigh(usable(logits), positions)),
    )


def _scoped(rule: Filter, shards: int) -> Filter:
    if rule.scope not in ("global", "local"):
        raise UserError(f'The filter\'s scope is "{rule.scope}"; it must be "global" or "local".')
    if shards < 1 or (shards > 1 and rule.scope == "global"):
        raise UserError(
            f'shards={shards} with scope="{rule.scope}": give a positive number of shards, and scope="local" for more than 1.'
        )
    rule = _of_usable(rule)
    if shards == 1:
        return rule

    def select(key: Array, logits: Array, k: int, *members: Array) -> Array:
        size = logits.shape[0]
        if size % shards or k % shards:
            raise UserError(
                f"A local filter over {shards} shards cannot divide {size} rows into {k} equally: make both multiples."
            )
        apart = [x.reshape(shards, size // shards) for x in (logits, *members)]
        inside = jax.vmap(lambda i, row, *of: rule.select(jax.random.fold_in(key, i), row, k // shards, *of))(
            jnp.arange(shards), *apart
        )
        offsets = jnp.arange(shards, dtype=inside.dtype)[:, None] * (size // shards)
        return (inside + offsets).reshape(-1)

    def weigh(logits: Array, positions: Array) -> Array:
        assert rule.weigh is not None
        size = logits.shape[0] // shards
        inside = (positions % size).reshape(shards, -1)
        return jax.vmap(rule.weigh)(logits.reshape(shards, size), inside).reshape(-1)

    return rule._replace(select=select, weigh=rule.weigh and weigh, shards=shards)
