"""The weighting network of a run as a function of texts, for any engine that moves functions between processes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.data import Document
from bilevel.devices.environment import keep_programs
from bilevel.offline.documents import score_documents
from bilevel.tasks import load_task
from bilevel.tools.select.network import Network, load_network
from bilevel.types import UserError


class DocumentScorer:
    """Score whole documents by the weighting network of a finished run, as `bilevel select` does.

    The score of a document is the mean of the network's logits over its rows, weighted by their bytes. A pickled scorer holds
    the path of the run alone; each process loads the network once, when it scores its first documents.

        scorer = DocumentScorer("runs/my_domain/soba-seed0")
        scorer(["a text", ""])  # array([0.31, nan], dtype=float32)

    Args:
        run: directory METHOD-seedN, which every process must see under the same path.
        at: the network of the run's end, or of the evaluation that was best on valid.
        task: name or file of the run's task, where it is your own (default: as the run says).
        batch_size: rows scored in one program call.

    Raises:
        UserError: by the first call, that the run is missing or not finished, or learned no network that scores documents.
    """

    def __init__(
        self, run: str | Path, *, at: Literal["end", "best"] = "end", task: str | None = None, batch_size: int = 1024
    ):
        self.run, self.at, self.batch_size = Path(run).absolute(), at, batch_size
        self.task = str(Path(task).absolute()) if task is not None and task.endswith(".py") else task

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Score some texts.

        Args:
            texts: n documents.

        Returns:
            float32 `[n]`; NaN for blank texts, which have no score.

        Raises:
            UserError: a text holds half a surrogate pair, or the network gives no number for it.
        """
        network = _network(self.run, self.task, self.at)
        documents = [Document(_encoded(text, number)) for number, text in enumerate(texts)]
        scores = np.full(len(documents), np.nan, np.float32)
        for scored in score_documents(network.logits, network.pack, documents, self.batch_size):
            scores[scored.document] = scored.score
            for bad in scored.document[~np.isfinite(scored.score)]:
                raise UserError(
                    f"The weighting network of {self.run} gives {scores[bad]} for text {bad}: give a run that did not diverge."
                )
        return scores


@functools.lru_cache(maxsize=4)
def _network(run: Path, task: str | None, at: Literal["end", "best"]) -> Network:
    keep_programs()
    return load_network(run, task, load_task, at)


def _encoded(text: str, number: int) -> bytes:
    """The text in UTF-8, `b""` if it is blank."""
    try:
        found = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"Text {number} holds half a surrogate pair at character {error.start + 1}: remove it or write the whole character."
        ) from error
    return found if found.strip() else b""
