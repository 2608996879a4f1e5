"""A small random model that stands in for a large one: its architecture, its tokenizer."""
