"""The first phase: a table of scores for each part of the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bilevel.data import digest
from bilevel.data.text.part_tables import PartTables
from bilevel.data.text.parts import Part
from bilevel.files import remove_abandoned
from bilevel.offline.documents import score_documents
from bilevel.tools.select.config import Config
from bilevel.tools.select.network import Network
from bilevel.tools.select.written import GROUP_FIELD, key_digests, stored
from bilevel.training import prepare_run_dir
from bilevel.training.progress import Progress
from bilevel.types import UserError

SCHEMA = pa.schema([("document", pa.int64()), ("bytes", pa.int64()), ("score", pa.float32()), ("text", pa.int64())])
"""The columns of `offline.documents.Scored`."""


_GROUP = pa.schema([("group", pa.int64())])
"""One more column: `digests` of the values of --group-field."""


def schema_of(grouped: bool) -> pa.Schema:
    """Return the columns of a table of scores."""
    return pa.unify_schemas([SCHEMA, _GROUP]) if grouped else SCHEMA


class ScoreFiles(PartTables):
    """The score files of a corpus."""

    def __init__(self, config: Config, network: Network, parts: list[Part]):
        names = [Path(name).name for part in parts for name in part.files or (part.source.name,)]
        self.settings: dict[str, Any] = {
            "network": network.settings, "field": config.field, "documents": config.documents,
            "group_field": config.group_field,
            "files": {"count": len(names), "names": digest(names)},
        }  # fmt: skip
        self._config, self._network = config, network
        super().__init__(config.scores or config.output / "scores", schema_of(config.group_field is not None))

    def prepare(self) -> None:
        """Begin or continue the folder; a `UserError` says that it holds the scores of another network or corpus."""
        flag = "--scores" if self._config.scores else "--output"
        prepare_run_dir(self.folder, self.settings, flag=flag)
        remove_abandoned(self.folder)

    def score(self, part: Part, progress: Progress) -> None:
        """Score a part and write its table; a `UserError` says that the network gives no number."""
        network, documents, groups = self._network, part.stream(part.source.read), self._groups(part)
        with self.writing(part) as writer:
            for scored in score_documents(network.logits, network.pack, documents, self._config.batch_size):
                for bad in np.flatnonzero(~np.isfinite(scored.score))[:1]:
                    raise UserError(
                        f"The weighting network gives {scored.score[bad]} for document {scored.document[bad]} of "
                        f"{part.source.name}: give the weights of a run that did not diverge."
                    )
                columns = [*scored] if groups is None else [*scored, groups[scored.document]]
                writer.write_table(pa.table(columns, schema=writer.schema))
                progress.advance(len(scored.document))

    def _groups(self, part: Part) -> NDArray[np.int64] | None:
        """The group of each document of a part, blank ones too, int64 `[n]`."""
        if self._config.group_field is None:
            return None
        keys = part.stream(lambda: stored(part).keys(self._config.group_field, GROUP_FIELD))
        found = [key_digests(block) for block in keys]
        return np.concatenate(found) if found else np.zeros(0, np.int64)
