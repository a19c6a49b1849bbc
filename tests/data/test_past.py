"""The rows before a batch, as a function of (seed, step)."""

from typing import Any

import jax
import numpy as np
import pytest
from tiny_captions import write_png

from bilevel.data import (
    ArrayDataset,
    FunctionEmbedding,
    Loader,
    MixedData,
    MixedLoader,
    PastLoader,
    embed_captions,
    open_captions,
    pack_captions,
)
from bilevel.types import Shared, UserError

ROWS, BATCH, COUNT = 23, 4, 10


def arrays(rows: int = ROWS) -> dict[str, np.ndarray]:
    return {"image": np.arange(rows) * 100, "text": np.arange(2.0 * rows).reshape(rows, 2), "caption": np.arange(rows)}


def parts(rows: int = ROWS) -> tuple[ArrayDataset, ArrayDataset]:
    """The whole rows, and their captions alone."""
    found = arrays(rows)
    return ArrayDataset(found, name="whole"), ArrayDataset({k: found[k] for k in ("text", "caption")}, name="captions")


def past_loader(seed: int = 0, **processes: int) -> PastLoader:
    whole, captions = parts()
    return PastLoader(Loader(whole, BATCH, seed=seed, **processes), captions, COUNT)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 40])
def test_the_past_is_what_was_loaded_before(step: int) -> None:
    loader = past_loader()
    order = np.concatenate([np.full(COUNT, -1), *(loader.indices(i) for i in range(step))])[-COUNT:]
    np.testing.assert_array_equal(loader.past(step), order)
    batch = loader.batch(step)
    past = batch["past"].arrays
    assert past.keys() == {"text", "caption", "real"}
    np.testing.assert_array_equal(past["real"], order >= 0)
    np.testing.assert_array_equal(past["caption"][past["real"]], order[order >= 0])
    np.testing.assert_array_equal(past["text"][past["real"]], arrays()["text"][order[order >= 0]])
    np.testing.assert_array_equal(batch["image"], loader.indices(step) * 100)


def test_it_is_a_function_of_seed_and_step() -> None:
    forward = [past_loader().past(step) for step in range(12)]
    backward = past_loader()
    for step in (11, 3, 7, 7, 0):
        np.testing.assert_array_equal(backward.past(step), forward[step])
    assert (past_loader(seed=1).past(11) != forward[11]).any()


def test_every_process_has_the_whole_past() -> None:
    whole = past_loader().batch(9)
    shares = [past_loader(process_index=i, process_count=2).batch(9) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate([share["caption"] for share in shares]), whole["caption"])
    for share in shares:
        jax.tree.map(np.testing.assert_array_equal, share["past"], whole["past"])


def test_the_past_of_mixed_batches_has_the_rows_of_both() -> None:
    (one, one_captions), (two, two_captions) = parts(), parts(9)
    mixed = MixedLoader(Loader(one, 3, seed=0), Loader(two, 1, seed=1))
    loader = PastLoader(mixed, MixedData(one_captions, two_captions), COUNT)
    past = loader.batch(8)["past"].arrays
    order = np.concatenate([mixed.batch(i)["caption"] for i in range(8)])[-COUNT:]
    np.testing.assert_array_equal(past["caption"], order)


def test_what_cannot_be_a_past_is_refused() -> None:
    whole, captions = parts()
    loader = Loader(whole, BATCH, seed=0)
    others: dict[str, Any] = {
        "A past of 0 rows": (captions, 0, {}),
        "cannot be of the 9 rows of captions": (parts(9)[1], COUNT, {}),
        "has no array 'other'": (ArrayDataset({"other": np.zeros(ROWS)}), COUNT, {}),
        "The name 'image' of the past is taken": (captions, COUNT, {"name": "image"}),
    }
    for message, (rows, count, options) in others.items():
        with pytest.raises(UserError, match=message):
            PastLoader(loader, rows, count, **options)


def test_captions_of_packed_images(tmp_path: Any) -> None:
    for number in range(5):
        write_png(tmp_path / "images" / f"{number}.png", number)
        (tmp_path / "images" / f"{number}.txt").write_text(f"picture {number % 3}")
    packed = pack_captions(open_captions(str(tmp_path / "images")), size=6, small_size=3, cache_dir=tmp_path / "cache")
    embedding = FunctionEmbedding(lambda captions: [[len(c), float(c[-1])] for c in captions], "last digits", 2)
    rows = embed_captions(packed, embedding, cache_dir=tmp_path / "cache")
    numbers = np.asarray([4, 0, 3])
    whole, captions = rows.rows(numbers), rows.captions.rows(numbers)
    assert captions.keys() == {"text", "caption", "id"}
    for name, found in captions.items():
        np.testing.assert_array_equal(found, whole[name])
    assert len(rows.captions) == 5
    assert rows.captions.content_hash == rows.content_hash
    past = PastLoader(Loader(rows, 2, seed=0), rows.captions, 3).batch(4)["past"]
    assert isinstance(past, Shared)
    assert past.arrays["text"].shape == (3, 2)
