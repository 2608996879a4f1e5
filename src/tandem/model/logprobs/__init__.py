"""Log-probabilities of sequences."""
