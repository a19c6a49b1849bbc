"""Language modelling with learned data weights: `python -m experiments.language_modeling --help`."""
