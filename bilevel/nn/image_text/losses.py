"""The losses of images and captions: the right caption among past ones, and among those of all classes.

    ℓ_gen,i  = −log [ e^{τ⟨f_i, g(e_i)⟩} / ( e^{τ⟨f_i, g(e_i)⟩} + Σ_{q: caption(q) ≠ caption(i)} e^{τ⟨f_i, g(e_q)⟩} ) ]
    ℓ_spec,i = −log softmax_c( τ⟨f_i, g(e_c)⟩ )[label_i]

with e_q the embeddings of the captions before the batch (`bilevel.data.PastLoader`). They are embedded anew by today's θ and
carry its gradient. From images to captions alone, and without negatives from the same batch: these would couple its rows, and
the derivative of a row's loss would not be that row's effect.

Reference: ATD, section 5.4 ("for the generic loss, we consider a buffer of past captions as negatives; for the specific loss, we
consider all the other class captions as negatives").
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from numpy.typing import ArrayLike

from bilevel import trees
from bilevel.nn.classification import Prepare
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, Shared, UserError


def caption_losses(images: Array, texts: Array, negatives: Array, counts: Array, scale: Array) -> tuple[Array, Array]:
    """Compute ℓ_gen from embeddings.

    Args:
      images: f, `[b, w]`.
      texts: g of the rows' own captions, `[b, w]`.
      negatives: g of the captions to compare with, `[K, w]`.
      counts: bool `[b, K]`: whether a row is compared with that caption. A row without any has the loss 0.
      scale: τ.

    Returns:
      The losses `[b]`; and whether the own caption has the largest score, bool `[b]`.
    """
    own = scale * jnp.sum(images * texts, axis=1, keepdims=True)
    scores = jnp.where(counts, scale * images @ negatives.T, -jnp.inf)
    losses = jax.nn.logsumexp(jnp.concatenate([own, scores], axis=1), axis=1) - own[:, 0]
    return losses, own[:, 0] > jnp.max(scores, axis=1)


def class_losses(images: Array, class_texts: Array, labels: Array, scale: Array) -> tuple[Array, Array]:
    """Compute ℓ_spec from embeddings.

    Args:
      images: f, `[b, w]`.
      class_texts: g of the captions of classes, `[C, w]`.
      labels: integer `[b]`.
      scale: τ.

    Returns:
      The losses `[b]`, meaningless for negative labels; and whether the label has the largest score, bool `[b]`.
    """
    scores = scale * images @ class_texts.T
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels), jnp.argmax(scores, axis=1) == labels


def image_text_loss(
    module: nn.Module,
    class_texts: ArrayLike | None = None,
    *,
    train: bool = True,
    prepare: Prepare | None = None,
    past: str = "past",
) -> LossFn:
    """Make the loss of rows of both kinds: ℓ_spec where there is a label (`label` ≥ 0), else ℓ_gen.

    A batch has `image` `[b, H, W, C]`, `text` `[b, d]`, `caption` integer `[b]` (equal for equal captions), `label` integer
    `[b]`, and the captions before it as `PastLoader` gives them: `Shared` arrays `text` `[K, d]`, `caption` `[K]` and `real` bool
    `[K]`. A row is not compared with its own caption, nor with places that are not real.

    Args:
      module: an `ImageText`.
      class_texts: embeddings of the captions of classes, `[C, d]`; None: all rows have ℓ_gen.
      train: BatchNorm normalises by the batch and moves its statistics; False uses the statistics.
      prepare: what is done to the images on the device, with the key of the call; see `bilevel.nn.augment.preparation`.
      past: name of the captions before the batch.

    Returns:
      A loss whose metrics are `correct`, float32 `[b]`: 1 where the right caption has the largest score.

    Raises:
      UserError: when traced, if the batch brings no past along.
    """
    towers = _Towers(module, train, prepare)

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        before = _past(batch, past)
        given = [batch["text"], before["text"], *([] if class_texts is None else [class_texts])]
        images, (own, negatives, *classes), scale, model_state = towers(params, model_state, batch, rng, given)
        counts = before["real"] & (before["caption"] != batch["caption"][:, None])
        losses, correct = caption_losses(images, own, negatives, counts, scale)
        for embedded in classes:
            labels = batch["label"].astype(jnp.int32)
            of_class, right = class_losses(images, embedded, labels, scale)
            losses, correct = jnp.where(labels >= 0, of_class, losses), jnp.where(labels >= 0, right, correct)
        return losses, LossAux(model_state, {"correct": correct.astype(jnp.float32)})

    return loss


def class_caption_loss(
    module: nn.Module, class_texts: ArrayLike, *, train: bool = True, prepare: Prepare | None = None
) -> LossFn:
    """Make the loss of specific rows, ℓ_spec. With `train=False` it is zero-shot classification by class captions.

    A batch has `image` `[b, H, W, C]` and `label` integer `[b]`, from 0 to C − 1; a row with another label has the loss NaN.

    Args:
      module: an `ImageText`.
      class_texts: embeddings of the captions of classes, `[C, d]`.
      train: as for `image_text_loss`.
      prepare: as for `image_text_loss`.

    Returns:
      A loss whose metrics are `correct`, float32 `[b]`: 1 where the caption of the label has the largest score.
    """
    towers = _Towers(module, train, prepare)

    def loss(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        images, (classes,), scale, model_state = towers(params, model_state, batch, rng, [class_texts])
        labels = batch["label"].astype(jnp.int32)
        losses, correct = class_losses(images, classes, labels, scale)
        losses = jnp.where(labels >= 0, losses, jnp.nan)
        return losses, LossAux(model_state, {"correct": correct.astype(jnp.float32)})

    return loss


def with_past(loss: LossFn, arrays: Any, *, past: str = "past", always: bool = True) -> LossFn:
    """Give all batches of a loss the same past, for what is compared by the same negatives, such as losses of two models.

    Args:
      loss: an `image_text_loss`.
      arrays: those of a `Shared` past.
      past: its name.
      always: False gives it to batches that bring none along alone.
    """

    def wrapped(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        if always or past not in batch:
            batch = {**batch, past: Shared(arrays)}
        return loss(params, model_state, batch, rng)

    return wrapped


class _Towers:
    """Applies both towers at once, to all texts of a loss."""

    def __init__(self, module: nn.Module, train: bool, prepare: Prepare | None):
        self._module, self._train, self._prepare = module, train, prepare

    def __call__(
        self, params: Params, model_state: ModelState, batch: Batch, rng: Array, texts: list[Any]
    ) -> tuple[Array, list[Array], Array, ModelState]:
        """f `[b, w]`, g of each of the texts, τ, and the new model state."""
        images = batch["image"] if self._prepare is None else self._prepare(batch["image"], rng)
        together = jnp.concatenate([trees.widen(jnp.asarray(text)) for text in texts])
        variables = {"params": params, **model_state}
        found: Any = self._module.apply(
            variables, images, together, train=self._train, mutable=list(model_state) if self._train else False
        )
        if self._train:
            found, changed = found
            model_state = trees.in_structure({**model_state, **changed}, model_state)
        embedded, parts = found[1], []
        for text in texts:
            parts.append(embedded[: len(text)])
            embedded = embedded[len(text) :]
        return found[0], parts, found[2], model_state


def _past(batch: Batch, name: str) -> dict[str, Array]:
    if not isinstance(batch, dict) or not isinstance(batch.get(name), Shared):
        there = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise UserError(
            f"The batch brings no captions {name!r} to compare with (it has: {there}): load it by bilevel.data.PastLoader, give "
            "the loss a fixed past by with_past, or take class_caption_loss for rows that all have labels."
        )
    return batch[name].arrays
