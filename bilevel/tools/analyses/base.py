"""What the analyses share: their runs one after the other, the table and the plot."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from bilevel.devices.processes import say
from bilevel.study import comparison, flags, search
from bilevel.study.config import Config
from bilevel.study.context import Context, Setting
from bilevel.study.methods.learning import LEARNING
from bilevel.study.methods.picking import Picking
from bilevel.study.methods.plain import Frozen
from bilevel.study.registry import with_first
from bilevel.study.results import WHERE, attempt, refuse
from bilevel.study.suite import check_methods, opened
from bilevel.study.tables import Column
from bilevel.study.task import Measure, Task
from bilevel.training import read_metrics
from bilevel.training.charts import draw, mean_line
from bilevel.training.metrics import Row
from bilevel.training.run_dir import write_atomically, write_json
from bilevel.training.settings import flag_of, value_of
from bilevel.types import UserError

OF_COMPARISONS = ("eval_only", "trials", "trial_steps", "same_seconds", "budget_seconds", "targets", "hosts")
"""Flags of the comparison that no analysis has a use for."""


class Planned(NamedTuple):
    """One training of an analysis."""

    label: str
    """The line of the table that it belongs to."""
    context: Context
    summary: Mapping[str, Any] = {}
    """Empty until it has ended."""
    metrics: Sequence[Row] = ()
    """With the seconds of what preceded training, as in the summary; of a run that diverged, none."""


@dataclass(frozen=True)
class Analysis(ABC):
    """An analysis: its own flags as fields, the runs that it makes, and what it adds to their table."""

    name: ClassVar[str]
    """Of the command, of the files, and of the run directory below runs/."""
    unused: ClassVar[tuple[str, ...]] = (*OF_COMPARISONS, "compare", "specific_sets")
    """Flags of the study that it refuses."""
    apart: ClassVar[bool] = False
    """Whether the runs take nothing from each other: one that diverges is then a dash in the table, and the others are made."""
    x: ClassVar[str] = "step"
    """What the deciding measure is plotted against: step or seconds."""
    columns: ClassVar[Mapping[str, Column]] = {}
    """Of the table, besides those of a comparison."""

    methods = staticmethod(flags.compared)
    """The configuration without flags, and the arguments -> the methods whose settings are flags."""

    @classmethod
    def adapted(cls, config: Config) -> Config:
        """Return the defaults of this analysis."""
        return config.with_study(run_dir=Path("runs") / cls.name, targets=())

    @abstractmethod
    def check(self, config: Config) -> None:
        """Check the flags before anything is read; raises a UserError."""

    def opened(self, config: Config, task: Task) -> list[Setting]:
        """Open the data of all runs, one setting for each data set; raises a UserError."""
        return [opened(config, task)]

    @abstractmethod
    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan the runs of one seed, in their order; this reads nothing that they write."""

    def added(self, run: Planned, runs: Sequence[Planned], measure: Measure) -> dict[str, Any]:
        """Return what is added to the summary of a run that ended, given all runs."""
        return {}


@dataclass(frozen=True)
class OfLearner(Analysis):
    """An analysis of one method that learns weights."""

    learner: str = "soba"
    """The method that learns the weights."""

    sparse: ClassVar[bool] = True
    """Whether all runs pick rows from a big batch, as frozen weights do."""

    @classmethod
    def adapted(cls, config: Config) -> Config:
        """Replace a task's settings for dense weights, their rate too, by those that pick rows."""
        config = super().adapted(config)
        for name in LEARNING if cls.sparse else ():
            if (own := config.methods[name]).mode != "sparse":
                config = config.with_method(name, dataclasses.replace(own, mode="sparse", weight_learning_rate=None))
        return config

    @staticmethod
    def methods(before: Config, arguments: Sequence[str]) -> Sequence[str]:
        """Return the learner."""
        if (found := value_of(arguments, "--learner") or "soba") not in LEARNING:
            what = "does not learn a weighting network while it trains"
            raise UserError(f"--learner {found} {what}: choose from {', '.join(LEARNING)}.")
        return [found]

    def check(self, config: Config) -> None:
        """Refuse weights of rows that were not picked."""
        if self.sparse and config.methods[self.learner].mode != "sparse":
            flag = flag_of(f"{self.learner}.mode")
            raise UserError(f"{flag} dense is not for this analysis, which picks rows from a big batch: omit it.")

    def frozen(self, setting: Setting, learned: Path) -> Setting:
        """Return the setting of the method `frozen`, with the filter of the learner and the weights of its run `learned`."""
        own = setting.config.methods[self.learner]
        filtering = {f.name: getattr(own, f.name) for f in dataclasses.fields(Picking)}
        return setting.of(setting.config.with_method("frozen", Frozen(**filtering, weights=learned)))


def in_folder(setting: Setting, folder: str) -> Setting:
    """Return the setting with a folder of the run directory for its runs."""
    return setting.at(setting.config.study.run_dir / folder)


def baseline(run: Planned, runs: Sequence[Planned]) -> Planned:
    """Return the run with uniform sampling of the same data and seed."""
    seed, splits = run.context.seed, run.context.splits
    same = (other for other in runs if other.context.seed == seed and other.context.splits is splits)
    return next(other for other in same if other.context.method == "uniform")


def analyse(analysis: Analysis, config: Config, task: Task) -> None:
    """Make the runs of all seeds, and write NAME.json, NAME.md and NAME.svg; at the end, a UserError names what diverged."""
    settings, study, measure = analysis.opened(config, task), config.study, task.measures[0]
    for run in (run for setting in settings for run in analysis.runs(setting, study.seed)):
        if run.context.method != "frozen":  # its weights are learned by a run of those that are checked
            check_methods(run.context, with_first([run.context.method]))
    seeds = [(setting, seed) for setting in settings for seed in study.seed_numbers]
    runs = [_made(run, analysis.apart) for setting, seed in seeds for run in analysis.runs(setting, seed)]
    added = [analysis.added(run, runs, measure) if run.metrics else {} for run in runs]
    rows = [{**run.summary, "method": run.label, **more} for run, more in zip(runs, added, strict=True)]
    text, file = comparison.table(rows, task, analysis.columns), study.run_dir / analysis.name
    write_json(file.with_suffix(".json"), rows)
    write_atomically(file.with_suffix(".md"), text + "\n")
    write_atomically(file.with_suffix(".svg"), _plot(analysis, runs, measure))
    print(f"{text}\n\nPlot: {file}.svg")
    refuse(rows)


def _made(run: Planned, apart: bool) -> Planned:
    """Make a run; where the runs are apart, one that diverges ends nothing."""
    context = run.context
    if context.study.progress:
        say(f"{run.label}, seed {context.seed}")
    summary = attempt(context.of(search.searched(context, context.method)), not apart)
    ended = WHERE not in summary
    return run._replace(summary=summary, metrics=metrics_of(context.directory, summary) if ended else ())


def metrics_of(directory: Path, summary: dict[str, Any]) -> list[Row]:
    """Return the metrics of a run; their seconds include what preceded training."""
    rows = read_metrics(directory / "metrics.jsonl")
    return [row | {"seconds": row["seconds"] + comparison.preparation(summary, row["step"])} for row in rows]


def _plot(analysis: Analysis, runs: Sequence[Planned], measure: Measure) -> str:
    """The valid measure of each line of the table, the mean over seeds and each seed, as SVG."""
    name, labels = f"valid_{measure.name}", dict.fromkeys(run.label for run in runs if run.metrics)
    lines = [mean_line(of, [run.metrics for run in runs if run.label == of], name, analysis.x) for of in labels]
    x_label = "training seconds" if analysis.x == "seconds" else "step"
    return draw(lines, x_label=x_label, y_label=f"valid {measure.label}")
