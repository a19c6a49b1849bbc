"""Folders that are computed once: they appear in one piece, whoever is killed or computes them at the same time."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bilevel.files import user_path
from bilevel.types import UserError

T = TypeVar("T")

_ATTEMPTS = 5
_ABANDONED = 24 * 3600.0  # seconds after which the temporary folder of a killed process is removed
_TEMPORARY = ".packing-"


def cached_folder(folder: Path, opened: Callable[[Path], T], write: Callable[[Path], None], *, work: str) -> T:
    """Open a folder of the cache; write it first if it is missing or damaged.

    A killed process leaves only a temporary folder, which is removed a day later; of several processes that write at once one
    publishes its result.

    Args:
        folder: where the result is to be, in a cache folder that is made if it does not exist; `~` is the home folder.
        opened: opens the result; raises a UserError if it is damaged.
        write: fills an empty folder.
        work: what is done, for messages, such as "Packing my.txt".

    Returns:
        What `opened` returns.

    Raises:
        UserError: the cache cannot be written, or as `write`.
    """
    folder = user_path(folder.parent) / folder.name
    if (found := _open_if_sound(folder, opened)) is not None:
        return found
    cache_dir = folder.parent
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        temporary = _temporary_folder(cache_dir)
    except OSError as error:
        raise UserError(
            f"The cache folder {cache_dir} cannot be written ({error}); choose another one with --data.cache-dir."
        ) from error
    try:
        write(temporary)
        return _publish(temporary, folder, opened)
    except OSError as error:
        raise UserError(
            f"{work} into {cache_dir} failed ({error}); correct this, or choose another cache folder with --data.cache-dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already, unless something failed


def _open_if_sound(folder: Path, opened: Callable[[Path], T]) -> T | None:
    if not folder.exists():
        return None
    try:
        return opened(folder)
    except UserError:
        return None


def _publish(temporary: Path, folder: Path, opened: Callable[[Path], T]) -> T:
    """Rename `temporary` to `folder`, unless another process has put a sound one there in the meantime."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):  # it exists, or another process is moving it: look again
            temporary.rename(folder)
        if (found := _open_if_sound(folder, opened)) is not None:
            return found
        if folder.exists():
            # Damaged. Moved away first, because removing takes time; a process that has it open keeps its
            # files.
            discarded = _temporary_folder(folder.parent)
            with contextlib.suppress(OSError):
                os.replace(folder, discarded / "damaged")
            shutil.rmtree(discarded, ignore_errors=True)
    raise UserError(
        f"The result could not be moved to {folder}; remove that folder, or choose another cache folder with --data.cache-dir."
    )


def _temporary_folder(parent: Path) -> Path:
    folder = parent / f"{_TEMPORARY}{uuid.uuid4().hex}"  # not mkdtemp, whose folders nobody else can read
    folder.mkdir()
    return folder


def _remove_abandoned(cache_dir: Path) -> None:
    for path in cache_dir.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
