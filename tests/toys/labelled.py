"""A small classification problem with known wrong labels, and classifiers written as losses."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.types import Array, LossAux, LossFn

FEATURES, CLASSES = 6, 4


class Net(nn.Module):
    hidden: int = 8
    norm: bool = False
    bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dense(self.hidden, param_dtype=x.dtype, dtype=self.dtype)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(CLASSES, use_bias=self.bias, param_dtype=x.dtype, dtype=self.dtype)(nn.relu(x))


def classifier(net: nn.Module, train: bool = False) -> LossFn:
    """Cross-entropy, and whether the row is classified right."""

    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        variables = {"params": params, **model_state}
        logits: Any
        logits, changed = net.apply(variables, batch["x"], train=train, mutable=list(model_state))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = jnp.argmax(logits, -1) == batch["label"]
        return losses, LossAux({**model_state, **changed}, {"correct": correct})

    return loss


@functools.partial(jax.jit, static_argnums=0)
def losses(net: nn.Module, params: Any, batch: Any) -> Array:
    """Of a network without BatchNorm."""
    return classifier(net)(params, {}, batch, jax.random.key(0))[0]


def start(net: Any, seed: int = 0, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Parameters and model state."""
    return _start(net, seed, dtype)


@functools.cache
def _start(net: Any, seed: int, dtype: Any) -> tuple[Any, Any]:
    variables = dict(jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, FEATURES), dtype)))
    return variables.pop("params"), variables


def rows(
    seed: int, count: int, *, flipped: float = 0.0, spread: float = 1.0, dtype: Any = np.float32
) -> dict[str, Any]:
    """Rows around one centre a class; a share of the labels is another one."""
    rng = np.random.default_rng(seed)
    centres = 2.0 * np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    true = rng.integers(0, CLASSES, count)
    x = centres[true] + spread * rng.normal(size=(count, FEATURES))
    wrong = rng.random(count) < flipped
    label = np.where(wrong, (true + rng.integers(1, CLASSES, count)) % CLASSES, true)
    ids = np.arange(count, dtype=np.int32)
    return {"x": x.astype(dtype), "label": label.astype(np.int32), "true": true.astype(np.int32), "id": ids}


def take(arrays: dict[str, Any], indices: Any) -> dict[str, Any]:
    return {name: x[indices] for name, x in arrays.items()}
