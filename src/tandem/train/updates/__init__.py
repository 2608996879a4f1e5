"""Update rules that torch does not have, or not in full precision, as torch optimizers."""
