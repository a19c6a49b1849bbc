"""Token-level selection on text, as a user calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import compare, refused
from tiny_text import text_flags, write_texts


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def test_a_reference_is_trained_once_and_counted(text: Path) -> None:
    given = text_flags(text, compare="uniform,token_selection", token_selection__reference_steps=20)
    uniform, selecting = compare("language_modeling", text / "run", **given)
    assert np.isfinite(selecting["test_loss"])
    assert selecting["test_loss"] != uniform["test_loss"]
    assert 0 < selecting["preparation_seconds"] <= selecting["seconds"]
    (table,) = (text / "run" / "prepared").glob("tokens-*/table")
    losses = np.load(table / "tokens.npy", mmap_mode="r")
    assert losses.dtype == np.float16
    assert losses.shape[1] == 16
    seconds = json.loads((table / "seconds.json").read_text())
    assert selecting["preparation_seconds"] == pytest.approx(sum(seconds.values()))
    written = (table / "tokens.npy").stat().st_mtime_ns
    other = given | {"compare": "token_selection", "token_selection__share": 1.0}
    found = compare("language_modeling", text / "run", **other, seed=1)
    assert (table / "tokens.npy").stat().st_mtime_ns == written, "another seed has the same reference"
    of_all = next(row for row in found if row["seed"] == 1)
    (uniform,) = compare("language_modeling", text / "all", **text_flags(text, compare="uniform", seed=1))
    assert of_all["test_loss"] == pytest.approx(uniform["test_loss"], rel=1e-5), (
        "all tokens are those of uniform sampling"
    )


def test_tasks_without_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused("tabular", tmp_path / "run", capsys, compare="token_selection")
    assert "token_selection needs a task whose losses are of tokens" in message
