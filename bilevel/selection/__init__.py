"""From the big batch to the small one: scorers, filters, picking, metrics."""
