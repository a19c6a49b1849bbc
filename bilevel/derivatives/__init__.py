"""Losses of rows, their gradient, alignments and Hessian products: `Forward`, `Finite`."""
