"""A Parquet table for each part of a corpus, in one folder; each says of which text it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bilevel.data.text.parts import Part
from bilevel.files import appearing
from bilevel.types import UserError

_ROWS = 1 << 16
_NOTE = b"bilevel"
"""In the metadata of a table: which text it is of."""


class PartTables:
    """The tables of a corpus, in a folder that several processes may share.

    Args:
        folder: where they are, or will be.
        schema: of each table.
    """

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder, self.schema = folder, schema

    def file(self, part: Part) -> Path:
        """Where the table of a part is, or will be."""
        return self.folder / f"{part.stem}.parquet"

    def noted(self, part: Part) -> dict[str, Any] | None:
        """Return the state and the content that a part had when its table was made; None without one, or with a damaged one."""
        try:
            return json.loads(pq.read_metadata(self.file(part)).metadata[_NOTE])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def found(self, part: Part) -> bool:
        """Whether the table of a part is there, and of the text that it has now.

        If its files have other times than those noted, they are read to see whether they are the same.
        """
        before, now = self.noted(part), part.state()
        if before is None or before["sizes"] != now["sizes"]:
            return False
        return before["times"] == now["times"] or before["content"] == part.content()

    @contextlib.contextmanager
    def writing(self, part: Part) -> Iterator[pq.ParquetWriter]:
        """Write the table of a part, in one piece; if something is raised, there is none."""
        note = json.dumps({**part.state(), "content": part.content()})
        schema = self.schema.with_metadata({_NOTE: note})
        with appearing(self.file(part)) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            yield writer

    def read(self, part: Part, *names: str) -> list[NDArray[Any]]:
        """Return columns of the table of a part, `[n]` each.

        Raises:
            UserError: its file is damaged.
        """
        file = self.file(part)
        try:
            with pq.ParquetFile(file) as table:
                count, place = table.metadata.num_rows, 0
                found = [np.empty(count, table.schema_arrow.field(name).type.to_pandas_dtype()) for name in names]
                # Block by block: a table of all documents would be a second copy.
                for block in table.iter_batches(_ROWS, columns=list(names)):
                    for name, column in zip(names, found, strict=True):
                        column[place : place + len(block)] = block.column(name).to_numpy()
                    place += len(block)
                return found
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged ({error}): remove it, and give the same command again.") from error
