"""Folders that Hugging Face `datasets` saved: Arrow streams, and which of them belong to the data."""

from __future__ import annotations

import json
from typing import Any

from bilevel.data.opening import Place, entries_in, exists, name_of, open_bytes, read_errors
from bilevel.types import UserError

INFO = "dataset_info.json"
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_files(folder: Place) -> list[Place] | None:
    """Return the Arrow files of a saved data set in their order; None if the folder is none.

    Raises:
        UserError: it holds several splits, or a file is missing or damaged.
    """
    if (splits := saved_splits(folder)) is not None:
        raise UserError(
            f"{folder} is a saved data set with the splits {', '.join(splits)}: name one of them, as in {folder}/{splits[0]}."
        )
    if exists(inside(folder, _STATE)):
        names = [entry["filename"] for entry in read_json_file(inside(folder, _STATE)).get("_data_files") or ()]
        files = [inside(folder, name) for name in names]
        if missing := [file for file in files if not exists(file)]:
            raise UserError(
                f"The file {missing[0]}, which {folder}/{_STATE} names, does not exist; copy the folder again."
            )
        return files
    if exists(inside(folder, INFO)):
        return [file for file in entries_in(folder) if name_of(file).endswith(".arrow")] or None
    return None


def saved_splits(folder: Place) -> list[str] | None:
    """Return the names of the splits of a saved `DatasetDict`, each in a folder; None if it is none."""
    file = inside(folder, _SPLITS)
    return list(read_json_file(file).get("splits") or ()) if exists(file) else None


def inside(folder: Place, name: str) -> Place:
    """Return what is called `name` in a folder."""
    return f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else folder / name


def read_json_file(file: Place) -> dict[str, Any]:
    """Read a JSON object; a UserError says that it is damaged."""
    try:
        with read_errors(file), open_bytes(file) as stream:
            found = json.loads(stream.read())
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy the folder again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object; copy the folder again.")
    return found
