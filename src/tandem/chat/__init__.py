"""Talking to models in the terminal."""
