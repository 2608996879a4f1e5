"""DPO of one recipe with several values of its settings, compared on the same held-out records."""
