"""Pairs of several languages: their label, and the table of rows by target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.data import (
    JoinedData,
    PackedPairs,
    PairSource,
    labelled_pairs,
    multilingual_pairs,
    open_pairs,
    pack_pairs,
    pairs_by_target,
)
from bilevel.types import UserError


class Letters:
    """A tokenizer without sentencepiece: a piece is a byte."""

    size, fingerprint = 3 + 256, "letters"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[3 + byte for byte in text.encode()] for text in texts]

    def decode(self, rows: Any) -> list[str]:
        return ["".join(chr(i - 3) for i in row if i > 2) for row in np.asarray(rows).tolist()]


LINES = [
    # en, az, tr, be
    ("one", "bir", "bir", ""),
    ("two", "", "iki", "dva"),
    ("one", "yek", "", "adzin"),
    ("Two", "iki", "", ""),
    ("", "x", "y", "z"),
    ("ėn", "", "", "e"),
    ("one", "", "tek", ""),
]


def sources_of(folder: Path, target: str = "en") -> dict[str, PairSource]:
    path = folder / "pairs.tsv"
    path.write_text("en\taz\ttr\tbe\n" + "".join("\t".join(line) + "\n" for line in LINES), encoding="utf-8")
    return {name: open_pairs(str(path), source_language=name, target_language=target) for name in ("az", "tr", "be")}


def pack(folder: Path, source: PairSource) -> PackedPairs:
    return pack_pairs(source, Letters(), length=12, cache_dir=folder / "cache")


@pytest.mark.parametrize("joined", [True, False])
def test_the_table(tmp_path: Path, joined: bool) -> None:
    sources = sources_of(tmp_path)
    if joined:
        data = pack(tmp_path, multilingual_pairs("all", sources))
        found, text = pairs_by_target(data), data.text
        assert data.manifest["languages"] == ["az+tr+be", "en"]
    else:
        packed = {name: pack(tmp_path, source) for name, source in sources.items()}
        found, starts = pairs_by_target(packed), JoinedData(packed).starts

        def text(row: int) -> tuple[str, str]:
            part = int(np.searchsorted(starts, row, side="right")) - 1
            return list(packed.values())[part].text(row - int(starts[part]))

    assert found.languages == ("az", "tr", "be")
    assert found.rows.dtype == np.int32
    # az one, yek, Two; tr one, two, tek; be two, one, ėn: one line for the first sentences, one for the second ones.
    lines = [[text(row) if row >= 0 else None for row in line] for line in found.rows.tolist()]
    assert lines == [
        [("bir", "one"), ("bir", "one"), ("adzin", "one")],
        [("yek", "one"), ("tek", "one"), None],
        [("iki", "Two"), None, None],
        [None, ("iki", "two"), ("dva", "two")],
        [None, None, ("e", "ėn")],
    ]
    assert sorted(found.rows[found.rows >= 0]) == list(range(9)), "each row stands there once"


def test_parts_of_the_table(tmp_path: Path) -> None:
    found = pairs_by_target(pack(tmp_path, multilingual_pairs("all", sources_of(tmp_path))))
    kin = found.only(["tr", "az"])
    assert kin.languages == ("tr", "az")
    np.testing.assert_array_equal(kin.rows, found.rows[:4, [1, 0]])
    apart = found.apart()
    assert apart.languages == found.languages
    assert ((apart.rows >= 0).sum(1) == 1).all()
    for column in range(3):
        kept = [set(table[table[:, column] >= 0, column]) for table in (apart.rows, found.rows)]
        assert kept[0] == kept[1]
    with pytest.raises(UserError, match="no uk, but az, tr, be: choose among these"):
        found.only(["az", "uk"])


def test_many_random_targets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abé"], rng.integers(1, 6))) for _ in range(400)]
    path = tmp_path / "many.tsv"
    path.write_text(
        "en\taz\ttr\n" + "".join(f"{w}\t{'a' * (i % 3)}\tt\n" for i, w in enumerate(words)), encoding="utf-8"
    )
    sources = {name: open_pairs(str(path), source_language=name, target_language="en") for name in ("az", "tr")}
    data = pack(tmp_path, multilingual_pairs("many", sources))
    table, language = pairs_by_target(data), data.labels["language"]
    rows = table.rows[table.rows >= 0]
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(data)))
    for line in table.rows:
        assert len({data.text(row)[1] for row in line[line >= 0].tolist()}) == 1
        for column in np.flatnonzero(line >= 0):
            assert language.names[language.values[line[column]]] == table.languages[column]
    # As few lines as the most frequent sentence of a language asks for.
    counts = {}
    for row in range(len(data)):
        key = (data.text(row)[1], int(language.values[row]))
        counts[key] = counts.get(key, 0) + 1
    assert len(table.rows) == sum(max(counts.get((word, i), 0) for i in (0, 1)) for word in set(words))


def test_labels_stay_behind_the_language(tmp_path: Path) -> None:
    sources = sources_of(tmp_path)
    (tmp_path / "labels.tsv").write_text("".join(f"domain{i}\n" for i in range(len(LINES))))
    labelled = {name: labelled_pairs(source, tmp_path / "labels.tsv") for name, source in sources.items()}
    data = pack(tmp_path, multilingual_pairs("all", labelled))
    assert list(data.labels) == ["language", "domain"]
    domains = data.labels["domain"]
    assert [domains.names[i] for i in domains.values[:3]] == ["domain0", "domain2", "domain3"]
    with pytest.raises(UserError, match=r"tr have the labels \(\), the first \('domain',\)"):
        multilingual_pairs("all", {"az": labelled["az"], "tr": sources["tr"]})
    assert multilingual_pairs("all", sources).fingerprint() != multilingual_pairs("all", labelled).fingerprint()


def test_mistakes(tmp_path: Path) -> None:
    sources = sources_of(tmp_path)
    with pytest.raises(UserError, match="does not say the language of its pairs"):
        pairs_by_target(pack(tmp_path, sources["az"]))
    other = open_pairs(str(tmp_path / "pairs.tsv"), source_language="tr", target_language="be")
    with pytest.raises(UserError, match="tr is translated to be, the first language to en"):
        multilingual_pairs("all", {"az": sources["az"], "tr": other})
    with pytest.raises(UserError, match="there are no languages"):
        multilingual_pairs("all", {})
    with pytest.raises(UserError, match="no packed pairs to group"):
        pairs_by_target({})
