"""The temperature of the logits along a mapped axis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import PartitionSpec

import bilevel
from bilevel.devices import sharding
from bilevel.selection import filters
from bilevel.types import Array


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("check_vma", [False, True])
def test_one_temperature_over_a_mapped_axis(scope: Any, check_vma: bool) -> None:
    """The floor under the effective sample size is met on every device, by one temperature."""
    rule = filters.gumbel_top_k(scope=scope, min_effective_fraction=0.8)
    train = bilevel.make_step(
        toy.loss,
        toy.weighting,
        optax.sgd(0.1),
        optax.sgd(0.1),
        bilevel.dds(),
        batch_size=4,
        filter=rule,
        axis_name="data",
    )
    state, big = train.init(jax.random.key(0), toy.params(1), toy.weight_params(2)), toy.arrays(0, 12)
    rows, same = PartitionSpec("data"), PartitionSpec()

    def temperature(*arguments: Any) -> Array:
        return train.step(*arguments)[1]["temperature"][None]

    specs: dict[str, Any] = {"in_specs": (same, rows, rows), "out_specs": rows, "check_vma": check_vma}
    mapped = jax.shard_map(temperature, mesh=sharding.make_mesh(jax.devices()[:2]), **specs)
    found = np.asarray(jax.jit(mapped)(state, big, toy.arrays(1, 4)))
    assert found[0] == found[1] > 1
    logits = toy.weighting(state.weight_params, big)
    for part in [logits] if scope == "global" else jnp.split(logits, 2):
        assert filters.effective_sample_size(part / found[0]) >= 0.8 * len(part) * 0.999
