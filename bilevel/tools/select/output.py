"""The second phase: which documents are kept, and the file that is written for each part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.data.text.parts import Part
from bilevel.files import appearing, remove_abandoned
from bilevel.tools.select.card import write_card
from bilevel.tools.select.choice import Choice
from bilevel.tools.select.config import KEEP, Config
from bilevel.tools.select.scores import PATIENCE, ScoreFiles
from bilevel.tools.select.written import Judged, file_name, write_part
from bilevel.training import prepare_run_dir
from bilevel.training.progress import Progress
from bilevel.training.run_dir import read_json, write_json

SELECTED = "selected"
DECIDES = ("format", *KEEP, "rule", "temperature", "seed", "id_field", "weight_field")
"""Flags that say, given the scores, what is written."""
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the scores of the corpus: the scale of scores is that of one network, and only their order compares to another's."""


class Selection:
    """Writes what is kept, part by part; a note beside each file says which choice it was written for."""

    def __init__(self, config: Config, files: ScoreFiles, parts: list[Part]):
        self._config, self._files, self._parts = config, files, parts
        self._choice = Choice(config, [files.read(part)["score"].to_numpy() for part in parts])
        choice = {name: getattr(config, name) for name in DECIDES}
        prepare_run_dir(config.output, {"scores": files.settings, "choice": choice}, flag="--output", patience=PATIENCE)
        self._folder = config.output / SELECTED
        self._folder.mkdir(exist_ok=True)
        remove_abandoned(self._folder)

    def target(self, part: Part) -> Path:
        """The file that is written for a part."""
        return self._folder / file_name(part, self._config.format)

    def is_written(self, part: Part) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        note = self._note(part)
        return note.exists() and self.target(part).exists() and read_json(note) == self._identity(part)

    def write(self, part: Part, progress: Progress) -> None:
        """Write the file of a part, in one piece."""
        with appearing(self.target(part)) as file:
            for count in write_part(part, self._judged(part), self._config, file):
                progress.advance(count)
        write_json(self._note(part), self._identity(part))

    def write_summary(self) -> tuple[int, int]:
        """Write summary.json, the same for every process but for the paths of copies, and beside weights README.md.

        Returns how many of how many documents are kept.
        """
        files = [
            {"file": list(part.files) or part.source.name, "documents": len(kept), "kept": int(kept.sum()),
             "output": self.target(part).name}
            for part, kept in zip(self._parts, self._choice.kept, strict=True)
        ]  # fmt: skip
        kept, documents = (sum(file[name] for file in files) for name in ("kept", "documents"))
        summary = {
            "documents": documents, "kept": kept, "threshold": self._choice.threshold,
            "score_quantiles": self._choice.scores_at(QUANTILES), "files": files,
        }  # fmt: skip
        if self._config.rule == "top":
            summary["threshold_quantile"] = float(
                self._choice.quantiles(np.array([self._choice.threshold], np.float32))[0]
            )
        if self._config.format == "weights":
            summary["effective_sample_size"] = self._choice.effective_sample_size
            write_card(self._config, self._parts, summary)
        write_json(self._config.output / "summary.json", summary)
        return kept, documents

    def _note(self, part: Part) -> Path:
        return self._config.output / "written" / f"{part.stem}.json"

    def _identity(self, part: Part) -> dict[str, str]:
        """What says that a file was written for this choice: the text, and what is written of it."""
        scored, judged = self._files.noted(part) or {}, (self._quantile(part), self._weight(part))
        written = [self._choice.kept[part.number], *(values for values in judged if values is not None)]
        return {"choice": digest([scored.get("content", ""), *(array.tobytes() for array in written)])}

    def _quantile(self, part: Part) -> NDArray[np.float64] | None:
        shown = self._config.format in ("parquet", "attributes")
        return self._choice.quantiles(self._choice.scores[part.number]) if shown else None

    def _weight(self, part: Part) -> NDArray[np.float32] | None:
        return self._choice.weights(self._choice.scores[part.number]) if self._config.format == "weights" else None

    def _judged(self, part: Part) -> Judged:
        number, size, score = (column.to_numpy() for column in self._files.read(part).columns)
        return Judged(number, size, score, self._choice.kept[part.number], self._quantile(part), self._weight(part))
