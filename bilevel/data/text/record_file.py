"""ArrayRecord files of documents as they are stored: JSON objects, `tf.train.Example`s or plain text."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bilevel.data.opening import Place, compression_of
from bilevel.data.text.fields import DEFAULT, field_names, record_key, record_text
from bilevel.data.text.line_file import json_line, json_lines, rounded, with_number
from bilevel.data.text.lines import json_object
from bilevel.data.text.stored import ID_FIELD, Chosen
from bilevel.types import UserError

_BLOCK_BYTES = 1 << 20
_OPTIONS = "max_parallelism:1"
Content = Literal["text", "json", "example"]


class RecordFile:
    """An ArrayRecord file; its first record says of which kind all are."""

    def __init__(self, path: Place):
        self._path = path

    def texts(self, field: str | None) -> Iterator[bytes]:
        """Stream the text of each record."""
        names, first, content = field_names(field), True, None
        for number, record in enumerate(one for block in self._blocks() for one in block):
            where, content = self._where(number), content or _content(record)
            if content == "text":
                if field is not None:
                    raise UserError(
                        f"field={field!r} names a field, but {self._path} holds plain text; leave the field out."
                    )
                yield _checked(record, where)
            elif not record.strip():
                yield b""
            else:
                yield record_text(_fields(record, content, where), names, where, first=first)
                first = False

    def _where(self, number: int) -> str:
        return f"{self._path}, record {number}"

    def _module(self) -> Any:
        try:
            return importlib.import_module("array_record.python.array_record_module")
        except ImportError as error:
            raise UserError(
                f"Reading {self._path} needs array-record: run `pip install 'bilevel[experiments]'`."
            ) from error

    def _reader(self) -> Any:
        module = self._module()
        if not isinstance(self._path, Path) or compression_of(self._path) is not None:
            raise UserError(
                f"{self._path} is an ArrayRecord file, which is read locally and not compressed: download or unpack it."
            )
        try:
            reader = module.ArrayRecordReader(str(self._path), _OPTIONS)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        if not reader.ok():
            raise self._damaged("its end is missing")
        return reader

    def _damaged(self, why: object) -> UserError:
        found = str(why).split(";")[0]
        return UserError(f"{self._path} is not a complete ArrayRecord file ({found}); copy or write it again.")

    def _blocks(self) -> Iterator[list[bytes]]:
        """Stream the records, in lists of about 1 MiB."""
        reader, block, size = self._reader(), [], 0
        try:
            for _ in range(reader.num_records()):
                block.append(reader.read())
                size += len(block[-1])
                if size >= _BLOCK_BYTES:
                    yield block
                    block, size = [], 0
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._damaged(error) from error
        finally:
            reader.close()
        if block:
            yield block

    def fields(self) -> list[str]:
        """Return the names in the first record, or the one that plain text gets."""
        record = next((block[0] for block in self._blocks()), b"")
        content = _content(record)
        return [DEFAULT] if content == "text" else list(_fields(record, content, self._where(0)))

    def keys(self, field: str | None, flag: str = ID_FIELD) -> Iterator[Any]:
        """Stream the values of a field, None for a blank record; or the numbers of the records."""
        start, content = 0, None
        for block in self._blocks():
            content = content or _content(block[0])
            if field is not None and content == "text":
                raise UserError(f"{flag} {field} names a field, but {self._path} holds plain text; leave {flag} out.")
            if field is None:
                yield np.arange(start, start + len(block))
            else:
                yield [self._key(one, content, field, start + i, flag) for i, one in enumerate(block)]
            start += len(block)

    def _key(self, record: bytes, content: Content, field: str, number: int, flag: str) -> str | int | None:
        where = self._where(number)
        return record_key(_fields(record, content, where), field, where, flag) if record.strip() else None

    def name(self, stem: str, *, plain: bool) -> str:
        """Return the same name."""
        return stem

    def write(self, target: Path, chosen: Chosen) -> Iterator[int]:
        """Write the original records; with weights, plain text as JSON objects."""
        start, content = 0, None
        with contextlib.closing(self._writer(target)) as writer:
            for block in self._blocks():
                content = content or _content(block[0])
                kept, weights = chosen.of(start, len(block))
                for i, number in enumerate(np.flatnonzero(kept)):
                    record, where = block[number], self._where(start + int(number))
                    if weights is not None:
                        record = _weighted(record, content, chosen.weight_field, float(weights[i]), where)
                    writer.write(record)
                start += len(block)
                yield int(kept.sum())

    def _writer(self, target: Path) -> Any:
        reader = self._reader()
        options = reader.writer_options_string()
        reader.close()
        return self._module().ArrayRecordWriter(str(target), options)

    def write_columns(self, target: Path, blocks: Iterable[Mapping[str, Any]]) -> Iterator[int]:
        """Write a JSON object for each row."""
        with contextlib.closing(self._writer(target)) as writer:
            for block in blocks:
                lines = json_lines(block)
                for line in lines:
                    writer.write(line.rstrip(b"\n"))
                yield len(lines)


def _content(record: bytes) -> Content:
    """Return what a record is: its bytes say so."""
    if record.lstrip()[:1] == b"{":
        try:
            return "json" if isinstance(json.loads(record), dict) else "text"
        except ValueError:
            pass
    try:
        found = None if not record.startswith(b"\n") else _example(record)
    except UserError:  # plain text may begin with a line end
        found = None
    return "example" if found else "text"


def _fields(record: bytes, content: Content, where: str) -> Mapping[str, Any]:
    return json_object(record, where) if content == "json" else _example(record, where)


def _parsed(record: bytes, where: str = "the record") -> Any:
    try:
        messages: Any = importlib.import_module("tensorflow_datasets.proto").tf_example_pb2
    except ImportError as error:
        raise UserError(
            f"{where} is a tf.train.Example, which needs tensorflow-datasets: run `pip install 'bilevel[experiments]'`."
        ) from error
    try:
        return messages.Example.FromString(record)
    except Exception as error:  # protobuf's own, of which there are several implementations
        raise UserError(f"{where} is not a tf.train.Example; write the file again.") from error


def _example(record: bytes, where: str = "the record") -> dict[str, Any]:
    """Return the features of a `tf.train.Example`; "meta/text" is the field text of the field meta."""
    fields: dict[str, Any] = {}
    for name, feature in _parsed(record, where).features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        *outer, last = name.split("/")
        inside = fields
        for part in outer:
            inside = inside.setdefault(part, {})
        inside[last] = values[0] if len(values) == 1 else values or None
    return fields


def _checked(record: bytes, where: str) -> bytes:
    try:
        record.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is neither UTF-8 text (byte {error.start + 1}), JSON nor a tf.train.Example."
        ) from error
    return record if record.strip() else b""


def _weighted(record: bytes, content: Content, name: str, weight: float, where: str) -> bytes:
    if content == "text":
        return json_line({DEFAULT: record.decode(), name: rounded(weight)}).rstrip(b"\n")
    if content == "json":
        return with_number(record, name, weight, where).rstrip(b"\n")
    example = _parsed(record, where)
    if name in example.features.feature:
        raise UserError(
            f"{where}: there is a feature {name!r} already; give the weights another name (--weight-field)."
        )
    example.features.feature[name].float_list.value.append(weight)
    return example.SerializeToString(deterministic=True)
