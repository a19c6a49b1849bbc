"""How long the loop runs, and how often it does what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bilevel.types import UserError


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to do what."""

    num_steps: int
    """Steps in all, those of earlier starts of this run included."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    evaluate_every: int = 500
    """Steps between two evaluations; there is one after the last step too. 0: only that one."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; there is one after the last step too. 0: only that one."""
    state_every: int = 0
    """Steps between two calls of `on_state`; there is one before the first and one after the last step too. 0: only these."""
    keep: int = 2
    """How many checkpoints are kept."""
    steps_per_call: int = 1
    """Most steps that one call of the compiled program makes; more than 1 needs `Resident` data."""
    progress: bool = True
    """Show a progress bar (lines when stderr is not a terminal)."""
    stop_signals: bool = True
    """SIGTERM and SIGINT finish the steps in hand, save and return."""
    tensorboard: bool = False
    """Mirror the metrics to TensorBoard events in the run directory."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: one is out of range.
        """
        smallest = dict.fromkeys(("num_steps", "log_every", "keep", "steps_per_call"), 1)
        smallest |= dict.fromkeys(("evaluate_every", "checkpoint_every", "state_every"), 0)
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give {least} or more.")

    def due(self, done: int, every: int) -> bool:
        """Return whether what happens `every` so many steps is due after `done` steps.

        0: never. It is due when all steps are done, too.
        """
        return done == self.num_steps or (every > 0 and done % every == 0)

    def calls(self, start: int) -> Iterator[tuple[int, int]]:
        """Iterate over `(first step, count)` of the calls from `start` on.

        None goes beyond a step with something due.
        """
        given = (self.log_every, self.evaluate_every, self.checkpoint_every, self.state_every)
        rhythms = [every for every in given if every]
        while start < self.num_steps:
            ends = [start + self.steps_per_call, self.num_steps, *((start // every + 1) * every for every in rhythms)]
            yield start, min(ends) - start
            start = min(ends)
