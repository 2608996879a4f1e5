"""What a run would do and take, before it starts."""
