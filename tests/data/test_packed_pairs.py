"""Sentence pairs packed to arrays: rows, what is dropped, labels, and the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.data import (
    JoinedData,
    Loader,
    PackedPairs,
    PairSource,
    RowView,
    hold_out,
    labelled_pairs,
    open_pairs,
    pack_pairs,
    pairs_in_both,
    warn_of_shared_pairs,
)
from bilevel.data.digests import digest
from bilevel.data.pairs import packed_pairs as module
from bilevel.training import Resident
from bilevel.types import UserError


class Letters:
    """A tokenizer without sentencepiece: a piece is a character."""

    def __init__(self, size: int = 3 + 128):
        self.size = size
        self.fingerprint = digest(["letters", size])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[3 + ord(letter) for letter in text] for text in texts]

    def decode(self, rows: Any) -> list[str]:
        return ["".join(chr(i - 3) for i in row if i > 2) for row in np.asarray(rows).tolist()]


PAIRS = [
    ("ab", "xyz"),
    ("", "x"),
    ("c", "toolong"),
    ("abcd", "w"),
    ("same", "same"),
    ("ab", "xyz"),
    ("no", ""),
    ("e", "f"),
]


def source_of(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS, name: str = "a.tsv") -> PairSource:
    (folder / name).write_text("en\tcs\n" + "".join(f"{source}\t{target}\n" for source, target in pairs))
    return open_pairs(str(folder / name), target_language="cs")


def packed(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS, name: str = "a.tsv", **options: Any) -> PackedPairs:
    return pack_pairs(source_of(folder, pairs, name), Letters(), cache_dir=folder / "cache", **{"length": 5, **options})


@pytest.mark.parametrize("size", [3 + 128, 70_000])
def test_rows(tmp_path: Path, size: int) -> None:
    data = pack_pairs(source_of(tmp_path), Letters(size), length=6, cache_dir=tmp_path / "cache")
    assert data.tokens.dtype == (np.uint16 if size < 65_536 else np.int32)
    assert isinstance(data.tokens.base, np.memmap)
    batch = data.rows(np.array([1, 0, 4]))
    assert [(name, array.dtype, array.shape) for name, array in batch.items()] == [
        ("source", np.int32, (3, 6)), ("source_length", np.int32, (3,)), ("target", np.int32, (3, 6)),
        ("target_length", np.int32, (3,)), ("id", np.int32, (3,)),
    ]  # fmt: skip
    for row, number in enumerate([1, 0, 4]):
        for side, text in zip(("source", "target"), data.text(number), strict=True):
            pieces = [*Letters().encode([text])[0], 2]
            assert batch[side][row].tolist() == pieces + [0] * (6 - len(pieces))
            assert batch[f"{side}_length"][row] == len(pieces)
    assert batch["id"].tolist() == [1, 0, 4]
    assert [data.text(i) for i in range(len(data))] == [PAIRS[i] for i in (0, 3, 4, 5, 7)]
    assert data.number.tolist() == [0, 3, 4, 5, 7]
    assert data.hash[0] == data.hash[3] != data.hash[1]


@pytest.mark.parametrize(
    ("options", "kept", "dropped"),
    [
        ({}, [0, 3, 4, 5, 7], {"empty": 2, "long": 1}),
        ({"length": 4}, [0, 5, 7], {"empty": 2, "long": 3}),
        ({"length": 8, "max_ratio": 3.0}, [0, 4, 5, 7], {"empty": 2, "ratio": 2}),
        ({"length": 8, "max_ratio": 4.0}, [0, 3, 4, 5, 7], {"empty": 2, "ratio": 1}),
        ({"drop_copies": True}, [0, 3, 5, 7], {"empty": 2, "long": 1, "copy": 1}),
        ({"drop_repeats": True}, [0, 3, 4, 7], {"empty": 2, "long": 1, "repeated": 1}),
    ],
)
def test_what_is_dropped_is_counted(
    tmp_path: Path, options: dict[str, Any], kept: list[int], dropped: dict[str, int]
) -> None:
    data = packed(tmp_path, **options)
    assert data.number.tolist() == kept
    assert {reason: count for reason, count in data.manifest["dropped"].items() if count} == dropped
    assert data.manifest["pair_count"] == len(PAIRS) == len(kept) + sum(dropped.values())


def test_a_note_says_once_what_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        packed(tmp_path, drop_repeats=True, max_ratio=3, length=7)
    reasons = (
        "1 longer than 7 pieces (--data.length), 2 empty on one side, 1 with one side more than 3 times as long as the other "
        "(--data.max-ratio), 1 repeated."
    )
    assert capsys.readouterr().err == f"note: 5 of 8 pairs of {tmp_path}/a.tsv are dropped: {reasons}\n"
    assert packed(tmp_path, [("a", "b")], "b.tsv").dropped() == ""
    assert capsys.readouterr().err == ""


def test_cached_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_pairs", None)
        again = packed(tmp_path)
    assert again.folder == first.folder
    assert again.content_hash == first.content_hash
    (first.folder / "starts.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"of packed pairs is damaged \(.*\); remove the folder"):
        PackedPairs.open(first.folder)
    assert packed(tmp_path).content_hash == first.content_hash, "packed again"


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    first = packed(tmp_path)
    assert packed(tmp_path, name="b.tsv").content_hash == first.content_hash
    others = [packed(tmp_path, PAIRS[:-1], "c.tsv"), packed(tmp_path, length=6, drop_copies=False)]
    moved = [("a", "bxyz"), *PAIRS[1:]]
    others.append(packed(tmp_path, moved, "d.tsv"))
    others.append(pack_pairs(source_of(tmp_path), Letters(200), length=5, cache_dir=tmp_path / "cache"))
    assert len({first.content_hash, *(other.content_hash for other in others)}) == 5
    folder = json.loads((first.folder / "manifest.json").read_text())
    assert (folder["languages"], folder["length"], folder["source"]) == (["en", "cs"], 5, f"{tmp_path}/a.tsv")


def test_two_tokenizers(tmp_path: Path) -> None:
    class Shifted(Letters):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            return [[1 + i for i in row] for row in super().encode(texts)]

    data = pack_pairs(
        source_of(tmp_path, [("a", "a")]),
        Letters(),
        target_tokenizer=Shifted(200),
        length=4,
        cache_dir=tmp_path / "cache",
    )
    row = data.rows(np.zeros(1, np.int64))
    assert (row["target"] - row["source"])[0].tolist() == [1, 0, 0, 0]
    assert len(data.manifest["tokenizers"]) == 2


def test_blocks_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(200)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    whole = packed(tmp_path, pairs)
    monkeypatch.setattr("bilevel.data.pairs.pair_writer._BLOCK", 7)
    pieces = pack_pairs(source_of(tmp_path, pairs), Letters(), length=5, cache_dir=tmp_path / "other")
    everything = np.arange(len(whole))
    for name, array in whole.rows(everything).items():
        np.testing.assert_array_equal(pieces.rows(everything)[name], array)
    assert (
        pieces.number.tolist()
        == whole.number.tolist()
        == [i for i, p in enumerate(pairs) if all(0 < len(t) < 5 for t in p)]
    )


# -- with the rest of the library --------------------------------------------------------------------------------------


def test_views_joined_data_loaders_and_resident_data(tmp_path: Path) -> None:
    first = packed(tmp_path, [(f"a{i}", f"b{i}") for i in range(20)])
    second = packed(tmp_path, [("c", "d")], "b.tsv")
    view = RowView(first, np.arange(5, 15))
    assert view.rows(np.array([0]))["id"].tolist() == [5]
    joined = JoinedData({"first": view, "second": second})
    np.testing.assert_array_equal(joined.rows(np.array([10]))["source"], second.rows(np.array([0]))["source"])
    loader = Loader(joined, 4, seed=0)
    batch = loader.batch(3)
    assert {name: array.shape for name, array in batch.items()}["target"] == (4, 5)
    np.testing.assert_array_equal(batch["target"], joined.rows(loader.indices(3))["target"])
    table, _ = Resident(loader, Loader(second, 1, seed=0)).item(0, 1, 1).arguments[0][0]
    np.testing.assert_array_equal(table["target"], joined.rows(np.arange(11))["target"])


def test_no_sentence_is_trained_on_and_held_out(tmp_path: Path) -> None:
    pairs = [(f"{chr(97 + i % 26)}{i // 26}", "x") for i in range(400)]
    source = source_of(tmp_path, [*pairs, *pairs[:40]])
    train, held_out = hold_out(source, 0.1)
    data = [pack_pairs(part, Letters(), length=8, cache_dir=tmp_path / "cache") for part in (train, held_out)]
    assert len(data[0]) + len(data[1]) == 440
    assert 20 < len(data[1]) < 70
    assert not pairs_in_both(*data).any()
    assert (train.name, held_out.name) == (source.name, f"{source.name} (held out)")
    with pytest.raises(UserError, match="too few different pairs to hold 10% of them out"):
        hold_out(source_of(tmp_path, [("a", "b")], "b.tsv"), 0.1)


def test_a_warning_of_shared_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = packed(tmp_path, [("a", "b"), ("c", "d")])
    second = packed(tmp_path, [("c", "e"), ("f", "g"), ("h", "i")], "b.tsv")
    assert pairs_in_both(first, second).tolist() == [True, False, False]
    warn_of_shared_pairs([first], {"valid": second})
    message = f"warning: 1 of 3 sentences of {tmp_path}/b.tsv are also in {tmp_path}/a.tsv: remove them from"
    assert message in capsys.readouterr().err
    warn_of_shared_pairs([packed(tmp_path, [("z", "z")], "c.tsv")], {"valid": second})
    assert capsys.readouterr().err == ""


# -- labels ------------------------------------------------------------------------------------------------------------

LABELS = ["news", "news", "web\trotated", "web\tcopied", "news", "news", "web", "web\trotated"]


@pytest.mark.parametrize("faults", [False, True])
def test_labels_follow_their_pairs(tmp_path: Path, faults: bool) -> None:
    lines = LABELS if faults else [line.split("\t")[0] for line in LABELS]
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    source = labelled_pairs(source_of(tmp_path), tmp_path / "labels.tsv")
    data = pack_pairs(source, Letters(), length=5, cache_dir=tmp_path / "cache")
    found = {kind: [label.names[i] for i in label.values] for kind, label in data.labels.items()}
    assert found["domain"] == ["news", "web", "news", "news", "web"]
    assert found.get("fault") == (["none", "copied", "none", "none", "rotated"] if faults else None)
    assert packed(tmp_path).labels == {}
    assert (
        hold_out(labelled_pairs(source_of(tmp_path), tmp_path / "labels.tsv"), 0.5)[0].label_kinds == source.label_kinds
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            LABELS[:-1],
            r"The label file .*labels\.tsv has 7 lines, but .*a\.tsv has 8 pairs; line i must hold the label of pair i",
        ),
        ([*LABELS, "news"], r"has 9 lines, but .*a\.tsv has 8 pairs"),
        (["\tfault", *LABELS[1:]], r"labels\.tsv, line 1: the first column is empty; every pair needs a domain"),
    ],
)
def test_bad_labels(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "labels.tsv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        list(labelled_pairs(source_of(tmp_path), tmp_path / "labels.tsv").read())


def test_a_missing_label_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"The label file .*labels\.tsv does not exist; check the path, or leave --data"
    ):
        labelled_pairs(source_of(tmp_path), tmp_path / "labels.tsv")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        (
            [("a", ""), ("b", "")],
            {},
            r"a\.tsv: all 2 pairs are empty in cs; check the languages \(--data\.source-language",
        ),
        ([("", "a"), ("", "")], {}, r"all 2 pairs are empty in en"),
        ([], {}, r"a\.tsv holds no pairs; give data"),
        (
            [("abcdef", "a"), ("a", "")],
            {},
            r"all 2 pairs are dropped \(1 long, 1 empty\); raise --data\.length \(5\) or --data\.max",
        ),
        (PAIRS, {"length": 1}, r"--data\.length is 1; it must be at least 2"),
        (PAIRS, {"max_ratio": 0.5}, r"--data\.max-ratio is 0\.5; it must be at least 1"),
    ],
)
def test_nothing_to_pack(tmp_path: Path, pairs: list[tuple[str, str]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed(tmp_path, pairs, **options)
    assert not list((tmp_path / "cache").glob("*"))
