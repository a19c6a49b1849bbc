"""Losses of the main model on data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bilevel.data import Dataset, JoinedData, evaluation_batches
from bilevel.devices import sharding
from bilevel.nn.transformer import Transformer, byte_losses
from bilevel.state import TrainState
from bilevel.types import Array, Params
from experiments.language_modeling.config import Config
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.tasks import task_losses

EVALUATION_BATCH = 256


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
        params = jax.tree.map(local, params)
        found = [self._sums(params, batch) for batch in evaluation_batches(dataset, EVALUATION_BATCH, limit)]
        nats, count = np.sum(jax.device_get(found), axis=0)
        return float(nats / count)


def local(x: Array) -> Any:
    """This process's copy of a replicated array: every process evaluates for itself."""
    return x.addressable_data(0) if not x.is_fully_addressable else x


def while_training(
    config: Config, mesh: Mesh, evaluator: Evaluator, corpora: Corpora
) -> Callable[[TrainState], Mapping[str, float]]:
    """The losses on at most `evaluate_rows` rows, for the metrics."""

    def evaluate(state: TrainState) -> Mapping[str, float]:
        params = sharding.whole(mesh, state.params)
        valid = evaluator(params, corpora.specific["valid"], config.evaluate_rows)
        held_out = evaluator(params, corpora.generic_valid, config.evaluate_rows)
        return {"specific_valid_loss": valid, "generic_valid_loss": held_out}

    return evaluate


def final_losses(params: Params, evaluator: Evaluator, corpora: Corpora) -> dict[str, Any]:
    """The final losses, on all rows, in nats per byte."""
    return {
        "specific_valid_loss": evaluator(params, corpora.specific["valid"]),
        "specific_test_loss": evaluator(params, corpora.specific["test"]),
        "generic_loss": evaluator(params, corpora.generic_valid),
        **task_losses(params, evaluator, corpora),
    }
