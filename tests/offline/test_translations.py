"""Translations of a trained model, and measures of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.data import ArrayDataset
from bilevel.nn.translation.base import END, PAD
from bilevel.nn.translation.losses import translation_loss
from bilevel.nn.translation.transformer import TranslatorConfig, transformer
from bilevel.offline.translations import chance_of_difference, scored, signature, translator

pytest.importorskip("sacrebleu")
V, LENGTH = 9, 4


def cipher(rows: int, seed: int) -> ArrayDataset:
    """Rows whose translation replaces each piece by the next one."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, LENGTH + 1, rows).astype(np.int32)
    places = np.arange(LENGTH)
    words = rng.integers(3, V, (rows, LENGTH))
    ends, real = places == length[:, None] - 1, places < length[:, None]
    sides = {"source": words, "target": 3 + (words - 2) % (V - 3)}
    arrays = {name: np.where(real, np.where(ends, END, x), PAD).astype(np.int32) for name, x in sides.items()}
    return ArrayDataset({**arrays, "source_length": length, "target_length": length}, name="cipher")


def test_a_model_that_learned_a_cipher_translates_it() -> None:
    network = transformer(TranslatorConfig(V, layers=1, width=16, heads=2, feed_forward=32))
    train, test = cipher(256, 0), cipher(150, 1)  # more than are translated at once
    batch = {name: jnp.asarray(x) for name, x in train.rows(np.arange(256)).items()}
    loss, optimizer = translation_loss(network, train=True), optax.adam(1e-2)

    @jax.jit
    def fitted(params: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            gradient = jax.grad(lambda p: loss(p, {}, batch, jax.random.key(0))[0].mean())(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=300)[0][0]

    params = fitted(network.init(jax.random.key(0), batch))
    found = translator(network, beam=2, most=LENGTH)(params, test)
    rows = test.rows(np.arange(150))
    wanted = [row[: n - 1].tolist() for row, n in zip(rows["target"], rows["target_length"], strict=True)]
    assert len(found) == 150
    assert np.mean([a == b for a, b in zip(found, wanted, strict=True)]) > 0.9


def test_scores_are_those_of_sacrebleu() -> None:
    references = ["the cat sat on the mat", "a dog runs over there", "it is raining again today"]
    perfect = scored(references, references)
    assert perfect.bleu == pytest.approx(100)
    assert perfect.chrf == pytest.approx(100)
    assert "tok:13a" in signature()
    worse = scored(["the cat sat on a mat", "a dog runs there", "it rains"], references, tokenize="none")
    assert 0 < worse.bleu < worse.chrf < 100
    assert "tok:none" in signature("none")


def test_a_difference_is_told_from_chance() -> None:
    references = [f"sentence number {i} of a long list of sentences" for i in range(60)]
    bad = [line.replace("long list", "short text") for line in references]
    one_word = [line.replace("of a", "of one") if i == 7 else line for i, line in enumerate(references)]
    assert chance_of_difference(bad, references, references)["bleu"] < 0.01
    found = chance_of_difference(one_word, references, references)
    assert found.keys() == {"bleu", "chrf"}
    assert found["bleu"] > 0.05
