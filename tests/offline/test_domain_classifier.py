"""The domain classifier: the loss and the parameters that are kept, against a loop written out; two domains that differ."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.data import ArrayDataset, Loader
from bilevel.offline.domain_classifier import binary_cross_entropy, train_domain_classifier
from bilevel.selection import filters
from bilevel.types import Array, LossAux, UserError

FEATURES = 5


def domain(seed: int, rows: int, centre: float) -> ArrayDataset:
    x = np.random.default_rng(seed).normal(centre, 1.0, (rows, FEATURES))
    return ArrayDataset({"x": x.astype(np.float32)})


def whole(data: ArrayDataset) -> dict[str, Any]:
    return data.rows(np.arange(len(data)))


def weighting(params: Any, batch: Any) -> Array:
    return batch["x"] @ params["w"] + params["b"]


BEGIN = {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}


def setting(distance: float, specific_rows: int = 40) -> tuple[Any, ...]:
    generic, specific = domain(0, 300, 0.0), domain(1, specific_rows, distance)
    held_out = whole(domain(2, 90, 0.0)), whole(domain(3, 30, distance))
    return Loader(generic, 32, seed=0), Loader(specific, 16, seed=1), held_out


@jax.jit
def entropy(params: Any, generic: Any, specific: Any) -> Any:
    """By the definition: rows of both kinds together, weighted to equal mass."""
    logits = jnp.concatenate([weighting(params, generic), weighting(params, specific)])
    sizes = [len(generic["x"]), len(specific["x"])]
    label = np.repeat([0.0, 1.0], sizes)
    mass = np.repeat([0.5 / size for size in sizes], sizes)
    return (optax.sigmoid_binary_cross_entropy(logits, label) * mass).sum()


def test_it_tells_two_domains_apart() -> None:
    generic, specific, held_out = setting(1.0)
    found = train_domain_classifier(
        weighting, BEGIN, generic, specific, held_out, optimizer=optax.adam(0.05), steps=100
    )
    assert found.valid_loss < 0.5 * math.log(2)
    assert found.valid_loss == pytest.approx(float(entropy(found.weight_params, *held_out)), rel=1e-5)
    logits = [weighting(found.weight_params, rows) for rows in held_out]
    assert np.mean(logits[0] < 0) > 0.8
    assert np.mean(logits[1] > 0) > 0.8


def test_seconds_leave_out_what_compiles() -> None:
    def slow_to_trace(params: Any, batch: Any) -> Any:
        time.sleep(0.3)
        return weighting(params, batch)

    generic, specific, held_out = setting(1.0)
    began = time.perf_counter()
    found = train_domain_classifier(
        slow_to_trace, BEGIN, generic, specific, held_out, optimizer=optax.sgd(0.1), steps=3
    )
    assert 0 < found.seconds < time.perf_counter() - began - 1.0


@pytest.mark.parametrize(("steps", "evaluations"), [(60, 100), (60, 7), (5, 1)])
def test_the_best_of_a_loop_written_out_is_kept(steps: int, evaluations: int) -> None:
    generic, specific, held_out = setting(0.1, specific_rows=16)  # so few rows that it learns them by heart
    optimizer = optax.adamw(0.1, weight_decay=0.01)
    found = train_domain_classifier(
        weighting, BEGIN, generic, specific, held_out, optimizer=optimizer, steps=steps, evaluations=evaluations
    )
    params: Any = BEGIN

    @jax.jit
    def descend(params: Any, opt_state: Any, *batches: Any) -> Any:
        updates, opt_state = optimizer.update(jax.grad(entropy)(params, *batches), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, every = optimizer.init(params), math.ceil(steps / evaluations)
    trajectory = {0: params}
    for step in range(steps):
        params, opt_state = descend(params, opt_state, generic.batch(step), specific.batch(step))
        if (step + 1) % every == 0 or step + 1 == steps:
            trajectory[step + 1] = params
    losses = {step: float(entropy(params, *held_out)) for step, params in trajectory.items()}
    best = min(losses, key=lambda step: losses[step])
    assert found.steps == best < 60
    assert found.valid_loss == pytest.approx(losses[best], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found.weight_params, trajectory[best]
    )


def test_its_network_selects_for_a_step() -> None:
    generic, specific, held_out = setting(2.0)
    found = train_domain_classifier(weighting, BEGIN, generic, specific, held_out, optimizer=optax.adam(0.1), steps=40)

    def loss(params: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        return (batch["x"] @ params) ** 2, LossAux(model_state, {})

    step = bilevel.make_step(
        loss, weighting, optax.sgd(0.1), None, bilevel.frozen(), batch_size=8, filter=filters.top_k()
    )
    state = step.init(jax.random.key(0), jnp.zeros(FEATURES), found.weight_params)
    big = {"x": np.concatenate([held_out[0]["x"][:24], held_out[1]["x"][:8]])}
    _, metrics = jax.jit(step.step)(state, {**big, "id": np.arange(32, dtype=np.int32)}, {})
    assert sum(row >= 24 for row in np.asarray(metrics["selected"])) >= 7


def test_mistakes_are_explained() -> None:
    generic, specific, held_out = setting(1.0)
    train = lambda begin, **given: train_domain_classifier(  # noqa: E731
        weighting, begin, generic, specific, held_out, **{"optimizer": optax.adam(0.1), "steps": 3, **given}
    )
    with pytest.raises(UserError, match="given 0 steps and 100 evaluations; both must be at least 1"):
        train(BEGIN, steps=0)
    with pytest.raises(UserError, match="given 3 steps and 0 evaluations"):
        train(BEGIN, evaluations=0)
    with pytest.raises(UserError, match="is nan before the first update"):
        train({**BEGIN, "b": jnp.nan})


def test_the_entropy_has_equal_mass() -> None:
    _, _, held_out = setting(1.0)
    params = {"w": jnp.linspace(-1, 1, FEATURES), "b": jnp.float32(0.3)}
    found = binary_cross_entropy(weighting, params, *held_out)
    assert float(found) == pytest.approx(float(entropy(params, *held_out)), rel=1e-5)
