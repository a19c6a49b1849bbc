"""What a task supplies: data, a model with its losses, a weighting network, and how a model is measured.

A task is an object with the attributes and functions of `Task`. The study layer does the rest: methods, runs, comparisons,
search, fine-tuning, tables and the report, for every task alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from bilevel.data import Dataset, Pack, PairsByTarget
from bilevel.selection.known import Known as Known
from bilevel.selection.scorers import Scorer
from bilevel.study.report import Picture as Picture
from bilevel.study.report import Text as Text
from bilevel.training.evaluation import Evaluate as Evaluate
from bilevel.training.evaluation import evaluator as evaluator
from bilevel.training.evaluation import mean_evaluator as mean_evaluator
from bilevel.training.evaluation import rows_at_once as rows_at_once
from bilevel.types import Array, LogitFn, LossFn, ModelState, Params, TokenLosses, UserError

ParamFilter: TypeAlias = Callable[[str], bool]
"""Path of a parameter ("block_1/mlp/kernel") -> whether it is meant."""
Write: TypeAlias = Callable[[Params, ModelState, Dataset], Sequence[str]]
"""(θ, model state, rows) -> a text a row."""
GENERIC = "generic"
"""Name of the evaluated set of generic rows that are not trained on."""


class SourceLanguages(NamedTuple):
    """What is known of training pairs that come from several source languages."""

    table: PairsByTarget
    """Which rows of `train` each target sentence has."""
    specific: str
    """The language that the model is for."""
    sentences: Callable[[str], Sequence[str]]
    """A language -> its training sentences."""


class Past(NamedTuple):
    """What each batch brings along of the generic rows before it, because losses compare its rows with them."""

    rows: Callable[[Any], Dataset]
    """A data set of the task -> the same rows, of the arrays that are brought along."""
    size: int
    """Rows that are."""


@dataclass(frozen=True)
class Splits:
    """The data of a task, as disjoint sets of rows."""

    train: Dataset
    """Generic rows: θ learns from them."""
    specific: Dataset
    """Specific rows: α learns from them. `JoinedData` of several sets gives each specific batch from one of them."""
    valid: Mapping[str, Dataset]
    """Choices are made on the first; the others are reported."""
    test: Mapping[str, Dataset]
    """Reported only."""
    held_out: Dataset | None = None
    """What irreducible losses are learned from; None: there is none."""
    known: Mapping[str, Known] = field(default_factory=dict)
    """By name: the domain of a row, whether its label is wrong, …"""
    classes: int = 0
    """Number of labels of a batch's `label`; 0 where rows have none."""
    specific_weights: Sequence[float] | None = None
    """How often a specific batch comes from each set of `JoinedData`, in proportion; None: all alike."""
    languages: SourceLanguages | None = None
    """For methods that draw the source language of a target; None: there is one language."""
    past: Past | None = None
    """What batches bring along; None: nothing."""
    small: Callable[[Any], Dataset] | None = None
    """A data set of the task -> the same rows, of the arrays that the weighting network reads; None: it reads all of them."""
    about: str = ""
    """Where the rows come from, in a sentence for the report."""

    @property
    def hashes(self) -> dict[str, str]:
        """The content hash of each set: a path may hold other data tomorrow."""
        found = {"train": self.train, "specific": self.specific, "held_out": self.held_out}
        for phase, sets in self.measured().items():
            found |= {f"{phase}_{name}": rows for name, rows in sets.items()}
        return {name: rows.content_hash for name, rows in found.items() if rows is not None}

    @property
    def taught(self) -> Known | None:
        """The first fault that methods may learn from; None: there is none."""
        return next((known for known in self.known.values() if known.fault and known.taught), None)

    @property
    def deciding(self) -> Dataset:
        """The valid set that choices are made on."""
        return next(iter(self.valid.values()))

    def measured(self, test: bool = True) -> dict[str, Mapping[str, Dataset]]:
        """Return the sets that models are measured on: "valid" and, with `test`, "test"."""
        return {"valid": self.valid, "test": self.test} if test else {"valid": self.valid}


class ModelOptions(NamedTuple):
    """Which model is asked for."""

    network: str | None = None
    """Another network than that of the flags; None: that one."""
    mesh: Mesh | None = None
    """The devices that the state is split over, for a model that gathers its own parameters."""
    forward: bool = False
    """Whether forward-mode derivatives are taken: no fused kernels."""
    dtype: str | None = None
    """Another type of the computation; None: that of the flags."""


class Model(NamedTuple):
    """The main model, as losses. All take `(params, model_state, batch, rng)`; see `bilevel.types.LossFn`."""

    init: Callable[[Array], tuple[Params, ModelState]]
    """Random key -> θ and the model state."""
    loss: LossFn
    """Of generic rows in training: dropout, augmentation, BatchNorm by the batch."""
    specific_loss: LossFn
    """Of specific rows in training: as `loss`, without augmentation."""
    evaluation: LossFn
    """In evaluation mode: a row's loss depends on nothing but the row. Its metrics `[b]` are measured too."""
    scoring: Callable[[str], LossFn] | None = None
    """"batch" or "running", the statistics that BatchNorm normalises scored rows by -> the loss that scores rows, without
    augmentation; None: `evaluation`."""
    part: Callable[[int], ParamFilter] | None = None
    """Number of blocks -> the parameters of the last ones, for cheap probes; None: the network has no such blocks."""
    tokens: Callable[[bool], TokenLosses] | None = None
    """Whether in training -> the losses of tokens; None: rows have none."""
    at_once: int = 256
    """Most rows that are evaluated at once where θ does not move: for measures, losses of all rows, and scores of big batches."""
    gather: ParamFilter | None = None
    """See `make_step`."""
    describe: str = ""
    """In a few words, for the report."""
    start: Callable[[], Params] | None = None
    """Reads parameters that training begins with instead of those of `init`, as numpy arrays in nested dicts; they may be a part
    of all."""

    def first(self, key: Array, start: Params) -> tuple[Params, ModelState]:
        """Return θ and the model state before training: those of `init`, with what `start` has in their place."""
        params, model_state = self.init(key)
        return replaced(params, start), model_state


def replaced(tree: Any, part: Any) -> Any:
    """Return nested dicts of arrays with the arrays of `part`, which need not have all, in their places."""
    if not isinstance(part, Mapping):
        return part
    return {**tree, **{name: replaced(tree[name], value) for name, value in part.items()}} if part else tree


class Weighting(NamedTuple):
    """A weighting network."""

    init: Callable[[Array], Params]
    """Random key -> α."""
    logits: LogitFn | Scorer | None
    """None for a method that has none."""


class Measure(NamedTuple):
    """One number by which a model is judged."""

    name: str
    """As `Task.evaluate` returns it: loss, accuracy."""
    title: str
    digits: int = 3
    unit: str = ""
    lower_is_better: bool = True

    @property
    def sign(self) -> int:
        """1, or -1 where higher is better: the best value is that with the smallest product with it."""
        return 1 if self.lower_is_better else -1

    @property
    def label(self) -> str:
        """The title with the unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


class Task(Protocol):
    """A task. `config` is any dataclass with the fields `data` and `model`, dataclasses themselves: they become flags.

    The splits that a task is given are those that its `open` returned, which may be of a type of its own.
    """

    name: str
    """In run directories and on the command line."""
    title: str
    """Of the report."""
    config: type[Any]
    measures: Sequence[Measure]
    """The first one decides."""
    presets: Mapping[str, Mapping[str, Any]]
    """Preset -> method (or "study", or "task") -> what it sets; "default" holds always. A preset that sets "extends" to "paper"
    lies on that one, which holds the papers' settings of the methods."""

    def open(self, config: Any, folder: Path) -> Splits:
        """Open the data.

        Args:
          config: `data` and `model`.
          folder: the run directory, for what opening learns (which classes a model confuses).

        Raises:
          UserError: for data that are missing, broken or too small.
        """
        ...

    def model(self, config: Any, splits: Any, options: ModelOptions) -> Model:
        """Build the main model.

        Raises:
          UserError: for an unknown network, or data that it cannot take.
        """
        ...

    def weighting(self, config: Any, splits: Any) -> Weighting:
        """Build the weighting network over rows."""
        ...

    def evaluate(self, config: Any, splits: Any, model: Model) -> Evaluate:
        """Return the function that measures a model on a set of rows."""
        ...

    def show(self, config: Any, splits: Any, ids: NDArray[np.integer[Any]]) -> Sequence[Text | Picture]:
        """Return generic rows as texts or pictures for the report, `ids` being their numbers."""
        ...


class DocumentTask(Task, Protocol):
    """A task whose rows are documents or parts of them, so that `bilevel select` scores any corpus."""

    def model(self, config: Any, splits: Any, options: ModelOptions) -> Model:
        """Build the main model, without data too (`splits` is None then)."""
        ...

    def weighting(self, config: Any, splits: Splits | None) -> Weighting:
        """Build the weighting network over rows, without data too."""
        ...

    def pack(self, config: Any) -> Pack:
        """Return what cuts documents into rows of the weighting network, as in training."""
        ...


class ExportedTask(Task, Protocol):
    """A task whose trained models are written in a layout that other programs read, by `bilevel export`."""

    def export(self, config: Any, splits: Any, params: Params, folder: Path, dtype: str) -> None:
        """Write θ to a folder, its parameters in a type ("float32", "bfloat16").

        Raises:
          UserError: the model of these settings has no such layout.
        """
        ...


class WritingTask(Task, Protocol):
    """A task whose models write texts; they are measured at the end of a run alone."""

    judged: Sequence[Measure]
    """What `judge` returns."""

    def write(self, config: Any, splits: Any, model: Model) -> Write:
        """Return the function that writes a text for each row of a data set."""
        ...

    def judge(self, config: Any, splits: Any, rows: Any, texts: Sequence[str]) -> Mapping[str, float]:
        """Measure the texts that were written for some rows."""
        ...

    def chance(
        self, config: Any, splits: Any, rows: Any, baseline: Sequence[str], texts: Sequence[str]
    ) -> Mapping[str, float]:
        """Return how probable as large a difference of each measure is by chance, in [0, 1].

        `baseline` is what a model trained with the baseline wrote for the same rows.
        """
        ...

    def signature(self, config: Any) -> str:
        """Say in a few words how the texts are measured, so that others can compare."""
        ...


def measures_of(task: Any) -> tuple[Measure, ...]:
    """Return the measures of a model, and of what it writes."""
    return (*task.measures, *getattr(task, "judged", ()))


def check_task(task: Any, where: str) -> Task:
    """Return an object that is a task; a UserError names what another one lacks."""
    wanted = ("name", "title", "config", "measures", "presets", "open", "model", "weighting", "evaluate", "show")
    missing = [name for name in wanted if not hasattr(task, name)]
    if missing:
        raise UserError(f"The task in {where} lacks {', '.join(missing)}: implement bilevel.study.Task.")
    return task
