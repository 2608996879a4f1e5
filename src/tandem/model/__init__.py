"""Models: loaded, prepared, asked and scored. Only this package knows transformers and peft."""
