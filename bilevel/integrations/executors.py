"""Runs the phases of `bilevel select` by the executors of datatrove: on this machine, with Slurm or with Ray."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from bilevel.tools.select.config import Config
from bilevel.tools.select.phases import FOLDER, Phase, RunPhases
from bilevel.types import UserError

_DONE = "completions"
"""In the logs of a phase: datatrove's mark for each task that ended well."""


class PhaseStep(PipelineStep):
    """A phase as the only step of a pipeline: it takes no documents and gives none."""

    type = "bilevel select"

    def __init__(self, phase: Phase):
        self.phase, self.name = phase, phase.name
        super().__init__()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the share of a task."""
        self.phase(rank)
        return ()


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor with processes whose end is noticed: its own pool waits for a killed one for ever.

    They end with the process that started them, also if that is killed.
    """

    quiet = False
    """Whether only errors are printed; the log files have everything."""

    def run(self) -> None:
        """Run all tasks; the first exception of one is raised when those that began before have ended.

        Raises:
            UserError: a process was killed.
        """
        if self.workers == 1:
            for rank in range(self.tasks):
                self._run_for_rank(rank, self._place(rank))
            return
        spawn = multiprocessing.get_context("spawn")  # jax's threads do not survive a fork
        with ProcessPoolExecutor(self.workers, spawn, _end_with_parent) as pool:
            begun = [pool.submit(self._run_for_rank, rank, self._place(rank)) for rank in range(self.tasks)]
            try:
                for one in begun:
                    one.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "A process of --executor local was killed, perhaps for want of memory: give the same command again, with "
                    "fewer --workers; it continues."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    def _place(self, rank: int) -> int:
        return rank + self.quiet  # datatrove prints the log of place 0


def _end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def open_executor(config: Config) -> RunPhases:
    """Return what runs phases one after the other, or hands them to Slurm as jobs that wait for each other.

    The tasks find out themselves what is done; marks and logs of earlier calls decide nothing. Call this before jax starts its
    threads, which do not survive the forks by which Ray starts.

    Raises:
        UserError: what the executor needs is missing; later, tasks of a phase failed.
    """
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--executor slurm needs the program sbatch: give the command on a login node of the cluster.")
    if config.executor == "ray":
        try:
            ray = importlib.import_module("ray")  # of no extra
        except ImportError as error:
            raise UserError("--executor ray needs ray: pip install 'ray[default]'.") from error
        ray.init(ignore_reinit_error=True)
    return partial(_run_phases, config)


def _run_phases(config: Config, phases: Sequence[Phase]) -> None:
    before: PipelineExecutor | None = None
    for phase in phases:
        logs = config.output / FOLDER / phase.name
        shutil.rmtree(logs / _DONE, ignore_errors=True)
        executor = _EXECUTORS[str(config.executor)](config, phase, str(logs.absolute()), before)
        executor.run()
        before = executor
        if config.executor != "slurm":
            _check_done(executor, phase, logs)
    if config.executor == "slurm":
        summary = config.output / "summary.json"
        print(f"Slurm has the jobs (squeue lists them); {summary} is new when the last one has ended.")


def _check_done(executor: PipelineExecutor, phase: Phase, logs: Path) -> None:
    failed = executor.get_incomplete_ranks(skip_completed=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {phase.tasks} tasks of the phase {phase.name} failed (the first is {failed[0]}): see "
            f"{logs / 'logs' / f'task_{failed[0]:05d}.log'}, and give the same command again; it continues."
        )


def _local(config: Config, phase: Phase, logs: str, before: Any) -> PipelineExecutor:
    workers = min(phase.tasks, config.workers or os.cpu_count() or 1)
    executor = LocalExecutor([PhaseStep(phase)], phase.tasks, workers, logs, skip_completed=False)
    executor.quiet = not config.progress
    return executor


def _ray(config: Config, phase: Phase, logs: str, before: Any) -> PipelineExecutor:
    workers = config.workers or -1
    return RayPipelineExecutor([PhaseStep(phase)], phase.tasks, workers, logging_dir=logs, skip_completed=False)


def _slurm(config: Config, phase: Phase, logs: str, before: Any) -> PipelineExecutor:
    slurm = config.slurm
    assert slurm.partition is not None
    return SlurmPipelineExecutor(
        [PhaseStep(phase)], phase.tasks, slurm.time, slurm.partition, slurm.cpus_per_task, slurm.memory,
        workers=config.workers or -1, job_name=f"bilevel-{phase.name}", qos=slurm.qos or "",
        env_command=slurm.setup or "", sbatch_args={} if slurm.account is None else {"account": slurm.account},
        depends=before, logging_dir=logs, skip_completed=False,
    )  # fmt: skip


_EXECUTORS: dict[str, Callable[[Config, Phase, str, Any], PipelineExecutor]] = {
    "local": _local, "slurm": _slurm, "ray": _ray,
}  # fmt: skip
