"""What a method's plan may use: the settings, the data, the task's parts, and what is learned before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.files import load_tree
from bilevel.offline.domain_classifier import train_domain_classifier
from bilevel.study import files
from bilevel.study.config import Config, OptimizerConfig, Study
from bilevel.study.task import GENERIC, Evaluate, Model, ModelOptions, Splits, Task, Weighting
from bilevel.types import Batch, Params, UserError

WEIGHTS = "weights.safetensors"
"""In the directory of a run: its last weighting network."""
CLASSIFIER = "classifier.json"
"""In the directory of a run that begins with a domain classifier: what that cost."""
_EVALUATED = 2048
_SYMBOLS = 256


class Start(NamedTuple):
    """α before training, where it is learned beforehand."""

    weight_params: Params
    report: Mapping[str, float]
    """For the summary: `preparation_seconds` and the like."""


@dataclass(frozen=True, eq=False)
class Context:
    """One method with one seed, before it is trained."""

    config: Config
    task: Task
    splits: Splits
    seed: int
    mesh: Mesh
    directory: Path
    """Of the run."""
    other: Callable[[str], tuple[Path, Mapping[str, Any]]]
    """Another method -> the directory of its finished run with this seed, and the summary; trained now if there is none."""

    @property
    def study(self) -> Study:
        """The settings that all methods share."""
        return self.config.study

    @property
    def prepared(self) -> Path:
        """Where what several runs use is kept: irreducible losses, proxies."""
        return self.config.prepared

    @property
    def guesses(self) -> int:
        """The number of outcomes that a guess chooses from: the loss of guessing is its logarithm."""
        return self.splits.classes or _SYMBOLS

    @property
    def gathering_mesh(self) -> Mesh | None:
        """The mesh of a state that is split over several devices."""
        return self.mesh if self.study.shard_state and self.mesh.size > 1 else None

    def model(self, options: ModelOptions) -> Model:
        """Build a main model of the task."""
        return self.task.model(self.config.task, self.splits, options)

    @cached_property
    def weighting(self) -> Weighting:
        """The task's weighting network over rows."""
        return self.task.weighting(self.config.task, self.splits)

    def evaluate(self, model: Model) -> Evaluate:
        """Return the function that measures a model."""
        return self.task.evaluate(self.config.task, self.splits, model)

    def recorded(self, method: str) -> Mapping[str, Any]:
        """Return the settings of `method` that this run was begun with; {} for a new run."""
        return files.recorded(self.directory).get(method, {})

    def weights_of(self, method: str, state: Any) -> tuple[Params, float]:
        """Return the last weighting network of another method's run with this seed, and the seconds of that run."""
        directory, summary = self.other(method)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.weight_params)
        found, _ = load_tree(directory / WEIGHTS, shapes)
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), found, state.weight_params), summary[
            "seconds"
        ]

    def classified(self, steps: int, rows: int, rate: float, flag: str) -> Callable[[Any], Start]:
        """Return what gives α the parameters of a domain classifier, trained on as many specific as generic rows.

        Args:
          steps: its updates; the best on held-out rows is kept.
          rows: most rows of either kind in a batch.
          rate: Adam's learning rate.
          flag: how the flags of steps and rows begin, for messages: "classifier.".

        Raises:
          UserError: for steps or rows below 1, or data without generic rows for validation.
        """
        if steps < 1 or rows < 1:
            raise UserError(
                f"--{flag}steps {steps} and --{flag}rows {rows} must be at least 1: they train the domain classifier."
            )
        held_out = self.splits.valid.get(GENERIC, self.splits.train)

        def start(state: Any) -> Start:
            file = self.directory / CLASSIFIER
            if files.steps_done(self.directory) and file.exists():  # the checkpoint has the network
                return Start(state.weight_params, files.read_json(file))
            logits = self.weighting.logits
            assert callable(logits)
            train = (self.splits.train, self.splits.specific)
            generic, specific = (
                Loader(data, min(rows, len(data)), seed=self.seed + i) for i, data in enumerate(train, 3_000_000)
            )
            found = train_domain_classifier(
                logits,
                jax.tree.map(lambda x: np.asarray(local(x)), state.weight_params),
                generic,
                specific,
                (_spread(held_out), _spread(self.splits.deciding)),
                optimizer=optax.adam(rate),
                steps=steps,
            )
            placed = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding), found.weight_params, state.weight_params
            )
            report = {"preparation_seconds": found.seconds, "classifier_valid_loss": found.valid_loss}
            files.write_json(file, report)
            return Start(placed, report)

        return start


def optimizer_of(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer of θ.

    Args:
      config: its settings.
      steps: length of the schedule.
    """
    rate = _rate(config, min(config.warmup, steps // 2), steps)
    if config.name == "adamw":
        return optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay)
    if config.name == "adam":
        return optax.adam(rate, b2=config.b2)
    momentum = optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), momentum)


def _rate(config: OptimizerConfig, warmup: int, steps: int) -> optax.ScalarOrSchedule:
    peak = config.learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps)
    warm = optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else None
    if config.schedule == "constant":
        return warm or peak
    factor = optax.piecewise_constant_schedule(1.0, dict.fromkeys(config.milestones, config.decay))
    return lambda count: (warm(count) if warm else peak) * factor(count)


def local(x: Any) -> Any:
    """Return this process's copy of a replicated array: every process evaluates for itself."""
    return x.addressable_data(0) if not x.is_fully_addressable else x


def _spread(data: Dataset) -> Batch:
    """At most `_EVALUATED` rows, at even distances from the whole."""
    return data.rows(np.linspace(0, len(data) - 1, min(_EVALUATED, len(data))).astype(np.int64))
