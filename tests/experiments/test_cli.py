"""Names of methods, and how a command ends."""

import errno

import pytest
from experiments.cli import chosen_methods
from experiments.language_modeling.config import DataConfig

from bilevel.types import UserError
from experiments import cli


def test_methods_by_name() -> None:
    known, everything = ("a", "b", "c"), ("a", "b")
    assert chosen_methods(None, "b, a,b", known, everything) == ["b", "a"]
    assert chosen_methods(None, "all", known, everything) == ["a", "b"]
    assert chosen_methods(None, "c,all", known, everything) == ["c", "a", "b"]
    assert chosen_methods("c", "all", known, everything) == ["c"]
    with pytest.raises(UserError, match='names the method "d", which does not exist: choose from all, a, b, c'):
        chosen_methods(None, "d", known, everything)
    with pytest.raises(UserError, match="--compare is empty"):
        chosen_methods(None, ",", known, everything)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/metrics.jsonl"), 2, ["a/metrics.jsonl", "make room"]),
        (UserError("This is wrong: change it."), 2, ["error: This is wrong: change it."]),
        (KeyboardInterrupt(), 130, ["Interrupted"]),
    ],
)
def test_what_ends_a_command(
    raised: BaseException, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: DataConfig) -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        cli.run(DataConfig, main, [])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert all(word in error for word in words)
