"""Stands for Habana's bridge: torch reports an HPU whose tensors stay on the CPU."""
