"""Measure how long evaluating text takes, by how many rows are evaluated at once.

    python -m benchmarks.evaluation_speed --size xs --length 64 --rows 2048 --at-once 16 32 64 128 256

Random bytes and parameters; the least of three evaluations each, taken in turns.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import ArrayDataset
from bilevel.nn.transformer import SIZES, Transformer, language_model_loss
from bilevel.training.evaluation import mean_evaluator

_REPEATS = 3


def main() -> None:
    """Print a line for each number of rows: seconds, and processor seconds of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="xs", choices=SIZES)
    parser.add_argument("--length", type=int, default=64, help="bytes of a row")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--at-once", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (args.rows, args.length)).astype(np.uint8)
    rows = ArrayDataset({"tokens": tokens, "length": np.full(args.rows, args.length, np.int32)}, name="bytes")
    model = Transformer(SIZES[args.size])
    params = model.init(jax.random.key(0), jnp.zeros((1, args.length), jnp.int32))["params"]
    ways = {count: mean_evaluator(language_model_loss(model), count, per="length") for count in args.at_once}
    seconds: dict[int, list[tuple[float, float]]] = {count: [] for count in ways}
    for repeat in range(_REPEATS + 1):
        for count, evaluate in ways.items():
            start = time.perf_counter(), time.process_time()
            evaluate(params, {}, rows, None)
            if repeat:  # the first one compiles
                seconds[count].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for count, found in seconds.items():
        wall, processor = (min(column) for column in zip(*found, strict=True))
        print(f"{count} rows at once: {wall:.2f} s, {processor:.2f} processor seconds")


if __name__ == "__main__":
    main()
