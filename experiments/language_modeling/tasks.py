"""Several specific sets at once: the loss on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel.data import Dataset, JoinedData
from bilevel.types import Params
from experiments.language_modeling.corpora import Corpora


def task_losses(
    params: Params, evaluator: Callable[[Params, Dataset, int | None], float], corpora: Corpora, prefix: str = ""
) -> dict[str, Any]:
    """The loss on the test rows of each task, in nats per byte: `{prefix}task_test_losses`, by name; {} for one task alone."""
    test = corpora.specific["test"]
    if not isinstance(test, JoinedData):
        return {}
    return {f"{prefix}task_test_losses": {name: evaluator(params, part, None) for name, part in test.parts.items()}}
