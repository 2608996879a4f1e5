"""Attention over packed trees, in several forms."""
