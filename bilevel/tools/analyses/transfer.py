"""Do weights that a small model learned serve a large one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from bilevel.study.config import Config
from bilevel.study.context import Setting
from bilevel.study.task import Measure
from bilevel.tools.analyses.base import OfLearner, Planned, baseline, in_folder
from bilevel.training.metrics import first_reaching
from bilevel.training.settings import filled
from bilevel.types import UserError


@dataclass(frozen=True)
class Transfer(OfLearner):
    """Weights of a small model reused to train a large one (tables 9 and 10, figure 1).

    Trains the small model with SOBA (or --learner), and the large one with uniform sampling, with SOBA, and with the small
    model's weights, frozen. The plot shows the valid measure against training seconds; they include those of a domain classifier
    that warm_soba begins with, but those of the frozen weights leave out the training of the small model, which is a line of
    its own. After Grangier et al. (2024), section 6.4.
    """

    small: str | None = None
    """Network of the small model; none given: --model.network."""
    large: str | None = None
    """Network of the large model, as --model.network takes it. The paper: --small small --large large."""

    name: ClassVar[str] = "transfer"
    x: ClassVar[str] = "seconds"

    def check(self, config: Config) -> None:
        """Refuse models that are one, or do not exist."""
        super().check(config)
        if not hasattr(config.task.model, "network"):
            raise UserError("The models of this task have no --model.network, so that there is no larger one: omit it.")
        small = self.small or config.task.model.network
        if self.large is None or small == self.large:
            raise UserError(f"--small {small} --large {self.large}: give the networks of two models that differ.")
        for network in (small, self.large):
            _of_network(config, network)

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan the small model, then the large one three times."""
        small, large = self.small or setting.config.task.model.network, str(self.large)
        first, second = (
            in_folder(setting.of(_of_network(setting.config, network)), network.replace("/", "_"))
            for network in (small, large)
        )
        learner = first.context(self.learner, seed)
        yield Planned(f"{small}: {self.learner}", learner)
        for method in ("uniform", self.learner):
            yield Planned(f"{large}: {method}", second.context(method, seed))
        task = _weighing_as(setting.task, first.config.task)
        frozen = dataclasses.replace(self.frozen(second, learner.directory), task=task)
        yield Planned(f"{large}: weights from {small}", frozen.context("frozen", seed))

    def added(self, run: Planned, runs: Sequence[Planned], measure: Measure) -> dict[str, Any]:
        """Return the seconds at which a large model passes the value that uniform sampling of the same seed ends with."""
        if run.context.config.task.model.network != self.large:
            return {}
        name = f"valid_{measure.name}"
        *_, end = (row[name] for row in baseline(run, runs).metrics if name in row)
        at = first_reaching(run.metrics, name, end, lower_is_better=measure.lower_is_better)
        return {"seconds_to_uniform": at and at["seconds"]}


def _weighing_as(task: Any, config: Any) -> Any:
    """The task with the weighting network of other settings: it may be as large as the main model that learned it."""
    parts = {name: getattr(task, name) for name in dir(task) if not name.startswith("_")}
    return SimpleNamespace(**{**parts, "weighting": lambda _, splits: task.weighting(config, splits)})


def _of_network(config: Config, network: str) -> Config:
    """The configuration with another main model; raises a UserError where the task has no such one."""
    return dataclasses.replace(config, task=filled(config.task, {"model": {"network": network}}, "--small or --large"))
