"""Image–text networks and losses, against a numpy transcription."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.data import ArrayDataset
from bilevel.nn.augment import preparation
from bilevel.nn.image_text.losses import (
    caption_losses,
    class_caption_loss,
    class_losses,
    image_text_loss,
    with_past,
)
from bilevel.nn.image_text.towers import ImageText, image_text, init_image_text, last_image_blocks
from bilevel.nn.image_text.weighting import image_weighting
from bilevel.training.evaluation import mean_evaluator
from bilevel.types import Shared, UserError

ROWS, NEGATIVES, CLASSES, DIMENSIONS, WIDTH = 5, 6, 3, 4, 3
SHAPE = (2, 2, 1)


class Flat(nn.Module):
    """An image tower without parameters."""

    @nn.compact
    def __call__(self, images: Any, *, train: bool = False) -> Any:
        return images.reshape(images.shape[0], -1)


TOWERS = ImageText(Flat(), WIDTH, (5, 4))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def parts(kind: Any = np.float64) -> tuple[Any, Any]:
    """Parameters of `TOWERS`, and a batch: row 1 shares its caption with a negative, and the first two negatives are none."""
    params, model_state = init_image_text(TOWERS, jax.random.key(0), SHAPE, DIMENSIONS)
    assert model_state == {}
    past = {
        "text": draw(NEGATIVES, DIMENSIONS, seed=1),
        "caption": np.asarray([7, 10, 11, 7, 12, 13]),
        "real": np.asarray([False, False, True, True, True, True]),
    }
    batch = {
        "image": draw(ROWS, *SHAPE),
        "text": draw(ROWS, DIMENSIONS),
        "caption": np.asarray([1, 7, 2, 3, 10]),
        "label": np.asarray([-1, -1, 2, -1, 0]),
        "past": Shared(past),
    }
    cast = lambda x: jnp.asarray(x, kind) if np.asarray(x).dtype.kind == "f" else jnp.asarray(x)  # noqa: E731
    return jax.tree.map(cast, (params, batch))


TEXTS = draw(CLASSES, DIMENSIONS, seed=2)


def written_out(params: Any, batch: Any) -> np.ndarray:
    """ℓ_gen and ℓ_spec of each row, one after the other."""
    p, batch = jax.tree.map(np.asarray, (params, batch))
    past = batch["past"].arrays

    def g(e: np.ndarray) -> np.ndarray:
        for layer in ("text_0", "text_1"):
            e = np.maximum(e @ p[layer]["kernel"] + p[layer]["bias"], 0)
        return unit(e @ p["text_projection"]["kernel"])

    f = unit(batch["image"].reshape(ROWS, -1) @ p["projection"]["kernel"])
    tau = np.exp(min(p["log_scale"], np.log(100)))
    losses = []
    for i in range(ROWS):
        own = np.exp(tau * f[i] @ g(batch["text"][i]))
        rivals = [
            np.exp(tau * f[i] @ g(past["text"][q]))
            for q in range(NEGATIVES)
            if past["real"][q] and past["caption"][q] != batch["caption"][i]
        ]
        classes = np.exp([tau * f[i] @ g(e) for e in TEXTS])
        label = batch["label"][i]
        losses.append(-np.log(own / (own + sum(rivals))) if label < 0 else -np.log(classes[label] / classes.sum()))
    return np.asarray(losses)


def test_losses_and_their_gradients() -> None:
    """Gradients along random directions, by central differences of the transcription; in float64."""
    with jax.enable_x64(True):
        params, batch = parts()
        loss = image_text_loss(TOWERS, TEXTS)
        compiled = jax.jit(jax.value_and_grad(lambda p, w: w @ loss(p, {}, batch, jax.random.key(0))[0]))
        losses, aux = jax.jit(lambda p: loss(p, {}, batch, jax.random.key(0)))(params)
        np.testing.assert_allclose(losses, written_out(params, batch), rtol=1e-12, atol=1e-14)
        assert aux.metrics["correct"].shape == (ROWS,)
        weights = draw(ROWS)
        _, gradient = compiled(params, weights)
        for seed in range(3):
            direction = jax.tree.map(lambda x, seed=seed: draw(*x.shape, seed=seed), params)
            ahead, behind = (jax.tree.map(lambda x, d, e=e: x + e * d, params, direction) for e in (1e-6, -1e-6))
            wanted = weights @ (written_out(ahead, batch) - written_out(behind, batch)) / 2e-6
            found = sum(jax.tree.leaves(jax.tree.map(lambda x, d: np.vdot(x, d), gradient, direction)))
            np.testing.assert_allclose(found, wanted, rtol=1e-7)


def test_gradients_by_embeddings_written_out() -> None:
    """dℓ_i = Σ_j p_ij dz_ij − dz_i0, with z = τ⟨f, g⟩ and p the softmax over the own caption, 0, and the ones compared with."""
    with jax.enable_x64(True):
        f, own, negatives, tau = (
            unit(draw(ROWS, WIDTH)),
            unit(draw(ROWS, WIDTH, seed=3)),
            unit(draw(NEGATIVES, WIDTH)),
            7.0,
        )
        counts = draw(ROWS, NEGATIVES) > -0.5
        counts[0] = False
        arguments = jax.tree.map(jnp.asarray, (f, own, negatives, counts, tau))
        losses, correct = caption_losses(*arguments)
        z = np.concatenate([(f * own).sum(1, keepdims=True), f @ negatives.T], axis=1)
        mass = np.exp(tau * z) * np.concatenate([np.ones((ROWS, 1)), counts], axis=1)
        p = mass / mass.sum(1, keepdims=True)
        np.testing.assert_allclose(losses, -np.log(p[:, 0]), rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(correct, p.argmax(1) == 0)
        assert losses[0] == 0
        weights, residual = draw(ROWS), p - np.eye(1, NEGATIVES + 1)

        def total(f: Any, own: Any, negatives: Any, tau: Any) -> Any:
            return weights @ caption_losses(f, own, negatives, arguments[3], tau)[0]

        found = jax.grad(total, (0, 1, 2, 3))(*arguments[:3], arguments[4])
        r = weights[:, None] * residual
        wanted = (
            tau * (r[:, :1] * own + r[:, 1:] @ negatives),
            tau * r[:, :1] * f,
            tau * r[:, 1:].T @ f,
            (r * z).sum(),
        )
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
        labels = np.asarray([0, 2, 1, 1, 0])
        classes = unit(draw(CLASSES, WIDTH))
        of_class, right = class_losses(arguments[0], jnp.asarray(classes), jnp.asarray(labels), arguments[4])
        scores = tau * f @ classes.T
        np.testing.assert_allclose(
            of_class, np.log(np.exp(scores).sum(1)) - scores[np.arange(ROWS), labels], rtol=1e-12
        )
        np.testing.assert_array_equal(right, scores.argmax(1) == labels)


def moved(batch: Any, place: int) -> Any:
    past = batch["past"].arrays
    return {**batch, "past": Shared({**past, "text": past["text"].at[place].add(1.0)})}


def test_equal_captions_and_empty_places_are_no_negatives() -> None:
    params, batch = parts(np.float32)
    params = {**params, "log_scale": jnp.zeros(())}  # so that no change is too small to see
    compiled = jax.jit(lambda batch: image_text_loss(TOWERS, TEXTS)(params, {}, batch, jax.random.key(0))[0])
    losses = compiled(batch)
    changed = {place: np.flatnonzero(compiled(moved(batch, place)) != losses).tolist() for place in range(NEGATIVES)}
    generic = [0, 1, 3]
    # The caption of place 3 is that of row 1; places 0 (with the same caption) and 1 are empty.
    assert changed == {0: [], 1: [], 2: generic, 3: [0, 3], 4: generic, 5: generic}


def test_no_row_acts_on_another() -> None:
    params, batch = parts(np.float32)
    params = {**params, "log_scale": jnp.zeros(())}  # so that no change is too small to see
    compiled = jax.jit(lambda batch: image_text_loss(TOWERS, TEXTS)(params, {}, batch, jax.random.key(0))[0])
    other = {**batch, "image": batch["image"].at[3].add(1.0), "text": batch["text"].at[3].add(1.0)}
    np.testing.assert_array_equal(np.flatnonzero(compiled(batch) != compiled(other)), [3])


def test_the_temperature_ends_at_100() -> None:
    params, batch = parts(np.float32)
    compiled = jax.jit(jax.value_and_grad(lambda p: image_text_loss(TOWERS)(p, {}, batch, jax.random.key(0))[0].sum()))
    assert float(params["log_scale"]) == pytest.approx(np.log(1 / 0.07))
    assert float(compiled(params)[1]["log_scale"]) != 0
    (value, gradient), (same, _) = (compiled({**params, "log_scale": jnp.float32(s)}) for s in (9.0, np.log(100.0)))
    assert float(gradient["log_scale"]) == 0
    assert float(value) == pytest.approx(float(same), rel=1e-5)


def test_a_caption_of_unknown_words_has_finite_gradients() -> None:
    params, batch = parts(np.float32)
    batch = {**batch, "text": jnp.zeros_like(batch["text"])}
    compiled = jax.jit(jax.grad(lambda p: image_text_loss(TOWERS)(p, {}, batch, jax.random.key(0))[0].sum()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(compiled(params)))


def test_half_precision_embeddings_and_a_fixed_past() -> None:
    params, batch = parts(np.float32)
    past = batch["past"].arrays
    half = {**batch, "text": batch["text"].astype(jnp.float16)}
    del half["past"]
    loss = with_past(image_text_loss(TOWERS, TEXTS), {**past, "text": past["text"].astype(jnp.float16)})
    losses, _ = loss(params, {}, half, jax.random.key(0))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(
        losses, image_text_loss(TOWERS, TEXTS)(params, {}, batch, jax.random.key(0))[0], rtol=2e-2
    )
    with pytest.raises(
        UserError, match=r"brings no captions 'past' to compare with \(it has: caption, image, label, text\)"
    ):
        image_text_loss(TOWERS)(params, {}, half, jax.random.key(0))


def test_zero_shot_classification() -> None:
    """Images that lie on the captions of their classes, but for one."""
    texts = np.eye(4, DIMENSIONS, dtype=np.float32)[:CLASSES]
    params, _ = parts(np.float32)
    embedded: Any = TOWERS.apply({"params": params}, jnp.zeros((1, *SHAPE)), jnp.asarray(texts))
    _, g, tau = embedded
    labels = np.asarray([0, 1, 2, 1, 1, 0, 2])
    seen = labels.copy()
    seen[3] = 2
    images = np.asarray(g)[seen]  # width numbers, and a projection that keeps them
    params = {**params, "projection": {"kernel": jnp.eye(WIDTH)}}
    rows = ArrayDataset({"image": images.reshape(-1, WIDTH, 1, 1), "label": labels.astype(np.int32)})
    loss = class_caption_loss(TOWERS, texts, train=False)
    found = mean_evaluator(loss, 3, accuracy="correct")(params, {}, rows, None)
    scores = float(tau) * images @ np.asarray(g).T
    wanted = np.log(np.exp(scores).sum(1)) - scores[np.arange(7), labels]
    assert found["accuracy"] == pytest.approx(6 / 7)
    assert found["loss"] == pytest.approx(wanted.mean(), rel=1e-4)


def test_labels_of_no_class_are_not_numbers() -> None:
    params, batch = parts(np.float32)
    for label in (-1, CLASSES):
        labelled = {**batch, "label": batch["label"].at[1].set(label).at[0].set(0).at[3].set(0)}
        losses, _ = class_caption_loss(TOWERS, TEXTS)(params, {}, labelled, jax.random.key(0))
        assert np.isnan(losses).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(("name", "size", "trunk"), [("resnet50", 224, 23_508_032), ("resnet20", 32, 269_072)])
def test_towers_of_residual_networks(name: Any, size: int, trunk: int) -> None:
    """ResNet-50 as published (25,557,032 parameters, 2,049,000 of them of the classifier), and ResNet-20 counted by hand."""
    module = image_text(name, size=size, width=16, hidden=(8, 8))
    params, model_state = jax.eval_shape(
        lambda: init_image_text(module, jax.random.key(0), (size, size, 3), DIMENSIONS)
    )
    assert sum(x.size for x in jax.tree.leaves(params["image"])) == trunk
    assert set(params) == {"image", "projection", "text_0", "text_1", "text_projection", "log_scale"}
    assert set(model_state) == {"batch_stats"}
    assert "bias" not in params["projection"]
    accepts = last_image_blocks(1, params)
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    last = {path.split("/")[1] for path in paths if path.startswith("image/") and accepts(path)}
    assert len(last) == 1
    assert all(accepts(path) for path in paths if not path.startswith("image/"))


def test_an_unknown_tower() -> None:
    with pytest.raises(UserError, match='There is no image tower "vgg"'):
        image_text("vgg")  # pyright: ignore[reportArgumentType]


def test_weighting_network() -> None:
    init, logits = image_weighting(
        (16, 16, 3), preparation((0.5,) * 3, (0.25,) * 3, augment=False), features=(4, 4, 4, 6)
    )
    weights = init(jax.random.key(0))
    assert [x["kernel"].shape for x in (weights[f"conv_{i}"] for i in range(4))] == [
        (3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 4, 4), (3, 3, 4, 6),
    ]  # fmt: skip
    small = jnp.asarray(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)), jnp.uint8)
    compiled = jax.jit(logits)
    np.testing.assert_array_equal(compiled(weights, {"small": small}), np.zeros(5))
    weights = {**weights, "logit": {**weights["logit"], "kernel": jnp.ones((6, 1))}}
    found = compiled(weights, {"small": small})
    assert len(set(found.tolist())) == 5
    np.testing.assert_allclose(compiled(weights, {"small": small[2:3]})[0], found[2], rtol=1e-5)


def test_a_whole_step_in_both_stages() -> None:
    """Shapes alone: towers, BatchNorm, a past, mixed rows, micro-batches, and rows that come in full afterwards."""
    prepare = preparation((0.5,) * 3, (0.25,) * 3)
    module = image_text("resnet20", size=16, width=8, hidden=(8, 8))
    init, logits = image_weighting(
        (8, 8, 3), preparation((0.5,) * 3, (0.25,) * 3, augment=False), features=(4, 4, 4, 4)
    )
    train = bilevel.make_step(
        image_text_loss(module, TEXTS, prepare=prepare), logits, optax.sgd(0.05, momentum=0.9), optax.adam(1e-4),
        bilevel.soba(optax.sgd(0.05)), batch_size=4, micro_batches=2, ema_decay=0.9,
        specific_loss=class_caption_loss(module, TEXTS, prepare=prepare),
    )  # fmt: skip

    def rows(count: int) -> dict[str, Any]:
        shapes = {"image": (16, 16, 3), "small": (8, 8, 3), "text": (DIMENSIONS,), "caption": (), "label": (), "id": ()}
        kinds = {"image": jnp.uint8, "small": jnp.uint8, "text": jnp.float16}
        return {name: jnp.zeros((count, *shape), kinds.get(name, jnp.int32)) for name, shape in shapes.items()}

    past = {
        "text": jnp.zeros((6, DIMENSIONS), jnp.float16),
        "caption": jnp.zeros(6, jnp.int32),
        "real": jnp.ones(6, bool),
    }
    big, specific = {**rows(12), "past": Shared(past)}, rows(4)

    def both(key: Any) -> Any:
        params, model_state = init_image_text(module, key, (16, 16, 3), DIMENSIONS)
        state = train.init(key, params, init(key), model_state)
        stages = train.stages_at(0)
        choice = stages.choose(state, {"small": big["small"], "id": big["id"]})
        picked = {**rows(4), "past": big["past"]}
        return state, train.learn(state, big, specific), stages.step_on(state, picked, specific, choice)

    state, one, two = jax.eval_shape(both, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, one) == jax.tree.map(lambda x: x.shape, two)
    assert jax.tree.structure(one[0]) == jax.tree.structure(state)
    assert {"generic_loss", "generic_correct", "specific_loss"} <= one[1].keys()
