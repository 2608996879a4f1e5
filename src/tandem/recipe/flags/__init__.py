"""Flags of the command line, made from the settings of a recipe."""
