"""What a sampler drew and what it learned, in files for other runs on the same data.

Row numbers mean something for one data set only, so that its number of rows and its content hash are stored and compared.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.files import appearing
from bilevel.training.leaves import from_table, to_table
from bilevel.types import UserError

_KIND, _HASH, _ROWS = "kind", "content_hash", "num_rows"
_SEQUENCE, _PARAMS = "sequence of row numbers", "learned sampler"


def save_sequence(path: str | Path, sequence: Any, *, content_hash: str, num_rows: int) -> None:
    """Write the row numbers of a run to an `.npz` file; a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        sequence: integers `[steps, b]`, such as the metric `selected` of all steps.
        content_hash: of the rows that they count (`bilevel.data.rows_hash`).
        num_rows: N, how many these are.

    Raises:
        UserError: the sequence has another shape or type, or the file cannot be written.
    """
    rows = np.asarray(sequence)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise UserError(
            f"The sequence has the shape {rows.shape} and the type {rows.dtype}; it must be integers [steps, batch_size]."
        )
    _save(Path(path), _SEQUENCE, {"sequence": rows.astype(np.int32)}, content_hash, num_rows)


def load_sequence(path: str | Path, *, content_hash: str | None, num_rows: int) -> NDArray[np.int32]:
    """Read what `save_sequence` wrote, for `bilevel.samplers.replayed`.

    Args:
        path: the file.
        content_hash: of the data at hand; None takes what belongs to other data with as many rows, such as the same images
            with other labels.
        num_rows: N, of the data at hand.

    Returns:
        int32 `[steps, b]`.

    Raises:
        UserError: the file cannot be read, is no such file, or belongs to other data.
    """
    found = _load(Path(path), _SEQUENCE, content_hash, num_rows)
    return np.asarray(found["sequence"], np.int32)


def save_sampler(path: str | Path, params: Any, *, content_hash: str, num_rows: int) -> None:
    """Write a learned sampler's parameters, `state.sampler.params`, to an `.npz` file.

    Args:
        path: the file; its folder must exist.
        params: a pytree of arrays.
        content_hash: as for `save_sequence`.
        num_rows: likewise.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in to_table(params).items()}
    _save(Path(path), _PARAMS, arrays, content_hash, num_rows)


def load_sampler(path: str | Path, template: Any, *, content_hash: str | None, num_rows: int) -> Any:
    """Read what `save_sampler` wrote, for the `sampler_params` of a sampled run.

    Args:
        path: the file.
        template: parameters of a sampler with the same sizes, or their shapes:
            `jax.eval_shape(sampler.init, key).params`.
        content_hash: as for `load_sequence`.
        num_rows: likewise.

    Returns:
        The parameters, in the tree of the template.

    Raises:
        UserError: as `load_sequence`, and if a shape or a type differs from the template's.
    """
    found, wanted = _load(Path(path), _PARAMS, content_hash, num_rows), _shapes(template)
    for name in {**wanted, **found}:
        have = None if name not in found else (found[name].shape, found[name].dtype)
        if have != wanted.get(name):
            raise UserError(
                f"The sampler in {path} does not fit: its {name} is {have}, and {wanted.get(name)} is needed; "
                "use the settings that it was learned with."
            )
    return from_table(found, template)


def _shapes(template: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(template)
    return {jax.tree_util.keystr(path): (leaf.shape, np.dtype(leaf.dtype)) for path, leaf in leaves}


def _save(path: Path, kind: str, arrays: Mapping[str, NDArray[Any]], content_hash: str, num_rows: int) -> None:
    about = {_KIND: np.array(kind), _HASH: np.array(content_hash), _ROWS: np.array(num_rows)}
    table: dict[str, Any] = {**about, **arrays}
    with appearing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **table)


def _load(path: Path, kind: str, content_hash: str | None, num_rows: int) -> dict[str, NDArray[Any]]:
    if not path.exists():
        raise UserError(f"The file {path} does not exist; check the path (it is taken relative to {Path.cwd()}).")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        found, stored, rows = str(arrays.pop(_KIND)), str(arrays.pop(_HASH)), int(arrays.pop(_ROWS))
    except (ValueError, KeyError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a {kind} ({error}); write it again.") from error
    if found != kind:
        raise UserError(f"{path} holds a {found}, not a {kind}; give another file.")
    if rows != num_rows:
        raise UserError(
            f"The {kind} in {path} belongs to data with {rows} rows, and the data at hand have {num_rows}: give the data that "
            "it was made with."
        )
    if content_hash is not None and stored != content_hash:
        raise UserError(
            f"The {kind} in {path} belongs to data with the content hash {stored}, and the data at hand have {content_hash}: "
            "its row numbers mean other rows here; give the data that it was made with."
        )
    return arrays
