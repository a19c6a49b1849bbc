"""The data of an experiment: opened, packed and split."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.data import Dataset, PackedText, RowView, open_source, open_specific, options_of, pack, rows_in_both
from bilevel.types import UserError
from experiments.language_modeling.config import Config, DataConfig

HELD_OUT_EVERY = 50
"""Of generic data that comes without a valid part, the documents with a number divisible by this are held out."""


WORTH_A_WARNING = 0.001
"""Share of held-out specific rows that may be in the generic data before the user is told."""


@dataclass(frozen=True)
class Corpora:
    """All data of one experiment, packed."""

    generic: PackedText
    generic_train: RowView
    generic_valid: RowView
    specific: Mapping[str, Dataset]
    """train, valid and test; `JoinedData` if there are several tasks."""
    task_weights: Sequence[float] | None = None
    """With several tasks: how often a specific batch comes from each, in proportion; None: all alike."""

    @property
    def content_hashes(self) -> dict[str, str]:
        """The hashes of the generic data and of each part of the specific data."""
        return {"generic": self.generic.content_hash} | {
            f"specific_{name}": part.content_hash for name, part in self.specific.items()
        }

    @property
    def shares(self) -> dict[str, float]:
        """Share of each labelled domain in the generic training rows; empty without labels."""
        return self.shares_among(self.generic_train.positions)

    def shares_among(self, rows: np.ndarray) -> dict[str, float]:
        """Share of each labelled domain among rows of the generic data; empty without labels."""
        if self.generic.labels is None:
            return {}
        counts = np.bincount(self.generic.labels[rows], minlength=len(self.generic.label_names))
        return dict(zip(self.generic.label_names, (counts / max(len(rows), 1)).tolist(), strict=True))


def load_corpora(config: Config) -> Corpora:
    """Opens, packs and splits the data.

    Raises:
      UserError: for data that is missing, broken or too small.
    """
    data, cache = config.data, Path(config.data.cache_dir).expanduser()
    generic_options, specific_options = _source_options(data)
    source = open_source(data.generic, **generic_options)
    generic = pack(source, length=config.length, cache_dir=cache, labels=data.generic_labels)
    parts = open_specific(data.specific, **specific_options)
    specific = {name: pack(part, length=config.length, cache_dir=cache) for name, part in parts.items()}
    held_out = np.asarray(generic.document) % HELD_OUT_EVERY == 0
    if not held_out.any() or held_out.all():
        count = generic.manifest["document_count"]
        raise UserError(
            f"{generic.name} has {count} documents, too few to hold some out: give more generic data, of which every "
            f"{HELD_OUT_EVERY}th document is held out, or cut it into more documents."
        )
    if jax.process_index() == 0:
        _warn_of_overlap(generic, specific)
    return Corpora(
        generic,
        RowView(generic, np.flatnonzero(~held_out)),
        RowView(generic, np.flatnonzero(held_out)),
        specific,
    )


def _warn_of_overlap(generic: PackedText, specific: Mapping[str, PackedText]) -> None:
    """Says what share of the rows that decide and report stands in the generic data, word for word."""
    for name in ("valid", "test"):
        shared = rows_in_both(generic, specific[name])
        if shared.mean() >= WORTH_A_WARNING:
            print(
                f"warning: {shared.sum():,} of {len(shared):,} rows of {specific[name].name} are also in {generic.name}: "
                f"remove those documents from one of the two, or the {name} loss is too good.",
                file=sys.stderr,
            )


def _source_options(data: DataConfig) -> list[dict[str, Any]]:
    """--data.field and --data.documents for the generic and for the specific data: where only one of them has fields, or is
    plain text, the flag concerns that one."""
    uses = [options_of(spec) for spec in (data.generic, data.specific)]
    field, documents = (any(use[i] for use in uses) for i in range(2))
    return [
        {
            "field": data.field if use.field or not field else None,
            "documents": data.documents if use.documents or not documents else "line",
        }
        for use in uses
    ]
