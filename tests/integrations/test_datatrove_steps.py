"""The steps in a pipeline of one's own."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from selections import code_of, select, three_files

from bilevel.types import UserError

pytest.importorskip("datatrove")
from datatrove.data import Document

from bilevel.integrations.datatrove import ChooseDocuments, DocumentScorer, KeepDocuments, ScoreDocuments

RULES: dict[str, dict[str, Any]] = {
    "one of each text": {"keep_count": 20, "max_copies": 1},
    "count": {"keep_count": 17}, "fraction": {"keep_fraction": 0.3}, "quantile": {"keep_quantile": 0.8},
    "gumbel": {"keep_count": 20, "rule": "gumbel", "temperature": 0.5, "seed": 3},
}  # fmt: skip


def documents(task: int) -> Iterator[Document]:
    for number, text in enumerate(three_files()[task]):
        yield Document(text, id=f"{task}/{number}")


def score(scorer: Any, folder: Path) -> list[Document]:
    step = ScoreDocuments(scorer, folder / "scores")
    return [document for task in range(3) for document in step(documents(task), task, 3)]


def keep(folder: Path, **rule: Any) -> list[Document]:
    for _ in ChooseDocuments(folder / "scores", folder / "choice", tasks=3, **rule)():
        pass
    step = KeepDocuments(folder / "scores", folder / "choice")
    return [document for task in range(3) for document in step(documents(task), task, 3)]


@pytest.fixture
def scored(run: Path, tmp_path: Path) -> Path:
    passed = score(DocumentScorer(run, batch_size=64), tmp_path)
    assert [(x.text, x.id) for x in passed] == [(x.text, x.id) for task in range(3) for x in documents(task)]
    assert [x.id for x in passed if "score" not in x.metadata] == ["0/3", "1/0", "2/24"]
    return tmp_path


def test_the_steps_keep_what_select_keeps(run: Path, scored: Path, corpus: Path) -> None:
    for name, rule in RULES.items():
        select(run, corpus, scored / name, scores=scored / "of_select", **rule)
        tables = [pq.read_table(file).to_pylist() for file in sorted((scored / name / "selected").iterdir())]
        wanted = {
            f"{i}/{row['document']}": row["score"] for i, rows in enumerate(tables) for row in rows if row["kept"]
        }
        assert {x.id: x.metadata["score"] for x in keep(scored, **rule)} == wanted, name
        assert 0 < len(wanted) < 72


def test_any_function_of_texts_scores(tmp_path: Path) -> None:
    score(lambda texts: np.array([len(text) if text.strip() else np.nan for text in texts], np.float32), tmp_path)
    lengths = {x.id: len(x.text) for task in range(3) for x in documents(task)}
    assert {x.id for x in keep(tmp_path, keep_count=9)} == set(sorted(lengths, key=lambda i: -lengths[i])[:9])


def test_no_group_has_more_than_its_share(tmp_path: Path) -> None:
    def by_length(texts: Sequence[str]) -> np.ndarray:
        return np.array([len(text) if text.strip() else np.nan for text in texts], np.float32)

    step, own = ScoreDocuments(by_length, tmp_path / "scores", group="site"), list(documents(0))
    for number, document in enumerate(own):
        document.metadata["site"] = number % 4
    list(step(own, 0, 1))
    for _ in ChooseDocuments(tmp_path / "scores", tmp_path / "choice", tasks=1, keep_count=8, max_per_group=2)():
        pass
    kept = [x.id for x in KeepDocuments(tmp_path / "scores", tmp_path / "choice")(own, 0, 1)]
    wanted = [sorted(own[site::4], key=lambda x: -len(x.text))[:2] for site in range(4)]
    assert sorted(kept) == sorted(x.id for group in wanted for x in group)
    with pytest.raises(UserError, match="Document y has no 'site' in its metadata"):
        list(step([Document("a", "y")], 0, 1))
    list(ScoreDocuments(by_length, tmp_path / "scores")(own, 0, 1))
    with pytest.raises(UserError, match="has scores without groups: give ScoreDocuments a group"):
        list(ChooseDocuments(tmp_path / "scores", tmp_path / "choice", tasks=1, keep_count=1, max_per_group=1)())


def test_what_documents_have_is_kept(tmp_path: Path) -> None:
    own = [Document("a", "x", metadata={"score": 2.0})]
    with pytest.raises(UserError, match="Document x has another 'score' in its metadata"):
        list(ScoreDocuments(lambda texts: np.ones(len(texts), np.float32), tmp_path)(own))
    step = ScoreDocuments(lambda texts: np.ones(len(texts), np.float32), tmp_path, field="bilevel")
    assert [x.metadata for x in step(own)] == [{"score": 2.0, "bilevel": 1.0}]
    with pytest.raises(UserError, match=r"gives \(3,\) numbers for 1 texts"):
        list(ScoreDocuments(lambda texts: np.ones(3, np.float32), tmp_path)(own))


def test_other_documents_are_refused(scored: Path) -> None:
    keep(scored, keep_count=17)
    step, own = KeepDocuments(scored / "scores", scored / "choice"), list(documents(1))
    for other in (own[:-1], [*own, own[0]], [own[1], own[0], *own[2:]], [*own[:-1], Document("other", "x")]):
        with pytest.raises(UserError, match="The documents of task 1 are not the 20 that were scored"):
            list(step(other, 1, 3))
    with pytest.raises(UserError, match="with the same tasks"):
        list(step(own, 1, 2))


def test_choices_that_cannot_be_made(scored: Path) -> None:
    where = scored / "scores", scored / "choice"
    with pytest.raises(UserError, match="keep_fraction and keep_count: give exactly one"):
        ChooseDocuments(*where, tasks=3, keep_count=1, keep_fraction=0.1)
    with pytest.raises(UserError, match=r"keep_fraction 1.5 must lie in \(0, 1\]"):
        ChooseDocuments(*where, tasks=3, keep_fraction=1.5)
    with pytest.raises(UserError, match="keep_count 73 is more than the 72 documents"):
        list(ChooseDocuments(*where, tasks=3, keep_count=73)())
    with pytest.raises(UserError, match="The scores of task 3 are missing"):
        list(ChooseDocuments(*where, tasks=4, keep_count=1)())
    with pytest.raises(UserError, match="tasks=1, not 3"):
        list(ChooseDocuments(*where, tasks=3, keep_count=1)(None, 0, 3))
    with pytest.raises(UserError, match="s3://bucket/scores is a URL"):
        ScoreDocuments(len, "s3://bucket/scores")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="holds no choice"):
        list(KeepDocuments(*where)(documents(0), 0, 3))


def test_a_broken_task_leaves_no_scores(tmp_path: Path) -> None:
    step = ScoreDocuments(lambda texts: np.zeros(len(texts), np.float32), tmp_path / "scores")
    passing = step(documents(0), 0, 3)
    next(passing)
    passing.close()
    assert list((tmp_path / "scores").iterdir()) == []


PIPELINE = """
import os, sys
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import JsonlWriter
from bilevel.integrations import datatrove as steps

run, corpus, out, deadly = sys.argv[1:]


class Scorer(steps.DocumentScorer):
    calls = 0

    def __call__(self, texts):
        Scorer.calls += 1
        if deadly == "score" and Scorer.calls == 2:
            os._exit(9)
        return super().__call__(texts)


class Dying(steps.PipelineStep):
    type, name = "test", "dying"

    def run(self, data, rank=0, world_size=1):
        for number, document in enumerate(data):
            if deadly == "keep" and (rank, number) == (1, 2):
                os._exit(9)
            yield document


def start(name, tasks, *pipeline):
    LocalPipelineExecutor(list(pipeline), tasks=tasks, workers=1, logging_dir=f"{out}/logs/{name}").run()


if __name__ == "__main__":
    reader = ParquetReader(corpus, glob_pattern="*.parquet")
    scores, choice = f"{out}/scores", f"{out}/choice"
    start("score", 3, reader, steps.ScoreDocuments(Scorer(run, batch_size=64), scores))
    start("choose", 1, steps.ChooseDocuments(scores, choice, tasks=3, keep_count=17, rule="gumbel"))
    start("keep", 3, reader, steps.KeepDocuments(scores, choice), Dying(), JsonlWriter(f"{out}/kept", compression=None))
"""


@pytest.mark.slow
def test_killed_tasks_started_again_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """Killed in the second task of scoring, then in the second one of keeping."""
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "corpus").mkdir()
    for name, lines in zip("abc", three_files(), strict=True):
        rows = pa.table({"text": [text or "-" for text in lines], "id": [f"{name}{i}" for i in range(len(lines))]})
        pq.write_table(rows, tmp_path / "corpus" / f"{name}.parquet")
    (tmp_path / "pipeline.py").write_text(PIPELINE)

    def code(out: str, deadly: str) -> int:
        given = [str(run), str(tmp_path / "corpus"), str(tmp_path / out), deadly]
        command = [sys.executable, str(tmp_path / "pipeline.py"), *given]
        return code_of(command, tmp_path / f"{out}.log")

    assert code("whole", "never") == 0
    assert code("broken", "score") == 9
    assert [path.name for path in (tmp_path / "broken" / "scores").glob("*.parquet")] == ["00000.parquet"]
    assert code("broken", "keep") == 9
    assert len(list((tmp_path / "broken" / "scores").glob("*.parquet"))) == 3
    assert code("broken", "never") == 0
    for folder in ("scores", "choice", "kept"):
        bytes_of = [
            {path.name: path.read_bytes() for path in (tmp_path / out / folder).iterdir() if path.name[0] != "."}
            for out in ("whole", "broken")
        ]
        assert bytes_of[0] == bytes_of[1]
    files = (tmp_path / "broken" / "kept").iterdir()
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(lines) == 17
    assert all(line["metadata"]["score"] for line in lines)
