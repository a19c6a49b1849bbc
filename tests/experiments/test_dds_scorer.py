"""The scorer of DDS as the classification experiment builds it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from experiments.image_classification import build
from experiments.image_classification.config import Config, DataConfig, MethodConfig, ModelConfig
from experiments.image_classification.faults import load_data


def test_scores_are_bounded() -> None:
    """Raw scores far beyond the bound keep their order and their sign within it; without a bound they are as they are."""
    pytest.importorskip("sklearn")
    config = Config(data=DataConfig(limit=200), model=ModelConfig(width=16))
    data = load_data(config)
    batch = data.train.rows(np.arange(32))

    def scores(bound: float) -> Any:
        found = build.scorer_network(dataclasses.replace(config, weights=MethodConfig(scorer_bound=bound)), data)
        assert callable(found.logits)
        params = found.init(jax.random.key(0))
        np.testing.assert_array_equal(found.logits(params, batch), 0)
        params["head"] = jax.tree.map(
            lambda x: 20 * jax.random.normal(jax.random.key(1), x.shape, x.dtype), params["head"]
        )
        return np.asarray(found.logits(params, batch))

    raw = scores(0.0)
    assert np.abs(raw).max() > 6
    np.testing.assert_allclose(scores(3.0), 3 * np.tanh(raw / 3), rtol=1e-5)
