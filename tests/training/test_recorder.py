"""The rows of all steps in a file: of a run that goes on from a checkpoint too."""

from pathlib import Path

import numpy as np
import pytest

from bilevel.training import SequenceRecorder
from bilevel.types import UserError

IDS = np.arange(12, dtype=np.int32)


def test_steps_after_a_checkpoint_are_written_again(tmp_path: Path) -> None:
    recorder = SequenceRecorder(tmp_path / "rows", 2)
    assert recorder(IDS[:4], 2) == {}
    recorder(IDS[4:8] + 100, 4)
    with (tmp_path / "rows").open("ab") as file:
        file.write(b"abc")  # a kill in the middle of a write
    again = SequenceRecorder(tmp_path / "rows", 2)
    again(IDS[4:6], 3)
    again(IDS[6:], 6)
    found = again.sequence()
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, IDS.reshape(6, 2))


def test_rows_with_ids_of_their_own_and_places_without_a_row(tmp_path: Path) -> None:
    recorder = SequenceRecorder(tmp_path / "rows", 2, np.array([30, 10, 20], np.int32))
    recorder(np.array([10, 30, 20, -1], np.int32), 2)
    np.testing.assert_array_equal(recorder.sequence(), [[1, 0], [2, -1]])


def test_mistakes(tmp_path: Path) -> None:
    recorder = SequenceRecorder(tmp_path / "rows", 2)
    with pytest.raises(UserError, match="does not hold the rows of a run"):
        recorder.sequence()
    recorder(IDS[:2], 1)
    with pytest.raises(UserError, match="lacks rows of the steps before step 3"):
        recorder(IDS[4:6], 3)
    with pytest.raises(UserError, match="Cannot write"):
        SequenceRecorder(tmp_path / "no" / "rows", 2)(IDS, 6)
