"""How to train: the loop, its steps, optimizers, checkpoints. Knows no stages and no vendors."""
