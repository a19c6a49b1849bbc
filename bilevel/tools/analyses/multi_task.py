"""Several specific sets at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bilevel.study.config import Config
from bilevel.study.context import Setting, Variant
from bilevel.study.registry import METHODS, chosen
from bilevel.study.sets import joined, named_sets
from bilevel.study.suite import opened
from bilevel.study.task import Task
from bilevel.tools.analyses.base import OF_COMPARISONS, Analysis, Planned
from bilevel.types import UserError


@dataclass(frozen=True)
class MultiTask(Analysis):
    """Several specific tasks at once (appendix B, table 12).

    The specific batch of each step comes from one of the sets, at random. What decides is the mean over the sets. Fine-tuning,
    and the domain classifier, use the rows of all sets together. --data.specific is not used. After Grangier et al. (2024).
    """

    task_weights: tuple[float, ...] | None = None
    """How often a specific batch comes from each set, in proportion; none given: from all alike. It concerns the specific
    batches that weights are learned from: mixed rows and candidates, contrastive selection, the domain classifier and fine-tuning
    use the rows of all sets together, and the specific measures are plain means over the sets."""

    name: ClassVar[str] = "multi_task"
    unused: ClassVar[tuple[str, ...]] = OF_COMPARISONS
    apart: ClassVar[bool] = True

    @classmethod
    def adapted(cls, config: Config) -> Config:
        """Return the methods of the paper's table, and fine-tuning."""
        finetune = dataclasses.replace(config.study.finetune, steps=1000)
        return super().adapted(config).with_study(compare="uniform,classifier,soba", finetune=finetune)

    def check(self, config: Config) -> None:
        """Refuse fewer than two sets, weights that are not theirs, and methods that need other runs."""
        count = len(config.study.specific_sets)
        if count < 2:
            raise UserError(f"--specific-sets names {count} specific sets: give at least two.")
        named_sets(config)
        if self.task_weights is not None and len(self.task_weights) != count:
            raise UserError(
                f"--task-weights has {len(self.task_weights)} numbers for {count} specific sets: give one for each."
            )
        for method in chosen(config.study.compare, None):
            if not METHODS[method].in_all:
                raise UserError(f"--compare names {method}, which takes what another run left: omit it.")

    def opened(self, config: Config, task: Task) -> list[Setting]:
        """Open the generic data, and all sets joined; raises a UserError, also for weights that are no proportions."""
        parts = {name: opened(own.with_study(run_dir=config.study.run_dir), task) for name, own in named_sets(config)}
        splits = joined({name: part.splits for name, part in parts.items()}, self.task_weights)
        data = dataclasses.replace(config.task.data, specific=" + ".join(config.study.specific_sets))
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, data=data))
        return [dataclasses.replace(next(iter(parts.values())), config=config, splits=splits)]

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan one run a method."""
        variant = Variant({"task_weights": self.task_weights})
        for method in chosen(setting.config.study.compare, setting.splits):
            yield Planned(method, setting.context(method, seed, variant))
