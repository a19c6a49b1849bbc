"""Folders of packed data: a manifest, and arrays that stay on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError


@dataclass(frozen=True)
class PackedFolder:
    """A folder whose manifest was read."""

    folder: Path
    manifest: Mapping[str, Any]
    """What was packed; it has source, content_hash and format_version, and what the kind of data adds."""

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.manifest["source"]

    @property
    def content_hash(self) -> str:
        """A digest of all that a row holds."""
        return self.manifest["content_hash"]

    def array(self, name: str, dtype: Any, *shape: int) -> NDArray[Any]:
        """Map an array from disk.

        Raises:
            ValueError: it has another type or shape.
        """
        path = self.folder / f"{name}.npy"
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path.name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}{list(shape)}")
        return np.asarray(array)


@contextlib.contextmanager
def packed_folder(folder: Path, what: str, version: int) -> Iterator[PackedFolder]:
    """Read the manifest of a packed folder, and say in one sentence what is wrong with the folder.

    Args:
        folder: with `manifest.json`.
        what: "pairs", "text", … for the message.
        version: the format version that it must have.

    Raises:
        UserError: a file is missing, damaged, or of another version, found here or inside the `with`.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["format_version"] != version:
            raise ValueError(f"its format version is {manifest['format_version']}, not {version}")
        yield PackedFolder(folder, manifest)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The folder {folder} of packed {what} is damaged ("
            f"{type(error).__name__}: {error}); remove the folder and pack again."
        ) from error
