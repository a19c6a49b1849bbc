"""The weighting network of a run on disk, and the generic rows that it likes most and least."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data import digest, evaluation_batches
from bilevel.files import load_tree, save_tree
from bilevel.study import files
from bilevel.study.context import WEIGHTS as NAME
from bilevel.study.context import Context, local
from bilevel.study.task import Text
from bilevel.types import LogitFn, Params, UserError

RANKED = "ranked.json"
"""The rows with the highest and the lowest logits: {"highest": [[id, logit], …], "lowest": …}."""
_MOST = 16_384
_SHOWN = 36
_AT_ONCE = 512


def weights_file(source: Path | None) -> Path:
    """Return the file with the weighting network of another run.

    Raises:
      UserError: if there is none.
    """
    if source is None:
        raise UserError(
            "The method frozen needs --frozen.weights: the directory METHOD-seedN of a run that learned weights."
        )
    file = source / NAME
    if not file.exists():
        raise UserError(f"{file} does not exist: give the directory of a finished run of dds, soba or anograd.")
    return file


def load_weights(source: Path | None, template: Params) -> Params:
    """Return the weighting network of another run's end, placed like `template`.

    Raises:
      UserError: if there is none, or a damaged one, or one of other shapes.
    """
    found, _ = load_tree(weights_file(source), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template))
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), found, template)


def weights_digest(source: Path | None, before: Mapping[str, Any]) -> str:
    """Return what tells the weighting network of one run from that of another, wherever it lies.

    Args:
      source: directory of the run.
      before: the settings that the run asking was begun with; what they recorded stands if the weights are gone.

    Raises:
      UserError: if there is none, or a damaged one.
    """
    if "weights_digest" in before and (source is None or not (source / NAME).exists()):
        return before["weights_digest"]
    tree, _ = load_tree(weights_file(source))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return digest(
        part for path, x in leaves for part in (jax.tree_util.keystr(path), str(x.shape), np.asarray(x).tobytes())
    )


def save_weights(directory: Path, weight_params: Params, context: Context, batch_size: int) -> dict[str, float]:
    """Keep the weighting network, and name the generic rows that it likes most and least.

    Args:
      directory: of the run.
      weight_params: α.
      context: of the run.
      batch_size: rows that the network was shown at once while it learned (BatchNorm normalises by them).

    Returns:
      `weight_on/NAME`: the share of the softmax over the ranked rows that rows with each known fault have.
    """
    weight_params = jax.tree.map(lambda x: np.asarray(local(x)), weight_params)
    save_tree(directory / NAME, weight_params, {"task": context.task.name})
    logits_of = context.weighting.logits
    assert callable(logits_of)
    ids, logits = _logits(weight_params, logits_of, context, batch_size)
    order = np.argsort(-logits, kind="stable")
    count = min(_SHOWN, len(order) // 2)
    chosen = {"highest": order[:count], "lowest": order[::-1][:count]}
    files.write_json(
        directory / RANKED, {name: [[int(ids[i]), float(logits[i])] for i in rows] for name, rows in chosen.items()}
    )
    share = np.exp(logits - logits.max())
    share /= share.sum()
    faults = {name: known for name, known in context.splits.known.items() if known.fault}
    return {f"weight_on/{name}": float(share[known.values[ids] == 1].sum()) for name, known in faults.items()}


def shown(directory: Path, context: Context) -> dict[str, list[Any]]:
    """Return the ranked rows of a run as texts or pictures: "highest" and "lowest"; {} if it has none."""
    file = directory / RANKED
    if not file.exists():
        return {}
    found = {}
    for name, rows in files.read_json(file).items():
        shapes = context.task.show(context.config.task, context.splits, np.asarray([i for i, _ in rows], np.int64))
        scores = [score for _, score in rows]
        found[name] = [
            x._replace(score=score) if isinstance(x, Text) else x._replace(title=f"rows with the {name} weights")
            for x, score in zip(shapes, scores, strict=False)
        ]
    return found


def _logits(
    weights: Params, logits_of: LogitFn, context: Context, batch_size: int
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float64]]:
    """Ids and logits of generic rows, all or a part at even distances, in batches like those of training.

    A network with BatchNorm normalises by its batch, and learned on batches drawn at random: stored order may go class by class.
    """
    data, score = context.splits.train, jax.jit(logits_of)
    if len(data) > _MOST:
        ids, found = [], []
        for batch in evaluation_batches(data, _AT_ONCE, _MOST):
            real = batch.pop("mask") > 0
            found.append(np.asarray(score(weights, batch), np.float64)[real])
            ids.append(batch["id"][real])
        return np.concatenate(ids), np.concatenate(found)
    count = len(data)
    order, values, ids = np.random.default_rng(0).permutation(count), np.empty(count), np.empty(count, np.int64)
    for start in range(0, count, batch_size):
        rows = order[
            np.arange(start, start + batch_size) % count
        ]  # the last batch is filled with the first rows of all
        batch = data.rows(rows)
        keep = min(batch_size, count - start)
        values[rows[:keep]] = np.asarray(score(weights, batch), np.float64)[:keep]
        ids[rows[:keep]] = batch["id"][:keep]
    return ids, values
