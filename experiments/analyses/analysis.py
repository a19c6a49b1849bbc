"""What the analyses share: flags, the runs one after the other, the table and the plot."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from bilevel.study.report.charts import draw, mean_line
from bilevel.study.tables import Column, by_method
from bilevel.training import read_metrics
from bilevel.training.metrics import Row
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError
from experiments.diverged import WHERE
from experiments.language_modeling import checks, search
from experiments.language_modeling.comparison import UNITS
from experiments.language_modeling.config import Config, MethodName
from experiments.language_modeling.corpora import Corpora, load_corpora
from experiments.language_modeling.variant import Variant
from experiments.runs import run_name

LEARNING = ("soba", "warm_soba", "dds", "anograd", "penalty", "implicit_cg", "implicit_neumann")
"""Methods that learn a weighting network of text while the model trains."""
OF_COMPARISONS = ("eval_only", "trials", "trial_steps", "same_seconds", "budget_seconds")
"""Flags of the comparison that an analysis has no use for."""


class Run(NamedTuple):
    """One training of an analysis."""

    label: str
    """The line of the table that it belongs to."""
    config: Config
    method: str
    seed: int
    variant: Variant = Variant()

    @property
    def directory(self) -> Path:
        """Where it is written."""
        return self.config.run_dir / run_name(self.method, self.seed)


class Record(NamedTuple):
    """A finished run."""

    run: Run
    summary: dict[str, Any]
    """What `experiments.language_modeling.diverged.attempt` returned."""
    metrics: Sequence[Row]
    """With the seconds of what preceded training, as in the summary; of a run that diverged, none."""


@dataclass(frozen=True)
class Analysis(Config, ABC):
    """The flags of the language-modelling experiment, of which an analysis makes runs."""

    method: MethodName | None = None
    """The method that learns the weights (default: soba)."""
    compare: str = Config.compare
    """Not for this analysis."""
    eval_only: bool = False
    """Not for analyses."""

    columns: ClassVar[Mapping[str, str]] = {
        "specific_valid_loss": "specific valid loss",
        "specific_test_loss": "specific test loss",
        "generic_loss": "generic loss",
        "effective_sample_size": "effective sample size",
        "seconds": "seconds",
        "finetuned_specific_test_loss": "test loss, fine-tuned",
    }
    """Results in the table, and their headings; those that no run has are left out."""
    heading: ClassVar[str] = "method"
    """Of the first column."""
    several_sets: ClassVar[bool] = False
    """Whether --specific-sets is of use."""
    apart: ClassVar[bool] = False
    """Whether the runs take nothing from each other: one that diverges is then a dash in the table, and the others are made."""
    x: ClassVar[str] = "step"
    """What the loss is plotted against: step or seconds."""

    def check(self) -> None:
        """Checks the flags before anything is read.

        Raises:
          UserError: if one is out of range or not for this analysis.
        """
        if self.coordinator is not None:
            raise UserError("--coordinator is not for analyses, which run in one process: leave it away.")
        self.check_numbers()
        for name in OF_COMPARISONS if self.several_sets else (*OF_COMPARISONS, "specific_sets"):
            if getattr(self, name) != getattr(Config, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{flag} is not for analyses: give it to experiments.language_modeling, or leave it away."
                )
        self.check_methods()

    def check_methods(self) -> None:
        """Checks which methods are asked for.

        Raises:
          UserError: for a method that this analysis cannot use.
        """
        if self.compare != Config.compare:
            raise UserError(f"--compare {self.compare} is not for this analysis: choose one method by --method.")
        if self.learner not in LEARNING:
            raise UserError(
                f"--method {self.learner} does not learn a weighting network while it trains: choose from {', '.join(LEARNING)}."
            )

    @property
    def learner(self) -> str:
        """The method that learns the weights."""
        return self.method or "soba"

    def settings(self, folder: str = "", **changes: Any) -> Config:
        """The flags of a run of this analysis, in a folder of its run directory."""
        flags = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**{**flags, "run_dir": self.run_dir / folder, **changes})

    def frozen(self, learned: Path, folder: str, **changes: Any) -> Config:
        """The flags of a run of the method `frozen` with the weights of the run in `learned`."""
        return self.settings(folder, weights=dataclasses.replace(self.weights, frozen_from=learned), **changes)

    def corpora(self) -> Corpora:
        """The data of all runs."""
        return load_corpora(self.settings())

    def parts(self) -> list[Analysis]:
        """The analyses that this one is made of, each with its own data: itself alone."""
        return [self]

    def measured(self, planned: Run, corpora: Corpora) -> dict[str, Any]:
        """What is added to the summary of a finished run, given the data of all runs."""
        return {}

    def check_runs(self, corpora: Corpora) -> None:
        """Checks the settings of all runs before the first begins, given the data of all.

        Raises:
          UserError: for settings that a run would refuse.
        """
        for planned in self.runs(self.seed):
            if planned.method == "frozen":  # its weights are learned by a run of those that are checked
                continue
            for config in (planned.config, *search.trial_configs(planned.config, planned.method, corpora)):
                checks.check_named(config, planned.method, corpora, planned.label)

    @abstractmethod
    def runs(self, seed: int) -> Iterator[Run]:
        """The runs of one seed, in their order; to list them reads nothing that they write."""

    def results(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """The lines of the table, one a run, with values named as in `columns`; `method` is the label."""
        return [record.summary | {"method": record.run.label} for record in records]

    def table(self, results: Sequence[Mapping[str, Any]]) -> str:
        """The table of some results, as Markdown."""
        columns = {name: Column(title, 3 if name.endswith("loss") else 0) for name, title in self.columns.items()}
        return f"{by_method(results, columns, self.heading)}\n\n{UNITS}"

    def plot(self, records: Sequence[Record]) -> str:
        """The specific validation loss of each line of the table, the mean over seeds and each seed, as SVG."""
        rows: dict[str, list[Sequence[Row]]] = {}
        for record in records:
            if WHERE in record.summary:
                continue
            rows.setdefault(record.run.label, []).append(record.metrics)
        lines = [mean_line(label, seeds, "specific_valid_loss", self.x) for label, seeds in rows.items()]
        x_label = "training seconds" if self.x == "seconds" else "step"
        return draw(lines, x_label=x_label, y_label="specific valid loss (nats per byte)")


def write(analysis: Analysis, name: str, records: Sequence[Record]) -> str:
    """Writes NAME.json, NAME.md and NAME.svg into the run directory; returns the table.

    Args:
      analysis: says what is in the table and the plot.
      name: of the files.
      records: the finished runs of all seeds.
    """
    results = analysis.results(records)
    text = analysis.table(results)
    write_atomically(analysis.run_dir / f"{name}.json", json.dumps(results, indent=2) + "\n")
    write_atomically(analysis.run_dir / f"{name}.md", text + "\n")
    write_atomically(analysis.run_dir / f"{name}.svg", analysis.plot(records))
    return text


def record_of(run: Run, summary: dict[str, Any]) -> Record:
    """A finished run with its metrics."""
    seconds, begin = summary.get("preparation_seconds", 0.0), summary.get("preparation_step", 0)
    rows = [] if WHERE in summary else read_metrics(run.directory / "metrics.jsonl")
    rows = [row | {"seconds": row["seconds"] + seconds * (row["step"] > begin)} for row in rows]
    return Record(run, summary, rows)
