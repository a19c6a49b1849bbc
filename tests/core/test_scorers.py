"""Scorers that see the model, and Meta-Weight-Net: brute force, cost, and what they leave alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_batch_norm import linen_parts
from test_hypergradients import BIG, EXACT, ROUGH, SMALL, objective

import bilevel
from bilevel import filters, scorers
from bilevel.nn.weighting import LossMLP
from bilevel.types import Array, UserError

HIDDEN = 6


def mlp(wp: Any, batch: Any, losses: Array) -> Array:
    out = LossMLP(HIDDEN).apply({"params": wp}, losses)
    assert isinstance(out, jax.Array)
    return out


def alpha(dtype: Any) -> Any:
    rng = np.random.default_rng(5)
    shapes = {"hidden": {"kernel": (1, HIDDEN), "bias": (HIDDEN,)}, "logit": {"kernel": (HIDDEN, 1), "bias": (1,)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 4, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def one_step(weighting: Any, dtype: Any, **options: Any) -> tuple[Any, Any, Any, Any, Any]:
    """One step whose weight optimizer is `sgd(1)`: the move of α is minus its gradient."""
    optimizer = toy.OPTIMIZERS["momentum"]()
    train = bilevel.make_step(
        toy.loss, weighting, optimizer, optax.sgd(1.0), options.pop("method", bilevel.dds()), update_every=1, **options
    )
    wp = alpha(dtype)
    state = train.init(jax.random.key(0), toy.params(1, dtype), wp)
    big, specific = toy.arrays(3, BIG, dtype), toy.arrays(4, 7, dtype)
    after, metrics = jax.jit(train.step)(state, big, specific)
    gradient = jax.tree.map(lambda a, b: a - b, wp, after.weight_params)
    return gradient, state, jax.tree.map(lambda x: x[metrics["selected"]], big), specific, (after, metrics)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("mode", ["dense", "sparse", "uniform"])
def test_meta_weight_net_hypergradient(mode: str, micro_batches: int) -> None:
    """s_i = mlp(ℓ_i) with ℓ_i held fixed, otherwise the objective of DDS."""

    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        net = bilevel.meta_weight_net(toy.loss, hidden=HIDDEN, micro_batches=micro_batches)
        options: dict[str, Any] = {"mode": "dense", "batch_size": BIG}
        if mode != "dense":
            options = {"batch_size": SMALL}
        if mode == "uniform":
            options |= {"alpha_batch": "uniform", "alpha_batch_size": BIG}
        gradient, state, rows, specific, (after, _) = one_step(
            net.weighting, dtype, method=net.method, derivatives=derivatives, micro_batches=micro_batches, **options
        ) if mode != "sparse" or micro_batches == 1 else one_step(
            net.weighting, dtype, method=net.method, derivatives=derivatives, micro_batches=3, **options
        )
        rows = toy.arrays(3, BIG, dtype) if mode == "uniform" else rows
        seen = toy.losses(state.params, rows)
        assert after.params

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(mlp(wp, rows, seen))
            if mode == "sparse":
                weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            return objective("dds", toy.OPTIMIZERS["momentum"](), state, specific)(weights, rows)

        assert toy.relative_error(gradient, jax.grad(written_out)(state.weight_params)) <= bound

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    check(np.float32, bilevel.Finite(), ROUGH)
