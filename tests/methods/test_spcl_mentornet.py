"""Weighting baselines for labelled data: SPCL and MentorNet, written out; alike on one device and on eight."""

from typing import Any

import jax
import jax.numpy as jnp
import labelled
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from labelled import CLASSES, Net, classifier
from scipy.optimize import minimize

import bilevel
from bilevel.devices import sharding
from bilevel.methods.mentornet import MentorFeatures, with_wrong_labels
from bilevel.methods.spcl import restrained
from bilevel.nn.mentor_net import MentorNetwork, mentor
from bilevel.types import NOT_COMPUTED, UserError

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

BIG, NET = 32, Net()
MENTOR, ALONE = (mentor(MentorNetwork(classes), jax.random.key(5)) for classes in (CLASSES, 1))


def build(method: Any, optimizer: Any = None, **options: Any) -> bilevel.TrainStep:
    return bilevel.make_step(
        options.pop("loss", classifier(NET)), None, optimizer or optax.sgd(0.1), None, method, mode="dense", batch_size=BIG,
        **options,
    )  # fmt: skip


def mentornet(**options: Any) -> bilevel.methods.Method:
    options = {"num_classes": CLASSES, "total_steps": 10, **options}
    return bilevel.mentornet(*(ALONE if options["num_classes"] == 1 else MENTOR), optax.adam(0.01), **options)


def start(train: bilevel.TrainStep) -> bilevel.TrainState:
    return train.init(jax.random.key(0), labelled.start(NET, 1)[0])


def moved_by(params: Any, weights: Any, batch: Any) -> Any:
    gradient = weighted_gradient(params, jnp.asarray(weights, jnp.float32), batch)
    return jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), params, gradient)


@jax.jit
def weighted_gradient(params: Any, weights: Any, batch: Any) -> Any:
    return jax.grad(lambda p: weights @ labelled.losses(NET, p, batch))(params)


def check(found: Any, wanted: Any, rtol: float = 1e-4) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), found, wanted)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_spcl_written_out(micro_batches: int) -> None:
    """v = max(0, 1 − ℓ/λ) with λ of the schedule, and θ moves by (1/B) Σ v_i ∇ℓ_i."""
    pace = optax.exponential_decay(1.0, 1, 1.3)
    train = build(bilevel.spcl(pace), micro_batches=micro_batches)
    state, step = start(train), jax.jit(train.step)
    shares = []
    for i in range(3):
        batch, before = labelled.rows(i, BIG), state.params
        state, metrics = step(state, batch, {})
        losses = np.asarray(labelled.losses(NET, before, batch))
        weights = np.maximum(0, 1 - losses / 1.3**i) / BIG
        np.testing.assert_allclose(metrics["weights"], weights, rtol=1e-4, atol=1e-6)
        check(state.params, moved_by(before, weights, batch))
        assert metrics["specific_loss"] == NOT_COMPUTED
        shares.append(np.mean(weights > 0))
    assert 0 < shares[0] < shares[-1]
    assert int(state.method_state.step) == 3
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.3, 0.9])
def test_the_curriculum_region_against_a_solver(bound: float, unit: float) -> None:
    """v minimises Σ v ℓ + λ Σ (v²/2 − v) over [0, 1]ᵇ with Σ a v ≤ c Σ a; losses below 0 and a_i = 0 included."""
    rng = np.random.default_rng(0)
    losses, pace, rows = rng.normal(1.0, 1.0, 24), 1.5, 24
    hard = rng.exponential(size=rows) * (np.arange(rows) % 6 > 0)
    found = restrained(
        jnp.asarray(np.where(losses < pace, 1 - losses / pace, 0), jnp.float32), jnp.asarray(unit * hard, jnp.float32),
        jnp.asarray(bound), jnp.sum,
    )  # fmt: skip
    solved = minimize(
        lambda v: v @ losses + pace * np.sum(v * v / 2 - v), np.full(rows, 1e-3), jac=lambda v: losses + pace * (v - 1),
        bounds=[(0, 1)] * rows, method="SLSQP", options={"ftol": 1e-12, "maxiter": 1000},
        constraints=[{"type": "ineq", "fun": lambda v: bound * hard.sum() - hard @ v, "jac": lambda v: -hard}],
    )  # fmt: skip
    assert solved.success
    np.testing.assert_allclose(found, solved.x, atol=1e-5)
    free = np.clip(1 - losses / pace, 0, 1)
    assert (hard @ free > bound * hard.sum()) == (bound < 0.5), "bounds of both kinds are tried"
    if bound > 0.5:
        np.testing.assert_allclose(found, free, atol=1e-6)


def test_spcl_with_a_curriculum_written_out() -> None:
    """Rows that are known to be hard weigh less, and the harder the less, until a growing bound lets them in."""
    bound = optax.linear_schedule(0.1, 1.0, 2)
    train = build(bilevel.spcl(3.0, curriculum=lambda batch: 1.0 + batch["id"] % 3, bound=bound))
    state, step = start(train), jax.jit(train.step)
    for i in range(3):
        batch, before = labelled.rows(i, BIG), state.params
        hard, losses = 1.0 + batch["id"] % 3, np.asarray(labelled.losses(NET, before, batch), np.float64)
        state, metrics = step(state, batch, {})
        limit = (0.1, 0.55, 1.0)[i] * hard.sum()

        def weights(mu: float, losses: Any = losses, hard: Any = hard) -> Any:
            return np.clip(1 - (losses + mu * hard) / 3.0, 0, 1)

        multipliers = np.linspace(0, 3, 300_001)
        mu = next(m for m in multipliers if hard @ weights(m) <= limit)
        np.testing.assert_allclose(metrics["weights"], weights(mu) / BIG, atol=1e-5 / BIG * 10)
        check(state.params, moved_by(before, weights(mu) / BIG, batch), rtol=1e-3)
        assert (mu > 0) == (i == 0)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_spcl_costs_a_plain_step() -> None:
    net = Net(hidden=256)

    def operations(train: Any) -> float:
        batch, state = labelled.rows(0, BIG), train.init(jax.random.key(0), labelled.start(net)[0])
        cost: Any = jax.jit(train.step).lower(state, batch, batch).compile().cost_analysis()
        return float(cost["flops"])

    plain = bilevel.make_step(classifier(net), None, optax.sgd(0.1), None, bilevel.uniform(), batch_size=BIG)
    assert operations(build(bilevel.spcl(2.0), loss=classifier(net))) <= 1.1 * operations(plain)


def test_spcl_where_no_row_is_easy() -> None:
    train = build(bilevel.spcl(1e-6))
    after, metrics = jax.jit(train.step)(start(train), labelled.rows(0, BIG), {})
    check(after.params, labelled.start(NET, 1)[0])
    assert metrics["effective_sample_size"] == NOT_COMPUTED
    assert np.isfinite(metrics["generic_loss"])


def test_mentornet_written_out() -> None:
    """Burn-in, then v = sigmoid(mentor); the moving percentile; and one step of cross-entropy for the mentor."""
    train = build(mentornet(burn_in=0.1, percentile=0.5, decay=0.8))
    state, step, level = start(train), jax.jit(train.step), 0.0
    for i in range(3):
        batch, specific, before = labelled.rows(i, BIG), labelled.rows(50 + i, 16), state
        state, metrics = step(state, batch, specific)
        losses = np.asarray(labelled.losses(NET, before.params, batch))
        median = np.median(losses)
        level = median if i == 0 else 0.8 * level + 0.2 * median
        np.testing.assert_allclose(state.method_state.percentile, level, rtol=1e-5)
        seen = MentorFeatures(
            jnp.asarray(losses), jnp.asarray(losses - level), batch["label"], jnp.full(BIG, i / 10, jnp.float32)
        )
        v = np.ones(BIG) if i == 0 else np.asarray(jax.nn.sigmoid(MENTOR[0](before.method_state.params, seen)))
        np.testing.assert_allclose(metrics["weights"], v / BIG, rtol=1e-4)
        check(state.params, moved_by(before.params, jnp.asarray(v / BIG, jnp.float32), batch))
        assert np.isfinite(metrics["specific_loss"])
        changed = jax.tree.map(
            lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))),
            state.method_state.params,
            before.method_state.params,
        )
        assert any(jax.tree.leaves(changed))
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_first_step_of_the_mentor() -> None:
    """The logits are 0 at first, so its cross-entropy is log 2, whatever labels were drawn."""
    train = build(mentornet())
    state = train.init(jax.random.key(0), labelled.start(NET, 1)[0])
    abstract = jax.eval_shape(train.init, jax.random.key(0), labelled.start(NET, 1)[0])
    after, metrics = jax.jit(train.step, donate_argnums=0)(state, labelled.rows(0, BIG), labelled.rows(1, 16))
    np.testing.assert_allclose(metrics["specific_loss"], np.log(2), rtol=1e-6)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert np.isfinite(jax.tree.leaves(MENTOR[1])[0]).all()  # not donated away


def test_mentornet_with_known_rows_written_out() -> None:
    """One step of cross-entropy over the rows that are known, by the losses of the batch; none of them changes nothing."""
    known = np.asarray([1, 0, -1, -1] * 25, np.int8)
    train = build(mentornet(burn_in=0.0, percentile=0.5, num_classes=1, known=jnp.asarray(known)), loss=classifier(NET))
    state, step = start(train), jax.jit(train.step)
    batch = labelled.rows(0, BIG)
    ids = np.arange(BIG) * 3 % 100
    ids[5] = -1
    values = np.where(ids < 0, -1, known[ids])
    losses = labelled.losses(NET, state.params, batch)
    after, metrics = step(state, {**batch, "id": jnp.asarray(ids, jnp.int32)}, {})
    seen = MentorFeatures(losses, losses - jnp.median(losses), jnp.zeros(BIG, jnp.int32), jnp.zeros(BIG))

    def cross_entropy(params: Any) -> Any:
        logits, rows = ALONE[0](params, seen), jnp.asarray(values >= 0)
        each = optax.sigmoid_binary_cross_entropy(logits, jnp.asarray(values == 0, jnp.float32))
        return jnp.sum(each * rows) / jnp.sum(rows)

    value, gradient = jax.value_and_grad(cross_entropy)(state.method_state.params)
    updates, _ = optax.adam(0.01).update(gradient, state.method_state.opt_state, state.method_state.params)
    check(after.method_state.params, optax.apply_updates(state.method_state.params, updates))
    np.testing.assert_allclose(metrics["specific_loss"], value, rtol=1e-5)
    nobody, metrics = step(after, {**batch, "id": jnp.full(BIG, 2, jnp.int32)}, {})
    assert metrics["specific_loss"] == NOT_COMPUTED
    jax.tree.map(np.testing.assert_array_equal, nobody.method_state.params, after.method_state.params)
    jax.tree.map(np.testing.assert_array_equal, nobody.method_state.opt_state, after.method_state.opt_state)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    without = {name: x for name, x in batch.items() if name != "id"}
    with pytest.raises(
        UserError, match=r"reads the numbers of rows as batch\['id'\], but a batch holds label, true, x"
    ):
        jax.eval_shape(train.step, state, without, {})


def test_mentornet_says_which_labels_it_misses() -> None:
    train = build(mentornet())
    unlabelled = {name: x for name, x in labelled.rows(1, 16).items() if name != "label"}
    with pytest.raises(
        UserError, match=r"mentornet reads labels as batch\['label'\], but a batch holds id, true, x: give mentornet"
    ):
        jax.jit(train.step)(start(train), labelled.rows(0, BIG), unlabelled)


def test_wrong_labels() -> None:
    labels = jnp.asarray(np.random.default_rng(0).integers(0, CLASSES, 20_000), jnp.uint8)
    given, right = with_wrong_labels(jax.random.key(0), labels, CLASSES, 0.3)
    assert given.dtype == labels.dtype
    np.testing.assert_array_equal(given == labels, right == 1)
    assert np.mean(right) == pytest.approx(0.7, abs=0.01)
    wrong = np.bincount(np.asarray((given - labels) % CLASSES)[np.asarray(right) == 0], minlength=CLASSES)
    assert np.all(wrong[1:] / wrong.sum() == pytest.approx(1 / 3, abs=0.02))
    assert int(given.max()) == CLASSES - 1


@pytest.mark.parametrize("taught", [False, True])
def test_mentor_learns_to_leave_out_wrong_labels(taught: bool) -> None:
    """From clean rows, or from a fifth of the rows of which it is known, without seeing a label."""
    steps, data = 300, labelled.rows(1, 2000, flipped=0.4)
    clean = labelled.rows(2, 200)
    wrong = np.asarray(data["label"] != data["true"], np.int8)
    known = {"known": jnp.asarray(np.where(np.arange(2000) % 5 == 0, wrong, -1)), "num_classes": 1}
    train = build(mentornet(total_steps=steps, **(known if taught else {})), optax.adam(0.01))
    rng = np.random.default_rng(0)
    chosen = [np.stack([rng.permutation(n)[:BIG] for _ in range(steps)]) for n in (2000, 200)]
    data, clean = (jax.tree.map(jnp.asarray, arrays) for arrays in (data, clean))

    @jax.jit
    def run(state: Any) -> Any:
        def one(state: Any, indices: Any) -> Any:
            batch = labelled.take(data, indices[0])
            state, metrics = train.step(state, batch, labelled.take(clean, indices[1]))
            wrong = batch["label"] != batch["true"]
            mean = lambda mask: jnp.sum(metrics["weights"] * mask) / jnp.sum(mask) * BIG  # noqa: E731
            return state, (mean(wrong), mean(~wrong))

        return jax.lax.scan(one, state, tuple(chosen))

    _, (wrong, right) = run(start(train))
    assert np.all(np.asarray(wrong[:60]) == pytest.approx(1.0))  # burn-in
    assert np.mean(wrong[-60:]) < 0.2
    assert np.mean(right[-60:]) > 0.8


METHODS = {
    "spcl": bilevel.spcl(2.0), "region": bilevel.spcl(2.0, curriculum=lambda batch: 1.0 + batch["id"] % 3, bound=0.2),
    "mentornet": mentornet(burn_in=0.0), "known": mentornet(burn_in=0.0, known=jnp.arange(BIG) % 2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [("spcl", False), ("spcl", True), ("region", False), ("region", True), ("mentornet", True), ("known", True)],
)
def test_eight_devices(name: str, check_vma: bool) -> None:
    def make(**options: Any) -> bilevel.TrainStep:
        # The percentile of a device's few rows is not that of all, and labels are drawn by device.
        return build(METHODS[name], **options)

    batch, specific = labelled.rows(0, BIG), labelled.rows(9, 16)
    wanted = jax.jit(make().step)(start(make()), batch, specific)[0]
    train, rows, same = make(axis_name="data"), PartitionSpec("data"), PartitionSpec()
    step = jax.shard_map(
        lambda *a: train.step(*a)[0], mesh=sharding.make_mesh(), in_specs=(same, rows, rows), out_specs=same,
        check_vma=check_vma,
    )  # fmt: skip
    found = jax.jit(step)(start(train), batch, specific)
    check(found.params, wanted.params)
    if name in ("mentornet", "known"):
        assert np.isfinite(found.method_state.percentile)


def test_mistakes_are_explained() -> None:
    for options, message in (
        ({"num_classes": 1}, "num_classes=1"),
        ({"known": jnp.asarray([0, 2])}, r"known=….* it must be integers \[N\]"),
        ({"known": jnp.asarray([0.0, 1.0])}, "the type float32; it must be integers"),
        ({"known": jnp.asarray([-1, -1])}, "knows of no row"),
        ({"known": jnp.asarray([0, 1]), "num_classes": 0}, "num_classes=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"burn_in": 1.5}, "burn_in=1.5"),
        ({"percentile": -1.0}, "percentile=-1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"wrong_share": 0.0}, "wrong_share=0.0"),
    ):
        with pytest.raises(UserError, match=message):
            mentornet(**options)
    with pytest.raises(UserError, match="pace=0"):
        bilevel.spcl(0)
    wanted: Any
    for wanted, message in (
        ({"bound": 0.5}, "go together"),
        ({"curriculum": lambda batch: batch["id"]}, "go together"),
        ({"curriculum": lambda batch: batch["id"], "bound": 0.0}, "bound=0.0"),
    ):
        with pytest.raises(UserError, match=message):
            bilevel.spcl(1.0, **wanted)
    one = build(bilevel.spcl(1.0, curriculum=lambda batch: jnp.ones(()), bound=0.5))
    with pytest.raises(UserError, match=r"of shape \(\) for 32 rows"):
        jax.eval_shape(one.step, start(one), labelled.rows(0, BIG), {})
    with pytest.raises(UserError, match='mode="sparse" does not fit'):
        bilevel.make_step(classifier(NET), None, optax.sgd(0.1), None, bilevel.spcl(1.0), batch_size=4)
