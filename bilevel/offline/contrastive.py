"""Contrastive data selection: rows whose loss falls most with fine-tuning.

    scores = score_gains(loss, (before, {}), (after, {}), generic, specific, batch_size=256, settings={"steps": 1000})
    scores.save("gains.safetensors")
    scores = load_gains("gains.safetensors", generic, specific)
    rows = RowView(generic, highest_fraction(scores, 0.1))    # training is resumed on these

`before` is pre-trained on the generic rows (phase i), `after` is `before` fine-tuned on the specific rows (ii); scoring and
choosing is (iii), and (iv) trains `before` on, with any training loop.

Reference: Moore and Lewis, ACL 2010; van der Wees et al., EMNLP 2017; Wang et al., WMT 2018; phases as in Grangier, Ablin,
Hannun, "Adaptive Training Distributions with Scalable Online Bilevel Optimization", section 2.
"""

from __future__ import annotations

from pathlib import Path

from bilevel.data.loading.arrays import Dataset
from bilevel.data.loading.views import rows_hash
from bilevel.offline.irreducible import OnBatch, score_rows
from bilevel.offline.loss_table import LossTable as LossTable
from bilevel.offline.loss_table import Settings
from bilevel.offline.loss_table import highest_fraction as highest_fraction
from bilevel.types import Array, Batch, LossAux, LossFn, ModelState, Params, UserError

SPECIFIC_HASH = "specific_hash"
"""Name, in the settings of a table of gains, of the hash of the specific rows."""


def score_gains(
    loss: LossFn,
    before: tuple[Params, ModelState],
    after: tuple[Params, ModelState],
    generic: Dataset,
    specific: Dataset,
    *,
    batch_size: int,
    settings: Settings,
    num_examples: int | None = None,
    on_batch: OnBatch | None = None,
) -> LossTable:
    """Score each generic row by its loss before minus its loss after fine-tuning.

    Args:
      loss: per-example losses, in evaluation mode; see `bilevel.offline.irreducible.score_rows`.
      before: parameters and model state of the model trained on generic rows.
      after: likewise, fine-tuned on the specific rows.
      generic: rows with `id`, int32 `[b]`; a `RowView` scores a part of the whole.
      specific: the rows of fine-tuning; only its hash is used.
      batch_size: rows evaluated at once.
      settings: kept with the scores; the specific rows' hash is added as `specific_hash`.
      num_examples: N; None takes the rows of the data set, or those of the whole for a `RowView`.
      on_batch: see `bilevel.offline.irreducible.score_rows`.

    Returns:
      float32 `[N]` by id, NaN for rows that are not in `generic`, with the hashes of both data sets.

    Raises:
      UserError: a batch size below 1, an id outside 0..N−1, or a score that is not finite.

    Reference: Grangier, Ablin, Hannun, section 2, phase iii.
    """

    def gains(params: Params, model_state: ModelState, batch: Batch, rng: Array) -> tuple[Array, LossAux]:
        first, second = (loss(*model, batch, rng)[0] for model in zip(params, model_state, strict=True))
        return first - second, LossAux(model_state, {})

    params, model_state = zip(before, after, strict=True)
    about = {**settings, SPECIFIC_HASH: rows_hash(specific)}
    return score_rows(
        gains, params, model_state, generic, batch_size=batch_size, settings=about, num_examples=num_examples,
        on_batch=on_batch,
    )  # fmt: skip


def load_gains(path: str | Path, generic: Dataset, specific: Dataset) -> LossTable:
    """Read a table of gains, if it is of these generic and these specific rows.

    Raises:
      UserError: the file is missing or no table, belongs to other generic rows, or was made for other specific rows or for none.
    """
    table = LossTable.load(path, content_hash=generic.content_hash, settings=None)
    found = table.settings.get(SPECIFIC_HASH)
    if found != (here := rows_hash(specific)):
        raise UserError(
            f"The scores in {path} were made for "
            + (f"other specific data (hash {found}, here {here})" if found else "no specific data")
            + ": score the generic data for these, or give those."
        )
    return table
