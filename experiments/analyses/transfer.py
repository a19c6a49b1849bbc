"""Do weights that a small model learned serve a large one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from bilevel.training.metrics import Row
from bilevel.types import UserError
from experiments.analyses.analysis import Analysis, Record, Run

Size: TypeAlias = Literal["xs", "small", "medium", "large"]


@dataclass(frozen=True)
class Transfer(Analysis):
    """Weights of a small model reused to train a large one (tables 9 and 10, figure 1).

    Trains the small model with SOBA (or --method), and the large one with uniform sampling, with SOBA, and with the small
    model's weights, frozen. The plot shows the specific loss against training seconds; they include those of a domain classifier
    that warm_soba begins with, but those of the frozen weights leave out the training of the small model, which is a line of
    its own.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.4.
    """

    run_dir: Path = Path("runs/transfer")
    """Where everything is written; the same command continues there."""
    small: Size = "xs"
    """Size of the small model, as --model.size, which is not used here."""
    large: Size = "small"
    """Size of the large model. The paper: --small small --large large."""

    columns: ClassVar[Mapping[str, str]] = {
        **Analysis.columns,
        "seconds_to_baseline": "seconds to the large baseline's last loss",
    }
    heading: ClassVar[str] = "model and method"
    x: ClassVar[str] = "seconds"

    def check(self) -> None:
        """As `Analysis.check`, and the flags of this analysis."""
        super().check()
        if self.small == self.large:
            raise UserError(f"--small {self.small} --large {self.large}: give two sizes that differ.")

    def runs(self, seed: int) -> Iterator[Run]:
        """The small model, then the large one three times."""
        small, large = (dataclasses.replace(self.model, size=size) for size in (self.small, self.large))
        learner = Run(f"{self.small}: {self.learner}", self.settings(self.small, model=small), self.learner, seed)
        yield learner
        settings = self.settings(self.large, model=large)
        for method in ("uniform", self.learner):
            yield Run(self._label(method), settings, method, seed)
        frozen = self.frozen(learner.directory, self.large, model=large)
        yield Run(self._label(f"weights from {self.small}"), frozen, "frozen", seed)

    def results(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Adds the seconds at which the large model passes the loss that uniform sampling of the same seed ends with."""
        rows = super().results(records)
        ends = {
            record.run.seed: _evaluations(record.metrics)[-1]["specific_valid_loss"]
            for record in records
            if record.run.method == "uniform"
        }
        for row, record in zip(rows, records, strict=True):
            if record.run.config.model.size == self.large:
                row["seconds_to_baseline"] = seconds_to(ends[record.run.seed], record.metrics)
        return rows

    def _label(self, what: str) -> str:
        return f"{self.large}: {what}"


def seconds_to(loss: float, metrics: Sequence[Row]) -> float | None:
    """The training seconds at which the specific validation loss first is at most `loss`; None if it never is."""
    return next((row["seconds"] for row in _evaluations(metrics) if row["specific_valid_loss"] <= loss), None)


def _evaluations(metrics: Sequence[Row]) -> list[Row]:
    return [row for row in metrics if "specific_valid_loss" in row]
