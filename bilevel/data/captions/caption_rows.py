"""Packed images with embedded captions: the data set that a model of images and text trains on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.captions.embeddings import TextEmbedding
from bilevel.data.captions.packed_captions import PackedCaptions
from bilevel.data.digests import digest
from bilevel.data.loading.arrays import NumpyBatch, take_rows
from bilevel.data.text.writer import GrowingArray
from bilevel.types import UserError

TextType = Literal["float32", "float16"]
_BLOCK = 1 << 14  # captions embedded at once


@dataclass(frozen=True)
class CaptionRows:
    """Images with embedded captions, as a data set; made by `embed_captions`."""

    packed: PackedCaptions
    texts: NDArray[np.floating[Any]]
    """float32 or float16 `[D, d]`: the embeddings of the distinct captions."""
    embedding: str
    """Fingerprint of the embedding."""

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.packed.name

    @property
    def content_hash(self) -> str:
        """A digest of the images, captions and labels, and of the embedding."""
        return digest(["caption rows", self.packed.content_hash, self.embedding, self.texts.dtype.name])

    @property
    def captions(self) -> CaptionVectors:
        """The same rows without images: what others are compared with."""
        return CaptionVectors(self)

    @property
    def small(self) -> SmallRows:
        """The same rows without images and embeddings: what the weighting network chooses among."""
        return SmallRows(self)

    def __len__(self) -> int:
        return len(self.packed)

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        Returns:
            image uint8 `[b, H, W, 3]`, text float32 (or float16) `[b, d]`, and those of `PackedCaptions.small_rows`: small uint8
            `[b, s, s, 3]`, caption int32 `[b]`, label int32 `[b]`, id int32 `[b]`.
        """
        return {
            "image": self.packed.images(indices),
            "text": self.vectors(indices),
            **self.packed.small_rows(indices),
        }

    def vectors(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.floating[Any]]:
        """Gather the embeddings of captions, `[b, d]`, of rows at `indices`, integer `[b]`."""
        return take_rows(self.texts, take_rows(self.packed.place, indices))


@dataclass(frozen=True)
class _PartOfRows:
    """Some of the arrays of the rows."""

    whole: CaptionRows

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.whole.name

    @property
    def content_hash(self) -> str:
        """The digest of the whole rows, whose numbers these have."""
        return self.whole.content_hash

    def __len__(self) -> int:
        return len(self.whole)


class SmallRows(_PartOfRows):
    """Small images and caption numbers alone, as a data set: `CaptionRows.small`."""

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`; see `PackedCaptions.small_rows`."""
        return self.whole.packed.small_rows(indices)


class CaptionVectors(_PartOfRows):
    """Captions alone, as a data set: `CaptionRows.captions`."""

    def rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather rows at `indices`, integer `[b]`.

        Returns:
            text float32 (or float16) `[b, d]`, caption int32 `[b]` (equal for equal captions), id int32 `[b]`.
        """
        packed = self.whole.packed
        return {
            "text": self.whole.vectors(indices),
            "caption": take_rows(packed.caption, take_rows(packed.place, indices)),
            "id": np.asarray(indices, np.int32),
        }


def embed_captions(
    packed: PackedCaptions, embedding: TextEmbedding, *, text_type: TextType = "float32", cache_dir: str | Path
) -> CaptionRows:
    """Embed the distinct captions of packed images, once; a second call only opens the vectors.

    Args:
        packed: the images.
        embedding: of the captions, by `open_embedding`, or a `FunctionEmbedding`.
        text_type: of the vectors; float16 takes half the space.
        cache_dir: made if it does not exist.

    Raises:
        UserError: the embedding has no vector of a caption, or gives other shapes.
    """
    if text_type not in ("float32", "float16"):
        raise UserError(f"--data.text-type {text_type!r} is not known; give float32 or float16.")
    shape = (len(packed.caption), embedding.dimensions)
    fingerprint = embedding.fingerprint

    def opened(folder: Path) -> NDArray[Any]:
        try:
            texts = np.load(folder / "texts.npy", mmap_mode="r", allow_pickle=False)
            if texts.shape != shape or texts.dtype != text_type:
                raise ValueError(f"texts.npy is {texts.dtype}{list(texts.shape)}, not {text_type}{list(shape)}")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"The vectors in {folder} are damaged ({error}); remove the folder and try again."
            ) from error
        return np.asarray(texts)

    def write(folder: Path) -> None:
        captions, array = packed.captions(), GrowingArray(folder / "texts.npy", text_type, shape[1:])
        try:
            for start in range(0, len(captions), _BLOCK):
                array.append(embedding(captions[start : start + _BLOCK]).astype(text_type))
        finally:
            array.close()
        manifest = {"source": packed.name, "embedding": embedding.name, "shape": shape, "fingerprint": fingerprint}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    key = digest(["caption vectors", packed.content_hash, fingerprint, text_type])
    folder = Path(cache_dir) / f"caption-vectors-{key}"
    texts = cached_folder(folder, opened, write, work=f"Embedding the captions of {packed.name}")
    return CaptionRows(packed, texts, fingerprint)
