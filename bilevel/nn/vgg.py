"""VGG-16, with and without BatchNorm.

Reference: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015,
configuration D. RLSampler, appendix B, trains it on CIFAR with fully connected layers of 512 units in place of 4096.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bilevel.nn.image_layers import Head, Layers, checked_images, max_pool
from bilevel.types import Array

_CONFIGURATION_D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen 3 × 3 convolutions with a max pool after each group, two hidden layers with dropout, a linear classifier.

    Pixels are flattened, not averaged, before the hidden layers: 32 × 32 images leave 512 numbers, 224 × 224 leave 25,088.
    """

    num_classes: int = 10
    batch_norm: bool = True
    """BatchNorm after every convolution, before its rectifier."""
    hidden: int = 512
    """Units of the two hidden layers: 512 for CIFAR (RLSampler), 4096 for ImageNet."""
    dropout: float = 0.5
    """After each hidden layer; needs the random stream `dropout` while training."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, statistics and logits stay float32."""
    axis_name: str | None = None
    """Mapped axis (of `shard_map` or `pmap`) over which BatchNorm takes its means; None: each device its own."""

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images, floating-point `[b, H, W, C]` of at least 32 × 32 pixels -> logits, float32 `[b, num_classes]`."""
        layers = Layers(self.dtype, train, self.axis_name)
        x = checked_images(images, self.dtype, at_least=32)
        for i, widths in enumerate(_CONFIGURATION_D):
            for j, width in enumerate(widths):
                x = layers.conv(width, name=f"conv_{i}_{j}", use_bias=True)(x)
                x = nn.relu(layers.norm(f"norm_{i}_{j}")(x) if self.batch_norm else x)
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for i in range(2):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=f"hidden_{i}")(x))
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return Head(self.num_classes, name="head")(x)
