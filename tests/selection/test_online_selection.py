"""Online batch selection: every score against an independent computation, its cost, and what it leaves alone."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import labelled
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from labelled import Net, classifier

import bilevel
from bilevel.devices import sharding
from bilevel.nn.head import with_head
from bilevel.selection import filters, scoring
from bilevel.types import Array, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

BIG, SMALL = 40, 8
NET, PROXY = Net(), Net(hidden=5)


def selecting(loss: Any, scorer: Any, rule: Any = None, **options: Any) -> bilevel.TrainStep:
    optimizer = options.pop("optimizer", optax.sgd(0.1))
    options = {"batch_size": SMALL, "filter": rule or filters.top_k(), **options}
    return bilevel.make_step(loss, scorer, optimizer, None, bilevel.frozen(), **options)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_norms_against_automatic_differentiation(bias: bool) -> None:
    """In float64: the gradient of each row's loss in the last layer, and in the logits."""
    with jax.enable_x64(True):
        net, batch = Net(bias=bias), labelled.rows(1, 20, dtype=np.float64)
        params, _ = labelled.start(net, dtype=np.float64)

        def one(last: Any, x: Any, label: Any) -> Array:
            row = {"x": x[None], "label": label[None]}
            return labelled.losses(net, {**params, "Dense_1": last}, row)[0]

        gradients = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params["Dense_1"], batch["x"], batch["label"])
        wanted = np.sqrt(sum(np.sum(np.asarray(g) ** 2, axis=tuple(range(1, g.ndim))) for g in gradients.values()))
        metrics = jax.jit(with_head(classifier(net)))(params, {}, batch, jax.random.key(0))[1].metrics
        found = scoring.last_layer_gradient_norms(metrics["logits"], batch["label"], metrics["hidden"], bias=bias)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        in_logits = jax.jit(jax.vmap(jax.grad(cross_entropy)))(metrics["logits"], batch["label"])
        found = scoring.last_layer_gradient_norms(metrics["logits"], batch["label"])
        np.testing.assert_allclose(found, np.linalg.norm(in_logits, axis=1), rtol=1e-12)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(net: Any, params: Any, x: Any) -> Any:
    return net.apply({"params": params}, x)


def probabilities(net: Any, params: Any, batch: Any) -> np.ndarray:
    logits = np.asarray(logits_of(net, params, batch["x"]), np.float64)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def cross_entropies(net: Any, params: Any, batch: Any) -> np.ndarray:
    return -np.log(probabilities(net, params, batch)[np.arange(len(batch["x"])), batch["label"]])


def uncertainty(net: Any, params: Any, batch: Any) -> np.ndarray:
    p = probabilities(net, params, batch)
    return -(p * np.log(p)).sum(1)


def norms(net: Any, params: Any, batch: Any) -> np.ndarray:
    first = params["Dense_0"]
    hidden = np.maximum(batch["x"] @ np.asarray(first["kernel"]) + np.asarray(first["bias"]), 0)
    error = probabilities(net, params, batch) - np.eye(labelled.CLASSES)[batch["label"]]
    return np.linalg.norm(error, axis=1) * np.sqrt((hidden**2).sum(1) + 1)


TABLE = np.random.default_rng(5).exponential(size=100).astype(np.float32)
SCORES: dict[str, Any] = {
    "train_loss": (lambda loss: scoring.train_loss(loss, micro_batches=2), cross_entropies),
    "gradient_norm": (lambda loss: scoring.gradient_norm(with_head(loss), micro_batches=2), norms),
    "entropy": (lambda loss: scoring.entropy(with_head(loss)), uncertainty),
    "irreducible_loss": (lambda loss: scoring.irreducible_loss(), lambda net, p, batch: -TABLE[batch["id"]]),
    "rho_loss": (scoring.rho_loss, lambda net, p, batch: cross_entropies(net, p, batch) - TABLE[batch["id"]]),
    "by_id": (lambda loss: scoring.by_id(), lambda net, p, batch: TABLE[batch["id"]]),
}


def big_batch() -> dict[str, Any]:
    """Rows in an order that is not that of their ids."""
    return labelled.take(labelled.rows(2, 100), np.random.default_rng(3).permutation(100)[:BIG])


def highest(scores: np.ndarray) -> set[int]:
    order = np.argsort(-scores)
    assert scores[order[SMALL - 1]] - scores[order[SMALL]] > 1e-4  # more than rounding
    return set(order[:SMALL].tolist())


# Scores that read no model are the same whichever model scores.
PROXIED = ("train_loss", "gradient_norm", "entropy", "rho_loss")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "target") for name in SCORES),
        *((name, "frozen proxy") for name in PROXIED),
        *((name, "trained proxy") for name in ("gradient_norm", "rho_loss", "by_id")),
    ],
)
def test_rows_that_are_selected(name: str, model: str) -> None:
    make, independent = SCORES[name]
    batch, weights = big_batch(), {"table": jnp.asarray(TABLE)}
    (target, _), (proxy, _) = labelled.start(NET, 1), labelled.start(PROXY, 2)
    loss, params, model_state = classifier(NET), target, {}
    if model == "target":
        scorer, wanted = make(loss), independent(NET, target, batch)
    else:
        scorer, wanted = make(classifier(PROXY)), independent(PROXY, proxy, batch)
        if model == "frozen proxy":
            scorer, weights = scoring.frozen_proxy(scorer), scoring.frozen_proxy_params(proxy, {}, weights)
        else:
            loss, scorer = scoring.with_proxy(loss, classifier(PROXY)), scoring.trained_proxy(scorer)
            params, model_state = {"target": target, "proxy": proxy}, {"target": {}, "proxy": {}}
    train = selecting(loss, scorer)
    state = train.init(jax.random.key(0), params, weights, model_state)
    after, metrics = jax.jit(train.step)(state, batch, {})
    found = np.asarray(metrics["selected"])
    assert set(found.tolist()) == highest(wanted)
    correct = probabilities(NET, target, batch).argmax(1) == batch["label"]
    np.testing.assert_allclose(metrics["generic_correct"], correct[found].mean(), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.weight_params, weights)


def test_proxy_is_trained_on_the_same_rows() -> None:
    """Each of the two models moves as if it were alone; the loss that is reported is the target's."""
    params = {"target": labelled.start(NET, 1)[0], "proxy": labelled.start(PROXY, 2)[0]}
    proxy_loss = classifier(PROXY)
    train = selecting(
        scoring.with_proxy(classifier(NET), proxy_loss), scoring.trained_proxy(scoring.train_loss(proxy_loss))
    )
    state = train.init(jax.random.key(0), params, {}, {"target": {}, "proxy": {}})
    after, metrics = jax.jit(train.step)(state, big_batch(), {})
    rows = labelled.take(big_batch(), np.asarray(metrics["selected"]))
    for name, net in (("target", NET), ("proxy", PROXY)):
        mean = lambda p, net=net: labelled.losses(net, p, rows).mean()  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(mean))(params[name])
        wanted = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params[name], gradient)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), after.params[name], wanted)
        if name == "target":
            np.testing.assert_allclose(metrics["generic_loss"], value, rtol=1e-5)


def test_rows_without_an_entry_come_last() -> None:
    table = jnp.asarray([1.0, jnp.nan, 3.0])
    found = scoring.look_up(table, jnp.asarray([2, 1, 0, -1, 3]))
    np.testing.assert_array_equal(found, [3.0, -np.inf, 1.0, -np.inf, -np.inf])


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_batch_norm_moves_once_a_step(statistics: Any) -> None:
    """All rows are scored, by the statistics asked for; those that are kept move by the rows of the θ-update alone."""
    net = Net(norm=True)
    params, model_state = labelled.start(net, 1)
    stats = model_state["batch_stats"]["BatchNorm_0"]
    stats = {"mean": stats["mean"] + 0.7, "var": stats["var"] * 3}
    model_state = {"batch_stats": {"BatchNorm_0": stats}}
    loss = scoring.scoring_loss(lambda train: classifier(net, train), statistics=statistics)
    train = selecting(classifier(net, True), scoring.rho_loss(loss))
    batch = big_batch()
    state = train.init(jax.random.key(0), params, {"table": jnp.asarray(TABLE)}, model_state)
    after, metrics = jax.jit(train.step)(state, batch, {})
    hidden = batch["x"] @ np.asarray(params["Dense_0"]["kernel"]) + np.asarray(params["Dense_0"]["bias"])
    mean, var = (hidden.mean(0), hidden.var(0)) if statistics == "batch" else (stats["mean"], stats["var"])
    norm = params["BatchNorm_0"]
    x = np.maximum((hidden - mean) / np.sqrt(var + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    logits = x @ np.asarray(params["Dense_1"]["kernel"]) + np.asarray(params["Dense_1"]["bias"])
    scores = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]) - TABLE[batch["id"]]
    assert set(np.asarray(metrics["selected"]).tolist()) == highest(np.asarray(scores))
    chosen = hidden[np.asarray(metrics["selected"])]
    moved = after.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(moved["mean"], 0.9 * stats["mean"] + 0.1 * chosen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved["var"], 0.9 * stats["var"] + 0.1 * chosen.var(0), rtol=1e-4, atol=1e-5)


def test_half_precision_is_for_scores_alone() -> None:
    params, _ = labelled.start(NET, 1)
    seen: list[Any] = []

    def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        seen.append(NET.apply({"params": p}, batch["x"]).dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return classifier(NET)(p, model_state, batch, rng)

    scorer = scoring.train_loss(scoring.scoring_loss(lambda train: loss, dtype=jnp.bfloat16))
    train = selecting(loss, scorer)
    after, metrics = jax.jit(train.step)(train.init(jax.random.key(0), params), big_batch(), {})
    assert seen[0] == jnp.bfloat16
    assert set(seen[1:]) == {jnp.dtype(jnp.float32)}
    assert jax.tree.leaves(after.params)[0].dtype == jnp.float32
    scores = cross_entropies(NET, params, big_batch())
    assert scores[np.asarray(metrics["selected"])].min() > np.sort(scores)[-SMALL] - 0.05


@pytest.mark.parametrize("shards", [1, 2])
def test_importance_weights_make_the_gradient_unbiased(shards: int) -> None:
    """The mean of Σ w_i g_i over all draws, each with its probability, is the mean gradient of the big batch."""
    norms, gradients = np.asarray([0.1, 3.0, 1.0, 0.5]), np.random.default_rng(0).normal(size=(4, 3))
    scope: Any = "local" if shards > 1 else "global"
    rule = filters.importance(unbiased=True, scope=scope, shards=shards)
    assert rule.weigh is not None
    size, mean = 4 // shards, np.zeros(3)
    for draw in itertools.product(range(4), repeat=2):
        if shards == 2 and not draw[0] < 2 <= draw[1]:
            continue  # each shard gives one row
        groups = [np.arange(4) if shards == 1 else np.arange(2) + 2 * (i // 2) for i in draw]
        chance = np.prod([norms[i] / norms[g].sum() for i, g in zip(draw, groups, strict=True)])
        weights = np.asarray(rule.weigh(jnp.log(norms), jnp.asarray(draw))) / 2
        np.testing.assert_allclose(weights[0], norms[groups[0]].sum() / (2 * size * norms[draw[0]]), rtol=1e-5)
        mean += chance * weights @ gradients[list(draw)]
    np.testing.assert_allclose(mean, gradients.mean(0), rtol=1e-5)


def test_step_with_importance_weights() -> None:
    """θ moves by Σ g_i/(B p_i b), p ∝ the gradient norms; on eight devices as on one."""
    params, _ = labelled.start(NET, 1)
    batch, scorer = big_batch(), scoring.log_gradient_norm(with_head(classifier(NET)))
    train = selecting(classifier(NET), scorer, filters.importance(unbiased=True))
    state = train.init(jax.random.key(0), params)
    after, metrics = jax.jit(train.step)(state, batch, {})
    chosen = np.asarray(metrics["selected"])
    p = norms(NET, params, batch) / norms(NET, params, batch).sum()
    weights = jnp.asarray(1 / (BIG * p[chosen] * SMALL), jnp.float32)
    loss = lambda q: weights @ labelled.losses(NET, q, labelled.take(batch, chosen))  # noqa: E731
    wanted = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, jax.jit(jax.grad(loss))(params))
    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(check, after.params, wanted)

    mesh, rows, same = sharding.make_mesh(), PartitionSpec("data"), PartitionSpec()
    axis = selecting(classifier(NET), scorer, filters.importance(unbiased=True), axis_name="data")
    step = jax.shard_map(
        lambda state, batch: axis.step(state, batch, {})[0].params,
        mesh=mesh,
        in_specs=(same, rows),
        out_specs=same,
        check_vma=False,
    )
    jax.tree.map(check, jax.jit(step)(state, batch), wanted)
    spread = selecting(classifier(NET), scorer, filters.importance(unbiased=True), mesh=mesh)
    found, _ = jax.jit(spread.step)(
        jax.device_put(state, sharding.replicated(mesh)), sharding.place_batch(mesh, batch), {}
    )
    jax.tree.map(check, found.params, wanted)


class Conv(nn.Module):
    """Five convolutions, a mean over pixels, a linear layer."""

    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for _ in range(5):
            x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return nn.Dense(labelled.CLASSES)(x.mean((1, 2)))


def operations(train: bilevel.TrainStep, params: Any, weights: Any, model_state: Any, rows: int) -> float:
    shapes: dict[str, Any] = {
        "x": jax.ShapeDtypeStruct((rows, 8, 8, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "id": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    state = jax.eval_shape(lambda *a: train.init(jax.random.key(0), *a), params, weights, model_state)
    cost: Any = jax.jit(train.step).lower(state, shapes, {}).compile().cost_analysis()
    return float(cost["flops"])


def test_operations_of_a_step() -> None:
    """With n_b/n_B = 0.1: at most 4.5 plain steps if the target scores (10F + 3F over 3F), 1.7 with a small proxy."""
    b, big = 4, 40
    net, small = Conv(16), Conv(5)
    shape = jnp.zeros((1, 8, 8, 3))
    target, proxy = (jax.eval_shape(n.init, jax.random.key(0), shape)["params"] for n in (net, small))
    table = {"table": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    loss, proxy_loss = classifier(net), classifier(small)
    uniform = bilevel.make_step(loss, None, optax.adam(1e-3), None, bilevel.uniform(), batch_size=b)
    plain = operations(uniform, target, {}, {}, b)

    def ratio(loss: Any, scorer: Any, params: Any, weights: Any, model_state: Any) -> float:
        train = selecting(loss, scorer, batch_size=b, optimizer=optax.adam(1e-3))
        return operations(train, params, weights, model_state, big) / plain

    assert 4.0 < ratio(loss, scoring.rho_loss(loss), target, table, {}) <= 4.5
    assert ratio(loss, scoring.gradient_norm(with_head(loss)), target, {}, {}) <= 4.5
    frozen = scoring.frozen_proxy(scoring.rho_loss(proxy_loss))
    assert ratio(loss, frozen, target, scoring.frozen_proxy_params(proxy, {}, table), {}) <= 1.7
    both = {"target": target, "proxy": proxy}
    trained = scoring.trained_proxy(scoring.rho_loss(proxy_loss))
    joint = scoring.with_proxy(loss, proxy_loss)
    assert ratio(joint, trained, both, table, {"target": {}, "proxy": {}}) <= 1.7


def trained(data: Any, scorer: Any, weights: Any, steps: int, big: int = 160, b: int = 16) -> tuple[Any, float]:
    """Parameters after training, and the share of wrong labels among the rows selected in the last fifth."""
    net = Net(hidden=32)
    if scorer is None:
        train = bilevel.make_step(classifier(net), None, optax.adam(3e-3), None, bilevel.uniform(), batch_size=b)
    else:
        train = selecting(classifier(net), scorer(classifier(net)), batch_size=b, optimizer=optax.adam(3e-3))
    state = train.init(jax.random.key(0), labelled.start(net, 1)[0], weights)

    @jax.jit
    def run(state: Any, batches: Any) -> Any:
        def one(state: Any, indices: Any) -> Any:
            batch = labelled.take(data, indices)
            state, metrics = train.step(state, batch, {})
            return state, jnp.mean((batch["label"] != batch["true"])[metrics["selected"]])

        return jax.lax.scan(one, state, batches)

    rng = np.random.default_rng(7)
    batches = np.stack([rng.permutation(len(data["x"]))[:big] for _ in range(steps)])
    state, shares = run(state, batches)
    return state.params, float(shares[-steps // 5 :].mean())


def test_wrong_labels_are_selected_by_loss_and_not_by_rho_loss() -> None:
    """A fifth of the labels is wrong; those of the held-out data are right, as in the paper."""
    data = {name: jnp.asarray(x) for name, x in labelled.rows(1, 4000, flipped=0.2).items()}
    held_out = {name: jnp.asarray(x) for name, x in labelled.rows(2, 2000).items()}
    model, _ = trained(held_out, None, {}, 600, big=32)
    losses = labelled.losses(Net(hidden=32), model, data)
    _, by_loss = trained(data, scoring.train_loss, {}, 600)
    _, by_rho = trained(data, scoring.rho_loss, {"table": losses}, 600)
    assert by_loss > 0.5
    assert by_rho < 0.1


def test_no_second_compilation() -> None:
    train = selecting(classifier(NET), scoring.rho_loss(classifier(NET)), ema_decay=0.9)
    state = train.init(jax.random.key(0), labelled.start(NET, 1)[0], {"table": jnp.asarray(TABLE)})
    step = jax.jit(train.step, donate_argnums=0)
    for i in range(3):
        state, _ = step(state, labelled.take(labelled.rows(i, 100), np.arange(BIG)), {})
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_mistakes_are_explained() -> None:
    loss = classifier(NET)
    train = selecting(loss, scoring.gradient_norm(loss))
    state = train.init(jax.random.key(0), labelled.start(NET, 1)[0])
    with pytest.raises(UserError, match='needs "hidden" in the metrics of the loss, which gives correct'):
        train.step(state, big_batch(), {})
    with pytest.raises(UserError, match=r"found no nn\.Dense"):
        with_head(lambda p, s, batch, rng: (batch["x"][:, 0], bilevel.LossAux(s, {})))({}, {}, big_batch(), state.rng)
    with pytest.raises(UserError, match='statistics="none" is unknown'):
        scoring.scoring_loss(lambda train: loss, statistics="none")  # pyright: ignore[reportArgumentType]
    cases: list[tuple[Any, Any]] = [(bilevel.dds(), {}), (bilevel.frozen(), {"mode": "dense"})]
    for method, options in cases:
        with pytest.raises(UserError, match=r"importance\(unbiased=True\) undoes every preference"):
            bilevel.make_step(
                loss, lambda wp, batch: batch["x"][:, 0], optax.sgd(0.1), optax.sgd(0.1), method, batch_size=SMALL,
                filter=filters.importance(unbiased=True), **options,
            )  # fmt: skip
