"""Scores from a forward pass of the model: loss, gradient norm, uncertainty."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.selection.scorers import Scorer, model_features, of_losses
from bilevel.types import Array, Batch, LossFn, Metrics, UserError


def train_loss(loss: LossFn, *, micro_batches: int = 1) -> Scorer:
    """Score rows by their loss, ℓ_i(θ).

    Args:
      loss: that of `make_step`, or another over the same parameters (`scoring_loss`).
      micro_batches: score the big batch in this many equal parts, one after the other, to save memory.

    Reference: Loshchilov and Hutter, "Online batch selection for faster training of neural networks", 2015; Kawaguchi and Lu,
      "Ordered SGD", AISTATS 2020 (top-k of the losses).
    """
    return of_losses(loss, lambda weights, batch, losses: losses, micro_batches=micro_batches)


def gradient_norm(
    loss: LossFn, *, label: str = "label", hidden: bool = True, bias: bool = True, micro_batches: int = 1
) -> Scorer:
    """Score rows by the norm of their gradient in the last layer.

    That of their cross-entropy, in closed form: no backward pass.

    Args:
      loss: a softmax cross-entropy over labels, with `logits` (and `hidden`) in its metrics, which `bilevel.nn.head.with_head`
        adds.
      label: name of the labels in the batch, integer `[B]`.
      hidden: False takes the gradient in the logits, ‖p − e_y‖, which needs no `hidden`: Katharopoulos and Fleuret's bound.
      bias: the last layer has one.
      micro_batches: see `train_loss`.

    Raises:
      UserError: when traced, if the loss gives no `logits` or `hidden`.

    Reference: Katharopoulos and Fleuret, ICML 2018, section 3.2; RHO-LOSS, section 5, baselines ("last layer gradient norm").
    """

    def read(losses: Array, metrics: Metrics, batch: Batch) -> Array:
        inputs = _metric(metrics, "hidden") if hidden else None
        return last_layer_gradient_norms(_metric(metrics, "logits"), batch[label], inputs, bias=bias)

    return Scorer(model_features(loss, read, micro_batches=micro_batches), lambda weights, batch, norms: norms)


def log_gradient_norm(
    loss: LossFn, *, label: str = "label", hidden: bool = True, bias: bool = True, micro_batches: int = 1
) -> Scorer:
    """Score rows by the logarithm of `gradient_norm`.

    With `filters.importance(unbiased=True)` draws are in proportion to the norm.

    The θ-update then has the weights 1/(B p_i b) and is unbiased for the mean gradient of the big batch. Katharopoulos and
    Fleuret begin so only once the variance falls enough to pay; here it is done from the first step, as in RHO-LOSS.
    """
    scorer = gradient_norm(loss, label=label, hidden=hidden, bias=bias, micro_batches=micro_batches)
    # A norm of 0 would be a row that can never be drawn, and B of them nothing to draw from.
    return scorer._replace(
        logits=lambda weights, batch, norms: jnp.log(jnp.maximum(norms, jnp.finfo(norms.dtype).tiny))
    )


def entropy(loss: LossFn, *, micro_batches: int = 1) -> Scorer:
    """Score rows by the entropy of the model's prediction.

    It is large where the model is unsure, whatever the label.

    Args:
      loss: one with `logits` in its metrics: `bilevel.nn.head.with_head` adds them.
      micro_batches: see `train_loss`.

    Raises:
      UserError: when traced, if the loss gives no `logits`.

    Reference: Coleman et al., "Selection via proxy", ICLR 2020, section 3: there by a small model that is trained first
      (`frozen_proxy`), and before training starts (`bilevel.offline.irreducible.score_rows` with `entropies`,
      then `by_id` or `highest`).
    """
    read = lambda losses, metrics, batch: entropies(_metric(metrics, "logits"))  # noqa: E731
    return Scorer(model_features(loss, read, micro_batches=micro_batches), lambda weights, batch, found: found)


def last_layer_gradient_norms(logits: Array, labels: Array, hidden: Array | None = None, *, bias: bool = True) -> Array:
    """Compute norms of gradients of cross-entropies in the last layer z = Wh + c.

    With p = softmax(z), ∂ℓ/∂z = p − e_y, so ∂ℓ/∂W = (p − e_y) hᵀ and ∂ℓ/∂c = p − e_y: the norm over both is

        ‖p − e_y‖ · √(‖h‖² + 1),

    without the 1 if there is no c. The penultimate layer's derivative is bounded by a multiple of ‖p − e_y‖.

    Args:
      logits: z, `[b, C]`.
      labels: y, integer `[b]`.
      hidden: h, `[b, d]`; None gives ‖p − e_y‖.
      bias: whether there is a c.

    Returns:
      `[b]`, in at least float32.
    """
    logits = trees.widen(logits)
    error = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    norms = jnp.sqrt(jnp.sum(error**2, axis=-1))
    if hidden is None:
        return norms
    return norms * jnp.sqrt(jnp.sum(trees.widen(hidden) ** 2, axis=-1) + (1.0 if bias else 0.0))


def entropies(logits: Array) -> Array:
    """Compute −Σ_c p_c log p_c of p = softmax(logits), in nats.

    `[b, C]` -> `[b]`, in at least float32.
    """
    log_p = jax.nn.log_softmax(trees.widen(logits))
    return -jnp.sum(jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0), axis=-1)


def _metric(metrics: Metrics, name: str) -> Array:
    if name not in metrics:
        found = ", ".join(metrics) or "none"
        raise UserError(
            f'This score needs "{name}" in the metrics of the loss, which gives {found}: wrap a linen loss in '
            "bilevel.nn.head.with_head, or return it in LossAux.metrics."
        )
    return metrics[name]
