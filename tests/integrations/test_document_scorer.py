"""The scorer: a function of texts that any engine can move."""

import importlib
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import selections
from selections import code_of, select, three_files

from bilevel.integrations.scorer import DocumentScorer
from bilevel.types import UserError


def test_scores_are_those_of_select(run: Path, corpus: Path, tmp_path: Path) -> None:
    select(run, corpus / "a.txt", tmp_path / "out", keep_count=3)
    table = pq.read_table(tmp_path / "out" / "scores" / "00000-a.txt.parquet")
    scores = pickle.loads(pickle.dumps(DocumentScorer(run, batch_size=64)))(three_files()[0])
    assert scores.dtype == np.float32
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3]
    np.testing.assert_array_equal(scores[table["document"].to_numpy()], table["score"].to_numpy())
    assert len(np.unique(scores)) > 20


def test_a_pickled_scorer_is_light(run: Path) -> None:
    scorer = DocumentScorer(run)
    scorer(["a text"])
    assert len(pickle.dumps(scorer)) < 1000


def test_documents_are_scored_whole(run: Path, tmp_path: Path) -> None:
    """A document's score is the mean over its parts, of which the last counts as the first does, also behind many kilobytes."""
    scorer, rng = DocumentScorer(run, batch_size=64), np.random.default_rng(0)
    parts = ["".join(rng.choice(list("abcdefgh "), 24 * 100)) for _ in range(10)]
    scores = scorer(["".join(parts), *parts])
    assert np.ptp(scores[1:]) > 0.01
    np.testing.assert_allclose(scores[0], scores[1:].astype(np.float64).mean(), rtol=1e-5, atol=1e-6)
    (tmp_path / "long.txt").write_text("".join(parts) + "\n")
    select(run, tmp_path / "long.txt", tmp_path / "out", keep_count=1)
    found = pq.read_table(tmp_path / "out" / "scores" / "00000-long.txt.parquet")
    assert found["score"].to_pylist() == [scores[0]]
    assert found["bytes"].to_pylist() == [24_000]


def test_bad_texts_and_runs(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Text 1 holds half a surrogate pair at character 2"):
        DocumentScorer(run)(["a", "a\ud800"])
    with pytest.raises(UserError, match="nowhere is not the directory of a run"):
        DocumentScorer(tmp_path / "nowhere")(["a"])


def test_steps_without_datatrove(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datatrove", "datatrove.data"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bilevel.integrations.datatrove", raising=False)
    with pytest.raises(ImportError, match=r'needs datatrove: pip install "bilevel\[datatrove\]"'):
        importlib.import_module("bilevel.integrations.datatrove")


RAY = """
import json, sys
import ray.data
from selections import three_files
from bilevel.integrations.scorer import DocumentScorer

scorer = DocumentScorer(sys.argv[1], batch_size=64)
rows = ray.data.from_items([{"text": text} for lines in three_files() for text in lines])
scored = rows.map_batches(lambda batch: {**batch, "score": scorer(list(batch["text"]))}, batch_size=16)
print(json.dumps({row["text"]: float(row["score"]) for row in scored.take_all()}))
"""


@pytest.mark.slow
def test_map_batches(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")  # no extra installs it
    path = os.pathsep.join([*sys.path, str(Path(selections.__file__).parent)])
    assert code_of([sys.executable, "-c", RAY, str(run)], tmp_path / "log", PYTHONPATH=path) == 0
    found = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    texts = [text for lines in three_files() for text in lines]
    np.testing.assert_array_equal([found[text] for text in texts], DocumentScorer(run, batch_size=64)(texts))
