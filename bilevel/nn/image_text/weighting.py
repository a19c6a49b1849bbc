"""The weighting network of image–text training: a few convolutions over small images; it sees no captions.

Reference: ATD, section 5.4 and table 1 (4 convolutions of 32, 32, 32 and 64 channels on images of 32 × 32). Kernels, strides and
what follows are not given there: 3 × 3, strides of 2 after the first, GELU, the mean over pixels, a linear logit.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel.nn.classification import Prepare
from bilevel.nn.image_layers import Layers, checked_images
from bilevel.types import Array, Batch, LogitFn, Params


class ImageWeighting(nn.Module):
    """Convolutions, the mean over pixels, a linear logit, 0 at first; a row's logit depends on no other row."""

    features: tuple[int, ...] = (32, 32, 32, 64)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Images, floating-point `[b, H, W, C]` -> logits, float32 `[b]`."""
        layers = Layers(jnp.float32, train=False)
        x = checked_images(images, jnp.float32)
        for i, features in enumerate(self.features):
            x = nn.gelu(layers.conv(features, stride=2 if i else 1, name=f"conv_{i}", use_bias=True)(x))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(jnp.mean(x, axis=(1, 2)))[:, 0]


def image_weighting(
    shape: tuple[int, int, int],
    prepare: Prepare,
    *,
    features: tuple[int, ...] = (32, 32, 32, 64),
    inputs: str = "small",
) -> tuple[Callable[[Array], Params], LogitFn]:
    """Return what makes the parameters of a weighting network, and its logits.

    Args:
      shape: of one small image, `(H, W, C)`.
      prepare: makes inputs of small images; without augmentation, as it is given the same key always.
      features: channels of each convolution.
      inputs: name of the small images in a batch.
    """
    network = ImageWeighting(features)

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros((1, *shape)))["params"]

    def logits(weights: Params, batch: Batch) -> Array:
        found = network.apply({"params": weights}, prepare(batch[inputs], jax.random.key(0)))
        assert isinstance(found, jax.Array)
        return found

    return init, logits
