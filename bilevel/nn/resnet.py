"""Post-activation residual networks: ResNet-18 and ResNet-50 for ImageNet or CIFAR, ResNet-20 for CIFAR.

Reference: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016. Users: Wang et al. 2020,
appendix A.4 (ResNet-50); RLSampler, appendix B (ResNet-20); RHO-LOSS, section 5 (ResNet-18).
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from bilevel.nn.image_layers import Head, Layers, Stem, check_stem, checked_images, max_pool
from bilevel.types import Array

Shortcut = Literal["projection", "pad"]


class ResidualBlock(nn.Module):
    """Convolutions, each followed by BatchNorm, added to the shortcut, then rectified: `[b, H, W, C]` -> `[b, H', W', C']`.

    A plain block has two 3 × 3 convolutions; a bottleneck has 1 × 1, 3 × 3 (which takes the stride) and 1 × 1 to four times
    the width.
    """

    width: int
    stride: int
    bottleneck: bool
    shortcut: Shortcut
    layers: Layers

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Apply the block."""
        conv, norm = self.layers.conv, self.layers.norm
        if self.bottleneck:
            h = nn.relu(norm("norm_0")(conv(self.width, 1, name="conv_0")(x)))
            h = nn.relu(norm("norm_1")(conv(self.width, 3, self.stride, name="conv_1")(h)))
            h = norm("norm_2")(conv(4 * self.width, 1, name="conv_2")(h))
        else:
            h = nn.relu(norm("norm_0")(conv(self.width, 3, self.stride, name="conv_0")(x)))
            h = norm("norm_1")(conv(self.width, name="conv_1")(h))
        return nn.relu(h + self._shortcut(x, h.shape[-1]))

    def _shortcut(self, x: Array, features: int) -> Array:
        """The input, in the shape of the output: options A ("pad") and B ("projection") of He et al., section 3.3."""
        if self.stride == 1 and x.shape[-1] == features:
            return x
        if self.shortcut == "projection":
            projected = self.layers.conv(features, 1, self.stride, name="shortcut")(x)
            return self.layers.norm("shortcut_norm")(projected)
        missing = features - x.shape[-1]
        every = x[:, :: self.stride, :: self.stride]
        return jnp.pad(every, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class ResNet(nn.Module):
    """A stem, stages of residual blocks (each after the first halves the image), the mean over pixels, a linear classifier."""

    stages: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...]
    """Width of each stage; a bottleneck's output has four times as many channels."""
    num_classes: int | None
    """None: without a classifier, what the network gives is the mean over pixels, float32 `[b, channels]`."""
    bottleneck: bool = False
    shortcut: Shortcut = "projection"
    stem: Stem = "cifar"
    """"imagenet": 7 × 7 with stride 2 and a max pool; "cifar": 3 × 3."""
    dtype: Any = jnp.float32
    """Type of the computation; parameters, statistics and logits stay float32."""
    axis_name: str | None = None
    """Mapped axis (of `shard_map` or `pmap`) over which BatchNorm takes its means; None: each device its own."""

    def __post_init__(self) -> None:
        check_stem(self.stem)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images, floating-point `[b, H, W, C]` -> logits, float32 `[b, num_classes]`."""
        layers = Layers(self.dtype, train, self.axis_name)
        x = checked_images(images, self.dtype)
        if self.stem == "imagenet":
            x = nn.relu(layers.norm("stem_norm")(layers.conv(self.widths[0], 7, 2, name="stem")(x)))
            x = max_pool(x, 3, 2, 1)
        else:
            x = nn.relu(layers.norm("stem_norm")(layers.conv(self.widths[0], name="stem")(x)))
        for i, (blocks, width) in enumerate(zip(self.stages, self.widths, strict=True)):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                block = ResidualBlock(
                    width, stride, self.bottleneck, self.shortcut, layers, name=f"stage_{i}_block_{j}"
                )
                x = block(x)
        pooled = jnp.mean(x, axis=(1, 2))
        return pooled.astype(jnp.float32) if self.num_classes is None else Head(self.num_classes, name="head")(pooled)


def resnet18(
    num_classes: int | None = 10, *, stem: Stem = "cifar", dtype: Any = jnp.float32, axis_name: str | None = None
) -> ResNet:
    """ResNet-18 (He et al., table 1), by default with a 3 × 3 stem for images of 32 × 32 pixels.

    Raises:
      UserError: the stem is not known.
    """
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes, stem=stem, dtype=dtype, axis_name=axis_name)


def resnet20(num_classes: int | None = 10, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> ResNet:
    """ResNet-20 for CIFAR with parameter-free shortcuts (He et al., section 4.2, n = 3)."""
    return ResNet((3, 3, 3), (16, 32, 64), num_classes, shortcut="pad", dtype=dtype, axis_name=axis_name)


def resnet8(num_classes: int | None = 10, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> ResNet:
    """ResNet-8, the smallest of that kind (n = 1): a block a stage."""
    return ResNet((1, 1, 1), (16, 32, 64), num_classes, shortcut="pad", dtype=dtype, axis_name=axis_name)


def resnet50(
    num_classes: int | None = 1000, *, stem: Stem = "imagenet", dtype: Any = jnp.float32, axis_name: str | None = None
) -> ResNet:
    """ResNet-50 (He et al., table 1) with the stride in the 3 × 3 convolutions, as now usual.

    Raises:
      UserError: the stem is not known.
    """
    return ResNet(
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        num_classes,
        bottleneck=True,
        stem=stem,
        dtype=dtype,
        axis_name=axis_name,
    )
