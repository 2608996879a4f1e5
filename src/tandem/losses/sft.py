"""The supervised loss: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """Sum of the negative log-probabilities of a micro-batch.

    The caller divides by the step's trained tokens, a number known before the first forward, so
    that micro-batches of any size add up to the same loss.

    Args:
        logps: summed log-probability of each sequence [S], float32 or float64.
    """
    return -logps.sum()
