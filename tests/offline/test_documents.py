"""The choice of documents by their scores."""

import numpy as np
from numpy.typing import NDArray

from bilevel.offline.documents import drawn_ranks, highest_documents


def test_the_choice_is_that_of_a_stable_sort() -> None:
    rng, values = np.random.default_rng(0), np.array([-3.5, -0.0, 0.0, 0.25, 1e-30, 7.0], np.float32)
    scores = [rng.choice(values, 20 * part).astype(np.float32) for part in range(5)]
    whole, owner = np.concatenate(scores), np.repeat(np.arange(5), [len(x) for x in scores])
    for count in (1, 2, 57, 100, 143, 199, 200):
        threshold, kept = highest_documents(scores, count)
        order = np.argsort(-whole, kind="stable")[:count]
        assert np.flatnonzero(np.concatenate(kept)).tolist() == sorted(order)
        assert [len(own) for own in kept] == np.bincount(owner, minlength=5).tolist()
        assert threshold == whole[order[-1]]


def test_documents_are_drawn_in_proportion() -> None:
    """The first draws follow the softmax of score / temperature; the noise of seeds and parts differs."""

    def drawn(seed: int, part: int, scores: list[float], temperature: float = 1.0) -> NDArray[np.float32]:
        return drawn_ranks(np.array(scores, np.float32), temperature, (seed, part))

    first = [int(np.argmax(drawn(seed, 4, [0.0, 2.0, 4.0], 2.0))) for seed in range(4000)]
    wanted = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    np.testing.assert_allclose(np.bincount(first, minlength=3) / 4000, wanted, atol=0.03)
    noise = drawn(1, 2, [0.0] * 1000)
    np.testing.assert_array_equal(noise, drawn(1, 2, [0.0] * 1000))
    for seed, part in ((2, 2), (1, 3)):
        assert abs(np.corrcoef(noise, drawn(seed, part, [0.0] * 1000))[0, 1]) < 0.15
