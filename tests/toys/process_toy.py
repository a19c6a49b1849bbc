"""One of two processes that train the toy model together: `process_toy.py INDEX PORT RUN_DIR`."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from training_toy import BIG, ToyLoader, toy_state, toy_step

from bilevel.training import Data, LoopConfig, train

CONFIG = LoopConfig(num_steps=30, log_every=5, evaluate_every=10, checkpoint_every=10, progress=False)


class HalfLoader:
    """The rows of one of two processes."""

    def __init__(self, whole: ToyLoader, index: int):
        self._whole, self._rows = whole, slice(index * BIG // 2, (index + 1) * BIG // 2)

    def batch(self, step: int, /) -> dict[str, np.ndarray]:
        return {name: value[self._rows] for name, value in self._whole.batch(step).items()}


def main(index: int, port: str, run_dir: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    # An array that is split over both processes goes through the checkpoint as well.
    shardings = jax.tree.map(lambda _: replicated, toy_state())._replace(ema=rows)

    def init() -> Any:
        return toy_state()._replace(ema=jax.numpy.zeros(4))

    def step(state: Any, big: Any, specific: Any) -> Any:
        new, metrics = toy_step(state, big, specific)
        return new._replace(ema=state.ema + jax.numpy.arange(4)), metrics

    def place(batch: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    data = Data(HalfLoader(ToyLoader(1), index), HalfLoader(ToyLoader(2), index), place, place)
    stepper = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def start(interrupt: bool) -> Any:
        def evaluate(state: Any) -> dict[str, float]:
            if interrupt and index == 1:
                signal.raise_signal(signal.SIGTERM)  # one process is asked to stop, both must
            return {"specific_valid_loss": float(state.params["b"])}

        state = jax.jit(init, out_shardings=shardings)()
        return train(
            stepper, state, data=data, config=CONFIG, run_dir=run_dir, evaluate=evaluate,
            on_selected=lambda ids, step: {"id": float(ids.mean())},
        )  # fmt: skip

    stopped = start(interrupt=True)
    print("first", stopped.stopped_early, int(stopped.state.step), flush=True)
    if index == 0:
        shutil.rmtree(run_dir / "checkpoints" / "15" / "state" / "d")
    multihost_utils.sync_global_devices("damaged")
    result = start(interrupt=False)
    print("second", result.stopped_early, int(result.state.step), len(result.history), flush=True)
    np.testing.assert_array_equal(result.state.ema.addressable_data(0), 30 * np.arange(4)[2 * index :][:2])
    if index == 0:
        np.savez(run_dir / "final.npz", **result.state.params)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
