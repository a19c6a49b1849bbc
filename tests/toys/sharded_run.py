"""Five steps of SOBA; as a script, one of several processes. Prints the parameters' sums as hexadecimal floats."""

import sys
from typing import Any

import jax
import numpy as np
import optax
import toy

import bilevel
from bilevel.devices import sharding

BIG, SMALL, SPECIFIC, STEPS = 64, 16, 8, 5


def build(axis_name: str | None = None, **options: Any) -> bilevel.TrainStep:
    return bilevel.make_step(
        toy.loss,
        toy.weighting,
        options.pop("optimizer", optax.adam(0.01)),
        optax.adam(0.01),
        options.pop("method", bilevel.soba(optax.sgd(0.05))),
        batch_size=SMALL,
        update_every=2,
        derivatives=options.pop("derivatives", bilevel.Forward()),
        axis_name=axis_name,
        **options,
    )


def start(train: bilevel.TrainStep) -> bilevel.TrainState:
    return train.init(jax.random.key(0), toy.params(1), toy.weight_params(2))


def batches(step: int) -> tuple[Any, Any]:
    return toy.arrays(step, BIG), toy.arrays(100 + step, SPECIFIC)


def on_mesh(mesh: Any, **options: Any) -> bilevel.TrainState:
    """The run with its rows spread over `mesh`; every process loads its own slice."""
    train = build(**options)
    state = jax.jit(lambda: start(train), out_shardings=sharding.replicated(mesh))()
    step = jax.jit(train.step, donate_argnums=0)
    for i in range(STEPS):
        share = [jax.tree.map(mine, batch) for batch in batches(i)]
        state, _ = step(state, *(sharding.place_batch(mesh, batch) for batch in share))
    return state


def mine(x: Any) -> np.ndarray:
    size = x.shape[0] // jax.process_count()
    return np.asarray(x)[jax.process_index() * size : (jax.process_index() + 1) * size]


if __name__ == "__main__":
    port, count, index = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    sharding.start_processes(f"127.0.0.1:{port}", int(count), int(index))
    final = on_mesh(sharding.make_mesh())
    local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), (final.params, final.weight_params))
    print("RESULT", *(float(x).hex() for x in toy.flat(local)))
