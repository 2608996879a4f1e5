"""A run folder's files as a page, a terminal table and a model card."""
