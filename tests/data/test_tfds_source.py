"""TFDS data sets, read without TensorFlow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bilevel.data import open_source, pack
from bilevel.types import UserError

tfds = pytest.importorskip("tensorflow_datasets")

# Built in another process, so that its builder class is not registered here: it is then read from its files.
_BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        pair = tfds.features.Tensor(shape=(2,), dtype=np.int64)
        features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "pair": pair}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(1200), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for number in range(count):
            text = "" if number == 7 else f"document é {number}"
            yield number, {"text": text, "title": f"title {number}", "pair": [1, 2]}

TinyText(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", _BUILD, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def _data_dir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    had_tensorflow = "tensorflow" in sys.modules
    yield
    assert ("tensorflow" in sys.modules) == had_tensorflow


def fails(spec: str, *words: str, field: str | None = None) -> None:
    with pytest.raises(UserError) as caught:
        open_source(spec, field=field)
    for word in (spec, *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_default_split_and_field():
    documents = list(open_source("tfds:tiny_text").documents())
    assert sorted(documents) == sorted(["document é %d".encode() % n if n != 7 else b"" for n in range(1200)])


@pytest.mark.parametrize(
    ("spec", "options", "count"),
    [
        ("tfds:tiny_text:test:title", {}, 3),
        ("tfds:tiny_text:test", {"field": "title"}, 3),
        ("tfds:tiny_text:1.0.0:test:title", {}, 3),
        ("tfds:tiny_text:train[10:20]:title", {}, 10),
        ("tfds:tiny_text:train[:50%]:title", {}, 600),
        ("tfds:tiny_text:train+test:title", {}, 1203),
    ],
)
def test_splits_fields_and_versions(spec: str, options: dict[str, Any], count: int):
    source = open_source(spec, **options)
    documents = list(source.documents())
    assert len(documents) == count
    assert all(document.startswith(b"title ") for document in documents)
    assert source.name == spec


def test_packing(tmp_path: Path):
    packed = pack(open_source("tfds:tiny_text"), length=16, cache_dir=tmp_path)
    assert packed.manifest["document_count"] == 1199
    assert packed.manifest["empty_documents"] == 1
    assert packed.text(0).startswith("document é")


def test_fingerprint():
    specs = [
        "tfds:tiny_text",
        "tfds:tiny_text:test",
        "tfds:tiny_text:train:title",
        "tfds:tiny_text:train[:5]",
    ]
    prints = [open_source(spec).fingerprint() for spec in specs]
    assert len(set(prints)) == len(specs)
    assert open_source("tfds:tiny_text:train:text").fingerprint() == prints[0]


def test_unknown_names(folder: Path):
    fails("tfds:tiny_txt", "no data set 'tiny_txt'", str(folder), "tiny_text", "TFDS_DATA_DIR")
    fails("tfds:imdb_revews", "imdb_reviews")
    fails("tfds:qqqqqqqqqqqq", "no known name is close", "check the name")
    fails("tfds:tiny_text:2.0.0", "no version", "'tiny_text:2.0.0'")
    fails("tfds:tiny_text:tran", "Unknown split 'tran'", "correct the specification")
    fails("tfds:tiny_text:train:txt", "no field 'txt'", "'text'", "'title'", "--data.field")
    fails("tfds:tiny_text:train[:0]", "could not open it", "correct the specification")


def test_bad_specifications():
    for spec in ("tfds:", "tfds:tiny_text:", "tfds:a:b:c:d"):
        fails(spec, "not a TFDS specification", "tfds:NAME:SPLIT:FIELD")
    fails("tfds:tiny_text:train:text", "'title'", "give one of them", field="title")
    fails("tfds:tiny_text:train:pair", "record 0", "instead of a string")


def test_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails("tfds:tiny_text", "pip install 'bilevel[experiments]'")


def test_preparing_without_what_tfds_needs(monkeypatch: pytest.MonkeyPatch):
    def needs_more(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds, "data_source", needs_more)
    fails("tfds:tiny_text", "'tensorflow'", "pip install 'bilevel[prepare]'")


def test_tensorflow_is_not_imported(tmp_path: Path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = """
from bilevel.data import open_source
from bilevel.types import UserError

assert next(open_source("tfds:tiny_text:test").documents())
try:
    open_source("tfds:tiny_txt")
except UserError:
    print("finished")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "finished\n", result.stderr
