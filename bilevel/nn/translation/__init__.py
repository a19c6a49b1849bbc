"""Encoder–decoders, their losses, beam search, and a weighting network over pairs of sentences."""
