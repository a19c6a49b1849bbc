"""Steps that are called one by one, where a loop in the program would be slow.

XLA on CPU turns the convolutions of a gradient into fast ones outside of loops alone: on one core of an AMD EPYC the gradient of
a 3 × 3 convolution of 32 images of 32 × 32 × 16 took 13 ms, and 409 ms in a `while_loop` (2026-11-29, jax 0.10.2;
https://github.com/jax-ml/jax/issues/12868).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.training.many_steps import Arguments, many_steps
from bilevel.training.programs import Program, Step, StepChoice


def program_of_steps(
    step: Step | StepChoice, most: int, arguments: Arguments, compiled: Callable[..., Program]
) -> Program:
    """Make a function of up to `most` steps: one program, or one for each kind of step where loops are slow.

    Args:
        step: the step, or what chooses it.
        most: the leading axis of the metrics.
        arguments: what each step takes after the state, from what the call was given.
        compiled: jits a function of the state and more, with a donated state.

    Returns:
        As `many_steps`. Which it is shows when it is called first.
    """
    looped = compiled(many_steps(step, most, arguments))
    chosen: list[Program] = []

    def program(*given: Any) -> tuple[Any, Mapping[str, Any]]:
        if not chosen:
            chosen.append(one_by_one(step, arguments, compiled) if slow_in_loops(looped, *given) else looped)
        return chosen[0](*given)

    return program


def slow_in_loops(function: Any, *arguments: Any) -> bool:
    """Say whether a function has convolutions that XLA on CPU is slow at inside of loops: transposed ones, as gradients have.

    Args:
        function: what `jax.jit` made; traced, not run, and not traced again when it is called with the same arguments.
        arguments: arrays, or their shapes.
    """
    if jax.default_backend() != "cpu":
        return False
    return any(map(_is_transposed, _equations(function.trace(*arguments).jaxpr)))


def one_by_one(step: Step | StepChoice, arguments: Arguments, compiled: Callable[[Step], Program]) -> Program:
    """Make a function that calls a program for each step, to the same end as `many_steps`.

    Args:
        step: the step, or what chooses it.
        arguments: what each step takes after the state, from what the call was given.
        compiled: compiles what it is given, once for each kind of step, with a donated state.

    Returns:
        As `many_steps`. A call of 0 steps compiles all kinds.
    """
    programs: dict[Any, Program] = {}
    chooser: Any = step

    def program(place: int) -> Program:
        function = chooser.at(place) if hasattr(chooser, "at") else chooser
        if function not in programs:

            def made_step(state: Any, given: Any, made: Any) -> tuple[Any, Mapping[str, Any]]:
                return function(state, *arguments(given, made))

            programs[function] = compiled(made_step)
        return programs[function]

    def run(state: Any, given: Any, first: Any, count: Any) -> tuple[Any, Mapping[str, Any]]:
        if int(count) == 0:
            for place in range(getattr(step, "period", 1)):
                program(place)(jax.tree.map(jnp.copy, state), given, np.int32(0))
            return state, {}
        rows = []
        for made in range(int(count)):
            state, metrics = program(int(first) + made)(state, given, np.int32(made))
            rows.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *rows)

    return run


def _is_transposed(equation: Any) -> bool:
    """Whether a convolution has its axes in another order than batch, space, features, and space, inputs, outputs."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    given = equation.params["dimension_numbers"]
    space = tuple(range(1, len(given.lhs_spec) - 1))
    last = len(given.lhs_spec) - 1
    usual = (0, last, *space)
    return (given.lhs_spec, given.rhs_spec, given.out_spec) != (usual, (last, last - 1, *range(last - 1)), usual)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: _inner(x) is not None):
            if (inner := _inner(value)) is not None:
                yield from _equations(inner)


def _inner(value: Any) -> Any:
    """The jaxpr that a parameter of an equation is; None if it is something else."""
    inner = getattr(value, "jaxpr", value)
    return inner if hasattr(inner, "eqns") else None
