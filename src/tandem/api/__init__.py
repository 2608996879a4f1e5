"""Tandem in Python: what `import tandem` has, above the same jobs as the command line."""
