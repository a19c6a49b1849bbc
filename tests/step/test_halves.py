"""The halves of a step choose the rows, and teach the weights, of the whole step, and touch nothing else."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel.selection import filters
from bilevel.types import UserError

BIG, SMALL, STEPS = 32, 8, 4
METHODS: dict[str, Any] = {
    "soba": lambda: bilevel.soba(optax.sgd(0.05)),
    "dds": lambda: bilevel.dds(unroll=optax.sgd(0.1)),
    "anograd": lambda: bilevel.anograd(through_optimizer=False),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {"estimator": "score", "entropy_bonus": 0.1, "normalize_alignments": True},
    "weighed by the softmax": {"filter": filters.gumbel_top_k(temperature=2.0), "derivatives": bilevel.Forward()},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])
def test_halves_are_those_of_the_whole_step(method: str, options: dict[str, Any]) -> None:
    optimizer, made = optax.adam(0.05), METHODS[method]()
    train = bilevel.make_step(
        toy.loss, toy.weighting, optimizer, optax.adam(0.1), made, batch_size=SMALL, update_every=1, **options
    )
    halves = bilevel.make_halves(toy.loss, toy.weighting, optax.adam(0.1), made, batch_size=SMALL, **options)
    key, params, alpha = jax.random.key(0), toy.params(1), toy.weight_params(2)
    state, weights = train.init(key, params, alpha), halves.init(params, alpha)
    opt_state = optimizer.init(params)
    step, select, learn = jax.jit(train.step), jax.jit(halves.select), jax.jit(halves.learn)

    @jax.jit
    def update(params: Any, opt_state: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda p: toy.losses(p, batch).mean())(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(STEPS):
        big, specific = toy.arrays(10 + i, BIG), toy.arrays(50 + i, 6)
        state, metrics = step(state, big, specific)
        chosen = select(weights, big, key)
        weights, found = learn(weights, params, chosen, specific, key)
        params, opt_state = update(params, opt_state, chosen.rows)
        np.testing.assert_array_equal(chosen.positions, metrics["selected"])
        np.testing.assert_array_equal(chosen.rows["x"], big["x"][chosen.positions])
        for name in ("generic_loss", "specific_loss", "effective_sample_size", "alignment_rms"):
            np.testing.assert_allclose(found[name], metrics[name], rtol=1e-4, err_msg=name)
    assert toy.relative_error(params, state.params) < 1e-5
    assert toy.relative_error(weights.weight_params, state.weight_params) < 1e-4
    assert int(weights.step) == STEPS


def test_learning_costs_no_update_of_the_model() -> None:
    """θ is as it was: what the θ-update of the whole step would compute on top is left out of the compiled half."""
    halves = bilevel.make_halves(toy.loss, toy.weighting, optax.adam(0.1), METHODS["soba"](), batch_size=SMALL)
    params, key = toy.params(1), jax.random.key(0)
    weights = halves.init(params, toy.weight_params(2))
    big, specific = toy.arrays(10, BIG), toy.arrays(50, 6)
    chosen = halves.select(weights, big, key)
    shapes = jax.eval_shape(halves.learn, weights, params, chosen, specific, key)
    assert {*vars(shapes[0])} == {"step", "weight_params", "weight_opt_state", "method_state"}
    assert not shapes[1].keys() & {"selected", "ids"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (bilevel.dds(), "looks ahead by θ's optimizer, which stays in your loop"),
        (bilevel.uniform(), "learns no weighting network"),
        (bilevel.learning_to_reweight(), "learns no weighting network"),
    ],
)
def test_methods_that_do_not_fit_are_refused(method: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bilevel.make_halves(toy.loss, toy.weighting, optax.adam(0.1), method, batch_size=SMALL)


def test_weights_that_see_the_model_are_refused() -> None:
    scorer: Any = bilevel.scoring.train_loss(toy.loss)
    with pytest.raises(UserError, match="sees rows alone"):
        bilevel.make_halves(toy.loss, scorer, optax.adam(0.1), METHODS["soba"](), batch_size=SMALL)
