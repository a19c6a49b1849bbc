"""A number for each example of a data set, such as its irreducible loss, kept in a file that knows which data it is of."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from bilevel.files import load_tree, save_tree
from bilevel.types import Array, UserError

Settings = Mapping[str, Any]
"""What the numbers depend on besides the rows, as JSON values: the model, its training, the loss."""


@dataclass(frozen=True, eq=False)
class LossTable:
    """A number for each example of one data set."""

    losses: NDArray[np.float32]
    """`[N]`, by example id; NaN where an example was not scored."""
    content_hash: str
    """That of the data set."""
    settings: Settings

    def params(self) -> dict[str, Array]:
        """The parameters of `scoring.rho_loss`, `irreducible_loss` and `by_id`."""
        return {"table": jnp.asarray(self.losses)}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
          UserError: it cannot be written.
        """
        path = Path(path)
        with contextlib.suppress(OSError):  # writing says what is wrong
            path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dict(self.settings), sort_keys=True)
        save_tree(path, {"losses": self.losses}, {"content_hash": self.content_hash, "settings": settings})

    @classmethod
    def load(cls, path: str | Path, *, content_hash: str, settings: Settings | None) -> LossTable:
        """Read a table, if it is of these rows and settings.

        Args:
          path: of the file.
          content_hash: of the data set.
          settings: those asked for; None takes any, such as those of a table from elsewhere.

        Raises:
          UserError: the file is missing or no table, or belongs to other data or other settings.
        """
        table = _read(Path(path))
        if table.content_hash != content_hash:
            raise UserError(
                f"The table {path} holds losses of data with the content hash {table.content_hash}, but these data have "
                f"{content_hash}: score these data, or give those."
            )
        if settings is None:
            return table
        wanted = json.loads(json.dumps(dict(settings)))
        differing = [k for k in sorted({*wanted, *table.settings}) if wanted.get(k) != table.settings.get(k)]
        if differing:
            found = ", ".join(f"{k}={table.settings.get(k)!r} instead of {wanted.get(k)!r}" for k in differing)
            raise UserError(f"The table {path} was made with {found}: score the data again, or ask for its settings.")
        return table


def _read(path: Path) -> LossTable:
    if not path.exists():
        raise UserError(f"There is no table of losses at {path}: score the data first, or check the path.")
    arrays, about = load_tree(path)
    try:
        losses, settings = arrays["losses"], json.loads(about["settings"])
        if losses.ndim != 1 or losses.dtype.kind != "f":
            raise ValueError(f"its losses are {losses.dtype}{list(losses.shape)}, not real numbers by row")
        return LossTable(losses.astype(np.float32), about["content_hash"], settings)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not a table of losses ({error}): delete it, and score the data again.") from error


def combine(one: LossTable, other: LossTable) -> LossTable:
    """One table of two that hold different examples of the same data.

    Raises:
      UserError: the tables are of different data or settings, or both hold a number for an example.
    """
    if (one.content_hash, one.losses.shape) != (other.content_hash, other.losses.shape):
        raise UserError(
            f"Two tables are of different data: {one.content_hash} with {len(one.losses)} examples and "
            f"{other.content_hash} with {len(other.losses)}; score the same data."
        )
    if dict(one.settings) != dict(other.settings):
        raise UserError(
            f"Two tables were made with different settings, {dict(one.settings)} and {dict(other.settings)}: make them equal."
        )
    both = np.isfinite(one.losses) & np.isfinite(other.losses)
    if both.any():
        raise UserError(
            f"{both.sum()} examples are in both tables, the first is {int(np.flatnonzero(both)[0])}: score each only once, "
            "by the model that was not trained on it."
        )
    return LossTable(np.where(np.isfinite(one.losses), one.losses, other.losses), one.content_hash, one.settings)


def highest(table: LossTable, count: int) -> NDArray[np.int64]:
    """The ids of the `count` examples with the largest numbers, in order of id: a subset chosen before training starts.

    Of equal numbers the smaller id is taken. `RowView(dataset, highest(table, count))` is the subset.

    Raises:
      UserError: the table holds fewer numbers.
    """
    known = int(np.isfinite(table.losses).sum())
    if not 0 < count <= known:
        raise UserError(f"highest(count={count}): the table holds {known} numbers; ask for 1 to {known}.")
    order = np.argsort(-table.losses, kind="stable")  # NaN, without a number, comes last
    return np.sort(order[:count])


def highest_fraction(table: LossTable, fraction: float) -> NDArray[np.int64]:
    """The ids of a share of the examples that have a number, at least of one: those with the largest; see `highest`.

    Raises:
      UserError: a share outside (0, 1], or a table without numbers.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"highest_fraction(fraction={fraction}) must lie in (0, 1].")
    return highest(table, max(1, round(fraction * int(np.isfinite(table.losses).sum()))))
