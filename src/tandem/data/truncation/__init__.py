"""What a record that is too long loses."""
