"""The weighting network of the best evaluation: kept, continued from a checkpoint, and named at the end."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from study_calls import call, fails, metrics, result, weights

from bilevel.devices import sharding
from bilevel.files import load_tree
from bilevel.study.best_weights import FOLDER, BestWeights
from bilevel.study.task import Measure
from bilevel.study.weights import BEST

pytestmark = pytest.mark.usefixtures("one_device")


def keeper(folder: Path, *, lower: bool = True) -> BestWeights:
    measure = Measure("loss", "loss", lower_is_better=lower)
    task = SimpleNamespace(name="rows", measures=(measure,))
    mesh = sharding.make_mesh(jax.devices()[:1])
    return BestWeights(SimpleNamespace(directory=folder, task=task, mesh=mesh))  # pyright: ignore[reportArgumentType]


def see(best: BestWeights, step: int, value: float) -> None:
    state = SimpleNamespace(step=jnp.asarray(step), weight_params={"of": jnp.asarray([float(step)])})
    best.compare(state, {"valid_loss": value, "test_loss": -1.0})


def checkpoint(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)


def files(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / FOLDER).glob("*.safetensors"))


def kept(folder: Path) -> tuple[float, dict[str, str]]:
    tree, about = load_tree(folder / BEST)
    return float(tree["of"][0]), about


@pytest.mark.parametrize("lower", [True, False])
def test_the_best_is_kept_under_its_name(tmp_path: Path, lower: bool) -> None:
    best, sign = keeper(tmp_path, lower=lower), 1 if lower else -1
    for step, value in ((2, math.nan), (4, 3.0), (6, 5.0), (8, 2.0), (10, 2.0)):
        see(best, step, sign * value)
    assert files(tmp_path) == [4, 8], "each better than all before"
    best.finish()
    assert kept(tmp_path) == (8.0, {"task": "rows", "step": "8", "valid_loss": repr(sign * 2.0)})
    assert not (tmp_path / FOLDER).exists()


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    """The next evaluation is at another step, as with another --evaluate-every."""
    best = keeper(tmp_path)
    for step, value in ((2, 5.0), (4, 4.0), (6, 1.0)):
        see(best, step, value)
    checkpoint(tmp_path, 4)
    again = keeper(tmp_path)
    assert files(tmp_path) == [2, 4]
    see(again, 7, 3.0)
    see(again, 8, 3.5)
    again.finish()
    assert kept(tmp_path)[0] == 7.0


def test_a_step_that_is_evaluated_again_counts_once(tmp_path: Path) -> None:
    """Its older checkpoint is used, as the newest is damaged."""
    checkpoint(tmp_path, 2, 6)
    best = keeper(tmp_path)
    for step, value in ((2, 5.0), (4, 4.0), (6, 1.0)):
        see(best, step, value)
    again = keeper(tmp_path)
    see(again, 4, 4.0)
    assert files(tmp_path) == [2, 4]


def test_as_many_files_as_checkpoints_can_ask_for(tmp_path: Path) -> None:
    best = keeper(tmp_path)
    for step, value in ((2, 9.0), (4, 8.0), (6, 7.0), (8, 6.0)):
        see(best, step, value)
    checkpoint(tmp_path, 5, 9)
    see(best, 10, 5.0)
    assert files(tmp_path) == [4, 6, 8, 10], "step 4 is the best of a run that continues at 5"


def test_killed_between_the_name_and_the_result(tmp_path: Path) -> None:
    best = keeper(tmp_path)
    see(best, 2, 5.0)
    see(best, 4, 4.0)
    checkpoint(tmp_path, 4, 8)
    best.finish()
    again = keeper(tmp_path)
    assert files(tmp_path) == [4]
    again.finish()
    assert kept(tmp_path)[0] == 4.0


def test_methods_take_the_best_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of soba, whose valid loss rises again where θ's steps are far too long; of dds; and of a run without."""
    given: tuple[Any, ...] = ("--evaluate-every", 1, "--optimizer.name", "sgd", "--optimizer.learning-rate", 0.2)
    call(tmp_path / "run", "soba", *given)
    source = tmp_path / "run" / "soba-seed0"
    rows = metrics(source)
    best = min((row for row in rows if "valid_loss" in row), key=lambda row: row["valid_loss"])
    tree, about = load_tree(source / BEST)
    assert int(about["step"]) == best["step"] < rows[-1]["step"]
    assert tree["of"].tolist() != weights(source).tolist()
    for at, wanted in (("end", weights(source)), ("best", tree["of"])):
        call(tmp_path / at, "frozen", "--frozen.weights", source, "--frozen.at", at)
        assert weights(tmp_path / at / "frozen-seed0").tolist() == wanted.tolist()
    still = ("--retrained-dds.weight-warmup", 10**6, "--retrained-dds.at", "best")
    call(tmp_path / "dds", "retrained_dds", *given, *still)
    begun, _ = load_tree(tmp_path / "dds" / "dds-seed0" / BEST)
    assert weights(tmp_path / "dds" / "retrained_dds-seed0") == pytest.approx(begun["of"], abs=1e-5)
    assert result(tmp_path / "dds", "retrained_dds")["preparation_steps"] == 8
    (source / BEST).unlink()
    fails(tmp_path / "none", "frozen", "--frozen.weights", source, "--frozen.at", "best")
    assert "learned no weights while it trained: give --frozen.at end." in capsys.readouterr().err
