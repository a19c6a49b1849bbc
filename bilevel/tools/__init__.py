"""Tools around a study, for every task."""
