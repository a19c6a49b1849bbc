"""Models that are trained before the comparison: for irreducible losses, proxies and confusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel.data import Dataset, Loader
from bilevel.methods import uniform
from bilevel.nn.classification import init_variables
from bilevel.state import TrainState
from bilevel.step.train_step import make_step
from bilevel.training import LoopConfig, prepare_run_dir, train
from bilevel.types import LossFn, ModelState, Params
from experiments.image_classification.build import classifier, losses_of, optimizer_of
from experiments.image_classification.config import NEWER, NEWER_DATA, Config
from experiments.image_classification.data import ImageData
from experiments.image_classification.evaluation import Evaluator
from experiments.runs import Stopped, without_newer
from experiments.sources import open_source, steps_in_call

BEST = "best.npz"
_EVALUATIONS = 20
_NEWER_HERE: dict[str, Any] = {"padding": 4, "standardize": True}
"""Flags of the data that `settings_of` came to record later, with their defaults."""


class Fitted(NamedTuple):
    """A trained classifier."""

    params: Params
    model_state: ModelState
    loss: LossFn
    """In evaluation mode."""


def settings_of(config: Config, data: ImageData, name: str | None, rows: Dataset) -> dict[str, Any]:
    """What the outcome of `fit` depends on, as JSON values."""
    network = name or config.model.network
    training = ("optimizer", "learning_rate", "momentum", "weight_decay", "schedule", "warmup", "batch_size")
    of_data = NEWER_DATA | _NEWER_HERE
    newer = {name: getattr(config, name) for name in NEWER} | {name: getattr(config.data, name) for name in of_data}
    return {
        "network": network,
        **({"width": config.model.width} if network.startswith("mlp") else {}),
        "dtype": config.model.dtype,
        "augment": config.data.augment,
        "steps": config.weights.il_steps,
        "seed": config.data.seed,
        "rows": rows.content_hash,
        "dev": data.dev.content_hash,
        "count": len(rows),
        **{key: getattr(config, key) for key in training},
        **without_newer(newer, NEWER | of_data),
    }


def fit(config: Config, data: ImageData, name: str | None, rows: Dataset, directory: Path) -> Fitted:
    """Trains a classifier on some rows, and keeps the parameters with the lowest dev loss.

    Args:
      config: how to train; `weights.il_steps` steps, from the seed of the data.
      data: the dev set counts.
      name: of the network; None: that of the target.
      rows: what to train on.
      directory: where it trains, and continues.

    Raises:
      Stopped: a signal stopped it after saving.

    Reference: RHO-LOSS, section 4 and appendix: the irreducible-loss model with the lowest validation loss.
    """
    prepare_run_dir(directory, settings_of(config, data, name, rows))
    network = classifier(config, data, name)
    losses = losses_of(config, data, network)
    size, steps = min(config.batch_size, len(rows)), config.weights.il_steps
    step = make_step(losses.train, None, optimizer_of(config, steps), None, uniform(), batch_size=size)
    key, step_key = jax.random.split(jax.random.key(config.data.seed))

    def create() -> TrainState:
        params, model_state = init_variables(network, key, data.shape)
        return step.init(step_key, params, {}, model_state)

    state = jax.jit(create)()
    best = _Best(directory / BEST, Evaluator(losses.evaluate), data.dev)
    best(state)
    loader = Loader(rows, size, seed=config.data.seed)
    source = open_source(config.resident, loader, loader)
    every = max(1, steps // _EVALUATIONS)
    result = train(
        step,
        state,
        data=source,
        config=LoopConfig(
            num_steps=steps,
            log_every=every,
            evaluate_every=every,
            checkpoint_every=config.checkpoint_every,
            steps_per_call=steps_in_call(source, config.steps_per_call),
            progress=config.progress,
        ),
        run_dir=directory,
        evaluate=best,
    )
    if result.stop_requested:
        raise Stopped
    return Fitted(*best.load(result.state), losses.evaluate)


@dataclasses.dataclass
class _Best:
    """The parameters with the lowest dev loss, in a file: a continued run goes on with them."""

    file: Path
    evaluator: Evaluator
    dev: Dataset

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        score = self.evaluator(state.params, state.model_state, self.dev)
        if not self.file.exists() or score.loss < self._lowest():
            leaves = jax.tree.leaves((state.params, state.model_state))
            part = self.file.with_suffix(".part.npz")
            arrays: dict[str, Any] = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
            np.savez(part, loss=score.loss, **arrays)
            part.replace(self.file)
        return {"dev_loss": score.loss, "dev_accuracy": score.accuracy}

    def load(self, state: TrainState) -> tuple[Params, ModelState]:
        tree = jax.tree.structure((state.params, state.model_state))
        with np.load(self.file) as stored:
            return jax.tree.unflatten(tree, [stored[f"leaf_{i}"] for i in range(tree.num_leaves)])

    def _lowest(self) -> float:
        with np.load(self.file) as stored:
            return float(stored["loss"])
