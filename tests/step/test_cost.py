"""Operations and memory of the compiled step over the plain step's, at size S, without scoring."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel.nn.transformer import SIZES, Transformer, language_model_loss

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

ROWS, LENGTH = 16, 128
METHODS: dict[str, Any] = {
    "dds": bilevel.dds,
    "anograd": bilevel.anograd,
    "soba": lambda: bilevel.soba(optax.sgd(0.1)),
}
MODES = {"forward": bilevel.Forward(), "finite": bilevel.Finite()}


def compiled(method: Any, kind: str, **options: Any) -> Any:
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
    return jax.jit(getattr(train, kind)).lower(state, batch, batch).compile()


@functools.cache
def learning(method: str, mode: str) -> tuple[float, int]:
    """Operations and peak temporary bytes of a step with α-work."""
    return measured(compiled(METHODS[method](), "learn", derivatives=MODES[mode]))


@functools.cache
def plain() -> tuple[float, int]:
    """The same of a step without; the method does not matter."""
    return measured(compiled(bilevel.dds(), "plain"))


def measured(program: Any) -> tuple[float, int]:
    return float(program.cost_analysis()["flops"]), int(program.memory_analysis().temp_size_in_bytes)


BUDGETS = {
    ("dds", "forward"): (2.85, 1.5),
    ("dds", "finite"): (2.5, 1.5),
    ("anograd", "forward"): (2.85, 1.5),
    ("anograd", "finite"): (2.5, 1.5),
    ("soba", "forward"): (4.2, 1.8),
    ("soba", "finite"): (3.2, 1.8),
}


@pytest.mark.parametrize(("method", "mode"), BUDGETS)
def test_operations(method: str, mode: str) -> None:
    every_step, every_fourth = BUDGETS[method, mode]
    ratio = learning(method, mode)[0] / plain()[0]
    assert ratio <= every_step
    # XLA counts a conditional by its branches, so the average is of the two programs compiled apart.
    assert (ratio + 3) / 4 <= every_fourth


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_of_finite_do_not_live_together(method: str) -> None:
    assert learning(method, "finite")[1] <= 1.3 * plain()[1]


def last_block(path: str) -> bool:
    return path.startswith(("block_3/", "final_norm"))


LAST_BLOCK_BUDGETS = {
    ("dds", "forward"): 1.75,
    ("dds", "finite"): 1.65,
    ("soba", "forward"): 2.1,
    ("soba", "finite"): 1.85,
}


@pytest.mark.parametrize(("method", "mode"), LAST_BLOCK_BUDGETS)
def test_probe_in_the_last_block_costs_less(method: str, mode: str) -> None:
    """Nothing is pulled back below the block but for the θ-update, and of the generic rows nothing evaluated there twice."""
    program = compiled(METHODS[method](), "learn", derivatives=MODES[mode], param_filter=last_block)
    assert measured(program)[0] <= LAST_BLOCK_BUDGETS[method, mode] * plain()[0]


@pytest.mark.parametrize(("part", "bound"), [(None, 1.4), (last_block, 1.15)])
@pytest.mark.parametrize("method", [bilevel.dds(average_specific=0.9), bilevel.soba(optax.sgd(0.1))])
def test_a_remembered_specific_gradient_costs_one_forward_pass(method: Any, part: Any, bound: float) -> None:
    """With the probe in the last block one through that block and the output layer."""
    program = compiled(method, "reuse", derivatives=bilevel.Finite(), probe_every=8, param_filter=part)
    assert measured(program)[0] <= bound * plain()[0]
