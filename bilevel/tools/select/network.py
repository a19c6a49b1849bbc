"""What scores the rows of documents: the weighting network of a finished run, or its losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax

from bilevel.data import NumpyBatch, Pack, digest, given_by
from bilevel.study.context import RESULT
from bilevel.study.domain_weights import NAME as DOMAINS
from bilevel.study.reducible import NAME as LOSSES
from bilevel.study.reducible import reducible_losses
from bilevel.study.resolve import default_config
from bilevel.study.task import DocumentTask, Task
from bilevel.study.weights import NAME as WEIGHTS
from bilevel.study.weights import At, load_weights, parts_of, weights_file
from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.training.settings import of_run
from bilevel.types import Array, Params, UserError

_Scores: TypeAlias = tuple[Callable[[Params, Any], Array], Params]
"""Parameters and rows -> float32 `[b]`; and the parameters."""


class Network(NamedTuple):
    """A trained weighting network, or the models of a run of RHO-LOSS."""

    logits: Callable[[NumpyBatch], Array]
    """Rows -> logits or reducible losses, float32 `[b]`; one compiled program for each b."""
    pack: Pack
    """Cuts documents into rows, as in training."""
    settings: dict[str, Any]
    """What decides the scores: the task, its settings and a digest of the parameters."""


def load_network(run: Path, name: str | None, load_task: Callable[[str], Task], at: At = "end") -> Network:
    """Load the weighting network of a finished run, or the models of one that selected by irreducible losses.

    Args:
      run: the run's directory METHOD-seedN.
      name: name or file of its task; None: as the run says.
      load_task: name or file -> task.
      at: the network of its end, or of its best evaluation.

    Raises:
      UserError: if the run is missing or not finished, or learned nothing that scores documents.
    """
    task = _task(run, name, load_task)
    whole = default_config(task, settings=("--weights", run / CONFIG_NAME))
    if whole.study.weigh == "domains":
        raise UserError(f"--weights {run} has weights of domains ({run / DOMAINS}), which score no documents.")
    config = whole.task
    with given_by("--weights"):  # what the run's settings name may be gone
        pack = task.pack(config)
        if (run / LOSSES).exists():
            file = run / LOSSES
            scores, params = _losses(task, whole, run, at)
        else:
            file = weights_file(run, at, "--at")
            scores, params = _weighting(task, config, file)
    compiled = jax.jit(scores)
    settings = {"task": task.name, **of_run(config), "parameters": digest(parts_of(file))}
    return Network(lambda rows: compiled(params, rows), pack, settings)


def _weighting(task: DocumentTask, config: Any, file: Path) -> _Scores:
    weighting = task.weighting(config, None)
    assert callable(weighting.logits)
    return weighting.logits, load_weights(file, jax.eval_shape(weighting.init, jax.random.key(0)))


def _losses(task: DocumentTask, config: Any, run: Path, at: At) -> _Scores:
    if at != "end":
        raise UserError(f"--weights {run} keeps the models of its end alone: give --at end.")
    return reducible_losses(task, config.task, run / LOSSES, config.methods[read_settings(run)["method"]])


def _task(run: Path, name: str | None, load_task: Callable[[str], Task]) -> DocumentTask:
    """The task of a finished run with a weighting network of documents."""
    if not (run / CONFIG_NAME).exists():
        inside = sorted(path.parent.name for path in run.glob(f"*/{WEIGHTS}"))
        hint = f"one of the runs in it, {', '.join(inside)}" if inside else "METHOD-seedN below its run directory"
        raise UserError(f"--weights {run} is not the directory of a run (it holds no {CONFIG_NAME}): give {hint}.")
    settings = read_settings(run)
    if "task" not in settings:
        raise UserError(f"{run / CONFIG_NAME} names no task: give --weights the directory of a run of bilevel compare.")
    if not ((run / WEIGHTS).exists() or (run / LOSSES).exists()):
        hint = "so it is not finished: continue it with the command that began it"
        if (run / RESULT).exists():
            hint = f"as {settings.get('method')} leaves nothing that scores rows: give a run of soba, dds, anograd or rho_loss"
        raise UserError(f"--weights {run} holds no {WEIGHTS}, {hint}.")
    try:
        task = load_task(name or settings["task"])
    except UserError as error:
        if name is not None:
            raise
        hint = "which does not come with bilevel: name its file, as in --task my_task.py"
        raise UserError(f"--weights {run} is a run of the task {settings['task']}, {hint}.") from error
    if not hasattr(task, "pack"):
        hint = "whose rows are not documents (it has no function pack): give one of, say, language_modeling"
        raise UserError(f"--weights {run} is a run of the task {task.name}, {hint}.")
    return cast(DocumentTask, task)
