"""Tables of irreducible losses: the right numbers by id, refused for other data, and no row scored by its own model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import labelled
import numpy as np
import optax
import pytest
from labelled import Net, classifier

import bilevel
from bilevel.data.loading.arrays import ArrayDataset
from bilevel.data.loading.views import RowView
from bilevel.nn.head import with_head
from bilevel.offline import irreducible
from bilevel.offline.irreducible import LossTable, cross_scored, half, half_of, score_rows
from bilevel.offline.loss_table import combine, highest
from bilevel.selection import filters, scoring
from bilevel.types import LossAux, UserError

NET, SETTINGS = Net(), {"model": "net", "steps": 10, "rate": 0.1}


def dataset(seed: int = 1, rows: int = 37) -> ArrayDataset:
    arrays = labelled.rows(seed, rows)
    return ArrayDataset({"x": arrays["x"], "label": arrays["label"]})


def table_of(data: Any, **options: Any) -> LossTable:
    params, _ = labelled.start(NET, 3)
    return score_rows(classifier(NET), params, {}, data, batch_size=8, settings=SETTINGS, **options)


def test_numbers_by_id_whatever_the_batches() -> None:
    data = dataset()
    params, _ = labelled.start(NET, 3)
    wanted = labelled.losses(NET, params, data.rows(np.arange(37)))
    traces: list[int] = []

    def counting(*args: Any) -> Any:
        traces.append(1)
        return classifier(NET)(*args)

    table = score_rows(counting, params, {}, data, batch_size=8, settings=SETTINGS)
    assert len(traces) == 1
    assert table.losses.dtype == np.float32
    np.testing.assert_allclose(table.losses, wanted, rtol=1e-5)
    np.testing.assert_allclose(table.params()["table"], table.losses)
    some = np.asarray([5, 3, 36])
    part = table_of(RowView(data, some))
    np.testing.assert_allclose(part.losses[some], np.asarray(wanted)[some], rtol=1e-5)
    assert np.isnan(part.losses).sum() == 34


def test_entropies_beforehand_and_the_subset_they_choose() -> None:
    data = dataset()
    params, _ = labelled.start(NET, 3)
    read = lambda losses, metrics, batch: scoring.entropies(metrics["logits"])  # noqa: E731
    table = score_rows(
        with_head(classifier(NET)), params, {}, data, batch_size=16, settings={"score": "entropy"}, read=read
    )
    logits: Any = jax.jit(NET.apply)({"params": params}, data.rows(np.arange(37))["x"])
    p = jax.nn.softmax(logits)
    wanted = np.asarray(-(p * jnp.log(p)).sum(1))
    np.testing.assert_allclose(table.losses, wanted, rtol=1e-4)
    assert highest(table, 5).tolist() == sorted(np.argsort(-wanted)[:5].tolist())
    with pytest.raises(UserError, match="the table holds 37 numbers"):
        highest(table, 38)


def test_file_is_of_its_data_and_settings(tmp_path: Path) -> None:
    data, path = dataset(), tmp_path / "tables" / "il.safetensors"
    table = table_of(data)
    table.save(path)
    table.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["il.safetensors"]
    again = LossTable.load(path, content_hash=data.content_hash, settings=SETTINGS)
    np.testing.assert_array_equal(again.losses, table.losses)
    any_settings = LossTable.load(path, content_hash=data.content_hash, settings=None)
    assert any_settings.settings == SETTINGS
    with pytest.raises(UserError, match=f"content hash {data.content_hash}, but these data have"):
        LossTable.load(path, content_hash=dataset(2).content_hash, settings=SETTINGS)
    with pytest.raises(UserError, match=r"made with rate=0\.1 instead of 0\.2, seed=None instead of 1: score"):
        LossTable.load(path, content_hash=data.content_hash, settings={**SETTINGS, "rate": 0.2, "seed": 1})
    with pytest.raises(UserError, match="There is no table of losses"):
        LossTable.load(tmp_path / "none.safetensors", content_hash="", settings={})
    LossTable(table.losses[:, None], data.content_hash, SETTINGS).save(tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"is not a table of losses \(its losses are float32\[\d+, 1\]"):
        LossTable.load(tmp_path / "wide.safetensors", content_hash=data.content_hash, settings=None)
    for content in (b"", b"not a safetensors file", path.read_bytes()[:100]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a safetensors file"):
            LossTable.load(tmp_path / "bad.safetensors", content_hash="", settings={})


def test_halves_are_a_function_of_the_id() -> None:
    ids = np.arange(10_000)
    halves = half_of(ids)
    assert abs(halves.mean() - 0.5) < 0.02
    np.testing.assert_array_equal(half_of(ids[::-7]), halves[::-7])
    np.testing.assert_array_equal(half_of(ids.astype(np.int32)), halves)
    assert 0.45 < np.mean(half_of(ids, 1) != halves) < 0.55
    assert 0.45 < np.mean(halves[1:] != halves[:-1]) < 0.55  # no pattern along the order


@pytest.mark.parametrize("view", [False, True])
def test_no_row_is_scored_by_a_model_trained_on_it(view: bool) -> None:
    """A "model" is the set of ids it was trained on; the loss of a row is 1 if it is among them."""
    whole = dataset(rows=101)
    data: Any = RowView(RowView(whole, np.arange(100)[::-1]), np.arange(0, 100, 2)) if view else whole
    wanted = {id for id in range(100) if id % 2} if view else set(range(101))

    def trained_on(which: int) -> tuple[Any, Any]:
        view = half(data, which, seed=4)
        return jnp.zeros(101).at[view.rows(np.arange(len(view)))["id"]].set(1.0), {}

    def seen(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return params[batch["id"]], LossAux(model_state, {})

    models = (trained_on(0), trained_on(1))
    assert float(sum(m[0].sum() for m in models)) == len(wanted)
    table = cross_scored(seen, models, data, batch_size=8, settings={}, seed=4)
    assert set(np.flatnonzero(np.isfinite(table.losses)).tolist()) == wanted
    assert np.nanmax(table.losses) == 0
    assert table.settings == {"half_seed": 4}
    swapped = cross_scored(seen, (models[1], models[0]), data, batch_size=8, settings={}, seed=4)
    assert np.nanmin(swapped.losses) == 1


def test_one_table_serves_many_targets() -> None:
    data = dataset(rows=64)
    table = table_of(data)
    for net, optimizer in ((Net(hidden=5), optax.sgd(0.1)), (Net(hidden=12), optax.adam(0.01))):
        params, _ = labelled.start(net, 4)
        batch = data.rows(np.arange(63, 31, -1))
        train = bilevel.make_step(
            classifier(net), scoring.rho_loss(classifier(net)), optimizer, None, bilevel.frozen(), batch_size=4,
            filter=filters.top_k(),
        )  # fmt: skip
        _, metrics = jax.jit(train.step)(train.init(jax.random.key(0), params, table.params()), batch, {})
        scores = labelled.losses(net, params, batch) - table.losses[batch["id"]]
        assert set(np.asarray(metrics["selected"]).tolist()) == set(np.argsort(-np.asarray(scores))[:4].tolist())


def test_mistakes_are_explained() -> None:
    data = dataset()
    table = table_of(data)
    with pytest.raises(UserError, match="37 examples are in both tables, the first is 0"):
        combine(table, table)
    with pytest.raises(UserError, match="of different data"):
        combine(table, table_of(dataset(2)))
    with pytest.raises(UserError, match="with different settings"):
        combine(table, LossTable(table.losses, table.content_hash, {}))
    with pytest.raises(UserError, match="batch_size=0"):
        score_rows(classifier(NET), {}, {}, data, batch_size=0, settings={})
    with pytest.raises(UserError, match="ids reach from 0 to 7, outside 0 to 2: give num_examples"):
        table_of(data, num_examples=3)
    with pytest.raises(UserError, match="the loss of example 11 is nan"):
        table_of(data, read=lambda losses, metrics, batch: jnp.where(batch["id"] == 11, jnp.nan, losses))
    with pytest.raises(UserError, match="must be 0 or 1"):
        half(data, 2)
    with pytest.raises(UserError, match=r"half [01] of 1 rows is empty"):
        [half(dataset(rows=1), which) for which in (0, 1)]


def test_seconds_of_scoring_leave_out_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr(irreducible, "perf_counter", lambda: next(times))
    clock = irreducible.ScoringClock()
    clock(10, 25)
    assert clock.seconds == 0
    clock(20, 25)
    clock(25, 25)
    assert clock.seconds == pytest.approx(2 / 15 * 25)
