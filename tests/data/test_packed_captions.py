"""Captioned images packed to arrays, embedded and read as a data set: rows, what is dropped, labels, the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_captions import pixels, png, write_png

from bilevel.data import (
    Captioned,
    CaptionRows,
    CaptionSource,
    FunctionEmbedding,
    JoinedData,
    Loader,
    PackedCaptions,
    RowView,
    caption_hash,
    embed_captions,
    images_in_both,
    labelled_captions,
    note_close_captions,
    open_captions,
    open_embedding,
    pack_captions,
    warn_of_shared_images,
)
from bilevel.data.captions import packed_captions as module
from bilevel.training import Resident
from bilevel.types import UserError

pytest.importorskip("PIL")
LETTERS = FunctionEmbedding(lambda texts: [[len(text), ord(text[0])] for text in texts], "letters", 2)
ITEMS = [
    Captioned("a", pixels(0, 8, 12), "dog", label=2),
    Captioned("b", png(1, height=12, width=8), "Cat"),
    Captioned("c", png(1)[:60], "torn"),
    Captioned("d", b"text", "no image"),
    Captioned("e", pixels(2, 8, 8)[..., :1], "dog"),
    Captioned("f", Path("/nowhere/x.png"), "gone"),
    Captioned("g", None, "nothing"),
    Captioned("h", pixels(3), ""),
    Captioned("i", pixels(0, 8, 12), "cat"),
]


def source_of(items: Sequence[Captioned] = ITEMS, name: str = "tiny", **fields: Any) -> CaptionSource:
    return CaptionSource(name, lambda: iter(items), lambda: repr(items), **fields)


def packed(folder: Path, items: Sequence[Captioned] = ITEMS, **options: Any) -> PackedCaptions:
    return pack_captions(source_of(items), cache_dir=folder, **{"size": 8, "small_size": 4, **options})


def embedded(folder: Path, items: Sequence[Captioned] = ITEMS, **options: Any) -> CaptionRows:
    return embed_captions(packed(folder, items, **options), LETTERS, cache_dir=folder)


def test_rows(tmp_path: Path) -> None:
    data = embedded(tmp_path)
    batch = data.rows(np.array([3, 0, 1]))
    found = {name: (str(array.dtype), array.shape) for name, array in batch.items()}
    assert found == {
        "image": ("uint8", (3, 8, 8, 3)), "text": ("float32", (3, 2)), "small": ("uint8", (3, 4, 4, 3)),
        "caption": ("int32", (3,)), "label": ("int32", (3,)), "id": ("int32", (3,)),
    }  # fmt: skip
    assert batch["id"].tolist() == [3, 0, 1]
    assert batch["label"].tolist() == [-1, 2, -1]
    assert batch["text"].tolist() == [[3, ord("c")], [3, ord("d")], [3, ord("C")]]
    np.testing.assert_array_equal(batch["image"][0], batch["image"][1])
    np.testing.assert_array_equal(batch["image"][1], pixels(0, 8, 12)[:, 2:10])  # the longer side is cut
    np.testing.assert_allclose(batch["small"].mean((1, 2)), batch["image"].mean((1, 2)), atol=12)
    assert [data.packed.text(row) for row in range(4)] == ["dog", "Cat", "dog", "cat"]
    assert data.packed.captions() == ["dog", "Cat", "cat"]
    assert data.packed.number.tolist() == [0, 1, 4, 8]


def test_equal_captions_have_one_number(tmp_path: Path) -> None:
    caption = embedded(tmp_path).rows(np.arange(4))["caption"]
    assert caption.tolist() == [caption_hash(text) for text in ("dog", "cat", "dog", "CAT")]
    assert len(set(caption.tolist())) == 2
    assert caption.min() >= 0


def test_grey_and_transparent_pixels(tmp_path: Path) -> None:
    transparent = np.full((8, 8, 4), (200, 100, 0, 0), np.uint8)
    data = packed(tmp_path, [Captioned("a", pixels(2, 8, 8)[..., :1], "grey"), Captioned("b", transparent, "clear")])
    grey, clear = data.images(np.arange(2))
    np.testing.assert_array_equal(grey, np.repeat(pixels(2, 8, 8)[..., :1], 3, axis=-1))
    assert np.unique(clear).tolist() == [128]


def test_what_is_dropped_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = packed(tmp_path)
    assert data.manifest["dropped"] == {"corrupt": 2, "missing": 2, "empty": 1}
    assert (data.manifest["row_count"], data.manifest["image_count"], data.manifest["caption_count"]) == (4, 9, 3)
    said = (
        "5 of 9 images of tiny are dropped: 2 corrupt, 2 missing, 1 without a caption; c, d, f, g, h, all named in "
        f"{data.folder / 'dropped.tsv'}."
    )
    assert data.dropped() == said
    assert capsys.readouterr().err == f"note: {said}\n"
    lines = [line.split("\t") for line in (data.folder / "dropped.tsv").read_text().splitlines()]
    assert [line[:2] for line in lines] == [
        ["corrupt", "c"],
        ["corrupt", "d"],
        ["missing", "f"],
        ["missing", "g"],
        ["empty", "h"],
    ]
    assert "d is not a sound image (of no known kind)" in lines[1][2]
    assert lines[2][2] == "/nowhere/x.png does not exist"
    assert packed(tmp_path, ITEMS[:2]).dropped() == ""


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "tiny holds no images; give data that are not empty .--data.generic, --data.specific"),
        (ITEMS[2:4], "none of the 2 images can be used, 2 are corrupt .the first is c: .*; .* --data.image-column"),
        (ITEMS[5:7], "2 are missing .the first is f: /nowhere/x.png does not exist.; name the paths with --data.image-column"),
        (ITEMS[7:8], "1 are empty .the first is h: no caption.; name the captions with --data.caption-column"),
        ([Captioned("a", np.zeros((4, 4, 2), np.uint8), "two")], "1 are corrupt .the first is a: a has 2 channels instead of"),
    ],
)  # fmt: skip
def test_nothing_left(tmp_path: Path, items: list[Captioned], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        packed(tmp_path, items)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8, "small_size": 9}, "--data.size is 8 and --data.small-size 9"),
        ({"small_size": 0}, "--data.small-size 0"),
        ({"decode": "twice"}, "--data.decode 'twice' is not known; give once or each_time"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed(tmp_path, **options)


def test_large_images_are_decoded_each_time(tmp_path: Path) -> None:
    once, each = (embedded(tmp_path, decode=decode) for decode in ("once", "each_time"))
    assert once.content_hash == each.content_hash
    assert not (each.packed.folder / "image.npy").exists()
    indices = np.array([2, 0, 3, 0, 1])
    for name, array in once.rows(indices).items():
        np.testing.assert_array_equal(array, each.rows(indices)[name], err_msg=name)
    assert each.packed.images(np.array([], np.int64)).shape == (0, 8, 8, 3)


def test_small_rows_are_read_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = embedded(tmp_path, decode="each_time")
    whole = data.rows(np.array([3, 1]))
    monkeypatch.setattr(module, "decode_picture", None)
    found = data.small.rows(np.array([3, 1]))
    assert set(found) == {"small", "caption", "label", "id"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, whole[name])
    assert (len(data.small), data.small.name, data.small.content_hash) == (4, "tiny", data.content_hash)


def test_loaders_views_and_joined_data_take_it(tmp_path: Path) -> None:
    data, other = embedded(tmp_path), embedded(tmp_path, ITEMS[:2])
    assert Loader(data, 3, seed=0).batch(1)["image"].shape == (3, 8, 8, 3)
    joined = JoinedData({"generic": RowView(data, np.array([1, 3])), "specific": other})
    assert joined.rows(np.arange(4))["label"].tolist() == [-1, -1, 2, -1]
    table, _ = Resident(Loader(data, 3, seed=0), Loader(other, 1, seed=0)).item(0, 1, 1).arguments[0][0]
    for name, array in data.rows(np.arange(4)).items():
        if name != "id":
            np.testing.assert_array_equal(np.asarray(table[name]), array)
    small = JoinedData({"generic": data.small, "specific": other.small})
    assert small.rows(np.array([5]))["caption"].tolist() == [caption_hash("cat")]


def test_the_cache(tmp_path: Path) -> None:
    reads: list[int] = []

    def read() -> Any:
        reads.append(1)
        return iter(ITEMS)

    def again(size: int = 8, small_size: int = 4) -> PackedCaptions:
        source = CaptionSource("tiny", read, lambda: "key")
        return pack_captions(source, size=size, small_size=small_size, cache_dir=tmp_path)

    first = again()
    assert again().content_hash == first.content_hash
    assert len(reads) == 1
    again(size=9)
    again(small_size=3)
    assert len(reads) == 3
    (first.folder / "label.npy").unlink()
    with pytest.raises(UserError, match=r"of packed images is damaged \(FileNotFoundError"):
        PackedCaptions.open(first.folder)
    assert again().label.tolist() == [2, -1, -1, -1]
    manifest = json.loads((first.folder / "manifest.json").read_text())
    (first.folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))
    with pytest.raises(UserError, match="its format version is 0"):
        PackedCaptions.open(first.folder)


def test_the_content_hash_tells_what_is_in_the_rows(tmp_path: Path) -> None:
    """Pixels, captions and classes count; where they stood, and what was dropped between them, do not."""
    kept = [item for item in ITEMS if item.where in "abei"]
    moved = [item._replace(where="elsewhere") for item in kept]
    same = {packed(tmp_path, items).content_hash for items in (ITEMS, kept, moved)}
    assert len(same) == 1
    for change in ({"caption": "cats"}, {"label": 3}, {"picture": pixels(9, 8, 12)}):
        other = [*kept[:3], kept[3]._replace(**change)]
        assert packed(tmp_path, other).content_hash not in same, change
    half = embed_captions(packed(tmp_path), LETTERS, text_type="float16", cache_dir=tmp_path)
    assert half.content_hash != embedded(tmp_path).content_hash


def test_many_blocks(tmp_path: Path) -> None:
    items = [Captioned(str(n), pixels(n % 7, 4, 4), f"caption {n % 300}", label=n) for n in range(700)]
    data = packed(tmp_path, items, size=4, small_size=4)
    assert data.label.tolist() == list(range(700))
    assert [data.text(row) for row in (0, 299, 300, 699)] == ["caption 0", "caption 299", "caption 0", "caption 99"]
    assert len(data.captions()) == 300
    np.testing.assert_array_equal(data.images(np.array([600])), pixels(600 % 7, 4, 4)[None])


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text("".join(f"{d}\t{f}\n" for d, f in zip("xyxxzxxxy", "....w....", strict=True)))
    data = pack_captions(
        labelled_captions(source_of(), tmp_path / "labels.tsv"), size=8, small_size=8, cache_dir=tmp_path
    )
    assert data.labels["domain"].names == ("x", "y", "z")
    assert data.labels["domain"].values.tolist() == [0, 1, 2, 1]
    assert data.labels["fault"].names == (".", "w")
    assert data.labels["fault"].values.tolist() == [0, 0, 1, 0]


def test_corrupt_files_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "img"
    for number in range(3):
        write_png(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"number {number}")
    (folder / "1.png").write_bytes(png(1)[:50])
    data = pack_captions(open_captions(str(folder)), size=4, small_size=2, cache_dir=tmp_path / "cache")
    assert [data.text(row) for row in range(len(data))] == ["number 0", "number 2"]
    assert data.dropped().startswith(f"1 of 3 images of {folder} are dropped: 1 corrupt; {folder}/1.png, all named in")


def test_shared_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = packed(tmp_path, ITEMS[:2])
    other = packed(tmp_path, [Captioned("x", pixels(5), "dog"), ITEMS[0]._replace(caption="another")])
    assert images_in_both(one, other).tolist() == [False, True]
    warn_of_shared_images([one], {"test": other, "valid": packed(tmp_path, [Captioned("x", pixels(5), "dog")])})
    assert capsys.readouterr().err == (
        "warning: 1 of 2 images of tiny are also in tiny: remove them from one of the two, or the test loss is too good.\n"
    )


# -- embeddings --------------------------------------------------------------------------------------------------------

CAPTIONS = ["a red dog", "a blue dog", "a red cat", "the small letter b", "the small letter c", "blue sea", "the sea"]


def test_lsa(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    lsa = open_embedding("lsa", CAPTIONS, dimensions=5, cache_dir=tmp_path)
    found = lsa(["a red dog", "A RED DOG!", "dog red", "the small letter b", "the small letter c", "unknown words", ""])
    assert (found.shape, found.dtype, lsa.dimensions) == ((7, 5), np.float32, 5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 1, 1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])
    alike = found @ found.T
    assert alike[0, 2] > 0.8 > alike[0, 3]
    whole = open_embedding("lsa", CAPTIONS, dimensions=6, cache_dir=tmp_path)(CAPTIONS)
    assert whole[3] @ whole[4] < 0.99  # single letters count
    kept = open_embedding("lsa", CAPTIONS, dimensions=5, cache_dir=tmp_path)
    assert kept.fingerprint == lsa.fingerprint
    np.testing.assert_array_equal(kept(CAPTIONS), lsa(CAPTIONS))
    assert open_embedding("lsa", CAPTIONS[:6], dimensions=4, cache_dir=tmp_path).fingerprint != lsa.fingerprint


def test_lsa_counts_each_image(tmp_path: Path) -> None:
    """A caption that stands three times counts as three captions: words of frequent captions are kept, rare ones lost."""
    pytest.importorskip("sklearn")
    counts = np.asarray([3, 1, 1, 40, 40, 1, 2])
    repeated = [caption for caption, count in zip(CAPTIONS, counts, strict=True) for _ in range(count)]
    often, alike = (open_embedding("lsa", c, dimensions=3, cache_dir=tmp_path)(CAPTIONS) for c in (repeated, CAPTIONS))
    counted = open_embedding("lsa", CAPTIONS, counts=counts, dimensions=3, cache_dir=tmp_path)(CAPTIONS)
    np.testing.assert_allclose(counted @ counted.T, often @ often.T, atol=1e-4)
    assert counted[3] @ counted[4] < 0.95, "the letters b and c are told apart"
    assert not np.allclose(counted @ counted.T, alike @ alike.T, atol=0.1)


def test_lsa_is_tfidf_projected_on_singular_vectors(tmp_path: Path) -> None:
    """Compare with a dense singular value decomposition of the written-out TF-IDF matrix."""
    pytest.importorskip("sklearn")
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    counts = np.array([[caption.split().count(word) for word in words] for caption in CAPTIONS], float)
    tf = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
    matrix = tf * (np.log((1 + len(CAPTIONS)) / (1 + (counts > 0).sum(0))) + 1)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    expected = matrix @ np.linalg.svd(matrix)[2][:3].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = open_embedding("lsa", CAPTIONS, dimensions=3, cache_dir=tmp_path)(CAPTIONS)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_captions_that_no_model_tells_apart_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"a": (1.0, 0.0), "b": (0.0, 2.0), "c": (0.01, 3.0), "d": (0.0, 0.0)}
    known = FunctionEmbedding(lambda texts: [rows[text] for text in texts], "known", 2)
    note_close_captions(["a", "b", "d"], known)
    assert capsys.readouterr().err == ""
    note_close_captions(["a", "b", "c", "d"], known)
    said = capsys.readouterr().err
    assert said.startswith("note: 1 of 6 pairs of captions have nearly the same vector by known (a cosine above 0.99)")
    assert "such as 'b' and 'c'; raise --data.text-dimensions" in said


def vectors(
    path: Path, captions: Any = ("dog", "Cat", "cat"), embeddings: Any = ((1, 2), (3, 4), (5, 6)), **more: Any
) -> str:
    np.savez(path, captions=np.array(captions), embeddings=np.array(embeddings, np.float64), **more)
    return str(path)


def test_vectors_from_a_file(tmp_path: Path) -> None:
    embedding = open_embedding(vectors(tmp_path / "e.npz"), [], cache_dir=tmp_path)
    data = embed_captions(packed(tmp_path), embedding, text_type="float16", cache_dir=tmp_path)
    batch = data.rows(np.arange(4))
    assert batch["text"].dtype == np.float16
    assert batch["text"].tolist() == [[1, 2], [3, 4], [1, 2], [5, 6]]
    assert embedding([" dog "]).tolist() == [[1, 2]]
    with pytest.raises(UserError, match=r"e.npz has no vector for 1 of 2 captions, such as 'mouse'; add them, or give"):
        embedding(["dog", "mouse"])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: str(p / "gone.npz"), "--data.embedding .*gone.npz does not exist; give lsa, or a .npz file"),
        (lambda p: "word2vec", "--data.embedding word2vec does not exist"),
        (lambda p: vectors(p / "e.npz", embeddings=[[1.0], [np.nan], [1]]), "e.npz of caption 1 is not finite"),
        (lambda p: vectors(p / "e.npz", captions=["a"]), r"gives float64\[3, 2\] for 1 captions; it must give numbers \[1, 2\]"),
        (lambda p: vectors(p / "e.npz", captions=[1, 2, 3]), r"captions are int64\[3\] and embeddings float64\[3, 2\]"),
    ],
)  # fmt: skip
def test_bad_files_of_vectors(tmp_path: Path, write: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_embedding(write(tmp_path), ["dog"], cache_dir=tmp_path)
    np.savez(tmp_path / "other.npz", captions=np.array(["a"]))
    with pytest.raises(UserError, match=r"other\.npz holds captions, but no array 'embeddings'"):
        open_embedding(str(tmp_path / "other.npz"), [], cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("captions", "dimensions", "message"),
    [
        (
            CAPTIONS,
            7,
            "7 captions of 11 different words are too few for 7 dimensions; give --data.text-dimensions 6 or less",
        ),
        (CAPTIONS, 0, "--data.text-dimensions is 0"),
        (["!", "?"], 1, "The 2 generic captions hold no words .*; check --data.caption-column"),
    ],
)
def test_captions_that_are_too_few(tmp_path: Path, captions: list[str], dimensions: int, message: str) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(UserError, match=message):
        open_embedding("lsa", captions, dimensions=dimensions, cache_dir=tmp_path)


def test_functions_that_return_other_shapes(tmp_path: Path) -> None:
    wrong = FunctionEmbedding(lambda texts: np.zeros((len(texts), 3)), "wrong", 2)
    with pytest.raises(
        UserError, match=r"embedding wrong gives float64\[3, 3\] for 3 captions; it must give numbers \[3, 2\]"
    ):
        embed_captions(packed(tmp_path), wrong, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"--data\.text-type 'int8' is not known"):
        embed_captions(packed(tmp_path), LETTERS, text_type="int8", cache_dir=tmp_path)  # pyright: ignore[reportArgumentType]


def test_vectors_are_computed_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def function(texts: Sequence[str]) -> Any:
        asked.append(len(texts))
        return [[1.0]] * len(texts)

    embedding = FunctionEmbedding(function, "constant", 1)
    for _ in range(2):
        embed_captions(packed(tmp_path), embedding, cache_dir=tmp_path)
    assert asked == [3]
    folder = next(tmp_path.glob("caption-vectors-*"))
    assert json.loads((folder / "manifest.json").read_text())["shape"] == [3, 1]
    np.save(folder / "texts.npy", np.zeros((2, 1), np.float32))
    assert embed_captions(packed(tmp_path), embedding, cache_dir=tmp_path).texts.tolist() == [[1.0]] * 3
    assert asked == [3, 3]
