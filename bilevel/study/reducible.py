"""The models of RHO-LOSS at the end of a run, kept so that they score documents that no run has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bilevel.devices import sharding
from bilevel.files import load_metadata, load_tree, save_tree
from bilevel.study.context import Context
from bilevel.study.known_rows import held_out_model
from bilevel.study.task import DocumentTask, ModelOptions
from bilevel.training.evaluation import trained
from bilevel.types import Array, Batch, Params

NAME = "losses.safetensors"
"""In the directory of a run: parameters and state of the model of irreducible losses, `held_out`, and perhaps of the trained
model, `target`."""
_MODELS = "models"
"""In its metadata: which of the two."""


def save_models(context: Context, s: Any, with_target: bool, state: Any) -> dict[str, float]:
    """Keep the models of a finished run, if documents can be scored by them; all processes call this.

    `with_target` says whether its scores compare with the trained model.

    Where irreducible losses came from a table or from two halves, no one model gives them, and nothing is kept.
    """
    if not hasattr(context.task, "pack") or s.table is not None or s.halves:
        return {}
    found = {"held_out": held_out_model(context, s)}
    if with_target:
        params, model_state = sharding.local(trained(state, context.mesh))
        proxied = getattr(s, "network", None) is not None
        found["target"] = (params["target"], model_state["target"]) if proxied else (params, model_state)
    if jax.process_index() == 0:
        save_tree(context.directory / NAME, found, {"task": context.task.name, _MODELS: ",".join(found)})
    return {}


def reducible_losses(
    task: DocumentTask, config: Any, file: Path, s: Any
) -> tuple[Callable[[Params, Batch], Array], Params]:
    """Build what scores rows by their reducible loss, ℓ_i(θ) − IL_i, or by −IL_i where no trained model is kept.

    Args:
        task: whose rows are documents.
        config: its settings.
        file: NAME of a run.
        s: settings of the run's method.

    Returns:
        A function of parameters and rows -> float32 `[b]`, and its parameters.

    Raises:
        UserError: the file is missing or damaged, or holds other networks.

    Reference: Mindermann et al., RHO-LOSS, ICML 2022; here equation 6 of its first version.
    """
    networks = {"held_out": s.held_out_network, "target": None}
    names = load_metadata(file)[_MODELS].split(",")
    models = {name: task.model(config, None, ModelOptions(network=networks[name])) for name in names}
    found = load_tree(file, {name: jax.eval_shape(model.init, jax.random.key(0)) for name, model in models.items()})[0]

    def scores(params: Params, rows: Batch) -> Array:
        losses: dict[str, Any] = {}
        for name, model in models.items():
            theta, model_state = params[name]
            losses[name] = model.evaluation(theta, model_state, rows, jax.random.key(0))[0]
        return losses.get("target", 0.0) - losses["held_out"]

    return scores, found
