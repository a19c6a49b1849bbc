"""The file that is written for a part of the corpus, in each of the formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bilevel.data.text.fields import DEFAULT
from bilevel.data.text.line_file import write_json_lines
from bilevel.data.text.parts import Part
from bilevel.data.text.stored import ID_FIELD, Chosen, Stored
from bilevel.offline.documents import digests
from bilevel.tools.select.config import Config, Format
from bilevel.types import UserError

SCHEMA = pa.schema(
    [("file", pa.dictionary(pa.int32(), pa.string())), ("document", pa.int64()), ("bytes", pa.int64()),
     ("score", pa.float32()), ("quantile", pa.float64()), ("kept", pa.bool_())]
)  # fmt: skip
_BLOCK = 4096
GROUP_FIELD = "--group-field"


class Judged(NamedTuple):
    """The documents of a part that are not blank, n of them."""

    number: NDArray[np.int64]
    """int64 `[n]`: in the part, blank ones counted."""
    size: NDArray[np.int64]
    """int64 `[n]`: bytes."""
    score: NDArray[np.float32]
    """float32 `[n]`."""
    kept: NDArray[np.bool_]
    """bool `[n]`."""
    quantile: NDArray[np.float64] | None
    """float64 `[n]`, for formats that show it."""
    weight: NDArray[np.float32] | None
    """float32 `[n]`, likewise."""


def file_name(part: Part, written: Format) -> str:
    """Return the name of the file that is written for a part."""
    if written == "parquet":
        return f"{part.stem}.parquet"
    return stored(part).name(part.stem, plain=written == "documents")


def check_fields(part: Part, config: Config) -> None:
    """Refuse fields that there are not, and a --weight-field that there is, by a `UserError`, before anything is scored."""
    for field, flag in ((config.id_field, ID_FIELD), (config.group_field, GROUP_FIELD)):
        if field is not None:
            next(part.stream(lambda field=field, flag=flag: stored(part).keys(field, flag)), None)
    if config.format == "weights" and config.weight_field in stored(part).fields():
        raise UserError(
            f"{part.source.name} has a field {config.weight_field!r} already; give the weights another name (--weight-field)."
        )


def write_part(
    part: Part, judged: Judged, config: Config, target: Path, seen: Callable[[Any], object] | None = None
) -> Iterator[int]:
    """Write the file of a part; yields how many documents, some at a time. `seen` is given each block of keys that is written."""

    def keys() -> Iterator[Any]:
        for block in part.stream(lambda: stored(part).keys(config.id_field)):
            if seen:
                seen(block)
            yield block

    if config.format == "parquet":
        pq.write_table(_table(part, judged, None if config.id_field is None else keys()), target, compression="zstd")
        yield len(judged.number)
    elif config.format == "attributes":
        yield from stored(part).write_columns(target, _attributes(keys(), judged))
    else:
        count = int(judged.number[-1]) + 1 if len(judged.number) else 0
        kept, weight = np.zeros(count, bool), None
        kept[judged.number] = judged.kept
        if judged.weight is not None:
            weight = np.zeros(count, np.float32)
            weight[judged.number] = judged.weight
        chosen = Chosen(kept, weight, config.weight_field)
        yield from part.stream(lambda: stored(part).write(target, chosen))


def key_digests(block: Any) -> NDArray[np.int64]:
    """Return `digests` of a block of keys, as texts."""
    keys = block if isinstance(block, list) else block.to_pylist()
    return digests([str(key).encode("utf-8", "surrogatepass") for key in keys])


def _table(part: Part, judged: Judged, keys: Iterator[Any] | None) -> pa.Table:
    """Every document that is not blank."""
    number, which = judged.number, np.zeros(len(judged.number), np.int32)
    if part.files:
        number, which = which.astype(np.int64), number.astype(np.int32)
    file = pa.DictionaryArray.from_arrays(which, part.files or (part.source.name,))
    columns = [file, number, judged.size, judged.score, judged.quantile, judged.kept]
    table = pa.table(columns, schema=SCHEMA)
    if keys is None:
        return table
    found = list(keys)
    ids = pa.chunked_array(_of_one_type(found)) if found else pa.chunked_array([pa.nulls(0, pa.string())])
    return table.append_column("id", ids.take(judged.number))


def _of_one_type(blocks: list[Any]) -> list[pa.Array]:
    """The keys as arrays; where JSON has texts and numbers, as texts."""
    if not isinstance(blocks[0], list):
        return blocks
    try:
        return [pa.array([key for block in blocks for key in block])]
    except (pa.ArrowException, TypeError, OverflowError):
        return [pa.array([None if key is None else str(key) for block in blocks for key in block])]


def _attributes(keys: Iterable[Any], judged: Judged) -> Iterator[dict[str, Any]]:
    """Columns for all documents of a part in their order, blank ones (which have no score) too."""
    start = 0
    for block in keys:
        own = slice(*np.searchsorted(judged.number, (start, start + len(block))))
        place = judged.number[own] - start
        blank = np.ones(len(block), bool)
        blank[place] = False
        columns: dict[str, Any] = {"id": block}
        for name, values in (("score", judged.score), ("quantile", judged.quantile)):
            assert values is not None
            full = np.zeros(len(block), values.dtype)
            full[place] = values[own]
            columns[name] = pa.array(full, mask=blank)
        kept = np.zeros(len(block), bool)
        kept[place] = judged.kept[own]
        yield {**columns, "kept": kept}
        start += len(block)


def stored(part: Part) -> Stored:
    """Return what reads the records of a part, and writes others like them."""
    return part.source.stored or _Texts(part)


class _Texts:
    """Documents that are not records of one file, written as JSON lines that say where each is from."""

    def __init__(self, part: Part):
        self._part = part

    def texts(self, field: str | None) -> Iterator[bytes]:
        return (document.text for document in self._part.source.read())

    def fields(self) -> list[str]:
        return [self._where, DEFAULT]

    @property
    def _where(self) -> str:
        return "file" if self._part.files else "document"

    def _places(self) -> Iterator[tuple[str | int, bytes]]:
        for number, text in enumerate(self.texts(None)):
            yield self._part.files[number] if self._part.files else number, text

    def keys(self, field: str | None, flag: str = ID_FIELD) -> Iterator[Any]:
        if field is not None:
            name = self._part.files[0] if self._part.files else self._part.source.name
            raise UserError(f"{flag} {field} names a field of files with records, which {name} is not; leave it out.")
        return ([place] for place, _ in self._places())

    def name(self, stem: str, *, plain: bool) -> str:
        return f"{stem}.jsonl.gz"

    def write(self, target: Path, chosen: Chosen) -> Iterator[int]:
        return write_json_lines(target, self._kept(chosen), "gzip")

    def _kept(self, chosen: Chosen) -> Iterator[Mapping[str, Any]]:
        for number, (place, text) in enumerate(self._places()):
            kept, weight = chosen.of(number, 1)
            if kept[0]:
                more = {} if weight is None else {chosen.weight_field: weight}
                yield {self._where: [place], DEFAULT: [text.decode()], **more}

    def write_columns(self, target: Path, blocks: Iterable[Mapping[str, Any]]) -> Iterator[int]:
        return write_json_lines(target, blocks, "gzip")
