"""Labelled images and rows of features: sources, parts, faults."""
