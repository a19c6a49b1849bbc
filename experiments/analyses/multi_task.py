"""Several specific sets at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bilevel.data import JoinedData
from bilevel.types import UserError
from experiments.analyses.analysis import Analysis, Record, Run
from experiments.language_modeling.config import MethodName
from experiments.language_modeling.corpora import Corpora, load_corpora
from experiments.language_modeling.variant import Variant


@dataclass(frozen=True)
class MultiTask(Analysis):
    """Several specific tasks at once (appendix B, table 12).

    The specific batch of each step comes from one of the sets, at random. The specific loss is the mean of the sets' losses.
    Fine-tuning, and the domain classifier, use the rows of all sets together.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    appendix B.
    """

    run_dir: Path = Path("runs/multi_task")
    """Where everything is written; the same command continues there."""
    method: MethodName | None = None
    """Train one method only, instead of --compare."""
    compare: str = "uniform,classifier,soba"
    """Methods to train under the same budget, comma-separated."""
    finetune_steps: int = 1000
    """Longest fine-tuning on the rows of all sets after training; the step with the best average on valid is kept. 0: none."""
    specific_sets: tuple[str, ...] = ()
    """The specific sets, at least two, each as --data.specific, which is not used here."""
    task_weights: tuple[float, ...] | None = None
    """How often a specific batch comes from each set, in proportion; without it, from all alike. It concerns the specific
    batches that weights are learned from: mixed rows and candidates, contrastive selection, the domain classifier and fine-tuning
    use the rows of all sets together, and the specific losses are plain means over the sets."""

    several_sets: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def check(self) -> None:
        """As `Analysis.check`, and the flags of this analysis."""
        super().check()
        if len(self.specific_sets) < 2:
            raise UserError(f"--specific-sets names {len(self.specific_sets)} specific sets: give at least two.")
        if len(set(self.specific_sets)) < len(self.specific_sets):
            raise UserError(f"--specific-sets {' '.join(self.specific_sets)} names a set twice: name each only once.")
        if self.task_weights is not None and len(self.task_weights) != len(self.specific_sets):
            raise UserError(
                f"--task-weights has {len(self.task_weights)} numbers for {len(self.specific_sets)} specific sets: "
                "give one for each."
            )

    def check_methods(self) -> None:
        """Checks that the methods exist, and that none needs another run."""
        if "frozen" in self.methods():
            raise UserError("The method frozen is not for this analysis, as its weights come from another run.")

    @property
    def names(self) -> list[str]:
        """Short names of the sets: those of their files or folders where these differ."""
        short = [Path(spec).name.split(".")[0] or spec for spec in self.specific_sets]
        return short if len(set(short)) == len(short) else list(self.specific_sets)

    @property
    def columns(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The average and each set, before and after fine-tuning."""
        found = {"specific_valid_loss": "average valid loss"}
        for prefix, note in (("", ""), ("finetuned_", ", fine-tuned")):
            found[f"{prefix}specific_test_loss"] = f"average test loss{note}"
            found |= {_column(prefix, name): f"{name}{note}" for name in self.names}
        return found | {"generic_loss": "generic loss", "seconds": "seconds"}

    def corpora(self) -> Corpora:
        """The generic data, and the parts of all sets joined.

        Raises:
          UserError: for data that is missing, broken or too small, or weights that are no proportions.
        """
        loaded = {
            name: load_corpora(self.settings(data=dataclasses.replace(self.data, specific=spec)))
            for name, spec in zip(self.names, self.specific_sets, strict=True)
        }
        first = next(iter(loaded.values()))
        joined = {part: JoinedData({name: c.specific[part] for name, c in loaded.items()}) for part in first.specific}
        return dataclasses.replace(first, specific=joined, task_weights=self.task_weights)

    def runs(self, seed: int) -> Iterator[Run]:
        """One run a method."""
        settings = self.settings(data=dataclasses.replace(self.data, specific=" + ".join(self.specific_sets)))
        for method in self.methods():
            yield Run(method, settings, method, seed, Variant({"task_weights": self.task_weights}))

    def results(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Adds the losses of the sets, one a column."""
        rows = super().results(records)
        for row in rows:
            for prefix in ("", "finetuned_"):
                found = row.get(f"{prefix}task_test_losses", {})
                row |= {_column(prefix, name): loss for name, loss in found.items()}
        return rows


def _column(prefix: str, name: str) -> str:
    return f"{prefix}{name}/test_loss"  # unlike the names of other results, also for a set called "specific"
