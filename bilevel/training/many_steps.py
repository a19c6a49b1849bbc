"""Many steps in one call of a program, on data that stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bilevel.training.programs import Program, Step, StepChoice
from bilevel.types import Array, UserError

Arguments: TypeAlias = Callable[[Any, Array], tuple[Any, ...]]
"""(what the call was given, steps made in it) -> what the next step takes after the state."""

_Carry: TypeAlias = tuple[Array, Any, dict[str, Array]]
"""Steps made in this call, the state, the metrics of all steps."""


class _Phase(NamedTuple):
    """Consecutive steps of a period that one function makes."""

    function: Step
    begin: int
    end: int


def many_steps(step: Step | StepChoice, most: int, arguments: Arguments) -> Program:
    """Make a function of up to `most` steps.

    `(state, given, first, count) -> (state, metrics)`.

    Each kind of step has a loop of its own, which runs as often as the step is due, inside one loop over all: a choice by
    `lax.cond` would copy the state in each step on CPU. As no number of repetitions is known to the compiler, the steps of
    a call of one are compiled as those of a call of many, and round alike.

    Args:
        step: the step, or what chooses it (with `period`, after which the choice repeats).
        most: the leading axis of the metrics.
        arguments: what each step takes after the state, from what the call was given.

    Returns:
        The function. first, count: int32 scalars. Metrics from `count` on are 0.

    Raises:
        UserError: `step` chooses functions but does not say after how many steps they repeat.
    """
    phases = _phases(step)

    def run(state: Any, given: Any, first: Array, count: Array) -> tuple[Any, Mapping[str, Array]]:
        def one(function: Step, made: Array, state: Any) -> tuple[Any, Mapping[str, Array]]:
            return function(state, *arguments(given, made))

        def unfinished(carry: _Carry) -> Array:
            return carry[0] < count

        def repeat(phase: _Phase, carry: _Carry) -> _Carry:
            def due(carry: _Carry) -> Array:
                place = (first + carry[0]) % phases[-1].end
                return unfinished(carry) & (phase.begin <= place) & (place < phase.end)

            def body(carry: _Carry) -> _Carry:
                made, state, metrics = carry
                state, new = one(phase.function, made, state)
                return made + 1, state, {name: metrics[name].at[made].set(new[name]) for name in metrics}

            return jax.lax.while_loop(due if len(phases) > 1 else unfinished, body, carry)

        def period(carry: _Carry) -> _Carry:
            for phase in phases:
                carry = repeat(phase, carry)
            return carry

        _, shapes = jax.eval_shape(lambda: one(phases[-1].function, jnp.int32(0), state))
        metrics = {name: jnp.zeros((most, *shape.shape), shape.dtype) for name, shape in shapes.items()}
        carry = (jnp.int32(0), state, metrics)
        carry = jax.lax.while_loop(unfinished, period, carry) if len(phases) > 1 else period(carry)
        return carry[1], carry[2]

    return run


def _phases(step: Any) -> list[_Phase]:
    if not hasattr(step, "at"):
        return [_Phase(step, 0, 1)]
    if not hasattr(step, "period"):
        raise UserError(
            f"{type(step).__name__} chooses a function for each step, but has no `period`: add it, "
            "the number of steps after which the choice repeats."
        )
    functions = [step.at(place) for place in range(step.period)]
    begins = [0, *(place for place in range(1, len(functions)) if functions[place] != functions[place - 1])]
    ends = [*begins[1:], len(functions)]
    return [_Phase(functions[begin], begin, end) for begin, end in zip(begins, ends, strict=True)]
