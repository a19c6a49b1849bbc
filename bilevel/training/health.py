"""What a run warns of, once: what is not finite though training goes on, and a method that learns nothing."""

from __future__ import annotations

import warnings

from bilevel.training.interval import Fault

SILENT_STEPS = 20
"""α-steps in a row, from the first, whose alignments are all 0, before there is a warning."""


class Health:
    """Remembers the first fault of a run."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        """What was the first not to be finite in this start of the run."""
        self._alpha_steps = 0
        self._left_out = False
        self._moved = False

    def note(self, fault: Fault) -> None:
        """Warn of the first fault."""
        if self.fault is None:
            self.fault = fault
            warnings.warn(f"{fault.what}, and training goes on without it: {fault.advice}.", stacklevel=2)

    def watch(self, alpha_steps: int, silent: int) -> None:
        """Warn, once, if the alignments were 0 on each of the first α-steps.

        Args:
            alpha_steps: α-steps since the last call.
            silent: those among them whose alignments were all 0.
        """
        before = self._alpha_steps
        self._alpha_steps += alpha_steps
        self._moved |= silent < alpha_steps
        if not self._moved and before < SILENT_STEPS <= self._alpha_steps:
            warnings.warn(
                f"All alignments were 0 on each of the first {self._alpha_steps} α-steps, so the method has learned nothing: "
                "look for an optimizer of θ whose derivative is 0 where α is due (of signs, or one that gathers gradients), "
                "or for a specific loss that does not depend on θ.",
                stacklevel=2,
            )

    def watch_uses(self, step: int | None) -> None:
        """Warn, once, of a step that had too few rows left for its θ-update; None: there was none."""
        if step is not None and not self._left_out:
            self._left_out = True
            warnings.warn(
                f"At step {step} the big batch had fewer rows left than a batch, the others having been trained on as often as "
                "max_uses allows, so the batch was smaller: raise max_uses (--max-uses), or take fewer steps.",
                stacklevel=2,
            )
