"""Errors in opening data name the flag that gave the path."""

import pytest

from bilevel.data import given_by, open_pairs, open_source
from bilevel.types import UserError


def test_the_flag_begins_the_sentence() -> None:
    with (
        pytest.raises(UserError, match=r"^--data\.generic: The file nosuch\.txt does not exist; check"),
        given_by("--data.generic"),
    ):
        open_source("nosuch.txt")


def test_another_flag_does_not_hide_it() -> None:
    """The languages are named as what may be wrong too, and the name of one begins with that of the other."""
    wanted = r"^--data\.source: The file a\.en does not exist \(.*--data\.source-language and"
    with pytest.raises(UserError, match=wanted), given_by("--data.source"):
        open_pairs("a.{en,fr}", source_language="en", target_language="fr")


def test_what_names_the_flag_stays_as_it_is() -> None:
    wanted = r"^The data specification \(--data\.generic, --data\.specific\) is empty"
    with pytest.raises(UserError, match=wanted), given_by("--data.generic"):
        open_source(" ")
