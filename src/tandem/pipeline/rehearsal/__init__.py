"""A whole run on a small random model and a few records, to find what would fail later."""
