"""Captioned images packed to memory-mapped arrays: decoded once, or kept as files for large ones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.cache import cached_folder
from bilevel.data.captions.caption_writer import (
    FORMAT_VERSION,
    THREADS,
    Decode,
    PackOptions,
    decode_picture,
    write_captions,
)
from bilevel.data.captions.stream import CaptionSource
from bilevel.data.digests import digest
from bilevel.data.labelled.opening import statistics_of
from bilevel.data.loading.arrays import NumpyBatch, take_rows
from bilevel.data.notes import note, some
from bilevel.data.packed_folder import PackedFolder, packed_folder
from bilevel.data.streams import RowLabels
from bilevel.types import UserError

_COUNTED = 4096


@dataclass(frozen=True)
class PackedCaptions(PackedFolder):
    """Images and captions in memory-mapped arrays; made by `pack_captions`, and a data set with `embed_captions`.

    The manifest has source, size, small_size, decode, row_count, image_count, caption_count, dropped (images by reason),
    content_hash (of the pixels, captions and labels), label_names and format_version.
    """

    small: NDArray[np.uint8]
    """uint8 `[N, s, s, 3]`: what the weighting network sees."""
    label: NDArray[np.int32]
    """int32 `[N]`: the class; −1 for generic images."""
    place: NDArray[np.int32]
    """int32 `[N]`: which of the distinct captions each row has."""
    caption: NDArray[np.int32]
    """int32 `[D]`: `caption_hash` of each distinct caption, not negative."""
    hash: NDArray[np.uint64]
    """uint64 `[N]`: hash of each image's pixels."""
    number: NDArray[np.int64]
    """int64 `[N]`: the number of each row's image in the source, dropped ones counted."""
    labels: Mapping[str, RowLabels]
    """By what they say, "domain" and "fault"; empty without labels."""
    _text: NDArray[np.uint8]
    _text_starts: NDArray[np.int64]
    _image: NDArray[np.uint8] | None
    _encoded: tuple[NDArray[np.uint8], NDArray[np.int64]] | None

    @classmethod
    def open(cls, folder: Path) -> PackedCaptions:
        """Open a folder written by `pack_captions`; the arrays stay on disk.

        Raises:
            UserError: the folder is damaged or of another version.
        """
        with packed_folder(folder, "images", FORMAT_VERSION) as packed:
            manifest, read = packed.manifest, packed.array
            rows, distinct = manifest["row_count"], manifest["caption_count"]
            size, small = manifest["size"], manifest["small_size"]
            once = manifest["decode"] == "once"
            text_starts = read("text_starts", np.int64, distinct + 1)
            starts = None if once else read("encoded_starts", np.int64, rows + 1)
            return cls(
                folder,
                manifest,
                read("small", np.uint8, rows, small, small, 3),
                read("label", np.int32, rows),
                read("place", np.int32, rows),
                read("caption", np.int32, distinct),
                read("hash", np.uint64, rows),
                read("number", np.int64, rows),
                {k: RowLabels(read(k, np.int32, rows), tuple(n)) for k, n in manifest["label_names"].items()},
                read("text", np.uint8, int(text_starts[-1])),
                text_starts,
                read("image", np.uint8, rows, size, size, 3) if once else None,
                None if starts is None else (read("encoded", np.uint8, int(starts[-1])), starts),
            )

    @property
    def size(self) -> int:
        """Height and width of `images`."""
        return self.manifest["size"]

    def __len__(self) -> int:
        return len(self.label)

    def images(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Gather images, uint8 `[b, H, W, 3]`, at `indices`, integer `[b]`; large ones are decoded now, in threads."""
        if self._image is not None:
            return take_rows(self._image, indices)
        found = list(_threads().map(self._decoded, np.asarray(indices).tolist()))
        return np.stack(found) if found else np.zeros((0, self.size, self.size, 3), np.uint8)

    def small_rows(self, indices: NDArray[np.integer[Any]]) -> NumpyBatch:
        """Gather what is needed to choose among rows at `indices`, integer `[b]`: all but the images and embeddings.

        Returns:
            small uint8 `[b, s, s, 3]`, caption int32 `[b]` (equal for equal captions), label int32 `[b]` (−1: generic), and id
            int32 `[b]` (the row numbers).
        """
        return {
            "small": take_rows(self.small, indices),
            "caption": take_rows(self.caption, take_rows(self.place, indices)),
            "label": take_rows(self.label, indices),
            "id": np.asarray(indices, np.int32),
        }

    def text(self, row: int) -> str:
        """Return the caption of a row."""
        return self._caption(int(self.place[row]))

    def captions(self) -> list[str]:
        """Return the distinct captions, in the order of their first appearance."""
        whole = self._text.tobytes()
        starts = self._text_starts.tolist()
        return [whole[a:b].decode("utf-8") for a, b in itertools.pairwise(starts)]

    def counts(self) -> NDArray[np.int64]:
        """Return how many rows have each of the distinct captions, int64 `[D]`."""
        return np.bincount(self.place, minlength=len(self.caption))

    def dropped(self) -> str:
        """Say in a sentence how many images were dropped, why, and which ones; `""` if none were."""
        counts = self.manifest["dropped"]
        said = {"corrupt": "corrupt", "missing": "missing", "empty": "without a caption"}
        reasons = ", ".join(f"{counts[reason]:,} {words}" for reason, words in said.items() if counts[reason])
        if not reasons:
            return ""
        lines = (self.folder / "dropped.tsv").read_text("utf-8").splitlines()
        which = some([line.split("\t")[1] for line in lines])
        return (
            f"{sum(counts.values()):,} of {self.manifest['image_count']:,} images of {self.name} are dropped: {reasons}; "
            f"{which}, all named in {self.folder / 'dropped.tsv'}."
        )

    def _caption(self, place: int) -> str:
        start, end = self._text_starts[place : place + 2]
        return self._text[start:end].tobytes().decode("utf-8")

    def _decoded(self, row: int) -> NDArray[np.uint8]:
        assert self._encoded is not None
        content, starts = self._encoded
        picture = content[starts[row] : starts[row + 1]].tobytes()
        return decode_picture(picture, f"{self.name}, row {row}", self.size)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS)


def pack_captions(
    source: CaptionSource, *, size: int = 32, small_size: int = 16, decode: Decode = "once", cache_dir: str | Path
) -> PackedCaptions:
    """Decode the images of `source` and keep them in `cache_dir`; a second call only opens them.

    Images that cannot be decoded, are not there or have no caption are dropped and counted; a note says so, and the folder's
    `dropped.tsv` names all of them. Nothing else is dropped: what is worth training on is what weights learn.

    Args:
        source: the images.
        size: height and width that the model sees; the shorter side is scaled to it, the longer one cut.
        small_size: likewise for the weighting network, from the image of `size`.
        decode: "once" keeps pixels; "each_time" keeps the files, and decodes a row when it is asked for: for large images.
        cache_dir: made if it does not exist.

    Raises:
        UserError: no image is left, a setting is out of range, or as reading the source.
    """
    if small_size < 1 or size < small_size:
        raise UserError(
            f"--data.size is {size} and --data.small-size {small_size}; give a small size from 1 to the size."
        )
    if decode not in ("once", "each_time"):
        raise UserError(f"--data.decode {decode!r} is not known; give once or each_time.")
    options = PackOptions(size, small_size, decode)
    key = digest(["packed captions", FORMAT_VERSION, *map(str, options), source.name, source.fingerprint()])
    packed = cached_folder(
        Path(cache_dir) / f"captions-{size}-{key}",
        PackedCaptions.open,
        lambda folder: write_captions(folder, source, options),
        work=f"Packing {source.name}",
    )
    if dropped := packed.dropped():
        note(dropped)
    return packed


def image_statistics(packed: PackedCaptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the pixels of packed images, in units of 255.

    Of more than 4,096 images these many, evenly spread, count.

    Raises:
        UserError: a channel is constant.
    """
    places = np.linspace(0, len(packed) - 1, min(len(packed), _COUNTED)).astype(np.int64)
    return statistics_of(packed.images(places), packed.name)
