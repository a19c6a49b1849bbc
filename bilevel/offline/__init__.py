"""Scores and networks that are learned or measured outside the step."""
