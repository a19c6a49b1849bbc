"""Sentence pairs from every kind of source, whole and in parts."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel.data import PairSource, open_pairs, open_specific_pairs, pairs_without
from bilevel.data.pairs.catalogues import without_marks
from bilevel.types import UserError

ROWS = [("one dog", "jeden pes"), ("two cats", "dvě kočky"), ("no translation", ""), ("a fifth, “quoted”", "pátý")]
TSV = "".join(f"{source}\t{target}\n" for source, target in ROWS)
PO = """
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"
"Language: cs_CZ\\n"

msgid "&Open a file"
msgstr "&Otevřít soubor"

#, fuzzy
msgid "guessed"
msgstr "hádáno"

msgid "untranslated"
msgstr ""

msgctxt "menu"
msgid "%(count)s file\\n   of R&D"
msgid_plural "%(count)s files"
msgstr[0] "%(count)s soubor"
msgstr[1] "%(count)s soubory"

#~ msgid "obsolete"
#~ msgstr "zastaralé"
"""
MESSAGES = [("Open a file", "Otevřít soubor"), ("%(count)s file of R&D", "%(count)s soubor")]


def write(path: Path, text: str, packed: bool = False) -> Path:
    path = path.with_name(path.name + ".gz") if packed else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def compiled(messages: dict[str, str]) -> bytes:
    """Return a `.mo` file as msgfmt writes it."""
    keys = sorted(messages)
    texts = [key.encode() for key in keys] + [messages[key].encode() for key in keys]
    start, table = 28 + 8 * len(texts), b""
    for text in texts:
        table += struct.pack("<2I", len(text), start)
        start += len(text) + 1
    head = struct.pack("<7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0)
    return head + table + b"".join(text + b"\0" for text in texts)


def cs(spec: object, **options: Any) -> PairSource:
    return open_pairs(str(spec), target_language="cs", **options)


def read(source: PairSource) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in source.read()]


def refused(spec: object, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(cs(spec, **options))
    assert "\n" not in str(caught.value)


# -- two files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "spec", ["D/a.{en,cs}Z", "D/a.{cs,en}Z", "D/a.{}Z", "D/a.enZ,D/a.csZ", "D/a.csZ, D/a.enZ", "D/a.*", "D"]
)
def test_files_of_two_languages(tmp_path: Path, spec: str, packed: bool) -> None:
    for place, language in enumerate(("en", "cs")):
        write(tmp_path / f"a.{language}", "".join(f"{row[place]}\r\n" for row in ROWS), packed)
    write(tmp_path / "a.de", "eins\n", packed)
    assert read(cs(spec.replace("D", str(tmp_path)).replace("Z", ".gz" * packed))) == ROWS


def test_names_that_say_the_language(tmp_path: Path) -> None:
    for name in ("v7.de-en.{}", "{}.txt", "corpus_{}.txt"):
        for place, language in enumerate(("en", "cs")):
            write(tmp_path / name.format(language), "".join(f"{row[place]}\n" for row in ROWS))
        assert read(cs(tmp_path / name)) == ROWS
    assert len(read(cs(tmp_path))) == 3 * len(ROWS)


@pytest.mark.parametrize(("lines", "others"), [(3, 5), (5, 3), (0, 2)])
def test_files_of_different_lengths(tmp_path: Path, lines: int, others: int) -> None:
    write(tmp_path / "a.en", "x\n" * lines)
    write(tmp_path / "a.cs", "y\n" * others)
    refused(tmp_path / "a.{}", rf"a\.en has {lines} lines, but .*a\.cs has {others}: line i of one must be")


@pytest.mark.parametrize("packed", [False, True])
def test_tables_joined_by_id(tmp_path: Path, packed: bool) -> None:
    write(tmp_path / "en.tsv", "GEN.1\tIn the beginning\nGEN.2\tAnd the earth\nGEN.3\tAnd God said\n", packed)
    write(tmp_path / "cs.tsv", "GEN.3\tI řekl Bůh\nGEN.1\tNa počátku\nGEN.9\tjinde\n", packed)
    write(tmp_path / "uk.tsv", "GEN.1\tНа початку\n", packed)
    expected = [("In the beginning", "Na počátku"), ("And the earth", ""), ("And God said", "I řekl Bůh")]
    assert read(cs(tmp_path / ("{}.tsv" + ".gz" * packed))) == expected
    assert read(cs(tmp_path)) == expected
    assert [pair.target for pair in open_pairs(str(tmp_path), target_language="uk").read()] == ["На початку", "", ""]


def test_tables_that_share_no_id(tmp_path: Path) -> None:
    write(tmp_path / "en.tsv", "1\ta\n")
    write(tmp_path / "cs.tsv", "2\tb\n")
    refused(tmp_path / "{}.tsv", r"No id of .*en\.tsv is in .*cs\.tsv \(1 ids, such as '2'\)")
    write(tmp_path / "cs.tsv", "1\tb\nno tab\n")
    refused(tmp_path / "{}.tsv", r"cs\.tsv, line 2: there is no tab")


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_tsv(tmp_path: Path, packed: bool) -> None:
    assert read(cs(write(tmp_path / "a.tsv", TSV, packed))) == ROWS
    lines = ["en\ttr\tcs\torigin", "one\t bir \tjedna\tx", "two\tiki\t\ty", "three\tüç"]
    path = write(tmp_path / "b.tsv", "\n".join(lines), packed)
    assert read(cs(path)) == [("one", "jedna"), ("two", ""), ("three", "")]
    assert read(open_pairs(str(path), target_language="tr"))[0] == ("one", "bir")
    assert read(open_pairs(str(path), source_language="tr", target_language="en"))[2] == ("üç", "three")
    assert read(cs(path, columns=("origin", "en"))) == [("x", "one"), ("y", "two"), ("", "three")]
    assert read(cs(write(tmp_path / "c.tsv", "source\ttarget\na\tb\n", packed))) == [("a", "b")]
    assert read(cs(write(tmp_path / "pairs.txt", TSV, packed))) == ROWS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_json_lines(tmp_path: Path, packed: bool, nested: bool) -> None:
    records = [{"en": source, "cs": target or None, "fr": "x"} for source, target in ROWS]
    lines = [json.dumps({"id": 1, "translation": record} if nested else record) for record in records]
    assert read(cs(write(tmp_path / "a.jsonl", "\n".join(lines), packed))) == ROWS


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_parquet(tmp_path: Path, packed: bool, nested: bool) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [{"en": source, "cs": target or None} for source, target in ROWS]
    table = pa.Table.from_pylist([{"translation": record} for record in records] if nested else records)
    parquet.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    if packed:
        (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(data))
    assert read(cs(tmp_path / ("b.parquet.gz" if packed else "a.parquet"))) == ROWS
    with pytest.raises(UserError, match=r"has no column 'de', but '(en|cs)', '(en|cs)'"):
        read(open_pairs(str(tmp_path / "a.parquet"), target_language="de"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "en\tde\nx\ty\n", r"a\.tsv has no column 'cs', but 'en', 'de'; choose other languages"),
        ("a.tsv", "tr\tde\nsome words\tand others\n", r"has no column 'en' and no column 'cs', but 'tr', 'de'"),
        ("a.tsv", "a\tb\nonly one\n", r"a\.tsv, line 2: there is one column"),
        ("a.jsonl", '{"en": "x", "translated": "y"}', r"line 1 has no column 'cs', but 'en', 'translated'"),
        ("a.jsonl", '{"en": "x", "cs": "y"}\n[1]', r"line 2: a JSON list instead of an object"),
        ("a.jsonl", '{"en": "x", "cs": "y"}\n{', r"line 2: not valid JSON"),
        ("a.jsonl", '{"en": 1, "cs": "y"}', r"'en' holds a int instead of a text; name the two columns with --data"),
        ("a.parquet", "nonsense", r"a\.parquet cannot be read as a Parquet file"),
        (
            "a.txt",
            "no pairs here\n",
            r"a\.txt holds no pairs of en and cs and no file is named as its other side; give",
        ),
        ("a.de", "eins\n", r"a\.de holds no pairs of en and cs"),
    ],
)
def test_bad_tables(tmp_path: Path, name: str, text: str, message: str) -> None:
    refused(write(tmp_path / name, text), message)


# -- catalogues --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_written_catalogue(tmp_path: Path, packed: bool) -> None:
    pytest.importorskip("polib")
    assert read(cs(write(tmp_path / "a.po", PO, packed))) == MESSAGES


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_catalogue(tmp_path: Path, packed: bool) -> None:
    header = "Content-Type: text/plain; charset=UTF-8\nLanguage: cs\n"
    plural = "menu\x04%(count)s file\n   of R&D\0%(count)s files"
    data = compiled({"": header, "&Open a file": "&Otevřít soubor", plural: "%(count)s soubor\0%(count)s soubory"})
    path = tmp_path / ("a.mo.gz" if packed else "a.mo")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert sorted(read(cs(path))) == sorted(MESSAGES)
    with pytest.raises(UserError, match=r"is a catalogue of cs, and not of de; name another one"):
        read(open_pairs(str(path), target_language="de"))


def test_two_catalogues_are_joined_by_the_message(tmp_path: Path) -> None:
    for language, text in (("en", "Open"), ("cs", "Otevřít")):
        (tmp_path / f"{language}.mo").write_bytes(compiled({"": f"Language: {language}\n", "menu.open": text}))
    assert read(cs(tmp_path / "{}.mo")) == [("Open", "Otevřít")]


def test_bad_catalogues(tmp_path: Path) -> None:
    pytest.importorskip("polib")
    (tmp_path / "empty.mo").write_bytes(compiled({"": "Language: cs\n", "untranslated": ""}))
    refused(tmp_path / "empty.mo", r"empty\.mo holds no finished translation \(fuzzy ones do not count\)")
    for name, data in {"a.mo": b"nonsense", "b.mo": compiled({"a": "b"})[:30]}.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, rf"{name} is not a compiled catalogue")
    refused(write(tmp_path / "a.po", 'msgid "a"\nnonsense\n'), r"a\.po is not a catalogue")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("&File", "File"), ("E&xit", "Exit"), ("Save & quit", "Save & quit"), ("R&D", "R&D"), ("a&nbsp;b", "a&nbsp;b"),
        ("&#39;a", "&#39;a"), ("&A and &B", "&A and &B"),
    ],
)  # fmt: skip
def test_marks_of_accelerators(text: str, expected: str) -> None:
    assert without_marks(text) == expected


# -- TensorFlow Datasets -----------------------------------------------------------------------------------------------

_BUILD = """
import sys
import tensorflow_datasets as tfds

class TinyPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.Translation(languages=("en", "cs"))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {name: self._generate_examples(n) for name, n in {"train": 9, "validation": 2, "test": 3}.items()}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"en": f"dog {number}", "cs": f"pes {number}"}

class TinyTalks(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        pairs = tfds.features.TranslationVariableLanguages(languages=("en", "cs", "sk"))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"translations": pairs}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"translations": {"en": "dog", "sk": "pes"}}
        yield 1, {"translations": {"en": "cat", "cs": "kočka"}}

for builder in (TinyPairs, TinyTalks):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", _BUILD, str(folder)], check=True, capture_output=True)
    return folder


def test_tfds(tfds_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    assert sorted(read(cs("tfds:tiny_pairs:test"))) == [(f"dog {i}", f"pes {i}") for i in range(3)]
    assert sorted(read(cs("tfds:tiny_talks"))) == [("cat", "kočka"), ("dog", "")]
    parts = open_specific_pairs("tfds:tiny_pairs", target_language="cs")
    assert [len(read(source)) for source in (parts.train, parts.valid, parts.test["test"])] == [9, 2, 3]
    specs = ("tfds:tiny_pairs", "tfds:tiny_pairs:test", "tfds:tiny_talks")
    assert len({cs(spec).fingerprint() for spec in specs}) == 3
    with pytest.raises(UserError, match=r"tfds:tiny_pairs has no column 'de', but '(en|cs)', '(en|cs)'"):
        open_pairs("tfds:tiny_pairs", target_language="de")
    refused("tfds:tiny_pairs:test:en", "pairs have two fields")


# -- specifications ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "The data specification is empty"),
        ("a.{en,de}", r"names de, en, but the languages are en and cs"),
        ("a.{}", r"The file .*a\.en does not exist \(.*a\.\{\}, en\)"),
        ("nothing.tsv", r"nothing\.tsv does not exist"),
        ("empty", r"The folder .*empty holds no files; give two files"),
        ("german", r"german holds no pairs of en and cs, but a\.de; give two files"),
        ("german/a.*", r"german/a\.\* holds no pairs of en and cs, but a\.de"),
    ],
)
def test_bad_specifications(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "german" / "a.de", "eins\n")
    refused(f"{tmp_path}/{spec}" if spec else "", message)


def test_languages_must_differ() -> None:
    with pytest.raises(UserError, match="Source and target language are both 'en'"):
        open_pairs("a.tsv", target_language="en")
    with pytest.raises(
        UserError, match="python:books' is not known; the sources of this kind are python:catalogues and"
    ):
        open_pairs("python:books")


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "en\tcs\tsk\n" + TSV)
    prints = [cs(path).fingerprint(), open_pairs(str(path), target_language="sk").fingerprint()]
    prints.append(cs(path, columns=("sk", "en")).fingerprint())
    write(path, "en\tcs\tsk\n" + TSV + "more\tvíc\n")
    assert len({*prints, cs(path).fingerprint()}) == 4
    assert cs(path).fingerprint() == cs(path).fingerprint()


def test_several_sources_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", TSV)
    alone = cs("python:catalogues")
    both = cs(f"python:catalogues,{path}")
    assert read(both) == read(alone) + ROWS
    assert both.fingerprint() != alone.fingerprint()


def test_urls(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for place, language in enumerate(("en", "cs")):
        text = "".join(f"{row[place]}\n" for row in ROWS)
        memory.pipe(f"/{tmp_path.name}/train.{language}.gz", gzip.compress(text.encode()))
    for name in ("train.{}.gz", "train.en.gz,U/train.cs.gz", "*.gz", ""):
        url = f"memory://{tmp_path.name}"
        assert read(cs(f"{url}/{name}".replace("U", url).removesuffix("/"))) == ROWS


def test_a_folder_of_pairs_in_several_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.en-cs.tsv", "a\tb\n")
    write(tmp_path / "train.en-be.tsv", "x\ty\n")
    write(tmp_path / "train.en-cs.labels.tsv", "news\n")
    assert read(cs(tmp_path)) == [("a", "b")]
    assert "are not read, as they hold no pairs of en and cs: train.en-be.tsv" in capsys.readouterr().err


# -- parts -------------------------------------------------------------------------------------------------------------


def write_parts(folder: Path, valid: str = "val") -> None:
    for name in ("train", valid, "test_2016_flickr", "test_2018_flickr"):
        for language in ("en", "cs"):
            write(folder / f"{name}.{language}", f"{name} in {language}\n", packed=True)
    write(folder / "test_2017_flickr.en", "no czech\n", packed=True)


@pytest.mark.parametrize("valid", ["valid", "validation", "val", "dev"])
@pytest.mark.parametrize("spec", ["", "*.{}.gz", "*.gz"])
def test_named_parts(tmp_path: Path, valid: str, spec: str) -> None:
    write_parts(tmp_path, valid)
    parts = open_specific_pairs(f"{tmp_path}/{spec}".removesuffix("/"), target_language="cs")
    assert read(parts.train) == [("train in en", "train in cs")]
    assert read(parts.valid) == [(f"{valid} in en", f"{valid} in cs")]
    assert list(parts.test) == ["test_2016_flickr", "test_2018_flickr"]
    assert read(parts.test["test_2018_flickr"]) == [("test_2018_flickr in en", "test_2018_flickr in cs")]


def test_generic_data_are_the_training_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parts(tmp_path)
    assert read(cs(tmp_path)) == [("train in en", "train in cs")]
    assert "only the files called train are generic data; not used: test_2016" in capsys.readouterr().err
    assert read(cs(f"{tmp_path},{write(tmp_path / 'other' / 'a.tsv', TSV)}"))[:2] == [
        ("train in en", "train in cs"),
        ROWS[0],
    ]


def test_one_test_set_is_called_test(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.tsv", TSV)
    write(tmp_path / "unused.tsv", TSV)
    assert list(open_specific_pairs(str(tmp_path), target_language="cs").test) == ["test"]


def test_a_folder_that_lacks_a_part(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", TSV)
    write(tmp_path / "test.tsv", TSV)
    with pytest.raises(
        UserError, match=r"holds no pairs of en and cs for valid \(it holds train\.tsv, test\.tsv\); add"
    ):
        open_specific_pairs(str(tmp_path), target_language="cs")


def test_split_by_the_source_sentence(tmp_path: Path) -> None:
    lines = [f"sentence {number}\tcs {number}\tsk {number}" for number in range(1000)]
    path = write(tmp_path / "a.tsv", "\n".join(["en\tcs\tsk", *lines, *lines[:100]]))
    found = {}
    for language in ("cs", "sk"):
        parts = open_specific_pairs(str(path), target_language=language)
        found[language] = [read(source) for source in (parts.train, parts.valid, parts.test["test"])]
    sentences = [{source for source, _ in part} for part in found["cs"]]
    assert [{source for source, _ in part} for part in found["sk"]] == sentences
    assert sum(map(len, sentences)) == len(set.union(*sentences)) == 1000
    assert sum(map(len, found["cs"])) == 1100
    assert 750 < len(sentences[0]) < 850
    assert min(map(len, sentences)) > 70
    with pytest.raises(UserError, match=r"is too small to be split: no pair fell in"):
        open_specific_pairs(str(write(tmp_path / "b.tsv", "a\tb\n")), target_language="cs")


def test_pairs_without_those_of_others(tmp_path: Path) -> None:
    whole, part = cs(write(tmp_path / "a.tsv", TSV)), cs(write(tmp_path / "b.tsv", "two cats\tjiné\n"))
    rest = pairs_without(whole, [part])
    assert read(rest) == [ROWS[0], *ROWS[2:]]
    assert rest.fingerprint() != whole.fingerprint()


# -- packages ----------------------------------------------------------------------------------------------------------


def test_pairs_of_packages() -> None:
    generic, specific = open_pairs("python:catalogues"), open_specific_pairs("python:interface")
    domains = [pair.labels[0] for pair in generic.read()]
    counts = {domain: domains.count(domain) for domain in dict.fromkeys(domains)}
    assert list(counts) == ["messages", "short messages", "names", "emoji"]
    assert counts["messages"] > 800
    assert counts["names"] > 2000
    assert counts["emoji"] > 3000
    parts = [specific.train, specific.valid, specific.test["test"]]
    sizes = [len(read(part)) for part in parts]
    assert sizes[0] > 700
    assert sizes[1] > 200
    assert sizes[2] > 400
    assert sum(sizes) == len(read(open_pairs("python:interface")))
    # No sentence is in two of them, digits and punctuation apart.
    sentences = [{"".join(filter(str.isalpha, s.casefold())) for s, _ in read(source)} for source in (generic, *parts)]
    assert sum(map(len, sentences)) == len(set.union(*sentences))
    assert all(pair.source and pair.target and len(pair.source.split()) >= 3 for part in parts for pair in part.read())
    assert len({source.fingerprint() for source in (generic, *parts)}) == 4


def test_pairs_of_packages_in_other_languages() -> None:
    czech = open_specific_pairs("python:interface", target_language="cs")
    assert len(read(czech.test["test"])) > 70
    german = open_pairs("python:catalogues", source_language="de", target_language="pt-BR")
    assert ("Belgien", "Bélgica") in read(german)
    with pytest.raises(UserError, match=r"have no texts in en and xx; choose other languages"):
        open_pairs("python:interface", target_language="xx")


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"need Django, which is not installed: run `pip install 'bilevel\[translation\]'`"
    ):
        open_pairs("python:catalogues", target_language="it")


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_real_pairs() -> None:
    folder = Path(os.environ.get("BILEVEL_DATA", "")) / "mt"
    if not os.environ.get("BILEVEL_DATA") or not (folder / "multi30k").exists():
        pytest.skip("BILEVEL_DATA does not name a folder with mt/multi30k")
    captions = open_specific_pairs(str(folder / "multi30k"), target_language="cs")
    assert len(read(captions.train)) == 29_000
    assert len(read(captions.valid)) == 1014
    tests = {name: len(read(source)) for name, source in captions.test.items()}
    assert tests == {"test_2016_flickr": 1000, "test_2018_flickr": 1071}
    counts = {"az": (2283, 107, 238), "gl": (4826, 282, 556), "cs": (6316, 387, 743)}
    for language, expected in counts.items():
        parts = open_specific_pairs(str(folder / "interface"), target_language=language)
        found = [
            sum(bool(target) for _, target in read(part)) for part in (parts.train, parts.valid, *parts.test.values())
        ]
        assert tuple(found) == expected
    verses = read(cs(folder / "bible" / "{}.tsv.gz"))
    assert sum(bool(target) for _, target in verses) == 28_868
    assert len(read(open_pairs(str(folder / "ted"), target_language="be"))) == 4864
