"""Which records a step has, how they are packed, and the tensors made of them."""
