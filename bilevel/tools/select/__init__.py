"""Selects the documents of any corpus that a trained weighting network prefers."""

from bilevel.tools.select.main import command as command
