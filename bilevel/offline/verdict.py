"""What acceleration rates say, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

from bilevel.offline.acceleration import RATES

CHANCE = 0.5
ERRORS = 2
"""A rate is above chance if it is so by more than this many standard errors."""
FINDINGS = {
    (True, True): "both are above chance: gradient alignments tell the two kinds of data apart",
    (True, False): "only SAR is above chance: specific batches do more than generic ones for specific rows, but no less for "
    "generic rows",
    (False, True): "only GAR is above chance: specific batches do no more than generic ones for specific rows",
    (False, False): "neither is above chance: either generic batches serve specific rows as well as specific batches do, or "
    "gradient alignments do not show the difference",
}  # fmt: skip
"""(SAR above chance, GAR above chance) -> what that says, after section 6.3."""
PAPER = (
    "Grangier et al., table 8, report 86.2 / 69.4 % for language modelling and 78.1 / 68.2 % for translation, where bilevel "
    "data selection helped, and 50.3 / 49.8 % for image classification, where it did poorly, which makes the rates an indication "
    "from three tasks, not a promise"
)


def verdict(step: int, rates: Mapping[str, float]) -> str:
    """Return a sentence on the rates of a model after some steps, with the paper's numbers beside them.

    Args:
      step: θ-updates of the model.
      rates: the fields of `AccelerationRates`.
    """
    sar, gar = (rates[name] - CHANCE > ERRORS * rates[f"{name}_error"] for name in RATES)
    return (
        f"After {step} steps SAR is {in_percent(rates, 'sar')} and GAR {in_percent(rates, 'gar')} (± one standard error; "
        f"chance is 50 %), so that {FINDINGS[sar, gar]}; {PAPER}."
    )


def in_percent(rates: Mapping[str, float], name: str) -> str:
    """Return a rate and its standard error as text: "61.0 ± 2.5 %"."""
    return f"{100 * rates[name]:.1f} ± {100 * rates[f'{name}_error']:.1f} %"
