"""One run: one method, one seed, in a directory of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel import sharding
from bilevel.data import Dataset, JoinedData, Loader, MixedLoader, PackedText, TaskLoader, evaluation_batches
from bilevel.nn.transformer import Transformer, byte_losses, language_model_loss
from bilevel.state import TrainState
from bilevel.training import Checkpoints, Data, Document, LoopConfig, Resident, TrainResult, prepare_run_dir, train
from bilevel.types import Array, LogitFn, Params, UserError
from experiments.language_modeling import build
from experiments.language_modeling.classifier import train_classifier
from experiments.language_modeling.config import DENSE, PLAIN, Config, settings_of
from experiments.language_modeling.finetune import finetune
from experiments.language_modeling.tasks import task_losses
from experiments.language_modeling.variant import Variant

RESULT_NAME = "result.json"
EVALUATION_BATCH = 256
MAY_CHANGE = (
    "log_every", "evaluate_every", "checkpoint_every", "progress", "tensorboard", "data.cache_dir", "shard_state",
)  # fmt: skip


class Evaluator:
    """Nats per byte of data sets, with one compiled program."""

    def __init__(self, model: Transformer):
        def sums(params: Params, batch: Any) -> tuple[Array, Array]:
            logits = model.apply({"params": params}, batch["tokens"])
            _, nats = byte_losses(logits, batch["tokens"], batch["length"])  # pyright: ignore[reportArgumentType]
            return (nats * batch["mask"]).sum(), (batch["length"] * batch["mask"]).sum()

        self._sums = jax.jit(sums)

    def __call__(self, params: Params, dataset: Dataset, limit: int | None = None) -> float:
        """Total nats over total bytes of (at most `limit`) rows; of several tasks the mean, each with as many rows."""
        if isinstance(dataset, JoinedData):
            share = None if limit is None else max(1, limit // len(dataset.parts))
            return float(np.mean([self(params, part, share) for part in dataset.parts.values()]))
        params = jax.tree.map(_local, params)
        found = [self._sums(params, batch) for batch in evaluation_batches(dataset, EVALUATION_BATCH, limit)]
        nats, count = np.sum(jax.device_get(found), axis=0)
        return float(nats / count)


def _local(x: Array) -> Any:
    """This process's copy of a replicated array: every process evaluates for itself."""
    return x.addressable_data(0) if not x.is_fully_addressable else x


def run_name(method: str, seed: int) -> str:
    """Directory of one run below the run directory."""
    return f"{method}-seed{seed}"


def settings_dict(config: Config, method: str, seed: int) -> dict[str, Any]:
    """What decides the outcome of a run: two runs with equal settings give equal results."""
    weights = {} if method == "uniform" else settings_of(config, method)
    everything = dataclasses.asdict(config) | {"method": method, "seed": seed, "weights": weights}
    for name in ("compare", "seeds", "run_dir", "eval_only", "coordinator", "processes", "process", "steps_per_call"):
        del everything[name]
    if not config.resident:
        del everything["resident"]  # it rounds otherwise; runs that were begun before it existed go on
    return everything


def run(
    config: Config, method: str, seed: int, corpora: build.Corpora, variant: Variant | None = None
) -> dict[str, Any] | None:
    """Trains (or continues, or only evaluates) one run.

    Args:
      config: the flags.
      method: its name.
      seed: of the initial parameters, the order of the data and all random draws.
      corpora: the data.
      variant: what is done in another way than the flags say.

    Returns:
      The summary, as written to result.json; None if a signal stopped the run before its end.
    """
    variant = variant or Variant()
    directory = config.run_dir / run_name(method, seed)
    settings = settings_dict(config, method, seed) | dict(variant.settings)
    prepare_run_dir(directory, settings, may_change=MAY_CHANGE)
    done = directory / RESULT_NAME
    if done.exists() and not config.eval_only:
        return json.loads(done.read_text())
    model, mesh = build.build_model(config), sharding.make_mesh()
    loss = language_model_loss(model)
    weighting = build.weighting_of(config, method, loss)
    step = build.build_step(config, method, model, loss, weighting, mesh)
    state, step = build.init_state(config, seed, step, model, weighting, mesh)
    generic, specific = build.build_loaders(config, method, seed, corpora)
    sharding.check_divides(mesh, batch_size=config.batch_size, specific_batch_size=specific.batch_size)
    evaluator = Evaluator(model)
    if config.eval_only:
        return _evaluate_checkpoint(directory, state, mesh, evaluator, corpora)
    state, before = _prepared(config, method, seed, state, weighting, corpora)
    result = train(
        step,
        state,
        data=variant.source(_source(config, generic, specific, mesh), mesh),
        config=dataclasses.replace(_loop_config(config), state_every=variant.state_every),
        run_dir=directory,
        evaluate=_evaluation(config, mesh, evaluator, corpora),
        on_selected=variant.on_selected(_share_counter(corpora)),
        on_state=variant.on_state,
    )
    if result.stopped_early:
        return None
    params, weight_params = sharding.whole(mesh, (result.state.params, result.state.weight_params))
    summary = _summary(config, method, seed, result, losses_of(params, evaluator, corpora)) | before
    summary["seconds"] += before.get("preparation_seconds", 0.0)
    summary |= finetune(config, seed, params, model, evaluator, corpora)
    if method not in (*PLAIN, *DENSE) and jax.process_index() == 0:
        assert callable(weighting.logits)
        _write_documents(directory, weight_params, weighting.logits, corpora)
    if jax.process_index() == 0:
        done.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _prepared(
    config: Config, method: str, seed: int, state: TrainState, weighting: build.Weighting, corpora: build.Corpora
) -> tuple[TrainState, dict[str, float]]:
    """The state with weights that are learned before training, and what that cost."""
    if method == "frozen":
        return dataclasses.replace(state, weight_params=_weights_from(config, state)), {}
    if method != "classifier":
        return state, {}
    settings = settings_of(config, method)
    assert callable(weighting.logits)
    found = train_classifier(
        weighting.logits,
        jax.tree.map(lambda x: np.asarray(_local(x)), state.weight_params),
        corpora,
        seed=seed,
        steps=settings["classifier_steps"],
        rows=settings["classifier_rows"],
        rate=settings["weight_learning_rate"],
    )
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), found.weight_params, state.weight_params)
    report = {"preparation_seconds": found.seconds, "classifier_valid_loss": found.valid_loss}
    return dataclasses.replace(state, weight_params=placed), report


def _source(
    config: Config, generic: Loader | MixedLoader, specific: Loader | TaskLoader, mesh: Mesh
) -> Data | Resident:
    """The data on the device, or batches that travel."""
    if config.resident and config.shard_state:
        raise UserError("--resident keeps the whole state on every device: leave it or --shard-state away.")
    if config.resident and isinstance(generic, MixedLoader):
        raise UserError("--resident does not go with the method mixing, whose batches come from two data sets.")
    if config.resident:
        assert isinstance(generic, Loader)
        return Resident(generic, specific, mesh)

    def place(batch: Any) -> Any:
        return sharding.place_batch(mesh, batch) if mesh.size > 1 else jax.device_put(batch)

    return Data(generic, specific, place, place)


def _loop_config(config: Config) -> LoopConfig:
    return LoopConfig(
        num_steps=config.steps,
        log_every=config.log_every,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        steps_per_call=config.steps_per_call if config.resident else 1,
        progress=config.progress,
        tensorboard=config.tensorboard,
    )


def _evaluation(
    config: Config, mesh: Mesh, evaluator: Evaluator, corpora: build.Corpora
) -> Callable[[TrainState], Mapping[str, float]]:
    def evaluate(state: TrainState) -> Mapping[str, float]:
        params = sharding.whole(mesh, state.params)
        valid = evaluator(params, corpora.specific["valid"], config.evaluate_rows)
        held_out = evaluator(params, corpora.generic_valid, config.evaluate_rows)
        return {"specific_valid_loss": valid, "generic_valid_loss": held_out}

    return evaluate


def _share_counter(corpora: build.Corpora) -> Callable[[np.ndarray, int], Mapping[str, float]] | None:
    if corpora.generic.labels is None:
        return None

    def shares(ids: np.ndarray, step: int) -> Mapping[str, float]:
        return {f"share/{name}": share for name, share in corpora.shares_among(ids[ids >= 0]).items()}

    return shares


def losses_of(params: Params, evaluator: Evaluator, corpora: build.Corpora) -> dict[str, Any]:
    """The final losses, on all rows, in nats per byte."""
    return {
        "specific_valid_loss": evaluator(params, corpora.specific["valid"]),
        "specific_test_loss": evaluator(params, corpora.specific["test"]),
        "generic_loss": evaluator(params, corpora.generic_valid),
        **task_losses(params, evaluator, corpora),
    }


def _summary(config: Config, method: str, seed: int, result: TrainResult, losses: dict[str, Any]) -> dict[str, Any]:
    tail = result.history[-max(1, len(result.history) // 5) :]
    sizes = [row["effective_sample_size"] for row in tail if row.get("effective_sample_size")]
    return {
        "method": method,
        "seed": seed,
        "steps": config.steps,
        "seconds": result.seconds,
        **losses,
        "effective_sample_size": float(np.mean(sizes)) if sizes else math.nan,
    }


def _evaluate_checkpoint(
    directory: Path, state: TrainState, mesh: Mesh, evaluator: Evaluator, corpora: build.Corpora
) -> dict[str, Any]:
    method, seed = directory.name.rsplit("-seed", 1)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        restored = checkpoints.restore_latest(state)
    if restored is None:
        raise UserError(f"{directory} holds no checkpoint to evaluate: train first, without --eval-only.")
    step, state = restored
    losses = losses_of(sharding.whole(mesh, state.params), evaluator, corpora)
    return {"method": method, "seed": int(seed), "steps": step, "seconds": math.nan, **losses}


def _weights_from(config: Config, state: TrainState) -> Params:
    """The weighting network of another run's last checkpoint."""
    source = config.weights.frozen_from
    if source is None:
        raise UserError(
            "The method frozen needs --weights.frozen-from: the directory METHOD-seedN of a run that learned weights."
        )
    result = source / "weights.npz"
    if not result.exists():
        raise UserError(f"{result} does not exist: give the directory of a finished run of dds, soba or anograd.")
    template, tree = jax.tree.flatten(state.weight_params)
    with np.load(result) as stored:
        leaves = [stored[f"leaf_{i}"] for i in range(len(stored.files))]
    if [x.shape for x in leaves] != [x.shape for x in template]:
        raise UserError(
            f"The weighting network in {result} has other shapes than this one: give the same --model.weighting* flags."
        )
    placed = [jax.device_put(new, old.sharding) for new, old in zip(leaves, template, strict=True)]
    return jax.tree.unflatten(tree, placed)


def _write_documents(directory: Path, weight_params: Params, weighting: LogitFn, corpora: build.Corpora) -> None:
    """Keeps the weighting network, and the generic rows that it likes most and least."""
    weight_params = jax.tree.map(lambda x: np.asarray(_local(x)), weight_params)
    leaves = jax.tree.leaves(weight_params)
    np.savez(directory / "weights.npz", **{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)})
    logits_of = jax.jit(weighting)
    ids, logits = [], []
    for batch in evaluation_batches(corpora.generic_train, 512, 16_384):
        real = batch.pop("mask") > 0
        logits.append(np.asarray(logits_of(weight_params, batch))[real])
        ids.append(batch["id"][real])
    ids, logits = np.concatenate(ids), np.concatenate(logits)
    order = np.argsort(-logits)
    chosen = {"highest": order[:12], "lowest": order[::-1][:12]}
    documents = {k: [_document(corpora.generic, int(ids[i]), float(logits[i])) for i in v] for k, v in chosen.items()}
    (directory / "documents.json").write_text(json.dumps(documents, indent=2) + "\n")


def _document(generic: PackedText, row: int, logit: float) -> Document:
    label = "" if generic.labels is None else generic.label_names[generic.labels[row]]
    return Document(logit, label, generic.text(row))
