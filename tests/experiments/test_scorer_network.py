"""A small proxy that scores rows in place of the classifier, and the precision of scoring."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.image_classification.config import Config, DataConfig, MethodConfig, ModelConfig
from experiments.image_classification.evaluation import Evaluator
from experiments.image_classification.faults import load_data
from experiments.image_classification.model import model_of
from experiments.image_classification.run import run
from experiments.runs import CHECKPOINTS

from bilevel.devices import sharding
from bilevel.offline.irreducible import LossTable
from bilevel.training import Checkpoints
from experiments.image_classification import build

pytest.importorskip("sklearn")
BIG, SMALL = 40, 8


def config_of(folder: Path, **weights: Any) -> Config:
    return Config(
        steps=4, batch_size=SMALL, big_batch_size=BIG, log_every=2, evaluate_every=2, checkpoint_every=2, steps_per_call=2,
        progress=False, run_dir=folder, data=DataConfig(limit=400), model=ModelConfig(width=32),
        weights=MethodConfig(il_steps=4, **weights),
    )  # fmt: skip


def one_step(config: Config, method: str, known: Any) -> tuple[Any, Any, Any, Any]:
    """The model, the parameters before a step, its big batch, and its metrics."""
    data = load_data(config)
    model = model_of(config, method, data)
    weighting = build.weighting_of(config, method, data, model.losses, known)
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = build.build_step(config, method, data, model.losses, weighting, 0, mesh)
    params, model_state = model.init(jax.random.key(3))
    state = step.init(jax.random.key(0), params, weighting.init(jax.random.key(1)), model_state)
    batch = data.train.rows(np.arange(BIG) * 3)
    _, metrics = jax.jit(step.step)(state, batch, data.dev.rows(np.arange(SMALL)))
    return model, state, batch, metrics


def test_the_proxy_picks_the_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, scorer_network="mlp-small")
    table = np.random.default_rng(0).exponential(size=400).astype(np.float32)
    model, state, batch, metrics = one_step(config, "rho_loss", {"table": jnp.asarray(table)})
    losses, _ = model.losses.score(state.params["proxy"], state.model_state["proxy"], batch, jax.random.key(0))
    wanted = np.argsort(-(np.asarray(losses) - table[batch["id"]]))[:SMALL]
    assert set(np.asarray(metrics["selected"]).tolist()) == set(wanted.tolist())
    units = {name: params["hidden_0"]["bias"].shape[0] for name, params in state.params.items()}
    assert units == {"target": 32, "proxy": 4}


def test_the_classifier_begins_the_same_with_a_proxy_and_without(tmp_path: Path) -> None:
    alone, both = config_of(tmp_path), config_of(tmp_path, scorer_network="mlp-small")
    data, key = load_data(alone), jax.random.key(0)
    params, _ = model_of(alone, "rho_loss", data).init(key)
    with_proxy, _ = model_of(both, "rho_loss", data).init(key)
    jax.tree.map(np.testing.assert_array_equal, with_proxy["target"], params)
    assert model_of(both, "uniform", data).scored_by is None
    assert "target" not in model_of(both, "uniform", data).init(key)[0]


@pytest.mark.slow
def test_a_run_with_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Irreducible losses are those of the classifier's network, and what is evaluated is the classifier."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    config = dataclasses.replace(config_of(tmp_path, scorer_network="mlp-small"), average=0.9)
    data = load_data(config)
    result = run(config, "rho_loss", 0, data)
    assert json.loads((tmp_path / "rho_loss-seed0" / "result.json").read_text()) == result
    assert result["scored_by"] == (
        "scored by mlp-small, which is trained along on the rows picked, by a forward pass in float32, no BatchNorm"
    )
    file = tmp_path / "irreducible" / "table.safetensors"
    table = LossTable.load(file, content_hash=data.train.content_hash, settings=None)
    assert table.settings["network"] == "mlp"
    model = model_of(config, "rho_loss", data)
    params, model_state = model.init(jax.random.key(0))
    weighting = build.weighting_of(config, "rho_loss", data, model.losses, table.params())
    step = build.build_step(config, "rho_loss", data, model.losses, weighting, 0, mesh)
    template = step.init(jax.random.key(0), params, table.params(), model_state)
    with Checkpoints(tmp_path / "rho_loss-seed0" / CHECKPOINTS) as checkpoints:
        restored = checkpoints.restore_latest(template)
    assert restored is not None
    averaged, _ = restored[1].ema
    alone = build.losses_of(config, data, build.classifier(config, data)).evaluate
    assert Evaluator(alone)(averaged["target"], {}, data.test).loss == pytest.approx(result["test_loss"])


@pytest.mark.parametrize("network", ["mlp", "resnet20"])
def test_scoring_in_half_precision(tmp_path: Path, network: str) -> None:
    """Only the scoring pass is in bfloat16; without the flag nothing is."""
    half = config_of(tmp_path, scoring_dtype="bfloat16")
    for config in (half, config_of(tmp_path)):
        config = dataclasses.replace(config, model=ModelConfig(network, width=32))
        data = load_data(config)
        model = model_of(config, "rho_loss", data)
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        batch = data.train.rows(np.arange(SMALL))
        text = {
            name: str(jax.make_jaxpr(getattr(model.losses, name))(params, state, batch, jax.random.key(0)))
            for name in ("score", "train", "evaluate")
        }
        assert ("bf16" in text["score"]) == (config.weights.scoring_dtype is not None)
        assert "bf16" not in text["train"] + text["evaluate"]
        assert model.scored_by is not None
        assert ("no BatchNorm" in model.scored_by) == (network == "mlp")
        assert "bfloat16" in model.scored_by or config.weights.scoring_dtype is None
