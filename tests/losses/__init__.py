"""Losses as functions of log-probs."""
