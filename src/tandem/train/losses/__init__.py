"""Losses, and what a step minimises."""
