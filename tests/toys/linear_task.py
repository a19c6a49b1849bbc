"""The smallest task: linear regression on rows of three domains, of which one is noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.data import ArrayDataset
from bilevel.nn.head import with_head
from bilevel.study import Evaluate, Known, Measure, Model, ModelOptions, Splits, Text, Weighting, mean_evaluator
from bilevel.types import LossAux, UserError

DOMAINS = ("first", "second", "noise")
FEATURES = 4
AT_ONCE, MOST = 20, 64
"""Rows evaluated at once, and the most that any test gives a step."""
STUDY = {
    "steps": 8, "batch_size": 4, "big_batch_size": 16, "log_every": 2, "evaluate_every": 4, "checkpoint_every": 4,
    "progress": False, "optimizer": {"learning_rate": 0.05},
}  # fmt: skip
PRESETS = {"default": {"study": STUDY}}


@dataclass(frozen=True)
class Data:
    specific: str = "first"
    """first or second: the domain of the specific rows."""
    rows: int = 240
    """Generic rows, a third of them of each domain."""
    classes: int = 0
    """2: rows have the sign of y as label."""


@dataclass(frozen=True)
class Net:
    network: Literal["linear", "affine", "classes"] = "linear"
    """A line without or with a bias; classes: a classifier of the label by one linear layer."""


@dataclass(frozen=True)
class LinearConfig:
    data: Data = field(default_factory=Data)
    model: Net = field(default_factory=Net)


def rows(domain: np.ndarray, seed: int, name: str) -> ArrayDataset:
    """y = ±Σx on the first two domains, and noise on the third."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(domain), FEATURES)).astype(np.float32)
    y = np.choose(domain, [x.sum(1), -x.sum(1), 3 * rng.normal(size=len(domain))]).astype(np.float32)
    return ArrayDataset(
        {"x": x, "y": y, "domain": domain.astype(np.int32), "label": (y > 0).astype(np.int32)}, name=name
    )


def classifier() -> Model:
    """The sign of y by one layer, with a scoring loss that gives its logits."""
    layer = nn.Dense(2)

    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Any, LossAux]:
        assert len(batch["x"]) <= MOST, "what scores all rows does not ask the model how many it takes at once"
        logits = layer.apply({"params": params}, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])  # pyright: ignore[reportArgumentType]
        return losses, LossAux(model_state, {})

    def init(key: Any) -> tuple[Any, Any]:
        return layer.init(key, jnp.zeros((1, FEATURES)))["params"], {}

    scoring = with_head(loss)
    return Model(init, loss, loss, loss, scoring=lambda statistics: scoring, describe="a classifier", at_once=AT_ONCE)


class LinearTask:
    """Fit a line to rows of which a third are like the specific rows."""

    name, title, config = "linear", "A linear task", LinearConfig
    measures: Sequence[Measure] = (Measure("loss", "loss", 3, "squared units"),)
    presets: Mapping[str, Mapping[str, Mapping[str, Any]]] = PRESETS

    def open(self, config: LinearConfig, folder: Any) -> Splits:
        d = config.data
        if d.specific not in DOMAINS[:2]:
            raise UserError(f"--data.specific {d.specific} does not exist: give first or second.")
        kind, mixed = DOMAINS.index(d.specific), np.arange(d.rows) % 3
        parts = [rows(np.full(n, kind), kind * 9 + i, d.specific) for i, n in enumerate((60, 20, 20, 40), 1)]
        return Splits(
            train=rows(mixed, 0, "generic"),
            specific=parts[0],
            valid={"specific": parts[1], "generic": rows(mixed[:60], 99, "generic valid")},
            test={"specific": parts[2]},
            held_out=parts[3],
            known={
                "domain": Known(mixed, DOMAINS),
                "noisy": Known((mixed == 2).astype(int), ("no", "yes"), fault=True),
            },
            classes=d.classes,
            about="Rows of a line.",
        )

    def model(self, config: LinearConfig, splits: Splits, options: ModelOptions) -> Model:
        network = options.network or config.model.network
        if network == "classes":
            return classifier()
        bias = network == "affine"

        def init(key: Any) -> tuple[Any, Any]:
            return {"w": 0.1 * jax.random.normal(key, (FEATURES,))} | ({"b": jnp.zeros(())} if bias else {}), {}

        def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Any, LossAux]:
            assert len(batch["x"]) <= MOST, "what scores all rows does not ask the model how many it takes at once"
            found = batch["x"] @ params["w"] + params.get("b", 0.0)
            correct = ((found > 0) == (batch["label"] > 0)).astype(jnp.float32)
            return (found - batch["y"]) ** 2, LossAux(model_state, {"correct": correct})

        return Model(init, loss, loss, loss, describe="a line", at_once=AT_ONCE)

    def weighting(self, config: LinearConfig, splits: Splits) -> Weighting:
        return Weighting(
            lambda key: {"of": jnp.zeros(len(DOMAINS))}, lambda weights, batch: weights["of"][batch["domain"]]
        )

    def evaluate(self, config: LinearConfig, splits: Splits, model: Model) -> Evaluate:
        return mean_evaluator(model.evaluation, AT_ONCE)  # one program for all sets

    def show(self, config: LinearConfig, splits: Splits, ids: Any) -> list[Text]:
        return [Text(0.0, DOMAINS[i % 3], f"row {i}") for i in ids]


TASK = LinearTask()
