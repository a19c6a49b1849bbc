"""The weighting network of a run on disk, and the rows that it likes most and least."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import jax
import numpy as np

from bilevel.data import PackedText, evaluation_batches
from bilevel.state import TrainState
from bilevel.training import Document
from bilevel.types import LogitFn, Params, UserError
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import local

NAME = "weights.npz"
DOCUMENTS = "documents.json"
RANKED = 16_384
SHOWN = 12


def load_weights(source: Path | None, state: TrainState) -> Params:
    """The weighting network of another run's last checkpoint, placed like that of `state`.

    Raises:
      UserError: if there is none, or a damaged one, or one of another shape.
    """
    if source is None:
        raise UserError(
            "The method frozen needs --weights.frozen-from: the directory METHOD-seedN of a run that learned weights."
        )
    result = source / NAME
    if not result.exists():
        raise UserError(f"{result} does not exist: give the directory of a finished run of dds, soba or anograd.")
    template, tree = jax.tree.flatten(state.weight_params)
    try:
        with result.open("rb") as raw, np.load(raw) as stored:
            leaves = [stored[f"leaf_{i}"] for i in range(len(stored.files))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{result} is damaged ({error}): give the weights of another run, or train again.") from error
    if [x.shape for x in leaves] != [x.shape for x in template]:
        raise UserError(
            f"The weighting network in {result} has other shapes than this one: give the same --model.weighting* flags."
        )
    placed = [jax.device_put(new, old.sharding) for new, old in zip(leaves, template, strict=True)]
    return jax.tree.unflatten(tree, placed)


def save_weights(directory: Path, weight_params: Params, weighting: LogitFn, corpora: Corpora) -> None:
    """Keeps the weighting network, and the generic rows that it likes most and least."""
    weight_params = jax.tree.map(lambda x: np.asarray(local(x)), weight_params)
    leaves = jax.tree.leaves(weight_params)
    np.savez(directory / NAME, **{f"leaf_{i}": leaf for i, leaf in enumerate(leaves)})
    logits_of = jax.jit(weighting)
    ids, logits = [], []
    for batch in evaluation_batches(corpora.generic_train, 512, RANKED):
        real = batch.pop("mask") > 0
        logits.append(np.asarray(logits_of(weight_params, batch))[real])
        ids.append(batch["id"][real])
    ids, logits = np.concatenate(ids), np.concatenate(logits)
    order = np.argsort(-logits)
    chosen = {"highest": order[:SHOWN], "lowest": order[::-1][:SHOWN]}
    documents = {k: [_document(corpora.generic, int(ids[i]), float(logits[i])) for i in v] for k, v in chosen.items()}
    (directory / DOCUMENTS).write_text(json.dumps(documents, indent=2) + "\n")


def _document(generic: PackedText, row: int, logit: float) -> Document:
    label = "" if generic.labels is None else generic.label_names[generic.labels[row]]
    return Document(logit, label, generic.text(row))
