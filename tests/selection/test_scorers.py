"""Scorers that see the model, and Meta-Weight-Net: brute force, cost, and what they leave alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from test_batch_norm import linen_parts
from test_hypergradients import BIG, EXACT, ROUGH, SMALL, chosen, moved, objective

import bilevel
from bilevel.nn.weighting import LossMLP
from bilevel.selection import filters, scorers
from bilevel.types import Array, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

HIDDEN = 6


def mlp(wp: Any, batch: Any, losses: Array) -> Array:
    out = LossMLP(HIDDEN).apply({"params": wp}, losses)
    assert isinstance(out, jax.Array)
    return out


def alpha(dtype: Any) -> Any:
    rng = np.random.default_rng(5)
    shapes = {"hidden": {"kernel": (1, HIDDEN), "bias": (HIDDEN,)}, "logit": {"kernel": (HIDDEN, 1), "bias": (1,)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / 4, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def one_step(weighting: Any, dtype: Any, **options: Any) -> tuple[Any, Any, Any, Any, Any]:
    """One step whose weight optimizer is `sgd(1)`: the move of α is minus its gradient."""
    optimizer = toy.OPTIMIZERS["momentum"]()
    train = bilevel.make_step(
        toy.loss, weighting, optimizer, optax.sgd(1.0), options.pop("method", bilevel.dds()), update_every=1, **options
    )
    wp = alpha(dtype)
    state = train.init(jax.random.key(0), toy.params(1, dtype), wp)
    if hasattr(state.method_state, "v"):
        state = dataclasses.replace(state, method_state=state.method_state._replace(v=toy.params(9, dtype)))
    big, specific = toy.arrays(3, BIG, dtype), toy.arrays(4, 9, dtype)
    after, metrics = jax.jit(train.step)(state, big, specific)
    return moved(wp, after), state, chosen(big, metrics), specific, after


@pytest.mark.parametrize(("mode", "micro_batches"), [("dense", 1), ("sparse", 1), ("uniform", 1), ("dense", 3)])
def test_meta_weight_net_hypergradient(mode: str, micro_batches: int) -> None:
    """s_i = mlp(ℓ_i) with ℓ_i held fixed, otherwise the objective of DDS; and θ moves with those weights."""

    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        net = bilevel.meta_weight_net(toy.loss, hidden=HIDDEN, micro_batches=micro_batches)
        options: dict[str, Any] = {"mode": "dense", "batch_size": BIG}
        if mode != "dense":
            options = {"batch_size": SMALL}
        if mode == "uniform":
            options |= {"alpha_batch": "uniform", "alpha_batch_size": BIG}
        options |= {"method": bilevel.dds(), "derivatives": derivatives, "micro_batches": micro_batches}
        gradient, state, small, specific, after = one_step(net.scorer, dtype, **options)
        rows = toy.arrays(3, BIG, dtype) if mode == "uniform" else small
        seen = jax.jit(toy.losses)(state.params, rows)

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(mlp(wp, rows, seen))
            if mode == "sparse":
                weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            return objective("dds", toy.OPTIMIZERS["momentum"](), state, specific)(weights, rows)

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= bound

        @jax.jit
        def wanted() -> Any:
            weights = (
                jax.nn.softmax(mlp(state.weight_params, rows, seen)) if mode == "dense" else jnp.full(SMALL, 1 / SMALL)
            )
            gradient = jax.grad(lambda p: weights @ toy.losses(p, small))(state.params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)

        assert toy.relative_error(after.params, wanted()) <= 1e-5

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    check(np.float32, bilevel.Finite(), ROUGH)


@pytest.mark.parametrize(
    ("method", "derivatives"),
    [
        (lambda: bilevel.soba(optax.sgd(0.1)), bilevel.Forward()),
        (bilevel.implicit_cg, bilevel.Finite()),
        (bilevel.anograd, bilevel.Finite()),
        (bilevel.anograd, bilevel.Forward()),
    ],
)
def test_losses_of_the_update_are_those_that_scoring_would_find(method: Any, derivatives: Any) -> None:
    """Dense mode shares the evaluation if the scorer's loss is the step's own, and gives the same step if it is not."""
    options: dict[str, Any] = {"mode": "dense", "batch_size": BIG, "derivatives": derivatives}
    shared = scorers.of_losses(toy.loss, mlp)
    steps = [one_step(s, np.float32, method=method(), **options) for s in (shared, shared._replace(loss=None))]
    (one, *_, one_state), (other, *_, other_state) = steps
    assert toy.relative_error(one_state.params, other_state.params) < 1e-6
    assert toy.relative_error(one, other) < 1e-3


def test_features_travel_with_their_rows() -> None:
    """Features that only the big batch can give: the α-gradient is right only if the picked rows bring theirs."""

    def ranks(p: Any, model_state: Any, batch: Any, rng: Array) -> dict[str, Array]:
        return {"rank": jnp.argsort(jnp.argsort(toy.losses(p, batch))).astype(batch["x"].dtype)[:, None] / BIG}

    def logits(wp: Any, batch: Any, features: Any) -> Array:
        return mlp(wp, batch, features["rank"][:, 0] + batch["x"][:, 0])

    with jax.enable_x64(True):
        gradient, state, rows, specific, _ = one_step(
            bilevel.Scorer(ranks, logits), np.float64, batch_size=SMALL, derivatives=bilevel.Forward()
        )
        big = toy.arrays(3, BIG, np.float64)
        rank = np.asarray(jax.jit(ranks)(state.params, {}, big, jax.random.key(0))["rank"])[:, 0]
        where = np.argmax(np.all(rows["x"][:, None] == np.asarray(big["x"])[None], axis=-1), axis=1)

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(mlp(wp, rows, rank[where] + rows["x"][:, 0]))
            weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            return objective("dds", toy.OPTIMIZERS["momentum"](), state, specific)(weights, rows)

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= EXACT


def operations(weighting: Any, due: bool, **options: Any) -> float:
    width, big = 64, 256

    def loss(p: Any, model_state: Any, batch: Any, rng: Array) -> Any:
        x = batch
        for w in p:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2, axis=1), bilevel.LossAux(model_state, {})

    if weighting == "losses":
        weighting, wp = scorers.of_losses(loss, mlp), alpha(np.float32)
    else:
        weighting, wp = (lambda wp, batch: wp * batch[:, 0]), jnp.zeros(())
    train = bilevel.make_step(loss, weighting, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(), **options)
    rows = jnp.zeros((big, width))
    state = jax.eval_shape(lambda: train.init(jax.random.key(0), [jnp.zeros((width, width))] * 3, wp))
    program = jax.jit(train.learn if due else train.plain).lower(state, rows, rows[:32]).compile()
    cost: Any = program.cost_analysis()
    return float(cost["flops"]) / (3 * 2 * width * width)  # forward passes of one row


@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
@pytest.mark.parametrize("due", [False, True])
def test_nothing_is_evaluated_twice(due: bool, derivatives: Any) -> None:
    """Sparse: B forward passes for the scores, in steps with α-work too. Dense: none."""

    def more(**options: Any) -> float:
        options["derivatives"] = derivatives
        return operations("losses", due, **options) - operations("batch", due, **options)

    assert more(batch_size=32) == pytest.approx(256, rel=0.1)
    assert more(batch_size=32, alpha_batch="uniform") == pytest.approx(256, rel=0.1)
    assert abs(more(mode="dense", batch_size=256)) < 20


def test_scoring_leaves_the_model_state_alone() -> None:
    """Batch statistics move by the θ-update's rows only, though all rows of the big batch were scored with them."""
    loss, params, model_state = linen_parts()
    train = bilevel.make_step(
        loss, scorers.of_losses(loss, mlp), optax.sgd(0.05), optax.sgd(0.5), bilevel.dds(), batch_size=8
    )
    state = train.init(jax.random.key(1), params, alpha(np.float32), model_state)
    big = toy.arrays(0, 16)
    after, metrics = jax.jit(train.step)(state, big, toy.arrays(50, 8))
    layer = jax.tree.map(np.asarray, params["Dense_0"])
    hidden = chosen(big, metrics)["x"] @ layer["kernel"] + layer["bias"]
    found = after.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(found, 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-6)


def test_selection_by_loss_needs_no_weighting_network() -> None:
    """`frozen` with a scorer: the rows with the largest losses, and an irreducible loss looked up in the batch."""
    irreducible = jnp.linspace(0, 30, BIG)
    scorer = scorers.of_losses(toy.loss, lambda wp, batch, losses: losses - batch["irreducible"])
    train = bilevel.make_step(
        lambda p, s, batch, rng: toy.loss(p, s, batch, rng), scorer, optax.sgd(0.1), None, bilevel.frozen(),
        batch_size=SMALL, filter=filters.top_k(),
    )  # fmt: skip
    big = toy.arrays(3, BIG) | {"irreducible": irreducible}
    _, metrics = jax.jit(train.step)(train.init(jax.random.key(0), toy.params(1)), big, toy.arrays(4, 7))
    wanted = np.argsort(-np.asarray(toy.losses(toy.params(1), big) - irreducible))[:SMALL]
    assert set(np.asarray(metrics["selected"]).tolist()) == set(wanted.tolist())


def test_no_second_compilation() -> None:
    traces: list[int] = []

    def loss(*args: Any) -> Any:
        traces.append(1)
        return toy.loss(*args)

    net = bilevel.meta_weight_net(loss, hidden=HIDDEN)
    train = bilevel.make_step(loss, net.scorer, optax.adam(0.1), optax.adam(0.1), bilevel.dds(), batch_size=SMALL)
    state = train.init(jax.random.key(0), toy.params(1), net.init(jax.random.key(1)))
    step, traced = jax.jit(train.step, donate_argnums=0), []
    for i in range(5):
        state, metrics = step(state, toy.arrays(i, BIG), toy.arrays(9, 7))
        traced.append(len(traces))
        if i == 0:
            np.testing.assert_allclose(metrics["effective_sample_size"], BIG, rtol=1e-5)  # uniform at first
    assert traced[0] == traced[-1]


def test_mistakes_are_explained() -> None:
    with pytest.raises(UserError, match="micro_batches=0: it must be at least 1"):
        scorers.loss_features(toy.loss, micro_batches=0)
    with pytest.raises(UserError, match="weighting=None"):
        bilevel.make_step(toy.loss, None, optax.sgd(0.1), optax.sgd(0.1), bilevel.dds(), batch_size=SMALL)
    with pytest.raises(UserError, match="weight_optimizer=None"):
        bilevel.make_step(toy.loss, toy.weighting, optax.sgd(0.1), None, bilevel.dds(), batch_size=SMALL)
    short = bilevel.Scorer(lambda p, s, batch, rng: {"n": jnp.zeros(3)}, lambda wp, batch, features: features["n"])
    with pytest.raises(UserError, match=rf"features\['n'\] have the shape \(3,\) for a batch of {BIG} rows"):
        one_step(short, np.float32, batch_size=SMALL)
