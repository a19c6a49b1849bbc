"""Files that appear in one piece, and parameter trees in safetensors files."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.types import UserError

_ABANDONED = 86_400.0


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` at the end, or is removed if something is raised.

    A reader, or a crash, sees the old file or the new, never a part.

    Raises:
        UserError: instead of an OSError, in writing too.
    """
    # Not the process's number: two containers that share a disk may have the same one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}): check the permissions and the free space there."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that nobody has written to for a day: their processes were killed."""
    for path in folder.glob(".*.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def user_path(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder, which users in containers may not have.

    Raises:
        UserError: there is none.
    """
    found = os.path.expanduser(path)
    if found == str(path) and Path(path).parts[:1] == ("~",):
        raise UserError(
            f"There is no home folder for {path}: set HOME, or give a path without ~ (for the cache, --data.cache-dir)."
        )
    return Path(found)


def save_tree(path: str | Path, tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of arrays to a safetensors file, in one piece.

    The array at `tree["block_1"]["mlp"]["kernel"]` is stored as `block_1/mlp/kernel`; attributes and positions count as names
    too. Any reader of safetensors can open the file, torch's included.

    Args:
        path: the file; its folder must exist.
        tree: a pytree of arrays.
        metadata: texts for the header of the file.

    Raises:
        UserError: the file cannot be written, or the tree holds what the format cannot store, such as text.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, leaf in _named(tree):
        if name in arrays:
            raise UserError(f"Two arrays for {path} are called {name}: give them names without a slash.")
        arrays[name] = np.asarray(leaf, order="C")
    save_arrays(Path(path), arrays, metadata)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
    """Write contiguous arrays to a safetensors file under their names, in one piece; errors as `save_tree`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with appearing(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(dict(arrays), temporary, dict(metadata or {}))
            temporary.chmod(mode)  # safetensors makes files that nobody else can read
    except SafetensorError as error:
        raise UserError(f"Cannot write {path}: {error}.") from error


def load_tree(path: str | Path, template: Any = None) -> tuple[Any, dict[str, str]]:
    """Read what `save_tree` wrote.

    Args:
        path: the file.
        template: a tree of arrays, or of their shapes (`jax.eval_shape`), which the stored ones must equal in names, shapes and
            types.

    Returns:
        The tree and the metadata. Without a template: nested dicts of numpy arrays. With one: its structure, with numpy arrays
        where it has these, and jax arrays elsewhere.

    Raises:
        UserError: the file is missing, damaged or of another kind, or it does not fit the template; the first parameter that
            differs is named.
    """
    arrays, metadata = read_arrays(path), load_metadata(path)
    if template is None:
        return _nested(arrays), metadata
    wanted = dict(_named(template))
    for name in [*wanted, *(name for name in arrays if name not in wanted)]:
        found, needed = _described(arrays.get(name)), _described(wanted.get(name))
        if found != needed:
            raise UserError(
                f"{path} does not fit: its parameter {name} is {found or 'missing'}, and {needed or 'none'} is needed; use the "
                "settings that it was made with."
            )
    leaves = [_like(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), metadata


def read_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a safetensors file by name; errors as `load_tree`."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata alone of what `save_tree` wrote.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise UserError(f"The file {path} does not exist; check the path (it is taken relative to {Path.cwd()}).")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file ({error}); write it again.") from error


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _nested(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = array
    return tree


def _described(leaf: Any) -> str | None:
    if leaf is None:
        return None
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"


def _like(array: NDArray[Any], leaf: Any) -> Any:
    return array if isinstance(leaf, np.ndarray) else jnp.array(array)
