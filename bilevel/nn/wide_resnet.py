"""Pre-activation wide residual networks for images of 32 × 32 pixels: WRN-28-k.

Reference: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016. Users: Wang et al. 2020, section 4.1 (WRN-28-2 and
WRN-28-10); RLSampler, table 6.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bilevel.nn.image_layers import Head, Layers, checked_images
from bilevel.types import Array, UserError


class PreActivationBlock(nn.Module):
    """Twice BatchNorm, ReLU, 3 × 3 convolution, added to the shortcut: `[b, H, W, C]` -> `[b, H', W', width]`.

    Where the shape changes, the shortcut is a 1 × 1 convolution of the normalised and rectified input.
    """

    width: int
    stride: int
    dropout: float
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply the block."""
        conv, norm = self.layers.conv, self.layers.norm
        active = nn.relu(norm("norm_0")(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = conv(self.width, 1, self.stride, name="shortcut")(active)
        h = nn.relu(norm("norm_1")(conv(self.width, 3, self.stride, name="conv_0")(active)))
        h = nn.Dropout(self.dropout)(h, deterministic=not self.layers.train)
        return x + conv(self.width, name="conv_1")(h)


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth − 4)/6 pre-activation blocks with 16, 32 and 64 times `width` channels.

    Raises:
      UserError: the depth is not 6n + 4, or the width is below 1.
    """

    depth: int = 28
    width: int = 10
    num_classes: int = 10
    dropout: float = 0.0
    """Between the convolutions of a block; needs the random stream `dropout` while training."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, statistics and logits stay float32."""
    axis_name: str | None = None
    """Mapped axis (of `shard_map` or `pmap`) over which BatchNorm takes its means; None: each device its own."""

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UserError(
                f"The depth {self.depth} of a wide ResNet must be 6n + 4, such as 10, 16, 22 or 28 (--model.network wrn28-2)."
            )
        if self.width < 1:
            raise UserError(
                f"The width {self.width} of a wide ResNet must be at least 1, as in WRN-28-2 (--model.network wrn28-2)."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images, floating-point `[b, H, W, C]` -> logits, float32 `[b, num_classes]`."""
        layers = Layers(self.dtype, train, self.axis_name)
        x = layers.conv(16, name="stem")(checked_images(images, self.dtype))
        for i in range(3):
            for j in range((self.depth - 4) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage_{i}_block_{j}"
                x = PreActivationBlock(16 * 2**i * self.width, stride, self.dropout, layers, name=name)(x)
        x = nn.relu(layers.norm("final_norm")(x))
        return Head(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))
