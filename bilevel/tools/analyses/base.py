"""What the analyses share: flags, the runs one after the other, the table and the plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

from bilevel.study import diverged, files, flags, search
from bilevel.study.config import Config, flag_of
from bilevel.study.methods.learning import Learning, MetaWeightNet
from bilevel.study.methods.picking import Picking
from bilevel.study.methods.plain import Frozen
from bilevel.study.registry import METHODS, with_first
from bilevel.study.report.charts import draw, mean_line
from bilevel.study.run import Setting, Variant, directory_of
from bilevel.study.suite import check_methods, opened
from bilevel.study.tables import Column, by_method
from bilevel.study.task import GENERIC, Measure, Task
from bilevel.training import TrainingDiverged, read_metrics
from bilevel.training.metrics import Row
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError

Results: TypeAlias = Sequence[Mapping[str, Any]]
LEARNING = tuple(
    name for name, spec in METHODS.items()
    if issubclass(spec.settings, Learning) and not issubclass(spec.settings, MetaWeightNet)
)  # fmt: skip
"""Methods that learn a weighting network of rows while the model trains."""
OF_COMPARISONS = ("eval_only", "trials", "trial_steps", "same_seconds", "budget_seconds", "targets", "hosts")
"""Flags of the comparison that no analysis has a use for."""


class Planned(NamedTuple):
    """One training of an analysis."""

    label: str
    """The line of the table that it belongs to."""
    setting: Setting
    method: str
    seed: int
    variant: Variant = Variant()

    @property
    def directory(self) -> Path:
        """Where it is written."""
        return directory_of(self.setting.config, self.method, self.seed)


class Record(NamedTuple):
    """A finished run."""

    run: Planned
    summary: dict[str, Any]
    metrics: Sequence[Row]
    """With the seconds of what preceded training, as in the summary; of a run that diverged, none."""


@dataclass(frozen=True)
class Analysis:
    """An analysis: its own flags as fields, the runs that it makes, and what it shows of them."""

    name: ClassVar[str]
    """Of the command, of the files, and of the run directory below runs/."""
    heading: ClassVar[str] = "method"
    """Of the first column."""
    unused: ClassVar[tuple[str, ...]] = (*OF_COMPARISONS, "compare", "specific_sets")
    """Flags of the study that it refuses."""
    apart: ClassVar[bool] = False
    """Whether the runs take nothing from each other: one that diverges is then a dash in the table, and the others are made."""
    x: ClassVar[str] = "step"
    """What the deciding measure is plotted against: step or seconds."""

    @classmethod
    def adapted(cls, config: Config) -> Config:
        """Return the defaults of this analysis."""
        return config.with_study(run_dir=Path("runs") / cls.name, targets=())

    @staticmethod
    def methods(before: Config, arguments: Sequence[str]) -> Sequence[str]:
        """Return the methods whose settings are flags."""
        return flags.compared(before, arguments)

    def check(self, config: Config) -> None:
        """Check the flags before anything is read; raises a UserError."""

    def opened(self, config: Config, task: Task) -> list[Setting]:
        """Open the data of all runs: one setting for each data set."""
        return [opened(config, task)]

    def runs(self, setting: Setting, seed: int) -> Iterator[Planned]:
        """Plan the runs of one seed, in their order; this reads nothing that they write."""
        raise NotImplementedError

    def measured(self, planned: Planned) -> dict[str, Any]:
        """Return what is added to the summary of a finished run."""
        return {}

    def results(self, records: Sequence[Record], measure: Measure) -> list[dict[str, Any]]:
        """Return the lines of the table, one a run, with values named as in `columns`; `method` is the label."""
        return [record.summary | {"method": record.run.label} for record in records]

    def columns(self, measure: Measure, results: Results) -> dict[str, Column]:
        """Return the columns of the table of some results; those that no run has are left out."""
        name, title, digits, *_ = measure
        return {
            f"valid_{name}": Column(f"valid {title}", digits),
            f"test_{name}": Column(f"test {title}", digits),
            f"valid_{name}/{GENERIC}": Column(f"{GENERIC} valid {title}", digits),
            "effective_sample_size": Column("effective sample size"),
            "seconds": Column("seconds"),
            f"finetuned_test_{name}": Column(f"test {title}, fine-tuned", digits),
        }


@dataclass(frozen=True)
class OfLearner(Analysis):
    """An analysis of one method that learns weights."""

    learner: str = "soba"
    """The method that learns the weights."""

    sparse: ClassVar[bool] = True
    """Whether all runs pick rows from a big batch, as frozen weights do."""

    @classmethod
    def adapted(cls, config: Config) -> Config:
        """As `Analysis.adapted`; a task's settings for dense weights, their rate too, give way to those that pick rows."""
        config = super().adapted(config)
        for name in LEARNING if cls.sparse else ():
            if (own := config.methods[name]).mode != "sparse":
                config = config.with_method(name, dataclasses.replace(own, mode="sparse", weight_learning_rate=None))
        return config

    @staticmethod
    def methods(before: Config, arguments: Sequence[str]) -> Sequence[str]:
        """Return the learner."""
        if (found := flags.value(arguments, "--learner") or "soba") not in LEARNING:
            known = ", ".join(LEARNING)
            raise UserError(
                f"--learner {found} does not learn a weighting network while it trains: choose from {known}."
            )
        return [found]

    def check(self, config: Config) -> None:
        """As `Analysis.check`."""
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
    return setting.of(setting.config.with_study(run_dir=setting.config.study.run_dir / folder))


def analyse(analysis: Analysis, config: Config, task: Task) -> None:
    """Make the runs of all seeds, and write NAME.json, NAME.md and NAME.svg.

    Raises:
      UserError: for data or settings that are not possible, and at the end for runs that diverged.
    """
    settings, (measure, *_), file = analysis.opened(config, task), task.measures, config.study.run_dir / analysis.name
    for planned in (run for setting in settings for run in analysis.runs(setting, config.study.seed)):
        if planned.method != "frozen":  # its weights are learned by a run of those that are checked
            check_methods(planned.setting, with_first([planned.method]))
    seeds = [(setting, seed) for setting in settings for seed in config.study.seed_numbers]
    records = [_record(analysis, planned) for setting, seed in seeds for planned in analysis.runs(setting, seed)]
    results = analysis.results(records, measure)
    unit = f"{measure.title.capitalize()} in {measure.unit}; seconds" if measure.unit else "Seconds"
    text = f"{by_method(results, analysis.columns(measure, results), analysis.heading)}\n\n{unit} of training."
    files.write_json(file.with_suffix(".json"), results)
    write_atomically(file.with_suffix(".md"), text + "\n")
    write_atomically(file.with_suffix(".svg"), _plot(analysis, records, measure))
    print(f"{text}\n\nPlot: {file}.svg")
    diverged.refuse(record.summary for record in records)


def _record(analysis: Analysis, planned: Planned) -> Record:
    """Make a run; where the runs are apart, of one that diverged what is known."""
    _, setting, method, seed, variant = planned
    if setting.config.study.progress:
        files.say(f"{planned.label}, seed {seed}")
    try:
        config = search.searched(setting, method)
        summary = diverged.attempt(setting.of(config), method, seed, not analysis.apart, variant)
    except TrainingDiverged as error:
        if not analysis.apart:
            raise
        files.say(f"{planned.label} is left out: {error}")
        summary = {"method": method, "seed": seed, diverged.WHERE: str(search.folder_of(setting.config, method))}
    if diverged.WHERE in summary:
        return Record(planned, summary, [])
    return record_of(planned, summary | analysis.measured(planned))


def record_of(run: Planned, summary: dict[str, Any]) -> Record:
    """Return a finished run with its metrics."""
    seconds, begin = summary.get("preparation_seconds", 0.0), summary.get("preparation_step", 0)
    rows = read_metrics(run.directory / "metrics.jsonl")
    return Record(run, summary, [row | {"seconds": row["seconds"] + seconds * (row["step"] > begin)} for row in rows])


def _plot(analysis: Analysis, records: Sequence[Record], measure: Measure) -> str:
    """The valid measure of each line of the table, the mean over seeds and each seed, as SVG."""
    rows: dict[str, list[Sequence[Row]]] = {}
    for record in records:
        if record.metrics:
            rows.setdefault(record.run.label, []).append(record.metrics)
    lines = [mean_line(label, seeds, f"valid_{measure.name}", analysis.x) for label, seeds in rows.items()]
    unit = f" ({measure.unit})" if measure.unit else ""
    x_label = "training seconds" if analysis.x == "seconds" else "step"
    return draw(lines, x_label=x_label, y_label=f"valid {measure.title}{unit}")
