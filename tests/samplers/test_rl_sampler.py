"""RLSampler: its gradient against all sequences enumerated, its draws, its memory, and what it learns."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import bilevel
from bilevel import samplers
from bilevel.samplers import networks
from bilevel.types import NOT_COMPUTED, Array, LossAux, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

ROWS, BATCH = 12, 4
SMALL: dict[str, Any] = {"summary_size": 3, "logger_size": 5, "policy_size": 4}


def loss(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
    """The toy loss, which also returns what the sampler observes: two outputs a row."""
    hidden = jnp.tanh(batch["x"] @ p["first"]["kernel"])
    output = hidden @ p["last"]["kernel"]
    logits = jnp.stack([output, jnp.sin(3 * output)], axis=-1)
    return (output - batch["y"]) ** 2, LossAux(model_state, {"logits": logits})


def sampler(**options: Any) -> samplers.Sampler:
    settings = {"update_every": 4, "reward_every": 2, **SMALL, **options}
    return samplers.rl_sampler(settings.pop("num_rows", ROWS), settings.pop("batch_size", BATCH), 2, **settings)


def wide(**options: Any) -> samplers.Sampler:
    """A sampler whose networks do something from the start."""
    return sampler(logger_linear_scale=1.0, policy_linear_scale=1.0, **options)


def build(chosen: samplers.Sampler, **options: Any) -> bilevel.SampledStep:
    return bilevel.make_sampled_step(chosen, loss, optax.sgd(0.1, momentum=0.9), **options)


# The gradient


def lstm(cell: Any, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """One cell, gate by gate."""
    n = h.shape[0]
    i, f, g, o = (
        x @ cell.inputs[:, j * n : (j + 1) * n]
        + h @ cell.hidden[:, j * n : (j + 1) * n]
        + cell.bias[j * n : (j + 1) * n]
        for j in range(4)
    )
    c = c / (1 + jnp.exp(-f)) + jnp.tanh(g) / (1 + jnp.exp(-i))
    return jnp.tanh(c) / (1 + jnp.exp(-o)), c


def written_out(params: Any, start: Array, sequence: Any, observed: Array) -> list[list[Array]]:
    """log p of each draw of a window, by loops, from the equations of section 3.2 and appendix A.1."""

    def zeros(network: Any) -> list[Array]:
        return [jnp.zeros(network.first.hidden.shape[0])] * 4

    logger, policy, summary, found = zeros(params.logger), zeros(params.policy), start, []
    for t, rows in enumerate(sequence):
        found.append([])
        for row in rows:
            x = summary @ params.policy.encoder.kernel + params.policy.encoder.bias
            policy[:2] = lstm(params.policy.first, x, *policy[:2])
            policy[2:] = lstm(params.policy.second, policy[0], *policy[2:])
            logits = policy[2] @ params.policy.decoder.kernel + params.policy.decoder.bias
            found[-1].append(jnp.log(jnp.exp(logits) / jnp.sum(jnp.exp(logits)))[row])
        logger[:2] = lstm(params.logger.first, observed[t], *logger[:2])
        logger[2:] = lstm(params.logger.second, logger[0], *logger[2:])
        summary = logger[2] @ params.logger.decoder.kernel + params.logger.decoder.bias
    return found


def played(chosen: samplers.Sampler, state: Any, sequence: Array) -> tuple[samplers.Window, Array]:
    """What the sampler stores, and the rewards, when a model learns from the rows of `sequence` `[T1, k]`."""
    assert chosen.observe is not None
    assert chosen.reward is not None
    data, validation = toy.arrays(1, chosen.num_rows, np.float64), toy.arrays(2, 5, np.float64)
    p, rewards = toy.params(3, np.float64), []

    def mean_loss(p: Any, rows: Array) -> tuple[Array, LossAux]:
        losses, aux = loss(p, {}, jax.tree.map(lambda x: x[rows], data), None)
        return jnp.mean(losses), aux

    for t in range(sequence.shape[0]):
        _, state, _ = chosen.draw(state)
        state = state._replace(
            window=state.window._replace(draws=state.window.draws.at[t].set(sequence[t].astype(jnp.int32)))
        )
        gradient, aux = jax.grad(mean_loss, has_aux=True)(p, sequence[t])
        state = chosen.observe(state, aux.metrics["logits"])
        p = jax.tree.map(lambda x, g: x - 0.1 * g, p, gradient)
        if (t + 1) % chosen.reward_every == 0:
            validation_loss = jnp.mean(loss(p, {}, validation, None)[0])
            rewards.append(jnp.exp(-2 * validation_loss))
            state, _ = chosen.reward(state, validation_loss)
    return state.window, jnp.stack(rewards)


@pytest.mark.parametrize(("steps", "batch", "periods"), [(2, 2, 2), (3, 1, 1)])
def test_the_expected_gradient_is_that_of_all_sequences_enumerated(steps: int, batch: int, periods: int) -> None:
    """E[∇L_policy] = −(1 − λ)/k · ∇ Σ_m E[r_m | the periods before m], over all sequences of batches of 3 rows."""
    rate = 0.3
    with jax.enable_x64(True):
        chosen = wide(
            num_rows=3, batch_size=batch, update_every=steps, reward_every=steps // periods,
            baseline_rate=rate, initial_baseline=0.2, dtype=jnp.float64,
        )  # fmt: skip
        state = jax.jit(chosen.init)(jax.random.key(1))
        start = jnp.asarray([0.5, -1.0, 1.0])
        state = state._replace(window=state.window._replace(summary=start), summary=start)
        every = jnp.asarray(list(itertools.product(range(3), repeat=batch * steps))).reshape(-1, steps, batch)
        windows, rewards = jax.jit(jax.vmap(lambda sequence: played(chosen, state, sequence)))(every)

        def by_period(params: Any) -> Array:
            """log p of each period of each sequence, `[sequences, periods]`."""

            def logged(sequence: Array, observed: Array) -> Array:
                found = written_out(params, start, sequence, observed)
                return jnp.asarray(found).reshape(periods, -1).sum(1)

            return jax.vmap(logged)(every, windows.observed)

        def objective(params: Any) -> Array:
            found = by_period(params)
            others = jax.lax.stop_gradient(found.sum(1, keepdims=True) - found)
            return jnp.sum(jnp.exp(found + others) * rewards)

        def expected(params: Any) -> Array:
            losses = jax.vmap(lambda window: samplers.policy_loss(params, window))(windows)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(by_period(params).sum(1))) * losses)

        gradients = jax.jit(lambda p: (jax.grad(expected)(p), jax.grad(objective)(p), by_period(p)))
        found, wanted, logged = gradients(state.params)
        np.testing.assert_allclose(jnp.sum(jnp.exp(logged.sum(1))), 1.0, rtol=1e-12)
        assert toy.relative_error(found, jax.tree.map(lambda x: -(1 - rate) / batch * x, wanted)) <= 1e-8
        if steps > 2:  # time enough for each part of the networks to matter
            assert all(np.any(part) for part in jax.tree.leaves(found))


def test_recomputed_is_what_was_drawn_from_and_its_gradient_the_direct_one() -> None:
    with jax.enable_x64(True):
        chosen = wide(update_every=6, reward_every=3, dtype=jnp.float64)
        assert chosen.observe is not None
        state = jax.jit(chosen.init)(jax.random.key(0))
        propose = jax.jit(networks.propose, static_argnums=3)
        draw, observe = jax.jit(chosen.draw), jax.jit(chosen.observe)
        logged = []
        for t in range(6):
            logits, _ = propose(state.params.policy, state.summary, state.policy, BATCH)
            rows, state, _ = draw(state)
            logged.append(jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, None], axis=1)[:, 0])
            state = observe(state, jnp.cos(t + jnp.arange(2.0 * BATCH)).reshape(BATCH, 2))
        window = state.window._replace(advantages=jnp.asarray([0.5, -0.2]))
        found, *_ = jax.jit(samplers.log_probabilities)(state.params, window)
        np.testing.assert_allclose(found, jnp.stack(logged), rtol=1e-12)
        gradient = jax.jit(jax.grad(samplers.policy_loss), static_argnames="remat")
        recomputed, direct = (gradient(state.params, window, remat=remat) for remat in (True, False))
        assert toy.relative_error(recomputed, direct) <= 1e-12


def gradient_bytes(iterations: int, remat: bool) -> int:
    chosen = sampler(num_rows=20_000, update_every=iterations, reward_every=iterations)
    state = jax.eval_shape(chosen.init, jax.random.key(0))
    function = jax.grad(lambda params, window: samplers.policy_loss(params, window, remat=remat))
    program = jax.jit(function).lower(state.params, state.window).compile()
    found: Any = program.memory_analysis()
    return int(found.temp_size_in_bytes)


def test_memory_does_not_grow_with_the_window() -> None:
    step = 20_000 * BATCH * 4  # the logits of one iteration
    assert gradient_bytes(64, True) - gradient_bytes(8, True) < step / 4
    assert gradient_bytes(64, False) - gradient_bytes(8, False) > 56 * step


# The parts of section 3.2, 3.3 and appendix A


def test_first_draws_are_uniform_and_parameters_begin_as_written() -> None:
    chosen = samplers.rl_sampler(500, 8, 10)
    state = jax.jit(chosen.init)(jax.random.key(0))
    policy, logger = state.params.policy, state.params.logger
    logits, _ = jax.jit(networks.propose, static_argnums=3)(policy, jnp.ones(64), state.policy, 8)
    np.testing.assert_allclose(jax.nn.softmax(logits), 1 / 500, rtol=1e-6)
    assert logger.first.inputs.shape == (10, 4 * 256)
    assert logger.decoder.kernel.shape == (256, 64)
    assert logger.encoder is None
    assert policy.encoder.kernel.shape == (64, 64)
    assert policy.decoder.kernel.shape == (64, 500)
    for network, scale in ((logger, 1e-3), (policy, 1e-5)):
        np.testing.assert_allclose(jnp.std(network.decoder.kernel), scale, rtol=0.05)
        assert not jnp.any(network.decoder.bias)
        for cell in (network.first, network.second):
            hidden = cell.hidden.shape[0]
            np.testing.assert_allclose(cell.hidden @ cell.hidden.T, jnp.eye(hidden), atol=1e-5)
            bound = np.sqrt(6 / sum(cell.inputs.shape))
            assert 0.95 * bound < jnp.max(jnp.abs(cell.inputs)) <= bound
            assert not jnp.any(cell.bias)


def test_draws_follow_the_policy() -> None:
    chosen, count = wide(num_rows=7), 4000
    state = jax.jit(chosen.init)(jax.random.key(5))
    state = state._replace(summary=jnp.asarray([1.0, -2.0, 3.0]))
    logits, _ = jax.jit(networks.propose, static_argnums=3)(state.params.policy, state.summary, state.policy, BATCH)
    keys = jax.random.split(jax.random.key(6), count)
    rows = jax.jit(jax.vmap(lambda key: chosen.draw(state._replace(rng=key))[0]))(keys)
    for i in range(BATCH):
        wanted = count * jax.nn.softmax(logits[i])
        statistic = jnp.sum((samplers.row_counts(rows[:, i], 7) - wanted) ** 2 / wanted)
        assert statistic < 22.5  # chi-square, 6 degrees of freedom: exceeded with probability 0.001
    # The draws of a batch are independent of each other.
    both = jnp.mean((rows[:, 0] == 0) & (rows[:, 1] == 0))
    probability = jax.nn.softmax(logits)[0, 0] * jax.nn.softmax(logits)[1, 0]
    assert abs(both - probability) < 4 * np.sqrt(probability / count)


@pytest.mark.parametrize("initial", [None, 0.5])
def test_rewards_and_advantages(initial: float | None) -> None:
    chosen = sampler(initial_baseline=initial)
    assert chosen.observe is not None
    assert chosen.reward is not None
    state, losses = jax.jit(chosen.init)(jax.random.key(0)), [0.7, 0.2, 0.4]
    draw, observe, reward = jax.jit(chosen.draw), jax.jit(chosen.observe), jax.jit(chosen.reward)
    baseline = np.exp(-1.4) if initial is None else initial
    advantages = []
    for value in losses:
        for _ in range(2):
            _, state, _ = draw(state)
            state = observe(state, jnp.ones((BATCH, 2)))
        state, metrics = reward(state, jnp.float32(value))
        baseline = 0.1 * np.exp(-2 * value) + 0.9 * baseline
        advantages.append(np.exp(-2 * value) - baseline)
        np.testing.assert_allclose(metrics["baseline"], baseline, rtol=1e-5)
        np.testing.assert_allclose(metrics["advantage"], advantages[-1], rtol=1e-4, atol=1e-7)
    # Two periods in a window: the third is the first of the next one.
    np.testing.assert_allclose(state.window.advantages, [advantages[2], advantages[1]], rtol=1e-4)


def test_an_update_resets_the_states_and_keeps_the_summary() -> None:
    chosen = sampler()
    run = build(chosen)
    state = jax.jit(run.init)(jax.random.key(0), toy.params(1))
    data, validation = toy.arrays(1, ROWS), toy.arrays(2, 5)
    step, seen = jax.jit(run.step), []
    for _ in range(8):
        state, metrics = step(state, data, validation)
        seen.append((state.sampler, metrics))
    for i, (after, metrics) in enumerate(seen):
        resets = (i + 1) % 4 == 0
        assert (not np.any(toy.flat((after.logger, after.policy)))) == resets
        assert (metrics["policy_loss"] == NOT_COMPUTED) != resets
        assert (metrics["reward"] == NOT_COMPUTED) != ((i + 1) % 2 == 0)
    np.testing.assert_array_equal(seen[3][0].summary, seen[3][0].window.summary)
    assert np.any(toy.flat(seen[3][0].summary))
    # Adam's first update moves each parameter that has a gradient by the learning rate.
    moved = np.abs(seen[3][0].params.policy.decoder.bias - seen[2][0].params.policy.decoder.bias)
    np.testing.assert_allclose(moved, 0.04, rtol=1e-3)


def test_a_learned_sampler_goes_on_or_stays_as_it_is() -> None:
    """Table 3: "unfixed" and "fixed"."""
    params = jax.jit(wide().init)(jax.random.key(7)).params
    for learns in (True, False):
        run = build(sampler(learns=learns))
        state = jax.jit(run.init)(jax.random.key(0), toy.params(1), sampler_params=params)
        metrics, step = {}, jax.jit(run.step)
        for _ in range(run.period):
            state, metrics = step(state, toy.arrays(1, ROWS), toy.arrays(2, 5))
        assert (toy.relative_error(state.sampler.params, params) > 0) == learns
        assert ("reward" in metrics) == learns
        assert not np.any(toy.flat((state.sampler.logger, state.sampler.policy)))
        assert np.any(toy.flat(state.sampler.summary))


# What it learns


def test_rows_of_noise_are_left_aside() -> None:
    """Half of the rows have a target that says nothing; three seeds."""
    rows, features, iterations = 32, 4, 2000
    rng = np.random.default_rng(0)
    noise = np.arange(rows) % 2 == 1
    x = rng.normal(size=(rows + 128, features)).astype(np.float32)
    y = x.sum(1) / 2
    y[:rows] = np.where(noise, 2 * rng.normal(size=rows), y[:rows])
    data, validation = ({"x": x[part], "y": y[part]} for part in (slice(rows), slice(rows, None)))

    def regress(p: Any, model_state: Any, batch: Any, rng: Any) -> tuple[Array, LossAux]:
        found = batch["x"] @ p
        return (found - batch["y"]) ** 2, LossAux(model_state, {"logits": found})

    chosen = samplers.rl_sampler(
        rows, 8, 1, update_every=10, reward_every=1, learning_rate=0.005, summary_size=4, logger_size=8, policy_size=8
    )
    run = bilevel.make_sampled_step(chosen, regress, optax.sgd(0.2))

    def drawn(key: Array) -> Array:
        def iteration(function: Any, state: Any) -> tuple[Any, Array]:
            state, metrics = function(state, data, validation)
            return state, metrics["selected"]

        def window(state: Any, _: None) -> tuple[Any, Array]:
            state, found = jax.lax.scan(lambda state, _: iteration(run.at(0), state), state, None, length=9)
            state, last = iteration(run.at(9), state)
            return state, jnp.concatenate([found, last[None]])

        return jax.lax.scan(window, run.init(key, jnp.zeros(features)), None, length=iterations // 10)[1]

    sequences = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), 3))
    share = noise[np.asarray(sequences)].reshape(3, iterations, 8).mean(2)
    assert np.all(np.abs(share[:, :100].mean(1) - 0.5) < 0.1)
    assert np.all(share[:, -400:].mean(1) < 0.25)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows=0"),
        ({"reward_every": 3}, "reward_every=3 must divide update_every=4"),
        ({"reward_every": 0}, "reward_every=0 must divide"),
        ({"baseline_rate": 1.0}, "baseline_rate=1.0 must lie in"),
        ({"reward_scale": 0.0}, "reward_scale=0.0 must be positive"),
        ({"logger_size": 0}, "size of logger is 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(**options)


def test_parameters_and_outputs_that_do_not_fit() -> None:
    other = jax.jit(sampler(num_rows=ROWS + 1).init)(jax.random.key(0)).params
    with pytest.raises(UserError, match=r"policy\.decoder\.kernel have the shape \(4, 13\)"):
        sampler().init(jax.random.key(0), other)
    with pytest.raises(UserError, match="not a `SamplerParams`"):
        sampler().init(jax.random.key(0), {"w": jnp.ones(3)})
    chosen = sampler()
    assert chosen.observe is not None
    with pytest.raises(UserError, match=r"outputs have the shape \(4, 3\)"):
        chosen.observe(chosen.init(jax.random.key(0)), jnp.ones((BATCH, 3)))
