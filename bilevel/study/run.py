"""One run: one method, one seed, in a directory of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bilevel.data import Dataset
from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.step import SampledState, make_sampled_step, make_step
from bilevel.study import files
from bilevel.study.config import Config, Study, may_change, of_run, plain
from bilevel.study.context import Context, optimizer_of
from bilevel.study.evaluation import measured, trained, while_training
from bilevel.study.feeding import loaded_rows, loaders, open_source, steps_in_call
from bilevel.study.finetune import Finetuning, kept_results
from bilevel.study.observing import observer
from bilevel.study.placing import placed
from bilevel.study.registry import METHODS
from bilevel.study.spec import Plan
from bilevel.study.summary import summary
from bilevel.study.task import Evaluate, Splits, Task
from bilevel.study.variant import Variant
from bilevel.study.weights import save_weights
from bilevel.training import LoopConfig, Sampled, Source, TrainResult, prepare_run_dir, train
from bilevel.types import Params


class Setting(NamedTuple):
    """What the runs of a comparison share."""

    config: Config
    task: Task
    splits: Splits
    mesh: Mesh
    others: Mapping[str, Config] = MappingProxyType({})
    """Method -> the configuration of its runs, for methods that continue from one; of those not named, `config`."""

    def of(self, config: Config) -> Setting:
        """The same with another configuration."""
        return self._replace(config=config)


def run(setting: Setting, method: str, seed: int, variant: Variant | None = None) -> dict[str, Any]:
    """Train (or continue, or only evaluate) one run.

    Args:
      setting: configuration, task and data.
      method: its name in the registry.
      seed: of the initial parameters, the order of the data and all random draws.
      variant: what is done in another way than the flags say.

    Returns:
      The summary, as written to result.json and finetuned.json.

    Raises:
      Stopped: a signal stopped it before its end.
      UserError: its directory holds a run of other settings or data.
    """
    this = Run(setting, method, seed, variant or Variant())
    study, directory = setting.config.study, this.context.directory
    if study.eval_only:
        return this.evaluated() | kept_results(study, directory)
    this.prepare()
    done = directory / files.RESULT
    if done.exists():
        found, finished = files.read_json(done), None
    else:
        found, finished = this.train()
    if not study.finetune.steps:
        return found
    if study.progress:
        files.say(f"{method}, seed {seed}: fine-tuning")
    finetuning = Finetuning(this.context, this.plan.model)
    return found | finetuning.results(directory, lambda: trained(finished or this.checkpoint(), setting.mesh))


def directory_of(config: Config, method: str, seed: int) -> Path:
    """Return the directory of a run."""
    return config.study.run_dir / files.run_name(method, seed)


def context_of(setting: Setting, method: str, seed: int) -> Context:
    """Return what the plan of a method may use."""

    def other(name: str) -> tuple[Path, Mapping[str, Any]]:
        there = setting.of(setting.others.get(name, setting.config))
        return directory_of(there.config, name, seed), run(there, name, seed)

    config, task, splits, mesh, _ = setting
    return Context(config, task, splits, seed, mesh, directory_of(config, method, seed), other)


def plan_of(setting: Setting, method: str, seed: int) -> tuple[Context, Plan]:
    """Return the plan of a run; building it checks the method's settings."""
    context = context_of(setting, method, seed)
    return context, METHODS[method].plan(setting.config.methods[method], context)


def identity(setting: Setting, method: str, seed: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run: those that decide its outcome, and those that may change when it continues."""
    config = setting.config
    own = {**plain(config.methods[method]), **more}
    return {
        "task": setting.task.name, "method": method, **of_run(config.study), "seed": seed, **of_run(config.task),
        **({method: own} if own else {}), files.CONTENT_HASH: setting.splits.hashes,
    }  # fmt: skip


def changeable(setting: Setting, method: str) -> list[str]:
    """Return the dotted names of the settings that may change when a run continues."""
    config = setting.config
    return [*may_change(config.study), *may_change(config.task), *may_change(config.methods[method], f"{method}.")]


def build_step(study: Study, plan: Plan, mesh: Mesh) -> Any:
    """Build the train step of a plan; checks that its options go together.

    Returns:
      A `TrainStep`, or a `SampledStep` for a plan with a sampler.
    """
    model, optimizer = plan.model, optimizer_of(study.optimizer, study.schedule_steps or study.steps)
    average = study.optimizer.average or None
    if plan.sampler is not None:
        return make_sampled_step(
            plan.sampler, model.loss, optimizer, validation_micro_batches=plan.reward_parts,
            micro_batches=study.micro_batches, ema_decay=average,
        )  # fmt: skip
    part = model.part(plan.probe_blocks) if plan.probe_blocks and model.part is not None else None
    return make_step(
        model.loss, plan.weighting.logits, optimizer, plan.weight_optimizer, plan.method,
        batch_size=study.batch_size, filter=plan.filter, derivatives=plan.derivatives, specific_loss=model.specific_loss,
        param_filter=part, mode=plan.mode, estimator=plan.estimator, alpha_batch=plan.alpha_batch,
        alpha_batch_size=plan.alpha_batch_size, update_every=plan.update_every, probe_every=plan.probe_every,
        normalize_alignments=plan.normalize_alignments, ema_decay=average, micro_batches=study.micro_batches,
        mesh=mesh if mesh.size > 1 else None, gather=model.gather,
    )  # fmt: skip


class Run:
    """One run; its parts are built when they are needed."""

    def __init__(self, setting: Setting, method: str, seed: int, variant: Variant):
        self.setting, self.method, self.seed, self.variant = setting, method, seed, variant
        self.context = context_of(setting, method, seed)

    @property
    def study(self) -> Study:
        """The settings that all methods share."""
        return self.setting.config.study

    @cached_property
    def plan(self) -> Plan:
        """How it trains."""
        return METHODS[self.method].plan(self.setting.config.methods[self.method], self.context)

    @cached_property
    def evaluate(self) -> Evaluate:
        """Measures the model."""
        return self.context.evaluate(self.plan.model)

    def prepare(self) -> None:
        """Write the settings into the directory, or compare them with those of the run there."""
        settings = identity(self.setting, self.method, self.seed, self.plan.identity)
        settings |= {"variant": dict(self.variant.settings)} if self.variant.settings else {}
        prepare_run_dir(self.context.directory, settings, may_change=changeable(self.setting, self.method))

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """The step, and the initial state on all devices; the same main model for every method of a seed."""
        plan, mesh, study = self.plan, self.setting.mesh, self.study
        step, watch = build_step(study, plan, mesh), observer(self.setting.splits)
        step = step if watch is None else step.map(watch)
        model_key, weight_key, step_key = jax.random.split(jax.random.key(self.seed), 3)
        if plan.sampler is not None:

            def sampled(policy: Params | None) -> SampledState:
                params, model_state = plan.model.init(model_key)
                return step.init(step_key, params, model_state, policy)

            policy = plan.sampler_params() if plan.sampler_params is not None else None
            return step.step, jax.jit(sampled)(policy)
        known = plan.table() if plan.table is not None else None

        def create() -> TrainState:
            params, model_state = plan.model.init(model_key)
            return step.init(step_key, params, plan.weighting.init(weight_key) if known is None else known, model_state)

        state, step = placed(study, mesh, step, create)
        return step, state

    def checkpoint(self) -> Any:
        """Return the newest checkpoint.

        Raises:
          UserError: if there is none.
        """
        advice = "train first, without --eval-only" if self.study.eval_only else f"delete {files.RESULT} to train again"
        return files.newest(self.context.directory, self.parts[1], advice)

    def evaluated(self) -> dict[str, Any]:
        """Return the measures of the newest checkpoint, if the run is of these settings and data."""
        state = self.checkpoint()
        self.prepare()
        found = measured(self.evaluate, trained(state, self.setting.mesh), self.setting.splits)
        steps = int(jax.device_get(state.step))
        return {"method": self.method, "seed": self.seed, "steps": steps, "seconds": math.nan, **found}

    def train(self) -> tuple[dict[str, Any], Any]:
        """Train to the end, and write what remains of the run; returns the summary and the last state."""
        state, report = self._started()
        if self.plan.switch is None:
            rows = self.plan.rows() if self.plan.rows is not None else None
            result = self._trained(state, self.study.steps, rows)
        else:
            result, report = self._switched(state)
        splits, mesh = self.setting.splits, self.setting.mesh
        found: dict[str, Any] = summary(
            self.method, self.seed, self.study, result, splits, self.setting.task, self._epochs()
        )
        found |= measured(self.evaluate, trained(result.state, mesh), splits) | dict(report)
        found["seconds"] += found.get("preparation_seconds", 0.0)
        if self.plan.mode == "sparse" and not self.plan.picks and self.plan.sampler is None:
            found.pop("effective_sample_size", None)  # rows that weigh alike have no weights to be effective
        found |= {"scored_by": self.plan.scored_by} if self.plan.scored_by else {}
        found |= self._kept(result.state)
        files.write_json(self.context.directory / files.RESULT, found)
        return found, result.state

    def _started(self) -> tuple[Any, Mapping[str, float]]:
        """The state with weights that are learned before training, and what that cost."""
        state = self.parts[1]
        if self.plan.start is None:
            return state, {}
        found = self.plan.start(state)
        return dataclasses.replace(state, weight_params=found.weight_params), found.report

    def _switched(self, state: Any) -> tuple[TrainResult, Mapping[str, float]]:
        """Train on all rows up to a step, choose rows, and train on those; they are chosen once."""
        switch = self.plan.switch
        assert switch is not None
        if not switch.done() or files.steps_done(self.context.directory) < switch.step:
            state = self._trained(state, switch.step).state
        rows, report = switch.rows(state)
        return self._trained(state, self.study.steps, rows), report

    def _trained(self, state: Any, steps: int, rows: Dataset | None = None) -> TrainResult:
        """Train (or continue) up to a step, on all generic rows or on some.

        Raises:
          Stopped: a signal stopped it before.
        """
        study, mesh, splits = self.study, self.setting.mesh, self.setting.splits
        source, limit = self._source(rows), study.evaluate_rows or None
        on_selected = self.plan.recorder(self.context.directory) if self.plan.recorder else self.variant.on_selected
        result = train(
            self.parts[0],
            state,
            data=source,
            config=self._loop(steps, source),
            run_dir=self.context.directory,
            evaluate=while_training(self.evaluate, splits, mesh, limit, bool(study.targets)),
            on_selected=on_selected,
            on_state=self.variant.on_state,
        )
        if result.stop_requested:
            raise files.Stopped
        return result

    def _source(self, rows: Dataset | None) -> Source:
        study, splits, mesh = self.study, self.setting.splits, self.setting.mesh
        if self.plan.sampler is not None:
            return Sampled(splits.train, splits.specific)
        generic, specific = loaders(study, self.plan, splits, self.seed, mesh, rows)
        residence = "never" if self.variant.streams else study.residence
        return self.variant.source(open_source(residence, generic, specific, mesh), mesh)

    def _loop(self, steps: int, source: Source) -> LoopConfig:
        s = self.study
        return LoopConfig(
            num_steps=steps, log_every=s.log_every, evaluate_every=s.evaluate_every, checkpoint_every=s.checkpoint_every,
            state_every=self.variant.state_every, steps_per_call=steps_in_call(source, s.steps_per_call),
            progress=s.progress, tensorboard=s.tensorboard,
        )  # fmt: skip

    def _epochs(self) -> float:
        """Passes over the training rows by what is loaded: online selection loads more rows than it trains on."""
        rows = len(self.setting.splits.train)
        return self.study.steps * loaded_rows(self.study, self.plan, rows, self.setting.mesh.size) / rows

    def _kept(self, state: Any) -> Mapping[str, float]:
        """Keep what was learned for other runs, and report what it preferred."""
        if self.plan.finish is not None:
            return self.plan.finish(self.context.directory, state)
        if not self.plan.keeps_weights:
            return {}
        alpha = sharding.whole(self.setting.mesh, state.weight_params)
        if jax.process_index() != 0:
            return {}
        size = loaded_rows(self.study, self.plan, len(self.setting.splits.train), self.setting.mesh.size)
        return save_weights(self.context.directory, alpha, self.context, size)
