"""Shorten records that are too long."""
