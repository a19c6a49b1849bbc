"""The parameters of a training that are best on valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bilevel.devices import sharding
from bilevel.training.checkpoints import Checkpoints
from bilevel.types import ModelState, Params


class Best(NamedTuple):
    """The best parameters, whole on every device."""

    params: Params
    model_state: ModelState
    steps: int = 0
    """Updates after which they were reached."""
    value: float = math.nan
    """What they were judged by."""


class KeepBest:
    """Keeps the best parameters, in memory and on disk, so that a killed training goes on with them.

        best = KeepBest(measure, "loss", begin, saved, mesh)
        train(step, state, data=data, config=config, evaluate=best.compare, until=best.waited(500))

    Args:
        measure: (parameters, model state), this process's copies -> values by name.
        name: the value that decides.
        begin: the parameters and model state before training, whole on every device.
        saved: the checkpoints of the best, one at a time.
        mesh: the devices of the state.
        sign: 1 if a lower value is better, else -1.
    """

    def __init__(
        self, measure: Callable[[Params, ModelState], Mapping[str, float]], name: str, begin: tuple[Params, ModelState],
        saved: Checkpoints, mesh: Mesh, sign: int = 1,
    ):  # fmt: skip
        self._measure, self._name, self._saved, self._mesh, self._sign = measure, name, saved, mesh, sign
        if restored := saved.restore_latest(Best(*begin)):
            self.best: Best = restored[1]
        else:
            self._keep(Best(*begin, 0, measure(*sharding.local(begin))[name]))

    def compare(self, state: Any) -> dict[str, float]:
        """Keep the parameters of a state if they are better; a step that is evaluated again changes nothing."""
        whole = sharding.whole(self._mesh, (state.params, state.model_state))
        values = self._measure(*sharding.local(whole))
        if self._sign * values[self._name] < self._sign * self.best.value:
            params, model_state = jax.tree.map(jnp.copy, whole)
            self._keep(Best(params, model_state, int(jax.device_get(state.step)), values[self._name]))
        return {f"valid_{name}": float(value) for name, value in values.items()}

    def waited(self, patience: float) -> Callable[[int], bool]:
        """Return whether that many updates brought nothing better, for `until` of `train`."""
        return lambda done: done - self.best.steps >= patience

    def _keep(self, best: Best) -> None:
        self.best = best
        # To the end: several processes cannot have two checkpoints of one step under way.
        self._saved.save(best.steps, best, wait=True)
