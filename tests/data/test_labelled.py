"""Labelled data: every kind of source, and sets that are disjoint by the stated rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import bilevel
from bilevel.data import ArrayDataset, LabelledData, Loader, channel_statistics, open_labelled
from bilevel.data.labelled import corruption
from bilevel.nn.augment import preparation
from bilevel.nn.classification import classification_loss, init_variables
from bilevel.nn.small import MLP
from bilevel.types import UserError

pytest.importorskip("PIL")
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def pixels(number: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3)).astype(np.uint8)


def rows_of(data: LabelledData, part: str) -> list[int]:
    return getattr(data, part).arrays["source_row"].tolist()


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def png_folder(folder: Path, **counts: int) -> Path:
    """`counts[part]` images of each class; their contents are numbered through."""
    number = 0
    for part, count in counts.items():
        for name in CLASSES:
            for i in range(count):
                write_png(folder / part / name / f"{i:03}.png", pixels(number))
                number += 1
    return folder


def table(rows: int, first: int = 0) -> dict[str, Any]:
    features = np.arange(first, first + rows, dtype=np.float64)[:, None] * [1.0, -1.0]
    return {"features": features, "label": np.arange(rows, dtype=np.uint8) % 3}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# The rule.


def test_digits_are_the_default() -> None:
    pytest.importorskip("sklearn")
    data = open_labelled()
    image = data.train.arrays["image"]
    assert (image.dtype, image.shape[1:], image.max()) == (np.uint8, (8, 8, 1), 255)
    assert data.train.arrays["label"].dtype == np.int32
    assert data.num_classes == len(data.class_names) == 10
    assert data.held_out is None
    parts = {part: rows_of(data, part) for part in ("train", "specific", "test")}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(1797))
    assert (len(parts["test"]), len(parts["specific"])) == (359, 180)
    assert [getattr(data, part).name for part in parts] == [f"sklearn:digits ({part})" for part in parts]
    assert data.rule == (
        "of the 1797 rows of sklearn:digits (train) (in a random order of seed 0) the last 359 are test, "
        "before test 180 are specific, the other 1258 are train"
    )
    batch = data.specific.rows(np.array([5, 0]))
    assert set(batch) == {"image", "label", "source_row", "id"}


def test_random_sets_depend_on_the_seed_alone(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", **table(100))
    first, again, other = (open_labelled(str(file), seed=seed) for seed in (1, 1, 2))
    assert rows_of(first, "specific") == rows_of(again, "specific") != rows_of(other, "specific")
    for part in ("train", "specific", "test"):
        rows, features = rows_of(first, part), getattr(first, part).arrays["features"]
        assert rows == sorted(rows)
        assert features[:, 0].tolist() == rows
        assert features.dtype == np.float32
    assert first.train.content_hash == again.train.content_hash != other.train.content_hash


def test_the_last_rows(tmp_path: Path) -> None:
    """DDS, appendix A.4: of the first 4,000 images the last 400 are the specific set; here 40 and 4."""
    for name, rows in (("train", 100), ("test", 20)):
        save(tmp_path / f"small_{name}.npz", **table(rows))
    data = open_labelled(str(tmp_path / "small"), split="last", limit=40, specific=0.1, held_out=6)
    assert rows_of(data, "specific") == list(range(36, 40))
    assert rows_of(data, "held_out") == list(range(30, 36))
    assert rows_of(data, "train") == list(range(30))
    assert rows_of(data, "test") == list(range(20))
    assert data.rule == (
        f"of the 40 rows of {tmp_path}/small (first rows of train) the last 4 are specific, "
        "before specific 6 are held out, the other "
        f"30 are train; all 20 rows of {tmp_path}/small (test) are test"
    )


def test_a_validation_part_is_not_mixed_with_train(tmp_path: Path) -> None:
    for name, rows in (("train", 30), ("valid", 20), ("test", 10)):
        save(tmp_path / f"{name}.npz", **table(rows, first=1000 * len(name)))
    data = open_labelled(str(tmp_path), specific=4)
    assert rows_of(data, "train") == list(range(30))
    assert data.held_out is not None
    assert sorted(rows_of(data, "specific") + rows_of(data, "held_out")) == list(range(20))
    assert len(data.specific) == 4
    for part in (data.specific, data.held_out):
        assert (part.arrays["features"][:, 0] - 5000).tolist() == part.arrays["source_row"].tolist()
    less = open_labelled(str(tmp_path), specific=4, held_out=0.5)
    assert less.held_out is not None
    assert len(less.held_out) == 10
    assert not set(rows_of(less, "specific")) & set(rows_of(less, "held_out"))
    assert open_labelled(str(tmp_path), specific=20).held_out is None
    none = open_labelled(str(tmp_path), specific=4, held_out=0)
    assert (none.held_out, len(none.specific), len(none.train)) == (None, 4, 30)


def test_transform(tmp_path: Path) -> None:
    data = open_labelled(str(save(tmp_path / "a.npz", **table(300))), held_out=0.2)
    noisy = data.transform(lambda a: corruption.uniform_noise(a, 1.0, num_classes=3, seed=0), "train")
    assert noisy.train.arrays["corrupted"].all()
    assert noisy.train.name == data.train.name
    assert noisy.specific is data.specific
    half = data.transform(lambda a: corruption.only_classes(a, [1]), "specific", "held_out", "test")
    assert half.held_out is not None
    assert all(set(part.arrays["label"].tolist()) == {1} for part in (half.specific, half.held_out, half.test))


# Kinds of sources.


def test_one_archive_with_all_parts(tmp_path: Path) -> None:
    x, y = np.stack([pixels(i) for i in range(30)]), np.arange(30)[:, None] % 3  # labels [N, 1], as Keras has them
    file = save(tmp_path / "keras.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:, ..., 0], y_test=y[20:])
    with pytest.raises(UserError, match=r"parts have the shapes \[4, 4, 1\] and \[4, 4, 3\]; give"):
        open_labelled(str(file))
    file = save(tmp_path / "keras.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
    data = open_labelled(str(file))
    np.testing.assert_array_equal(data.test.arrays["image"], x[20:])
    assert data.test.arrays["label"].tolist() == [i % 3 for i in range(20, 30)]
    assert (len(data.train), len(data.specific), data.num_classes) == (18, 2, 3)
    with pytest.raises(
        UserError, match=r"holds x_train, whose labels are y_train; leave label='kind' \(--data\.label\) out"
    ):
        open_labelled(str(file), label="kind")


def test_grey_images_and_features(tmp_path: Path) -> None:
    grey = np.arange(40 * 6, dtype=np.uint8).reshape(40, 2, 3)
    data = open_labelled(str(save(tmp_path / "grey.npz", images=grey, labels=np.arange(40) % 2)))
    assert data.train.arrays["image"].shape == (28, 2, 3, 1)
    pytest.importorskip("sklearn")
    wine = open_labelled("sklearn:wine")
    assert wine.train.arrays["features"].shape[1] == 13
    assert wine.class_names == ("class_0", "class_1", "class_2")


def test_folder_of_images(tmp_path: Path) -> None:
    folder, cache = png_folder(tmp_path / "cinic", train=4, valid=3, test=2), tmp_path / "cache"
    with pytest.raises(
        UserError, match=r"is a folder of images, labelled by their folders; leave label='kind' \(--data\.label\) out"
    ):
        open_labelled(str(folder), label="kind", cache_dir=cache)
    data = open_labelled(str(folder), specific=3, cache_dir=cache)
    assert data.class_names == CLASSES
    assert data.train.arrays["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(data.train.arrays["image"], np.stack([pixels(i) for i in range(12)]))
    np.testing.assert_array_equal(data.test.arrays["image"][-1], pixels(26))
    assert data.held_out is not None
    assert (len(data.specific), len(data.held_out)) == (3, 6)
    kept = sorted(cache.iterdir())
    assert len(kept) == 3
    manifest = json.loads((kept[0] / "manifest.json").read_text())
    assert manifest["shape"] == [4, 4, 3]
    assert set(manifest) == {"format_version", "source", "rows", "shape", "content_hash"}

    write_png(folder / "train" / "bee" / "000.png", pixels(99))  # another content, another entry in the cache
    again = open_labelled(str(folder), specific=3, cache_dir=cache)
    np.testing.assert_array_equal(again.train.arrays["image"][4], pixels(99))
    assert len(list(cache.iterdir())) == 4


def test_the_cache_is_used_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = png_folder(tmp_path / "set", train=3, test=1), tmp_path / "cache"
    first = open_labelled(str(folder), specific=1, split="last", cache_dir=cache)
    array: Any = first.train.arrays["image"]
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    assert array is not None  # rows are read from the disk when they are used
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        again = open_labelled(str(folder), specific=1, split="last", cache_dir=cache)
    assert again.train.content_hash == first.train.content_hash
    for entry in cache.iterdir():
        (entry / "image.npy").write_bytes(b"damaged")
    repaired = open_labelled(str(folder), specific=1, split="last", cache_dir=cache)
    assert repaired.train.content_hash == first.train.content_hash


def test_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for part in ("train", "test"):
        for i in range(4):
            write_png(folder / part / "a" / f"{i}.png", np.full((4 + 2 * i, 6, 3), 10 * i, np.uint8))
    with pytest.raises(
        UserError, match=r"1\.png has the shape \[6, 6, 3\], but .*0\.png \[4, 6, 3\]; give a size .--data\.size."
    ):
        open_labelled(str(folder), cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    data = open_labelled(str(folder), size=5, specific=1, split="last", cache_dir=tmp_path / "cache")
    assert data.train.arrays["image"].shape == (3, 5, 5, 3)
    assert data.train.arrays["image"][:, 2, 2, 0].tolist() == [0, 10, 20]


def test_jpeg_files_end_to_end(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, count in (("train", 6), ("test", 3)):
        files = []
        for i in range(count):
            file = BytesIO()
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        blob = np.frombuffer(b"".join(files), np.uint8)
        save(tmp_path / f"cifar_{name}_jpeg.npz", jpeg=blob, offsets=offsets, labels=np.arange(count, dtype=np.uint8))
    data = open_labelled(str(tmp_path / "cifar"), specific=1, split="last", cache_dir=cache)
    assert np.abs(data.train.arrays["image"][:, 4, 4, 0].astype(int) - [0, 20, 40, 60, 80]).max() <= 2
    assert data.train.arrays["label"].tolist() == [0, 1, 2, 3, 4]
    assert len(open_labelled(str(tmp_path), specific=1, cache_dir=cache).train) == 5  # the only data set of the folder
    with pytest.raises(UserError, match="holds jpeg, offsets, labels; name the labels one of kind"):
        open_labelled(str(tmp_path / "cifar"), label="kind", cache_dir=cache)
    with np.load(tmp_path / "cifar_test_jpeg.npz") as stored:
        save(tmp_path / "cifar_test_jpeg.npz", **{**stored, "offsets": stored["offsets"][:-1]})
    with pytest.raises(UserError, match="`offsets` must rise"):
        open_labelled(str(tmp_path / "cifar"), cache_dir=cache)
    for labels, message in (
        (np.full(3, -1), "labels run from -1 to -1"),
        (np.ones(3) / 2, "labels are float64"),
        (np.full(3, "cat"), "labels holds text; beside JPEG files, number the classes from 0"),
    ):
        save(tmp_path / "cifar_test_jpeg.npz", jpeg=blob, offsets=offsets, labels=labels)
        with pytest.raises(UserError, match=message):
            open_labelled(str(tmp_path / "cifar"), cache_dir=cache)


_BUILD = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(number):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return io.BytesIO(file.getvalue())

class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            "title": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(5)}

    def _generate_examples(self, count, hidden=False):
        for number in range(count):
            yield number, {"image": png(number), "label": -1 if hidden else number % 3, "title": "a"}

class HiddenTest(TinyImages):
    def _split_generators(self, manager):
        splits = super()._split_generators(manager)
        return {"train": splits["train"], "validation": splits["test"], "test": self._generate_examples(4, hidden=True)}

class HiddenTrain(TinyImages):
    def _split_generators(self, manager):
        return {"train": self._generate_examples(4, hidden=True), "test": self._generate_examples(4)}

for builder in (TinyImages, HiddenTest, HiddenTrain):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_tensorflow_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorflow_datasets")
    subprocess.run([sys.executable, "-c", _BUILD, str(tmp_path / "tfds")], check=True, capture_output=True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    had_tensorflow = "tensorflow" in sys.modules
    data = open_labelled("tfds:tiny_images", specific=2, split="last", cache_dir=tmp_path / "cache")
    assert data.class_names == CLASSES
    assert (len(data.train), len(data.specific), len(data.test)) == (10, 2, 5)
    image, label = data.test.arrays["image"], data.test.arrays["label"]
    assert image.shape == (5, 4, 4, 3)
    np.testing.assert_array_equal(image[:, 1, 2, 0] % 3, label)  # records come in an order of their own
    assert sorted(image[:, 0, 0, 0].tolist()) == list(range(5))
    assert (
        open_labelled("tfds:tiny_images:1.0.0", size=2, cache_dir=tmp_path / "cache").test.arrays["image"].shape[1] == 2
    )
    assert ("tensorflow" in sys.modules) == had_tensorflow
    with pytest.raises(UserError, match="come with all their splits; write tfds:NAME"):
        open_labelled("tfds:tiny_images:test", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="no data set 'tiny_image'"):
        open_labelled("tfds:tiny_image", cache_dir=tmp_path / "cache")
    hidden = open_labelled("tfds:hidden_test", specific=2, cache_dir=tmp_path / "cache")  # as that of ImageNet
    assert (len(hidden.train), len(hidden.specific), len(hidden.test)) == (10, 2, 5)
    assert hidden.rule.endswith("all 5 rows of tfds:hidden_test (validation) are test")
    assert sorted(set(hidden.test.arrays["label"].tolist())) == [0, 1, 2]
    with pytest.raises(UserError, match=r"tfds:hidden_train \(train\): the labels run from -1 to -1; number"):
        open_labelled("tfds:hidden_train", cache_dir=tmp_path / "cache")


def test_channel_statistics() -> None:
    image = np.stack([pixels(i) for i in range(50)])
    mean, std = channel_statistics(ArrayDataset({"image": image}))
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)) / 255, rtol=1e-6)
    np.testing.assert_allclose(std, image.std((0, 1, 2)) / 255, rtol=1e-6)
    with pytest.raises(UserError, match=r"no array 'image' \(x\)"):
        channel_statistics(ArrayDataset({"x": image}))
    with pytest.raises(UserError, match="same value everywhere"):
        channel_statistics(ArrayDataset({"image": np.ones((2, 2, 2, 1), np.uint8)}))


def test_digits_are_learned() -> None:
    """From the source to the loss: rows, normalisation and labels belong together."""
    pytest.importorskip("sklearn")
    data = open_labelled()
    prepare = preparation(*channel_statistics(data.train), padding=1, flip=False)
    module = MLP(hidden=(64,))
    params, _ = jax.jit(lambda: init_variables(module, jax.random.key(0), (8, 8, 1)))()
    train = bilevel.make_step(
        classification_loss(module, prepare=prepare), None, optax.adam(1e-2), None, bilevel.uniform(), batch_size=64
    )
    state, step, loader = train.init(jax.random.key(1), params), jax.jit(train.step), Loader(data.train, 64, seed=0)
    for i in range(120):
        state, _ = step(state, loader.batch(i), data.specific.rows(np.arange(4)))
    still = preparation(*channel_statistics(data.train), augment=False)
    evaluate = jax.jit(classification_loss(module, train=False, prepare=still))
    _, aux = evaluate(state.params, {}, data.test.rows(np.arange(len(data.test))), jax.random.key(0))
    assert aux.metrics["correct"].mean() > 0.9


@pytest.mark.slow
@pytest.mark.data
def test_real_images_and_human_labels(tmp_path: Path) -> None:
    folder = Path(os.environ.get("BILEVEL_DATA", "")) / "image"
    if not os.environ.get("BILEVEL_DATA") or not (folder / "cifar10_train_jpeg.npz").exists():
        pytest.skip("BILEVEL_DATA does not name a folder with image/cifar10_train_jpeg.npz")
    with pytest.raises(UserError, match=r"several data sets \(cifar10, mnist\); name one"):
        open_labelled(str(folder))
    mnist = open_labelled(str(folder / "mnist"))
    assert (mnist.test.arrays["image"].shape, mnist.test.arrays["label"][0]) == ((10_000, 28, 28, 1), 7)
    data = open_labelled(str(folder / "cifar10"), specific=640, split="last", cache_dir=tmp_path)
    assert (len(data.train), len(data.specific), len(data.test), data.num_classes) == (49_360, 640, 10_000, 10)
    mean, std = channel_statistics(data.train)
    np.testing.assert_allclose([*mean, *std], [0.4913, 0.4821, 0.4465, 0.2452, 0.2428, 0.2606], atol=5e-4)
    names = folder / "cifar10n_train_labels.npz"
    for split in ("last", "random"):
        rows = open_labelled(str(folder / "cifar10"), split=split, cache_dir=tmp_path).train.arrays
        worse = corruption.recorded_labels(rows, names, "worse_label", num_classes=10)
        assert abs(worse["corrupted"].mean() - 0.402) < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "first"}, "split='first' is not known"),
        ({"seed": -1}, "seed is -1"),
        ({"limit": 0}, "limit=0 is not possible"),
        ({"size": 0}, "size=0 is not possible"),
        ({"size": 8}, "holds arrays, which are not resized; leave size=8 .--data.size. out"),
        ({"specific": 0}, "specific=0 is not a number of its 30 rows"),
        ({"specific": 2.5}, "specific=2.5 is not a number"),
        ({"specific": 0.001}, "specific=0.001 is not a number"),
        (
            {"specific": 25},
            "30 rows are too few for test=0.2, specific=25; ask for fewer .--data.test, --data.specific-rows.",
        ),
        (
            {"specific": 24},
            "test, specific take all 30 rows; leave some to train on .--data.test, --data.specific-rows.",
        ),
    ],
)
def test_impossible_wishes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    file = save(tmp_path / "a.npz", **table(30))
    with pytest.raises(UserError, match=message):
        open_labelled(str(file), **options)


def test_bad_sources(tmp_path: Path) -> None:
    def fails(spec: Path | str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_labelled(str(spec), cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)

    label = np.zeros(3, int)
    fails(" ", "specification .--data.source. is empty; give")
    fails("sklearn:faces", "sklearn:faces.* is not known; the sources of this kind are sklearn:digits")
    fails(tmp_path / "missing", "no labelled data at .*missing")
    fails(tmp_path, "holds no labelled data; give a .npz, .csv or .parquet file, a folder")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "broken.npz").write_text("text")
    fails(tmp_path / "a.txt", r"a\.txt is not a \.npz, \.csv or \.parquet file")
    fails(tmp_path / "broken.npz", r"broken\.npz cannot be read as a \.npz file")
    fails(save(tmp_path / "b.npz", foo=label), "holds foo; name the inputs one of image, images")
    fails(save(tmp_path / "c.npz", x_train=np.zeros((3, 2))), "holds x_train but no y_train; add the labels")
    for name, arrays, message in (
        ("float images", {"x": np.zeros((3, 2, 2, 1)), "y": label}, "float64.3, 2, 2, 1.; give images uint8"),
        ("too few", {"x": np.zeros((4, 2)), "y": label}, "the labels int64.3.; give as many of each"),
        ("negative", {"x": np.zeros((3, 2)), "y": label - 1}, "labels run from -1 to -1; number the classes from 0"),
        (
            "real labels",
            {"x": np.zeros((3, 2)), "y": label / 2},
            "labels are float64.3.; give integers from 0, or text",
        ),
        ("not finite", {"x": np.array([[1.0], [np.nan], [0]]), "y": label}, "features of row 1 are not finite"),
        ("none", {"x": np.zeros((0, 2)), "y": label[:0]}, "holds no rows"),
        (
            "first",
            {"x": np.zeros((3, 3, 8, 8), np.uint8), "y": label},
            r"\[3, 8, 8\] look as if the channels came first",
        ),
        ("no pixels", {"x": np.zeros((3, 0, 8, 1), np.uint8), "y": label}, "give images uint8"),
        ("ids", {"x": np.zeros((3, 2)), "y": label + 400_000_000}, "labels run up to 400000000, but there are 3 rows"),
        ("blank", {"x": np.zeros((3, 2)), "y": np.asarray(["a", " ", "b"])}, "row 1 has no label; leave such rows out"),
    ):
        fails(save(tmp_path / f"{name}.npz", **arrays), message)
    folder = png_folder(tmp_path / "set", train=2, test=1)
    (folder / "test" / "bee" / "000.png").write_bytes(b"no image")
    fails(folder, "000.png is not a sound image")
    write_png(folder / "test" / "dog" / "000.png", pixels(0))
    fails(folder, "class 'dog' that train has not")


@pytest.mark.parametrize(("package", "spec"), [("sklearn", "sklearn:digits"), ("PIL", "folder")])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    target = spec if ":" in spec else str(tmp_path / spec)
    (tmp_path / "folder" / "train" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "train" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'bilevel\[experiments\]'"):
        open_labelled(target, cache_dir=tmp_path / "cache")
