"""The best parameters of a training, kept for one that goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bilevel.devices import sharding
from bilevel.training import Checkpoints
from bilevel.training.best import KeepBest


def state_at(step: int, value: float) -> Any:
    return SimpleNamespace(step=jnp.asarray(step), params={"w": jnp.asarray(value)}, model_state={})


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_is_kept_and_found_again(sign: int, tmp_path: Path) -> None:
    mesh = sharding.make_mesh(jax.devices()[:1])

    def measure(params: Any, model_state: Any) -> dict[str, float]:
        return {"loss": sign * float(params["w"]), "other": 0.0}

    def keeper(saved: Checkpoints) -> KeepBest:
        return KeepBest(measure, "loss", ({"w": jnp.asarray(5.0)}, {}), saved, mesh, sign)

    with Checkpoints(tmp_path, keep=1) as saved:
        best = keeper(saved)
        assert (best.best.steps, best.best.value) == (0, sign * 5.0)
        for step, value in ((10, 3.0), (20, 4.0), (30, 3.0)):
            assert best.compare(state_at(step, value)) == {"valid_loss": sign * value, "valid_other": 0.0}
        assert not best.waited(21)(30)
        assert best.waited(20)(30)
    with Checkpoints(tmp_path, keep=1) as saved:
        again = keeper(saved)
        assert (again.best.steps, again.best.value, float(again.best.params["w"])) == (10, sign * 3.0, 3.0)
        again.compare(state_at(40, 1.0))
        assert (again.best.steps, float(again.best.params["w"])) == (40, 1.0)
