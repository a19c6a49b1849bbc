"""Writes the arrays of packed captions, a block of images at a time; decodes them in threads."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bilevel.data.captions.stream import Captioned, CaptionSource, Picture, caption_hash, picture_bytes
from bilevel.data.digests import digest, text_hash
from bilevel.data.labelled.decoding import ImageError, decoded, resized
from bilevel.data.loading.arrays import check_rows
from bilevel.data.text.writer import GrowingArray
from bilevel.types import UserError

FORMAT_VERSION = 1
THREADS = 8
_BLOCK = 256  # images decoded at once
_MOST_LABELS = 10_000
REASONS = ("corrupt", "missing", "empty")
"""An image that cannot be decoded, a file that is not there, no caption."""
Decode = Literal["once", "each_time"]


class PackOptions(NamedTuple):
    """How images are packed."""

    size: int
    small_size: int
    decode: Decode


class _Row(NamedTuple):
    """An image as it is written."""

    pixels: NDArray[np.uint8]
    small: NDArray[np.uint8]
    encoded: bytes
    """Empty where images are decoded once."""
    hash: int


class _Dropped(NamedTuple):
    reason: str
    where: str
    why: str


def write_captions(folder: Path, source: CaptionSource, options: PackOptions) -> None:
    """Write the arrays and the manifest of `PackedCaptions` to an empty folder.

    Raises:
        UserError: no image is left, or as reading the source.
    """
    writer = _Writer(folder, options, source.label_kinds)
    with contextlib.closing(writer), ThreadPoolExecutor(THREADS) as threads:
        items = source.read()
        while block := list(itertools.islice(items, _BLOCK)):
            writer.add(block, list(threads.map(lambda item: _prepared(item, options), block)))
    if not writer.rows:
        raise UserError(_nothing_left(source, writer))
    check_rows(writer.rows, source.name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "size": options.size,
        "small_size": options.small_size,
        "decode": options.decode,
        "row_count": writer.rows,
        "image_count": writer.images,
        "caption_count": len(writer.captions),
        "dropped": {reason: sum(one.reason == reason for one in writer.dropped) for reason in REASONS},
        "content_hash": writer.content_hash(),
        "label_names": {kind: list(names) for kind, names in writer.label_names.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    lines = ("\t".join(" ".join(cell.split()) for cell in one) + "\n" for one in writer.dropped)
    (folder / "dropped.tsv").write_text("".join(lines), encoding="utf-8", errors="replace")


def decode_picture(picture: Picture, where: str, size: int) -> NDArray[np.uint8]:
    """Decode an image, or take its pixels, as RGB uint8 `[size, size, 3]`: the shorter side is scaled, the longer one cut.

    Raises:
        ImageError: it cannot be decoded.
        UserError: pillow is missing.
    """
    if not isinstance(picture, np.ndarray):
        return decoded(picture_bytes(picture), where, size)
    if picture.shape[-1] == 4:
        return decoded(_png(picture), where, size)  # lays what is transparent on grey
    pixels = resized(picture, size)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _prepared(item: Captioned, options: PackOptions) -> _Row | _Dropped:
    if not item.caption:
        return _Dropped("empty", item.where, "no caption")
    if item.picture is None:
        return _Dropped("missing", item.where, "no image")
    try:
        content = picture_bytes(item.picture)
        picture = item.picture if isinstance(item.picture, np.ndarray) else content
        if isinstance(picture, np.ndarray) and picture.shape[-1] not in (1, 3, 4):
            raise ImageError(f"{item.where} has {picture.shape[-1]} channels instead of 1, 3 or 4.")
        pixels = decode_picture(picture, item.where, options.size)
    except FileNotFoundError:
        return _Dropped("missing", item.where, f"{item.picture} does not exist")
    except ImageError as error:
        return _Dropped("corrupt", item.where, str(error))
    encoded = b""
    if options.decode == "each_time":
        encoded = _png(picture) if isinstance(picture, np.ndarray) else picture
    return _Row(pixels, resized(pixels, options.small_size), encoded, text_hash(pixels.tobytes()))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


class _Writer:
    def __init__(self, folder: Path, options: PackOptions, label_kinds: tuple[str, ...]):
        self.images = self.rows = 0
        """Images read, and those kept."""
        self.dropped: list[_Dropped] = []
        self.captions: dict[str, int] = {}
        self.label_names: dict[str, dict[str, int]] = {kind: {} for kind in label_kinds}
        self._settings = f"captions {options.size} {options.small_size}"
        self._hashers = {name: hashlib.blake2b(digest_size=16) for name in ("hash", "label", "place", "text")}
        self._decode = options.decode
        types: dict[str, Any] = {"place": np.int32, "label": np.int32, "hash": np.uint64, "number": np.int64}
        types |= {"text": np.uint8, "text_starts": np.int64, "caption": np.int32} | dict.fromkeys(label_kinds, np.int32)
        self._arrays = {name: GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in types.items()}
        sides = {"small": options.small_size}
        if options.decode == "once":
            sides["image"] = options.size
        else:
            self._arrays |= {
                name: GrowingArray(folder / f"{name}.npy", dtype)
                for name, dtype in (("encoded", np.uint8), ("encoded_starts", np.int64))
            }
        for name, side in sides.items():
            self._arrays[name] = GrowingArray(folder / f"{name}.npy", np.uint8, (side, side, 3))
        self._ends: dict[str, int] = {"text": 0, "encoded": 0}
        for name in ("text_starts", "encoded_starts"):
            if name in self._arrays:
                self._arrays[name].append(np.zeros(1, np.int64))

    def add(self, block: list[Captioned], prepared: list[_Row | _Dropped]) -> None:
        """Write the images that were decoded."""
        both = enumerate(zip(block, prepared, strict=True))
        kept = [(number, item, row) for number, (item, row) in both if isinstance(row, _Row)]
        self.dropped += [row for row in prepared if isinstance(row, _Dropped)]
        self._add_pictures([row for _, _, row in kept])
        self._add_captions([item.caption for _, item, _ in kept])
        self._append("label", np.array([item.label for _, item, _ in kept], np.int32))
        self._arrays["number"].append(np.array([number for number, _, _ in kept], np.int64) + self.images)
        for place, (kind, names) in enumerate(self.label_names.items()):
            values = [names.setdefault(item.labels[place], len(names)) for _, item, _ in kept]
            self._arrays[kind].append(np.array(values, np.int32))
            if len(names) > _MOST_LABELS:
                raise UserError(
                    f"There are more than {_MOST_LABELS} different labels of the kind {kind}, such as "
                    f"{next(reversed(names))[:40]!r}; the first column of --data.generic-labels names an image's domain, the "
                    "second one its fault."
                )
        self.images += len(block)
        self.rows += len(kept)

    def _add_pictures(self, rows: list[_Row]) -> None:
        if not rows:
            return
        self._arrays["small"].append(np.stack([row.small for row in rows]))
        self._append("hash", np.array([row.hash for row in rows], np.uint64))
        if self._decode == "once":
            self._arrays["image"].append(np.stack([row.pixels for row in rows]))
        else:
            self._add_flat("encoded", [row.encoded for row in rows])

    def _add_captions(self, captions: list[str]) -> None:
        """Write each distinct caption once, and which one each row has."""
        known = len(self.captions)
        places = np.array([self.captions.setdefault(caption, len(self.captions)) for caption in captions], np.int32)
        new = list(itertools.islice(self.captions, known, None))
        self._append("place", places)
        self._arrays["caption"].append(np.array([caption_hash(caption) for caption in new], np.int32))
        texts = [caption.encode("utf-8", "replace") for caption in new]
        self._add_flat("text", texts)
        self._hashers["text"].update(b"".join(text + b"\n" for text in texts))

    def _append(self, name: str, values: NDArray[Any]) -> None:
        """Write values that the content hash depends on."""
        self._arrays[name].append(values)
        self._hashers[name].update(values.astype(values.dtype.newbyteorder("<")).tobytes())

    def _add_flat(self, name: str, parts: list[bytes]) -> None:
        ends = self._ends[name] + np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._arrays[name].append(np.frombuffer(b"".join(parts), np.uint8))
        self._arrays[f"{name}_starts"].append(ends)
        if len(ends):
            self._ends[name] = int(ends[-1])

    def content_hash(self) -> str:
        """Return a digest of the rows, the same however they are kept."""
        return digest([self._settings, *(hasher.digest() for hasher in self._hashers.values())])

    def close(self) -> None:
        """Finish the files."""
        for array in self._arrays.values():
            array.close()


def _nothing_left(source: CaptionSource, writer: _Writer) -> str:
    if not writer.images:
        return f"{source.name} holds no images; give data that are not empty (--data.generic, --data.specific)."
    counts = Counter(one.reason for one in writer.dropped)
    reason, count = counts.most_common(1)[0]
    first = next(one for one in writer.dropped if one.reason == reason)
    advice = {
        "empty": "name the captions with --data.caption-column",
        "missing": "name the paths with --data.image-column, and write them relative to the table",
        "corrupt": "give images in them, or name another column with --data.image-column",
    }[reason]
    return (
        f"{source.name}: none of the {writer.images:,} images can be used, {count:,} are {reason} (the first is {first.where}: "
        f"{first.why.rstrip('.')}); {advice}."
    )
