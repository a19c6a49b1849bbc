"""Corrupted labels: the promised rates, the promised classes, countable, and a function of the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bilevel.data import ArrayDataset
from bilevel.data.labelled import corruption
from bilevel.types import UserError

ROWS, CLASSES = 20_000, 10


def arrays(rows: int = ROWS) -> dict[str, Any]:
    label = (np.arange(rows) % CLASSES).astype(np.int32)
    return {
        "image": np.zeros((rows, 1, 1, 1), np.uint8),
        "label": label,
        "source_row": np.arange(rows, dtype=np.int32)[::-1],
    }


def check_counts(found: dict[str, Any]) -> None:
    """What every result promises."""
    assert {"label", "clean_label", "corrupted", "relevant"} <= set(found)
    assert found["label"].dtype == found["clean_label"].dtype == np.int32
    assert found["corrupted"].dtype == found["relevant"].dtype == bool
    np.testing.assert_array_equal(found["corrupted"], found["label"] != found["clean_label"])
    ArrayDataset(found)


def near(share: float, wanted: float, rows: int) -> bool:
    return abs(share - wanted) < 4 * (wanted * (1 - wanted) / rows) ** 0.5


def test_uniform_noise() -> None:
    given = arrays()
    found = corruption.uniform_noise(given, 0.1, num_classes=CLASSES, seed=3)
    check_counts(found)
    assert near(found["corrupted"].mean(), 0.1, ROWS)
    np.testing.assert_array_equal(found["clean_label"], given["label"])
    table = np.zeros((CLASSES, CLASSES))
    np.add.at(table, (found["clean_label"], found["label"]), 1)
    off = table[~np.eye(CLASSES, dtype=bool)]
    expected = found["corrupted"].sum() / 90
    assert (
        (off - expected) ** 2 / expected
    ).sum() < 140  # 89 degrees of freedom: exceeded less than once in a thousand
    assert given["label"].tolist() == (np.arange(ROWS) % CLASSES).tolist()  # the given arrays stay as they are
    assert found["image"] is given["image"]


def test_noise_is_a_function_of_the_seed_and_the_row() -> None:
    first, again, other, short = (
        corruption.uniform_noise(arrays(rows), 0.3, num_classes=CLASSES, seed=seed)["label"]
        for rows, seed in ((ROWS, 1), (ROWS, 1), (ROWS, 2), (500, 1))
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:500], short)
    assert (first != other).mean() > 0.4


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_extremes(fraction: float) -> None:
    found = corruption.uniform_noise(arrays(), fraction, num_classes=CLASSES, seed=0)
    assert found["corrupted"].mean() == fraction


def test_uniform_noise_among_some_classes() -> None:
    given = {**arrays(), "label": np.asarray([1, 5, 7, 2], np.int32)[np.arange(ROWS) % 4]}
    found = corruption.uniform_noise(given, 1.0, num_classes=CLASSES, seed=3, among=[5, 1, 7])
    table = np.zeros((CLASSES, CLASSES))
    np.add.at(table, (found["clean_label"], found["label"]), 1)
    assert set(np.flatnonzero(table.sum(0)).tolist()) == {1, 5, 7}
    assert found["corrupted"].all()
    for c, others in ((1, [5, 7]), (5, [1, 7]), (7, [1, 5]), (2, [1, 5, 7])):
        assert all(near(table[c, k] / table[c].sum(), 1 / len(others), ROWS // 4) for k in others)
    with pytest.raises(UserError, match=r"among the classes \[5\]; there must be 2 or more"):
        corruption.uniform_noise(given, 1.0, num_classes=CLASSES, seed=3, among=[5])


def test_pair_noise() -> None:
    pairs = {2: 5, 7: 1}
    found = corruption.pair_noise(arrays(), pairs, seed=4)
    check_counts(found)
    for c in range(CLASSES):
        mine = found["label"][found["clean_label"] == c]
        if c in pairs:
            assert set(mine.tolist()) == {c, pairs[c]}
            assert near((mine != c).mean(), 0.5, ROWS // CLASSES)
        else:
            assert (mine == c).all()


def test_most_confused() -> None:
    confusion = np.asarray([[90, 3, 0], [1, 50, 9], [4, 0, 99]])
    assert corruption.most_confused(confusion, 2) == {1: 2, 2: 0}
    assert list(corruption.most_confused(confusion, 3)) == [1, 2, 0]
    with pytest.raises(UserError, match=r"4 classes cannot be found in a confusion matrix of shape \[3, 3\]"):
        corruption.most_confused(confusion)


def test_faults_add_up() -> None:
    """Clean labels stay those of the beginning, whatever is done afterwards."""
    once = corruption.pair_noise(arrays(), {0: 1}, fraction=1.0, seed=0)
    assert once["corrupted"].mean() == 0.1
    twice = corruption.uniform_noise(once, 0.2, num_classes=CLASSES, seed=0)
    check_counts(twice)
    np.testing.assert_array_equal(twice["clean_label"], arrays()["label"])
    last = corruption.mark_relevant(twice, [0, 3])
    np.testing.assert_array_equal(last["relevant"], np.isin(arrays()["label"], [0, 3]))  # by the true class
    np.testing.assert_array_equal(last["corrupted"], twice["corrupted"])


def test_recorded_labels(tmp_path: Path) -> None:
    given, file = arrays(100), tmp_path / "human.npz"
    clean = given["label"][::-1]  # row i of the data is row 99 − i of the file
    worse = clean.copy()
    worse[:7] = (worse[:7] + 1) % CLASSES
    np.savez(file, clean_label=clean, worse_label=worse)
    found = corruption.recorded_labels(given, file, "worse_label", num_classes=CLASSES)
    check_counts(found)
    assert np.flatnonzero(found["corrupted"]).tolist() == list(range(93, 100))
    part = {name: array[90:95] for name, array in given.items()}
    assert (
        corruption.recorded_labels(part, file, "worse_label", num_classes=CLASSES)["corrupted"].tolist()
        == [False] * 3 + [True] * 2
    )

    with pytest.raises(UserError, match="no array 'aggre_label' but clean_label, worse_label; name one"):
        corruption.recorded_labels(given, file, "aggre_label", num_classes=CLASSES)
    with pytest.raises(UserError, match=r"clean_label differs from ours in 100 rows; .* order"):
        corruption.recorded_labels(
            {**given, "source_row": given["source_row"][::-1].copy()}, file, "worse_label", num_classes=CLASSES
        )
    with pytest.raises(UserError, match=r"worse_label has the shape \[100\], but the data have a row 119"):
        corruption.recorded_labels(arrays(120), file, "worse_label", num_classes=CLASSES)
    with pytest.raises(UserError, match=r"no array 'source_row'.*open_labelled"):
        corruption.recorded_labels({"label": given["label"]}, file, "worse_label", num_classes=CLASSES)
    with pytest.raises(UserError, match=r"missing\.npz cannot be read"):
        corruption.recorded_labels(given, tmp_path / "missing.npz", "worse_label", num_classes=CLASSES)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(np.int64(10), "10"), (np.int8(-1), "-1"), (0.5, r"0\.5"), (np.nan, "nan"), (np.True_, "True"), ("cat", "'cat'")],
)
def test_recorded_labels_are_classes(tmp_path: Path, value: Any, shown: str) -> None:
    file = tmp_path / "human.npz"
    np.savez(file, worse=np.full(100, value), real=np.full(100, 3.0))
    with pytest.raises(UserError, match=rf"human\.npz: worse\[99\] is {shown}; give whole numbers from 0 to 9"):
        corruption.recorded_labels(arrays(100), file, "worse", num_classes=CLASSES)
    found = corruption.recorded_labels(arrays(100), file, "real", num_classes=CLASSES)
    check_counts(found)
    assert (found["label"] == 3).all()


def test_half_of_the_classes() -> None:
    """RHO-LOSS: all classes in train, half of them in the held-out and test sets."""
    half = corruption.half_of_classes(CLASSES, seed=5)
    assert len(set(half)) == 5
    assert half == corruption.half_of_classes(CLASSES, seed=5) == tuple(sorted(half))
    assert len({corruption.half_of_classes(CLASSES, seed=s) for s in range(20)}) > 10
    train, test = corruption.mark_relevant(arrays(), half), corruption.only_classes(arrays(), half)
    check_counts(train)
    check_counts(test)
    assert train["relevant"].mean() == 0.5
    assert len(train["label"]) == ROWS
    assert set(test["label"].tolist()) == set(half)
    assert len(test["label"]) == len(test["image"]) == ROWS // 2
    assert (np.diff(test["source_row"]) < 0).all()  # the stored order
    with pytest.raises(UserError, match=r"no row of the classes \[77\]"):
        corruption.only_classes(arrays(), [77])


def test_long_tail() -> None:
    given = arrays()
    found = corruption.long_tail(given, 100, num_classes=CLASSES, seed=1)
    check_counts(found)
    counts = np.bincount(found["label"], minlength=CLASSES)
    wanted = [int(2000 * 100 ** (-c / 9) + 1e-9) for c in range(CLASSES)]
    assert counts.tolist() == wanted
    assert (counts[0], counts[-1]) == (2000, 20)
    assert (np.diff(found["source_row"]) < 0).all()
    again, other = (corruption.long_tail(given, 100, num_classes=CLASSES, seed=s)["source_row"] for s in (1, 2))
    np.testing.assert_array_equal(found["source_row"], again)
    assert set(again.tolist()) != set(other.tolist())
    assert len(corruption.long_tail(given, 1, num_classes=CLASSES, seed=1)["label"]) == ROWS
    tiny = corruption.long_tail(arrays(20), 1000, num_classes=CLASSES, seed=1)
    assert np.bincount(tiny["label"]).min() == 1


def test_user_errors() -> None:
    with pytest.raises(UserError, match=r"fraction 1\.5 is not between 0 and 1"):
        corruption.uniform_noise(arrays(), 1.5, num_classes=CLASSES, seed=0)
    with pytest.raises(UserError, match="labels run from 0 to 9, but num_classes=5"):
        corruption.uniform_noise(arrays(), 0.1, num_classes=5, seed=0)
    with pytest.raises(UserError, match="seed is -1"):
        corruption.uniform_noise(arrays(), 0.1, num_classes=CLASSES, seed=-1)
    with pytest.raises(UserError, match=r"pairs={3: 3} is not possible"):
        corruption.pair_noise(arrays(), {3: 3}, seed=0)
    with pytest.raises(UserError, match=r"factor 0\.5 is below 1"):
        corruption.long_tail(arrays(), 0.5, num_classes=CLASSES, seed=0)
    with pytest.raises(UserError, match=r"no array 'label' \(image\)"):
        corruption.annotated({"image": np.zeros(3)})
