"""A Python that starts at once: forks of one process that has imported torch and tandem."""
