"""Captioned images from every kind of source, whole and in parts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_captions import pixels, png, read, write_png

from bilevel.data import (
    CaptionColumns,
    captions_of_labels,
    labelled_captions,
    open_captions,
    open_labelled,
    open_specific_captions,
    pack_captions,
    parts_by_class,
)
from bilevel.data.labelled.corruption import recorded_labels
from bilevel.types import UserError

pytest.importorskip("PIL")
CAPTIONS = ["a red dog", 'two "cats", asleep', "ένα σπίτι"]


def refused(message: str, spec: Path | str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(open_captions(str(spec), **options))
    assert "\n" not in str(caught.value)


def split_refused(message: str, spec: Path | str, **options: Any) -> None:
    def opened() -> None:
        parts = open_specific_captions(str(spec), **options)
        for source in (parts.train, parts.valid, *parts.test.values()):
            read(source)

    with pytest.raises(UserError, match=message) as caught:
        opened()
    assert "\n" not in str(caught.value)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write three images."""
    for number in range(3):
        write_png(tmp_path / "img" / f"{number}.png", number)
    return tmp_path


EXPECTED = [(png(number), caption, "", -1) for number, caption in enumerate(CAPTIONS)]


def write_table(path: Path, names: tuple[str, str], extra: dict[str, Any] | None = None) -> Path:
    """Write a table of the three images and captions, with columns called so."""
    rows = [
        {names[0]: f"img/{number}.png", names[1]: caption, **(extra or {})} for number, caption in enumerate(CAPTIONS)
    ]
    text = io.StringIO()
    if ".json" in path.name:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    elif ".tsv" in path.name:
        text.write("\t".join(rows[0]) + "\n" + "".join("\t".join(map(str, row.values())) + "\n" for row in rows))
    else:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("names", [("image", "caption"), ("file_name", "text"), ("Path", "Title")])
def test_tables_of_paths(images: Path, name: str, names: tuple[str, str]) -> None:
    table = write_table(images / name, names, {"width": 6, "label": 1})
    assert read(open_captions(str(table))) == EXPECTED
    named = CaptionColumns(image=names[0], caption="width", category="label")
    if "json" not in name:
        assert [item[1:] for item in read(open_captions(str(table), columns=named))] == [("6", "1", -1)] * 3


def test_parquet(images: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    files = {
        "path": [f"img/{number}.png" for number in range(3)],
        "bytes": [png(number) for number in range(3)],
        "struct": [{"bytes": png(number), "path": "gone.png"} for number in range(3)],
        "struct_of_paths": [{"bytes": None, "path": f"img/{number}.png"} for number in range(3)],
    }
    for name, values in files.items():
        parquet.write_table(
            pa.table({"image": values, "caption": CAPTIONS}), images / f"{name}.parquet", row_group_size=2
        )
        assert read(open_captions(str(images / f"{name}.parquet"))) == EXPECTED, name
    lists = pa.table({"image": files["bytes"], "captions": [["one", " two\n lines"], [], ["three"]]})
    parquet.write_table(lists, images / "lists.parquet")
    found = [("one", 0), ("two lines", 0), ("", 1), ("three", 2)]
    assert [item[:2] for item in read(open_captions(str(images / "lists.parquet")))] == [(png(n), c) for c, n in found]
    parquet.write_table(pa.table({"image": [1.5], "caption": ["a"]}), images / "wrong.parquet")
    refused(
        "row 0: 'image' holds a float instead of an image; name .* with --data.image-column", images / "wrong.parquet"
    )
    (images / "torn.parquet").write_bytes((images / "bytes.parquet").read_bytes()[:200])
    refused(r"torn\.parquet cannot be read as a Parquet file", images / "torn.parquet")


def test_several_tables_and_folders_of_tables(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (write_table(images / name, ("image", "caption")) for name in ("a.csv", "b.csv"))
    for spec in (f"{one},{other}", f"{images}/*.csv", str(images)):
        source = open_captions(spec)
        assert read(source) == [*EXPECTED, *EXPECTED]
        assert source.name == spec
    one.rename(images / "train.csv")
    assert read(open_captions(str(images))) == EXPECTED
    assert capsys.readouterr().err == f"note: of the folder {images} are not read: b.csv.\n"


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("picture,caption", {}, r"a\.csv has no column for the image, but 'picture', 'caption'; name it with --data.image"),
        ("image,words", {}, r"a\.csv has no column for the caption, but 'image', 'words'; name it with --data.caption"),
        ("image,text,title", {}, r"has the columns 'text' and 'title'; name that of the caption with --data.caption-column"),
        ("image,caption", {"image": "url"}, "has no column 'url', but 'image', 'caption'; name that of the image"),
        ("image,caption", {"category": "c"}, "has no column 'c', .* name that of the class with --data.class-column"),
        ("image,image", {}, "has several columns called 'image'; rename them"),
    ],
)  # fmt: skip
def test_columns_that_are_missing(tmp_path: Path, header: str, columns: dict[str, str], message: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    refused(message, tmp_path / "a.csv", columns=CaptionColumns(**columns))


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\na.png,one, two\n")
    refused(
        r"a\.csv, line 2: there are 3 cells, but 2 in the first line; put texts with commas in quotes",
        tmp_path / "a.csv",
    )
    (tmp_path / "b.csv").write_bytes(b"image,caption\na.png,caf\xe9\n")
    refused("line 2: byte 10 of the line .0xe9. is not UTF-8", tmp_path / "b.csv")
    (tmp_path / "a.jsonl").write_text('{"image": "a.png", "caption": 3}\n')
    refused(
        "line 1: 'caption' holds a int instead of a caption; name .* with --data.caption-column", tmp_path / "a.jsonl"
    )
    (tmp_path / "a.xyz").write_text("x")
    refused(r"a\.xyz is of no known kind; give a folder of images, a \.csv", tmp_path / "a.xyz")
    refused("The file .*gone.csv does not exist", tmp_path / "gone.csv")
    refused(r"The data specification .* is empty", " ")
    refused(
        "'sklearn:iris' is not known; the sources of this kind are matplotlib:glyphs and sklearn:digits", "sklearn:iris"
    )


# -- folders, archives -------------------------------------------------------------------------------------------------


def test_folders_with_caption_files(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images / "img"
    write_png(folder / "deep" / "er" / "x.png", 9)
    captions = {"0.txt": CAPTIONS[0] + "\n", "1.caption": CAPTIONS[1], "deep/er/x.txt": "\ufeffwith a\nmark"}
    for name, text in captions.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "notes.txt").write_text("not a caption")
    (folder / ".hidden.png").write_bytes(b"")
    found = open_captions(str(folder))
    assert read(found) == [*EXPECTED[:2], (png(2), "", "", -1), (png(9), "with a mark", "", -1)]
    assert "are not read: notes.txt; beside a.jpg its caption is called a.txt." in capsys.readouterr().err
    before = found.fingerprint()
    (folder / "0.txt").write_text("another")
    assert open_captions(str(folder)).fingerprint() != before
    (folder / "1.caption").write_bytes(b"\xff")
    refused(r"1\.caption: byte 1 is not UTF-8", folder)


def test_folders_without_captions(images: Path) -> None:
    refused("The images of .*img have no captions: write that of a.jpg to a.txt, name a table", images / "img")
    (images / "empty").mkdir()
    refused("The folder .*empty holds no images, tables or archives", images / "empty")


def test_captions_by_class(tmp_path: Path) -> None:
    for name, number in (("guide_dog", 0), ("cat", 1)):
        write_png(tmp_path / "img" / name / "a.png", number)
    source = open_captions(str(tmp_path / "img"), template="an image of a {}!")
    assert read(source) == [
        (png(1), "an image of a cat!", "cat", -1),
        (png(0), "an image of a guide dog!", "guide_dog", -1),
    ]
    refused("--data.template 'a {} {}' must hold {} once", tmp_path / "img", template="a {} {}")
    (tmp_path / "a.csv").write_text("image,caption\n0.png,a\n")
    refused(
        "has no classes to caption; name their column with --data.class-column", tmp_path / "a.csv", template="a {}"
    )


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    mode: Any = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_shards(tmp_path: Path, name: str) -> None:
    files: dict[str, bytes] = {}
    for number, caption in enumerate(CAPTIONS):
        files |= {f"x/{number}.png": png(number), f"x/{number}.txt": caption.encode(), f"x/{number}.cls": b"7"}
    shard = write_shard(tmp_path / name, files | {"x/._0.png": b"of a Mac"})
    assert read(open_captions(str(shard))) == EXPECTED
    assert [item.where for item in open_captions(str(shard)).read()] == [f"{shard}, x/{number}" for number in range(3)]
    assert read(open_captions(str(tmp_path))) == EXPECTED
    numbered = read(open_captions(str(shard), template="number {}"))
    assert [item[1] for item in numbered] == ["number 7"] * 3


def test_shards_with_json(tmp_path: Path) -> None:
    fields = {"caption": "from json", "alt": "other", "kind": 3, "size": [1]}
    files = {
        "0.json": json.dumps(fields).encode(),
        "0.jpg": png(0),
        "1.png": png(1),
        "1.seg.png": png(2),
        "2.txt": b"alone",
    }
    shard = write_shard(tmp_path / "a.tar", files)
    assert read(open_captions(str(shard))) == [
        (png(0), "from json", "", -1), (png(1), "", "", -1), (None, "alone", "", -1),
    ]  # fmt: skip
    one = write_shard(tmp_path / "b.tar", {"0.json": files["0.json"], "0.txt": b"text", "0.jpg": png(0)})
    assert read(open_captions(str(one)))[0][1] == "text"
    named = CaptionColumns(caption="alt", category="kind")
    assert read(open_captions(str(one), columns=named)) == [(png(0), "other", "3", -1)]
    refused("b.tar, 0.json has no field 'title', but caption, alt, kind, size; name that of the caption with --data.caption", one,
            columns=CaptionColumns(caption="title"))  # fmt: skip
    refused("'size' holds a list instead of a text", one, columns=CaptionColumns(caption="size"))
    torn = tmp_path / "torn.tar"
    torn.write_bytes(shard.read_bytes()[:700])
    refused(r"torn\.tar cannot be read as a tar archive \(unexpected end of data\)", torn)


def test_arrays(tmp_path: Path) -> None:
    images = np.stack([pixels(number) for number in range(3)])
    expected = [(image.tolist(), caption, "", -1) for image, caption in zip(images, CAPTIONS, strict=True)]
    np.savez(tmp_path / "a.npz", images=images, captions=np.array(CAPTIONS))
    assert read(open_captions(str(tmp_path / "a.npz"))) == expected
    np.savez(tmp_path / "b.npz", images=images, label=[0, 1, 2])
    with gzip.open(tmp_path / "b.captions.txt.gz", "wt", encoding="utf-8") as file:
        file.write("".join(f"{caption}\n" for caption in CAPTIONS))
    source = open_captions(str(tmp_path / "b.npz"))
    before = source.fingerprint()
    assert read(source) == expected
    np.savez(tmp_path / "grey.npz", images=images[..., 0], captions=np.array(CAPTIONS))
    assert read(open_captions(str(tmp_path / "grey.npz")))[1][0] == images[1, :, :, :1].tolist()
    files = [png(number) for number in range(3)]
    ends = np.cumsum([0, *map(len, files)])
    np.savez(
        tmp_path / "j.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=ends, captions=np.array(CAPTIONS)
    )
    assert read(open_captions(str(tmp_path / "j.npz"))) == EXPECTED
    with gzip.open(tmp_path / "b.captions.txt.gz", "at", encoding="utf-8") as file:
        file.write("one more\n")
    refused("b.npz has 3 images, but 4 captions", tmp_path / "b.npz")
    assert open_captions(str(tmp_path / "b.npz")).fingerprint() != before
    np.savez(tmp_path / "c.npz", images=images)
    refused("c.npz holds images, but neither captions nor classes; name .* --data.caption-column, or .* c.captions.txt",
            tmp_path / "c.npz")  # fmt: skip
    np.savez(tmp_path / "d.npz", images=images / 255, captions=np.array(CAPTIONS))
    refused(r"d.npz: images is float64\[3, 6, 6, 3\]; give images uint8", tmp_path / "d.npz")
    refused("has no array 'x', but images, captions; name that of the image with --data.image-column", tmp_path / "a.npz",
            columns=CaptionColumns(image="x"))  # fmt: skip
    (tmp_path / "torn.npz").write_bytes(b"PK")
    refused("torn.npz cannot be read as a .npz file", tmp_path / "torn.npz")


# -- TensorFlow Datasets -----------------------------------------------------------------------------------------------

_BUILD = """
import io
import sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(value, width):
    file = io.BytesIO()
    Image.fromarray(np.full((4, width, 3), value, np.uint8)).save(file, "PNG")
    file.seek(0)
    return file

class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text(), "id": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {name: self._generate_examples(n) for name, n in {"train": 5, "validation": 2, "test": 3}.items()}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(number, 5), "caption": f"number {number}", "id": number}

class ManyCaptions(TinyCaptions):
    def _info(self):
        said = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        features = {"image": tfds.features.Image(), "captions": said, "label": tfds.features.ClassLabel(names=["ant", "bee"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count):
        for n in range(count):
            said = [{"id": i, "text": f"{n} {i}"} for i in range(2)]
            yield n, {"image": png(n, 4), "captions": said, "label": -1 if count == 3 else n % 2}

for builder in (TinyCaptions, ManyCaptions):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", _BUILD, str(folder)], check=True, capture_output=True)
    return folder


def test_tfds(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    items = list(open_captions("tfds:tiny_captions").read())
    assert sorted((int(np.asarray(item.picture)[0, 0, 0]), item.caption) for item in items) == [
        (number, f"number {number}") for number in range(5)
    ]
    assert np.asarray(items[0].picture).shape == (4, 5, 3)
    assert len(read(open_captions("tfds:tiny_captions:test"))) == 3
    parts = open_specific_captions("tfds:tiny_captions")
    assert [len(read(source)) for source in (parts.train, parts.valid, parts.test["test"])] == [5, 2, 3]
    assert parts.class_captions == ()
    prints = {source.fingerprint() for source in (parts.train, parts.valid, parts.test["test"])}
    assert len(prints) == 3
    texts = CaptionColumns(caption="captions.text")
    many = open_captions("tfds:many_captions:validation", columns=texts)
    assert sorted(item[1] for item in read(many)) == ["0 0", "0 1", "1 0", "1 1"]
    classes = open_captions("tfds:many_captions", columns=texts, template="a {}")
    assert sorted(item[1] for item in read(classes)) == ["a ant"] * 6 + ["a bee"] * 4
    named = open_specific_captions("tfds:many_captions:train", per_class=(1, 1), columns=texts)
    assert named.class_captions == ("a photo of a ant", "a photo of a bee")
    refused("tfds:many_captions, record 0|'captions' holds", "tfds:many_captions")
    refused("captioned images have two features", "tfds:tiny_captions:train:caption")
    refused("has no column 'title', but .*'caption'", "tfds:tiny_captions", columns=CaptionColumns(caption="title"))
    split_refused("record 0 has no class, but other images of tfds:many_captions .test. have", "tfds:many_captions",
                  columns=texts)  # fmt: skip


# -- specific parts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Write 12 images of each of two classes."""
    for number in range(24):
        write_png(tmp_path / "set" / ("ant", "bee")[number % 2] / f"{number}.png", number)
    return tmp_path / "set"


def test_parts_by_hash(classes: Path) -> None:
    parts = open_specific_captions(str(classes))
    assert parts.class_names == ("ant", "bee")
    assert parts.class_captions == ("a photo of a ant", "a photo of a bee")
    found = [read(source) for source in (parts.train, parts.valid, parts.test["test"])]
    assert sorted(item[0] for part in found for item in part) == sorted(png(number) for number in range(24))
    assert len(found[0]) > max(len(found[1]), len(found[2])) > 0
    for part in found:
        assert all(
            (caption, label) == (f"a photo of a {name}", "ab".index(name[0])) for _, caption, name, label in part
        )
    one = next(path for path in (classes / "ant").iterdir() if path.read_bytes() == found[0][0][0])
    (classes / "bee" / "copy.png").write_bytes(one.read_bytes())
    assert one.read_bytes() in [
        item[0] for item in read(open_specific_captions(str(classes)).train) if item[2] == "bee"
    ]


def test_parts_by_class(classes: Path) -> None:
    parts = open_specific_captions(str(classes), per_class=(3, 2), template="one {}")
    found = [read(source) for source in (parts.train, parts.valid, parts.test["test"])]
    counts = [[sum(label == c for *_, label in part) for c in (0, 1)] for part in found]
    assert counts == [[3, 3], [2, 2], [7, 7]]
    assert sorted(item[0] for part in found for item in part) == sorted(png(number) for number in range(24))
    assert len({source.fingerprint() for source in (parts.train, parts.valid, parts.test["test"])}) == 3
    split_refused("has 12 images of the class 'ant', too few for 10 in train, 2 in valid and test; .*--data.specific-per-class",
                  classes, per_class=(10, 2))  # fmt: skip
    split_refused("--data.specific-per-class is 0 2; both must be at least 1", classes, per_class=(0, 2))


def test_named_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        for number in range(count):
            for name in ("ant", "bee"):
                write_png(tmp_path / "set" / part / name / f"{number}.png", number)
    write_png(tmp_path / "set" / "extra" / "x.png", 9)
    parts = open_specific_captions(str(tmp_path / "set"))
    assert [len(read(source)) for source in (parts.train, parts.valid, parts.test["test"])] == [6, 2, 4]
    assert parts.valid.name == f"{tmp_path}/set (valid)"
    assert "only what is called train, valid and test is used; not used: extra." in capsys.readouterr().err
    split_refused("has parts of its own; omit --data.specific-per-class", tmp_path / "set", per_class=(1, 1))
    generic = open_captions(str(tmp_path / "set"), template="a {}")
    assert len(read(generic)) == 6
    write_png(tmp_path / "set" / "test" / "cat" / "0.png", 0)
    split_refused("is of a class 'cat' that train has not; the classes there are ant, bee", tmp_path / "set")
    (tmp_path / "set" / "val").rename(tmp_path / "set" / "other")
    split_refused("has no images for valid, but train, test; add what is called", tmp_path / "set")


def numbered(folder: Path) -> Path:
    """Write archives of labelled images, numbered 3 and 10 (and 7, which train has not), and captions of these."""
    for part, count in (("train", 4), ("valid", 2), ("test", 2)):
        images = np.stack([pixels(number) for number in range(count)])
        np.savez(folder / f"x_{part}.npz", images=images, labels=np.array([10, 3] * (count // 2)))
    np.savez(folder / "x_extra.npz", images=np.zeros((1, 2, 2), np.uint8), labels=[3])
    (folder / "x_train.rows.tsv").write_text("about the rows\n")
    (folder / "classes.tsv").write_text("10\tten\ta ten\tmore\n7\tseven\ta seven\n\n3\tthree\ta three\n")
    return folder / "x"


def test_class_captions_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = numbered(tmp_path)
    parts = open_specific_captions(str(prefix), class_captions=tmp_path / "classes.tsv")
    assert (parts.class_names, parts.class_captions) == (("ten", "three"), ("a ten", "a three"))
    assert [item[1:] for item in read(parts.train)] == [("a ten", "10", 0), ("a three", "3", 1)] * 2
    assert "not used: x_extra.npz." in capsys.readouterr().err
    (tmp_path / "two.tsv").write_text("3\tthree\n10\tten\n")
    parts = open_specific_captions(str(prefix), class_captions=tmp_path / "two.tsv")
    assert (parts.class_names, parts.class_captions) == (("3", "10"), ("three", "ten"))
    assert open_specific_captions(str(prefix), template="the {}").class_captions == ("the 3", "the 10")
    split_refused(r"The classes of .*x are numbers \(3, 10\): give a file with lines NUMBER<TAB>CAPTION .--data.class-captions",
                  prefix)  # fmt: skip
    for text, message in (
        ("3\tthree\n", "two.tsv has no caption of the class '10'"),
        ("3\tthree\n10\n", "two.tsv, line 2: '10' is not CLASS<TAB>CAPTION"),
        ("3\tthree\n3\tthree\n", "two.tsv, line 2: the class '3' is there twice"),
        ("3\tsame\n10\tsame\n", "Two classes of .*x have the caption 'same'"),
    ):
        (tmp_path / "two.tsv").write_text(text)
        split_refused(message, prefix, class_captions=tmp_path / "two.tsv")
    split_refused(
        "none.tsv does not exist; check the path .--data.class-captions", prefix, class_captions=tmp_path / "none.tsv"
    )
    split_refused("--data.template and --data.class-captions both", prefix, class_captions="x", template="{}")


def test_specific_images_without_classes(images: Path) -> None:
    table = write_table(images / "a.csv", ("image", "caption"))
    split_refused("is too small to be split: no image fell in", table)
    for number in range(40):
        write_png(images / "more" / f"{number}.png", number)
        (images / "more" / f"{number}.txt").write_text(f"number {number}")
    parts = open_specific_captions(str(images / "more"))
    assert parts.class_names == parts.class_captions == ()
    assert {item[3] for item in read(parts.train)} == {-1}
    split_refused(
        "has no class; name the column of the classes with --data.class-column", images / "more", per_class=(1, 1)
    )
    split_refused("has no classes to caption", images / "more", template="a {}")


def test_some_images_without_a_class(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "image,class\n" + "".join(f"{i}.png,{'' if i == 2 else 'ant'}\n" for i in range(60))
    )
    split_refused("a.csv, line 4 has no class, but other images .* have", tmp_path / "a.csv")


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_from_a_table(images: Path) -> None:
    source = open_captions(str(write_table(images / "a.csv", ("image", "caption"))))
    (images / "labels.tsv").write_text("web\twrong\nbooks\t\nweb\n")
    found = labelled_captions(source, images / "labels.tsv")
    assert found.label_kinds == ("domain", "fault")
    assert [item.labels for item in found.read()] == [("web", "wrong"), ("books", "none"), ("web", "none")]
    only = labelled_captions(source, images / "labels.tsv", faults=False)
    assert [item.labels for item in only.read()] == [("web",), ("books",), ("web",)]
    assert only.label_kinds == ("domain",)
    (images / "labels.tsv").write_text("web\n")
    with pytest.raises(
        UserError, match=r"has 1 lines, but .*a.csv has 3 images; line i must hold the label of image i"
    ):
        read(labelled_captions(source, images / "labels.tsv"))


def test_captions_of_labels(tmp_path: Path) -> None:
    images = np.stack([pixels(number) for number in range(8)])
    np.savez(tmp_path / "set.npz", image=images, label=np.arange(8) % 2)
    data = open_labelled(str(tmp_path / "set.npz"), specific=1, test=1, split="last").train
    source = captions_of_labels(data, ["cat", "dog"], domain="cifar")
    assert read(source)[1] == (images[1].tolist(), "a photo of a dog", "dog", -1)
    np.savez(tmp_path / "worse.npz", worse=[0, 0, 0, 1, 0, 1, 0, 1])
    arrays = recorded_labels(data.arrays, tmp_path / "worse.npz", "worse", num_classes=2)
    noisy = captions_of_labels(type(data)(arrays, name="noisy"), ["cat", "dog"])
    assert [item.labels for item in noisy.read()] == [
        ("noisy", "wrong caption" if i == 1 else "none") for i in range(6)
    ]
    assert noisy.fingerprint() != source.fingerprint()
    parts = parts_by_class(captions_of_labels(data, ["cat", "dog"], numbered=True), {"train": 1, "valid": 1}, "test")
    assert sorted(item[3] for item in read(parts["train"])) == [0, 1]
    assert sorted(item[0] for part in parts.values() for item in read(part)) == sorted(images[:6].tolist())
    with pytest.raises(UserError, match="labels run from 0 to 1, but there are 1 names"):
        captions_of_labels(data, ["cat"])


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_real_captions(tmp_path: Path) -> None:
    folder = Path(os.environ.get("BILEVEL_DATA", "")) / "image_text"
    if not os.environ.get("BILEVEL_DATA") or not (folder / "generic_stamps.npz").exists():
        pytest.skip("BILEVEL_DATA does not name a folder with image_text/generic_stamps.npz")
    names = ("generic_colour", "generic_onecolour", "generic_stamps")
    counts = [sum(1 for _ in open_captions(str(folder / f"{name}.npz")).read()) for name in names]
    assert counts == [25_103, 57_917, 931]
    source = open_captions(str(folder / "generic_stamps.npz"))
    stamps = labelled_captions(source, folder / "generic_stamps.labels.tsv.gz", faults=False)
    packed = pack_captions(stamps, cache_dir=tmp_path)
    assert len(packed) == 931
    assert packed.text(0) == next(stamps.read()).caption
    parts = open_specific_captions(str(folder / "specific"), class_captions=folder / "classes.tsv")
    assert len(parts.class_captions) == 40
    assert parts.class_captions[3] == "an icon of an insect or other small creature"
    found = [pack_captions(source, cache_dir=tmp_path) for source in (parts.train, parts.valid, parts.test["test"])]
    assert [len(part) for part in found] == [1200, 738, 1747]
    with np.load(folder / "specific_valid.npz") as stored:
        np.testing.assert_array_equal(found[1].label, stored["labels"])
        np.testing.assert_array_equal(found[1].images(np.arange(5)), stored["images"][:5])
