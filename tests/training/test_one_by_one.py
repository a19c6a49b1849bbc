"""Steps with convolutions are called one by one on CPU, where they are slow in loops; the results are those of a loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.training.many_steps import many_steps
from bilevel.training.one_by_one import one_by_one, program_of_steps, slow_in_loops

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6, 6, 1)), jnp.float32)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 1, 2)), jnp.float32)


def convolved(kernel: jax.Array, images: jax.Array) -> jax.Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return jnp.sum(jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=axes) ** 2)


def multiplied(kernel: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.sum((images.reshape(-1, 1) @ kernel[0, 0]) ** 2)


def descent(loss: Any, rate: float, kernel: Any, images: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, gradient = jax.value_and_grad(loss)(kernel, images)
    return kernel - rate * gradient, {"loss": value, "rate": jnp.float32(rate)}


class Alternating:
    """Every third step has another rate."""

    period = 3

    def __init__(self, loss: Any):
        self._kinds = [partial(descent, loss, rate) for rate in (1e-3, 1e-2)]

    def at(self, step: int) -> Any:
        return self._kinds[step % self.period == 0]


def batch(given: jax.Array, made: jax.Array) -> tuple[jax.Array]:
    return (given[made],)


@pytest.mark.parametrize(("loss", "slow"), [(convolved, True), (multiplied, False)])
def test_gradients_of_convolutions_are_slow_in_loops(loss: Any, slow: bool) -> None:
    step = jax.jit(many_steps(Alternating(loss), 5, batch))
    assert slow_in_loops(step, KERNEL, IMAGES, jnp.int32(0), jnp.int32(5)) == slow
    assert not slow_in_loops(jax.jit(loss), KERNEL, IMAGES[0])  # without a gradient


@pytest.mark.parametrize("step", [Alternating(convolved), partial(descent, convolved, 1e-2)])
def test_steps_are_those_of_a_loop(step: Any) -> None:
    looped = jax.jit(many_steps(step, 5, batch))
    single = one_by_one(step, batch, partial(jax.jit, donate_argnums=0))
    expected, metrics = looped(KERNEL, IMAGES, jnp.int32(4), jnp.int32(5))
    found, rows = single(jnp.copy(KERNEL), IMAGES, jnp.int32(4), jnp.int32(5))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert rows.keys() == metrics.keys()
    for name, values in rows.items():
        np.testing.assert_allclose(values, metrics[name], rtol=1e-4, err_msg=name)


def test_a_call_of_no_steps_leaves_the_state_and_compiles_all_kinds() -> None:
    compiled: list[Any] = []

    def counted(function: Any) -> Any:
        compiled.append(function)
        return jax.jit(function, donate_argnums=0)

    program = program_of_steps(Alternating(convolved), 5, batch, counted)
    kernel = jnp.copy(KERNEL)
    state, _ = program(kernel, IMAGES, jnp.int32(0), jnp.int32(0))
    np.testing.assert_array_equal(state, KERNEL)
    assert len(compiled) == 3, "the loop, which is not called, and two kinds"
    after, metrics = program(state, IMAGES, jnp.int32(0), jnp.int32(4))
    assert len(compiled) == 3
    assert metrics["rate"].tolist() == pytest.approx([1e-2, 1e-3, 1e-3, 1e-2])
    assert not np.allclose(after, KERNEL)


def test_what_is_asked_is_not_traced_again() -> None:
    traces: list[int] = []

    def counted(kernel: Any, images: Any, *others: Any) -> Any:
        traces.append(1)
        return descent(multiplied, 1e-2, kernel, images)

    compiled: Any = partial(jax.jit, donate_argnums=0)
    call = (IMAGES, jnp.int32(0), jnp.int32(2))
    compiled(many_steps(counted, 5, batch))(jnp.copy(KERNEL), *call)
    once = len(traces)
    program_of_steps(counted, 5, batch, compiled)(jnp.copy(KERNEL), *call)
    assert len(traces) == 2 * once
