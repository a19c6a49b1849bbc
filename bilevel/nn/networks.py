"""Networks by name, for classifiers and for scorers of the same architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bilevel.nn.resnet import resnet8, resnet18, resnet20, resnet50
from bilevel.nn.small import MLP, SmallCNN
from bilevel.nn.vgg import VGG16
from bilevel.nn.wide_resnet import WideResNet
from bilevel.types import Params, UserError

NAMES = ("mlp", "mlp-small", "cnn", "cnn-small", "resnet8", "resnet18", "resnet20", "resnet50", "vgg16", "vgg16-plain")
_PLACED = re.compile(r"(stage|conv|norm|hidden)_(\d+)(?:_(?:block_)?(\d+))?")
"""Submodules that are blocks, with their places, or belong to one: residual blocks, and the layers of other networks."""
_BEHIND = ("final_norm", "head")
_LARGE = 64
"""From this height or width on, images get the networks' ImageNet form."""


def network_of(
    name: str, outputs: int, shape: tuple[int, ...], *, width: int = 256, dtype: Any = jnp.float32, dropout: bool = True
) -> nn.Module:
    """Build a network by its name, for inputs of a shape.

    Args:
      name: one of `NAMES`, or wrnDEPTH-WIDTH.
      outputs: number of classes, or of scores.
      shape: of one input, `(H, W, C)` or `(d,)`.
      width: units of each hidden layer of mlp; mlp-small has an eighth of them.
      dtype: type of the computation.
      dropout: False builds it without (a scorer draws nothing).

    Raises:
      UserError: for an unknown name, or inputs that the network cannot take.
    """
    dtype = jnp.dtype(dtype)
    if len(shape) == 1 and not name.startswith("mlp"):
        raise UserError(
            f"The network {name} needs images, but the data are rows of {shape[0]} features: take mlp (--model.network)."
        )
    large = max(shape) >= _LARGE
    if name in ("mlp", "mlp-small"):
        width = width if name == "mlp" else math.ceil(width / 8)
        return MLP(outputs, hidden=(width,) * 3, dtype=dtype)
    if name in ("cnn", "cnn-small"):
        part = 1 if name == "cnn" else 8
        features, hidden = (64 // part, 128 // part, 256 // part), (128 // part, 256 // part)
        return SmallCNN(outputs, features=features, hidden=hidden, pad=min(shape[:2]) < 22, dtype=dtype)
    if name in ("vgg16", "vgg16-plain"):
        hidden, norm = 4096 if large else 512, name == "vgg16"
        return VGG16(outputs, batch_norm=norm, hidden=hidden, dropout=0.5 if dropout else 0.0, dtype=dtype)
    if name in ("resnet8", "resnet20"):
        return (resnet8 if name == "resnet8" else resnet20)(outputs, dtype=dtype)
    if name in ("resnet18", "resnet50"):
        make = resnet18 if name == "resnet18" else resnet50
        return make(outputs, stem="imagenet" if large else "cifar", dtype=dtype)
    wide = re.fullmatch(r"wrn(\d+)-(\d+)", name)
    if wide is None:
        raise UserError(f'There is no network "{name}": choose from {", ".join(NAMES)}, wrnDEPTH-WIDTH (wrn28-10).')
    return WideResNet(int(wide[1]), int(wide[2]), outputs, dtype=dtype)


def last_blocks(count: int, params: Params) -> Callable[[str], bool]:
    """Return what accepts the parameters of the last `count` blocks of a network, and of what lies behind them.

    A block is a residual one; in networks without, a convolution with its BatchNorm, or a hidden layer.

    Args:
      count: number of blocks.
      params: those of a network of this module, or their shapes.

    Raises:
      UserError: the network has no such blocks.
    """
    places = {name: place for name in params if (place := _place(name)) is not None}
    order = sorted({*places.values()})
    if not 0 < count <= len(order):
        raise UserError(f"the last {count} blocks of a network that has {len(order)}: give 1 to {len(order)}.")
    chosen = {name for name, place in places.items() if place in order[-count:]} | {*_BEHIND}
    return lambda path: path.partition("/")[0] in chosen


def _place(name: str) -> tuple[bool, int, int] | None:
    """Where the block of a submodule lies; hidden layers come after convolutions. None for another submodule."""
    found = _PLACED.fullmatch(name)
    return found and (found[1] == "hidden", int(found[2]), int(found[3] or 0))
