"""Token-level selection: which tokens are chosen, what is trained on, and the losses of a reference model on disk."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.data import ArrayDataset, RowView, WithColumn
from bilevel.offline.token_losses import open_token_losses, write_token_losses
from bilevel.selection.tokens import most_excess, token_selection
from bilevel.types import UserError

ROWS, LENGTH = 6, 5


def tokens(params: Any, model_state: Any, batch: Any, rng: Any) -> Any:
    return params["w"] * batch["x"], jnp.arange(LENGTH) < batch["length"][:, None]


def rows() -> ArrayDataset:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(ROWS, LENGTH)).astype(np.float32),
        "length": np.asarray([5, 3, 1, 0, 5, 4], np.int32),
    }
    return ArrayDataset(arrays, name="rows")


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_the_chosen_tokens_are_those_of_the_largest_excess(share: float) -> None:
    rng = np.random.default_rng(1)
    losses, reference = rng.normal(size=(2, ROWS, LENGTH)).astype(np.float32)
    length = rows().arrays["length"]
    real = np.arange(LENGTH) < length[:, None]
    chosen = np.asarray(most_excess(jnp.asarray(losses), jnp.asarray(reference), jnp.asarray(real), share))
    for row in range(ROWS):
        count = int(np.ceil(share * length[row] - 1e-5))
        order = np.argsort(-(losses - reference)[row, : length[row]])[:count]
        np.testing.assert_array_equal(np.flatnonzero(chosen[row]), np.sort(order))


def test_rows_choose_by_themselves_and_pass_gradients_to_chosen_tokens() -> None:
    batch = {**rows().rows(np.arange(ROWS)), "reference": np.zeros((ROWS, LENGTH), np.float16)}
    loss = token_selection(tokens, 0.4)
    params = {"w": jnp.asarray(2.0)}
    whole, _ = loss(params, {}, batch, jax.random.key(0))
    for row in range(ROWS):  # micro-batches and devices select alike
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        np.testing.assert_allclose(loss(params, {}, one, jax.random.key(0))[0], whole[row : row + 1], rtol=1e-6)
    gradient = jax.grad(lambda p: loss(p, {}, batch, jax.random.key(0))[0][0])(params)["w"]
    top = np.sort(batch["x"][0])[-2:]  # two of five tokens
    np.testing.assert_allclose(gradient, top.mean(), rtol=1e-5)
    assert float(whole[3]) == 0.0, "an empty row"


def test_losses_of_tokens_stay_on_disk_and_come_with_their_rows(tmp_path: Path) -> None:
    data = rows()
    view = RowView(data, np.asarray([4, 0, 1]))
    write_token_losses(tmp_path, tokens, {"w": jnp.asarray(3.0)}, {}, view, batch_size=2)
    found = open_token_losses(tmp_path, ROWS)
    assert isinstance(found, np.memmap)
    real = np.arange(LENGTH) < data.arrays["length"][:, None]
    expected = np.where(real, 3 * data.arrays["x"], 0)
    expected[[2, 3, 5]] = 0  # not in the view
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    batch = WithColumn(view, "reference", found, "a").rows(np.asarray([2, 0]))
    np.testing.assert_array_equal(batch["reference"], found[[1, 4]])
    assert (
        WithColumn(view, "reference", found, "b").content_hash != WithColumn(view, "reference", found, "a").content_hash
    )


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        token_selection(tokens, 0.0)
    with pytest.raises(UserError, match="no array 'reference'"):
        token_selection(tokens, 0.5)({"w": jnp.ones(())}, {}, rows().rows(np.arange(2)), jax.random.key(0))
    with pytest.raises(UserError, match="has an array 'x' already"):
        WithColumn(rows(), "x", np.zeros((ROWS, 1)), "a")
    bad = {"w": jnp.asarray(np.nan)}
    with pytest.raises(UserError, match="a loss of row 0 is not finite"):
        write_token_losses(tmp_path, tokens, bad, {}, rows(), batch_size=4)
    with pytest.raises(UserError, match="damaged"):
        open_token_losses(tmp_path / "nowhere", ROWS)
