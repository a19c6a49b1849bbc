"""What a method's plan may use: the settings, the data, the task's parts, and what other runs left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh

from bilevel.data import digest
from bilevel.study.config import Config, Study
from bilevel.study.task import Evaluate, Model, ModelOptions, Splits, Task, Weighting
from bilevel.training.optimizers import optimizer_of
from bilevel.training.run_dir import recorded


@dataclass(frozen=True, eq=False)
class Context:
    """One method with one seed, before it is trained."""

    config: Config
    task: Task
    splits: Splits
    method: str
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
    def flag(self) -> str:
        """What the flags of the method begin with, for messages: rho-loss."""
        return self.method.replace("_", "-")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of θ."""
        return optimizer_of(self.study.optimizer, self.study.schedule_steps or self.study.steps)

    def model(self, **options: Any) -> Model:
        """Build a main model of the task; the options are those of `ModelOptions`."""
        return self.task.model(self.config.task, self.splits, ModelOptions(**options))

    def trained_model(self, **options: Any) -> Model:
        """Build the main model of the run, whose state may be split over several devices."""
        split = self.study.shard_state and self.mesh.size > 1
        return self.model(mesh=self.mesh if split else None, **options)

    @cached_property
    def weighting(self) -> Weighting:
        """The task's weighting network over rows."""
        return self.task.weighting(self.config.task, self.splits)

    def evaluate(self, model: Model) -> Evaluate:
        """Return the function that measures a model."""
        return self.task.evaluate(self.config.task, self.splits, model)

    def loaded_rows(self, picks: bool) -> int:
        """Return the rows that a step loads; of a training set smaller than the big batch, all that its parts can share."""
        size, rows = self.study.big_batch_size, len(self.splits.train)
        if not picks:
            return self.study.batch_size
        parts = self.mesh.size * self.study.micro_batches
        return size if size <= rows else rows // parts * parts

    def identified(self, name: str, file: Path | None, parts: Callable[[], Iterable[str | bytes]]) -> dict[str, str]:
        """Return the setting `name`: a digest of what `parts` reads from a file of another run, wherever that lies.

        If the file is gone, what this run was begun with stands.
        """
        before = recorded(self.directory).get(self.method, {})
        gone = file is None or not file.exists()
        return {name: before[name] if gone and name in before else digest(parts())}
