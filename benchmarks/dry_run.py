"""Does it fit? Compiles a step of a model of a billion parameters for many devices, without running it or storing anything.

    python -m benchmarks.dry_run [--devices 64] [--methods plain,dds,soba] [--json FILE]

The devices are virtual ones on this machine's CPU, so the bytes are those of XLA's CPU compiler; the state is spread over all of
them (`bilevel.sharding.split_state`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class DryRunConfig:
    """What to compile."""

    devices: int = 64
    """Virtual devices."""
    layers: int = 16
    """Layers of the transformer."""
    width: int = 2304
    """Its width; the feed-forward network is four times as wide."""
    heads: int = 18
    """Its heads."""
    length: int = 1024
    """Bytes in a row."""
    batch_size: int = 64
    """b."""
    big_batch_size: int = 1024
    """B."""
    micro_batches: int = 1
    """Parts in which the batch is evaluated."""
    methods: str = "plain,dds,soba,soba bfloat16"
    """plain, dds, soba and soba with v in bfloat16."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


def compile_step(c: DryRunConfig, name: str) -> dict[str, Any]:
    """Bytes of one device for a step of the method, with α-work."""
    import jax
    import jax.numpy as jnp
    import optax

    import bilevel
    from bilevel.devices import sharding
    from bilevel.nn.transformer import Transformer, TransformerConfig, gathered_before, language_model_loss
    from bilevel.nn.weighting import NGramWeighting, logit_fn

    shape = TransformerConfig(c.layers, c.width, c.heads, 4 * c.width, dtype=jnp.bfloat16, remat=True, scan_layers=True)
    mesh = sharding.make_mesh(jax.devices()[: c.devices])
    model, weighting = Transformer(shape, mesh), NGramWeighting()
    adam = optax.adam(1e-3)
    methods = {
        "plain": bilevel.frozen,
        "dds": bilevel.dds,
        "soba": lambda: bilevel.soba(adam),
        "soba bfloat16": lambda: bilevel.soba(adam, dtype=jnp.bfloat16),
    }
    train = bilevel.make_step(
        language_model_loss(model), logit_fn(weighting), adam, adam, methods[name](), batch_size=c.batch_size,
        estimator="score", micro_batches=c.micro_batches, mesh=mesh, gather=gathered_before,
    )  # fmt: skip

    def init() -> bilevel.TrainState:
        tokens, length = jnp.zeros((1, c.length), jnp.uint8), jnp.full((1,), c.length)
        params: Any = model.init(jax.random.key(0), tokens)["params"]
        return train.init(jax.random.key(1), params, weighting.init(jax.random.key(2), tokens, length)["params"])

    def batch(rows: int) -> Any:
        at = sharding.row_sharding(mesh)
        tokens = jax.ShapeDtypeStruct((rows, c.length), jnp.uint8, sharding=at)
        return {"tokens": tokens, "length": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=at)}

    shapes = jax.eval_shape(init)
    where = sharding.split_state(mesh, shapes)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
    step = train.map(sharding.keep_sharding(where)).learn
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch(c.big_batch_size), batch(c.batch_size)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
        "devices": c.devices,
        "method": name,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
        "donated_bytes": int(memory.alias_size_in_bytes),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "compile_seconds": time.perf_counter() - began,
    }


def main(config: DryRunConfig) -> None:
    """Compiles the steps and prints the table: MiB a device."""
    flags = f"--xla_force_host_platform_device_count={config.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # before jax starts its backend
    columns = ("argument_bytes", "output_bytes", "donated_bytes", "temp_bytes")
    print(
        "| parameters | method | arguments | results | donated | temporary | seconds to compile |\n"
        + "| --- " * 7
        + "|"
    )
    rows = []
    for name in config.methods.split(","):
        rows.append(row := compile_step(config, name.strip()))
        cells = (f"{row[x] / 2**20:,.0f}" for x in columns)
        print(
            f"| {row['parameters']:,} | {name} | " + " | ".join(cells) + f" | {row['compile_seconds']:.0f} |",
            flush=True,
        )
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(DryRunConfig))
