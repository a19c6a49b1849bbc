"""The loop that every run shares: steps, metrics, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bilevel.training.checkpoints import CHECKPOINTS_NAME, Checkpoints
from bilevel.training.config import LoopConfig as LoopConfig
from bilevel.training.feed import Item, Source, feed
from bilevel.training.health import Health
from bilevel.training.interval import Interval
from bilevel.training.metrics import MetricsWriter, Row
from bilevel.training.programs import Program, Programs, Step, StepChoice
from bilevel.training.progress import Progress
from bilevel.training.run_dir import hold_run_dir
from bilevel.training.signals import StopSignals
from bilevel.training.timing import Stopwatch
from bilevel.types import UserError

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"

# The parts of a state beside its parameters that a NaN would spread from.
_KEPT = ("model_state", "opt_state", "weight_opt_state", "method_state", "ema", "train", "sampler")

# Each queued step keeps its batches in device memory; this many are enough to keep a device busy.
STEPS_AHEAD = 8

Evaluate = Callable[[Any], Mapping[str, float]]
OnSelected = Callable[[np.ndarray, int], Mapping[str, float]]
OnState = Callable[[Any, int], None]
Until = Callable[[int], bool]


class TrainingDiverged(UserError):
    """The loss, the parameters or what is kept beside them are no longer finite."""

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step
        """The step at which, or after which, that was seen."""


class TrainResult(NamedTuple):
    """What `train` returns."""

    state: Any
    """The state after the last step."""
    history: list[Row]
    """The rows of metrics of the whole run, those of earlier starts included (on process 0)."""
    stopped_early: bool
    """A signal ended the run before `num_steps`, and before `until` did."""
    seconds: float
    """Training seconds of the whole run: without compiling, evaluating and saving."""
    compile_seconds: float
    """Seconds of the first call of each step function in this start, which compiles; with data on the device it makes no step."""
    stop_requested: bool = False
    """A signal asked to stop, perhaps only in the last step or its evaluation: begin nothing more."""


def train(
    step: Step | StepChoice,
    state: Any,
    *,
    data: Source,
    config: LoopConfig,
    run_dir: str | Path | None = None,
    evaluate: Evaluate | None = None,
    on_selected: OnSelected | None = None,
    on_state: OnState | None = None,
    until: Until | None = None,
) -> TrainResult:
    """Train until `config.num_steps`, from the newest checkpoint of `run_dir`.

    The batches of a step are a function of its number alone, so a run that was killed and continued ends with
    the same parameters, bit for bit, as one that was not. A row of metrics is the mean since the row before;
    rows are written every `log_every` steps and at each evaluation and checkpoint, before the checkpoint.

    Args:
        step: `(state, big_batch, specific_batch) -> (state, metrics)`; jitted here with the state donated,
            unless it is jitted already. An object with `at(step) -> function` (`bilevel.TrainStep`) chooses
            the function for each step. `metrics` are scalars (`generic_loss` must be finite; means leave out
            `bilevel.types.NOT_COMPUTED`, and NaN) and `ids`, int32 `[b]`, the ids of the rows that were trained on.
        state: the initial state, with a `step` field. It is donated: do not use it afterwards. On continuing
            it is only the template that gives the tree, the types and the shardings.
        data: `Data`, the loaders and how batches get to the devices; or `Resident`, data that are there.
        config: how long to train, and how often to do what.
        run_dir: where metrics and checkpoints go; None keeps nothing on disk.
        evaluate: `(state) -> {name: value}`, added to the row; called in every process.
        on_selected: `(ids, step) -> {name: value}`, added to the row; `ids`, int32 `[n]`, are the data rows
            trained on since the row before. Called in process 0 only. The step must give `ids`, as those of the
            library do for batches with an `id`.
        on_state: `(state, steps done)`, called in every process with the initial state and every `state_every` steps, before
            the checkpoint of the same step: so a run that continues calls it again, with equal states, for all steps after
            its checkpoint. The state's arrays are donated afterwards; copy what is to be kept.
        until: `(steps done) -> bool`, asked after each evaluation, and when a run continues; True ends the run there, with a
            checkpoint. Called in every process, which must all answer the same.

    Returns:
        The final state, the metrics and the times.

    Raises:
        TrainingDiverged: the loss or the parameters are not finite, or there is NaN in what the state keeps beside them (see
            `_KEPT`); the last checkpoint is from before that. It names what was the first not to be finite. Of what a step goes
            on without (an α-step whose specific loss is NaN, a row without a logit) there is one warning, as of α-steps that
            all have alignments of 0.
        UserError: the run directory cannot be used, or the state has no `step`.
    """
    state, run_dir = _settled(jax.tree.map(_strong, state)), None if run_dir is None else Path(run_dir)
    with StopSignals(config.stop_signals) as signals:
        with contextlib.ExitStack() as stack:
            checkpoints = writer = None
            first = jax.process_index() == 0
            if run_dir is not None:
                if first:
                    stack.enter_context(hold_run_dir(run_dir))
                checkpoints = stack.enter_context(Checkpoints(run_dir / CHECKPOINTS_NAME, config.keep))
                restored = checkpoints.restore_latest(state)
                state = state if restored is None else restored[1]
            start = _steps_of(state)
            if start > config.num_steps:
                raise UserError(
                    f"{run_dir} has been trained for {start} steps already, and {config.num_steps} are asked "
                    "for: ask for more steps, or give another --run-dir."
                )
            if run_dir is not None and first:
                tensorboard = run_dir / TENSORBOARD_NAME if config.tensorboard else None
                writer = stack.enter_context(MetricsWriter(run_dir / METRICS_NAME, start, tensorboard))
            progress = stack.enter_context(Progress(config.num_steps, config.progress and first, start=start))
            programs = data.programs(step, config.steps_per_call)
            ended = until is not None and start > 0 and until(start)
            calls = () if ended else config.calls(start)
            items = stack.enter_context(feed(data, calls, config.steps_per_call))
            if on_state is not None and start == 0:
                on_state(state, 0)
            run = _Run(
                programs,
                config,
                run_dir,
                evaluate,
                on_selected,
                on_state,
                until,
                checkpoints,
                writer,
                signals,
                progress,
            )
            result = run(state, items)
        # Asked last, so that no signal is lost while everything is closed.
        return result._replace(stop_requested=signals.agreed())


class _Run:
    """One start of a run: the mutable part of the loop."""

    def __init__(
        self,
        programs: Programs,
        config: LoopConfig,
        run_dir: Path | None,
        evaluate: Evaluate | None,
        on_selected: OnSelected | None,
        on_state: OnState | None,
        until: Until | None,
        checkpoints: Checkpoints | None,
        writer: MetricsWriter | None,
        signals: StopSignals,
        progress: Progress,
    ):
        self._programs = programs
        self._config = config
        self._run_dir = run_dir
        self._evaluate = evaluate
        self._on_selected = on_selected
        self._on_state = on_state
        self._until = until
        self._checkpoints = checkpoints
        self._writer = writer
        self._signals = signals
        self._progress = progress
        self._history: list[Row] = [] if writer is None else list(writer.rows)
        self._stopwatch = Stopwatch(_common(self._history[-1]["seconds"] if self._history else 0.0))
        self._interval = Interval(on_selected is not None)
        self._calls_ahead = max(1, STEPS_AHEAD // config.steps_per_call)
        self._compile_seconds = 0.0
        self._health = Health()

    def __call__(self, state: Any, items: Iterator[tuple[int, Item]]) -> TrainResult:
        stop, ended, done = False, False, self._config.num_steps
        for number, item in items:
            state = self._call(number, state, item)
            done = number + (item.steps or 1)
            if self._on_state is not None and self._config.due(done, self._config.state_every):
                self._show_state(self._on_state, state, done)
            stop = self._must_stop(done)
            if stop or self._logs(done) or self._evaluates(done) or self._saves(done):
                ended = self._finish_interval(state, done, stop)
            if stop or ended:
                break
        stopped_early = stop and not ended and done < self._config.num_steps
        seconds = self._stopwatch.stop()
        return TrainResult(state, self._history, stopped_early, seconds, self._compile_seconds)

    def _call(self, number: int, state: Any, item: Item) -> Any:
        program, new = self._programs.at(number)
        state, metrics = self._first_call(program, state, item) if new else program(state, *item.arguments)
        self._interval.add(number + 1, metrics, item.steps)
        self._interval.bound(self._calls_ahead)
        self._progress.advance(item.steps or 1)
        return state

    def _first_call(self, program: Program, state: Any, item: Item) -> tuple[Any, Mapping[str, Any]]:
        """Call a program that compiles now. Training time stands still meanwhile."""
        jax.block_until_ready(state)
        self._stopwatch.stop()
        result, moved = self._compiling(program, state, item.arguments if item.idle is None else item.idle)
        if item.idle is None:
            if moved:
                self._programs.renew()
            self._stopwatch.start()
            return result
        if moved:  # for a state that lies elsewhere it is compiled again
            result, _ = self._compiling(program, result[0], item.idle)
        self._stopwatch.start()
        return program(result[0], *item.arguments)

    def _compiling(self, program: Program, state: Any, arguments: tuple[Any, ...]) -> tuple[Any, bool]:
        """What a call that compiles returns, and whether the state lies elsewhere than before."""
        began, before = time.perf_counter(), _places(state)
        result = jax.block_until_ready(program(state, *arguments))
        self._compile_seconds += time.perf_counter() - began
        return result, _places(result[0]) != before

    def _show_state(self, on_state: OnState, state: Any, done: int) -> None:
        """Call `on_state`. Training time stands still meanwhile."""
        jax.block_until_ready(state)
        self._stopwatch.stop()
        on_state(state, done)
        self._stopwatch.start()

    def _finish_interval(self, state: Any, done: int, stop: bool) -> bool:
        """Write a row; evaluate and save when it is time. Training time stands still meanwhile.

        Returns:
            Whether the run is to end here, as `until` says.
        """
        jax.block_until_ready(state)
        seconds = self._stopwatch.stop()
        fetched = self._interval.take()
        fault, bad = fetched.first_fault(), fetched.first_bad("generic_loss")
        # In the same step both follow from parameters that are not finite.
        if fault is not None and (bad is None or fault.step < bad[0]):
            self._health.note(fault)
        if bad is not None:
            self._diverged(bad[0], f"The generic loss is {bad[1]} at step {bad[0]}")
        evaluates, saves = self._evaluates(done), stop or self._saves(done)
        if (evaluates or saves) and (broken := _broken(state)):
            self._diverged(done, f"{broken} after step {done}, though the generic loss was finite")
        self._health.watch(*fetched.silent())
        self._health.watch_uses(fetched.first_left_out())
        values = fetched.means()
        if evaluates and self._evaluate is not None:
            values.update(self._evaluate(state))
        if self._on_selected is not None and fetched.ids is not None and jax.process_index() == 0:
            values.update(self._on_selected(fetched.ids, done))
        self._record(done, seconds, values)
        ended = evaluates and self._until is not None and self._until(done)
        if (saves or ended) and self._checkpoints is not None:
            self._checkpoints.save(done, state, wait=stop or ended or done == self._config.num_steps)
        self._stopwatch.start()
        return ended

    def _record(self, done: int, seconds: float, values: Mapping[str, float]) -> None:
        if taken := {"step", "seconds"} & values.keys():
            raise UserError(
                f"The metrics, `evaluate` or `on_selected` gave a value called {min(taken)!r}, which each row has already: "
                "rename it."
            )
        row = {"step": done, "seconds": seconds, **{name: float(value) for name, value in values.items()}}
        self._history.append(row if self._writer is None else self._writer.write(done, seconds, values))
        self._progress.show({name: value for name, value in values.items() if name.endswith("loss")})

    def _diverged(self, step: int, what: str) -> NoReturn:
        advice = "lower the learning rate or clip the gradients"
        if (fault := self._health.fault) is not None:
            what, advice = f"{fault.what}; {what[0].lower()}{what[1:]}", f"{fault.advice}, then {advice}"
        if self._checkpoints is None:
            raise TrainingDiverged(f"{what}: {advice}.", step)
        self._checkpoints.wait()
        last = self._checkpoints.latest_step()
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is that of step {last}"
        raise TrainingDiverged(f"{what} ({kept}, in {self._run_dir}): {advice}, and give another --run-dir.", step)

    def _must_stop(self, done: int) -> bool:
        # Several processes must stop at the same step; they ask each other only where they wait anyway.
        if jax.process_count() > 1 and not self._logs(done):
            return False
        return self._signals.agreed()

    def _logs(self, done: int) -> bool:
        return self._config.due(done, self._config.log_every)

    def _evaluates(self, done: int) -> bool:
        return self._config.due(done, self._config.evaluate_every)

    def _saves(self, done: int) -> bool:
        return self._config.due(done, self._config.checkpoint_every)


def _steps_of(state: Any) -> int:
    if not hasattr(state, "step"):
        raise UserError(
            f"The state, a {type(state).__name__}, has no field `step`: give it one, int32, that the step function counts up."
        )
    return int(jax.device_get(state.step))


def _strong(leaf: Any) -> jax.Array:
    """Make an array without a weak type: a checkpoint cannot store it, and it may change the arithmetic."""
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype) if getattr(array, "weak_type", False) else array


def _settled(state: Any) -> Any:
    """Commit all arrays to their device if some are (by `jax.device_put`), as a step would return them: else the step is
    compiled again for its second call."""
    committed = [leaf.sharding.device_set for leaf in jax.tree.leaves(state) if leaf.committed]
    devices = set().union(*committed)
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding) if leaf.sharding.device_set == devices else leaf, state
    )


def _places(state: Any) -> list[Any]:
    """Where the arrays of a state lie: a program is compiled anew for others."""
    return [(leaf.sharding, leaf.committed) for leaf in jax.tree.leaves(state)]


def _broken(state: Any) -> str | None:
    """What makes a state no good to go on from, in words: parameters that are not finite, or NaN in what is kept beside them.

    Infinities there are no harm: optimizers begin with them where they look for a minimum.
    """
    parameters = {
        "The parameters": getattr(state, "params", state),
        "The parameters of the weighting network": getattr(state, "weight_params", None),
    }
    kept = {name: getattr(state, name) for name in _KEPT if hasattr(state, name)}
    finite, without_nan = jax.device_get(_soundness(parameters, kept))
    if not all(finite.values()):
        return f"{next(name for name, sound in finite.items() if not sound)} are not finite"
    return next((f"There is NaN in state.{name}" for name, sound in without_nan.items() if not sound), None)


@jax.jit
def _soundness(parameters: dict[str, Any], kept: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    finite = {name: _everywhere(jnp.isfinite, part) for name, part in parameters.items()}
    return finite, {name: _everywhere(lambda x: ~jnp.isnan(x), part) for name, part in kept.items()}


def _everywhere(holds: Callable[[jax.Array], jax.Array], tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.asarray([holds(leaf).all() for leaf in floats]).all()


def _common(seconds: float) -> float:
    """Return process 0's value in every process."""
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.broadcast_one_to_all(np.asarray(seconds)))
