"""A small problem with every part that the core needs, and the written-out objectives to compare with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.types import Array, LossAux

ROWS, FEATURES, HIDDEN = 12, 5, 4


def arrays(seed: int, rows: int, dtype: Any = np.float32) -> dict[str, Array]:
    """A batch of `rows` random rows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, FEATURES))
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(np.sin(x).sum(1), dtype)}


def params(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    first, last = {"kernel": rng.normal(size=(FEATURES, HIDDEN))}, {"kernel": rng.normal(size=HIDDEN)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {"first": first, "last": last})


def weight_params(seed: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=FEATURES), dtype)}


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    hidden = jnp.tanh(batch["x"] @ p["first"]["kernel"])
    return (hidden @ p["last"]["kernel"] - batch["y"]) ** 2, LossAux(model_state, {})


def losses(p: Any, batch: Any) -> Array:
    return loss(p, {}, batch, None)[0]


def weighting(wp: Any, batch: Any) -> Array:
    return batch["x"] @ wp["w"]


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "clipped adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
}


def warm_state(optimizer: optax.GradientTransformation, p: Any) -> Any:
    """The optimizer's state after two updates, so that momenta are not 0."""
    return jax.jit(lambda p: _warm(optimizer, p))(p)


def _warm(optimizer: optax.GradientTransformation, p: Any) -> Any:
    state = optimizer.init(p)
    for i in range(2):
        gradient = jax.tree.map(lambda x, i=i: jnp.cos(x + i), p)
        _, state = optimizer.update(gradient, state, p)
    return state


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def relative_error(found: Any, wanted: Any) -> float:
    a, b = flat(found), flat(wanted)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
