"""How often rows, classes and faults were drawn."""

from pathlib import Path

import numpy as np
import pytest

from bilevel.selection.known import Known
from bilevel.training.frequencies import save_frequencies
from bilevel.training.run_dir import read_json


def test_frequencies(tmp_path: Path) -> None:
    """20 rows: 0 and 1 are never drawn, 18 and 19 most often; 0 and 19 are wrong."""
    wrong, classes = np.isin(np.arange(20), [0, 19]), np.arange(20) % 4
    counts = np.asarray([0, 0, *[5] * 16, 12, 8])
    sequence = np.random.default_rng(0).permutation(np.repeat(np.arange(20), counts)).reshape(-1, 4)
    known = {"wrong": Known(wrong.astype(int), ("no", "yes"), fault=True), "class": Known(classes, tuple("abcd"))}
    found = save_frequencies(tmp_path, sequence, 20, known)
    kept = read_json(tmp_path / "frequencies.json")
    assert kept["draws"] == 100
    assert kept["rows"]["never_drawn"] == pytest.approx(0.1)
    assert (kept["rows"]["least"], kept["rows"]["most"]) == (0, 12)
    assert kept["rows"]["most_deviation"] == pytest.approx(12 / 5 - 1)
    assert found == {
        "wrong_often": 0.5, "wrong_rarely": 0.5, "spread": pytest.approx(counts.var() / 5), "share/wrong": pytest.approx(0.08),
    }  # fmt: skip
    assert kept["wrong"]["all"] == pytest.approx(0.1)
    assert kept["wrong"]["drawn"] == pytest.approx(0.08)
    assert list(kept["classes"]["counts"].values()) == np.bincount(classes, counts, minlength=4).tolist()
    assert "<svg" in (tmp_path / "frequencies.svg").read_text()
    assert kept["rewards"] == {"all": 0, "a_row": 0}
    save_frequencies(tmp_path, sequence, 20, known, 5)
    assert read_json(tmp_path / "frequencies.json")["rewards"] == {"all": 5, "a_row": 0.25}


def test_chance_is_no_preference(tmp_path: Path) -> None:
    """Uniform draws with replacement spread as much as the counts beside them; whole epochs do not spread."""
    wrong = np.arange(200) % 5 == 0
    known = {"wrong": Known(wrong.astype(int), ("no", "yes"), fault=True)}
    by_chance = save_frequencies(tmp_path, np.random.default_rng(1).integers(0, 200, (1000, 40)), 200, known)
    assert by_chance["spread"] == pytest.approx(1, abs=0.5)
    assert read_json(tmp_path / "frequencies.json")["rows_by_chance"]["spread"] == pytest.approx(1, abs=0.5)
    epochs = save_frequencies(tmp_path, np.arange(800).reshape(-1, 4) % 200, 200, known)
    assert epochs["spread"] == 0
    assert epochs["wrong_often"] == epochs["wrong_rarely"] == wrong.mean()
