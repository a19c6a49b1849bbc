"""Meshes, shardings, and sums over a mapped axis."""
