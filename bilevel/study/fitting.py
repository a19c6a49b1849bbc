"""Models that are trained before a comparison: for irreducible losses, proxies and confusions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.files import load_tree, save_tree
from bilevel.methods import uniform
from bilevel.state import TrainState
from bilevel.step import make_step
from bilevel.study.config import Study, plain
from bilevel.study.context import optimizer_of
from bilevel.study.feeding import open_source, steps_in_call
from bilevel.study.files import Stopped
from bilevel.study.task import Evaluate, Measure, Model
from bilevel.training import LoopConfig, prepare_run_dir, train
from bilevel.types import ModelState, Params, UserError

BEST = "best.safetensors"
_EVALUATIONS = 20
_LOSS = Measure("loss", "loss")


class Fitted(NamedTuple):
    """A trained model."""

    params: Params
    model_state: ModelState
    model: Model


@dataclass(frozen=True)
class Fit:
    """A model to train on some rows with the optimizer of the study, and the parameters with the lowest valid loss to keep."""

    study: Study
    model: Model
    evaluate: Evaluate
    rows: Dataset
    valid: Dataset
    about: Mapping[str, Any]
    """What tells this model from others: the task's settings and the network."""
    steps: int
    seed: int
    mesh: Mesh
    measure: Measure = _LOSS
    """What decides which parameters are kept."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the outcome depends on, as JSON values."""
        return {
            **plain(self.about), "steps": self.steps, "seed": self.seed, "count": len(self.rows),
            "rows": self.rows.content_hash, "valid": self.valid.content_hash, "batch_size": self.study.batch_size,
            "optimizer": plain(self.study.optimizer),
        }  # fmt: skip

    def __call__(self, directory: Path) -> Fitted:
        """Train in a directory, or continue there.

        Raises:
          Stopped: a signal stopped it after saving.

        Reference: RHO-LOSS, section 4 and appendix: the irreducible-loss model with the lowest validation loss.
        """
        if self.steps < 1:
            raise UserError(
                f"A model that is trained beforehand needs at least 1 step, and {self.steps} are asked for."
            )
        prepare_run_dir(directory, self.settings)
        size, model = min(self.study.batch_size, len(self.rows)), self.model
        step = make_step(
            model.loss, None, optimizer_of(self.study.optimizer, self.steps), None, uniform(), batch_size=size
        )
        key, step_key = jax.random.split(jax.random.key(self.seed))

        def create() -> TrainState:
            params, model_state = model.init(key)
            return step.init(step_key, params, {}, model_state)

        state = jax.jit(create)()
        best = _Best(directory / BEST, self.evaluate, self.valid, self.measure)
        best(state)
        loader = Loader(self.rows, size, seed=self.seed)
        one = sharding.make_mesh(self.mesh.local_devices[:1])
        source = open_source("never" if jax.process_count() > 1 else self.study.residence, loader, loader, one)
        every = max(1, self.steps // _EVALUATIONS)
        loop = LoopConfig(
            num_steps=self.steps, log_every=every, evaluate_every=every, checkpoint_every=self.study.checkpoint_every,
            steps_per_call=steps_in_call(source, self.study.steps_per_call), progress=self.study.progress,
        )  # fmt: skip
        if train(step, state, data=source, config=loop, run_dir=directory, evaluate=best).stop_requested:
            raise Stopped
        return Fitted(*best.load(state), model)


@dataclass
class _Best:
    """The best parameters on valid, in a file: a continued run goes on with them."""

    file: Path
    evaluate: Evaluate
    valid: Dataset
    measure: Measure

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        found = self.evaluate(state.params, state.model_state, self.valid, None)
        name, sign = self.measure.name, 1 if self.measure.lower_is_better else -1
        if not self.file.exists() or sign * found[name] < sign * float(load_tree(self.file)[1][name]):
            tree = jax.tree.map(np.asarray, {"params": state.params, "model_state": state.model_state})
            save_tree(self.file, tree, {name: repr(found[name])})
        return {f"valid_{name}": value for name, value in found.items()}

    def load(self, state: TrainState) -> tuple[Params, ModelState]:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"params": state.params, "model_state": state.model_state}
        )
        tree, _ = load_tree(self.file, shapes)
        return tree["params"], tree["model_state"]
