"""Data sets, and loaders whose order is a function of (seed, step)."""
