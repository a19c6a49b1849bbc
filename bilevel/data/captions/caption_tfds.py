"""Captioned images from TensorFlow Datasets, and from labelled arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bilevel.data.captions.caption_columns import CaptionColumns, Chosen, captions_of, choose_columns
from bilevel.data.captions.classes import TEMPLATE
from bilevel.data.captions.stream import Captioned, CaptionSource
from bilevel.data.digests import digest
from bilevel.data.loading.arrays import ArrayDataset
from bilevel.data.records import all_records
from bilevel.data.streams import NO_FAULT
from bilevel.data.tfds import identify_records, open_records, parse_spec
from bilevel.types import UserError

_AT_ONCE = 64  # images held in memory


def tfds_captions(spec: str, columns: CaptionColumns, split: str | None = None) -> CaptionSource:
    """Open `tfds:NAME[:SPLIT]`: the image and the caption, or the class, of each record.

    "captions.text" names the field `text` of the items of `captions`.

    Raises:
        UserError: an unknown name, split or feature, or a package that is missing.
    """
    name, named, field = parse_spec(spec)
    if field is not None:
        raise UserError(
            f"{spec}: captioned images have two features; write tfds:NAME:SPLIT, and name them with --data.image-column and "
            "--data.caption-column."
        )
    split = split or named
    records = open_records(spec, name, split)
    features = records.dataset_info.features
    outer = CaptionColumns(*(column and column.partition(".")[0] for column in columns))
    found = choose_columns(list(features), outer, spec)
    chosen = Chosen(columns.image or found.image, columns.caption or found.caption, columns.category or found.category)
    names = tuple(getattr(features[chosen.category], "names", None) or ()) if chosen.category in features else ()

    def read() -> Iterator[Captioned]:
        for number, record in enumerate(all_records(records, at_once=_AT_ONCE)):
            for item in captions_of(record, chosen, f"{spec} ({split}), record {number}", None):
                yield item._replace(category=_name(names, item.category)) if names else item

    key = ",".join(column or "" for column in chosen)
    return CaptionSource(spec, read, lambda: identify_records(records, split, key), (), names)


def _name(names: tuple[str, ...], number: str) -> str:
    """The name of a class; `""` where it is hidden, as in test sets, by a negative number."""
    return names[int(number)] if number.isdecimal() else ""


def splits_of(spec: str) -> set[str]:
    """Return the splits of `tfds:NAME`; none if the specification names one."""
    name, _, _ = parse_spec(spec)
    if spec != f"tfds:{name}":
        return set()
    return set(open_records(spec, name, "train").dataset_info.splits)


def captions_of_labels(
    dataset: ArrayDataset,
    names: Sequence[str],
    template: str = TEMPLATE,
    *,
    domain: str = "",
    numbered: bool = False,
) -> CaptionSource:
    """Caption labelled images by the name of their label, such as CIFAR-10 with the wrong labels of people (CIFAR-10N).

    `parts_by_class` splits them.

    Args:
        dataset: with arrays `image` uint8 `[N, H, W, C]` and `label` int `[N]`, as `open_labelled` gives it; where there is
            `clean_label`, a caption of another class has the fault "wrong caption".
        names: of the classes, in the order of the labels.
        template: the caption, with {} for the name.
        domain: of all these images, for analysis; `""`: the name of the data set.
        numbered: whether the images keep their label, as specific ones do; generic ones have −1.

    Raises:
        UserError: an array is missing, or a label has no name.
    """
    arrays = dataset.arrays
    if missing := {"image", "label"} - arrays.keys():
        raise UserError(f"{dataset.name} has no array {min(missing)!r} ({', '.join(arrays)}); give labelled images.")
    images, label = arrays["image"], arrays["label"]
    clean = arrays.get("clean_label", label)
    for values in (label, clean):
        if values.min() < 0 or values.max() >= len(names):
            raise UserError(
                f"{dataset.name}: the labels run from {values.min()} to {values.max()}, but there are {len(names)} names of "
                "classes; give one for each."
            )
    captions = [template.format(name) for name in names]

    def read() -> Iterator[Captioned]:
        for number, (image, said, true) in enumerate(zip(images, label, clean, strict=True)):
            labels = (domain or dataset.name, NO_FAULT if said == true else "wrong caption")
            label_of = int(said) if numbered else -1
            where = f"{dataset.name}, image {number}"
            yield Captioned(where, image, captions[said], str(names[said]), label_of, labels)

    def identify() -> str:
        return digest(["labels", dataset.content_hash, domain, str(numbered), *captions])

    return CaptionSource(dataset.name, read, identify, ("domain", "fault"), tuple(names))
