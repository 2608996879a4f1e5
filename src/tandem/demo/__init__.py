"""The embedded demo: a tiny base model and its data."""
