"""The language model and the weighting networks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.nn.transformer import SIZES, Transformer, TransformerConfig, embedded, language_model_loss, token_losses
from bilevel.nn.weighting import ConvWeighting, NGramWeighting, logit_fn, ngram_hashes
from bilevel.types import UserError

LENGTH = 24
TINY = TransformerConfig(layers=2, width=16, heads=2, feed_forward=32)


def batch(rows: int = 3) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(1, 256, (rows, LENGTH)).astype(np.uint8)
    return {"tokens": jnp.asarray(tokens), "length": jnp.full(rows, LENGTH, jnp.int32)}


def first_params(model: Transformer) -> Any:
    return model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.uint8))["params"]


def init(model: Transformer) -> Any:
    return jax.jit(lambda: first_params(model))()


@pytest.mark.parametrize(("size", "count"), [("small", 824_064), ("large", 9_530_880)])
def test_sizes_are_the_papers(size: str, count: int) -> None:
    """Grangier et al., table 9."""
    shapes = jax.eval_shape(lambda: first_params(Transformer(SIZES[size])))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_a_byte_changes_only_what_follows_it() -> None:
    model = Transformer(TINY)
    params, tokens = init(model), batch()["tokens"]
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    before, after = np.asarray(logits(tokens)), np.asarray(logits(tokens.at[:, 10].set(7)))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert np.abs(before[:, 11:] - after[:, 11:]).max() > 1e-3


def test_padding_does_not_count() -> None:
    model, rows = Transformer(TINY), batch()
    rows["length"] = jnp.asarray([5, 24, 1])
    loss = jax.jit(language_model_loss(model))
    params = init(model)
    changed = rows | {"tokens": rows["tokens"].at[0, 5:].set(0).at[2, 1:].set(99)}
    first, second = (loss(params, {}, b, jax.random.key(0))[0] for b in (rows, changed))
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_losses_are_mean_negative_log_likelihoods() -> None:
    rows = batch(2)
    logits = jax.random.normal(jax.random.key(1), (2, LENGTH, 256))
    mean, total = jax.jit(token_losses)(logits, rows["tokens"], jnp.asarray([LENGTH, 4]))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nats = -np.take_along_axis(log_p, np.asarray(rows["tokens"], np.int64)[..., None], 2)[..., 0]
    np.testing.assert_allclose(mean, [nats[0].mean(), nats[1, :4].mean()], rtol=1e-5)
    np.testing.assert_allclose(total, [nats[0].sum(), nats[1, :4].sum()], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"remat": True}])
def test_options_keep_the_function(options: dict[str, Any]) -> None:
    rows, reference = batch(), Transformer(TINY)
    model = Transformer(TransformerConfig(layers=2, width=16, heads=2, feed_forward=32, **options))
    params = init(model)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))

    def mean(m: Transformer) -> Any:
        loss = language_model_loss(m)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, {}, rows, jax.random.key(0))[0].mean()))(params)

    (value, gradient), (wanted, exact) = mean(model), mean(reference)
    assert value.dtype == jnp.float32
    bound = 2e-2 if "dtype" in options else 1e-6
    assert value == pytest.approx(float(wanted), rel=bound)
    difference = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-6), gradient, exact)
    assert max(map(float, jax.tree.leaves(difference))) < 10 * bound


@pytest.mark.slow
@pytest.mark.parametrize("derivatives", [bilevel.Forward(), bilevel.Finite()])
def test_remat_gives_the_same_step_with_less_memory(derivatives: Any) -> None:
    tokens = np.random.default_rng(0).integers(1, 256, (16, 128)).astype(np.uint8)
    rows = {"tokens": jnp.asarray(tokens), "length": jnp.full(16, 128, jnp.int32)}
    found = []
    for remat in (False, True):
        model = Transformer(
            TransformerConfig(layers=6, width=32, heads=4, feed_forward=128, remat=remat, scan_layers=True)
        )
        train = bilevel.make_step(
            language_model_loss(model), lambda wp, b: b["tokens"].astype(jnp.float32) @ wp, optax.sgd(0.1), optax.sgd(1.0),
            bilevel.soba(optax.sgd(0.1)), batch_size=16, derivatives=derivatives,
        )  # fmt: skip
        params: Any = jax.jit(model.init)(jax.random.key(0), rows["tokens"][:1])["params"]
        state = train.init(jax.random.key(1), params, jnp.zeros(128))
        state = dataclasses.replace(state, method_state=state.method_state._replace(v=params))
        compiled = jax.jit(train.learn).lower(state, rows, rows).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        found.append((compiled(state, rows, rows)[0], memory.temp_size_in_bytes))
    (kept, most), (again, least) = found
    assert least < 0.7 * most, (least, most)
    for a, b in zip(jax.tree.leaves(kept.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    bound = 1e-4 if isinstance(derivatives, bilevel.Forward) else 2e-2
    difference = jnp.linalg.norm(kept.weight_params - again.weight_params)
    assert difference < bound * jnp.linalg.norm(kept.weight_params)


def test_scanned_layers_are_the_same_function() -> None:
    rows = batch()
    model = Transformer(TINY)
    scanned = Transformer(dataclasses.replace(TINY, scan_layers=True))
    params = init(model)
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), params["block_0"], params["block_1"])
    assert jax.tree.structure(jax.eval_shape(lambda: first_params(scanned))) == jax.tree.structure(
        rest | {"blocks": stacked}
    )
    found: Any = jax.jit(scanned.apply)({"params": rest | {"blocks": stacked}}, rows["tokens"])
    wanted: Any = jax.jit(model.apply)({"params": params}, rows["tokens"])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(UserError, match="width 30 must be even and a multiple of its 4 heads"):
        TransformerConfig(width=30)


@pytest.mark.parametrize("module", [ConvWeighting(layers=2, width=8), NGramWeighting(width=8, buckets=64)])
def test_weighting_networks(module: Any) -> None:
    rows = batch()
    params = jax.jit(module.init)(jax.random.key(0), rows["tokens"], rows["length"])["params"]
    logits = jax.jit(logit_fn(module))
    np.testing.assert_array_equal(logits(params, rows), 0)  # training starts from uniform weights
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32), params)
    short = rows | {"length": jnp.asarray([10, 3, 1])}
    padded = short | {"tokens": jnp.where(jnp.arange(LENGTH) < short["length"][:, None], rows["tokens"], 0)}
    first, second = logits(params, short), logits(params, padded)
    assert first.dtype == jnp.float32
    assert len(np.unique(np.asarray(first))) == 3
    np.testing.assert_allclose(first, second, rtol=1e-5)
    longer = logits(params, short | {"tokens": jnp.pad(short["tokens"], ((0, 0), (0, 3 * LENGTH)))})
    np.testing.assert_allclose(first, longer, rtol=1e-5)


def test_losses_over_a_large_vocabulary() -> None:
    """Rows are looked up there instead of multiplied; values and gradients are the same."""
    logits = np.random.default_rng(0).normal(size=(2, LENGTH, 2000)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 2000, (2, LENGTH))
    mean, total = jax.jit(token_losses)(logits, tokens, np.array([LENGTH, 4]), np.array([3, 0]))
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(total, [nats[0, 3:].sum(), nats[1, :4].sum()], rtol=1e-5)
    np.testing.assert_allclose(mean, [nats[0, 3:].mean(), nats[1, :4].mean()], rtol=1e-5)
    table = jnp.asarray(logits[0])  # [24, 2000]: as an embedding of 2000 tokens
    found = embedded(table.T, jnp.asarray(tokens), jnp.float32)
    np.testing.assert_array_equal(found, np.asarray(table).T[tokens])


def test_pairs_of_tokens_are_told_apart() -> None:
    """With the factor of bytes, (a, b) and (a + 1, b - 257) were one pair."""
    pairs = jnp.asarray([[1000, 700], [1001, 443], [3, 1]])
    hashes = np.asarray(ngram_hashes(pairs, 2, 4096, 5000))[:, 0]
    assert len(set(hashes.tolist())) == 3
    many = jnp.arange(10_000)[:, None]
    used = np.unique(np.asarray(ngram_hashes(many, 1, 4096, 10_000)))
    assert len(used) > 3000, "tokens are spread over the buckets"
    np.testing.assert_array_equal(ngram_hashes(many[:4096], 1, 4096, 4096), many[:4096])
