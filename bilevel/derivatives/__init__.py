"""Losses of rows, gradient, alignments, Hessian products: `Forward`, `Finite`."""
