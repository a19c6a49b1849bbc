"""Small image networks without BatchNorm: a convolutional one in the manner of LeNet, and a perceptron.

Reference: RHO-LOSS, sections 5 and 5.3, which says "a 3 layer MLP" and "a small CNN reminiscent of LeNet" with 21 times fewer
parameters than ResNet-18. The sizes are not in the paper; those here are of its authors' published code.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bilevel.nn.image_layers import Head, checked_images, max_pool
from bilevel.types import Array


class SmallCNN(nn.Module):
    """3 × 3 convolutions, each with ReLU and a max pool, then hidden layers and a linear classifier.

    Raises:
      UserError: when it is applied, for images too small for that many pools.
    """

    num_classes: int = 10
    features: tuple[int, ...] = (64, 128, 256)
    hidden: tuple[int, ...] = (128, 256)
    pad: bool = False
    """Pad the convolutions, so that they keep the size of the image: for images smaller than 22 × 22 pixels."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters and logits stay float32."""

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images, floating-point `[b, H, W, C]` -> logits, float32 `[b, num_classes]`; `train` changes nothing."""
        del train
        x = checked_images(images, self.dtype, at_least=self._smallest())
        for i, features in enumerate(self.features):
            padding = "SAME" if self.pad else "VALID"
            x = nn.relu(nn.Conv(features, (3, 3), padding=padding, dtype=self.dtype, name=f"conv_{i}")(x))
            x = max_pool(x)
        return _perceptron(x, self.hidden, self.num_classes, self.dtype)

    def _smallest(self) -> int:
        """The smallest image that leaves a pixel after the last pool."""
        size = 1
        for _ in self.features:
            size = 2 * size + (0 if self.pad else 2)
        return size


class MLP(nn.Module):
    """A perceptron over the flattened image: three hidden layers of 512 rectified units and a linear classifier."""

    num_classes: int = 10
    hidden: tuple[int, ...] = (512, 512, 512)
    dtype: Any = jnp.float32
    """Type of the computation; parameters and logits stay float32."""

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Images `[b, H, W, C]` or features `[b, d]`, floating-point -> logits, float32 `[b, num_classes]`."""
        del train
        x = inputs[:, None, None, :] if inputs.ndim == 2 else inputs
        return _perceptron(checked_images(x, self.dtype), self.hidden, self.num_classes, self.dtype)


def _perceptron(x: Array, hidden: tuple[int, ...], num_classes: int, dtype: Any) -> Array:
    """Hidden layers and the classifier, as submodules of the module whose call this is part of."""
    x = x.reshape(x.shape[0], -1)
    for i, units in enumerate(hidden):
        x = nn.relu(nn.Dense(units, dtype=dtype, name=f"hidden_{i}")(x))
    return Head(num_classes, name="head")(x)
