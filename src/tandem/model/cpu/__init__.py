"""What only a processor does: C kernels, and products through oneDNN."""
