"""What acceleration rates say."""

import pytest

from bilevel.offline.verdict import verdict


@pytest.mark.parametrize(
    ("sar", "gar", "words"),
    [
        (0.75, 0.75, "both are above chance"),
        (0.75, 0.55, "only SAR is above chance"),
        (0.25, 0.75, "only GAR is above chance"),
        (0.55, 0.45, "neither is above chance"),
    ],
)
def test_verdict(sar: float, gar: float, words: str) -> None:
    sentence = verdict(7, {"sar": sar, "sar_error": 0.03, "gar": gar, "gar_error": 0.03})
    assert words in sentence
    assert "After 7 steps" in sentence
    for text in ("chance is 50 %", "86.2 / 69.4 %", "78.1 / 68.2 %", "50.3 / 49.8 %", "Grangier et al., table 8"):
        assert text in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence
