"""How a step combines its parts, checked before anything is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from bilevel.estimators import Estimator
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
    ema_decay: float | None = None
    micro_batches: int = 1
    row_metrics: tuple[str, ...] = ()
    axis_name: str | None = None

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
        if self.estimator not in ("softmax", "score"):
            raise UserError(f'estimator="{self.estimator}" is unknown: choose "softmax" or "score".')
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
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must lie in (0, 1), or be None for no average.")

    def check_chooses_weights(self) -> None:
        """Refuses what does not fit a method that chooses the weights of every θ-update itself.

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
    def period(self) -> int:
        """The number of steps after which the kinds of steps repeat."""
        return self.probe_every or self.update_every

    @property
    def shares_rows(self) -> bool:
        """Whether one linearisation of the losses serves both the θ-update and the α-gradient."""
        own_size = self.alpha_batch_size not in (None, self.batch_size)
        return self.mode == "dense" or (self.alpha_batch == "filtered" and not own_size)
