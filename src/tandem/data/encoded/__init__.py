"""Encode records in several processes, keep them on disk, read them back."""
