"""The compiled programs of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax

from bilevel.types import Batch

Step: TypeAlias = Callable[[Any, Batch, Batch], tuple[Any, Mapping[str, Any]]]
Program: TypeAlias = Callable[..., tuple[Any, Mapping[str, Any]]]
"""Takes the state and the `arguments` of an `Item`."""


class StepChoice(Protocol):
    """Chooses the step function by the number of the step; `bilevel.TrainStep` is one."""

    def at(self, step: int, /) -> Step:
        """Return the function for `step` (counted from 0).

        Always the same object for the same function.
        """
        ...


def jitted(function: Program) -> Program:
    """Jit a step function with a donated state, unless it is jitted already."""
    return function if hasattr(function, "lower") else jax.jit(function, donate_argnums=0)


class Programs:
    """The step functions, compiled.

    Args:
        step: a step function, or what chooses one.
        compiled: (what `step` is or chooses) -> the program.
    """

    def __init__(self, step: Any, compiled: Callable[[Any], Program] = jitted):
        self._step = step
        self._compiled = compiled
        self._programs: dict[Any, Program] = {}

    def at(self, step: int) -> tuple[Program, bool]:
        """Return the program for a step, and whether its first call is to come.

        That call compiles.
        """
        function: Any = self._step
        if hasattr(function, "at"):
            function = function.at(step)
        new = function not in self._programs
        if new:
            self._programs[function] = self._compiled(function)
        return self._programs[function], new

    def renew(self) -> None:
        """Take all programs for new.

        They compile again, as the state lies elsewhere than before.
        """
        self._programs.clear()
