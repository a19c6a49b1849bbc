"""The settings that all comparisons share, resolved once at the entry.

A field says by its metadata whether it decides the outcome of a run: two runs whose deciding fields are equal give equal results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from bilevel.training.opening import Residence
from bilevel.training.optimizers import OptimizerConfig
from bilevel.training.settings import Count, Rate, check_bounds, flag_of, free, of_comparison
from bilevel.types import UserError


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
    max_uses: int = 0
    """Most times that a row is trained on by methods that pick rows from a big batch by their logits, 1 to 255: one that was
    picked so often is left out of later big batches; 0: no limit. Others train on each row once an epoch."""
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
    judge: bool = of_comparison(True)
    """Where models write, let each write its test sets at its end, and measure the texts."""
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
    weigh: Literal["rows", "domains"] = "rows"
    """What the weighting network of learned methods sees: rows, or nothing but the known domain of each (--data.generic-labels,
    classes), so that a mixture of domains is learned, {domain: share} in domains.json."""
    two_stage: bool = of_comparison(False)
    """Where rows are picked from a big batch by a weighting network that reads a part of them, such as small images: let only
    that part travel of all rows, and in full the rows that are picked."""
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
        if not 0 <= self.max_uses <= 255:
            raise UserError(f"--max-uses {self.max_uses} must be at least 0 and at most 255: 0 is no limit.")
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
        if self.resident == "always" and self.two_stage:
            raise UserError(
                "--resident always keeps all rows on the device, and --two-stage loads them: omit one of the two."
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
