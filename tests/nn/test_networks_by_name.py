"""Networks by name, as --model.network takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nn.networks import NAMES, last_blocks, network_of
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


LAST_TWO = {
    "mlp": {"hidden_1", "hidden_2"},
    "cnn-small": {"hidden_0", "hidden_1"},
    "resnet20": {"stage_2_block_1", "stage_2_block_2"},
    "wrn28-2": {"stage_2_block_2", "stage_2_block_3"},
    "vgg16": {"hidden_0", "hidden_1"},
}
BLOCKS = {"mlp": 3, "cnn-small": 5, "resnet20": 9, "wrn28-2": 12, "vgg16": 15}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_blocks(name: str) -> None:
    """With what lies behind them; all blocks are all but the stem."""
    network = network_of(name, 10, (32, 32, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]

    def chosen(count: int) -> set[str]:
        meant, paths = last_blocks(count, params), jax.tree_util.tree_leaves_with_path(params)
        return {
            n.partition("/")[0]
            for path, _ in paths
            if meant(n := jax.tree_util.keystr(path, simple=True, separator="/"))
        }

    assert chosen(2) - {"head", "final_norm"} == LAST_TWO[name]
    assert "head" in chosen(1)
    assert params.keys() - chosen(BLOCKS[name]) == {x for x in params if x.startswith("stem")}
    for count in (0, BLOCKS[name] + 1):
        with pytest.raises(UserError, match=f"the last {count} blocks of a network that has {BLOCKS[name]}: give 1 to"):
            last_blocks(count, params)


def test_a_convolution_and_its_norm_are_one_block() -> None:
    params = dict.fromkeys(("conv_3_2", "norm_3_2", "conv_4_0", "norm_4_0", "hidden_0", "head"))
    meant = last_blocks(2, params)
    assert [name for name in params if meant(f"{name}/kernel")] == ["conv_4_0", "norm_4_0", "hidden_0", "head"]


def test_mlp_small_has_an_eighth_of_the_units() -> None:
    for name, units in (("mlp", 20), ("mlp-small", 3)):
        params = jax.eval_shape(network_of(name, 2, (5,), width=20).init, jax.random.key(0), jnp.zeros((1, 5)))[
            "params"
        ]
        assert params["hidden_0"]["bias"].shape == (units,)


def test_an_unknown_network() -> None:
    with pytest.raises(UserError, match='There is no network "resnet19": choose from mlp'):
        network_of("resnet19", 10, (32, 32, 3))
