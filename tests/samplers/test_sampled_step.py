"""The step that a sampler feeds: one contract for all samplers, exact continuation, and replay."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel import samplers
from bilevel.training import Checkpoints
from bilevel.types import NOT_COMPUTED, Array, LossAux, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

ROWS, BATCH = 10, 4
DATA, VALIDATION = toy.arrays(1, ROWS), toy.arrays(2, 6)


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    """The toy loss with noise from `rng`, a counter as model state, and the inputs' first two columns as outputs."""
    losses = toy.losses(p, batch) * (1 + 0.1 * jax.random.normal(rng, batch["y"].shape))
    return losses, LossAux({"calls": model_state["calls"] + 1}, {"logits": batch["x"][:, :2]})


def learned(**options: Any) -> samplers.Sampler:
    sizes = {"summary_size": 3, "logger_size": 5, "policy_size": 4}
    return samplers.rl_sampler(ROWS, BATCH, 2, **{"update_every": 4, "reward_every": 2, **sizes, **options})


SAMPLERS = {
    "rl_sampler": learned,
    "fixed rl_sampler": lambda: learned(learns=False),
    "uniform": lambda: samplers.uniform(ROWS, BATCH),
    "replayed": lambda: samplers.replayed(np.arange(12).reshape(3, 4) % ROWS, ROWS),
}


def build(name: str = "rl_sampler", **options: Any) -> bilevel.SampledStep:
    return bilevel.make_sampled_step(SAMPLERS[name](), loss, optax.adam(0.05), **options)


@functools.cache
def ready(name: str) -> tuple[bilevel.SampledStep, bilevel.SampledState, Any]:
    """The functions, the first state and the compiled step: compiling is nearly all that these tests cost."""
    run = build(name)
    state = jax.jit(run.init)(jax.random.key(0), toy.params(1), {"calls": jnp.int32(0)})
    return run, state, jax.jit(run.step)


def leaves(tree: Any) -> list[np.ndarray]:
    found = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in found]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(found, keys, strict=True)]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", SAMPLERS)
def test_contract(name: str) -> None:
    run, first, step = ready(name)
    at = {run.at(i): jax.jit(run.at(i), donate_argnums=0) for i in range(run.period)}
    state, apart, seen = first, jax.tree.map(jnp.copy, first), []
    for i in range(4):
        state, metrics = step(state, DATA, VALIDATION)
        apart, same = at[run.at(i)](apart, DATA, VALIDATION)
        assert shapes(metrics) == shapes(same)
        for key, values in metrics.items():
            np.testing.assert_allclose(same[key], values, rtol=1e-4, atol=1e-6)
        seen.append(metrics)
    assert step._cache_size() == 1
    assert shapes(state) == shapes(first)
    for x, y in zip(leaves(state), leaves(apart), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    metrics = {key: jnp.stack([m[key] for m in seen]) for key in seen[0]}
    assert int(state.step) == int(state.model_state["calls"]) == 4
    assert metrics["selected"].shape == (4, BATCH)
    assert metrics["selected"].dtype == jnp.int32
    rewards = name == "rl_sampler"
    assert [m.get("reward", NOT_COMPUTED) != NOT_COMPUTED for m in seen] == [False, rewards] * 2


def test_the_model_learns_from_the_rows_drawn_and_is_observed_before_the_update() -> None:
    def observed(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        losses = toy.losses(p, batch)
        return losses, LossAux(model_state, {"output": jnp.stack([losses, batch["y"]], axis=1)[:, None]})

    chosen = learned()
    run = bilevel.make_sampled_step(chosen, observed, optax.sgd(0.1), outputs="output", micro_batches=2)
    state = jax.jit(run.init)(jax.random.key(0), toy.params(1))
    after, metrics = jax.jit(run.at(1))(state, DATA, VALIDATION)
    rows = metrics["selected"]
    batch = jax.tree.map(lambda x: x[rows], DATA)
    gradient = jax.grad(lambda p: jnp.mean(toy.losses(p, batch)))(state.params)
    wanted = jax.tree.map(lambda x, g: x - 0.1 * g, state.params, gradient)
    assert toy.relative_error(after.params, wanted) < 1e-5
    outputs = jnp.stack([toy.losses(state.params, batch), batch["y"]], axis=1)
    np.testing.assert_allclose(after.sampler.window.observed[0], outputs.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(after.sampler.window.draws[0], rows)
    validation_loss = jnp.mean(toy.losses(after.params, VALIDATION))
    np.testing.assert_allclose(metrics["validation_loss"], validation_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"], jnp.exp(-2 * validation_loss), rtol=1e-4)


def test_validation_in_parts() -> None:
    def quiet(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        return toy.losses(p, batch), LossAux(model_state, {"logits": batch["x"][:, :2]})

    state, found = ready("rl_sampler")[1], []
    for parts in (1, 3):
        run = bilevel.make_sampled_step(learned(), quiet, optax.adam(0.05), validation_micro_batches=parts)
        found.append(jax.jit(run.at(1))(state, DATA, VALIDATION)[1]["validation_loss"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_restored_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, first, step = ready(name)
    state = first
    for i in range(9):
        if i == 6:  # in the middle of a window
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(6, state)
        state, _ = step(state, DATA, VALIDATION)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(first)
    assert restored is not None
    again = restored[1]
    for _ in range(3):
        again, _ = step(again, DATA, VALIDATION)
    assert_same(again, state)


def test_a_replayed_sequence_gives_the_same_model() -> None:
    trajectories, sequence = [], []
    _, state, step = ready("rl_sampler")
    for _ in range(9):
        state, metrics = step(state, DATA, VALIDATION)
        sequence.append(np.asarray(metrics["selected"]))
        trajectories.append(state.train)
    again = bilevel.make_sampled_step(samplers.replayed(np.stack(sequence), ROWS, num_steps=9), loss, optax.adam(0.05))
    state, step = jax.jit(again.init)(jax.random.key(0), toy.params(1), {"calls": jnp.int32(0)}), jax.jit(again.step)
    for wanted, rows in zip(trajectories, sequence, strict=True):
        state, metrics = step(state, DATA, VALIDATION)
        np.testing.assert_array_equal(metrics["selected"], rows)
        assert toy.relative_error(state.params, wanted.params) < 1e-6


def test_mistakes() -> None:
    run, state, _ = ready("rl_sampler")
    with pytest.raises(UserError, match="data have 11 rows, but the sampler was made for num_rows=10"):
        jax.eval_shape(run.step, state, toy.arrays(1, 11), VALIDATION)
    with pytest.raises(UserError, match=r"no per-example metric 'probs' \(it returns: logits\)"):
        jax.eval_shape(build(outputs="probs").step, state, DATA, VALIDATION)
    with pytest.raises(UserError, match=r"6 rows .* micro_batches=4"):
        jax.eval_shape(build(validation_micro_batches=4).step, state, DATA, VALIDATION)
    with pytest.raises(UserError, match="validation_micro_batches=0"):
        build(validation_micro_batches=0)
