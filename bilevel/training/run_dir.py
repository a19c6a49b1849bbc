"""The directory of a run: its settings, and a lock against a second process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import yaml
from filelock import Timeout, UnixFileLock, WindowsFileLock

from bilevel.files import appearing
from bilevel.types import UserError

CONFIG_NAME = "config.yaml"
FORMAT = 1
"""Version of what run directories hold; changed whenever an older one cannot be continued."""
_FORMAT_KEY = "format"
_LOCK_NAME = ".lock"
_SHOWN = 3
_SPECIAL = "[]*?\\" if os.sep == "/" else "[]"
"""What patterns of file names give a meaning: Orbax finds the parts of a checkpoint by a pattern that begins with its path."""


def check_path(path: str | Path, flag: str = "--run-dir") -> None:
    """Refuse a directory from which checkpoints could not be read again.

    Raises:
        UserError: the absolute path has a character that patterns of file names give a meaning, or is not UTF-8.
    """
    whole = str(Path(path).absolute())
    special = next((letter for letter in whole if letter in _SPECIAL or "\ud800" <= letter <= "\udfff"), None)
    if special is not None:
        shown = special if special in _SPECIAL else "that is not UTF-8"
        raise UserError(
            f"The path {whole} holds a character ({shown}) with which checkpoints could not be read again: give a {flag} "
            f"in UTF-8 without any of {' '.join(_SPECIAL)}"
        )


def prepare_run_dir(
    path: str | Path,
    config: Mapping[str, Any],
    *,
    may_change: Collection[str] = (),
    flag: str = "--run-dir",
) -> Path:
    """Create the directory of a run and write its settings to `config.yaml`, or compare them with it.

    Settings with which nothing was saved (the run was refused, or stopped before its first row of metrics) are replaced.
    Only process 0 of a multi-process run touches the disk.

    Args:
        path: the run directory.
        config: the settings; nested mappings are compared by dotted names such as `model.width`. Values that
            JSON does not have (paths, types) are stored as text. The name `format` is taken.
        may_change: dotted names of settings that may differ when the run continues (the number of steps, how
            often to log); a name also covers everything below it.
        flag: that gave the path, for messages.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: the directory cannot be written, is in use, or holds a run with other settings or of another format.
    """
    path = Path(path)
    if _FORMAT_KEY in config:
        raise UserError(
            f"The settings for {path} hold {_FORMAT_KEY!r}, which is the version of the directory: rename it."
        )
    if jax.process_index() != 0:
        return path
    settings = json.loads(json.dumps(config, default=str))
    with hold_run_dir(path, flag):
        if (path / CONFIG_NAME).exists() and anything_saved(path):
            _check_same(path, read_settings(path), settings, may_change, flag)
        text = yaml.safe_dump({_FORMAT_KEY: FORMAT, **settings}, sort_keys=False, allow_unicode=True)
        write_atomically(path / CONFIG_NAME, text)
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that `prepare_run_dir` wrote to a run directory.

    Raises:
        UserError: they cannot be read, or are of another format.
    """
    file = path / CONFIG_NAME
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it does not hold names and values")
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"Cannot read the settings in {file} ({found}): repair it, or give another run.") from error
    if (found := settings.pop(_FORMAT_KEY, None)) != FORMAT:
        raise UserError(
            f"{path} holds a run of the format {found}, and this version of bilevel reads the format {FORMAT}: give another "
            "--run-dir, or use the version that began the run."
        )
    return settings


@contextlib.contextmanager
def hold_run_dir(path: Path, flag: str = "--run-dir") -> Iterator[None]:
    """Hold the lock of a run directory (created if needed); it is released however the process dies.

    Args:
        path: the directory.
        flag: that gave it, for messages.

    Raises:
        UserError: another process holds it, or the directory cannot be written, or has a path that checkpoints cannot have.
    """
    check_path(path, flag)
    # Not FileLock: without fcntl it is a lock that a killed process leaves.
    kind = WindowsFileLock if sys.platform == "win32" else UnixFileLock
    lock = kind(path / _LOCK_NAME, timeout=0.0, fallback_to_soft=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / _LOCK_NAME).touch()
    except OSError as error:
        raise UserError(f"Cannot write to the run directory {path} ({error.strerror}): give another {flag}.") from error
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"Another process is running in {path}: wait for its end, stop it, or give another {flag}."
        ) from error
    except (OSError, NotImplementedError) as error:  # some network file systems, and some Pythons, have no locks
        why = getattr(error, "strerror", None) or "this Python has no fcntl"
        print(f"warning: {path} cannot be locked ({why}): start no second process there.", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by `text`; a reader (or a crash) sees the old content or the new, never a part.

    Raises:
        UserError: the file cannot be written.
    """
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


def write_json(file: Path, value: Any) -> None:
    """Write a file of a run directory in one piece; only process 0 writes."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(value, indent=2) + "\n")


def read_json(file: Path) -> Any:
    """Read a file of a run directory.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the same command again.") from error


def recorded(path: Path) -> dict[str, Any]:
    """Return the settings that a run was begun with; {} where nothing was saved."""
    return read_settings(path) if (path / CONFIG_NAME).exists() and anything_saved(path) else {}


def anything_saved(path: Path) -> bool:
    """Whether the directory holds more than settings: a file that is not empty, at any depth."""
    own = (path / CONFIG_NAME, path / _LOCK_NAME)
    return any(file.is_file() and file not in own and file.stat().st_size > 0 for file in path.rglob("*"))


def _check_same(
    path: Path, before: dict[str, Any], settings: dict[str, Any], may_change: Collection[str], flag: str
) -> None:
    old, new = flatten(before), flatten(settings)
    names = [*new, *(name for name in old if name not in new)]
    differing = [
        f"{name} was {_show(old, name)}, now {_show(new, name)}"
        for name in names
        if old.get(name, _ABSENT) != new.get(name, _ABSENT) and not _covered(name, may_change)
    ]
    if differing:
        shown = "; ".join(differing[:_SHOWN])
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"{path} holds a run with other settings ({shown}{more}): "
            f"give another {flag}, or the same settings to continue that run."
        )


_ABSENT = object()


def _show(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "absent"


def _covered(name: str, may_change: Collection[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in may_change)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
