"""The supervised loss: negative log-likelihood of the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.errors import UserError
from tandem.train.losses.paired import sigmoid_loss


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """Sum of the negative log-probabilities of a micro-batch.

    The caller divides by the step's trained tokens, a number known before the first forward, so
    that micro-batches of any size add up to the same loss.

    Args:
        logps: summed log-probability of each sequence [S], float32 or float64.
    """
    return -logps.sum()


@dataclass(frozen=True)
class LossSums:
    """A micro-batch's share of a step: the loss to differentiate, not yet divided, and sums.

    The sums are scalars of one dtype that stay on the device, the loss among them: reading one
    would wait for all that is queued there.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Objective(Protocol):
    """Turns sequence log-probs into losses; the loop knows nothing else about a stage."""

    def denominator(self, trees: Sequence[Example]) -> int:
        """What the step's summed loss is divided by, known before its first forward."""
        ...

    def part(self, logps: Tensor, examples: Sequence[int], *, first_step: bool) -> LossSums:
        """The loss of a micro-batch's examples from their sequences' log-probs [S]."""
        ...

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Named averages from sums over one or more steps, `count` (denominators) among them."""
        ...


def sequence_tokens(tree: Example) -> list[int]:
    """Targets of each of a tree's sequences, those of the prefix counted for each."""
    shared = int(tree.prefix.trained.sum())
    return [shared + int(branch.trained.sum()) for branch in tree.branches]


def trained_tokens(tree: Example) -> int:
    """Targets of a tree over all its sequences."""
    return sum(sequence_tokens(tree))


class SupervisedObjective:
    """Negative log-likelihood per trained token of the step."""

    def denominator(self, trees: Sequence[Example]) -> int:
        """The step's trained tokens."""
        return sum(trained_tokens(tree) for tree in trees)

    def part(self, logps: Tensor, examples: Sequence[int], *, first_step: bool) -> LossSums:
        """Sum of negative log-probs; see `Objective.part`."""
        del examples, first_step
        loss = negative_log_likelihood(logps)
        return LossSums(loss, {"loss": loss.detach()})

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss per trained token."""
        return {"loss": sums["loss"] / sums["count"]}


class PreferenceObjective:
    """Sigmoid DPO (arXiv 2305.18290) averaged over the step's pairs.

    Args:
        reference: log-probs of every example's two answers under the reference [n, 2] float64.
        beta: strength of the pull towards the reference.
        relative_tolerance: of the step-0 check, what the precision in use explains.
    """

    _MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(
        self, reference: NDArray[np.float64], *, beta: float, relative_tolerance: float
    ) -> None:
        self.reference = torch.from_numpy(reference)
        self.beta = beta
        self.relative_tolerance = relative_tolerance

    def denominator(self, trees: Sequence[Example]) -> int:
        """The step's pairs."""
        return len(trees)

    def part(self, logps: Tensor, examples: Sequence[int], *, first_step: bool) -> LossSums:
        """Sum of the pairs' losses; in the first step, the step-0 check as well."""
        policy = logps.view(-1, 2)  # [P, 2] chosen, rejected
        reference, real = self._rows(examples, policy)
        if first_step:
            self._check_start(policy.detach(), reference)
        result = sigmoid_loss(
            policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=self.beta
        )
        margins = result.chosen_rewards - result.rejected_rewards
        # Pairs that only fill a declared shape up have zeros everywhere, and so a loss of ln 2.
        loss = (result.loss * real).sum()
        return LossSums(
            loss,
            {
                "loss": loss.detach(),
                "rewards/chosen": result.chosen_rewards.sum(),
                "rewards/rejected": result.rejected_rewards.sum(),
                "rewards/margins": margins.sum(),
                "rewards/accuracies": (margins > 0).to(margins.dtype).sum(),
                "logps/chosen": policy[:, 0].detach().sum(),
                "logps/rejected": policy[:, 1].detach().sum(),
            },
        )

    def _rows(self, examples: Sequence[int], policy: Tensor) -> tuple[Tensor, Tensor]:
        """The reference of the policy's rows [P, 2], and which of them are pairs [P], 1 or 0."""
        reference = torch.zeros(policy.shape, dtype=policy.dtype)
        reference[: len(examples)] = self.reference[list(examples)].to(policy.dtype)
        real = torch.zeros(len(policy), dtype=policy.dtype)
        real[: len(examples)] = 1.0
        return reference.to(policy.device), real.to(policy.device)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over pairs, under TRL's names."""
        names = ("loss", *self._MEANS, "logps/chosen", "logps/rejected")
        return {name: sums[name] / sums["count"] for name in names}

    def _check_start(self, policy: Tensor, reference: Tensor) -> None:
        # With B = 0 the policy is the reference: any other difference is a mistake that training
        # would silently build on.
        gap = (policy - reference).abs()
        allowed = self.relative_tolerance * (reference.abs() + 10.0)
        if bool((gap > allowed).any()):
            worst = int((gap - allowed).flatten().argmax())
            raise UserError(
                "step-0 check: before training, the policy must equal the reference, but a "
                f"log-probability is {float(policy.flatten()[worst]):.4f} under the policy and "
                f"{float(reference.flatten()[worst]):.4f} under the reference. Likely causes: an "
                "adapter that does not start at zero, trained parameters outside the adapter, "
                "dropout that is on, or a reference computed in another precision."
            )
