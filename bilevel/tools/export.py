"""Writes the model of a run in a layout that other programs read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from bilevel.devices import sharding
from bilevel.study.context import Context, run_of
from bilevel.study.fitting import FOLDER
from bilevel.study.registry import METHODS
from bilevel.study.resolve import default_config
from bilevel.study.run import Run
from bilevel.study.suite import opened
from bilevel.study.task import Task
from bilevel.training.best import Best
from bilevel.training.checkpoints import Checkpoints
from bilevel.training.evaluation import trained
from bilevel.training.fit import BEST
from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.types import Params, UserError


@dataclass(frozen=True)
class Config:
    """Write the model of a run in a layout that other programs read: a decoder in Hugging Face's.

    The folder holds config.json, the parameters as safetensors, and the tokenizer's files of the model that the run began with.
    """

    run: Path
    """Directory METHOD-seedN of a run."""
    output: Path
    """Folder that is written; files of a model in it are replaced."""
    of: Literal["end", "finetuned"] = "end"
    """The parameters of the run's newest checkpoint (their moving averages, where it keeps these), or the best of its
    fine-tuning."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that they are stored in; float32 loses nothing."""


def command(
    arguments: Sequence[str], prog: str, load_task: Callable[[str], Task]
) -> tuple[Callable[[], None], Config, Path]:
    """Understand a command line, without running it.

    Returns what runs it, its settings, and the directory that it writes to.
    """
    import tyro

    config = tyro.cli(Config, args=list(arguments), prog=prog)
    return lambda: export(config, load_task), config, config.output


def export(config: Config, load_task: Callable[[str], Task]) -> None:
    """Restore the model of a run, and write it.

    Raises:
      UserError: there is no such run, it has no such parameters, or its model has no layout that others read.
    """
    task, run = _task(config, load_task), run_of(config.run)
    if run is None or run[0] not in METHODS:
        raise UserError(f"--run {config.run} is not the directory METHOD-seedN of a run: give one.")
    settings = default_config(task, settings=("--run", config.run / CONFIG_NAME))
    context = opened(settings.with_study(run_dir=config.run.parent), task).context(*run)
    params = _finetuned(context, config) if config.of == "finetuned" else _last(context)
    if jax.process_index() == 0:
        writing: Any = task
        writing.export(context.config.task, context.splits, params, config.output, config.dtype)
        print(f"Wrote the model of {config.run} to {config.output}.")


def _task(config: Config, load_task: Callable[[str], Task]) -> Task:
    if not (config.run / CONFIG_NAME).exists():
        raise UserError(f"--run {config.run} is not the directory of a run (it holds no {CONFIG_NAME}): give one.")
    task = load_task(read_settings(config.run)["task"])
    if not hasattr(task, "export"):
        raise UserError(f"--run {config.run} is a run of the task {task.name}, whose models have no layout of others.")
    return task


def _last(context: Context) -> Params:
    """The parameters of the newest checkpoint, whole on this process's devices."""
    return sharding.local(trained(Run(context).checkpoint(), context.mesh))[0]


def _finetuned(context: Context, config: Config) -> Params:
    folder = context.directory / FOLDER / BEST
    shapes = jax.eval_shape(context.model().init, jax.random.key(0))
    restored = None
    if folder.is_dir():
        with Checkpoints(folder, read_only=True) as saved:
            restored = saved.restore_latest(Best(*shapes))
    if restored is None:
        raise UserError(f"--run {config.run} has no fine-tuned parameters: give --of end.")
    return restored[1].params
