"""Embeddings of captions: latent semantic analysis of generic captions, a file, or a function of the user's."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.digests import digest, text_hash
from bilevel.data.notes import note
from bilevel.data.opening import place_of
from bilevel.data.streams import one_line
from bilevel.types import UserError

DIMENSIONS = 256
MOST_CAPTIONS = 500_000
"""Distinct captions that the analysis is fitted on, those with the smallest hashes."""
_WORD = r"(?u)\w+"
"""Single letters too: they tell "latin small letter a" from "latin small letter b"."""
_VERSION = 2
_BLOCK = 1 << 14
_CLOSE = 0.99


class TextEmbedding(Protocol):
    """Turns captions into vectors."""

    @property
    def name(self) -> str:
        """For messages and the report."""
        ...

    @property
    def dimensions(self) -> int:
        """d."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the vectors may have changed."""
        ...

    def __call__(self, captions: Sequence[str], /) -> NDArray[np.float32]:
        """Embed captions: float32 `[n, d]`."""
        ...


@dataclass(frozen=True)
class LSA:
    """Latent semantic analysis: TF-IDF of words, projected on its first singular vectors, of length 1; made by `open_embedding`.

    A caption of unknown words alone is the zero vector.

    Reference: Deerwester et al., "Indexing by latent semantic analysis", JASIS 1990.
    """

    words: tuple[str, ...]
    """The vocabulary, V words."""
    idf: NDArray[np.float64]
    """`[V]`: inverse document frequencies."""
    components: NDArray[np.float32]
    """`[d, V]`: right singular vectors."""
    name: str = "lsa"

    @property
    def dimensions(self) -> int:
        """d."""
        return len(self.components)

    @property
    def fingerprint(self) -> str:
        """A digest of vocabulary, frequencies and vectors."""
        return digest(["lsa", "\n".join(self.words), self.idf.tobytes(), self.components.tobytes()])

    def __call__(self, captions: Sequence[str], /) -> NDArray[np.float32]:
        """Embed captions, new ones too: float32 `[n, d]`."""
        vectorizer = _vectorizer(vocabulary=list(self.words))
        vectorizer.idf_ = self.idf
        found = np.zeros((len(captions), self.dimensions), np.float32)
        for start in range(0, len(captions), _BLOCK):
            words = vectorizer.transform(captions[start : start + _BLOCK])
            found[start : start + _BLOCK] = words @ self.components.T
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
        return found / lengths


@dataclass(frozen=True)
class FunctionEmbedding:
    """A function of the user's, such as a sentence encoder.

    Args:
        function: captions -> `[n, d]`.
        name: says which function it is; vectors that were computed under this name are kept, so change it with the function.
        dimensions: d.
    """

    function: Callable[[Sequence[str]], ArrayLike]
    name: str
    dimensions: int

    @property
    def fingerprint(self) -> str:
        """A digest of the name."""
        return digest(["function", self.name, self.dimensions])

    def __call__(self, captions: Sequence[str], /) -> NDArray[np.float32]:
        """Embed captions: float32 `[n, d]`.

        Raises:
            UserError: the function returns another shape, or what is not finite.
        """
        return _checked(np.asarray(self.function(captions)), (len(captions), self.dimensions), self.name)


@dataclass(frozen=True)
class FileEmbedding:
    """Vectors from a file, for the captions that stand there; made by `open_embedding`."""

    name: str
    vectors: NDArray[np.float32]
    """`[n, d]`."""
    places: dict[str, int]
    """Caption -> its vector."""
    fingerprint: str

    @property
    def dimensions(self) -> int:
        """d."""
        return self.vectors.shape[1]

    def __call__(self, captions: Sequence[str], /) -> NDArray[np.float32]:
        """Look captions up: float32 `[n, d]`.

        Raises:
            UserError: some are not in the file.
        """
        found = [self.places.get(one_line(caption), -1) for caption in captions]
        if missing := [caption for caption, place in zip(captions, found, strict=True) if place < 0]:
            raise UserError(
                f"{self.name} has no vector for {len(missing):,} of {len(captions):,} captions, such as {missing[0][:60]!r}; add "
                "them, or give --data.embedding lsa."
            )
        return self.vectors[np.asarray(found, np.int64)]


def open_embedding(
    spec: str,
    captions: Sequence[str],
    *,
    counts: NDArray[np.integer[Any]] | None = None,
    dimensions: int = DIMENSIONS,
    cache_dir: str | Path,
) -> TextEmbedding:
    """Open an embedding of captions.

    Args:
        spec: "lsa", fitted on `captions` and kept in the cache; or a .npz file with text `captions` `[n]` and `embeddings`
            `[n, d]`, in which all captions must be, those of the classes too. For a function see `FunctionEmbedding`.
        captions: distinct generic captions, as `PackedCaptions.captions` gives them.
        counts: how many images have each, integer `[n]`, so that "lsa" keeps the words of what is frequent; None: all alike.
        dimensions: d of "lsa".
        cache_dir: made if it does not exist.

    Raises:
        UserError: there are too few captions or words, the file is missing or of another form, or scikit-learn is missing.
    """
    if spec != "lsa":
        return _of_file(spec)
    if dimensions < 1:
        raise UserError(f"--data.text-dimensions is {dimensions}; it must be at least 1.")
    often = np.ones(len(captions), np.int64) if counts is None else np.asarray(counts, np.int64)
    if len(captions) > MOST_CAPTIONS:
        kept = sorted(range(len(captions)), key=lambda i: text_hash(captions[i].encode()))[:MOST_CAPTIONS]
        captions, often = [captions[i] for i in kept], often[kept]
    key = digest(["lsa", _VERSION, dimensions, often.tobytes(), *captions])
    return cached_folder(
        Path(cache_dir) / f"lsa-{dimensions}-{key}",
        _opened,
        lambda folder: _fit(folder, captions, often, dimensions),
        work="Fitting the embedding of captions",
    )


def note_close_captions(captions: Sequence[str], embedding: TextEmbedding) -> None:
    """Say how many pairs of captions, such as those of classes, have nearly the same vector: no model tells them apart."""
    vectors = embedding(captions)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    cosines = np.triu(vectors @ vectors.T, 1)
    close = int((cosines > _CLOSE).sum())
    if close:
        one, other = divmod(int(cosines.argmax()), len(captions))
        note(
            f"{close:,} of {len(captions) * (len(captions) - 1) // 2:,} pairs of captions have nearly the same vector by "
            f"{embedding.name} (a cosine above {_CLOSE}), such as {captions[one]!r} and {captions[other]!r}; raise "
            "--data.text-dimensions, or give other vectors with --data.embedding."
        )


def _vectorizer(**options: Any) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise UserError(
            f"--data.embedding lsa needs scikit-learn, which cannot be imported ({error}): run `pip install "
            "'bilevel[experiments]'`, or give a .npz file with vectors."
        ) from error
    return TfidfVectorizer(token_pattern=_WORD, sublinear_tf=True, **options)


def _fit(folder: Path, captions: Sequence[str], counts: NDArray[np.int64], dimensions: int) -> None:
    vectorizer = _vectorizer(norm=None, use_idf=False)
    from sklearn.decomposition import TruncatedSVD
    from threadpoolctl import threadpool_limits

    try:
        matrix = vectorizer.fit_transform(captions)
    except ValueError as error:  # no words at all
        raise UserError(
            f"The {len(captions)} generic captions hold no words ({error}); check --data.caption-column."
        ) from error
    most = min(matrix.shape) - 1
    if dimensions > most:
        raise UserError(
            f"{matrix.shape[0]:,} captions of {matrix.shape[1]:,} different words are too few for {dimensions} dimensions; give "
            f"--data.text-dimensions {max(most, 1)} or less, or more generic captions."
        )
    words = list(vectorizer.get_feature_names_out())
    weighed = _vectorizer(vocabulary=words)
    # As scikit-learn has it, with each image counted.
    weighed.idf_ = np.log((1 + counts.sum()) / (1 + counts @ (matrix > 0))) + 1
    # A row that stands n times counts as one times √n does.
    matrix = weighed.transform(captions).multiply(np.sqrt(counts)[:, None]).tocsr()
    # One thread: sums in another order give other vectors, and on busy processors several threads took seven times as long.
    with threadpool_limits(1):
        svd: Any = TruncatedSVD(dimensions, random_state=0).fit(matrix)
    np.save(folder / "components.npy", svd.components_.astype(np.float32))
    np.save(folder / "idf.npy", weighed.idf_)
    (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")


def _opened(folder: Path) -> LSA:
    try:
        words = tuple(json.loads((folder / "words.json").read_text("utf-8")))
        idf, components = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("idf", "components"))
        if idf.shape != (len(words),) or components.shape[1:] != (len(words),):
            raise ValueError(f"{len(words)} words, but vectors {list(components.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The embedding in {folder} is damaged ({error}); remove the folder and try again.") from error
    return LSA(words, idf, components)


def _of_file(spec: str) -> FileEmbedding:
    path = Path(place_of(spec))
    if path.suffix.lower() != ".npz" or not path.is_file():
        what = "is not a .npz file" if path.is_file() else "does not exist"
        raise UserError(f"--data.embedding {spec} {what}; give lsa, or a .npz file with captions and embeddings.")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npz file ({error}); write it again with numpy.savez.") from error
    if missing := {"captions", "embeddings"} - stored.keys():
        raise UserError(
            f"{path} holds {', '.join(stored) or 'nothing'}, but no array {min(missing)!r}; --data.embedding needs captions "
            "(text [n]) and embeddings (numbers [n, d])."
        )
    captions, vectors = stored["captions"], stored["embeddings"]
    if captions.dtype.kind != "U" or captions.ndim != 1 or vectors.ndim != 2:
        raise UserError(
            f"{path}: captions are {captions.dtype}{list(captions.shape)} and embeddings {vectors.dtype}{list(vectors.shape)}; "
            "--data.embedding needs text [n] and numbers [n, d]."
        )
    vectors = _checked(vectors, (len(captions), vectors.shape[1]), str(path))
    places = {one_line(str(caption)): place for place, caption in enumerate(captions)}
    return FileEmbedding(str(path), vectors, places, digest(["vectors", *captions.tolist(), vectors.tobytes()]))


def _checked(vectors: NDArray[Any], shape: tuple[int, int], name: str) -> NDArray[np.float32]:
    if vectors.shape != shape or vectors.dtype.kind not in "fiu":
        raise UserError(
            f"The embedding {name} gives {vectors.dtype}{list(vectors.shape)} for {shape[0]} captions; it must give numbers "
            f"{list(shape)} (--data.embedding)."
        )
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise UserError(f"The embedding {name} of caption {row} is not finite; correct it (--data.embedding).")
    return vectors.astype(np.float32)
