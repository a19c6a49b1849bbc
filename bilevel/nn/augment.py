"""Images prepared on the device: normalised, flipped and cropped at random, as functions of a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.nn.classification import Prepare
from bilevel.types import Array, UserError

Padding = Literal["zero", "reflect"]


def standardize(images: Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32) -> Array:
    """(images / 255 − mean) / std, channel by channel.

    Args:
      images: uint8 `[b, H, W, C]`.
      mean: C numbers between 0 and 1, as `bilevel.data.channel_statistics` gives them.
      std: C positive numbers, likewise.
      dtype: of the result; the arithmetic is float32.

    Returns:
      `[b, H, W, C]`.

    Raises:
      UserError: the images are not uint8, or the statistics are not one positive number a channel.
    """
    if images.dtype != jnp.uint8:
        raise UserError(f"The images are {images.dtype}; standardize needs uint8 images with values from 0 to 255.")
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(
            f"The images have {channels} channels, but mean={tuple(mean)} and std={tuple(std)} were given; "
            "give one number a channel, those of std positive."
        )
    scale = 1 / (255 * np.asarray(std, np.float32))
    shift = -np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    last = (1,) * (images.ndim - 1) + (channels,)
    values = images.astype(jnp.float32) * scale.reshape(last) + shift.reshape(last)
    return values.astype(dtype)


def flip_and_crop(rng: Array, images: Array, *, padding: int = 4, mode: Padding = "zero", flip: bool = True) -> Array:
    """Each image mirrored left to right with probability ½, padded on every side, and cut back to its size at a random place.

    The (2·padding + 1)² places are equally likely. One gather; nothing is padded in memory.

    Args:
      rng: a key, such as `jax.random.fold_in(jax.random.key(seed), step)`.
      images: `[b, H, W, C]`, any type.
      padding: pixels on every side; 0 crops nothing.
      mode: what the padding holds: zeros (after normalising: the mean colour), or the image reflected at its outermost pixels.
      flip: whether images are mirrored.

    Returns:
      `[b, H, W, C]` of the same type.

    Raises:
      UserError: an unknown mode, or a padding that is negative or, reflected, not smaller than the image.

    Reference: He et al. 2016, section 4.2 (zeros); Zagoruyko and Komodakis 2016, section 3 (reflections); RLSampler, appendix B.
    """
    rows, height, width = images.shape[:3]
    if mode not in ("zero", "reflect"):
        raise UserError(f"The padding mode {mode!r} is not known; it must be 'zero' or 'reflect'.")
    if padding < 0 or (mode == "reflect" and padding >= min(height, width)):
        raise UserError(f"A padding of {padding} pixels is not possible for images of {height} × {width} pixels.")
    for_place, for_flip = jax.random.split(rng)
    offsets = jax.random.randint(for_place, (2, rows, 1), -padding, padding + 1)
    y = jnp.arange(height)[None, :] + offsets[0]
    x = jnp.arange(width)[None, :] + offsets[1]
    if flip:
        mirrored = jax.random.bernoulli(for_flip, 0.5, (rows, 1))
        x = jnp.where(mirrored, width - 1 - x, x)
    cut = images[jnp.arange(rows)[:, None, None], _inside(y, height)[:, :, None], _inside(x, width)[:, None, :]]
    if mode == "reflect":
        return cut
    real = _is_inside(y, height)[:, :, None, None] & _is_inside(x, width)[:, None, :, None]
    return jnp.where(real, cut, jnp.zeros((), images.dtype))


def _inside(position: Array, size: int) -> Array:
    """Positions outside 0 … size − 1, reflected at the first and the last."""
    position = jnp.abs(position)
    return jnp.where(position >= size, 2 * (size - 1) - position, position) if size > 1 else jnp.zeros_like(position)


def _is_inside(position: Array, size: int) -> Array:
    return (position >= 0) & (position < size)


def preparation(
    mean: Sequence[float],
    std: Sequence[float],
    *,
    augment: bool = True,
    padding: int = 4,
    mode: Padding = "zero",
    flip: bool = True,
    dtype: Any = jnp.float32,
) -> Prepare:
    """What `classification_loss` does to its images: `standardize`, then `flip_and_crop` unless `augment` is False.

    Args:
      mean: see `standardize`; a constant of the compiled program, like `std`.
      std: see `standardize`.
      augment: False for evaluation.
      padding: see `flip_and_crop`.
      mode: see `flip_and_crop`.
      flip: see `flip_and_crop`.
      dtype: of the result.

    Returns:
      (images uint8 `[b, H, W, C]`, key) -> `[b, H, W, C]`.

    Raises:
      UserError: when it is traced; see `standardize` and `flip_and_crop`.
    """

    def prepare(images: Array, rng: Array) -> Array:
        values = standardize(images, mean, std, dtype)
        return flip_and_crop(rng, values, padding=padding, mode=mode, flip=flip) if augment else values

    return prepare


def standardization(features: NDArray[np.floating]) -> Prepare:
    """Return what brings each feature to mean 0 and variance 1 over some rows, `[N, d]`; constant ones to 0."""
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    # A constant column's deviation is rounding alone.
    scale = 1 / np.where(std > 1e-7 * np.abs(mean), std, 1)

    def prepare(rows: Array, rng: Array) -> Array:
        return (rows - jnp.asarray(mean, jnp.float32)) * jnp.asarray(scale, jnp.float32)

    return prepare
