"""Disjoint sets of rows, cut one before the other from the end of an order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.permutation import permute
from bilevel.types import UserError

FLAGS = {"specific": "--data.specific-rows", "held_out": "--data.held-out", "test": "--data.test"}
"""Of the commands, for the sizes of sets."""


@dataclass(frozen=True)
class Order:
    """The order of rows before sets are cut from its end."""

    split: Literal["last", "random"]
    seed: int

    def __post_init__(self) -> None:
        if self.split not in ("last", "random"):
            raise UserError(f"split={self.split!r} is not known; it must be 'last' or 'random'.")
        if self.seed < 0:
            raise UserError(f"The seed is {self.seed}; it must not be negative.")

    def cut(
        self, count: int, sizes: Mapping[str, float], name: str, *, rest: str
    ) -> tuple[dict[str, NDArray[np.int64]], str]:
        """Cut sets from the end of `count` rows; the others are the set `rest`, which may be empty.

        Args:
            count: number of rows.
            sizes: for each set its rows, or their share if below 1; the first one is cut first.
            name: of the rows, for messages.
            rest: name of the set of the others; "" leaves them out.

        Returns:
            The row numbers of each set that is not empty, increasing; and a sentence that says where they come from.

        Raises:
            UserError: the sets are larger than `count`, or a size is no number of rows.
        """
        order = np.arange(count)
        order = permute(order, count, self.seed) if self.split == "random" else order
        found: dict[str, NDArray[np.int64]] = {}
        said: list[str] = []
        end = count
        for what, wanted in sizes.items():
            rows = _number(what, wanted, count, name)
            if rows > end:
                asked = ", ".join(f"{what}={wanted:g}" for what, wanted in sizes.items())
                raise UserError(
                    f"{name}: {count} rows are too few for {asked}; ask for fewer ({flags_of(sizes)}), or give more data."
                )
            found[what] = np.sort(order[end - rows : end])
            where = f"before {_words(list(found)[-2])}" if len(found) > 1 else "the last"
            said.append(f"{where} {rows} are {_words(what)}")
            end -= rows
        if rest and end:
            found[rest] = np.sort(order[:end])
            said.append(f"{'the other' if sizes else 'all'} {end} are {_words(rest)}")
        how = f" (in a random order of seed {self.seed})" if self.split == "random" and sizes else ""
        return found, f"of the {count} rows of {name}{how} {', '.join(said)}"


def flags_of(sets: Iterable[str]) -> str:
    """Return the flags of the sizes of sets, as words."""
    return ", ".join(FLAGS.get(name, name) for name in sets)


def _number(what: str, wanted: float, count: int, name: str) -> int:
    whole = float(wanted).is_integer()  # neither NaN nor ∞ is
    rows = int(wanted) if whole else round(wanted * count) if wanted < 1 else 0
    if rows < 1:
        raise UserError(
            f"{name}: {what}={wanted:g} is not a number of its {count} rows; give a whole number from 1, or a share "
            f"between 0 and 1 that comes to a row or more ({flags_of([what])})."
        )
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")
