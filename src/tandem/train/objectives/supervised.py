"""Supervised fine-tuning: the log-probs of trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.train.objectives.objective import LossSums, trained_tokens


class SupervisedObjective:
    """Negative log-likelihood per trained token of the step."""

    couples = False

    def __init__(self) -> None:
        self._sequences: Sequence[int] = ()  # of each of the step's examples
        self._tokens: Sequence[int] = ()

    def begin(self, examples: Sequence[Example], indices: Sequence[int]) -> int:
        """The step's trained tokens."""
        del indices
        self._sequences = [len(example.branches) for example in examples]
        self._tokens = [trained_tokens(example) for example in examples]
        return sum(self._tokens)

    def shares(self) -> Sequence[int]:
        """Each example's trained tokens."""
        return self._tokens

    def see_step(self, logps: Tensor) -> None:
        """Not called: every token counts for itself."""

    def loss(
        self, logps: Tensor, weights: Tensor, members: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of negative log-probs; see `Objective.loss`."""
        del first_step
        weighted = logps * weights
        loss = negative_log_likelihood(weighted)
        parts = [self._sequences[i] for i in members]
        return LossSums(loss, {"loss": loss.detach()}, -weighted.detach(), parts)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss per trained token."""
        return {"loss": sums["loss"] / sums["count"]}


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """Sum the negative log-probs of sequences [S], to be divided by the step's trained tokens."""
    return -logps.sum()


def probability_weighted(logps: Tensor) -> Tensor:
    """DFT (arXiv 2508.05629): each log-prob [N] times its probability, a constant."""
    return logps * logps.detach().exp()
