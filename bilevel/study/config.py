"""The settings that all comparisons share, resolved once at the entry.

A field says by its metadata whether it decides the outcome of a run: two runs whose deciding fields are equal give equal results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
)

from bilevel.training.opening import Residence
from bilevel.types import UserError

T = TypeVar("T")
Count: TypeAlias = Annotated[int, Field(ge=1)]
Rate: TypeAlias = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


def _in(where: str, fits: Callable[[float], bool]) -> AfterValidator:
    def check(value: float) -> float:
        if not fits(value):
            raise ValueError(f"must lie in {where}")
        return value

    return AfterValidator(check)


Share: TypeAlias = Annotated[float, _in("(0, 1]", lambda value: 0 < value <= 1)]
Portion: TypeAlias = Annotated[float, _in("[0, 1]", lambda value: 0 <= value <= 1)]


def free(default: T) -> T:
    """A field that does not decide the outcome of a run: it may differ when the run continues."""
    return field(default=default, metadata={"decides": False})


def of_comparison(default: T) -> T:
    """A field that concerns the comparison of runs, and no run."""
    return field(default=default, metadata={"decides": False, "of_run": False})


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def check_bounds(settings: Any) -> None:
    """Refuse values of a dataclass that its types exclude, nested ones too; a UserError names the first such flag."""
    try:
        validator(type(settings))(plain(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"{flag_of(name)} {first['input']} {wrong(first['msg'])}.") from None


@functools.cache
def validator(kind: Any) -> Callable[[Any], Any]:
    """Return what makes a dataclass of names and values; pydantic takes options for a tuple of dataclasses, not for one."""
    options: Any = {"extra": "forbid", "arbitrary_types_allowed": True}
    adapter = TypeAdapter(tuple[kind], config=options)  # pyright: ignore[reportInvalidTypeForm]
    return lambda values: adapter.validate_python((values,))[0]


def wrong(message: str) -> str:
    """What a message of pydantic says about a value, as the end of a sentence: "must be at least 1"."""
    said = message.removeprefix("Input ").removeprefix("Value error, ")
    return said.replace("should", "must").replace("greater than or equal to", "at least")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of θ."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule."""
    learning_rate: Rate = 2e-3
    """Peak learning rate."""
    b2: float = 0.999
    """adam, adamw: decay of the second moment."""
    momentum: float = 0.9
    """sgd: its momentum."""
    nesterov: bool = True
    """sgd: Nesterov momentum."""
    weight_decay: float = 0.0
    """Decoupled (adamw), or added to the gradient (sgd); adam has none."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """After warm-up: constant, cosine decay to 0, or multiplied by --optimizer.decay at each milestone."""
    milestones: tuple[int, ...] = ()
    """step: θ-updates, counted from the first, after which the learning rate changes."""
    decay: PositiveFloat = 0.1
    """step: factor of each change."""
    warmup: NonNegativeInt = 0
    """Steps of warm-up, at most half of all."""
    average: Annotated[NonNegativeFloat, Field(lt=1)] = 0.0
    """Evaluate a moving average of the parameters and BatchNorm statistics with this decay (DDS: 0.999); 0: the last ones."""

    def check(self) -> None:
        """Refuse milestones that do not fit, by a UserError."""
        given = " ".join(map(str, self.milestones))
        if (self.schedule == "step") != bool(self.milestones):
            found = f"--optimizer.milestones {given} with" if given else "No --optimizer.milestones with"
            raise UserError(
                f"{found} --optimizer.schedule {self.schedule}: give both, as in --optimizer.schedule step "
                "--optimizer.milestones 50000 75000, or neither."
            )
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise UserError(
                f"--optimizer.milestones {given} must be numbers of steps from 1 on, each larger than the one before."
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """A last phase on the specific rows alone; its best parameters on valid are kept."""

    steps: NonNegativeInt = of_comparison(0)
    """Most steps; 0: none."""
    learning_rate: Rate = of_comparison(5e-4)
    """Learning rate (Adam)."""


@dataclass(frozen=True)
class HostsConfig:
    """A run on several hosts: start the same command once a host."""

    coordinator: str | None = of_comparison(None)
    """HOST:PORT of process 0; "auto": ask the cluster's environment."""
    processes: int | None = of_comparison(None)
    """Number of processes."""
    process: int | None = of_comparison(None)
    """Number of this process, from 0."""


@dataclass(frozen=True)
class Study:
    """What is compared, for how long, and where it is written."""

    compare: str = of_comparison("uniform,soba")
    """Methods to train under the same budget, comma-separated; all: every method that needs no other run."""
    preset: str = of_comparison("default")
    """default: tuned on valid; paper: the papers' settings of the methods; or a whole experiment of a paper, where the task has
    one. Flags have the last word."""
    steps: Count = 3000
    """θ-updates."""
    seed: NonNegativeInt = 0
    """First seed; decides the initial parameters, the order of the data and all random draws."""
    seeds: Count = of_comparison(1)
    """Number of seeds: seed, seed + 1, …"""
    batch_size: Count = 16
    """b: rows in a θ-update."""
    big_batch_size: Count = 512
    """B: rows that are scored for it."""
    specific_sets: tuple[str, ...] = of_comparison(())
    """Several specific sets, each as --data.specific takes one: everything is done for each, in a folder named after it."""
    same_seconds: bool = of_comparison(False)
    """Train every method again, with as many steps as fit in uniform's seconds (or in --budget-seconds)."""
    budget_seconds: NonNegativeFloat = of_comparison(0.0)
    """With --same-seconds: training seconds of each run; 0: those of uniform, on average over seeds."""
    trials: NonNegativeInt = of_comparison(0)
    """Settings that are tried for each method before the comparison, the preset first; the best on valid is used. 0: none."""
    trial_steps: NonNegativeInt = of_comparison(0)
    """θ-updates of a trial; 0: a quarter of --steps."""
    schedule_steps: NonNegativeInt = 0
    """Length of the learning-rate schedule, if training is to stop before its end; 0: --steps."""
    targets: tuple[float, ...] = of_comparison(())
    """Values of the deciding measure on test; reported are the steps until each is reached."""
    run_dir: Path = of_comparison(Path("runs/study"))
    """Where everything is written; the same command continues there."""
    eval_only: bool = of_comparison(False)
    """Evaluate the checkpoints in the run directory, without training."""
    log_every: Count = free(50)
    """Steps between two rows of metrics."""
    evaluate_every: NonNegativeInt = free(250)
    """Steps between two evaluations."""
    checkpoint_every: NonNegativeInt = free(1000)
    """Steps between two checkpoints."""
    evaluate_rows: NonNegativeInt = free(2048)
    """Most rows of each set in an evaluation while training; 0: all. The final ones use all."""
    resident: Residence = of_comparison("auto")
    """Keep all data on the device, and make several steps in one program call; auto: if they fit (in an eighth of its memory,
    on CPU in 1 GiB) and there is one process."""
    steps_per_call: Count = of_comparison(8)
    """With data on the device: most steps in one call."""
    progress: bool = free(True)
    """Show a progress bar."""
    tensorboard: bool = free(False)
    """Also write TensorBoard events."""
    micro_batches: Count = 1
    """Evaluate batches in this many equal parts, one after the other, to save memory."""
    shard_state: bool = free(False)
    """Spread parameters and optimizer states over all devices, for models that do not fit on one."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    @property
    def residence(self) -> Residence:
        """Where the data lie: as --resident says, but batches travel where a state is split."""
        return "never" if self.shard_state else self.resident

    @property
    def seed_numbers(self) -> range:
        """All seeds."""
        return range(self.seed, self.seed + self.seeds)

    def check(self) -> None:
        """Refuse numbers out of range and flags that do not go together; a UserError names the first."""
        check_bounds(self)
        self.optimizer.check()
        self._check_together()
        self._check_hosts()

    def _check_together(self) -> None:
        if 0 < self.schedule_steps < self.steps:
            raise UserError(
                f"--schedule-steps {self.schedule_steps} ends the learning rate before --steps {self.steps}: give at least "
                "as many, or 0."
            )
        for name, other in (("budget_seconds", "same_seconds"), ("trial_steps", "trials")):
            if getattr(self, name) and not getattr(self, other):
                raise UserError(
                    f"{flag_of(name)} {getattr(self, name)} counts only with {flag_of(other)}: add it, or omit {flag_of(name)}."
                )
        if self.same_seconds and self.schedule_steps > self.steps:
            raise UserError(
                f"--same-seconds ends the learning rate with each run, and --schedule-steps {self.schedule_steps} after "
                f"--steps {self.steps}: omit one of the two."
            )

    def _check_hosts(self) -> None:
        h = self.hosts
        alone = next((name for name in ("processes", "process") if getattr(h, name) is not None), None)
        if alone is not None and h.coordinator is None:
            raise UserError(f"--hosts.{alone} needs --hosts.coordinator HOST:PORT, the address of process 0, or auto.")
        if h.coordinator not in (None, "auto") and None in (h.processes, h.process):
            raise UserError(
                f"--hosts.coordinator {h.coordinator} needs --hosts.processes and --hosts.process (from 0) too."
            )
        if self.resident == "always" and (self.shard_state or h.coordinator):
            other = "--shard-state" if self.shard_state else "--hosts.coordinator"
            raise UserError(f"--resident always keeps everything on each device of one process: omit it or {other}.")


@dataclass(frozen=True)
class Config:
    """All typed settings of a command: the study, the task's own, and those of every method."""

    study: Study
    task: Any
    """The task's dataclass, with `data` and `model`."""
    methods: Mapping[str, Any]
    """Name of a method -> its settings."""
    prepared: Path
    """Where what several runs use is kept."""

    def with_study(self, **changes: Any) -> Config:
        """The same with other settings of the study."""
        return dataclasses.replace(self, study=dataclasses.replace(self.study, **changes))

    def with_method(self, method: str, settings: Any) -> Config:
        """The same with other settings of a method."""
        return dataclasses.replace(self, methods={**self.methods, method: settings})


def plain(value: Any) -> Any:
    """A configuration as YAML and JSON have it: dataclasses as mappings, paths as text, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def of_run(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that concern one run, as `plain` values."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("of_run", True):
            found[f.name] = of_run(value) if dataclasses.is_dataclass(value) else plain(value)
    return {name: value for name, value in found.items() if value != {}}


def may_change(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of the settings that may differ when a run continues."""
    found: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not f.metadata.get("decides", True):
            found.append(prefix + f.name)
        elif dataclasses.is_dataclass(value):
            found += may_change(value, f"{prefix}{f.name}.")
    return found
