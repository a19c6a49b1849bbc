"""Tokenizers of sentence pairs: trained, brought, and merged over languages."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from bilevel.data import MergedVocabulary, PairSource, Tokenizer, open_pairs, open_tokenizer, train_tokenizer
from bilevel.data.pairs import tokenizer as module
from bilevel.types import UserError

spm = pytest.importorskip("sentencepiece")
SYLLABLES = ("ba", "do", "ke", "li", "mu", "na", "ro", "si", "tu", "ve", "the", "red")
WORDS = ("the", "red", "dog", *(a + b + c for a in SYLLABLES[:8] for b in SYLLABLES[::3] for c in SYLLABLES[1::4]))
CZECH = {word: word[::-1].replace("a", "á") + "ý" for word in WORDS}


def sentences(count: int = 300, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    drawn = [[WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(2, 7))] for _ in range(count)]
    return [(" ".join(words), " ".join(CZECH[word] for word in words)) for words in drawn]


def source_of(folder: Path, pairs: Iterable[tuple[str, str]], name: str = "pairs.tsv") -> PairSource:
    (folder / name).write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return open_pairs(str(folder / name), target_language="cs")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_round_trip_and_special_pieces(tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path, sentences())
    tokenizer = open_tokenizer(kind, source, vocabulary=60, cache_dir=tmp_path / "cache")
    assert tokenizer.size == 60
    assert tokenizer.pieces()[:3] == ["<pad>", "<unk>", "</s>"]
    for pair in list(source.read())[:20]:
        rows = tokenizer.encode([pair.source, pair.target])
        assert min(map(min, rows)) > 2
        assert tokenizer.decode(rows) == [pair.source, pair.target]
    row = [*tokenizer.encode(["the dog"])[0], 2, 5, 0, 0]
    assert tokenizer.decode(np.array([row])) == ["the dog"], "up to eos"
    assert tokenizer.decode([]) == []
    assert tokenizer.encode(["", "漢"])[0] == []
    assert 1 in tokenizer.encode(["漢"])[0]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_model(tmp_path: Path, kind: module.ModelKind) -> None:
    pairs = sentences()
    source = source_of(tmp_path, pairs)
    first, second = (
        train_tokenizer(source, vocabulary=60, kind=kind, cache_dir=tmp_path / name) for name in ("a", "b")
    )
    assert first.fingerprint == second.fingerprint
    others = [
        train_tokenizer(
            source_of(tmp_path, sentences(seed=1), "b.tsv"), vocabulary=60, kind=kind, cache_dir=tmp_path / "a"
        ),
        train_tokenizer(source, vocabulary=70, kind=kind, cache_dir=tmp_path / "a"),
        train_tokenizer(source, vocabulary=40, kind=kind, side="source", cache_dir=tmp_path / "a"),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert not any("ý" in piece for piece in others[-1].pieces()), "of the source side only"


def test_a_second_time_it_is_only_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path, sentences())
    first = train_tokenizer(source, vocabulary=60, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(module, "_train", None)
    assert train_tokenizer(source, vocabulary=60, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint
    monkeypatch.undo()
    (file,) = (tmp_path / "cache").glob("*/tokenizer.model")
    file.write_bytes(b"damaged")
    assert train_tokenizer(source, vocabulary=60, cache_dir=tmp_path / "cache").fingerprint == first.fingerprint


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (100_000, r"pairs\.tsv does not give 100,000 pieces: set --data\.vocabulary to at most \d+, or"),
        (9, r"The letters of .*pairs\.tsv need more than 9 pieces: set --data\.vocabulary to at least \d+\.$"),
    ],
)
def test_impossible_vocabularies(tmp_path: Path, kind: str, vocabulary: int, message: str) -> None:
    source = source_of(tmp_path, sentences())
    with pytest.raises(UserError, match=message):
        open_tokenizer(kind, source, vocabulary=vocabulary, cache_dir=tmp_path / "cache")


def test_no_text_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("en\tcs\n")
    with pytest.raises(UserError, match=r"a\.tsv holds no text to train a tokenizer on"):
        train_tokenizer(open_pairs(str(tmp_path / "a.tsv"), target_language="cs"), cache_dir=tmp_path / "cache")


def model_file(path: Path, **special: int) -> Path:
    model = io.BytesIO()
    texts = (text for pair in sentences() for text in pair)
    spm.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=60, minloglevel=3, **special
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def test_models_of_the_user(tmp_path: Path) -> None:
    source = source_of(tmp_path, sentences())
    given = model_file(tmp_path / "own.model", pad_id=0, unk_id=1, eos_id=2, bos_id=-1)
    tokenizer = open_tokenizer(str(given), source, cache_dir=tmp_path / "cache")
    assert tokenizer.decode(tokenizer.encode(["the red dog"])) == ["the red dog"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        UserError, match=r"other\.model has pad, unk and eos at -1, 0, 2; train it with pad_id=0, unk_id=1"
    ):
        open_tokenizer(str(model_file(tmp_path / "other.model")), source, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"The tokenizer words does not exist; give a sentencepiece \.model file"):
        open_tokenizer("words", source, cache_dir=tmp_path)
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.model is not a sentencepiece model"):
        open_tokenizer(str(tmp_path / "bad.model"), source, cache_dir=tmp_path)


def test_merged_vocabularies_share_equal_pieces(tmp_path: Path) -> None:
    sides = {"en": "source", "cs": "target"}
    pairs = [(source, f"{target} the") for source, target in sentences()]
    source = source_of(tmp_path, pairs)
    own: dict[str, Tokenizer] = {
        language: train_tokenizer(source, vocabulary=45, side=side, cache_dir=tmp_path / "cache")  # pyright: ignore
        for language, side in sides.items()
    }
    merged = MergedVocabulary(own)
    english, czech = (set(own[language].pieces()) for language in ("en", "cs"))
    assert english & czech > {"<pad>", "<unk>", "</s>"}
    assert len(merged.pieces) == len(english | czech) == merged.of("en").size == merged.of("cs").size
    for language, tokenizer in own.items():
        numbers = merged.of(language).numbers
        assert [merged.pieces[number] for number in numbers] == tokenizer.pieces()
    numbers = {
        language: dict(zip(own[language].pieces(), merged.of(language).numbers, strict=True)) for language in own
    }
    assert all(numbers["en"][piece] == numbers["cs"][piece] for piece in english & czech)
    for text, language in zip(pairs[0], ("en", "cs"), strict=True):
        tokenizer = merged.of(language)
        rows = tokenizer.encode([text])
        assert tokenizer.decode([[*rows[0], 2, 0]]) == [text]
        assert tokenizer.decode([[1, 2]]) == own[language].decode([[1, 2]])
    assert len({merged.of("en").fingerprint, merged.of("cs").fingerprint, own["en"].fingerprint}) == 3
