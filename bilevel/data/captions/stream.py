"""What a source of captioned images is, and what is made of one: parts, labels, captions of classes."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bilevel.data.digests import digest, text_hash
from bilevel.data.opening import Place, open_bytes, read_errors
from bilevel.data.streams import changed, hashed_parts, held_apart, joined, labelled
from bilevel.types import UserError

Picture: TypeAlias = "Place | bytes | NDArray[np.uint8]"
"""An encoded image as a file or its content, or pixels uint8 `[H, W, C]` of 1, 3 or 4 channels."""
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}
_MOST_CLASSES = 20_000


class Captioned(NamedTuple):
    """An image with a caption, as its source gives it."""

    where: str
    """For messages: file, line, member of an archive."""
    picture: Picture | None
    """None: the source names no image."""
    caption: str
    """In one line; `""` where there is none."""
    category: str = ""
    """What the source calls the class; `""` without classes."""
    label: int = -1
    """Number of the class; −1: not known."""
    labels: tuple[str, ...] = ()
    """The domain and, if known, the fault; for analysis only."""


@dataclass(frozen=True)
class CaptionSource:
    """A stream of captioned images that can be read again and again; made by `open_captions` or `open_specific_captions`."""

    name: str
    """For messages and manifests."""
    read: Callable[[], Iterator[Captioned]]
    """Starts a new pass over the images, not yet decoded. Those without a caption are there too: packing drops and counts
    them."""
    identify: Callable[[], str]
    """Computes what `fingerprint` returns."""
    label_kinds: tuple[str, ...] = ()
    """What the labels of an image say: (), ("domain",) or ("domain", "fault")."""
    categories: tuple[str, ...] = ()
    """The names of the classes in the order of their numbers, where the source knows them all."""

    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the images may have changed; it reads almost nothing.

        Of a table that names image files only the table counts: pack into another cache after changing those.
        """
        return digest(["captions", self.identify()])


def caption_hash(caption: str) -> int:
    """The number by which equal captions know each other: 31 bits of a hash, upper and lower case alike."""
    return text_hash(caption.casefold().encode("utf-8", "surrogatepass")) >> 33


def picture_bytes(picture: Picture) -> bytes:
    """Return the content of an encoded image, or the pixels with their shape.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, np.ndarray):
        return repr(picture.shape).encode() + picture.tobytes()
    with read_errors(picture), open_bytes(picture, decompress=False) as file:
        return file.read()


def picture_hash(item: Captioned) -> int:
    """The 64-bit hash of an image as it is stored; missing ones go by their place."""
    try:
        return text_hash(picture_bytes(item.picture) if item.picture is not None else item.where.encode())
    except FileNotFoundError:
        return text_hash(item.where.encode())


def joined_captions(name: str, sources: list[CaptionSource]) -> CaptionSource:
    """Read several sources one after the other; the labels of the images are kept where all say the same kinds."""
    known = {source.categories for source in sources}
    return joined(name, sources, categories=known.pop() if len(known) == 1 else ())


def labelled_captions(source: CaptionSource, path: str | Path, *, faults: bool = True) -> CaptionSource:
    """Give each image the labels of its line in a table: the domain in the first column, and a fault in the second one.

    Args:
        source: the images; line i of the table belongs to image i, images without a caption included.
        path: tab-separated columns, compressed or not. Where some line has a second column, lines without one have the
            fault "none".
        faults: whether a second column tells faults; otherwise it is not read.

    Raises:
        UserError: there is no such file; while reading, the numbers of lines and images differ, or a domain is empty.
    """
    return labelled(source, path, "images", faults=faults)


def parts_of_captions(source: CaptionSource, shares: Mapping[str, float] = SHARES) -> dict[str, CaptionSource]:
    """Split images by a hash of their content, so that equal files are in one part; see `hashed_parts`."""
    return hashed_parts(source, dict(shares), picture_hash)


def hold_out_captions(source: CaptionSource, share: float = 0.02) -> tuple[CaptionSource, CaptionSource]:
    """Split generic images into what is trained on, and a share held out by a hash of the image.

    Returns:
        The images to train on, under the name of the source, and those held out.

    Raises:
        UserError: there are too few images for one to be held out.
    """
    parts = parts_of_captions(source, {"held out": share, "train": 1 - share})
    return held_apart(source, parts, share, lambda item: item.caption, "images")


def parts_by_class(source: CaptionSource, sizes: Mapping[str, int], rest: str) -> dict[str, CaptionSource]:
    """Split images by class: so many of each class in each part, chosen by the smallest hashes of their content.

    Args:
        source: the images, each with a class.
        sizes: images of each class in each part.
        rest: the part of all others.

    Raises:
        UserError: an image has no class, or a class has too few images; while reading.
    """

    @cache
    def parts() -> dict[int, str]:
        ranked: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, item in enumerate(source.read()):
            if not item.category:
                raise UserError(
                    f"{item.where} has no class; name the column of the classes with --data.class-column, or omit "
                    "--data.specific-per-class."
                )
            ranked[item.category].append((picture_hash(item), number))
        wanted, found = sum(sizes.values()), {}
        for category, rows in ranked.items():
            if len(rows) <= wanted:
                raise UserError(
                    f"{source.name} has {len(rows)} images of the class {category!r}, too few for {_sizes(sizes)} and {rest}; "
                    "give smaller numbers with --data.specific-per-class."
                )
            names = [part for part, size in sizes.items() for _ in range(size)]
            found |= {number: part for part, (_, number) in zip(names, heapq.nsmallest(wanted, rows), strict=True)}
        return found

    def part_of(part: str) -> CaptionSource:
        def read() -> Iterator[Captioned]:
            return (item for number, item in enumerate(source.read()) if parts().get(number, rest) == part)

        return changed(source, f"{source.name} ({part})", read, "by class", part, _sizes(sizes))

    return {part: part_of(part) for part in (*sizes, rest)}


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{size} in {part}" for part, size in sizes.items())


def no_class(source: CaptionSource, where: str) -> str:
    """Say that an image has no class where others have."""
    return f"{where} has no class, but other images of {source.name} have; give it one, or leave it out."


def category_names(source: CaptionSource) -> tuple[str, ...]:
    """Return the names of the classes: those that the source knows, or those found, sorted; () without classes.

    Raises:
        UserError: some images have a class and others have none, or there are very many.
    """
    if source.categories:
        return source.categories
    found: set[str] = set()
    without = ""
    for item in source.read():
        found.add(item.category)
        without = without or ("" if item.category else item.where)
        if len(found) > _MOST_CLASSES:
            raise UserError(
                f"{source.name} has more than {_MOST_CLASSES} classes, such as {item.category!r}; name the column of the classes "
                "with --data.class-column."
            )
    if found == {""}:
        return ()
    if without:
        raise UserError(no_class(source, without))
    return tuple(sorted(found, key=lambda name: (0, int(name), "") if name.isdecimal() else (1, 0, name)))
