"""LoRA adapters: injected, saved, loaded."""
