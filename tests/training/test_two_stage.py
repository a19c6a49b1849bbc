"""Rows that travel once they are picked, and a past: the same training wherever the data are, and fewer bytes."""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.data import ArrayDataset, Loader, PastLoader
from bilevel.devices import sharding
from bilevel.training import Data, LoopConfig, Resident, TwoStageData, train
from bilevel.types import UserError

ROWS, BIG, SMALL, SPECIFIC, STEPS = 60, 16, 8, 8, 5


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    losses, aux = toy.loss(p, model_state, batch, rng)
    past = batch["past"].arrays
    return losses + jnp.sum(jnp.where(past["real"], past["y"], 0)) * p["last"]["kernel"].mean(), aux


def specific_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    return toy.loss(p, model_state, batch, rng)


def weighting(wp: Any, batch: Any) -> Any:
    return batch["small"] @ wp["w"][:2]


STEP = bilevel.make_step(
    loss, weighting, optax.sgd(0.05), optax.adam(0.05), bilevel.dds(), batch_size=SMALL, update_every=2,
    specific_loss=specific_loss, alpha_batch="uniform",
)  # fmt: skip


def dataset(*names: str) -> ArrayDataset:
    x = np.random.default_rng(0).normal(size=(ROWS, toy.FEATURES)).astype(np.float32)
    found = {"x": x, "y": np.sin(x).sum(1), "small": x[:, :2]}
    return ArrayDataset({name: found[name] for name in names or found})


def loaders() -> tuple[PastLoader, Loader]:
    return PastLoader(Loader(dataset(), BIG, seed=3), dataset("y"), 20), Loader(dataset(), SPECIFIC, seed=4)


def two_stages(mesh: Any = None) -> TwoStageData:
    generic, specific = loaders()
    return TwoStageData(generic, dataset("small"), specific, mesh)


def run(data: Any, run_dir: Path | None = None, step: Any = STEP, mesh: Any = None, **config: Any) -> Any:
    state = step.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    state = state if mesh is None else jax.device_put(state, sharding.replicated(mesh))
    ids: list[int] = []

    def on_selected(rows: np.ndarray, at: int) -> dict[str, float]:
        ids.extend(rows.tolist())
        return {}

    given = {"num_steps": STEPS, "log_every": 1, "evaluate_every": 5, "checkpoint_every": 2, "progress": False}
    config = {**given, **config}
    result = train(step, state, data=data, config=LoopConfig(**config), run_dir=run_dir, on_selected=on_selected)
    return toy.flat((result.state.params, result.state.weight_params)), ids


def test_the_same_training_wherever_the_data_are() -> None:
    wanted, rows = run(Data(*loaders()))
    mesh = sharding.make_mesh()
    place = sharding.batch_placer(mesh)
    spread = bilevel.make_step(
        loss, weighting, optax.sgd(0.05), optax.adam(0.05), bilevel.dds(), batch_size=SMALL, update_every=2,
        specific_loss=specific_loss, alpha_batch="uniform", mesh=mesh,
    )  # fmt: skip
    others: dict[str, Any] = {
        "two stages": lambda: run(two_stages()),
        "resident": lambda: run(Resident(*loaders()), steps_per_call=3),
        "two stages on eight devices": lambda: run(two_stages(mesh), step=spread, mesh=mesh),
        "resident on eight devices": lambda: run(Resident(*loaders(), mesh), step=spread, mesh=mesh),
        "eight devices": lambda: run(Data(*loaders(), place, place), step=spread, mesh=mesh),
    }
    for name, other in others.items():
        found, chosen = other()
        assert chosen == rows, name
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_run_that_continues(tmp_path: Path) -> None:
    """Bit for bit that of a run that was left alone: the past too is a function of the step."""
    wanted, rows = run(two_stages())
    _, first = run(two_stages(), tmp_path / "run", num_steps=3)
    found, rest = run(two_stages(), tmp_path / "run")
    assert first + rest == rows
    np.testing.assert_array_equal(found, wanted)


class Big:
    """As large as real data, without the memory: zeros of strides 0."""

    name = content_hash = "big"

    def __init__(self, **shapes: tuple[tuple[int, ...], Any]):
        self.shapes = shapes

    def __len__(self) -> int:
        return 1 << 20

    def rows(self, indices: Any) -> dict[str, np.ndarray]:
        zeros = {k: np.broadcast_to(np.zeros((), d), (len(indices), *s)) for k, (s, d) in self.shapes.items()}
        return {**zeros, "id": np.asarray(indices, np.int32)}


IMAGE, TEXT = ((224, 224, 3), np.uint8), ((768,), np.float16)
CHOICE: dict[str, Any] = {"small": ((32, 32, 3), np.uint8), "caption": ((), np.int32), "label": ((), np.int32)}


def test_bytes_that_travel_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 images of 224 × 224 pixels, of which 256 are picked."""
    whole: Any = Big(image=IMAGE, text=TEXT, **CHOICE)
    loader = Loader(whole, 2048, seed=0)
    generic = PastLoader(loader, cast(Any, Big(text=TEXT, caption=((), np.int32))), 8192)
    specific: Any = type("Nothing", (), {"batch": lambda self, step: {}})()
    moved: list[dict[str, int]] = []

    def count(batch: Any) -> Any:
        moved.append({jax.tree_util.keystr(path): x.nbytes for path, x in jax.tree_util.tree_leaves_with_path(batch)})
        return {name: name for name in batch}

    def megabytes(name: str = "") -> float:
        return round(sum(n for batch in moved for path, n in batch.items() if name in path) / 1e6, 1)

    Data(generic, specific, count, count).item(5, 1, 1)
    assert (megabytes("image"), megabytes("past"), megabytes()) == (308.3, 12.6, 330.4)
    moved.clear()
    monkeypatch.setattr(TwoStageData, "_place", lambda self, batch: count(batch))
    source = TwoStageData(generic, cast(Any, Big(**CHOICE)), specific)
    _, _, rows_at = source.item(5, 1, 1).arguments
    rows_at(np.arange(0, 2048, 8))
    assert (megabytes("image"), megabytes("past"), megabytes()) == (38.5, 12.6, 58.7)


def test_what_does_not_fit_is_refused() -> None:
    other = Loader(ArrayDataset({"x": np.zeros(9)}, name="other"), 4, seed=0)
    with pytest.raises(UserError, match="The small rows of arrays are 60, but other has 9"):
        TwoStageData(other, dataset("small"), loaders()[1])
    with pytest.raises(UserError, match="steps_per_call=2 does not fit steps in two stages"):
        two_stages().programs(STEP, 2)
    with pytest.raises(UserError, match="takes a TrainStep, not a function"):
        two_stages().programs(cast(Any, loss), 1)
