"""One run: one method, one seed, in a directory of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import Dataset, Loader
from bilevel.devices import sharding
from bilevel.state import TrainState
from bilevel.step.sampled import SampledFn, SampledState
from bilevel.step.train_step import TrainStep
from bilevel.training import Checkpoints, LoopConfig, Sampled, Source, TrainResult, prepare_run_dir, train
from bilevel.training.metrics import even_intervals
from bilevel.training.run_dir import write_atomically
from bilevel.types import Params, UserError
from experiments.image_classification import build, pictures, sampled
from experiments.image_classification.config import (
    LEARNED,
    NEWER,
    NEWER_DATA,
    NEWER_WEIGHTS,
    SAMPLED,
    SELECTING,
    TABLED,
    Config,
)
from experiments.image_classification.data import ImageData
from experiments.image_classification.evaluation import Evaluator, State, scores, while_training
from experiments.image_classification.known import irreducible_losses, uncertain_rows
from experiments.image_classification.model import Model, model_of
from experiments.image_classification.observation import observer
from experiments.runs import CHECKPOINTS, CONTENT_HASH, RESULT_NAME, Stopped, read_json, run_name, without_newer
from experiments.sources import open_source, steps_in_call

IRREDUCIBLE = "irreducible"
PROXY = "svp"
MAY_CHANGE = (
    "log_every", "evaluate_every", "evaluate_rows", "checkpoint_every", "progress", "tensorboard", "data.cache_dir",
    "resident",
)  # fmt: skip
"""What may differ when a run continues; `resident` was recorded once."""
NOT_OF_A_RUN = ("compare", "seeds", "targets", "run_dir", "eval_only", "resident", "steps_per_call")
"""Flags that do not change how one run trains."""
_TAIL = 0.2
"""Shares of the selected rows are means over the last fifth of the rows of metrics, and over all."""


def settings_dict(config: Config, method: str, seed: int) -> dict[str, Any]:
    """What decides the outcome of a run: two runs with equal settings give equal results."""
    everything = dataclasses.asdict(config) | {"method": method, "seed": seed}
    for name in NOT_OF_A_RUN:
        del everything[name]
    if method == "uniform":
        del everything["weights"]
    else:
        everything["weights"] = without_newer(everything["weights"], NEWER_WEIGHTS)
    everything["data"] = without_newer(everything["data"], NEWER_DATA)
    return without_newer(everything, NEWER)


def identity(config: Config, method: str, seed: int, data: ImageData) -> dict[str, Any]:
    """The settings of a run, with the content hashes of the sets that it reads, wrong labels included."""
    read = {"train": data.train, "dev": data.dev, "test": data.test}
    if method in TABLED and data.holdout is not None:
        read["holdout"] = data.holdout
    hashes = {name: rows.content_hash for name, rows in read.items()}
    return settings_dict(config, method, seed) | {CONTENT_HASH: hashes}


def run(config: Config, method: str, seed: int, data: ImageData) -> dict[str, Any]:
    """Trains (or continues, or only evaluates) one run.

    Returns:
      The summary, as written to result.json.

    Raises:
      Stopped: a signal stopped it before its end.
      UserError: its directory holds a run of other settings or data.
    """
    directory = config.run_dir / run_name(method, seed)
    settings = identity(config, method, seed, data)
    prepare_run_dir(directory, settings, may_change=MAY_CHANGE)
    this = _Run(config, method, seed, data, directory)
    if config.eval_only:
        return this.evaluated()
    done = directory / RESULT_NAME
    return read_json(done) if done.exists() else this.train()


class _Parts(NamedTuple):
    """What a run is made of."""

    mesh: Mesh
    weighting: build.Weighting
    step: TrainStep | SampledFn
    state: State
    evaluator: Evaluator
    rows: Dataset
    """What is trained on."""
    before: float
    """Seconds that another run took before this one."""
    scored_by: str | None
    """See `Model`."""


class _Run:
    """One run; its parts are built when they are needed."""

    def __init__(self, config: Config, method: str, seed: int, data: ImageData, directory: Path):
        self.config, self.method, self.seed = config, method, seed
        self.data, self.directory = data, directory

    @cached_property
    def parts(self) -> _Parts:
        config, data, mesh = self.config, self.data, sharding.make_mesh()
        model = model_of(config, self.method, data)
        if self.method in SAMPLED:
            return self._sampled_parts(mesh, model)
        weighting = build.weighting_of(config, self.method, data, model.losses, self._known())
        step = build.build_step(config, self.method, data, model.losses, weighting, self.seed, mesh)
        rows = uncertain_rows(config, data, config.run_dir / PROXY) if self.method == "svp" else data.train
        model_key, weight_key, step_key = self._keys()

        def create() -> TrainState:
            params, model_state = model.init(model_key)
            return step.init(step_key, params, weighting.init(weight_key), model_state)

        state = jax.jit(create, out_shardings=sharding.replicated(mesh) if mesh.size > 1 else None)()
        before = 0.0
        if self.method == "retrained_dds":
            first = run(config, "dds", self.seed, data)
            state, before = dataclasses.replace(state, weight_params=self._scorer_of_dds(state)), first["seconds"]
        step = build.observed(step, observer(data))
        return _Parts(mesh, weighting, step, state, Evaluator(model.losses.evaluate), rows, before, model.scored_by)

    def _sampled_parts(self, mesh: Mesh, model: Model) -> _Parts:
        config, method, data = self.config, self.method, self.data
        sampler = sampled.build_sampler(config, method, data)
        step = sampled.build_step(config, sampler, model.losses)
        model_key, _, step_key = self._keys()

        def create(policy: Params | None) -> SampledState:
            params, model_state = model.init(model_key)
            return step.init(step_key, params, model_state, policy)

        state = jax.jit(create)(sampled.first_policy(config, method, data, sampler))
        watched = sampled.observed(step.step, observer(data))
        nothing = build.Weighting(lambda key: {}, None)
        return _Parts(mesh, nothing, watched, state, Evaluator(model.losses.evaluate), data.train, 0.0, None)

    def _keys(self) -> jax.Array:
        """Of the model, the weighting network and the steps."""
        return jax.random.split(jax.random.key(self.seed), 3)

    def _known(self) -> Params:
        if self.method not in TABLED:
            return {}
        return irreducible_losses(self.config, self.data, self.config.run_dir / IRREDUCIBLE).params()

    def _scorer_of_dds(self, state: TrainState) -> Params:
        """The scorer that the run of dds with this seed ended with.

        Reference: Wang et al. (DDS), section 4.1 (retrained DDS).
        """
        return _newest(self.config.run_dir / run_name("dds", self.seed), state).weight_params

    def evaluated(self) -> dict[str, Any]:
        """Loss and accuracy of the newest checkpoint."""
        state = _newest(self.directory, self.parts.state)
        found = scores(self.parts.evaluator, state, self.data)
        steps = int(jax.device_get(state.step))
        return {"method": self.method, "seed": self.seed, "steps": steps, "seconds": math.nan, **found}

    def train(self) -> dict[str, Any]:
        """Trains to the end, and writes what remains of the run."""
        config, parts, source = self.config, self.parts, self._source()
        result = train(
            parts.step,
            parts.state,
            data=source,
            config=_loop_config(config, source),
            run_dir=self.directory,
            evaluate=while_training(parts.evaluator, self.data, config.evaluate_rows or None),
            on_selected=sampled.recorder(config, self.directory) if self.method in SAMPLED else None,
        )
        if result.stop_requested:
            raise Stopped
        epochs = config.steps * self._loaded_rows() / len(parts.rows)
        summary = self._summary(result, epochs) | self._learned(result.state)
        write_atomically(self.directory / RESULT_NAME, json.dumps(summary, indent=2) + "\n")
        (self.directory / sampled.DRAWN).unlink(missing_ok=True)
        return summary

    def _source(self) -> Source:
        """The data on the device, or batches that travel."""
        config, parts, data = self.config, self.parts, self.data
        if self.method in SAMPLED:
            return Sampled(data.train, data.dev)
        generic = Loader(parts.rows, self._loaded_rows(), seed=self.seed)
        dev = Loader(data.dev, build.dev_rows(config, len(data.dev)), seed=self.seed + 1_000_003)
        return open_source(config.resident, generic, dev, parts.mesh)

    def _loaded_rows(self) -> int:
        return build.loaded_rows(self.config, self.method, len(self.data.train), self.parts.mesh.size)

    def _learned(self, state: Any) -> dict[str, float]:
        """Keeps what a scorer or a sampler learned, and says what it preferred."""
        if self.method in SAMPLED:
            return sampled.save_results(self.config, self.directory, state, self.data)
        if self.method not in LEARNED:
            return {}
        logits = self.parts.weighting.logits
        assert callable(logits)
        return pictures.save_scores(self.directory, state.weight_params, logits, self.data, self._loaded_rows())

    def _summary(self, result: TrainResult, epochs: float) -> dict[str, Any]:
        history, final = result.history, scores(self.parts.evaluator, result.state, self.data)
        best = min((row for row in history if "dev_loss" in row), key=lambda row: -row["dev_accuracy"])
        shares = {"corrupted_share": "corrupted_share", "irrelevant_share": "irrelevant_share"}
        if self.method in (*SELECTING, *SAMPLED, "uniform", "svp"):
            shares["learned_share"] = "generic_correct"
        rows = even_intervals(history, [*shares.values(), "effective_sample_size"])
        tail = rows[-max(1, round(_TAIL * len(rows))) :]
        found = {name: _mean(rows, key) for name, key in shares.items()}
        found |= {f"{name}_at_end": _mean(tail, key) for name, key in shares.items()}
        return {
            "method": self.method,
            "seed": self.seed,
            "steps": self.config.steps,
            "epochs": epochs,
            "seconds": result.seconds + self.parts.before,
            **final,
            "best_test_accuracy": max(row.get("test_accuracy", 0.0) for row in history),
            "test_accuracy_at_best_dev": best["test_accuracy"],
            "effective_sample_size": _mean(tail, "effective_sample_size"),
            **({"scored_by": self.parts.scored_by} if self.parts.scored_by else {}),
            **{name: value for name, value in found.items() if value is not None},
        }


def _newest(directory: Path, template: Any) -> Any:
    """The newest checkpoint of a run.

    Raises:
      UserError: if there is none.
    """
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(template)
    if restored is None:
        raise UserError(f"{directory} holds no checkpoint to evaluate: train first, without --eval-only.")
    return restored[1]


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a metric where it is known; None where it never is."""
    known = [row[name] for row in rows if name in row]
    return float(np.mean(known)) if known else None


def _loop_config(config: Config, source: Source) -> LoopConfig:
    return LoopConfig(
        num_steps=config.steps,
        log_every=config.log_every,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        steps_per_call=steps_in_call(source, config.steps_per_call),
        progress=config.progress,
        tensorboard=config.tensorboard,
    )
