"""The library inside other people's engines."""
