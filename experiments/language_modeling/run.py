"""One run: one method, one seed, in a directory of its own."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import RowView
from bilevel.devices import sharding
from bilevel.nn.transformer import Transformer, language_model_loss
from bilevel.offline.loss_table import LossTable
from bilevel.state import TrainState
from bilevel.step.train_step import TrainStep
from bilevel.training import Checkpoints, LoopConfig, Source, TrainResult, prepare_run_dir, train
from bilevel.training.metrics import even_intervals
from bilevel.training.run_dir import write_atomically
from bilevel.types import Params, UserError
from experiments.language_modeling import build, contrastive
from experiments.language_modeling.classifier import train_classifier
from experiments.language_modeling.config import DENSE, PLAIN, Config, settings_of
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import Evaluator, final_losses, local, while_training
from experiments.language_modeling.finetune import Finetuning, kept_results, remove
from experiments.language_modeling.variant import Variant
from experiments.language_modeling.weights import DIGEST, known_digest, load_weights, save_weights
from experiments.runs import CHECKPOINTS, CONTENT_HASH, RESULT_NAME, Stopped, read_json, run_name, without_newer
from experiments.sources import open_source, steps_in_call

MAY_CHANGE = (
    "log_every", "evaluate_every", "checkpoint_every", "progress", "tensorboard", "data.cache_dir", "shard_state",
    "weights.frozen_from", "resident",
)  # fmt: skip
"""What may differ when a run continues; `resident` was recorded once."""
NOT_OF_A_RUN = (
    "compare", "seeds", "run_dir", "eval_only", "coordinator", "processes", "process", "resident", "steps_per_call",
    "specific_sets", "same_seconds", "budget_seconds", "trials", "trial_steps", "finetune_steps", "finetune_learning_rate",
)  # fmt: skip
"""Flags that do not change how one run trains."""
NEWER_WEIGHTS: dict[str, Any] = {"weight_warmup": 0, "specific_candidates": 0, "threshold": 0.0}
"""Flags that came later, with what was done before them: see `without_newer`."""
CLASSIFIER = "classifier.json"
"""In the directory of a run that begins with a domain classifier: what that cost."""


def settings_dict(config: Config, method: str, seed: int) -> dict[str, Any]:
    """What decides the outcome of a run: two runs with equal settings give equal results."""
    weights = {} if method == "uniform" else settings_of(config, method)
    everything = dataclasses.asdict(config) | {"method": method, "seed": seed, "weights": weights}
    for name in NOT_OF_A_RUN:
        del everything[name]
    everything["weights"] = without_newer(weights, NEWER_WEIGHTS)
    return everything


def run(config: Config, method: str, seed: int, corpora: Corpora, variant: Variant | None = None) -> dict[str, Any]:
    """Trains (or continues, or only evaluates) one run.

    Args:
      config: the flags.
      method: its name.
      seed: of the initial parameters, the order of the data and all random draws.
      corpora: the data.
      variant: what is done in another way than the flags say.

    Returns:
      The summary, as written to result.json and finetuned.json.

    Raises:
      Stopped: a signal stopped it before its end.
    """
    variant = variant or Variant()
    directory = config.run_dir / run_name(method, seed)
    if config.eval_only and not (directory / CHECKPOINTS).is_dir():
        raise UserError(
            f"{directory} holds no checkpoint to evaluate: check --run-dir, or train first, without --eval-only."
        )
    settings = settings_dict(config, method, seed) | dict(variant.settings)
    if method == "frozen":
        identity = known_digest(config.weights.frozen_from, directory)
        settings["weights"] |= {} if identity is None else {DIGEST: identity}
    moves: tuple[str, ...] = ()
    if method == "contrastive" and (identity := contrastive.scores_digest(config, corpora, directory)) is not None:
        settings["weights"] |= {contrastive.SCORES_DIGEST: identity}
        moves = ("weights.contrastive_scores",)
    settings[CONTENT_HASH] = corpora.content_hashes
    prepare_run_dir(directory, settings, may_change=(*MAY_CHANGE, *moves))
    this = _Run(config, method, seed, corpora, directory, variant)
    done = directory / RESULT_NAME
    if config.eval_only:
        return this.evaluated() | kept_results(config, directory)
    if done.exists():
        summary, params = read_json(done), lambda: this.checkpoint().params
    else:
        finished = this.train()
        summary, params = finished.summary, lambda: finished.params
    if not config.finetune_steps:
        return summary
    if config.progress and jax.process_index() == 0:
        print(f"{method}, seed {seed}: fine-tuning", file=sys.stderr)
    return summary | this.finetuning().results(directory, params)


class _Parts(NamedTuple):
    """What a run is made of."""

    model: Transformer
    mesh: Mesh
    weighting: build.Weighting
    step: TrainStep
    state: TrainState
    evaluator: Evaluator


class _Finished(NamedTuple):
    """A run at its end."""

    params: Params
    summary: dict[str, Any]


class _Start(NamedTuple):
    """The state that training begins with."""

    state: TrainState
    report: dict[str, float]
    """What was done before, for the summary."""


class _Run:
    """One run; its parts are built when they are needed."""

    def __init__(self, config: Config, method: str, seed: int, corpora: Corpora, directory: Path, variant: Variant):
        self.config, self.method, self.seed = config, method, seed
        self.corpora, self.directory, self.variant = corpora, directory, variant
        self.settings = settings_of(config, method)

    @cached_property
    def parts(self) -> _Parts:
        config, mesh = self.config, sharding.make_mesh()
        model = build.build_model(config)
        loss = language_model_loss(build.build_model(config, mesh))
        weighting = build.weighting_of(config, self.method, loss)
        step = build.build_step(config, self.method, model, loss, weighting, mesh)
        state, step = build.init_state(config, self.seed, step, model, weighting, mesh)
        return _Parts(model, mesh, weighting, step, state, Evaluator(model))

    def checkpoint(self) -> TrainState:
        """The newest checkpoint, with whole parameters.

        Raises:
          UserError: if there is none.
        """
        with Checkpoints(self.directory / CHECKPOINTS, read_only=True) as checkpoints:
            restored = checkpoints.restore_latest(self.parts.state)
        if restored is None:
            advice = (
                "train first, without --eval-only" if self.config.eval_only else f"delete {RESULT_NAME} to train again"
            )
            raise UserError(f"{self.directory} holds no checkpoint: {advice}.")
        state = restored[1]
        return dataclasses.replace(state, params=sharding.whole(self.parts.mesh, state.params))

    def finetuning(self) -> Finetuning:
        """A phase on the specific data alone."""
        return Finetuning(self.config, self.seed, self.parts.mesh, self.parts.evaluator, self.corpora)

    def evaluated(self) -> dict[str, Any]:
        """The losses of the newest checkpoint."""
        state = self.checkpoint()
        losses = final_losses(state.params, self.parts.evaluator, self.corpora)
        steps = int(jax.device_get(state.step))
        return {"method": self.method, "seed": self.seed, "steps": steps, "seconds": math.nan, **losses}

    def train(self) -> _Finished:
        """Trains to the end, and writes what remains of the run."""
        if self.method == "contrastive":
            result, report = self._contrastive()
        else:
            start = self._prepared()
            result, report = self._trained(start.state, self.config.steps), start.report
        state, mesh = result.state, self.parts.mesh
        params, weight_params = sharding.whole(mesh, (state.params, state.weight_params))
        summary = self._summary(result, final_losses(params, self.parts.evaluator, self.corpora)) | report
        summary["seconds"] += report.get("preparation_seconds", 0.0)
        if jax.process_index() == 0:
            if self.method not in (*PLAIN, *DENSE):
                assert callable(self.parts.weighting.logits)
                save_weights(self.directory, weight_params, self.parts.weighting.logits, self.corpora)
            write_atomically(self.directory / RESULT_NAME, json.dumps(summary, indent=2) + "\n")
        return _Finished(params, summary)

    def _trained(self, state: TrainState, steps: int, rows: RowView | None = None) -> TrainResult:
        """Trains (or continues) up to a step, on all generic rows or on some.

        Raises:
          Stopped: a signal stopped it before.
        """
        config, mesh = self.config, self.parts.mesh
        generic, specific = build.build_loaders(config, self.method, self.seed, self.corpora, rows)
        sharding.check_divides(mesh, batch_size=config.batch_size, specific_batch_size=specific.batch_size)
        residence = "never" if self.variant.streams else config.residence
        source = self.variant.source(open_source(residence, generic, specific, mesh), mesh)
        result = train(
            self.parts.step,
            state,
            data=source,
            config=dataclasses.replace(_loop_config(config, steps, source), state_every=self.variant.state_every),
            run_dir=self.directory,
            evaluate=while_training(config, mesh, self.parts.evaluator, self.corpora),
            on_selected=self.variant.on_selected(_share_counter(self.corpora)),
            on_state=self.variant.on_state,
        )
        if result.stop_requested:
            raise Stopped
        return result

    def _contrastive(self) -> tuple[TrainResult, dict[str, float]]:
        """The four phases of contrastive data selection; the second and third are done once."""
        first = contrastive.steps_before_selection(self.config, self.settings)
        contrastive.check(self.config, self.settings, self.corpora)
        given = self.settings["contrastive_scores"]
        file = given or self.directory / contrastive.NAME
        scores = contrastive.load_scores(file, self.corpora, own=not given) if given or file.exists() else None
        state = self.parts.state
        if scores is None or self._steps_done() < first:
            state = self._trained(state, first).state
        if scores is None:
            scores = self._scored(state.params, file)
        rows = contrastive.best_rows(scores, self.settings["contrastive_fraction"], self.corpora)
        report = {"preparation_seconds": scores.settings.get(contrastive.SECONDS, 0.0), "preparation_step": first}
        return self._trained(state, self.config.steps, rows), report

    def _scored(self, params: Params, file: Path) -> LossTable:
        params = sharding.whole(self.parts.mesh, params)
        folder = self.directory / contrastive.FOLDER
        scores = contrastive.compute_scores(self.settings, params, self.parts.model, self.finetuning(), folder)
        if jax.process_index() == 0:
            scores.save(file)
        remove(folder)
        return scores

    def _steps_done(self) -> int:
        with Checkpoints(self.directory / CHECKPOINTS, read_only=True) as checkpoints:
            return checkpoints.latest_step() or 0

    def _prepared(self) -> _Start:
        """The state with weights that are learned before training, and what that cost."""
        state, settings = self.parts.state, self.settings
        if self.method == "frozen":
            weights = load_weights(self.config.weights.frozen_from, state)
            return _Start(dataclasses.replace(state, weight_params=weights), {})
        if self.method != "classifier" and not (settings["warm_start"] and self.method not in (*PLAIN, *DENSE)):
            return _Start(state, {})
        file = self.directory / CLASSIFIER
        if self._steps_done() and file.exists():  # the checkpoint has the network
            return _Start(state, read_json(file))
        weighting = self.parts.weighting.logits
        assert callable(weighting)
        found = train_classifier(
            weighting,
            jax.tree.map(lambda x: np.asarray(local(x)), state.weight_params),
            self.corpora,
            seed=self.seed,
            steps=settings["classifier_steps"],
            rows=settings["classifier_rows"],
            rate=settings["weight_learning_rate"],
        )
        placed = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), found.weight_params, state.weight_params
        )
        report = {"preparation_seconds": found.seconds, "classifier_valid_loss": found.valid_loss}
        if jax.process_index() == 0:
            write_atomically(file, json.dumps(report) + "\n")
        return _Start(dataclasses.replace(state, weight_params=placed), report)

    def _summary(self, result: TrainResult, losses: dict[str, Any]) -> dict[str, Any]:
        rows = even_intervals(result.history, ["effective_sample_size"])
        sizes = [row["effective_sample_size"] for row in rows[-max(1, len(rows) // 5) :]]
        return {
            "method": self.method,
            "seed": self.seed,
            "steps": self.config.steps,
            "seconds": result.seconds,
            **losses,
            "effective_sample_size": float(np.mean(sizes)) if sizes else math.nan,
        }


def _loop_config(config: Config, steps: int, source: Source) -> LoopConfig:
    return LoopConfig(
        num_steps=steps,
        log_every=config.log_every,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        steps_per_call=steps_in_call(source, config.steps_per_call),
        progress=config.progress,
        tensorboard=config.tensorboard,
    )


def _share_counter(corpora: Corpora) -> Callable[[np.ndarray, int], Mapping[str, float]] | None:
    if corpora.generic.labels is None:
        return None

    def shares(ids: np.ndarray, step: int) -> Mapping[str, float]:
        return {f"share/{name}": share for name, share in corpora.shares_among(ids[ids >= 0]).items()}

    return shares
