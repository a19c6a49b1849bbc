"""The weighting network of the best evaluation: kept, continued from a checkpoint, and named at the end."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from bilevel.devices import sharding
from bilevel.files import load_tree
from bilevel.training.best_weights import BEST, FOLDER, BestWeights


def keeper(folder: Path, *, lower: bool = True) -> BestWeights:
    mesh = sharding.make_mesh(jax.devices()[:1])
    return BestWeights(folder, mesh, "valid_loss", 1 if lower else -1, {"task": "rows"})


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
