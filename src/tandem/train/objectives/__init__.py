"""What a step minimises: from log-probs of sequences to a loss, and sums for the metrics."""
