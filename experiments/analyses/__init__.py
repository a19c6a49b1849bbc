"""Analyses of learned weights: `python -m experiments.analyses --help`."""
