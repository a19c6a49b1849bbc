"""TensorFlow Datasets, read through `tfds.data_source`: TensorFlow is not imported."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bilevel.data.digests import FIELD, Document, Source, digest
from bilevel.data.records import all_records
from bilevel.data.text.fields import field_names, record_text
from bilevel.types import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+|\d+\.\*\.\*|\d+\.\d+\.\*")
_FORM = "write tfds:NAME, tfds:NAME:SPLIT or tfds:NAME:SPLIT:FIELD"


def tfds_source(spec: str, field: str | None) -> Source:
    """The source for `tfds:NAME[:SPLIT[:FIELD]]`; NAME may hold a configuration and a version.

    A data set that is registered with tfds but not yet on disk is downloaded and prepared by tfds.

    Raises:
        UserError: an unknown name, split or field, or a package that is missing.
    """
    name, split, named = parse_spec(spec)
    if field is not None and named is not None and field != named:
        raise UserError(
            f"{spec} names the field {named!r}, but field={field!r} ({FIELD}) was given as well; give one of them."
        )
    names = field_names(named or field)
    records = open_records(spec, name, split)
    record_text(records[0], names, f"{spec}, record 0")

    def read() -> Iterator[Document]:
        for number, record in enumerate(all_records(records)):
            yield Document(record_text(record, names, f"{spec}, record {number}"))

    return Source(spec, read, lambda: identify_records(records, split, ",".join(names)))


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Split at the colons outside brackets (a split may be `train[10:20]`); a version belongs to the name."""
    parts = re.split(r":(?![^\[]*\])", spec.removeprefix("tfds:"))
    if len(parts) > 1 and _VERSION.fullmatch(parts[1]):
        parts[:2] = [":".join(parts[:2])]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"{spec!r} is not a TFDS specification; {_FORM}.")
    name, split, field = [*parts, *["train", None][len(parts) - 1 :]]
    return str(name), str(split), field


def open_records(spec: str, name: str, split: str) -> Any:
    """The records of one split, by number.

    Raises:
        UserError: an unknown name or split, or a package that is missing.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"{spec} needs tensorflow-datasets, which cannot be imported ({error}); "
            "install it with: pip install 'bilevel[experiments]'"
        ) from error
    # tfds reads the variable only when it is first imported.
    folder = os.environ.get("TFDS_DATA_DIR")
    place = folder or "the default data_dir of tfds"
    try:
        return tfds.data_source(
            name,
            split=split,
            data_dir=folder,
            builder_kwargs={"file_format": tfds.core.FileFormat.ARRAY_RECORD},
        )
    except tfds.core.DatasetNotFoundError as error:
        # The list of community data sets would import TensorFlow and look in the network.
        known = tfds.list_builders(with_community_datasets=False)
        raise UserError(_unknown(spec, name, place, known)) from error
    except ImportError as error:
        raise UserError(
            f"{spec}: preparing {name} needs a package that is not installed ({error}); install it, or all "
            "that tfds needs with: pip install 'bilevel[prepare]'"
        ) from error
    except Exception as error:  # what tfds raises while it downloads and prepares is not documented
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{spec}: tfds could not open it in {place} ({type(error).__name__}: {reason}); correct the "
            "specification, or prepare the data with tfds in the array_record format first."
        ) from error


def _unknown(spec: str, name: str, place: str, known: Sequence[str]) -> str:
    folder = Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")))
    local = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    base = re.split("[/:]", name)[0]
    close = difflib.get_close_matches(base, sorted({*known, *local}), n=3)
    if base in close:
        return f"{spec}: {place} holds no version or configuration {name!r} of {base!r}; leave it out."
    advice = f"close names are: {', '.join(close)}" if close else "no known name is close to it"
    return (
        f"{spec}: there is no data set {name!r} in tfds or in {place}; {advice}; check the name, or set "
        "TFDS_DATA_DIR to the folder that holds it."
    )


def identify_records(records: Any, split: str, key: str) -> str:
    """A digest that changes when the records may have changed; see `Source.fingerprint`."""
    info = records.dataset_info
    folder = Path(info.data_dir)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    facts = (f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)
    return digest(["tfds", info.full_name, split, key, len(records), *facts])
