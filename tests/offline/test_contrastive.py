"""Contrastive scores: differences of losses computed by hand, of one pair of data sets, and the share they choose."""

from pathlib import Path
from typing import Any

import labelled
import numpy as np
import pytest
from labelled import Net, classifier

from bilevel.data import ArrayDataset, RowView
from bilevel.offline.contrastive import LossTable, highest_fraction, load_gains, score_gains
from bilevel.types import UserError

SETTINGS = {"steps": 10}


def dataset(seed: int, rows: int) -> ArrayDataset:
    arrays = labelled.rows(seed, rows)
    return ArrayDataset({"x": arrays["x"], "label": arrays["label"]})


GENERIC, SPECIFIC = dataset(1, 37), dataset(2, 9)


def models(net: Net) -> tuple[Any, Any]:
    return labelled.start(net, 3), labelled.start(net, 4)


def gains(data: Any, net: Net = Net(), **options: Any) -> LossTable:  # noqa: B008
    return score_gains(classifier(net), *models(net), data, SPECIFIC, batch_size=8, settings=SETTINGS, **options)


def by_hand(net: Net = Net()) -> Any:  # noqa: B008
    batch = GENERIC.rows(np.arange(37))
    before, after = (
        labelled.losses(net, params, batch) if not state else classifier(net)(params, state, batch, None)[0]  # pyright: ignore
        for params, state in models(net)
    )
    return np.asarray(before) - np.asarray(after)


@pytest.mark.parametrize("net", [Net(), Net(norm=True)])
def test_scores_are_differences_of_losses(net: Net) -> None:
    wanted = by_hand(net)
    table = gains(GENERIC, net)
    assert table.losses.dtype == np.float32
    assert np.abs(wanted).min() > 0
    np.testing.assert_allclose(table.losses, wanted, rtol=1e-4, atol=1e-5)
    some = np.asarray([36, 5, 3])
    part = gains(RowView(GENERIC, some), net)
    np.testing.assert_allclose(part.losses[some], wanted[some], rtol=1e-4, atol=1e-5)
    assert np.isnan(part.losses).sum() == 34


def test_the_best_share_is_chosen() -> None:
    order = np.argsort(-by_hand())
    table = gains(GENERIC)
    for fraction, count in ((0.2, 7), (0.001, 1), (1.0, 37)):
        assert highest_fraction(table, fraction).tolist() == sorted(order[:count].tolist())
    some = np.arange(0, 37, 4)
    best = highest_fraction(gains(RowView(GENERIC, some)), 0.3)
    assert best.tolist() == sorted([row for row in order if row in some][:3])
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"must lie in \(0, 1\]"):
            highest_fraction(table, fraction)
    with pytest.raises(UserError, match="the table holds 0 numbers"):
        highest_fraction(LossTable(np.full(3, np.nan, np.float32), "", {}), 0.5)


def test_a_file_serves_one_pair_of_data_sets(tmp_path: Path) -> None:
    path, table = tmp_path / "gains.safetensors", gains(GENERIC)
    table.save(path)
    again = load_gains(path, GENERIC, SPECIFIC)
    np.testing.assert_array_equal(again.losses, table.losses)
    assert again.settings == {**SETTINGS, "specific_hash": SPECIFIC.content_hash}
    with pytest.raises(UserError, match=f"content hash {GENERIC.content_hash}, but these data have"):
        load_gains(path, dataset(3, 37), SPECIFIC)
    other = dataset(3, 9)
    with pytest.raises(
        UserError, match=f"other specific data .hash {SPECIFIC.content_hash}, here {other.content_hash}"
    ):
        load_gains(path, GENERIC, other)
    LossTable(table.losses, table.content_hash, {}).save(path)
    with pytest.raises(UserError, match="were made for no specific data: score the generic data for these"):
        load_gains(path, GENERIC, SPECIFIC)


def test_a_model_that_diverged_is_named() -> None:
    (params, state), after = models(Net())
    broken = {**params, "Dense_1": {**params["Dense_1"], "bias": np.full(labelled.CLASSES, np.nan, np.float32)}}
    with pytest.raises(UserError, match="the loss of example 0 is nan"):
        score_gains(classifier(Net()), (broken, state), after, GENERIC, SPECIFIC, batch_size=8, settings={})


def test_scores_for_one_part_of_the_specific_rows_are_not_those_of_another(tmp_path: Path) -> None:
    parts = [RowView(SPECIFIC, np.arange(i, i + 4)) for i in (0, 4)]
    table = score_gains(classifier(Net()), *models(Net()), GENERIC, parts[0], batch_size=8, settings=SETTINGS)
    table.save(tmp_path / "gains.safetensors")
    assert load_gains(tmp_path / "gains.safetensors", GENERIC, parts[0]).content_hash == GENERIC.content_hash
    with pytest.raises(UserError, match="other specific data"):
        load_gains(tmp_path / "gains.safetensors", GENERIC, parts[1])


def test_others_may_read_a_table(tmp_path: Path) -> None:
    gains(GENERIC).save(tmp_path / "gains.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "gains.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*folder.safetensors"):
        gains(GENERIC).save(tmp_path / "folder.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"gains.safetensors", "plain", "folder.safetensors"}
