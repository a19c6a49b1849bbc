"""The weighting network of a finished run, and the scores that it gives documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data import Document, NumpyBatch, document_blocks, read_ahead
from bilevel.files import load_tree
from bilevel.study.config import of_run
from bilevel.study.context import WEIGHTS
from bilevel.study.files import RESULT
from bilevel.study.resolve import default_config
from bilevel.study.task import DocumentRows, DocumentTask, Pack, Task
from bilevel.study.weights import weights_digest
from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.types import Array, UserError

_BLOCK_BYTES = 1 << 24


class Network(NamedTuple):
    """A trained weighting network."""

    logits: Callable[[NumpyBatch], Array]
    """Rows -> logits, float32 `[b]`; one compiled program for each b."""
    pack: Pack
    """Cuts documents into rows, as in training."""
    settings: dict[str, Any]
    """What decides the scores: the task, its settings and a digest of the parameters."""


def load_network(run: Path, name: str | None, load_task: Callable[[str], Task]) -> Network:
    """Load the weighting network of a finished run.

    Args:
      run: the run's directory METHOD-seedN.
      name: name or file of its task; None: as the run says.
      load_task: name or file -> task.

    Raises:
      UserError: if the run is missing or not finished, or learned no network that scores documents.
    """
    task = _task(run, name, load_task)
    config = default_config(task, settings=("--weights", run / CONFIG_NAME)).task
    weighting = task.weighting(config, None)
    logits = weighting.logits
    assert callable(logits)
    params, _ = load_tree(run / WEIGHTS, jax.eval_shape(weighting.init, jax.random.key(0)))
    compiled = jax.jit(logits)
    settings = {"task": task.name, **of_run(config), "parameters": weights_digest(run, {})}
    return Network(lambda rows: compiled(params, rows), task.pack(config), settings)


def _task(run: Path, name: str | None, load_task: Callable[[str], Task]) -> DocumentTask:
    """The task of a finished run with a weighting network of documents."""
    if not (run / CONFIG_NAME).exists():
        inside = sorted(path.parent.name for path in run.glob(f"*/{WEIGHTS}"))
        hint = f"one of the runs in it, {', '.join(inside)}" if inside else "METHOD-seedN below its run directory"
        raise UserError(f"--weights {run} is not the directory of a run (it holds no {CONFIG_NAME}): give {hint}.")
    settings = read_settings(run)
    if "task" not in settings:
        raise UserError(f"{run / CONFIG_NAME} names no task: give --weights the directory of a run of bilevel compare.")
    if not (run / WEIGHTS).exists():
        hint = "so it is not finished: continue it with the command that began it"
        if (run / RESULT).exists():
            hint = f"as {settings.get('method')} learns no network that scores rows: give a run of soba, dds or anograd"
        raise UserError(f"--weights {run} holds no {WEIGHTS}, {hint}.")
    try:
        task = load_task(name or settings["task"])
    except UserError as error:
        if name is not None:
            raise
        hint = "which does not come with bilevel: name its file, as in --task my_task.py"
        raise UserError(f"--weights {run} is a run of the task {settings['task']}, {hint}.") from error
    if not hasattr(task, "pack"):
        hint = "whose rows are not documents (it has no function pack): give one of, say, language_modeling"
        raise UserError(f"--weights {run} is a run of the task {task.name}, {hint}.")
    return cast(DocumentTask, task)


class Scored(NamedTuple):
    """Scores of some documents, in the order of the corpus."""

    document: NDArray[np.int64]
    """int64 `[n]`: numbers in the part, blank documents counted."""
    size: NDArray[np.int64]
    """int64 `[n]`: bytes of each document."""
    score: NDArray[np.float32]
    """float32 `[n]`."""


def score_documents(network: Network, documents: Iterable[Document], batch_size: int) -> Iterator[Scored]:
    """Score documents as a stream: each by the mean logit of its rows, weighted by their bytes.

    Blank ones (`b""`) get no score. `batch_size` rows are scored in one program call; the last one of about 16 MiB of text is
    padded. While the device works on some documents, a thread cuts the next.
    """
    first = 0
    with read_ahead(enumerate(_cut(network.pack, documents, batch_size))) as blocks:
        for _, (sizes, batches) in blocks:
            if batches:
                owner = np.concatenate([rows.owner for rows in batches])
                size = np.concatenate([rows.size for rows in batches])
                begun = [network.logits(rows.batch) for rows in batches]
                logits = np.concatenate([np.asarray(x) for x in begun], dtype=np.float64)[: len(owner)]
                weight, total = (np.bincount(owner, x, len(sizes)) for x in (size, size * logits))
                chosen = np.flatnonzero(weight)
                yield Scored(first + chosen, sizes[chosen], (total[chosen] / weight[chosen]).astype(np.float32))
            first += len(sizes)


def _cut(
    pack: Pack, documents: Iterable[Document], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[DocumentRows]]]:
    """Stream the sizes of some documents, and their rows in batches of one size, the last one padded."""
    for block in document_blocks(documents, _BLOCK_BYTES):
        texts, batches = [document.text for document in block], []
        for rows in pack(texts, batch_size):
            if len(rows.owner) < batch_size:
                place = np.minimum(np.arange(batch_size), len(rows.owner) - 1)
                rows = rows._replace(batch={name: x[place] for name, x in rows.batch.items()})
            batches.append(rows)
        yield np.fromiter(map(len, texts), np.int64, len(texts)), batches
