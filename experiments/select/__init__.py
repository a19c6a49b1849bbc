"""Selects the documents of any corpus that a trained weighting network prefers."""
