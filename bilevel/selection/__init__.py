"""From the big batch to the small one: scorers, filters, picking, scores from models or tables, metrics of the weights."""
