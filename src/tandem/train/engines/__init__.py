"""How processes share the work of a step."""
