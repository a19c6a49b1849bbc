"""The flags of the check, and the settings of the run that it trains or reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.types import UserError
from experiments.cli import flag_of
from experiments.language_modeling.config import Config, DataConfig, MethodConfig, ModelConfig


@dataclass(frozen=True)
class DiagnoseConfig:
    """Can gradient alignments tell the specific from the generic data? A check before a long run.

    Trains a uniform model for a short while, as experiments.language_modeling --method uniform would with the same flags and
    more --steps, and measures the specific and the generic acceleration rate (SAR and GAR) on the way.

    Reference: Grangier, Ablin, Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization",
    section 6.3.
    """

    checkpoint: Path | None = None
    """Measure on the newest checkpoint of this run, RUN_DIR/METHOD-seedN, in place of training. Model and data are the run's;
    a --data flag that is given replaces the run's own."""
    steps: int = 600
    """θ-updates of the uniform model."""
    schedule_steps: int = 3000
    """θ-updates of the long run that this is the beginning of: the length of the learning-rate schedule (at least --steps)."""
    every: int = 200
    """Steps between two measurements; there is one after the last step too."""
    rows: int = 256
    """m: specific rows, and as many generic ones, whose gradients are compared; from the valid parts."""
    pairs: int = 8
    """P: pairs of a specific and a generic batch that they are compared with; from the train parts."""
    batch_rows: int = 128
    """Rows in each of these batches; the paper trains with 128. Fewer mean noisier gradients, and rates nearer to chance."""
    micro_batches: int = 8
    """Most parts in which rows and batches are evaluated one after the other: less memory, and on CPU less time."""
    seed: int = 0
    """Decides the initial parameters, the order of the data, and which rows are compared."""
    batch_size: int = 16
    """b: rows in a θ-update."""
    length: int = 64
    """T: bytes in a row."""
    learning_rate: float = 2e-3
    """Peak learning rate of θ (Adam; warm-up, then cosine decay to 0 over --schedule-steps)."""
    warmup: int = 100
    """Steps of warm-up."""
    run_dir: Path = Path("runs/diagnose")
    """Where diagnose.md, diagnose.json and diagnose.svg are written."""
    progress: bool = True
    """Show a progress bar."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> None:
        """Refuses numbers that measure nothing.

        Raises:
          UserError: naming the first such flag.
        """
        for name, least in (
            ("steps", 1),
            ("every", 1),
            ("rows", 2),
            ("pairs", 2),
            ("batch_rows", 1),
            ("micro_batches", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{flag_of(name)} {getattr(self, name)} must be at least {least}.")


class Run(NamedTuple):
    """The run whose model is measured."""

    config: Config
    method: str
    seed: int


TRAINING = ("steps", "schedule_steps", "batch_size", "length", "learning_rate", "warmup", "model")
"""What a checkpoint brings along."""


def run_of(options: DiagnoseConfig) -> Run:
    """The beginning of a run of `experiments.language_modeling --method uniform`, by these flags; or the one that was saved.

    Raises:
      UserError: for a checkpoint that is not there, or flags that do not go with it.
    """
    if options.checkpoint is not None:
        return _recorded(options, options.checkpoint)
    shared = {name: getattr(options, name) for name in (*TRAINING, "seed", "progress", "data")}
    shared["schedule_steps"] = max(options.steps, options.schedule_steps)
    config = Config(method="uniform", **shared)
    config.check_numbers()
    return Run(config, "uniform", options.seed)


def _recorded(options: DiagnoseConfig, directory: Path) -> Run:
    default = DiagnoseConfig()
    for name in TRAINING:
        if getattr(options, name) != getattr(default, name):
            raise UserError(f"--checkpoint takes {flag_of(name)} from {directory}: leave it away.")
    settings = _settings(directory / CONFIG_NAME)
    given = {
        f.name: getattr(options.data, f.name)
        for f in dataclasses.fields(DataConfig)
        if getattr(options.data, f.name) != getattr(default.data, f.name)
    }
    if "task_weights" in settings and "specific" not in given:
        raise UserError(
            f"The run in {directory} has several specific sets ({settings['data']['specific']}): choose the one to measure on by "
            "--data.specific."
        )
    data = dataclasses.replace(_filled(DataConfig, settings["data"]), **given)
    parts = {
        "data": data,
        "model": _filled(ModelConfig, settings["model"]),
        "weights": _filled(MethodConfig, settings["weights"]),
    }
    config = dataclasses.replace(_filled(Config, settings), **parts)
    return Run(config, settings["method"], settings["seed"])


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = read_settings(file.parent)
        for name, kind in (("method", str), ("seed", int), ("data", dict), ("model", dict), ("weights", dict)):
            if not isinstance(settings[name], kind):
                raise ValueError(f"its {name} is {settings[name]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Cannot read the settings in {file} ({type(error).__name__}: {error}): "
            "give --checkpoint the directory METHOD-seedN of a run of experiments.language_modeling."
        ) from error
    return settings


def _filled(kind: type[Any], settings: dict[str, Any]) -> Any:
    """The dataclass with the recorded values of its fields; what is not recorded keeps its default, what it lacks is left out."""
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in settings and f.default_factory is dataclasses.MISSING:
            value = settings[f.name]
            values[f.name] = value if value is None or "Path" not in str(f.type) else Path(value)
    return kind(**values)
