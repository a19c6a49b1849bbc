"""The scorer of DDS as the classification experiment builds it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from experiments.image_classification.config import Config, DataConfig, MethodConfig, ModelConfig
from experiments.image_classification.faults import load_data

from experiments.image_classification import build, pictures


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


def test_scores_that_are_kept_are_those_of_batches_drawn_at_random(tmp_path: Path) -> None:
    """A scorer that centres its batch, on rows sorted by class: classes differ by as much as their brightness does."""
    label = np.repeat(np.arange(4), 65)
    image = (50 * label[:, None, None, None] + np.random.default_rng(0).integers(0, 9, (260, 5, 5, 1))).astype(np.uint8)
    np.savez(tmp_path / "sorted.npz", image=image, label=label)
    data = load_data(
        Config(data=DataConfig(source=str(tmp_path / "sorted.npz"), noise="none", dev=8, holdout=0, test=8))
    )

    def logits(weights: Any, batch: Any) -> Any:
        bright = batch["image"].astype(float).mean((1, 2, 3)) / 50
        return bright - bright.mean()

    shares = pictures.save_scores(tmp_path, {}, logits, data, 16)
    scores = np.load(tmp_path / "scores.npz")["scores"]
    known, count = data.train.arrays["label"], len(data.train)
    assert count % 16, "the last batch is filled"
    means = [scores[known == c].mean() for c in range(4)]
    np.testing.assert_allclose(means, np.arange(4) - known.mean(), atol=0.15)
    mass = np.bincount(known, np.exp(scores), 4)
    np.testing.assert_allclose([shares[f"weight_share/{c}"] for c in range(4)], mass / mass.sum(), rtol=1e-6)
