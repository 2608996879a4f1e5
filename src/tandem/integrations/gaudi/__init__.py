"""Habana's Gaudi cards."""
