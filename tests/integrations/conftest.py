"""A finished run, and a corpus of three files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_run import random_run
from selections import three_files


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(tmp_path_factory.mktemp("run") / "soba-seed0")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    *plain, rows = three_files()
    for name, lines in zip("ab", plain, strict=True):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    pq.write_table(pa.table({"text": rows}), folder / "c.parquet")
    return folder
