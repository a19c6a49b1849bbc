"""Text in the tokens of files that the libraries wrote: what tokens stand for, and rows of them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizers import write_json_tokenizer, write_sentencepieces

from bilevel.data import Document, Source, cut_rows, open_source, open_text_tokenizer, pack, rows_in_both
from bilevel.data.text.tokenizers import TextTokenizer, token_type
from bilevel.types import UserError

TEXTS = [
    "the cat sat on a mat", "naïve café 日本語 😀 the town", "", "  two  spaces \t and x", "q",
    "the\nold\n\ntown <|endoftext|> </s>",
]  # fmt: skip


@pytest.fixture(params=["json", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    write = write_json_tokenizer if request.param == "json" else write_sentencepieces
    found = open_text_tokenizer(str(write(tmp_path / "model").parent))
    assert found is not None
    return found


def source_of(texts: list[str], name: str = "texts", prompts: list[int] | None = None) -> Source:
    documents = [Document(text.encode(), None, n) for text, n in zip(texts, prompts or [0] * len(texts), strict=True)]
    return Source(name, lambda: iter(documents), lambda: f"{name}{texts}{prompts}")


def test_tokens_stand_for_all_bytes(tokenizer: TextTokenizer) -> None:
    """Each begins where the one before it ends; text that looks like a special token is text."""
    texts = [text.encode() for text in TEXTS]
    found = tokenizer.encode(texts)
    assert found.ids.dtype == np.uint16
    assert found.ids.max() < tokenizer.size
    assert len(found.ids) == len(found.starts) == found.counts.sum()
    assert tokenizer.end is not None
    assert tokenizer.end not in found.ids
    for i, text in enumerate(texts):
        first = found.counts[:i].sum()
        starts = found.starts[first : first + found.counts[i]]
        assert (len(starts) > 0) == (len(text) > 0)
        if len(text):
            assert starts[0] == 0
            assert (np.diff(starts) >= 0).all()
            assert starts[-1] < len(text)
        exact = isinstance(tokenizer.encode([b"a"]).ids, np.ndarray) and "json" in tokenizer.name
        shown = tokenizer.decode(found.ids[first : first + found.counts[i]])
        assert shown == text.decode() or (not exact and shown.split() == text.decode().split())


def test_tokens_begin_at_their_characters(tmp_path: Path) -> None:
    tokenizer = open_text_tokenizer(str(write_json_tokenizer(tmp_path)))
    assert tokenizer is not None
    text = "é x 日".encode()
    found = tokenizer.encode([text])
    for start in found.starts:
        text[: int(start)].decode()  # never inside a character
    assert {int(x) for x in found.starts} >= {0, 2, 3}


@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_the_bytes_of_rows_are_those_of_their_documents(length: int, tokenizer: TextTokenizer) -> None:
    texts = [text.encode() for text in TEXTS if text]
    rows = list(cut_rows(texts, length, 2, tokenizer=tokenizer))
    assert all(len(part.tokens) <= 2 for part in rows)
    owner, size, count = (
        np.concatenate([getattr(part, name) for part in rows]) for name in ("owner", "size", "length")
    )
    counts = tokenizer.encode(texts).counts
    for i, text in enumerate(texts):
        whole = count[owner == i].sum() == counts[i]
        assert size[owner == i].sum() <= len(text)
        assert (size[owner == i].sum() == len(text)) == whole
    assert all((part.given == 0).all() for part in rows)


def test_packed_tokens(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    source = source_of(TEXTS)
    packed = pack(source, length=6, cache_dir=tmp_path, tokenizer=tokenizer)
    again = pack(source, length=6, cache_dir=tmp_path, tokenizer=tokenizer)
    assert (again.folder, again.content_hash) == (packed.folder, packed.content_hash)
    assert pack(source, length=6, cache_dir=tmp_path).content_hash != packed.content_hash
    assert packed.tokens.dtype == token_type(tokenizer)
    assert packed.manifest["tokenizer"] == tokenizer.name
    rows = packed.rows(np.arange(len(packed)))
    assert set(rows) == {"tokens", "length", "size", "id"}
    assert packed.text(0).split()[0] == "the"
    assert rows["size"][rows["id"] == 0].sum() > 6


def test_large_vocabularies_take_four_bytes() -> None:
    class Large:
        size = 70_000

    assert token_type(Large()) == np.uint32  # pyright: ignore[reportArgumentType]
    assert token_type(None) == np.uint8


def test_rows_in_both_are_found_in_tokens(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lines = [f"the old town of number {i} and its people, while rain fell over it" for i in range(6)]
    first, second = (
        pack(source_of(part, name), length=40, cache_dir=tmp_path, tokenizer=tokenizer)
        for name, part in (("a", lines[:4]), ("b", lines[3:]))
    )
    found = rows_in_both(first, second)
    assert found[0]
    assert not found[second.document > 0].all()


@pytest.mark.parametrize("tokens", [False, True])
def test_prompts_are_given(tokens: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a prompt alone are left out, and said."""
    tokenizer = open_text_tokenizer(str(write_json_tokenizer(tmp_path))) if tokens else None
    texts, prompts = ["the cat sat on a mat", "rain fell", "old town people ran while rain fell over"], [8, 0, 39]
    source = source_of(texts, f"with prompts {tokens}", prompts)
    packed = pack(source, length=100, cache_dir=tmp_path, tokenizer=tokenizer, prompts=True)
    rows = packed.rows(np.arange(3))
    assert rows["size"].tolist() == [12, 9, 1]
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        given = rows["tokens"][i, : rows["given"][i]]
        shown = given.tobytes().decode() if tokenizer is None else tokenizer.decode(given)
        assert shown == text[:prompt]
    short = pack(source, length=8, cache_dir=tmp_path, tokenizer=tokenizer, prompts=True)
    found = short.rows(np.arange(len(short)))
    assert (found["given"] < found["length"]).all()
    assert "rows of with prompts" in capsys.readouterr().err


def test_prompts_are_read_of_their_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"q": "1 + 1 = ", "a": "2"}\n{"q": "no answer", "a": ""}\n{"q": "", "a": "alone"}\n'
    )
    source = open_source(str(tmp_path / "a.jsonl"), field="a", prompt="q")
    assert list(source.read()) == [Document(b"1 + 1 = 2", None, 8), Document(b""), Document(b"alone", None, 0)]
    assert source.fingerprint() != open_source(str(tmp_path / "a.jsonl"), field="a").fingerprint()
    with pytest.raises(UserError, match="no field 'question'"):
        list(open_source(str(tmp_path / "a.jsonl"), field="a", prompt="question").read())


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("length", [5, 7, 1000])
def test_rows_that_cross_documents(length: int, tokens: bool, tmp_path: Path) -> None:
    tokenizer = open_text_tokenizer(str(write_json_tokenizer(tmp_path))) if tokens else None
    source = source_of(TEXTS * 20)
    packed = pack(source, length=length, cache_dir=tmp_path, tokenizer=tokenizer, crossing=True)
    apart = packed.hash <= int(2**32 / 50)
    for side in (apart, ~apart):
        flat = np.concatenate(
            [row[:n] for row, n in zip(packed.tokens[side], packed.length[side], strict=True)] or [[]]
        )
        texts = [text for text in TEXTS * 20 if text]
        ends = 0 if tokenizer is None else tokenizer.end
        parts = np.split(flat, np.flatnonzero(flat == ends) + 1)
        shown = [
            p[:-1].astype(np.uint8).tobytes().decode() if tokenizer is None else tokenizer.decode(p[:-1].astype(int))
            for p in parts[:-1]
        ]
        assert set(shown) <= set(texts)
    whole = (packed.length == length).sum()
    assert whole >= len(packed) - 2
    if length == 1000:
        assert packed.size is not None
        assert packed.size.sum() == sum(len(text.encode()) for text in TEXTS * 20)
        assert packed.length.sum() == packed.size.sum() + 100 or tokens


def test_what_is_unknown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers

    made: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "words.json"))
    tokenizer = open_text_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer is not None
    pack(source_of(["the cat the"], "one"), length=4, cache_dir=tmp_path, tokenizer=tokenizer)
    assert "1 tokens of one are the one for what" in capsys.readouterr().err
    with pytest.raises(UserError, match="names no token for the end of a document"):
        pack(source_of(["the"], "two"), length=4, cache_dir=tmp_path, tokenizer=tokenizer, crossing=True)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "the"}}')
    ended = open_text_tokenizer(str(tmp_path / "words.json"))
    assert ended is not None
    assert (ended.end, tokenizer.end) == (0, None)


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = write_json_tokenizer if package == "tokenizers" else write_sentencepieces
    file = write(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: run `pip install 'bilevel\[tokenizers\]'`"):
        open_text_tokenizer(str(file))
