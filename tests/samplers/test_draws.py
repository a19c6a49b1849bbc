"""Draws in two stages: their distribution, rows without weight, and lines that do not fill their last block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bilevel.samplers.draws import draw_each


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 10, 37, 100])
def test_rows_are_drawn_by_their_weights(rows: int) -> None:
    weights = np.random.default_rng(rows).gamma(0.5, size=rows).astype(np.float32)
    weights[1::3] = 0
    count = 20_000
    drawn = np.asarray(jax.jit(draw_each)(jax.random.key(1), jnp.broadcast_to(3.0 * weights, (count, rows))))
    found = np.bincount(drawn, minlength=rows)
    assert len(found) == rows
    assert not found[weights == 0].any()
    expected = count * weights.astype(float) / weights.sum(dtype=float)
    often = expected >= 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (found, expected)]
    kept = pooled[1] > 0
    if kept.sum() > 1:
        assert stats.chisquare(pooled[0][kept], pooled[1][kept]).pvalue > 1e-4


def test_each_line_has_its_own_distribution() -> None:
    rows = np.array([7, 0, 49_999, 12_345])
    weights = np.zeros((4, 50_000), np.float32)
    weights[np.arange(4), rows] = [1e-20, 1.0, 1e20, 0.5]
    drawn = draw_each(jax.random.key(0), jnp.asarray(weights))
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, rows)


def test_small_chances_among_many_rows_are_kept() -> None:
    weights = np.full((20_000, 2_000), 1.0, np.float16)
    weights[:, :1_000] = 3.0
    drawn = np.asarray(draw_each(jax.random.key(2), jnp.asarray(weights)))
    share = (drawn < 1_000).mean()
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 20_000)
    # Within each half all rows are alike: the spread of the counts is that of independent draws.
    for half in (slice(None, 1_000), slice(1_000, None)):
        counts = np.bincount(drawn, minlength=2_000)[half]
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.2)
