"""Implicit differentiation: probes against solved linear systems, α-gradients against brute force."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.flatten_util import ravel_pytree
from test_hypergradients import BIG, EXACT, ROUGH, SMALL, one_step

import bilevel
from bilevel.derivatives.rows import RowLosses
from bilevel.methods import implicit
from bilevel.trees import make_subset
from bilevel.types import Array, LossAux, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

SIZE = 10


def matrix(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return basis * eigenvalues @ basis.T


def written_out_probe(method: str, hessian: Array, specific: Array, steps: int, damping: float, rate: float) -> Array:
    """The probe by dense linear algebra."""
    system = hessian + damping * jnp.eye(len(specific))
    if method == "cg":  # the best point of the Krylov space, found by solving in an orthonormal basis of it
        powers = [specific]
        for _ in range(steps - 1):
            powers.append(system @ powers[-1] / jnp.linalg.norm(powers[-1]))
        basis, _ = jnp.linalg.qr(jnp.stack(powers, 1))
        return -basis @ jnp.linalg.solve(basis.T @ system @ basis, basis.T @ specific)
    shrink = jnp.eye(len(specific)) - rate * system
    return -rate * jnp.stack([jnp.linalg.matrix_power(shrink, j) @ specific for j in range(steps + 1)]).sum(0)


STEPS, DAMPING, RATE = 4, 600.0, 0.001  # the toy's Hessian reaches from -277 to 57


def build(method: str, **options: Any) -> Any:
    if method == "cg":
        return bilevel.implicit_cg(iterations=STEPS, damping=DAMPING, **options)
    return bilevel.implicit_neumann(iterations=STEPS, damping=DAMPING, step_size=RATE, **options)


@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_hypergradient_in_a_part_of_the_parameters(method: str) -> None:
    """What lies below the part is evaluated once, outside the loop that solves the system."""

    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        options = {"batch_size": SMALL, "param_filter": lambda path: path.startswith("last")}
        optimizer = toy.OPTIMIZERS["sgd"]()
        gradient, state, rows, specific = one_step(build(method), optimizer, dtype, derivatives=derivatives, **options)

        def losses(kernel: Array, rows: Any) -> Array:
            return toy.losses({**state.params, "last": {"kernel": kernel}}, rows)

        kernel = state.params["last"]["kernel"]
        s = jax.jit(jax.grad(lambda x: losses(x, specific).mean()))(kernel)

        def written_out(wp: Any) -> Array:
            hessian = jax.hessian(lambda x: losses(x, rows).mean())(kernel)
            probe = written_out_probe(method, hessian, s, STEPS, DAMPING, RATE)
            weights = jax.nn.softmax(toy.weighting(wp, rows))
            return jax.grad(lambda x: weights @ losses(x, rows))(kernel) @ probe

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= bound

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    check(np.float32, bilevel.Finite(), ROUGH)


@pytest.mark.parametrize("mode", ["dense", "sparse", "uniform"])
@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_hypergradient(method: str, mode: str) -> None:
    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        options: dict[str, Any] = {"mode": "dense", "batch_size": BIG}
        if mode != "dense":
            options = {"mode": "sparse", "batch_size": SMALL}
        if mode == "uniform":
            options |= {"alpha_batch": "uniform", "alpha_batch_size": BIG}
        optimizer = toy.OPTIMIZERS["clipped adam"]()
        gradient, state, rows, specific = one_step(build(method), optimizer, dtype, derivatives=derivatives, **options)
        rows = toy.arrays(3, BIG, dtype) if mode == "uniform" else rows  # all rows of the big batch, in another order
        theta, unravel = ravel_pytree(state.params)
        s = jax.jit(jax.grad(lambda x: toy.losses(unravel(x), specific).mean()))(theta)

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, rows))
            known = jnp.full(SMALL, 1 / SMALL) if mode == "sparse" else jax.lax.stop_gradient(weights)
            hessian = jax.hessian(lambda x: known @ toy.losses(unravel(x), rows))(theta)
            probe = written_out_probe(method, hessian, s, STEPS, DAMPING, RATE)
            return jax.grad(lambda x: weights @ toy.losses(unravel(x), rows))(theta) @ probe

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= bound

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    if mode == "sparse":
        check(np.float32, bilevel.Finite(), ROUGH)


def test_conjugate_gradient_solves_the_system_in_as_many_steps_as_there_are_unknowns() -> None:
    with jax.enable_x64(True):
        a, b = matrix(np.linspace(1, 30, SIZE)), np.random.default_rng(1).normal(size=SIZE)
        for guess in (None, jnp.ones(SIZE)):
            found = implicit.conjugate_gradient(lambda d: a @ d, jnp.asarray(b), guess, SIZE)
            np.testing.assert_allclose(found, np.linalg.solve(a, b), rtol=1e-8)
        early = implicit.conjugate_gradient(lambda d: a @ d, jnp.asarray(b), None, 1)
        np.testing.assert_allclose(early, b * (b @ b) / (b @ a @ b), rtol=1e-10)


def test_conjugate_gradient_of_nothing_is_nothing() -> None:
    found = implicit.conjugate_gradient(lambda d: d, jnp.zeros(3), None, 4)
    np.testing.assert_array_equal(found, jnp.zeros(3))


@pytest.mark.parametrize("flattest", [-1e-3, -2.0, 0.0, 1e-9])
def test_conjugate_gradient_stops_at_negative_curvature(flattest: float) -> None:
    """Every iterate that it keeps is one from before the bend: bounded, and a direction of descent."""
    eigenvalues = np.append(np.linspace(1, 5, SIZE - 1), flattest)
    a, b = matrix(eigenvalues), np.random.default_rng(1).normal(size=SIZE)
    found = implicit.conjugate_gradient(lambda d: jnp.asarray(a, jnp.float32) @ d, jnp.float32(b), None, 3 * SIZE)
    assert np.linalg.norm(found) < 1e3 * np.linalg.norm(b)
    assert found @ b > 0


def test_conjugate_gradient_gives_the_right_side_where_the_first_direction_bends() -> None:
    b = jnp.arange(1.0, 4.0)
    for guess in (None, jnp.ones(3)):
        np.testing.assert_array_equal(implicit.conjugate_gradient(lambda d: -d, b, guess, 5), b)


def test_neumann_series_goes_to_the_solution() -> None:
    with jax.enable_x64(True):
        a, b = matrix(np.linspace(1, 9, SIZE)), np.random.default_rng(1).normal(size=SIZE)
        for guess in (None, jnp.ones(SIZE)):
            found = implicit.neumann_series(lambda d: a @ d, jnp.asarray(b), guess, 300, 0.15)
            np.testing.assert_allclose(found, np.linalg.solve(a, b), rtol=1e-8)


@pytest.mark.parametrize(
    ("make", "derivatives"), [(bilevel.implicit_cg, bilevel.Forward()), (bilevel.implicit_neumann, bilevel.Finite())]
)
def test_warm_start_on_a_quadratic(make: Any, derivatives: Any) -> None:
    """θ and α held still: one iteration a step, warm-started, ends at −(H + λI)⁻¹ ∇L_spec."""
    rng, damping = np.random.default_rng(0), 0.5
    x, y = rng.normal(size=(20, 4)), rng.normal(size=20)
    generic = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    specific = {"x": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), "y": jnp.ones(9)}

    def loss(p: Array, model_state: dict, batch: dict, key: Array) -> tuple[Array, LossAux]:
        return (batch["x"] @ p - batch["y"]) ** 2, LossAux(model_state, {})

    train = bilevel.make_step(
        loss, lambda wp, batch: wp * batch["y"], optax.set_to_zero(), optax.set_to_zero(),
        make(iterations=1, damping=damping, warm_start=True), derivatives=derivatives, mode="dense", batch_size=20,
        update_every=1,
    )  # fmt: skip
    p = jnp.asarray(rng.normal(size=4), jnp.float32)
    state, step = train.init(jax.random.key(0), p, jnp.asarray(0.7)), jax.jit(train.step)
    for _ in range(100):
        state, _ = step(state, generic, specific)
    weights = np.asarray(jax.nn.softmax(0.7 * generic["y"]), np.float64)
    hessian = 2 * x.T @ (weights[:, None] * x) + damping * np.eye(4)
    gradient = 2 * np.asarray(specific["x"]).T @ np.asarray(specific["x"] @ p - 1) / 9
    np.testing.assert_allclose(state.method_state.probe, -np.linalg.solve(hessian, gradient), rtol=5e-3, atol=5e-3)


def test_products_reuse_the_gradient() -> None:
    """By differences a product is one gradient, no more: the difference between one and three of them, unrolled."""
    p, batch, weights = toy.params(0), toy.arrays(2, 512), jnp.full(512, 1 / 512)
    losses = RowLosses(toy.loss, {}, batch, jax.random.key(0))

    def operations(mode: Any, count: int) -> float:
        def run(p: Any, d: Any) -> Any:
            found = mode.quadratic(losses, p, weights, make_subset(None, p), lambda tree: tree)
            for _ in range(count):
                d = found.hessian_product(d)
            return found.gradient, d

        compiled = jax.jit(run).lower(p, toy.params(1)).compile()
        return float(compiled.cost_analysis()["flops"])  # pyright: ignore[reportOptionalSubscript]

    finite, forward = bilevel.Finite(), bilevel.Forward()
    gradient = operations(finite, 0)
    assert operations(finite, 3) < 4.2 * gradient
    assert operations(forward, 3) - operations(forward, 2) < 2.6 * gradient


def test_average_and_bound() -> None:
    method = bilevel.implicit_cg(average_specific=0.9, warm_start=True, max_norm=1e-3)
    train = bilevel.make_step(toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(0.1), method, batch_size=4)
    state = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))
    after, _ = jax.jit(train.learn)(state, toy.arrays(0, 8), toy.arrays(1, 3))
    s = jax.jit(jax.grad(lambda p: toy.losses(p, toy.arrays(1, 3)).mean()))(state.params)
    assert toy.relative_error(after.method_state.specific_gradient, jax.tree.map(lambda x: 0.1 * x, s)) < 1e-5
    assert np.linalg.norm(toy.flat(after.method_state.probe)) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("make", [bilevel.implicit_cg, bilevel.implicit_neumann])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"iterations": 0}, r"iterations=0\) must be at least 1"),
        ({"damping": -1.0}, r"damping=-1.0\) must not be negative"),
        ({"max_norm": 0.0}, r"max_norm=0.0\) must be positive"),
        ({"average_specific": 1.0}, "average_specific=1.0 must lie in"),
    ],
)
def test_options_out_of_range(make: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**option)
    with pytest.raises(UserError, match="step_size=0"):
        bilevel.implicit_neumann(step_size=0.0)
