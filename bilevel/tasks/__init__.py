"""Tasks: each supplies data, a model with its losses, a weighting network and measures to the study layer."""
