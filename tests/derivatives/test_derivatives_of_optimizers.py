"""Optimizers that fit no step, and those that a method which looks ahead learns nothing through."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import toy

import bilevel
from bilevel.types import UserError

NEEDY: dict[str, Any] = {
    "value": optax.contrib.momo(0.1),
    "value and grad": optax.lbfgs(),
    "in a chain": optax.chain(optax.scale(0.5), optax.polyak_sgd()),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
}
OF_SIGNS = {"lion": optax.lion(0.1), "sign_sgd": optax.sign_sgd(0.1), "rprop": optax.rprop(0.1)}
GATHERING: dict[str, Any] = {
    "MultiSteps": lambda k: optax.MultiSteps(optax.adam(0.1), k),
    "apply_every": lambda k: optax.chain(optax.apply_every(k), optax.sgd(0.1)),
}


def start(optimizer: Any, method: Any = None, params: Any = None, **options: Any) -> Any:
    method = bilevel.dds() if method is None else method
    given = {"weight_optimizer": optax.sgd(0.1), "batch_size": 4} | options
    rate = given.pop("weight_optimizer")
    train = bilevel.make_step(toy.loss, toy.weighting, optimizer, rate, method, **given)
    return jax.eval_shape(train.init, jax.random.key(0), params or toy.params(1), toy.weight_params(2))


@pytest.mark.parametrize("name", NEEDY)
def test_updates_that_need_more_than_a_gradient(name: str) -> None:
    with pytest.raises(UserError, match=r"The optimizer of θ cannot make an update .*'value'.*choose an optimizer"):
        start(NEEDY[name])
    with pytest.raises(UserError, match="weight_optimizer cannot make an update"):
        start(optax.sgd(0.1), weight_optimizer=NEEDY[name])
    for method, which in ((bilevel.soba, "soba's"), (bilevel.penalty, "penalty's")):
        with pytest.raises(UserError, match=f"{which} optimizer cannot make an update"):
            start(optax.sgd(0.1), method(NEEDY[name]))


@pytest.mark.parametrize(
    ("leaf", "kind"), [(jnp.zeros((), jnp.int32), "int32"), (jax.random.key(0), "key"), (3, "int"), (True, "bool")]
)
def test_parameters_without_a_gradient(leaf: Any, kind: str) -> None:
    with pytest.raises(UserError, match=rf"params: the leaf 'first/count' is {kind}.*keep counters and"):
        start(optax.sgd(0.1), params={"first": {"count": leaf}, "last": jnp.zeros(3)})


def test_what_the_weighting_network_does_not_learn_may_be_whole_numbers() -> None:
    alpha = {**toy.weight_params(2), "count": jnp.zeros((), jnp.int32)}
    for method in (bilevel.frozen(), bilevel.dds()):
        train = bilevel.make_step(toy.loss, toy.weighting, optax.sgd(0.1), optax.sgd(0.1), method, batch_size=4)
        if method.update is None:
            train.init(jax.random.key(0), toy.params(1), alpha)
            continue
        with pytest.raises(UserError, match="weight_params: the leaf 'count' is int32"):
            train.init(jax.random.key(0), toy.params(1), alpha)


@pytest.mark.parametrize("name", OF_SIGNS)
def test_the_derivative_of_a_sign_is_said_to_be_zero(name: str) -> None:
    for method in (bilevel.dds(), bilevel.anograd(through_optimizer=True)):
        with pytest.warns(
            UserWarning, match=r"The derivative of θ's optimizer is 0 everywhere .*it will learn nothing"
        ):
            start(OF_SIGNS[name], method)
    start(OF_SIGNS[name], bilevel.anograd())  # warnings are errors
    start(OF_SIGNS[name], bilevel.soba(optax.sgd(0.1)))


@pytest.mark.parametrize("name", GATHERING)
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_gathering_optimizers_that_never_move_on_an_alpha_step(name: str, every: int) -> None:
    """θ moves on steps 3, 7, …; α on 0, k, 2k, …: they meet if k and 4 have no common divisor."""
    if every % 2:
        start(GATHERING[name](4), update_every=every)
        return
    with pytest.warns(UserWarning, match=rf"gathers gradients, and on every step .*\(update_every={every}\)"):
        start(GATHERING[name](4), update_every=every)


def test_a_method_that_works_on_each_step_needs_a_derivative_on_each() -> None:
    options: dict[str, Any] = {"mode": "dense", "weight_optimizer": None}
    with pytest.warns(UserWarning, match="gathers gradients, and on some steps it leaves θ where it is"):
        start(GATHERING["MultiSteps"](2), bilevel.learning_to_reweight(), **options)
    start(GATHERING["MultiSteps"](1), bilevel.learning_to_reweight(), **options)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.radam(0.1)),
        optax.adafactor(0.1),
        optax.set_to_zero(),
        optax.contrib.muon(0.1),
        optax.contrib.schedule_free_adamw(0.1),
    ],
)
def test_others_are_not_warned_of(optimizer: Any) -> None:
    start(optimizer)
