"""Text: sources, packing, splits."""
