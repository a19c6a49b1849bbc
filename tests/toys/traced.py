"""The steps of methods on a real task: built as a run builds them and traced, without being compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.selection.known import observer
from bilevel.study import Task, resolve
from bilevel.study.context import Setting
from bilevel.study.feeding import loaders
from bilevel.study.registry import METHODS
from bilevel.study.run import Run
from bilevel.study.suite import opened
from bilevel.training.settings import filled


def setting_of(task: Task, folder: Path, given: Mapping[str, Any], methods: Mapping[str, Any] | None = None) -> Setting:
    """Open a task for batches of 4 of 16 rows; `given` are settings of the task, `methods` of methods, by name."""
    study = {"run_dir": folder, "steps": 6, "batch_size": 4, "big_batch_size": 16}
    config = resolve.default_config(task).with_study(**study)
    config = resolve.Config(config.study, filled(config.task, given, "the test"), config.methods, config.prepared)
    for name, values in (methods or {}).items():
        config = config.with_method(name, filled(config.methods[name], values, "the test"))
    return opened(resolve.complete(config), task)


def fitting(setting: Setting) -> list[str]:
    """Return the methods that need no other run and fit the data."""
    return [m for m, spec in METHODS.items() if spec.in_all and not spec.lacks(setting.splits)]


def trace(setting: Setting, method: str) -> None:
    """Trace the first step of a method, and of a sampler one that learns too.

    It keeps the state's shapes, and gives a loss and the shares of what is known.
    """
    context = setting.context(method, 0)
    plan = Run(context).plan
    watch = observer(setting.splits.known)
    step = plan.step if watch is None else plan.step.map(watch)
    state = jax.eval_shape(plan.init, *jax.random.split(jax.random.key(0), 3))
    if plan.samples:
        batches = [rows.rows(np.arange(len(rows))) for rows in (setting.splits.train, setting.splits.specific)]
    else:
        batches = [loader.batch(0) for loader in loaders(context, plan)]
        assert {len(x) for x in jax.tree.leaves(batches[0])} == {context.loaded_rows(plan.picks)}
    for kind in dict.fromkeys((step.at(0), step.at(step.period - 1)) if plan.samples else (step.at(0),)):
        after, metrics = jax.eval_shape(kind, state, *batches)
        assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state), f"{method} changes the state's shapes"
        assert metrics["generic_loss"].shape == (), method
        assert metrics["ids"].shape == (4,), method
        assert [name for name in metrics if name.startswith("share/")] or not setting.splits.known, method


def _kind(x: Any) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype
