"""Specific data in three disjoint parts."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

from bilevel.data import open_specific
from bilevel.types import UserError

PARTS = ["train", "valid", "test"]


def parts_of(spec: object) -> dict[str, list[bytes]]:
    return {part: list(source.documents()) for part, source in open_specific(str(spec)).items()}


@pytest.mark.parametrize("valid", ["valid.txt", "dev.txt", "validation-0.txt", "val.jsonl"])
def test_folder_of_named_files(tmp_path: Path, valid: str):
    (tmp_path / "train-0.txt").write_text("a")
    (tmp_path / "train-1.txt.gz").write_bytes(gzip.compress(b"b"))
    (tmp_path / "train.labels.tsv").write_text("label")
    (tmp_path / valid).write_text('{"text": "c"}' if valid.endswith("jsonl") else "c")
    (tmp_path / "test.txt").write_text("d")
    assert parts_of(tmp_path) == {"train": [b"a", b"b"], "valid": [b"c"], "test": [b"d"]}
    assert open_specific(str(tmp_path))["test"].name == f"{tmp_path} (test)"


def test_folder_that_lacks_a_part(tmp_path: Path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "other.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"no text file for valid and test \(it holds other.txt, train.txt\); add"
    ) as caught:
        open_specific(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_split_by_text(tmp_path: Path):
    texts = [f"document {number}" for number in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(texts + texts[:500]))
    parts = parts_of(tmp_path / "a.txt")
    assert list(parts) == PARTS
    assert sorted(itertools.chain(*parts.values())) == sorted(text.encode() for text in texts + texts[:500])
    assert not set(parts["train"]) & set(parts["valid"])
    assert not set(parts["train"]) & set(parts["test"])
    assert not set(parts["valid"]) & set(parts["test"])
    unique = [len(set(parts[part])) for part in PARTS]
    assert 1540 <= unique[0] <= 1660  # 3.3 standard deviations
    assert 150 <= unique[1] <= 250
    # A document keeps its part when others are added or leave: here in another folder layout, too.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("\n".join(texts[::-2]))
    for part, documents in parts_of(tmp_path / "folder").items():
        assert set(documents) <= set(parts[part])


def test_parts_have_their_own_fingerprints(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(100))))
    sources = open_specific(str(tmp_path / "a.txt"))
    assert len({source.fingerprint() for source in sources.values()}) == 3
    assert [source.name for source in sources.values()] == [f"{tmp_path / 'a.txt'} ({part})" for part in PARTS]


def test_too_few_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("same\n\n" * 100)
    with pytest.raises(
        UserError, match=r"too small to be split: of its 100 documents none fell in .* and .*; give more"
    ):
        open_specific(str(tmp_path / "a.txt"))


def test_errors_of_the_source_pass(tmp_path: Path):
    with pytest.raises(UserError, match=r"missing.txt does not exist"):
        open_specific(str(tmp_path / "missing.txt"))


def test_topics_are_split_by_topic():
    sources = open_specific("python:topics")
    assert list(sources) == PARTS
    labels = {part: {document.label for document in source.read()} for part, source in sources.items()}
    assert not labels["train"] & (labels["valid"] | labels["test"])
    assert not labels["valid"] & labels["test"]
    assert min(map(len, labels.values())) >= 3
    sizes = {part: sum(map(len, source.documents())) for part, source in sources.items()}
    total = sum(sizes.values())
    assert 0.7 < sizes["train"] / total < 0.85
    assert 0.08 < sizes["valid"] / total < 0.15
    assert 0.08 < sizes["test"] / total < 0.15


def test_topics_do_not_leak():
    # Paragraphs, as the pieces of two topics are cut at different places.
    paragraphs = {}
    for part, source in open_specific("python:topics").items():
        text = b"".join(source.documents()).decode()
        paragraphs[part] = {p.strip() for p in text.split("\n\n") if len(p.strip()) > 40}
    assert min(map(len, paragraphs.values())) > 50
    assert not paragraphs["train"] & (paragraphs["valid"] | paragraphs["test"])
    assert not paragraphs["valid"] & paragraphs["test"]
