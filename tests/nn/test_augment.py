"""Augmentation: real crops, uniform places, a fair flip, and the same images for the same key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nn.augment import flip_and_crop, preparation, standardize
from bilevel.nn.classification import classification_loss, init_variables
from bilevel.nn.small import MLP
from bilevel.types import UserError

PAD = 2
crop = jax.jit(flip_and_crop, static_argnames=("padding", "mode", "flip"))


def images(rows: int, height: int = 7, width: int = 8) -> np.ndarray:
    """No two pixels of an image are alike, none is 0."""
    one = np.arange(1, height * width * 3 + 1, dtype=np.uint8).reshape(height, width, 3)
    return np.stack([one + row % 80 for row in range(rows)])


def all_crops(image: np.ndarray, mode: Any) -> dict[bytes, tuple[bool, int, int]]:
    """Every possible result -> (mirrored, top, left), cut from a padded copy by numpy."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="constant" if mode == "zero" else "reflect")
    found = {}
    for top in range(2 * PAD + 1):
        for left in range(2 * PAD + 1):
            cut = padded[top : top + height, left : left + width]
            found[cut.tobytes()] = (False, top, left)
            found[cut[:, ::-1].tobytes()] = (True, top, left)
    return found


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_results_are_crops_equally_often(mode: Any) -> None:
    rows = 5000
    result = np.asarray(crop(jax.random.key(0), jnp.asarray(images(1).repeat(rows, 0)), padding=PAD, mode=mode))
    assert result.dtype == np.uint8
    crops = all_crops(images(1)[0], mode)
    assert len(crops) == 50
    counts = dict.fromkeys(crops.values(), 0)
    for row in result:
        counts[crops[row.tobytes()]] += 1
    expected = rows / 50
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 85  # 49 degrees of freedom: exceeded once in a thousand draws
    mirrored = sum(count for (flipped, _, _), count in counts.items() if flipped)
    assert abs(mirrored / rows - 0.5) < 4 * 0.5 / rows**0.5


def test_rows_are_drawn_apart_and_stay_in_place() -> None:
    given = images(40)
    result = np.asarray(crop(jax.random.key(1), jnp.asarray(given), padding=PAD))
    pairs = zip(given, result, strict=True)
    places = [all_crops(image, "zero")[found.tobytes()] for image, found in pairs]
    assert len(set(places)) > 15


def test_a_function_of_seed_and_step() -> None:
    given = jnp.asarray(images(16))

    def at(seed: int, step: int) -> np.ndarray:
        return np.asarray(crop(jax.random.fold_in(jax.random.key(seed), step), given))

    np.testing.assert_array_equal(at(3, 5), at(3, 5))
    assert (at(3, 5) != at(3, 6)).any()
    assert (at(3, 5) != at(4, 5)).any()


def test_switched_off() -> None:
    given = jnp.asarray(images(8))
    np.testing.assert_array_equal(crop(jax.random.key(0), given, padding=0, flip=False), given)
    only = np.asarray(crop(jax.random.key(0), given, padding=0))
    mirrored = np.asarray([(a == b[:, ::-1]).all() for a, b in zip(only, given, strict=True)])
    kept = np.asarray([(a == b).all() for a, b in zip(only, given, strict=True)])
    assert (mirrored ^ kept).all()
    assert 0 < mirrored.sum() < 8


def test_padding_wider_than_the_image() -> None:
    given = jnp.ones((200, 2, 2, 1))
    result = np.asarray(crop(jax.random.key(0), given, padding=4))
    assert set(np.unique(result)) == {0.0, 1.0}


def test_standardize() -> None:
    given = images(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    wanted = (given / 255 - np.asarray(mean)) / np.asarray(std)
    found = standardize(jnp.asarray(given), mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert standardize(jnp.asarray(given), mean, std, jnp.bfloat16).dtype == jnp.bfloat16


def test_preparation_in_the_loss() -> None:
    """The zeros around the normalised image are its mean colour, and the loss draws from its own key."""
    given = jnp.asarray(images(8))
    prepare = preparation((0.2,) * 3, (0.5,) * 3, padding=PAD)
    result = jax.jit(prepare)(given, jax.random.key(0))
    assert (np.asarray(result) == 0).any()
    plain = preparation((0.2,) * 3, (0.5,) * 3, augment=False)(given, jax.random.key(0))
    np.testing.assert_array_equal(plain, standardize(given, (0.2,) * 3, (0.5,) * 3))

    module = MLP(hidden=(4,))
    params, state = jax.jit(lambda: init_variables(module, jax.random.key(0), (7, 8, 3)))()
    loss = jax.jit(classification_loss(module, prepare=prepare))
    batch = {"image": given, "label": jnp.arange(8)}
    first, again, other = (loss(params, state, batch, jax.random.key(k))[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 1e-4


def test_user_errors() -> None:
    given, key = jnp.asarray(images(2)), jax.random.key(0)
    with pytest.raises(UserError, match="'mirror' is not known; it must be 'zero' or 'reflect'"):
        flip_and_crop(key, given, mode="mirror")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="padding of 7 pixels is not possible for images of 7 × 8"):
        flip_and_crop(key, given, padding=7, mode="reflect")
    with pytest.raises(UserError, match="padding of -1 pixels"):
        flip_and_crop(key, given, padding=-1)
    with pytest.raises(UserError, match="images are float32; standardize needs uint8"):
        standardize(jnp.zeros((1, 2, 2, 3)), (0,) * 3, (1,) * 3)
    for mean, std in [((0.0,), (1.0,)), ((0.0,) * 3, (1.0, 0.0, 1.0))]:
        with pytest.raises(UserError, match=r"3 channels, but mean=.* give one number a channel"):
            standardize(given, mean, std)
