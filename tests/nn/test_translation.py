"""Encoder–decoders, their losses and beam search."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nn.translation.base import END, PAD, EncoderDecoder, shifted
from bilevel.nn.translation.beam_search import beam_search, by_length, gnmt
from bilevel.nn.translation.losses import piece_losses, translation_loss
from bilevel.nn.translation.recurrent import RecurrentConfig, decoder_part, recurrent
from bilevel.nn.translation.transformer import TranslatorConfig, last_blocks, transformer
from bilevel.nn.translation.weighting import PairWeighting, pair_logits
from bilevel.types import UserError

V, ROWS, S, T = 7, 3, 5, 4


def batch_of(seed: int = 0, rows: int = ROWS) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = {"source_length": rng.integers(1, S + 1, rows), "target_length": rng.integers(1, T + 1, rows)}
    pieces = {"source": rng.integers(3, V, (rows, S)), "target": rng.integers(3, V, (rows, T))}
    found = {name: jnp.asarray(x, jnp.int32) for name, x in {**lengths, **pieces}.items()}
    for side, size in (("source", S), ("target", T)):
        length = found[f"{side}_length"][:, None]
        x = jnp.where(jnp.arange(size) == length - 1, END, found[side])
        found[side] = jnp.where(jnp.arange(size) < length, x, PAD)
    return found


def networks(dropout: float = 0.0) -> dict[str, EncoderDecoder]:
    shape = TranslatorConfig(V, layers=2, width=8, heads=2, feed_forward=16, dropout=dropout)
    # Weights far from 0, so that hypotheses differ clearly.
    cells = RecurrentConfig(V, V, hidden=8, embedding=6, dropout=dropout, scale=1.0)
    return {"transformer": transformer(shape), "recurrent": recurrent(cells)}


@pytest.fixture(scope="module", params=["transformer", "recurrent"])
def network(request: pytest.FixtureRequest) -> tuple[EncoderDecoder, Any]:
    found = networks()[request.param]
    params = found.init(jax.random.key(1), batch_of())
    return found, jax.tree.map(lambda x: 2.0 * x, params) if request.param == "transformer" else params


def test_a_piece_depends_on_those_before_it_alone(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of()
    other = {**batch, "target": batch["target"].at[:, 2].set(3 + (batch["target"][:, 2] - 2) % (V - 3))}
    logits = jax.jit(lambda b: net.logits(params, b, None))
    np.testing.assert_allclose(logits(batch)[:, :3], logits(other)[:, :3], rtol=1e-6, atol=1e-6)
    assert float(jnp.abs(logits(batch)[:, 3] - logits(other)[:, 3]).max()) > 1e-3


def test_padding_of_the_source_counts_for_nothing(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of()
    padded = jnp.arange(S) >= batch["source_length"][:, None]
    other = {**batch, "source": jnp.where(padded, 5, batch["source"])}
    logits = jax.jit(lambda b: net.logits(params, b, None))
    np.testing.assert_allclose(logits(batch), logits(other), rtol=1e-5, atol=1e-6)
    changed = {**batch, "source": batch["source"].at[:, 0].set(3 + (batch["source"][:, 0] - 2) % (V - 3))}
    assert float(jnp.abs(logits(batch) - logits(changed)).max()) > 1e-3


def test_pieces_one_by_one_give_the_logits_of_all_at_once(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of()
    together = jax.jit(lambda b: net.logits(params, b, None))(batch)
    decoding, extend = net.begin(params, batch, T), jax.jit(net.extend)
    for t in range(T):
        logits, moving = extend(params, decoding, shifted(batch["target"])[:, t, None], jnp.int32(t))
        decoding = decoding._replace(moving=moving)
        np.testing.assert_allclose(logits[:, 0], together[:, t], rtol=1e-5, atol=1e-5)


def every_hypothesis(net: EncoderDecoder, params: Any, row: dict[str, Any], penalty: Any) -> tuple[float, list[int]]:
    """The best of all hypotheses of a row, by enumeration."""
    pieces = [v for v in range(V) if v not in (PAD, END)]
    ended = [[*h, END] for n in range(T) for h in itertools.product(pieces, repeat=n)]
    targets = np.asarray([h + [PAD] * (T - len(h)) for h in ended], np.int32)
    many = {name: jnp.repeat(x, len(ended), axis=0) for name, x in row.items()} | {"target": jnp.asarray(targets)}
    nll, _ = piece_losses(net.logits(params, many, None), many["target"], 0.0)
    lengths = np.asarray([len(h) for h in ended])
    totals = -np.where(np.arange(T) < lengths[:, None], nll, 0.0).sum(axis=1)
    scores = totals / np.asarray(penalty(jnp.asarray(lengths, jnp.float32)))
    return float(scores.max()), ended[int(scores.argmax())]


@pytest.mark.parametrize("penalty", [by_length, gnmt(0.6)], ids=["by_length", "gnmt"])
def test_a_wide_beam_finds_the_best_of_all_hypotheses(network: tuple[EncoderDecoder, Any], penalty: Any) -> None:
    net, params = network
    batch = batch_of()
    found = jax.jit(lambda b: beam_search(net, params, b, beam=(V - 2) ** (T - 1), most=T, penalty=penalty))(batch)
    for i in range(ROWS):
        score, pieces = every_hypothesis(net, params, {k: v[i : i + 1] for k, v in batch.items()}, penalty)
        assert found.pieces[i].tolist() == pieces + [PAD] * (T - len(pieces))
        assert int(found.length[i]) == len(pieces)
        np.testing.assert_allclose(found.score[i], score, rtol=1e-5)


def greedy(net: EncoderDecoder, params: Any, batch: dict[str, Any], most: int) -> np.ndarray:
    """Take the most probable piece until that is END."""
    target = np.full((len(batch["source"]), most), PAD, np.int32)
    over = np.zeros(len(target), bool)
    for t in range(most):
        logits = np.array(net.logits(params, {**batch, "target": jnp.asarray(target)}, None))[:, t]
        logits[:, PAD] = -np.inf
        target[:, t] = np.where(over, PAD, logits.argmax(axis=1))
        over |= target[:, t] == END
    return target


def test_a_beam_of_one_is_greedy(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of(seed=3, rows=16)
    found = jax.jit(lambda b: beam_search(net, params, b, beam=1, most=6))(batch)
    expected = greedy(net, params, batch, 6)
    np.testing.assert_array_equal(found.pieces, expected)
    ended = (expected == END).any(axis=1)
    assert ended.any()
    np.testing.assert_array_equal(found.length, np.where(ended, (expected != PAD).sum(axis=1), 6))


def test_no_step_of_a_search_sorts_all_extensions(network: tuple[EncoderDecoder, Any]) -> None:
    program = jax.jit(lambda b: beam_search(*network, b, beam=2, most=T)).lower(batch_of()).compile().as_text()
    sorts = [line for line in (program or "").splitlines() if " sort(" in line]
    assert not any(f"[{ROWS},{2 * V}]" in line for line in sorts)


def test_a_wider_beam_finds_more_probable_translations(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of(seed=4, rows=256)
    one, four = (
        jax.jit(lambda b, k=k: beam_search(net, params, b, beam=k, most=6, penalty=gnmt(0.0)))(batch) for k in (1, 4)
    )
    both = (one.pieces == END).any(axis=1) & (four.pieces == END).any(axis=1)
    assert int(both.sum()) >= 8
    gained = np.asarray(four.score - one.score)[np.asarray(both)]
    assert gained.mean() > 0


@pytest.mark.parametrize(("beam", "most"), [(0, 3), (2, 0)])
def test_a_search_without_hypotheses_is_refused(network: tuple[EncoderDecoder, Any], beam: int, most: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        beam_search(*network, batch_of(), beam=beam, most=most)


def test_smoothed_losses_are_those_of_the_definition() -> None:
    rng, smoothing = np.random.default_rng(0), 0.1
    logits, target = rng.normal(size=(2, 3, V)), rng.integers(0, V, (2, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.full(logits.shape, smoothing / (V - 1))
    np.put_along_axis(q, target[..., None], 1 - smoothing, axis=-1)
    nll, smooth = piece_losses(jnp.asarray(logits, jnp.float32), jnp.asarray(target), smoothing)
    np.testing.assert_allclose(smooth, -(q * np.log(chances)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(nll, -np.log(np.take_along_axis(chances, target[..., None], -1))[..., 0], rtol=1e-5)


def test_losses_are_means_over_the_pieces_of_a_row(network: tuple[EncoderDecoder, Any]) -> None:
    net, params = network
    batch = batch_of()
    nll, _ = piece_losses(net.logits(params, batch, None), batch["target"], 0.0)
    sums = np.asarray([nll[i, : int(n)].sum() for i, n in enumerate(batch["target_length"])])
    losses, aux = translation_loss(net, train=True)(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(losses, sums / np.asarray(batch["target_length"]), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["nll"], losses, rtol=1e-6)
    by_pieces, _ = translation_loss(net, train=True, pieces_a_row=2.5)(params, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(by_pieces, sums / 2.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "recurrent"])
def test_dropout_is_of_training_alone(name: str) -> None:
    net, batch = networks(dropout=0.5)[name], batch_of()
    params = net.init(jax.random.key(0), batch)
    losses = [translation_loss(net, train=train) for train in (True, False)]
    train, plain = (jax.jit(lambda key, f=loss: f(params, {}, batch, key)[0]) for loss in losses)
    one, other = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(train(one), train(one))
    assert float(jnp.abs(train(one) - train(other)).max()) > 1e-3
    np.testing.assert_array_equal(plain(one), plain(other))


@pytest.mark.parametrize("name", ["transformer", "recurrent"])
def test_forward_and_reverse_derivatives_of_a_loss_agree(name: str) -> None:
    net, batch = networks(dropout=0.5)[name], batch_of()
    params = net.init(jax.random.key(0), batch)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    loss = translation_loss(net, train=True, smoothing=0.1)

    @jax.jit
    def both(params: Any) -> tuple[Any, Any]:
        def mean(p: Any) -> Any:
            return loss(p, {}, batch, jax.random.key(1))[0].mean()

        products = jax.tree.map(jnp.vdot, jax.grad(mean)(params), direction)
        return jax.jvp(mean, (params,), (direction,))[1], sum(jax.tree.leaves(products))

    forward, reverse = both(params)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-6)


def test_the_decoder_of_the_recurrent_network_is_all_behind_the_encoder() -> None:
    params = jax.eval_shape(lambda: networks()["recurrent"].init(jax.random.key(0), batch_of()))
    assert {name for name in params if not decoder_part(f"{name}/")} == {"source_embedding", "encoder"}


def test_the_probed_part_is_the_end_of_the_decoder() -> None:
    config = TranslatorConfig(V, layers=2, width=8, heads=2, feed_forward=16)
    params = transformer(config).init(jax.random.key(0), batch_of())
    accepted = {name for name in params if last_blocks(1, config)(f"{name}/")}
    assert accepted == {"decoder_1", "final_norm"}
    with pytest.raises(UserError, match="give 1 to 2"):
        last_blocks(3, config)


def test_the_weighting_network_is_even_at_first_and_sees_both_sides() -> None:
    module, batch = PairWeighting(V, width=4, hidden=8), batch_of()
    sides = [batch[name] for name in ("source", "source_length", "target", "target_length")]
    params: Any = module.init(jax.random.key(0), *sides)["params"]
    np.testing.assert_array_equal(pair_logits(module)(params, batch), np.zeros(ROWS))
    params["logit"]["kernel"] = jnp.ones_like(params["logit"]["kernel"])
    logits = pair_logits(module)(params, batch)
    table = np.asarray(params["embedding"])
    means = [
        np.stack([table[x[i, : int(n)]].sum(0) / np.sqrt(int(n)) for i, n in enumerate(length)])
        for x, length in (sides[:2], sides[2:])
    ]
    layer = jax.tree.map(np.asarray, params["hidden"])
    hidden = np.concatenate(means, axis=1) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(logits, np.maximum(hidden, 0).sum(axis=1), rtol=1e-5)
