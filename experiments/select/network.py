"""The weighting network of a finished run."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.data import NumpyBatch, digest
from bilevel.nn.weighting import logit_fn
from bilevel.training.run_dir import CONFIG_NAME, read_settings
from bilevel.types import Array, Params, UserError
from experiments.language_modeling import build
from experiments.language_modeling.config import DENSE, PLAIN, Config, ModelConfig

WEIGHTS_NAME = "weights.npz"
_SHAPE_FLAGS = ("weighting", "weighting_layers", "weighting_width")


class Network(NamedTuple):
    """A trained weighting network."""

    logits: Callable[[NumpyBatch], Array]
    """Rows (tokens uint8 `[b, T]`, length int32 `[b]`) -> logits, float32 `[b]`; one compiled program for each b."""
    length: int
    """T: bytes in a row, as in training."""
    settings: dict[str, Any]
    """What decides the logits: architecture, length and a digest of the parameters."""


def load_network(run: Path) -> Network:
    """Loads the weighting network of a finished run of experiments.language_modeling.

    Args:
      run: the run's directory METHOD-seedN.

    Raises:
      UserError: if the directory is missing or none, its run is not finished, or learned no network that scores text.
    """
    settings = _settings(run)
    try:
        method, length = str(settings["method"]), int(settings["length"])
        chosen = {name: settings["model"][name] for name in _SHAPE_FLAGS}
        model = dataclasses.replace(ModelConfig(), **chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run / CONFIG_NAME} lacks the settings of a language-modelling run ({type(error).__name__}: {error}): "
            "give a run of experiments.language_modeling."
        ) from error
    if method in (*PLAIN, *DENSE):
        raise UserError(
            f"{run} is a run of {method}, which learns no network that scores text: give one of soba, dds or anograd."
        )
    module = build.build_weighting(Config(length=length, model=model))
    batch = {"tokens": jnp.zeros((1, length), jnp.uint8), "length": jnp.full((1,), length, jnp.int32)}
    template = jax.eval_shape(module.init, jax.random.key(0), batch["tokens"], batch["length"])["params"]
    params, identity = _load_params(run, template)
    compiled = jax.jit(logit_fn(module))
    return Network(lambda rows: compiled(params, rows), length, {**chosen, "length": length, "parameters": identity})


def _settings(run: Path) -> dict[str, Any]:
    file = run / CONFIG_NAME
    if not run.is_dir():
        raise UserError(
            f"--weights {run} is no directory: give METHOD-seedN below the run directory of a finished run."
        )
    if not file.exists():
        inside = sorted(path.parent.name for path in run.glob(f"*/{WEIGHTS_NAME}"))
        hint = f"one of the runs in it, {', '.join(inside)}" if inside else "METHOD-seedN below a run directory"
        raise UserError(f"--weights {run} holds no {CONFIG_NAME}, so it is not the directory of one run: give {hint}.")
    return read_settings(run)


def _load_params(run: Path, template: Params) -> tuple[Params, str]:
    """The parameters on the device, in the tree of `template`, and a digest of them."""
    file = run / WEIGHTS_NAME
    if not file.exists():
        raise UserError(
            f"{file} does not exist, so this run is not finished: continue it with the command that began it."
        )
    try:
        with file.open("rb") as raw, np.load(raw) as stored:
            leaves = [stored[f"leaf_{i}"] for i in range(len(stored.files))]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): continue that run, or train again."
        ) from error
    wanted, tree = jax.tree.flatten(template)
    if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in wanted]:
        raise UserError(
            f"The arrays in {file} do not have the shapes that {run / CONFIG_NAME} states: give another run."
        )
    return jax.device_put(jax.tree.unflatten(tree, leaves)), digest([x.tobytes() for x in leaves])
