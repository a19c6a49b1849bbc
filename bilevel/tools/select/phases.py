"""The phases of a selection as tasks that an executor starts in other processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from bilevel.devices.environment import keep_memory, keep_programs
from bilevel.offline.choice import Choice
from bilevel.study.task import Task
from bilevel.tools.select.config import Config
from bilevel.tools.select.work import Share, Work

FOLDER = "executor"
"""In the directory of the selection: logs of the tasks, and the choice that they share."""
_CHOICE = "choice"
_MOST = 1000


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase, done by some tasks in any order; it can be pickled, and loads everything in the process that calls it."""

    name: str
    """score, choose, write or finish."""
    tasks: int
    config: Config
    load_task: Callable[[str], Task]
    directory: Path
    """Where the command was given: its relative paths are meant from there."""

    def __call__(self, task: int) -> None:
        """Do the share of a task, from 0; nothing that is done already is done again."""
        keep_memory()
        keep_programs()
        with contextlib.chdir(self.directory):
            work, folder = Work(self.config, self.load_task), self.config.output / FOLDER / _CHOICE
            if self.name == "score":
                work.score(Share(task, self.tasks))
            elif self.name == "choose":
                folder.mkdir(parents=True, exist_ok=True)
                work.choose().save(folder)
            elif self.name == "write":
                work.write(Choice.load(folder), Share(task, self.tasks))
            else:
                work.finish(Choice.load(folder))


RunPhases: TypeAlias = Callable[[Sequence[Phase]], None]
"""Runs phases one after the other."""
OpenExecutor: TypeAlias = Callable[[Config], RunPhases]
"""Checks that the executor of the flags can be used, and returns what runs phases by it."""


def phases(config: Config, load_task: Callable[[str], Task], files: int) -> list[Phase]:
    """Return the phases of a selection from some files, in their order."""
    tasks, own = config.tasks or min(files, config.workers or _MOST), dataclasses.replace(config, progress=False)
    counts = {"score": tasks, "choose": 1, "write": tasks, "finish": 1}
    return [Phase(name, count, own, load_task, Path.cwd()) for name, count in counts.items()]
