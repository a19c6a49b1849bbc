"""The first phase: a table of scores for each part of the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilevel.data import digest
from bilevel.data.text.parts import Part
from bilevel.files import appearing, remove_abandoned
from bilevel.offline.documents import score_documents
from bilevel.tools.select.config import Config
from bilevel.tools.select.network import Network
from bilevel.training import prepare_run_dir
from bilevel.training.progress import Progress
from bilevel.types import UserError

SCHEMA = pa.schema([("document", pa.int64()), ("bytes", pa.int64()), ("score", pa.float32())])
_NOTE = b"bilevel"
"""In the metadata of a table: which text was scored."""
PATIENCE = 60.0
"""Seconds to wait for other shards that begin at the same time."""


class ScoreFiles:
    """The score files of a corpus, in a folder that all processes share."""

    def __init__(self, config: Config, network: Network, parts: list[Part]):
        names = [Path(name).name for part in parts for name in part.files or (part.source.name,)]
        self.settings: dict[str, Any] = {
            "network": network.settings, "field": config.field, "documents": config.documents,
            "files": {"count": len(names), "names": digest(names)},
        }  # fmt: skip
        self._config, self._network, self._folder = config, network, config.scores or config.output / "scores"
        flag = "--scores" if config.scores else "--output"
        prepare_run_dir(self._folder, self.settings, flag=flag, patience=PATIENCE)
        remove_abandoned(self._folder)

    def file(self, part: Part) -> Path:
        """Where the scores of a part are, or will be."""
        return self._folder / f"{part.stem}.parquet"

    def scored(self, part: Part) -> dict[str, Any] | None:
        """Return the state and the content that a part had when it was scored; None without a table, or with a damaged one."""
        try:
            return json.loads(pq.read_metadata(self.file(part)).metadata[_NOTE])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def found(self, part: Part, exact: bool = True) -> bool:
        """Whether the scores of a part are there, and come from the text that it has now.

        If its files have other times than those that were scored, they are read to see whether they are the same. Without
        `exact`, sizes decide: for the parts of other shards, which may lie on a machine of their own.
        """
        before, now = self.scored(part), part.state()
        if before is None or before["sizes"] != now["sizes"]:
            return False
        return not exact or before["times"] == now["times"] or before["content"] == part.content()

    def score(self, part: Part, progress: Progress) -> None:
        """Score a part and write its table, in one piece; a `UserError` says that the network gives no number."""
        note = json.dumps({**part.state(), "content": part.content()})
        network, schema, documents = self._network, SCHEMA.with_metadata({_NOTE: note}), part.stream(part.source.read)
        with appearing(self.file(part)) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for scored in score_documents(network.logits, network.pack, documents, self._config.batch_size):
                for bad in np.flatnonzero(~np.isfinite(scored.score))[:1]:
                    raise UserError(
                        f"The weighting network gives {scored.score[bad]} for document {scored.document[bad]} of "
                        f"{part.source.name}: give the weights of a run that did not diverge."
                    )
                writer.write_table(pa.table(list(scored), schema=schema))
                progress.advance(len(scored.document))

    def read(self, part: Part) -> pa.Table:
        """Return the scores of a part; a `UserError` says that their file is damaged."""
        file = self.file(part)
        try:
            return pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged ({error}): remove it, and give the same command again.") from error
