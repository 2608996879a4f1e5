"""What texts say: languages, refusals, repeated and shared words."""
