"""The weighting network of a run on disk, and the rows that it likes most and least."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import jax
import numpy as np

from bilevel.data import PackedText, digest, evaluation_batches
from bilevel.state import TrainState
from bilevel.study.report import Text
from bilevel.training.run_dir import CONFIG_NAME
from bilevel.types import LogitFn, Params, UserError
from experiments.language_modeling.corpora import Corpora
from experiments.language_modeling.evaluation import local
from experiments.runs import read_json

NAME = "weights.npz"
DOCUMENTS = "documents.json"
DIGEST = "frozen_digest"
"""Among the settings of a run with frozen weights: which they are."""
RANKED = 16_384
SHOWN = 12


def load_weights(source: Path | None, state: TrainState) -> Params:
    """The weighting network of another run's last checkpoint, placed like that of `state`.

    Raises:
      UserError: if there is none, or a damaged one, or one of another shape.
    """
    result, leaves = _read(source)
    template, tree = jax.tree.flatten(state.weight_params)
    if [x.shape for x in leaves] != [x.shape for x in template]:
        raise UserError(
            f"The weighting network in {result} has other shapes than this one: give the same --model.weighting* flags."
        )
    placed = [jax.device_put(new, old.sharding) for new, old in zip(leaves, template, strict=True)]
    return jax.tree.unflatten(tree, placed)


def weights_file(source: Path | None) -> Path:
    """The file with the weighting network of another run.

    Raises:
      UserError: if there is none.
    """
    if source is None:
        raise UserError(
            "The method frozen needs --weights.frozen-from: the directory METHOD-seedN of a run that learned weights."
        )
    file = source / NAME
    if not file.exists():
        raise UserError(f"{file} does not exist: give the directory of a finished run of dds, soba or anograd.")
    return file


def _read(source: Path | None) -> tuple[Path, list[np.ndarray]]:
    """The file of a run's weights, and what it holds."""
    file = weights_file(source)
    try:
        with file.open("rb") as raw, np.load(raw) as stored:
            return file, [stored[f"leaf_{i}"] for i in range(len(stored.files))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}): give the weights of another run, or train again.") from error


def weights_digest(source: Path | None) -> str:
    """What tells the weighting network of one run from that of another, wherever it lies.

    Raises:
      UserError: if there is none, or a damaged one.
    """
    return digest(part for leaf in _read(source)[1] for part in (str(leaf.shape), leaf.tobytes()))


def known_digest(source: Path | None, directory: Path) -> str | None:
    """The digest of the weights in `source` for the settings of the run in `directory`.

    What the run recorded stands if the weights are gone. It is None for a run that was begun when only their path was recorded,
    unless there are other weights at that path.

    Raises:
      UserError: as `weights_digest`.
    """
    file = directory / CONFIG_NAME
    recorded = read_json(file).get("weights", {}) if file.exists() else {}
    if source is not None and recorded.get("frozen_from") and not (source / NAME).exists():
        return recorded.get(DIGEST)
    found = weights_digest(source)
    if DIGEST in recorded or not recorded.get("frozen_from"):
        return found
    before = Path(recorded["frozen_from"])
    return found if (before / NAME).exists() and weights_digest(before) != found else None


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


def _document(generic: PackedText, row: int, logit: float) -> Text:
    label = "" if generic.labels is None else generic.label_names[generic.labels[row]]
    return Text(logit, label, generic.text(row))
