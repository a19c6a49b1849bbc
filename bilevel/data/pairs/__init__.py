"""Sentence pairs for translation: sources, tokenizers, and packing."""
