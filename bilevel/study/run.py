"""One run: one method, one seed, in a directory of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax

from bilevel.data import Dataset, GroupedData
from bilevel.devices import sharding
from bilevel.devices.processes import say
from bilevel.selection.known import faults, observer
from bilevel.study.context import RESULT, Context
from bilevel.study.feeding import loaders, small_of
from bilevel.study.fitting import finetuned, kept_results
from bilevel.study.judging import OUTPUTS, judged, judges
from bilevel.study.registry import METHODS
from bilevel.study.spec import Switch
from bilevel.study.task import Evaluate, Measure
from bilevel.training import LoopConfig, Sampled, Source, TrainResult, prepare_run_dir, train
from bilevel.training.checkpoints import newest_state, steps_done
from bilevel.training.evaluation import measured, trained
from bilevel.training.metrics import best_row, even_intervals, mean_of, narrowed
from bilevel.training.opening import open_source, steps_in_call
from bilevel.training.run_dir import read_json, write_json
from bilevel.training.signals import Stopped
from bilevel.training.two_stage import TwoStageData

CORRECT = "generic_correct"
"""Metric of losses that know whether a row is classified right: on rows picked, the share that is learned already."""


def run(context: Context) -> dict[str, Any]:
    """Train (or continue, or only evaluate) one run, and return its summary.

    It is that of result.json and finetuned.json. The seed decides the initial parameters, the order of the data and all random
    draws.

    Raises:
      Stopped: a signal stopped it before its end.
      UserError: its directory holds a run of other settings or data.
    """
    this, study, directory = Run(context), context.study, context.directory
    if study.eval_only:
        return this.evaluated() | kept_results(study, directory)
    this.prepare()
    done = directory / RESULT
    if done.exists():
        found, state = read_json(done), None
        if judges(context) and not (directory / OUTPUTS).exists():  # trained without writing
            found |= this.judged(this.checkpoint())
            write_json(done, found)
    else:
        found, state = this.train()
    if not study.finetune.steps:
        return found
    if study.progress:
        say(f"{context.method}, seed {context.seed}: fine-tuning")
    return found | finetuned(context, this.plan.model, lambda: trained(state or this.checkpoint(), context.mesh))


class Run:
    """One run; its parts are built when they are needed."""

    def __init__(self, context: Context):
        """Build the plan, which checks the method's settings."""
        self.context = context
        self.plan = METHODS[context.method].plan(context.config.methods[context.method], context)

    @cached_property
    def evaluate(self) -> Evaluate:
        """Measures the model."""
        return self.context.evaluate(self.plan.model)

    def prepare(self) -> None:
        """Write the settings into the directory, or compare them with those of the run there."""
        context = self.context
        prepare_run_dir(context.directory, context.identity(self.plan.identity), may_change=context.changeable())

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """The step, and the initial state on all devices; the same main model for every method of a seed."""
        context, step, watch = self.context, self.plan.step, observer(self.context.splits.known)
        step = step if watch is None else step.map(watch)
        create = partial(self.plan.init, *jax.random.split(jax.random.key(context.seed), 3))
        start = {} if self.plan.model.start is None else self.plan.model.start()
        if self.plan.samples:
            return step.step, jax.jit(create)(start)
        split = context.study.shard_state
        start = sharding.place_tree(context.mesh, start, split=split) if start else start
        state, step = sharding.placed(context.mesh, step, create, start, split=split)
        return step, state

    def started(self) -> tuple[Any, Mapping[str, float]]:
        """Return the initial state with the weights that are known before training, and what those cost.

        Runs that this one continues from are made now if there are none.
        """
        context, state = self.context, self.parts[1]
        for name in METHODS[context.method].first:
            run(context.own_context(name, context.seed))
        if self.plan.start is None:
            return state, {}
        alpha, report = self.plan.start(state)
        alpha = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), alpha, state.weight_params)
        return dataclasses.replace(state, weight_params=alpha), report

    def checkpoint(self) -> Any:
        """Return the newest checkpoint; a UserError says if there is none."""
        again = f"delete {RESULT} to train again"
        advice = "train first, without --eval-only" if self.context.study.eval_only else again
        return newest_state(self.context.directory, self.parts[1], advice)

    def measured(self, state: Any, limit: int | None = None, test: bool = True) -> dict[str, float]:
        """Measure a state on the valid sets and, with `test`, on the test sets."""
        model = trained(state, self.context.mesh)
        return measured(self.evaluate, model, self.context.splits.measured(test), limit)

    def evaluated(self) -> dict[str, Any]:
        """Return the measures of the newest checkpoint, if the run is of these settings and data."""
        state, context = self.checkpoint(), self.context
        self.prepare()
        about = {"method": context.method, "seed": context.seed, "steps": int(jax.device_get(state.step))}
        return {**about, "seconds": math.nan, **self.measured(state), **self.judged(state)}

    def judged(self, state: Any) -> dict[str, float]:
        """Let the model of a state write its test sets, and measure the texts."""
        return judged(self.context, self.plan.model, lambda: trained(state, self.context.mesh))

    def train(self) -> tuple[dict[str, Any], Any]:
        """Train to the end, and write what remains of the run; returns the summary and the last state."""
        plan, context, (state, report) = self.plan, self.context, self.started()
        rows = plan.rows() if plan.rows is not None else None
        if plan.switch is None:
            result = self._trained(state, context.study.steps, rows)
        else:
            result, report = self._switched(state, plan.switch)
        loaded = context.loaded_rows(plan.picks)
        if isinstance(rows, GroupedData):
            loaded, rows = rows.mean_rows(loaded), None
        found = _summary(context, result, loaded) | self.measured(result.state) | dict(report)
        found["seconds"] += found.get("preparation_seconds", 0.0)
        if not plan.weighs:
            found.pop("effective_sample_size", None)
        if rows is not None:
            found["training_rows"] = len(rows)
        found |= plan.about
        if plan.if_narrow and (warning := narrowed(result.history, context.study.batch_size, plan.if_narrow)):
            found["warnings"] = [warning]
        found |= plan.finish(result.state) if plan.finish is not None else {}
        found |= self.judged(result.state)
        write_json(context.directory / RESULT, found)
        return found, result.state

    def _switched(self, state: Any, switch: Switch) -> tuple[TrainResult, Mapping[str, float]]:
        """Train on all rows up to a step, choose rows, and train on those; they are chosen once."""
        if not switch.done() or steps_done(self.context.directory) < switch.step:
            state = self._trained(state, switch.step).state
        rows, report = switch.rows(state)
        return self._trained(state, self.context.study.steps, rows), report

    def _trained(self, state: Any, steps: int, rows: Dataset | None = None) -> TrainResult:
        """Train (or continue) up to a step, on all generic rows or on some."""
        study, variant, recorder = self.context.study, self.context.variant, self.plan.recorder
        source = self.source(rows)
        keeper = None if self.plan.keeper is None else self.plan.keeper()

        def evaluate(state: Any) -> dict[str, float]:
            found = self.measured(state, study.evaluate_rows or None, bool(study.targets))
            if keeper is not None:
                keeper.compare(state, found)
            return found

        result = train(
            self.parts[0], state, data=source, config=self.loop(steps, source), run_dir=self.context.directory,
            evaluate=evaluate, on_state=variant.on_state,
            on_selected=variant.on_selected if recorder is None else recorder(),
        )  # fmt: skip
        if result.stop_requested:
            raise Stopped
        if keeper is not None:
            keeper.finish()
        return result

    def source(self, rows: Dataset | None = None) -> Source:
        """Return what the batches come from: all generic rows, or some."""
        splits, mesh = self.context.splits, self.context.mesh
        if self.plan.samples:
            return Sampled(splits.train, splits.specific)
        generic, specific = loaders(self.context, self.plan, rows)
        study, variant = self.context.study, self.context.variant
        if study.two_stage and self.plan.picks and not (self.plan.reads_rows or variant.streams):
            return TwoStageData(generic, small_of(splits, generic.dataset), specific, mesh)
        residence = "never" if variant.streams else study.residence
        return variant.source(open_source(residence, generic, specific, mesh), mesh)

    def loop(self, steps: int, source: Source) -> LoopConfig:
        """Return how long to train, and how often to do what."""
        s = self.context.study
        return LoopConfig(
            num_steps=steps, log_every=s.log_every, evaluate_every=s.evaluate_every, checkpoint_every=s.checkpoint_every,
            state_every=self.context.variant.state_every, steps_per_call=steps_in_call(source, s.steps_per_call),
            progress=s.progress, tensorboard=s.tensorboard,
        )  # fmt: skip


def _summary(context: Context, result: TrainResult, loaded_rows: float) -> dict[str, Any]:
    """Return the numbers of a run that follow from its metrics.

    Shares of the rows that were trained on are means over all rows of metrics (`share/NAME`), and over the last fifth of them
    (`share_at_end/NAME`); the effective sample size is that of the last fifth. Epochs are what the steps load, in generic rows:
    online selection loads more rows than it trains on.
    """
    shares, steps = [f"share/{name}" for name in faults(context.splits.known)], context.study.steps
    rows = even_intervals(result.history, [*shares, CORRECT, "effective_sample_size"])
    tail = rows[-max(1, len(rows) // 5) :]
    found = {"effective_sample_size": mean_of(tail, "effective_sample_size")}
    for name in shares:
        found[name] = mean_of(rows, name)
        found[name.replace("share/", "share_at_end/")] = mean_of(tail, name)
    found["learned_share"] = mean_of(rows, CORRECT)
    return {
        "method": context.method, "seed": context.seed, "steps": steps,
        "epochs": steps * loaded_rows / len(context.splits.train), "seconds": result.seconds,
        **{name: value for name, value in found.items() if value is not None},
        **_best(result.history, context.task.measures[0]),
    }  # fmt: skip


def _best(history: list[dict[str, Any]], measure: Measure) -> dict[str, float]:
    """The best value on test, and that at the best value on valid; {} where test is not measured while training."""
    valid, test = f"valid_{measure.name}", f"test_{measure.name}"
    known = [row for row in history if test in row and valid in row]
    if not known:
        return {}
    best, top = (best_row(known, name, lower_is_better=measure.lower_is_better) for name in (valid, test))
    return {f"best_{test}": top[test], f"{test}_at_best_valid": best[test]}
