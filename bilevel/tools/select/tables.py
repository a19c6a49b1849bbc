"""Parquet files that appear in one piece, and the settings that a folder was made with."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bilevel.files import appearing
from bilevel.study.files import read_json, write_json
from bilevel.training.run_dir import flatten
from bilevel.types import UserError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise UserError("The selection needs pyarrow: pip install 'bilevel[experiments]'.") from missing

_METADATA = b"bilevel"
_ABANDONED = 86_400.0  # seconds without a write after which the temporary file of a killed process is removed
_SHOWN = 60


def make_folder(folder: Path, flag: str) -> None:
    """Create a folder (on failure, `flag` is what to change), or remove from it what killed processes left a day ago."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}): give another {flag}.") from error
    for path in folder.glob(".[0-9][0-9][0-9][0-9][0-9]-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def check_settings(folder: Path, settings: Mapping[str, Any], flag: str, write: bool = False) -> None:
    """Compare settings with those that a folder was made with; if it has none, note them there (with `write`).

    Raises:
      UserError: if they differ; `flag` is named as what to change.
    """
    file = folder / "settings.json"
    if not file.exists():
        if write:
            write_json(file, settings)
        return
    before, now = flatten(read_json(file)), flatten(settings)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        shown = [{name: json.dumps(x.get(name, "absent"))[:_SHOWN] for name in names[:3]} for x in (before, now)]
        differing = "; ".join(f"{name} was {shown[0][name]}, now {shown[1][name]}" for name in names[:3])
        raise UserError(
            f"{folder} was made with other settings ({differing}): give another {flag}, or the same settings to continue."
        )


@contextlib.contextmanager
def writing(target: Path, schema: pa.Schema, metadata: Mapping[str, Any]) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of a Parquet file that appears in one piece, with metadata for `metadata_of`."""
    with appearing(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield writer
        writer.add_key_value_metadata({_METADATA: json.dumps(metadata).encode()})


def metadata_of(file: Path) -> dict[str, Any] | None:
    """Return what `writing` noted in a Parquet file; None if there is none, or a damaged one."""
    try:
        return json.loads(pq.read_metadata(file).metadata[_METADATA])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
