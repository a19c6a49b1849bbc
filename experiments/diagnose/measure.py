"""SAR, GAR and losses of one model, on rows that stay the same from one measurement to the next."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.nn.transformer import Transformer, language_model_loss
from bilevel.offline.acceleration import acceleration_rates
from bilevel.state import TrainState
from bilevel.training import Checkpoints, hold_run_dir
from bilevel.training.loop import CHECKPOINTS_NAME
from bilevel.types import Batch, Params, UserError
from experiments.diagnose.config import DiagnoseConfig, Run
from experiments.language_modeling import build
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import Evaluator

EVALUATED = 2048
"""Most rows in the evaluation of a loss."""


class Measurement:
    """Compares rows of the valid parts, which no training sees, with pairs of batches from the train parts.

    Derivatives are exact and in float32, whatever the model trains in.

    Raises:
      UserError: for data too small for the batches.
    """

    def __init__(self, options: DiagnoseConfig, model: Transformer, corpora: Corpora):
        self._valid = corpora.specific["valid"], corpora.generic_valid
        train = corpora.specific["train"], corpora.generic_train
        parts = math.gcd(options.micro_batches, options.batch_rows)
        most = [min(options.rows, len(dataset)) for dataset in self._valid]
        parts = parts if min(most) >= parts else 1
        self.rows = [count - count % parts for count in most]
        """How many specific and generic rows are compared."""
        seed = options.seed + 5_000_011  # other rows than those of the first steps
        rows = (Loader(d, n, seed=seed).batch(0) for d, n in zip(self._valid, self.rows, strict=True))
        self._data: list[Batch] = [*rows, *(_batches(dataset, options, seed) for dataset in train)]
        exact = Transformer(dataclasses.replace(model.config, attention="xla", dtype=jnp.float32))
        self._rates = functools.partial(acceleration_rates, language_model_loss(exact), micro_batches=parts)
        self._evaluate = Evaluator(model)

    def __call__(self, params: Params) -> dict[str, float]:
        """Valid losses in nats per byte (of at most 2,048 rows), rates and their standard errors."""
        params = jax.tree.map(jnp.asarray, jax.device_get(params))
        specific, generic = (self._evaluate(params, dataset, EVALUATED) for dataset in self._valid)
        rates = self._rates(params, {}, *self._data, rng=jax.random.key(0))
        numbers = {name: float(value) for name, value in rates._asdict().items()}
        return {"specific_valid_loss": specific, "generic_valid_loss": generic, **numbers}


def initial(run: Run) -> tuple[Any, TrainState]:
    """The step and the initial state of a run, as experiments.language_modeling makes them."""
    config, method, seed = run
    mesh = sharding.make_mesh()
    model = build.build_model(config, mesh)
    loss = language_model_loss(model)
    weighting = build.weighting_of(config, method, loss)
    step = build.build_step(config, method, model, loss, weighting, mesh)
    state, step = build.init_state(config, seed, step, model, weighting, mesh)
    return step, state


def measured_checkpoint(directory: Path, run: Run, measure: Measurement) -> dict[str, float]:
    """Measures the newest checkpoint.

    Raises:
      UserError: if there is none, or its run is in progress.
    """
    if not (directory / CHECKPOINTS_NAME).is_dir():
        raise UserError(
            f"{directory} holds no checkpoint to measure on: give a run that has saved one, or train it again."
        )
    _, state = initial(run)
    with hold_run_dir(directory), Checkpoints(directory / CHECKPOINTS_NAME) as checkpoints:
        restored = checkpoints.restore_latest(state)
    if restored is None:
        raise UserError(
            f"{directory} holds no checkpoint to measure on: give a run that has saved one, or train it again."
        )
    step, state = restored
    return {"step": step, **measure(sharding.whole(sharding.make_mesh(), state.params))}


def _batches(dataset: Dataset, options: DiagnoseConfig, seed: int) -> Batch:
    """Every array `[P, b, …]`."""
    if options.batch_rows > len(dataset):
        raise UserError(
            f"--batch-rows {options.batch_rows}: {dataset.name} has {len(dataset)} rows to train on; "
            f"give at most {len(dataset)}."
        )
    loader = Loader(dataset, options.batch_rows, seed=seed)
    return jax.tree.map(lambda *x: np.stack(x), *(loader.batch(i) for i in range(options.pairs)))
