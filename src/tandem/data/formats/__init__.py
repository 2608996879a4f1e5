"""Rows of known formats, as conversations, preference pairs and questions."""
