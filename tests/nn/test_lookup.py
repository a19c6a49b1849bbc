"""Pooled look-ups equal the plain networks, in value and in derivative."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nn import lookup
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn, masked_mean, ngram_hashes

pytestmark = pytest.mark.slow  # half a minute and more, nearly all of it compiling

LENGTH, WIDTH = 24, 8


def batch() -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(0, 256, (5, LENGTH)).astype(np.uint8)
    return {"tokens": jnp.asarray(tokens), "length": jnp.asarray([LENGTH, 9, 3, 2, 1], jnp.int32)}


@functools.cache
def random_params(module: Any) -> Any:
    rows, rng = batch(), np.random.default_rng(1)
    params = jax.jit(module.init)(jax.random.key(0), rows["tokens"], rows["length"])["params"]
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


def plain_conv(params: Any, rows: Any, layers: int) -> Any:
    """Embedding, convolutions, mean, logit: written with flax's own layers."""
    x = params["embedding"][rows["tokens"].astype(jnp.int32)]
    real = (jnp.arange(LENGTH) < rows["length"][:, None])[..., None]
    for i in range(layers):
        conv: Any = nn.Conv(WIDTH, (7,)).apply({"params": params[f"conv_{i}"]}, jnp.where(real, x, 0))
        x = nn.relu(conv)
    return (masked_mean(x, rows["length"]) @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]


def plain_ngrams(params: Any, rows: Any, buckets: int) -> Any:
    pooled = []
    for i, order in enumerate((1, 2, 3, 4)):
        inside = LENGTH - order + 1
        found = params["tables"][ngram_hashes(rows["tokens"], order, buckets)[:, :inside] + i * buckets]
        pooled.append(masked_mean(found, jnp.clip(rows["length"] - order + 1, 0, inside)))
    x = jnp.concatenate(pooled, -1) * 8.0
    x = nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return (x @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]


CASES: dict[str, tuple[Any, Any]] = {
    "one convolution": (ConvWeighting(layers=1, width=WIDTH), lambda p, b: plain_conv(p, b, 1)),
    "two convolutions": (ConvWeighting(layers=2, width=WIDTH), lambda p, b: plain_conv(p, b, 2)),
    "one convolution of tokens": (
        ConvWeighting(layers=1, width=WIDTH, vocabulary=5000),
        lambda p, b: plain_conv(p, b, 1),
    ),
    "two convolutions of tokens": (
        ConvWeighting(layers=2, width=WIDTH, vocabulary=5000),
        lambda p, b: plain_conv(p, b, 2),
    ),
    "n-grams": (NGramWeighting(width=WIDTH, buckets=300, hidden=WIDTH), lambda p, b: plain_ngrams(p, b, 300)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_network(case: str) -> None:
    module, plain = CASES[case]
    params, rows = random_params(module), batch()
    cotangent = jnp.asarray([1.0, -2.0, 0.5, 3.0, -1.0])

    def of(function: Any) -> Any:
        """The logits, and their gradient against the cotangent."""
        logits, pulled_back = jax.vjp(lambda p: function(p, rows), params)
        return logits, pulled_back(cotangent)[0]

    (logits, found), (plain_logits, wanted) = jax.jit(lambda: (of(logit_fn(module)), of(plain)))()
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)) > 0.1


def test_scoring_stores_nothing_for_each_position() -> None:
    module = NGramWeighting()
    rows = {"tokens": jnp.zeros((512, 128), jnp.uint8), "length": jnp.full((512,), 128, jnp.int32)}
    params = jax.eval_shape(module.init, jax.random.key(0), rows["tokens"][:1], rows["length"][:1])["params"]
    compiled = jax.jit(logit_fn(module)).lower(params, rows).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 512 * 128 * 32 * 4 / 2, memory


def test_bag_sums_weighted_rows() -> None:
    table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    rows, weights = np.asarray([[1, 2, 2], [9, 0, 5]]), np.asarray([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]], np.float32)
    wanted = [table[1] + 0.5 * table[2], 2 * table[9] + table[0] + table[5]]
    np.testing.assert_allclose(
        lookup.bag(jnp.asarray(table), jnp.asarray(rows), jnp.asarray(weights)), wanted, rtol=1e-6
    )


@pytest.mark.parametrize(("platform", "loops"), [("cpu", True), ("cuda", False), ("tpu", False)])
@pytest.mark.parametrize("case", ["one convolution", "n-grams"])
def test_only_on_cpu_scoring_is_a_loop(case: str, platform: str, loops: bool) -> None:
    """On a GPU each iteration would launch kernels of its own, some hundreds of times a step."""
    module, _ = CASES[case]
    lowered = jax.export.export(jax.jit(logit_fn(module)), platforms=[platform])(random_params(module), batch())
    assert ("while" in lowered.mlir_module()) == loops


def test_both_forms_are_equal() -> None:
    rng = np.random.default_rng(0)
    tables, bias = rng.normal(size=(7, 257, WIDTH)).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)
    tables[:, 256] = 0
    arguments = (jnp.asarray(tables), jnp.asarray(bias), batch()["tokens"], batch()["length"])
    np.testing.assert_allclose(
        lookup.pooled_token_conv(*arguments), lookup._pooled_stored(*arguments), rtol=1e-5, atol=1e-5
    )
    bag = (
        jnp.asarray(tables[0]),
        batch()["tokens"].astype(jnp.int32),
        jnp.asarray(rng.random((5, LENGTH)), jnp.float32),
    )
    np.testing.assert_allclose(lookup.bag(*bag), lookup._bag_stored(*bag), rtol=1e-5, atol=1e-5)
