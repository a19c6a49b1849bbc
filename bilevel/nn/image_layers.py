"""What the image networks are made of: convolutions and BatchNorm with one type and one way of normalising a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from bilevel.types import Array, UserError

Stem = Literal["cifar", "imagenet"]

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, equation 14


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one network; to be used inside its compact call."""

    dtype: Any
    """Type of the computation; parameters and statistics stay float32."""
    train: bool
    """Normalise by the batch (and move the statistics) or by the statistics."""
    axis_name: str | None = None
    """Mapped axis over which BatchNorm takes its means."""

    def conv(self, features: int, kernel: int = 3, stride: int = 1, *, name: str, use_bias: bool = False) -> nn.Conv:
        """A convolution, padded by (kernel − 1)/2 on every side, whatever the stride."""
        padding = (kernel - 1) // 2
        return nn.Conv(
            features,
            (kernel, kernel),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            use_bias=use_bias,
            kernel_init=_he_normal,
            dtype=self.dtype,
            name=name,
        )

    def norm(self, name: str) -> nn.BatchNorm:
        """BatchNorm that keeps 0.9 of its statistics at each update."""
        return nn.BatchNorm(
            use_running_average=not self.train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )


def checked_images(images: Array, dtype: Any, *, at_least: int = 1) -> Array:
    """The images in the type of the computation.

    Args:
      images: floating-point `[b, H, W, C]`.
      dtype: type of the computation.
      at_least: the smallest H and W that the network can reduce.

    Raises:
      UserError: the images are integers (not yet normalised), of another rank, or too small.
    """
    if images.ndim != 4:
        raise UserError(f"The images have shape {images.shape}; the network needs [rows, height, width, channels].")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"The images are {images.dtype}; normalise them first, for example with bilevel.nn.augment.standardize."
        )
    if min(images.shape[1:3]) < at_least:
        raise UserError(
            f"The images are {images.shape[1]} × {images.shape[2]} pixels, but this network needs at least "
            f"{at_least} × {at_least}; resize them (--data.size) or take another network (--model.network)."
        )
    return images.astype(dtype)


def check_stem(stem: str) -> None:
    """Raise a UserError unless the stem is known."""
    if stem not in ("cifar", "imagenet"):
        raise UserError(f"The stem {stem!r} is not known; it must be 'cifar' or 'imagenet'.")


def max_pool(x: Array, window: int = 2, stride: int = 2, padding: int = 0) -> Array:
    """Largest value of each window, `[b, H, W, C]` -> `[b, H', W', C]`."""
    edges = ((padding, padding), (padding, padding))
    return nn.max_pool(x, (window, window), (stride, stride), edges)  # pyright: ignore[reportArgumentType]


class Head(nn.Module):
    """The linear classifier; its inputs are sown as `features` in the collection `intermediates`."""

    num_classes: int

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Features `[b, d]` -> logits, float32 `[b, num_classes]`, computed in float32."""
        features = features.astype(jnp.float32)
        self.sow("intermediates", "features", features)
        return nn.Dense(self.num_classes, name="classifier")(features)
