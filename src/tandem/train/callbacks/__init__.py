"""What happens between the steps of a run: lines of metrics, scores, checkpoints, trackers."""
