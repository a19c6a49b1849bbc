"""Data sets in memory or on disk, and loaders whose order is a function of (seed, step)."""
