"""Training on some rows alone, for the parameters that are best on valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.devices.processes import remove_folder, say
from bilevel.methods import uniform
from bilevel.state import TrainState
from bilevel.step import make_step
from bilevel.training.best import Best, KeepBest
from bilevel.training.checkpoints import Checkpoints
from bilevel.training.config import LoopConfig
from bilevel.training.loop import train
from bilevel.training.opening import Residence, open_source, steps_in_call
from bilevel.training.run_dir import prepare_run_dir, recorded, write_json
from bilevel.training.signals import Stopped
from bilevel.types import Array, LossFn, ModelState, Params

BEST = "best"
"""In the folder of a fit: a checkpoint of the best parameters."""
FITTED = "fitted.json"
"""In the folder of a fit by `best_of`: how good the model is on valid, at which step, and the seconds of its updates."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """A model to train on some rows alone, for the parameters that are best on valid."""

    loss: LossFn
    begin: Callable[[], tuple[Params, ModelState]]
    """Makes the first parameters and the model state, whole on every device."""
    optimizer: optax.GradientTransformation
    rows: Dataset
    measure: Callable[[Params, ModelState], Mapping[str, float]]
    """Parameters and model state, this process's copies -> values on valid."""
    decides: str
    """Name of the value that says which parameters are best."""
    title: str = ""
    """What it is called; empty: its name."""
    digits: int = 3
    """That are shown of it."""
    sign: int = 1
    """1 if a lower value is better, else -1."""
    steps: int
    """Most updates."""
    every: int
    """Updates between two evaluations."""
    patience: float = math.inf
    """Updates without a better value after which it ends."""
    batch_size: int
    """Most rows in an update."""
    seed: int
    """Of the order of the rows."""
    key: Array
    """Of the draws in the steps."""
    settings: Mapping[str, Any]
    """What the outcome depends on, as JSON values."""
    mesh: Mesh
    gather: Callable[[str], bool] | None = None
    """See `make_step`."""
    micro_batches: int = 1
    split: bool = False
    """Whether the state is spread over all devices."""
    residence: Residence = "auto"
    steps_per_call: int = 1
    progress: bool = True

    def __call__(self, folder: Path) -> tuple[Best, float]:
        """Train, or continue, in a folder; one of other settings is emptied.

        Returns:
            The best parameters, and the seconds of all updates: without compiling, evaluating and saving.

        Raises:
            Stopped: a signal stopped it after saving.
        """
        if recorded(folder) not in ({}, self.settings):
            remove_folder(folder)
        prepare_run_dir(folder, self.settings)
        mesh, parts = self.mesh, self.mesh.size * self.micro_batches
        size = min(self.batch_size, len(self.rows)) // parts * parts or parts
        step = make_step(
            self.loss, None, self.optimizer, None, uniform(), batch_size=size, micro_batches=self.micro_batches,
            mesh=mesh if mesh.size > 1 else None, gather=self.gather,
        )  # fmt: skip

        def create(params: Params, model_state: ModelState) -> TrainState:
            # A copy, as the state is donated.
            return step.init(self.key, jax.tree.map(jnp.copy, params), {}, model_state)

        begin = self.begin()
        state, step = sharding.placed(mesh, step, create, *begin, split=self.split)
        hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        loader = Loader(self.rows, size, seed=self.seed, **hosts)
        source = open_source(self.residence, loader, loader, mesh)
        loop = LoopConfig(
            self.steps, log_every=self.every, evaluate_every=self.every, checkpoint_every=self.every,
            steps_per_call=steps_in_call(source, self.steps_per_call), progress=self.progress,
        )  # fmt: skip
        with Checkpoints(folder / BEST, keep=1) as saved:
            best = KeepBest(self.measure, self.decides, begin, saved, mesh, self.sign)
            result = train(
                step, state, data=source, config=loop, run_dir=folder, evaluate=best.compare,
                until=best.waited(self.patience),
            )  # fmt: skip
        if result.stop_requested:
            raise Stopped
        return best.best, result.seconds


def best_of(fit: Fit, folder: Path) -> Best:
    """Train a model, say how good it is on valid and whether training ended too soon, and keep the same in FITTED.

    Args:
        fit: what is trained.
        folder: where; the same fit continues there.

    Raises:
        Stopped: a signal stopped it after saving.
    """
    best, seconds = fit(folder)
    shown = f"valid {fit.title or fit.decides}"
    say(f"{folder}: {shown} {best.value:.{fit.digits}f}, best at step {best.steps}")
    if best.steps > fit.steps - fit.every:
        say(f"warning: {shown} still improved when the {fit.steps} steps of that model ended: allow it more.")
    found = {fit.decides: best.value, "step": best.steps, "most_steps": fit.steps, "seconds": seconds}
    write_json(folder / FITTED, found)
    return best
