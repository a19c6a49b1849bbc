"""Tasks: each supplies data, a model with its losses, a weighting network and measures to the study layer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from bilevel.types import UserError

TASKS = {
    "language_modeling": "bilevel.tasks.language_modeling:TASK",
    "image_classification": "bilevel.tasks.classification:TASK",
    "tabular": "bilevel.tasks.classification:TABULAR",
    "translation": "bilevel.tasks.translation:TASK",
    "image_text": "bilevel.tasks.image_text:TASK",
}
"""The tasks that come with the package, by name; none is imported before it is loaded."""


def load_task(name: str) -> Any:
    """Return a task by its name, or from a user's file.

    Raises:
      UserError: there is none.
    """
    from bilevel.study.task import check_task

    if name in TASKS:
        module, _, attribute = TASKS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    path = Path(name)
    if path.suffix != ".py":
        raise UserError(f"There is no task {name}: choose from {', '.join(TASKS)}, or give a file my_task.py.")
    if not path.is_file():
        raise UserError(f"The file {path} does not exist: check the path of the task.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "TASK"):
        raise UserError(f"{path} defines no TASK: end it with TASK = MyTask().")
    return check_task(module.TASK, str(path))
