"""Parquet files and other files that appear in one piece, and the settings that a directory was made with."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bilevel import files
from bilevel.training.run_dir import flatten, write_atomically
from bilevel.types import UserError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise SystemExit("error: the selection needs pyarrow: pip install 'bilevel[experiments]'") from missing

SETTINGS_NAME = "settings.json"
READ_ROWS = 1 << 17
_METADATA = b"bilevel"
_ABANDONED = 3600.0  # seconds without a write after which the temporary file of a killed process is removed
_TOUCHED = 600.0
_SHOWN = 60


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A temporary path next to `target` that is renamed to it at the end, or removed if something is raised.

    Raises:
      UserError: if it cannot be written.
    """
    with files.appearing(target) as temporary, _kept_fresh(temporary):
        yield temporary


@contextlib.contextmanager
def _kept_fresh(path: Path) -> Iterator[None]:
    """Touches a file now and then, however seldom there is something to write, so that it does not look abandoned."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCHED):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_folder(folder: Path, flag: str) -> None:
    """Creates a folder, or removes from it what killed processes left an hour ago or earlier.

    Raises:
      UserError: if that fails; `flag` is named as what to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}): give another {flag}.") from error
    for path in folder.glob(".[0-9][0-9][0-9][0-9][0-9]-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def check_settings(folder: Path, settings: Mapping[str, Any], flag: str) -> bool:
    """Compares settings with those that a folder was made with.

    Args:
      folder: holds `settings.json`, or not yet.
      settings: what JSON can hold.
      flag: named as what to change.

    Returns:
      Whether the folder has settings.

    Raises:
      UserError: if they differ.
    """
    file = folder / SETTINGS_NAME
    try:
        before = flatten(json.loads(file.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"Cannot read the settings in {file} ({error}): repair it, or give another {flag}.") from error
    now = flatten(settings)
    differing = [f"{name} was {_show(before, name)}, now {_show(now, name)}" for name in {**before, **now}
                 if before.get(name) != now.get(name)]  # fmt: skip
    if any(before.get(name) not in (None, value) for name, value in now.items() if name.endswith("version")):
        raise UserError(f"{folder} was made by another version of this command: give another {flag}.")
    if differing:
        raise UserError(
            f"{folder} was made with other settings ({'; '.join(differing[:3])}): "
            f"give another {flag}, or the same settings to continue."
        )
    return True


def write_settings(folder: Path, settings: Mapping[str, Any], flag: str) -> None:
    """Notes the settings that a folder is made with, or compares them with those noted; as `check_settings`."""
    if not check_settings(folder, settings, flag):
        write_atomically(folder / SETTINGS_NAME, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _show(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name], ensure_ascii=False) if name in settings else "absent"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


@contextlib.contextmanager
def writing(target: Path, schema: pa.Schema, metadata: Mapping[str, Any]) -> Iterator[pq.ParquetWriter]:
    """A writer of a Parquet file that appears in one piece, with metadata that `metadata_of` reads.

    The metadata may be filled in until the end.

    Raises:
      UserError: if it cannot be written.
    """
    with appearing(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield writer
        writer.add_key_value_metadata({_METADATA: json.dumps(metadata).encode()})


def metadata_of(file: Path) -> dict[str, Any] | None:
    """What `writing` noted in a Parquet file; None if there is none, or a damaged one."""
    try:
        return json.loads(pq.read_metadata(file).metadata[_METADATA])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def read_batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Streams columns of a Parquet file, READ_ROWS rows at a time (the last ones excepted).

    Raises:
      UserError: if it is damaged.
    """
    try:
        with pq.ParquetFile(file) as stored:
            yield from stored.iter_batches(READ_ROWS, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and give the same command again.") from error
