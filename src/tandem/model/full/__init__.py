"""Full fine-tuning: all weights are trained, and a whole model is left."""
