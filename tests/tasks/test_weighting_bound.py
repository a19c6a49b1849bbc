"""Every task keeps the logits of its weighting network within the bound of its settings, and as they are without one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.selection.scorers import bounded
from bilevel.study.flags import parse
from bilevel.tasks.image_text import TASK as IMAGE_TEXT
from bilevel.tasks.language_modeling import TASK as LANGUAGE_MODELING
from bilevel.tasks.translation import TASK as TRANSLATION
from bilevel.types import Array, UserError

ROWS = 24


def texts() -> dict[str, Array]:
    return {"tokens": tokens(64), "length": jnp.full(ROWS, 64)}


def pairs() -> dict[str, Array]:
    lengths = jnp.full(ROWS, 9)
    return {"source": tokens(9), "source_length": lengths, "target": tokens(9) // 2, "target_length": lengths}


def images() -> dict[str, Array]:
    return {"small": tokens(16 * 16 * 3).reshape(ROWS, 16, 16, 3).astype(jnp.uint8)}


def tokens(columns: int) -> Array:
    return jax.random.randint(jax.random.key(1), (ROWS, columns), 0, 250)


CASES = {
    "language_modeling": (LANGUAGE_MODELING, None, texts),
    "translation": (TRANSLATION, SimpleNamespace(source=SimpleNamespace(size=250), target=SimpleNamespace(size=250)), pairs),
    "image_text": (IMAGE_TEXT, SimpleNamespace(statistics=((0.5,) * 3, (0.25,) * 3)), images),
}  # fmt: skip


def logits_of(case: str, **model: Any) -> np.ndarray:
    """The logits of a network whose last layer has moved far away from 0, where it begins."""
    task, splits, batch = CASES[case]
    config: Any = task.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    weighting = task.weighting(config, splits)  # pyright: ignore[reportArgumentType]
    assert callable(weighting.logits)
    params = dict(weighting.init(jax.random.key(0)))
    kernel = params["logit"]["kernel"]
    params["logit"] = {**params["logit"], "kernel": 300 * jax.random.normal(jax.random.key(2), kernel.shape)}
    return np.asarray(jax.jit(weighting.logits)(params, batch()))


@pytest.mark.parametrize("case", CASES)
def test_logits_stay_within_the_bound(case: str) -> None:
    raw = logits_of(case, weighting_bound=0.0)
    assert np.abs(raw).max() > 50
    np.testing.assert_allclose(logits_of(case, weighting_bound=25.0), 25 * np.tanh(raw / 25), rtol=1e-4)
    np.testing.assert_allclose(logits_of(case, weighting_bound=3.0), 3 * np.tanh(raw / 3), rtol=1e-4)


@pytest.mark.parametrize("task", [LANGUAGE_MODELING, TRANSLATION])
@pytest.mark.parametrize(("preset", "bound"), [("default", 25.0), ("paper", 0.0), ("atd", 0.0)])
def test_text_is_bounded_by_default_and_not_in_the_papers(task: Any, preset: str, bound: float) -> None:
    assert parse(task, ["--preset", preset], "test").config.task.model.weighting_bound == bound


def test_a_bound_that_is_none() -> None:
    network = lambda weights, batch: weights * batch  # noqa: E731
    assert bounded(network, 0.0) is network
    for bound in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="bound"):
            bounded(network, bound)
