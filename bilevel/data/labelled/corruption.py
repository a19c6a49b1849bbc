"""Labels made wrong, classes made irrelevant or rare: known faults, for experiments on choosing data.

Every function takes the arrays of a labelled set (`ArrayDataset.arrays`) and returns new ones, with what analyses count:

    label        int32 `[N]`, as given to the learner
    clean_label  int32 `[N]`, as it was before any corruption
    corrupted    bool `[N]`, label ≠ clean_label
    relevant     bool `[N]`, whether the row's true class is of interest (True unless `mark_relevant` says otherwise)

They are pure functions of their arguments, `seed` included. Functions that draw for each row draw the same for the first rows
of a longer set. They can be applied one after another; inputs are shared with the given arrays, not copied, unless rows are
left out. A learner must see `label` alone.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.data.labelled.annotations import (
    Arrays,
    annotated,
    check_fraction,
    checked_labels,
    chosen,
    generators,
    relabelled,
)
from bilevel.types import UserError


def uniform_noise(
    arrays: Arrays, fraction: float, *, num_classes: int, seed: int, among: Iterable[int] | None = None
) -> dict[str, NDArray[Any]]:
    """Each label is replaced with probability `fraction` by one of the other classes, all equally likely.

    Args:
        arrays: see the top of this module.
        fraction: between 0 and 1.
        num_classes: C.
        seed: not negative.
        among: the classes that replace others, such as those that occur in the training set; None: all C.

    Raises:
        UserError: a fraction outside [0, 1], fewer than 2 classes to choose from, or a label that is none of the C.

    Reference: RHO-LOSS, section 1 and figure 1 (10 % of the labels switched); Rolnick et al. 2017.
    """
    check_fraction(fraction)
    given = annotated(arrays)
    label = checked_labels(given["label"], num_classes)
    circle = checked_labels(np.unique(np.arange(num_classes) if among is None else list(among)), num_classes)
    if len(circle) < 2:
        raise UserError(
            f"Labels cannot be switched among the classes {circle.tolist()}; "
            "there must be 2 or more: without them give --data.noise none."
        )
    which, how = generators(seed, 2)
    switched = which.random(len(label)) < fraction
    # One to len(circle) − 1 steps further round the circle of classes: any but the same.
    within = np.isin(label, circle)
    steps = (how.random(len(label)) * (len(circle) - within)).astype(np.int32) + within
    return relabelled(given, np.where(switched, circle[(np.searchsorted(circle, label) + steps) % len(circle)], label))


def pair_noise(
    arrays: Arrays, pairs: Mapping[int, int], *, fraction: float = 0.5, seed: int
) -> dict[str, NDArray[Any]]:
    """Each label that is a key of `pairs` is replaced by the value with probability `fraction`.

    Args:
        arrays: see the top of this module.
        pairs: class -> the class that it is mistaken for; see `most_confused`.
        fraction: between 0 and 1.
        seed: not negative.

    Raises:
        UserError: a fraction outside [0, 1], no pairs, or a class that is mistaken for itself.

    Reference: RHO-LOSS, section 5.1 (the four most frequently confused classes, flipped with 50 % probability).
    """
    check_fraction(fraction)
    if not pairs or any(a == b for a, b in pairs.items()):
        raise UserError(f"pairs={dict(pairs)} is not possible; give at least one class and another one for it.")
    given = annotated(arrays)
    label = given["label"]
    which = generators(seed, 1)[0]
    switched = which.random(len(label)) < fraction
    found = label.copy()
    for source, target in pairs.items():
        found[switched & (label == source)] = target
    return relabelled(given, found)


def most_confused(confusion: NDArray[Any], count: int = 4) -> dict[int, int]:
    """The classes that are most often taken for another one, and for which.

    Args:
        confusion: `[C, C]`, how many rows of class i were predicted to be class j.
        count: number of classes.

    Returns:
        class -> the class it is most often taken for, most frequent first; equally frequent ones by number.

    Raises:
        UserError: the matrix is not square, or has too few classes.
    """
    confusion = np.array(confusion, np.float64)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or not 1 <= count <= len(confusion):
        raise UserError(f"{count} classes cannot be found in a confusion matrix of shape {list(confusion.shape)}.")
    np.fill_diagonal(confusion, -1)
    target = confusion.argmax(axis=1)
    often = np.argsort(-confusion.max(axis=1), kind="stable")[:count]
    return {int(source): int(target[source]) for source in often}


def recorded_labels(arrays: Arrays, path: str | Path, name: str, *, num_classes: int) -> dict[str, NDArray[Any]]:
    """Labels from a file, such as the human ones of CIFAR-10N (`worse_label`, `aggre_label`, `random_label1` to 3).

    Args:
        arrays: see the top of this module; `source_row` int32 `[N]` says which row of the file belongs to each row (as
            `open_labelled` gives it: the file must be in the order of the source).
        path: a .npz file with arrays `[M]` of whole numbers; if one of them is `clean_label`, it must agree with ours.
        name: of the array.
        num_classes: C.

    Raises:
        UserError: the file cannot be read, lacks the array or rows, is in another order, or a label is none of the C.

    Reference: Wei et al., "Learning with noisy labels revisited: a study using real-world human annotations", ICLR 2022.
    """
    given = annotated(arrays)
    if "source_row" not in given:
        raise UserError(
            "There is no array 'source_row', which tells the rows of the file; open the data by open_labelled."
        )
    try:
        with np.load(os.path.expanduser(path), allow_pickle=False) as file:
            stored = {key: file[key] for key in file.files if key in (name, "clean_label")}
            names = ", ".join(file.files)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as a .npz file ({error}); check the path (in --data.noise FILE.npz:NAME) and the file."
        ) from error
    if name not in stored:
        raise UserError(
            f"{path} holds no array {name!r} but {names}; name one of these, as in --data.noise FILE.npz:NAME."
        )
    rows = given["source_row"]
    for key in (name, *stored):
        if stored[key].ndim != 1 or len(stored[key]) <= rows.max():
            shape = list(stored[key].shape)
            raise UserError(
                f"{path}: {key} has the shape {shape}, but the data have a row {rows.max()}; give its labels too."
            )
    if "clean_label" in stored and (wrong := (stored["clean_label"][rows] != given["clean_label"]).sum()):
        raise UserError(
            f"{path}: clean_label differs from ours in {wrong} rows; the file must be in the order of the data."
        )
    return relabelled(given, _whole(stored[name], rows, num_classes, f"{path}: {name}"))


def _whole(labels: NDArray[Any], rows: NDArray[Any], num_classes: int, where: str) -> NDArray[np.int32]:
    """Some labels of a file, if they are whole numbers from 0 to `num_classes − 1`."""
    found = labels[rows]
    good = np.zeros(len(found), bool)
    if found.dtype.kind in "iuf":
        good = (found >= 0) & (found < num_classes) & (found == np.floor(found))
    if not good.all():
        first = int(np.argmin(good))
        raise UserError(
            f"{where}[{rows[first]}] is {found[first].item()!r}; give whole numbers from 0 to {num_classes - 1}."
        )
    return found.astype(np.int32)


def mark_relevant(arrays: Arrays, classes: Iterable[int]) -> dict[str, NDArray[Any]]:
    """All rows, with `relevant` where the clean label is one of `classes`: for a training set with classes of no interest.

    Reference: RHO-LOSS, section 5.2 ("more relevant points"): all classes in train, half of them in the held-out and test sets.
    """
    given = annotated(arrays)
    return {**given, "relevant": np.isin(given["clean_label"], list(classes))}


def only_classes(arrays: Arrays, classes: Iterable[int]) -> dict[str, NDArray[Any]]:
    """The rows whose clean label is one of `classes`, in their order: for the specific, held-out and test sets.

    Raises:
        UserError: no row is left.
    """
    given, kept = annotated(arrays), sorted(set(classes))
    return chosen(given, np.flatnonzero(np.isin(given["clean_label"], kept)), f"the classes {kept}")


def half_of_classes(num_classes: int, *, seed: int) -> tuple[int, ...]:
    """Half of the classes (rounded down) at random, in increasing order; the paper does not say which half it took."""
    generator = generators(seed, 1)[0]
    return tuple(sorted(int(c) for c in generator.permutation(num_classes)[: num_classes // 2]))


def long_tail(arrays: Arrays, factor: float, *, num_classes: int, seed: int) -> dict[str, NDArray[Any]]:
    """Fewer and fewer rows from the first class to the last: class c keeps the share factor^(−c/(C − 1)) of its rows.

    At least one row of each class that has any is kept; which ones is drawn. Classes go by `label`.

    Args:
        arrays: see the top of this module.
        factor: how many times larger the share of the first class is than that of the last; 1 changes nothing.
        num_classes: C.
        seed: not negative.

    Raises:
        UserError: a factor below 1, or a label that is not one of the classes.

    Reference: Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, section 5.1. (DDS has no such
        experiment: the imbalance of its figure 3 is that of the first 4,000 images of CIFAR-10.)
    """
    if not factor >= 1:
        raise UserError(f"The factor {factor} is below 1; the first class is the largest, so give 1 or more.")
    given = annotated(arrays)
    label = checked_labels(given["label"], num_classes)
    kept = []
    for c, generator in enumerate(generators(seed, num_classes)):
        rows = np.flatnonzero(label == c)
        share = factor ** (-c / max(num_classes - 1, 1))
        kept.append(generator.permutation(rows)[: max(1, int(len(rows) * share + 1e-9))])
    return chosen(given, np.sort(np.concatenate(kept)), "any class")
