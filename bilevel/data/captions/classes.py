"""Classes of images and their captions: by a template, or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bilevel.data.captions.stream import Captioned, CaptionSource, no_class
from bilevel.data.notes import some
from bilevel.data.opening import Place, exists
from bilevel.data.streams import changed, one_line
from bilevel.data.text.lines import lines_of
from bilevel.types import UserError

TEMPLATE = "a photo of a {}"


class Classes(NamedTuple):
    """The classes of a set of images, in the order of their labels."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    numbers: Mapping[str, int]
    """What the source calls a class -> its label."""


def classes_of(found: tuple[str, ...], template: str | None, file: Place | None, where: str) -> Classes:
    """Caption classes.

    Args:
        found: the classes as the source calls them: names, or numbers.
        template: with {} for the name; None: "a photo of a {}", for names alone. Not used with a file.
        file: lines `CLASS<TAB>CAPTION` or `NUMBER<TAB>NAME<TAB>CAPTION`, more columns may follow; None: the template is used.
        where: the source, for messages.

    Raises:
        UserError: there are no classes, the template or the file is of another form, a class has no caption, or two have one.
    """
    if not found:
        raise UserError(
            f"{where} has no classes to caption; name their column with --data.class-column, or omit --data.template and "
            "--data.class-captions."
        )
    if file is not None:
        classes = _of_file(found, file, where)
    else:
        if template is None and all(name.isdecimal() for name in found):
            raise UserError(
                f"The classes of {where} are numbers ({some(found)}): give a file with lines NUMBER<TAB>CAPTION "
                "(--data.class-captions), or a --data.template for numbers."
            )
        captions = tuple(_filled(template or TEMPLATE, name) for name in found)
        classes = Classes(found, captions, {name: number for number, name in enumerate(found)})
    if len(set(classes.captions)) < len(classes.captions):
        double = next(caption for caption in classes.captions if classes.captions.count(caption) > 1)
        raise UserError(
            f"Two classes of {where} have the caption {double!r}; give each its own (--data.template, --data.class-captions)."
        )
    return classes


def with_class_captions(source: CaptionSource, classes: Classes, *, numbered: bool) -> CaptionSource:
    """Give each image the caption of its class.

    Args:
        source: the images.
        classes: those of the training part.
        numbered: whether the images get the number of their class as `label`, as specific ones do.
    """

    def read() -> Iterator[Captioned]:
        for item in source.read():
            number = classes.numbers.get(item.category)
            if not item.category:
                raise UserError(no_class(source, item.where))
            if number is None:
                raise UserError(
                    f"{item.where} is of a class {item.category!r} that train has not; the classes there are "
                    f"{some(classes.names)}."
                )
            yield item._replace(caption=classes.captions[number], label=number if numbered else -1)

    identity = (str(numbered), *classes.numbers, *classes.names, *classes.captions)
    return changed(source, source.name, read, "class captions", *identity, categories=classes.names)


def _filled(template: str, name: str) -> str:
    if template.count("{}") != 1:
        raise UserError(f"--data.template {template!r} must hold {{}} once, for the name of the class.")
    return one_line(template.replace("{}", name.replace("_", " ")))


def _of_file(found: tuple[str, ...], file: Place, where: str) -> Classes:
    lines = _lines(file)
    known = {key: caption for keys, caption in lines for key in keys}
    if missing := [name for name in found if name not in known]:
        raise UserError(
            f"{file} has no caption of the class {missing[0]!r} of {where}; write a line CLASS<TAB>CAPTION for each class "
            "(--data.class-captions)."
        )
    used = [(keys, caption) for keys, caption in lines if set(keys) & set(found)]
    numbers = {key: number for number, (keys, _) in enumerate(used) for key in keys}
    return Classes(tuple(keys[-1] for keys, _ in used), tuple(caption for _, caption in used), numbers)


def _lines(file: Place) -> list[tuple[list[str], str]]:
    """The lines of a file: what a class is called, by number and name or one of them, and its caption."""
    if not exists(file):
        raise UserError(f"The file {file} does not exist; check the path (--data.class-captions).")
    found: list[tuple[list[str], str]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines_of(file), start=1):
        cells = [one_line(cell) for cell in line.split("\t")]
        if cells == [""]:
            continue
        keys, caption = (cells[:1], cells[1]) if len(cells) == 2 else (cells[:2], cells[2] if len(cells) > 2 else "")
        if not caption or not all(keys):
            raise UserError(
                f"{file}, line {number}: {line[:60]!r} is not CLASS<TAB>CAPTION, nor NUMBER<TAB>NAME<TAB>CAPTION; correct it "
                "(--data.class-captions)."
            )
        if again := seen & set(keys):
            raise UserError(f"{file}, line {number}: the class {min(again)!r} is there twice; remove one of the lines.")
        seen.update(keys)
        found.append((keys, caption))
    return found
