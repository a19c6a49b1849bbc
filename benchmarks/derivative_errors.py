"""How far alignments and Hessian products are from exact ones, by precision of the computation and way of differentiating.

    python -m benchmarks.derivative_errors [--size small] [--json FILE]

A transformer is trained for some steps without weights; then, for several batches, the probe is the gradient of specific rows.
The reference is forward mode in float32 with products of full precision: on GPUs, float32 products round their inputs to
TF32 unless `jax_default_matmul_precision` says otherwise. Errors are relative, ‖found − exact‖ / ‖exact‖, and the correlation is
that of the alignments with the exact ones; each is the median over batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.step_cost import SHAPES, show
from bilevel import trees
from bilevel.data import Loader, open_source, pack
from bilevel.derivatives.linearization import Derivatives
from bilevel.derivatives.rows import RowLosses
from bilevel.nn.transformer import SIZES, Transformer, language_model_loss, last_blocks
from bilevel.types import Batch, Params


@dataclass(frozen=True)
class ErrorsConfig:
    """What to measure."""

    size: str = "small"
    """Size of the main model: xs, small, medium, large."""
    train_steps: int = 500
    """Steps before the measurement."""
    batches: int = 8
    """Batches that are measured."""
    scales: str = "1e-2,1e-3,1e-4"
    """Scales of `Finite`, comma-separated."""
    probe_blocks: str = "0,1"
    """How many of the last blocks are probed, comma-separated; 0: all parameters."""
    generic: str = "python:stdlib"
    """Text of the rows; anything that the experiment's --data.generic takes."""
    specific: str = "python:topics"
    """Text of the probe."""
    cache_dir: Path = Path("~/.cache/bilevel")
    """Where packed text is kept."""
    json: Path | None = None
    """Also write the rows of the table here, as a list of objects."""


class Precision(NamedTuple):
    """How the model computes."""

    name: str
    dtype: Any
    products: str


PRECISIONS = (
    Precision("float32, full products", jnp.float32, "highest"),
    Precision("float32, default products", jnp.float32, "default"),
    Precision("bfloat16", jnp.bfloat16, "default"),
)


class Found(NamedTuple):
    """What was measured in one batch."""

    alignments: np.ndarray
    product: np.ndarray


def trained(config: ErrorsConfig, model: Transformer, loader: Loader) -> Params:
    """The parameters after plain training."""
    loss, optimizer = language_model_loss(model), optax.adam(2e-3, b2=0.98)
    step = bilevel.make_step(
        loss, None, optimizer, optax.identity(), bilevel.uniform(), batch_size=loader.batch_size, mode="dense"
    )
    first = loader.batch(0)
    params = model.init(jax.random.key(0), jnp.asarray(first["tokens"][:1]))["params"]
    state = step.init(jax.random.key(1), params, {})
    plain = jax.jit(step.plain, donate_argnums=0)
    for i in range(config.train_steps):
        state, _ = plain(state, loader.batch(i), first)
    return state.params


def measure(
    model: Transformer, derivatives: Derivatives, blocks: int, params: Params, pairs: list[tuple[Batch, Batch]]
) -> list[Found]:
    """Alignments and Hessian products of the generic rows of each pair with the gradient of its specific rows."""
    loss = language_model_loss(model)
    subset = trees.make_subset(last_blocks(blocks, model.config), params)

    @jax.jit
    def one(params: Params, probe: Params, generic: Batch) -> tuple[Any, Params]:
        count = trees.num_rows(generic)
        rows = RowLosses(loss, {}, generic, jax.random.key(0))
        found = derivatives.second_order(rows, params, jnp.full(count, 1 / count), probe, subset, lambda tree: tree)
        return found.alignments, found.hessian_product

    probe, results = probe_of(model, subset), []
    for generic, specific in pairs:
        alignments, product = one(params, probe(params, specific), generic)
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(product))])
        results.append(Found(np.asarray(alignments, np.float64), flat.astype(np.float64)))
    return results


def probe_of(model: Transformer, subset: trees.Subset) -> Callable[[Params, Batch], Params]:
    """(θ, specific rows) -> ∇L_spec over the chosen part with full precision: the same probe for every line of the table."""
    loss = language_model_loss(Transformer(dataclasses.replace(model.config, attention="xla", dtype=jnp.float32)))

    @jax.jit
    def gradient(params: Params, batch: Batch) -> Params:
        with jax.default_matmul_precision("highest"):
            found = jax.grad(lambda theta: jnp.mean(loss(theta, {}, batch, jax.random.key(0))[0]))(params)
        return subset.restrict(found)

    return gradient


def main(config: ErrorsConfig) -> None:
    """Measures and prints the table."""
    shape = SHAPES[config.size]
    directory = config.cache_dir.expanduser()
    generic, specific = (
        Loader(pack(open_source(text), length=shape.length, cache_dir=directory), shape.rows, seed=0)
        for text in (config.generic, config.specific)
    )
    exact = Transformer(SIZES[config.size])
    params = trained(config, exact, generic)
    pairs = [(generic.batch(config.train_steps + i), specific.batch(i)) for i in range(config.batches)]
    scales = [float(scale) for scale in config.scales.split(",")]
    rows = []
    for blocks in (int(count) for count in config.probe_blocks.split(",")):
        with jax.default_matmul_precision("highest"):
            reference = measure(exact, bilevel.Forward(), blocks, params, pairs)
        for precision in PRECISIONS:
            config_of = dataclasses.replace(exact.config, dtype=precision.dtype)
            ways: list[tuple[str, Derivatives, Any]] = [
                ("forward", bilevel.Forward(), dataclasses.replace(config_of, attention="xla")),
                *((f"finite, {scale:g}", bilevel.Finite(scale), config_of) for scale in scales),
            ]
            for name, derivatives, transformer in ways:
                with jax.default_matmul_precision(precision.products):
                    found = measure(Transformer(transformer), derivatives, blocks, params, pairs)
                rows.append({"precision": precision.name, "blocks": blocks, "way": name, **errors(found, reference)})
    show(rows, COLUMNS, config.json)


def errors(found: list[Found], reference: list[Found]) -> dict[str, float]:
    """Medians over batches."""

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    pairs = list(zip(found, reference, strict=True))
    return {
        "alignments": float(np.median([relative(x.alignments, y.alignments) for x, y in pairs])),
        "correlation": float(np.median([np.corrcoef(x.alignments, y.alignments)[0, 1] for x, y in pairs])),
        "product": float(np.median([relative(x.product, y.product) for x, y in pairs])),
    }


COLUMNS = {
    "precision": "computation", "blocks": "blocks", "way": "derivatives", "alignments": "error of a",
    "correlation": "correlation of a", "product": "error of H p",
}  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(ErrorsConfig))
