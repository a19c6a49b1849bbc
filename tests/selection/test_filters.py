"""Filters against their distributions, and the temperature against the effective sample size that it promises."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.selection import filters, metrics
from bilevel.step import estimators
from bilevel.types import NOT_COMPUTED, UserError

LOGITS = jnp.asarray([0.0, 1.0, 2.0, -1.0, 0.5])
WEIGHTS = np.asarray(jax.nn.softmax(LOGITS), np.float64)
DRAWS = 20_000


def draw(rule: filters.Filter, k: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(jax.vmap(lambda key: rule.select(key, LOGITS, k))(keys))


def without_replacement() -> dict[frozenset[int], float]:
    """Probability of each set of two rows, drawn one after the other in proportion to their weights."""
    found: dict[frozenset[int], float] = {}
    for i, j in itertools.permutations(range(len(WEIGHTS)), 2):
        chance = WEIGHTS[i] * WEIGHTS[j] / (1 - WEIGHTS[i])
        found[frozenset((i, j))] = found.get(frozenset((i, j)), 0.0) + chance
    return found


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((counts - expected) ** 2 / expected))


def test_gumbel_top_k_draws_without_replacement() -> None:
    rows = draw(filters.gumbel_top_k(), 2)
    wanted = without_replacement()
    counts = [np.sum([set(row) == pair for row in rows.tolist()]) for pair in wanted]
    # 9 degrees of freedom: 27.9 is passed by chance once in 1,000 keys, and the key is fixed.
    assert chi_square(np.asarray(counts), DRAWS * np.asarray(list(wanted.values()))) < 27.9


def test_importance_draws_with_replacement() -> None:
    rows = draw(filters.importance(), 3)
    counts = np.bincount(rows.ravel(), minlength=5)
    assert chi_square(counts, rows.size * WEIGHTS) < 18.5  # 4 degrees of freedom
    assert any(len(set(row)) < 3 for row in rows.tolist())


def test_uniform_ignores_the_logits() -> None:
    rows = draw(filters.uniform(), 2)
    assert all(len(set(row)) == 2 for row in rows[:500].tolist())
    assert chi_square(np.bincount(rows.ravel(), minlength=5), np.full(5, rows.size / 5)) < 18.5


def test_top_k_takes_the_largest() -> None:
    rows = filters.top_k().select(jax.random.key(0), LOGITS, 2)
    assert set(rows.tolist()) == {1, 2}


def test_top_fraction_draws_evenly_from_the_largest() -> None:
    rows = draw(filters.top_fraction(0.6), 2)
    assert all(len(set(row)) == 2 for row in rows[:500].tolist())
    largest = np.argsort(-np.asarray(LOGITS))[:3]
    counts = np.bincount(rows.ravel(), minlength=5)
    assert counts[largest].sum() == rows.size
    assert chi_square(counts[largest], np.full(3, rows.size / 3)) < 13.8  # 2 degrees of freedom
    assert set(filters.top_fraction(0.01).select(jax.random.key(0), LOGITS, 2).tolist()) == set(largest[:2].tolist())
    with pytest.raises(UserError, match=r"top_fraction\(0\) must lie in"):
        filters.top_fraction(0)


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.9])
def test_floor_under_the_effective_sample_size(fraction: float) -> None:
    logits = 30 * jax.random.normal(jax.random.key(1), (512,))
    temperature = filters.gumbel_top_k(min_effective_fraction=fraction).temperature(logits)
    size = float(filters.effective_sample_size(logits / temperature))
    assert temperature > 1
    assert size == pytest.approx(512 * fraction, rel=1e-3)
    weights = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    assert 1 / np.sum(weights**2) == pytest.approx(size, rel=1e-3)


def test_floor_that_is_met_changes_nothing() -> None:
    logits = 0.1 * jax.random.normal(jax.random.key(1), (512,))
    assert filters.gumbel_top_k(min_effective_fraction=0.5).temperature(logits) == 1.0


def test_bound_on_the_spread() -> None:
    logits = jnp.asarray([0.0, 40.0, 10.0])
    assert filters.top_k(max_spread=8.0).temperature(logits) == pytest.approx(5.0)
    assert filters.top_k(max_spread=100.0, temperature=2.0).temperature(logits) == 2.0


def test_rows_that_are_never_drawn_set_no_temperature() -> None:
    logits = jnp.array([0.0, 1.0, 2.0, -jnp.inf])
    assert filters.gumbel_top_k(max_spread=0.5).temperature(logits) == pytest.approx(4)
    assert filters.gumbel_top_k(max_spread=0.5).temperature(jnp.full(4, -jnp.inf)) == 1
    tempered = logits / filters.gumbel_top_k(min_effective_fraction=0.9).temperature(logits)
    assert filters.effective_sample_size(tempered) == pytest.approx(0.9 * 3, rel=1e-3)


def test_local_groups_choose_for_themselves() -> None:
    logits = jnp.arange(16.0)
    rows = filters.top_k(scope="local", shards=4).select(jax.random.key(0), logits, 8)
    assert rows.tolist() == [3, 2, 7, 6, 11, 10, 15, 14]
    noisy = filters.gumbel_top_k(scope="local", shards=4).select(jax.random.key(0), jnp.zeros(16), 8)
    assert [sum(int(r) // 4 == g for r in noisy) for g in range(4)] == [2, 2, 2, 2]


def test_score_estimator_is_unbiased() -> None:
    """Its mean over all draws with replacement is the gradient of E_{i∼w}[a_i]."""
    a = jnp.asarray([0.3, -1.0, 2.0, 0.7, 0.1])
    wanted = jax.grad(lambda s: jnp.sum(jax.nn.softmax(s) * a))(LOGITS)
    mean = np.zeros(5)
    for rows in itertools.product(range(5), repeat=3):
        index = jnp.asarray(rows)
        c = estimators.logit_cotangents(a[index], LOGITS[index], "score", num_rows=3)
        mean += np.prod(WEIGHTS[list(rows)]) * np.bincount(rows, np.asarray(c), minlength=5)
    # d log w_i / ds = e_i − w: the draw of row i moves its own logit; the −w part cancels, since Σ c = 0.
    np.testing.assert_allclose(mean, wanted, atol=1e-6)


def test_equal_alignments_give_no_gradient() -> None:
    for estimator in ("softmax", "score"):
        c = estimators.logit_cotangents(jnp.full(5, 0.3), LOGITS, estimator, num_rows=5, normalize=True)
        np.testing.assert_array_equal(c, 0)


def test_weight_metrics() -> None:
    found = metrics.weight_metrics(jnp.zeros(64))
    assert found["effective_sample_size"] == pytest.approx(64)
    assert found["weight_entropy"] == pytest.approx(np.log(64))
    collapsed = metrics.weight_metrics(jnp.zeros(64).at[3].set(1000.0))
    assert collapsed["effective_sample_size"] == pytest.approx(1)
    assert collapsed["largest_weight"] == pytest.approx(1)
    assert collapsed["weight_entropy"] == pytest.approx(0)


def test_domain_shares() -> None:
    shares = metrics.domain_shares(jnp.asarray([0, 0, 2, -1]), 3)
    np.testing.assert_allclose(shares, [2 / 3, 0, 1 / 3], rtol=1e-6)
    weighted = metrics.domain_shares(jnp.asarray([0, 1]), 2, jnp.asarray([3.0, 1.0]))
    np.testing.assert_allclose(weighted, [0.75, 0.25])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: filters.gumbel_top_k(temperature=0.0), r"temperature=0\.0 must be positive"),
        (lambda: filters.importance(min_effective_fraction=1.0), r"min_effective_fraction=1\.0 must lie in \[0, 1\)"),
        (lambda: filters.top_k(max_spread=-1.0), r"max_spread=-1\.0 must be positive"),
        (lambda: filters.uniform(scope="here"), 'scope is "here"; it must be "global" or "local"'),  # pyright: ignore
        (lambda: filters.uniform(shards=2), 'shards=2 with scope="global"'),
        (
            lambda: filters.uniform(scope="local", shards=3).select(jax.random.key(0), LOGITS, 2),
            "cannot divide 5 rows into 2 equally",
        ),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # pyright: ignore[reportCallIssue]


def test_threshold_draws_evenly_above_it_and_fills_up_with_the_highest() -> None:
    logits = jnp.asarray([3.0, -1.0, 0.5, 0.2, -0.5, 0.0])
    rule = filters.threshold(0.0)
    keys = jax.random.split(jax.random.key(0), 3000)
    drawn = np.asarray(jax.vmap(lambda key: rule.select(key, logits, 1))(keys))[:, 0]
    counts = np.bincount(drawn, minlength=6)
    assert counts[[1, 4, 5]].sum() == 0, "a logit of 0 is not above 0"
    assert np.abs(counts[[0, 2, 3]] / 3000 - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / 3000)
    assert set(rule.select(keys[0], logits, 5)[:3].tolist()) == {0, 2, 3}
    assert rule.select(keys[0], logits, 5)[3:].tolist() == [5, 4]
    with pytest.raises(UserError, match=r"threshold\(nan\) must be a finite number"):
        filters.threshold(float("nan"))


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1.0, 0.0), (1e12, 0.0), (1.0, 3e4)])
def test_the_floor_holds_whatever_the_scale(scale: float, offset: float) -> None:
    logits = scale * jax.random.normal(jax.random.key(0), (1000,)) + offset
    temperature = filters.temperature_for(logits, 1.0, 500.0)
    found = float(filters.effective_sample_size(logits / temperature))
    assert found >= 499.9
    if scale >= 1:
        assert found < 510, "the smallest temperature that is enough"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "make",
    [
        filters.gumbel_top_k,
        filters.importance,
        filters.top_k,
        lambda **given: filters.top_fraction(1.0, **given),
        lambda **given: filters.threshold(-10.0, **given),
        lambda **given: filters.importance(unbiased=True, **given),
        lambda **given: filters.gumbel_top_k(min_effective_fraction=0.5, max_spread=4.0, **given),
    ],
)
def test_rows_without_a_finite_logit_come_last(make: Callable[..., filters.Filter], value: float) -> None:
    bad = [5, 17, 30]
    logits = jax.random.normal(jax.random.key(3), (32,)).at[jnp.asarray(bad)].set(value)
    for rule in (make(), make(scope="local", shards=2)):
        tempered = logits / rule.temperature(logits)
        for i in range(5):
            rows = rule.select(jax.random.key(i), tempered, 28).tolist()
            assert not set(bad) & set(rows)
            if rule.weigh is not None:
                assert np.isfinite(rule.weigh(tempered, jnp.asarray(rows))).all()
        if rule.name != "importance":  # which draws with repeats
            assert set(rule.select(jax.random.key(9), tempered, 32).tolist()) == set(range(32))
        found = rule.temperature(logits)
        assert np.isfinite(found)
        assert found == rule.temperature(jnp.where(jnp.isfinite(logits), logits, -jnp.inf))


@pytest.mark.parametrize("make", [filters.gumbel_top_k, filters.importance, filters.top_k, filters.uniform])
def test_rows_are_found_where_none_has_a_logit(make: Callable[..., filters.Filter]) -> None:
    rows = make().select(jax.random.key(0), jnp.full(8, jnp.nan), 4)
    assert all(0 <= row < 8 for row in rows.tolist())
    drawn = [filters.importance().select(jax.random.key(i), jnp.full(8, jnp.nan), 4).tolist() for i in range(20)]
    assert set(itertools.chain(*drawn)) == set(range(8))


def test_weights_where_no_row_has_one() -> None:
    np.testing.assert_array_equal(estimators.softmax(jnp.full(3, -jnp.inf)), 0)
    assert all(value == NOT_COMPUTED for value in metrics.weight_metrics(jnp.full(3, -jnp.inf)).values())
