"""The methods of all tasks. A new method is a specification in `bilevel.study.methods` and its name here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bilevel.study.methods import languages, learning, plain, sampling, selecting, tokens, weighing
from bilevel.study.spec import Spec
from bilevel.study.task import Splits
from bilevel.types import UserError

BASELINE = "uniform"
"""What other methods are compared with."""
_KNOWN: dict[str, Spec] = {
    **plain.SPECS, **learning.SPECS, **weighing.SPECS, **selecting.SPECS, **sampling.SPECS,
    **languages.SPECS, **tokens.SPECS,
}  # fmt: skip
_ORDER = (
    "uniform", "mixing", "contrastive", "classifier", "meta_weight_net", "learning_to_reweight", "dds", "retrained_dds",
    "anograd", "soba", "warm_soba", "penalty", "implicit_cg", "implicit_neumann", "spcl", "mentornet", "rho_loss",
    "train_loss", "gradient_norm", "gradient_norm_is", "irreducible_loss", "token_selection", "svp", "rl_sampler",
    "uniform_pairs", "uniform_languages", "related", "tcs", "multilingual_dds", "tcs_dds", "frozen", "replayed",
)  # fmt: skip
METHODS: Mapping[str, Spec] = {name: _KNOWN[name] for name in (*_ORDER, *sorted(_KNOWN.keys() - {*_ORDER}))}
"""In the order of the tables."""


def chosen(compare: str, splits: Splits | None) -> list[str]:
    """Return the methods that --compare names, each once.

    Args:
      compare: names, comma-separated; "all" stands for every method that needs no other run and fits the data.
      splits: the data; None: not known yet, and every method may fit them.

    Raises:
      UserError: if one is unknown or does not fit, or none is named.
    """
    everything = [name for name, spec in METHODS.items() if spec.in_all and (splits is None or not spec.lacks(splits))]
    given = [name.strip() for name in compare.split(",") if name.strip()]
    names = [name for one in given for name in (everything if one == "all" else [one])]
    for name in names:
        if name not in METHODS:
            raise UserError(
                f'--compare names the method "{name}", which does not exist: choose from all, {", ".join(METHODS)}.'
            )
        if splits is not None and (lacks := METHODS[name].lacks(splits)):
            raise UserError(f"--compare names {name}, which needs {lacks}.")
    if not names:
        raise UserError(f"--compare is empty: name at least one of {', '.join(METHODS)}.")
    return list(dict.fromkeys(names))


def with_first(names: Sequence[str]) -> list[str]:
    """Return the methods with those that they continue from, before them."""
    found = [first for name in names for first in (*METHODS[name].first, name)]
    return list(dict.fromkeys(found))
