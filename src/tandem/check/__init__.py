"""What is in a data set, and what in it would spoil a training."""
