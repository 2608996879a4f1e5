"""Encoded records: made in several processes, kept on disk, read back."""
