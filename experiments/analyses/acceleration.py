"""Do gradient alignments say what learned weights will gain?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bilevel.study.tables import mean_cell
from bilevel.training.run_dir import write_atomically
from bilevel.types import UserError
from experiments.analyses.analysis import Analysis, Record, Run
from experiments.diagnose import config as diagnose
from experiments.diagnose import report
from experiments.diagnose.measure import Measurement, measured_checkpoint
from experiments.language_modeling import build
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.suite import named_sets, set_name
from experiments.runs import read_json

RATES = ("sar", "gar")
MEASURED = "acceleration.json"
"""In the directory of a uniform run: the rates of its last parameters."""


@dataclass(frozen=True)
class Acceleration(Analysis):
    """Acceleration rates beside the gain of learned weights (table 8).

    For each specific set, trains with uniform sampling and with SOBA (or --method). On the uniform model at its end it measures
    how often a row's gradient aligns better with a batch of its own kind than with one of the other: the specific and the
    generic acceleration rate (SAR, GAR). The gain is uniform's test loss on the specific set minus the learner's.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.3.
    """

    run_dir: Path = Path("runs/acceleration")
    """Where everything is written; the same command continues there."""
    rows: int = diagnose.DiagnoseConfig.rows
    """m: specific rows, and as many generic ones, whose gradients are compared; from the valid parts."""
    pairs: int = diagnose.DiagnoseConfig.pairs
    """P: pairs of a specific and a generic batch that they are compared with; from the train parts."""
    batch_rows: int = diagnose.DiagnoseConfig.batch_rows
    """Rows in each of these batches. Fewer mean noisier gradients, and rates nearer to chance."""

    several_sets: ClassVar[bool] = True

    def check(self) -> None:
        """As `Analysis.check`, and the flags of this analysis."""
        super().check()
        self.options(self.seed).check()
        if self.finetune_steps:
            raise UserError(
                f"--finetune-steps {self.finetune_steps} is not for this analysis, whose gain is that of training: leave it away."
            )
        self.parts()

    def options(self, seed: int) -> diagnose.DiagnoseConfig:
        """What is measured on a run with this seed."""
        return diagnose.DiagnoseConfig(rows=self.rows, pairs=self.pairs, batch_rows=self.batch_rows, seed=seed)

    def parts(self) -> list[Analysis]:
        """One analysis for each specific set."""
        return [
            dataclasses.replace(self, specific_sets=(), run_dir=own.run_dir, data=own.data)
            for _, own in named_sets(self)
        ]

    def corpora(self) -> Corpora:
        """The data of one set.

        Raises:
          UserError: for data that is missing, broken or too small to train or to measure on.
        """
        corpora = super().corpora()
        Measurement(self.options(self.seed), build.build_model(self.settings()), corpora)
        return corpora

    def runs(self, seed: int) -> Iterator[Run]:
        """Uniform sampling, then the learner."""
        for method in ("uniform", self.learner):
            yield Run(f"{set_name(self.data.specific)}: {method}", self.settings(), method, seed)

    def measured(self, planned: Run, corpora: Corpora) -> dict[str, float]:
        """The rates of the uniform model, measured once for the same flags."""
        if planned.method != "uniform":
            return {}
        settings = {name: getattr(self, name) for name in ("rows", "pairs", "batch_rows")}
        file = planned.directory / MEASURED
        kept = read_json(file) if file.exists() else {}
        if kept.get("settings") == settings:
            return kept["results"]
        run = diagnose.Run(planned.config, planned.method, planned.seed)
        measure = Measurement(self.options(planned.seed), build.build_model(planned.config), corpora)
        found = measured_checkpoint(planned.directory, run, measure)
        results = {name: found[name] for rate in RATES for name in (rate, f"{rate}_error")}
        write_atomically(file, json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
        return results

    def results(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """One line for each set and seed."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for run, summary, _ in records:
            found.setdefault((set_name(run.config.data.specific), run.seed), {})[run.method] = summary
        return [
            {"specific_set": name, "seed": seed, "learner": self.learner} | _gain(both["uniform"], both[self.learner])
            for (name, seed), both in found.items()
        ]

    def table(self, results: Sequence[Mapping[str, Any]]) -> str:
        """One line for each set."""
        heads = ("specific set", "seeds", "test loss, uniform", f"test loss, {self.learner}", "gain", "SAR", "GAR")
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for name, rows in _by_set(results).items():
            losses = [mean_cell([row[x] for row in rows], 3) for x in ("uniform_test_loss", "test_loss", "gain")]
            mean = _mean(rows)
            rates = [report.rate(mean, rate) for rate in RATES]
            lines.append(f"| {' | '.join([name, str(len(rows)), *losses, *rates])} |")
        return "\n".join(lines) + (
            "\n\nTest losses on the specific set in nats per byte; rates of the uniform model at its end ± one standard error of "
            "measuring (chance is 50 %)."
        )

    def plot(self, records: Sequence[Record]) -> str:
        """The rates of each set against its gain, as SVG."""
        means = {name: _mean(rows) for name, rows in _by_set(self.results(records)).items()}
        label = f"gain of {self.learner} over uniform (nats per byte)"
        return report.plot(list(means.values()), "gain", label, list(means))


def _gain(uniform: Mapping[str, Any], learner: Mapping[str, Any]) -> dict[str, float]:
    losses = uniform["specific_test_loss"], learner["specific_test_loss"]
    rates = {name: uniform[name] for rate in RATES for name in (rate, f"{rate}_error")}
    return {"uniform_test_loss": losses[0], "test_loss": losses[1], "gain": losses[0] - losses[1], **rates}


def _by_set(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        found.setdefault(row["specific_set"], []).append(row)
    return found


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over seeds, and the standard errors of the mean rates."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("gain", *RATES)}
    errors = {f"{name}_error": math.hypot(*(row[f"{name}_error"] for row in rows)) / len(rows) for name in RATES}
    return means | errors
