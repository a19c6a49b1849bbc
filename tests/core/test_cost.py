"""Operation counts of the compiled step over the plain step's, at size S, without scoring."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel.nn.transformer import SIZES, Transformer, language_model_loss

ROWS, LENGTH = 16, 128


def flops(method: Any, due: bool, **options: Any) -> float:
    model = Transformer(SIZES["small"])
    train = bilevel.make_step(
        language_model_loss(model),
        lambda wp, batch: wp * batch["length"].astype(jnp.float32),
        optax.adam(1e-3),
        optax.sgd(1e-3),
        method,
        mode="dense",
        batch_size=ROWS,
        **options,
    )
    batch = {
        "tokens": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.uint8),
        "length": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    }
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.uint8)
    params = jax.eval_shape(lambda t: model.init(jax.random.key(0), t)["params"], tokens)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    state = jax.eval_shape(lambda p, w: train.init(jax.random.key(0), p, w), params, scalar)
    program = train.learn if due else train.plain
    found = jax.jit(program).lower(state, batch, batch).compile().cost_analysis()
    assert found is not None
    return float(found["flops"])


@pytest.fixture(scope="module")
def plain() -> float:
    return flops(bilevel.dds(), due=False)


METHODS = {
    "dds": (bilevel.dds, 2.85, 2.5),
    "anograd": (bilevel.anograd, 2.85, 2.5),
    "soba": (lambda: bilevel.soba(optax.sgd(0.1)), 4.2, 3.2),
}


@pytest.mark.parametrize("method", METHODS)
def test_budget(method: str, plain: float) -> None:
    make, forward, finite = METHODS[method]
    exact = flops(make(), due=True, derivatives=bilevel.Forward()) / plain
    rough = flops(make(), due=True, derivatives=bilevel.Finite()) / plain
    assert exact <= forward, exact
    assert rough <= finite, rough


def test_probe_in_the_last_block_costs_less(plain: float) -> None:
    last = flops(
        bilevel.dds(), due=True, derivatives=bilevel.Forward(), param_filter=lambda path: path.startswith("block_3")
    )
    assert last / plain < 2.2, last / plain
