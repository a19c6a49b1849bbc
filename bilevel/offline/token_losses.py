"""The losses of all tokens of a corpus under one model, in a memory-mapped array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from bilevel.data.loading.arrays import Dataset
from bilevel.offline.irreducible import OnBatch, unwrapped
from bilevel.types import Array, Batch, ModelState, Params, TokenLosses, UserError

NAME = "tokens.npy"


def write_token_losses(
    folder: Path,
    tokens: TokenLosses,
    params: Params,
    model_state: ModelState,
    dataset: Dataset,
    *,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> None:
    """Compute the losses of all tokens, and write them to `folder`/tokens.npy.

    Args:
      folder: exists.
      tokens: the losses of tokens, in evaluation mode.
      params: of the model.
      model_state: of the model.
      dataset: rows with `id`; of a view only its rows are computed, and the others are 0.
      batch_size: rows evaluated at once.
      on_batch: called after each batch with the rows done, and their number in all.

    Writes:
      float16 `[N, T]` by `id`, 0 where nothing is predicted. N is the number of rows of the whole.

    Raises:
      UserError: a loss is not finite.
    """

    @jax.jit
    def evaluate(params: Params, model_state: ModelState, batch: Batch) -> Array:
        losses, real = tokens(params, model_state, batch, jax.random.key(0))
        return jax.numpy.where(real, losses, 0.0)

    found: Any = None
    for start in range(0, len(dataset), batch_size):
        # The last batch repeats the last row, so that one program serves all.
        batch = dataset.rows(np.minimum(np.arange(start, start + batch_size), len(dataset) - 1))
        values = np.asarray(evaluate(params, model_state, batch))
        if not np.isfinite(values).all():
            bad = int(batch["id"][~np.isfinite(values).all(axis=1)][0])
            raise UserError(f"{dataset.name}: a loss of row {bad} is not finite: check the model that scores it.")
        if found is None:
            shape = (len(unwrapped(dataset)[0]), values.shape[1])
            found = np.lib.format.open_memmap(folder / NAME, "w+", np.float16, shape)
        found[batch["id"]] = values
        if on_batch is not None:
            on_batch(min(start + batch_size, len(dataset)), len(dataset))
    if found is not None:
        found.flush()


def open_token_losses(folder: Path, rows: int) -> NDArray[np.float16]:
    """Open what `write_token_losses` wrote, float16 `[N, T]`; it stays on disk.

    Raises:
      UserError: it is missing, damaged, or of other rows.
    """
    try:
        found = np.load(folder / NAME, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The losses of tokens in {folder} are damaged ({error}): delete the folder.") from error
    if found.ndim != 2 or len(found) != rows:
        raise UserError(
            f"The losses of tokens in {folder} are of {len(found)} rows instead of {rows}: delete the folder."
        )
    return found
