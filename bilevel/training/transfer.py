"""What a sampler drew and what it learned, in files for other runs on the same data.

Row numbers mean something for one data set only, so that its number of rows and its content hash are stored and compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.files import load_metadata, load_tree, save_tree
from bilevel.types import UserError

_KIND, _HASH, _ROWS = "kind", "content_hash", "num_rows"
_SEQUENCE, _PARAMS = "sequence of row numbers", "learned sampler"


def save_sequence(path: str | Path, sequence: Any, *, content_hash: str, num_rows: int) -> None:
    """Write the row numbers of a run to a safetensors file, in one piece.

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
    save_tree(path, {"sequence": rows.astype(np.int32)}, _about(_SEQUENCE, content_hash, num_rows))


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
    _check(Path(path), _SEQUENCE, content_hash, num_rows)
    found, _ = load_tree(path)
    return np.asarray(found["sequence"], np.int32)


def save_sampler(path: str | Path, params: Any, *, content_hash: str, num_rows: int) -> None:
    """Write a learned sampler's parameters, `state.sampler.params`, to a safetensors file.

    Args:
        path: the file; its folder must exist.
        params: a pytree of arrays.
        content_hash: as for `save_sequence`.
        num_rows: likewise.

    Raises:
        UserError: the file cannot be written.
    """
    save_tree(path, params, _about(_PARAMS, content_hash, num_rows))


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
    _check(Path(path), _PARAMS, content_hash, num_rows)
    return load_tree(path, template)[0]


def _about(kind: str, content_hash: str, num_rows: int) -> dict[str, str]:
    return {_KIND: kind, _HASH: content_hash, _ROWS: str(num_rows)}


def _check(path: Path, kind: str, content_hash: str | None, num_rows: int) -> None:
    about = load_metadata(path)
    found, stored, rows = (about.get(name, "") for name in (_KIND, _HASH, _ROWS))
    if found != kind:
        raise UserError(f"{path} holds {f'a {found}' if found else 'other arrays'}, not a {kind}; give another file.")
    if rows != str(num_rows):
        raise UserError(
            f"The {kind} in {path} belongs to data with {rows} rows, and the data at hand have {num_rows}: give the data that "
            "it was made with."
        )
    if content_hash is not None and stored != content_hash:
        raise UserError(
            f"The {kind} in {path} belongs to data with the content hash {stored}, and the data at hand have {content_hash}: "
            "its row numbers mean other rows here; give the data that it was made with."
        )
