"""The weighting network of a run: learned beforehand, kept at its end, and read by other runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
import optax

from bilevel.data import Loader
from bilevel.devices import sharding
from bilevel.files import load_tree, save_tree
from bilevel.offline.domain_classifier import train_domain_classifier
from bilevel.offline.ranked_rows import extremes, logits_of_rows
from bilevel.selection.known import faults
from bilevel.study import domain_weights
from bilevel.study.context import Context
from bilevel.study.spec import Start
from bilevel.study.task import GENERIC, Text
from bilevel.training.best_weights import BEST, BestWeights
from bilevel.training.checkpoints import steps_done
from bilevel.training.run_dir import read_json, write_json
from bilevel.types import Params, UserError

NAME = "weights.safetensors"
"""In the directory of a run: its last weighting network."""
At: TypeAlias = Literal["end", "best"]
"""Whether that one is taken, or that of the evaluation while training that was best on valid."""
RANKED = "ranked.json"
"""The rows with the highest and the lowest logits: {"highest": [[id, logit], …], "lowest": …}."""
CLASSIFIER = "classifier.json"
"""In the directory of a run that begins with a domain classifier: what that cost."""
_EVALUATED = 2048
_MOST = 16_384
_SHOWN = 36


def classified(context: Context, *, steps: int, rows: int, rate: float) -> Callable[[Any], Start]:
    """Return what gives α the parameters of a domain classifier, trained on as many specific as generic rows.

    Of its `steps` updates by Adam, with at most `rows` of either kind, the best on held-out rows counts.
    """
    splits, file = context.splits, context.directory / CLASSIFIER
    if context.study.weigh == "domains":
        raise UserError(
            f"{context.method} begins with a domain classifier of rows, and --weigh domains sees none: omit one of the two."
        )

    def start(state: Any) -> Start:
        if steps_done(context.directory) and file.exists():  # the checkpoint has the network
            return Start(state.weight_params, read_json(file))
        logits, alpha = context.weighting.logits, jax.tree.map(np.asarray, sharding.local(state.weight_params))
        assert callable(logits)
        train = enumerate((splits.train, splits.specific), context.seed + 3_000_000)
        generic, specific = (Loader(data, min(rows, len(data)), seed=seed) for seed, data in train)
        known = (splits.valid.get(GENERIC, splits.train), splits.deciding)
        places = [np.linspace(0, len(data) - 1, min(_EVALUATED, len(data))).astype(np.int64) for data in known]
        held_out = (known[0].rows(places[0]), known[1].rows(places[1]))
        optimizer = optax.adam(rate)
        found = train_domain_classifier(logits, alpha, generic, specific, held_out, optimizer=optimizer, steps=steps)
        report = {"preparation_seconds": found.seconds, "classifier_valid_loss": found.valid_loss}
        write_json(file, report)
        return Start(found.weight_params, report)

    return start


def weights_file(source: Path, at: At, flag: str) -> Path:
    """Return the file of a run's weighting network, at its end or at its best evaluation.

    Raises:
      UserError: if a finished run has none at its best; `flag` is that of `at`.
    """
    if at == "end":
        return source / NAME
    if (source / NAME).exists() and not (source / BEST).exists():
        raise UserError(
            f"{source / BEST} does not exist, as that run learned no weights while it trained: give {flag} end."
        )
    return source / BEST


def load_weights(file: Path, template: Any = None) -> Params:
    """Return the weighting network in a file of `weights_file`.

    Raises:
      UserError: if there is none, or a damaged one, or one that does not have the names, shapes and types of `template`.
    """
    if not file.exists():
        raise UserError(f"{file} does not exist: give the directory of a finished run of dds, soba or anograd.")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template)
    return load_tree(file, shapes)[0]


def parts_of(file: Path) -> Iterator[str | bytes]:
    """Yield what tells one weighting network from another, wherever its file lies."""
    for path, x in jax.tree_util.tree_leaves_with_path(load_weights(file)):
        yield from (jax.tree_util.keystr(path), str(x.shape), np.asarray(x).tobytes())


def best_weights(context: Context) -> BestWeights:
    """Return what keeps the weighting network of a run that is best on valid."""
    measure = context.task.measures[0]
    about = {"task": context.task.name}
    return BestWeights(context.directory, context.mesh, f"valid_{measure.name}", measure.sign, about)


def save_weights(context: Context, batch_size: int, state: Any) -> dict[str, float]:
    """Keep the weighting network of a run's last state, and name the generic rows that it likes most and least.

    It is shown as many rows at once as while it learned, `batch_size`: BatchNorm normalises by them. All processes call this.

    Returns:
      `weight_on/NAME`: the share of the softmax over the ranked rows that rows with each known fault have.
    """
    alpha = sharding.local(sharding.whole(context.mesh, state.weight_params))
    if jax.process_index() != 0:
        return {}
    save_tree(context.directory / NAME, alpha, {"task": context.task.name})
    if context.study.weigh == "domains":
        write_json(context.directory / domain_weights.NAME, domain_weights.mixture(context.splits, alpha))
    network = context.weighting.logits
    assert callable(network)
    ids, logits = logits_of_rows(network, alpha, context.splits.train, batch_size=batch_size, most=_MOST)
    write_json(context.directory / RANKED, extremes(ids, logits, _SHOWN))
    share = np.exp(logits - logits.max())
    share /= share.sum()
    known = faults(context.splits.known)
    return {f"weight_on/{name}": float(share[fault.values[ids] == 1].sum()) for name, fault in known.items()}


def shown(context: Context) -> dict[str, list[Any]]:
    """Return the ranked rows of a run as texts or pictures: "highest" and "lowest"; {} if it has none."""
    file = context.directory / RANKED
    if not file.exists():
        return {}
    found = {}
    for name, rows in read_json(file).items():
        shapes = context.task.show(context.config.task, context.splits, np.asarray([i for i, _ in rows], np.int64))
        scores = [score for _, score in rows]
        found[name] = [
            x._replace(score=score) if isinstance(x, Text) else x._replace(title=f"rows with the {name} weights")
            for x, score in zip(shapes, scores, strict=False)
        ]
    return found
