"""Checkpoints of the training state: one small module that hides Orbax."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bilevel.training import leaves
from bilevel.training.run_dir import check_path
from bilevel.types import UserError

CHECKPOINTS_NAME = "checkpoints"
"""Folder of a run's checkpoints in its directory."""

_ITEM = "state"
# What reading a damaged checkpoint raises. Running out of memory is not among them, for it is no damage.
_DAMAGE = (ValueError, KeyError, TypeError, OSError)
# After a failed restore other reads still end, and complain that nobody waits for them.
_ABANDONED_READS_SECONDS = 0.2


class Checkpoints:
    """The checkpoints in one directory; a context manager.

    It waits for pending saves when it closes.

    The state is stored as a flat table `path of the leaf -> array`, so that any pytree can be saved (typed
    random keys, None, empty nodes and Python numbers included) and a difference can be named by its path.

    Args:
        directory: where the checkpoints are; created if needed.
        keep: how many checkpoints are kept; older ones are deleted once a newer one is complete.
        read_only: change nothing in the directory, to which another process may be writing: saves are ignored, and damaged
            checkpoints stay where they are.

    Raises:
        UserError: the directory cannot be written, or has a path that Orbax cannot read again, or `keep` is below 1.
    """

    def __init__(self, directory: Path, keep: int = 2, *, read_only: bool = False):
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints would keep none: give a number of at least 1.")
        check_path(directory)
        self._directory, self._read_only = Path(directory).absolute(), read_only
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            # Otherwise a directory that cannot be created leaves a thread that waits for it for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers={_ITEM: ocp.StandardCheckpointHandler()}
            )
        except OSError as error:
            raise UserError(
                f"Cannot write checkpoints in {self._directory} ({error.strerror}): give another --run-dir."
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, exc_type: Any, *unused: object) -> Literal[False]:
        if exc_type is None:
            self.close()
        else:  # a failing save must not hide the error that brought us here
            with contextlib.suppress(UserError):
                self.close()
        return False

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint (a save in progress included), or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Save `state`, in the background.

        All of `state` is on the host (or protected from being overwritten) when this returns, so it may be
        donated to the next step at once. Saving the newest step again does nothing. Every process must call
        this.

        Args:
            step: number of the checkpoint, larger than that of the newest one.
            state: any pytree of arrays, typed keys and numbers.
            wait: return only when the checkpoint is complete on disk.

        Raises:
            UserError: this checkpoint, or the one before it, could not be written.
        """
        with self._write_errors():
            if step != self.latest_step():
                table = leaves.to_table(state)
                self._manager.save(step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(table)}))
            if wait:
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Return when all saves are complete on disk.

        Raises:
            UserError: a checkpoint could not be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def restore_latest(self, template: Any) -> tuple[int, Any] | None:
        """Restore the newest checkpoint that can be read.

        A damaged checkpoint is set aside (renamed to `STEP.damaged`, unless read only) with a warning on stderr, and the
        one before it is used.

        Args:
            template: a pytree like the saved one, of arrays or of `jax.ShapeDtypeStruct`. Arrays with a
                committed sharding are restored with it; the others uncommitted, on the default device.

        Returns:
            `(step, state)`, or None when there is no checkpoint.

        Raises:
            UserError: `template` does not fit the checkpoint, or no checkpoint can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            state, problem = self._restore(step, template)
            if problem is None:
                self._set_aside(damaged)
                return step, state
            damaged[step] = problem
        if damaged:
            raise UserError(
                f"None of the checkpoints in {self._directory} can be read "
                f"(step {steps[0]}: {damaged[steps[0]]}): "
                "restore that directory from a backup, or delete it to start from the beginning."
            )
        return None

    def close(self) -> None:
        """Wait for pending saves and release the threads.

        Raises:
            UserError: a checkpoint could not be written.
        """
        with self._write_errors():
            self._manager.close()

    def _restore(self, step: int, template: Any) -> tuple[Any, str | None]:
        """Return (state, None), or (None, what is damaged)."""
        table: dict[str, Any] = {}
        problem = None
        with _quiet_failures():
            try:
                stored = self._manager.item_metadata(step)[_ITEM]
                if stored is None or not stored.tree:
                    raise ValueError("its description is missing")
                leaves.check_fits(template, stored.tree, f"checkpoint {self._directory / str(step)}")
                restore = ocp.args.StandardRestore(leaves.restore_template(template))
                table = self._manager.restore(step, args=ocp.args.Composite(**{_ITEM: restore}))[_ITEM]
            except UserError:
                raise
            except _DAMAGE as error:
                problem = _first_line(error)
                del error
                gc.collect()
                time.sleep(_ABANDONED_READS_SECONDS)
        problem = _agree(problem)
        return (leaves.from_table(table, template), None) if problem is None else (None, problem)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for step, problem in damaged.items():
                if not self._read_only:
                    _free_name(self._directory / str(step))
                renamed = "" if self._read_only else f"it was renamed to {step}.damaged and "
                print(
                    f"warning: the checkpoint of step {step} in {self._directory} is damaged ({problem}); "
                    f"{renamed}an earlier one is used.",
                    file=sys.stderr,
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("bilevel: damaged checkpoints set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(
                f"A checkpoint could not be written to {self._directory} ({_first_line(error)}): "
                "check the free space and the permissions there and run the same command again; "
                "complete checkpoints are kept."
            ) from error


def steps_done(run_dir: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 if there is none."""
    if not (run_dir / CHECKPOINTS_NAME).is_dir():
        return 0
    with Checkpoints(run_dir / CHECKPOINTS_NAME, read_only=True) as checkpoints:
        return checkpoints.latest_step() or 0


def kept_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, by their names alone."""
    return sorted(int(path.name) for path in (run_dir / CHECKPOINTS_NAME).glob("[0-9]*") if path.name.isdecimal())


def newest_state(run_dir: Path, template: Any, advice: str) -> Any:
    """Return the state of a run's newest checkpoint.

    Raises:
        UserError: there is none; `advice` is the end of the sentence.
    """
    restored = None
    if (run_dir / CHECKPOINTS_NAME).is_dir():
        with Checkpoints(run_dir / CHECKPOINTS_NAME, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(template)
    if restored is None:
        raise UserError(f"{run_dir} holds no checkpoint: {advice}.")
    return restored[1]


def _free_name(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    path.rename(target)


def _agree(problem: str | None) -> str | None:
    """One process that cannot read a checkpoint makes all of them use the one before."""
    if jax.process_count() == 1:
        return problem
    failed = multihost_utils.process_allgather(np.asarray(problem is not None))
    return (problem or "another process could not read it") if np.any(failed) else None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return (text[:150] + "…" if len(text) > 150 else text) or type(error).__name__


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Hide what a failed restore leaves behind: unawaited coroutines, errors of abandoned reads."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    was_disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled, sys.unraisablehook = was_disabled, hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _silence_orbax() -> None:
    """Drop the log records of Orbax (its errors reach us as exceptions); others that use absl keep theirs.

    Likewise what the other writes of a failed save, which nobody waits for, print when they end: their event loop is closed.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)  # adding the same function twice has no effect
    if getattr(sys.unraisablehook, "__name__", "") != _unless_abandoned.__name__:
        before = sys.unraisablehook
        sys.unraisablehook = functools.wraps(_unless_abandoned)(lambda found: _unless_abandoned(found, before))


def _unless_abandoned(found: Any, hook: Callable[[Any], object]) -> None:
    last = traceback.extract_tb(found.exc_traceback)[-1:]
    if not (found.exc_type is RuntimeError and last and last[0].name == "_check_closed"):
        hook(found)
