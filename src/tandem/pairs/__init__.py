"""Making preference pairs."""
