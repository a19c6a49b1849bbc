"""SAR and GAR: brute force by per-example gradients, problems with a known answer, and refusals."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import bilevel
from bilevel.offline import acceleration
from bilevel.offline.acceleration import acceleration_rates, alignment_differences, crossed_standard_error
from bilevel.types import Array, LossAux, Shared, UserError

PAIRS, BATCH = 3, 6
KEY = jax.random.key(0)


def stacked(seed: int, batch: int = BATCH, dtype: Any = np.float32, pairs: int = PAIRS) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *(toy.arrays(seed + i, batch, dtype) for i in range(pairs)))


def other_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    values, aux = toy.loss(p, model_state, batch, rng)
    return jnp.sqrt(1 + values), aux


def a_norm(loss: Any, p: Any, rows: Any, loss_of_batch: Any, batches: Any) -> np.ndarray:
    """Section 6.3 written out with a gradient for every row, float64 `[P, m]`."""

    def mean(q: Any, batch: Any) -> Array:
        return jnp.mean(loss_of_batch(q, {}, batch, None)[0])

    def single(q: Any, row: Any) -> Array:
        return loss(q, {}, jax.tree.map(lambda x: x[None], row), None)[0][0]

    def matrix(tree: Any, count: int) -> np.ndarray:
        return np.concatenate([np.asarray(x).reshape(count, -1) for x in jax.tree.leaves(tree)], axis=1)

    of_rows = matrix(jax.jit(jax.vmap(jax.grad(single), (None, 0)))(p, rows), rows["y"].shape[0])
    of_batches = matrix(jax.jit(jax.vmap(jax.grad(mean), (None, 0)))(p, batches), batches["y"].shape[0])
    return (of_batches / np.linalg.norm(of_batches, axis=1, keepdims=True)) @ of_rows.T


@pytest.mark.parametrize(("micro_batches", "specific_loss"), [(1, None), (1, other_loss), (3, other_loss)])
def test_brute_force(micro_batches: int, specific_loss: Any) -> None:
    """Rates, and what they count, from one gradient for each row; other sizes of rows and batches on the two sides."""
    with jax.enable_x64(True):
        p = toy.params(0, np.float64)
        rows = toy.arrays(1, 9, np.float64), toy.arrays(2, 12, np.float64)
        batches = stacked(10, BATCH, np.float64), stacked(20, 2 * BATCH, np.float64)
        arguments: Any = (toy.loss, p, {}, *rows, *batches, KEY)
        given: Any = {"specific_loss": specific_loss, "micro_batches": micro_batches}
        found = alignment_differences(*arguments, **given)
        rates = acceleration_rates(*arguments, **given)
        losses = specific_loss or toy.loss, toy.loss
        wanted = []
        for loss, own in zip(losses, rows, strict=True):
            specific, generic = (a_norm(loss, p, own, *side) for side in zip(losses, batches, strict=True))
            wanted.append((specific, generic))
        for differences, (specific, generic) in zip(found, wanted, strict=True):
            assert differences.dtype == jnp.float64
            np.testing.assert_allclose(differences, specific - generic, rtol=1e-8, atol=1e-8)
        assert float(rates.sar) == pytest.approx(np.mean(wanted[0][0] > wanted[0][1]), rel=1e-12)
        assert float(rates.gar) == pytest.approx(np.mean(wanted[1][1] > wanted[1][0]), rel=1e-12)
        assert 0 < rates.sar < 1


def test_finite_differences_agree() -> None:
    arguments: Any = (toy.loss, toy.params(0), {}, toy.arrays(1, 9), toy.arrays(2, 9), stacked(10), stacked(20), KEY)
    exact = alignment_differences(*arguments)
    rough = alignment_differences(*arguments, derivatives=bilevel.Finite())
    assert toy.relative_error(rough, exact) < 2e-2


def test_what_is_shared_is_the_same_for_all_rows_and_batches() -> None:
    scales = jnp.asarray([0.5, 2.0, 4.0])  # as many as pairs, and fewer than rows

    def scaled(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        losses, aux = toy.loss(p, model_state, {**batch, "y": batch["y"] * batch["scales"].arrays.sum()}, rng)
        return losses, aux

    def sides(**more: Any) -> Any:
        return tuple({**side, **more} for side in (toy.arrays(1, 9), toy.arrays(2, 9), stacked(10), stacked(20)))

    known = ({**side, "y": side["y"] * 6.5} for side in sides())
    shared: Any = (scaled, toy.params(0), {}, *sides(scales=Shared(scales)), KEY)
    written: Any = (toy.loss, toy.params(0), {}, *known, KEY)
    found, wanted = (alignment_differences(*given, micro_batches=3) for given in (shared, written))
    assert toy.relative_error(found, wanted) < 1e-5


def linear(seed: int, rows: int, task: int) -> dict[str, Array]:
    """Rows of one of two tasks on features of their own, so that their gradients are orthogonal."""
    x = np.zeros((rows, 2, 3), np.float32)
    x[:, task] = np.random.default_rng(seed).normal(size=(rows, 3))
    return {"x": jnp.asarray(x.reshape(rows, 6)), "y": jnp.asarray(x[:, task].sum(1))}


def linear_loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    return (batch["x"] @ p - batch["y"]) ** 2, LossAux(model_state, {})


def rates_of(tasks: tuple[int, int], seed: int, rows: int = 64, pairs: int = 8) -> acceleration.AccelerationRates:
    sides = [
        (linear(seed + side, rows, task), *(linear(seed + 10 + 100 * side + i, 64, task) for i in range(pairs)))
        for side, task in enumerate(tasks)
    ]
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *side[1:]) for side in sides]
    return acceleration_rates(linear_loss, jnp.zeros(6), {}, sides[0][0], sides[1][0], batches[0], batches[1], KEY)


def test_orthogonal_tasks_are_told_apart() -> None:
    rates = rates_of((0, 1), seed=0)
    assert rates.sar > 0.9
    assert rates.gar > 0.9


def test_same_distribution_is_chance_and_errors_have_the_right_size() -> None:
    """Over draws of rows and batches, the rates scatter around 1/2 as widely as their standard errors say."""
    found = [rates_of((0, 0), seed=1000 * i) for i in range(40)]
    for name in ("sar", "gar"):
        values = np.asarray([getattr(rates, name) for rates in found])
        errors = np.asarray([getattr(rates, f"{name}_error") for rates in found])
        assert abs(values.mean() - 0.5) < 4 * np.sqrt(np.mean(errors**2) / len(found))
        assert 0.6 < values.std(ddof=1) / np.sqrt(np.mean(errors**2)) < 1.6


def test_standard_error_of_known_components() -> None:
    """Outcomes made of a row's, a pair's and a rest's share with known variances."""
    rng = np.random.default_rng(0)
    pairs, rows, squares = 10, 30, []
    for _ in range(400):
        shares = rng.normal(size=(1, rows)), 0.5 * rng.normal(size=(pairs, 1)), 2 * rng.normal(size=(pairs, rows))
        squares.append(float(crossed_standard_error(jnp.asarray(sum(shares)))) ** 2)
    assert np.mean(squares) == pytest.approx(1 / rows + 0.25 / pairs + 4 / (pairs * rows), rel=0.1)
    assert crossed_standard_error(jnp.ones((4, 5))) == 0


def test_gradients_of_zero_count_for_neither_side() -> None:
    nothing = {"x": jnp.zeros((4, 6)), "y": jnp.zeros(4)}
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *(linear(i, 8, task) for i in range(3))) for task in (0, 1)]
    rates = acceleration_rates(linear_loss, jnp.zeros(6), {}, nothing, nothing, batches[0], batches[1], KEY)
    assert rates.sar == rates.gar == 0
    flat = jax.tree.map(jnp.zeros_like, batches[0])
    rows = linear(0, 8, 0), linear(1, 8, 1)
    specific, generic = alignment_differences(linear_loss, jnp.zeros(6), {}, *rows, batches[0], flat, KEY)
    assert np.all(np.isfinite(specific))
    assert np.any(specific != 0)
    assert np.all(generic == 0)  # the specific batches know nothing of the other task


def test_no_second_compilation() -> None:
    traces: list[int] = []
    counts: list[int] = []

    def loss(*given: Any) -> Any:
        traces.append(1)
        return toy.loss(*given)

    for seed in range(3):
        arguments: Any = (toy.arrays(seed, 9), toy.arrays(2, 9), stacked(10 + seed), stacked(20), KEY)
        acceleration_rates(loss, toy.params(seed), {}, *arguments)
        counts.append(len(traces))
    assert counts[0] == counts[-1]


REFUSED: dict[str, tuple[dict[int, Any], str]] = {
    "one specific row": ({0: toy.arrays(1, 1)}, "1 specific rows have no standard error: give at least 2"),
    "one generic row": ({1: toy.arrays(1, 1)}, "1 generic rows"),
    "one pair": ({2: stacked(10, pairs=1), 3: stacked(20, pairs=1)}, "1 pairs of batches"),
    "unequal pairs": ({3: stacked(20, pairs=5)}, "3 specific batches, but 5 generic ones"),
    "not stacked": ({2: toy.arrays(10, BATCH)}, r"specific_batches has shape \(6, 5\) .* stack P batches"),
    "empty batches": ({3: stacked(20, batch=0)}, "generic_batches must be at least one batch of at least one row"),
    "other arrays": ({2: {"x": stacked(10)["x"]}}, r"do not hold the same arrays .*'y'"),
    "ragged rows": ({0: {"x": jnp.zeros((4, 5)), "y": jnp.zeros(3)}}, "one common leading axis"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    changed, message = REFUSED[case]
    data = [toy.arrays(1, 4), toy.arrays(2, 4), stacked(10), stacked(20)]
    for place, value in changed.items():
        data[place] = value
    with pytest.raises(UserError, match=message):
        acceleration_rates(toy.loss, toy.params(0), {}, data[0], data[1], data[2], data[3], KEY)


def test_losses_that_are_not_one_a_row_and_uneven_parts_are_refused() -> None:
    data = toy.arrays(1, 4), toy.arrays(2, 4), stacked(10), stacked(20)

    def mean_loss(*given: Any) -> Any:
        values, aux = toy.loss(*given)
        return jnp.mean(values), aux

    with pytest.raises(UserError, match="one loss a row"):
        acceleration_rates(mean_loss, toy.params(0), {}, *data, KEY)
    for parts, message in ((0, "must be at least 1"), (3, "4 rows .* cannot be divided into micro_batches=3")):
        with pytest.raises(UserError, match=message):
            acceleration_rates(toy.loss, toy.params(0), {}, *data, KEY, micro_batches=parts)
