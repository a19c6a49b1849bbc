"""Rows that stand in two data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bilevel.data import ArrayDataset, open_source, pack, rows_in_both
from bilevel.types import UserError


def packed(folder: Path, name: str, lines: list[str], length: int):
    (folder / name).write_text("\n".join(lines) + "\n")
    return pack(open_source(str(folder / name)), length=length, cache_dir=folder / "cache")


@pytest.mark.parametrize("length", [64, 61, 40])
def test_rows_of_common_documents_are_found_and_no_others(tmp_path: Path, length: int) -> None:
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("abcdefgh "), 150)) for _ in range(300)]
    first = packed(tmp_path, "first.txt", lines[:200], length)
    second = packed(tmp_path, "second.txt", [*lines[250:], lines[7], *lines[200:210], lines[180], "short"], length)
    brute = {(row.tobytes(), int(n)) for row, n in zip(first.tokens, first.length, strict=True)}
    expected = [
        n >= 32 and (row.tobytes(), int(n)) in brute for row, n in zip(second.tokens, second.length, strict=True)
    ]
    found = rows_in_both(first, second)
    assert found.tolist() == expected
    assert 0 < found.sum() < len(found)


def test_one_byte_makes_a_row_another_and_short_rows_count_for_none() -> None:
    def data(tokens: np.ndarray, length: np.ndarray) -> ArrayDataset:
        return ArrayDataset({"tokens": tokens, "length": length}, name="rows")

    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 256, (500, 48), np.uint8)
    changed = tokens.copy()
    changed[np.arange(500), rng.integers(0, 48, 500)] += rng.integers(1, 256, 500, np.uint8)
    full, short = np.full(500, 48), np.full(500, 31)
    assert rows_in_both(data(tokens, full), data(tokens, full)).all()
    assert not rows_in_both(data(tokens, full), data(changed, full)).any()
    assert not rows_in_both(data(tokens, short), data(tokens, short)).any()


def test_rows_of_two_lengths_are_refused(tmp_path: Path) -> None:
    lines = ["some text of more than thirty-two bytes"] * 3
    first, second = (packed(tmp_path, f"{length}.txt", lines, length) for length in (64, 72))
    with pytest.raises(UserError, match=r"have 64 bytes, those of .* 72: pack both with one length"):
        rows_in_both(first, second)
