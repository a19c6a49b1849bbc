"""What devices along a mapped axis do together, and one device alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bilevel.devices.axis import ALONE, Axis
from bilevel.devices.sharding import make_mesh

DEVICES, ROWS = 4, 8
X = np.random.default_rng(0).normal(size=(DEVICES, ROWS)).astype(np.float32)


def everything(axis: Axis, x: Any) -> dict[str, Any]:
    """Of one device with the row `x` of `X`; each entry has the devices as its leading axis."""
    key, count = jax.random.key(3), x[0, :1].astype(jnp.int32)
    found = {
        "sum": axis.sum(x[0]),
        "mean": axis.mean(x[0]),
        "counter": axis.mean(count),
        "key": jax.random.key_data(axis.mean(axis.fold(key))),
        "folded": jax.random.key_data(axis.fold(key)),
        "max": axis.max(x[0]),
        "gather": axis.gather(x[0]),
        "scatter": axis.scatter(x[0]),
        "index": jnp.asarray(axis.index),
        "size": jnp.asarray(axis.size),
    }
    return {name: value[None] for name, value in found.items()}


def test_several_devices() -> None:
    rows, axis = PartitionSpec("data"), Axis("data")
    mapped = jax.shard_map(
        lambda x: everything(axis, x), mesh=make_mesh(jax.devices()[:DEVICES]), in_specs=rows, out_specs=rows,
        check_vma=False,
    )  # fmt: skip
    found = {name: np.asarray(value) for name, value in jax.jit(mapped)(10 * X).items()}
    keys = [jax.random.key_data(jax.random.fold_in(jax.random.key(3), i)) for i in range(DEVICES)]
    for device in range(DEVICES):
        np.testing.assert_allclose(found["sum"][device], 10 * X.sum(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["mean"][device], 10 * X.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["counter"][device], (10 * X[0, :1]).astype(np.int32))
        np.testing.assert_array_equal(found["key"][device], keys[0])
        np.testing.assert_array_equal(found["folded"][device], keys[device])
        np.testing.assert_array_equal(found["max"][device], (10 * X).max(0))
        np.testing.assert_array_equal(found["gather"][device], (10 * X).reshape(-1))
        np.testing.assert_allclose(
            found["scatter"][device], 10 * X.sum(0).reshape(DEVICES, -1)[device], rtol=1e-4, atol=1e-5
        )
    assert found["index"].tolist() == [*range(DEVICES)]
    assert found["size"].tolist() == [DEVICES] * DEVICES


def test_one_device_alone() -> None:
    assert Axis(None) == ALONE
    found = everything(ALONE, jnp.asarray(X[:1]))
    for name in ("sum", "mean", "max", "gather", "scatter"):
        np.testing.assert_array_equal(found[name], X[:1], err_msg=name)
    for name in ("key", "folded"):
        np.testing.assert_array_equal(found[name][0], jax.random.key_data(jax.random.key(3)), err_msg=name)
    assert (int(found["index"][0]), int(found["size"][0])) == (0, 1)
