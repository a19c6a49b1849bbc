"""Entry points, one for each experiment: `python -m experiments.NAME` from a clone."""
