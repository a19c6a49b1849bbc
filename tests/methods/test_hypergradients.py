"""The α-gradient of every method against brute-force autodiff of its written-out objective."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.selection import filters
from bilevel.types import NOT_COMPUTED, Array

BIG, SMALL = 24, 6
EXACT, ROUGH = 1e-8, 2e-2
SGD = "sgd"


def one_step(method: Any, optimizer: Any, dtype: Any, *, v: Any = None, **options: Any) -> tuple[Any, Any, Any, Any]:
    """One step whose weight optimizer is `sgd(1)`, so that the move of α is minus its gradient."""
    train = bilevel.make_step(toy.loss, toy.weighting, optimizer, optax.sgd(1.0), method, update_every=1, **options)
    p, wp = toy.params(1, dtype), toy.weight_params(2, dtype)
    state = jax.jit(train.init)(jax.random.key(0), p, wp)
    state = dataclasses.replace(state, opt_state=toy.warm_state(optimizer, p))
    if v is not None:
        state = dataclasses.replace(state, method_state=state.method_state._replace(v=v))
    big, specific = toy.arrays(3, BIG, dtype), toy.arrays(4, 7, dtype)
    after, metrics = jax.jit(train.step)(state, big, specific)
    return moved(wp, after), state, chosen(big, metrics), specific


def moved(wp: Any, after: Any) -> Any:
    """How far α went down: the gradient, by `sgd(1)`. In numpy, which compiles nothing."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), wp, after.weight_params)


def chosen(big: Any, metrics: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(metrics["selected"])], big)


def theta_gradient(p: Any, weights: Array, rows: Any) -> Any:
    return jax.grad(lambda q: jnp.sum(weights * toy.losses(q, rows)))(p)


def objective(method: str, optimizer: Any, state: Any, specific: Any, v: Any = None) -> Any:
    """L(weights, rows): what the method lowers, written out from the papers."""
    p = state.params

    def dds(weights: Array, rows: Any) -> Array:
        updates, _ = optimizer.update(theta_gradient(p, weights, rows), state.opt_state, p)
        return toy.losses(optax.apply_updates(p, updates), specific).mean()

    def anograd(weights: Array, rows: Any) -> Array:
        g = ravel(theta_gradient(p, weights, rows))
        s = ravel(jax.grad(lambda q: toy.losses(q, specific).mean())(p))
        return -(g @ s) / jnp.sqrt(g @ g) / jnp.sqrt(s @ s)

    def anograd_moves(weights: Array, rows: Any) -> Array:
        updates, _ = optimizer.update(theta_gradient(p, weights, rows), state.opt_state, p)
        u, s = ravel(updates), ravel(jax.grad(lambda q: toy.losses(q, specific).mean())(p))
        return (u @ s) / jnp.sqrt(u @ u) / jnp.sqrt(s @ s)

    def soba(weights: Array, rows: Any) -> Array:
        return ravel(theta_gradient(p, weights, rows)) @ ravel(v)

    return {"dds": dds, "anograd": anograd, "anograd moves": anograd_moves, "soba": soba}[method]


def ravel(tree: Any) -> Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def build(method: str, dtype: Any) -> tuple[Any, Any]:
    if method == "soba":
        return bilevel.soba(optax.sgd(0.1)), toy.params(9, dtype)
    if method == "dds":
        return bilevel.dds(), None
    return bilevel.anograd(through_optimizer=method == "anograd moves"), None


METHODS = ("dds", "anograd", "anograd moves", "soba")


# The optimizer has no part in the objectives of anograd and soba, and the same part in the other two.
CASES = [
    *(("dense", "dds", name) for name in toy.OPTIMIZERS),
    *(("dense", method, "clipped adam") for method in METHODS[1:]),
    *(("sparse", method, "clipped adam") for method in METHODS),
]


@pytest.mark.parametrize(("mode", "method", "optimizer_name"), CASES)
def test_softmax_estimator(mode: str, method: str, optimizer_name: str) -> None:
    """Dense: weights are the softmax. Sparse: θ moves with uniform weights, α as if the softmax were added to them."""

    def check(dtype: Any, derivatives: Any, bound: float) -> None:
        optimizer = toy.OPTIMIZERS[optimizer_name]()
        how, v = build(method, dtype)
        options: dict[str, Any] = {"mode": mode, "batch_size": BIG if mode == "dense" else SMALL}
        gradient, state, rows, specific = one_step(how, optimizer, dtype, v=v, derivatives=derivatives, **options)

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, rows))
            if mode == "sparse":
                weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            return objective(method, optimizer, state, specific, v)(weights, rows)

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= bound

    with jax.enable_x64(True):
        check(np.float64, bilevel.Forward(), EXACT)
    if mode == "sparse" or optimizer_name == "momentum":
        check(np.float32, bilevel.Finite(), ROUGH)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_their_own(method: str) -> None:
    """alpha_batch="uniform": softmax weights over other rows, also in the look-ahead."""
    with jax.enable_x64(True):
        optimizer, (how, v) = toy.OPTIMIZERS["clipped adam"](), build(method, np.float64)
        options: dict[str, Any] = {"alpha_batch": "uniform", "alpha_batch_size": BIG, "batch_size": SMALL}
        gradient, state, _, specific = one_step(
            how, optimizer, np.float64, v=v, derivatives=bilevel.Forward(), **options
        )
        big = toy.arrays(3, BIG, np.float64)  # all rows of the big batch, in another order

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, big))
            return objective(method, optimizer, state, specific, v)(weights, big)

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= EXACT


@pytest.mark.parametrize(("method", "normalize"), [*((method, False) for method in METHODS), ("dds", True)])
def test_score_estimator(method: str, normalize: bool) -> None:
    """(1/b) Σ (a_i − ā_{−i}) ∇s_i, with a_i the derivative of the objective in the weight of row i."""
    with jax.enable_x64(True):
        optimizer, (how, v) = toy.OPTIMIZERS["momentum"](), build(method, np.float64)
        gradient, state, rows, specific = one_step(
            how,
            optimizer,
            np.float64,
            v=v,
            derivatives=bilevel.Forward(),
            estimator="score",
            batch_size=SMALL,
            normalize_alignments=normalize,
        )
        uniform = jnp.full(SMALL, 1 / SMALL)
        a = jax.jit(jax.grad(objective(method, optimizer, state, specific, v)))(uniform, rows)
        if normalize:
            a = a / jnp.std(a)
        others = (a.sum() - a) / (SMALL - 1)

        def written_out(wp: Any) -> Array:
            return jnp.sum((a - others) / SMALL * toy.weighting(wp, rows))

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= EXACT


@pytest.mark.parametrize(("cosine", "normalize"), [(False, False), (True, True)])
def test_algorithm_1_of_dds(cosine: bool, normalize: bool) -> None:
    """(1/b) Σ r_i ∇log p_i (line 9), r_i the dot product of the gradients of row and dev batch, or their cosine."""
    with jax.enable_x64(True):
        gradient, state, rows, specific = one_step(
            bilevel.dds(cosine=cosine),
            optax.sgd(0.1),
            np.float64,
            derivatives=bilevel.Forward(),
            estimator="uniform",
            mode="dense",
            batch_size=BIG,
            normalize_alignments=normalize,
        )
        p = state.params

        @jax.jit
        def line_by_line() -> Array:
            weights = jax.nn.softmax(toy.weighting(state.weight_params, rows))
            moved = jax.tree.map(lambda x, g: x - 0.1 * g, p, theta_gradient(p, weights, rows))  # lines 5 and 6
            dev = ravel(jax.grad(lambda q: toy.losses(q, specific).mean())(moved))  # line 7
            each = jax.vmap(ravel)(jax.jacrev(lambda q: toy.losses(q, rows))(p))
            rewards = each @ dev * 0.1
            if cosine:
                rewards = rewards / (jnp.linalg.norm(each, axis=1) * jnp.linalg.norm(0.1 * dev))
            return rewards / jnp.std(rewards) if normalize else rewards

        rewards = line_by_line()

        def written_out(wp: Any) -> Array:
            return -jnp.mean(rewards * jax.nn.log_softmax(toy.weighting(wp, rows)))

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= EXACT


@pytest.mark.parametrize("method", ["dds", "soba"])
@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite(1e-6)])
def test_probe_in_a_part_of_the_parameters(method: str, derivatives: Any) -> None:
    with jax.enable_x64(True):
        optimizer = toy.OPTIMIZERS[SGD]()
        how, v = build(method, np.float64)
        part = None if v is None else {"first": {"kernel": None}, "last": v["last"]}
        gradient, state, rows, specific = one_step(
            how,
            optimizer,
            np.float64,
            v=part,
            derivatives=derivatives,
            batch_size=SMALL,
            param_filter=lambda path: path.startswith("last"),
        )

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, rows))
            weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            g = theta_gradient(state.params, weights, rows)["last"]["kernel"]
            if v is not None:
                return g @ v["last"]["kernel"]
            uniform = theta_gradient(state.params, jnp.full(SMALL, 1 / SMALL), rows)
            moved = jax.tree.map(lambda x, u: x - 0.1 * u, state.params, uniform)
            s = jax.grad(lambda q: toy.losses(q, specific).mean())(moved)["last"]["kernel"]
            return -0.1 * g @ jax.lax.stop_gradient(s)

        wanted = jax.jit(jax.grad(written_out))(state.weight_params)
        exact = isinstance(derivatives, bilevel.Forward)
        assert toy.relative_error(gradient, wanted) <= (EXACT if exact else 1e-4)


@pytest.mark.parametrize(
    ("method", "derivatives"),
    [*((method, bilevel.Forward()) for method in METHODS), ("anograd moves", bilevel.Finite(1e-6))],
)
def test_remembered_specific_gradient(method: str, derivatives: Any) -> None:
    """Between two evaluations of specific rows (`probe_every`) the objective is that of the specific gradient in the state."""
    with jax.enable_x64(True):
        optimizer, memory = toy.OPTIMIZERS["clipped adam"](), toy.params(9, np.float64)
        how: Any = {
            "soba": bilevel.soba(optax.sgd(0.1)),
            "dds": bilevel.dds(average_specific=0.9),
            "anograd": bilevel.anograd(average_specific=0.9),
            "anograd moves": bilevel.anograd(average_specific=0.9, through_optimizer=True),
        }[method]
        gradient, state, rows, after = reused(how, optimizer, memory, derivatives)

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, rows))
            weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            g, m = theta_gradient(state.params, weights, rows), ravel(memory)
            u = ravel(optimizer.update(g, state.opt_state, state.params)[0])
            cosines = {"anograd": -ravel(g), "anograd moves": u}
            if method in cosines:
                return cosines[method] @ m / jnp.linalg.norm(cosines[method]) / jnp.linalg.norm(m)
            return (u if method == "dds" else ravel(g)) @ m

        exact, wanted = isinstance(derivatives, bilevel.Forward), jax.jit(jax.grad(written_out))(state.weight_params)
        assert toy.relative_error(gradient, wanted) <= (EXACT if exact else 1e-4)
        assert toy.relative_error(after.method_state, state.method_state) == 0


def reused(method: Any, optimizer: Any, memory: Any, derivatives: Any) -> tuple[Any, Any, Any, Any]:
    """As `one_step`, on a step whose specific gradient comes from the state."""
    train = bilevel.make_step(
        toy.loss, toy.weighting, optimizer, optax.sgd(1.0), method, batch_size=SMALL, derivatives=derivatives,
        update_every=1, probe_every=2,
    )  # fmt: skip
    p, wp = toy.params(1, np.float64), toy.weight_params(2, np.float64)
    state = jax.jit(train.init)(jax.random.key(0), p, wp)
    state = dataclasses.replace(
        state,
        step=jnp.int32(1),
        opt_state=toy.warm_state(optimizer, p),
        method_state=state.method_state._replace(**{state.method_state._fields[0]: memory}),
    )
    big = toy.arrays(3, BIG, np.float64)
    after, metrics = jax.jit(train.step)(state, big, toy.arrays(4, 7, np.float64))
    assert metrics["specific_loss"] == NOT_COMPUTED
    return moved(wp, after), state, chosen(big, metrics), after


def test_temperature_divides_the_logits_in_the_gradient() -> None:
    with jax.enable_x64(True):
        optimizer, rule = toy.OPTIMIZERS[SGD](), filters.gumbel_top_k(temperature=3.0)
        gradient, state, rows, specific = one_step(
            bilevel.dds(), optimizer, np.float64, derivatives=bilevel.Forward(), batch_size=SMALL, filter=rule
        )

        def written_out(wp: Any) -> Array:
            weights = jax.nn.softmax(toy.weighting(wp, rows) / 3.0)
            weights = 1 / SMALL + weights - jax.lax.stop_gradient(weights)
            return objective("dds", optimizer, state, specific)(weights, rows)

        assert toy.relative_error(gradient, jax.jit(jax.grad(written_out))(state.weight_params)) <= EXACT


@pytest.mark.parametrize("optimizer_name", ["sgd", "momentum"])
def test_dds_equals_the_forms_derived_by_hand(optimizer_name: str) -> None:
    """Wang et al., appendix A.1, equation 13: for SGD and momentum alike the probe is −η ∇L_spec(θ⁺)."""
    with jax.enable_x64(True):
        optimizer, rate = toy.OPTIMIZERS[optimizer_name](), 0.1
        gradient, state, rows, specific = one_step(
            bilevel.dds(), optimizer, np.float64, derivatives=bilevel.Forward(), estimator="score", batch_size=SMALL
        )

        @jax.jit
        def by_hand() -> Any:
            g = theta_gradient(state.params, jnp.full(SMALL, 1 / SMALL), rows)
            move = jax.tree.map(lambda x: rate * x, g)
            if optimizer_name == "momentum":
                trace = state.opt_state[0].trace
                move = jax.tree.map(lambda m, t: m + rate * 0.9 * t, move, trace)
            moved = jax.tree.map(jnp.subtract, state.params, move)
            s = ravel(jax.grad(lambda q: toy.losses(q, specific).mean())(moved))
            rewards = jax.vmap(lambda row: ravel(theta_gradient(state.params, jnp.ones(()), row)) @ s)(rows)
            a = -rate * rewards
            others = (a.sum() - a) / (SMALL - 1)
            log_p = jax.jacobian(lambda wp: toy.weighting(wp, rows))(state.weight_params)
            return jax.tree.map(lambda x: jnp.tensordot((a - others) / SMALL, x, 1), log_p)

        assert toy.relative_error(gradient, by_hand()) <= EXACT
