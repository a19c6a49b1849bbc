"""Analyses of learned weights.

Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization" (2024), sections
  6.1 to 6.4 and appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bilevel.study import flags
from bilevel.study.task import Task
from bilevel.tools.analyses.acceleration import Acceleration
from bilevel.tools.analyses.base import Analysis, analyse
from bilevel.tools.analyses.curriculum import Curriculum
from bilevel.tools.analyses.filters import Filters
from bilevel.tools.analyses.multi_task import MultiTask
from bilevel.tools.analyses.transfer import Transfer

ANALYSES: dict[str, type[Analysis]] = {a.name: a for a in (Curriculum, Filters, Acceleration, Transfer, MultiTask)}


def command(name: str, task: Task, arguments: Sequence[str], prog: str) -> tuple[Callable[[], None], Any, Path]:
    """Understand a command line, without running it.

    Returns what runs it, its settings, and the run directory; a UserError says which flags do not go together.
    """
    kind = ANALYSES[name]
    found = flags.parse(task, arguments, prog, kind.methods, own=kind, adapt=kind.adapted)
    found.refuse(kind.unused, f"is not for bilevel analyse {name}: omit it.")
    found.config.study.check()
    found.own.check(found.config)
    return lambda: analyse(found.own, found.config, task), (found.config, found.own), found.config.study.run_dir
