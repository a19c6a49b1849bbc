"""Two towers: a residual network over images, and a perceptron over precomputed embeddings of captions.

Reference: Grangier, Ablin and Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization" (ATD), section
5.4 and table 1; Radford et al., "Learning transferable visual models from natural language supervision" (CLIP), 2021. ATD names
no joint width and no temperature: those here are ours, the latter after CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bilevel import trees
from bilevel.nn.networks import last_blocks
from bilevel.nn.resnet import ResNet, resnet8, resnet18, resnet20, resnet50
from bilevel.types import Array, ModelState, Params, UserError

_TOWERS: dict[str, Callable[..., ResNet]] = {
    "resnet8": resnet8, "resnet20": resnet20, "resnet18": resnet18, "resnet50": resnet50,
}  # fmt: skip
_LARGE = 64
"""From this height or width on, images get the ImageNet stem."""
_LOG_SCALE = math.log(1 / 0.07)
_LARGEST_LOG_SCALE = math.log(100)
_SMALLEST_SQUARE = 1e-12


class ImageText(nn.Module):
    """Embeds images and captions in one space: f = norm(W·image(I)), g = norm(MLP(e)), and the factor τ = exp(min(s, log 100)).

    A row of zeros, such as the embedding of a caption of unknown words, has an embedding of zeros at first.
    """

    image: nn.Module
    """Images `[b, H, W, C]` -> features `[b, F]`, called with `train=`."""
    width: int = 1024
    """Of the joint space."""
    hidden: tuple[int, ...] = (768, 768)
    """Units of each hidden layer of the text tower."""

    def setup(self) -> None:
        """Define the parameters beside the image tower."""
        self.projection = nn.Dense(self.width, use_bias=False)
        self.text = [nn.Dense(units) for units in self.hidden]
        self.text_projection = nn.Dense(self.width, use_bias=False)
        self.log_scale = self.param("log_scale", nn.initializers.constant(_LOG_SCALE), ())

    def __call__(self, images: Array, texts: Array, *, train: bool = False) -> tuple[Array, Array, Array]:
        """Embed images and texts; their numbers may differ.

        Args:
          images: floating-point `[b, H, W, C]`.
          texts: embeddings of captions, floating-point `[n, d]`.
          train: BatchNorm normalises by the batch, and moves its statistics.

        Returns:
          f `[b, width]` and g `[n, width]`, of length 1; τ, a scalar. In at least float32.
        """
        f = _normalised(self.projection(trees.widen(self.image(images, train=train))))
        g = trees.widen(texts)
        for layer in self.text:
            g = nn.relu(layer(g))
        return f, _normalised(self.text_projection(g)), jnp.exp(jnp.minimum(self.log_scale, _LARGEST_LOG_SCALE))


def _normalised(x: Array) -> Array:
    """Rows of length 1; no derivative is infinite at a row of zeros."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), _SMALLEST_SQUARE))


def image_text(
    name: str = "resnet50",
    *,
    size: int = 224,
    width: int = 1024,
    hidden: tuple[int, ...] = (768, 768),
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
) -> ImageText:
    """Build both towers.

    Args:
      name: of the image tower.
      size: height and width of images: from 64 on they get the ImageNet stem.
      width: see `ImageText`.
      hidden: see `ImageText`.
      dtype: type of the computation in the image tower.
      axis_name: see `bilevel.nn.resnet.ResNet`.

    Raises:
      UserError: for an unknown name.
    """
    if name not in _TOWERS:
        raise UserError(f'There is no image tower "{name}": choose from {", ".join(_TOWERS)} (--model.network).')
    stem = {} if name in ("resnet8", "resnet20") else {"stem": "imagenet" if size >= _LARGE else "cifar"}
    return ImageText(_TOWERS[name](None, dtype=dtype, axis_name=axis_name, **stem), width, hidden)


def init_image_text(
    module: ImageText, rng: Array, image_shape: tuple[int, int, int], dimensions: int
) -> tuple[Params, ModelState]:
    """Make the parameters and the model state of fresh towers; works under `jax.eval_shape`.

    Args:
      module: the towers.
      rng: a key.
      image_shape: of one image, `(H, W, C)`.
      dimensions: d of the embeddings of captions.

    Returns:
      params, float32; and the other collections: {"batch_stats": …}.
    """
    variables = module.init(rng, jnp.zeros((1, *image_shape)), jnp.zeros((1, dimensions)))
    return variables["params"], {name: found for name, found in variables.items() if name != "params"}


def last_image_blocks(count: int, params: Params) -> Callable[[str], bool]:
    """Return what accepts the parameters of the last `count` blocks of the image tower, and all outside of it.

    A `param_filter` for cheap probes.

    Args:
      count: number of residual blocks.
      params: of an `ImageText`, or their shapes.

    Raises:
      UserError: the image tower has no such blocks.
    """
    inside = last_blocks(count, params["image"])

    def accepts(path: str) -> bool:
        tower, _, rest = path.partition("/")
        return tower != "image" or inside(rest)

    return accepts
