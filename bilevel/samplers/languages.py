"""Samplers of translation pairs from many source languages: multilingual DDS, and fixed chances of the languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel import trees
from bilevel.samplers.base import Sampler, check_sizes
from bilevel.samplers.language_learning import Learning, Similarity, SpecificRows
from bilevel.samplers.language_rounds import Drawing, ends
from bilevel.samplers.language_scorer import ESTIMATORS, Estimator, among, checked_logits
from bilevel.types import Array, Params, UserError


def multilingual_dds(
    rows: Any,
    num_rows: int,
    batch_size: int,
    params: Params,
    specific: int,
    *,
    names: Sequence[str] | None = None,
    targets_per_round: int = 20_000,
    scorer_steps: int = 1,
    scorer_batch_size: int = 160,
    gradient_decay: float = 0.5,
    gradient_scale: float = 1.0,
    similarity: Similarity = "cosine",
    reward_scale: float = 0.001,
    estimator: Estimator = "sum",
    specific_rows: SpecificRows = "dev",
    units: int = 64,
    temperature: float = 1.0,
    learning_rate: float = 1e-4,
    optimizer: optax.GradientTransformation | None = None,
    param_filter: Callable[[str], bool] | None = None,
    gradient_dtype: Any = jnp.float32,
) -> Sampler:
    """Draw one source language for each target sentence, by a scorer that learns which languages help a specific one, S.

    A round takes the next K targets of a permutation of all (a new one each epoch), and draws a language i ~ p(·|y_j) for each,
    see `language_scorer`. The pairs are trained on in minibatches of one language:

        g_i ← α₁ g_i + α₂ ∇ℓ(θ_{t−1})                                    each minibatch, for its language i
        r_i = scale · cos(g_i, g_S), or scale · ⟨g_i, g_S⟩                at the end of a round; 0 if g_i or g_S is 0
        ψ ← Adam(ψ, (1/B) Σ_j Σ_{i available} r_i ∇ log p(i|y_j))         then E times, each on B targets drawn uniformly

    g_S is the gradient of the mean loss of S's dev rows at the θ that the round ends with: all validation rows of the sampled
    step. Memory: n gradients.

    Where the paper leaves a choice:
      * a minibatch that is the last of its language in the round is as large as the pairs that are left; its loss is their mean;
      * the minibatches of a round come in random order;
      * a language that no minibatch had so far has g_i = 0, and so r_i = 0;
      * K, B, E, α₁, α₂ and the scale are those of its authors' public code, as read; the perceptron's units are ours.

    Args:
      rows: int `[T, n]`: the row of target j in language i, −1 where there is none (`bilevel.data.pairs_by_target`).
      num_rows: N, rows of the data.
      batch_size: b.
      params: θ, or its shapes.
      specific: S, a column of `rows`.
      names: of the languages, for metrics; None: their numbers.
      targets_per_round: K ≤ T.
      scorer_steps: E (the authors': 1; after TCS 100).
      scorer_batch_size: B.
      gradient_decay: α₁.
      gradient_scale: α₂.
      similarity: "cosine" or "dot".
      reward_scale: multiplies r_i (the authors': 0.001 and 0.01). Adam divides it out but for its ε.
      estimator: "sum", as above, "positive_sum" or "policy_gradient"; see `scorer_gain`.
      specific_rows: where g_S comes from: S's "dev" rows, or its "train" rows, g_S = g[S] as algorithm 2 writes it.
      units: of the scorer's hidden layer.
      temperature: of the scorer.
      learning_rate: of Adam for ψ, with β₁ = 0.9, β₂ = 0.999, ε = 1e-8.
      optimizer: replaces Adam.
      param_filter: path -> whether gradients of that parameter are kept and compared; None: all.
      gradient_dtype: of the g_i; jnp.bfloat16 halves their memory.

    Returns:
      A sampler, whose `init(rng, params)` takes ψ (`fit_scorer`: TCS + DDS). Metrics, where a round begins: chance/NAME, the mean
      p(i|y_j) over its targets (figures 4 and 5), and drawn/NAME, the share drawn; where one ends: reward/NAME, scorer_gain and
      sampler_gradient_norm (means over the E steps).

    Raises:
      UserError: for values out of range, or a table with a target without rows.

    Reference: Wang et al., "Optimizing Data Usage via Differentiable Rewards", ICML 2020, section 3.2, algorithm 2, appendix A.2.
    """
    table = _checked_table(rows, num_rows, batch_size, targets_per_round)
    labels = _checked_names(names, table.shape[1])
    _check_choices(similarity, estimator, specific_rows)
    if not 0 <= specific < table.shape[1]:
        raise UserError(f"specific={specific} is no column of a table of {table.shape[1]} languages: give one.")
    positive = {"scorer_steps": scorer_steps, "scorer_batch_size": scorer_batch_size, "units": units}
    positive |= {"temperature": temperature, "reward_scale": reward_scale, "gradient_scale": gradient_scale}
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"{name}={value} must be positive.")
    if not 0 <= gradient_decay < 1:
        raise UserError(f"gradient_decay={gradient_decay} must lie in [0, 1): g_i is a running sum.")
    shapes = jax.eval_shape(lambda: params)
    subset = trees.make_subset(param_filter, shapes)
    learning = Learning(
        jnp.asarray(table >= 0), specific, subset, subset.restrict(shapes), scorer_steps, scorer_batch_size,
        gradient_decay, gradient_scale, similarity, reward_scale, estimator, specific_rows, units, temperature,
        optimizer or optax.adam(learning_rate), gradient_dtype, labels,
    )  # fmt: skip
    drawing = Drawing(table, batch_size, targets_per_round, labels, learning.log_chances, learning.init)
    return Sampler(
        drawing.init,
        drawing.draw,
        num_rows,
        batch_size,
        learn=learning.learn,
        pads=True,
        observe_gradient=learning.observe_gradient,
        reward_gradient=learning.reward_gradient if specific_rows == "dev" else None,
        due=ends,
    )


def fixed_languages(
    rows: Any,
    num_rows: int,
    batch_size: int,
    logits: Any = None,
    *,
    names: Sequence[str] | None = None,
    targets_per_round: int = 20_000,
) -> Sampler:
    """Draw one source language for each target by fixed chances: p(i|y_j) = softmax over the available i of logits_i.

    The baselines of multilingual DDS, in its rounds and minibatches of one language:
      * uniform over the languages of each target: no logits;
      * uniform over pairs: no logits, and a table with each pair as a target of its own (`PairsByTarget.apart`);
      * related: no logits, and a table of S and its kin alone (`PairsByTarget.only`);
      * TCS: logits sim(i, S)/τ, the authors' τ = 0.01 (`bilevel.offline.language_similarity`).

    Args:
      rows: as for `multilingual_dds`, like the other arguments.
      num_rows: see there.
      batch_size: see there.
      logits: `[n]`, −∞ for a language that is never drawn; None: all alike.
      names: see there.
      targets_per_round: see there; it changes how often a minibatch is not full.

    Returns:
      A sampler. Metrics: chance/NAME and drawn/NAME.

    Raises:
      UserError: as `multilingual_dds`, or a target has no language with a logit above −∞.

    Reference: Wang and Neubig, "Target conditioned sampling", ACL 2019 (TCS); Wang et al., 2020, section 4.2.
    """
    table = _checked_table(rows, num_rows, batch_size, targets_per_round)
    fixed = jnp.asarray(checked_logits(table, np.zeros(table.shape[1]) if logits is None else logits), jnp.float32)
    labels = _checked_names(names, table.shape[1])

    def init(key: Array, params: Any) -> tuple[None, None, None, None]:
        del key
        if params is not None:
            raise UserError("The sampler fixed_languages has no parameters: omit params.")
        return None, None, None, None

    chances: Callable[[Any, Array], Array] = lambda params, available: among(fixed, available)  # noqa: E731
    drawing = Drawing(table, batch_size, targets_per_round, labels, chances, init)
    return Sampler(drawing.init, drawing.draw, num_rows, batch_size, pads=True)


def _checked_table(rows: Any, num_rows: int, batch_size: int, targets: int) -> np.ndarray:
    check_sizes(num_rows, batch_size)
    table = np.asarray(rows)
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise UserError(
            f"The table of rows has the shape {table.shape} and the type {table.dtype}; it must be integers [targets, languages]."
        )
    if table.min() < -1 or table.max() >= num_rows:
        raise UserError(
            f"The table holds the row numbers {table.min()} to {table.max()}, but num_rows={num_rows}: give the data that it was "
            "made from, and −1 where there is no row."
        )
    empty = np.flatnonzero((table < 0).all(axis=1))
    if empty.size:
        raise UserError(
            f"The table has {empty.size} targets without a row (the first is number {empty[0]}): omit them."
        )
    if not 1 <= targets <= len(table):
        raise UserError(f"targets_per_round={targets} must lie between 1 and the {len(table)} targets of the table.")
    return table.astype(np.int32)


def _checked_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    found = tuple(map(str, range(count))) if names is None else tuple(names)
    if len(found) != count or len(set(found)) != count:
        raise UserError(f"There are {len(set(found))} different names for {count} languages: give one each.")
    return found


def _check_choices(similarity: str, estimator: str, specific_rows: str) -> None:
    choices = {
        "similarity": (similarity, ("cosine", "dot")),
        "estimator": (estimator, ESTIMATORS),
        "specific_rows": (specific_rows, ("dev", "train")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"{name}={value!r} is unknown: choose {' or '.join(known)}.")
