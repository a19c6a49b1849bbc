"""One contract for all methods: shapes fixed at the start, no second compilation, nothing changed behind the caller."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.step import train_step as step_module
from bilevel.types import NOT_COMPUTED, UserError

METHODS = {
    "uniform": bilevel.uniform,
    "frozen": bilevel.frozen,
    "dds": bilevel.dds,
    "dds averaged": lambda: bilevel.dds(average_specific=0.9),
    "anograd": lambda: bilevel.anograd(average_specific=0.9, through_optimizer=True),
    "soba": lambda: bilevel.soba(optax.adam(0.01)),
    "penalty": lambda: bilevel.penalty(optax.adam(0.01)),
    "implicit cg": lambda: bilevel.implicit_cg(damping=300.0, average_specific=0.9),
    "implicit neumann": lambda: bilevel.implicit_neumann(step_size=0.003, damping=1.0, warm_start=True),
}
BIG, SMALL = 12, 4


def build(name: str, **options: Any) -> bilevel.TrainStep:
    return bilevel.make_step(
        options.pop("loss", toy.loss),
        options.pop("weighting", toy.weighting),
        optax.adam(0.01),
        optax.adam(0.01),
        METHODS[name](),
        batch_size=options.pop("batch_size", SMALL),
        **options,
    )


def batches(step: int) -> tuple[Any, Any]:
    return toy.arrays(step, BIG), toy.arrays(100 + step, 3)


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str) -> None:
    traces: list[int] = []
    traced, metrics = 0, {}

    def loss(*args: Any) -> Any:
        traces.append(1)
        return toy.loss(*args)

    train = build(name, loss=loss, ema_decay=0.9, update_every=3)
    p, wp, key = toy.params(1), toy.weight_params(2), jax.random.key(0)
    state = jax.jit(train.init)(key, p, wp)
    abstract = jax.eval_shape(train.init, key, p, wp)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)

    step = jax.jit(train.step, donate_argnums=0)
    for i in range(5):
        state, metrics = step(state, *batches(i))
        if i == 1:
            traced = len(traces)
    assert len(traces) == traced
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    np.testing.assert_array_equal(p["last"]["kernel"], toy.params(1)["last"]["kernel"])  # not donated away
    assert int(state.step) == 5
    assert metrics["selected"].shape == (SMALL,)
    learns = name not in ("uniform", "frozen")
    assert (toy.relative_error(state.weight_params, wp) > 0) == learns


@pytest.mark.parametrize("name", ["dds averaged", "soba"])
def test_functions_of_single_steps_are_the_step(name: str) -> None:
    """With and without α-work compiled apart."""
    train = build(name, update_every=3)
    at = {due: jax.jit(train.at(due)) for due in (0, 1)}
    state = apart = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    step = jax.jit(train.step)
    for i in range(5):
        state, _ = step(state, *batches(i))
        apart, _ = at[0 if i % 3 == 0 else 1](apart, *batches(i))
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(apart.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_the_example_of_the_module_runs() -> None:
    assert step_module.__doc__ is not None
    lines = [line.strip() for line in step_module.__doc__.splitlines() if line.startswith("    ")]
    big_batch, specific_batch = jax.tree.map(lambda x: np.resize(x, (32, *x.shape[1:])), batches(0))
    names = vars(bilevel) | {
        "jax": jax, "optax": optax, "rng": jax.random.key(0), "loss": toy.loss, "weighting": toy.weighting,
        "optimizer": optax.sgd(0.01), "weight_optimizer": optax.sgd(0.01), "params": toy.params(1),
        "weight_params": toy.weight_params(2), "big_batch": big_batch, "specific_batch": specific_batch,
    }  # fmt: skip
    exec("\n".join(lines), names)
    assert int(names["state"].step) == 1


@pytest.mark.parametrize(
    "name", ["soba", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dds averaged", "implicit neumann"))]
)
def test_jit_equals_eager(name: str) -> None:
    train = build(name, update_every=1)
    state, step = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2)), jax.jit(train.step)
    for i in range(2):  # Adam's very first move does not depend on the size of the gradient: nothing to compare
        state, _ = step(state, *batches(i))
    eager, _ = train.step(state, *batches(2))
    jitted, _ = step(state, *batches(2))
    assert toy.relative_error(eager.params, jitted.params) < 1e-5
    assert toy.relative_error(eager.weight_params, jitted.weight_params) < 1e-3


@pytest.mark.parametrize("name", ["uniform", "dds"])
def test_per_example_metrics_that_are_asked_for(name: str) -> None:
    def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        metrics = {"x": batch["x"], "unused": batch["y"]}
        return toy.losses(p, batch), bilevel.LossAux(model_state, metrics)

    train = build(name, loss=loss, row_metrics=("x",), micro_batches=2)
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    big, specific = batches(0)[0], toy.arrays(100, 4)
    for function in (train.plain, train.learn):
        _, metrics = jax.jit(function)(state, big, specific)
        np.testing.assert_array_equal(metrics["x"], big["x"][metrics["selected"]])
        assert "unused" not in metrics


def test_row_metrics_do_not_replace_those_of_the_step() -> None:
    def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> Any:
        return toy.losses(p, batch), bilevel.LossAux(model_state, {"selected": batch["y"]})

    train = build("dds", loss=loss, row_metrics=("selected",))
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    with pytest.raises(UserError, match="row_metrics asks for 'selected', and the step has a metric of that"):
        jax.eval_shape(train.step, state, *batches(0))


def test_parameters_of_the_weighting_network_are_missing() -> None:
    with pytest.raises(UserError, match="init got no weight_params, but this method learns"):
        build("soba").init(jax.random.key(0), toy.params(1))
    build("uniform").init(jax.random.key(0), toy.params(1))


@pytest.mark.parametrize("name", ["dds", "soba"])
def test_parameters_without_elements(name: str) -> None:
    train = build(name)
    params = {**toy.params(1), "none": np.zeros((0, 3))}

    def step(params: Any) -> Any:
        start = jax.jit(train.init)(jax.random.key(0), params, toy.weight_params(2))
        return jax.jit(train.learn)(start, *batches(0))[0]

    found, wanted = step(params), step(toy.params(1))
    assert found.params["none"].shape == (0, 3)
    assert toy.relative_error(found.weight_params, wanted.weight_params) == 0


def test_weights_of_dense_mode_are_reported() -> None:
    """On steps with and without α-work; in sparse mode all rows of the θ-update weigh the same."""
    train, alpha = build("dds", mode="dense", batch_size=BIG, update_every=2), toy.weight_params(2)
    big, specific = batches(0)
    wanted = jax.nn.softmax(toy.weighting(alpha, big))
    for due in (0, 1):
        state = train.init(jax.random.key(0), toy.params(1), alpha)
        _, metrics = jax.jit(train.at(due))(state, big, specific)
        np.testing.assert_allclose(metrics["weights"], wanted, rtol=1e-6)
    train = build("dds")
    state = jax.eval_shape(train.init, jax.random.key(0), toy.params(1), alpha)
    assert "weights" not in jax.eval_shape(train.step, state, big, specific)[1]


def test_alpha_changes_on_due_steps_only() -> None:
    train = build("dds", update_every=3)
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    moved, step = [], jax.jit(train.step)
    for i in range(7):
        before = state.weight_params
        state, metrics = step(state, *batches(i))
        moved.append(toy.relative_error(state.weight_params, before) > 0)
        assert bool(metrics["specific_loss"] == NOT_COMPUTED) != moved[-1]
    assert moved == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("apart", [False, True])
def test_specific_rows_are_evaluated_on_due_steps_only(apart: bool) -> None:
    train = build("soba", update_every=2, probe_every=4)
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    alpha, tracker, seen = [], [], []
    for i in range(6):
        before = state
        state, metrics = jax.jit(train.at(i) if apart else train.step)(state, *batches(i))
        alpha.append(toy.relative_error(state.weight_params, before.weight_params) > 0)
        tracker.append(bool(np.any(toy.flat(state.method_state.v) != toy.flat(before.method_state.v))))
        seen.append(metrics["specific_loss"] != NOT_COMPUTED)
    assert alpha == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]  # the tracker starts at 0, and says nothing on the first step
    assert tracker == seen == [True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 0}, "update_every=0 must be at least 1"),
        ({"update_every": 2, "probe_every": 3}, "probe_every=3 must be a multiple of update_every=2"),
        ({"estimator": "magic"}, 'estimator="magic" is unknown'),
        ({"alpha_batch": "all"}, 'alpha_batch="all" is unknown'),
        ({"mode": "thick"}, 'mode="thick" is unknown'),
        ({"mode": "dense", "alpha_batch": "uniform"}, 'mode="dense" takes the α-gradient on the rows of the θ-update'),
        ({"mode": "dense", "alpha_batch_size": 7}, 'mode="dense" takes the α-gradient on the rows of the θ-update'),
        ({"alpha_batch_size": 1}, "alpha_batch_size=1 must be at least 2"),
        ({"estimator": "score", "mode": "dense"}, "needs rows drawn in proportion to their weights"),
        ({"estimator": "uniform"}, "needs rows drawn without regard to their weights"),
        ({"estimator": "score", "filter": bilevel.filters.top_k()}, "the filter top_k does not draw them so"),
        ({"batch_size": 1}, "batch_size=1 leaves one row to learn the weights from"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must lie in"),
        ({"filter": "top_k"}, "filter='top_k' is no Filter"),
        ({"filter": bilevel.filters.top_k}, "is no Filter: give what a factory returns"),
        ({"derivatives": bilevel.Forward}, "is no way of differentiating"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("dds", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": BIG + 1}, f"asks for {BIG + 1} rows but the big batch has only {BIG}"),
        ({"mode": "dense"}, f"has {BIG} rows and batch_size={SMALL}"),
        ({"loss": lambda *a: (toy.loss(*a)[0].sum(), toy.loss(*a)[1])}, r"The loss returned an array of shape \(\)"),
        ({"loss": lambda *a: toy.loss(*a)[0]}, r"no pair \(losses, LossAux\)"),
        ({"loss": lambda *a: (toy.loss(*a)[0], ({}, {}))}, r"no pair \(losses, LossAux\)"),
        ({"weighting": lambda wp, b: b["x"]}, "must return one logit a row"),
        ({"param_filter": lambda path: False}, "param_filter accepts none of the 2 parameters"),
    ],
)
def test_shapes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    train = build("dds", **options)

    def start_and_step() -> None:
        state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
        jax.eval_shape(train.step, state, *batches(0))

    with pytest.raises(UserError, match=message):
        start_and_step()


def _with_method(method: Any) -> bilevel.TrainStep:
    return bilevel.make_step(toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(0.1), method, batch_size=SMALL)


def test_factories_refuse_what_makes_no_sense() -> None:
    for make, message in (
        (lambda: bilevel.dds(average_specific=1.0), "average_specific=1.0 must lie in"),
        (lambda: build("dds", update_every=2, probe_every=4), "needs a method that can do without a specific batch"),
        (lambda: bilevel.soba(optax.sgd(1.0), damping=-1.0), "damping=-1.0"),
        (lambda: bilevel.soba(optax.sgd(1.0), max_norm=0.0), "max_norm=0.0"),
        (lambda: _with_method(bilevel.soba), "is no Method: give what a factory returns"),
        (lambda: _with_method("soba"), "method='soba' is no Method"),
        (lambda: bilevel.Finite(0.0), r"Finite\(scale=0.0\)"),
    ):
        with pytest.raises(UserError, match=message):
            make()
