"""The four phases of a selection, of which each task of the first and the third does a share of the files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bilevel.data import given_by
from bilevel.data.text.parts import Part, open_parts
from bilevel.devices.processes import say
from bilevel.offline.choice import Choice, choose
from bilevel.study.task import Task
from bilevel.tools.select.config import Config
from bilevel.tools.select.network import load_network
from bilevel.tools.select.output import SELECTED, Selection
from bilevel.tools.select.scores import ScoreFiles
from bilevel.tools.select.written import check_fields
from bilevel.training.progress import Progress
from bilevel.training.settings import flag_of
from bilevel.types import UserError


class Share(NamedTuple):
    """Every `tasks`-th file from `task` on."""

    task: int = 0
    tasks: int = 1


class Work:
    """A selection, opened by one process: `prepare`, `score`, `choose`, `write`, `finish`, in this order.

    Each phase leaves what it does on disk, does nothing again that is there, and may be done by another process.

    Raises:
      UserError: says what is wrong with the weights or the corpus.
    """

    def __init__(self, config: Config, load_task: Callable[[str], Task]):
        self._config = config
        network = load_network(config.weights, config.task, load_task, config.at)
        with given_by("--corpus"):
            self.parts = open_parts(config.corpus, field=config.field, documents=config.documents)
        self._files = ScoreFiles(config, network, self.parts)
        self._selection = Selection(config, self._files, self.parts)
        self._shown: Callable[..., Any] = partial(Progress, None, config.progress, unit="document")

    def prepare(self) -> None:
        """Refuse flags that the files do not fit, and begin or continue the folder of the scores."""
        for part in self.parts:
            check_fields(part, self._config)
        self._files.prepare()

    def score(self, share: Share = Share()) -> None:  # noqa: B008 — an immutable tuple
        """Score the files of a share that are not scored yet, or that changed."""
        own = self._own(share)
        for i, part in enumerate(own, start=1):
            if not self._files.found(part):
                if self._files.file(part).exists():
                    say(f"{part.source.name} changed after it was scored, or its scores are damaged: scoring it again.")
                with self._shown(f"scoring {i}/{len(own)} {part.source.name}") as progress:
                    self._files.score(part, progress)

    def choose(self) -> Choice:
        """Find the threshold over the scores of all files, and begin or continue the folder of what is written."""
        config, missing = self._config, [part for part in self.parts if not self._files.found(part)]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.parts)} files are not scored (the first is {missing[0].source.name}), or changed "
                "meanwhile: give the same command again."
            )
        limits = {"text": config.max_copies, "group": config.max_per_group}
        names = ["score", *(name for name, limit in limits.items() if limit is not None)]
        tables = [self._files.read(part, *names) for part in self.parts]
        columns = {name: [table[i] for table in tables] for i, name in enumerate(names)}
        choice = choose(
            columns["score"], config.choice, config.corpus, flag_of, columns.get("text"), columns.get("group")
        )
        self._selection.prepare()
        return choice

    def write(self, choice: Choice, share: Share = Share()) -> None:  # noqa: B008
        """Write the files of a share that are not written yet, or not for this choice."""
        own = self._own(share)
        for i, part in enumerate(own, start=1):
            judged = self._selection.judged(part, choice)
            if not self._selection.is_written(part, judged):
                with self._shown(f"writing {i}/{len(own)} {part.source.name}") as progress:
                    self._selection.write(part, judged, progress)

    def finish(self, choice: Choice) -> None:
        """Write the summary, and say what was done."""
        self._selection.write_summary(choice)
        kept, documents = sum(choice.kept), sum(choice.documents)
        print(f"Kept {kept:,} of {documents:,} documents; {self._config.output / SELECTED}: {len(self.parts)} files.")

    def _own(self, share: Share) -> list[Part]:
        return self.parts[share.task :: share.tasks]
