"""What can be refused before anything is trained: the data and the settings of every run of a comparison."""

from __future__ import annotations

import jax

from bilevel.data import Loader
from bilevel.devices import sharding
from bilevel.nn.transformer import language_model_loss
from bilevel.types import UserError
from experiments.language_modeling import build, contrastive, search
from experiments.language_modeling.config import Config, settings_of
from experiments.language_modeling.corpora import Corpora, load_corpora
from experiments.language_modeling.weights import weights_file


def opened(config: Config, methods: list[str]) -> Corpora:
    """The data of one specific set, after the settings of all methods and trials were checked against them.

    Raises:
      UserError: for data or settings that a run would refuse.
    """
    corpora = load_corpora(config)
    for method in methods if not config.eval_only else ():
        for own in [config, *search.trial_configs(config, method, corpora)]:
            # What no method causes is found with the first.
            check_named(own, method, corpora, method if method != methods[0] else "")
    return corpora


def check_named(config: Config, method: str, corpora: Corpora, name: str) -> None:
    """As `check`, the errors beginning with a name, if it is not empty."""
    try:
        check(config, method, corpora)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from error


def check(config: Config, method: str, corpora: Corpora) -> None:
    """Checks the settings of one run.

    Raises:
      UserError: for settings that the run would refuse.
    """
    mesh, settings = sharding.make_mesh(), settings_of(config, method)
    model = build.build_model(config)
    loss = language_model_loss(build.build_model(config, mesh))
    build.build_step(config, method, model, loss, build.weighting_of(config, method, loss), mesh)
    _, specific = build.build_loaders(config, method, config.seed, corpora)
    sharding.check_divides(mesh, batch_size=config.batch_size, specific_batch_size=specific.batch_size)
    if method == "contrastive":
        contrastive.steps_before_selection(config, settings)
        contrastive.check(config, settings, corpora)
    if method == "frozen":
        weights_file(config.weights.frozen_from)
    if method == "contrastive" or config.finetune_steps:
        Loader(corpora.specific["train"], config.batch_size, seed=config.seed, process_count=jax.process_count())
