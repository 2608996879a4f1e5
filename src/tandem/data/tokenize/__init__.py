"""Turns to token ids, and the positions that are trained."""
