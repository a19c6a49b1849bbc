"""How many rows of text are evaluated at once."""

import os

import jax
import pytest

from bilevel.training.evaluation import rows_at_once


@pytest.mark.parametrize(
    ("cores", "positions", "vocabulary", "rows"),
    [
        (1, 64, 256, 32),
        (2, 64, 256, 32),
        (8, 64, 256, 128),
        (64, 64, 256, 256),
        (2, 4096, 256, 1),
        (64, 1024, 50_000, 5),
    ],
)
def test_positions_a_core_and_logits_bound_the_rows(
    monkeypatch: pytest.MonkeyPatch, cores: int, positions: int, vocabulary: int, rows: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert rows_at_once(positions, vocabulary) == rows
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows_at_once(positions, vocabulary) == min(256, 2**28 // (positions * vocabulary))
