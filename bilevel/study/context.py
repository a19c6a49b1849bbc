"""What the runs of a comparison share, and one run of them: a method with a seed, and a directory of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import optax
from jax.sharding import Mesh

from bilevel import training
from bilevel.data import digest
from bilevel.study.config import Config, Study
from bilevel.study.domain_weights import domain_weighting
from bilevel.study.task import Evaluate, Model, ModelOptions, Splits, Task, Weighting
from bilevel.training.optimizers import optimizer_of
from bilevel.training.run_dir import CONFIG_NAME, flatten, recorded
from bilevel.training.settings import may_change, of_run, plain

RESULT = "result.json"
"""In the directory of a run that has ended: its summary."""
CONTENT_HASH = "content_hash"
"""Of the data, in a run's settings: a path may hold other data tomorrow."""
Differing = dict[str, tuple[Any, Any]]
"""Dotted name of a setting -> (as recorded, as this command has it)."""


class Variant(NamedTuple):
    """What an analysis does in another way than a run of its flags would; by default nothing."""

    settings: Mapping[str, Any] = MappingProxyType({})
    """What of these changes decides the outcome; kept and compared with the run's other settings."""
    source: Callable[[training.Data | training.Resident, Mesh], training.Source] = lambda data, mesh: data
    """What the batches come from, given what they would come from and the devices."""
    streams: bool = False
    """Whether the batches must travel, whatever --resident says."""
    on_selected: training.OnSelected | None = None
    """Called with the rows that were trained on; see `bilevel.training.train`."""
    on_state: training.OnState | None = None
    """Called every `state_every` steps; see `bilevel.training.train`."""
    state_every: int = 0


AS_FLAGS_SAY = Variant()


@dataclass(frozen=True, eq=False)
class Setting:
    """What the runs of a comparison share."""

    config: Config
    task: Task
    splits: Splits
    mesh: Mesh
    others: Mapping[str, Config] = dataclasses.field(default_factory=dict, kw_only=True)
    """Method -> the configuration of its runs; of those not named, `config`."""

    def of(self, config: Config) -> Self:
        """The same with another configuration."""
        return dataclasses.replace(self, config=config)

    def at(self, run_dir: Path) -> Self:
        """The same with another run directory."""
        return self.of(self.config.with_study(run_dir=run_dir))

    def context(self, method: str, seed: int, variant: Variant = AS_FLAGS_SAY) -> Context:
        """One run, with this configuration."""
        return Context(self.config, self.task, self.splits, self.mesh, method, seed, variant, others=self.others)

    def own_context(self, method: str, seed: int) -> Context:
        """One run, with the configuration of its method."""
        return self.of(self.others.get(method, self.config)).context(method, seed)


@dataclass(frozen=True, eq=False)
class Context(Setting):
    """One method with one seed: what its plan may use, and what its directory is compared with."""

    method: str
    seed: int
    variant: Variant = AS_FLAGS_SAY

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.config.study.run_dir / f"{self.method}-seed{self.seed}"

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
        """The weighting network: the task's over rows, or a number for each domain."""
        if self.study.weigh == "domains":
            return domain_weighting(self.splits)
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

    def scored_parts(self, model: Model) -> int:
        """Return in how many equal parts a model scores a big batch: each of at most `model.at_once` rows of a device.

        Where statistics of the rows scored together count, these are of a micro-batch.
        """
        least, rows = self.study.micro_batches, self.loaded_rows(picks=True) // self.mesh.size
        if model.scoring is not None:
            return least
        most = rows // max(1, model.at_once // 4)
        parts = range(max(least, -(-rows // model.at_once)), most + 1)
        return next((count for count in parts if rows % count == 0), least)

    def identified(self, name: str, file: Path | None, parts: Callable[[], Iterable[str | bytes]]) -> dict[str, str]:
        """Return the setting `name`: a digest of what `parts` reads from a file of another run, wherever that lies.

        If the file is gone, what this run was begun with stands.
        """
        before = recorded(self.directory).get(self.method, {})
        gone = file is None or not file.exists()
        return {name: before[name] if gone and name in before else digest(parts())}

    def identity(self, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """Return the settings of the run: those that decide its outcome, and those that may change when it continues.

        `more` are digests of what it takes from elsewhere.
        """
        own = {**plain(self.config.methods[self.method]), **more}
        return {
            "task": self.task.name, "method": self.method, **of_run(self.study), "seed": self.seed,
            **of_run(self.config.task), **({self.method: own} if own else {}), CONTENT_HASH: self.splits.hashes,
            **({"variant": dict(self.variant.settings)} if self.variant.settings else {}),
        }  # fmt: skip

    def changeable(self) -> list[str]:
        """Return the dotted names of the settings that may change when the run continues."""
        own = may_change(self.config.methods[self.method], f"{self.method}.")
        return [*may_change(self.study), *may_change(self.config.task), *own]

    def differing(self) -> Differing:
        """Return the settings that decide the outcome and differ between the run in the directory and this command.

        Digests of what each seed takes from another run do not count.
        """
        old, new, free = flatten(recorded(self.directory)), flatten(self.identity()), {*self.changeable()}
        names = sorted(name for name in {*old, *new} - free if not name.endswith("_digest"))
        return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def run_of(folder: Path) -> tuple[str, int] | None:
    """Return the method and the seed that a directory is named after; None for another directory."""
    found = re.fullmatch(r"(.+)-seed(\d+)", folder.name)
    return (found[1], int(found[2])) if found else None


def begun(folder: Path) -> list[tuple[str, int]]:
    """Return method and seed of the runs that were begun in a folder."""
    found = [run_of(file.parent) for file in sorted(folder.glob(f"*/{CONFIG_NAME}"))]
    return [run for run in found if run is not None]
