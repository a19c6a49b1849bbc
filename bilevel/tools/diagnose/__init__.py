"""A check before a long run: SAR and GAR of a short uniform training, or of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bilevel.offline.verdict import verdict
from bilevel.study import flags
from bilevel.study.config import Config
from bilevel.study.context import Setting, run_of
from bilevel.study.registry import METHODS
from bilevel.study.run import Run
from bilevel.study.suite import opened
from bilevel.study.task import Task
from bilevel.tools.diagnose.measure import Compared, Measurement, plot, table
from bilevel.training import hold_run_dir, train
from bilevel.training.evaluation import trained
from bilevel.training.run_dir import CONFIG_NAME, read_settings, write_atomically, write_json
from bilevel.training.settings import plain, value_of
from bilevel.types import UserError

UNUSED = (
    "compare", "seeds", "big_batch_size", "specific_sets", "same_seconds", "budget_seconds", "trials", "trial_steps",
    "targets", "eval_only", "checkpoint_every", "tensorboard", "finetune", "hosts",
)  # fmt: skip


@dataclass(frozen=True)
class Diagnose(Compared):
    """Can gradient alignments tell the specific from the generic data? A check before a long run.

    Trains a uniform model for a short while, the beginning of a run of --schedule-steps, and measures the specific and the
    generic acceleration rate (SAR and GAR) every --evaluate-every steps. After Grangier, Ablin and
    Hannun (2024), section 6.3.
    """

    checkpoint: Path | None = None
    """Measure on the newest checkpoint of this run, RUN_DIR/METHOD-seedN, instead of training. Model and data are the run's; a
    --data flag that is given replaces the run's own."""


def command(task: Task, arguments: Sequence[str], prog: str) -> tuple[Callable[[], None], Any, Path]:
    """Understand a command line, without running it.

    Returns what runs it, its settings, and the run directory; a UserError says which flags do not go together.
    """
    settings = None
    if given := value_of(arguments, "--checkpoint"):
        run, settings = run_of(Path(given)), ("--checkpoint", Path(given) / CONFIG_NAME)
        if run is None or run[0] not in METHODS or not settings[1].is_file():
            what = f"give the directory METHOD-seedN of one, with its {CONFIG_NAME}"
            raise UserError(f"--checkpoint {given} holds no run: {what}.")
    found = flags.parse(task, arguments, prog, lambda *_: (), own=Diagnose, adapt=_shorter, settings=settings)
    config, own = found.config, found.own
    config = config.with_study(schedule_steps=max(config.study.steps, config.study.schedule_steps))
    config.study.check()
    found.refuse(UNUSED, "is not for bilevel diagnose, which trains one uniform model: omit it.")
    if own.checkpoint is not None:
        others = [name for name in found.changed() if not name.startswith(("data", "run_dir", "progress"))]
        found.refuse(others, f"does not go with --checkpoint, which takes it from {own.checkpoint}: omit it.")
        several = "task_weights" in read_settings(own.checkpoint).get("variant", {})
        if several and "data.specific" not in found.changed():
            raise UserError(
                f"The run in {own.checkpoint} has several specific sets ({config.task.data.specific}): choose the one to "
                "measure on by --data.specific."
            )
    return lambda: diagnose(config, task, own), (config, own), config.study.run_dir


def diagnose(config: Config, task: Task, own: Diagnose) -> None:
    """Train or restore, measure, and report."""
    setting, directory, rows = opened(config, task), config.study.run_dir, []
    method, seed = (own.checkpoint and run_of(own.checkpoint)) or ("uniform", config.study.seed)
    with hold_run_dir(directory):
        measure = Measurement(setting, own, seed)

        def evaluate(state: Any) -> Mapping[str, float]:
            found, step = measure(trained(state, setting.mesh)), getattr(state, "train", state).step
            rows.append({"step": int(jax.device_get(step)), **found})
            return found

        if own.checkpoint is None:
            _train(setting, evaluate)
        else:
            evaluate(Run(setting.at(own.checkpoint.parent).context(method, seed)).checkpoint())
        model = f"{setting.splits.about} Model: {method}, seed {seed}, b = {config.study.batch_size}."
        about, said = f"{model} {measure.about}", verdict(rows[-1]["step"], rows[-1])
        text, file = f"{about}\n\n{table(rows, task.measures[0])}\n\n{said}", directory / "diagnose"
        found = {"measured": about, "method": method, "settings": plain(own) | plain(config.task)}
        write_json(file.with_suffix(".json"), {**found, "measurements": rows, "verdict": said})
        write_atomically(file.with_suffix(".md"), f"# SAR and GAR\n\n{text}\n")
        write_atomically(file.with_suffix(".svg"), plot(rows))
    print(f"{text}\n\nPlot: {file}.svg")


def _train(setting: Setting, evaluate: Callable[[Any], Mapping[str, float]]) -> None:
    """Train the uniform model, without keeping anything of it."""
    run = Run(setting.context("uniform", setting.config.study.seed))
    source = run.source()
    loop = dataclasses.replace(run.loop(setting.config.study.steps, source), stop_signals=False)
    train(*run.parts, data=source, config=loop, evaluate=evaluate)


def _shorter(config: Config) -> Config:
    """A fifth of the task's steps as the beginning of a whole run, with three measurements."""
    whole = config.study.steps
    steps = max(1, whole // 5)
    return config.with_study(
        steps=steps, schedule_steps=whole, evaluate_every=-(-steps // 3), run_dir=Path("runs/diagnose"), targets=()
    )
