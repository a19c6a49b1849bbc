"""The second phase: which documents are kept, and the file that is written for each part."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bilevel.data import digest
from bilevel.data.text.parts import Part
from bilevel.devices.processes import say
from bilevel.files import appearing, remove_abandoned
from bilevel.offline.choice import KEEP, Choice
from bilevel.tools.select.card import write_card
from bilevel.tools.select.config import Config
from bilevel.tools.select.scores import ScoreFiles
from bilevel.tools.select.written import Judged, file_name, key_digests, write_part
from bilevel.training import prepare_run_dir
from bilevel.training.progress import Progress
from bilevel.training.run_dir import read_json, write_json

SELECTED = "selected"
DECIDES = ("format", *KEEP, "max_copies", "max_per_group", "rule", "temperature", "seed", "id_field", "weight_field")
"""Flags that say, given the scores, what is written."""
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the scores of the corpus: the scale of scores is that of one network, and only their order compares to another's."""


class Selection:
    """Writes what is kept, part by part; a note beside each file says which choice it was written for."""

    def __init__(self, config: Config, files: ScoreFiles, parts: list[Part]):
        self._config, self._files, self._parts = config, files, parts
        self._folder = config.output / SELECTED

    def prepare(self) -> None:
        """Begin or continue the folder; a `UserError` says that it holds another choice."""
        choice = {name: getattr(self._config, name) for name in DECIDES}
        prepare_run_dir(self._config.output, {"scores": self._files.settings, "choice": choice}, flag="--output")
        self._folder.mkdir(exist_ok=True)
        remove_abandoned(self._folder)

    def target(self, part: Part) -> Path:
        """The file that is written for a part."""
        return self._folder / file_name(part, self._config.format)

    def judged(self, part: Part, choice: Choice) -> Judged:
        """Return what a choice says of the documents of a part."""
        number, size, score = self._files.read(part, "document", "bytes", "score")
        quantile = choice.quantiles(score) if self._config.format in ("parquet", "attributes") else None
        weight = choice.weights(score) if self._config.format == "weights" else None
        return Judged(number, size, score, choice.kept_of(score, part.number), quantile, weight)

    def is_written(self, part: Part, judged: Judged) -> bool:
        """Whether the file of a part is complete and belongs to this choice."""
        note = self._note(part)
        return note.exists() and self.target(part).exists() and read_json(note) == self._identity(part, judged)

    def write(self, part: Part, judged: Judged, progress: Progress) -> None:
        """Write the file of a part, in one piece."""
        named, ids = self._config.id_field is not None, [np.zeros(0, np.int64)]
        seen = (lambda keys: ids.append(key_digests(keys))) if named else None
        with appearing(self.target(part)) as file:
            for count in write_part(part, judged, self._config, file, seen):
                progress.advance(count)
        if named:
            self._ids(part).parent.mkdir(exist_ok=True)
            with appearing(self._ids(part)) as path, path.open("wb") as file:
                np.save(file, np.concatenate(ids))
        write_json(self._note(part), self._identity(part, judged))

    def write_summary(self, choice: Choice) -> None:
        """Write summary.json, and beside weights README.md."""
        files = [
            {"file": list(part.files) or part.source.name, "documents": choice.documents[part.number],
             "kept": choice.kept[part.number], "output": self.target(part).name}
            for part in self._parts
        ]  # fmt: skip
        summary = {
            "documents": sum(choice.documents), "kept": sum(choice.kept), "threshold": choice.threshold,
            "score_quantiles": choice.scores_at(QUANTILES), "files": files,
        }  # fmt: skip
        if choice.excess is not None:
            summary["left_out"] = int(choice.excess.sum())
        if self._config.id_field is not None:
            summary["repeated_ids"] = self._repeated_ids()
        if self._config.rule == "top":
            summary["threshold_quantile"] = float(choice.quantiles(np.array([choice.threshold], np.float32))[0])
        if self._config.format == "weights":
            summary["effective_sample_size"] = choice.effective_sample_size
            write_card(self._config, self._parts, summary)
        write_json(self._config.output / "summary.json", summary)

    def _repeated_ids(self) -> int:
        """Count the documents, blank ones too, whose id another one of the corpus has; they are said to the user."""
        ids = [np.load(self._ids(part)) for part in self._parts]
        whole = np.concatenate(ids)
        found, counts = np.unique(whole, return_counts=True)
        repeated = np.flatnonzero(np.isin(whole, found[counts > 1]))
        if len(repeated):
            ends = np.cumsum([len(x) for x in ids])
            part = int(np.searchsorted(ends, repeated[0], side="right"))
            first = f"document {repeated[0] - ends[part] + len(ids[part])} of {self._parts[part].source.name}"
            say(
                f"Warning: {len(repeated):,} documents share their id with another one, the first is {first}: give --id-field a "
                f"field that tells them apart, which {self._config.id_field} does not."
            )
        return len(repeated)

    def _ids(self, part: Part) -> Path:
        return self._config.output / "written" / f"{part.stem}.ids.npy"

    def _note(self, part: Part) -> Path:
        return self._config.output / "written" / f"{part.stem}.json"

    def _identity(self, part: Part, judged: Judged) -> dict[str, str]:
        """What says that a file was written for this choice: the text, and what is written of it."""
        scored, written = self._files.noted(part) or {}, (judged.kept, judged.quantile, judged.weight)
        return {"choice": digest([scored.get("content", ""), *(x.tobytes() for x in written if x is not None)])}
