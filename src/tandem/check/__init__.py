"""Inspect a data set: what is in it, and what in it would harm training."""
