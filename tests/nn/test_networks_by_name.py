"""Networks by name, as --model.network takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nn.networks import NAMES, network_of
from bilevel.types import UserError


def test_vgg16_without_batch_norm() -> None:
    plain, usual = (network_of(name, 10, (32, 32, 3)) for name in ("vgg16-plain", "vgg16"))
    trees = [jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))) for net in (plain, usual)]
    assert ["batch_stats" in tree for tree in trees] == [False, True]


@pytest.mark.parametrize("name", [*NAMES, "wrn28-2"])
def test_networks_by_name(name: str) -> None:
    network, key = network_of(name, 10, (32, 32, 3)), jax.random.key(0)
    shape = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda x: network.init({"params": key, "dropout": key}, x), shape)
    assert "head" in variables["params"], "the weighting network's last layer begins at 0"


def test_mlp_small_has_an_eighth_of_the_units() -> None:
    for name, units in (("mlp", 20), ("mlp-small", 3)):
        params = jax.eval_shape(network_of(name, 2, (5,), width=20).init, jax.random.key(0), jnp.zeros((1, 5)))[
            "params"
        ]
        assert params["hidden_0"]["bias"].shape == (units,)


def test_an_unknown_network() -> None:
    with pytest.raises(UserError, match='There is no network "resnet19": choose from mlp'):
        network_of("resnet19", 10, (32, 32, 3))
