"""How a step combines its parts, checked before anything is traced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bilevel.devices.axis import ALONE, Axis
from bilevel.methods.base import Method
from bilevel.selection.filters import Filter
from bilevel.selection.uses import MaxUses
from bilevel.step.estimators import Estimator
from bilevel.types import UserError

Mode: TypeAlias = Literal["sparse", "dense"]
AlphaBatch: TypeAlias = Literal["filtered", "uniform"]


@dataclass(frozen=True)
class StepOptions:
    """How a step combines its parts. See `make_step` for what the fields mean."""

    batch_size: int
    mode: Mode = "sparse"
    estimator: Estimator = "softmax"
    alpha_batch: AlphaBatch = "filtered"
    alpha_batch_size: int | None = None
    update_every: int = 4
    probe_every: int | None = None
    normalize_alignments: bool = False
    entropy_bonus: float = 0.0
    shift_pull: float = 0.0
    ema_decay: float | None = None
    micro_batches: int = 1
    row_metrics: tuple[str, ...] = ()
    max_uses: MaxUses | None = None
    axis: Axis = ALONE

    def __post_init__(self) -> None:
        for name in ("batch_size", "update_every", "micro_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.probe_every is not None and (self.probe_every < 1 or self.probe_every % self.update_every):
            raise UserError(
                f"probe_every={self.probe_every} must be a multiple of update_every={self.update_every}: "
                "the specific gradient can only be renewed where α moves."
            )
        if self.mode not in ("sparse", "dense"):
            raise UserError(f'mode="{self.mode}" is unknown: choose "sparse" or "dense".')
        if self.estimator not in ("softmax", "score", "uniform"):
            raise UserError(f'estimator="{self.estimator}" is unknown: choose "softmax", "score" or "uniform".')
        if self.alpha_batch not in ("filtered", "uniform"):
            raise UserError(f'alpha_batch="{self.alpha_batch}" is unknown: choose "filtered" or "uniform".')
        if self.alpha_batch_size is not None and self.alpha_batch_size < 2:
            raise UserError(f"alpha_batch_size={self.alpha_batch_size} must be at least 2: one row has no rival.")
        if self.mode == "dense" and (
            self.alpha_batch == "uniform" or self.alpha_batch_size not in (None, self.batch_size)
        ):
            raise UserError(
                'mode="dense" takes the α-gradient on the rows of the θ-update: '
                'leave alpha_batch and alpha_batch_size out, or choose mode="sparse".'
            )
        if self.estimator == "score" and (self.alpha_batch == "uniform" or self.mode == "dense"):
            raise UserError(
                'estimator="score" needs rows drawn in proportion to their weights: '
                'use it with mode="sparse" and alpha_batch="filtered", or choose "softmax".'
            )
        if self.estimator == "uniform" and self.alpha_batch == "filtered" and self.mode == "sparse":
            raise UserError(
                'estimator="uniform" needs rows drawn without regard to their weights: '
                'use it with mode="dense" or alpha_batch="uniform", or choose "softmax" or "score".'
            )
        for name in ("entropy_bonus", "shift_pull"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be a number of at least 0; 0 is none.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must lie in (0, 1), or be None for no average.")

    def check_chooses_weights(self) -> None:
        """Reject options that do not fit a method that chooses all weights itself.

        Raises:
          UserError: in sparse mode, or with work on some steps only.
        """
        if self.mode != "dense":
            raise UserError(
                f'mode="{self.mode}" does not fit a method that chooses the weights of all rows itself '
                '(learning_to_reweight, spcl, mentornet): choose mode="dense", and give big batches of batch_size rows.'
            )
        if self.update_every != 1:
            raise UserError(
                f"update_every={self.update_every} does not fit a method that chooses the weights of every θ-update "
                "itself (learning_to_reweight, spcl, mentornet): leave it out, or choose 1."
            )

    @property
    def averaged_by(self) -> str:
        """The option by which the model state is averaged; "" if there is none."""
        if self.micro_batches > 1:
            return f"micro_batches={self.micro_batches}"
        if self.axis.name is not None:
            return f"axis_name={self.axis.name!r}"
        return "" if self.ema_decay is None else f"ema_decay={self.ema_decay}"

    @property
    def period(self) -> int:
        """The number of steps after which the kinds of steps repeat."""
        return self.probe_every or self.update_every

    @property
    def shares_rows(self) -> bool:
        """Whether one linearisation serves both the θ-update and the α-gradient."""
        own_size = self.alpha_batch_size not in (None, self.batch_size)
        return self.mode == "dense" or (self.alpha_batch == "filtered" and not own_size)


def check_parts(method: Any, filter: Any, derivatives: Any) -> None:
    """Reject a factory (or its name) given instead of its result.

    Such as `soba` for `soba(…)`.

    Raises:
      UserError: for such an argument.
    """
    if not isinstance(method, Method):
        raise UserError(f"method={method!r} is no Method: give what a factory returns, as in method=bilevel.soba(…).")
    if filter is not None and not isinstance(filter, Filter):
        raise UserError(f"filter={filter!r} is no Filter: give what a factory returns, as in filters.gumbel_top_k().")
    if isinstance(derivatives, (type, str)):
        raise UserError(
            f"derivatives={derivatives!r} is no way of differentiating: give bilevel.Finite() or Forward()."
        )


def check_together(
    options: StepOptions, method: Method, filter: Filter | None, *, has_weighting: bool, has_rate: bool
) -> None:
    """Reject parts of a step that do not fit each other.

    Args:
      options: how the parts are combined.
      method: what learns α.
      filter: the filter that the user gave.
      has_weighting: whether there is a weighting network.
      has_rate: whether there is an optimizer of α.

    Raises:
      UserError: for the first two that do not.
    """
    if method.chooses_weights:
        options.check_chooses_weights()
    learns = method.update is not None and not method.chooses_weights
    if learns and (options.alpha_batch_size or options.batch_size) < 2:
        raise UserError(
            f"batch_size={options.batch_size} leaves one row to learn the weights from, and one row has no rival: give a "
            "larger batch, or alpha_batch_size."
        )
    if learns and options.estimator == "score" and filter is not None and not filter.proportional:
        raise UserError(
            f'estimator="score" needs rows drawn in proportion to their weights, and the filter {filter.name} does not draw '
            'them so: choose estimator="softmax", or gumbel_top_k() or importance().'
        )
    if filter is not None and filter.weigh is not None and (learns or options.mode == "dense"):
        raise UserError(
            f"The filter {filter.name}(unbiased=True) undoes every preference in the mean: use it in sparse mode and with a "
            "method that learns no weighting network (frozen), or leave unbiased out."
        )
    if options.max_uses is not None and (options.mode == "dense" or not method.uses_weights):
        raise UserError(
            "max_uses leaves rows of a big batch out by their logits, and here none are picked by logits: choose "
            'mode="sparse" and a method with a weighting network (uniform ones: load each row as often as it may be used).'
        )
    if options.max_uses is not None and filter is not None and not filter.caps:
        raise UserError(
            f"max_uses does not fit the filter {filter.name}, which may pick a row whatever its logit, or one twice: choose "
            "gumbel_top_k, top_k, top_fraction or threshold."
        )
    if not has_weighting and method.uses_weights:
        raise UserError("weighting=None, but this method selects or weighs rows by it: give a function or a Scorer.")
    if learns and not has_rate:
        raise UserError(
            "weight_optimizer=None, but this method learns the weighting network: give an optax transformation."
        )
    if method.update is not None and options.period > options.update_every and method.reuse is None:
        raise UserError(
            f"probe_every={options.probe_every} needs a method that can do without a specific batch on some α-steps: soba, "
            "penalty, or dds and anograd with an average_specific. Choose one of them, or omit probe_every."
        )
