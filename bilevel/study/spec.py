"""What a method is to a study: its settings, what it searches over, and the plan of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from bilevel.data import Dataset
from bilevel.methods import Method
from bilevel.state import TrainState
from bilevel.step import SampledStep, TrainStep, make_step
from bilevel.study.config import Study
from bilevel.study.context import Context
from bilevel.study.picked import in_groups, max_uses
from bilevel.study.task import Model, ParamFilter, Splits, Weighting
from bilevel.training import OnSelected
from bilevel.training.best_weights import BestWeights
from bilevel.training.random_search import Log, Space
from bilevel.types import Array, Params, UserError

RATE: Space = {"learning_rate": Log(1e-3, 8e-3)}
"""A search varies settings of the method, and "learning_rate", that of θ."""
NOTHING: Params = MappingProxyType({})
NO_WEIGHTING = Weighting(lambda key: {}, None)
"""For a method that has no network."""


class Tried(NamedTuple):
    """A setting that is chosen on valid, where neither it nor --trials is given; its default is then None."""

    name: str
    values: Callable[[Study], Sequence[Any]]
    """What is tried."""


class Start(NamedTuple):
    """α before training, where it is known or learned beforehand."""

    weight_params: Params
    report: Mapping[str, float] = MappingProxyType({})
    """For the summary: `preparation_seconds` and the like."""


class Switch(NamedTuple):
    """Training goes on with other rows after some steps."""

    step: int
    rows: Callable[[Any], tuple[Dataset, Mapping[str, float]]]
    """The state after that step -> the rows, and what is reported. Called once; what it finds is kept on disk."""
    done: Callable[[], bool]
    """Whether the rows were chosen before."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run trains. Building it checks the settings, and is cheap: what costs something happens when it is called."""

    model: Model
    """What is trained: the task's model, or that with a proxy."""
    step: TrainStep | SampledStep
    init: Callable[..., Any]
    """Keys of the model, of the weights and of the step -> the initial state. A fourth argument, {} by default, is what
    `model.start` has read."""
    picks: bool = False
    """Whether rows are picked from a big batch."""
    reads_rows: bool = False
    """Whether that takes whole rows, because a model scores them, and not what the weighting network reads of them."""
    weighs: bool = True
    """Whether some rows count more than others, or are picked sooner."""
    specific_rows: int = 0
    """Specific rows in each loaded batch."""
    specific_batch_size: int = 0
    """Specific rows in an α-step; 0: as many as a θ-update has."""
    rows: Callable[[], Dataset] | None = None
    """The rows that are trained on; None: all generic ones."""
    start: Callable[[TrainState], Start] | None = None
    """Initial state -> α learned beforehand."""
    switch: Switch | None = None
    recorder: Callable[[], OnSelected] | None = None
    """Makes what keeps the rows that were drawn."""
    keeper: Callable[[], BestWeights] | None = None
    """Makes what keeps the weighting network of the best evaluation."""
    finish: Callable[[Any], Mapping[str, float]] | None = None
    """Last state -> what is reported of what was learned, after keeping that in the run's directory."""
    about: Mapping[str, str] = field(default_factory=dict)
    """For the summary, in words: what rows are `scored_by`, and how many of which sets are `trained_on` beside generic ones."""
    if_narrow: str = ""
    """What mends a distribution over rows that is narrower than a batch, in words; empty where that needs no mending."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Digests of what the run takes from elsewhere."""

    @property
    def samples(self) -> bool:
        """Whether a sampler picks rows by their numbers, from data on the device."""
        return isinstance(self.step, SampledStep)


def plan_over(
    context: Context, model: Model, method: Method, weighting: Weighting = NO_WEIGHTING,
    options: Mapping[str, Any] = MappingProxyType({}), **fields: Any,
) -> Plan:  # fmt: skip
    """Return a plan over `make_step`.

    Its `options` are those that the method chooses, beside what all methods of a study share; `fields` are those of `Plan`. A
    UserError says that options do not go together, or that a big batch leaves nothing to pick.
    """
    study, mesh = context.study, context.mesh
    if fields.get("picks") and study.big_batch_size < study.batch_size:
        raise UserError(
            f"--big-batch-size {study.big_batch_size} is smaller than --batch-size {study.batch_size}: the batch is picked "
            "from the big batch, so give a larger big batch."
        )
    if (rule := options.get("filter")) is not None and rule.groups is not None:
        weighting, fields = in_groups(context, weighting, fields)
    step = make_step(
        model.loss, weighting.logits, context.optimizer, method=method, batch_size=study.batch_size,
        specific_loss=model.specific_loss, ema_decay=study.optimizer.average or None, micro_batches=study.micro_batches,
        mesh=mesh if mesh.size > 1 else None, gather=model.gather,
        max_uses=max_uses(context, options.get("filter")) if fields.get("picks") else None,
        **{"weight_optimizer": None, **options},
    )  # fmt: skip

    def init(model_key: Array, weight_key: Array, step_key: Array, start: Params = NOTHING) -> TrainState:
        params, model_state = model.first(model_key, start)
        return step.init(step_key, params, weighting.init(weight_key), model_state)

    return Plan(model=model, step=step, init=init, **fields)


def probed(context: Context, model: Model, blocks: int, name: str = "probe-blocks") -> ParamFilter | None:
    """Return which parameters are probed: those of the last blocks, this many; None, which is all, for 0.

    `name` is that of the flag, for messages.
    """
    if not blocks:
        return None
    if model.part is None:
        raise UserError(f"--{context.flag}.{name} {blocks}: this network has no blocks; give 0.")
    try:
        return model.part(blocks)
    except UserError as error:
        raise UserError(f"--{context.flag}.{name} {blocks}: {error}") from error


def labels(splits: Splits) -> str:
    """Return what is lacking for a method that needs rows with a `label`."""
    return "" if splits.classes else "rows with a label, and these have none: omit it"


@dataclass(frozen=True)
class Spec:
    """A method of the registry."""

    settings: type[Any]
    """A frozen dataclass of its settings, with real defaults: they become the flags --METHOD.NAME."""
    plan: Callable[[Any, Context], Plan]
    search: Space = field(default_factory=lambda: RATE)
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the preset "paper"."""
    in_all: bool = True
    """Whether `--compare all` means it: it needs no file of another run."""
    tried: Tried | None = None
    first: tuple[str, ...] = ()
    """Methods whose run of the same seed it continues from."""
    lacks: Callable[[Splits], str] = lambda splits: ""
    """What the data lack that it needs, as the end of a sentence; empty: nothing."""
