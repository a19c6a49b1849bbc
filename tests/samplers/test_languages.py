"""Samplers of languages: rounds, draws, running gradients, rewards, and exact continuation in the middle of a round."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from scipy import stats

import bilevel
from bilevel import samplers
from bilevel.samplers.language_queue import most_batches, sorted_queue
from bilevel.samplers.language_scorer import init_scorer
from bilevel.training import Checkpoints
from bilevel.types import NOT_COMPUTED, UserError

BATCH, TARGETS = 3, 9
NAMES = ("az", "tr", "be")
AVAILABLE = np.array(
    [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]], bool
)
TABLE = np.where(AVAILABLE, np.cumsum(AVAILABLE).reshape(AVAILABLE.shape) - 1, -1)
ROWS = int(AVAILABLE.sum())
DATA, DEV = toy.arrays(1, ROWS), toy.arrays(2, 6)
COLUMN = np.nonzero(AVAILABLE)[1]
"""The language of each row."""


def dds(**options: Any) -> samplers.Sampler:
    given: dict[str, Any] = {
        "targets_per_round": 7, "names": NAMES, "units": 5, "scorer_batch_size": 4, "scorer_steps": 2, "learning_rate": 0.05,
    }  # fmt: skip
    return samplers.multilingual_dds(TABLE, ROWS, BATCH, toy.params(1), 0, **{**given, **options})


def fixed(logits: Any = None, **options: Any) -> samplers.Sampler:
    return samplers.fixed_languages(TABLE, ROWS, BATCH, logits, **{"names": NAMES, "targets_per_round": 7, **options})


SAMPLERS = {
    "dds": dds,
    "own rows": lambda: dds(specific_rows="train", similarity="dot", estimator="policy_gradient"),
    "part in bfloat16": lambda: dds(param_filter=lambda path: "last" in path, gradient_dtype=jnp.bfloat16),
    "fixed": fixed,
}


@functools.cache
def ready(name: str) -> tuple[bilevel.SampledStep, bilevel.SampledState, Any]:
    """The functions, the first state and the compiled step."""
    run = bilevel.make_sampled_step(SAMPLERS[name](), toy.loss, optax.adam(0.05))
    return run, jax.jit(run.init)(jax.random.key(0), toy.params(1)), jax.jit(run.step)


def leaves(tree: Any) -> list[np.ndarray]:
    found = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in found]
    return [np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(found, keys, strict=True)]


@pytest.mark.parametrize(("pairs", "languages", "batch"), [(7, 3, 3), (2, 5, 3), (12, 1, 4), (6, 6, 1), (30, 4, 8)])
def test_each_minibatch_has_one_language_and_no_pair_is_lost(pairs: int, languages: int, batch: int) -> None:
    queue_of = jax.jit(lambda key, rows, column: sorted_queue(key, rows, column, languages, batch))
    most = most_batches(pairs, languages, batch)
    lengths = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows, column = rng.permutation(50)[:pairs], rng.integers(languages, size=pairs)
        queue = jax.device_get(queue_of(jax.random.key(seed), jnp.asarray(rows), jnp.asarray(column)))
        language = dict(zip(rows.tolist(), column.tolist(), strict=True))
        used = queue.rows[: queue.length]
        assert sorted(used[used >= 0]) == sorted(rows)
        assert (queue.rows[queue.length :] == -1).all()
        assert (used[:, 0] >= 0).all(), "no minibatch is empty"
        for line, named in zip(used, queue.language, strict=False):
            assert {language[row] for row in line[line >= 0].tolist()} == {named}
        assert queue.length == sum(-(-count // batch) for count in np.bincount(column))
        assert queue.rows.shape == (most, batch)
        lengths.append(int(queue.length))
    assert max(lengths) <= most


def test_rounds_go_through_all_targets_each_epoch() -> None:
    sampler = fixed(targets_per_round=6)
    state, draw, target = sampler.init(jax.random.key(0)), jax.jit(sampler.draw), np.nonzero(AVAILABLE)[0]
    drawn: list[list[int]] = []
    for _ in range(3 * 12):
        rows, state, metrics = draw(state)
        if metrics["drawn/az"] != NOT_COMPUTED:
            drawn.append([])
            assert sum(float(metrics[f"drawn/{name}"]) for name in NAMES) == pytest.approx(1)
        drawn[-1] += rows[rows >= 0].tolist()
    assert all(len(round) == 6 for round in drawn[:-1])
    targets = target[np.concatenate(drawn)]
    for epoch in range(len(targets) // TARGETS):
        # Minibatches of a round are sorted by language: an epoch is exact at the ends of rounds alone.
        if (epoch + 1) * TARGETS % 6 == 0:
            seen = targets[: (epoch + 1) * TARGETS]
            assert (np.bincount(seen, minlength=TARGETS) == epoch + 1).all()


def test_languages_are_drawn_by_their_chances_and_none_that_is_absent() -> None:
    logits = np.array([0.3, 1.0, -0.4])
    many = np.repeat(TABLE, 1500, axis=0)
    sampler = samplers.fixed_languages(many, ROWS, 500, logits, targets_per_round=len(many))
    state, draw, counts = sampler.init(jax.random.key(3)), jax.jit(sampler.draw), np.zeros(ROWS, int)
    while True:
        rows, state, _ = draw(state)
        counts += np.bincount(rows[rows >= 0], minlength=ROWS)
        if state.queue.place == state.queue.length:
            break
    assert counts.sum() == len(many)
    expected = np.exp(logits) * AVAILABLE
    expected = 1500 * (expected / expected.sum(1, keepdims=True))[AVAILABLE]
    free = int(AVAILABLE.sum() - len(AVAILABLE))
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, free) > 1e-3, "the key is fixed"


def test_what_a_language_cannot_have() -> None:
    sampler = samplers.fixed_languages(
        TABLE[[0, 2, 5]], ROWS, BATCH, [0.0, -np.inf, 0.0], targets_per_round=3
    )  # fmt: skip
    state, draw = sampler.init(jax.random.key(0)), jax.jit(sampler.draw)
    for _ in range(20):
        rows, state, _ = draw(state)
        assert set(COLUMN[rows[rows >= 0]]) <= {0, 2}


@pytest.mark.parametrize("name", SAMPLERS)
def test_running_gradients_rewards_and_rounds_written_out(name: str) -> None:
    """Three rounds, each number by hand: the mean over real rows, g_i, r_i, and when ψ moves."""
    _, state, step = ready(name)
    part = (lambda g: {"last": g["last"]}) if name == "part in bfloat16" else (lambda g: g)
    kept: list[Any] = [jax.tree.map(jnp.zeros_like, part(state.params)) for _ in NAMES]
    rounds, padded = 0, 0
    while rounds < 3:
        before = state
        state, metrics = step(before, DATA, DEV)
        rows = np.asarray(metrics["selected"])
        real = rows[rows >= 0]
        padded += len(rows) - len(real)
        batch = jax.tree.map(lambda x, real=real: x[real], DATA)
        value, gradient = jax.value_and_grad(lambda p, batch=batch: jnp.mean(toy.losses(p, batch)))(before.params)
        np.testing.assert_allclose(metrics["generic_loss"], value, rtol=1e-5)
        updates, _ = optax.adam(0.05).update(gradient, before.train.opt_state, before.params)
        assert toy.relative_error(state.params, optax.apply_updates(before.params, updates)) < 1e-5
        (language,) = set(COLUMN[real])
        ends = bool(state.sampler.queue.place == state.sampler.queue.length)
        rounds += ends
        if name == "fixed":
            continue
        kept[language] = jax.tree.map(lambda g, new: 0.5 * g + new, kept[language], part(gradient))
        loose = 1e-2 if name == "part in bfloat16" else 1e-5
        for i in range(len(NAMES)):
            own = jax.tree.map(lambda x, i=i: x[i], state.sampler.gradients)
            np.testing.assert_allclose(toy.flat(own), toy.flat(kept[i]), rtol=loose, atol=loose)
        moved = any(
            (x != y).any() for x, y in zip(*map(leaves, (state.sampler.params, before.sampler.params)), strict=True)
        )
        assert moved == ends
        assert (metrics["reward/az"] != NOT_COMPUTED) == ends
        if ends:
            dev = jax.grad(lambda p: jnp.mean(toy.losses(p, DEV)))(state.params)
            specific = toy.flat(kept[0]) if name == "own rows" else toy.flat(part(dev))
            for i, label in enumerate(NAMES):
                own = toy.flat(kept[i])
                wanted = own @ specific
                if name != "own rows":
                    wanted = wanted / max(np.linalg.norm(own) * np.linalg.norm(specific), 1e-30)
                np.testing.assert_allclose(
                    metrics[f"reward/{label}"], 0.001 * wanted, rtol=10 * loose, atol=loose * 1e-3
                )
    assert padded


def test_a_language_without_a_gradient_has_the_reward_0() -> None:
    sampler = dds()
    assert sampler.reward_gradient is not None
    assert sampler.observe_gradient is not None
    state = sampler.init(jax.random.key(0))
    _, state, _ = sampler.draw(state)
    gradient = jax.tree.map(jnp.ones_like, toy.params(1))
    state = sampler.observe_gradient(state, gradient)
    _, metrics = sampler.reward_gradient(state, gradient)
    first = NAMES[int(state.queue.language[0])]
    assert {name: round(float(metrics[f"reward/{name}"]), 6) for name in NAMES} == {
        name: 0.001 * (name == first) for name in NAMES
    }
    _, metrics = sampler.reward_gradient(state, jax.tree.map(jnp.zeros_like, gradient))
    assert [float(metrics[f"reward/{name}"]) for name in NAMES] == [0, 0, 0]


def test_the_gradient_is_pulled_back_through_the_optimizer() -> None:
    """By Adam the reward is that of DDS: minus the derivative of the dev loss after the update, by what g_i would add."""
    optimizer = optax.adam(0.05)
    run = bilevel.make_sampled_step(
        dds(similarity="dot", reward_scale=1.0), toy.loss, optimizer, through_optimizer=True
    )
    state, step = jax.jit(run.init)(jax.random.key(0), toy.params(1)), jax.jit(run.step)
    while True:
        before = state
        state, metrics = step(before, DATA, DEV)
        if metrics["reward/az"] != NOT_COMPUTED:
            break
    batch = jax.tree.map(lambda x: x[metrics["selected"][metrics["selected"] >= 0]], DATA)
    gradient = jax.grad(lambda p: jnp.mean(toy.losses(p, batch)))(before.params)

    def after(shares: Any) -> Any:
        moved = jax.tree.map(lambda g, each: g + jnp.tensordot(shares, each, 1), gradient, state.sampler.gradients)
        updates, _ = optimizer.update(moved, before.train.opt_state, before.params)
        return jnp.mean(toy.losses(optax.apply_updates(before.params, updates), DEV))

    wanted = -jax.grad(after)(jnp.zeros(len(NAMES)))
    np.testing.assert_allclose([metrics[f"reward/{name}"] for name in NAMES], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["dds", "fixed"])
def test_a_run_restored_in_the_middle_of_a_round_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, first, step = ready(name)
    state, middle = first, None
    for i in range(14):
        if middle is None and i > 4 and 0 < int(state.sampler.queue.place) < int(state.sampler.queue.length):
            middle = i
            with Checkpoints(tmp_path) as checkpoints:
                checkpoints.save(i, state)
        state, _ = step(state, DATA, DEV)
    assert middle is not None
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(first)
    assert restored is not None
    again = restored[1]
    for _ in range(14 - middle):
        again, _ = step(again, DATA, DEV)
    assert int(again.sampler.rounds) > int(restored[1].sampler.rounds), "a round began afterwards"
    for x, y in zip(leaves(again), leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_replayed_sequence_with_empty_places_gives_the_same_model() -> None:
    _, state, step = ready("dds")
    sequence = []
    for _ in range(4):
        state, metrics = step(state, DATA, DEV)
        np.testing.assert_array_equal(metrics["ids"], metrics["selected"])
        sequence.append(np.asarray(metrics["selected"]))
    again = bilevel.make_sampled_step(samplers.replayed(np.stack(sequence), ROWS), toy.loss, optax.adam(0.05))
    other, step = jax.jit(again.init)(jax.random.key(0), toy.params(1)), jax.jit(again.step)
    for _ in range(4):
        other, _ = step(other, DATA, DEV)
    assert np.min(sequence) == -1
    assert toy.relative_error(other.params, state.params) < 1e-6


def test_one_program_and_one_kind_of_step() -> None:
    run, state, step = ready("dds")
    assert {run.at(i) for i in range(10)} == {run.step}
    wrapped = run.map(lambda function: lambda *given: function(*given))
    assert wrapped.at(0) == wrapped.step != run.step
    shapes = jax.eval_shape(run.step, state, DATA, DEV)[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert run.period == 1
    assert step._cache_size() == 1


def test_it_begins_with_a_given_scorer() -> None:
    params = init_scorer(jax.random.key(5), len(NAMES), 5)
    params = params._replace(output=params.output._replace(bias=jnp.asarray([0.0, 50.0, 0.0])))
    sampler = dds()
    state = sampler.init(jax.random.key(0), params)
    _, _, metrics = sampler.draw(state)
    _, _, even = sampler.draw(sampler.init(jax.random.key(0)))
    assert metrics["chance/tr"] > even["chance/tr"] + 0.2
    with pytest.raises(UserError, match=r"hidden\.kernel have the shape \(3, 6\)"):
        sampler.init(jax.random.key(0), init_scorer(jax.random.key(5), len(NAMES), 6))
    with pytest.raises(UserError, match="fixed_languages has no parameters"):
        fixed().init(jax.random.key(0), params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dds(targets_per_round=10), "targets_per_round=10 must lie between 1 and the 9 targets"),
        (lambda: dds(names=("az", "az", "be")), "2 different names for 3 languages"),
        (lambda: dds(similarity="angle"), "similarity='angle' is unknown: choose cosine or dot"),
        (lambda: dds(temperature=0.0), r"temperature=0\.0 must be positive"),
        (lambda: dds(gradient_decay=1.0), r"gradient_decay=1\.0 must lie in \[0, 1\)"),
        (lambda: dds(param_filter=lambda path: False), "param_filter accepts none of the 2 parameters"),
        (lambda: samplers.multilingual_dds(TABLE, ROWS, BATCH, {}, 3, targets_per_round=2), "specific=3 is no column"),
        (lambda: samplers.fixed_languages(TABLE, 4, BATCH), "row numbers -1 to 16, but num_rows=4"),
        (lambda: samplers.fixed_languages(TABLE - 20, ROWS, BATCH), "row numbers -21 to -4"),
        (lambda: samplers.fixed_languages(np.full((2, 2), -1), ROWS, BATCH), r"2 targets without a row \(the first is number 0"),
        (lambda: samplers.fixed_languages(TABLE.astype(float), ROWS, BATCH), "type float64; it must be integers"),
        (lambda: fixed([0.0, -np.inf, 0.0]), r"1 of 9 targets \(the first is number 7\) have no language with a logit"),
        (
            lambda: bilevel.make_sampled_step(fixed(), toy.loss, optax.sgd(0.1), through_optimizer=True),
            "through_optimizer=True needs a sampler that learns from the gradient",
        ),
    ],
)  # fmt: skip
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
