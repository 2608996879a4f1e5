"""Losses: pure functions of the log-probs of answers. Nothing here knows models or data.

Recipes are read without torch, and they name losses; so these files import torch when a loss is
computed, and no sooner.
"""
